"""On a mesh a run computes what it computes on one device, and its programs move what the mesh implies, no more."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcpo_jax import config as config_lib
from gcpo_jax import learner, models, partition, sampler, scorer, slots, train
from gcpo_jax.checkpoint import Checkpoints
from gcpo_jax.tasks import arithmetic

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
T = 8


@pytest.fixture(autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def model(sizes=(1, 1, 1), kv_heads=8, layers=3) -> models.ModelConfig:
    """A micro model on a mesh of these sizes."""
    config = models.ModelConfig(
        family="qwen2",
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=kv_heads,
        head_dim=4,
        qkv_bias=True,
        tied_embeddings=True,
        eos_ids=(1,),
    )
    mesh = partition.make_mesh(config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))))
    return dataclasses.replace(config, layout=partition.make_layout(mesh, config)) if mesh.size > 1 else config


@functools.cache
def host_params(kv_heads=8, layers=3):
    """Numbers far from uniform distributions, on the host."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: np.float32(0.1 * rng.normal(size=s.shape)) + np.float32(s.ndim == 1),
        models.shapes(model((1, 1, 1), kv_heads, layers)),
    )


def placed(config, kv_heads=8, layers=3):
    params = host_params(kv_heads, layers)
    # A copy even where a host array could be lent: the update gives its buffers back.
    return (
        jax.tree.map(jnp.array, params)
        if config.layout is None
        else jax.device_put(params, config.layout.shardings(params))
    )


def batch(seed: int, N=16, S=24) -> learner.Batch:
    """Random ragged experience with targets of KL'."""
    rng = np.random.default_rng(seed)

    def ragged(rows, width):
        prompt = rng.integers(3, width, rows).astype(np.int32)
        return rng.integers(2, 40, (rows, width)).astype(np.int32), prompt

    prompts, prompt_lengths = ragged(N, S - T)
    completion = rng.integers(1, T + 1, N).astype(np.int32)
    mask = (np.arange(T)[None, :] < completion[:, None]).astype(np.float32)
    row = rng.permutation(N)[:8].astype(np.int32)
    contexts, context_lengths = ragged(8, 32 - T)
    completions = rng.integers(2, 40, (N, 1, T)).astype(np.int32)
    kl = learner.KlBatch(
        row=row,
        weight=np.full(8, 2, np.float32),
        contexts=scorer.Rows(contexts, context_lengths, None, completions[row], None, completion[row][:, None]),
        weight_x=np.ones((8, 1), np.float32),
        weight_phi=np.full((8, 1), 0.5, np.float32),
        phi_rest=rng.uniform(0, 0.02, (8, T)).astype(np.float32),
        old_logp=None,
    )
    return learner.Batch(
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        completions=completions,
        lengths=completion[:, None],
        weights=mask / completion[:, None].astype(np.float32) / N,
        mask=mask,
        advantages=rng.normal(size=N).astype(np.float32),
        rewards=rng.normal(size=N).astype(np.float32),
        real=np.arange(N) < N - 2,
        ref_logp=-rng.uniform(3.2, 4.2, (N, T)).astype(np.float32) * mask,
        old_logp=None,
        kl=kl,
    )


def settings(remat="none") -> config_lib.Config:
    return config_lib.Config(
        model=config_lib.Model(remat=remat),
        algorithm=config_lib.preset("gcpo"),
        rollout=config_lib.Rollout(group_size=2),
        learner=config_lib.Learner(micro_batch=8, learning_rate=1e-3, warmup=0.0),
    )


def updating(config, remat="none", **kind):
    """(the jitted update, the state before it)."""
    optimizer, _ = learner.make_optimizer(settings().learner, 10)
    state = learner.init_state(config, optimizer, placed(config, **kind))
    return learner.make_update(config, settings(remat), optimizer), state


@functools.cache
def five_updates(sizes, kv_heads=8):
    update, state = updating(model(sizes, kv_heads), kv_heads=kv_heads)
    rows = []
    for seed in range(5):
        state, metrics, details = update(state, batch(seed))
        rows.append([float(metrics[name]) for name in ("loss", "grad_norm", "kl", "kl_causal", "entropy")])
    return np.array(rows), np.asarray(details["logp"]), jax.device_get(state.params)


@pytest.mark.parametrize("sizes", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in MESHES[:3])], ids=str)
def test_five_updates_give_the_same_numbers_on_every_mesh(sizes):
    for ours, single in zip(five_updates(sizes)[:2], five_updates((1, 1, 1))[:2], strict=True):
        np.testing.assert_allclose(ours, single, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (1, 2, 4)], ids=str)
def test_five_updates_give_the_same_numbers_with_replicated_key_value_heads(sizes):
    np.testing.assert_allclose(five_updates(sizes, 2)[0], five_updates((1, 1, 1), 2)[0], atol=2e-5)


@functools.cache
def drawn(sizes, kv_heads=8):
    config = model(sizes, kv_heads)
    params = placed(config, kv_heads)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 40, rng.integers(3, 9)).tolist() for _ in range(5)]  # fewer than there are devices
    common = dict(n=2, max_new_tokens=6, eos_ids=(1,))
    greedy = sampler.generate(config, params, prompts, temperature=0.0, **common)
    random = sampler.generate(config, params, prompts, seed=3, **common)
    logp = scorer.score(config, params, prompts, [r[0][0] for r in random], width=6)
    return greedy, random, logp, scorer.last_hidden(config, params, prompts)


@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [((2, 2, 2), 8), pytest.param((1, 1, 8), 2, marks=pytest.mark.slow)]
    + [pytest.param(s, 8, marks=pytest.mark.slow) for s in MESHES[:3]],
    ids=str,
)
def test_tokens_and_log_probabilities_are_the_same_on_every_mesh(sizes, kv_heads):
    ours, single = drawn(sizes, kv_heads), drawn((1, 1, 1), kv_heads)
    for a, b in zip(ours[:2], single[:2], strict=True):
        assert [[t for t, _ in g] for g in a] == [[t for t, _ in g] for g in b]
        for x, y in zip((p for g in a for _, p in g), (p for g in b for _, p in g), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)
    np.testing.assert_allclose(ours[2], single[2], atol=2e-5)
    np.testing.assert_allclose(ours[3], single[3], atol=2e-5)


def collectives(hlo: str) -> dict[str, list[tuple[int, ...]]]:
    """{kind: shapes of the results} of a compiled program."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for result, kind in re.findall(r"= (\S+|\(.*?\)) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", hlo):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        found.setdefault(kind, []).extend(tuple(int(d) for d in s.split(",") if d) for s in shapes)
    return found


@functools.cache
def update_hlo(sizes, remat="none", layers=3) -> str:
    update, state = updating(model(sizes, layers=layers), remat, layers=layers)
    return update.lower(state, batch(0)).compile().as_text()


def stacked_shapes() -> set[str]:
    """Of the stacked matrices, whole, as HLO writes them."""
    return {f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(host_params()["layers"]) if x.ndim == 3}


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
def test_over_fsdp_the_update_gathers_a_layer_at_a_time_and_never_holds_a_whole_stack(remat):
    hlo = update_hlo((1, 8, 1), remat)
    gathered = [shape for shape in collectives(hlo)["all-gather"] if math.prod(shape) >= 32 * 32]
    matrices = {x.shape[1:] for x in jax.tree.leaves(host_params()["layers"]) if x.ndim == 3}
    assert {tuple(d for d in shape if d > 1) for shape in gathered} == matrices | {(40, 32)}
    # Neither a collective nor anything kept for the backward pass: a device's program has no array of that shape.
    assert not [shape for shape in stacked_shapes() if shape in hlo]


@pytest.mark.slow
def test_over_data_and_tensor_the_update_sums_and_gathers_no_parameter():
    for sizes in ((8, 1, 1), (1, 1, 8)):
        found = collectives(update_hlo(sizes))
        assert found["all-reduce"]
        assert max(map(math.prod, found.get("all-gather", [()]))) < 32 * 32
    assert not [shape for shape in stacked_shapes() if shape in update_hlo((1, 1, 8))]
    assert "all-reduce" not in collectives(update_hlo((1, 1, 1)))


@pytest.mark.slow
def test_decoding_moves_activations_and_no_parameters():
    config = model((2, 2, 2))
    ids, lengths = np.ones((8, 16), np.int32), np.full(8, 5, np.int32)
    numbers = np.arange(8, dtype=np.int32)
    prompts = slots.Prompts(ids, lengths, None, None, None)
    rows = partition.put_rows(config.layout, prompts, lengths, lengths, numbers, lengths > 0)
    how = dict(
        n=2,
        together=2,
        lanes=8,
        computed=8,
        width=16,
        max_new_tokens=4,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_ids=(1,),
    )
    lowered = slots.run.lower(config, placed(config), *rows, jax.random.key(0), **how)
    steps = [line for line in lowered.compile().as_text().splitlines() if "jit(run)/while/body/while" in line]
    found = collectives("\n".join(steps))
    assert found["all-reduce"]
    # The layers of the prefill are named without the second "while". Of a step: [B, n, ...], never [width, ...].
    assert {shape[-2] for kind in found.values() for shape in kind if len(shape) > 2} <= {2}


def cost(layers: int) -> tuple[int, float]:
    """Length of the program and processor seconds that compiling it takes."""
    update, state = updating(model(layers=layers), layers=layers)
    lowered = update.lower(state, batch(0))
    began = time.process_time()
    lowered.compile()
    return len(lowered.as_text()), time.process_time() - began


@pytest.mark.slow
def test_the_update_of_28_layers_is_compiled_in_the_time_of_4():
    cost(2)  # what only the first compilation does
    (few, few_s), (many, many_s) = cost(4), cost(28)
    assert many < 1.05 * few
    assert many_s < 1.3 * few_s


def test_a_state_saved_on_one_mesh_goes_on_on_another_and_on_one_device(tmp_path):
    optimizer, _ = learner.make_optimizer(settings().learner, 10)
    config = model((8, 1, 1))
    state = learner.init_state(config, optimizer, placed(config))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    for sizes in ((2, 2, 2), (1, 1, 1)):
        config = model(sizes)
        like = learner.init_state(config, optimizer, placed(config))
        restored, _ = checkpoints.restore(1, like)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, like))
    checkpoints.close()


@functools.cache
def recorded(preset: str, sizes, directory: pathlib.Path):
    """The rows of metrics.jsonl and completions.jsonl of a run of five updates, everything from loading to export."""
    workdir = directory / f"{preset}-{'-'.join(map(str, sizes))}"
    tiny = pathlib.Path(__file__).parents[1] / "configs" / "tiny_model"
    if not (directory / "model").exists():
        config = dataclasses.replace(models.read_config(tiny), hidden_size=32, intermediate_size=64, num_layers=2)
        config = dataclasses.replace(config, num_heads=8, num_kv_heads=8, head_dim=4)
        models.save_pretrained(directory / "model", config, models.init_params(config), source=tiny)
        rows = arithmetic.problems()[0][:12]
        (directory / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        # A random model has no right answers, but some have more digits than others.
        (directory / "digits.py").write_text(
            "def reward(p, completion, r): return sum(map(str.isdigit, completion)) / 8\n"
        )
    config = config_lib.Config(
        model=config_lib.Model(path=str(directory / "model")),
        data=config_lib.Data(
            path=str(directory / "problems.jsonl"),
            held_out=4,
            reward="digits.reward",
            directory=str(directory / "data"),
        ),
        rollout=config_lib.Rollout(queries=4, group_size=4, max_new_tokens=8, max_rows=64),
        contexts=config_lib.Contexts(cap=8),
        algorithm=config_lib.preset(preset),
        learner=config_lib.Learner(micro_batch=8, learning_rate=1e-3, warmup=0.0),
        mesh=config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))),
        evaluation=config_lib.Evaluation(problems=4, samples=2),
        train=config_lib.Train(total_steps=5, log_groups=4),
    )
    assert train.train(config, workdir)
    metrics, completions = (
        [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "completions")
    )
    return metrics, completions, models.load_pretrained(workdir / "policy")[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("preset", ["grpo", "gcpo"])
def test_a_run_of_five_steps_writes_the_same_numbers_on_every_mesh(preset, sizes, directory, monkeypatch):
    monkeypatch.syspath_prepend(str(directory))
    (ours, texts, policy), (single, single_texts, single_policy) = (
        recorded(preset, s, directory) for s in (sizes, (1, 1, 1))
    )
    sampled = [[(c["completion"], c["reward"]) for g in t for c in g["candidates"]] for t in (texts, single_texts)]
    assert sampled[0] == sampled[1] and len(sampled[0]) == 5 * 4 * 4
    assert len(ours) == len(single) == 6
    for row, other in zip(ours, single, strict=True):
        for name in row:
            if name.startswith(("reward/", "eval/")) or name in (
                "loss",
                "grad_norm",
                "kl",
                "kl_causal",
                "upsilon/mean",
            ):
                assert row[name] == pytest.approx(other[name], abs=2e-5), (row["step"], name)
    assert any(row.get("reward/std") for row in ours)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), policy, single_policy)

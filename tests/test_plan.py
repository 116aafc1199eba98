"""The plan against what runs really allocate and compile; what is refused, and that what it advises would fit."""

import collections
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from gcpo_jax import (
    advice,
    batching,
    estimate,
    hardware,
    learner,
    metrics,
    models,
    partition,
    plan,
    rollout,
    sampler,
    scorer,
    slots,
    workload,
)
from gcpo_jax import config as config_lib
from gcpo_jax.config import ConfigError
from gcpo_jax.evaluation import held_out
from gcpo_jax.models.architectures import ARCHITECTURES

ROOT = pathlib.Path(__file__).parent.parent
MODEL = models.ModelConfig("qwen2", 64, 32, 64, 2, 4, 2, 8, qkv_bias=True, eos_ids=(1,))
CPU = hardware.parse("cpu:8")


def config(mesh=(1, 1, 1), preset="gcpo", dtype="float32", **of_learner) -> config_lib.Config:
    """Two prompts of four candidates."""
    return config_lib.Config(
        model=config_lib.Model(dtype=dtype),
        rollout=config_lib.Rollout(queries=2, group_size=4, max_prompt_tokens=16, max_new_tokens=16, max_rows=16),
        contexts=config_lib.Contexts(cap=16),
        algorithm=config_lib.preset(preset),
        learner=config_lib.Learner(micro_batch=4, **of_learner),
        mesh=config_lib.Mesh(**dict(zip(partition.MESH_AXES, mesh, strict=True))),
    )


def on_device(tree) -> int:
    """Bytes that the arrays of a tree hold on the first device."""
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in jax.tree.leaves(x.addressable_shards[:1]))


@functools.cache
def laid_out(mesh, dtype="float32"):
    c = config(mesh, dtype=dtype)
    return c, estimate.with_layout(c, MODEL, partition.make_mesh(c.mesh))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize(
    "optimizer", [{}, {"moments_dtype": "bfloat16"}, {"optimizer": "adafactor"}], ids=["adamw", "bf16", "adafactor"]
)
def test_parameter_and_optimizer_bytes_are_those_that_a_run_allocates(mesh, optimizer):
    _, model = laid_out(mesh)
    c = config(mesh, **optimizer)
    params = models.init_params(model)
    if model.layout is not None:
        params = jax.device_put(params, model.layout.shardings(params))
    state = learner.init_state(model, learner.make_optimizer(c.learner, 100)[0], params)
    planned = estimate.resident(c, model)
    assert planned["parameters"] == on_device(state.params)
    assert planned["optimizer"] == on_device(state.opt_state)
    assert (planned["sampling copy"], planned["reference"]) == (0, planned["parameters"])


def test_the_sampling_copy_and_the_reference_are_counted_where_there_are_such():
    c, model = laid_out((1, 2, 2), "bfloat16")
    planned = estimate.resident(c, model)
    assert planned["sampling copy"] == planned["reference"] == planned["parameters"] // 2
    without = dataclasses.replace(c, algorithm=config_lib.preset("dr_grpo"))
    assert estimate.resident(without, model)["reference"] == 0


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)])
def test_cache_bytes_are_those_that_sampling_allocates(mesh):
    _, model = laid_out(mesh)
    shapes = sampler.Call(2, 16, 4, 2, 2, batching.Shape(1, 16, 0))
    call = workload.Call("sample", "sampler", rows=2, width=16, n=4, tokens=8, slots=shapes)
    params = models.init_params(model)
    if model.layout is not None:
        params = jax.device_put(params, model.layout.shardings(params))
    tokens = jnp.zeros((2, 16), jnp.int32)

    @jax.jit
    def caches(params):
        ready, running = models.prefill(model, params, tokens, jnp.full(2, 16))[1], models.init_cache(model, 2, 4, 8)
        return ready, jax.tree.map(jnp.copy, ready), running

    assert estimate.cache_bytes(model, call) == on_device(caches(params))


def shapes(calls) -> collections.Counter:
    def parts(call):
        return (*call.blocks, *call.trie) if call.slots is None else call.slots.shared[3:]

    return collections.Counter((k.program, (k.rows, k.width), k.n, k.tokens, k.rest, parts(k)) for k in calls)


def parts_of(given) -> tuple[int, int, int, int]:
    """Blocks and their tokens, prompts of a trie and its nodes, of a program's prompts."""
    blocks = (0, 0) if given.blocks is None else given.blocks.tokens.shape[1:]
    if given.trie is None:
        return (*blocks, 1, 0)
    groups, nodes = given.trie.place.shape
    return (*blocks, len(given.trie.node) // groups, nodes)


@pytest.mark.parametrize(
    ("preset", "attention"),
    [("gcpo", "causal"), ("gcpo_paper", "causal"), ("gcpo_paper", "block"), ("gcpo_loo", "block")],
)
def test_the_calls_are_those_that_a_real_actor_makes(preset, attention, monkeypatch):
    """Only the device programs are stood in for: batching, padding and phases are the run's own."""
    _, model = laid_out((1, 1, 1))
    c = config(preset=preset)
    c.contexts.attention = attention
    made = collections.Counter()

    def sampled(model_config, params, prompts, lengths, end, index, real, key, *, n, max_new_tokens, width, **_):
        made["sampler", (len(lengths), width), n, max_new_tokens, 0, parts_of(prompts)] += 1
        size = (len(lengths), n)
        return (
            np.broadcast_to(np.arange(n, dtype=np.int32)[:, None], (*size, max_new_tokens)),
            np.zeros((*size, max_new_tokens)),
            np.full(size, max_new_tokens),
        )

    def scored(model_config, params, rows, width, temperature):
        rest = rows.rows.shape[2] - width
        made["scorer", rows.prompts.shape, rows.rows.shape[1], width, rest, parts_of(rows)] += 1
        return np.zeros((*rows.lengths.shape, width), np.float32)

    def hidden(model_config, params, tokens, lengths):
        made["hidden", tokens.shape, 1, 0, 0, (0, 0, 1, 0)] += 1
        return np.ones((len(tokens), model_config.hidden_size), np.float32)

    monkeypatch.setattr(slots, "run", sampled)
    monkeypatch.setattr(scorer, "_row_logprobs", scored)
    monkeypatch.setattr(scorer, "_last_hidden", hidden)
    # Equal sequences are represented once: every one asked for is told apart here.
    monkeypatch.setattr(scorer, "dict", SimpleNamespace(fromkeys=lambda keys: list(keys)), raising=False)
    actor = rollout.Actor(c, model, {}, workload.Contexts(c))
    turns = iter(range(1000))
    rows = [{"id": str(b), "problem": str(b)} for b in range(c.rollout.queries)]
    exp = rollout.collect(actor, lambda *_: float(next(turns) % 2), rows, 0, metrics.Timers())
    batch = learner.make_batch(actor, {"a": 1}, exp)
    calls, planned = workload.step(c, model)
    assert any(k.rest for k in calls) == (preset != "gcpo")
    assert shapes(calls) == made and any(m for *_, (m, *_) in made) == (attention == "block")
    assert any(nodes for *_, (*_, nodes) in made) == (attention == "causal")
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), batch, planned)

    made.clear()
    problems = rows[:1] * c.evaluation.problems
    held_out.accuracy(actor, lambda *_: 1.0, lambda text: text, problems, c.evaluation.samples)
    calls = workload.evaluation(c, model)
    assert {k.phase for k in calls} == {"evaluate"} and c.evaluation.samples > 1
    assert shapes(calls) == made


def test_shorter_completions_shorten_what_is_decoded_and_not_what_memory_is_planned_for():
    c, model = laid_out((1, 1, 1))
    longest, _ = workload.step(c, model)
    mean, _ = workload.step(c, model, mean=3)
    assert {k.steps for k in longest if k.phase == "sample"} == {16}
    assert max(k.steps for k in mean if k.phase == "sample") <= 5
    assert [k.tokens for k in longest if k.phase == "sample"] == [k.tokens for k in mean if k.phase == "sample"]


@functools.cache
def report(mesh=(1, 2, 2)) -> dict:
    # What the instructions become afterwards changes no program's memory, and takes half of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types in its bias correction
            return plan.plan(config(mesh), MODEL, dataclasses.replace(CPU, count=4))
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def test_the_plan_compiles_the_real_programs_and_says_what_lies_where():
    found = report()
    assert (found["method"], found["mesh"]) == ("compiled", {"data": 1, "fsdp": 2, "tensor": 2})
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(models.shapes(MODEL)))
    update, *calls = found["programs"]
    assert {row["program"] for row in calls} == {
        "sample: sampler", "integrate: sampler", "contexts: sampler", "score: hidden", "score: scorer",
        "evaluate: sampler",
    }  # fmt: skip
    state = found["resident"]["parameters"] + found["resident"]["optimizer"] + found["batch"]
    assert abs(update["arguments"] / state - 1) < 0.02
    assert all(row["caches"] > 0 and row["temp"] > 0 for row in calls if "sampler" in row["program"])
    assert found["peak"] == max(row["peak"] for row in found["programs"])
    assert found["fits"] and found["headroom"] > 0.9 and found["changes"] == []
    json.dumps(found)
    assert "fits: " in plan.table(found) and "compiled by jaxlib" in plan.table(found)


def test_the_estimate_is_near_what_the_compiler_says():
    for row in report()["programs"]:
        assert 0.4 < row["estimated_peak"] / row["peak"] < 2.5, row


def test_the_causal_terms_cost_something_and_phases_that_do_not_happen_are_not_listed():
    found = report()
    assert found["gcpo_over_grpo"] > 0
    assert set(found["phases"]) == {"sample", "integrate", "contexts", "score", "update"}
    c = config((1, 1, 1), "dr_grpo")
    times = plan.seconds(c, estimate.with_layout(c, MODEL, partition.abstract_mesh(c.mesh, 1)), CPU.device, 8)
    assert set(times) == {"sample", "update"}


def small(topology: hardware.Topology, memory: float) -> hardware.Topology:
    return dataclasses.replace(topology, device=dataclasses.replace(topology.device, memory=memory))


def test_what_does_not_fit_is_refused_with_changes_that_would():
    c, model = config((1, 1, 1)), MODEL
    topology = hardware.parse("gpu:4xH200")
    whole = plan.plan(c, model, topology)
    assert whole["fits"] and whole["method"] == "estimated" and whole["formula"]
    tight = small(topology, 0.7 * whole["peak"])
    refused = plan.plan(c, model, tight)
    assert not refused["fits"] and refused["changes"]
    assert plan.table(refused).splitlines()[-len(refused["changes"]) - 1].startswith("does not fit: ")
    for sentence in refused["changes"]:
        change = dict(flag.removeprefix("--config.").split("=") for flag in sentence.split(": ", 1)[1].split())
        typed = {path: int(value) if value.isdigit() else value for path, value in change.items()}
        assert plan.plan(advice.changed(c, typed), model, tight)["fits"], sentence


def test_where_no_setting_helps_a_number_of_devices_is_named():
    c = config((1, 1, 1), dtype="bfloat16")
    [sentence] = plan.plan(c, ARCHITECTURES["Qwen2.5-7B"], hardware.parse("gpu:1xA100-80GB"))["changes"]
    assert sentence.startswith("no setting makes 1 such devices enough; 4 would do, with --config.mesh.fsdp=4 ")


def test_the_command_refuses_a_run_that_cannot_fit_with_exit_code_1_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "gcpo_jax.plan", "--config", str(ROOT / "configs" / "qwen7b.py")]
    command += ["--topology", "gpu:1xA100-80GB", "--config.mesh.tensor=1", "--config.learner.micro_batch=8"]
    done = subprocess.run([*command, "--json", tmp_path / "plan.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout and "devices" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert not found["fits"] and found["changes"] and found["parameters"] == 7_615_616_512


@pytest.mark.parametrize(
    ("name", "model", "count"),
    [("v5p:4x4x4", "v5p", 64), ("v5e:16x16", "v5e", 256), ("v6e:2x4", "v6e", 8), ("gpu:8xA100-80GB", "A100-80GB", 8)],
)
def test_a_topology_is_so_many_devices_of_a_model(name, model, count):
    assert (hardware.parse(name).model, hardware.parse(name).count) == (model, count)


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v4:2x2x1", "gpu:8xK80", "gpu:0xH200", "tpu", "cpu:0", "gpu:2xv5p", "v5p:4"]
)
def test_a_topology_that_nobody_knows_is_refused_with_those_that_are(name):
    with pytest.raises(ConfigError, match="v5p:4x4x4"):
        hardware.parse(name)


def test_the_peak_is_that_of_the_longest_name_that_fits():
    assert hardware.peak_flops("TPU v5") == 459e12
    assert hardware.peak_flops("TPU v5 lite") == 197e12
    assert hardware.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert hardware.peak_flops("cpu") is None


@pytest.mark.parametrize(("name", "size"), [("Qwen2.5-1.5B", 1_543_714_304), ("Qwen2.5-7B", 7_615_616_512)])
def test_published_sizes_have_the_published_number_of_parameters(name, size):
    assert sum(x.size for x in jax.tree.leaves(models.shapes(ARCHITECTURES[name]))) == size


@pytest.mark.parametrize(
    ("message", "used"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.50G of 15.75G hbm.", 33.5 * (1 << 30)),
        ("the total memory required for HLO temporaries (512.00G) exceeds available HBM (95.74G).", 1 << 39),
        ("out of memory", 0),
    ],
)
def test_what_the_compiler_would_have_needed_is_read_from_its_message(message, used):
    assert plan._used(message) == used


def test_a_program_that_the_tpu_compiler_refuses_is_too_large_and_not_an_error():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with gcpo_jax[tpu]")
    devices, _ = hardware.compile_devices(hardware.parse("v5e:2x2"))
    square = jax.ShapeDtypeStruct((1 << 18, 1 << 18), jnp.float32, sharding=SingleDeviceSharding(devices[0]))
    with pytest.raises(plan.OutOfMemory, match=r"768\.0 GiB"):
        plan.compiled_bytes(jax.jit(jnp.matmul).lower(square, square))


def test_a_tpu_slice_that_is_not_here_is_compiled_for():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with gcpo_jax[tpu]")
    c = config((1, 2, 2))
    topology = hardware.parse("v5e:2x2")
    with jax.numpy_dtype_promotion("standard"):
        found = plan.plan(c, MODEL, topology)
    assert found["method"] == "compiled" and "libtpu" in found["compiler"] and found["fits"]


def rows_of_the_page() -> list[tuple[str, str, str, str]]:
    """(recipe, topology, flags, plan) of docs/hardware.md."""
    text = (ROOT / "docs" / "hardware.md").read_text()
    found = re.findall(r"^\| (7B|1\.5B) \| [^|`]*(?:`([^`]+)` )?\| ([^|]*) \| \[json\]\(results/(\S+)\)", text, re.M)
    return [("qwen7b" if size == "7B" else "qwen1_5b", *rest) for size, *rest in found]


@pytest.mark.parametrize(("recipe", "topology", "flags", "file"), rows_of_the_page())
def test_every_recipe_of_the_page_fits_with_the_flags_that_stand_there(recipe, topology, flags, file):
    found = json.loads((ROOT / "docs" / "results" / file).read_text())
    given = dict(re.findall(r"--config\.([\w.]+)=(\d+)", flags))
    c = importlib.import_module(f"gcpo_jax.configs.{recipe}").get_config("gcpo")
    settings = config_lib.flatten(advice.changed(c, {name: int(value) for name, value in given.items()}))
    planned = ("mesh.", "rollout.", "algorithm.", "learner.", "contexts.", "model.dtype", "model.remat")
    assert {k: v for k, v in settings.items() if k.startswith(planned)}.items() <= found["settings"].items()
    assert found["fits"] and found["headroom"] >= 0.08
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and all(
        found[k] for k in ("command", "date", "machine", "jax")
    )
    assert topology in ("", found["topology"]) and found["method"] == (
        "estimated" if "gpu" in found["topology"] else "compiled"
    )

"""scripts/audit.py, which computes a step again with transformers: it agrees with runs, and it finds what is wrong."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="scripts/audit.py needs torch")

FILE = pathlib.Path("audit") / "step_000000.npz"
ROOT = pathlib.Path(__file__).parents[1]
PRESETS = ("gcpo_paper", "gcpo", "gcpo_loo")
NUMBERS = (
    "alpha", "weight_x", "kappa", "weight_phi", "z", "beta", "z_x", "temperature", "advantages", "z_phi",
    "upsilon", "scaled_advantages", "logp", "ref_logp", "p_q", "p_x", "p_phi", "projected", "loss",
)  # fmt: skip
# Runs of a script's main in a process that cannot import what is audited.
ALONE = """
import runpy, sys
for name in ("gcpo_jax", "jax", "flax"):
    sys.modules[name] = None
script, *runs = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
main = runpy.run_path(script)["main"]
sys.exit(max([main([run]) for run in runs]))
"""


def reward(prompt, completion, row):
    """A random model is never right, but the groups of this reward are mixed."""
    return float(sum(map(ord, completion)) % 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """Problems, and random models with weights large enough that outputs depend on what is read."""
    import jax
    import micro_model

    from gcpo_jax import models

    home = tmp_path_factory.mktemp("audit")
    problems = [{"problem": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 6) for b in range(2, 6)]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    for style in ("tiny", "chat"):
        plain = micro_model.write(home / "plain" / style, chat=style == "chat")
        config, params = models.load_pretrained(plain)
        params = jax.tree.map(lambda w: w * 6 if w.ndim > 1 else w, params)
        models.save_pretrained(home / style, config, params, source=plain)
    return home


def run(home: pathlib.Path, preset: str, model: str = "tiny", **changes) -> pathlib.Path:
    """A run of one audited step; `changes` are of the preset."""
    import jax

    from gcpo_jax import config as config_lib
    from gcpo_jax import train

    config = config_lib.Config(
        model=config_lib.Model(path=str(home / model)),
        data=config_lib.Data(
            path=str(home / "data.jsonl"), held_out=1, reward=f"{__name__}.reward", directory=str(home / "data")
        ),
        rollout=config_lib.Rollout(queries=3, group_size=4, max_new_tokens=6, temperature=0.9, max_rows=64),
        contexts=config_lib.Contexts(cap=5),
        algorithm=dataclasses.replace(config_lib.preset(preset), rollout_tokens=0 if preset == "gcpo_paper" else 4),
        learner=config_lib.Learner(micro_batch=12),
        evaluation=config_lib.Evaluation(problems=1, samples=1),
        train=config_lib.Train(total_steps=1, audit_steps=(0,)),
    )
    for name, value in changes.items():
        setattr(config.algorithm if hasattr(config.algorithm, name) else config.learner, name, value)
    workdir = home / "-".join([preset, model, *map(str, changes.values())])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types in its bias correction
        assert train.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def runs(home) -> dict[str, pathlib.Path]:
    """A run of each preset that the default suite looks at."""
    return {preset: run(home, preset) for preset in PRESETS}


@pytest.fixture
def audit(monkeypatch, capsys):
    """The script in this process: audit(run) -> the lines that are over their tolerance."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    main = importlib.import_module("audit").main

    def call(run: pathlib.Path) -> set[str]:
        code = main([str(run)])
        rows = [row.split() for row in capsys.readouterr().out.splitlines()]
        failed = {row[0] for row in rows if row and row[-1] == "NO"}
        assert code == bool(failed)
        return failed

    return call


@pytest.fixture
def changed(runs, tmp_path):
    """A copy of the run of a preset whose arrays a function has changed."""

    def make(preset: str, change) -> pathlib.Path:
        arrays = dict(np.load(runs[preset] / FILE))
        change(arrays)
        (tmp_path / FILE).parent.mkdir()
        (tmp_path / "config.json").write_text((runs[preset] / "config.json").read_text())
        np.savez(tmp_path / FILE, **arrays)
        return tmp_path

    return make


def agree_alone(*runs: pathlib.Path) -> None:
    command = [sys.executable, "-c", ALONE, str(ROOT / "scripts" / "audit.py"), *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  yes\n") >= 26 * len(runs)
    assert "  NO\n" not in done.stdout


def test_transformers_alone_agree_with_every_number_of_a_step(runs):
    agree_alone(*runs.values())


@pytest.mark.slow
def test_transformers_alone_agree_whatever_the_preset(home):
    others = ("gcpo_bayes", "gcpo_noise", "gcpo_centroid", "gcpo_no_adv", "gcpo_no_kl", "grpo", "dr_grpo", "gvpo")
    agree_alone(
        *(run(home, preset) for preset in others),
        run(home, "gcpo_loo", "chat"),
        run(home, "gcpo_paper", "chat", similarity="gaussian", aggregation="token_mean"),
        run(home, "gcpo_loo", similarity="euclidean", aggregation="constant", updates_per_batch=2),
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_the_audited_step_holds_all_the_work_there_is(runs, preset):
    arrays = np.load(runs[preset] / FILE)
    assert np.ptp(arrays["upsilon"]) > 0.1
    assert (arrays["projected"] > 0).any()
    assert (arrays["rollout_ids"] >= 0).any()
    assert arrays["logp"].shape == arrays["candidate_ids"].shape


@pytest.mark.parametrize("preset", ["gcpo", "gcpo_loo"])
def test_each_wrong_number_shows_on_its_own_line(changed, audit, preset):
    def change(arrays):
        for name in wrong:
            flat = arrays[name].reshape(-1).copy()
            flat[np.abs(flat).argmax()] += 1e-3
            arrays[name] = flat.reshape(arrays[name].shape)

    # Alternately: every second one, so that a line which follows its neighbour would be caught.
    wrong = NUMBERS[::2] if preset == "gcpo" else NUMBERS[1::2]
    assert audit(changed(preset, change)) == set(wrong)


def edit(name, at, value):
    """A change of one id, weight or reward at the first place where there is one."""

    def change(arrays):
        places = np.argwhere(arrays[name] > -1) if name.endswith("_ids") else np.argwhere(arrays[name] >= 0)
        place = tuple(places[at])
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value(arrays[name][place])

    return change


def other(token):
    return (token + 1) % 20 + 6


def swap_first_two(name):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][[0, 1]] = arrays[name][[1, 0]]

    return change


def swap_order(arrays):
    arrays["order"] = arrays["order"][:, ::-1].copy()


def longer_rollout(arrays):
    ids = arrays["rollout_ids"]
    arrays["rollout_ids"] = np.concatenate([ids, np.where(ids[..., :1] >= 0, 7, -1)], axis=-1)


def list_the_target(arrays):
    """The target's own ids stand where another candidate's stood, in one context."""
    b, i = np.argwhere(arrays["klc_weight"] > 0)[0]
    context = [int(t) for t in arrays["context_ids"][b, i, 0] if t >= 0]
    quoted = [[int(t) for t in c if t >= 0 and t != 5][-5:] for c in arrays["candidate_ids"][b]]
    k = next(k for k in range(len(quoted)) if k != i and quoted[k] and quoted[k] != quoted[i])
    at = next(s for s in range(len(context)) if context[s : s + len(quoted[k])] == quoted[k])
    context[at : at + len(quoted[k])] = quoted[i]
    arrays["context_ids"] = np.pad(arrays["context_ids"], [(0, 0)] * 3 + [(0, 8)], constant_values=-1)
    arrays["context_ids"][b, i, 0] = context + [-1] * (arrays["context_ids"].shape[-1] - len(context))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (edit("prompt_ids", 2, other), {"logp", "context_ids/query"}),
        (swap_first_two("prompt_ids"), {"logp", "context_ids/query"}),
        (edit("candidate_ids", 0, other), {"logp"}),
        (edit("candidate_ids", 0, lambda _: 5), {"candidate_ids"}),
        (edit("integrated_ids", 0, lambda _: 5), {"integrated_ids"}),
        (swap_first_two("integrated_ids"), {"context_ids"}),
        (edit("rewards", 0, lambda r: 1 - r), {"advantages"}),
        (swap_order, {"context_ids"}),
        (edit("context_ids", 1, other), {"context_ids"}),
        (list_the_target, {"context_ids", "context_ids/target", "p_x"}),
        (edit("rollout_ids", 0, other), {"z_x", "z_phi"}),
        (longer_rollout, {"rollout_ids"}),
        (edit("feature_ids", 0, other), {"feature_ids"}),
        (edit("klc_weight", 0, lambda w: 2 - w), {"klc_weight"}),
    ],
)
def test_wrong_ids_are_found(changed, audit, change, expected):
    assert audit(changed("gcpo", change)) >= expected


def test_a_candidate_equal_to_the_target_is_no_leak(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    ids = importlib.import_module("audit_ids")
    step = types.SimpleNamespace(prompts=[[1, 50, 4], [1, 60, 61, 4]])
    quoted = [[[7, 8], [7, 8], [9]], [[7], [8], [9]]]
    equal = ((0, 0), "", [1, 50, 2, 7, 8, 2, 9, 3, 30, 4], [[7, 8], [9], [30]])
    plain = ((1, 2), "", [1, 60, 61, 2, 7, 2, 8, 3, 30, 4], [[7], [8], [30]])
    leaking = ((0, 0), "", [1, 50, 2, 7, 8, 2, 9, 3, 30, 4], [[9], [30]])

    def faults(*rows):
        found = set()
        ids.check_contexts(step, None, quoted, rows, lambda ok, line, _: None if ok else found.add(line), "context_ids")
        return found

    assert faults(equal, plain) == set()
    assert faults(leaking) == {"context_ids/target"}

"""Rewards in training: batches, grading beside the device, workers that die, systems that cannot confine programs."""

import json
import os
import pathlib
import signal
import threading
import time

import micro_model
import numpy as np
import pytest

from gcpo_jax import config as config_lib
from gcpo_jax import metrics, models, rollout, tasks
from gcpo_jax.grading.workers import Worker
from gcpo_jax.tasks import code, sandbox
from gcpo_jax.tasks import math as math_task

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get("GCPO_DATA") or ROOT.parent / "shared" / "data")
SMOLLM2 = os.environ.get("GCPO_SMOLLM2", "")
ADD = {"id": "add", "problem": "Add.", "answer": "-", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}


def needs_sandbox():
    if missing := code.available():
        pytest.skip(f"no sandbox here: {missing}")


# A random model is never right. These rewards ask a question, hard or a program, that the completion's bytes choose;
# `plainly` knows the verdict, and has no workers.
def choice(completion: str) -> int:
    return sum(completion.encode()) % 12


def plainly(prompt, completion, row):
    return float(choice(completion) % 3 != 0)


def by_math_workers(prompts, completions, rows):
    asked = [choice(c) for c in completions]
    golds = [rf"\frac{{{k * k + (k % 3 == 0)}}}{{2}}" for k in asked]
    return math_task.grade_all([rf"\boxed{{\int_0^{{{k}}} x dx}}" for k in asked], golds)


def by_sandbox(prompts, completions, rows):
    right = [choice(c) % 3 != 0 for c in completions]
    programs = [f"import time\ntime.sleep(0.1)\ndef add(a, b):\n    return a + b + {int(not ok)}\n" for ok in right]
    return code.rewards(prompts, programs, [ADD] * len(programs))


@tasks.batched(by_math_workers)
def mathematics(prompt, completion, row):
    raise AssertionError("the batch form is there")


@tasks.batched(by_sandbox)
def programs(prompt, completion, row):
    raise AssertionError("the batch form is there")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """A random model, and problems for it."""
    home = tmp_path_factory.mktemp("workers")
    micro_model.write(home / "model", chat=True)
    rows = [{"problem": "a" * 15 * k, "answer": str(k)} for k in range(1, 9)]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def settings(home: pathlib.Path, reward: str, **data) -> config_lib.Config:
    return config_lib.Config(
        model=config_lib.Model(path=str(home / "model")),
        data=config_lib.Data(
            **{"path": str(home / "data.jsonl"), "held_out": 1, "reward": reward, "directory": str(home / "data")}
            | data
        ),
        rollout=config_lib.Rollout(queries=2, group_size=4, max_new_tokens=8, max_rows=4, max_prompt_tokens=600),
        contexts=config_lib.Contexts(cap=8),
        algorithm=config_lib.preset("gcpo"),
        learner=config_lib.Learner(learning_rate=1e-3, micro_batch=8),
        evaluation=config_lib.Evaluation(problems=1, samples=1),
        train=config_lib.Train(total_steps=2),
    )


def train(home: pathlib.Path, reward: str, name: str) -> list[dict]:
    """The rows of metrics.jsonl, without times and rates."""
    import jax

    from gcpo_jax import train as command

    with jax.numpy_dtype_promotion("standard"):  # optax mixes types in its bias correction
        assert command.train(settings(home, f"{__name__}.{reward}"), home / name)
    rows = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("time/", "tokens_per_s", "mfu"))} for r in rows]


@pytest.fixture(scope="module")
def plain_run(home) -> list[dict]:
    """Metrics of a run without reward workers."""
    rows = train(home, "plainly", "plain")
    assert rows[1]["frac_reward_zero_std"] < 1 and rows[1]["integrated/accuracy"] is not None
    return rows


@pytest.fixture(scope="module")
def actor(home) -> rollout.Actor:
    from gcpo_jax import train as command

    config = settings(home, "unused.unused")
    config.algorithm = config_lib.preset("gcpo_no_adv")  # candidates and integrated outputs, and no more
    model_config, params = models.load_pretrained(config.model.path)
    return rollout.Actor(config, model_config, params, command.make_contexts(config, model_config))


def collect(actor: rollout.Actor, reward) -> tuple[rollout.Experience, dict[str, float]]:
    """What a step on four problems saw, and its seconds; the sampler takes one problem a call."""
    timers = metrics.Timers()
    exp = rollout.collect(actor, reward, [{"id": str(k), "problem": f"{k}+1="} for k in range(4)], 0, timers)
    return exp, timers.read()


@pytest.fixture(scope="module")
def plain(actor) -> tuple[list, list]:
    """Rewards of candidates and integrated outputs, without workers."""
    exp, _ = collect(actor, plainly)
    assert exp.active.any() and all(len(r) == 2 for r in exp.integrated_rewards)
    assert exp.rewards.tolist() == [[plainly("", text, {}) for text in group] for group in exp.texts]
    return exp.rewards.tolist(), exp.integrated_rewards


@pytest.fixture
def kill_math_workers(monkeypatch):
    """Three workers get their question and die before they can answer it."""
    asked, killed, ask = [], [], Worker.ask

    def ask_and_kill(worker, question, limit_s):
        asked.append(question)
        if len(asked) in (1, 4, 9):
            os.kill(worker.process.pid, signal.SIGSTOP)  # so that it cannot have answered
            killed.append(worker.process.pid)
            threading.Timer(0.05, os.kill, (worker.process.pid, signal.SIGKILL)).start()
        return ask(worker, question, limit_s)

    monkeypatch.setattr(Worker, "ask", ask_and_kill)
    yield
    assert len(killed) == 3 and not set(killed) & set(math_task._POOL.pids)


@pytest.fixture
def kill_sandbox(monkeypatch):
    """Two sandboxes die, with all that is in them, while a program sleeps there."""
    needs_sandbox()
    begun, killed, begin = [], [], sandbox.Sandbox._begin

    def begin_and_kill(box, *given):
        trial = begin(box, *given)
        begun.append(trial)
        if len(begun) in (2, 12) and box.process:
            killed.append(box.process.pid)
            threading.Timer(0.05, os.kill, (box.process.pid, signal.SIGKILL)).start()
        return trial

    monkeypatch.setattr(sandbox.Sandbox, "_begin", begin_and_kill)
    yield
    assert len(set(killed)) == 2 and any(trial.attempt for trial in begun)


def test_math_workers_killed_in_the_middle_change_no_reward(actor, plain, kill_math_workers):
    exp, _ = collect(actor, mathematics)
    assert (exp.rewards.tolist(), exp.integrated_rewards) == plain


def test_a_sandbox_killed_in_the_middle_changes_no_reward(actor, plain, kill_sandbox):
    exp, _ = collect(actor, programs)
    assert (exp.rewards.tolist(), exp.integrated_rewards) == plain


@pytest.mark.slow
def test_math_workers_killed_in_the_middle_change_nothing_in_the_metrics(home, plain_run, kill_math_workers):
    assert train(home, "mathematics", "mathematics") == plain_run


@pytest.mark.slow
def test_a_sandbox_killed_in_the_middle_changes_nothing_in_the_metrics(home, plain_run, kill_sandbox):
    assert train(home, "programs", "programs") == plain_run


def test_candidates_are_graded_while_others_are_sampled(actor, plain, monkeypatch):
    begun, added = threading.Event(), []

    def many(prompts, completions, rows):
        begun.set()
        return [plainly("", c, {}) for c in completions]

    @tasks.batched(many)
    def reward(prompt, completion, row): ...

    class Watched(tasks.Grading):
        def add(self, group, *given):
            super().add(group, *given)
            # The sampler has results to collect yet: only a grading that runs beside it can begin.
            assert begun.wait(20)
            added.append(group)

    monkeypatch.setattr(tasks, "Grading", Watched)
    exp, seconds = collect(actor, reward)
    assert sorted(added[:4]) == [0, 1, 2, 3]
    assert (exp.rewards.tolist(), exp.integrated_rewards) == plain
    assert seconds["time/reward_busy_s"] > 0 and seconds["time/reward_s"] < seconds["time/sample_s"]


def test_a_step_waits_for_what_the_device_leaves_of_the_grading():
    @tasks.batched(lambda prompts, completions, rows: time.sleep(0.2) or [1.0] * len(rows))
    def slow(prompt, completion, row): ...

    with tasks.Grading(slow) as grading:
        grading.add(0, "p", ["a"], {})
        time.sleep(0.3)  # the device's work
        began = time.perf_counter()
        assert grading.wait()[0].tolist() == [1.0]
        assert time.perf_counter() - began < 0.1 and grading.seconds >= 0.2


def test_groups_come_back_under_their_numbers_and_only_once():
    @tasks.batched(lambda prompts, completions, rows: [float(c) for c in completions])
    def reward(prompt, completion, row): ...

    with tasks.Grading(reward) as grading:
        for group in (5, 0, 3):
            grading.add(group, "p", [f"{group}", f"{group}.5"], {})
        assert {k: v.tolist() for k, v in grading.wait().items()} == {k: [k, k + 0.5] for k in (0, 3, 5)}
        assert grading.wait() == {}
        grading.add(3, "p", ["7"], {})
        assert {k: v.tolist() for k, v in grading.wait().items()} == {3: [7.0]}


def test_a_reward_without_a_batch_form_is_called_in_the_main_thread_in_the_order_of_the_groups():
    calls = []

    def reward(prompt, completion, row):
        calls.append((completion, threading.current_thread() is threading.main_thread()))
        return len(calls)

    with tasks.Grading(reward) as grading:
        for group in (2, 0, 1):
            grading.add(group, "p", [f"{group}a", f"{group}b"], {})
        assert not calls
        values = grading.wait()
    assert calls == [(f"{group}{part}", True) for group in range(3) for part in "ab"]
    assert {k: v.tolist() for k, v in values.items()} == {0: [1, 2], 1: [3, 4], 2: [5, 6]}


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_reward_that_fails_in_the_thread_stops_whoever_waits(value):
    @tasks.batched(lambda prompts, completions, rows: [value])
    def reward(prompt, completion, row): ...

    with pytest.raises(tasks.RewardError, match="row 'x', completion 'c'"), tasks.Grading(reward) as grading:
        grading.add(0, "p", ["c"], {"id": "x"})
        grading.wait()


def test_the_batch_form_of_a_reward_is_its_rows_one_by_one():
    needs_sandbox()
    right, half = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a + 2"
    cases = {
        "tasks.math.reward": (
            [r"\boxed{\frac{1}{2}}", "60%", "7"],
            [{"answer": "0.5"}, {"answer": "61"}, {"answer": "8"}],
        ),
        "tasks.code.reward": ([right, half, "no"], [ADD] * 3),
        "tasks.code.fraction": ([right, half, "no"], [ADD] * 3),
    }
    expected = {"tasks.math.reward": [1, 0, 0], "tasks.code.reward": [1, 0, 0], "tasks.code.fraction": [1, 0.5, 0]}
    for path, (completions, rows) in cases.items():
        reward = tasks.resolve_reward(path)
        assert [reward("p", c, row) for c, row in zip(completions, rows, strict=True)] == expected[path]
        assert tasks.score(reward, ["p"] * 3, completions, rows).tolist() == expected[path]


@pytest.fixture
def unconfined(monkeypatch):
    """A system without system call filters."""
    broken = sandbox.START.replace("; ", "\n").replace(
        "zygote.main", "from sandbox import seccomp\nseccomp.supported = lambda: False\nzygote.main"
    )
    boxes = {unsafe: sandbox.Sandbox(start=broken, unsafe=unsafe) for unsafe in (False, True)}
    monkeypatch.setattr(sandbox, "_shared", boxes)
    yield
    for box in boxes.values():
        box.close()


@pytest.mark.parametrize("name", ["reward", "fraction"])
def test_programs_are_not_run_where_they_cannot_be_confined_unless_the_user_says_so(unconfined, name):
    with pytest.raises(config_lib.ConfigError, match=r"tasks\.code.*missing: .*system call filter.*data\.unsafe=True"):
        tasks.resolve_reward(f"tasks.code.{name}")
    reward = tasks.resolve_reward(f"tasks.code.{name}", unsafe=True)
    completions = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return 4"]
    assert tasks.score(reward, ["p"] * 2, completions, [ADD] * 2).tolist() == [1.0, 0.0]
    assert reward("p", completions[0], ADD) == 1.0
    assert tasks.resolve_reward("tasks.math.reward") is math_task.reward  # which runs none


def test_a_run_that_cannot_confine_programs_ends_before_anything_else_unless_told_to_go_on(unconfined, home):
    from gcpo_jax import train as command

    (home / "empty.jsonl").touch()
    path = str(home / "empty.jsonl")
    with pytest.raises(config_lib.ConfigError, match=r"data\.unsafe=True"):
        command.train(settings(home, "tasks.code.reward", path=path), home / "refused")
    with pytest.raises(tasks.DataError, match="has no rows"):  # which is looked at later
        command.train(settings(home, "tasks.code.reward", path=path, unsafe=True), home / "refused")
    assert not (home / "refused").exists()


FILES = {
    "math": ("math_train.jsonl.gz", {"reward": "tasks.math.reward"}),
    "mbpp": (
        "mbpp.jsonl",
        {"reward": "tasks.code.fraction", "problem_field": "prompt", "answer_field": "canonical_solution"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_three_steps_on_real_problems(home, name):
    """With SmolLM2 where GCPO_SMOLLM2 names its directory, else with the random model."""
    import jax

    from gcpo_jax import train as command

    file, data = FILES[name]
    if not (DATA / file).exists():
        pytest.skip(f"no {DATA / file}: set GCPO_DATA")
    if name == "mbpp":
        needs_sandbox()
    config = settings(home, **data | {"path": str(DATA / file), "held_out": 8})
    config.train.total_steps, config.rollout.max_new_tokens = 3, 32
    config.model.path = SMOLLM2 or config.model.path
    with jax.numpy_dtype_promotion("standard"):
        assert command.train(config, home / name)
    rows = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()][1:]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(np.isfinite(row["loss"]) for row in rows)
    assert all(0 <= row["reward/mean"] <= 1 and row["time/reward_busy_s"] > 0 for row in rows)

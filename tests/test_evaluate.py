"""The command from files to table, on a random model and problems made on the spot."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import micro_model
import pytest

from gcpo_jax import evaluate, models
from gcpo_jax.config import ConfigError, Contexts, Mesh
from gcpo_jax.evaluation import forms, store, table
from gcpo_jax.evaluation.settings import EvalConfig, Input, Policy, Prompts, Sampling, stored
from gcpo_jax.tasks import DataError, benchmarks

SAMPLES, PROBLEMS = 4, 6
# A random model has no right answers, but some completions are longer than others.
REWARD = "def reward(prompt, completion, row): return float(len(completion) % int(row['answer']) == 0)\n"
REWARD += "def answer(completion): return str(len(completion) % 3)\n"
QUIET = {"report": lambda text: None}


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A directory with a model, problems, a reward, and a cache."""
    path = tmp_path_factory.mktemp("evaluate")
    micro_model.write(path / "model", chat=True)
    settings = json.loads((path / "model" / "config.json").read_text())
    (path / "model" / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 32768}))
    rows = [{"id": f"p{k}", "problem": f"What is {k} plus {k}?", "answer": str(2 + k % 2)} for k in range(PROBLEMS)]
    (path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "lengths.py").write_text(REWARD)
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
    patch.syspath_prepend(str(path))
    yield path
    patch.undo()


def settings(micro, **changes):
    """Batches of two problems, so that there are three; every prompt is as long, so that one program is compiled."""
    config = EvalConfig(
        benchmarks=str(micro / "problems.jsonl"),
        reward="lengths.reward",
        model=Policy(path=str(micro / "model"), dtype="float32"),
        sampling=Sampling(samples=SAMPLES, max_new_tokens=8, max_rows=2, temperature=1.5, top_p=1.0),
        prompts=Prompts(answer="{problem} Answer:"),
        contexts=Contexts(cap=8),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def whole(micro):
    """The directory of an evaluation that was left alone."""
    said = []
    evaluate.evaluate(settings(micro), micro / "whole", said.append)
    assert [line.partition("problems.jsonl ")[2].partition(" ")[0] for line in said[1:]] == ["2/6", "4/6", "6/6"]
    assert all(line.endswith(" left") and "tokens/s" in line for line in said[1:])
    return micro / "whole"


@pytest.fixture
def copy(whole, tmp_path):
    """The same, to be changed."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))


def lines(workdir, name):
    return (workdir / name).read_text().splitlines(keepends=True)


def drawn(workdir):
    """Completions by key, without the time that they took."""
    rows = store.read(workdir / "completions.jsonl")
    return {key: {k: v for k, v in row.items() if k != "seconds"} for key, row in rows.items()}


def no_sampling(*args, **kwargs):
    raise AssertionError("sampled")


def test_every_sample_of_every_problem_is_kept_and_counted(whole):
    completions, grades = (store.read(whole / name) for name in ("completions.jsonl", "grades.jsonl"))
    assert (
        len(lines(whole, "completions.jsonl")) == len(completions) == PROBLEMS * SAMPLES
        and completions.keys() == grades.keys()
    )
    assert len({row["completion"] for row in completions.values()}) > PROBLEMS  # samples differ
    right = [row["correct"] for row in grades.values()]
    assert 0 < sum(right) < len(right)
    (line,) = table.read(whole)
    assert line.accuracy[0] == pytest.approx(sum(right) / len(right)) and line.accuracy[1] > 0
    assert line.pass_at[SAMPLES][0] == len({key[1] for key, row in grades.items() if row["correct"]}) / PROBLEMS
    assert line.truncated == sum(not row["finished"] for row in completions.values()) / len(right)
    assert line.tokens == sum(row["tokens"] for row in completions.values()) / len(right) <= 8
    text = (whole / "table.md").read_text()
    assert "| problems  | 6 " in text and f"{100 * line.accuracy[0]:.1f} ± {100 * line.accuracy[1]:.1f}" in text
    assert json.loads((whole / "results.json").read_text())[0]["accuracy"] == list(line.accuracy)


def test_the_table_is_a_function_of_what_is_stored(copy, whole, micro):
    for name in ("completions.jsonl", "grades.jsonl"):
        shuffled = lines(copy, name)
        random.Random(0).shuffle(shuffled)
        (copy / name).write_text("".join(shuffled))
    (copy / "table.md").unlink()
    evaluate.finish(copy)
    assert (copy / "table.md").read_bytes() == (whole / "table.md").read_bytes()
    assert (copy / "results.json").read_bytes() == (whole / "results.json").read_bytes()


@pytest.mark.parametrize("whole_batches", [0, 1, 2])
@pytest.mark.parametrize("cut", ["completions", "grades"])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_table(
    micro, whole, tmp_path, monkeypatch, whole_batches, cut
):
    workdir, append, written = tmp_path / "killed", store.append, []

    def torn(file, rows):
        """Half of a write, then nothing."""
        if file.name == f"{cut}.jsonl" and len(written) == 2 * whole_batches + (cut == "grades"):
            rows = list(rows)
            append(file, rows[: len(rows) // 2])
            with file.open("a") as out:
                out.write(json.dumps(rows[len(rows) // 2])[:40])
            raise KeyboardInterrupt
        written.append(file)
        append(file, rows)

    monkeypatch.setattr(store, "append", torn)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(settings(micro), workdir, **QUIET)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="are missing or not graded; the same command again goes on"):
        table.read(workdir)
    said = []
    evaluate.evaluate(settings(micro), workdir, said.append)
    stored_batches = whole_batches + (cut == "grades")
    assert said == [] if stored_batches == 3 else said[0].startswith(f"{stored_batches} of 3 batches are there")
    assert (workdir / "table.md").read_bytes() == (whole / "table.md").read_bytes()
    assert (workdir / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert drawn(workdir) == drawn(whole)


def test_the_same_command_again_samples_nothing(micro, copy, monkeypatch):
    monkeypatch.setattr(forms, "sample", no_sampling)
    monkeypatch.setattr(models, "load_pretrained", no_sampling)
    before = lines(copy, "completions.jsonl")
    evaluate.evaluate(settings(micro), copy, **QUIET)
    assert lines(copy, "completions.jsonl") == before


def test_how_many_are_sampled_at_a_time_and_which_others_are_asked_changes_nothing(micro, whole, tmp_path):
    more = dataclasses.replace(settings(micro).sampling, max_rows=64)
    (micro / "other.jsonl").write_text(json.dumps({"problem": "What is 8 plus 9?", "answer": "2"}) + "\n")
    both = f"{micro / 'other.jsonl'},{micro / 'problems.jsonl'}"
    evaluate.evaluate(settings(micro, sampling=more, benchmarks=both), tmp_path / "both", **QUIET)
    here = {key: row for key, row in drawn(tmp_path / "both").items() if "problems" in key[0]}
    assert here == drawn(whole)
    assert (tmp_path / "both" / "table.md").read_text().count("\n") == 4


def test_a_larger_limit_adds_to_a_smaller_one(micro, whole, tmp_path):
    for limit in (2, 3):
        evaluate.evaluate(settings(micro, limit=limit), tmp_path / "w", **QUIET)
        assert (
            len(drawn(tmp_path / "w")) == limit * SAMPLES
            and f"| {limit}        |" in (tmp_path / "w" / "table.md").read_text()
        )
    assert drawn(tmp_path / "w").items() < drawn(whole).items()
    evaluate.evaluate(settings(micro, limit=2), tmp_path / "w", **QUIET)
    assert "| 2        |" in (tmp_path / "w" / "table.md").read_text()


def test_eight_devices_give_what_one_gives(micro, whole, tmp_path):
    evaluate.evaluate(settings(micro, mesh=Mesh(data=4, fsdp=2)), tmp_path / "mesh", **QUIET)
    assert (tmp_path / "mesh" / "table.md").read_bytes() == (whole / "table.md").read_bytes()
    assert drawn(tmp_path / "mesh") == drawn(whole)


def test_greedy_samples_are_the_same_as_each_other(micro, tmp_path):
    greedy = dataclasses.replace(settings(micro).sampling, temperature=0.0, samples=2)
    evaluate.evaluate(settings(micro, sampling=greedy, limit=1), tmp_path / "w", **QUIET)
    assert len({row["completion"] for row in drawn(tmp_path / "w").values()}) == 1


def test_stored_completions_are_graded_again_without_model_or_sampling(micro, copy, monkeypatch):
    monkeypatch.setattr(forms, "sample", no_sampling)
    hidden = (micro / "model").rename(micro / "elsewhere")
    try:
        evaluate.regrade(copy, {"reward": "tasks.math.reward"})
        (line,) = table.read(copy)
        assert line.accuracy == (0.0, 0.0) and stored(copy).reward == "tasks.math.reward"
        (again,) = evaluate.regrade(copy, {"reward": "lengths.reward"})
    finally:
        hidden.rename(micro / "model")
    assert again.accuracy[0] > 0 and len(lines(copy, "grades.jsonl")) == PROBLEMS * SAMPLES
    evaluate.evaluate(settings(micro), copy, **QUIET)


def test_what_would_mix_two_evaluations_is_refused(micro, copy, monkeypatch):
    other = dataclasses.replace(settings(micro).sampling, temperature=0.7)
    with pytest.raises(ConfigError, match=r"sampling.temperature was 1.5, is 0.7"):
        evaluate.evaluate(settings(micro, sampling=other), copy, **QUIET)
    weights = micro / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    try:
        with pytest.raises(ConfigError, match=r"completions of other weights than model.path has now"):
            evaluate.evaluate(settings(micro), copy, **QUIET)
    finally:
        weights.write_bytes(content)
    file = micro / "problems.jsonl"
    text = file.read_text()
    try:
        file.write_text(text.replace('"answer": "3"', '"answer": "4"'))
        with pytest.raises(ConfigError, match=r"graded by other answers .*: --regrade does"):
            evaluate.evaluate(settings(micro), copy, **QUIET)
        evaluate.regrade(copy, {})
        file.write_text(text.replace("plus", "minus"))
        with pytest.raises(ConfigError, match="to other problems of"):
            evaluate.evaluate(settings(micro), copy, **QUIET)
        with pytest.raises(ConfigError, match="to other problems of"):
            evaluate.regrade(copy, {})
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"benchmarks": "aime"}, "benchmarks='aime': must be one of aime24"),
        ({"benchmarks": " ,"}, "benchmarks=' ,': must name one of"),
        ({"limit": -1}, "limit=-1: must be at least 0"),
        ({"reward": "lengths.nothing"}, "has no function 'nothing'"),
        ({"model": Policy(path="nowhere")}, "model.path='nowhere': nowhere/config.json does not exist"),
        ({"input": Input(form="z")}, "input.form='z': must be one of q, x, projected"),
        ({"sampling": Sampling(max_new_tokens=40000)}, "that is past the model's 32768 positions; at most 327"),
        ({"mesh": Mesh(data=0)}, "mesh.data=0: must be at least 1"),
        ({"prompts": Prompts(answer="?")}, "prompts.answer='?': must contain {problem}"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(micro, tmp_path, changes, said):
    with pytest.raises((ConfigError, DataError)) as error:
        evaluate.evaluate(settings(micro, **changes), tmp_path / "w", **QUIET)
    assert said in str(error.value) and not (tmp_path / "w").exists()


def hand_made(workdir, correct, benchmark="b"):
    """An evaluation with these samples right, correct[problem][sample]."""
    workdir.mkdir()
    known = {"title": benchmark, "form": "answer", "digest": "", "questions": "", "places": list(range(len(correct)))}
    state = {
        "policy": "",
        "style": "chat",
        "samples": len(correct[0]),
        "asked": [benchmark],
        "benchmarks": {benchmark: known},
    }
    (workdir / "state.json").write_text(json.dumps(state))
    (workdir / "config.json").write_text(json.dumps({"config": {"model.path": workdir.name, "limit": 0}}))
    keys = [
        {"benchmark": benchmark, "problem": i, "sample": s} for i, row in enumerate(correct) for s in range(len(row))
    ]
    extra = {"tokens": 3, "finished": True, "seconds": 0.5, "completion": "a\u2028b"}
    store.append(workdir / "completions.jsonl", [key | extra | {"id": f"p{key['problem']}"} for key in keys])
    answer = {"answer": "1", "reason": None}
    store.append(
        workdir / "grades.jsonl", [key | answer | {"correct": correct[key["problem"]][key["sample"]]} for key in keys]
    )
    return workdir


def test_two_evaluations_are_compared_problem_by_problem(tmp_path):
    a = hand_made(tmp_path / "a", [[True, False], [False, False], [True, True]])
    b = hand_made(tmp_path / "b", [[True, True], [False, True], [True, True]])
    said = table.compare(a, b)
    # Differences 1/2, 1/2, 0: mean 1/3, deviation sqrt(1/12), error sqrt(1/36).
    row = said.splitlines()[2]
    assert [cell.strip() for cell in row.strip("| ").split("|")] == [
        "b",
        "3",
        "50.0 ± 28.9",
        "83.3 ± 16.7",
        "+33.3 ± 16.7",
    ]
    assert said.splitlines()[3] == "model.path: A 'a', B 'b'"
    with pytest.raises(ConfigError, match="they have no problem in common"):
        table.compare(a, hand_made(tmp_path / "c", [[True]], "other"))
    with pytest.raises(ConfigError, match="holds no evaluation"):
        table.compare(a, tmp_path / "nothing")


def test_the_mean_of_the_five_needs_all_five(tmp_path):
    lines = []
    for k, name in enumerate(benchmarks.FIVE):
        (line,) = table.read(hand_made(tmp_path / name, [[True] * 4] * k + [[False] * 4] * (5 - k), name))
        lines.append(line)
        assert ("mean of the five" in table.render(lines)) == (k == 4)
    mean = table.render(lines).splitlines()[-1]
    errors = [(k / 5 * (1 - k / 5) / 4) ** 0.5 for k in range(5)]
    expected = f"40.0 ± {100 * sum(e * e for e in errors) ** 0.5 / 5:.1f}"
    assert [cell.strip() for cell in mean.strip("| ").split("|")] == [
        "mean of the five",
        "25",
        "4",
        *[expected] * 3,
        "0.0 %",
        "3",
    ]


def command(micro, *arguments):
    """python -m gcpo_jax.evaluate with these arguments, running."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(micro_model.ROOT), str(micro)])
    return subprocess.Popen(
        [sys.executable, "-m", "gcpo_jax.evaluate", *map(str, arguments)],
        cwd=micro, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--config.sampling.sample=4"], 1, "error: --config.sampling.sample: there is no such field; the nearest is"),
        (["--compare", "a"], 1, "error: 1 more argument is needed"),
        (["--regrade", "--config.data=d"], 1, "--config.data has no place beside it; only --data, --benchmarks"),
        (
            ["--config.model.path=model", "--benchmarks=problems.jsonl", "--limit=3", "--dry_run"],
            0,
            "| problems  | 3  ",
        ),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(micro, arguments, code, said):
    process = command(micro, *arguments)
    out, error = process.communicate()
    assert process.returncode == code and said in (error if code else out), out + error
    assert "Traceback" not in error


@pytest.mark.slow  # the command is started seven times
def test_a_command_killed_with_9_at_any_moment_goes_on_and_ends_with_the_same_table(micro, whole, tmp_path):
    settings = {
        "model.path": micro / "model",
        "model.dtype": "float32",
        "sampling.samples": SAMPLES,
        "sampling.max_new_tokens": 8,
        "sampling.max_rows": 2,
        "sampling.temperature": 1.5,
        "sampling.top_p": 1.0,
        "prompts.answer": "{problem} Answer:",
        "contexts.cap": 8,
        "benchmarks": micro / "problems.jsonl",
    }
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    arguments += ["--reward=lengths.reward", "--workdir", tmp_path / "w"]
    for seen in ("0 of 3 batches", "2/6 problems", "2/2 problems"):
        process = command(micro, *arguments)
        for line in process.stderr:
            if seen in line:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = command(micro, *arguments)
    out, error = process.communicate()
    assert process.returncode == 0 and (whole / "table.md").read_text() in out, error
    assert drawn(tmp_path / "w") == drawn(whole)

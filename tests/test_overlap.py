import json
import os
import pathlib
import subprocess
import sys

import pytest

from gcpo_jax import config, tasks, train
from gcpo_jax.tasks import benchmarks, jsonl, overlap

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("GCPO_DATA", ROOT.parent / "shared" / "data"))
PROBLEM = (
    r"Let $x$ be a real number such that $\frac{x}{2} = 3$.  Find the value of  $\left(x + 1\right)^2$ in the end."
)


def rows(*problems):
    return [{"id": f"r{k}", "problem": problem, "answer": "1"} for k, problem in enumerate(problems)]


@pytest.mark.parametrize(
    "same",
    [
        PROBLEM.upper().replace(r"\FRAC", r"\frac").replace(r"\LEFT", r"\left").replace(r"\RIGHT", r"\right"),
        PROBLEM.replace(r"\frac", r"\dfrac").replace("$", ""),
        PROBLEM.replace(r"\left", "").replace(r"\right", "").replace(" ", "\n "),
        PROBLEM.rstrip(".") + "!",
        PROBLEM.replace(r"$x$", r"$x\,$"),
    ],
)
def test_another_spelling_of_a_problem_is_found(same):
    assert overlap.find(rows("Something else", same), rows("Another", PROBLEM)) == [("r1", "r1")]


@pytest.mark.parametrize("other", [PROBLEM.replace("3", "4"), PROBLEM.replace("+ 1", "- 1"), "", PROBLEM[:-9]])
def test_another_problem_is_not(other):
    assert overlap.find(rows(other), rows(PROBLEM)) == []


def test_problems_of_one_template_are_different():
    made = [f"({a}+{b})*2-1=" for a in range(9) for b in range(9)]
    assert overlap.find(rows(*made[:40]), rows(*made[40:])) == []


def test_near_finds_a_copy_with_another_end_and_only_where_it_is_asked_for():
    text = "A farmer has a rectangular field that is twice as long as it is wide and is crossed by two straight paths."
    copy = rows(text + " What is its area if the width is 5?")
    assert overlap.find(copy, rows(text + " Find the area.")) == []
    assert overlap.find(copy, rows(text + " Find the area."), near=True) == [("r0", "r0")]
    assert overlap.find(rows("Find the area."), rows(text + " Find the area."), near=True) == []


def task(train_rows, held_out):
    return tasks.Task(rows(*train_rows), rows(*held_out))


def test_training_refuses_a_held_out_problem_and_says_which():
    with pytest.raises(
        tasks.DataError, match=r"1 training problems stand in the held-out problems too \('r1' is 'r0'\)"
    ):
        train.overlaps(config.Config(), task(["a", PROBLEM], [PROBLEM + " "]))
    assert train.overlaps(config.Config(), task(["a"], [PROBLEM])) == []


def test_training_tells_and_goes_on_where_it_is_told_to():
    settings = config.Config(data=config.Data(overlap="allow"))
    said = train.overlaps(settings, task(["a", PROBLEM], [PROBLEM]))
    assert said == ["1 training problems stand in the held-out problems: r1 (r0)"]


def test_training_compares_with_the_files_that_are_named(tmp_path):
    text = "A farmer has a rectangular field that is twice as long as it is wide and is crossed by two straight paths."
    for name, problem in (("same.jsonl", PROBLEM), ("near.jsonl", text + " Find its area.")):
        (tmp_path / name).write_text(json.dumps(rows(problem)[0]) + "\n")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("same", "near")}
    wrong = config.Config(evaluation=config.Evaluation(benchmarks=f"{files['near']},{files['same']}"))
    with pytest.raises(tasks.DataError, match=r"same\.jsonl too"):
        train.overlaps(wrong, task(["a", PROBLEM], ["b"]))
    near = config.Config(evaluation=config.Evaluation(benchmarks=files["near"]))
    (said,) = train.overlaps(near, task(["a", text + " What is its area?"], ["b"]))
    assert said.startswith("1 training problems are nearly problems of") and said.endswith("r1 (r0)")


def test_the_command_lists_pairs(tmp_path):
    for name, problems in (("train", ["a", PROBLEM]), ("test", [PROBLEM, "c"]), ("other", ["d"])):
        text = "".join(json.dumps(row) + "\n" for row in rows(*problems))
        (tmp_path / f"{name}.jsonl").write_text(text)
    command = [sys.executable, "-m", "gcpo_jax.tasks.overlap"]
    said = subprocess.run([*command, "train.jsonl", "test.jsonl", "other.jsonl"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (said.returncode, said.stdout) == (1, "test.jsonl\tr1\tr0\n"), said.stderr


def read(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA} (GCPO_DATA names another directory)")
    return benchmarks.parse(jsonl.read(DATA / name, "file"), name)[1]


@pytest.mark.parametrize(("name", "same", "near"), [("aime_1983_2023_919.jsonl", 5, 7), ("math_train.jsonl.gz", 0, 17)])
def test_known_overlaps_with_math500_are_found(name, same, near):
    training, held_out = read(name), read("math500.jsonl")
    assert len(overlap.find(training, held_out)) == same
    found = overlap.find(training, held_out, near=True)
    assert len(found) == near and {a for a, _ in found} == {r["id"] for r in training if r["eval_overlap"]}
    assert overlap.find(training, read("aime24.jsonl"), near=True) == []

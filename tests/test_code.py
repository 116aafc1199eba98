import json
import os
import pathlib
import time

import pytest
from mutants import mutants

from gcpo_jax.tasks import code

DATA = pathlib.Path(os.environ.get("GCPO_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))

HUMANEVAL = {
    "id": "HumanEval/x",
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
    'def twice(x: int) -> int:\n    """Twice x.\n    >>> twice(1)\n    2\n    """\n',
    "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert half(candidate(4)) == 4\n"
    "    assert candidate(-3) == -6\n",
}
MBPP = {"id": "mbpp/x", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": ""}


@pytest.fixture(autouse=True, scope="module")
def needs_a_sandbox():
    if missing := code.available():
        pytest.skip(f"no sandbox here: {missing}")


@pytest.mark.parametrize(
    "completion",
    [
        "    return 2 * x\n",
        "    return 2 * x\n\n\ndef other():\n    return broken(\n",
        "    y = (x +\nx)\n    return y\n\n# Next\nprint(twice(3))\nassert False\n",
        "def twice(x):\n    return 2 * x\n",
        "```python\ndef twice(x):\n    return 2 * x\n```",
        "Sure! First a draft:\n```py\ndef twice(x):\n    return 0\n```\nBetter:\n```python\ndef twice(x):\n"
        "    return 2 * x\n```\nIt is used so:\n```python\nprint(twice(2))\n```\n",
        "<think>```python\ndef twice(x): return 1\n```</think>\n```python\n    return math.floor(2 * half(2 * x))\n```",
        "```\ndef twice(x):\n    return 2 * x",
        "Here is the function.\n\ndef twice(x):\n    return 2 * x\n\nI hope that this helps!\n",
    ],
)
def test_a_right_completion_in_any_dress_gets_the_reward(completion):
    assert code.reward("", completion, HUMANEVAL) == 1.0


@pytest.mark.parametrize(
    "completion", ["", "    return x\n", "no idea", "```python\n```", "    return 2 * x if x > 0 else 0\n", "\0"]
)
def test_a_wrong_completion_gets_none(completion):
    assert code.reward("", completion, HUMANEVAL) == 0.0


def test_a_completion_cannot_redefine_what_the_tests_use():
    cheat = "    return 4\ndef half(x):\n    return 4\n"
    assert code.reward("", "def half(x): return 4\ndef twice(x): return {1: 2, 4: 0, -3: -6}[x]", HUMANEVAL) == 0.0
    assert code.reward("", cheat, HUMANEVAL) == 0.0


def test_the_fraction_is_the_share_of_asserts_that_hold():
    assert code.fraction("", "    return abs(2 * x)\n", HUMANEVAL) == pytest.approx(2 / 3)
    assert code.fraction("", "def add(a, b):\n    return a - b", MBPP) == 0.5
    assert code.fraction("", "def add(a, b):\n    return a + b", MBPP) == 1.0
    hangs = "def add(a, b):\n    while a: pass\n    return b"
    turned = MBPP | {"test_list": MBPP["test_list"][::-1]}
    assert code.rewards([""], [hangs], [turned], every=True, timeout_s=1) == [0.5]
    assert code.reward("", "def add(a, b):\n    return a - b", MBPP) == 0.0


def test_rewards_of_many_come_in_order():
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return 1"
    assert code.rewards([""] * 4, [right, wrong, right, wrong], [MBPP] * 4) == [1.0, 0.0, 1.0, 0.0]


def test_a_row_in_neither_format_is_named():
    with pytest.raises(ValueError, match=r"row 'r'.*test_list.*entry_point"):
        code.reward("", "x", {"id": "r", "problem": "p"})


def test_answers_are_alike_where_only_layout_and_comments_differ():
    assert code.answer("```python\ndef f( x ):\n    # why\n    return  x\n```") == code.answer(
        "def f(x):\n    return x"
    )
    assert code.answer("```python\ndef f(:\n```") is None


def rows(name: str) -> list[dict]:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there (GCPO_DATA names the directory)")
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def whole(row: dict, text: str) -> str:
    return f"{text}\n{row['test']}\ncheck({row['entry_point']})\n"


def test_all_solutions_of_humaneval_pass_and_fast():
    problems = rows("humaneval.jsonl")
    began = time.monotonic()
    verdicts = code.run_all([code.program(row["canonical_solution"], row) for row in problems], 30.0)
    assert [row["id"] for row, v in zip(problems, verdicts, strict=True) if not v.passed] == []
    assert time.monotonic() - began < 60
    texts = [whole(row, row["prompt"] + row["canonical_solution"]) for row in problems]
    verdicts = code.run_all(texts, 30.0)
    assert [(row["id"], v) for row, v in zip(problems, verdicts, strict=True) if not v.passed or not v.tests] == []


@pytest.mark.slow
def test_all_references_of_mbpp_pass():
    problems = rows("mbpp.jsonl")
    programs = [code.program(f"```python\n{row['canonical_solution']}\n```", row) for row in problems]
    # Row 123 tries all pairs up to 9999, which takes 15 s where others take milliseconds.
    verdicts = code.run_all(programs, 180.0)
    assert [row["id"] for row, v in zip(problems, verdicts, strict=True) if not v.passed] == []


# Changes that the data set's tests cannot tell from the original, by problem: the operators' numbers, as in mutants.py.
# Checked: run without a sandbox these pass as well.
SURVIVING = {
    10: [0],
    18: [1],
    20: [2],
    32: [3],
    39: [2],
    40: [0, 1],
    59: [4],
    88: [3],
    89: [4, 5],
    94: [1],
    124: [3, 5, 13, 14, 15, 16],
    127: [3, 4, 5],
    129: [0, 1],
    131: [3],
    140: [7, 19],
    142: [6],
    147: [0],
    153: [2],
    154: [2, 6],
    157: [8, 9, 10],
}


@pytest.mark.slow
def test_a_solution_of_humaneval_with_a_changed_operator_fails():
    names, programs = [], []
    for number, row in enumerate(rows("humaneval.jsonl")):
        for k, mutant in enumerate(mutants(row["prompt"] + row["canonical_solution"], row["entry_point"])):
            names.append((number, k))
            programs.append(code.program(f"```python\n{mutant}\n```", row))
    verdicts = code.run_all(programs, 10.0)
    passed = {name for name, verdict in zip(names, verdicts, strict=True) if verdict.passed}
    assert len(names) == 661 and passed == {(number, k) for number, ks in SURVIVING.items() for k in ks}

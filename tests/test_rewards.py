"""Rewards: found by name, called, and their failures."""

import fractions
import math
import sys
import time

import numpy as np
import pytest

from gcpo_jax import tasks
from gcpo_jax.config import ConfigError
from gcpo_jax.tasks import math as math_task

ROW = {"id": "row-7", "problem": "1+1=", "answer": "2"}


def score(value) -> list[float]:
    return tasks.score(lambda prompt, completion, row: value, ["p"], ["c"], [ROW]).tolist()


def test_a_reward_sees_prompt_completion_and_row():
    seen = []
    values = tasks.score(
        lambda *given: seen.append(given) or len(seen), ["p", "q"], ["c", "d"], [ROW, ROW | {"id": "8"}]
    )
    assert values.tolist() == [1.0, 2.0] and values.dtype == np.float64
    assert seen == [("p", "c", ROW), ("q", "d", ROW | {"id": "8"})]


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True), fractions.Fraction(1)])
def test_finite_numbers_and_truth_values_are_rewards(value):
    assert score(value) == [1.0]


@pytest.mark.parametrize("value", [None, "1", math.nan, -math.inf, np.float32("nan"), 1j, [1.0], np.ones(1), 10**400])
def test_anything_else_is_refused_with_its_row(value):
    with pytest.raises(
        tasks.RewardError, match=r"the reward is .*, not a finite number \(row 'row-7', completion 'c'\)"
    ):
        score(value)


def test_a_raising_reward_is_refused_with_its_row_and_keeps_its_cause():
    def reward(prompt, completion, row):
        return 1 / len(completion)

    with pytest.raises(tasks.RewardError, match=r"raised ZeroDivisionError: .*row 'second', completion ''") as caught:
        tasks.score(reward, ["p", "p"], ["c", ""], [ROW, ROW | {"id": "second"}])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reward", "must be MODULE.FUNCTION"),
        ("", "must be MODULE.FUNCTION"),
        ("tasks.nothing.reward", "module gcpo_jax.tasks.nothing cannot be imported: ModuleNotFoundError"),
        ("no_such_module_here.reward", "module no_such_module_here cannot be imported"),
        ("tasks.math.nothing", "gcpo_jax.tasks.math has no function 'nothing'"),
        ("tasks.math.__doc__", "has no function '__doc__'"),
        ("..math.reward", "cannot be imported"),
    ],
)
def test_an_unknown_dotted_path_is_refused(path, message):
    with pytest.raises(ConfigError, match=f"data.reward='{path}': .*{message}" if path else message):
        tasks.resolve_reward(path)


def test_a_users_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_of_this_test.py").write_text(
        "def reward(p, c, row):\n    return len(c)\nanswer = 'not a function'\n"
    )
    (tmp_path / "broken_of_this_test.py").write_text("def reward(:\n")
    monkeypatch.chdir(tmp_path)
    # As of an installed command: neither the directory nor "" is on the path.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    reward = tasks.resolve_reward("mine_of_this_test.reward")
    assert tasks.score(reward, ["p"], ["four"], [ROW]) == [4.0]
    assert tasks.resolve_answer("mine_of_this_test.reward")(" x ") == "x"
    with pytest.raises(ConfigError, match="module broken_of_this_test cannot be imported: SyntaxError"):
        tasks.resolve_reward("broken_of_this_test.reward")


def test_the_answer_beside_a_reward_is_what_votes_compare():
    answer = tasks.resolve_answer("tasks.math.reward")
    assert answer(r"so \boxed{12}") == math_task.answer(r"so \boxed{12}") == "12"


def test_an_answer_that_raises_names_the_completion(tmp_path, monkeypatch):
    (tmp_path / "frail.py").write_text("reward = lambda p, c, r: 1.0\nanswer = lambda completion: completion[99]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(tasks.RewardError, match=r"frail\.answer.*'short'"):
        tasks.resolve_answer("frail.reward")("short")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"so \boxed{12} or \boxed{\frac{1}{2}}, done with 7", None),
        (r"\boxed{3} and then \boxed{4", None),
        (r"\boxed {\{1, 2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{6} \boxed{ $1,234$ }.", "6,1234"),
        (r"}} {{ \boxed{8}", "8"),
        (r"\boxed{}", None),
        ("12 apples, 1,234,567 pears.", "1234567"),
        ("we have 9-4", "4"),
        ("it is -4.50.", "-4.50"),
        ("1, 2, 3", "1,2,3"),
        ("about .5", ".5"),
        ("there is no number in this", None),
        ("", None),
    ],
)
def test_the_answer_is_the_final_box_or_number_unless_two_contend(completion, expected):
    assert math_task.answer(completion) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{2}", "2", 1.0),
        ("The sum is 2.", "2", 1.0),
        ("2.0", "2", 1.0),
        ("1/2", "0.5", 1.0),
        ("1,000", "1000", 1.0),
        (r"\boxed{x^2}", "$x^2$", 1.0),
        (r"\boxed{x^2}", "x^3", 0.0),
        ("3", "2", 0.0),
        ("two", "2", 1.0),
        ("", "2", 0.0),
        ("1/0", "1/0", 1.0),
        ("9" * 5000, "2", 0.0),
    ],
)
def test_a_reward_compares_values(completion, answer, expected):
    assert math_task.reward("p", completion, {"answer": answer}) == expected


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", "1,", "1", "-", r"\boxed ", ",123", "1/"])
def test_no_completion_takes_long(piece):
    began = time.process_time()
    math_task.reward("p", piece * 50_000, {"answer": "2"})
    assert time.process_time() - began < 2

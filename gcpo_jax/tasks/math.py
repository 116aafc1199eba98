r"""Grading mathematics: `grade`, `grade_all`, `answer`, `votes` (what majority votes compare) and `reward`. Never
raises, never hangs.

How: extract.py finds the final answer, notation.py spells it one way, equivalence.py compares structures and reads
scalars with expressions.py (exact rationals, else values at fixed points). What that cannot settle goes to
math-verify in worker processes that may be killed (workers.py). No text is evaluated as code.

What is decided where graders differ (the reward must not be gamed: a doubtful answer is wrong):

* No answer, unfinished thinking or an unfinished box, two different answers in the final statement, "12 or 13" for
  12, "either", "maybe": wrong; an answer said in two ways (1/2 or 0.5) is one. Boxes of earlier steps do not count, nor
  what is taken back ("Wait", "I first thought"). Two boxes joined by "and" are a list.
* Units and degrees may be left out on either side; where both name one it must be the same or convert exactly (5 m =
  500 cm, $0.50 = 50 cents, 1 hour 50 minutes = 110; 5 cm is not 5 m, nor Celsius Fahrenheit). Any noun counts as a
  unit, not a word that changes the number ("12 or more", "5 million").
* 50% is 0.5 and is not 50, unless the problem asks for a percentage (`percent`; `reward` sees that in
  row["problem"]).
* 0.5 = 1/2; 0.33 is not 1/3, nor 1.414 the root of 2. A gold of >= 3 digits in decimals that is no binary fraction is
  taken as rounded: an answer with more digits that rounds to it is right. A gold in scientific notation (4.5e33): an
  answer that agrees to the digits of the coarser one, and within 1 %. Integers are exact, at any size. Beside an exact
  value its rounding does not count, unless it is none.
* (1,2) is not [1,2], nor (2,1). {1,2} = {2,1}, and lists "1, 2", "1 and 2" in any order; a list is not a tuple. 1,000
  is a thousand, "1, 000" a list, (1,000) a pair. \pm makes two values. Inequalities are intervals of their variable,
  and so are two of them joined by "and"; ]0,1[ is (0,1).
* x = 5 may stand for 5 and y = 2x+3 for 2x+3, never for y = 5; implicit equations may differ by a factor.
* A base may not be left out unless it is ten: 101_2 is not 101. 1/2\pi is read from the left, (1/2)\pi. 1\frac{3}{4}
  is a mixed number.
* Ratios 2:4 = 1:2; clock times are times, 4:51 p.m. 16:51. Text ignores case, articles and punctuation; single letters
  do not ignore case.
"""

import itertools
import json
import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

from gcpo_jax.grading import equivalence, extract
from gcpo_jax.grading.notation import compact, tidy
from gcpo_jax.grading.scalars import Undecided
from gcpo_jax.grading.workers import Pool
from gcpo_jax.tasks.rewards import batched

_POOL = Pool()
_LOG = logging.getLogger(__name__)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_ESCAPED = re.compile(r"\\[{}]")
MAX_COMPLETION = 4_000_000
MAX_HARD_VOTES = 40  # pairs of one problem's answers that may go to the workers; the others stay apart


class Verdict(NamedTuple):
    """Whether an answer is right; the reason where it counts as wrong because it could not be graded."""

    correct: bool
    reason: str | None = None


def answer(completion: str) -> str | None:
    """The final answer of a completion as text in one spelling; None where it has none, or not one."""
    found = _found(completion)
    if found is None:
        return None
    text = tidy(found)
    return (text if _PROSE.search(text) else compact(text)) or None


def _found(completion: str) -> str | None:
    try:
        return extract.extract(completion[-MAX_COMPLETION:])
    except (ValueError, TypeError, RecursionError):
        return None


def _gold(gold: str) -> str:
    """The gold's answer where it comes in a box or, as some files have it, at the end of a sentence."""
    return (_found(gold) or gold) if r"\boxed" in gold else gold


def judge_all(completions: Sequence[str], golds: Sequence[str], percent: Sequence[bool] | None = None) -> list[Verdict]:
    """Whether each completion's final answer is its gold, in order; hard cases run in parallel.

    Args:
      completions: what the policy wrote.
      golds: the right answers, one for each completion.
      percent: where true, the problem asks for a percentage, and 60 and 60% are the same.

    Raises:
      ValueError: where the lengths differ.
    """
    flags = percent if percent is not None else [False] * len(golds)
    verdicts: list[Verdict] = []
    hard: dict[str, list[int]] = {}
    for k, (completion, gold, flag) in enumerate(zip(completions, golds, flags, strict=True)):
        found, gold = _found(completion), _gold(gold)
        # A few golds of the data have unbalanced braces: such a one is right where it is repeated as it is.
        braces = _ESCAPED.sub("", gold)
        verdict = braces.count("{") != braces.count("}") and completion.rstrip(" $.\n").endswith(f"{{{gold}}}")
        if found is not None and not verdict:
            try:
                verdict = equivalence.equal(gold, found, percent=flag)
            except Undecided:
                hard.setdefault(json.dumps([gold, found, bool(flag)]), []).append(k)
            except (ArithmeticError, ValueError, RecursionError):
                pass  # a hostile answer is a wrong one
        verdicts.append(Verdict(verdict))
    for rows, reply in zip(hard.values(), _POOL.map([json.loads(q) for q in hard]), strict=True):
        for k in rows:
            verdicts[k] = Verdict(reply) if isinstance(reply, bool) else Verdict(False, reply)
    if reasons := [v.reason for v in verdicts if v.reason]:
        counts = ", ".join(f"{reason}: {reasons.count(reason)}" for reason in sorted(set(reasons)))
        _LOG.warning("%d of %d answers could not be graded and count as wrong (%s)", len(reasons), len(golds), counts)
    return verdicts


def grade_all(completions: Sequence[str], golds: Sequence[str], percent: Sequence[bool] | None = None) -> list[bool]:
    """`judge_all` without the reasons."""
    return [verdict.correct for verdict in judge_all(completions, golds, percent)]


def grade(completion: str, gold: str, percent: bool = False) -> bool:
    """Whether the completion's final answer is the gold; see `grade_all`."""
    return grade_all([completion], [gold], [percent])[0]


def votes(groups: Sequence[Sequence[str]], rows: Sequence[dict]) -> list[list[str | None]]:
    """What majority votes compare, for the completions of each problem: the answer, as the first of them spells it
    that the grader holds equal in both directions; None where there is none.

    Args:
      groups: completions by problem.
      rows: the problems.
    """
    found = [[_found(text) for text in texts] for texts in groups]
    spelled = [[answer(text) for text in texts] for texts in groups]
    texts_of: list[dict[str, str]] = [{} for _ in groups]  # of each spelling, as it was first written
    same: set[tuple[int, str, str]] = set()
    hard: list[tuple[int, str, str]] = []
    for k, (group, row) in enumerate(zip(spelled, rows, strict=True)):
        for spelling, text in zip(group, found[k], strict=True):
            if spelling is not None and text is not None:
                texts_of[k].setdefault(spelling, text)
        percent, asked = asks_percentage(row), 0
        for a, b in itertools.combinations(texts_of[k], 2):
            verdict = _interchangeable(texts_of[k][a], texts_of[k][b], percent)
            if verdict:
                same.add((k, a, b))
            elif verdict is None and asked < MAX_HARD_VOTES:
                hard.append((k, a, b))
                asked += 1
    questions = [
        [texts_of[k][x], texts_of[k][y], asks_percentage(rows[k])] for k, a, b in hard for x, y in ((a, b), (b, a))
    ]
    replies = _POOL.map(questions)
    same |= {pair for n, pair in enumerate(hard) if replies[2 * n] is True and replies[2 * n + 1] is True}
    result: list[list[str | None]] = []
    for k, group in enumerate(spelled):
        first: dict[str, str] = {}  # the class of each spelling, by the spelling that began it
        for spelling in texts_of[k]:
            first[spelling] = next((f for f in first.values() if (k, f, spelling) in same), spelling)
        result.append([None if spelling is None else first[spelling] for spelling in group])
    return result


def _interchangeable(one: str, other: str, percent: bool) -> bool | None:
    """Whether each answer is right where the other is the gold; None where only a worker could tell."""
    try:
        return equivalence.equal(one, other, percent=percent) and equivalence.equal(other, one, percent=percent)
    except Undecided:
        return None
    except (ArithmeticError, ValueError, RecursionError):
        return False


def rewards(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """`reward` of many completions, hard ones in parallel."""
    del prompts
    verdicts = grade_all(completions, [str(row["answer"]) for row in rows], [asks_percentage(row) for row in rows])
    return [float(verdict) for verdict in verdicts]


@batched(rewards)
def reward(prompt: str, completion: str, row: dict) -> float:
    """1 for the right answer, else 0; the gold is row["answer"]."""
    return rewards([prompt], [completion], [row])[0]


def asks_percentage(row: dict) -> bool:
    """Whether the problem of a row asks for a percentage, so that the sign may be written or left out."""
    return "percent" in str(row.get("problem", ""))[-200:].lower()

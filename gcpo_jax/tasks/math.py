r"""Grading mathematics: `grade`, `grade_all`, `answer` (what majority votes compare) and `reward`. Never raises, never
hangs.

How: extract.py finds the final answer, notation.py spells it one way, equivalence.py compares structures and reads
scalars with expressions.py (exact rationals, else values at fixed points). What that cannot settle goes to
math-verify in worker processes that may be killed (workers.py). No text is evaluated as code.

What is decided where graders differ (the reward must not be gamed: a doubtful answer is wrong):

* No answer, unfinished thinking or an unfinished box, two different answers in the final statement, "12 or 13" for
  12, "either", "maybe": wrong. Boxes of earlier steps do not count. Two boxes joined by "and" are a list.
* Units and degrees may be left out on either side; where both name one it must be the same or convert exactly (5 m =
  500 cm, $0.50 = 50 cents; 5 cm is not 5 m). Any noun counts as a unit, not a word that changes the number ("12 or
  more", "5 million").
* 50% is 0.5 and is not 50, unless the problem asks for a percentage (`percent`; `reward` sees that in
  row["problem"]).
* 0.5 = 1/2; 0.33 is not 1/3, nor 1.414 the root of 2. A gold of >= 3 digits in decimals that is no binary fraction is
  taken as rounded: an answer with more digits that rounds to it is right. A gold in scientific notation (4.5e33): an
  answer that agrees to the digits of the coarser one, and within 1 %. Integers are exact, at any size.
* (1,2) is not [1,2], nor (2,1). {1,2} = {2,1}, and lists "1, 2", "1 and 2" in any order; a list is not a tuple. 1,000
  is a thousand, "1, 000" a list, (1,000) a pair. \pm makes two values. Inequalities are intervals of their variable.
* x = 5 may stand for 5 and y = 2x+3 for 2x+3, never for y = 5; implicit equations may differ by a factor.
* A base may not be left out unless it is ten: 101_2 is not 101. 1/2\pi is read from the left, (1/2)\pi. 1\frac{3}{4}
  is a mixed number.
* Ratios 2:4 = 1:2; clock times are times. Text ignores case, articles and punctuation; single letters do not ignore
  case.
"""

import json
import re
from collections.abc import Sequence

from gcpo_jax.grading import equivalence, extract
from gcpo_jax.grading.notation import compact, tidy
from gcpo_jax.grading.scalars import Undecided
from gcpo_jax.grading.workers import Pool
from gcpo_jax.tasks.rewards import batched

_POOL = Pool()
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_ESCAPED = re.compile(r"\\[{}]")
MAX_COMPLETION = 4_000_000


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


def grade_all(completions: Sequence[str], golds: Sequence[str], percent: Sequence[bool] | None = None) -> list[bool]:
    """Whether each completion's final answer is its gold, in order; hard cases run in parallel.

    Args:
      completions: what the policy wrote.
      golds: the right answers, one for each completion.
      percent: where true, the problem asks for a percentage, and 60 and 60% are the same.

    Raises:
      ValueError: where the lengths differ.
    """
    flags = percent if percent is not None else [False] * len(golds)
    verdicts: list[bool] = []
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
        verdicts.append(verdict)
    if hard:
        for rows, verdict in zip(hard.values(), _POOL.map([json.loads(q) for q in hard], False), strict=True):
            for k in rows:
                verdicts[k] = verdict is True
    return verdicts


def grade(completion: str, gold: str, percent: bool = False) -> bool:
    """Whether the completion's final answer is the gold; see `grade_all`."""
    return grade_all([completion], [gold], [percent])[0]


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

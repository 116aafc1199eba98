"""Right or wrong, many completions at a time."""

from collections.abc import Sequence
from typing import Any

from gcpo_jax import tasks
from gcpo_jax.evaluation.prompts import ended
from gcpo_jax.tasks import code, math
from gcpo_jax.tasks.benchmarks import Benchmark

CODE = ("humaneval", "mbpp")
_AT_A_TIME = 256  # programs that are judged in one call


def check(benchmarks: Sequence[Benchmark], unsafe: bool) -> None:
    """Refuse, before anything is sampled, programs that could not be run.

    Raises:
      SandboxUnavailable: naming what the system lacks.
    """
    if any(b.form in CODE for b in benchmarks) and not unsafe and (missing := code.available()):
        raise code.SandboxUnavailable(missing)


def grade(
    benchmark: Benchmark, places: Sequence[int], completions: Sequence[str], style: str, reward: str, unsafe: bool
) -> list[dict[str, Any]]:
    """For each completion {"correct": bool, "answer": what votes count, or None, "reason": the sandbox's, or why an
    answer could not be graded, or None}. All completions of a problem are to be there: votes compare them.

    Args:
      places: of each completion's problem in benchmark.rows.
      style: of the prompts, which says what ends a base model's answer.
      reward: dotted path, of problems with an answer: right is a reward of 1 or more.
    """
    rows = [benchmark.rows[place] for place in places]
    texts = [ended(c, benchmark.form, style) for c in completions]
    if benchmark.form in CODE:
        programs = [code.program(text, row) for text, row in zip(texts, rows, strict=True)]
        verdicts = []
        for at in range(0, len(programs), _AT_A_TIME):
            verdicts += code.run_all(programs[at : at + _AT_A_TIME], code.TIMEOUT_S, unsafe=unsafe)
        return [{"correct": v.passed, "answer": None, "reason": v.reason} for v in verdicts]
    function = tasks.resolve_reward(reward)
    if function is not math.reward:
        scores, answer = (
            tasks.score(function, [row["problem"] for row in rows], texts, rows),
            tasks.resolve_answer(reward),
        )
        return [
            {"correct": bool(s >= 1), "answer": answer(t), "reason": None} for s, t in zip(scores, texts, strict=True)
        ]
    verdicts = math.judge_all(texts, [row["answer"] for row in rows], [math.asks_percentage(row) for row in rows])
    groups: dict[int, list[int]] = {}
    for k, place in enumerate(places):
        groups.setdefault(place, []).append(k)
    voted = math.votes([[texts[k] for k in group] for group in groups.values()], [benchmark.rows[p] for p in groups])
    answers = {k: a for group, of in zip(groups.values(), voted, strict=True) for k, a in zip(group, of, strict=True)}
    return [{"correct": v.correct, "answer": answers[k], "reason": v.reason} for k, v in enumerate(verdicts)]

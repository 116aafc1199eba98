"""Right or wrong, many completions at a time."""

from collections.abc import Sequence
from typing import Any

from gcpo_jax import tasks
from gcpo_jax.evaluation.prompts import ended
from gcpo_jax.tasks import code, math
from gcpo_jax.tasks.benchmarks import Benchmark
from gcpo_jax.tasks.jsonl import Row

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
    benchmark: Benchmark, rows: Sequence[Row], completions: Sequence[str], style: str, reward: str, unsafe: bool
) -> list[dict[str, Any]]:
    """For each completion {"correct": bool, "answer": what votes count, or None, "reason": the sandbox's, or None}.

    Args:
      rows: the problem of each completion.
      style: of the prompts, which says what ends a base model's answer.
      reward: dotted path, of problems with an answer: right is a reward of 1 or more.
    """
    texts = [ended(c, benchmark.form, style) for c in completions]
    if benchmark.form in CODE:
        programs = [code.program(text, row) for text, row in zip(texts, rows, strict=True)]
        verdicts = []
        for at in range(0, len(programs), _AT_A_TIME):
            verdicts += code.run_all(programs[at : at + _AT_A_TIME], code.TIMEOUT_S, unsafe=unsafe)
        return [{"correct": v.passed, "answer": None, "reason": v.reason} for v in verdicts]
    function, answer = tasks.resolve_reward(reward), tasks.resolve_answer(reward)
    if function is math.reward:  # one call, so that hard cases run beside each other
        correct = math.grade_all(texts, [r["answer"] for r in rows], [math.asks_percentage(r) for r in rows])
    else:
        questions = [row["problem"] for row in rows]
        correct = [float(score) >= 1 for score in tasks.score(function, questions, texts, rows)]
    return [{"correct": bool(c), "answer": answer(t), "reason": None} for c, t in zip(correct, texts, strict=True)]

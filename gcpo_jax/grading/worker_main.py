"""The program of one grading worker: lines of JSON [gold, answer, percent] in, true, false or the reason why there is
neither out. See workers.py.

It loads the libraries once and forks for each question, so that one that hangs or eats memory costs itself only,
and leaves nothing behind for the next. It is run by path, so that the user's main module does not come along.
Nothing here or below evaluates text as code: math-verify's reader of plain expressions, which does, is not used,
only latex2sympy2's grammar.
"""

import json
import logging
import os
import resource
import select
import signal
import sys

import mpmath
from latex2sympy2_extended import latex2sympy
from math_verify import verify

from gcpo_jax.grading import equivalence, expressions, scalars, values
from gcpo_jax.grading.workers import DIED, LIMIT

DIGITS, PRECISION, RECURSION = 40, 110, 3000


def symbolic(gold: str, answer: str) -> bool:
    """Equality of two scalars, to many digits where expressions.py reads both, else by math-verify."""
    try:
        trees = expressions.parse(gold), expressions.parse(answer)
    except expressions.TooLarge:
        return False
    except expressions.Unreadable:
        left, right = latex2sympy(gold), latex2sympy(answer)
        return left is not None and right is not None and verify(left, right, timeout_seconds=None)

    def field() -> values.Field:
        return values.Field(mpmath.mp, lambda value: mpmath.mpf(value.numerator) / value.denominator)

    return bool(scalars.compare(*trees, field, DIGITS, PRECISION))


_REPLIES: dict[bytes, bool | str] = {b"1": True, b"0": False, b"m": LIMIT}


def answer(question: list) -> bytes:
    """The verdict, a key of _REPLIES; false where the libraries give up."""
    gold, text, percent = question
    try:
        return b"1" if equivalence.equal(gold, text, symbolic, percent) else b"0"
    except MemoryError:
        return b"m"
    except Exception:
        return b"0"


def child(question: list, reply: int, cpu_s: float, memory: int) -> None:
    """Answers one question in a process of its own, within its limits, and ends it."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 1))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # ends the process by SIGPROF, even one that nobody waits for any more
    os.write(reply, answer(question))
    os._exit(0)


def attempt(question: list, cpu_s: float, wall_s: float, memory: int) -> bool | str:
    """One question in a child process: the verdict, LIMIT, or DIED where something else ended it."""
    reading, writing = os.pipe()
    process = os.fork()  # this program has one thread
    if process == 0:
        try:
            child(question, writing, cpu_s, memory)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], wall_s)
        verdict = os.read(reading, 1) if ready else b"m"
        if not ready:
            os.kill(process, signal.SIGKILL)
    finally:
        os.close(reading)
        _, status = os.waitpid(process, 0)
    if verdict:
        return _REPLIES[verdict]
    slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU)
    return LIMIT if slow else DIED


def main() -> None:
    """Answers until the pipe closes."""
    cpu_s, wall_s, memory = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(RECURSION)
    logging.disable(logging.CRITICAL)
    mpmath.mp.dps = PRECISION + 10
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    symbolic(
        r"\int_0^1 x dx", r"\frac{1}{2}"
    )  # the grammar builds its tables at its first use: here, not in each child
    print(json.dumps("jax" in sys.modules), file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        verdict = attempt(question, cpu_s, wall_s, memory)
        if verdict == DIED:
            verdict = attempt(question, cpu_s, wall_s, memory)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()

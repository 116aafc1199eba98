"""The program of one grading worker: lines of JSON [gold, answer, percent] in, true or false out. See workers.py.

It is run by path, so that the user's main module does not come along. Nothing here or below evaluates text as code: math-verify's
reader of plain expressions, which does, is not used; only the grammar of latex2sympy2_extended is.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

import mpmath
from latex2sympy2_extended import latex2sympy
from math_verify import verify

from gcpo_jax.tasks import equivalence, expressions

MAX_SYMBOLIC, DIGITS, RECURSION = 300, 40, 3000
# sympy multiplies such a tower out while it reads it; the time limit would stop it, at the cost of a worker.
_TOWER = re.compile(r"\d{3,}\s*!|!\s*!|\^\{?\s*\d{5,}|\^[^+\-]{0,12}\^")


def symbolic(gold: str, answer: str) -> bool:
    """Equality of two scalars, to many digits where expressions.py reads both, else by math-verify."""
    try:
        trees = expressions.parse(gold), expressions.parse(answer)
    except expressions.Unreadable:
        texts = (gold, answer)
        if any(len(t) > MAX_SYMBOLIC or _TOWER.search(t) for t in texts):
            return False
        return verify(latex2sympy(gold), latex2sympy(answer), timeout_seconds=None)

    def field() -> expressions.Field:
        return expressions.Field(mpmath.mp, lambda value: mpmath.mpf(value.numerator) / value.denominator)

    return bool(equivalence.compare(*trees, field, digits=DIGITS))


def answer(question: list) -> bool:
    """The verdict; false where the libraries give up."""
    gold, text, percent = question
    try:
        return equivalence.equal(gold, text, symbolic, percent)
    except (Exception, RecursionError):
        return False


def main() -> None:
    """Answers until the pipe closes. The timer of processor time ends the process by a signal that the parent knows."""
    cpu_s, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(RECURSION)
    logging.disable(logging.CRITICAL)
    mpmath.mp.dps = 70
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    print(json.dumps("jax" in sys.modules), file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        verdict = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()

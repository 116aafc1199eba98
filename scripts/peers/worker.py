"""What every contender of scripts/benchmark.py has in common; standard library only, so that any interpreter runs it.

A worker is a process that gets one line of JSON (what to do), prepares it, compiles it, and answers one line of JSON
that says with which versions. After that each line "go" on its standard input is answered by one line of JSON with the
seconds and the tokens of one run of the work. Whatever libraries print goes to standard error.
"""

import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

MARKS = ("<q>", "<y>", "<agg>", "<try>")  # the last ids of the vocabulary; the others are the numbers themselves


class Pipe:
    """The worker's end of the two pipes."""

    def __init__(self):
        # Libraries that greet the user on standard output must not be read as answers.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.spec: dict[str, Any] = json.loads(sys.stdin.readline())

    def ready(self, *packages: str) -> None:
        """All is compiled: the next thing may be timed."""
        self._answer({"versions": {name: importlib.metadata.version(name) for name in packages}})

    def wait(self) -> bool:
        """Until the driver says go; False when it has gone away."""
        return sys.stdin.readline().strip() == "go"

    def done(self, seconds: float, tokens: int, **more: Any) -> None:
        """One run took this long and made so many tokens."""
        self._answer({"seconds": seconds, "tokens": int(tokens), **more})

    def _answer(self, row: dict[str, Any]) -> None:
        self._out.write(json.dumps(row) + "\n")
        self._out.flush()


def serve(pipe: Pipe, packages: tuple[str, ...], work: Callable[[int], dict[str, Any]], warm: int = 2) -> None:
    """Answer every "go" with a run of work(number of the run), which returns its tokens and what else there is to say.

    Args:
      warm: runs before the first that counts; the first compiles.
    """
    for number in range(warm):
        work(number)
    pipe.ready(*packages)
    number = 0
    while pipe.wait():
        began = time.perf_counter()
        row = work(number)
        pipe.done(time.perf_counter() - began, **row)
        number += 1


def words(vocabulary: int) -> list[str]:
    """The word of each id."""
    return [*map(str, range(vocabulary - len(MARKS))), *MARKS]


def problems(spec: dict[str, Any]) -> list[str]:
    """The problems of a spec, the same for every contender: numbers, of which two marks make a prompt."""
    draw = random.Random(spec["seed"])
    size = spec["model"]["vocab_size"] - len(MARKS)
    # Id 0 pads where a peer has to have a padding id.
    return [
        " ".join(str(draw.randrange(1, size)) for _ in range(spec["prompt_tokens"] - 2)) for _ in range(spec["prompts"])
    ]


def prompt(problem: str) -> str:
    """The prompt of a problem as text, its words apart."""
    return f"<q> {problem} <try>"


def prompt_ids(spec: dict[str, Any]) -> list[list[int]]:
    """The prompts of a spec as ids."""
    number = {word: k for k, word in enumerate(words(spec["model"]["vocab_size"]))}
    return [[number[word] for word in prompt(problem).split()] for problem in problems(spec)]


def even_share(completion: str) -> float:
    """The reward: which part of the completion's numbers is even."""
    numbers = [int(word) for word in completion.split() if word.isdigit()]
    return sum(n % 2 == 0 for n in numbers) / max(1, len(numbers))

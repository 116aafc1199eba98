"""Contenders as processes that wait for each other, rounds in which each works once, and what the rounds say."""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent


class ContenderError(RuntimeError):
    """A contender's process ended. The message has the end of what it printed."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who does what: an interpreter, a worker of scripts/peers/ and the JSON that says what the work is."""

    name: str
    python: str
    worker: str
    spec: dict[str, Any]


class _Process:
    """A contender that has been started; it computes only between go() and its answer."""

    def __init__(self, contender: Contender):
        self.name = contender.name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        env = dict(os.environ)
        if contender.worker == "ours.py":
            # The package of this checkout, whatever is installed.
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), env.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [contender.python, str(HERE / "peers" / contender.worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        self.versions: dict[str, str] = self._ask(json.dumps(contender.spec))["versions"]

    def go(self) -> dict[str, Any]:
        """One run: {"seconds": ..., "tokens": ..., ...}."""
        return self._ask("go")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        # What libraries say while they are imported, before a worker can keep it off standard output, is passed over.
        while answer := self._process.stdout.readline():
            with contextlib.suppress(ValueError):
                return json.loads(answer)
        self._process.wait()
        self._errors.seek(0)
        raise ContenderError(
            f"{self.name} ended with exit code {self._process.returncode}:\n{self._errors.read()[-3000:]}"
        )


@dataclasses.dataclass(frozen=True)
class Rounds:
    """rows[contender] has one answer a round."""

    rows: dict[str, list[dict[str, Any]]]
    versions: dict[str, dict[str, str]]


def alternate(contenders: Sequence[Contender], rounds: int) -> Rounds:
    """Start and warm up all, one after the other, then let each work once a round, in turn.

    What else the machine does then falls on all of them alike. The order is turned round every other round, so that
    nobody always works behind the same neighbour.

    Raises:
      ContenderError: where one of them fails.
    """
    with contextlib.ExitStack() as stack:
        started = []
        for contender in contenders:
            started.append(_Process(contender))
            stack.callback(started[-1].close)
        rows: dict[str, list[dict[str, Any]]] = {p.name: [] for p in started}
        for number in range(rounds):
            for process in started if number % 2 == 0 else reversed(started):
                rows[process.name].append(process.go())
        return Rounds(rows, {p.name: p.versions for p in started})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Spread of the rounds' own ratios ours / theirs."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def rates(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Tokens a second of each round."""
    return [row["tokens"] / row["seconds"] for row in rows]


def seconds(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of each round."""
    return [row["seconds"] for row in rows]

"""The table of an evaluation, and the paired comparison of two: functions of what their directories hold."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from gcpo_jax.config import ConfigError
from gcpo_jax.evaluation import statistics, store
from gcpo_jax.tasks.benchmarks import FIVE

VOTES = 4  # of maj@4, the paper's
Pair = tuple[float, float]  # value and standard error


@dataclasses.dataclass(frozen=True)
class Line:
    """One benchmark. Shares are in [0, 1]; `correct` is [N, n]: n samples of each of N problems, named by `ids`."""

    name: str
    title: str
    ids: list[str]
    correct: np.ndarray
    accuracy: Pair
    pass_at: dict[int, Pair]
    majority: Pair | None  # maj@4, None where there are fewer samples or nothing to vote on
    truncated: float  # share of completions without an end
    tokens: float  # mean length
    seconds: float  # all completions, without loading and grading
    ungraded: int  # answers that count as wrong because the grader gave up; grades.jsonl has the reasons


def read(workdir: pathlib.Path) -> list[Line]:
    """A line for each benchmark that was last asked for.

    Raises:
      ConfigError: where the directory holds no evaluation, or one that did not end.
    """
    state = store.read_state(workdir)
    completions, grades = (store.read(workdir / name) for name in (store.COMPLETIONS, store.GRADES))
    lines = []
    for name in state["asked"]:
        known = state["benchmarks"][name]
        keys = [[(name, place, s) for s in range(state["samples"])] for place in known["places"]]
        if missing := [k for row in keys for k in row if k not in completions or k not in grades]:
            raise ConfigError(
                f"{workdir}: {len(missing)} completions of {name!r} are missing or not graded; the same command again "
                "goes on where it was"
            )
        lines.append(_line(name, known, [[completions[k] | grades[k] for k in row] for row in keys]))
    return lines


def _line(name: str, known: dict[str, Any], rows: list[list[dict[str, Any]]]) -> Line:
    correct = np.array([[r["correct"] for r in row] for row in rows], np.float64)
    n = correct.shape[1]
    ks = [k for k in sorted({VOTES, n}) if 1 < k <= n]
    flat = [r for row in rows for r in row]
    majority = None
    if n >= VOTES and known["form"] == "answer":
        votes = [
            statistics.majority_at_k([r["answer"] for r in row], [float(r["correct"]) for r in row], VOTES)
            for row in rows
        ]
        majority = statistics.mean_and_error(votes)
    return Line(
        name,
        known["title"],
        [row[0]["id"] for row in rows],
        correct,
        statistics.clustered(correct),
        {
            k: statistics.mean_and_error([statistics.pass_at_k(int(c), n, k) for c in correct.sum(1).tolist()])
            for k in ks
        },
        majority,
        float(np.mean([not r["finished"] for r in flat])),
        float(np.mean([r["tokens"] for r in flat])),
        float(sum(r["seconds"] for r in flat)),
        sum(r["reason"] is not None for r in flat) if known["form"] == "answer" else 0,
    )


def five(lines: list[Line]) -> list[Line]:
    """The lines of the paper's five, in its order; none where one is missing."""
    named = {line.name: line for line in lines}
    return [named[name] for name in FIVE] if set(FIVE) <= set(named) else []


def render(lines: list[Line]) -> str:
    """The table in Markdown: shares in per cent with standard errors over problems. It does not depend on times."""
    ks = sorted({k for line in lines for k in line.pass_at})
    head = ["benchmark", "problems", "samples", "accuracy", *(f"pass@{k}" for k in ks), f"maj@{VOTES}"]
    rows = [
        [
            line.title,
            str(len(line.ids)),
            str(line.correct.shape[1]),
            _percent(line.accuracy),
            *(_percent(line.pass_at.get(k)) for k in ks),
            _percent(line.majority),
            f"{100 * line.truncated:.1f} %",
            f"{line.tokens:.0f}",
        ]
        for line in lines
    ]
    if paper := five(lines):

        def mean(pairs: list[Pair | None]) -> str:
            known = [p for p in pairs if p is not None]
            return _percent(statistics.mean_of(known) if len(known) == len(pairs) else None)

        rows.append(
            [
                "mean of the five",
                str(sum(len(line.ids) for line in paper)),
                str(paper[0].correct.shape[1]),
                mean([line.accuracy for line in paper]),
                *(mean([line.pass_at.get(k) for line in paper]) for k in ks),
                mean([line.majority for line in paper]),
                f"{100 * np.mean([line.truncated for line in paper]):.1f} %",
                f"{np.mean([line.tokens for line in paper]):.0f}",
            ]
        )
    return markdown([*head, "truncated", "mean tokens"], rows)


def costs(lines: list[Line]) -> str:
    """Time and rate of sampling, as it was when the completions were made, and what could not be graded."""
    rows = []
    for line in lines:
        count = line.tokens * line.correct.size
        rate = f"{count / line.seconds:,.0f}" if line.seconds else "-"
        rows.append([line.title, clock(line.seconds), f"{count:,.0f}", rate, str(line.ungraded)])
    return markdown(["benchmark", "time", "tokens", "tokens/s", "not graded"], rows)


def results(lines: list[Line]) -> str:
    """What `render` shows, as JSON with all digits."""
    rows = []
    for line in lines:
        row = dataclasses.asdict(line)
        del row["correct"], row["seconds"], row["ids"]
        rows.append(row | {"problems": len(line.ids), "samples": line.correct.shape[1]})
    return json.dumps(rows, indent=1) + "\n"


def compare(a: pathlib.Path, b: pathlib.Path) -> str:
    """Accuracy of two evaluations on the problems that both have, and the mean of the paired differences b - a.

    Raises:
      ConfigError: where a directory holds no finished evaluation, or they share no problem.
    """
    left, right = ({line.name: line for line in read(workdir)} for workdir in (a, b))
    rows, differences, means = [], {}, {}
    for name in [name for name in left if name in right]:
        values = {}
        for side, line in (("a", left[name]), ("b", right[name])):
            values[side] = dict(zip(_numbered(line.ids), line.correct.mean(1), strict=True))
        shared = [key for key in values["a"] if key in values["b"]]
        if not shared:
            continue
        x, y = (np.array([values[side][key] for key in shared]) for side in ("a", "b"))
        means[name] = statistics.mean_and_error(x), statistics.mean_and_error(y)
        differences[name] = statistics.paired(x, y)
        rows.append([left[name].title, str(len(shared)), *map(_percent, means[name]), _signed(differences[name])])
    if not rows:
        raise ConfigError(f"--compare {a} {b}: they have no problem in common")
    if set(FIVE) <= set(differences):
        sides = [statistics.mean_of([means[name][side] for name in FIVE]) for side in (0, 1)]
        difference = statistics.mean_of([differences[name] for name in FIVE])
        count = sum(int(row[1]) for row, name in zip(rows, differences, strict=True) if name in FIVE)
        rows.append(["mean of the five", str(count), *map(_percent, sides), _signed(difference)])
    said = markdown(["benchmark", "problems", f"A: {a}", f"B: {b}", "B - A, paired"], rows)
    settings = [json.loads((workdir / "config.json").read_text())["config"] for workdir in (a, b)]
    differ = [name for name in settings[0] | settings[1] if settings[0].get(name) != settings[1].get(name)]
    for name in differ:
        said += f"\n{name}: A {settings[0].get(name)!r}, B {settings[1].get(name)!r}"
    return said


def _numbered(ids: list[str]) -> list[tuple[str, int]]:
    """Ids with which of its like each is: a user's file may have an id twice."""
    seen: dict[str, int] = {}
    keys = []
    for name in ids:
        seen[name] = seen.get(name, -1) + 1
        keys.append((name, seen[name]))
    return keys


def _percent(pair: Pair | None) -> str:
    return "-" if pair is None else f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"


def _signed(pair: Pair) -> str:
    return f"{100 * pair[0]:+.1f} ± {100 * pair[1]:.1f}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, its columns padded so that it can be read as it is."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)

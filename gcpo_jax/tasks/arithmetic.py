"""The task of the tiny default: (a+b)*c-d=, solved in steps, e.g. (3+9)*6-1= -> 12;72;71.

2,916 problems, 1,024 of them held out. A demonstrator for the cold start has two habits: the right one, and one that
drops the brackets (3+9*6-1 -> 54;57;56).
"""

import itertools

import numpy as np

A, B, C, D = range(1, 10), range(1, 10), range(2, 6), range(1, 10)
HELD_OUT = 1024


def problems() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) rows with id, problem and answer, in one fixed order."""
    rows = [
        {"id": f"{a}-{b}-{c}-{d}", "problem": f"({a}+{b})*{c}-{d}=", "answer": str((a + b) * c - d)}
        for a, b, c, d in itertools.product(A, B, C, D)
    ]
    order = np.random.default_rng(2025).permutation(len(rows))
    rows = [rows[k] for k in order]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def operands(problem: str) -> tuple[int, int, int, int]:
    """(a, b, c, d) of a problem's text."""
    left, right = problem.removeprefix("(").removesuffix("=").split(")*")
    a, b = left.split("+")
    c, d = right.split("-")
    return int(a), int(b), int(c), int(d)


def demonstrate(problem: str, rng: np.random.Generator, wrong_habit: float, slips: float) -> str:
    """One worked answer: with probability wrong_habit without the brackets, and with probability slips one step off."""
    a, b, c, d = operands(problem)
    drop = rng.random() < wrong_habit
    slip_at = int(rng.integers(3)) if rng.random() < slips else -1
    off = [int(rng.choice([-10, -2, -1, 1, 2, 10])) if k == slip_at else 0 for k in range(3)]
    first = (b * c if drop else a + b) + off[0]
    second = (a + first if drop else first * c) + off[1]
    return f"{first};{second};{second - d + off[2]}"


def answer(completion: str) -> str | None:
    """What stands after the last semicolon; None where the completion is not numbers between semicolons."""
    fields = completion.strip().split(";")
    ok = all(f.removeprefix("-").isdecimal() for f in fields)
    return fields[-1] if ok else None


def reward(prompt: str, completion: str, row: dict) -> float:
    """1 for the right answer, else 0."""
    del prompt
    return float(answer(completion) == row["answer"])

"""Programming problems in the format of HumanEval or MBPP: completions to programs, programs to verdicts and rewards.

A row of HumanEval has "prompt" (a function up to its docstring), "entry_point" and "test" (which defines
`check(candidate)`); one of MBPP has "test_list" (assert statements) and perhaps "test_setup_code". Programs run in
`sandbox`, whose docstring says what that protects from; nothing is run where the system cannot protect, unless
`unsafe`.
"""

import ast
import builtins
import functools
import re
from collections.abc import Sequence
from typing import Any

from gcpo_jax.tasks import sandbox
from gcpo_jax.tasks.rewards import batched
from gcpo_jax.tasks.sandbox import Program, SandboxUnavailable, Verdict, split

__all__ = [
    "Program",
    "SandboxUnavailable",
    "Verdict",
    "answer",
    "available",
    "extract",
    "fraction",
    "program",
    "reward",
    "rewards",
    "run",
    "run_all",
]

TIMEOUT_S = 10.0
FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
LANGUAGES = ("", "py", "python", "python3", "python2", "pycon")
STARTS = re.compile(r"^(?:def|class|import|from|async def|@)\b|^@", re.MULTILINE)


def available() -> list[str]:
    """What this system lacks for running untrusted programs: nothing where they can be run."""
    box = sandbox.shared()
    try:
        box.judge([Program("assert 1 + 1 == 2", every=True)], TIMEOUT_S)
    except SandboxUnavailable as error:
        return error.missing
    return []


def run(
    program: str | Program, timeout_s: float | int = TIMEOUT_S, memory_mb: int = 512, unsafe: bool = False
) -> Verdict:
    """The verdict on one program: source text that contains its tests, or a Program with its tests apart (safer).

    Args:
      timeout_s: wall seconds, above 0.
      memory_mb: address space of the program's process.
      unsafe: run it with whatever isolation there is.

    Raises:
      SandboxUnavailable: naming what the system lacks.
    """
    return run_all([program], timeout_s, memory_mb, unsafe=unsafe)[0]


def run_all(
    programs: Sequence[str | Program],
    timeout_s: float | int = TIMEOUT_S,
    memory_mb: int = 512,
    workers: int | None = None,
    unsafe: bool = False,
) -> list[Verdict]:
    """The verdicts on many programs, in order, `workers` at a time (None: one for each processor); else as `run`."""
    if timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s}: must be above 0")
    if memory_mb < 64:
        raise ValueError(f"memory_mb={memory_mb}: must be at least 64, which Python itself needs")
    whole = [Program(p) if isinstance(p, str) else p for p in programs]
    return sandbox.shared(unsafe).judge(whole, timeout_s, memory_mb, workers)


def rewards(
    prompts: Sequence[str],
    completions: Sequence[str],
    rows: Sequence[dict[str, Any]],
    every: bool = False,
    timeout_s: float | int = TIMEOUT_S,
    unsafe: bool = False,
) -> list[float]:
    """`reward` (or with `every`, `fraction`) of many completions, judged in parallel.

    Raises:
      ValueError: for a row that is in neither format.
      SandboxUnavailable: naming what the system lacks, unless `unsafe`.
    """
    del prompts  # the row has the problem without the templates around it
    programs = [program(completion, row, every) for completion, row in zip(completions, rows, strict=True)]
    verdicts = run_all(programs, timeout_s, unsafe=unsafe)
    return [v.tests_passed / max(v.tests, 1) if every and not v.passed else float(v.passed) for v in verdicts]


@batched(rewards, missing=available)
def reward(prompt: str, completion: str, row: dict[str, Any], unsafe: bool = False) -> float:
    """1 where the completion passes all tests of the row, else 0."""
    return rewards([prompt], [completion], [row], unsafe=unsafe)[0]


@batched(functools.partial(rewards, every=True), missing=available)
def fraction(prompt: str, completion: str, row: dict[str, Any], unsafe: bool = False) -> float:
    """The share of the row's asserts that hold."""
    return rewards([prompt], [completion], [row], every=True, unsafe=unsafe)[0]


def program(completion: str, row: dict[str, Any], every: bool = False) -> Program:
    """The program that a completion is for a row, with the row's tests apart.

    Raises:
      ValueError: for a row that is in neither format.
    """
    if "test_list" in row:
        tests = "\n".join([row.get("test_setup_code") or "", *row["test_list"]])
        return Program(extract(completion, "", _called(row["test_list"])), tests, every=every)
    if not {"prompt", "entry_point", "test"} <= set(row):
        raise ValueError(
            f"row {row.get('id')!r} has neither test_list (MBPP) nor prompt, entry_point and test (HumanEval), only "
            f"{', '.join(sorted(row))}"
        )
    entry = row["entry_point"]
    tests = f"{row['test']}\n\ncheck({entry})\n"
    return Program(extract(completion, row["prompt"], [entry]), tests, _helpers(row["prompt"], entry), every)


def answer(completion: str) -> str | None:
    """The code of a completion without its comments and layout, for votes; None where it does not parse."""
    try:
        return ast.unparse(ast.parse(extract(completion))) or None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def extract(completion: str, prompt: str = "", entry: Sequence[str] = ()) -> str:
    """The program in a completion: its fenced code, or else its text, continuing `prompt` where it is no whole program.

    Of several fenced blocks the last that defines a name of `entry` is taken, else the last. Text that follows the code
    (of a base model that goes on writing) is cut off.
    """
    text = completion.rpartition("</think>")[2]
    blocks = [body for _, language, body in FENCE.findall(text) if language.lower() in LANGUAGES]
    if blocks:
        code = next((b for b in reversed(blocks) if _defines(b, entry)), blocks[-1])
        return code if not prompt or _defines(code, entry) else _continued(prompt, code)
    if _defines(text, entry) or not prompt:
        start = STARTS.search(text)
        before = f"{_preamble(prompt)}\n" if prompt else ""
        return before + _parsed("", text[start.start() :] if start else text)
    return _continued(prompt, text)


def _continued(prompt: str, text: str) -> str:
    """A prompt with the body that continues it, up to where the next thing begins at the margin."""
    lines = text.split("\n")
    margins = [k for k, line in enumerate(lines) if k and line[:1] not in ("", " ", "\t", "#")]
    for k in margins:
        if _parses(prompt + "\n".join(lines[:k])):
            return prompt + "\n".join(lines[:k])
    return prompt + _parsed(prompt, text)


def _parsed(prompt: str, text: str) -> str:
    """`text` without the lines at its end because of which prompt + text does not parse; all of it where none would."""
    lines = text.split("\n")
    kept = range(len(lines), max(0, len(lines) - 200), -1)
    return next(("\n".join(lines[:k]) for k in kept if _parses(prompt + "\n".join(lines[:k]))), text)


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _defines(text: str, entry: Sequence[str]) -> bool:
    return any(re.search(rf"^(?:def|class|async def)[ \t]+{re.escape(name)}\b", text, re.MULTILINE) for name in entry)


def _preamble(prompt: str) -> str:
    """A prompt's imports and helpers, without the function that is to be written."""
    return prompt[: prompt.rfind("\ndef ") + 1]


def _helpers(prompt: str, entry: str) -> str:
    """What of a prompt the tests may use, as the data set has it and not as a completion redefines it."""
    tree = ast.parse(prompt + "    pass\n")
    tree.body = [s for s in tree.body if getattr(s, "name", None) != entry]
    return ast.unparse(tree)


def _called(tests: Sequence[str]) -> list[str]:
    """The functions that tests can only have from the program."""
    body = ast.parse("\n".join(tests)).body
    called = {n.func.id for s in body for n in ast.walk(s) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return sorted((called - set(vars(builtins))) | split.shadowing(body, ()))

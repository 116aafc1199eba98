"""What an evaluation leaves on disk, and reading it back: nothing in the table comes from anywhere else.

config.json       every setting (rundir.py)
state.json        which policy, the prompts' style, and of each benchmark: title, form, digest, places of its problems
completions.jsonl a line for each (benchmark, problem, sample), written batch by batch and never again
grades.jsonl      a line for each of these: whether it is right, the answer that votes count, perhaps why it failed
table.md          what evaluate prints
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from gcpo_jax.config import ConfigError

Key = tuple[str, int, int]  # benchmark, number of the problem in its file, sample
COMPLETIONS, GRADES, STATE = "completions.jsonl", "grades.jsonl", "state.json"


def key(row: dict[str, Any]) -> Key:
    """What a line is about."""
    return row["benchmark"], row["problem"], row["sample"]


def read(file: pathlib.Path) -> dict[Key, dict[str, Any]]:
    """All whole lines of a file; those of a batch that was torn are written again, and the later one counts."""
    if not file.exists():
        return {}
    rows = {}
    # Not splitlines(): a completion may hold other characters that end a line.
    for line in file.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
            rows[key(row)] = row
        except (ValueError, KeyError, TypeError):
            continue  # the torn end of a killed evaluation
    return rows


def append(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write lines, on disk when this returns."""
    text = "".join(_line(row) for row in rows)
    with file.open("a+b") as out:
        # A torn last line must not swallow the first new one.
        if out.seek(0, os.SEEK_END) and _last_byte(out) != b"\n":
            text = "\n" + text
        out.write(text.encode())
        out.flush()
        os.fsync(out.fileno())


def replace(file: pathlib.Path, text: str) -> None:
    """Write a whole file, or leave the old one."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, file)


def replace_rows(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of lines whole."""
    replace(file, "".join(_line(row) for row in rows))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read_state(workdir: pathlib.Path) -> dict[str, Any]:
    """state.json.

    Raises:
      ConfigError: where the directory holds no evaluation.
    """
    try:
        return json.loads((workdir / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{workdir} holds no evaluation: {workdir / STATE} cannot be read: {error}") from error


def settle(workdir: pathlib.Path, state: dict[str, Any], regrade: bool = False) -> None:
    """Write state.json, or compare: completions of another policy or other problems must not be counted here.

    Raises:
      ConfigError: naming what differs.
    """
    if (workdir / STATE).exists():
        before = read_state(workdir)
        where = f"--workdir={str(workdir)!r} holds completions"
        if state["policy"] is not None and before["policy"] != state["policy"]:
            raise ConfigError(f"{where} of other weights than model.path has now; name another --workdir")
        if before["style"] != state["style"]:
            raise ConfigError(f"{where} to prompts of style {before['style']!r}, now it is {state['style']!r}")
        for name, now in state["benchmarks"].items():
            old = before["benchmarks"].get(name, now)
            if old["questions"] != now["questions"]:
                raise ConfigError(f"{where} to other problems of {name!r} than its file has now")
            if old["digest"] != now["digest"] and not regrade:
                raise ConfigError(f"{where} graded by other answers of {name!r} than its file has now: --regrade does")
        state = state | {"policy": before["policy"]}
        # Benchmarks that are not asked for this time keep their completions.
        state["benchmarks"] = before["benchmarks"] | state["benchmarks"]
    replace(workdir / STATE, json.dumps(state) + "\n")


def fingerprint(directory: str) -> str:
    """Of a model directory's weights and settings: a change of either is seen, whatever the times of the files."""
    path, seen = pathlib.Path(directory), hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), path / "config.json", path / "tokenizer.json"]):
        if not file.exists():
            continue
        size = file.stat().st_size
        seen.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            # Whole files take minutes for large models; training changes every part of one.
            for at in range(0, size, max(1 << 16, size // 64)):
                content.seek(at)
                seen.update(content.read(1 << 16))
    return seen.hexdigest()[:32]

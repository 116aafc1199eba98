"""Reading a JSONL file of problems: every row is checked here, once, and a wrong one is named by file and line."""

import gzip
import hashlib
import json
import math
import pathlib
import zlib
from typing import Any

from gcpo_jax.tasks.spelling import normalise

Row = dict[str, Any]


class DataError(ValueError):
    """Data that cannot be used. The message names the file and line, or the setting, and what is wrong."""


def read(path: pathlib.Path, field: str) -> bytes:
    """The bytes of a file, unpacked where they are gzip.

    Args:
      path: the file.
      field: the setting that names it, for the message.

    Raises:
      DataError: where it cannot be read, or where a .gz file is not (whole) gzip.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" or content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{field}={str(path)!r}: cannot be read: {error}") from error


def parse(content: bytes, name: str, problem_field: str, answer_field: str) -> list[Row]:
    """The rows of a JSONL file, in its order; blank lines are passed over.

    Each is {"id", "problem", "answer", "original"}: "id" is the source's id as text, or LINE-k (ids may repeat);
    "answer" is text, str() of it where the source has a number; "original" is the row as the file has it.

    Raises:
      DataError: naming the file and the line of the first wrong row; or for a file without rows.
    """
    rows = []
    for k, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, k, problem_field, answer_field))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {k}: {error}") from error
    if not rows:
        raise DataError(f"{name}: has no rows")
    return rows


def _row(line: bytes, k: int, problem_field: str, answer_field: str) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        source = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(source, dict):
        raise ValueError(f"a JSON object is needed, not {_short(source)}")
    problem = _field(source, problem_field, "data.problem_field")
    if not isinstance(problem, str):
        raise ValueError(f"field {problem_field!r} must be a string, not {_short(problem)}")
    answer = _field(source, answer_field, "data.answer_field")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer in (math.inf, -math.inf):
        raise ValueError(f"field {answer_field!r} must be a string or a finite number, not {_short(answer)}")
    name = source.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ValueError(f"field 'id' must be a string or an integer, not {_short(name)}")
    row = {"id": f"LINE-{k}" if name is None else str(name), "problem": problem, "answer": str(answer)}
    for field, value in zip(("id", problem_field, answer_field), row.values(), strict=True):
        _check_text(field, value)
    return row | {"original": source}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _field(source: Row, field: str, setting: str) -> Any:
    if field not in source:
        raise ValueError(f"no field {field!r} (set {setting}); it has {', '.join(map(repr, source)) or 'none'}")
    return source[field]


def _check_text(field: str, value: str) -> None:
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    if "\0" in value:
        raise ValueError(f"field {field!r} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"field {field!r} holds half of a surrogate pair: it is not text") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def split(rows: list[Row], held_out: int, name: str) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows, both in the file's order.

    Held out are the `held_out` rows whose problem's sha256 is smallest, among the problems that the file has once in
    any spelling: so the choice depends on neither order nor seed, and no training row repeats a held-out problem.

    Raises:
      DataError: where no row would be left to train on, or too few problems stand in the file once.
    """
    if held_out >= len(rows):
        raise DataError(f"data.held_out={held_out}: {name} has {len(rows)} rows and none would be left to train on")
    times: dict[str, int] = {}
    spelt = [normalise(row["problem"]) for row in rows]
    for text in spelt:
        times[text] = times.get(text, 0) + 1
    once = [row["problem"] for row, text in zip(rows, spelt, strict=True) if times[text] == 1]
    if held_out > len(once):
        raise DataError(f"data.held_out={held_out}: only {len(once)} problems of {name} stand in it once")
    kept = set(sorted(once, key=lambda problem: hashlib.sha256(problem.encode()).digest())[:held_out])
    return [r for r in rows if r["problem"] not in kept], [r for r in rows if r["problem"] in kept]

"""From the settings of section `data` to problems, and the order in which they are trained on."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import grain

from gcpo_jax import config
from gcpo_jax.tasks import arithmetic, jsonl
from gcpo_jax.tasks.jsonl import DataError, Row

Problems = Sequence[Row]  # rows with at least "id", "problem" and "answer", all text
FORMAT = 2  # raised whenever what is written for the same file changes


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """Problems to train on and problems kept for evaluation."""

    train: Problems
    held_out: Problems


def build(data: config.Data) -> Task:
    """The problems that `data` names, prepared on disk if they are not yet.

    A row has every field of its source, "id", "problem" and "answer" as text, and for a JSONL file "original": the row
    as the file has it. All runs of the same data are measured on the same held-out rows.

    Raises:
      DataError: naming file and line, or the setting.
    """
    contents = {}
    if data.task == "jsonl":
        named = {"data.path": data.path} | ({"data.eval_path": data.eval_path} if data.eval_path else {})
        contents = {field: jsonl.read(pathlib.Path(path), field) for field, path in named.items()}
    directory = cache_directory(data.directory) / data.task / _digest(data, contents)
    if not directory.exists():
        _prepare(data.task, _splits(data, contents), directory, f"data.directory={data.directory!r}")
    return Task(_open(directory, "train"), _open(directory, "held_out"))


def prepared(task: str, rows: Sequence[Row], digest: str) -> Problems:
    """Rows as they come back from a data set in the user's cache, which is written there if it is not yet.

    Args:
      task: a name of builders.BUILDERS.
      digest: of everything that decides the rows.

    Raises:
      DataError: where it cannot be written or read.
    """
    directory = cache_directory() / task / digest
    if not directory.exists():
        _prepare(task, {"test": list(rows)}, directory, "XDG_CACHE_HOME")
    return _open(directory, "test")


def batch_indices(size: int, queries: int, step: int, seed: int) -> list[int]:
    """The problems of one step: `queries` numbers below `size`.

    Every epoch is a fresh permutation of all problems, a batch may straddle epochs, and nothing but these four numbers
    decides: a resumed run needs no state.
    """
    # Every repetition is shuffled anew, and none is stored.
    order: Any = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    return [order[place] for place in range(step * queries, (step + 1) * queries)]


def fingerprint(problems: Problems) -> dict[str, str]:
    """The number of problems and a digest of what they say: equal where the problems are."""
    said = json.dumps([[row["id"], row["problem"], row["answer"]] for row in problems])
    return {"number": str(len(problems)), "sha256": hashlib.sha256(said.encode()).hexdigest()}


def cache_directory(named: str = "") -> pathlib.Path:
    """The directory that was named, or gcpo_jax in the user's cache directory."""
    if named:
        return pathlib.Path(named).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gcpo_jax"


def _digest(data: config.Data, contents: dict[str, bytes]) -> str:
    """Of everything that decides what is written: a changed file or setting is prepared anew, never read stale."""
    if data.task == "arithmetic":
        said = [FORMAT, arithmetic.problems()]
    else:
        files = {field: hashlib.sha256(content).hexdigest() for field, content in contents.items()}
        held_out = 0 if data.eval_path else data.held_out
        said = [FORMAT, files, data.problem_field, data.answer_field, held_out]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def _splits(data: config.Data, contents: dict[str, bytes]) -> dict[str, list[Row]]:
    if data.task == "arithmetic":
        train, held_out = arithmetic.problems()
    else:
        rows = {
            field: jsonl.parse(content, getattr(data, field.partition(".")[2]), data.problem_field, data.answer_field)
            for field, content in contents.items()
        }
        train, held_out = rows["data.path"], rows.get("data.eval_path")
        if held_out is None:
            train, held_out = jsonl.split(train, data.held_out, data.path)
    return {"train": train, "held_out": held_out}


def _prepare(task: str, splits: dict[str, list[Row]], directory: pathlib.Path, setting: str) -> None:
    """Write a data set beside its place and rename it there: whoever looks finds all of it or nothing."""
    from gcpo_jax.tasks import builders  # noqa: PLC0415  most of a second, which asking for a reward need not wait

    aside = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix="incomplete-"))
        written = builders.write(task, splits, aside)
        try:
            written.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was first, with the same content
                raise
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{setting}: a prepared data set cannot be written below {directory.parent}: "
            f"{error}; name a directory that can be written to"
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _open(directory: pathlib.Path, split: str) -> list[Row]:
    from gcpo_jax.tasks import builders  # noqa: PLC0415  as in _prepare

    try:
        rows = builders.read(directory, split)
    except Exception as error:  # whatever a damaged file makes of the three libraries that read it
        raise DataError(f"{directory}: cannot be read ({error}); delete it and it is prepared again") from error
    return [row.get("original", {}) | row for row in rows]

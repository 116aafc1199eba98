"""Evaluation sets by name, or by the path of a file in the same form, as TFDS data sets.

Three forms of a row, told apart by their fields:

  answer     "problem", "answer"                                      a question with one right answer
  humaneval  "prompt" (a function up to its docstring), "entry_point", "test" (which defines check(candidate))
  mbpp       "prompt" (what a function must do), "test_list" (assert statements), perhaps "test_setup_code"

"id" may be absent, any other field is kept. docs/evaluate.md says where the files of the named ones come from.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from gcpo_jax.tasks import arithmetic, jsonl
from gcpo_jax.tasks.jsonl import DataError, Row
from gcpo_jax.tasks.load import Problems, prepared

FORMAT = 1  # raised whenever what is written for the same file changes


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What a name stands for."""

    title: str
    file: str  # in the data directory; empty: generated
    split: str = ""  # only rows whose "split" is this
    shots: int = 0  # solved examples in the prompt


NAMED = {
    "aime24": Known("AIME 2024", "aime24.jsonl"),
    "aime25": Known("AIME 2025", "aime25.jsonl"),
    "amc23": Known("AMC 2023", "amc23.jsonl"),
    "math500": Known("MATH-500", "math500.jsonl"),
    "minerva_math": Known("Minerva Math", "minerva_math.jsonl"),
    "gsm8k": Known("GSM8K", "gsm8k_test.jsonl"),
    "humaneval": Known("HumanEval", "humaneval.jsonl"),
    "humaneval_5shot": Known("HumanEval, 5-shot", "humaneval.jsonl", shots=5),
    "mbpp": Known("MBPP", "mbpp.jsonl", split="test"),
    "arithmetic": Known("Arithmetic", ""),
}
FIVE = ("aime24", "aime25", "amc23", "math500", "minerva_math")  # of the paper's Table 1
SHOTS = "mbpp.jsonl"  # HumanEval has no training part: its shots are the first of MBPP's split "prompt"

_FORMS = {
    "answer": ("problem", "answer"),
    "humaneval": ("prompt", "entry_point", "test"),
    "mbpp": ("prompt", "test_list"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems that are asked and graded alike.

    Attributes:
      name: a key of NAMED, or the path as it was given.
      form: "answer" | "humaneval" | "mbpp".
      rows: with "id" as text.
      shots: rows of form "mbpp" with "canonical_solution", shown before the problem.
      digest: of rows and shots.
    """

    name: str
    title: str
    form: str
    rows: Problems
    shots: Problems
    digest: str


def load(name: str, directory: str) -> Benchmark:
    """A benchmark by name, from its file in `directory`, or of a user's own file by path (.jsonl or .jsonl.gz).

    Raises:
      DataError: for a name that is neither, a file that is not there, or a row in no form (by file and line).
    """
    known = NAMED.get(name)
    if known is None and not name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(
            f"benchmarks={name!r}: must be one of {', '.join(NAMED)}, or the path of a .jsonl or .jsonl.gz file"
        )
    known = known or Known(pathlib.Path(name).name.partition(".")[0], name)
    if not known.file:
        rows, form = arithmetic.problems()[1], "answer"
    else:
        path = pathlib.Path(directory, known.file) if name in NAMED else pathlib.Path(name)
        if not path.exists():
            hint = "" if name not in NAMED else "; --data names the directory that has it (see docs/evaluate.md)"
            raise DataError(f"benchmarks={name!r}: {path} does not exist{hint}")
        form, rows = parse(jsonl.read(path, "benchmarks"), str(path))
        rows = [row for row in rows if not known.split or row.get("split") == known.split]
        if not rows:
            raise DataError(f"{path}: has no row whose split is {known.split!r}")
    shots = []
    if known.shots:
        path = pathlib.Path(directory, SHOTS)
        _, examples = parse(jsonl.read(path, f"benchmarks={name!r}, its examples"), str(path))
        shots = [row for row in examples if row.get("split") == "prompt"][: known.shots]
        if len(shots) < known.shots:
            raise DataError(f"{path}: has only {len(shots)} rows whose split is 'prompt'; {known.shots} are needed")
    digest = hashlib.sha256(json.dumps([FORMAT, rows, shots]).encode()).hexdigest()[:32]
    return Benchmark(name, known.title, form, prepared("benchmark", rows, digest), shots, digest)


def parse(content: bytes, name: str) -> tuple[str, list[Row]]:
    """(form, rows) of a file; all rows are in the form of the first.

    Raises:
      DataError: naming the file and the line of the first wrong row; or for a file without rows.
    """
    form, rows = "", []
    for k, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("a JSON object is needed")
            form = form or _form(row)
            rows.append(_checked(row, form) | {"id": str(row.get("id", f"LINE-{k}"))})
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {k}: {error}") from error
    if not rows:
        raise DataError(f"{name}: has no rows")
    return form, rows


def _form(row: Row) -> str:
    for form, fields in _FORMS.items():
        if set(fields) <= set(row):
            return form
    needed = ", or ".join(" and ".join(fields) for fields in _FORMS.values())
    raise ValueError(f"a row has {needed}; this one has {', '.join(map(repr, row)) or 'nothing'}")


def _checked(row: Row, form: str) -> Row:
    for field in _FORMS[form]:
        if field not in row:
            raise ValueError(f"no field {field!r}, which the first row has; it has {', '.join(map(repr, row))}")
    if form == "answer" and type(row["answer"]) in (int, float):
        row = row | {"answer": str(row["answer"])}
    for field in _FORMS[form]:
        value: Any = row[field]
        if field == "test_list":
            if not (isinstance(value, list) and value and all(isinstance(test, str) for test in value)):
                raise ValueError(f"field 'test_list' must be a list of assert statements, not {json.dumps(value)[:80]}")
        elif not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {field!r} must be text, not {json.dumps(value)[:80]}")
    return row


def question(row: Row) -> str:
    """What is asked, of a row of any form."""
    return row["problem"] if "problem" in row else row["prompt"]


def subset(rows: Problems, limit: int) -> list[int]:
    """Places of at most `limit` rows (0: all), in order: those whose question's sha256 is smallest.

    A larger limit keeps what a smaller one chose; neither seed nor order of the file matters.
    """
    places = range(len(rows))
    if not limit:
        return list(places)
    chosen = sorted(places, key=lambda k: (hashlib.sha256(question(rows[k]).encode()).digest(), k))
    return sorted(chosen[:limit])

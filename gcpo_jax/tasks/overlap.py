"""Problems that stand in two files, found by their text.

Same is a problem of the same text up to its spelling (spelling.py). Near is a training row that has more than half of
the 13-word sequences of an evaluation problem: a copy with other notation or another ending, or else a sibling made
from the same template.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from gcpo_jax.tasks.jsonl import DataError, Row
from gcpo_jax.tasks.spelling import normalise

_WORD = re.compile(r"\w+")
LENGTH = 13


def find(
    train: Iterable[Row],
    held_out: Sequence[Row],
    near: bool = False,
    question: Callable[[Row], str] = lambda row: row["problem"],
) -> list[tuple[str, str]]:
    """(id of a training row, id of an evaluation row whose problem it repeats), in the order of `train`.

    Args:
      near: count near rows too.
    """
    same: dict[str, str] = {}
    parts: list[set[int]] = []
    holders: dict[int, list[int]] = {}
    for k, row in enumerate(held_out):
        same.setdefault(normalise(question(row)), str(row["id"]))
        parts.append(_sequences(question(row)) if near else set())
        for part in parts[k]:
            holders.setdefault(part, []).append(k)
    pairs = []
    for row in train:
        text = question(row)
        found = same.get(normalise(text))
        if found is None and near:
            shared: dict[int, int] = {}
            for part in _sequences(text) & holders.keys():
                for k in holders[part]:
                    shared[k] = shared.get(k, 0) + 1
            found = next((str(held_out[k]["id"]) for k, n in shared.items() if 2 * n > len(parts[k])), None)
        if found is not None:
            pairs.append((str(row["id"]), found))
    return pairs


def _sequences(text: str) -> set[int]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return {hash(tuple(words[k : k + LENGTH])) for k in range(len(words) - LENGTH + 1)}


def refuse(pairs: list[tuple[str, str]], name: str) -> None:
    """Nothing where there are no pairs.

    Raises:
      DataError: with the number of pairs, the first ones, and what to do.
    """
    if pairs:
        shown = ", ".join(f"{train!r} is {test!r}" for train, test in pairs[:5]) + (", ..." if pairs[5:] else "")
        raise DataError(
            f"{len(pairs)} training problems stand in {name} too ({shown}): take them out of the training file "
            "(python -m gcpo_jax.tasks.overlap TRAIN EVALUATION lists them), or set data.overlap=allow"
        )


def main(argv: list[str]) -> int:
    """python -m gcpo_jax.tasks.overlap TRAIN EVALUATION...: each pair, separated by tabs; 1 where there is one."""
    import pathlib  # noqa: PLC0415

    from gcpo_jax.tasks import benchmarks, jsonl  # noqa: PLC0415

    if len(argv) < 2:
        sys.exit("usage: python -m gcpo_jax.tasks.overlap TRAIN.jsonl EVALUATION.jsonl ...")
    try:
        (_, train), *others = (benchmarks.parse(jsonl.read(pathlib.Path(a), "file"), a) for a in argv)
    except DataError as error:
        sys.exit(f"error: {error}")
    found = 0
    for name, (_, rows) in zip(argv[1:], others, strict=True):
        for pair in find(train, rows, True, benchmarks.question):
            found += 1
            print(name, *pair, sep="\t")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Ragged token lists -> right-padded arrays of few distinct shapes, so that little is compiled and little padded."""

from collections.abc import Iterator, Sequence

import numpy as np


def bucket(length: int, least: int = 16) -> int:
    """The padded length of `length` tokens: a multiple of `least`, or of an eighth of the power of two below it."""
    step = max(least, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


def count_bucket(count: int) -> int:
    """The padded number of `count` rows: a power of two, or one and a half of one."""
    power = 1 << max(0, (count - 1).bit_length())
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def largest_share(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`, and 1 at least."""
    return next(m for m in range(n, 0, -1) if n % m == 0 and (m <= limit or m == 1))


def chunks(lengths: Sequence[int], rows: int, multiple: int = 1) -> Iterator[tuple[list[int], int]]:
    """Cut rows of the given lengths into device calls: (row numbers, padded row count), longest first.

    A call has `rows` rows, or fewer where that holds all that is left. Padded row counts are multiples of `multiple`,
    the parts that a mesh cuts rows into.
    """
    rows = max(multiple, rows // multiple * multiple)
    order = sorted(range(len(lengths)), key=lambda r: -lengths[r])
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        yield part, min(rows, count_bucket(-(-len(part) // multiple)) * multiple)


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all of the rows begin with, leaving each at least one; none of a single row."""
    if len(rows) == 1:
        return 0
    low, high = min(map(tuple, rows)), max(map(tuple, rows))  # as words: where these agree, so do all between them
    shortest = min(map(len, rows)) - 1
    return next((k for k in range(shortest) if low[k] != high[k]), shortest)


def pad_rows(rows: Sequence[Sequence[int]], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens[size, width] right-padded with 0, lengths[size]); rows beyond those given are empty."""
    tokens = np.zeros((size, width), np.int32)
    lengths = np.zeros(size, np.int32)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = row
        lengths[r] = len(row)
    return tokens, lengths

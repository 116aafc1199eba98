"""Ragged token lists -> right-padded arrays of few distinct shapes, so that little is compiled and little padded."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class InBlocks:
    """A prompt whose attention mask is the paper's structural model: blocks see the first part and not each other.

    All blocks stand behind `first`, at the same positions; the ending sees everything and stands behind the longest.
    As a sequence it is its tokens one after the other.
    """

    first: list[int]
    blocks: list[list[int]]
    ending: list[int]

    def __len__(self) -> int:
        return len(self.first) + sum(map(len, self.blocks)) + len(self.ending)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain(self.first, *self.blocks, self.ending)

    @property
    def end(self) -> int:
        """The position of what follows."""
        return len(self.first) + max(map(len, self.blocks), default=0) + len(self.ending)


Prompt = Sequence[int] | InBlocks


class Packed(NamedTuple):
    """Prompts with what they share apart: one computation of it serves them all."""

    first: Sequence[int]  # that every prompt begins with
    blocks: list[list[int]]  # that some of them have
    seen: list[list[bool]]  # of each prompt: which blocks are its own
    endings: list[Sequence[int]]  # of each prompt: what is left


def whole(prompt: Sequence[int], n: int = 1) -> Packed:
    """A prompt that all of n rows share to its end."""
    return Packed(prompt, [], [[] for _ in range(n)], [[] for _ in range(n)])


class Shape(NamedTuple):
    """Of the arrays that hold Packed: the rows of each, and widths in tokens."""

    n: int
    first: int  # P
    own: int  # W, of an ending and what follows it
    blocks: int = 0  # m
    block: int = 0  # A
    family: int = 1  # t: Packed whose first parts are computed as one trie
    nodes: int = 0  # U of it, where t > 1


def pack(prompts: Sequence[Prompt]) -> Packed:
    """What prompts share that begin alike or, in blocks, belong to one query.

    Raises:
      ValueError: for prompts in blocks that begin differently, or end in nothing.
    """
    plain = [p for p in prompts if not isinstance(p, InBlocks)]
    if plain:
        shared = common(plain)
        return Packed(plain[0][:shared], [], [[] for _ in plain], [p[shared:] for p in plain])
    blocked = [p for p in prompts if isinstance(p, InBlocks)]
    at: dict[tuple, int] = {}  # of a block, and of its copies where a prompt has several
    lists = []
    for prompt in blocked:
        if prompt.first != blocked[0].first:
            raise ValueError("prompts in blocks share a computation only where they begin alike")
        if not prompt.ending:
            raise ValueError("a prompt in blocks needs an ending, which sees all of them")
        keys = [(tuple(block), prompt.blocks[:k].count(block)) for k, block in enumerate(prompt.blocks)]
        lists.append({at.setdefault(key, len(at)) for key in keys})
    seen = [[k in mine for k in range(len(at))] for mine in lists]
    return Packed(blocked[0].first, [list(block) for block, _ in at], seen, [p.ending for p in blocked])


def trie(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The prefix trie of rows: (node[t, width] of each token, place[U] in the flattened rows where each node stands).

    Two tokens have one node where their rows agree up to and including them. Beyond a row's end nodes mean nothing.
    """
    node, place = np.zeros((len(rows), width), np.int32), []
    before: int | None = None
    # In the order of words, no earlier row agrees with a row for longer than the one before it.
    for r in sorted(range(len(rows)), key=lambda r: tuple(rows[r])):
        length, same = len(rows[r]), 0
        if before is not None:
            shorter = min(length, len(rows[before]))
            differ = np.asarray(rows[r][:shorter]) != np.asarray(rows[before][:shorter])
            same = int(differ.argmax()) if differ.any() else shorter
            node[r, :same] = node[before, :same]
        node[r, same:length] = len(place) + np.arange(length - same)
        place += range(r * width + same, r * width + length)
        before = r
    return node, np.asarray(place, np.int32)


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


def shape_of(packed: Sequence[Packed], n: int, more: int = 0, family: int = 1) -> Shape:
    """Of arrays that hold these, with `more` tokens behind the longest ending.

    Args:
      family: every so many of them, which have no blocks, are to be computed as a trie. They are, if it has fewer nodes
        than they have tokens by half a row at least: so coarse, that few programs differ in nothing else.
    """
    first, ending = max(len(p.first) for p in packed), max(len(e) for p in packed for e in p.endings)
    blocks = [block for p in packed for block in p.blocks]
    own = (bucket(ending) if ending else 0) + more
    if not blocks:
        P = bucket(first)
        families = [packed[k : k + family] for k in range(0, len(packed), family)] if family > 1 else []
        nodes = max((-(-2 * len(trie([p.first for p in f], P)[1]) // P) * P // 2 for f in families), default=0)
        return Shape(n, P, own, family=family, nodes=nodes) if nodes < family * P else Shape(n, P, own)
    return Shape(n, bucket(first), own, max(len(p.blocks) for p in packed), bucket(max(map(len, blocks))))


class Arrays(NamedTuple):
    """B Packed of one Shape; padding has a prompt of one token."""

    first: np.ndarray  # [B, P]
    lengths: np.ndarray  # [B]
    rows: np.ndarray  # [B, n, W] endings and what follows
    row_lengths: np.ndarray  # [B, n]
    blocks: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # tokens [B, m, A], lengths [B, m], seen [B, n, m]
    trie: tuple[np.ndarray, np.ndarray] | None  # node [B, P], place [B / t, U]


def pad_packed(packed: Sequence[Packed | None], shape: Shape, rows: Sequence[Sequence[int]] | None = None) -> Arrays:
    """Packed as arrays; None is padding.

    Args:
      rows: endings and what follows them, of all Packed one after the other; None: the endings alone.
    """
    B, (n, P, W, m, A, t, U) = len(packed), shape
    first, lengths = pad_rows([[] if p is None else p.first for p in packed], B, P)
    if rows is None:
        rows = [e for p in packed for e in ([[]] * n if p is None else p.endings)]
    tokens, row_lengths = pad_rows(rows, B * n, W)
    blocks = tries = None
    if t > 1:
        node, place = np.zeros((B, P), np.int32), np.zeros((B // t, U), np.int32)
        for at in range(0, B, t):
            node[at : at + t], nodes = trie([[] if p is None else p.first for p in packed[at : at + t]], P)
            place[at // t, : len(nodes)] = nodes
        tries = node, place
    if m:
        each = [[] if p is None else p.blocks for p in packed]
        ids, block_lengths = pad_rows([b for bs in each for b in [*bs, *[[]] * (m - len(bs))]], B * m, A)
        seen = np.zeros((B, n, m), bool)
        for at, p in enumerate(packed):
            for row, mine in enumerate([] if p is None else p.seen):
                seen[at, row, : len(mine)] = mine
        blocks = ids.reshape(B, m, A), block_lengths.reshape(B, m), seen
    return Arrays(first, np.maximum(lengths, 1), tokens.reshape(B, n, W), row_lengths.reshape(B, n), blocks, tries)

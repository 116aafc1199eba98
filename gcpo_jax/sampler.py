"""Prompts -> completions with log-probabilities, n per prompt.

Axes: B prompts, n samples of each, P prompt tokens, T new tokens, V vocabulary.
The policy is softmax(logits / temperature); top-k and top-p only restrict which of its tokens are drawn. The
log-probabilities returned are the policy's own, so they are the ones that scorer.score computes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from gcpo_jax import models, slots
from gcpo_jax.batching import (
    InBlocks,
    Packed,
    Prompt,
    Shape,
    bucket,
    count_bucket,
    largest_share,
    pack,
    pad_packed,
    shape_of,
    whole,
)
from gcpo_jax.partition import fetch, put_rows


class Samples(NamedTuple):
    """n completions of each prompt, ragged: tokens[b][k] includes the end id when there is one."""

    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]


def generate(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float | int = 1.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    max_rows: int = 512,
) -> list[list[tuple[list[int], list[float]]]]:
    """Sample n completions of each prompt.

    Args:
      prompts: token ids, one list a prompt, none empty.
      temperature: 0 is greedy; the log-probabilities are then those at temperature 1.
      eos_ids: a completion ends with the first of these; the id is part of it.
      seed: a completion depends on (seed, index of its prompt, index of the sample) and on nothing beside it.
      max_rows: rows that run at once; memory, never results.

    Returns:
      For each prompt, n pairs (tokens, log-probability of each token).

    Raises:
      ValueError: for an empty prompt, an id outside the vocabulary, or a setting out of range.
    """
    samples = sample(
        model_config,
        params,
        prompts,
        key=jax.random.key(seed),
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=eos_ids,
        max_rows=max_rows,
    )
    return [list(zip(t, p, strict=True)) for t, p in zip(samples.tokens, samples.logprobs, strict=True)]


def sample(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Sequence[Prompt],
    *,
    key: PRNGKeyArray,
    n: int,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    eos_ids: Sequence[int] = (),
    max_rows: int = 512,
    index: Sequence[int] | None = None,
    alike: int = 1,
    per_query: int = 1,
    done: Callable[[int, list[list[int]]], None] | None = None,
) -> Samples:
    """As generate, with a key. Up to `max_rows` rows run at once, and as one ends the next begins.

    Args:
      index: what stands for each prompt's index in its noise; by default its place in the list.
      alike: every so many prompts begin alike, or are of one query in blocks: what they share is computed once.
      per_query: every so many prompts, a multiple of alike, are of one query: beginnings that some of them share are
        computed once, for as many prompts as run at once.
      done: is told each prompt's place in the list and its n completions, while other device calls go on.
    """
    _check(model_config, prompts, n, max_new_tokens, temperature, top_k, top_p, max_rows)
    tokens: list[list[list[int]]] = [[] for _ in prompts]
    logprobs: list[list[list[float]]] = [[] for _ in prompts]
    running = []
    layout = model_config.layout
    shards = 1 if layout is None else layout.row_shards
    index = range(len(prompts)) if index is None else index
    families = arrange(prompts, n, max_rows, shards, alike, per_query)
    for numbers, call in calls([len(p) for p in prompts], n, max_new_tokens, max_rows, shards, families):
        # Every shard has its part of the prompts, and none has two more than another; a family lies together.
        size, packed = len(prompts) // len(families), len(families[0])
        placed = np.full((shards, call.prompts // shards // size), -1)
        placed.T.flat[: len(numbers)] = numbers
        order = placed.ravel().tolist()
        rows = [f * size + k if f >= 0 else -1 for f in order for k in range(size)]
        called = [prompts[r] if r >= 0 else [0] for r in rows]
        arrays = pad_packed([p for f in order for p in (families[f] if f >= 0 else [None] * packed)], call.shared)
        blocks = None if arrays.blocks is None else models.Blocks(*arrays.blocks)
        endings = (arrays.rows, np.maximum(arrays.row_lengths, 1)) if call.shared.own else (None, None)
        trie = None if arrays.trie is None else models.Trie(*arrays.trie)
        given = slots.Prompts(arrays.first, arrays.lengths, *endings, blocks, trie)
        lengths = np.array([len(p) for p in called], np.int32)
        end = np.array([p.end if isinstance(p, InBlocks) else len(p) for p in called], np.int32)
        number = np.array([index[r] if r >= 0 else 0 for r in rows], np.int32)
        out = slots.run(
            model_config,
            params,
            *put_rows(layout, given, lengths, end, number, np.array(rows) >= 0),
            key,
            n=n,
            together=call.together,
            lanes=call.lanes,
            computed=call.computed,
            width=call.width,
            max_new_tokens=max_new_tokens,
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            eos_ids=tuple(int(e) for e in eos_ids),
            apart=layout is None and jax.default_backend() == "cpu",
        )
        running.append((rows, out))
    for rows, out in running:
        drawn, logp, length = fetch(out)
        for at, row in enumerate(rows):
            if row < 0:
                continue
            tokens[row] = [drawn[at, k, : length[at, k]].tolist() for k in range(n)]
            logprobs[row] = [logp[at, k, : length[at, k]].tolist() for k in range(n)]
            if done is not None:
                done(row, tokens[row])
    return Samples(tokens, logprobs)


class Call(NamedTuple):
    """The shapes of one device call; see slots.run."""

    prompts: int  # Q, padded
    width: int  # P of the caches
    together: int  # m
    lanes: int  # B
    computed: int  # F
    shared: Shape  # of what is computed; own = 0: every prompt is a first part


def calls(
    lengths: Sequence[int],
    n: int,
    max_new_tokens: int,
    max_rows: int,
    shards: int,
    families: Sequence[Sequence[Packed]],
) -> Iterator[tuple[list[int], Call]]:
    """The device calls for prompts of these lengths, longest first: which families, and shapes.

    A call ends where prompts get half as long and it has enough of them to fill its lanes.

    Args:
      families: as arrange returns them.
    """
    size = len(lengths) // len(families) if families else 1
    longest = [max(lengths[k : k + size]) for k in range(0, len(lengths), size)]
    order = sorted(range(len(longest)), key=lambda f: -longest[f])
    while order:
        first = longest[order[0]]
        ends = (k for k, f in enumerate(order) if k * size * n >= max_rows and 2 * longest[f] <= first)
        end = next(ends, len(order))
        numbers, order = order[:end], order[end:]
        prompts = count_bucket(-(-len(numbers) // shards)) * shards * size
        width = bucket(first)
        # Rows of one prompt share its keys where all run at once or where its keys outweigh their own. In lanes of
        # their own they need not wait for each other.
        share = prompts * n <= max_rows or width >= max_new_tokens
        together = largest_share(n, max_rows // shards) if share else 1
        lanes = max(1, min(prompts * n, max_rows) // (together * shards)) * shards
        unit = shards * size
        computed = min(prompts, -(-lanes * together // (n * unit)) * unit)
        called = [packed for f in numbers for packed in families[f]]
        shared = shape_of(called, size // len(families[0]), family=len(families[0]))
        yield numbers, Call(prompts, width, together, lanes, computed, shared)


def arrange(
    prompts: Sequence[Prompt], n: int, max_rows: int, shards: int = 1, alike: int = 1, per_query: int = 1
) -> list[list[Packed]]:
    """Families of prompts that are computed together, all of equally many.

    A family's are of one query, as many as divide its number and run at once, and what they begin with is a trie. Each
    Packed of it has `alike` of them, or one, where some of those begin differently. In blocks a family is one Packed.
    """
    at_once = max(1, max_rows // n)
    if prompts and isinstance(prompts[0], InBlocks):
        alike = largest_share(alike, at_once)
        return [[pack(prompts[k : k + alike])] for k in range(0, len(prompts), alike)]
    packed = [pack(prompts[k : k + alike]) for k in range(0, len(prompts), alike)] if alike > 1 else []
    if not packed or not all(p.first for p in packed):
        alike, packed = 1, [whole(list(prompt)) for prompt in prompts]
    size = largest_share(max(1, per_query // alike), max(1, at_once // shards // alike))
    return [packed[k : k + size] for k in range(0, len(packed), size)]


def _check(model_config, prompts, n, max_new_tokens, temperature, top_k, top_p, max_rows) -> None:
    for name, value, ok, allowed in (
        ("n", n, n >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or above"),
        ("top_k", top_k, top_k >= 0, "0 (off) or above"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("max_rows", max_rows, max_rows >= 1, "at least 1"),
    ):
        if not ok:
            raise ValueError(f"{name}={value!r}: must be {allowed}")
    for b, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{b}] is empty")
        if min(prompt) < 0 or max(prompt) >= model_config.vocab_size:
            raise ValueError(f"prompts[{b}] holds an id outside [0, {model_config.vocab_size})")

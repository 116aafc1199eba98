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
    pad_rows,
    shape_of,
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
    done: Callable[[int, list[list[int]]], None] | None = None,
) -> Samples:
    """As generate, with a key. Up to `max_rows` rows run at once, and as one ends the next begins.

    Args:
      index: what stands for each prompt's index in its noise; by default its place in the list.
      alike: every so many prompts begin alike, or are of one query in blocks: what they share is computed once.
      done: is told each prompt's place in the list and its n completions, while other device calls go on.
    """
    _check(model_config, prompts, n, max_new_tokens, temperature, top_k, top_p, max_rows)
    tokens: list[list[list[int]]] = [[] for _ in prompts]
    logprobs: list[list[list[float]]] = [[] for _ in prompts]
    running = []
    layout = model_config.layout
    shards = 1 if layout is None else layout.row_shards
    index = range(len(prompts)) if index is None else index
    packed = pack_alike(prompts, alike, max(1, max_rows // n))
    alike = len(prompts) // max(1, len(packed))
    for groups, call in calls([len(p) for p in prompts], n, max_new_tokens, max_rows, shards, packed):
        # Every shard has its part of the prompts, and none has two more than another; those alike lie together.
        placed = np.full((shards, call.prompts // shards // alike), -1)
        placed.T.flat[: len(groups)] = groups
        entries = placed.ravel().tolist()
        rows = [g * alike + k if g >= 0 else -1 for g in entries for k in range(alike)]
        called = [prompts[r] if r >= 0 else [0] for r in rows]
        if call.shared.own:
            arrays = pad_packed([packed[g] if g >= 0 else None for g in entries], call.shared)
            blocks = None if arrays.blocks is None else models.Blocks(*arrays.blocks)
            row_lengths = np.maximum(arrays.row_lengths, 1)
            given = slots.Prompts(arrays.first, arrays.lengths, arrays.rows, row_lengths, blocks)
        else:
            given = slots.Prompts(*pad_rows([list(p) for p in called], call.prompts, call.width), None, None, None)
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
    shared: Shape  # of what is computed; own = 0: prompts share nothing


def calls(
    lengths: Sequence[int], n: int, max_new_tokens: int, max_rows: int, shards: int, packed: Sequence[Packed]
) -> Iterator[tuple[list[int], Call]]:
    """The device calls for prompts of these lengths, longest first: which of `packed`, and shapes.

    A call ends where prompts get half as long and it has enough of them to fill its lanes.

    Args:
      packed: each of len(lengths) / len(packed) prompts.
    """
    alike = len(lengths) // max(1, len(packed))
    longest = [max(lengths[g * alike : (g + 1) * alike]) for g in range(len(packed))]
    order = sorted(range(len(packed)), key=lambda g: -longest[g])
    while order:
        first = longest[order[0]]
        ends = (k for k, g in enumerate(order) if k * alike * n >= max_rows and 2 * longest[g] <= first)
        end = next(ends, len(order))
        groups, order = order[:end], order[end:]
        prompts = count_bucket(-(-len(groups) // shards)) * shards * alike
        width = bucket(first)
        # Rows of one prompt share its keys where all run at once or where its keys outweigh their own. In lanes of
        # their own they need not wait for each other.
        share = prompts * n <= max_rows or width >= max_new_tokens
        together = largest_share(n, max_rows // shards) if share else 1
        lanes = max(1, min(prompts * n, max_rows) // (together * shards)) * shards
        unit = shards * alike
        computed = min(prompts, -(-lanes * together // (n * unit)) * unit)
        called = [packed[g] for g in groups]
        shared = shape_of(called, alike) if called[0].first else Shape(1, width, 0)
        yield groups, Call(prompts, width, together, lanes, computed, shared)


def pack_alike(prompts: Sequence[Prompt], alike: int, limit: int) -> list[Packed]:
    """What every so many prompts share: `alike` of them, in blocks the most that divide it and are within `limit`.

    Each by itself where some begin differently.
    """
    if prompts and isinstance(prompts[0], InBlocks):
        alike = largest_share(alike, limit)
    packed = [pack(prompts[k : k + alike]) for k in range(0, len(prompts), alike)]
    return packed if alike == 1 or all(p.first for p in packed) else [pack([p]) for p in prompts]


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

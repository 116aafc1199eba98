"""Decoding in slots: a fixed number of lanes, each with m rows of one prompt; what has ended leaves, what waits enters.

One jitted loop does it all: no step waits for the host, no shape changes. Axes: Q prompts, n samples of each, P prompt
tokens, T new tokens. An entry is m samples of one prompt, so Q n / m entries wait for B lanes. What the rows of a lane
have drawn lies in rings of T columns, of which all lanes write the same one in a step (models.decode_step).
On a mesh each part of the rows (a shard, s of them) has prompts, queue and lanes of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gcpo_jax import models
from gcpo_jax.draw import choose


def ring_of(T: int) -> tuple[int, int]:
    """Chunks of the ring for T tokens, and columns of each. While t columns are in use, only their chunks are read.

    With more chunks fewer empty columns would be read, but a program is compiled for each.
    """
    chunks = 4 if T >= 1024 else 2 if T >= 128 else 1
    return chunks, -(-T // chunks)


class Lanes(NamedTuple):
    """What runs. Of a lane without an entry every row is done."""

    entry: jax.Array  # [B]
    start: jax.Array  # [B] the step at which the entry began
    lengths: jax.Array  # [B] prompt tokens
    end: jax.Array  # [B] position of the first token that is drawn
    hidden: jax.Array  # [B, m, D] that the next token is drawn from
    done: jax.Array  # [B, m]
    count: jax.Array  # [B, m] tokens drawn
    uniforms: jax.Array  # [B, m, T] ring
    tokens: jax.Array  # [B, m, T] ring
    logprobs: jax.Array  # [B, m, T] ring
    prompt: models.Caches  # [L, B, K, P, A]
    own: tuple[models.Caches, ...]  # [L, B, m, K, w, A] chunks of a ring


class Prompts(NamedTuple):
    """Q prompts, of which every n that share something make one of B entries; n = 1: they share nothing."""

    first: Any  # [B, P] that all of them begin with, or the prompt
    lengths: Any  # [B]
    rows: Any | None  # [B, n, W] what is left of each
    row_lengths: Any | None  # [B, n]
    blocks: models.Blocks | None  # between these
    trie: models.Trie | None = None  # of what every t of the B begin with


class Queue(NamedTuple):
    """The prompts, of which F are computed at a time, and how far the queue has moved."""

    prompts: Prompts
    lengths: jax.Array  # [Q]
    end: jax.Array  # [Q]
    index: jax.Array  # [Q]
    total: jax.Array  # [s] entries
    taken: jax.Array  # [s] of them
    chunk: jax.Array  # [s] which F prompts are computed; -1: none yet
    hidden: jax.Array  # [F, D] of their last tokens
    cache: models.Cache  # [L, F, K, P, A]


class Results(NamedTuple):
    """Of each entry."""

    tokens: jax.Array  # [E, m, T]
    logprobs: jax.Array  # [E, m, T]
    count: jax.Array  # [E, m]


# Which axis of what is in them a mesh cuts.
_CUT: Any = (Results(0, 0, 0), Lanes(*(0,) * 10, prompt=1, own=1), Queue(*(0,) * 8, cache=1))  # pyright: ignore[reportArgumentType]


def _over_shards(shards: int, function: Callable, axes_in: tuple, axes_out) -> Callable:
    """A function of one shard's arrays as a function of all shards' arrays, which lie behind each other on an axis."""
    if shards == 1:
        return function

    def split(axis, tree):
        return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :]), tree)

    def join(axis, tree):
        return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), tree)

    def of_all(*arguments):
        results = jax.vmap(function, axes_in, axes_out)(*jax.tree.map(split, axes_in, arguments))
        return jax.tree.map(join, axes_out, results)

    return of_all


def _prefill(c: models.ModelConfig, params: dict, prompts: Prompts, width: int) -> tuple[jax.Array, models.Cache]:
    """Last hidden states [F, D] and cache of prompts."""
    if prompts.rows is None or prompts.row_lengths is None:
        return models.prefill(c, params, prompts.first, prompts.lengths, prompts.trie)
    rows = prompts.rows, prompts.row_lengths
    return models.prefill_shared(c, params, prompts.first, prompts.lengths, *rows, width, prompts.blocks, prompts.trie)


@functools.partial(
    jax.jit,
    static_argnames=(
        *("model_config", "n", "together", "lanes", "computed", "width", "max_new_tokens"),
        *("temperature", "top_k", "top_p", "eos_ids", "apart"),
    ),
)
def run(
    model_config: models.ModelConfig,
    params: dict,
    prompts: Prompts,
    lengths: Int[Array, " Q"],
    end: Int[Array, " Q"],
    index: Int[Array, " Q"],
    real: Bool[Array, " Q"],
    key: PRNGKeyArray,
    *,
    n: int,
    together: int,
    lanes: int,
    computed: int,
    width: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos_ids: tuple[int, ...],
    apart: bool = False,
) -> tuple[Int[Array, "Q n T"], Float[Array, "Q n T"], Int[Array, "Q n"]]:
    """n completions of each prompt: tokens, their log-probabilities, and how many of the T there are.

    Args:
      lengths: tokens of each prompt.
      end: the position of the first token that is drawn; the length, but for prompts in blocks.
      index: of the prompt, for its noise: a row's depends on (key, index, sample) alone.
      real: False for prompts that only fill up the array, behind the real ones of a shard.
      together: m, samples of a prompt that share a lane and so the prompt's keys and values; divides n.
      lanes: B, a multiple of the shards.
      computed: F, prompts computed together; a multiple of the shards.
      width: P, of the prompts' caches.
      apart: layers apart (models.by_layer) in the steps, at the price of one more copy of them; not on a mesh.
    """
    c, m, T, layout = model_config, together, max_new_tokens, model_config.layout
    shards = 1 if layout is None else layout.row_shards
    Q, B, per_prompt = lengths.shape[0] // shards, lanes // shards, n // m  # of one shard
    E = Q * per_prompt
    W = B if B >= E else max(1, B // 8)  # lanes refilled at once
    F = computed // shards
    chunks, chunk = ring_of(T)
    turns = models.turn_to(jnp.arange(width + T), c)
    ring, ends = jnp.arange(T), jnp.asarray(eos_ids, jnp.int32)

    def waiting(queue):
        return queue.total - queue.taken

    def ready(queue):
        """Entries whose prompts have been computed, those that have left included."""
        return jnp.minimum(queue.total, (queue.chunk + 1) * F * per_prompt)

    def used_up(queue):
        return (waiting(queue) > 0) & (queue.taken >= ready(queue))

    def compute(queue: Queue) -> Queue:
        """The next F prompts, of the shards that need them."""

        def rows(chunk, prompts):
            def of(x):
                size = F * x.shape[0] // Q
                return jnp.take(x, chunk * size + jnp.arange(size), axis=0, mode="clip")

            return jax.tree.map(of, prompts)

        def replace(more, new, old):
            return jax.tree.map(lambda new, old: jnp.where(more[0], new, old), new, old)

        more = used_up(queue)
        chunk = queue.chunk + more.astype(jnp.int32)
        new = _prefill(c, params, _over_shards(shards, rows, (0, 0), 0)(chunk, queue.prompts), width)
        hidden, cache = _over_shards(shards, replace, (0, (0, 1), (0, 1)), (0, 1))(
            more, new, (queue.hidden, queue.cache)
        )
        return queue._replace(chunk=chunk, hidden=hidden, cache=cache)

    def hand_over(results: Results, lanes: Lanes, at, entry) -> Results:
        """The results with what the lanes `at` [W] hold written to entries [W], in the order of drawing."""
        columns = jnp.broadcast_to((lanes.start[at][:, None, None] + ring[None, None]) % T, (at.shape[0], m, T))
        held = (lanes.tokens, lanes.logprobs)
        values = [*(jnp.take_along_axis(x[at], columns, axis=-1) for x in held), lanes.count[at]]
        return Results(*(x.at[entry].set(v, mode="drop") for x, v in zip(results, values, strict=True)))

    def exchange(t, results: Results, lanes: Lanes, queue: Queue) -> tuple[Results, Lanes, Queue]:
        """Of one shard: up to W lanes whose rows are done hand over and take the next entries."""
        free = lanes.done.all(axis=-1)
        at = jnp.argsort(~free, stable=True)[:W]
        entry = queue.taken + jnp.arange(W)
        takes = free[at] & (entry < ready(queue))
        results = hand_over(results, lanes, at, jnp.where(takes, lanes.entry[at], E))
        at = jnp.where(takes, at, B)  # no lane: dropped
        prompt = jnp.minimum(entry // per_prompt, Q - 1)
        in_chunk = jnp.clip(prompt - queue.chunk * F, 0, F - 1)
        sample = (entry % per_prompt)[:, None] * m + jnp.arange(m)[None]
        # All of a row's uniforms at once, from a key of its own: its noise cannot depend on its neighbours.
        row_key = jax.vmap(jax.vmap(lambda b, k: jax.random.fold_in(jax.random.fold_in(key, b), k), (None, 0)))
        uniforms = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (T,))))(row_key(queue.index[prompt], sample))
        new = {
            "entry": entry,
            "start": jnp.broadcast_to(t, (W,)),
            "lengths": queue.lengths[prompt],
            "end": queue.end[prompt],
            "hidden": jnp.broadcast_to(queue.hidden[in_chunk][:, None], (W, *lanes.hidden.shape[1:])),
            "done": jnp.zeros((W, m), bool),
            "count": jnp.zeros((W, m), jnp.int32),
            "uniforms": uniforms[..., (ring - t) % T],
        }
        placed = {name: getattr(lanes, name).at[at].set(value, mode="drop") for name, value in new.items()}
        if apart:
            cache = jax.tree.map(
                lambda x, new: x.at[at].set(new[in_chunk], mode="drop"), lanes.prompt, models.by_layer(queue.cache)
            )
        else:
            cache = jax.tree.map(
                lambda x, new: x.at[:, at].set(new[:, in_chunk], mode="drop"), lanes.prompt, queue.cache
            )
        queue = queue._replace(taken=queue.taken + takes.sum(dtype=jnp.int32))
        return results, lanes._replace(**placed, prompt=cache), queue

    def draw(hidden, u):
        logits = models.unembed(c, params, hidden)
        if layout is not None:
            # Products with each device's words first, and the rows' whole distributions only then: never a whole table.
            logits = layout.constrain(layout.constrain(logits, "step_products"), "step_logits")
        logp = jax.nn.log_softmax(logits / (temperature or 1.0))
        tokens = choose(logp, u, top_k=top_k, top_p=top_p, greedy=temperature == 0)
        return tokens, jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]

    def step(full: bool, state: tuple[jax.Array, Lanes]) -> tuple[jax.Array, Lanes]:
        t, lanes = state
        column = t % T

        def read(x):
            return jax.lax.dynamic_index_in_dim(x, column, axis=2, keepdims=False)

        def write(x, values):
            # A row that is done keeps what it has: it may wait for its lane to be taken for more steps than T.
            return jax.lax.dynamic_update_index_in_dim(x, jnp.where(lanes.done, read(x), values), column, axis=2)

        drawn, logp = draw(lanes.hidden, read(lanes.uniforms))
        count = lanes.count + jnp.where(lanes.done, 0, 1)
        age = jnp.minimum(t - lanes.start, T - 1)
        cache_column = t % (chunks * chunk) if full else t
        hidden, own = models.decode_step(
            c, layers, drawn, cache_column, age, lanes.lengths, lanes.prompt, lanes.own, lanes.end, full, turns
        )
        return t + 1, lanes._replace(
            hidden=hidden,
            done=lanes.done | jnp.isin(drawn, ends) | (count == T),
            count=count,
            tokens=write(lanes.tokens, drawn),
            logprobs=write(lanes.logprobs, logp),
            own=own,
        )

    def advance(full: bool, state):
        t, results, lanes, queue = state
        if F < Q:
            queue = jax.lax.cond(used_up(queue).any(), compute, lambda queue: queue, queue)
        results, lanes, queue = _over_shards(shards, functools.partial(exchange, t), _CUT, _CUT)(results, lanes, queue)
        enough = jnp.clip(waiting(queue).sum(), 1, W * shards)

        def nothing_to_do(state):
            free = state[1].done.all(axis=-1).reshape(shards, B).sum(axis=1)
            return jnp.minimum(free, waiting(queue)).sum() < enough

        def goes_on(state):
            return nothing_to_do(state) & ~state[1].done.all() & fits(full, *state)

        t, lanes = jax.lax.while_loop(goes_on, functools.partial(step, full), (t, lanes))
        return t, results, lanes, queue

    def fits(full: bool, t, lanes):
        """Whether the next step's column is one of the chunks that there are."""
        return full | (t < len(lanes.own) * chunk)

    def unfinished(full: bool, state):
        t, _, lanes, queue = state
        return ((waiting(queue) > 0).any() | ~lanes.done.all()) & fits(full, t, lanes)

    def zeros(*shape, dtype=jnp.float32):
        return jnp.zeros(shape, dtype)

    def prompt_cache(size):
        shape, dtype = (c.num_layers, size, c.num_kv_heads, width, c.head_dim), c.dtype
        return models.constrain(c, (zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype)), "prompt_cache")

    def as_used(stacked):
        return models.by_layer(stacked) if apart else stacked

    b, D, layers = shards * B, c.hidden_size, {**params, "layers": as_used(params["layers"])}

    def new_chunk():
        own = as_used(models.init_cache(c, b, m, chunk))
        return jax.tree.map(lambda x: x[:, 0], own) if apart and m == 1 else own

    state = (
        jnp.int32(0),
        Results(
            zeros(shards * E, m, T, dtype=jnp.int32), zeros(shards * E, m, T), zeros(shards * E, m, dtype=jnp.int32)
        ),
        Lanes(
            entry=jnp.full(b, E, jnp.int32),
            start=zeros(b, dtype=jnp.int32),
            lengths=jnp.ones(b, jnp.int32),
            end=jnp.ones(b, jnp.int32),
            hidden=models.constrain(c, zeros(b, m, D, dtype=c.dtype), "step_hidden"),
            done=jnp.ones((b, m), bool),
            count=zeros(b, m, dtype=jnp.int32),
            uniforms=zeros(b, m, T),
            tokens=zeros(b, m, T, dtype=jnp.int32),
            logprobs=zeros(b, m, T),
            prompt=as_used(prompt_cache(b)),
            own=(new_chunk(),),
        ),
        Queue(
            prompts=prompts,
            lengths=lengths,
            end=end,
            index=index,
            total=real.reshape(shards, Q).sum(axis=1, dtype=jnp.int32) * per_prompt,
            taken=zeros(shards, dtype=jnp.int32),
            chunk=jnp.full(shards, -1, jnp.int32),
            hidden=zeros(shards * F, D, dtype=c.dtype),
            cache=prompt_cache(shards * F),
        ),
    )
    if F >= Q:
        state = (*state[:3], compute(state[3]))
    for number in range(1, chunks + 1):
        full = number == chunks
        loop = functools.partial(unfinished, full), functools.partial(advance, full)
        t, results, ended, queue = jax.lax.while_loop(*loop, state)
        if not full:
            state = t, results, ended._replace(own=(*ended.own, new_chunk())), queue

    def collect(results, lanes):
        return hand_over(results, lanes, jnp.arange(B), lanes.entry)

    results = _over_shards(shards, collect, _CUT[:2], _CUT[0])(results, ended)
    return results.tokens.reshape(-1, n, T), results.logprobs.reshape(-1, n, T), results.count.reshape(-1, n)

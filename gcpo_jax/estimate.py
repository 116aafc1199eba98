"""Bytes, FLOPs and seconds of a step from shapes alone: what plan.py says where it has no compiler, and all its times.

Everything is per device. b is the bytes of the compute dtype, t the tensor axis, r rows and S positions of a device's
share of a micro-batch; L, D, F, V, H, K, A as in partition.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from gcpo_jax import learner, models
from gcpo_jax.config import Config
from gcpo_jax.hardware import Device
from gcpo_jax.models.attention import STRIP, STRIPS, WHOLE_UP_TO
from gcpo_jax.partition import Layout, layout_of, rows_at_a_time
from gcpo_jax.scorer import TOKENS_PER_CHUNK
from gcpo_jax.slots import ring_of
from gcpo_jax.workload import FRAME_TOKENS, HEADING_TOKENS, Call

# Shares of the data sheet's peaks that a step is assumed to reach; none was measured.
DENSE, ATTENTION, KERNEL, BANDWIDTH, LINK = 0.4, 0.1, 0.35, 0.7, 0.5
COLLECTIVES, LATENCY = 6, 10e-6  # of a decoded layer where several devices share it, and the seconds of each

ASSUMPTIONS = (
    f"dense products at {DENSE:.0%} of the peak; attention at {KERNEL:.0%} by a fused kernel, {ATTENTION:.0%} without",
    f"memory at {BANDWIDTH:.0%} of its bandwidth, links at {LINK:.0%}; parameters travel while products are computed",
    f"a decoded token waits for {COLLECTIVES} exchanges a layer of {LATENCY * 1e6:.0f} us where devices share it",
    f"contexts are framed by {FRAME_TOKENS} tokens and {HEADING_TOKENS} more a candidate; the problem is the longest",
    "a decoded token reads the device's parameters and the caches in use; a call decodes until its last row ends",
    "rewards, logging, evaluation and checkpoints take no time",
)
FORMULA = (
    "update temp = gradients (2 x float32) + parameters in the compute dtype + two gathered layers and "
    "vocabulary tables with gradient + kept activations (remat full: L r S D b; S = P + n T where rows share P) "
    "+ one layer's backward pass (r S (5 F/t + 8 D + 4 H A/t) b) + 3 x 1,024 tokens' logits; sampler temp = keys and "
    "values of lanes and of waiting prompts + results + one layer's prefill (r S (2 F/t + 4 D + 2 H A/t) b) "
    "+ 4 x a token's logits; scorer temp = one layer + logits"
)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """What a program needs on one device: its arguments, its results beside them, and what it needs meanwhile."""

    arguments: int
    outputs: int
    temp: int  # with the caches
    caches: int = 0

    @property
    def total(self) -> int:
        """The program's peak."""
        return self.arguments + self.outputs + self.temp


def with_layout(config: Config, model: models.ModelConfig, mesh: Mesh | AbstractMesh) -> models.ModelConfig:
    """The model as it lies on a run's mesh.

    Raises:
      ConfigError: where mesh, model and batch sizes do not fit each other.
    """
    return dataclasses.replace(model, dtype=config.model.dtype, layout=layout_of(config, model, mesh))


def local_bytes(tree: Any, layout: Layout | None) -> int:
    """Bytes on one device of a tree of parameters, or of a state built from one."""
    leaves = jax.tree.leaves(tree)
    shapes = [x.shape for x in leaves]
    if layout is not None:
        shardings = jax.tree.leaves(layout.shardings(tree))
        shapes = [sharding.shard_shape(shape) for sharding, shape in zip(shardings, shapes, strict=True)]
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


def abstract_state(config: Config, model_config: models.ModelConfig) -> learner.TrainState:
    """The state's arrays as jax.ShapeDtypeStruct."""
    params = models.shapes(dataclasses.replace(model_config, dtype="float32"))
    updates = config.train.total_steps * config.learner.updates_per_batch
    optimizer, _ = learner.make_optimizer(config.learner, updates)
    return learner.TrainState(params, jax.eval_shape(optimizer.init, params))


def resident(config: Config, model_config: models.ModelConfig) -> dict[str, int]:
    """What lies on a device between programs: state, frozen reference and, until the update, the sampling policy."""
    state, layout = abstract_state(config, model_config), model_config.layout
    copy = local_bytes(models.shapes(model_config), layout)
    return {
        "parameters": local_bytes(state.params, layout),
        "optimizer": local_bytes(state.opt_state, layout),
        # In float32 the sampling policy is the state's own parameters.
        "sampling copy": copy if config.model.dtype != "float32" else 0,
        "reference": copy if learner.uses_reference(config) else 0,
    }


def cache_bytes(model_config: models.ModelConfig, call: Call) -> int:
    """Of a sampler call: keys and values of prompts and of generated tokens."""
    c, slots = model_config, call.slots
    assert slots is not None
    L, K, A = c.num_layers, c.num_kv_heads, c.head_dim
    total = 0
    for name, shape in (
        ("prompt_cache", (L, slots.lanes, K, call.width, A)),
        ("prompt_cache", (L, slots.computed, K, call.width, A)),  # of prompts that wait for lanes
        ("cache", (L, slots.lanes, slots.together, K, math.prod(ring_of(call.tokens)), A)),
    ):
        shape = shape if c.layout is None else c.layout.sharding(name).shard_shape(shape)
        total += 2 * math.prod(shape) * jnp.dtype(c.dtype).itemsize
    return total


@dataclasses.dataclass(frozen=True)
class Part:
    """What a row of the layers' pass is: P tokens that n completions of T tokens share, and m blocks between them.

    Of a trie every t rows compute U tokens for t P; attention is that of all rows.
    """

    P: int
    n: int = 0
    T: int = 0
    attention: str = "plain"  # of the ModelConfig
    m: int = 0
    A: int = 0
    t: int = 1
    U: int = 0
    _: dataclasses.KW_ONLY
    constant: bool = False  # no gradient flows through what stands before the completions

    @property
    def attending(self) -> int:
        """Positions."""
        return self.P + self.m * self.A + self.n * self.T

    @property
    def tokens(self) -> int:
        """Of them those that are computed outside attention, on average of the rows of a trie."""
        return self.attending - (self.P - -(-self.U // self.t) if self.t > 1 else 0)

    @property
    def blocks(self) -> bool:
        """Whether attention is computed in blocks, as every kernel does."""
        return self.attention != "plain" or max(self.P + self.m * self.A, self.T) > WHOLE_UP_TO

    @property
    def scored(self) -> float:
        """Pairs of query and key that are computed."""
        prompts = 1 + self.n if self.attention == "cudnn" else 1  # it computes the prompt's again with every row
        between = self.m * self.A
        blocks = between * (self.P + self._causal(self.A))
        return (
            prompts * self.P * self._causal(self.P)
            + blocks
            + self.n * self.T * (self.P + between + self._causal(self.T))
        )

    @property
    def differentiated(self) -> tuple[int, float]:
        """Tokens, and pairs of query and key, that a backward pass is for."""
        if not self.constant:
            return self.tokens, self.scored
        before = dataclasses.replace(self, n=0, T=0)
        return self.tokens - before.tokens, self.scored - before.scored

    def _causal(self, S: int) -> float:
        """Keys of S that a query is computed with, on average."""
        strips = -(-S // max(STRIP, -(-S // STRIPS)))
        return S / 2 if self.blocks or not strips else S * (1 + 1 / strips) / 2


def _computed(call: Call, attention: str) -> tuple[int, Part]:
    """Rows of the layers' pass of a call, of a sampler's the prompts computed together, and what a row is."""
    if call.slots is None:
        n = call.n if call.tokens else 0
        return call.rows, Part(call.width, n, call.rest + call.tokens, attention, *call.blocks, *call.trie)
    n, first, own, *more = call.slots.shared
    return call.slots.computed // n, Part(first, n if own else 0, own, attention, *more)


def _share_read(call: Call) -> float:
    """How much of the ring for generated tokens a step reads on average."""
    chunks, chunk = ring_of(call.tokens)
    columns = sum(min(chunks, t // chunk + 1) for t in range(call.steps))
    return columns / (chunks * max(1, call.steps))


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One run's settings on one sort of device."""

    config: Config
    model: models.ModelConfig

    def _axis(self, name: str) -> int:
        return 1 if self.model.layout is None else self.model.layout.mesh.shape.get(name, 1)

    @property
    def row_shards(self) -> int:
        """Parts into which rows are cut."""
        return 1 if self.model.layout is None else self.model.layout.row_shards

    @property
    def _b(self) -> int:
        return jnp.dtype(self.model.dtype).itemsize

    def _table(self) -> int:
        """Elements of a vocabulary table, put together over fsdp."""
        c = self.model
        whole = c.layout is not None and "vocabulary" in c.layout.whole
        return c.vocab_size * c.hidden_size // (1 if whole else self._axis("tensor"))

    def _layer(self) -> int:
        """Elements of a layer's matrices, put together over fsdp."""
        c = self.model
        attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
        return (attention + 3 * c.hidden_size * c.intermediate_size) // self._axis("tensor")

    def _working(self, tokens: int, backward: bool) -> int:
        """Bytes of one layer's intermediate results for so many tokens."""
        c, t = self.model, self._axis("tensor")
        mlp, width, heads = (5, 8, 4) if backward else (2, 4, 2)
        return (
            tokens
            * (mlp * c.intermediate_size // t + width * c.hidden_size + heads * c.num_heads * c.head_dim // t)
            * self._b
        )

    def _scores(self, rows: int, part: "Part", backward: bool) -> int:
        """Bytes of attention scores; of blocks, the float32 sums of keys' and values' gradients."""
        c, t = self.model, self._axis("tensor")
        if part.blocks:
            return (4 if backward else 2) * rows * part.attending * c.num_heads * c.head_dim // t * 4
        return (3 if backward else 2) * rows * c.num_heads // t * int(part.scored) * 4

    def _gathered(self, gradients: bool) -> int:
        """Bytes of parameters put together: two layers and the tables, with gradients where asked for."""
        tables = self._table() * (1 if self.model.tied_embeddings else 2)
        if self._axis("fsdp") == 1:
            return 2 * self._layer() * self._b if gradients else 0
        return (2 * self._layer() + tables) * self._b * (2 if gradients else 1)

    def _logits(self) -> int:
        return 3 * TOKENS_PER_CHUNK * self._table() // self.model.hidden_size * 4

    def _activations(self, rows: int, part: "Part") -> int:
        """Bytes kept and computed while rows are differentiated on a device."""
        c, t = self.model, self._axis("tensor")
        tokens, scored = (rows * int(x) for x in part.differentiated)
        kept = c.hidden_size
        if self.config.model.remat != "full":
            kept += c.hidden_size * 2 + ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 2 * c.intermediate_size) // t
        if self.config.model.remat == "none":
            kept += c.hidden_size * 4 + (c.num_heads * c.head_dim * 2 + 3 * c.intermediate_size) // t
        layers = c.num_layers * tokens * kept * self._b
        if part.constant:
            layers += c.num_layers * (rows * part.tokens - tokens) * 2 * c.num_kv_heads * c.head_dim // t * self._b
        if self.config.model.remat == "none" and not part.blocks:
            layers += c.num_layers * c.num_heads // t * scored * (4 + self._b)
        working = self._working(tokens, True) + self._scores(rows, part, True)
        return layers + working + tokens * c.hidden_size * (self._b + 4)

    def update(self, batch: learner.Batch) -> Bytes:
        """Of learner.make_update's program."""
        here = resident(self.config, self.model)
        state = here["parameters"] + here["optimizer"]
        widest = max(self._activations(-(-rows // self.row_shards), part) for _, rows, part in self._parts(batch))
        cast = here["parameters"] * self._b // 4 if self._b < 4 else 0
        temp = 2 * here["parameters"] + cast + self._gathered(True) + widest + self._logits()
        data = sum(x.nbytes for x in jax.tree.leaves(batch)) // self.row_shards
        details = batch.mask.nbytes // self.row_shards * (1 if batch.kl is None else 5)
        return Bytes(state + data, details, temp)

    def _parts(self, batch: learner.Batch) -> list[tuple[int, int, "Part"]]:
        """Of the surrogate and of KL': rows in all, rows of a micro-batch, and what a row is."""
        _, m, T = batch.completions.shape
        whole, at_once = batch.completions.shape[0], max(1, rows_at_a_time(self.config) // m)
        parts = [(whole, at_once, Part(batch.prompts.shape[1], m, T, self.model.attention))]
        if batch.kl is not None:
            E, n, W = batch.kl.contexts.rows.shape
            between = (0, 0) if batch.kl.contexts.blocks is None else batch.kl.contexts.blocks.tokens.shape[1:]
            M = batch.kl.row.shape[0]
            size = E * min(M, learner.targets_at_a_time(self.model, self.config)) // M
            part = Part(batch.kl.contexts.prompts.shape[1], n, W, self.model.attention, *between)
            constant = not self.config.algorithm.context_gradient
            parts.append((E, size, dataclasses.replace(part, constant=constant)))
        return parts

    def call(self, call: Call) -> Bytes:
        """Of the sampler's or the scorer's program."""
        params = local_bytes(models.shapes(self.model), self.model.layout)
        rows, part = _computed(call, self.model.attention)
        rows, inputs = rows // self.row_shards, call.rows // self.row_shards
        temp = self._working(rows * part.tokens, False) + self._scores(rows, part, False) + self._gathered(False)
        temp += rows * part.tokens * self.model.hidden_size * 2 * self._b
        copies = (2 * self.model.num_heads + 2 * self.model.num_kv_heads) * self.model.head_dim // self._axis("tensor")
        temp += rows * (part.attending - part.tokens) * copies * self._b  # of a trie's nodes, for attention
        if call.program == "scorer":
            temp += self._logits()
        if call.slots is None:
            return Bytes(params + inputs * part.tokens * 4, inputs * call.n * call.tokens * 8, temp)
        caches = cache_bytes(self.model, call)
        running = call.slots.lanes // self.row_shards * call.slots.together
        temp += 4 * running * self.model.vocab_size * 4 + 12 * running * call.tokens
        results = inputs * call.n * call.tokens * 8
        return Bytes(params + inputs * call.width * 4, results, temp + results + caches, caches)

    def _forward(self, rows: int | float, part: "Part") -> tuple[float, float]:
        """FLOPs on a device of the layers' products, and of attention, for its share of rows."""
        c, t = self.model, self._axis("tensor")
        mine = rows / self.row_shards
        return (
            2 * mine * part.tokens * self._layer() * c.num_layers,
            4 * mine * part.scored * c.num_heads * c.head_dim * c.num_layers / t,
        )

    def _seconds(self, dense: float, attention: float, gathers: float, device: Device) -> float:
        share = ATTENTION if self.model.attention == "plain" else KERNEL
        computing = dense / (DENSE * device.flops) + attention / (share * device.flops)
        fsdp = self._axis("fsdp")
        tables = self._table() * (1 if self.model.tied_embeddings else 2)
        travelling = gathers * (self.model.num_layers * self._layer() + tables) * self._b * (1 - 1 / fsdp)
        return max(computing, travelling / (LINK * device.link))

    def call_cost(self, call: Call, device: Device) -> tuple[float, float]:
        """(FLOPs, seconds) of a call on one device."""
        c = self.model
        rows, part = _computed(call, self.model.attention)
        if call.slots is not None:
            rows = rows * call.rows / call.slots.computed  # all of them, in turn
        dense, attention = self._forward(rows, part)
        if call.program == "scorer":
            dense += 2 * call.rows / self.row_shards * call.n * call.tokens * self._table()
        seconds = self._seconds(dense, attention, 1.0, device)
        if call.slots is not None:
            tokens = call.slots.lanes * call.slots.together / self.row_shards
            step = 2 * tokens * (c.num_layers * self._layer() + self._table())
            step += (
                4 * tokens * (call.width + call.tokens) * c.num_heads * c.head_dim * c.num_layers / self._axis("tensor")
            )
            prompts = cache_bytes(c, dataclasses.replace(call, tokens=0))
            own = (cache_bytes(c, call) - prompts) * _share_read(call)
            read = local_bytes(models.shapes(c), c.layout) + prompts + own + 10 * 4 * tokens * c.vocab_size
            shared = self._axis("fsdp") * self._axis("tensor") > 1
            waiting = LATENCY * COLLECTIVES * c.num_layers if shared else 0.0
            each = max(step / (DENSE * device.flops), read / (BANDWIDTH * device.bandwidth)) + waiting
            dense, seconds = dense + call.steps * step, seconds + call.steps * each
        return dense + attention, seconds

    def update_cost(self, batch: learner.Batch, device: Device) -> tuple[float, float]:
        """(FLOPs, seconds) of one update on one device: forward, twice that backward, and what is computed again."""
        again = {"none": 0.0, "dots": 0.1, "full": 1.0}[self.config.model.remat]
        flops = seconds = 0.0
        for rows, size, part in self._parts(batch):
            dense, attention = self._forward(rows, part)
            tokens, scored = part.differentiated
            dense *= 1 + (2 + again) * tokens / part.tokens
            dense += 4 * 2 * rows / self.row_shards * part.n * part.T * self._table()
            attention *= 1 + (2.5 + again) * scored / part.scored
            flops += dense + attention
            gathers = 2 + min(1.0, again) + part.constant
            seconds += self._seconds(dense, attention, gathers * rows / size, device)
        return flops, seconds

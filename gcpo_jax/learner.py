"""Train state, optimizer and the jitted update.

N = B * n candidates of T tokens, in E = N / m entries of m that share a prompt of P tokens; M targets of KL', with G
contexts of X tokens each that the update computes. One batch is one pytree of arrays; micro-batches of whole groups are
differentiated in turn and their gradients added, exactly, because every token's weight in the loss is known beforehand.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gcpo_jax import causal, models, objectives, scorer
from gcpo_jax.batching import bucket, pack, pad_rows, shape_of, whole
from gcpo_jax.config import Config, Learner
from gcpo_jax.partition import Layout, rows_at_a_time, rows_of_a_prompt
from gcpo_jax.rollout import Actor, Experience
from gcpo_jax.scorer import completion_logprobs, row_logprobs


class TrainState(NamedTuple):
    """Everything the next update depends on. Parameters are float32 whatever the compute dtype."""

    params: dict
    opt_state: Any


class Batch(NamedTuple):
    """A padded step of experience. Rows that only fill up the last micro-batch have weight 0."""

    prompts: np.ndarray  # [E, P]
    prompt_lengths: np.ndarray  # [E]
    completions: np.ndarray  # [E, m, T]
    lengths: np.ndarray  # [E, m]
    weights: np.ndarray  # [N, T] of each token in the loss; sums to 1 with "sequence_mean"
    mask: np.ndarray  # [N, T]
    advantages: np.ndarray  # [N] B_i
    rewards: np.ndarray  # [N]
    real: np.ndarray  # [N] bool
    ref_logp: np.ndarray | None  # [N, T]; None where beta is 0
    old_logp: np.ndarray | None  # [N, T]; None with one update a batch: the old policy is the current one
    kl: "KlBatch | None"


class KlBatch(NamedTuple):
    """The targets of KL' (Eq. 12-13)."""

    row: np.ndarray  # [M] which row of the batch
    weight: np.ndarray  # [M] n/k; 0 for padding
    contexts: scorer.Rows  # M G / m entries of m leave-one-out contexts, with the targets' completions
    weight_x: np.ndarray  # [M, G] in π(y | x_i)
    weight_phi: np.ndarray  # [M, G] in Φπ(y | x_i)
    phi_rest: np.ndarray  # [M, T] the part of Φπ(y | x_i) from contexts that are only scored
    old_logp: np.ndarray | None  # [M, G, T]; None with one update a batch


def make_optimizer(settings: Learner, updates: int) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer behind a global-norm clip, and its schedule over `updates`: linear warm-up, cosine or constant.

    AdamW, or Adafactor's factored second moments (arXiv:1804.04235) with AdamW's decoupled weight decay.
    """
    warmup = round(settings.warmup * updates)
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(settings.learning_rate, max(1, updates - warmup))
    else:
        after = optax.constant_schedule(settings.learning_rate)
    # The ramp starts above zero, so the first update is not wasted.
    ramp = optax.linear_schedule(settings.learning_rate / (warmup + 1), settings.learning_rate, max(1, warmup))
    schedule = optax.join_schedules([ramp, after], [warmup]) if warmup else after

    def decayed(params):
        return jax.tree_util.tree_map_with_path(_decays, params)

    if settings.optimizer == "adafactor":
        scale = [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(settings.weight_decay, decayed),
            optax.scale_by_learning_rate(schedule),
        ]
    else:
        scale = [
            optax.adamw(
                schedule,
                b1=settings.b1,
                b2=settings.b2,
                mu_dtype=settings.moments_dtype,
                weight_decay=settings.weight_decay,
                mask=decayed,
            )
        ]
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), *scale), schedule


def init_state(model_config: models.ModelConfig, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """The state before the first update; its moments lie where their parameters lie. `params` become part of it."""
    if model_config.layout is None:
        return TrainState(params, optimizer.init(params))
    shardings = model_config.layout.shardings(jax.eval_shape(optimizer.init, params))
    return TrainState(params, jax.jit(optimizer.init, out_shardings=shardings)(params))


def _decays(path, _) -> bool:
    name = jax.tree_util.keystr(path).lower()
    return "norm" not in name and "bias" not in name


def uses_reference(config: Config) -> bool:
    """Whether the objective needs the frozen reference at all."""
    return config.algorithm.beta > 0 and config.algorithm.objective == "clipped"


def make_batch(actor: Actor, ref_params: dict | None, exp: Experience) -> Batch:
    """Pad an Experience and score what the update needs and cannot know: reference, Φ's other contexts, old policy.

    Args:
      ref_params: of the frozen reference; None where beta is 0.
    """
    config = actor.config
    a, n, T = config.algorithm, config.rollout.group_size, config.rollout.max_new_tokens
    rows, m = rows_at_a_time(config), rows_of_a_prompt(config, actor.model_config.layout)
    real = len(exp.prompts) * n
    N = -(-real // rows) * rows
    prompts = [p for p in exp.prompts for _ in range(n)]
    candidates = [c for group in exp.candidates.tokens for c in group]
    T = min(T, bucket(max(map(len, candidates))))
    completions, lengths = pad_rows(candidates, N, T)
    prompt_ids, prompt_lengths = pad_rows(prompts[::m], N // m, bucket(max(map(len, prompts))))
    mask = (np.arange(T)[None, :] < lengths[:, None]).astype(np.float32)
    weights = np.zeros((N, T), np.float32)
    weights[:real] = np.asarray(
        objectives.token_weights(mask[:real].reshape(-1, n, T), a.aggregation, config.rollout.max_new_tokens)
    ).reshape(real, T)

    def fill(values, shape=(N,)):
        out = np.zeros(shape, np.float32)
        out[:real] = values
        return out

    ref_logp = None
    if ref_params is not None:
        reference = dataclasses.replace(actor, params=ref_params)
        ref_logp = fill(reference.score(prompts, candidates, T), (N, T))
    several = config.learner.updates_per_batch > 1
    return Batch(
        prompts=prompt_ids,
        prompt_lengths=np.maximum(prompt_lengths, 1),
        completions=completions.reshape(-1, m, T),
        lengths=lengths.reshape(-1, m),
        weights=weights,
        mask=mask,
        advantages=fill(exp.scaled_advantages.reshape(-1)),
        rewards=fill(exp.rewards.reshape(-1)),
        real=np.arange(N) < real,
        ref_logp=ref_logp,
        old_logp=fill(actor.score(prompts, candidates, T), (N, T)) if several else None,
        kl=_kl_batch(actor, exp, T, several) if exp.klc_weight.any() else None,
    )


def place(batch: Batch, layout: Layout | None) -> Batch:
    """The batch on the devices that will read it."""
    return batch if layout is None else jax.tree.map(layout.put_rows, batch)


def _kl_batch(actor: Actor, exp: Experience, T: int, several: bool) -> KlBatch:
    n = actor.config.rollout.group_size
    targets = [(int(b), int(i)) for b, i in zip(*np.nonzero(exp.klc_weight), strict=True)]
    contexts = [exp.contexts[t] for t in targets]
    candidate = [exp.candidates.tokens[b][i] for b, i in targets]
    with_gradient = [[c for c in cs if c.weight_x] for cs in contexts]
    others = [(m, c) for m, cs in enumerate(contexts) for c in cs if not c.weight_x]
    G, size = len(with_gradient[0]), targets_at_a_time(actor.model_config, actor.config)
    shards = 1 if actor.model_config.layout is None else actor.model_config.layout.row_shards
    M = -(-len(targets) // size) * size

    phi_rest = np.zeros((M, T), np.float32)
    # In blocks a query's targets share it, as many as lie together in a micro-batch.
    together = math.gcd(len(targets) // len(exp.prompts), size // shards) * G if actor.blocked else 1
    if others:
        alike, per_query = 1, len(others) // len(exp.prompts)
        if actor.blocked:
            alike = per_query
        elif actor.config.algorithm.sampling == "shared":
            # The contexts of a target differ in the integrated output at their end alone.
            alike = len(others) // len(targets)
        logp = actor.score(
            [c.ids for _, c in others], [candidate[m] for m, _ in others], T, alike=alike, per_query=per_query
        )
        np.add.at(
            phi_rest,
            [m for m, _ in others],
            np.array([c.weight_phi for _, c in others], np.float32)[:, None] * np.exp(logp),
        )
    prompts = [c.ids for cs in with_gradient for c in cs]
    replies = [candidate[m] for m in range(len(targets)) for _ in range(G)]
    entries = []
    for k in range(0, len(prompts), together):
        packed = pack(prompts[k : k + together]) if actor.blocked else whole(list(prompts[k]))
        entries.append(scorer.Entry(list(range(k, k + together)), packed))
    shape = shape_of([e.packed for e in entries], together, T)
    rows = scorer.pad(entries, replies, scorer.Call(M * G // together, shape, T))
    real = len(targets)
    weight_x, weight_phi, row, weight = (
        np.zeros((M, G), np.float32),
        np.zeros((M, G), np.float32),
        np.zeros(M, np.int32),
        np.zeros(M, np.float32),
    )
    weight_x[:] = 1 / G  # of padding too, whose logarithm is taken
    weight_x[:real] = [[c.weight_x for c in cs] for cs in with_gradient]
    weight_phi[:real] = [[c.weight_phi for c in cs] for cs in with_gradient]
    row[:real] = [b * n + i for b, i in targets]
    weight[:real] = [exp.klc_weight[t] for t in targets]
    old = None
    if several:
        old = np.zeros((M, G, T), np.float32)
        old[:real] = actor.score(prompts, replies, T, alike=together).reshape(real, G, T)
    return KlBatch(
        row=row,
        weight=weight,
        contexts=rows,
        weight_x=weight_x,
        weight_phi=weight_phi,
        phi_rest=phi_rest,
        old_logp=old,
    )


def targets_at_a_time(model_config: models.ModelConfig, config: Config) -> int:
    """Targets of KL' in a micro-batch: as many as it has groups, and on a mesh one at least for every part of rows."""
    groups = rows_at_a_time(config) // config.rollout.group_size
    shards = 1 if model_config.layout is None else model_config.layout.row_shards
    return -(-groups // shards) * shards


def make_update(model_config: models.ModelConfig, config: Config, optimizer: optax.GradientTransformation) -> Callable:
    """The jitted update(state, batch) -> (state, metrics, details); the state's buffers are reused for the result.

    metrics: float32 scalars: loss, grad_norm (before the clip), entropy, clip_fraction and, where the objective has
    them, kl, kl_causal, projected/invalid_frac (targets outside (0, 1]) and projected/shift (mean of Φπ(x_i) - π(q)).
    details: logp [N, T] of the policy before the update and, where there is KL', p_q, p_x, p_phi, projected [M, T].
    """
    surrogate, causal_kl = _losses(model_config, config)
    n, layout = config.rollout.group_size, model_config.layout

    def update(state: TrainState, batch: Batch):
        main, parts = batch._replace(kl=None), batch.real.shape[0] // rows_at_a_time(config)
        surrogate_of = functools.partial(surrogate, total_groups=jnp.sum(batch.real.astype(jnp.float32)) / n)
        grads, loss, (logp, sums) = accumulate(surrogate_of, state.params, main, parts, layout)
        tokens = jnp.sum(batch.mask * batch.real.astype(jnp.float32)[:, None])
        metrics = {name: jnp.sum(value) / tokens for name, value in sums.items()}
        details = {"logp": logp.reshape(batch.mask.shape)}
        if batch.kl is not None:
            kl, q_logp = batch.kl, details["logp"] if batch.old_logp is None else batch.old_logp
            T = batch.mask.shape[1]
            rows = (kl, batch.weights[kl.row], batch.mask[kl.row], q_logp[kl.row])
            parts = kl.row.shape[0] // targets_at_a_time(model_config, config)
            # On top of the first sums: a second tree of gradients beside them would be as large as the parameters.
            grads, loss, (sums, per_token) = accumulate(causal_kl, state.params, rows, parts, layout, (grads, loss))
            tokens = jnp.sum(batch.mask[kl.row] * jnp.sign(kl.weight)[:, None])
            metrics |= {name: jnp.sum(value) / tokens for name, value in sums.items()}
            details |= {name: value.reshape(-1, T) for name, value in per_token.items()}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics |= {"loss": loss, "grad_norm": optax.global_norm(grads)}
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), metrics, details

    if layout is None:
        return jax.jit(update, donate_argnums=0)
    params = models.shapes(model_config)
    state = layout.shardings(TrainState(params, jax.eval_shape(optimizer.init, params)))
    rows, same = layout.sharding("rows"), NamedSharding(layout.mesh, PartitionSpec())
    return jax.jit(update, donate_argnums=0, in_shardings=(state, rows), out_shardings=(state, same, rows))


def accumulate(loss, params, rows, parts: int, layout: Layout | None = None, start=None):
    """Sum of loss(params, part) and of its gradient over so many parts of the rows; the other outputs, stacked.

    Args:
      start: (gradient, loss) that the sums begin with; None: zeros.
    """
    cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    start = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0)) if start is None else start
    if layout is not None:
        cut = layout.constrain(cut, "parts")
        shardings = layout.shardings(params)

    def add(total, part):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, part)
        total = jax.tree.map(jnp.add, total, (grads, value))
        if layout is not None:
            total = (jax.lax.with_sharding_constraint(total[0], shardings), total[1])
        return total, aux

    (grads, value), aux = jax.lax.scan(add, start, cut)
    return grads, value, aux


def _losses(model_config: models.ModelConfig, config: Config):
    """The two parts of the objective as functions of (params, some rows): their share of the loss, and what to log."""
    a, n = config.algorithm, config.rollout.group_size

    temperature, remat = float(config.rollout.temperature), config.model.remat

    def surrogate(params, rows: Batch, total_groups):
        """Eq. 6: the clipped surrogate (or GVPO) and β KL."""
        inputs: Any = (rows.prompts, rows.prompt_lengths, rows.completions, rows.lengths)
        params = cast(params, config.model.dtype)
        both = completion_logprobs(model_config, params, *inputs, temperature=temperature, remat=remat)
        logp, entropy = (x.reshape(rows.mask.shape) for x in both)
        old_logp = jax.lax.stop_gradient(logp) if rows.old_logp is None else rows.old_logp
        sums = {"entropy": jnp.sum(entropy * rows.mask)}
        B = rows.advantages[:, None]
        ratio = jnp.exp(jax.lax.stop_gradient(logp) - old_logp)
        if a.objective == "gvpo":
            grouped = [x.reshape(-1, n, *x.shape[1:]) for x in (logp, old_logp, rows.rewards, rows.mask)]
            # A mean over the groups here, made this part's share of the mean over all; padding adds exactly nothing.
            loss = objectives.gvpo_loss(*grouped, beta=a.beta) * (grouped[0].shape[0] / total_groups)
            clipped = jnp.zeros_like(ratio)
        else:
            terms = objectives.clipped_surrogate(logp, old_logp, rows.advantages, a.clip_low, a.clip_high)
            clipped = ((B < 0) & (ratio < 1 - a.clip_low)) | ((B > 0) & (ratio > 1 + a.clip_high))
            if rows.ref_logp is not None:
                kl = objectives.kl_k3(logp, rows.ref_logp)
                terms = terms - a.beta * kl
                sums["kl"] = jnp.sum(jax.lax.stop_gradient(kl) * rows.mask)
            loss = -jnp.sum(terms * rows.weights)
        sums["clip_fraction"] = jnp.sum(clipped.astype(jnp.float32) * rows.mask)
        return loss, (jax.lax.stop_gradient(logp), sums)

    def causal_kl(params, rows):
        """Eq. 12 and 13: κ KL' of the targets, in the context x_i."""
        kl, weights, mask, q_logp = rows
        M, T = mask.shape
        params = cast(params, config.model.dtype)
        logp = row_logprobs(model_config, params, kl.contexts, T, temperature, remat, a.context_gradient)
        logp = logp.reshape(M, -1, T)
        p_old = jnp.exp(jax.lax.stop_gradient(logp) if kl.old_logp is None else kl.old_logp)
        p_x = jnp.sum(kl.weight_x[..., None] * p_old, axis=1)
        p_phi = jnp.sum(kl.weight_phi[..., None] * p_old, axis=1) + kl.phi_rest
        p_q = jnp.exp(q_logp)
        raw = causal.project(p_x, p_phi, p_q)
        projected = causal.projected_probs(p_x, p_phi, p_q)
        # With several contexts of x_i the policy's own probability is their mixture, as p_x is.
        logp_x = jax.nn.logsumexp(logp, axis=1, b=kl.weight_x[..., None])
        k3 = objectives.kl_k3(logp_x, jnp.log(projected), ratio_min=1e-3, ratio_max=10.0)
        loss = a.kappa * jnp.sum(k3 * weights * kl.weight[:, None])
        mask = mask * jnp.sign(kl.weight)[:, None]
        sums = {
            "kl_causal": jnp.sum(jax.lax.stop_gradient(k3) * mask),
            "projected/invalid_frac": jnp.sum(((raw <= 0) | (raw > 1)).astype(jnp.float32) * mask),
            "projected/shift": jnp.sum((p_phi - p_q) * mask),
        }
        return loss, (sums, {"p_q": p_q, "p_x": p_x, "p_phi": p_phi, "projected": projected})

    return surrogate, causal_kl


def cast(params: dict, dtype: str) -> dict:
    """Parameters in the compute dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)

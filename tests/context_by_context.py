"""`gcpo_paper` as the paper writes it down: one context after the other, nothing shared, nothing batched.

Every roll-out reads its context for itself, every (context, completion) is a forward of its own, every candidate a
gradient of its own. Only what has one context runs together: its n roll-outs. Programs are jitted, with padded lengths
as everywhere, so that time goes into computing and not into compiling. scripts/benchmark.py measures against this.

B queries, n candidates of each, T tokens, S of a padded row, P of a padded context, D model width.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gcpo_jax import causal, models, objectives
from gcpo_jax.batching import bucket, pad_rows
from gcpo_jax.contexts import Ids
from gcpo_jax.draw import choose
from gcpo_jax.rollout import Actor


@dataclasses.dataclass
class Found:
    """Of one batch. Υ and representations of a group of equal rewards are left at 1 and 0."""

    integrated: list[list[Ids]]
    contexts: dict[tuple[int, int], list[Ids]]  # x_i with each integrated output in turn, of target (b, i)
    rollouts: dict[tuple[int, int], list[list[Ids]]]
    z: np.ndarray  # [B, n, D], as z_x and z_phi
    z_x: np.ndarray
    z_phi: np.ndarray
    upsilon: np.ndarray  # [B, n]
    p_q: np.ndarray  # [B, n, T], as the next three; 0 beyond a candidate's end
    p_x: np.ndarray
    p_phi: np.ndarray
    projected: np.ndarray
    loss: float
    gradient: dict


class Loop:
    """The policy of an actor, evaluated in one context at a time."""

    def __init__(self, actor: Actor):
        self.actor, self.T = actor, actor.config.rollout.max_new_tokens
        self.temperature = float(actor.config.rollout.temperature)

    def draw(self, context: Ids, number: int, key) -> list[Ids]:
        """n completions of a context, the noise being that of prompt `number` of a call of the sampler."""
        n, ends = self.actor.config.rollout.group_size, self.actor.model_config.eos_ids
        (ids,), length = pad_rows([context], 1, bucket(len(context)))
        tokens, count = jax.device_get(
            _draw(self.actor.model_config, self.actor.params, ids, length[0], key, number, n, self.T,
                  self.temperature, ends)
        )  # fmt: skip
        return [row[:k].tolist() for row, k in zip(tokens, count, strict=True)]

    def last_state(self, ids: Ids) -> np.ndarray:
        """z of a sequence, [D]."""
        row, length = pad_rows([ids], 1, bucket(len(ids)))
        return np.asarray(_last_state(self.actor.model_config, self.actor.params, row, length))

    def probabilities(self, context: Ids, completion: Ids, params: dict | None = None) -> np.ndarray:
        """π(completion | context) token by token, [T], 0 beyond its end."""
        params = self.actor.params if params is None else params
        logp = _logp(self.actor.model_config, params, *self.row(context, completion), self.T, self.temperature)
        return np.where(np.arange(self.T) < len(completion), np.exp(np.asarray(logp)), 0).astype(np.float32)

    def row(self, context: Ids, completion: Ids) -> tuple[np.ndarray, np.ndarray]:
        """A context and a completion as one padded row [1, S], and where the completion begins [1]."""
        ids, _ = pad_rows([context + completion], 1, bucket(len(context)) + self.T)
        return ids, np.array([len(context)], np.int32)


def step(
    actor: Actor,
    reference: dict,
    problems: Sequence[str],
    candidates: Sequence[Sequence[Ids]],
    rewards: np.ndarray,
    order: Sequence[Sequence[int]],
    keys: dict,
) -> Found:
    """All that `gcpo_paper` makes of these candidates, and the gradient of its first update on them.

    Args:
      reference: the frozen reference's parameters.
      order: of each query, in which order its contexts list the candidates.
      keys: "integrated" and "rollouts".
    """
    a, loop, contexts = actor.config.algorithm, Loop(actor), actor.contexts
    (B, n), T, D = rewards.shape, loop.T, actor.model_config.hidden_size
    advantages = np.asarray(objectives.group_advantages(rewards))
    zeros, probabilities = np.zeros((B, n, D), np.float32), np.zeros((B, n, T), np.float32)
    found = Found(
        [], {}, {}, *(zeros.copy() for _ in range(3)), np.ones((B, n), np.float32),
        *(probabilities.copy() for _ in range(4)), 0.0, jax.tree.map(jnp.zeros_like, actor.params),
    )  # fmt: skip
    drawn_from = 0
    for b in range(B):
        quoted = {k: contexts.quote(candidates[b][k]) for k in order[b]}
        everything = contexts.integrate(problems[b], [quoted[k] for k in order[b]])
        found.integrated.append(loop.draw(everything, b, keys["integrated"]))
        for i in range(n):
            others = [quoted[k] for k in order[b] if k != i]
            found.contexts[b, i] = [
                contexts.leave_one_out(problems[b], others, contexts.quote(u)) for u in found.integrated[b]
            ]
        if rewards[b].min() == rewards[b].max():
            continue
        for i in range(n):
            found.z[b, i], found.rollouts[b, i], means = loop.last_state(candidates[b][i]), [], []
            for context in found.contexts[b, i]:
                outputs = loop.draw(context, drawn_from, keys["rollouts"])
                found.rollouts[b, i] += [outputs]
                means.append(np.mean([loop.last_state(o) for o in outputs], axis=0))
                drawn_from += 1
            found.z_x[b, i], found.z_phi[b, i] = means[0], np.mean(means, axis=0)
        found.upsilon[b] = causal.causal_factor(found.z[b], found.z_x[b], found.z_phi[b], alpha=a.alpha)

    query = [contexts.query(p) for p in problems]
    for b in range(B):
        for i in range(n):
            y, x = candidates[b][i], found.contexts[b, i]
            found.p_q[b, i] = loop.probabilities(query[b], y)
            each = np.stack([loop.probabilities(context, y) for context in x])
            found.p_x[b, i], found.p_phi[b, i] = each[0], each.mean(axis=0)
            target = causal.projected_probs(found.p_x[b, i], found.p_phi[b, i], found.p_q[b, i])
            found.projected[b, i] = np.where(found.p_q[b, i] > 0, target, 0)
            found.gradient, loss = _add_gradient(
                found.gradient, actor.model_config, actor.params, loop.row(query[b], y), loop.row(x[0], y),
                len(y), advantages[b, i] * found.upsilon[b, i], target, loop.probabilities(query[b], y, reference),
                (a.beta, a.kappa, a.clip_low, a.clip_high, 1 / (B * n)), T, loop.temperature,
            )  # fmt: skip
            found.loss += float(loss)
    return found


@functools.partial(jax.jit, static_argnames=("model_config", "n", "T", "temperature", "ends"))
def _draw(model_config, params, ids, length, key, number, n, T, temperature, ends):
    lengths = jnp.full(n, length, jnp.int32)
    hidden, prompt = models.prefill(model_config, params, jnp.broadcast_to(ids, (n, ids.shape[0])), lengths)
    row_key = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(key, number), k))
    uniforms = jax.vmap(lambda k: jax.random.uniform(k, (T,)))(row_key(jnp.arange(n)))

    def more(state):
        t, *_, done, _ = state
        return (t < T) & ~done.all()

    def one(state):
        t, hidden, own, tokens, done, count = state
        logp = jax.nn.log_softmax(models.unembed(model_config, params, hidden) / temperature)
        token = choose(logp, uniforms[:, t])
        count = count + jnp.where(done, 0, 1)
        done = done | jnp.isin(token, jnp.asarray(ends, jnp.int32))
        age = jnp.full(n, t, jnp.int32)
        hidden, own = models.decode_step(model_config, params, token[:, None], t, age, lengths, prompt, own)
        return t + 1, hidden[:, 0], own, tokens.at[:, t].set(token), done, count

    own = (models.init_cache(model_config, n, 1, T),)
    start = (jnp.int32(0), hidden, own, jnp.zeros((n, T), jnp.int32), jnp.zeros(n, bool), jnp.zeros(n, jnp.int32))
    _, _, _, tokens, _, count = jax.lax.while_loop(more, one, start)
    return tokens, count


@functools.partial(jax.jit, static_argnames="model_config")
def _last_state(model_config, params, row, length):
    return models.encode(model_config, params, row, length)[0, length[0] - 1].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model_config", "T", "temperature"))
def _logp(model_config, params, ids, start, T, temperature):
    """log π of the T tokens from column `start` of a row on."""
    hidden = models.encode(model_config, params, ids, jnp.full(1, ids.shape[1]))
    columns = start + jnp.arange(T)
    logits = models.unembed(model_config, params, hidden[0, columns - 1])
    every = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(every, ids[0, columns][:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model_config", "T", "temperature"), donate_argnums=0)
def _add_gradient(total, model_config, params, row, row_x, length, advantage, target, p_ref, weights, T, temperature):
    """(total + the gradient of one candidate's share of Eq. 10, that share)."""
    beta, kappa, clip_low, clip_high, share = (jnp.float32(w) for w in weights)
    mask = (jnp.arange(T) < length).astype(jnp.float32)

    def loss(params):
        logp = _logp(model_config, params, *row, T, temperature)
        logp_x = _logp(model_config, params, *row_x, T, temperature)
        arrays = (x[None, None] for x in (logp, jax.lax.stop_gradient(logp), advantage, mask))
        return share * objectives.gcpo_loss(
            *arrays, logp_x=logp_x[None, None], projected=target[None, None], klc_weight=jnp.ones((1, 1)), kappa=kappa,
            ref_logp=jnp.log(jnp.where(mask > 0, p_ref, 1.0))[None, None], beta=beta, clip_low=clip_low,
            clip_high=clip_high,
        )  # fmt: skip

    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(jnp.add, total, gradient), value

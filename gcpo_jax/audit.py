"""The audit file: every quantity of one step, in the form that another framework needs to compute it again.

Integers are int32, ragged axes are padded with -1 (0 for floats); B queries, n candidates, C contexts of a target,
R roll-outs, T tokens of the longest candidate. docs/audit.md says what each array means; scripts/audit.py computes
all of them again.
"""

import os
import pathlib
from typing import Any

import numpy as np

from gcpo_jax.config import Config
from gcpo_jax.learner import Batch
from gcpo_jax.rollout import Experience


def _ragged(nested, shape: tuple[int, ...]) -> np.ndarray:
    """A nested list of ids as an array of `shape` + (longest,), -1 where there is nothing."""
    leaves: list[tuple[tuple[int, ...], list[int]]] = []

    def walk(at, item):
        if len(at) == len(shape):
            leaves.append((at, item))
        else:
            for k, inner in enumerate(item):
                walk((*at, k), inner)

    walk((), nested)
    out = np.full((*shape, max([len(ids) for _, ids in leaves], default=0)), -1, np.int32)
    for at, ids in leaves:
        out[at][: len(ids)] = ids
    return out


def write(path: pathlib.Path, config: Config, exp: Experience, batch: Batch, details: dict, loss: float) -> None:
    """Write `path` (.npz), whole or not at all.

    Args:
      details, loss: of the first update on the batch, whose policy is the one that sampled; see learner.make_update.
    """
    B, n = exp.rewards.shape
    a = config.algorithm
    C = max([len(c) for c in exp.contexts.values()], default=0)
    R = max([len(r[0]) for r in exp.rollouts.values()], default=0)
    K = max(map(len, exp.integrated))
    weight_x, weight_phi = np.zeros((2, B, n, C), np.float32)
    contexts = [[[c.ids for c in exp.contexts.get((b, i), [])] for i in range(n)] for b in range(B)]
    rollouts = [[exp.rollouts.get((b, i), []) for i in range(n)] for b in range(B)]
    for (b, i), cs in exp.contexts.items():
        weight_x[b, i, : len(cs)] = [c.weight_x for c in cs]
        weight_phi[b, i, : len(cs)] = [c.weight_phi for c in cs]
    candidate_ids = _ragged(exp.candidates.tokens, (B, n))
    real, T = B * n, candidate_ids.shape[-1]

    def token_values(values):
        return (np.asarray(values)[:real, :T] * batch.mask[:real, :T]).reshape(B, n, T)

    per_target = {name: np.zeros((B, n, T), np.float32) for name in ("p_q", "p_x", "p_phi", "projected")}
    if batch.kl is not None:
        for name, values in per_target.items():
            for row, weight, value in zip(batch.kl.row, batch.kl.weight, np.asarray(details[name]), strict=True):
                if weight:
                    values[divmod(int(row), n)] = (value * batch.mask[row])[:T]
    arrays: dict[str, Any] = dict(
        prompt_ids=_ragged(exp.prompts, (B,)),
        candidate_ids=candidate_ids,
        integrated_ids=_ragged(exp.integrated, (B, K)),
        rewards=exp.rewards,
        advantages=exp.advantages,
        upsilon=exp.upsilon,
        scaled_advantages=exp.scaled_advantages,
        order=_ragged(exp.order, (B,)),
        context_ids=_ragged(contexts, (B, n, C)),
        weight_x=weight_x,
        weight_phi=weight_phi,
        bayes_ids=_ragged([[exp.bayes_contexts.get((b, i), [[]] * n) for i in range(n)] for b in range(B)], (B, n, n)),
        rollout_ids=_ragged(rollouts, (B, n, C, R)),
        feature_ids=_ragged([f or [[]] * n for f in exp.features], (B, n)),
        z=exp.z,
        z_x=exp.z_x,
        z_phi=exp.z_phi,
        logp=token_values(details["logp"]),
        ref_logp=token_values(np.zeros_like(batch.mask) if batch.ref_logp is None else batch.ref_logp),
        **per_target,
        klc_weight=exp.klc_weight,
        alpha=np.float32(a.alpha),
        kappa=np.float32(a.kappa),
        beta=np.float32(a.beta),
        temperature=np.float32(config.rollout.temperature),
        loss=np.float32(loss),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp.npz")
    np.savez_compressed(partial, **arrays)
    os.replace(partial, path)

"""What one step's row of metrics.jsonl and its rows of completions.jsonl say."""

from typing import Any

import jax
import numpy as np

from gcpo_jax import scorer
from gcpo_jax.config import Config
from gcpo_jax.evaluation.statistics import majority
from gcpo_jax.learner import Batch
from gcpo_jax.metrics import peak_flops
from gcpo_jax.rollout import Experience

# Every training row has all of these; null where the algorithm has no such thing.
NAMES = (
    "step",
    "reward/mean",
    "reward/std",
    "frac_reward_zero_std",
    "loss",
    "kl",
    "kl_causal",
    "clip_fraction",
    "entropy",
    "grad_norm",
    "learning_rate",
    "completion_length/mean",
    "completion_length/truncated_frac",
    "upsilon/mean",
    "upsilon/std",
    "upsilon/min",
    "upsilon/reward_corr",
    "upsilon/correction_ratio",
    "upsilon/effective_samples",
    "projected/invalid_frac",
    "projected/shift",
    "integrated/accuracy",
    "majority/accuracy",
    "sampler_logprob_gap",
    "time/log_s",
    "time/save_s",
    "time/data_s",
    "time/sample_s",
    "time/reward_s",
    "time/reward_busy_s",
    "time/integrate_s",
    "time/contexts_s",
    "time/score_s",
    "time/update_s",
    "time/step_s",
    "time/compilations",
    "tokens_per_s",
    "mfu",
)


def summarise(
    config: Config,
    exp: Experience,
    batch: Batch,
    values: dict[str, Any],
    details: dict[str, np.ndarray],
    times: dict[str, float],
    answer,
    parameters: int,
) -> dict[str, Any]:
    """One row of metrics.jsonl (without step and learning rate).

    Args:
      values, details: of learner.make_update's function.
      times: seconds by phase, "time/sample_s" and so on.
      answer: the final answer of a completion, for the majority vote.
      parameters: numbers in the policy, for mfu = 6 * parameters * tokens differentiated / update seconds / peak.
    """
    lengths = np.array([[len(c) for c in group] for group in exp.candidates.tokens])
    row: dict[str, Any] = dict.fromkeys(NAMES)
    row |= {
        "reward/mean": exp.rewards.mean(),
        "reward/std": exp.rewards.std(axis=1, ddof=1).mean(),
        "frac_reward_zero_std": 1 - exp.active.mean(),
        "completion_length/mean": lengths.mean(),
        "completion_length/truncated_frac": 1 - exp.finished.mean(),
        "majority/accuracy": np.mean(
            [majority([answer(t) for t in texts], r) for texts, r in zip(exp.texts, exp.rewards.tolist(), strict=True)]
        ),
        "sampler_logprob_gap": _sampler_gap(exp, details["logp"]),
        "tokens_per_s": lengths.sum() / times["time/sample_s"],
    }
    integrated = [r for rewards in exp.integrated_rewards for r in rewards]
    if integrated:
        row["integrated/accuracy"] = np.mean(integrated)
    if config.algorithm.causal_factor != "none" and exp.active.any():
        upsilon, rewards = exp.upsilon[exp.active], exp.rewards[exp.active]
        correction = np.linalg.norm((exp.z_x - exp.z_phi)[exp.active], axis=-1)
        centre = np.linalg.norm(exp.z[exp.active].mean(axis=1), axis=-1)
        row |= {
            "upsilon/mean": upsilon.mean(),
            "upsilon/std": upsilon.std(),
            "upsilon/min": upsilon.min(),
            "upsilon/reward_corr": _within_group_correlation(upsilon, rewards),
            "upsilon/correction_ratio": np.mean(correction / centre[:, None]),
            "upsilon/effective_samples": exp.effective_samples,
        }
    row |= values | times
    entries = batch.lengths.any(axis=1)  # the others only fill up a micro-batch
    differentiated = float(batch.prompt_lengths[entries].sum() + batch.lengths.sum())
    if batch.kl is not None:
        differentiated += _tokens(batch.kl.contexts)
    differentiated *= config.learner.updates_per_batch
    row["mfu"] = 6 * parameters * differentiated / times["time/update_s"] / peak_flops(config.model.dtype)
    return {name: value if value is None else float(value) for name, value in row.items()}


def _tokens(rows: scorer.Rows) -> float:
    """Tokens that are differentiated; blocks and what stands before them are only computed, a third of the work."""
    real = rows.lengths.any(axis=1)
    first, own = rows.prompt_lengths[real].sum(), rows.lengths.sum()
    if rows.blocks is None:
        return float(first + own)
    return float(own + np.asarray(rows.starts)[real].sum() + (first + rows.blocks.lengths.sum()) / 3)


def _sampler_gap(exp: Experience, logp: np.ndarray) -> float:
    """The largest difference of a completion token's log-probability between sampler and training graph."""
    sampled = [p for group in exp.candidates.logprobs for p in group]
    return max(float(np.abs(np.array(p) - logp[r, : len(p)]).max()) for r, p in enumerate(sampled))


def _within_group_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation after the mean of each group is taken off, so that hard and easy queries do not count."""
    x, y = (v - v.mean(axis=1, keepdims=True) for v in (x.astype(np.float64), y.astype(np.float64)))
    spread = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread) if spread > 0 else None


def readable(exp: Experience, step: int, groups: int, decode) -> list[dict[str, Any]]:
    """Rows of completions.jsonl: `groups` groups as a person reads them, those with differing rewards first."""
    chosen = sorted(range(len(exp.rows)), key=lambda b: not exp.active[b])[:groups]
    return [
        {
            "step": step,
            "id": exp.rows[b].get("id"),
            "answer": exp.rows[b].get("answer"),
            "prompt": decode([exp.prompts[b]], False)[0],
            "candidates": [
                {
                    "completion": text,
                    "finished": bool(exp.finished[b, i]),
                    "reward": float(exp.rewards[b, i]),
                    "advantage": float(exp.advantages[b, i]),
                    "upsilon": float(exp.upsilon[b, i]),
                    "scaled_advantage": float(exp.scaled_advantages[b, i]),
                    "kl_causal_weight": float(exp.klc_weight[b, i]),
                }
                for i, text in enumerate(exp.texts[b])
            ],
            "integrated": [
                {"completion": text, "reward": float(r)}
                for text, r in zip(decode(exp.integrated[b], True), exp.integrated_rewards[b], strict=True)
            ],
        }
        for b in chosen
    ]


def count(params: dict) -> int:
    """Numbers in a parameter tree."""
    return sum(x.size for x in jax.tree.leaves(params))

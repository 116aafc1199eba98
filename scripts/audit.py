"""Recompute every quantity of one audited step with transformers and NumPy, and compare: no line of gcpo_jax runs.

    python scripts/audit.py runs/tiny-gcpo            # after a run with --config.train.audit_steps="(0,)"

Numbers are computed in a chain from token ids, rewards and settings, never from other numbers of the file, so a wrong
array shows on its own line. audit_ids.py checks what token ids must hold; docs/audit.md says what each array is and
what cannot be checked this way. Exit code 1: a line is over its tolerance. Needs torch: pip install "gcpo_jax[torch]".
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers
from audit_ids import Ids, Step, check_ids, ragged

TOKENS = 8192  # fed to the model at a time


# ---- load


def load(run: pathlib.Path, step: int) -> tuple[dict, dict[str, np.ndarray]]:
    """(settings by "section.field", arrays) of a run and step; ends the program where they are not there."""
    file = run / "audit" / f"step_{step:06d}.npz"
    for path in (run / "config.json", file):
        if not path.exists():
            sys.exit(f'error: {path} does not exist; was the run made with --config.train.audit_steps="({step},)"?')
    return json.loads((run / "config.json").read_text())["config"], dict(np.load(file))


class Model:
    """A model directory in float32, as transformers computes it."""

    def __init__(self, path: str, temperature: float):
        self.network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.temperature = temperature
        ends = self.network.generation_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends])

    @torch.no_grad()
    def _run(self, rows: list[tuple[int, ...]]):
        """(row number, hidden states after the final norm) of each row."""
        order = sorted(range(len(rows)), key=lambda r: -len(rows[r]))
        while order:
            size = max(1, TOKENS // max(1, len(rows[order[0]])))
            part, order = order[:size], order[size:]
            tokens = torch.zeros((len(part), len(rows[part[0]])), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for k, r in enumerate(part):
                tokens[k, : len(rows[r])] = torch.tensor(rows[r], dtype=torch.long)
                mask[k, : len(rows[r])] = 1
            out = self.network(
                tokens, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
            )
            yield from ((r, out.hidden_states[-1][k, : len(rows[r])]) for k, r in enumerate(part))

    def last_hidden(self, sequences: list[Ids]) -> np.ndarray:
        """The last token's hidden state of each sequence fed alone, [R, D]; nan for an empty one."""
        rows = sorted({tuple(s) for s in sequences if s})
        found = {rows[r]: hidden[-1].double().numpy() for r, hidden in self._run(rows)}
        nothing = np.full(self.network.config.hidden_size, np.nan)
        return np.array([found.get(tuple(s), nothing) for s in sequences])

    @torch.no_grad()
    def logprobs(self, prompts: list[Ids], completions: list[Ids], width: int) -> np.ndarray:
        """log π(completion | prompt) by token, [R, width], 0 beyond a completion; nan where there is no prompt."""
        result = np.zeros((len(prompts), width))
        rows = [(*p, *c) if p else () for p, c in zip(prompts, completions, strict=True)]
        distinct = sorted({(row, len(p)) for row, p in zip(rows, prompts, strict=True) if row})
        found = {}
        for r, hidden in self._run([row for row, _ in distinct]):
            row, start = distinct[r]
            logits = self.network.lm_head(hidden[start - 1 : -1]) / self.temperature
            logp = torch.log_softmax(logits.double(), -1)
            found[distinct[r]] = logp.gather(1, torch.tensor(row[start:], dtype=torch.long)[:, None])[:, 0].numpy()
        for r, (row, p) in enumerate(zip(rows, prompts, strict=True)):
            result[r, : len(completions[r])] = found[row, len(p)] if row else np.nan
        return result


# ---- recompute numbers


def recompute(s: Step, policy: Model, reference: Model) -> dict[str, Any]:
    """Every number of the file, [B, n, ...], from ids, rewards and settings."""
    a, B, n, T = s.algorithm, s.B, s.n, s.T
    pairs = [(s.prompts[b], s.candidates[b][i]) for b in range(B) for i in range(n)]
    prompts, candidates = [list(x) for x in zip(*pairs, strict=True)]
    logp = policy.logprobs(prompts, candidates, T).reshape(B, n, T)
    ref_logp = np.zeros((B, n, T))
    if a["beta"] > 0 and a["objective"] == "clipped":
        ref_logp = logp if reference is policy else reference.logprobs(prompts, candidates, T).reshape(B, n, T)

    # Eq. 8
    advantages = s.rewards - s.rewards.mean(1, keepdims=True)
    if a["advantage_scale"] == "std":
        advantages = advantages / (s.rewards.std(1, ddof=1, keepdims=True) + 1e-4)

    z, z_x, z_phi = representations(s, policy)
    upsilon = np.ones((B, n))
    for b in s.factor_groups:
        upsilon[b] = causal_factor(a, z[b], z_x[b] - z_phi[b] + z[b].mean(0))
    scaled = advantages * upsilon

    # Eq. 12-13: the contexts of a target are mixed with their weights.
    p_q, p_x, p_phi, projected = np.zeros((4, B, n, T))
    at = [(b, i, c) for b, i in s.kl_targets for c in range(len(s.contexts[b][i]))]
    inside = policy.logprobs([s.contexts[b][i][c] for b, i, c in at], [s.candidates[b][i] for b, i, _ in at], T)
    for (b, i, c), row in zip(at, np.exp(inside), strict=True):
        p_x[b, i] += s.weights[0, b, i, c] * row * s.mask[b, i]
        p_phi[b, i] += s.weights[1, b, i, c] * row * s.mask[b, i]
    for b, i in s.kl_targets:
        p_q[b, i] = np.exp(logp[b, i]) * s.mask[b, i]
        projected[b, i] = np.clip(p_x[b, i] - p_phi[b, i] + p_q[b, i], 1e-4, 1) * s.mask[b, i]
    numbers = dict(
        weight_x=s.weights[0], weight_phi=s.weights[1], z=z, z_x=z_x, z_phi=z_phi, advantages=advantages,
        upsilon=upsilon, scaled_advantages=scaled, logp=logp, ref_logp=ref_logp, p_q=p_q, p_x=p_x, p_phi=p_phi,
        projected=projected,
    )  # fmt: skip
    settings = {name: np.float64(s.config[f"algorithm.{name}"]) for name in ("alpha", "kappa", "beta")}
    return settings | {"temperature": np.float64(policy.temperature)} | numbers | {"loss": loss(s, numbers)}


def representations(s: Step, policy: Model) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z_i, Z̄_i and Z̄'_i of the groups whose rewards differ; zeros elsewhere."""
    z, z_x, z_phi = np.zeros((3, s.B, s.n, policy.network.config.hidden_size))
    for b in s.factor_groups:
        z[b] = policy.last_hidden([ids[-s.M :] for ids in s.candidates[b]])
    if s.algorithm["causal_factor"] == "bayes":
        bayes_ids = ragged(s.arrays["bayes_ids"], 3)
        for b in s.factor_groups:
            u = s.integrated[b][0]
            flat = [ids for row in bayes_ids[b] for ids in row]
            loglik = policy.logprobs(flat, [u] * len(flat), len(u)).sum(1).reshape(s.n, s.n) / len(u)
            weights = np.exp(loglik - loglik.max(1, keepdims=True))
            z_x[b] = weights / weights.sum(1, keepdims=True) @ z[b]
            z_phi[b] = z[b].mean(0)
    for b, i in s.with_rollouts:
        outputs = s.rollouts[b][i]
        hidden = policy.last_hidden([o for context in outputs for o in context])
        means = hidden.reshape(len(outputs), -1, hidden.shape[-1]).mean(1)
        z_x[b, i], z_phi[b, i] = s.weights[0, b, i] @ means, s.weights[1, b, i] @ means
    if s.algorithm["correction"] == "permuted" and len(s.factor_groups):
        # The corrections of all targets, shuffled by a draw that is not in the file: each must be there exactly once.
        own = (z_x - z_phi)[s.factor_groups].reshape(-1, z.shape[-1])
        written = s.arrays["z_x"][s.factor_groups].reshape(own.shape)
        nearest = np.abs(written[:, None] - own[None]).max(-1).argmin(1)
        shuffled = own[nearest] if len(set(nearest)) == len(own) else np.full_like(own, np.nan)
        z_x[s.factor_groups], z_phi[:] = shuffled.reshape(-1, s.n, z.shape[-1]), 0
    return z, z_x, z_phi


def causal_factor(a: dict, z: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Υ of one group, Eq. 11: α sim(z_i, Z̄_i - Z̄'_i + z̄)."""
    distance = np.linalg.norm(z - target, axis=-1)
    value = {
        "cosine": (z * target).sum(-1)
        / np.maximum(np.linalg.norm(z, axis=-1) * np.linalg.norm(target, axis=-1), 1e-12),
        "euclidean": -distance,
        "gaussian": np.exp(-0.5 * (distance / max(np.median(distance), 1e-12)) ** 2),
    }[a["similarity"]]
    return np.maximum(a["alpha"] * value, 0) if a["clip_negative"] else a["alpha"] * value


def loss(s: Step, v: dict[str, np.ndarray]) -> np.ndarray:
    """The loss of the batch's first update, whose policy is the old policy: every ratio is 1 and no clip acts."""
    a, n = s.algorithm, s.n
    if a["objective"] == "gvpo":
        return (0.5 * ((s.rewards - s.rewards.mean(1, keepdims=True)) ** 2).sum(1) / (n - 1)).mean()
    share = {
        "sequence_mean": s.mask / np.maximum(s.mask.sum(-1, keepdims=True), 1) / (s.B * n),
        "token_mean": s.mask / s.mask.sum(),
        "constant": s.mask / (s.limit * s.B * n),
    }[a["aggregation"]]
    u = v["ref_logp"] - v["logp"]
    kl = np.expm1(u) - u if a["beta"] > 0 else 0.0
    inside = (s.mask > 0) & (s.arrays["klc_weight"] > 0)[..., None] & (a["kappa"] > 0)
    ratio = np.where(inside, v["projected"], 1) / np.where(inside, v["p_x"], 1)
    ratio = np.clip(ratio, 1e-3, 10)
    kl_causal = (ratio - np.log(ratio) - 1) * s.arrays["klc_weight"][..., None]
    return -((v["scaled_advantages"][..., None] - a["beta"] * kl - a["kappa"] * kl_causal) * share).sum()


# ---- compare and report


def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference; infinite where shapes differ or something is not a number."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = np.abs(ours.astype(np.float64) - theirs)
    return float("inf") if np.isnan(difference).any() else float(difference.max(initial=0))


def main(argv: list[str] | None = None) -> int:
    """Parse flags, recompute, print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=pathlib.Path, help="a run directory")
    p.add_argument("--step", type=int, default=0, help="updates done before the step")
    p.add_argument("--model", help="the policy of that step; default at step 0: model.path of the run")
    p.add_argument("--tolerance", type=float, default=1e-4, help="of every number; meant for float32")
    args = p.parse_args(argv)
    config, arrays = load(args.run, args.step)
    if args.step and not args.model:
        p.error("--step after 0 needs --model, the Hugging Face directory of the policy before that update")
    policy_path = args.model or config["model.path"]
    reference_path = policy_path if args.step == 0 else config["model.path"]
    temperature = config["rollout.temperature"]
    policy = Model(policy_path, temperature)
    reference = policy if reference_path == policy_path else Model(reference_path, temperature)
    for name in (name for name in arrays if name.endswith("_ids")):
        if arrays[name].max(initial=-1) >= policy.network.config.vocab_size:
            sys.exit(f"error: {name} holds ids beyond the vocabulary of {policy_path}")

    step = Step(config, arrays)
    faults = check_ids(step, transformers.AutoTokenizer.from_pretrained(policy_path), policy.end_ids)
    lines: list[tuple[str, float, float]] = [(name, len(found), 0.0) for name, found in faults.items()]
    for name, theirs in recompute(step, policy, reference).items():
        lines.append((name, largest(arrays[name], theirs), args.tolerance))
    print(f"{args.run}, step {args.step}: {step.B} queries, {step.n} candidates each, "
          f"{len(step.factor_groups)} groups with causal factors, {len(step.kl_targets)} targets of KL'")  # fmt: skip
    if config["model.dtype"] != "float32":
        print(f"the run computed in {config['model.dtype']}: the tolerance is meant for float32")
    print(f"{'quantity':24}{'largest difference':>20}{'tolerance':>12}  ok")
    for name, difference, tolerance in lines:
        shown = f"{difference:.1e}" if tolerance else f"{difference} faults"
        print(f"{name:24}{shown:>20}{tolerance:>12.0e}  {'yes' if difference <= tolerance else 'NO'}")
    for name, found in faults.items():
        for message in found[:3]:
            print(f"{name}: {message}")
    return int(any(difference > tolerance for _, difference, tolerance in lines))


if __name__ == "__main__":
    sys.exit(main())

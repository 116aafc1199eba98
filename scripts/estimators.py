"""What each saving of GCPO's estimator costs: bias and spread of Υ and of the gradient, beside the work it takes.

    python scripts/estimators.py --model configs/tiny_model --out docs/results/estimators_tiny
    python scripts/estimators.py --recipe smollm2 --model DIR --data words.jsonl --queries 4 --group 4 --tokens 48 \\
        --repeats 4 --no-gradient --out docs/results/estimators_smollm2

Candidates are sampled once: of a few steps' those whose rewards differ in the most groups. Every estimator then makes
its integrated outputs, contexts and roll-outs anew --repeats times; the oracle is the mean over repeats of the paper's
estimator, with L = R = n and whole roll-outs. Both mean and oracle are noisy themselves: what that adds to a squared
bias is taken off it. Writes OUT.json and OUT.md.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gcpo_jax import config as config_lib
from gcpo_jax import learner, metrics, models, provenance, rollout, tasks, train

STEPS = 32  # whose candidates are looked at
# The gradient itself as the optimizer's state, parameters untouched.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)


def estimators(n: int, tokens: int) -> dict[str, config_lib.Algorithm]:
    """The oracle first. None clips Υ at 0, so that all estimate the same.

    "through contexts": see algorithm.context_gradient. "in blocks": see contexts.attention.
    """
    sizes = sorted({k for k in (1, 2, 4) if k < n} | {n})
    found = {"gcpo_paper": config_lib.preset("gcpo_paper")}
    for L in sizes:
        for R in sizes:
            found[f"gcpo L={L} R={R}"] = dataclasses.replace(
                config_lib.preset("gcpo"), integrated=L, rollouts=R, rollout_tokens=tokens
            )
    for k in sizes:
        found[f"gcpo L=2 R=2 k={k}"] = dataclasses.replace(found["gcpo L=2 R=2"], kl_targets=k)
    half = tokens // 2
    found[f"gcpo L=2 R=2 M={half}"] = dataclasses.replace(config_lib.preset("gcpo"), rollout_tokens=half)
    found["gcpo L=2 R=2 through contexts"] = dataclasses.replace(found["gcpo L=2 R=2"], context_gradient=True)
    found["gcpo L=2 R=2 in blocks"] = found["gcpo L=2 R=2"]
    found["gcpo_loo L=2 R=2"] = dataclasses.replace(config_lib.preset("gcpo_loo"), rollout_tokens=tokens)
    found["gcpo_bayes"] = config_lib.preset("gcpo_bayes")
    return {name: dataclasses.replace(a, clip_negative=False, beta=0.0) for name, a in found.items()}


class Measured:
    """Repeats of one estimator on the same candidates."""

    def __init__(self):
        self.upsilon: list[np.ndarray] = []
        self.seconds: list[float] = []
        self.total: np.ndarray | None = None  # sum of gradients
        self.squares = 0.0  # and of their squared norms

    def add(self, upsilon: np.ndarray, gradient: np.ndarray | None, seconds: float) -> None:
        """One repeat: Υ of the candidates whose groups' rewards differ, the gradient if it was taken."""
        self.upsilon.append(upsilon)
        self.seconds.append(seconds)
        if gradient is not None:
            self.total = gradient.astype(np.float64) + (0 if self.total is None else self.total)
            self.squares += float(gradient.astype(np.float64) @ gradient)


def compare(name: str, mine: Measured, oracle: Measured, n: int) -> dict[str, Any]:
    """One row of the table."""
    K, K_oracle = len(mine.upsilon), len(oracle.upsilon)
    draws, truth_draws = np.array(mine.upsilon), np.array(oracle.upsilon)
    truth = truth_draws.mean(axis=0)
    variance, noise = draws.var(axis=0, ddof=1).mean(), truth_draws.var(axis=0, ddof=1).mean() / K_oracle
    bias = ((draws.mean(axis=0) - truth) ** 2).mean() - variance / K - (noise if mine is not oracle else 0)

    def within(x):
        groups = x.reshape(-1, n)
        return (groups - groups.mean(axis=1, keepdims=True)).ravel()

    correlation = np.mean([np.corrcoef(within(draw), within(truth))[0, 1] for draw in draws])
    row: dict[str, Any] = {
        "estimator": name,
        "seconds": float(np.median(mine.seconds[1:])),
        "upsilon_bias": float(np.sqrt(max(0.0, bias))) if mine is not oracle else 0.0,
        "upsilon_spread": float(np.sqrt(variance)),
        "upsilon_correlation": float(correlation),
        "gradient_bias": None,
        "gradient_spread": None,
    }
    if mine.total is not None and oracle.total is not None:
        mean, best = mine.total / K, oracle.total / K_oracle
        spread = (mine.squares / K - mean @ mean) * K / (K - 1)
        noise = (oracle.squares / K_oracle - best @ best) / (K_oracle - 1)
        size = np.sqrt(max(best @ best - noise, 1e-30))
        bias = (mean - best) @ (mean - best) - spread / K - noise
        row["gradient_bias"] = float(np.sqrt(max(0.0, bias)) / size) if mine is not oracle else 0.0
        row["gradient_spread"] = float(np.sqrt(max(0.0, spread)) / size)
    return row


def most_active(config, model_config, params, contexts, reward, problems) -> int:
    """The step whose candidates' rewards differ in the most groups."""
    actor = rollout.Actor(
        dataclasses.replace(config, algorithm=config_lib.preset("grpo")), model_config, params, contexts
    )
    active = [rollout.collect(actor, reward, problems, s, metrics.Timers()).active.sum() for s in range(STEPS)]
    return int(np.argmax(active))


def measure(config: config_lib.Config, repeats: int, gradients: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table's rows, and what they were measured on."""
    model_config, params = models.load_pretrained(config.model.path)
    contexts = train.make_contexts(config, model_config)
    reward, task = tasks.resolve_reward(config.data.reward), tasks.build(config.data)
    rows, _ = train.within_limit(config, contexts, task.train, model_config.vocab_size)
    problems = rows[: config.rollout.queries]
    n = config.rollout.group_size
    step = most_active(config, model_config, params, contexts, reward, problems)
    oracle, table_rows = Measured(), []
    active = np.zeros(0, bool)
    for name, algorithm in estimators(n, config.rollout.max_new_tokens).items():
        attention = "block" if name.endswith("in blocks") else "causal"
        of = dataclasses.replace(
            config, algorithm=algorithm, contexts=dataclasses.replace(config.contexts, attention=attention)
        )
        actor = rollout.Actor(of, model_config, params, train.make_contexts(of, model_config))
        update, state = learner.make_update(model_config, of, KEEP), None
        measured = Measured() if table_rows else oracle
        for repeat in range(repeats):
            began = time.process_time()
            exp = rollout.collect(actor, reward, problems, step, metrics.Timers(), repeat=repeat + 1)
            active = exp.active
            gradient = None
            if gradients:
                batch = learner.make_batch(actor, None, exp)
                state = state or learner.TrainState(jax.tree.map(jnp.copy, params), KEEP.init(params))
                state = update(state, batch)[0]
                gradient = np.concatenate([np.ravel(g) for g in jax.tree.leaves(jax.device_get(state.opt_state))])
            measured.add(exp.upsilon[active].ravel(), gradient, time.process_time() - began)
        table_rows.append(compare(name, measured, oracle, n))
        print(json.dumps(table_rows[-1]), flush=True)
    truth = np.mean(oracle.upsilon, axis=0).reshape(-1, n)
    about = {
        "queries": len(problems),
        "step": step,
        "active_groups": int(active.sum()),
        "group_size": n,
        "max_new_tokens": config.rollout.max_new_tokens,
        "repeats": repeats,
        "upsilon_mean": float(truth.mean()),
        "upsilon_std_within_group": float(np.sqrt(truth.var(axis=1).mean())),
    }
    return table_rows, about


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    head = ["estimator", "processor s", "Υ bias", "Υ spread", "corr with oracle", "gradient bias", "gradient spread"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        values = list(row.values())[2:]
        cells = [f"`{row['estimator']}`", f"{row['seconds']:.2f}"]
        lines.append("| " + " | ".join(cells + ["" if v is None else f"{v:.3f}" for v in values]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse flags, measure, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default="tiny", help="a file of configs/, without .py")
    p.add_argument("--model", required=True, help="a model directory")
    p.add_argument("--data", default="", help="a JSONL file, where the recipe needs one")
    p.add_argument("--queries", type=int, default=16)
    p.add_argument("--group", type=int, default=8, help="candidates of a query")
    p.add_argument("--tokens", type=int, default=0, help="of a completion; by default the recipe's")
    p.add_argument("--repeats", type=int, default=8)
    p.add_argument("--gradient", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--out", type=pathlib.Path, required=True, help="without suffix")
    args = p.parse_args()
    train.cache_compilations()
    config = importlib.import_module(f"gcpo_jax.configs.{args.recipe}").get_config("gcpo")
    config.model.path, config.data.path = args.model, args.data
    config.rollout.queries, config.rollout.group_size = args.queries, args.group
    config.rollout.max_new_tokens = args.tokens or config.rollout.max_new_tokens
    rows, about = measure(config, args.repeats, args.gradient)
    flags = [f"--recipe {args.recipe} --model DIR --queries {args.queries} --group {args.group}"]
    flags += [f"--tokens {config.rollout.max_new_tokens} --repeats {args.repeats}"]
    flags += [] if args.gradient else ["--no-gradient"]
    record = {**provenance.made(" ".join(["python scripts/estimators.py", *flags])), **about, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

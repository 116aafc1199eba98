"""Train presets side by side on one recipe, one or more seeds each, and tabulate them.

    python scripts/compare.py --models A B C --out docs/results/tiny
    python scripts/compare.py --recipe smollm2 --models DIR --presets grpo gcpo --data words.jsonl words_eval.jsonl \\
        --out docs/results/smollm2

Seed k starts from the k-th model directory (scripts/cold_start.py makes one per seed) and runs the recipe as it is
committed, seed apart. Runs lie under --runs; finished ones are read, unfinished ones resumed. Writes OUT.json, OUT.md
and OUT.svg.
"""

import argparse
import importlib
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from gcpo_jax import config as config_lib
from gcpo_jax import provenance, train
from gcpo_jax.evaluation.statistics import mean_and_error

MEASURES = ("pass@1", "greedy", "majority")
COLUMNS = ("integrated/accuracy", "majority/accuracy", "upsilon/mean", "upsilon/std", "upsilon/reward_corr")


def run(config: config_lib.Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """One run's rows of metrics.jsonl, trained now unless they are there already."""
    made = workdir.with_suffix(".commit")
    if not (workdir / "policy").exists():
        workdir.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(provenance.commit() or "")
        if not train.train(config, workdir):
            raise SystemExit("stopped; the same command goes on from here")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows[0]["commit"] = made.read_text().strip()
    return rows


def summary(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds of one preset's runs, with standard errors over seeds or, of a single run, over problems."""
    result: dict[str, Any] = {"seeds": len(runs), "commits": sorted({rows[0]["commit"] for rows in runs})}
    for name in MEASURES:
        measured = [[row for row in rows if f"eval/{name}" in row] for rows in runs]
        curves = [[row[f"eval/{name}"] for row in rows] for rows in measured]
        curve = [mean_and_error(at) for at in zip(*curves, strict=True)]
        gain = mean_and_error([c[-1] - c[0] for c in curves])
        if len(runs) == 1:
            errors = [row[f"eval/{name}_se"] for row in measured[0]]
            curve = [(mean, error) for (mean, _), error in zip(curve, errors, strict=True)]
            gain = (gain[0], math.hypot(errors[0], errors[-1]))  # as if the two were measured on different problems
        result[name] = {
            "steps": [row["step"] for row in measured[0]],
            "curve": curve,
            "gain": gain,
            "per_seed": [(c[0], c[-1]) for c in curves],
            "per_seed_se": [[row[f"eval/{name}_se"] for row in (rows[0], rows[-1])] for rows in runs],
        }
    rewards = [[row["reward/mean"] for row in rows[1:]] for rows in runs]
    result["reward"] = [mean_and_error(at) for at in zip(*rewards, strict=True)]
    for name in COLUMNS:
        result[f"{name}/by_step"] = [[row[name] for row in rows[1:]] for rows in runs]
        means = [[row[name] for row in rows[1:] if row[name] is not None] for rows in runs]
        result[name] = mean_and_error([float(np.mean(m)) for m in means]) if all(means) else None
    result["seconds_per_step"] = float(np.median([row["time/step_s"] for rows in runs for row in rows[1:]]))
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """The Markdown table: start and end on held-out problems, then what happened in between."""

    def cell(pair, digits=1, scale=100):
        return "" if pair is None else f"{scale * pair[0]:.{digits}f} ± {scale * pair[1]:.{digits}f}"

    head = ["preset", *(f"{m} start → end" for m in MEASURES), "gain pass@1", "gain greedy"]
    head += ["integrated", "majority of group", "Υ mean", "Υ std", "corr(Υ, r)", "s/step"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for preset, r in results.items():
        cells = [f"`{preset}`"]
        cells += [f"{cell(r[m]['curve'][0])} → {cell(r[m]['curve'][-1])}" for m in MEASURES]
        cells += [cell(r["pass@1"]["gain"]), cell(r["greedy"]["gain"])]
        cells += [cell(r["integrated/accuracy"]), cell(r["majority/accuracy"])]
        cells += [cell(r[name], 3, 1) for name in COLUMNS[2:]] + [f"{r['seconds_per_step']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(results: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Reward, held-out pass@1 and greedy accuracy against updates, with standard errors over seeds."""
    import matplotlib  # noqa: PLC0415 - an optional extra

    matplotlib.use("svg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.rcParams.update({"svg.hashsalt": "gcpo", "font.size": 9})
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.3), sharey=True)
    curves = {"reward of the group": "reward", "held-out pass@1": "pass@1", "held-out greedy": "greedy"}
    for axis, (title, name) in zip(axes, curves.items(), strict=True):
        for preset, r in results.items():
            points = r[name] if name == "reward" else r[name]["curve"]
            steps = range(1, len(points) + 1) if name == "reward" else r[name]["steps"]
            mean, error = np.array(points).T
            style = {"linewidth": 2.2} if preset in ("gcpo", "grpo") else {"linewidth": 0.9, "alpha": 0.7}
            axis.errorbar(steps, mean, error, label=preset, capsize=2, errorevery=1 if len(mean) < 10 else 5, **style)
        axis.set_xlabel("updates")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, ncol=2)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse flags, run what is missing, write the results."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default="tiny", help="a file of configs/, without .py")
    p.add_argument("--models", nargs="+", required=True, help="one model directory per seed")
    p.add_argument("--data", nargs=2, default=("", ""), metavar=("TRAIN", "HELD_OUT"), help="JSONL files")
    p.add_argument("--presets", nargs="+", default=list(config_lib.PRESETS), choices=list(config_lib.PRESETS))
    p.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/compare"))
    p.add_argument("--out", type=pathlib.Path, help="results without suffix; without it, runs are only made")
    args = p.parse_args()
    train.cache_compilations()
    recipe = importlib.import_module(f"gcpo_jax.configs.{args.recipe}")
    results, config = {}, recipe.get_config()
    for preset in args.presets:
        runs = []
        for seed, model in enumerate(args.models):
            config = recipe.get_config(preset)
            config.model.path, config.train.seed = model, seed
            config.data.path, config.data.eval_path = args.data
            runs.append(run(config, args.runs / f"{preset}-{seed}"))
        results[preset] = summary(runs)
        print(table({preset: results[preset]}), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python scripts/compare.py --recipe {args.recipe} --models {' '.join('DIR' for _ in args.models)}"
        record = {
            **provenance.made(command),
            "device": jax.devices()[0].device_kind,
            "steps": config.train.total_steps,
            "presets": results,
        }
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(results))
        figure(results, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()

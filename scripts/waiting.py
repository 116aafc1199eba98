"""Shares of a step that training waits for data, for rows of metrics and completions, and for checkpoints."""

import importlib
import json
import pathlib
import tempfile
import time
from typing import Any

import rounds as rounds_lib

from gcpo_jax import config as config_lib
from gcpo_jax import models, tasks, train

WAITS = ("data", "tokenize", "log", "save")


def measure(recipe: str, variant: str, changes: dict[str, Any], steps: int, every: int) -> dict[str, Any]:
    """Train a recipe with a checkpoint every so many steps, and read what its metrics say; see `shares`.

    Args:
      changes: {"section.field": value} on top of the recipe.
    """
    config = importlib.import_module(f"gcpo_jax.configs.{recipe}").get_config(variant)
    changes = changes | {"train.total_steps": steps, "checkpoint.every": every}
    for name, value in (changes | {"evaluation.every": 0, "evaluation.problems": 8}).items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    train.cache_compilations()
    with tempfile.TemporaryDirectory() as scratch:
        workdir = pathlib.Path(scratch) / "run"
        if not train.train(config, workdir):
            raise SystemExit("stopped")
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return shares(rows[1:], tokenizing(config), every)


def shares(rows: list[dict[str, Any]], tokenizing_s: list[float], every: int) -> dict[str, Any]:
    """Of the steps that compiled nothing: their seconds, and the share of each that went into each wait, in per cent.

    What was written of a step, and the save behind it, is part of the next one's time. "save" is of the steps that
    have one before them; "save, of all steps" is all that saves took, of all that these steps took.

    Args:
      rows: of metrics.jsonl, from step 1 on.
      tokenizing_s: seconds of each step's prompts, measured apart and so not part of "data".
      every: steps between checkpoints.

    Raises:
      ValueError: where no step is left, or none with a save before it.
    """
    steady = [row for row in rows[1:] if not row["time/compilations"]]
    saved = [row for row in steady if (row["step"] - 1) % every == 0]
    if not saved:
        raise ValueError(f"all of {len(rows)} steps compiled something or had no save before them: take more steps")

    def per_cent(seconds: float, row: dict[str, Any]) -> float:
        return 100 * seconds / row["time/step_s"]

    waits = {name: [per_cent(row[f"time/{name}_s"], row) for row in steady] for name in ("data", "log")}
    waits["tokenize"] = [per_cent(tokenizing_s[row["step"] - 1], row) for row in steady]
    waits["save"] = [per_cent(row["time/save_s"], row) for row in saved]
    total = {name: sum(row[f"time/{name}_s"] for row in steady) for name in ("save", "step")}
    return {
        "steps": len(steady),
        "saves": len(saved),
        "seconds": rounds_lib.spread([row["time/step_s"] for row in steady]),
        "save_seconds": rounds_lib.spread([row["time/save_s"] for row in saved]),
        "per_cent": {name: rounds_lib.spread(waits[name]) for name in WAITS},
        "save, of all steps": 100 * total["save"] / total["step"],
        "rows": [{k: v for k, v in row.items() if k.startswith(("step", "time/"))} for row in rows],
    }


def tokenizing(config: config_lib.Config) -> list[float]:
    """Seconds that the prompts of each step take from text to ids, with nothing beside them."""
    model_config = models.read_config(config.model.path, config.model.dtype)
    contexts = train.make_contexts(config, model_config)
    problems, _ = train.within_limit(config, contexts, tasks.build(config.data).train, model_config.vocab_size)
    seconds = []
    for step in range(config.train.total_steps):
        indices = tasks.batch_indices(len(problems), config.rollout.queries, step, config.train.seed)
        began = time.perf_counter()
        for k in indices:
            contexts.query(problems[k]["problem"])
        seconds.append(time.perf_counter() - began)
    return seconds


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line a recipe; shares are median (greatest), in per cent."""
    lines = ["| recipe | s a step | " + " | ".join(f"{name}, %" for name in WAITS) + " | save, of all steps, % |"]
    lines.append("|" + " --- |" * (len(WAITS) + 3))
    for name, r in results.items():
        cells = [f"{r['seconds']['median']:.2f}"]
        cells += [f"{r['per_cent'][w]['median']:.2f} ({r['per_cent'][w]['max']:.2f})" for w in WAITS]
        lines.append(f"| {name} | {' | '.join(cells)} | {r['save, of all steps']:.2f} |")
    return "\n".join(lines) + "\n"

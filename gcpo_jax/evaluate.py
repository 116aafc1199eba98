"""python -m gcpo_jax.evaluate --config configs/eval_paper.py --config.model.path=DIR --data=DATA

Samples, grades and counts. Everything is kept in the work directory (evaluation/store.py): the same command goes on
where a killed one was, --regrade judges the stored completions anew, --compare A B says how two evaluations differ.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from gcpo_jax import commandline, contexts, models, partition, rundir, tasks
from gcpo_jax import config as config_lib
from gcpo_jax.evaluation import budget, forms, grades, prompts, settings, store, table
from gcpo_jax.evaluation.settings import EvalConfig
from gcpo_jax.tasks import benchmarks, code
from gcpo_jax.train import cache_compilations

# What the command ends with as one line; anything else is a mistake of the program's and keeps its traceback.
EXPECTED = (
    config_lib.ConfigError,
    models.ModelError,
    tasks.DataError,
    tasks.RewardError,
    code.SandboxUnavailable,
    OSError,
)
CALLS = 4  # device calls' worth of completions between two writes: a kill loses no more, and long rows hold up fewer


@dataclasses.dataclass(frozen=True)
class Batch:
    """Problems, by place in their benchmark's file, that are sampled, graded and written together."""

    benchmark: benchmarks.Benchmark
    places: list[int]

    def keys(self, samples: int) -> list[store.Key]:
        """Of its completions."""
        return [(self.benchmark.name, place, s) for place in self.places for s in range(samples)]


def say(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def evaluate(config: EvalConfig, workdir: pathlib.Path, report: Callable[[str], None] = say) -> list[table.Line]:
    """Run, or go on with, one evaluation; the table is in `workdir` at its end.

    Raises:
      ConfigError, models.ModelError, tasks.DataError, SandboxUnavailable: for bad settings, files or data, before any
        device work.
      tasks.RewardError: when a reward raises or is not finite; what was sampled before stays.
    """
    # Whatever can be wrong is looked at before the device is.
    settings.validate(config)
    loaded = [benchmarks.load(name, config.data) for name in settings.names(config)]
    grades.check(loaded, config.unsafe)
    model_config = models.read_config(config.model.path, config.model.dtype)
    builder = contexts.build(config.model.path, config.contexts, "{problem}", model_config.eos_ids)
    batches = plan(config, model_config, builder, loaded)
    models.check_weights(config.model.path)
    layout = _layout(config, model_config)
    model_config = models.for_devices(model_config, config.model.attention, layout)
    with contextlib.closing(rundir.open_run(workdir, config, settings.MAY_CHANGE)):
        store.settle(workdir, _state(config, loaded, builder.style, store.fingerprint(config.model.path)))
        stored, graded = store.read(workdir / store.COMPLETIONS), store.read(workdir / store.GRADES)
        samples = config.sampling.samples
        left = [b for b in batches if not all(key in stored for key in b.keys(samples))]
        done = [b for b in batches if b not in left]
        for batch in done:  # of a kill between sampling and grading
            if any(key not in graded for key in batch.keys(samples)):
                _grade(config, workdir, batch.benchmark, builder.style, [stored[key] for key in batch.keys(samples)])
        if left:
            report(f"{len(batches) - len(left)} of {len(batches)} batches are there; {workdir} keeps them")
            _, params = models.load_pretrained(config.model.path, config.model.dtype, layout.mesh if layout else None)
            policy = forms.Policy(config, model_config, params, builder)
            progress = Progress(left, samples, report)
            for batch in left:
                began = time.perf_counter()
                rows = _sample(policy, batch)
                seconds = time.perf_counter() - began
                rows = [row | {"seconds": round(seconds / len(rows), 6)} for row in rows]
                store.append(workdir / store.COMPLETIONS, rows)
                right = _grade(config, workdir, batch.benchmark, builder.style, rows)
                progress.tell(batch, seconds, sum(int(row["tokens"]) for row in rows), right)
        return finish(workdir)


def plan(
    config: EvalConfig,
    model_config: models.ModelConfig,
    builder: contexts.ContextBuilder,
    loaded: Sequence[benchmarks.Benchmark],
) -> list[Batch]:
    """All batches, whatever is done of them already: so that the padding of a resumed one is what it would have been.

    Raises:
      ConfigError: where a prompt has ids that the model does not, or leaves no room for the completion.
    """
    size = max(1, CALLS * config.sampling.max_rows // config.sampling.samples)
    batches = []
    for benchmark in loaded:
        places = benchmarks.subset(benchmark.rows, config.limit)
        asked = {k: prompts.query(builder, benchmark, benchmark.rows[k], config.prompts) for k in places}
        for ids in asked.values():
            if max(ids) >= model_config.vocab_size:
                raise config_lib.ConfigError(
                    f"model.path={config.model.path!r}: its tokenizer writes id {max(ids)} for a problem of "
                    f"{benchmark.name!r}, config.json has vocab_size={model_config.vocab_size}: they belong to "
                    "different models"
                )
        forms.check_length(config, model_config, list(asked.values()))
        # Prompts of like length together: less padding.
        places = sorted(places, key=lambda k: (-len(asked[k]), k))
        batches += [Batch(benchmark, places[at : at + size]) for at in range(0, len(places), size)]
    return batches


def _layout(config: EvalConfig, model_config: models.ModelConfig) -> partition.Layout | None:
    """How rows and parameters lie on the devices; None for one device."""
    mesh = partition.make_mesh(config.mesh)
    return partition.make_layout(mesh, model_config) if mesh.size > 1 else None


def _state(
    config: EvalConfig, loaded: Sequence[benchmarks.Benchmark], style: str, policy: str | None
) -> dict[str, Any]:
    known = {}
    for b in loaded:
        questions = hashlib.sha256(json.dumps([benchmarks.question(row) for row in b.rows]).encode()).hexdigest()[:32]
        places = benchmarks.subset(b.rows, config.limit)
        known[b.name] = {
            "title": b.title, "form": b.form, "digest": b.digest, "questions": questions, "places": places
        }  # fmt: skip
    return {
        "policy": policy,
        "style": style,
        "samples": config.sampling.samples,
        "asked": [b.name for b in loaded],
        "benchmarks": known,
    }


def _sample(policy: forms.Policy, batch: Batch) -> list[dict[str, Any]]:
    """The lines of completions.jsonl of a batch."""
    # A key for each benchmark, so that the others that are asked for do not matter.
    name = zlib.crc32(batch.benchmark.name.encode())
    key = jax.random.fold_in(jax.random.key(policy.config.sampling.seed), name)
    rows = []
    for place, completions in zip(batch.places, forms.sample(policy, batch.benchmark, batch.places, key), strict=True):
        texts = [policy.contexts.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        for s, (ids, text) in enumerate(zip(completions, texts, strict=True)):
            rows.append(
                {
                    "benchmark": batch.benchmark.name,
                    "problem": place,
                    "id": batch.benchmark.rows[place]["id"],
                    "sample": s,
                    "tokens": len(ids),
                    "finished": ids[-1] in policy.model_config.eos_ids,
                    "completion": text,
                }
            )
    return rows


def _grade(
    config: EvalConfig, workdir: pathlib.Path, benchmark: benchmarks.Benchmark, style: str, rows: list[dict[str, Any]]
) -> float:
    """Grade lines of completions.jsonl into grades.jsonl; returns the share that is right."""
    judged = graded(config, benchmark, style, rows)
    store.append(workdir / store.GRADES, judged)
    return sum(row["correct"] for row in judged) / len(judged)


def graded(
    config: EvalConfig, benchmark: benchmarks.Benchmark, style: str, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The lines of grades.jsonl for lines of completions.jsonl, which hold all samples of each of their problems."""
    rows = sorted(rows, key=store.key)  # the first spelling of an answer names it
    places, texts = [row["problem"] for row in rows], [row["completion"] for row in rows]
    judged = grades.grade(benchmark, places, texts, style, config.reward, config.unsafe)
    return [
        {"benchmark": row["benchmark"], "problem": row["problem"], "sample": row["sample"]} | grade
        for row, grade in zip(rows, judged, strict=True)
    ]


def regrade(workdir: pathlib.Path, changes: dict[str, Any]) -> list[table.Line]:
    """Grade all stored completions of the benchmarks again; nothing is sampled and no model is needed.

    Args:
      changes: to the settings that the directory has, of settings.SHORT.

    Raises:
      ConfigError, tasks.DataError, SandboxUnavailable: as evaluate.
    """
    config = dataclasses.replace(settings.stored(workdir), **changes)
    settings.validate(config, needs_model=False)
    loaded = [benchmarks.load(name, config.data) for name in settings.names(config)]
    grades.check(loaded, config.unsafe)
    before = store.read_state(workdir)
    with contextlib.closing(rundir.open_run(workdir, config, settings.MAY_CHANGE | {"reward"})):
        store.settle(workdir, _state(config, loaded, before["style"], None), regrade=True)
        stored = store.read(workdir / store.COMPLETIONS)
        judged = []
        for benchmark in loaded:
            rows = [row for row in stored.values() if row["benchmark"] == benchmark.name]
            judged += graded(config, benchmark, before["style"], rows)
        kept = store.read(workdir / store.GRADES) | {store.key(row): row for row in judged}
        store.replace_rows(workdir / store.GRADES, kept.values())
        return finish(workdir)


def finish(workdir: pathlib.Path) -> list[table.Line]:
    """Write table.md and results.json from what is stored."""
    lines = table.read(workdir)
    store.replace(workdir / "table.md", table.render(lines) + "\n")
    store.replace(workdir / "results.json", table.results(lines))
    return lines


class Progress:
    """Says after each batch how far an evaluation is and how long the rest will take at the rate so far."""

    def __init__(self, left: Sequence[Batch], samples: int, report: Callable[[str], None]):
        self._samples, self._report = samples, report
        self._problems = {}
        for batch in left:
            name = batch.benchmark.name
            self._problems[name] = self._problems.get(name, 0) + len(batch.places)
        self._left, self._done, self._seconds = sum(self._problems.values()), 0, 0.0
        self._of: dict[str, list[float]] = {}

    def tell(self, batch: Batch, seconds: float, tokens: int, right: float) -> None:
        """After a batch that took so long to sample, and of which this share is right."""
        name, count = batch.benchmark.name, len(batch.places)
        self._left, self._done, self._seconds = self._left - count, self._done + count, self._seconds + seconds
        done = self._of.setdefault(name, [0, 0.0])
        done[0], done[1] = done[0] + count, done[1] + right * count
        self._report(
            f"{name} {done[0]}/{self._problems[name]} problems  right so far {100 * done[1] / done[0]:.1f} %  "
            f"{tokens / seconds:,.0f} tokens/s  {table.clock(self._seconds / self._done * self._left)} left"
        )


def default_workdir(recipe: str, config: EvalConfig) -> pathlib.Path:
    """runs/RECIPE-MODEL, by the last two parts of the model's path."""
    parts = [*pathlib.Path(pathlib.Path(recipe).stem).parts, *pathlib.Path(config.model.path).parts[-2:]]
    return pathlib.Path("runs") / "-".join(part for part in parts if part not in ("/", "."))


def define() -> None:
    """The command's flags."""
    commandline.define(EvalConfig, "eval_paper.py")
    flags.DEFINE_string("compare", "", "two work directories, A B: print the paired differences of B to A")
    flags.DEFINE_bool("regrade", False, "grade the stored completions again, without sampling")
    flags.DEFINE_bool("dry_run", False, "say how many tokens and about how long, and do nothing")
    for name in settings.SHORT:
        kind = {"unsafe": flags.DEFINE_bool, "limit": flags.DEFINE_integer}.get(name, flags.DEFINE_string)
        kind(name, None, f"the same as --config.{name}")


def refuse_overrides(overrides: dict[str, Any]) -> None:
    """Nothing where no more is set than the model.path that names a default directory.

    Raises:
      ConfigError: for a setting that --regrade would not look at.
    """
    if unused := sorted(overrides.keys() - {"model.path"}):
        raise config_lib.ConfigError(
            f"--regrade takes the settings of the work directory: --config.{unused[0]} has no place beside it; only "
            f"{', '.join('--' + name for name in settings.SHORT)} may be given"
        )


def main(argv: list[str]) -> None:
    """The command."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    given = {name: value for name in settings.SHORT if (value := flags.FLAGS[name].value) is not None}
    recipe = str(config_flags.get_config_filename(flags.FLAGS["config"])).partition(":")[0]
    config = dataclasses.replace(flags.FLAGS.config, **given)
    workdir = pathlib.Path(flags.FLAGS.workdir or default_workdir(recipe, config))
    try:
        if flags.FLAGS.compare:
            print(table.compare(pathlib.Path(flags.FLAGS.compare), pathlib.Path(argv[1])))
        elif flags.FLAGS.dry_run:
            print(budget.describe(config))
        else:
            cache_compilations()
            if flags.FLAGS.regrade:
                refuse_overrides(config_flags.get_override_values(flags.FLAGS["config"]))
            lines = regrade(workdir, given) if flags.FLAGS.regrade else evaluate(config, workdir)
            print(f"{table.render(lines)}\n\n{table.costs(lines)}")
    except EXPECTED as error:
        sys.exit(f"error: {error}")


def run() -> None:
    """Parse flags and go; the entry point of `gcpo-evaluate`."""
    define()
    app.run(main, flags_parser=commandline.parser(EvalConfig, lambda: int(bool(flags.FLAGS.compare))))


if __name__ == "__main__":
    run()

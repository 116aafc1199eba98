"""What an evaluation will cost, from its prompts' lengths and data sheets, before any weight is read."""

import dataclasses
import math

import numpy as np

from gcpo_jax import config as config_lib
from gcpo_jax import contexts, estimate, hardware, models, sampler
from gcpo_jax.batching import Shape, bucket
from gcpo_jax.evaluation import forms, prompts, settings
from gcpo_jax.evaluation.settings import EvalConfig
from gcpo_jax.evaluation.table import clock, markdown
from gcpo_jax.tasks import benchmarks
from gcpo_jax.workload import FRAME_TOKENS, HEADING_TOKENS, Call

DEVICES = ("cpu", "v5e", "v5p", "v6e", "A100-40GB", "A100-80GB", "H100-80GB", "H200")
HEADROOM = 0.1  # of a device's memory


@dataclasses.dataclass(frozen=True)
class Part:
    """Completions of one kind: how many, the length of their prompts, and the rows that decode one."""

    completions: int
    prompts: int
    width: int
    rows: int = 1


def parts(config: EvalConfig, lengths: list[int]) -> list[Part]:
    """What is sampled for the problems of one benchmark, whose queries have these lengths."""
    n, given = config.sampling.samples, config.input
    count, mean = len(lengths), round(float(np.mean(lengths)))
    if given.form == "q":
        return [Part(count * n, count, mean)]
    quoted = min(config.contexts.cap, config.sampling.max_new_tokens) + HEADING_TOKENS
    context = mean + FRAME_TOKENS + given.candidates * quoted
    integrated = 1 if given.form == "x" else given.integrated
    rows = 1 if given.form == "x" else 1 + integrated
    return [
        Part(count * given.candidates, count, mean),
        Part(count * integrated, count, context),
        Part(count * n, count * n * rows, context, rows),
    ]


def seconds(config: EvalConfig, model: models.ModelConfig, part: Part, device: hardware.Device) -> tuple[float, int]:
    """(time of a part on one device, rows it holds at a time); infinity and 0 where not one row fits.

    Every completion is taken to be as long as it may be. Decoding reads parameters and caches once a token.
    """
    estimator = estimate.Estimator(config_lib.Config(), model)
    T, width = config.sampling.max_new_tokens, bucket(part.width)

    def call(rows: int) -> Call:
        slots = sampler.Call(rows, width, 1, rows, rows, Shape(1, width, 0))
        return Call("sample", "sampler", rows, width, tokens=T, steps=T, slots=slots)

    free = (1 - HEADROOM) * device.memory - estimate.local_bytes(models.shapes(model), None)
    rows = min(config.sampling.max_rows, int(free // estimate.cache_bytes(model, call(1))))
    if rows < 1:
        return math.inf, 0
    _, each = estimator.call_cost(call(rows), device)
    return part.completions * part.rows / rows * each, rows


def describe(config: EvalConfig) -> str:
    """Tokens by benchmark and time by device, in words.

    Raises:
      ConfigError, models.ModelError, tasks.DataError: as the evaluation itself would.
    """
    settings.validate(config)
    model = models.read_config(config.model.path, config.model.dtype)
    builder = contexts.build(config.model.path, config.contexts, "{problem}", model.eos_ids)
    todo, rows = [], []
    for name in settings.names(config):
        benchmark = benchmarks.load(name, config.data)
        chosen = [benchmark.rows[k] for k in benchmarks.subset(benchmark.rows, config.limit)]
        asked = [prompts.query(builder, benchmark, row, config.prompts) for row in chosen]
        forms.check_length(config, model, asked)
        here = parts(config, [len(ids) for ids in asked])
        todo += here
        counts = [
            sum(part.completions for part in here),
            sum(part.prompts * part.width for part in here),
            sum(part.completions for part in here) * config.sampling.max_new_tokens,
        ]
        rows.append([benchmark.title, str(len(asked)), *(f"{count:,}" for count in counts), *_span(asked)])
    said = markdown(
        ["benchmark", "problems", "completions", "prompt tokens", "new tokens, at most", "prompts", "longest"], rows
    )
    times = []
    for name in DEVICES:
        device = hardware.parse("cpu").device if name == "cpu" else hardware.DEVICES[name]
        found = [seconds(config, model, part, device) for part in todo]
        total, fits = sum(s for s, _ in found), min(r for _, r in found)
        title = "this machine's order of CPU" if name == "cpu" else name
        times.append([title, str(fits) if fits else "does not fit", *(_time(total / many) for many in (1, 8))])
    said += "\n\n" + markdown(["device", "rows at a time", "one device, at most", "eight, at most"], times)
    assumed = [
        f"every completion has {config.sampling.max_new_tokens} tokens; shorter ones take nearly proportionally less",
        f"each device holds sampling.max_rows={config.sampling.max_rows} rows, or as many as fit",
        *estimate.ASSUMPTIONS[:2],
        "a decoded token reads the parameters and whole caches; grading, and compiling each length, not counted",
    ]
    return said + "\n\nAssumed, not measured:\n" + "\n".join(f"- {line}" for line in assumed)


def _span(asked: list[list[int]]) -> list[str]:
    return [f"{np.mean([len(ids) for ids in asked]):.0f} tokens", str(max(map(len, asked)))]


def _time(total: float) -> str:
    if math.isinf(total):
        return "-"
    days = f"{int(total // 86400)} d " if total >= 86400 else ""
    return days + clock(total % 86400)

"""What to change in a run that does not fit, tried by estimate: fewest changes first."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from gcpo_jax import estimate, partition, workload
from gcpo_jax.config import Config, ConfigError
from gcpo_jax.hardware import GIB, Topology
from gcpo_jax.models import ModelConfig

Change = dict[str, Any]  # {"section.field": value}


def changes(
    config: Config, model: ModelConfig, topology: Topology, tightest: dict[str, Any], headroom: float
) -> list[str]:
    """Sentences: up to three sets of flags that would make it fit, or else how many such devices would.

    Args:
      tightest: the program that needed most, with its "peak" and "estimated_peak": where the compiler needed more than
        the estimate, so it will after a change.
    """
    low = max(1.0, tightest["peak"] / tightest["estimated_peak"])
    limit = (1 - headroom) * topology.device.memory / low
    found: list[Change] = []
    seen: dict[Any, Any] = {}
    for change in _combinations(config, model, topology.count):
        if not any(smaller.items() <= change.items() for smaller in found):
            peak = _peak(changed(config, change), model, topology.count, seen)
            if peak is not None and peak <= limit:
                found.append(change | {"": peak * low})
        if len(found) == 3:
            break
    if found:
        return [_sentence(change) for change in found]
    for count in (topology.count << power for power in range(1, 8)):
        for size in _fsdp_sizes(model, count):
            least = _least(config, change := {"mesh.data": 1, "mesh.tensor": 1, "mesh.fsdp": size}, count)
            peak = _peak(changed(config, change | {"model.remat": "full"} | least), model, count, seen)
            if peak is not None and peak <= limit:
                return [
                    f"no setting makes {topology.count} such devices enough; {count} would do, with "
                    f"--config.mesh.fsdp={size} {_flags({'model.remat': 'full'} | least)}"
                ]
    return [
        f"neither a setting nor {topology.count << 7} such devices make it fit: a smaller model or shorter completions"
    ]


def changed(config: Config, change: Change) -> Config:
    """The config with some fields replaced."""
    for path, value in change.items():
        section, name = path.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def _flags(change: Change) -> str:
    return " ".join(f"--config.{path}={value}" for path, value in change.items())


def _sentence(change: Change) -> str:
    peak = change.pop("")
    return f"would fit ({peak / GIB:.1f} GiB by estimate): {_flags(change)}"


def _fsdp_sizes(model: ModelConfig, count: int) -> list[int]:
    return [size for size in range(count, 1, -1) if count % size == 0 and model.hidden_size % size == 0]


def _least(config: Config, change: Change, devices: int) -> Change:
    """The smallest micro-batch that the mesh of a change allows."""
    shape = partition.mesh_shape(changed(config, change).mesh, devices)
    n = config.rollout.group_size
    shards = shape[0] * shape[1]
    size = next(size for size in itertools.count(n, n) if size % shards == 0)
    return {"learner.micro_batch": size} if size != config.learner.micro_batch else {}


def _combinations(config: Config, model: ModelConfig, devices: int) -> Iterator[Change]:
    """Sets of one, two and three changes, each of which saves memory by itself or makes another possible."""
    learner, rollout = config.learner, config.rollout
    single: list[Change] = []
    if config.model.remat != "full":
        single.append({"model.remat": "full"})
    shape = partition.mesh_shape(config.mesh, devices)
    if least := _least(config, {}, devices):
        single.append(least)
    for size in (rollout.max_rows // 4, rollout.max_rows // 16):
        if size >= rollout.group_size:
            single.append({"rollout.max_rows": size})
    if config.evaluation.samples > rollout.group_size:
        single.append({"evaluation.samples": rollout.group_size})
    for tensor in (1, 2, 4, 8):
        for fsdp in _fsdp_sizes(model, devices // tensor) if devices % tensor == 0 else []:
            change = {"mesh.data": devices // tensor // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            if fsdp * tensor > shape[1] * shape[2] or (fsdp * tensor == shape[1] * shape[2] and tensor > shape[2]):
                new = {path: value for path, value in change.items() if value != getattr(config.mesh, path[5:])}
                single.append(new | _least(config, new, devices))
    if learner.optimizer == "adamw":
        if learner.moments_dtype == "float32":
            single.append({"learner.moments_dtype": "bfloat16"})
        single.append({"learner.optimizer": "adafactor", "learner.moments_dtype": "float32"})
    if config.model.dtype == "float32":
        single.append({"model.dtype": "bfloat16"})
    for size in (1, 2, 3):
        for parts in itertools.combinations(single, size):
            merged: Change = {}
            for part in parts:
                merged |= part
            if sum(map(len, parts)) == len(merged):  # no field twice
                yield merged


def _peak(config: Config, model: ModelConfig, devices: int, seen: dict[Any, Any]) -> int | None:
    """Of all programs, by estimate; None where mesh, model and batch sizes do not fit each other."""
    try:
        model = estimate.with_layout(config, model, partition.abstract_mesh(config.mesh, devices))
    except ConfigError:
        return None
    estimator = estimate.Estimator(config, model)
    at = (config.rollout.max_rows, config.evaluation.samples, config.learner.micro_batch, estimator.row_shards)
    if at not in seen:
        calls, batch = workload.step(config, model)
        seen[at] = {*calls, *workload.evaluation(config, model)}, batch
    calls, batch = seen[at]
    needs = estimate.resident(config, model)
    total, copy = sum(needs.values()), estimate.local_bytes(estimate.models.shapes(model), model.layout)
    update = estimator.update(batch).total + needs["reference"]
    return max(update, *(estimator.call(call).total + total - copy for call in calls))

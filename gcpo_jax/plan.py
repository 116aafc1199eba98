"""python -m gcpo_jax.plan --config configs/qwen7b.py --topology v5p:4x4x4

Says, before any device is paid for, whether a run fits and about how long a step takes. The programs are those of the
run itself, lowered for arrays that do not exist; see compile_call and compile_update.
"""

import dataclasses
import json
import pathlib
import re
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import config_flags

from gcpo_jax import (
    advice,
    commandline,
    estimate,
    hardware,
    learner,
    models,
    partition,
    provenance,
    scorer,
    slots,
    workload,
)
from gcpo_jax import config as config_lib
from gcpo_jax.estimate import Bytes
from gcpo_jax.hardware import GIB
from gcpo_jax.models import kernels
from gcpo_jax.models.architectures import ARCHITECTURES

HEADROOM = 0.08  # of a device's memory: fragments, and what the runtime itself holds


class OutOfMemory(Exception):
    """The compiler found no way into the device's memory; `used` is what it would have needed, in bytes."""

    def __init__(self, used: int):
        super().__init__(f"{used / GIB:.1f} GiB")
        self.used = used


def compiled_bytes(lowered: jax.stages.Lowered) -> Bytes:
    """Compile, and read what the program needs on one device.

    Raises:
      OutOfMemory: where the compiler refuses.
    """
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(_used(str(error))) from None
    if memory is None:
        raise RuntimeError("the compiler does not say what memory its program needs")
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Bytes(memory.argument_size_in_bytes, max(0, outputs), memory.temp_size_in_bytes)


def _used(message: str) -> int:
    """The bytes that a compiler's message says the program would have needed; 0 where it does not say."""
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds)", message)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else 0


def _place(tree: Any, shardings: Any) -> Any:
    """The arrays of a tree as ShapeDtypeStructs that lie so; one sharding is that of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = [shardings] * len(leaves)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        for x, s in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]
    return treedef.unflatten(placed)


def compile_update(
    config: config_lib.Config, model_config: models.ModelConfig, batch: learner.Batch, device: Any
) -> Bytes:
    """Of learner.make_update on the state and such a batch; `device` is used where there is no mesh."""
    layout = model_config.layout
    updates = config.train.total_steps * config.learner.updates_per_batch
    optimizer, _ = learner.make_optimizer(config.learner, updates)
    state = estimate.abstract_state(config, model_config)
    one = SingleDeviceSharding(device)
    state = _place(state, one if layout is None else layout.shardings(state))
    batch = _place(batch, one if layout is None else layout.sharding("rows"))
    return compiled_bytes(learner.make_update(model_config, config, optimizer).lower(state, batch))


def compile_call(
    config: config_lib.Config, model_config: models.ModelConfig, call: workload.Call, device: Any
) -> Bytes:
    """Of the sampler's or the scorer's own jitted function on arrays of a call's shapes."""
    layout, rollout = model_config.layout, config.rollout
    one = SingleDeviceSharding(device)
    shapes = models.shapes(model_config)
    params = _place(shapes, one if layout is None else layout.shardings(shapes))
    rows = one if layout is None else layout.sharding("rows")

    def ints(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def between(B, n, m, A):
        return models.Blocks(ints(B, m, A), ints(B, m), ints(B, n, m, dtype=jnp.bool)) if m else None

    def trie(B, P, family, nodes):
        return models.Trie(ints(B, P), ints(B // family, nodes)) if family > 1 else None

    B, n = call.rows, call.n
    if call.program == "hidden":
        return compiled_bytes(scorer._last_hidden.lower(model_config, params, ints(B, call.width), ints(B)))
    temperature = float(rollout.temperature)
    if call.slots is None:
        starts = ints(B, n) if call.rest else None
        blocks, own = between(B, n, *call.blocks), ints(B, n, call.rest + call.tokens)
        given = scorer.Rows(
            ints(B, call.width), ints(B), blocks, own, starts, ints(B, n), trie(B, call.width, *call.trie)
        )
        return compiled_bytes(scorer._row_logprobs.lower(model_config, params, given, call.tokens, temperature))
    alike, first, own, *blocks, family, nodes = call.slots.shared
    G = B // alike
    prompts = slots.Prompts(
        ints(G, first),
        ints(G),
        ints(G, alike, own) if own else None,
        ints(G, alike) if own else None,
        between(G, alike, *blocks),
        trie(G, first, family, nodes),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _place(key, one if layout is None else NamedSharding(layout.mesh, PartitionSpec()))
    lowered = slots.run.lower(
        model_config,
        params,
        prompts,
        *(ints(B) for _ in range(3)),
        ints(B, dtype=jnp.bool),
        key,
        n=call.n,
        together=call.slots.together,
        lanes=call.slots.lanes,
        computed=call.slots.computed,
        width=call.width,
        max_new_tokens=call.tokens,
        temperature=temperature,
        top_k=rollout.top_k,
        top_p=float(rollout.top_p),
        eos_ids=model_config.eos_ids,
    )
    return dataclasses.replace(compiled_bytes(lowered), caches=estimate.cache_bytes(model_config, call))


def largest(calls: Sequence[workload.Call], estimator: estimate.Estimator) -> dict[str, workload.Call]:
    """Of each phase and program the call that needs most, by estimate; equal shapes once."""
    found: dict[tuple[str, str], workload.Call] = {}
    for call in calls:
        at = (call.phase, call.program)
        if at not in found or estimator.call(call).total > estimator.call(found[at]).total:
            found[at] = call
    return {f"{phase}: {program}": call for (phase, program), call in found.items()}


def plan(
    config: config_lib.Config,
    model: models.ModelConfig,
    topology: hardware.Topology,
    mean: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything that the command prints, as --json writes it. Sizes are bytes of one device.

    Args:
      mean: tokens of a completion on average, for times; memory is planned for the longest. None: half the limit.
      say: told what is being compiled.

    Raises:
      ConfigError: for settings that no hardware would make right.
    """
    mean = config.rollout.max_new_tokens // 2 if mean is None else mean
    attention = kernels.choose(
        config.model.attention, config.model.dtype, model.head_dim, "cuda" if topology.sort == "gpu" else topology.sort
    )
    model = dataclasses.replace(model, attention=attention)
    devices, compiler = hardware.compile_devices(topology)
    mesh = (
        partition.abstract_mesh(config.mesh, topology.count)
        if devices is None
        else partition.make_mesh(config.mesh, devices)
    )
    model_config = estimate.with_layout(config, model, mesh)
    estimator = estimate.Estimator(config, model_config)
    calls, batch = workload.step(config, model_config)
    calls += workload.evaluation(config, model_config)
    needs = estimate.resident(config, model_config)
    copy = estimate.local_bytes(models.shapes(model_config), model_config.layout)

    programs = []
    for name, call in ({"update": None} | largest(calls, estimator)).items():
        began, began_cpu = time.perf_counter(), time.process_time()
        guess = estimator.update(batch) if call is None else estimator.call(call)
        beside = needs["reference"] if call is None else sum(needs.values()) - copy
        needed, refused = guess, None
        if devices is not None:
            say(f"compiling {name} for {topology.name}")
            try:
                if call is None:
                    needed = compile_update(config, model_config, batch, devices[0])
                else:
                    needed = compile_call(config, model_config, call, devices[0])
            except OutOfMemory as error:
                refused = error.used
        row = {
            "program": name,
            "shapes": _batch_shapes(batch) if call is None else dataclasses.asdict(call),
            "arguments": needed.arguments,
            "outputs": needed.outputs,
            "caches": needed.caches,
            "temp": needed.temp - needed.caches,
            "beside": beside,  # what else lies on the device while it runs
            "peak": (needed.total if refused is None else max(refused, guess.total)) + beside,
            "estimated_peak": guess.total + beside,
            "refused_by_compiler": refused is not None,
            "compile_s": round(time.perf_counter() - began, 1) if devices is not None else None,
            "compile_cpu_s": round(time.process_time() - began_cpu, 1) if devices is not None else None,
        }
        programs.append(row)
    tightest = max(programs, key=lambda row: row["peak"])
    headroom = 1 - tightest["peak"] / topology.device.memory
    fits = headroom >= HEADROOM and not any(row["refused_by_compiler"] for row in programs)
    times = seconds(config, model_config, topology.device, mean)
    grpo = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, kappa=0.0, causal_factor="none"))
    step_s = sum(phase["seconds"] for phase in times.values())
    grpo_s = sum(phase["seconds"] for phase in seconds(grpo, model_config, topology.device, mean).values())
    return {
        "topology": topology.name,
        "devices": topology.count,
        "device": dataclasses.asdict(topology.device),
        "mesh": dict(mesh.shape),
        "attention": attention,
        "parameters": sum(x.size for x in jax.tree.leaves(models.shapes(model_config))),
        "method": "estimated" if devices is None else "compiled",
        "compiler": compiler,  # or why there is none
        "formula": estimate.FORMULA if devices is None else None,
        "resident": needs,
        "batch": sum(x.nbytes for x in jax.tree.leaves(batch)) // estimator.row_shards,
        "programs": programs,
        "peak": tightest["peak"],
        "tightest": tightest["program"],
        "headroom": headroom,
        "fits": fits,
        "changes": [] if fits else advice.changes(config, model, topology, tightest, HEADROOM),
        "phases": times,
        "step_s": step_s,
        "gcpo_over_grpo": step_s / grpo_s - 1,
        "assumptions": [f"completions of {mean} tokens on average, memory for the longest", *estimate.ASSUMPTIONS],
        "settings": config_lib.flatten(config),
    }


def _batch_shapes(batch: learner.Batch) -> dict[str, list[int]]:
    shapes = {"prompts": list(batch.prompts.shape), "completions": list(batch.completions.shape)}
    return shapes | ({} if batch.kl is None else {"kl_contexts": list(batch.kl.contexts.prompts.shape)})


def seconds(
    config: config_lib.Config, model_config: models.ModelConfig, device: hardware.Device, mean: int
) -> dict[str, dict[str, Any]]:
    """FLOPs of one device and seconds by phase, and the calls that a phase makes."""
    estimator = estimate.Estimator(config, model_config)
    calls, batch = workload.step(config, model_config, mean)
    phases = {name: {"calls": 0, "flops": 0.0, "seconds": 0.0} for name in ("sample", "integrate", "contexts", "score")}
    for call in calls:
        flops, duration = estimator.call_cost(call, device)
        row = phases[call.phase]
        row["calls"], row["flops"], row["seconds"] = row["calls"] + 1, row["flops"] + flops, row["seconds"] + duration
    flops, duration = estimator.update_cost(batch, device)
    updates = config.learner.updates_per_batch
    phases["update"] = {"calls": updates, "flops": updates * flops, "seconds": updates * duration}
    return {name: row for name, row in phases.items() if row["calls"]}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    memory = report["device"]["memory"]
    unit, size_of = ("GiB", GIB) if report["peak"] > GIB else ("MiB", GIB >> 10)
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    how = f"compiled by {report['compiler']}" if report["method"] == "compiled" else f"estimated: {report['compiler']}"
    lines = [
        f"{report['topology']}: {report['devices']} devices of {memory / GIB:.1f} GiB, mesh {mesh}",
        f"{report['parameters'] / 1e9:.2f}e9 parameters, attention {report['attention']}; memory {how}",
        "",
        f"on each device between programs, {unit}",
        *(f"  {name:<34}{size / size_of:8.2f}" for name, size in report["resident"].items()),
        "",
        f"{f'program, {unit}':<22}{'arguments':>10}{'caches':>8}{'temp':>8}{'outputs':>9}{'beside':>8}{'peak':>8}",
    ]
    for row in report["programs"]:
        sizes = zip(("arguments", "caches", "temp", "outputs", "beside", "peak"), (10, 8, 8, 9, 8, 8), strict=True)
        mark = "  refused by the compiler" if row["refused_by_compiler"] else ""
        lines.append(f"{row['program']:<22}" + "".join(f"{row[k] / size_of:{w}.2f}" for k, w in sizes) + mark)
    lines += ["", f"{'phase':<12}{'calls':>6}{'TFLOP/device':>14}{'seconds':>10}   (estimated)"]
    for name, row in report["phases"].items():
        lines.append(f"{name:<12}{row['calls']:>6}{row['flops'] / 1e12:14.1f}{row['seconds']:10.1f}")
    share = f"{report['gcpo_over_grpo']:+.0%} over the same step without causal terms"
    lines.append(f"{'step':<32}{report['step_s']:10.1f}   {share}")
    lines += ["", "assumed:", *(f"  - {text}" for text in report["assumptions"])]
    if report["formula"]:
        lines.append(f"  - {report['formula']}")
    lines.append("")
    if report["fits"]:
        lines.append(f"fits: {report['headroom']:.0%} of a device's memory to spare ({report['tightest']})")
    else:
        lines.append(
            f"does not fit: {report['tightest']} takes {report['peak'] / GIB:.1f} of {memory / GIB:.1f} GiB, "
            f"{HEADROOM:.0%} should be left"
        )
        lines += [f"  {change}" for change in report["changes"]]
    return "\n".join(lines)


def shape_of(config: config_lib.Config, name: str, recipe: str) -> models.ModelConfig:
    """The sizes of the model: of model.path; else of a name in ARCHITECTURES, by default what the recipe was made for.

    Raises:
      ConfigError: where neither says which model it is.
    """
    if config.model.path and not name:
        return models.read_config(config.model.path, config.model.dtype)
    name = name or runpy.run_path(recipe).get("ARCHITECTURE", "")
    if name not in ARCHITECTURES:
        raise config_lib.ConfigError(f"--model={name!r}: must be one of {', '.join(ARCHITECTURES)}, or set model.path")
    return ARCHITECTURES[name]


def main(argv: list[str]) -> None:
    """The command; it exits with 1 where the run does not fit."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config, values = flags.FLAGS.config, flags.FLAGS
    recipe = str(config_flags.get_config_filename(flags.FLAGS["config"])).partition(":")[0]
    try:
        topology = hardware.parse(values.topology)
        jax.config.update("jax_platforms", "cpu" if topology.sort != "gpu" else None)
        if topology.sort == "cpu":
            jax.config.update("jax_num_cpu_devices", topology.count)
        model = shape_of(config, values.model, recipe)
        # Paths are not looked at: neither weights nor data need be here.
        config.model.path, config.data.path = config.model.path or "-", config.data.path or "-"
        config_lib.validate(config)
        report = plan(
            config, model, topology, values.mean_tokens, lambda text: print(text, file=sys.stderr, flush=True)
        )
    except (config_lib.ConfigError, models.ModelError) as error:
        sys.exit(f"error: {error}")
    print(table(report))
    if values.json:
        made = provenance.made("python -m gcpo_jax.plan " + shlex.join(sys.argv[1:]))
        pathlib.Path(values.json).write_text(json.dumps(made | report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if report["fits"] else 1)


def run() -> None:
    """Parse flags and go; the entry point of `gcpo-plan`."""
    config_flags.DEFINE_config_file("config", None, "a file of configs/, with :preset if wanted")
    flags.DEFINE_string("topology", "cpu", "v5p:4x4x4, v5e:8x8, gpu:8xA100-80GB, cpu, ...")
    flags.DEFINE_string("model", "", "plan for a published model's sizes: " + ", ".join(ARCHITECTURES))
    flags.DEFINE_string("json", "", "write the plan to this file too")
    flags.DEFINE_integer("mean_tokens", None, "tokens of a completion on average; default half of max_new_tokens", 1)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commandline.parse)


if __name__ == "__main__":
    run()

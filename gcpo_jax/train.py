"""python -m gcpo_jax.train --config configs/tiny.py:gcpo --workdir runs/mine

train() is Algorithm 1 of the paper, top to bottom; everything it calls is in the module of that name.
"""

import contextlib
import logging
import os
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from gcpo_jax import (
    audit,
    checkpoint,
    commandline,
    learner,
    metrics,
    models,
    partition,
    processes,
    rollout,
    rundir,
    summary,
    tasks,
    warmup,
)
from gcpo_jax import config as config_lib
from gcpo_jax import contexts as contexts_lib
from gcpo_jax.contexts import ContextBuilder
from gcpo_jax.evaluation import held_out as held_out_lib
from gcpo_jax.tasks import benchmarks, jsonl, overlap

# What the command ends with as one line; anything else is a mistake of the program's and keeps its traceback.
EXPECTED = (
    config_lib.ConfigError,
    models.ModelError,
    tasks.DataError,
    tasks.RewardError,
    checkpoint.CheckpointError,
    OSError,
)


def train(config: config_lib.Config, workdir: pathlib.Path) -> bool:
    """Run, or resume, one run in `workdir`: metrics, completions and checkpoints, and policy/ at its end.

    Returns:
      True at the end of the run, False where SIGTERM or Ctrl-C ended it after a save.

    Raises:
      ConfigError, models.ModelError, tasks.DataError: for bad settings, files or data, before any device work.
      tasks.RewardError: when a reward raises or is not finite; the last checkpoint stays.
    """
    # Whatever can be wrong is looked at before the device is.
    config_lib.validate(config)
    config_lib.check_paths(config)
    model_config = models.read_config(config.model.path, config.model.dtype)
    contexts = make_contexts(config, model_config)
    reward = tasks.resolve_reward(config.data.reward, config.data.unsafe)
    answer = tasks.resolve_answer(config.data.reward)
    task = tasks.build(config.data)
    problems, too_long = within_limit(config, contexts, task.train, model_config.vocab_size)
    repeats = overlaps(config, task)
    held_out, too_long_held_out = within_limit(config, contexts, task.held_out, model_config.vocab_size)
    models.check_weights(config.model.path)
    processes.check_same("problems", tasks.fingerprint((*problems, *held_out)))
    layout = partition.layout_of(config, model_config)
    run = rundir.open_run(workdir, config)

    model_config = models.for_devices(model_config, config.model.attention, layout)
    _, params = models.load_pretrained(config.model.path, "float32", layout.mesh if layout else None)
    mu = config.learner.updates_per_batch
    ref_params = None
    if learner.uses_reference(config):
        # A copy: the state's own buffers are reused by the first update.
        ref_params = jax.tree.map(jax.numpy.copy, learner.cast(params, config.model.dtype))
    optimizer, schedule = learner.make_optimizer(config.learner, config.train.total_steps * mu)
    update = learner.make_update(model_config, config, optimizer)
    size = summary.count(params)
    state = learner.init_state(model_config, optimizer, params)
    del params
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    start = checkpoints.latest() or 0
    if start:
        state, _ = checkpoints.restore(start, state)
    # A run that begins again measures its start again: -1 drops that row too.
    log = metrics.Log(workdir, resume_at=start or -1, total=config.train.total_steps)
    told = [f"{len(problems)} problems{left_out(config, too_long)}"]
    told += [f"{len(held_out)} held out{left_out(config, too_long_held_out)}"]
    log.say(f"{', '.join(told)}; from step {start}")
    for line in repeats:
        log.say(line)

    def actor() -> rollout.Actor:
        return rollout.Actor(config, model_config, learner.cast(state.params, config.model.dtype), contexts)

    decode = rollout.Actor(config, model_config, {}, contexts).decode

    def evaluation() -> dict[str, float]:
        rows = held_out[: config.evaluation.problems]
        result = held_out_lib.accuracy(actor(), reward, answer, rows, config.evaluation.samples)
        return {f"eval/{name}": value for name, value in result.items()}

    def save(step: int) -> None:
        if checkpoints.latest() != step:
            # No checkpoint without its rows: a restart would not write them again.
            checkpoints.save(step, state, {"step": step}, before=log.durable)

    def stopped(step: int) -> bool:
        signalled = any(processes.exchange(preemption.requested))
        if signalled:
            save(step)
            checkpoints.close()
            log.say(f"stopped by a signal, saved at step {step}; the same command goes on from there")
        return signalled

    # Closing waits for a save under way, also where a reward ends the run.
    closing = contextlib.closing
    with closing(run), closing(log), checkpoint.Preemption() as preemption, closing(checkpoints):
        if start == 0:
            log.write({"step": 0} | evaluation())
        timers, ahead = metrics.Timers(), warmup.Ahead(log.say)
        for step in range(start, config.train.total_steps):
            # Algorithm 1, line 2: a batch of queries; lines 3 to 11: everything sampled from the old policy.
            with timers("data"):
                indices = tasks.batch_indices(len(problems), config.rollout.queries, step, config.train.seed)
                queries = [problems[k] for k in indices]
            old_policy = actor()
            if step == start:
                old_policy = warmup.watch(old_policy, queries, step, update, state, ahead)
            exp = rollout.collect(old_policy, reward, queries, step, timers)
            # Sampling takes most of a step: a signal gives this one up, it comes out the same after the restart.
            if stopped(step):
                return False
            with timers("score"):
                batch = learner.make_batch(old_policy, ref_params, exp)
            del old_policy  # its copy of the parameters need not lie beside the update
            with timers("save"):
                checkpoints.copied()  # sampling leaves the state alone, the update reuses its buffers
            # Line 16: the update, μ times on the same batch.
            with timers("update"):
                placed = learner.place(batch, layout)
                ahead.wait()
                for inner in range(mu):
                    state, values, details = update(state, placed)
                    if inner == 0:
                        first, details_first = partition.fetch((values, details))
                last = partition.fetch(values)
            if step == start:
                checkpoints.prepare(state)  # now that nothing else is left to compile
            # The clip acts only from the second update on a batch: report the last one's share.
            first["clip_fraction"] = last["clip_fraction"]
            row = {"step": step + 1, "learning_rate": float(schedule(step * mu))}
            times = timers.read()
            if step in config.train.audit_steps and processes.is_first():
                path = workdir / "audit" / f"step_{step:06d}.npz"
                audit.write(path, config, exp, batch, details_first, float(first["loss"]))
            final = step + 1 == config.train.total_steps
            if final or (config.evaluation.every and (step + 1) % config.evaluation.every == 0):
                with timers("eval"):
                    row |= evaluation()
                row |= {"time/eval_s": timers.read()["time/eval_s"]}
            # A row cannot say how long it took to write: that, and the save behind it, count as the next step's.
            timers = metrics.Timers()
            with timers("log"):
                row = summary.summarise(config, exp, batch, first, details_first, times, answer, size) | row
                log.write(row, summary.readable(exp, step + 1, config.train.log_groups, decode))
            with timers("save"):
                if final or (step + 1) % config.checkpoint.every == 0:
                    save(step + 1)
            if not final and stopped(step + 1):
                return False
        checkpoints.close()
        models.save_pretrained(workdir / "policy", model_config, state.params, source=config.model.path)
        log.say(f"done: {workdir / 'policy'} is the trained policy")
    return True


def make_contexts(config: config_lib.Config, model_config: models.ModelConfig) -> ContextBuilder:
    """The context builder of a model directory.

    Raises:
      ConfigError: where there is no tokenizer, or no end id to stop at.
    """
    return contexts_lib.build(config.model.path, config.contexts, config.data.prompt, model_config.eos_ids)


def within_limit(config: config_lib.Config, contexts: ContextBuilder, problems: tasks.Problems, vocab_size: int):
    """The problems whose prompt has at most rollout.max_prompt_tokens tokens, and the ids of those that have more.

    Raises:
      tasks.DataError: where data.too_long is "refuse", naming a problem; or where none is left.
      ConfigError: where the tokenizer writes ids that the model does not have.
    """
    limit = config.rollout.max_prompt_tokens
    kept, dropped = [], []
    for k in range(len(problems)):
        row = problems[k]
        prompt = contexts.query(row["problem"])
        if max(prompt) >= vocab_size:  # a lookup on a device would take another row and say nothing
            raise config_lib.ConfigError(
                f"model.path={config.model.path!r}: its tokenizer writes id {max(prompt)} for problem {row['id']!r}, "
                f"config.json has vocab_size={vocab_size}: they belong to different models"
            )
        if len(prompt) <= limit:
            kept.append(row)
            continue
        dropped.append(row["id"])
        if config.data.too_long == "refuse":
            raise tasks.DataError(
                f"problem {row['id']!r} has {len(prompt)} prompt tokens; rollout.max_prompt_tokens={limit} "
                "(data.too_long=drop leaves such problems out)"
            )
    if not kept:
        raise tasks.DataError(f"none of {len(problems)} problems fits rollout.max_prompt_tokens={limit}")
    return kept, dropped


def overlaps(config: config_lib.Config, task: tasks.Task) -> list[str]:
    """In words, which training problems are evaluation problems too, by their text, or nearly so (overlap.py).

    Raises:
      tasks.DataError: for such a problem where data.overlap is "refuse", or for a file of evaluation.benchmarks that
        cannot be read. What is only nearly the same is never refused.
    """
    sets = {"the held-out problems": (task.held_out, False)}
    for path in filter(None, config.evaluation.benchmarks.split(",")):
        sets[path] = (benchmarks.parse(jsonl.read(pathlib.Path(path), "evaluation.benchmarks"), path)[1], True)
    said = []
    for name, (rows, also_near) in sets.items():
        same = overlap.find(task.train, rows, question=benchmarks.question)
        if config.data.overlap == "refuse":
            overlap.refuse(same, name)
        near = overlap.find(task.train, rows, near=True, question=benchmarks.question) if also_near else same
        for pairs, how in ((same, "stand in"), ([p for p in near if p not in same], "are nearly problems of")):
            if pairs:
                listed = ", ".join(f"{a} ({b})" for a, b in pairs[:3]) + (", ..." if pairs[3:] else "")
                said.append(f"{len(pairs)} training problems {how} {name}: {listed}")
    return said


def left_out(config: config_lib.Config, ids: list[str]) -> str:
    """In words, how many problems were too long and which; empty where none was."""
    if not ids:
        return ""
    named = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
    return f" ({len(ids)} over {config.rollout.max_prompt_tokens} prompt tokens left out: {named})"


def cache_compilations() -> None:
    """Keep compiled programs in the user's cache directory, so that only the first run of a recipe compiles them."""
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "gcpo_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    logging.getLogger("absl").setLevel(logging.WARNING)
    cache_compilations()
    flag = flags.FLAGS["config"]
    file, _, variant = str(config_flags.get_config_filename(flag)).partition(":")
    workdir = flags.FLAGS.workdir or f"runs/{pathlib.Path(file).stem}-{variant or 'gcpo'}"
    try:
        with warmup.command(), processes.joined(**commandline.processes(), expected=EXPECTED):
            train(flags.FLAGS.config, pathlib.Path(workdir))
    except EXPECTED as error:
        sys.exit(f"error: {error}")


def run() -> None:
    """Parse flags and go; the entry point of `gcpo-train`."""
    commandline.define()
    commandline.define_processes()
    app.run(main, flags_parser=commandline.parse)


if __name__ == "__main__":
    run()

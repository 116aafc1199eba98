"""Where a run's numbers go: metrics.jsonl, completions.jsonl, a progress line; timers; the device's peak rate."""

import collections
import concurrent.futures
import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gcpo_jax import hardware, processes

# Of each thread, the programs that it compiled or read from the cache: those that wait for a step are its own thread's.
_compiled: collections.Counter[int] = collections.Counter()


def _note_compilation(event: str, duration_secs: float, **kwargs: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[threading.get_ident()] += 1


def compiled() -> int:
    """How many programs this thread has compiled or read from the cache."""
    return _compiled[threading.get_ident()]


def count_compiled(programs: int) -> None:
    """Count programs that another thread compiled for this one."""
    _compiled[threading.get_ident()] += programs


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


class Timers:
    """Seconds by phase: `with timers("sample"): ...`; a phase entered twice adds up."""

    def __init__(self):
        self._began, self._compiled = time.perf_counter(), compiled()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time that the body takes to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - began)

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """{"time/PHASE_s": seconds}, with "time/step_s" and "time/compilations" (this thread's) since construction."""
        seconds = self._seconds | {"step": time.perf_counter() - self._began}
        named = {f"time/{phase}_s": value for phase, value in seconds.items()}
        return named | {"time/compilations": compiled() - self._compiled}


COMPILING_STEPS = 10  # in a row, after which a run is told that it compiles all the time


class Log:
    """Appends to metrics.jsonl and completions.jsonl in `workdir`, and tells a person how far the run is.

    Args:
      resume_at: rows of later steps, and a torn last line, are dropped, so no step stands twice.
      total: steps of the whole run, for the time left.

    Rows are written beside the run, in their order; they outlive the machine once `durable` has returned, which a
    checkpoint waits for. Of several processes only the first writes and says anything.

    Raises:
      OSError: where the files cannot be written; of a row, from a later call.
    """

    def __init__(self, workdir: pathlib.Path, resume_at: int, total: int, quiet: bool = False):
        self._metrics, self._completions = workdir / "metrics.jsonl", workdir / "completions.jsonl"
        self._total, self._quiet, self._seconds, self._compiling = total, quiet, [], 0
        self._writes = processes.is_first()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future[None] | None = None  # row, and so every row before it
        for path in (self._metrics, self._completions) if self._writes else ():
            keep_until(path, resume_at)

    def write(self, row: dict[str, Any], completions: Sequence[dict[str, Any]] = ()) -> None:
        """One step: its metrics (numbers that are not finite become null) and its readable groups."""
        if not self._writes:
            return
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._thread.submit(self._put, self._last, row, completions)
        if "reward/mean" in row:
            self._seconds = [*self._seconds, row["time/step_s"]][-20:]
        self._progress(row)
        self._compiling = self._compiling + 1 if row.get("time/compilations") else 0
        if self._compiling == COMPILING_STEPS:
            self.say(
                f"warning: each of the last {COMPILING_STEPS} steps compiled programs for lengths not seen before; "
                "a smaller contexts.cap or rollout.max_prompt_tokens makes fewer"
            )

    def durable(self) -> None:
        """Wait until all that was written is on the disk; from whatever thread."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait as `durable` does; nothing can be written any more."""
        self._thread.shutdown()
        self.durable()

    def _put(self, before: concurrent.futures.Future[None] | None, row, completions) -> None:
        if before is not None:
            before.result()  # done, as there is one thread; what failed once fails from then on
        for completion in completions:
            append(self._completions, completion)
        append(self._metrics, row)
        for path in (self._completions, self._metrics):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self._writes and not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def _progress(self, row: dict[str, Any]) -> None:
        parts = [f"step {row['step']}/{self._total}"]
        if "reward/mean" in row:
            parts.append(f"reward {row['reward/mean']:.3f}")
        if row.get("upsilon/mean") is not None:
            parts.append(f"upsilon {row['upsilon/mean']:.2f}")
        if row.get("kl") is not None:
            parts.append(f"kl {row['kl']:.4f}")
        if self._seconds and "reward/mean" in row:
            usual = sorted(self._seconds)[len(self._seconds) // 2]
            left = usual * (self._total - row["step"])
            parts.append(f"{row['time/step_s']:.1f} s, {int(left // 60)}:{int(left % 60):02d} left")
        if "eval/pass@1" in row:
            parts.append(
                f"held out: pass@1 {row['eval/pass@1']:.3f}±{row['eval/pass@1_se']:.3f} "
                f"greedy {row['eval/greedy']:.3f} majority {row['eval/majority']:.3f}"
            )
        self.say("  ".join(parts))


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """One line of JSON, no part of which is this process's any more when this returns."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")


def keep_until(path: pathlib.Path, step: int) -> None:
    """Drop rows with a later step, and a torn last line; the file is replaced whole or not at all."""
    if not path.exists():
        return
    kept = []
    # Not splitlines(): a completion may hold other characters that end a line.
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


@functools.cache
def peak_flops(dtype: str) -> float:
    """The rate that mfu is relative to: the data sheet's or, for other devices, that of a 1024³ product now."""
    if peak := hardware.peak_flops(jax.devices()[0].device_kind):
        return peak
    a = jnp.ones((1024, 1024), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        rates.append(2 * 1024**3 / (time.perf_counter() - began))
    return max(rates)

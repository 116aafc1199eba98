"""Seconds from the command to the first update of the tiny recipe, with nothing in the caches and with all of it."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_S = 1800


def first_update(cache: pathlib.Path, workdir: pathlib.Path, variant: str) -> dict[str, Any]:
    """Start the training command, wait for the row of step 1, stop it; seconds and number of compilations until then.

    Raises:
      RuntimeError: where the command ends before, with the end of what it printed.
    """
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_LOG_COMPILES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gcpo_jax.train", f"--config={ROOT / 'configs' / 'tiny.py'}:{variant}"]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([*command, f"--workdir={workdir}"], env=env, stderr=errors, stdout=errors)
        try:
            while not _stepped(workdir):
                if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
                    errors.seek(0)
                    raise RuntimeError(f"no first update: {errors.read()[-3000:]}")
                time.sleep(0.02)
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT_S)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        log = errors.read()
    # Every program is announced once; those found in the cache are announced as found too.
    programs = len(re.findall(r"Finished XLA compilation of", log))
    found = len(re.findall(r"Persistent compilation cache hit for", log))
    return {"seconds": seconds, "programs": programs, "compiled": programs - found}


def _stepped(workdir: pathlib.Path) -> bool:
    try:
        return '"step": 1,' in (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return False


def measure(rounds: int, variant: str) -> dict[str, list[dict[str, Any]]]:
    """{"cold": one a round, "warm": one a round}, each warm one with what the cold one before it left."""
    rows: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            for name in rows:
                rows[name].append(first_update(pathlib.Path(scratch) / "cache", pathlib.Path(scratch) / name, variant))
    return rows

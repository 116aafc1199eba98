"""Two processes write what one writes; when one ends, so do both, and the restart goes on as if nothing had been."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import micro_model
from gcpo_jax.tasks import arithmetic

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 5
SETTINGS = {
    "data.task": "jsonl",
    "data.held_out": 4,
    "data.reward": "digits.reward",
    "rollout.queries": 4,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 8,
    "contexts.cap": 8,
    "algorithm.rollout_tokens": 4,
    "learner.micro_batch": 8,
    "learner.learning_rate": 1e-3,
    "learner.warmup": 0.0,
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "evaluation.problems": 4,
    "evaluation.samples": 2,
    "checkpoint.every": 2,
    "train.total_steps": STEPS,
    "train.log_groups": 4,
    "train.audit_steps": "0",
}
# A random model has no right answers, but some have more digits than others. Every process says what it grades.
REWARD = """
import os
def reward(prompt, completion, row):
    with open(os.environ["GRADED"], "a") as file:
        file.write(row["id"] + chr(10))
    if os.path.exists(os.environ["GRADED"] + ".fail"):
        raise ValueError("asked to fail")
    return sum(map(str.isdigit, completion)) / 8
"""


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    path = tmp_path_factory.mktemp("micro")
    micro_model.write(path / "model", chat=False)
    rows = arithmetic.problems()[0][:12]
    (path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "digits.py").write_text(REWARD)
    return path


class Started:
    """A command that runs; what it says is read all the time, so that it never waits for a reader."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()

    def wait_for(self, text, seconds=240):
        with self._more:
            found = self._more.wait_for(lambda: any(text in line for line in self.lines), seconds)
        assert found, (text, self.lines)

    def end(self, seconds=240):
        """(exit code, everything it said)"""
        code = self.process.wait(seconds)
        self._reader.join(30)
        self.process.stderr.close()
        return code, "".join(self.lines)


@pytest.fixture(scope="module")
def start(micro, tmp_path_factory):
    """start(workdir, processes, devices): the commands of one run, one of each process."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(micro),
        "PYTHONWARNINGS": "",
    }
    running = []

    def start(workdir, processes=2, devices=4, preset="gcpo", **changed):
        workdir.parent.mkdir(exist_ok=True)
        settings = SETTINGS | {"model.path": micro / "model", "data.path": micro / "problems.jsonl"}
        settings |= {name.replace("__", "."): value for name, value in changed.items()}
        if devices * processes == 1:
            settings |= {"mesh.data": 1, "mesh.fsdp": 1}
        arguments = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "gcpo_jax.train", "--config", f"configs/tiny.py:{preset}", *arguments]
        command += [f"--workdir={workdir}"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        runs = []
        for k in range(processes):
            own = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process_id={k}"]
            flags = f"--xla_force_host_platform_device_count={devices}"
            runs.append(
                Started(
                    command + (own if processes > 1 else []),
                    environment | {"XLA_FLAGS": flags, "GRADED": f"{workdir}.graded.{k}"},
                )
            )
        running.extend(runs)
        return runs

    yield start
    for run in running:
        if run.process.poll() is None:
            run.process.kill()


def finish(runs):
    """All must end well."""
    ended = [run.end() for run in runs]
    assert [code for code, _ in ended] == [0] * len(runs), ended
    return [said for _, said in ended]


def rows_of(workdir, name):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def numbers(workdir):
    skip = ("time/", "tokens_per_s", "mfu")
    rows = [{k: v for k, v in row.items() if not k.startswith(skip)} for row in rows_of(workdir, "metrics")]
    return rows, rows_of(workdir, "completions")


def test_trial(start, tmp_path):
    began = time.time()
    runs = start(tmp_path / "two")
    print(*finish(runs), time.time() - began)

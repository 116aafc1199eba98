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

import jax
import micro_model
import numpy as np
import pytest

from gcpo_jax import models, processes
from gcpo_jax.config import ConfigError
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
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it says where it is
            code = self.process.wait(30)
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

    def start(workdir, processes=2, devices=4, preset="grpo", **changed):
        workdir.parent.mkdir(exist_ok=True)
        settings = SETTINGS | {"model.path": micro / "model", "data.path": micro / "problems.jsonl"}
        settings |= {name.replace("__", "."): value for name, value in changed.items()}
        if devices * processes == 1:
            settings |= {"mesh.data": 1, "mesh.fsdp": 1}
        arguments = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            "gcpo_jax.train",
            "--config",
            f"configs/tiny.py:{preset}",
            *arguments,
        ]
        command += [f"--workdir={workdir}"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        runs = []
        for k in range(processes):
            own = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process_id={k}"]
            # Little time for the compiler: no number depends on it but in its last digits.
            flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
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


def alike(workdir, other):
    """The same texts and rewards, and numbers equal to 2e-5."""
    (ours, texts), (theirs, their_texts) = numbers(workdir), numbers(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(STEPS + 1))
    sampled = [[(c["completion"], c["reward"]) for g in t for c in g["candidates"]] for t in (texts, their_texts)]
    assert sampled[0] == sampled[1] and len(sampled[0]) == STEPS * 4 * 4
    for row, same in zip(ours, theirs, strict=True):
        for name in row:
            if name.startswith(("reward/", "eval/")) or name in (
                "loss",
                "grad_norm",
                "kl",
                "kl_causal",
                "upsilon/mean",
            ):
                assert row[name] == pytest.approx(same[name], abs=2e-5), (row["step"], name)
    policies = [models.load_pretrained(w / "policy")[1]["embed"] for w in (workdir, other)]
    np.testing.assert_allclose(*policies, atol=1e-4)


def same(workdir, other):
    """Every number, text and parameter."""
    assert numbers(workdir) == numbers(other)
    ours, theirs = ((w / "policy" / "model.safetensors").read_bytes() for w in (workdir, other))
    assert ours == theirs


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The directory of a run of two processes that was left alone."""
    workdir = tmp_path_factory.mktemp("whole") / "two"
    said = finish(start(workdir))
    assert f"step {STEPS}/{STEPS}" in said[0] and "step" not in said[1]
    return workdir


def killed(runs, k):
    """Kill -9 process k; the other must end by itself, soon, with a line that says why."""
    runs[k].process.kill()
    began = time.monotonic()
    code, said = runs[1 - k].end(60)
    assert time.monotonic() - began < 60
    assert code != 0
    assert "error: another process of this run ended" in said and "goes on from the last checkpoint" in said
    runs[k].end()


@pytest.mark.timeout(1800)
def test_two_processes_of_four_devices_write_what_one_of_eight_writes(start, whole, tmp_path):
    finish(start(tmp_path / "one", processes=1, devices=8))
    alike(whole, tmp_path / "one")
    assert (whole / "audit" / "step_000000.npz").exists()
    # Every process graded its half of the queries: candidates of 4 queries in 5 steps, and 4 held out, twice.
    graded = [pathlib.Path(f"{whole}.graded.{k}").read_text().splitlines() for k in (0, 1)]
    assert [len(ids) for ids in graded] == [STEPS * 2 * 4 + 2 * 2 * 3] * 2


@pytest.mark.timeout(1800)
def test_after_kill_9_in_step_3_the_other_ends_and_the_restart_is_as_if_nothing_had_been(start, whole, tmp_path):
    runs = start(tmp_path / "run")
    runs[0].wait_for(f"step 2/{STEPS}")
    time.sleep(0.2)
    killed(runs, 1)
    assert len(rows_of(tmp_path / "run", "metrics")) < STEPS
    finish(start(tmp_path / "run"))
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("k", [0, 1])
def test_after_kill_9_in_a_save_the_other_ends_and_the_restart_is_as_if_nothing_had_been(start, whole, tmp_path, k):
    runs = start(tmp_path / "run")
    end = time.monotonic() + 600
    while not list(tmp_path.glob("run/checkpoints/2.orbax*")):
        assert time.monotonic() < end
        time.sleep(0.005)
    killed(runs, k)
    finish(start(tmp_path / "run"))
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigterm_to_one_saves_on_both_and_one_process_goes_on(start, whole, tmp_path):
    runs = start(tmp_path / "run")
    runs[0].wait_for(f"step 3/{STEPS}")
    runs[1].process.send_signal(signal.SIGTERM)
    said = finish(runs)
    assert "stopped by a signal, saved at step" in said[0]
    assert not (tmp_path / "run" / "policy").exists()
    finish(start(tmp_path / "run", processes=1, devices=1))
    alike(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_go_on_from_what_one_saved(start, whole, tmp_path):
    (run,) = start(tmp_path / "run", processes=1, devices=8)
    run.wait_for(f"step 3/{STEPS}")
    run.process.send_signal(signal.SIGTERM)
    finish([run])
    finish(start(tmp_path / "run", mesh__data=2, mesh__fsdp=4))
    alike(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_run_gcpo_as_one_device_does(start, tmp_path):
    finish(start(tmp_path / "two", preset="gcpo"))
    finish(start(tmp_path / "one", processes=1, devices=1, preset="gcpo"))
    alike(tmp_path / "two", tmp_path / "one")
    arrays = [np.load(tmp_path / name / "audit" / "step_000000.npz") for name in ("two", "one")]
    for name in arrays[0]:
        np.testing.assert_allclose(*(a[name] for a in arrays), atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_reward_that_fails_in_one_process_ends_both_with_its_message(start, tmp_path):
    pathlib.Path(f"{tmp_path / 'run'}.graded.1.fail").touch()
    ended = [run.end() for run in start(tmp_path / "run")]
    assert [code for code, _ in ended] == [1, 1]
    assert all("error: the reward raised ValueError: asked to fail (row" in said for _, said in ended), ended


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_processes_that_do_not_belong_together_and_a_mesh_without_all_devices_are_refused(start, tmp_path):
    ended = [run.end() for run in start(tmp_path / "run", mesh__data=2)]
    assert [code for code, _ in ended] == [1, 1]
    for _, said in ended:
        assert "error: mesh.data=2, mesh.fsdp=2, mesh.tensor=1: must take in all 8 devices of the 2 processes" in said
    assert not (tmp_path / "run").exists()


NOBODY = {"coordinator": "", "processes": None, "process_id": None, "distributed": ""}


def refused(match, **given):
    with pytest.raises(ConfigError, match=match), processes.joined(**NOBODY | given, expected=()):
        pass


def test_half_given_and_wrong_flags_are_named(monkeypatch):
    for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(variable, raising=False)
    refused("--processes, --process_id: missing", coordinator="host:1")
    refused("--coordinator: missing", processes=2, process_id=0)
    refused("--process_id=2: must be in", coordinator="host:1", processes=2, process_id=2)
    refused("--coordinator='host': must be HOST:PORT", coordinator="host", processes=2, process_id=0)
    refused("--distributed=auto and --processes: one of the two", processes=2, distributed="auto")
    refused("JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: missing", distributed="env")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    refused("JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers", distributed="env")


def test_one_process_stays_one_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    with processes.joined(**NOBODY, expected=()):
        assert not jax.distributed.is_initialized()
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    assert processes.exchange({"a": 0.1}) == [{"a": 0.1}]
    assert processes.together(lambda: 3, ConfigError) == [3]


def test_last_words_are_said_where_the_end_is_not_announced(capfd):
    shell = processes._last_words("error: gone")
    processes._dismiss(shell)
    assert capfd.readouterr().err == ""
    shell = processes._last_words("error: gone")
    shell.stdin.close()  # as the end of the process does
    shell.wait(30)
    assert capfd.readouterr().err == "error: gone\n"

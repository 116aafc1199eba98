"""A run that was killed or stopped and started again writes what an uninterrupted run writes."""

import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import transformers

from gcpo_jax import models
from gcpo_jax.tasks import arithmetic

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 6
SETTINGS = {
    "data.task": "jsonl",
    "data.held_out": 4,
    "data.reward": "digits.reward",
    "rollout.queries": 2,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 8,
    "contexts.cap": 8,
    "algorithm.rollout_tokens": 4,
    "learner.micro_batch": 4,
    "learner.learning_rate": 1e-2,
    "evaluation.problems": 4,
    "evaluation.samples": 2,
    "evaluation.every": 3,
    "checkpoint.every": 2,
    "train.total_steps": STEPS,
}


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A random model of two layers of width 32 with the tokenizer of the tiny model; a few problems; a reward."""
    spec = importlib.util.spec_from_file_location("cold_start", ROOT / "scripts" / "cold_start.py")
    cold_start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cold_start)
    path = tmp_path_factory.mktemp("micro")
    tokens, model = path / "tokens", path / "model"
    tokens.mkdir()
    cold_start.write_tokenizer(tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens)
    config = models.ModelConfig(
        family="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        qkv_bias=True,
        tied_embeddings=True,
        max_position=512,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    models.save_pretrained(model, config, models.init_params(config, 0))
    shutil.copytree(tokens, model, dirs_exist_ok=True)
    rows = arithmetic.problems()[0][:12]
    (path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A random model has no right answers, but some have more digits than others.
    (path / "digits.py").write_text(
        "def reward(prompt, completion, row): return sum(map(str.isdigit, completion)) / 8\n"
    )
    return path


@pytest.fixture(scope="module")
def start(micro, tmp_path_factory):
    """start(workdir): the command, running, its standard error readable line by line."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(micro)}

    def start(workdir):
        settings = {**SETTINGS, "model.path": micro / "model", "data.path": micro / "problems.jsonl"}
        arguments = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "gcpo_jax.train", "--config", "configs/tiny.py:gcpo", *arguments]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )

    return start


def wait_for(process, text):
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"ended with {process.wait()} before it said {text!r}")


def finish(process):
    """Everything it still says; it must end well."""
    with process:
        said = process.stderr.read()
    assert process.returncode == 0, said
    return said


def numbers(workdir):
    """The rows of metrics.jsonl without times and rates, and the rows of completions.jsonl."""
    rows, completions = (
        [json.loads(line) for line in (workdir / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "completions.jsonl")
    )
    skip = ("time/", "tokens_per_s", "mfu")
    return [{k: v for k, v in row.items() if not k.startswith(skip)} for row in rows], completions


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """(numbers, exported weights, usual seconds of a step, rows with times) of a run that was left alone."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(workdir))
    times = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]
    usual = statistics.median([0.0, *(row["time/step_s"] for row in times)])
    rows, completions = numbers(workdir)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert len({row["reward/mean"] for row in rows[1:]}) > 1 and any(row["upsilon/std"] for row in rows[1:])
    assert {row["step"] for row in completions} == set(range(1, STEPS + 1))
    return (rows, completions), (workdir / "policy" / "model.safetensors").read_bytes(), usual, times


def test_a_row_says_what_its_step_waited_for_the_row_and_the_checkpoint_before_it(uninterrupted):
    times = uninterrupted[3]
    assert times[0]["time/log_s"] is None and all(row["time/log_s"] > 0 for row in times[1:])
    assert all(row["time/data_s"] > 0 for row in times)
    # A checkpoint every two steps: those after steps 2 and 4 began with one.
    saving = [row["time/save_s"] for row in times[1:]]
    assert min(saving[1], saving[3]) > max(saving[0], saving[2], saving[4])


def check(workdir, uninterrupted):
    expected, weights, *_ = uninterrupted
    assert numbers(workdir) == expected
    assert (workdir / "policy" / "model.safetensors").read_bytes() == weights


def kill_and_resume(start, uninterrupted, directory, kills, seed):
    """Kill runs at `kills` random moments between the start and the end of training; see that each goes on rightly."""
    rng = random.Random(seed)
    done = runs = 0
    while done < kills:
        workdir, ended = directory / str(runs), False
        while done < kills and not ended:
            process = start(workdir)
            begins = int(wait_for(process, "from step").split()[-1])
            # One line a step, and one of step 0: any of them, the silence before it or the saving after the last.
            for _ in range(rng.randint(0, STEPS - begins + (begins == 0))):
                process.stderr.readline()
            time.sleep(rng.uniform(0, uninterrupted[2]))
            ended = process.poll() is not None
            if not ended:
                process.kill()
                done += 1
            with process:
                process.stderr.read()
        finish(start(workdir))
        check(workdir, uninterrupted)
        runs += 1


def test_a_run_killed_at_two_random_moments_ends_as_if_it_had_not_been(start, uninterrupted, tmp_path):
    kill_and_resume(start, uninterrupted, tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_at_twenty_random_moments_end_as_if_they_had_not_been(start, uninterrupted, tmp_path):
    kill_and_resume(start, uninterrupted, tmp_path, kills=20, seed=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_stopped_by_a_signal_saves_exits_with_0_and_goes_on(start, uninterrupted, tmp_path, number):
    process = start(tmp_path)
    wait_for(process, f"step 3/{STEPS}")
    process.send_signal(number)
    assert "stopped by a signal, saved at step" in finish(process)
    rows, _ = numbers(tmp_path)
    assert 3 <= rows[-1]["step"] < STEPS
    assert not (tmp_path / "policy").exists()
    said = finish(start(tmp_path))
    assert f"from step {rows[-1]['step']}" in said
    check(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again_without_repeating_a_row(start, uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for(process, f"step 1/{STEPS}")
    process.kill()
    with process:
        process.stderr.read()
    finish(start(tmp_path))
    check(tmp_path, uninterrupted)

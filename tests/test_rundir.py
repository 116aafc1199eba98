"""Run directories: one run, one writer, one set of settings."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import pytest

from gcpo_jax import metrics, rundir
from gcpo_jax.config import Config, ConfigError, flatten


@pytest.fixture
def config():
    return Config()


def changed(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def test_a_new_directory_gets_the_settings_and_the_version(tmp_path, config):
    rundir.open_run(tmp_path / "a" / "b", config).close()
    saved = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert saved["config"] == flatten(config)
    assert saved["version"]


def test_the_same_settings_open_the_directory_again(tmp_path, config):
    rundir.open_run(tmp_path, config).close()
    before = (tmp_path / "config.json").read_text()
    run = rundir.open_run(tmp_path, config)
    run.close()
    run.close()
    assert (tmp_path / "config.json").read_text() == before


def test_every_differing_field_is_named_with_both_values(tmp_path, config):
    rundir.open_run(tmp_path, config).close()
    before = (tmp_path / "config.json").read_text()
    other = changed(config, "learner", learning_rate=0.5)
    other = changed(other, "train", audit_steps=(0, 3), log_groups=9)
    with pytest.raises(ConfigError) as caught:
        rundir.open_run(tmp_path, other)
    text = str(caught.value)
    assert "learner.learning_rate was 1e-06, is 0.5" in text
    assert "train.audit_steps was [], is [0, 3]" in text
    assert "log_groups" not in text
    assert str(tmp_path) in text and "another --workdir" in text
    assert (tmp_path / "config.json").read_text() == before
    rundir.open_run(tmp_path, config).close()  # the refusal has given the lock back


@pytest.mark.parametrize("field", sorted(rundir.MAY_CHANGE))
def test_fields_that_change_no_number_may_change(tmp_path, config, field):
    rundir.open_run(tmp_path, config).close()
    section, name = field.split(".")
    value = "plain" if field == "model.attention" else 7
    rundir.open_run(tmp_path, changed(config, section, **{name: value})).close()
    assert json.loads((tmp_path / "config.json").read_text())["config"][field] == value


def test_a_field_that_only_one_side_knows_is_named(tmp_path, config):
    rundir.open_run(tmp_path, config).close()
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["config"]["rollout.gone"] = 3
    del saved["config"]["rollout.top_k"]
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"rollout.top_k was '\(absent\)', is 0; rollout.gone was 3, is '\(absent\)'"):
        rundir.open_run(tmp_path, config)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {}}'])
def test_a_broken_settings_file_is_named(tmp_path, config, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not"):
        rundir.open_run(tmp_path, config)


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex but no config\.json"):
        rundir.open_run(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_left_behind_is_taken_over(tmp_path, config):
    (tmp_path / "lock").write_text("1")
    (tmp_path / "config.partial").write_text('{"con')
    rundir.open_run(tmp_path, config).close()
    assert not (tmp_path / "config.partial").exists()


def test_a_second_process_is_told_who_has_the_directory_until_that_one_ends(tmp_path, config):
    code = (
        "import pathlib, sys; from gcpo_jax import rundir; from gcpo_jax.config import Config\n"
        "run = rundir.open_run(pathlib.Path(sys.argv[1]), Config()); print('open', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=f"in use by the process {holder.pid}:") as caught:
            rundir.open_run(tmp_path, config)
        assert str(tmp_path) in str(caught.value)
        holder.kill()
    rundir.open_run(tmp_path, config).close()


def test_the_same_process_cannot_open_a_directory_twice(tmp_path, config):
    run = rundir.open_run(tmp_path, config)
    with pytest.raises(ConfigError, match=f"in use by the process {os.getpid()}:"):
        rundir.open_run(tmp_path, config)
    run.close()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_place_of_the_directory_is_a_clear_error(tmp_path, config, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--workdir='.*file.*' cannot be written"):
        rundir.open_run(type(tmp_path)(f"{tmp_path}/file{below}"), config)


def test_a_read_only_directory_is_a_clear_error(tmp_path, config):
    rundir.open_run(tmp_path, config).close()
    if os.geteuid() == 0:  # permission bits do not hold root: a read-only mount does
        if (
            shutil.which("mount") is None
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True
            ).returncode
        ):
            pytest.skip("root, and not allowed to mount a read-only file system")
    else:
        tmp_path.chmod(0o500)
        (tmp_path / "lock").chmod(0o400)
    try:
        with pytest.raises(ConfigError, match=f"--workdir='{tmp_path}' cannot be written: .*(Read-only|Permission)"):
            rundir.open_run(tmp_path, config)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path)], check=True)
        else:
            tmp_path.chmod(0o700)


def test_a_run_that_compiles_at_every_step_is_told_once(tmp_path, capsys):
    log = metrics.Log(tmp_path, resume_at=-1, total=40)
    for step in range(1, 31):
        timers = metrics.Timers()
        if step != 5:
            jax.jit(lambda x, step=step: x + step)(1.0).block_until_ready()
        log.write({"step": step} | timers.read())
    log.close()
    assert capsys.readouterr().err.count("warning: each of the last 10 steps compiled programs") == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["time/compilations"] > 0 for row in rows] == [step != 5 for step in range(1, 31)]


def test_rows_are_written_beside_the_run_and_a_failure_there_is_raised_by_a_later_call(tmp_path, monkeypatch):
    allowed, synced = threading.Event(), []

    def fsync(number):
        assert allowed.wait(60)
        synced.append(os.readlink(f"/proc/self/fd/{number}").rpartition("/")[2])

    monkeypatch.setattr(metrics.os, "fsync", fsync)
    log = metrics.Log(tmp_path, resume_at=-1, total=2, quiet=True)
    log.write({"step": 1}, [{"step": 1, "completion": ""}])
    log.write({"step": 2})
    assert synced == []
    threading.Timer(0.2, allowed.set).start()
    log.durable()
    assert synced == ["completions.jsonl", "metrics.jsonl"] * 2
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    log.write({"step": 3})
    with pytest.raises(OSError, match="No space"):
        log.durable()
    with pytest.raises(OSError, match="No space"):
        log.write({"step": 4})


def test_a_completion_with_characters_that_end_lines_is_one_row_also_after_a_restart(tmp_path):
    text = "a\u2028b\x85c\x0bd"
    metrics.append(tmp_path / "completions.jsonl", {"step": 1, "completion": text})
    metrics.append(tmp_path / "completions.jsonl", {"step": 2, "completion": text})
    metrics.keep_until(tmp_path / "completions.jsonl", 1)
    [line] = (tmp_path / "completions.jsonl").read_text().removesuffix("\n").split("\n")
    assert json.loads(line) == {"step": 1, "completion": text}

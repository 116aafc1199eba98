import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from hostile import forgeries, programs
from hostile.honest import HONEST

from gcpo_jax.tasks import code, sandbox
from gcpo_jax.tasks.sandbox import Program

HERE = pathlib.Path(__file__).parent
KINDS = {"harm": programs.HARMING, "together": forgeries.FORGING}
CASES = [f"{kind}/{name}" for kind, made in KINDS.items() for name in made]
APART = [f"{kind}/{name}" for kind in ("check", "apart") for name in forgeries.FORGING]


@pytest.fixture(scope="module")
def box():
    """A sandbox; tests that need one say what the system lacks."""
    made = sandbox.Sandbox()
    try:
        made.judge([Program("assert 1 + 1 == 2")], 10.0)
    except code.SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def contained(*options: str) -> dict:
    """What the hostile programs did behind contained.py's wall, without which they are not run."""
    command = [sys.executable, str(HERE / "hostile" / "contained.py"), sandbox.DIRECTORY, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(f"hostile programs are run only where they can be contained: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcome():
    return contained("only=harm/", "only=together/")


def assert_beaten(verdict: dict, limit: float = 1.0) -> None:
    assert not verdict["passed"]
    assert "HARM" not in verdict["output"], verdict["output"]
    assert verdict["reason"] in ("failed", "timeout", "memory", "output", "exit", "crash"), verdict
    assert verdict["seconds"] < limit + 2


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_program_neither_passes_nor_harms_nor_outlives_its_limit_by_two_seconds(outcome, case):
    assert_beaten(outcome["verdicts"][case])


def assert_clean(outcome: dict) -> None:
    assert outcome["running"] == 3  # the harness and the zygote's two, before these are told to end
    assert outcome["after"] == outcome["before"]
    assert outcome["canary"] == "CANARY"
    assert outcome["honest"]["passed"], outcome["honest"]


def test_hostile_programs_leave_nothing_behind_and_an_honest_one_passes_after_them(outcome):
    assert_clean(outcome)


@pytest.mark.slow
def test_a_forgery_does_not_pass_tests_in_a_function_or_given_apart():
    outcome = contained("only=check/", "only=apart/")
    assert list(outcome["verdicts"]) != [] and sorted(outcome["verdicts"]) == sorted(APART)
    for verdict in outcome["verdicts"].values():
        assert_beaten(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("user",), ("user", "landlock"), ("landlock",)], ids="-".join)
def test_an_ordinary_user_and_a_system_without_namespaces_are_protected_as_well(options):
    outcome = contained(*options)
    assert ("user namespace" in outcome["layers"]) == (options == ("user",))
    assert ("pid namespaces" in outcome["layers"]) == (options == ("user",))
    for verdict in outcome["verdicts"].values():
        assert_beaten(verdict)
    assert_clean(outcome)


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(box, name):
    verdict = box.judge([Program(HONEST[name])], 10.0)[0]
    assert verdict.passed and verdict.reason == "passed", verdict


def test_a_verdict_says_why(box):
    made = {
        "failed": "def f(): return 1\nassert f() == 2",
        "timeout": "while True: pass",
        "memory": "x = bytearray(1 << 40)",
        "output": "while True: print('x' * 1000)",
        "exit": "raise SystemExit",
        "crash": "import ctypes\nctypes.string_at(0)",
        "passed": "print('the end')",
    }
    verdicts = box.judge([Program(text) for text in made.values()], 2.0)
    assert [v.reason for v in verdicts] == list(made)
    assert verdicts[-1].output == "the end\n" and verdicts[-1].seconds < 2
    assert 2.0 <= verdicts[1].seconds < 4
    error = box.judge([Program("def f():\n    return 1 / 0\nassert f()")], 5.0)[0]
    assert "line 2" in error.output and "ZeroDivisionError" in error.output
    assert box.judge([Program("def f(:")], 5.0)[0].reason == "failed"


def test_tests_given_apart_are_counted_and_need_not_be_known_to_the_program(box):
    tests = "assert f(1) == 1\nassert f(2) == 2\nassert f(3) == 3\nassert True"
    half = box.judge([Program("def f(x): return min(x, 2)", tests, every=True)], 5.0)[0]
    assert (half.passed, half.tests_passed, half.tests) == (False, 2, 3)
    first = box.judge([Program("def f(x): return 0", tests)], 5.0)[0]
    assert (first.passed, first.tests_passed, first.tests) == (False, 0, 3)
    nothing = box.judge([Program("def f(x): return x", "f(1)")], 5.0)[0]
    assert not nothing.passed and "no test" in nothing.output
    helped = Program("def g(x): return 7\ndef f(x): return 0", "assert g(f(1)) == 7", "def g(x):\n    return x + 1")
    assert not box.judge([helped], 5.0)[0].passed


def test_verdicts_come_in_order_and_side_by_side(box):
    texts = [f"import time\ntime.sleep({0.3 if k % 2 else 0})\nprint({k})" for k in range(8)]
    began = time.monotonic()
    verdicts = box.judge([Program(text) for text in texts], 10.0, workers=8)
    assert [int(v.output) for v in verdicts] == list(range(8))
    assert time.monotonic() - began < 4 * 0.3 + 1.5  # one after the other they sleep 1.2 s; the machine may be busy


def test_threads_share_a_sandbox(box):
    found = {}

    def ask(k: int) -> None:
        found[k] = box.judge([Program(f"print({k})")], 20.0)[0].output

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: f"{k}\n" for k in range(4)}


def test_a_killed_sandbox_is_replaced_and_its_programs_are_run_again():
    made = sandbox.Sandbox()
    try:
        made.judge([Program("x = 1")], 10.0)
    except code.SandboxUnavailable as error:
        pytest.skip(str(error))
    assert made.process
    killer = threading.Timer(0.4, os.kill, (made.process.pid, signal.SIGKILL))
    killer.start()
    texts = [f"import time\ntime.sleep(0.25)\nprint({k})" for k in range(6)]
    verdicts = made.judge([Program(text) for text in texts], 10.0, workers=2)
    killer.join()
    assert [(v.reason, v.output) for v in verdicts] == [("passed", f"{k}\n") for k in range(6)]
    made.close()


def test_nothing_is_run_where_a_layer_is_missing_unless_told_so():
    broken = sandbox.START.replace("; ", "\n").replace(
        "zygote.main", "from sandbox import seccomp\nseccomp.supported = lambda: False\nzygote.main"
    )
    strict = sandbox.Sandbox(start=broken)
    with pytest.raises(code.SandboxUnavailable, match="system call filter"):
        strict.judge([Program("x = 1")], 5.0)
    strict.close()
    loose = sandbox.Sandbox(start=broken, unsafe=True)
    assert loose.judge([Program("assert 1 + 1 == 2")], 10.0)[0].passed
    loose.close()


def test_a_sandbox_whose_walls_have_a_hole_is_found_out_by_trying():
    hole = sandbox.START.replace("; ", "\n").replace(
        "zygote.main", "from sandbox import kernel\nkernel.confine = lambda *_, **__: None\nzygote.main"
    )
    made = sandbox.Sandbox(start=hole)
    with pytest.raises(code.SandboxUnavailable, match=r"isolation that holds.*(a socket|namespaces|Landlock)"):
        made.judge([Program("x = 1")], 5.0)
    made.close()


def test_a_python_that_does_not_start_is_named():
    made = sandbox.Sandbox(python="/bin/false")
    with pytest.raises(code.SandboxUnavailable, match="/bin/false"):
        made.judge([Program("x = 1")], 5.0)
    made.close()


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"timeout_s=0"):
        code.run("x = 1", timeout_s=0)
    with pytest.raises(ValueError, match=r"memory_mb=1"):
        code.run("x = 1", memory_mb=1)

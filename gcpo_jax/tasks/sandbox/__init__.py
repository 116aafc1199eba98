"""Untrusted Python programs, run so that they can neither harm nor pass by anything but right results.

A program runs in a process that has no privileges and whose world is made empty by every means that the kernel gives:
see `layers`. Linux only. Root (also in a container that keeps CAP_SYS_ADMIN) or an ordinary user who may make user
namespaces has them all; without namespaces Landlock and the system call filter do the same work, and programs cannot
write files. Where neither is to be had nothing is run, unless the caller says `unsafe`.

**The threat model.** The program may do anything that Python, ctypes or machine code can do in its process. It is given
a limit of time, memory, output and files, no network, no other process, no /proc, no environment, no file but Python's
standard library and an empty /tmp. What it is tested by never enters its process: a judge in a process apart runs the
tests, asks for each call's result, and gets copies of plain data (`wire.py`). So the results have to be right; how
asserts, built-ins, `==`, frames, exit hooks, threads or signals are bent in the program's process does not matter, and
the only way to the verdict (with a nonce, and a count of the tests that were run) is a descriptor that no process of
the program has ever held.

**What remains.**
- A program may know the answers by heart, or from the arguments of a call; tests that do not look at results (`assert
  f(x)`, `assert f(x) != 3`, an exception that is expected and nothing else) accept whatever answers them.
- Tests that compare two objects of the program's own classes, or that call functions of its text (a `run(program)` that
  contains `assert check_inverse(f)`), take the program's word. With `tests` given apart, trusted helpers of the tests
  are the judge's own.
- A program whose tests are not asserts at its top level, or in `check` or `test...` functions of simple Python (see
  `split.py`), is judged by its running to its end without an exception, which code in the same interpreter can pretend.
- In a program that contains its tests, the line between the two is drawn by their form, not by their author.
- The kernel itself: a hole in it that the allowed system calls reach is a hole in the sandbox. Load on a shared
  processor can be observed, and time limits are those of the wall clock.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from . import wire

DIRECTORY = os.path.dirname(os.path.abspath(__file__))
# A package made by hand: the zygote shall import these files and nothing else of the caller's.
START = (
    "import sys, types; p = types.ModuleType('sandbox'); p.__path__ = [sys.argv[1]]; sys.modules['sandbox'] = p; "
    "from sandbox import zygote; zygote.main(int(sys.argv[2]), sys.argv[3] == 'unsafe')"
)
ATTEMPTS = 3  # for a program whose processes were killed from outside
PATIENCE = 5.0  # seconds beyond its limit after which the sandbox's own processes are taken to hang


class SandboxUnavailable(RuntimeError):
    """This system cannot confine a program; `missing` names what it lacks."""

    def __init__(self, missing: list[str]) -> None:
        super().__init__(
            f"untrusted programs cannot be confined here; missing: {'; '.join(missing)}. They are run with "
            "less isolation only where unsafe=True says so"
        )
        self.missing = missing


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """What to run.

    Attributes:
      code: the untrusted source. With no `tests` it contains its own.
      tests: trusted source that asserts; names which it does not define are the program's.
      helpers: trusted source that defines what the tests use, whatever the program defines under these names.
      every: go on after a failed assert, for the share of tests passed.
    """

    code: str
    tests: str = ""
    helpers: str = ""
    every: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How a program did.

    Attributes:
      passed: ran to its end, and every test held.
      reason: "passed", "failed" (a test or an exception), "timeout", "memory", "output" (too much of it), "exit" (ended
        itself before its tests), "crash" (died of a signal), "killed" (three times, from outside).
      seconds: wall time.
      output: the end of what was printed and of the error.
      tests_passed, tests: asserts that held, and all (constant ones are not counted; one in a loop counts once).
    """

    passed: bool
    reason: str
    seconds: float
    output: str = ""
    tests_passed: int = 0
    tests: int = 0


class Sandbox:
    """A zygote process and the way to it; safe to share between threads."""

    def __init__(self, python: str = sys.executable, unsafe: bool = False, start: str = START) -> None:
        self.python, self.unsafe, self.start_code = python, unsafe, start
        self.lock = threading.Lock()
        self.owner = os.getpid()
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.layers: list[str] = []
        self.missing: list[str] = []

    def _started(self) -> socket.socket:
        """The way to a living zygote, started if there is none."""
        with self.lock:
            if self.control is not None and self.process is not None and self.process.poll() is None:
                return self.control
            self._stop()
            if sys.platform != "linux":
                self.missing = ["Linux"]
                raise SandboxUnavailable(self.missing)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            mode = "unsafe" if self.unsafe else "safe"
            with theirs:
                # Never forked from this process: it may hold a runtime with threads and locks.
                command = [self.python, "-I", "-S", "-X", "utf8", "-c", self.start_code, DIRECTORY]
                try:
                    self.process = subprocess.Popen(
                        [*command, str(theirs.fileno()), mode],
                        pass_fds=[theirs.fileno()],
                        env={},
                        cwd="/",
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                    )
                except OSError as error:
                    ours.close()
                    raise SandboxUnavailable([f"a Python process of its own ({self.python}): {error}"]) from error
            ours.settimeout(60)
            hello = ours.recv(1 << 16)
            if not hello:
                error = self.process.communicate()[1].decode(errors="replace")[-2000:]
                ours.close()
                raise SandboxUnavailable([f"a Python process of its own ({self.python}): {error}"])
            ours.settimeout(None)
            self.control = ours
            said = json.loads(hello)
            self.layers, self.missing = said["layers"], said["missing"]
            return ours

    def _stop(self) -> None:
        if self.control is not None:
            self.control.close()
            self.control = None
        if self.process is not None:
            if self.process.stderr:
                self.process.stderr.close()
            if self.owner == os.getpid():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(2)
                self.process.kill()
                self.process.wait()
            self.process = None

    def close(self) -> None:
        """End the zygote and with it every program that it runs."""
        with self.lock:
            self._stop()

    def judge(
        self, programs: Sequence[Program], timeout_s: float | int, memory_mb: int = 512, workers: int | None = None
    ) -> list[Verdict]:
        """The verdicts of programs in order, `workers` at a time (as many as there are processors).

        Raises:
          SandboxUnavailable: where nothing may be run here.
        """
        workers = workers or len(os.sched_getaffinity(0))
        verdicts: dict[int, Verdict] = {}
        waiting = [(k, 0) for k in reversed(range(len(programs)))]
        with selectors.DefaultSelector() as selector:
            trials: set[_Trial] = set()
            while waiting or trials:
                while waiting and len(trials) < workers:
                    k, attempt = waiting.pop()
                    trial = self._begin(k, attempt, programs[k], timeout_s, memory_mb)
                    if isinstance(trial, Verdict):
                        verdicts[k] = trial
                        continue
                    trials.add(trial)
                    selector.register(trial.way, selectors.EVENT_READ, trial)
                for key, _ in selector.select(1.0):
                    if key.data.read():
                        continue
                    trials.discard(key.data)
                    selector.unregister(key.fileobj)
                    self._end(key.data, verdicts, waiting)
                if any(time.monotonic() > trial.late for trial in trials):
                    self.close()  # ends all trials, which are then repeated
        return [verdicts[k] for k in range(len(programs))]

    def _begin(
        self, k: int, attempt: int, program: Program, timeout_s: float | int, memory_mb: int
    ) -> "_Trial | Verdict":
        nonce = secrets.token_hex(16)
        try:
            job = wire.frame(dataclasses.asdict(program) | {"timeout": timeout_s, "nonce": nonce})
        except ValueError as error:
            return Verdict(False, "failed", 0.0, str(error))
        limits = json.dumps({"timeout": timeout_s, "memory_mb": memory_mb}).encode()
        for _ in range(ATTEMPTS):
            control = self._started()
            if self.missing and not self.unsafe:
                missing = self.missing
                self.close()
                raise SandboxUnavailable(missing)
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(OSError):
                socket.send_fds(control, [limits], [theirs.fileno()])
                return _Trial(k, attempt, ours, nonce, timeout_s, job)
            ours.close()
            self.close()
        raise SandboxUnavailable(["a process of the sandbox that stays alive"])

    def _end(self, trial: "_Trial", verdicts: dict[int, Verdict], waiting: list[tuple[int, int]]) -> None:
        """File a verdict, or have the trial repeated where it was ended from outside."""
        trial.way.close()
        verdict = trial.verdict()
        if verdict.reason == "killed" and trial.attempt + 1 < ATTEMPTS:
            waiting.append((trial.k, trial.attempt + 1))
        else:
            verdicts[trial.k] = verdict


class _Trial:
    """A program under way: its socket, and what has come back on it."""

    def __init__(
        self, k: int, attempt: int, way: socket.socket, nonce: str, timeout_s: float | int, job: bytes
    ) -> None:
        self.k, self.attempt, self.way, self.nonce, self.timeout_s = k, attempt, way, nonce, timeout_s
        self.began = time.monotonic()
        self.late = self.began + timeout_s + PATIENCE
        self.received = b""
        with contextlib.suppress(OSError):
            way.settimeout(timeout_s + PATIENCE)
            way.sendall(job)
            way.shutdown(socket.SHUT_WR)

    def read(self) -> bool:
        """Whether there may be more to come."""
        try:
            chunk = self.way.recv(1 << 16)
        except OSError:
            return False
        self.received += chunk
        return bool(chunk)

    def verdict(self) -> Verdict:
        """What the judge said; without that, what must have happened to it."""
        seconds = time.monotonic() - self.began
        try:
            said = json.loads(self.received)
        except ValueError:
            late = seconds >= self.timeout_s
            return Verdict(
                False, "timeout" if late else "killed", seconds, self.received.decode(errors="replace")[-4000:]
            )
        if said.pop("nonce") != self.nonce:
            return Verdict(False, "failed", seconds, "a verdict that the judge did not give")
        return Verdict(passed=said["reason"] == "passed", **said)


_shared: dict[bool, Sandbox] = {}
_shared_lock = threading.Lock()


def shared(unsafe: bool = False) -> Sandbox:
    """The sandbox of this process, started when first used and ended with it."""
    with _shared_lock:
        if unsafe not in _shared or _shared[unsafe].owner != os.getpid():
            _shared[unsafe] = Sandbox(unsafe=unsafe)
            atexit.register(_shared[unsafe].close)
        return _shared[unsafe]

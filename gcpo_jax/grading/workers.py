"""Worker processes that may be killed: each answers one question at a time, within limits of time, memory and
recursion.

A worker is a fresh interpreter that runs worker_main.py and speaks lines of JSON over its pipes. It never imports
JAX, and it is neither forked nor does it run the main module again, so it is safe beside JAX's threads. It keeps
the limits itself, in a child for each question; one that does not answer all the same is killed, and one that dies
is replaced and asked again.
"""

import atexit
import contextlib
import json
import logging
import os
import pathlib
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_MAIN = pathlib.Path(__file__).with_name("worker_main.py")
START_S, STARTS = 60.0, 5
# Why a question has no answer.
LIMIT, DIED = "grading ran past its time or memory", "the grading worker died twice"
_LOG = logging.getLogger(__name__)


class _Died(Exception):
    """The worker's pipe closed."""


class Worker:
    """One process."""

    def __init__(self, cpu_s: float, wall_s: float, memory_bytes: int):
        root = str(_MAIN.parents[2])
        environment = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if k in os.environ}
        # The package is found where this process found it; -P keeps the working directory out.
        environment |= {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_MAIN), str(cpu_s), str(wall_s), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
        self._left = b""

    def ask(self, question: object, limit_s: float) -> bool | str:
        """The answer to a question.

        Raises:
          TimeoutError: past the limit.
          _Died: where the process is gone.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise _Died from error
        return self._read(limit_s)

    def _read(self, limit_s: float) -> bool | str:
        assert self.process.stdout is not None
        end, pipe = time.monotonic() + limit_s, self.process.stdout.fileno()
        while b"\n" not in self._left:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(pipe, 65536)
            if not chunk:
                raise _Died
            self._left += chunk
        line, _, self._left = self._left.partition(b"\n")
        return json.loads(line)

    def wait_until_ready(self) -> None:
        """Returns when the libraries are loaded, so that loading costs no answer its time."""
        self._read(START_S)

    def kill(self) -> None:
        """Ends the process and reaps it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Pool:
    """A few workers, started at the first question and ended with the program."""

    def __init__(self, size: int = 2, wall_s: float = 3.0, cpu_s: float = 2.0, memory_bytes: int = 1 << 30):
        self.size, self.wall_s, self.cpu_s, self.memory_bytes = size, wall_s, cpu_s, memory_bytes
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._all: list[Worker] = []

    @property
    def pids(self) -> list[int]:
        """The process ids of the living workers."""
        return [worker.process.pid for worker in self._all]

    def map(self, questions: Sequence[object]) -> list[bool | str]:
        """The answer to each question, in order; LIMIT or DIED where there is none."""
        if len(questions) <= 1:
            return [self._answer(q) for q in questions]
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(self._answer, questions))

    def _answer(self, question: object) -> bool | str:
        worker = self._idle.get()
        try:
            for _ in range(2):
                try:
                    if worker is None:
                        worker = self._start()
                    # It keeps the limit itself, twice over where a child died: this is for a worker that stands still.
                    return worker.ask(question, 3 * self.wall_s)
                except TimeoutError:
                    self._end(worker)
                    worker = None
                    return LIMIT
                except _Died:
                    self._end(worker)
                    worker = None
            return DIED
        except BaseException:
            self._end(worker)  # a half-read answer must not become the next question's
            worker = None
            raise
        finally:
            self._idle.put(worker)

    def _start(self) -> Worker:
        """A worker that is ready. One that dies while it starts is started again: that is not its question's fault."""
        problem: Exception | None = None
        for _ in range(STARTS):
            try:
                return self._start_once()
            except (_Died, TimeoutError) as error:
                problem = error
        _LOG.error(
            "grading workers do not start (%r), so answers that need one are wrong: is math-verify there?", problem
        )
        raise _Died

    def _start_once(self) -> Worker:
        worker = Worker(self.cpu_s, self.wall_s, self.memory_bytes)
        with self._lock:
            if not self._all:
                atexit.register(self.close)
            self._all.append(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: Worker | None) -> None:
        if worker is None:
            return
        worker.kill()
        with self._lock:
            self._all = [w for w in self._all if w is not worker]

    def close(self) -> None:
        """Ends all workers; the next question starts new ones."""
        if os.getpid() != self._owner:  # a forked child does not own its parent's workers
            return
        for worker in list(self._all):
            self._end(worker)

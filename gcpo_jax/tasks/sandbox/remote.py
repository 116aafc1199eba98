"""The judge's view of the program's process: requests with a deadline, and objects that exist only over there."""

import builtins
import contextlib
import os
import select
import signal
import time
from typing import Any

from . import wire
from .split import ERRORS

TAIL = 4000  # bytes of output kept
FLOOD = 4 << 20  # bytes of output that end a program
ENDINGS = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")
NEVER_RAISED = ("StopIteration", "StopAsyncIteration")  # would end a loop of the tests early, and with it the tests


class Over(BaseException):
    """The program cannot go on, or has failed as a whole; args: the reason, and a text."""


class RemoteError(Exception):
    """An exception of the program that is no built-in one."""


class Link:
    """The pipes to the program's process, and its output."""

    def __init__(self, pid: int, requests: int, answers: int, output: int, deadline: float) -> None:
        self.pid, self.requests, self.answers, self.output, self.deadline = pid, requests, answers, output, deadline
        self.tail, self.written = b"", 0
        self.trace, self.memory = "", False  # of the last exception; whether any was a MemoryError
        self.received = bytearray()
        for fd in (requests, answers, output):
            os.set_blocking(fd, False)

    def ask(self, do: str, *given: Any, **keywords: Any) -> Any:
        """Have something done over there.

        Raises:
          Over: where the process has ended, is late, floods its output, or answers nonsense.
          Exception: what the program raised, as the same built-in exception, or RemoteError.
        """
        request = {"do": do, "with": [wire.encode(x, refer) for x in given]}
        request["keywords"] = {key: wire.encode(x, refer) for key, x in keywords.items()}
        pending = memoryview(wire.frame(request))
        while True:
            self._wait(bool(pending))
            self.drain()
            if pending:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    pending = pending[os.write(self.requests, pending) :]
            try:
                chunk = os.read(self.answers, 1 << 20)
            except BlockingIOError:
                continue
            if not chunk:
                raise self._ended()
            self.received += chunk
            try:
                answer = wire.unframe(self.received)
                if answer is None:
                    continue
                if "error" not in answer:
                    return wire.decode(answer["value"], self.resolve)
                name, message, trace = (str(x) for x in answer["error"])
            except Exception as error:
                raise Over(
                    "failed", f"the program's process sent something else than an answer ({error!r:.200})"
                ) from None
            raise self._raised(name, message, trace)

    def _raised(self, name: str, message: str, trace: str) -> BaseException:
        self.trace, self.memory = trace, self.memory or name == "MemoryError"
        if name in ENDINGS:
            return Over("exit", trace)
        if name in ERRORS and name not in NEVER_RAISED:
            with contextlib.suppress(TypeError):
                return getattr(builtins, name)(message)
        return RemoteError(f"{name}: {message}")

    def _wait(self, writing: bool) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Over("timeout", "")
        readable = [self.answers] + ([self.output] if self.output >= 0 else [])
        select.select(readable, [self.requests] if writing else [], [], left)

    def drain(self) -> None:
        """Take what the program has printed."""
        while self.output >= 0:
            try:
                chunk = os.read(self.output, 1 << 16)
            except BlockingIOError:
                return
            if not chunk:
                os.close(self.output)
                self.output = -1
            self.say(chunk)
            if self.written > FLOOD:
                raise Over("output", "")

    def say(self, data: bytes) -> None:
        """Add to the output."""
        self.written += len(data)
        self.tail = (self.tail + data)[-TAIL:]

    def _ended(self) -> Over:
        with contextlib.suppress(Over):
            self.drain()
        waited = 0
        while not waited and time.monotonic() < self.deadline:
            waited, status = os.waitpid(self.pid, os.WNOHANG)
            if waited and os.WIFSIGNALED(status):
                number = os.WTERMSIG(status)
                name = signal.Signals(number).name
                late = number in (signal.SIGXCPU, signal.SIGALRM)
                return Over(
                    "timeout" if late else "killed" if number == signal.SIGKILL else "crash", f"ended by {name}"
                )
            if waited:
                return Over("exit", f"ended with status {os.waitstatus_to_exitcode(status)} before its tests")
            time.sleep(0.001)
        return Over("crash", "the program has closed its pipes")

    def resolve(self, x: dict[str, Any]) -> Any:
        """What an object that could not be copied is here."""
        if "builtin" in x and isinstance(getattr(builtins, x["builtin"]), type):
            return getattr(builtins, x["builtin"])
        number, module = x["ref"]
        if type(number) is not int:
            raise ValueError("no object")
        return Remote(self, number, module if isinstance(module, str) else None)


def refer(x: Any) -> Any:
    """How an object of the judge is written for the program."""
    if type(x) is Remote:
        return {"ref": [object.__getattribute__(x, "_number"), None]}
    return wire.ship(x)


class Remote:
    """An object of the program that is not plain data.

    It equals no plain data, is less or more than nothing, and cannot be reckoned with: whatever its methods claim
    becomes something that a test can accept only as plain data, which the program had to get right.
    """

    __slots__ = ("_link", "_module", "_number")

    def __init__(self, link: Link, number: int, module: str | None) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Remote.__slots__:
            raise AttributeError(name)
        return self._link.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self, name, value)

    def __call__(self, *given: Any, **keywords: Any) -> Any:
        """Call it over there."""
        return self._link.ask("call", self, *given, **keywords)

    def __eq__(self, other: object) -> bool:
        if type(other) is not Remote:
            return False
        return self._number == other._number or self._link.ask("operator", "eq", self, other) is True

    def __hash__(self) -> int:
        return hash(self._number)

    def __iter__(self) -> Any:
        iterator = self._link.ask("operator", "iter", self)
        if type(iterator) is not Remote:
            raise TypeError("not iterable")
        count = 1
        while True:
            values = self._link.ask("take", iterator, count)
            if type(values) is not list:
                raise TypeError("not iterable")
            yield from values
            if len(values) < count:
                return
            count = min(2 * count, 1024)

    def __bool__(self) -> bool:
        return self._link.ask("operator", "truth", self) is True

    def __len__(self) -> int:
        return self._link.ask("operator", "len", self)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("operator", "getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._link.ask("operator", "setitem", self, key, value)

    def __contains__(self, x: Any) -> bool:
        return self._link.ask("operator", "contains", self, x) is True

    def __instancecheck__(self, x: Any) -> bool:
        return self._link.ask("operator", "isinstance", x, self) is True

    def __str__(self) -> str:
        return self._link.ask("operator", "str", self)

    def __repr__(self) -> str:
        return self._link.ask("operator", "repr", self)

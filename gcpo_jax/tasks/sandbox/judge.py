"""The process that judges one program: it holds the tests and the way to the verdict, and runs nothing but tests.

It meets the program only through `remote.Link`: the program sees the arguments of a call and never what is expected.
"""

import ast
import base64
import builtins
import contextlib
import copy
import importlib
import json
import marshal
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from . import split, wire
from .remote import Link, Over, Remote


class Judge:
    """One program's trial."""

    def __init__(self, job: dict[str, Any], link: Link) -> None:
        self.job, self.link = job, link
        self.held: dict[int, bool] = {}  # assert by number: whether it has held each time
        self.total = 0
        self.reason = ""

    def verdict(self) -> dict[str, Any]:
        """Run the tests and say how it went."""
        began = time.monotonic()
        try:
            (self.apart if self.job["tests"] else self.together)()
        except Over as over:
            self.fail(*over.args)
        except MemoryError:
            self.fail("memory", self.link.trace or "the values are too large to be compared")
        except BaseException as error:  # the tests may raise anything
            self.fail("failed", self.link.trace if self.link.trace else f"{type(error).__name__}: {error!s:.500}")
        if not self.reason and self.job["tests"] and not self.held:
            self.fail("failed", "no test was reached")
        try:
            self.link.drain()
        except Over as over:
            self.fail(*over.args)
        if self.reason == "failed" and self.link.memory:
            self.reason = "memory"
        good = sum(self.held.values())
        return {
            "nonce": self.job["nonce"],
            "reason": self.reason or "passed",
            "seconds": time.monotonic() - began,
            "output": self.link.tail.decode(errors="replace"),
            "tests_passed": good,
            "tests": max(self.total, len(self.held)) if self.reason else len(self.held),
        }

    def fail(self, reason: str, text: str) -> None:
        """The first failure gives the reason."""
        if not self.reason:
            self.reason = reason
            self.link.say(b"\n" * bool(self.link.tail) + text.encode(errors="replace"))

    def apart(self) -> None:
        """Tests that are given apart from the program, and trusted: real built-ins and modules, run in one piece."""
        scope: dict[str, Any] = {"__name__": "__tests__"}
        exec(compile(self.job["helpers"], "<helpers>", "exec", dont_inherit=True), scope)
        tree = ast.parse(self.job["tests"])
        self.total = self.counted(tree)
        self.link.ask("source", self.job["code"])
        own = set(scope) | split.bound(tree.body)
        wanted = {name for name in split.names([tree]) - own - set(vars(builtins)) if not name.startswith("__")}
        scope |= self.fetch(wanted | split.shadowing(tree.body, split.bound(tree.body)), importlib.import_module)
        exec(compile(tree, "<tests>", "exec", dont_inherit=True), scope | self.reports())

    def together(self) -> None:
        """A program that contains its tests."""
        tree = ast.parse(self.job["code"])
        futures = [s for s in tree.body if isinstance(s, ast.ImportFrom) and s.module == "__future__"]
        parts = split.parts(tree)
        judged = [ast.Module(copy.deepcopy(part.body) if part.definition else part.body, []) for part in parts]
        for part, module in zip(parts, judged, strict=True):
            if part.test or part.definition:
                self.total = self.counted(module, self.total)
        definitions: dict[str, list[ast.stmt]] = {}
        for part, module in zip(parts, judged, strict=True):
            if part.test:
                self.run(module.body, definitions)
                continue
            for name in split.bound(part.body) & set(definitions):
                del definitions[name]
            if part.definition:
                definitions[part.definition] = module.body
            body = [*(s for s in futures if s not in part.body), *part.body]
            code = compile(ast.Module(body, []), "<program>", "exec", dont_inherit=True)
            self.link.ask("code", base64.b64encode(marshal.dumps(code)).decode())

    def run(self, body: list[ast.stmt], definitions: dict[str, list[ast.stmt]]) -> None:
        """A test of a program that is not trusted, with safe built-ins only."""
        everything = [*(s for made in definitions.values() for s in made), *body]
        known = set(definitions) | split.SAFE | split.ERRORS
        names, mine = split.names(everything) - known, split.bound(body)
        wanted = {name for name in names | mine if not name.startswith("__")} | split.shadowing(everything, definitions)
        wanted = {f"!{name}" if name in names and hasattr(builtins, name) else name for name in wanted}
        scope: dict[str, Any] = {name: getattr(builtins, name) for name in split.SAFE | split.ERRORS}
        scope |= {
            "__name__": "__main__",
            "__builtins__": {"__import__": split.safe_module},
            "print": self.print,
            "type": _type,
        }
        scope |= self.fetch(wanted, split.safe_module) | self.reports()
        exec(compile(ast.Module(everything, []), "<tests>", "exec", dont_inherit=True), scope)
        for name in mine & set(scope):
            with contextlib.suppress(TypeError):  # a function of the tests, say: the program goes without it
                self.link.ask("bind", name, scope[name])

    def print(self, *values: Any, sep: str = " ", end: str = "\n", **_: Any) -> None:
        """The tests' print, which adds to the program's output."""
        self.link.say((sep.join(str(value) for value in values) + end).encode(errors="replace"))

    def fetch(self, wanted: set[str], load: Callable[[str], Any]) -> dict[str, Any]:
        """The program's objects of these names (with a ! before them, also of its built-ins).

        A module of the standard library is the judge's own copy, where `load` has it.
        """
        found = self.link.ask("names", *sorted(wanted))
        if type(found) is not dict or not set(found) <= {name.removeprefix("!") for name in wanted}:
            raise Over("failed", "the program's process answered with other names than were asked for")
        for name, x in found.items():
            module = object.__getattribute__(x, "_module") if type(x) is Remote else None
            if module == name and name in sys.stdlib_module_names:
                with contextlib.suppress(ImportError):
                    found[name] = load(name)
        return found

    def counted(self, tree: ast.Module, first: int = 0) -> int:
        """Replace the asserts of a tree by reports; returns the next number."""
        counter = split.Counted(first)
        tree.body = [node for s in tree.body for node in _several(counter.visit(s))]
        return counter.total

    def reports(self) -> dict[str, Any]:
        """What the replaced asserts call."""

        def judge(number: int, condition: Any) -> None:
            if condition:
                self.held.setdefault(number, True)
            else:
                failed(number)

        def failed(number: int) -> None:
            self.held[number] = False
            error = sys.exc_info()[1]
            text = self.link.trace or repr(error)[:500] if error else f"test {number + 1} does not hold"
            self.fail("failed", text)
            if not self.job["every"]:
                raise Over("failed", text)

        return {"__judge__": judge, "__failed__": failed, "__Exception__": Exception}


def _several(made: Any) -> list[ast.stmt]:
    return made if isinstance(made, list) else [made]


def _type(x: Any) -> type:
    """`type` of one argument: with three it makes classes."""
    return type(x)


def serve(job_fd: int, link: Link) -> None:
    """Read a job, judge it, write the verdict."""
    received = bytearray()
    while (job := wire.unframe(received)) is None:
        chunk = os.read(job_fd, 1 << 20)
        if not chunk:
            return
        received += chunk
    link.deadline = time.monotonic() + job["timeout"]
    answer = memoryview(json.dumps(Judge(job, link).verdict()).encode())
    while answer:
        answer = answer[os.write(job_fd, answer) :]

"""The process in which the program runs: a loop that does what the judge asks and sends back plain data.

Everything here lies in the hands of the program, which may replace all of it. Nothing depends on that: this process
holds no test, no expected value and no way to the verdict, only a pipe on which it is asked for values.
"""

import base64
import builtins
import importlib
import marshal
import operator
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from . import wire


class Program:
    """The module that the program fills, and the objects of it that the judge knows by number."""

    def __init__(self) -> None:
        self.module = types.ModuleType("__main__")
        self.names = self.module.__dict__
        self.names["__builtins__"] = builtins
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def refer(self, x: Any) -> dict[str, Any]:
        """How `x`, which cannot be copied, is named to the judge; it is kept, so that its number stays its own."""
        if isinstance(x, type) and getattr(builtins, x.__name__, None) is x:
            return {"builtin": x.__name__}
        if id(x) not in self.numbers:
            self.numbers[id(x)] = len(self.objects)
            self.objects.append(x)
        module = x.__name__ if isinstance(x, types.ModuleType) else None
        return {"ref": [self.numbers[id(x)], module]}

    def resolve(self, x: dict[str, Any]) -> Any:
        """The object that the judge means."""
        if "ref" in x:
            return self.objects[x["ref"][0]]
        if "builtin" in x:
            return getattr(builtins, x["builtin"])
        if "member" in x:
            return getattr(importlib.import_module(x["member"][0]), x["member"][1])
        return types.FunctionType(marshal.loads(base64.b64decode(x["code"])), self.names)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; what goes wrong in the program is an answer too."""
        try:
            given = [wire.decode(x, self.resolve) for x in request.get("with", [])]
            keywords = {key: wire.decode(x, self.resolve) for key, x in request.get("keywords", {}).items()}
            value = getattr(self, "do_" + request["do"])(*given, **keywords)
            return {"value": wire.encode(value, self.refer)}
        except BaseException as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != "<program>":
                trace = trace.tb_next
            text = "".join(traceback.format_exception(type(error), error, trace or error.__traceback__, limit=-6))
            return {"error": [type(error).__name__, str(error)[:500], text[-3000:]]}

    def do_source(self, source: str) -> None:
        """Run source text in the module."""
        exec(compile(source, "<program>", "exec", dont_inherit=True), self.names)

    def do_code(self, code: str) -> None:
        """Run compiled statements in the module."""
        exec(marshal.loads(base64.b64decode(code)), self.names)

    def do_names(self, *names: str) -> dict[str, Any]:
        """Those of `names` that the module has, or, for one with a ! before it, the built-ins have."""
        every = vars(builtins) | self.names
        plain = {name: self.names[name] for name in names if name in self.names}
        return plain | {name[1:]: every[name[1:]] for name in names if name[0] == "!" and name[1:] in every}

    def do_bind(self, name: str, value: Any) -> None:
        """Set a name of the module."""
        self.names[name] = value

    def do_call(self, function: Callable[..., Any], *given: Any, **keywords: Any) -> Any:
        """Call a function or class."""
        return function(*given, **keywords)

    def do_set(self, x: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        setattr(x, name, value)

    def do_get(self, x: Any, name: str) -> Any:
        """An attribute."""
        return getattr(x, name)

    def do_take(self, iterator: Any, count: int) -> list[Any]:
        """Up to `count` values of an iterator."""
        return [x for _, x in zip(range(count), iterator, strict=False)]

    def do_operator(self, name: str, *given: Any) -> Any:
        """An operator or built-in function by name."""
        return getattr(operator if hasattr(operator, name) else builtins, name)(*given)


def serve(requests: int, answers: int) -> None:
    """Answer until the judge hangs up."""
    program = Program()
    sys.modules["__main__"] = program.module
    sys.setrecursionlimit(1000 + 20)
    received = bytearray()
    while True:
        while (request := wire.unframe(received)) is None:
            chunk = os.read(requests, 1 << 16)
            if not chunk:
                os._exit(0)
            received += chunk
        answer = program.answer(request)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:  # closed or replaced by the program: its output is its own affair
            pass
        try:
            data = memoryview(wire.frame(answer))
        except (ValueError, RecursionError) as error:
            data = memoryview(wire.frame({"error": ["ValueError", str(error), str(error)]}))
        while data:
            data = data[os.write(answers, data) :]

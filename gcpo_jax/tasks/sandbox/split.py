"""Which statements of a program are its tests, and tests made countable.

A program whose tests are not named apart is cut at its top level: statements that assert something go to the judge, all
others to the process of the program. As the program's author may have written "tests" too, the judge runs such a
statement only where it keeps to a part of Python from which no object but plain data, functions of the statement itself
and remote ones can be reached; a test outside of that part stays with the program, whose word must then be taken for
it.
"""

import ast
import builtins
import dataclasses
import importlib
import types
from collections.abc import Iterable
from typing import Any

SAFE_TEXT = """
abs all any bin bool bytearray bytes callable chr complex dict divmod enumerate filter float format frozenset hash hex
int isinstance issubclass iter len list map max min next oct ord pow print range repr reversed round set slice sorted
str sum tuple type zip
"""
SAFE = frozenset(SAFE_TEXT.split())
ERRORS = frozenset(name for name, x in vars(builtins).items() if isinstance(x, type) and issubclass(x, Exception))
# What of a module the tests of a program that is not trusted may use (None: all that is public).
SAFE_MODULES: dict[str, list[str] | None] = {
    "math": None,
    "cmath": None,
    "copy": ["copy", "deepcopy"],
    "random": ["Random", "choice", "choices", "randint", "random", "randrange", "sample", "seed", "shuffle", "uniform"],
    "string": [
        "ascii_letters",
        "ascii_lowercase",
        "ascii_uppercase",
        "digits",
        "hexdigits",
        "punctuation",
        "whitespace",
    ],
}
STATEMENTS = (
    ast.Assert,
    ast.Expr,
    ast.If,
    ast.For,
    ast.While,
    ast.Try,
    ast.FunctionDef,
    ast.Return,
    ast.Pass,
    ast.Break,
)
STATEMENTS += (ast.Continue, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete, ast.Raise)
# Attributes that lead from data to the interpreter: frames and code of generators, templates that follow attributes.
FORBIDDEN_ATTRIBUTES = ("_", "gi_", "cr_", "ag_", "f_", "tb_", "co_", "format", "mro", "with_traceback")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Consecutive statements. `test`: the judge runs them; `definition`: a function for it and the program."""

    body: list[ast.stmt]
    test: bool = False
    definition: str = ""


def safe_module(name: str, *_: object) -> Any:
    """A module that holds what SAFE_MODULES says; takes the place of `__import__`.

    Raises:
      ImportError: for any other.
    """
    if name not in SAFE_MODULES:
        raise ImportError(f"{name} cannot be imported by the tests of a program that is not trusted")
    module = importlib.import_module(name)
    public = SAFE_MODULES[name] or [member for member in dir(module) if not member.startswith("_")]
    return types.SimpleNamespace(**{member: getattr(module, member) for member in public})


def names(nodes: Iterable[ast.AST], context: type[ast.expr_context] = ast.Load) -> set[str]:
    """Names that occur, read (or written)."""
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def bound(body: Iterable[ast.stmt]) -> set[str]:
    """Names that a module with these statements gets, those inside functions and classes left out."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            waiting += node.decorator_list
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler):
            found |= {node.name} if node.name else set()
            waiting += node.body
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                found.add(node.id)
            waiting += ast.iter_child_nodes(node)
    return found


def shadowing(body: Iterable[ast.stmt], tests: Iterable[str]) -> set[str]:
    """Built-in names by which the tests can only mean the program's own: `sum(10, 15) == 6`, `check(sum)`.

    Otherwise built-ins are the real ones: a program's own `sorted` or `abs` has no say in how its results are compared.
    """
    calls = [n for node in body for n in ast.walk(node) if isinstance(n, ast.Call)]
    called = {n.func.id for n in calls if isinstance(n.func, ast.Name) and not n.func.id.startswith("__")}
    given = {
        argument.id
        for n in calls
        if isinstance(n.func, ast.Name) and n.func.id in tests
        for argument in n.args
        if isinstance(argument, ast.Name)
    }
    own = called - set(vars(builtins))
    return {name for name in given | (set() if own else called) if hasattr(builtins, name)}


def asserts(node: ast.AST) -> bool:
    """Whether an assert statement occurs in it."""
    return any(isinstance(n, ast.Assert) for n in ast.walk(node))


def plain(node: ast.AST) -> bool:
    """Whether a statement keeps to what the judge may run for a program that is not trusted."""
    for n in ast.walk(node):
        if isinstance(n, ast.Import | ast.ImportFrom):
            modules = [n.module] if isinstance(n, ast.ImportFrom) else [alias.name for alias in n.names]
            if set(modules) <= set(SAFE_MODULES) and all(alias.name != "*" for alias in n.names):
                continue
        if isinstance(n, ast.stmt) and not isinstance(n, STATEMENTS):
            return False
        if isinstance(n, ast.Await | ast.Yield | ast.YieldFrom | ast.MatchAs):
            return False
        if isinstance(n, ast.FunctionDef) and (n.decorator_list or n.name.startswith("_")):
            return False
        if isinstance(n, ast.comprehension) and n.is_async:
            return False
        if isinstance(n, ast.Name) and n.id.startswith("__") and n.id != "__name__":
            return False
        if isinstance(n, ast.arg) and n.arg.startswith("__"):
            return False
        if isinstance(n, ast.Attribute) and n.attr.startswith(FORBIDDEN_ATTRIBUTES):
            return False
        if isinstance(n, ast.ExceptHandler) and not (n.type and names([n.type]) <= ERRORS and not _attributes(n.type)):
            return False
    return True


def _attributes(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Attribute | ast.Call | ast.Subscript) for n in ast.walk(node))


def parts(tree: ast.Module) -> list[Part]:
    """A program's statements in order, each for the process that runs it.

    A test is a statement with an assert in it (also inside a loop, condition or try), or one that calls a function
    which is named `check` or `test...` and asserts.
    """
    found: list[Part] = []
    tests: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and (statement.name == "check" or statement.name.startswith("test")):
            if asserts(statement) and plain(statement):
                tests.add(statement.name)
                found.append(Part([statement], definition=statement.name))
                continue
            tests.discard(statement.name)
        calls = {n.func.id for n in ast.walk(statement) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        kind = isinstance(statement, ast.Assert | ast.Expr | ast.If | ast.For | ast.While | ast.Try)
        harmless = not bound([statement]) & (SAFE | ERRORS | tests)
        if kind and (asserts(statement) or calls & tests) and harmless and plain(statement):
            found.append(Part([statement], test=True))
        elif found and not found[-1].test and not found[-1].definition:
            found[-1].body.append(statement)
        else:
            found.append(Part([statement]))
    return found


class Counted(ast.NodeTransformer):
    """Asserts made into reports: `__judge__(number, condition)`, an exception on the way being a report too.

    Inside a `try` an assert stays what it is, because the tests may mean to catch it, and is reported once it has held.
    Asserts of a constant are no tests. `total` counts the others.
    """

    def __init__(self, first: int = 0) -> None:
        self.total = first
        self.within = 0

    def visit_Try(self, node: ast.Try) -> ast.Try:
        """Asserts within are native."""
        self.within += 1
        self.generic_visit(node)
        self.within -= 1
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.Assert | list[ast.stmt]:
        """Replaced by reports."""
        if isinstance(node.test, ast.Constant):
            return node
        number, self.total = ast.Constant(self.total), self.total + 1

        def report(name: str, *given: ast.expr) -> ast.Expr:
            return ast.Expr(ast.Call(ast.Name(name, ast.Load()), [number, *given], []))

        if self.within:
            made: list[ast.stmt] = [node, report("__judge__", ast.Constant(True))]
        else:
            handler = ast.ExceptHandler(ast.Name("__Exception__", ast.Load()), None, [report("__failed__")])
            made = [ast.Try([report("__judge__", node.test)], [handler], [], [])]
        return [ast.fix_missing_locations(ast.copy_location(statement, node)) for statement in made]

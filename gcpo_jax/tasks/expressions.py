r"""A small reader of scalar LaTeX expressions, exact on rationals and numeric elsewhere. No text is ever evaluated as code.

`parse` gives a tree of tuples; `exact` its rational value where it has one; `numeric` its complex value at given values of
its symbols, over cmath or mpmath. Trees are bounded in size and depth, and integers in bits, so each call is quick.
"""

import cmath
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

MAX_LENGTH, MAX_DEPTH, MAX_BITS = 1500, 24, 60_000


class Unreadable(ValueError):
    """Not an expression that this reader knows."""


class Irrational(ValueError):
    """An expression without an exact rational value here: symbols, surds, functions."""


class TooLarge(ValueError):
    """A number too large to be written out, or an expression too long or too deep to be read."""


_TOKEN = re.compile(
    r"\s*(\d+(?:\.\d*)?[eE][+-]?\d+(?![\w.])|\.?\d+(?:\.\d*)?(?:[eE][+-]?\d+(?!\w))?|\\[A-Za-z]+|\\[{}|]|[A-Za-z]'*"
    r"|[-+*/^_!|(){}\[\],%=:])"
)
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi"
    " psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell odot R aleph triangle angle".split()
)
_CALLS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log exp abs floor ceil".split()
)
_ACCENTS = frozenset("vec hat bar dot ddot tilde overline mathcal mathbb prime widehat widetilde".split())
_OPEN = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
_STOP = frozenset([")", "]", "}", r"\}", r"\rfloor", r"\rceil", ",", "+", "-", "*", "/", r"\cdot", r"\times", "=", ":", "%"])


class _Reader:
    def __init__(self, text: str):
        if len(text) > MAX_LENGTH:
            raise TooLarge("too long")
        self.tokens, at = [], 0
        text = text.strip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise Unreadable(text[at : at + 10])
            self.tokens.append(found[1])
            at = found.end()
        self.at, self.depth, self.bars = 0, 0, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.next
        if not token or (expected is not None and token != expected):
            raise Unreadable(f"{token!r} where {expected!r} was expected")
        self.at += 1
        return token

    def sum(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("too deep")
        terms = []
        while True:
            sign = 1
            while self.next in ("+", "-"):
                sign = -sign if self.take() == "-" else sign
            term = self.product()
            terms.append(term if sign > 0 else ("neg", term))
            if self.next not in ("+", "-"):
                break
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self) -> tuple:
        value, bare = self.mixed()
        while self.next:
            if self.next in ("*", r"\cdot", r"\times"):
                self.take()
                factor, bare = self.signed(), False
                value = ("mul", value, factor)
            elif self.next == "/":
                self.take()
                value, bare = ("div", value, self.signed()), False
            elif self.next in _STOP or (self.next == "|" and self.bars):
                break
            else:
                digit = self.next[0].isdigit() or self.next[0] == "."
                if digit and bare:
                    raise Unreadable("two numbers side by side")
                factor, bare = self.mixed() if digit else (self.power(), False)
                value = ("mul", value, factor)
        return value

    def signed(self) -> tuple:
        if self.next in ("-", "+"):
            return ("neg", self.signed()) if self.take() == "-" else self.signed()
        return self.power()

    def mixed(self) -> tuple[tuple, bool]:
        r"""A factor, and whether it is a bare number; 1\frac{3}{4} is a sum."""
        start, whole = self.at, self.next
        value = self.power()
        bare = self.at == start + 1 and (whole[0].isdigit() or whole[0] == ".")
        if bare and whole.isdigit() and self.next == r"\frac":
            mark = self.at
            part = self.power()
            if part[0] == "div" and all(p[0] == "num" and p[1].denominator == 1 for p in part[1:]) and part[1][1] < part[2][1]:
                return ("add", value, part), False
            self.at = mark
        return value, bare

    def power(self) -> tuple:
        value = self.base()
        while self.next in ("^", "!", "%"):
            token = self.take()
            if token == "!":
                value = ("call", "factorial", value)
            elif token == "%":
                value = ("div", value, ("num", Fraction(100)))
            elif self.next == "{" and self.tokens[self.at + 1 : self.at + 3] == [r"\circ", "}"]:
                self.at += 3
                value = ("mul", value, ("deg",))
            elif self.next == "{" and all(t == r"\prime" for t in self.tokens[self.at + 1 : self.at + 2]):
                self.argument_text()
                value = ("sym", _name(value) + "'")
            else:
                value = ("pow", value, self.argument())
        return value

    def argument(self) -> tuple:
        """What TeX takes as one argument: a group, or one token, of a number its first digit only."""
        if self.next == "{":
            return self.group("{")
        if self.next == "-":
            self.take()
            return ("neg", self.argument())
        token = self.next
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.base()

    def argument_text(self) -> str:
        if self.next != "{":
            return self.take()
        depth, start = 0, self.at
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return "".join(self.tokens[start + 1 : self.at - 1])

    def group(self, bracket: str) -> tuple:
        self.take(bracket)
        inside_bars, self.bars = self.bars, int(bracket == "|")
        value = self.sum()
        self.take(_OPEN[bracket])
        self.bars = inside_bars
        return value

    def base(self) -> tuple:
        token = self.next
        if not token:
            raise Unreadable("ends early")
        if token[0].isdigit() or token[0] == ".":
            self.take()
            return ("num", _number(token))
        if token in ("(", "[", "{"):
            return self.group(token)
        if token in ("|", r"\lfloor", r"\lceil"):
            name = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}[token]
            return ("call", name, self.group(token))
        if token[0].isalpha():
            self.take()
            return self.symbol(token)
        if token[0] == "\\":
            self.take()
            return self.command(token[1:])
        raise Unreadable(token)

    def symbol(self, name: str) -> tuple:
        if self.next == "_":
            self.take()
            name += "_" + self.argument_text()
        while self.next == "^" and self.tokens[self.at + 1 : self.at + 3] == ["{", r"\prime"]:
            self.take()
            name += "'" * self.argument_text().count("prime")
        inside = self.tokens[self.at : self.at + 3]
        if len(inside) == 3 and inside[0] == "(" and inside[2] == ")" and inside[1][0].isdigit():
            self.at += 3  # I(0), f(2): a function's value, not a product
            return ("sym", f"{name}({inside[1]})")
        return {"e": ("e",), "i": ("i",)}.get(name, ("sym", name))

    def command(self, name: str) -> tuple:
        if name == "frac":
            top = self.argument()
            return ("div", top, self.argument())
        if name == "binom":
            top = self.argument()
            return ("call2", "binom", top, self.argument())
        if name == "sqrt":
            if self.next == "[":
                index = self.group("[")
                return ("pow", self.argument(), ("div", ("num", Fraction(1)), index))
            if self.next == "(":
                return ("sqrt", self.group("("))
            return ("sqrt", self.argument())
        if name == "pi":
            return ("pi",)
        if name in _CALLS:
            return self.call(name)
        if name in _ACCENTS:
            return self.symbol(rf"\{name} {self.argument_text()}")
        if name in _GREEK:
            return self.symbol("\\" + name)
        raise Unreadable(name)

    def call(self, name: str) -> tuple:
        base = power = None
        while self.next in ("^", "_"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.argument()
        if power == ("neg", ("num", Fraction(1))):
            if name not in ("sin", "cos", "tan"):
                raise Unreadable("inverse or reciprocal")
            name, power = "arc" + name, None
        if self.next in ("(", "{", "[", "|"):
            value = self.power() if self.next == "|" else self.group(self.next)
        else:  # \sin 2t: the factors up to the next sign, operator or function
            value = self.signed()
            while self.next and self.next not in _STOP and self.next[1:] not in _CALLS and not (self.next == "|" and self.bars):
                value = ("mul", value, self.power())
        value = ("call", name, value)
        if base is not None:
            if name != "log":
                raise Unreadable("a subscript on a function")
            value = ("div", ("call", "ln", value[2]), ("call", "ln", base))
        return value if power is None else ("pow", value, power)


def _name(value: tuple) -> str:
    if value[0] != "sym":
        raise Unreadable("a prime on a value")
    return value[1]


def _number(token: str) -> Fraction:
    exponent = re.search(r"[eE]([+-]?\d+)$", token)
    if len(token) > 400 or (exponent and len(exponent[1]) > 4):
        raise TooLarge(token[:20])
    mantissa = token[: exponent.start()] if exponent else token
    value = Fraction(("0" + mantissa).removesuffix("."))
    return value * Fraction(10) ** int(exponent[1]) if exponent else value


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> tuple:
    """The tree of a tidy expression.

    Raises:
      Unreadable: where it is not one expression of the kinds above.
      TooLarge: where it is too long or too deep, or holds a number of thousands of digits.
    """
    reader = _Reader(text)
    value = reader.sum()
    if reader.next:
        raise Unreadable(reader.next)
    return value


@functools.lru_cache(maxsize=4096)
def symbols(tree: tuple) -> frozenset[str]:
    """The names of the free symbols of a tree."""
    if tree[0] == "sym":
        return frozenset([tree[1]])
    return frozenset().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))


def has(tree: tuple, *kinds: str) -> bool:
    """Whether a node of one of these kinds occurs."""
    return tree[0] in kinds or any(has(part, *kinds) for part in tree[1:] if isinstance(part, tuple))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLarge("a number of thousands of digits")
    return value


def exact(tree: tuple) -> Fraction:
    """The rational value of a tree.

    Raises:
      Irrational: where it has none that rational arithmetic finds.
      TooLarge: where it has too many digits.
      ZeroDivisionError: as the name says.
    """
    kind, *parts = tree
    if kind == "num":
        return parts[0]
    if kind not in ("neg", "add", "mul", "div", "pow", "sqrt", "call", "call2"):
        raise Irrational(kind)
    values = [exact(part) for part in parts if isinstance(part, tuple)]
    if kind == "neg":
        return -values[0]
    if kind == "add":
        return _bounded(sum(values, Fraction(0)))
    if kind == "mul":
        return _bounded(values[0] * values[1])
    if kind == "div":
        return _bounded(values[0] / values[1])
    if kind == "pow":
        return _exact_power(*values)
    if kind == "sqrt":
        return _exact_power(values[0], Fraction(1, 2))
    return _exact_call(parts[0], values)


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 2 and base >= 0:
        roots = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
        if roots * roots != base:
            raise Irrational("a surd")
        base, exponent = roots, exponent * 2
    if exponent.denominator != 1:
        raise Irrational("a root")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base and bits * abs(exponent) > MAX_BITS:
        raise TooLarge("a power of thousands of digits")
    if abs(exponent) > 10**9:
        exponent = exponent % 2
    return base ** int(exponent)


def _exact_call(name: str, values: list[Fraction]) -> Fraction:
    if name == "abs":
        return abs(values[0])
    if name in ("floor", "ceil"):
        return Fraction(math.floor(values[0]) if name == "floor" else math.ceil(values[0]))
    if name == "factorial" and values[0].denominator == 1 and values[0] >= 0:
        if values[0] > 2500:
            raise TooLarge("a factorial")
        return Fraction(math.factorial(int(values[0])))
    if name == "binom" and all(v.denominator == 1 and v >= 0 for v in values):
        if values[0] > 5000:
            raise TooLarge("a binomial coefficient")
        return Fraction(math.comb(int(values[0]), int(values[1])))
    raise Irrational(name)


@dataclasses.dataclass
class Field:
    """Where `numeric` computes: functions by name (cmath's or mpmath's), and how a fraction enters.

    What sums lose is remembered: their largest term, and its largest ratio to the sum (cancellation) or to a smaller term.
    """

    functions: Any
    number: Callable[[Fraction], Any]
    largest: Any = 0.0
    loss: Any = 1.0

    def sum(self, terms: list[Any]) -> Any:
        """The sum of the terms."""
        total, sizes = sum(terms[1:], terms[0]), [abs(t) for t in terms if t]
        if sizes:
            self.largest = max(self.largest, max(sizes))
            self.loss = max(self.loss, max(sizes) / min(*sizes, abs(total)) if total else math.inf)
        return total


def floats() -> Field:
    """Double precision complex numbers."""
    return Field(cmath, lambda value: complex(float(value)))


_RECIPROCAL = {"cot": "tan", "sec": "cos", "csc": "sin"}
_RENAMED = {"ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}


def numeric(tree: tuple, at: Mapping[str, Any], field: Field) -> Any:
    """The complex value of a tree with its symbols set to `at`.

    Raises:
      ArithmeticError, ValueError: where it has none, or is too large.
    """
    kind, *parts = tree
    if kind == "num":
        return field.number(parts[0])
    if kind == "sym":
        return at[parts[0]]
    if kind in ("pi", "e", "deg"):
        pi = field.functions.pi
        return {"pi": pi, "e": field.functions.exp(1), "deg": pi / 180}[kind]
    if kind == "i":
        return 1j
    values = [numeric(part, at, field) for part in parts if isinstance(part, tuple)]
    if kind == "neg":
        return -values[0]
    if kind == "add":
        return field.sum(values)
    if kind == "mul":
        return values[0] * values[1]
    if kind == "div":
        return values[0] / values[1]
    if kind == "sqrt":
        return field.functions.sqrt(values[0])
    if kind == "pow":
        return _power(tree, values, field)
    return _call(tree, parts[0], values, field)


def _power(tree: tuple, values: list[Any], field: Field) -> Any:
    base, exponent = values
    if abs(exponent) * math.log2(abs(base) + 2) > 900:
        raise TooLarge("a power")
    if base == 0:
        return base if abs(exponent) else base + 1
    # A real cube root of a negative number is what is meant by the radical sign.
    top = tree[2]
    if top[0] == "div" and base.imag == 0 and base.real < 0 and top[2][0] == "num" and top[2][1] % 2 == 1:
        return -((-base) ** exponent)
    return base**exponent


def _call(tree: tuple, name: str, values: list[Any], field: Field) -> Any:
    functions, value = field.functions, values[0]
    if name in _RECIPROCAL:
        return 1 / getattr(functions, _RECIPROCAL[name])(value)
    if name == "abs":
        return complex(abs(value)) if functions is cmath else abs(value)
    if name in ("floor", "ceil"):
        return complex(getattr(math, name)(value.real))
    if name in ("factorial", "binom"):
        whole = [Fraction(round(v.real)) for v in values]
        if any(abs(v - int(w)) > 1e-9 for v, w in zip(values, whole, strict=True)):
            raise Irrational(name)
        return field.number(_exact_call(name, whole))
    if name == "exp" and abs(value) > 600:
        raise TooLarge("an exponential")
    return getattr(functions, _RENAMED.get(name, name))(value)

"""The values of expressions.py's trees: exact where rational arithmetic finds one, else numeric, over cmath or mpmath.

Integers are bounded in bits and functions in size, so that no call is slow.
"""

import cmath
import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from gcpo_jax.grading.expressions import TooLarge

MAX_BITS, MAX_CHOSEN = 60_000, 64


class Irrational(ValueError):
    """An expression without an exact rational value here: symbols, surds, functions."""


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

    What sums lose is remembered: their largest term, and its ratio to the sum (cancellation) or to a smaller term.
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
        return 0 - values[0]  # -(1+0j) is -1-0j, on the other side of the root's branch cut
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
    if name == "binom" and abs(values[1] - round(values[1].real)) < 1e-9 and 0 <= values[1].real < MAX_CHOSEN:
        product = field.number(Fraction(1))
        for k in range(round(values[1].real)):
            product = product * (value - k) / (k + 1)
        return product
    if name in ("factorial", "binom"):
        whole = [Fraction(round(v.real)) for v in values]
        if any(abs(v - int(w)) > 1e-9 for v, w in zip(values, whole, strict=True)):
            raise Irrational(name)
        return field.number(_exact_call(name, whole))
    if name == "exp" and abs(value) > 600:
        raise TooLarge("an exponential")
    return getattr(functions, _RENAMED.get(name, name))(value)

"""Whether two scalar expressions are equal: as text, as exact rationals, to the digits given, or at fixed points.

What none of these settles is left to `symbolic(gold, answer)`, which is passed in; without it, Undecided is raised.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from gcpo_jax.grading import expressions, values
from gcpo_jax.grading.notation import compact

EXACT_DIGITS, MANY_DIGITS, MAX_SYMBOLIC = 9, 20, 300
# sympy writes such numbers out while it reads them; the time limit would stop it, after seconds.
_TOWER = re.compile(r"\d{3,}\s*!|!\s*!|\^\{?\s*\d{5,}|\^\s*\{[^{}]{0,40}\^|(?:[({|]\s*){20}")

Symbolic = Callable[[str, str], bool]


class Undecided(Exception):
    """The quick rules do not settle it."""


def tree_of(text: str) -> tuple | None:
    """The expression that a text is, or None."""
    try:
        return expressions.parse(text)
    except (expressions.Unreadable, expressions.TooLarge):
        return None


def _point(names: frozenset[str], k: int, spread_of: int = 9) -> dict[str, complex]:
    """A value for each name, the same in every process: 0, 1 positive reals, 2, 3 whole numbers, 4 negative reals."""
    spread = {n: zlib.crc32(f"{n}/{k}".encode()) for n in names}
    if k in (2, 3):
        return {n: complex(3 + s % spread_of) for n, s in spread.items()}
    return {n: complex((0.3 + 2.4 * s / 2**32) * (-1 if k == 4 else 1)) for n, s in spread.items()}


def _at(tree: tuple, point: Mapping[str, complex], field: values.Field) -> Any:
    """A complex number of the field's kind, or None where the tree has no value there."""
    try:
        value = values.numeric(tree, point, field)
    except (ArithmeticError, ValueError):
        return None
    return value if abs(value) < 1e300 else None


def proportional(gold: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """Whether two equations say the same: their left minus right sides have a constant ratio."""
    trees = [[tree_of(side) for side in sides] for sides in (gold, answer)]
    if any(t is None for side in trees for t in side):
        return False
    ours, theirs = (("add", left, ("neg", right)) for left, right in trees)
    names = expressions.symbols(ours)
    if not names or names != expressions.symbols(theirs):
        return False
    ratios = []
    for k in range(4):
        point, field = _point(names, k), values.floats()
        g, a = _at(ours, point, field), _at(theirs, point, field)
        if g is not None and a is not None and min(abs(g), abs(a)) > 1e-9:
            ratios.append(g / a)
    return len(ratios) >= 3 and all(abs(r - ratios[0]) < 1e-9 * abs(ratios[0]) for r in ratios)


class _Literal(NamedTuple):
    last_place: Fraction
    digits: int
    scientific: bool


def _literal(text: str) -> _Literal | None:
    """The precision of a number written in decimals or in scientific notation."""
    found = re.fullmatch(
        r"[-+]?(\d*)\.?(\d*)(?:[eE]([-+]?\d{1,4})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?([-+]?\d{1,4})\}?)?",
        text.strip(),
    )
    if not found or not (found[1] or found[2]):
        return None
    power = found[3] or found[4]
    digits = len((found[1] + found[2]).lstrip("0"))
    return _Literal(Fraction(10) ** (int(power or 0) - len(found[2])), digits, power is not None)


def _close(gold: str, answer: str, value: Fraction, other: Fraction) -> bool:
    """Whether the answer is the gold to the digits that are given, and within one percent of it.

    A gold in scientific notation is rounded, so the coarser of the two sets the digits. A gold in decimals is taken as
    rounded where it has three digits or more and is no binary fraction (0.375), and then only a finer answer can match.
    """
    ours, theirs = _literal(gold), _literal(answer)
    if ours is None or value == 0 or (value.denominator == 1 and not ours.scientific):
        return False
    fine = theirs.last_place if theirs else Fraction(0)
    if not ours.scientific:
        binary = value.denominator & (value.denominator - 1) == 0
        if ours.digits < 3 or binary or fine >= ours.last_place:
            return False
    difference, coarse = abs(value - other), max(ours.last_place, fine)
    return difference <= coarse / 2 and difference <= abs(value) / 100


def agrees_with_its_rounding(tree: tuple, rounded: str) -> bool:
    """Whether a number without symbols may be written as this literal: they differ by less than its last place."""
    literal, other = _literal(rounded), tree_of(rounded)
    value = _at(tree, {}, values.floats())
    if literal is None or other is None or value is None:
        return False
    return abs(value - float(values.exact(other))) <= float(literal.last_place)


def same_scalar(gold: str, answer: str, symbolic: Symbolic | None, rounded: bool = True) -> bool:
    """Whether two expressions are equal; rounded: a gold in decimals may be matched by an answer that rounds to it.

    Raises:
      Undecided: where only `symbolic`, which is None, could tell.
    """
    if compact(gold) == compact(answer):
        return True
    try:
        ours, theirs = expressions.parse(gold), expressions.parse(answer)
    except expressions.TooLarge:
        return False
    except expressions.Unreadable:
        return _last_resort(gold, answer, symbolic)
    try:
        exact = [_exact(tree) for tree in (ours, theirs)]
    except (expressions.TooLarge, ArithmeticError):
        return False
    if exact[0] is not None and exact[1] is not None:
        return exact[0] == exact[1] or (rounded and _close(gold, answer, exact[0], exact[1]))
    verdict = compare(ours, theirs, values.floats)
    if verdict is None:
        return _last_resort(gold, answer, symbolic)
    if not verdict and rounded and exact[0] is not None and not expressions.symbols(theirs):
        value = _at(theirs, {}, values.floats())
        if value is not None and abs(value.imag) < 1e-12:
            return _close(gold, answer, exact[0], Fraction(value.real))
    return verdict


def _last_resort(gold: str, answer: str, symbolic: Symbolic | None) -> bool:
    if any((mark in gold) != (mark in answer) for mark in "'?#@&") or r"\ldots" in gold + answer:
        return False  # a grammar may skip what it does not know
    if any(len(text) > MAX_SYMBOLIC or _TOWER.search(text) for text in (gold, answer)):
        return False
    if symbolic is None:
        raise Undecided
    return symbolic(gold, answer)


def _exact(tree: tuple) -> Fraction | None:
    try:
        return values.exact(tree)
    except values.Irrational:
        return None


def compare(
    gold: tuple, answer: tuple, field_of: Callable[[], values.Field], digits: int = 11, precision: int = 14
) -> bool | None:
    """Whether two trees agree at fixed points to so many digits; None where the precision does not allow to tell.

    The points are random reals and whole numbers; expressions as short as answers agree there only if they are equal.
    """
    names = expressions.symbols(gold) | expressions.symbols(answer)
    # Roots and logarithms are meant for positive values; |x| on one side only is told from x by a negative one.
    one_size = ("'abs'" in str(gold)) != ("'abs'" in str(answer))
    positive = not one_size and any(expressions.has(tree, "sqrt", "call", "pow") for tree in (gold, answer))
    stepped = "floor" in str(gold) or "ceil" in str(gold)
    seen = 0
    for k in (range(4 if positive else 5)) if names else range(1):
        point, field = _point(names, k, 997 if stepped and k == 3 else 9), field_of()
        g, a = _at(gold, point, field), _at(answer, point, field)
        if g is None and a is None:
            continue
        if g is None or a is None:
            return False
        if names and g == a == 0 and not field.largest:
            continue  # a zero of both says nothing
        seen += 1
        size, difference, rounding = max(abs(g), abs(a)), abs(g - a), 10.0**-precision
        if size <= field.largest * rounding:  # both are zero, as far as these digits tell
            if digits < MANY_DIGITS:
                return None
            continue
        if difference > 10.0**-digits * size:
            return None if difference <= 100 * size * field.loss * rounding else False
        if field.loss * rounding > 10.0 ** (2 - digits):
            return None
    if seen < (2 if names else 1):
        return None
    long = any(expressions.has(t, "num") and _long(t) for t in (gold, answer))
    return None if long and digits < MANY_DIGITS else True


def _long(tree: tuple) -> bool:
    """Whether it holds a number of more digits than doubles tell apart from an irrational one."""
    if tree[0] == "num":
        return max(tree[1].numerator, tree[1].denominator) > 10**EXACT_DIGITS
    return any(_long(part) for part in tree[1:] if isinstance(part, tuple))

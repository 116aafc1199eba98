r"""A small reader of scalar LaTeX expressions. `parse` gives a tree of tuples, bounded in size and depth; values.py
evaluates it.

No text is ever evaluated as code.
"""

import functools
import re
from fractions import Fraction

MAX_LENGTH, MAX_DEPTH = 1500, 24


class Unreadable(ValueError):
    """Not an expression that this reader knows."""


class TooLarge(ValueError):
    """A number too large to be written out, or an expression too long or too deep to be read."""


_TOKEN = re.compile(
    r"\s*(\d+(?:\.\d*)?[eE][+-]?\d+(?![\w.])|\.?\d+(?:\.\d*)?(?:[eE][+-]?\d+(?!\w))?|\\[A-Za-z]+|\\[{}|]|[A-Za-z]'*"
    r"|[-+*/^_!|(){}\[\],%=:])"
)
_GREEK_WORDS = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho
sigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega
hbar ell odot R aleph triangle angle"""
_GREEK = frozenset(_GREEK_WORDS.split())
_CALLS_WORDS = "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log exp abs floor ceil"
_CALLS = frozenset(_CALLS_WORDS.split())
_ACCENTS_WORDS = "vec hat bar dot ddot tilde overline mathcal mathbb prime widehat widetilde"
_ACCENTS = frozenset(_ACCENTS_WORDS.split())
_OPEN = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
_STOP = frozenset(
    [")", "]", "}", r"\}", r"\rfloor", r"\rceil", ",", "+", "-", "*", "/", r"\cdot", r"\times", "=", ":", "%"]
)


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
            if (
                part[0] == "div"
                and all(p[0] == "num" and p[1].denominator == 1 for p in part[1:])
                and part[1][1] < part[2][1]
            ):
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
            while (
                self.next
                and self.next not in _STOP
                and self.next[1:] not in _CALLS
                and not (self.next == "|" and self.bars)
            ):
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

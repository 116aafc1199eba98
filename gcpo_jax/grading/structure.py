r"""The structure of an answer: lists, tuples, intervals, sets, matrices, equations, or one scalar. Compared in
equivalence.py."""

import functools
import re
from typing import NamedTuple

from gcpo_jax.grading import values
from gcpo_jax.grading.scalars import tree_of

MAX_ITEMS = 40
_SYNONYMS = {
    "allrealnumbers": r"(-\infty,\infty)", "allreals": r"(-\infty,\infty)", r"\R": r"(-\infty,\infty)",
    "infinity": r"\infty", "+\\infty": r"\infty", r"\{\}": r"\emptyset", "emptyset": r"\emptyset",
    "theemptyset": r"\emptyset", "dne": "doesnotexist",
}  # fmt: skip


class Value(NamedTuple):
    """What an answer is. The mark: a tuple's two brackets, and a range's variable after them; a leaf's text."""

    kind: str  # "leaf" | "list" | "set" | "tuple" | "union" | "matrix" | "equation"
    parts: tuple = ()
    mark: str = ""


_WHOLE = re.compile(r"[A-Za-z]\s*\\in\s*(?:\\mathbb\s*\{?)?[ZN]\}?(?:\^[+*])?")  # "k in Z", said beside an answer


def _split(text: str, pattern: str) -> list[str]:
    """The pieces between matches of the pattern outside all brackets."""
    pieces, depth, start = [], 0, 0
    finder = re.compile(rf"(?P<sep>{pattern})|\\[{{}}]|\\begin|\\end|\\[lr](?:angle|floor|ceil)\b|[()\[\]{{}}]")
    for found in finder.finditer(text):
        token = found[0]
        if found["sep"] is not None:
            if depth <= 0:
                pieces.append(text[start : found.start()].strip())
                start = found.end()
        elif token in ("(", "[", "{", r"\{", r"\begin", r"\langle", r"\lfloor", r"\lceil"):
            depth += 1
        else:
            depth -= 1
    return [*pieces, text[start:].strip()]


_SEPARATOR = r",|;|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_RELATION = r"\\leq(?![a-z])|\\geq(?![a-z])|\\neq(?![a-z])|=|<|>"


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """(open, inside, close) of a text that one pair of brackets encloses."""
    found = re.fullmatch(r"(\\\{|\\langle|[(\[])(.*)(\\\}|\\rangle|[)\]])", text, re.DOTALL)
    if not found:
        return None
    depth = 0
    for token in re.finditer(r"\\[{}]|\\[lr]angle|[()\[\]{}]", text):
        depth += 1 if token[0] in ("(", "[", "{", r"\{", r"\langle") else -1
        if depth == 0:
            return (found[1], found[2], found[3]) if token.end() == len(text) else None
    return None


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Value:
    """The structure of a tidy answer."""
    text = re.sub(rf"\s*\(\s*{_WHOLE.pattern}\s*\)\s*$", "", text)
    text = r"\cup".join(_REVERSED.sub(_upright, piece) for piece in text.split(r"\cup"))
    text = _SYNONYMS.get(re.sub(r"[\s.]", "", text).lower() if "\\R" not in text else text.strip(), text)
    pieces = [p for p in _split(text, _SEPARATOR) if p]
    pieces = [p for p in pieces if not _WHOLE.fullmatch(p)] or pieces
    if len(pieces) > MAX_ITEMS:
        return Value("leaf", mark=text)
    if len(pieces) > 1:
        parts = [part for p in pieces for part in _alternatives(p)]
        return _between(parts) or Value("list", tuple(parts))
    text = pieces[0] if pieces else text
    alternatives = _alternatives(text)
    return alternatives[0] if len(alternatives) == 1 else Value("list", tuple(alternatives))


_REVERSED = re.compile(r"\s*([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])\s*")


def _upright(found: re.Match) -> str:
    """An open end as ]0,1[ has it, in round brackets."""
    return ("(" if found[1] == "]" else "[") + found[2] + (")" if found[3] == "[" else "]")


def _between(parts: list[Value]) -> Value | None:
    """x > 0 and x < 1 as the one interval that it is; None for anything else, 1 < 0 included."""
    if len(parts) != 2 or not all(p.kind == "tuple" and p.mark[2:] for p in parts):
        return None
    low, high = sorted(parts, key=lambda p: p.parts[0].mark == r"-\infty")
    if high.parts[0].mark != r"-\infty" or low.parts[1].mark != r"\infty" or low.mark[2:] != high.mark[2:]:
        return None
    ends = [tree_of(v.mark) if v.kind == "leaf" else None for v in (low.parts[0], high.parts[1])]
    try:
        first, second = (values.numeric(t, {}, values.floats()).real for t in ends if t is not None)
    except (ArithmeticError, ValueError, KeyError):
        return None
    if first >= second:
        return None
    return Value("tuple", (low.parts[0], high.parts[1]), low.mark[0] + high.mark[1] + low.mark[2:])


def _alternatives(text: str) -> list[Value]:
    r"""One value, or the two that \pm stands for."""
    if r"\pm" not in text or text.startswith(r"\{"):
        return [_one(text)]
    both = [text.replace(r"\pm", sign).replace(r"\mp", other) for sign, other in ("+-", "-+")]
    return [_one(re.sub(r"(^|[=(,{])\s*\+", r"\1", b)) for b in both]


def _one(text: str) -> Value:
    text = re.sub(r"^[A-Za-z](?:_\{?\w+\}?)?\s*\\in\s*(?=[(\[\\])", "", text.strip())
    union = _split(text, r"\\cup")
    if len(union) > 1:
        return Value("union", tuple(read(u) for u in union))
    matrix = re.fullmatch(r"\\begin\{([bp]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", text, re.DOTALL)
    if not matrix and (wrapped := re.fullmatch(r"[(\[]\s*(\\begin\{(?:array|matrix)\}.*)[)\]]", text, re.DOTALL)):
        return _one(wrapped[1])
    scaled = re.fullmatch(r"([^&\x02]+?)\s*(?:\\cdot\s*)?(\\begin\{([bp]?matrix)\}.*\\end\{\3\})", text, re.DOTALL)
    if scaled and not matrix and tree_of(scaled[1]) is not None:
        inner = _one(scaled[2])
        if inner.kind == "matrix" and all(v.kind == "leaf" for row in inner.parts for v in row):
            rows = [tuple(Value("leaf", mark=rf"({scaled[1]})\cdot ({v.mark})") for v in row) for row in inner.parts]
            return Value("matrix", tuple(rows))
    if matrix:
        rows = [r for r in matrix[2].split("\x02") if r.strip()]
        return Value("matrix", tuple(tuple(_one(c.strip()) for c in r.split("&")) for r in rows))
    named = re.fullmatch(r"[A-Z]'?\s*(?:=\s*)?(\([^=]*,[^=]*\))", text)  # a point with its name
    enclosed = _enclosed(named[1] if named else text)
    if enclosed:
        inside = _inside(*enclosed)
        if inside is not None:
            return inside
    return _relation(text) or Value("leaf", mark=text)


def _inside(opening: str, inside: str, closing: str) -> Value | None:
    if opening == r"\{":
        builder = re.fullmatch(r"\s*([A-Za-z])\s*(?:\\in\s*\\R\s*)?[|:](.*)", inside)
        if builder:
            return read(builder[2].strip())
        entries = read(inside)
        return Value("set", entries.parts if entries.kind == "list" else (entries,))
    items = _split(inside, ",")
    if len(items) == 1:
        return read(inside.strip()) if opening == "(" and closing == ")" else None
    if len(items) > MAX_ITEMS or not all(items):
        return None
    return Value("tuple", tuple(read(i) for i in items), opening + closing)


def _relation(text: str) -> Value | None:
    """An inequality as the interval that it is, an equation as its sides."""
    sides = _split(text, _RELATION)
    if len(sides) == 1 or not all(sides):
        return None
    signs = re.findall(_RELATION, text)
    if len(signs) != len(sides) - 1:
        return None
    if set(signs) == {"="}:
        return Value("equation", tuple(sides))
    low, high = ("<", r"\leq"), (">", r"\geq")
    if len(sides) == 3 and all(s in low for s in signs):
        ends = (sides[0], sides[2])
    elif len(sides) == 3 and all(s in high for s in signs):
        ends, signs = (sides[2], sides[0]), signs[::-1]
    elif len(sides) == 2 and signs[0] in low and (size := re.fullmatch(r"\|\s*([A-Za-z])\s*\|", sides[0])):
        brackets = "()" if signs[0] == "<" else "[]"
        return Value("tuple", tuple(read(f"{sign}({sides[1]})") for sign in ("-", "")), brackets + size[1])
    elif len(sides) == 2 and signs[0] in low + high:
        name = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([A-Za-z]\))?")
        below = (signs[0] in low) == bool(name.fullmatch(sides[0]))
        bound = sides[1] if name.fullmatch(sides[0]) else sides[0]
        variable = sides[0] if name.fullmatch(sides[0]) else sides[1]
        strict = signs[0] in "<>"
        if not name.fullmatch(variable):
            return None
        edge = (")" if strict else "]") if below else ("(" if strict else "[")
        ends = (r"-\infty", bound) if below else (bound, r"\infty")
        return Value("tuple", tuple(map(read, ends)), ("(" + edge if below else edge + ")") + variable)
    elif len(sides) == 2 and signs == [r"\neq"]:
        halves = ((r"-\infty", sides[1]), (sides[1], r"\infty"))
        return Value("union", tuple(Value("tuple", tuple(map(read, h)), "()" + sides[0]) for h in halves))
    else:
        return None
    brackets = ("(" if signs[0] in "<>" else "[") + (")" if signs[1] in "<>" else "]")
    return Value("tuple", tuple(map(read, ends)), brackets + sides[1])

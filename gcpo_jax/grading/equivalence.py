r"""Whether an answer is the gold: structure first (lists, tuples, intervals, sets, matrices, equations), then scalars.

Everything here is quick and bounded except the last resort on scalars, which is passed in: `symbolic(gold,
answer)`. Without it `equal` raises Undecided where it would be needed. What is decided how is listed in math.py.
"""

import functools
import re
from typing import NamedTuple

from gcpo_jax.grading import expressions, quantities
from gcpo_jax.grading.notation import compact, tidy
from gcpo_jax.grading.scalars import Symbolic, proportional, same_scalar, tree_of

MAX_ANSWER, MAX_ITEMS = 2000, 40
_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty"""
_NUMBER_WORDS = {word: k for k, word in enumerate(_WORDS.split())}
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
    text = _SYNONYMS.get(re.sub(r"[\s.]", "", text).lower() if "\\R" not in text else text.strip(), text)
    pieces = [p for p in _split(text, _SEPARATOR) if p]
    pieces = [p for p in pieces if not _WHOLE.fullmatch(p)] or pieces
    if len(pieces) > MAX_ITEMS:
        return Value("leaf", mark=text)
    if len(pieces) > 1:
        parts = [part for p in pieces for part in _alternatives(p)]
        return Value("list", tuple(parts))
    text = pieces[0] if pieces else text
    alternatives = _alternatives(text)
    return alternatives[0] if len(alternatives) == 1 else Value("list", tuple(alternatives))


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


def equal(gold: str, answer: str, symbolic: Symbolic | None = None, percent: bool = False) -> bool:
    """Whether the answer is the gold; percent: the question asks for a percentage, so 60 and 60% are the same.

    Raises:
      Undecided: where only `symbolic`, which is not given, could tell.
    """
    if max(len(gold), len(answer)) > MAX_ANSWER:
        return gold.strip() == answer.strip()
    g, a = (tidy(quantities.spell_letters(t)) for t in (gold, answer))
    if not g or not a:
        return False
    if compact(g) == compact(a):
        return True
    approximate = r"^\s*\\approx|^approximately |^about |^≈|^~"
    if re.search(approximate, a) and not re.search(rf"\d\.\d|\\times|\de|{approximate}", g):
        return False
    g, a = (re.sub(approximate, "", t).strip() for t in (g, a))
    if percent:
        g, a = (re.sub(r"\s*(%|percent)$", "", t) for t in (g, a))
    letter = _choice(g, gold, a)
    if letter is not None:
        return letter
    if re.search(r"\d, +\d", g) and re.fullmatch(r"\d{1,3}(?:,\d{3})+", answer.strip("$ .")):
        a = answer.strip("$ .").replace(",", ", ")  # beside a list, commas separate
    a = re.sub(r"^(?:the )?(?:final )?answer(?: is)?\s*[:=]?\s+", "", a, flags=re.IGNORECASE)
    a = re.sub(r"^(?:negative|minus)\s+(?=\d)", "-", a, flags=re.IGNORECASE)
    a = re.sub(r"^(?:\([A-H]\)|[A-H][).:])\s+(?=\S)", "", a)
    return _same(read(g), read(a), symbolic)


def _choice(gold: str, raw: str, answer: str) -> bool | None:
    """Whether the answer picks the gold's letter; None where the gold is no letter."""
    wanted = re.fullmatch(r"\(?\s*([A-Z])\s*\)?", gold)
    if not wanted:
        return None
    picked = re.fullmatch(
        r"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(\s*([A-Za-z])\s*\)(?:\s.*)?|([A-Z])(?:[).:]\s*.*|\s*)?)",
        answer,
        re.IGNORECASE if "(" in raw or "text" in raw else 0,
    )
    if picked and re.search(r"(?<![A-Za-z])(?:or|and|not|nor)(?![A-Za-z])|\([A-Z]\).*\([A-Z]\)", answer):
        return False
    letter = (picked[1] or picked[2]) if picked else ""
    return letter.upper() == wanted[1]


def _same(gold: Value, answer: Value, symbolic: Symbolic | None) -> bool:
    kinds = (gold.kind, answer.kind)
    if gold.kind == answer.kind == "matrix":
        return _matrices(gold, answer, symbolic)
    if "matrix" in kinds:
        column, other = (gold, answer) if gold.kind == "matrix" else (answer, gold)
        flat = tuple(row[0] for row in column.parts) if all(len(row) == 1 for row in column.parts) else ()
        return (
            other.kind == "tuple" and other.mark in ("()", r"\langle\rangle") and _ordered(flat, other.parts, symbolic)
        )
    if kinds == ("tuple", "tuple"):
        return _tuples(gold, answer, symbolic)
    if "union" in kinds and set(kinds) <= {"union", "list"}:
        return _unordered(gold.parts, answer.parts, symbolic)
    if set(kinds) <= {"list", "set"}:
        if kinds == ("set", "set"):
            return all(any(_same(g, a, symbolic) for a in answer.parts) for g in gold.parts) and all(
                any(_same(g, a, symbolic) for g in gold.parts) for a in answer.parts
            )
        labels = [[v.parts[0] if v.kind == "equation" else "" for v in side.parts] for side in (gold, answer)]
        if any(len(set(one)) > 1 and all(one) and not any(other) for one, other in (labels, labels[::-1])):
            return _ordered(gold.parts, answer.parts, symbolic)
        return _unordered(gold.parts, answer.parts, symbolic)
    if "set" in kinds and set(kinds) & {"leaf", "equation"}:
        gold, answer = (v.parts[0] if v.kind == "set" and len(v.parts) == 1 else v for v in (gold, answer))
        return gold.kind != "set" and answer.kind != "set" and _same(gold, answer, symbolic)
    if "equation" in kinds:
        return _equations(gold, answer, symbolic)
    if kinds == ("leaf", "leaf"):
        return _leaves(gold.mark, answer.mark, symbolic)
    return False


def _ordered(gold: tuple, answer: tuple, symbolic: Symbolic | None) -> bool:
    return len(gold) == len(answer) and all(_same(g, a, symbolic) for g, a in zip(gold, answer, strict=True))


def _unordered(gold: tuple, answer: tuple, symbolic: Symbolic | None) -> bool:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for g in gold:
        match = next((a for a in left if _same(g, a, symbolic)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _matrices(gold: Value, answer: Value, symbolic: Symbolic | None) -> bool:
    return len(gold.parts) == len(answer.parts) and all(
        _ordered(g, a, symbolic) for g, a in zip(gold.parts, answer.parts, strict=True)
    )


def _tuples(gold: Value, answer: Value, symbolic: Symbolic | None) -> bool:
    def split(mark: str) -> tuple[str, str]:
        angles = mark.startswith(r"\langle")
        return ("()", "") if angles else (mark[:2], mark[2:])

    (ours, variable), (theirs, other) = split(gold.mark), split(answer.mark)
    if ours != theirs or (variable and other and compact(variable) != compact(other)):
        return False
    return _ordered(gold.parts, answer.parts, symbolic)


_LABEL = re.compile(
    r"(?:\\?[A-Za-z]+(?:_\{?[\w, ]+\}?)?'*|[A-Z]{2,}(?:\^\{?2\}?)?|\|?[A-Z]{2}\|?"
    r"|\\(?:vec|overline|angle|triangle)\s*\{?[A-Z]+\}?|[a-zA-Z]\s*\([\w, ]+\)|\\frac\{[A-Z_\d]+\}\{[A-Z_\d]+\}"
    r"|(?:\\(?:sin|cos|tan)\s*)(?:\\angle\s*)?(?:[A-Z]+|\\[a-z]+)|[A-Za-z ]{3,}|\([A-Za-z_\d{}, ]+\))"
)
_TOTAL = re.compile(r"\d*[a-z](?:\s*[+-]?\s*\d*[a-z])+")  # m + n, which many problems ask for


def _equations(gold: Value, answer: Value, symbolic: Symbolic | None) -> bool:
    if gold.kind == "equation" and answer.kind == "equation":
        (*names, last), (*others, other) = gold.parts, answer.parts
        for middle, end in [*((m, last) for m in names[1:]), *((m, other) for m in others[1:])]:
            if not _same(read(middle), read(end), symbolic):
                return False
        if compact(names[0]) == compact(others[0]) and _same(read(last), read(other), symbolic):
            return True
        if (
            len(names) == len(others) == 1
            and compact(names[0]) == compact(other)
            and compact(last) == compact(others[0])
        ):
            return True
        functions = [bool(re.fullmatch(r"y|[a-zA-Z]\s*\([a-z]\)", n)) for n in (names[0], others[0])]
        if all(functions) and "(" in names[0] + others[0] and "y" in (names[0], others[0]):
            return _same(read(last), read(other), symbolic)
        if _constant(last) and _LABEL.fullmatch(names[0]):
            return False  # x = 5 is a solution, 2x = 10 is not one yet
        return len(names) == len(others) == 1 and proportional(gold.parts, answer.parts)
    chain, value = (gold, answer) if gold.kind == "equation" else (answer, gold)
    *names, last = chain.parts
    asked = chain is answer and _constant(last) and all(_TOTAL.fullmatch(n) for n in names)
    worked = chain is answer and _constant(last)  # x = -b/2a = 3: how the value came about
    steps = [n for k, n in enumerate(names) if not (k and worked)]
    if not asked and (not all(_LABEL.fullmatch(n) or _constant(n) for n in steps) or _PROSE.search(last)):
        return False
    if any(_constant(n) for n in names):
        constants = [n for n in (*names, last) if _constant(n)]
        if not all(_leaves(constants[0], c, symbolic) for c in constants[1:]):
            return False
    pair = (read(last), value) if chain is gold else (value, read(last))
    return _same(*pair, symbolic)


def _constant(text: str) -> bool:
    found = tree_of(quantities.split(text, letters=False)[0])
    return found is not None and not expressions.symbols(found)


def _letters(text: str) -> str:
    """Text without case, articles and punctuation; signs stay."""
    text = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", " ", text.lower())
    words = re.findall(r"[A-Za-z]+|\d+|[^\sA-Za-z\d,;:'\"!?(){}]|(?<=\d)\.(?=\d)", text.rstrip("."))
    return " ".join(str(_NUMBER_WORDS.get(w, w)) for w in words if w not in ("a", "an", "the"))


_PROSE = re.compile(r"(?<![\\A-Za-z_{])[A-Za-z]{3,}|(?<![\\A-Za-z_{])[A-Z]{2}(?![A-Za-z])")


def _leaves(gold: str, answer: str, symbolic: Symbolic | None) -> bool:
    gold, answer = (quantities.multiply_out(t).strip() for t in (gold, answer))
    if compact(gold) == compact(answer):
        return True
    gold, answer = (str(_NUMBER_WORDS.get(t.lower(), t)) for t in (gold, answer))
    if not re.search(r"[\d\\]", gold) and _PROSE.search(gold):
        return _letters(gold) == _letters(answer)
    if ":" in gold:
        answer = re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", answer)
    if ":" in gold or ":" in answer:
        return _ratios(gold, answer, symbolic)
    if _BASED.fullmatch(gold) or _BASED.fullmatch(answer):
        return _numeral(gold) == _numeral(answer)
    pure = not re.search("[A-Za-z]", gold.replace(r"\frac", ""))
    (g, unit), (a, other) = quantities.split(gold, True), quantities.split(answer, True)
    if unit is None or not (pure or unit[0] & {"meter", "gram", "second", "hour", "liter"}):
        g, unit = quantities.split(gold, letters=False)
    elif re.fullmatch(r".*[^A-Za-z{][mgshlL](?:\^\{?[23]\}?)?", gold):
        g, unit = quantities.split(gold, letters=False)  # unmarked in the gold, a letter is a variable
    if unit is None and not pure:
        a, other = quantities.split(answer, letters=False)
    if any(_PROSE.search(t) for t in (g, a)):
        return _letters(gold) == _letters(answer) != ""
    return _measured(g, unit, a, other, symbolic)


def _measured(g: str, unit: quantities.Unit, a: str, other: quantities.Unit, symbolic: Symbolic | None) -> bool:
    g, a = (re.sub(r"^([-+]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", t.replace(r"\infty", "\\infty")) for t in (g, a))
    if r"\infty" in g or r"\infty" in a:
        return compact(g).lstrip("+") == compact(a).lstrip("+")
    percent = [u is not None and "percent" in u[0] for u in (unit, other)]
    if percent[0] != percent[1]:
        if (unit if percent[1] else other) is not None:
            return False
        g, a = (f"({t})/100" if p else t for t, p in zip((g, a), percent, strict=True))
        return same_scalar(g, a, symbolic)
    rounded = unit is None or not unit[0] & {"dollar", "cent"}
    degrees = [u is not None and "degree" in u[0] for u in (unit, other)]
    if degrees[0] != degrees[1] and (r"\pi" in g) != (r"\pi" in a):
        g, a = (rf"({t})\cdot\pi/180" if d else t for t, d in zip((g, a), degrees, strict=True))
        return same_scalar(g, a, symbolic)
    factor = quantities.conversion(unit, other)
    if factor is None:
        return False
    if factor != 1:
        a = rf"({a})\cdot {factor.numerator}/{factor.denominator}"
    return same_scalar(g, a, symbolic, rounded)


def _ratios(gold: str, answer: str, symbolic: Symbolic | None) -> bool:
    clock = r"0?(\d{1,2}):(\d\d(?::\d\d)?)\s*(?:([ap])\.?\s*m\.?)?(?:\s*o'clock)?"
    times = [re.fullmatch(clock, t, re.IGNORECASE) for t in (gold, answer)]
    if times[0]:
        if not times[1] or times[0].groups()[:2] != times[1].groups()[:2]:
            return False
        halves = [(t[3] or "").lower() for t in times if t]
        return halves[0] == halves[1] or "" in halves
    sides = [[s.strip() for s in t.split(":")] for t in (gold, answer)]
    if sorted(map(len, sides)) == [1, 2]:  # 3:4 as a fraction
        g, a = (f"({s[0]})/({s[1]})" if len(s) == 2 else s[0] for s in sides)
        return all(map(_constant, sides[0] + sides[1])) and same_scalar(g, a, symbolic, False)
    trees = [[tree_of(s) for s in side] for side in sides]
    if len(trees[0]) != len(trees[1]) or any(t is None for side in trees for t in side):
        return False
    (first, *rest), (other, *others) = sides
    return all(
        same_scalar(f"({g})({other})", f"({a})({first})", symbolic, False) for g, a in zip(rest, others, strict=True)
    )


_BASED = re.compile(r"\(?\s*(-?[\dA-F]+)\s*\)?\s*_\s*\{?\s*\(?\s*(\w+)\s*\)?\s*\}?")


def _numeral(text: str) -> tuple[str, int | str]:
    """Digits and base. Numerals in a base are compared as numerals; only base ten may go unsaid."""
    found = _BASED.fullmatch(text)
    if not found:
        return text.lstrip("0"), 10
    base = found[2]
    return found[1].lstrip("0"), int(base) if base.isdecimal() and len(base) < 4 else _NUMBER_WORDS.get(base, base)

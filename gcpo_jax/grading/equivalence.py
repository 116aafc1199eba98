r"""Whether an answer is the gold: structure first (lists, tuples, intervals, sets, matrices, equations), then scalars.

Everything here is quick and bounded except the last resort on scalars, which is passed in: `symbolic(gold,
answer)`. Without it `equal` raises Undecided where it would be needed. What is decided how is listed in math.py.
"""

import re

from gcpo_jax.grading import expressions, quantities
from gcpo_jax.grading.notation import compact, tidy
from gcpo_jax.grading.scalars import Symbolic, agrees_with_its_rounding, proportional, same_scalar, tree_of
from gcpo_jax.grading.structure import Value, read

MAX_ANSWER = 2000
_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty"""
_NUMBER_WORDS = {word: k for k, word in enumerate(_WORDS.split())}


def equal(gold: str, answer: str, symbolic: Symbolic | None = None, percent: bool = False) -> bool:
    """Whether the answer is the gold; percent: the question asks for a percentage, so 60 and 60% are the same.

    Raises:
      Undecided: where only `symbolic`, which is not given, could tell.
    """
    if max(len(gold), len(answer)) > MAX_ANSWER:
        return gold.strip() == answer.strip()
    g, a = (quantities.add_up(tidy(quantities.spell_letters(t))) for t in (gold, answer))
    if not g or not a:
        return False
    if compact(g) == compact(a):
        return True
    a = _rounded_beside(a)
    if a is None:
        return False
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


def _rounded_beside(answer: str) -> str | None:
    r"""Of "x = 3/56 \approx 0.054" the exact part, of "x \approx 0.054" the rounded one; None where they differ."""
    exact, mark, rounded = answer.partition(r"\approx")
    if not mark or not exact.strip():
        return answer
    value, rounded = (quantities.split(t.strip(), letters=True)[0] for t in (exact.rsplit("=", 1)[-1], rounded))
    tree = tree_of(value)
    if tree is None or expressions.symbols(tree):
        return rf"\approx {rounded}"
    return exact.strip() if agrees_with_its_rounding(tree, rounded) else None


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
    if answer.kind == "list" and gold.kind in ("leaf", "equation"):
        return all(_same(gold, part, symbolic) for part in answer.parts)  # "1/2 or 0.5" is one answer
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
    r"|(?:\\(?:sin|cos|tan)\s*)(?:\\angle\s*)?(?:[A-Z]+|\\[a-z]+)|[A-Za-z ]{3,}|\([A-Za-z_\d{}\\, ]+\))"
)
_TOTAL = re.compile(r"\d*[a-z](?:\s*[+-]?\s*\d*[a-z])+")  # m + n, which many problems ask for


def _equations(gold: Value, answer: Value, symbolic: Symbolic | None) -> bool:
    if gold.kind == "equation" and answer.kind == "equation":
        (*names, last), (*others, other) = gold.parts, answer.parts
        for middle, end in [*((m, last) for m in names[1:]), *((m, other) for m in others[1:])]:
            if not _same(read(middle), read(end), symbolic):
                return False
        if _label(names[0]) == _label(others[0]) and _same(read(last), read(other), symbolic):
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
    asked = chain is answer and _constant(last) and all(_TOTAL.fullmatch(n) or _constant(n) for n in names)
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


def _label(name: str) -> str:
    """A name; an angle may be said by its corner."""
    return compact(re.sub(r"^m?\s*\\angle\s*", "", name.strip()))


def _constant(text: str) -> bool:
    found = tree_of(quantities.split(text, letters=False)[0])
    return found is not None and not expressions.symbols(found)


def _letters(text: str) -> str:
    """Text without case, articles and punctuation; signs stay."""
    text = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", " ", text.lower())
    words = re.findall(r"[A-Za-z]+|\d+|[^\sA-Za-z\d,;:'\"!?(){}]|(?<=\d)\.(?=\d)", text.rstrip("."))
    return " ".join(str(_NUMBER_WORDS.get(w, w)) for w in words if w not in ("a", "an", "the"))


_PROSE = re.compile(r"(?<![\\A-Za-z_{])[A-Za-z]{3,}|(?<![\\A-Za-z_{(/])[A-Z]{2}(?![A-Za-z)])")


def _leaves(gold: str, answer: str, symbolic: Symbolic | None) -> bool:
    gold, answer = (quantities.multiply_out(t).strip() for t in (gold, answer))
    if compact(gold) == compact(answer):
        return True
    gold, answer = (str(_NUMBER_WORDS.get(t.lower(), t)) for t in (gold, answer))
    said = re.fullmatch(r"(\d+)\s*\(\s*([a-z]+)\s*\)", answer)
    if said and str(_NUMBER_WORDS.get(said[2])) == said[1]:  # 5 (five)
        answer = said[1]
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
        if not times[1] or times[0][2] != times[1][2]:
            return False
        (hour, half), (other, its) = (
            (int(m[1]) - 12, "p") if int(m[1]) > 12 else (int(m[1]), (m[3] or "").lower()) for m in times if m
        )
        as_written = times[0][1].lstrip("0") == times[1][1].lstrip("0")
        return hour == other and (half == its or (as_written and "" in (half, its)))
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


_BASED = re.compile(r"\(?\s*(-?[\dA-F]+)\s*\)?\s*(?:_|(?:in )?base(?=\W))\s*\{?\s*\(?\s*(\w+)\s*\)?\s*\}?")


def _numeral(text: str) -> tuple[str, int | str]:
    """Digits and base. Numerals in a base are compared as numerals; only base ten may go unsaid."""
    found = _BASED.fullmatch(text)
    if not found:
        return text.lstrip("0"), 10
    base = found[2]
    return found[1].lstrip("0"), int(base) if base.isdecimal() and len(base) < 4 else _NUMBER_WORDS.get(base, base)

"""Numbers with units: what is measured, in what, and whether two units go together."""

import re
from fractions import Fraction
from typing import Literal

# Canonical name: (dimension, size in the dimension's first unit, other spellings). Plurals are implied.
_TABLE = {
    "meter": ("length", Fraction(1), "metre m"),
    "centimeter": ("length", Fraction(1, 100), "centimetre cm"),
    "millimeter": ("length", Fraction(1, 1000), "millimetre mm"),
    "kilometer": ("length", Fraction(1000), "kilometre km"),
    "inch": ("length", Fraction(254, 10000), "inches in"),
    "foot": ("length", Fraction(3048, 10000), "feet ft"),
    "yard": ("length", Fraction(9144, 10000), "yd yds"),
    "mile": ("length", Fraction(1609344, 1000), "mi"),
    "second": ("time", Fraction(1), "sec s"),
    "minute": ("time", Fraction(60), "min mins"),
    "hour": ("time", Fraction(3600), "hr hrs h"),
    "day": ("time", Fraction(86400), ""),
    "week": ("time", Fraction(604800), ""),
    "gram": ("mass", Fraction(1), "gramme g"),
    "kilogram": ("mass", Fraction(1000), "kilo kg kgs"),
    "milligram": ("mass", Fraction(1, 1000), "mg"),
    "pound": ("weight", Fraction(16), "lb lbs"),
    "ounce": ("weight", Fraction(1), "oz"),
    "dollar": ("money", Fraction(100), "usd ¤ buck"),
    "cent": ("money", Fraction(1), ""),
    "liter": ("volume", Fraction(1), "litre l"),
    "milliliter": ("volume", Fraction(1, 1000), "millilitre ml"),
    "gallon": ("gallon", Fraction(1), "gal"),
    "degree": ("degree", Fraction(1), "deg °"),
    "radian": ("radian", Fraction(1), "rad rads"),
    "percent": ("percent", Fraction(1), "% pct"),
    "year": ("year", Fraction(1), "yr yrs"),
}
_NAMES = {alias: name for name, (_, _, others) in _TABLE.items() for alias in [name, *others.split()]}
_SINGLE_WORDS = "m g s h l L"
_SINGLE = frozenset(_SINGLE_WORDS.split())
_PHYSICAL = frozenset(_TABLE)
_EXTRA_WORDS = """hz khz mhz ghz pa kpa mpa gpa atm bar psi ev kev mev gev rpm mol mmol cc ha db kj mj kw mw kwh
nm um fm au pc kpc mpc cal kcal erg dyn am pm
celsius fahrenheit"""
_EXTRA = frozenset(_EXTRA_WORDS.split())
# A word that changes or withdraws the number before it is no unit.
_NOT_UNITS_WORDS = """or and not about approximately approx roughly nearly almost least most more less fewer than
greater under over above below maybe perhaps probably possibly either neither between from to
thousand million billion trillion hundred dozen half halves third thirds quarter quarters fourth
tenth tenths fifth hundredth hundredths negative minus plus divided squared cubed factorial wait
but unless if when where because since so is are was off hmm unknown undefined infinity sin cos
tan log exp sqrt mod base with without plusminus no none otherwise else except"""
_NOT_UNITS = frozenset(_NOT_UNITS_WORDS.split())
_MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_WORD = r"(?<![\\A-Za-z_])(?:[A-Za-z]{2,}|[mgshlL](?![A-Za-z]))\.?(?:\s*\^\s*\{?[23]\}?)?"
_TAIL = re.compile(rf"^(.*?[\d)}}\]!.a-zA-Z]|[a-z]|\\pi)\s*((?:{_WORD})(?:[\s/-]+(?:{_WORD}))*)$")
_TEXT_LETTER = re.compile(r"\\(?:text|mathrm|mbox|rm|textrm)\s*\{[\s~]*(m|g|s|h|L|l)\s*\.?\s*\}")
_SI = {"J": "joule", "N": "newton", "W": "watt", "K": "kelvin", "V": "volt", "T": "tesla", "A": "ampere"}
_TEXT_CAPITAL = re.compile(r"(?<=[\d}).])((?:\s|~|\\[,;:! ])*)\\(?:text|mathrm|mbox|textrm)\s*\{[\s~]*([JNWKVTA])\s*\}")
_COMPOUND = {"mph": "mile hour", "kmh": "kilometer hour", "kph": "kilometer hour"}

Unit = tuple[frozenset[str], int] | None


def spell_letters(text: str) -> str:
    r"""Units of one letter that LaTeX marks as text, \text{m}, written out before the marking goes."""
    text = _TEXT_CAPITAL.sub(lambda m: f" {_SI[m[2]]} ", text)
    return _TEXT_LETTER.sub(lambda m: f" {_NAMES[m[1].lower()]} ", text)


def multiply_out(text: str) -> str:
    """'5 million' as 5 times a power of ten, and 'two dozen' with its digits."""
    return re.sub(
        rf"(\d+(?:\.\d+)?)\s*({'|'.join(_MULTIPLIERS)})s?\b",
        lambda m: rf"({m[1]} \times 10^{{{_MULTIPLIERS[m[2].lower()]}}})",
        text,
        flags=re.IGNORECASE,
    )


_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)\.?(?:\s*,)?(?:\s*and)?\s*(?=\d|$)")


def add_up(text: str) -> str:
    """1 hour 50 minutes, or 5 feet and 4 inches, in the last of their units; any other text as it is."""
    parts = _PART.findall(text)
    if len(parts) < 2 or _PART.sub("", text).strip():
        return text
    known = [_TABLE.get(_NAMES.get(word) or _NAMES.get(word.lower().removesuffix("s"), "")) for _, word in parts]
    if any(unit is None for unit in known):
        return text
    dimensions, sizes = {unit[0] for unit in known if unit}, [unit[1] for unit in known if unit]
    if len(dimensions) > 1 or sizes != sorted(set(sizes), reverse=True):
        return text
    total = sum(Fraction(number) * size for (number, _), size in zip(parts, sizes, strict=True)) / sizes[-1]
    return f"{total} {parts[-1][1]}"


def _canonical(words: str) -> Unit | Literal[False]:
    """The unit that words name, None for a unit that says nothing ("units"), False where they are no unit."""
    power, found = 1, set()
    words = re.sub(r"\^\s*\{?([23])\}?", r" pow\1", words)
    for word in re.findall(r"[A-Za-z]+\d?", words):
        low = word.lower()
        if low in ("sq", "square", "pow2"):
            power = 2
        elif low in ("cu", "cubic", "pow3"):
            power = 3
        elif low in _NOT_UNITS:
            return False
        elif low in ("unit", "units", "per") or (found and low in ("of", "the", "a", "an", "total", "in")):
            continue
        elif low in _COMPOUND:
            found.update(_COMPOUND[low].split())
        elif word in _NAMES or (low in _NAMES and len(low) > 1):
            found.add(_NAMES.get(word) or _NAMES[low])
        elif low in _EXTRA:
            found.add(low)
        elif len(low) < 3:
            return False
        else:
            stem = low[:-1] if low.endswith("s") and not low.endswith("ss") else low
            found.add(_NAMES.get(stem, stem))
    return (frozenset(found), power) if found else None


def split(text: str, letters: bool) -> tuple[str, Unit]:
    """(value, unit) of a tidy quantity, the unit None where there is none; letters: a lone m, g, s, h, L is a unit."""
    money = re.fullmatch(r"([-+]?)\s*¤\s*([-+]?.+?)(?:\s*(?:dollars?|usd))?", text, re.IGNORECASE)
    if money:
        return money[1] + money[2].strip(), (frozenset(["dollar"]), 1)
    mark = re.fullmatch(r"(.*\S)\s*(%|\\pounds|\\euro|\^\{\\circ\}\s*[CF]?|¤)", text)
    within = mark and "circ" in mark[2] and re.search(r"\\circ|\\(?:sin|cos|tan|cot|sec|csc)", mark[1])
    if mark and not within and not _open(mark[1]):
        name = {"%": "percent", "¤": "dollar"}.get(mark[2], "degree" if "circ" in mark[2] else mark[2])
        scale = {"C": ["celsius"], "F": ["fahrenheit"]}.get(mark[2][-1], [])
        return mark[1], (frozenset([name, *scale]), 1)
    text = re.sub(r"\bper cent\b", "percent", text)  # two words, one unit
    text = re.sub(r"\^\{\\circ\}\s*(?=(?:Celsius|Fahrenheit)$)", " degrees ", text, flags=re.IGNORECASE)
    tail = _TAIL.match(text)
    if tail:
        value, words = tail[1], tail[2]
        lone = re.fullmatch(r"([mgshlL])\.?(\s*\^\s*\{?[23]\}?)?", words)
        unit = False if lone and not letters else _canonical(words)
        if unit is not False and re.search(r"\d|\\pi|[a-z]", value) and not _open(value):
            return value.strip(), unit
    return text, None


def _open(text: str) -> bool:
    return text.count("{") != text.count("}") or text.count("(") != text.count(")")


def conversion(gold: Unit, answer: Unit) -> Fraction | None:
    """What times the answer is in the gold's unit; 1 where one of them names none; None on a mismatch."""
    if gold is None or answer is None or gold == answer:
        return Fraction(1)
    (ours, power), (theirs, their_power) = gold, answer
    if power != their_power:
        return None
    if len(ours) == len(theirs) == 1:
        (a,), (b,) = ours, theirs
        if a in _PHYSICAL and b in _PHYSICAL:
            return (_TABLE[b][1] / _TABLE[a][1]) ** power if _TABLE[a][0] == _TABLE[b][0] else None
    return Fraction(1) if ours <= theirs or theirs <= ours else None

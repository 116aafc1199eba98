r"""A plain mathematics reward: the last \boxed{...}, or else the last number, against the row's answer."""

import fractions
import re

# A minus belongs to the number unless something stands before it: the last number of "9-4" is 4.
NUMBER = re.compile(r"(?:(?<![\w)}])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)")
BRACES = re.compile(r"\\f?boxed\s*\{|(?<!\\)[{}]")


def answer(completion: str) -> str | None:
    r"""The content of the last closed \boxed{...} (braces may nest), else the last number, else None."""
    opened, last, content = [], -1, ""
    for brace in BRACES.finditer(completion):
        if brace[0] != "}":
            opened.append((brace.end(), len(brace[0]) > 1))
        elif opened:
            start, boxed = opened.pop()
            if boxed and start > last:
                last, content = start, completion[start : brace.start()]
    if last < 0:
        content = ["", *NUMBER.findall(completion)][-1]
    return _plain(content) or None


def _plain(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("$", "").replace("\\!", "")).strip().rstrip(".")
    return text.replace(",", "") if NUMBER.fullmatch(text) else text


def _value(text: str) -> fractions.Fraction | str:
    try:
        return fractions.Fraction(text) if NUMBER.fullmatch(text) else text
    except (ValueError, ZeroDivisionError):  # more digits than int() takes; n/0
        return text


def reward(prompt: str, completion: str, row: dict) -> float:
    """1 where the completion's answer is the row's: as numbers where both are, else as text; 0 otherwise."""
    del prompt
    given = answer(completion)
    return float(given is not None and _value(given) == _value(_plain(row["answer"])))

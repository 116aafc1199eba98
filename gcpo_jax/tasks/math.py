r"""A plain mathematics reward: the last \boxed{...}, or else the last number, against the row's answer."""

import fractions
import re

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
BOXED = re.compile(r"\\f?boxed\s*\{")


def answer(completion: str) -> str | None:
    r"""The content of the last closed \boxed{...} (braces may nest), else the last number, else None."""
    for start in reversed([match.end() for match in BOXED.finditer(completion)]):
        depth = 1
        for end in range(start, len(completion)):
            # Two characters that LaTeX escapes are braces of the text, not of the group.
            if completion[end] in "{}" and completion[end - 1] != "\\":
                depth += 1 if completion[end] == "{" else -1
            if depth == 0:
                return _plain(completion[start:end]) or None
    found = NUMBER.findall(completion)
    return _plain(found[-1]) if found else None


def _plain(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("$", "").replace("\\!", "")).strip().rstrip(".")
    return text.replace(",", "") if NUMBER.fullmatch(text) else text


def _number(text: str) -> fractions.Fraction | None:
    try:
        return fractions.Fraction(text) if NUMBER.fullmatch(text) else None
    except ZeroDivisionError:
        return None


def reward(prompt: str, completion: str, row: dict) -> float:
    """1 where the completion's answer is the row's: as numbers where both are, else as text; 0 otherwise."""
    del prompt
    given, right = answer(completion), _plain(row["answer"])
    if given is None:
        return 0.0
    numbers = _number(given), _number(right)
    return float(given == right if None in numbers else numbers[0] == numbers[1])

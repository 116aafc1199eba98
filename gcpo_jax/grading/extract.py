r"""The final answer of a completion, as text; None where there is none, or more than one, or it is left open.

In order: the last \boxed{}, the last "answer is" or "answer:" or "####", the mathematics that ends the text, a
short text as it stands, the last number. Only what follows </think> counts, and thinking that is not finished has
no answer.
"""

import itertools
import re

from gcpo_jax.grading.notation import compact, tidy

MAX_CONTENT, MAX_TEXT, LAST_BOXES = 2000, 20_000, 6

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{\\]|\\[A-Za-z]+)")
_PHRASE = re.compile(
    r"(?:(?:final|correct|right)\s+)?(?:answers?|result|solution|option|choice)(?:\s+(?:to|of|for)\s[^.\n:]{0,60}?)?"
    r"\s*(?:\*\*)?\s*(?:is|are|=|:|was|will be|would be|must be)\s*(?:\*\*)?\s*:?|(?<!#)####(?!#)",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:either|maybe|perhaps|possibly|might be|could be|may be|can't decide|cannot decide|not sure|unsure|uncertain"
    r"|no idea|i guess|a guess|guessing|probably|one of)\b|\?\?",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|isn't|never|cannot be|can't be)\s*(?:equal to\s*)?(?:\$|\\\(|\*\*)?\s*$", re.IGNORECASE
)
_RETRACTION = re.compile(
    r"\b(?:wait|actually|scratch that|correction|that(?:'s| is) (?:wrong|incorrect|not right)"
    r"|is (?:wrong|incorrect)|or maybe|or perhaps"
    r"|on second thought|alternatively|i (?:first )?thought|at first|initial(?:ly)?|mistake\w*|corrected answer)\b",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(
    r"[\s$.,;:*()\[\]\\]*(?:(?:and|or|also|alternatively|either|maybe|perhaps|the|final|answers?|is|are|so|thus|hence|therefore|quad|"
    r"another|other|possible|it|could|be|text|\{|\}|x|=|y|z)\b[\s$.,;:*()\[\]\\{}=]*)*",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"-?\s?(?:\\\$|\$)?-?(?:\\[dt]?frac\s*\{-?\d+\}\s*\{\d+\}|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+/\d+|\d*\.\d+|\d+)(?:\s*(?:\\%|%|percent\b))?"
)
# A number with its unit, or a word or three without one.
_BRIEF = re.compile(r"[-$\d.,/]+%?(?:\s+[A-Za-z]+){0,3}\.?|[A-Za-z]+(?:\s+[A-Za-z]+){0,2}\.?")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_CLAUSE = re.compile(
    r"(?<=[^.])\.(?=\s|$|\*|\$|\")|\n|!(?=\s|$)(?<=[a-z]!)|,\s+not\s|(?:,|;)?\s+(?:because|since|as\s|which|so\s|where|when"
    r"|given|thus|therefore|for\s|after|if\s|(?:or )?equivalently|that is|i\.e\.|or about|or approximately)"
)
_CHOICE = re.compile(r"\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-H])\)?\s+is\s+(?:the\s+)?(?:correct|right|answer)")
_LABEL = re.compile(r"\(([A-H])\)")
_LEAD = re.compile(r"[\s*_:#]*(?:(?:the|my|our|so|thus|therefore|hence|final)[\s,*]*)*", re.IGNORECASE)
# What only says the answer again, in decimals.
_ASIDE = re.compile(
    r"[,\s(]*(?:\b(?:which is|or|that is|i\.e\.)\s*)?(?:\b(?:about|approximately|roughly)|≈)\s*"
    r"[$\\(]*[\d.,]+\s*(?:\\?%|percent)?[$\\)]*[.\s)]*$"
)
_BOUND = re.compile(r"\b(?:between\s+\S+\s+and|(?:greater|larger|more|less|smaller|fewer)\s+than)\W*$", re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*[\s.!]*$")


def _spoken(completion: str) -> str | None:
    """What the completion says after its thinking."""
    head, mark, tail = completion.rpartition("</think>")
    text = tail if mark else head or tail
    if "<think>" in text:
        return None
    return re.sub(r"<\|?(?:im_end|endoftext|eot_id|end)\|?>|</s>|</?answer>", " ", text)


def _closing(text: str, start: int) -> int | None:
    """The index of the brace that closes the one at start."""
    depth = 0
    for k in range(start, min(len(text), start + MAX_CONTENT)):
        if text[k] in "{}" and text[k - 1] != "\\":
            depth += 1 if text[k] == "{" else -1
            if depth == 0:
                return k
    return None


def _boxes(text: str) -> list[tuple[int, int, str]] | None:
    """(start, end, content) of the last few boxes; None where the last one is not finished."""
    starts, at = [], len(text)
    while len(starts) < LAST_BOXES and (at := max(text.rfind(r"\boxed", 0, at), text.rfind(r"\fbox", 0, at))) >= 0:
        starts.append(at)
    found = []
    for start in reversed(starts):
        box = _BOX.match(text, start)
        if found and start < found[-1][1]:  # a box within a box: the inner one is what it holds
            found.pop()
        if box is None:
            end, content = None, ""
        elif box[1] == "{":
            end = _closing(text, box.end() - 1)
            content = text[box.end() : end] if end is not None else ""
        else:
            end, content = box.end() - 1, box[1]
        if end is None:
            if start == starts[0]:
                return None
            continue
        found.append((start, end + 1, content))
    return found


def _sentence_before(text: str, at: int) -> str:
    """The beginning of the sentence that goes on at `at`."""
    return re.split(r"\.\s|\n|[!?]\s", text[max(0, at - 200) : at])[-1]


def _key(content: str) -> str:
    return compact(tidy(content))


def _boxed(text: str, boxes: list[tuple[int, int, str]]) -> str | None:
    """The content of the last box, or of several that one statement joins; None where they contradict each other."""
    group = [boxes[-1]]
    for earlier in reversed(boxes[:-1]):
        gap = text[earlier[1] : group[0][0]]
        joined = len(gap) <= 400 and _CONNECTIVE.fullmatch(gap)
        short = len(gap.strip()) <= 40 and not re.search(r"[.!]\s|\n", gap)
        claims = all(
            re.search(r"answer\W+(?:is|:)\W*$", text[max(0, b[0] - 30) : b[0]], re.I) for b in (earlier, group[0])
        )
        if not (joined or short or (claims and "\n\n" not in gap)):
            break
        if _RETRACTION.search(_sentence_before(text, earlier[0]) + gap):
            break
        group.insert(0, earlier)
    first, last = group[0], group[-1]
    if _HEDGE.search(_sentence_before(text, first[0])) or _NEGATION.search(text[max(0, last[0] - 30) : last[0]]):
        return None
    if len(group) == 1:
        return None if _contradicted(text[last[1] :], last[2]) else last[2]
    different = list({_key(content): content for _, _, content in group}.values())
    if len(different) > 1:
        gaps = [text[a[1] : b[0]] for a, b in itertools.pairwise(group)]
        if all(
            re.fullmatch(r"[\s$\\()]*(?:,|;|and|,\s*and|\\text\{\s*and\s*\}|\\quad)?[\s$\\()]*", g) and "\n\n" not in g
            for g in gaps
        ):
            return ", ".join(different)
        return None
    return None if _contradicted(text[last[1] :], last[2]) else last[2]


def _contradicted(tail: str, content: str) -> bool:
    """Whether what follows the answer takes it back or offers another."""
    tail = tail[:400]
    other = re.match(
        r"[\s$.)\]\\*]*,?\s*\(?(?:or|and/or)\b(?!\s+(?:equivalently|about|approximately|in))\s*(.{1,60})", tail
    )
    if other:
        offered = _NUMBER.search(other[1])
        return offered is None or not _alike(offered[0], content)
    sentence, *others = re.split(r"\n\s*\n", tail)
    if others and _RETRACTION.match(others[0].lstrip("* ")):
        sentence += "\n" + others[0]
    if _HEDGE.search(re.split(r"\.\s|\n", sentence)[0]):
        return True
    claim = _PHRASE.search(tail)
    if claim and (number := _NUMBER.search(tail[claim.end() : claim.end() + 40])):
        # "The answer is $\frac{1}{2}$" after \boxed{0.5} says the same; only numbers that differ contradict.
        return bool(re.fullmatch(r"[-\d.,$ ]+", content)) and not _alike(number[0], content)
    retraction = _RETRACTION.search(sentence)
    return bool(retraction and _NUMBER.search(sentence[retraction.end() :]))


def _alike(one: str, other: str) -> bool:
    def value(text: str) -> float | None:
        text = _key(text)
        found = re.fullmatch(r"¤?(-?[\d.]+)(?:/(\d+))?|(-?)\\frac\{?(\d+)\}?\{?(\d+)\}?", text)
        try:
            if found and found[1]:
                return float(found[1]) / float(found[2] or 1)
            return (-1 if found[3] else 1) * float(found[4]) / float(found[5]) if found else None
        except (ValueError, ZeroDivisionError):
            return None

    return _key(one) == _key(other) or (value(one) is not None and value(one) == value(other))


def _stated(text: str) -> tuple[bool, str | None]:
    """(whether the text states an answer in words, that answer)."""
    found = list(_PHRASE.finditer(text))
    # "Final answer: The answer is 5" says it once.
    found = [
        p
        for p, q in itertools.zip_longest(found, found[1:])
        if not q or q.start() - p.end() > 40 or not _LEAD.fullmatch(text, p.end(), q.start())
    ]
    if not found:
        return False, None
    answers = [_content(text, phrase.end()) for phrase in found[-4:]]
    start = text.rfind("\n\n", 0, found[-1].start())
    for retraction in _RETRACTION.finditer(text, max(0, start), found[-1].start()):
        start = retraction.start()
    same = [a for phrase, a in zip(found[-4:], answers, strict=True) if phrase.start() > start and a is not None]
    if _HEDGE.search(_sentence_before(text, found[-1].start())):
        return True, None
    if answers[-1] is None or any(not _alike(a, answers[-1]) and _key(a) not in _key(answers[-1]) for a in same):
        return True, None
    return True, answers[-1]


def _content(text: str, start: int) -> str | None:
    """The answer that a phrase introduces: on its line, or on the next where nothing follows."""
    rest = text[start : start + MAX_CONTENT].lstrip(" \t:*_\n\r")
    display = re.match(r"\\\[(.+?)\\\]|\$\$(.+?)\$\$", rest, re.DOTALL)
    if display:
        return (display[1] or display[2]).strip()
    whole = rest.split("\n")[0].strip()
    if _HEDGE.search(whole) or re.match(r"(?:not|n't)\b", whole):
        return None
    clause = re.sub(r"\*\*[!.\s]*$", "", _CLAUSE.split(whole)[0].strip()).strip("*_ ").strip()
    clause = re.sub(r"^([-$\d./,]+)\s+of\s.*", r"\1", clause)
    clause = re.sub(
        r"^(?:option|choice|that|equal to|simply|just|therefore|thus|indeed)\s+", "", clause, flags=re.IGNORECASE
    )
    after = whole[len(clause) :]
    if re.match(r"[\s.$*]*\bor\b(?! equivalently| about| approximately)", after):
        return None
    if not clause:
        return None
    if len(clause.split()) <= 6 or _only_math(clause):
        return clause
    inner = [m for m in _MATH.finditer(clause)]
    if inner:
        return _last_math(inner)
    numbers = list(_NUMBER.finditer(clause))
    return _signed(clause, numbers[-1]) if numbers else clause[:200]


def _only_math(clause: str) -> bool:
    return not re.search(
        r"(?<![\\A-Za-z])(?:[A-Z]?[a-z]{3,}|(?:it|is|so|to|we|of|be|by|at)\b)",
        re.sub(r"\\(?:text|mbox|mathrm)\{[^{}]*\}|\\[A-Za-z]+", "", clause),
    )


def _last_math(found: list[re.Match]) -> str:
    return next(group for group in found[-1].groups() if group is not None).strip()


def _signed(text: str, number: re.Match) -> str:
    """A number as it stands; a minus after a value is a subtraction, not a sign."""
    token, before = number[0].strip(), text[: number.start()] + number[0][: len(number[0]) - len(number[0].lstrip())]
    if token.startswith("-"):
        apart = re.match(r"-\s", token) is not None
        value = re.search(r"[\d)}\]]\s*$" if not apart else r"[\w)}\]]\s*$", before) or re.search(r"[A-Za-z]$", before)
        token = token[1:].strip() if value else token
    return token


def extract(completion: str) -> str | None:
    """The final answer of a completion. Linear in its length; any string is allowed."""
    text = _spoken(completion)
    if text is None or not text.strip():
        return None
    boxes = _boxes(text)
    if boxes is None:
        return None
    if boxes:
        content = _boxed(text, boxes)
        return content.strip() or None if content is not None else None
    text = text[-MAX_TEXT:].strip()
    stated, answer = _stated(text)
    if stated:
        return answer
    last = text.rsplit("\n", 1)[-1].strip()
    choice = _CHOICE.search(last) or _labelled(text)
    if choice and not _left_open(last):
        return choice[1]
    bare = text[:-200] + _ASIDE.sub("", text[-200:])
    if _NUMBER.search(bare.rsplit("\n", 1)[-1]):
        text, last = bare, bare.rsplit("\n", 1)[-1].strip()
    bold = _BOLD.search(text)
    if bold and not _left_open(last) and (_only_math(bold[1]) or _BRIEF.fullmatch(bold[1].strip())):
        return bold[1].strip()
    inner = list(_MATH.finditer(text[-MAX_CONTENT:]))
    if inner and re.fullmatch(r"[\s.*!,]*", text[-MAX_CONTENT:][inner[-1].end() :]):
        return None if _left_open(last) else _last_math(inner)
    if _left_open(last):
        return None
    if len(last) <= 80 and (_only_math(last) or _BRIEF.fullmatch(last)):
        return last
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    before, end = text[: numbers[-1].start()], numbers[-1].end()
    if _BOUND.search(before[-60:]) or _NEGATION.search(before[-60:]):
        return None
    start = max(0, len(text) - MAX_CONTENT)
    for found in inner:  # a number inside a formula stands for the formula
        if start + found.start() < end <= start + found.end():
            content = _last_math([found])
            return content if _only_math(content) else None
    whole = text[max(0, end - 80) : end].split()[-1] + re.split(r"\s", text[end : end + 80])[0]
    return whole.rstrip(".,;:!*") if re.search("[π√^]", whole) else _signed(text, numbers[-1])


def _labelled(text: str) -> re.Match | None:
    """Of a last line that is one labelled choice, "(C) Plane" or "a plane, (C)", the label; not of a list of them."""
    *others, last = [line.strip(" *") for line in text.split("\n") if line.strip()][-2:]
    if len(last) > 80 or len(_LABEL.findall(last)) != 1 or (others and _LABEL.match(others[0])):
        return None
    return re.match(r"\(([A-H])\)\s", last) or re.search(r"\s\(([A-H])\)[.!\s]*$", last)


def _left_open(sentence: str) -> bool:
    return bool(_HEDGE.search(sentence) or re.search(r"\d\W{0,4}\s*or\s\W{0,4}\d", sentence))

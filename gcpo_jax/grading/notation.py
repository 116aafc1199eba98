r"""One spelling for what can be written in many ways: Unicode, LaTeX's spacing and sizes, thousands, missing
backslashes.

`tidy` keeps the meaning and is never given to an evaluator of Python; text in \text{...} is unwrapped, with a space
kept on both sides.
"""

import functools
import re
import unicodedata

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": "/", "⁄": "/", "∕": "/", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ",
    "≈": r"\approx ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "ø": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "°": r"^{\circ}", "º": r"^{\circ}", "ℝ": r"\mathbb{R}",
    "∠": r"\angle ", "△": r"\triangle ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega ",
    "Δ": r"\Delta ", "Ω": r"\Omega ", "ρ": r"\rho ", "δ": r"\delta ", "∣": "|", "〈": r"\langle ", "〉": r"\rangle ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "，": ",", "、": ",", "“": '"', "”": '"', "’": "'", "‘": "'", "′": "'",
    "£": r"\pounds ", "€": r"\euro ",
    "¢": " cents ", "∴": " ",
}  # fmt: skip
# What a careless reader of backslashes has made of LaTeX: a form feed for \\f, a tab for \\t, a bell for \\b.
_ESCAPES = {"\x0crac": r"\frac", "\text": r"\text", "\times": r"\times", "\x08oxed": r"\boxed"}
_SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
}  # fmt: skip

_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt floor ceil abs"
_COMMANDS = "dfrac tfrac cfrac frac pi infty infinity cdot times leq geq neq cup cap circ binom theta"
# A function wants an argument after it: "5 sec" is a time.
_BARE = re.compile(
    r"(?<![\\A-Za-z_])(?:(" + _FUNCTIONS.replace(" ", "|") + r")(?=\s*[\\({^_a-z0-9])|"
    r"(" + _COMMANDS.replace(" ", "|") + r"))(?![A-Za-z])"
)
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\s*\\overline\s*\{?(\d+)\}?")
_ROW = "\x02"  # stands for the end of a matrix's row
_BARE_TEXT = re.compile(r"(?<![\\A-Za-z])(text|mathrm|mbox|boxed)(?=\{)")
_RENAMED = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\le": r"\leq", r"\ge": r"\geq",
    r"\leqslant": r"\leq", r"\geqslant": r"\geq", r"\leqq": r"\leq", r"\geqq": r"\geq", r"\ne": r"\neq",
    r"\infinity": r"\infty", r"\ast": r"\cdot", r"\varnothing": r"\emptyset", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\lbrack": "[", r"\rbrack": "]", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\div": "/",
    r"\lt": "<", r"\gt": ">", r"\degree": r"^{\circ}", r"\degrees": r"^{\circ}", r"\dbinom": r"\binom",
    r"\tbinom": r"\binom", r"\colon": ":", r"\to": ":", r"\dots": r"\ldots", r"\cdots": r"\ldots",
    r"\arcsec": r"\arcsec", r"\lor": " or ", r"\vee": " or ", r"\land": " and ", r"\wedge": " and ", r"\tg": r"\tan",
    r"\ctg": r"\cot", r"\arctg": r"\arctan", r"\overrightarrow": r"\vec", r"\varphi": r"\phi", r"\quad": " ",
    r"\qquad": " ", r"\space": " ", r"\asin": r"\arcsin", r"\acos": r"\arccos", r"\atan": r"\arctan",
}  # fmt: skip
_DROPPED = re.compile(
    r"\\(?:left|right|middle|displaystyle|textstyle|limits|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg"
    r"|nolimits|therefore|rm|bf|it|hfill|protect|mathstrut|strut)(?![A-Za-z])\.?|\\[!]"
)
_TEXT = re.compile(
    r"\\(?:textbf|textit|textrm|textnormal|textsf|text|mbox|hbox|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|operatorname|"
    r"underline|emph|fbox|boxed)\s*\*?\s*\{([^{}]*)\}"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\}|,\\!\s?|\\,|\\ |,\s?\\!\s?)\d{3})+(?![\d])")
_EXPLICIT = re.compile(r"(?<=\d)(?:\{,\}|,\s?\\!\s?|\\!,|\\,)(?=\d{3}(?!\d))")
_SPACED = re.compile(r"(?<![\d.,\s])(?<!\d\s)\d{1,3}(?:[ ~]\d{3})+(?![\d/.])")


def _unicode(text: str) -> str:
    for char, command in _ESCAPES.items():
        text = text.replace(char, command)
    if text.isascii():
        return text
    text = re.sub("√([0-9.]+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = text.replace("√", r"\sqrt ").replace("∛", r"\sqrt[3]")
    text = re.sub("[" + "".join(_SUPER) + "]+", lambda m: "^{" + "".join(_SUPER[c] for c in m[0]) + "}", text)
    text = re.sub("[" + "".join(_SUB) + "]+", lambda m: "_{" + "".join(_SUB[c] for c in m[0]) + "}", text)
    for char, (a, b) in _VULGAR.items():
        text = text.replace(char, rf"\frac{{{a}}}{{{b}}}")
    for char, command in _UNICODE.items():
        text = text.replace(char, command)
    return unicodedata.normalize("NFKC", text)


def _thousands(text: str) -> str:
    """Digit groups joined; inside brackets a comma separates entries, and only LaTeX's explicit separators join."""
    text = _EXPLICIT.sub("", text)
    bracketed = re.search(r"[(\[]|\\\{", text) and re.search(r"\d,\d", text)
    if not bracketed:
        text = _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    return _SPACED.sub(lambda m: re.sub(r"\D", "", m[0]), text)


def _unwrap(text: str) -> str:
    for _ in range(6):
        text, count = _TEXT.subn(r" \1 ", text)
        if not count:
            break
    return text


@functools.lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    """The answer in one spelling. Linear in its length, and any string is allowed."""
    text = text.encode("utf-8", "replace").decode().replace("\x00", " ")
    text = _unicode(text)
    text = text.replace(r"\\", _ROW) if r"\begin" in text else re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = _REPEATING.sub(_repeating, text)
    text = _BARE_TEXT.sub(r"\\\1", text)
    text = re.sub(r"\\(?:text)?color\s*\{[A-Za-z]+\}", "", text)
    text = re.sub(r"\\\$|\\text\s*\{\s*\\?\$\s*\}", "¤", text)
    text = re.sub(r"\$(?=\s*\d)(?![^$]*\$)", "¤", text)  # one lone dollar before a number is money, a pair is LaTeX
    text = re.sub(r"(?<=[\w)}\]])\*\*(?=[\w({\\-])", "^", text.replace("$", " ")).replace("**", " ")
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = _thousands(_unwrap(_DROPPED.sub("", _thousands(text))))
    text = re.sub(r"\\[,;:> ~]|~|\\hspace\{[^{}]*\}|\\phantom\{[^{}]*\}", " ", text)
    text = re.sub(r"\\[A-Za-z]+", lambda m: _RENAMED[m[0]] + " " if m[0] in _RENAMED else m[0], text)
    text = re.sub(r"\\%|\\percent", "%", text).replace(r"\#", "#").replace(r"\&", "&").replace(r"\_", "_")
    text = re.sub(r"(?<![A-Za-z])(?:np|math|numpy)\.(?=[A-Za-z])", "", text)
    text = re.sub(r"(?<![\\A-Za-z])a(sin|cos|tan)(?=\s*\()", r"\\arc\1", text)
    text = _BARE.sub(lambda m: "\\" + m[0], text)
    text = re.sub(r"\\(dfrac|tfrac|cfrac)", r"\\frac", text).replace(r"\infinity", r"\infty")
    text = re.sub(r"\^\s*\\circ|\^\s*\{\s*\\circ\s*\}", r"^{\\circ}", text)
    text = re.sub(r"\\mathbb\s*\{?\s*R\s*\}?", r"\\R", text)
    text = re.sub(r"(?<=[\d.])\s*[xX]\s*(?=10\s*\^)", r"\\times ", text)
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text)  # 10^33 means 10^{33} to whoever types it
    text = re.sub(r"_\s*(\d+)", r"_{\1}", text)
    text = text.replace("<=", r"\leq ").replace(">=", r"\geq ").replace("!=", r"\neq ")
    text = re.sub(r"\s+", " ", text).strip()
    return _trim(text)


def _repeating(found: re.Match) -> str:
    """A repeating decimal as the fraction that it is."""
    whole, fixed, period = found[1] or "0", found[2], found[3]
    if len(fixed) + len(period) > 30:
        return found[0]
    bottom = int("9" * len(period) + "0" * len(fixed))
    return rf"\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{bottom}}}"


def _trim(text: str) -> str:
    """Without the punctuation of the sentence around it, and without braces or brackets that enclose all of it."""
    for _ in range(6):
        before = text
        text = text.strip(' \t\n"`*')
        text = re.sub(r"(?:[.,;:]|\\\\)+$", "", text) if not re.fullmatch(r"-?\d+\.", text) else text[:-1]
        text = re.sub(r"^[,;:=]+", "", text).strip()
        if text.startswith("{") and _closes(text) == len(text) - 1:
            text = text[1:-1].strip()
        if text == before:
            break
    return text


def _closes(text: str) -> int:
    """Where the bracket that opens the text closes; -1 if nowhere."""
    depth = 0
    for k, char in enumerate(text):
        if k and text[k - 1] == "\\":
            continue
        depth += (char in "({[") - (char in ")}]")
        if depth == 0:
            return k
    return -1


def compact(text: str) -> str:
    """Without spaces that mean nothing and braces around one character: the form in which strings are compared."""
    text = re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])", "\\1\x01", text)
    text = re.sub(r"(?<!\d) | (?!\d)", "", text).replace("\x01", " ")  # 1 4/5 is not 14/5
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)

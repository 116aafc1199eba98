r"""When two problems have the same text.

Equal are texts that are the same after: Unicode in its compatibility form and one case; dollars, \left, \right,
spacing commands and all white space away; \dfrac and \tfrac as \frac; punctuation at the end away. Numbers and
operators count, so that problems made from one template stay different.
"""

import re
import unicodedata

_SPACING = re.compile(r"\\(?:left|right)(?![a-z])|\\q?quad(?![a-z])|\\[,;:! ]|\\text\s*\{\s*\}|[\s$~]+")


def normalise(text: str) -> str:
    """The text that is compared."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"').replace("−", "-")
    return _SPACING.sub("", text).rstrip(".!:;,")

"""Prompts as token ids: the query, the integration prompt, and the leave-one-out contexts x_i.

Candidates enter as the ids that the policy wrote; they are never turned into text and back. Three styles:

  tiny   <q>P<try>                       <q>P<y>A_1<y>A_2<agg>               <q>P<y>A_1<agg>U<try>
  base   "Problem: P\\n\\nAttempt:\\n"      numbered attempts, then a cue       the same, the combined solution, a cue
  chat   the template around P           the template around all of this, one user turn

where P is the problem, A_k a candidate and U an integrated output. A reply to the first and to the third is a
candidate, so its tokens can be scored unchanged in either.

With contexts.attention=block the second and third come in parts (InBlocks): up to the first attempt, the attempts, the
rest. An attempt then has no number, since it must not tell which of the others are there.
"""

import bisect
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import transformers

from gcpo_jax import config as config_lib
from gcpo_jax.batching import InBlocks

Ids = list[int]
# Private use: where ids go in a text that is tokenised in pieces around them, and where its parts meet.
_HOLE, _CUT = "\ue000", "\ue001"


def read_tokenizer(path: str | pathlib.Path) -> Any:
    """The tokenizer of a Hugging Face directory; whatever transformers raises where there is none.

    Of a directory whose model_type is qwen2, AutoTokenizer keeps the vocabulary and puts Qwen2's own splitting of text
    in place of tokenizer.json's, also where tokenizer_config.json names the class that reads that file as it is.
    """
    settings = pathlib.Path(path) / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.exists() else None
    plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
    if plain and not (pathlib.Path(path) / "tokenizer.json").exists():
        raise FileNotFoundError("tokenizer_config.json names the class that reads it, but is tokenizer.json there?")
    reader = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
    return reader.from_pretrained(str(path), local_files_only=True)


def build(path: str, settings: config_lib.Contexts, prompt: str, eos_ids: Sequence[int]) -> "ContextBuilder":
    """The context builder of a model directory.

    Raises:
      ConfigError: where there is no tokenizer, or no end id to stop at.
    """
    if not eos_ids:
        raise config_lib.ConfigError(
            f"model.path={path!r}: neither config.json nor generation_config.json has eos_token_id"
        )
    try:
        tokenizer = read_tokenizer(path)
    except Exception as error:  # the libraries below raise what they like, some of it over many lines
        reason = " ".join(str(error).split())
        raise config_lib.ConfigError(f"model.path={path!r}: no tokenizer can be read there: {reason}") from error
    # Without its files, transformers makes one that knows no text and says nothing.
    if not tokenizer.encode("1", add_special_tokens=False):
        raise config_lib.ConfigError(
            f"model.path={path!r}: no tokenizer can be read there: it makes nothing of text; is tokenizer.json there?"
        )
    return ContextBuilder(tokenizer, settings, prompt, frozenset(eos_ids))


@dataclasses.dataclass
class ContextBuilder:
    """Builds contexts with one tokenizer in one style.

    Attributes:
      tokenizer: a transformers tokenizer.
      settings: see config.Contexts; "auto" is resolved at construction.
      prompt: the user's turn, with {problem} in it.
      end_ids: ids stripped from the end of a candidate.

    Raises:
      ConfigError: where the tokenizer cannot do the style.
    """

    tokenizer: Any
    settings: config_lib.Contexts
    prompt: str
    end_ids: frozenset[int]

    def __post_init__(self):
        vocabulary = self.tokenizer.get_vocab()
        tiny = all(t in vocabulary for t in ("<q>", "<y>", "<agg>", "<try>"))
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        style = self.settings.style
        if style == "auto":
            style = "tiny" if tiny else "chat" if chat else "base"
        if style == "tiny" and not tiny:
            raise config_lib.ConfigError("contexts.style='tiny': the tokenizer lacks <q>, <y>, <agg> or <try>")
        if style == "chat" and not chat:
            raise config_lib.ConfigError("contexts.style='chat': the tokenizer has no chat template")
        self.style = style
        self._blocks = self.settings.attention == "block"
        marked = self.tokenizer.encode("a") if style == "base" else []
        self._start = marked[: marked.index(self._ids("a")[0])] if marked else []  # <s>, where the tokenizer adds one
        self._pieces = functools.lru_cache(maxsize=4096)(self._render)
        if style == "chat":
            self._check_template()

    def raw(self, text: str) -> Ids:
        """Text that the policy goes on writing, without anything around it."""
        return self._start + self._ids(text)

    def query(self, problem: str) -> Ids:
        """The context of a candidate."""
        return self._fill(("query", problem, 0), [])

    def integrate(self, problem: str, candidates: Sequence[Ids]) -> Ids | InBlocks:
        """The context of an integrated output y_n: the query and every candidate."""
        return self._context(("integrate", problem, len(candidates)), candidates)

    def leave_one_out(self, problem: str, others: Sequence[Ids], integrated: Ids) -> Ids | InBlocks:
        """x_i (main text of the paper): the query, all candidates but y_i, an integrated output. A reply is a y_i."""
        return self._context(("leave_one_out", problem, len(others)), [*others, integrated])

    def quote(self, completion: Ids) -> Ids:
        """What of a completion stands in a context: no end ids, the part after </think> by setting, the last `cap` ids.

        Empty where an answer part is asked for and missing (thinking that never ended).
        """
        ids = list(completion)
        while ids and ids[-1] in self.end_ids:
            ids.pop()
        if self.settings.text != "full":
            answer = self._after_thinking(ids)
            if answer is not None:
                ids = answer
            elif self.settings.text == "answer":
                return []
        return ids[-self.settings.cap :]

    def _after_thinking(self, ids: Ids) -> Ids | None:
        """What follows the id that completes the last </think>; None where there is none."""

        # By text: where the mark is no token of its own, what precedes and follows it changes its ids.
        def marks(width: int) -> int:
            return self.tokenizer.decode(ids[:width]).count("</think>")

        total = marks(len(ids))
        return ids[bisect.bisect_left(range(len(ids)), total, key=marks) :] if total else None

    def _check_template(self) -> None:
        try:
            text = self._chat("leave_one_out", "a", 2)
        except Exception as error:  # templates raise what they like
            raise config_lib.ConfigError(f"contexts.style='chat': the template refuses a user turn: {error}") from error
        if text.count(_HOLE) != 3 or text.count(_CUT) != 3:
            raise config_lib.ConfigError("contexts.style='chat': the template does not show the user turn once, whole")

    def _context(self, kind: tuple[str, str, int], fillings: Sequence[Ids]) -> Ids | InBlocks:
        if not self._blocks:
            return self._fill(kind, fillings)
        attempts, left = kind[2], iter(fillings)
        first, *parts = (self._join(pieces, [next(left) for _ in pieces[1:]]) for pieces in self._pieces(*kind))
        return InBlocks(self._start + first, parts[:attempts], parts[attempts])

    def _fill(self, kind: tuple[str, str, int], fillings: Sequence[Ids]) -> Ids:
        (pieces,) = self._pieces(*kind)
        return self._start + self._join(pieces, fillings)

    @staticmethod
    def _join(pieces: Sequence[Ids], fillings: Sequence[Ids]) -> Ids:
        ids = list(pieces[0])
        for filling, piece in zip(fillings, pieces[1:], strict=True):
            ids += filling
            ids += piece
        return ids

    def _render(self, kind: str, problem: str, attempts: int) -> list[list[Ids]]:
        """Of each part of a text, the pieces around its holes."""
        problem = problem.replace(_HOLE, " ").replace(_CUT, " ")
        text = getattr(self, f"_{self.style}")(kind, problem, attempts)
        parts = text.split(_CUT) if self._blocks else [text.replace(_CUT, "")]
        return [[self._ids(piece) for piece in part.split(_HOLE)] for part in parts]

    def _number(self, text: str) -> str:
        return "" if self._blocks else text

    def _ids(self, text: str) -> Ids:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _tiny(self, kind: str, problem: str, attempts: int) -> str:
        turn = self.prompt.replace("{problem}", problem)
        if kind == "query":
            return f"<q>{turn}<try>"
        listed = f"<q>{turn}" + f"{_CUT}<y>{_HOLE}" * attempts + f"{_CUT}<agg>"
        return listed if kind == "integrate" else f"{listed}{_HOLE}<try>"

    def _base(self, kind: str, problem: str, attempts: int) -> str:
        turn = self.prompt.replace("{problem}", problem)
        if kind == "query":
            return f"Problem: {turn}\n\nAttempt:\n"
        numbers = [self._number(f" {k + 1}") for k in range(attempts)]
        listed = f"Problem: {turn}\n\n" + "".join(f"{_CUT}Attempt{k}:\n{_HOLE}\n\n" for k in numbers) + _CUT
        if kind == "integrate":
            return f"{listed}Careful final solution, using the attempts above:\n"
        return f"{listed}Combined solution:\n{_HOLE}\n\nAnother attempt:\n"

    def _chat(self, kind: str, problem: str, attempts: int) -> str:
        turn = self.prompt.replace("{problem}", problem)
        if kind != "query":
            numbers = [self._number(f" {k + 1}") for k in range(attempts)]
            turn = (
                f"Problem:\n{turn}\n\nBelow are {self._number(f'{attempts} ')}independent attempts at this problem. "
                "Each may be right, partly right or wrong.\n\n"
                + "".join(f"{_CUT}### Attempt{k}\n{_HOLE}\n\n" for k in numbers)
                + _CUT
            )
            if kind == "integrate":
                turn += (
                    "Compare the attempts, keep what is sound, repair what is not, and write one final solution "
                    "in the form that the problem asks for."
                )
            else:
                turn += (
                    f"### Combined solution\n{_HOLE}\n\n"
                    "Now solve the problem yourself, independently, in the form that it asks for."
                )
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )

"""Which device calls a step makes, found by running the step itself with an actor that only notes what is asked of it.

rollout.collect and learner.make_batch are the real ones; prompts, candidates and contexts are zeros of the lengths in
question, rewards alternate so that every group is active. An evaluation's calls are written out below.
"""

import contextlib
import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from gcpo_jax import learner, models, rollout, sampler, scorer
from gcpo_jax.batching import InBlocks, Prompt, bucket, chunks
from gcpo_jax.config import Config
from gcpo_jax.contexts import ContextBuilder, Ids
from gcpo_jax.metrics import Timers
from gcpo_jax.sampler import Samples

# Of a context beside problem and candidates: the chat template with the instructions, and the heading of an attempt.
FRAME_TOKENS, HEADING_TOKENS = 128, 12


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a device program, with its padded shapes."""

    phase: str  # "sample" | "integrate" | "contexts" | "score" | "evaluate"
    program: str  # "sampler" | "scorer" | "hidden"
    rows: int  # prompts of the sampler and the scorer, else rows
    width: int  # padded tokens of the prompt, or of the row
    n: int = 1  # completions of a prompt
    tokens: int = 0  # T, the most that are generated, or the padded completion that is scored
    rest: int = 0  # of the scorer: padded tokens between what prompts share and the completion
    blocks: tuple[int, int] = (0, 0)  # of the scorer: those between prompt and rest, and their padded tokens
    trie: tuple[int, int] = (1, 0)  # of the scorer: prompts of which each has one, and its nodes
    steps: int = 0  # decoded until the longest row ended
    slots: sampler.Call | None = None  # of the sampler


class Contexts(ContextBuilder):
    """Contexts of the greatest length that the settings allow."""

    def __init__(self, config: Config):
        self.settings, self.end_ids = config.contexts, frozenset()
        self.limit = config.rollout.max_prompt_tokens
        self.number = itertools.count(1)
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: "")

    def query(self, problem: str) -> Ids:
        """A prompt at the limit; those of different problems differ."""
        return [int(problem), *[0] * (self.limit - 1)]

    def integrate(self, problem: str, candidates: Sequence[Ids]) -> Ids | InBlocks:
        """The query and every candidate."""
        first = [int(problem), *[0] * (self.limit - 1)]
        if self.settings.attention == "block":
            blocks = [[k, *[0] * (HEADING_TOKENS - 1 + len(c))] for k, c in enumerate(candidates)]
            return InBlocks(first, blocks, [0] * FRAME_TOKENS)
        return first + [t for c in candidates for t in (*[0] * HEADING_TOKENS, *c)] + [0] * FRAME_TOKENS

    def leave_one_out(self, problem: str, others: Sequence[Ids], integrated: Ids) -> Ids | InBlocks:
        """The query, the other candidates and an integrated output, with which it differs from every other context."""
        listed = self.integrate(problem, others)
        more = [next(self.number), *[0] * (HEADING_TOKENS + len(integrated) - 1)]
        if isinstance(listed, InBlocks):
            return InBlocks(listed.first, listed.blocks, listed.ending + more)
        return [*listed, *more]

    def quote(self, completion: Ids) -> Ids:
        """At most contexts.cap of it; no part of it is known to be thinking."""
        return completion[-self.settings.cap :]


class _Phases(Timers):
    """Knows the phase that the step is in."""

    now = ""

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Enter a phase."""
        self.now = phase
        yield


@dataclasses.dataclass(frozen=True)
class _Recorder(rollout.Actor):
    """An Actor that computes nothing."""

    phases: _Phases
    calls: list[Call]
    mean: int | None  # tokens of a completion on average; None: all are as long as they may be
    rng: np.random.Generator

    @property
    def _shards(self) -> int:
        return 1 if self.model_config.layout is None else self.model_config.layout.row_shards

    def _note(self, program: str, **shapes) -> None:
        self.calls.append(Call(self.phases.now, program, **shapes))

    def sample(self, prompts: Sequence[Prompt], n: int, max_new_tokens: int, key, done=None, **shared: int) -> Samples:
        size = (len(prompts), n)
        lengths = np.full(size, max_new_tokens)
        if self.mean is not None:
            lengths = np.minimum(self.rng.integers(1, 2 * self.mean, size), max_new_tokens)
        at_once = self.config.rollout.max_rows
        families = sampler.arrange(prompts, n, at_once, self._shards, **shared)
        for numbers, call in sampler.calls(
            [len(p) for p in prompts], n, max_new_tokens, at_once, self._shards, families
        ):
            rows = lengths.reshape(len(families), -1)[numbers].reshape(-1, call.together)
            shapes = {"rows": call.prompts, "width": call.width, "n": n, "tokens": max_new_tokens}
            self._note("sampler", **shapes, steps=_steps(rows.max(axis=1), call.lanes), slots=call)
        tokens = [[[k] * int(t) for k, t in enumerate(row)] for row in lengths]  # no two of a prompt are equal
        for b, group in enumerate(tokens):
            if done is not None:
                done(b, group)
        return Samples(tokens, [])

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Ids], width: int, **shared: int) -> np.ndarray:
        for _, call in scorer.calls(prompts, completions, self.config.rollout.max_rows, self._shards, **shared):
            shape = call.shape
            shapes = {"rows": call.prompts, "width": shape.first, "n": shape.n, "tokens": call.tokens}
            shapes |= {"blocks": (shape.blocks, shape.block), "trie": (shape.family, shape.nodes)}
            self._note("scorer", **shapes, rest=shape.own - call.tokens)
        return np.zeros((len(prompts), width), np.float32)

    def last_hidden(self, sequences: Sequence[Ids]) -> np.ndarray:
        lengths = [len(s) for s in sequences]
        for rows, padded in chunks(lengths, self.config.rollout.max_rows, self._shards):
            self._note("hidden", rows=padded, width=bucket(max(lengths[r] for r in rows)))
        return np.ones((len(sequences), self.model_config.hidden_size), np.float32)

    def decode(self, completions: Sequence[Ids], skip_special: bool = True) -> list[str]:
        return [""] * len(completions)


def _steps(entries: np.ndarray, lanes: int) -> int:
    """Steps until entries of these lengths have passed through so many lanes, each as soon as a lane is free."""
    ends = [0] * lanes
    for length in entries:
        heapq.heapreplace(ends, ends[0] + int(length))
    return max(ends)


def _recorder(config: Config, model_config: models.ModelConfig, mean: int | None) -> _Recorder:
    return _Recorder(config, model_config, {}, Contexts(config), _Phases(), [], mean, np.random.default_rng(0))


def step(config: Config, model_config: models.ModelConfig, mean: int | None = None) -> tuple[list[Call], learner.Batch]:
    """The device calls of one step before its update, and the update's batch.

    Args:
      mean: tokens of a completion on average, uniform between 1 and twice that; None: every completion is as long as
        it may be, which is what memory must be enough for.
    """
    actor = _recorder(config, model_config, mean)
    outcome = itertools.cycle((0.0, 1.0))
    problems = [{"id": str(b), "problem": str(b)} for b in range(config.rollout.queries)]
    experience = rollout.collect(actor, lambda prompt, completion, row: next(outcome), problems, 0, actor.phases)
    with actor.phases("score"):
        batch = learner.make_batch(actor, {} if learner.uses_reference(config) else None, experience)
    return actor.calls, batch


def evaluation(config: Config, model_config: models.ModelConfig) -> list[Call]:
    """The device calls of an evaluation on as many problems as it may have, every completion as long as it may be."""
    actor = _recorder(config, model_config, None)
    prompts = [actor.contexts.query(str(k)) for k in range(config.evaluation.problems)]
    with actor.phases("evaluate"):
        for n in (config.evaluation.samples, 1):
            actor.sample(prompts, n, config.rollout.max_new_tokens, None)
    return actor.calls

"""Which device calls a step makes, found by running the step itself with an actor that only notes what is asked of it.

rollout.collect and learner.make_batch are the real ones; prompts, candidates and contexts are zeros of the lengths in
question, rewards alternate so that every group is active. An evaluation's calls are written out below.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from gcpo_jax import learner, models, rollout
from gcpo_jax.batching import bucket, chunks
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
    rows: int  # prompts of the sampler, else rows
    width: int  # padded tokens of the prompt, or of prompt and completion
    n: int = 1  # completions of a prompt
    tokens: int = 0  # T, the most that are generated; or the completion's columns that are scored
    steps: int = 0  # decoded until the longest row ended


class Contexts(ContextBuilder):
    """Contexts of the greatest length that the settings allow."""

    def __init__(self, config: Config):
        self.settings, self.end_ids = config.contexts, frozenset()
        self.limit = config.rollout.max_prompt_tokens
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: "")

    def query(self, problem: str) -> Ids:
        """A prompt at the limit."""
        return [0] * self.limit

    def integrate(self, problem: str, candidates: Sequence[Ids]) -> Ids:
        """The query and every candidate."""
        return [0] * (self.limit + FRAME_TOKENS + sum(HEADING_TOKENS + len(c) for c in candidates))

    def leave_one_out(self, problem: str, others: Sequence[Ids], integrated: Ids) -> Ids:
        """The query, the other candidates and an integrated output."""
        return self.integrate(problem, [*others, integrated])

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

    def sample(self, prompts: Sequence[Ids], n: int, max_new_tokens: int, key) -> Samples:
        size = (len(prompts), n)
        lengths = np.full(size, max_new_tokens)
        if self.mean is not None:
            lengths = np.minimum(self.rng.integers(1, 2 * self.mean, size), max_new_tokens)
        at_once = max(1, self.config.rollout.max_rows // n)
        for rows, padded in chunks([len(p) for p in prompts], at_once, self._shards):
            width = bucket(max(len(prompts[r]) for r in rows))
            steps = int(lengths[rows].max())
            self._note("sampler", rows=padded, width=width, n=n, tokens=max_new_tokens, steps=steps)
        return Samples([[[0] * int(t) for t in row] for row in lengths], [])

    def score(self, prompts: Sequence[Ids], completions: Sequence[Ids], width: int) -> np.ndarray:
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        for rows, padded in chunks(lengths, self.config.rollout.max_rows, self._shards):
            self._note("scorer", rows=padded, width=bucket(max(lengths[r] for r in rows) + 1), tokens=width)
        return np.zeros((len(prompts), width), np.float32)

    def last_hidden(self, sequences: Sequence[Ids]) -> np.ndarray:
        lengths = [len(s) for s in sequences]
        for rows, padded in chunks(lengths, self.config.rollout.max_rows, self._shards):
            self._note("hidden", rows=padded, width=bucket(max(lengths[r] for r in rows)))
        return np.ones((len(sequences), self.model_config.hidden_size), np.float32)

    def decode(self, completions: Sequence[Ids], skip_special: bool = True) -> list[str]:
        return [""] * len(completions)


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
    problems = [{"id": str(b), "problem": ""} for b in range(config.rollout.queries)]
    experience = rollout.collect(actor, lambda prompt, completion, row: next(outcome), problems, 0, actor.phases)
    with actor.phases("score"):
        batch = learner.make_batch(actor, {} if learner.uses_reference(config) else None, experience)
    return actor.calls, batch


def evaluation(config: Config, model_config: models.ModelConfig) -> list[Call]:
    """The device calls of an evaluation on as many problems as it may have, every completion as long as it may be."""
    actor = _recorder(config, model_config, None)
    prompts = [actor.contexts.query("")] * config.evaluation.problems
    with actor.phases("evaluate"):
        for n in (config.evaluation.samples, 1):
            actor.sample(prompts, n, config.rollout.max_new_tokens, None)
    return actor.calls

"""The update is compiled while the first step still samples and scores.

It is the longest compilation of a run, and its shapes are certain once everything that contexts are made of has been
sampled. So from then on a thread compiles it beside the roll-outs and the scores, which have compilations of their
own: a compiler keeps one core busy, and lets go of Python's lock. JAX hands the program over in memory. Only for one
process without a mesh: programs of several devices would have to begin in the same order everywhere.
"""

import atexit
import contextlib
import dataclasses
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gcpo_jax import learner, metrics, processes, rollout
from gcpo_jax.batching import Prompt
from gcpo_jax.contexts import Ids
from gcpo_jax.sampler import Samples

_threads: list[threading.Thread] = []
_status: int | None = None  # that the command is ending with


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Around all that a command does: its end does not wait for a compiler."""
    global _status
    _status = 1
    yield
    _status = 0


# From here, so that it comes after what others clean up at the end and before JAX does.
@atexit.register
def _end() -> None:
    if any(thread.is_alive() for thread in _threads):
        if _status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_status)
        for thread in _threads:  # a compiler that comes back to a Python that is gone aborts the process
            thread.join()


class Ahead:
    """Compiles one program in a thread of its own.

    Args:
      say: told, in one line, where that failed; the program is then compiled where it is called, as without all this.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say, self._thread, self._compiled = say, None, 0

    def start(self, lower: Callable[[], jax.stages.Lowered]) -> None:
        """Begin with what `lower` returns in that thread; a second call does nothing."""
        if self._thread is None:
            # A daemon, or Python would wait for it before it calls _end.
            self._thread = threading.Thread(target=self._work, args=(lower,), daemon=True)
            _threads.append(self._thread)
            self._thread.start()

    def wait(self) -> None:
        """Wait for it, so that no call compiles the same once more; counted as compiled by the thread that waits."""
        if self._thread is not None:
            self._thread.join()
            metrics.count_compiled(self._compiled)
            self._compiled = 0

    def _work(self, lower: Callable[[], jax.stages.Lowered]) -> None:
        before = metrics.compiled()  # threads that have ended leave their numbers to new ones
        try:
            lower().compile()
        except Exception as error:  # whatever it is, the call itself will meet it and raise it
            self._say(f"the update was not compiled beside the first step: {type(error).__name__}: {str(error)[:200]}")
        self._compiled = metrics.compiled() - before


@dataclasses.dataclass(frozen=True)
class Watched(rollout.Actor):
    """The actor of the first step: calls `begin` with what was sampled, once that decides the update's shapes."""

    begin: Callable[[list[Samples]], None]
    sampled: list[Samples] = dataclasses.field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], n: int, max_new_tokens: int, key, done=None, **shared: int) -> Samples:
        """As its parent."""
        # Candidates and, for the contexts of KL', integrated outputs.
        if len(self.sampled) == (2 if self.config.algorithm.kappa > 0 else 1):
            self.begin(self.sampled)
        self.sampled.append(super().sample(prompts, n, max_new_tokens, key, done, **shared))
        return self.sampled[-1]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Ids], width: int, **shared: int) -> np.ndarray:
        """As its parent."""
        self.begin(self.sampled)
        return super().score(prompts, completions, width, **shared)

    def last_hidden(self, sequences: Sequence[Ids]) -> np.ndarray:
        """As its parent."""
        self.begin(self.sampled)
        return super().last_hidden(sequences)


@dataclasses.dataclass(frozen=True)
class _Replay(rollout.Actor):
    """Samples what was sampled already, and computes nothing."""

    sampled: list[Samples]

    def sample(self, prompts: Sequence[Prompt], n: int, max_new_tokens: int, key, done=None, **shared: int) -> Samples:
        samples = self.sampled.pop(0)
        if done is not None:
            for b, group in enumerate(samples.tokens):
                done(b, group)
        return samples

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Ids], width: int, **shared: int) -> np.ndarray:
        return np.zeros((len(prompts), width), np.float32)


def batch_of(actor: rollout.Actor, rows: Sequence[dict[str, Any]], step: int, sampled: list[Samples]) -> learner.Batch:
    """The batch that step `step` will update with, in shapes and dtypes; its numbers mean nothing.

    Args:
      sampled: the step's candidates and, where there is KL', its integrated outputs.
    """
    # Rewards and causal factors decide no shape: KL' takes its targets from all groups alike.
    config = dataclasses.replace(
        actor.config, algorithm=dataclasses.replace(actor.config.algorithm, causal_factor="none")
    )
    replay = _Replay(config, actor.model_config, {}, actor.contexts, list(sampled))
    outcome = itertools.cycle((0.0, 1.0))
    exp = rollout.collect(replay, lambda *_: next(outcome), rows, step, metrics.Timers())
    return learner.make_batch(replay, {} if learner.uses_reference(config) else None, exp)


def watch(
    actor: rollout.Actor,
    rows: Sequence[dict[str, Any]],
    step: int,
    update: Any,
    state: learner.TrainState,
    ahead: Ahead,
) -> rollout.Actor:
    """An actor that samples the same, and has `update` compiled for `state` while it does."""
    if actor.model_config.layout is not None or processes.count() > 1:
        return actor

    def begin(sampled: list[Samples]) -> None:
        known = list(sampled)
        ahead.start(lambda: update.lower(state, batch_of(actor, rows, step, known)))

    return Watched(actor.config, actor.model_config, actor.params, actor.contexts, begin)

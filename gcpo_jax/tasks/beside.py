"""Grading beside the device's work: completions go in as they are sampled, rewards come out where they are used."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from gcpo_jax import processes
from gcpo_jax.tasks import rewards

_Job = tuple[int, str, Sequence[str], dict[str, Any]]


class Grading:
    """The rewards of one step. A context manager; leaving it ends what has not begun.

    A reward with a batch form is called in one thread of its own, with all that waits at that moment. One without is
    called where it is waited for, in the order of the groups: it may use what only the main thread may (signals).
    With several processes each grades its share of the groups, and all get all rewards.
    """

    def __init__(self, reward: rewards.Reward):
        self._reward = reward
        self._thread = ThreadPoolExecutor(1, "grading") if getattr(reward, "batch", None) is not None else None
        self._lock = threading.Lock()
        self._waiting: list[_Job] = []
        self._begun: list[Future[None]] = []
        self._values: dict[int, np.ndarray] = {}
        self.seconds = 0.0  # spent in the reward

    def __enter__(self) -> "Grading":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def add(self, group: int, prompt: str, completions: Sequence[str], row: dict[str, Any]) -> None:
        """Have completions of one prompt graded, as the group of that number."""
        if group % processes.count() != processes.index():
            return
        with self._lock:
            self._waiting.append((group, prompt, completions, row))
        if self._thread is not None:
            self._begun.append(self._thread.submit(self._grade))

    def wait(self) -> dict[int, np.ndarray]:
        """The rewards [completions] of every group added since the last call.

        Raises:
          RewardError: as rewards.score, in every process where it is raised in one.
        """
        shares = processes.together(self._share, rewards.RewardError)
        return {group: np.array(values, np.float64) for share in shares for group, values in share}

    def _share(self) -> list[tuple[int, list[float]]]:
        if self._thread is None:
            self._waiting.sort(key=lambda job: job[0])
            self._grade()
        for job in self._begun:
            job.result()
        values, self._values, self._begun = self._values, {}, []
        return [(group, part.tolist()) for group, part in values.items()]

    def _grade(self) -> None:
        """Grade all that waits; nothing, where an earlier call took it along."""
        with self._lock:
            jobs, self._waiting = self._waiting, []
        if not jobs:
            return
        began = time.perf_counter()
        values = rewards.score(
            self._reward,
            [prompt for _, prompt, completions, _ in jobs for _ in completions],
            [text for _, _, completions, _ in jobs for text in completions],
            [row for _, _, completions, row in jobs for _ in completions],
        )
        self.seconds += time.perf_counter() - began
        ends = np.cumsum([len(completions) for _, _, completions, _ in jobs])
        for (group, *_), part in zip(jobs, np.split(values, ends[:-1]), strict=True):
            self._values[group] = part

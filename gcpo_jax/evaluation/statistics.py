"""What is said of graded samples: accuracy with its error, pass@k, majority votes, paired differences.

N problems, n samples of each. Problems are the clusters: samples of one problem are not independent of each other.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is 0."""
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0


def clustered(scores: np.ndarray) -> tuple[float, float]:
    """Mean of scores[N, n] and its standard error, clustered by problem.

    sqrt( N/(N-1) sum_i (sum_j (s_ij - mean))^2 ) / (N n), as in Miller, "Adding error bars to evals" (2411.00640), with
    the correction for few clusters. For n samples of each it is the error of the mean of the problems' means.
    """
    scores = np.asarray(scores, np.float64)
    N, n = scores.shape
    mean = float(scores.mean())
    sums = (scores - mean).sum(1)
    return mean, float(math.sqrt(N / (N - 1) * (sums**2).sum()) / (N * n)) if N > 1 else 0.0


def mean_of(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of independent (mean, error) pairs, each counting the same, and its error."""
    means, errors = zip(*parts, strict=True)
    return sum(means) / len(parts), math.sqrt(sum(e * e for e in errors)) / len(parts)


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of b - a and its error, from problem means a[N] and b[N] of the same problems in the same order."""
    return mean_and_error(np.asarray(b, np.float64) - np.asarray(a, np.float64))


def pass_at_k(correct: int, n: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, c of them correct, hold a correct one.

    Unbiased for the chance that k fresh samples hold one (Chen et al., 2107.03374).

    Raises:
      ValueError: where k is not in [1, n].
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be in [1, {n}]")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """Score of the most frequent answer; ties share. Completions without an answer (None) do not vote."""
    votes: dict[str, list[float]] = {}
    for a, s in zip(answers, scores, strict=True):
        if a is not None:
            votes.setdefault(a, []).append(s)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([v for votes_of in votes.values() if len(votes_of) == most for v in votes_of]))


def majority_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """Mean of `majority` over all C(n, k) ways to pick k of the n samples: unbiased for k fresh samples.

    Raises:
      ValueError: where k is not in [1, n].
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"k={k}: must be in [1, {len(answers)}]")
    votes: dict[str, list[float]] = {}
    for a, s in zip(answers, scores, strict=True):
        if a is not None:
            votes.setdefault(a, []).append(s)
    counts = tuple(sorted(map(len, votes.values())))
    wins = _wins(counts, len(answers) - sum(counts), k)
    # Inside a class any sample is as likely to be picked as another, so it counts with its mean score.
    return float(sum(wins[len(v)] * np.mean(v) for v in votes.values()))


@functools.lru_cache(maxsize=4096)
def _wins(counts: tuple[int, ...], silent: int, k: int) -> dict[int, float]:
    """{size of a class: its mean share of the win}, for classes of these sizes and `silent` samples without a vote."""
    total = math.comb(sum(counts) + silent, k)
    shares = {}
    for size in set(counts):
        others = list(counts)
        others.remove(size)
        share = 0.0
        for m in range(1, min(k, size) + 1):
            for (used, tied), ways in _picks(others, m, k - m).items():
                left = k - m - used
                share += math.comb(size, m) * ways * math.comb(silent, left) / (1 + tied)
        shares[size] = share / total
    return shares


def _picks(sizes: Sequence[int], most: int, room: int) -> dict[tuple[int, int], int]:
    """Ways to pick at most `most` of each class, by (how many in all, how many classes give exactly `most`)."""
    ways = {(0, 0): 1}
    for size in sizes:
        grown: dict[tuple[int, int], int] = {}
        for (used, tied), count in ways.items():
            for m in range(min(size, most, room - used) + 1):
                at = (used + m, tied + (m == most))
                grown[at] = grown.get(at, 0) + count * math.comb(size, m)
        ways = grown
    return ways

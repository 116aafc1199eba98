import itertools
import math

import numpy as np
import pytest

from gcpo_jax.evaluation import statistics


def test_pass_at_k_is_the_share_of_picks_that_hold_a_right_sample():
    for n in (1, 3, 6):
        for correct in range(n + 1):
            right = [True] * correct + [False] * (n - correct)
            for k in range(1, n + 1):
                picks = [any(pick) for pick in itertools.combinations(right, k)]
                assert statistics.pass_at_k(correct, n, k) == pytest.approx(sum(picks) / len(picks), abs=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.03, 0.5, 1.0])
def test_pass_at_k_is_unbiased_for_fresh_samples(p):
    n = 20
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in (1, 4, 20):
        expected = sum(w * statistics.pass_at_k(c, n, k) for c, w in enumerate(chance))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_more_picks_than_samples_are_refused(k):
    with pytest.raises(ValueError, match=r"must be in \[1, 4\]"):
        statistics.pass_at_k(1, 4, k)
    with pytest.raises(ValueError, match=r"must be in \[1, 4\]"):
        statistics.majority_at_k(["a"] * 4, [1.0] * 4, k)


@pytest.mark.parametrize("seed", range(40))
def test_majority_at_k_is_the_mean_over_all_picks(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    answers = [None if a == 0 else "abcde"[a - 1] for a in rng.integers(0, int(rng.integers(2, 6)), n)]
    scores = (
        rng.integers(0, 2, n).astype(float).tolist()
    )  # not a function of the answer: graders may differ on spellings
    for k in range(1, n + 1):
        picks = [
            statistics.majority([answers[i] for i in pick], [scores[i] for i in pick])
            for pick in itertools.combinations(range(n), k)
        ]
        assert statistics.majority_at_k(answers, scores, k) == pytest.approx(np.mean(picks), abs=1e-12)


def test_votes_by_hand():
    assert statistics.majority(["7", "7", "9", None], [0.0, 0.0, 1.0, 0.0]) == 0.0
    assert statistics.majority(["7", "9"], [0.0, 1.0]) == 0.5
    assert statistics.majority([None, None], [0.0, 0.0]) == 0.0
    # Of three picks of two from 9, 9, 7: once 9 alone, twice a tie.
    assert statistics.majority_at_k(["9", "9", "7"], [1.0, 1.0, 0.0], 2) == pytest.approx(2 / 3)


def test_many_different_answers_take_no_time():
    answers = [str(k // 2) for k in range(64)]
    assert statistics.majority_at_k(answers, [1.0] * 64, 4) == pytest.approx(1.0)


def test_the_clustered_error_is_that_of_the_problems_means():
    scores = np.random.default_rng(0).integers(0, 2, (13, 7))
    mean, error = statistics.clustered(scores)
    assert mean == pytest.approx(scores.mean())
    assert error == pytest.approx(scores.mean(1).std(ddof=1) / math.sqrt(13))
    assert (mean, error) == pytest.approx(statistics.mean_and_error(scores.mean(1)))


def test_one_sample_of_each_has_the_binomial_error_and_one_problem_none():
    scores = np.array([[1.0]] * 30 + [[0.0]] * 70)
    assert statistics.clustered(scores) == pytest.approx((0.3, math.sqrt(0.3 * 0.7 / 99)))
    assert statistics.clustered(np.array([[1.0, 0.0]])) == (0.5, 0.0)


def test_the_clustered_error_is_the_spread_of_repeated_evaluations():
    rng = np.random.default_rng(1)
    N, n, times = 40, 8, 3000
    # Every evaluation has problems of its own, some hard and some easy.
    scores = rng.random((times, N, n)) < rng.beta(0.5, 0.5, (times, N, 1))
    means, errors = np.array([statistics.clustered(s) for s in scores]).T
    assert math.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.04)
    unclustered = math.sqrt(0.25 / (N * n))
    assert unclustered < 0.6 * means.std()


def test_a_paired_difference_has_the_error_of_the_differences():
    rng = np.random.default_rng(2)
    difficulty = rng.random(2000)
    a, b = difficulty + 0.05 * rng.standard_normal(2000), difficulty + 0.1 + 0.05 * rng.standard_normal(2000)
    difference, error = statistics.paired(a, b)
    assert difference == pytest.approx(0.1, abs=0.01)
    assert error == pytest.approx(0.05 * math.sqrt(2 / 2000), rel=0.1)
    assert error < 0.3 * math.hypot(statistics.mean_and_error(a)[1], statistics.mean_and_error(b)[1])


def test_the_mean_of_benchmarks_counts_each_the_same():
    mean, error = statistics.mean_of([(0.2, 0.03), (0.4, 0.04)])
    assert (mean, error) == pytest.approx((0.3, 0.025))

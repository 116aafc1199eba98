"""Projection, causal factor and projected reference: hand-derived values, identities, limits, exchangeability."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gcpo_jax import causal

properties = settings(max_examples=25, deadline=None)
numbers = hnp.arrays(np.float32, (3, 5), elements=st.floats(-10, 10, width=32, allow_subnormal=False))
probabilities = hnp.arrays(np.float32, (2, 5), elements=st.floats(0, 1, width=32))


class Values(chex.TestCase):
    """Each function at points where pencil and paper give the answer."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_cosine_factor_of_eq_11(self):
        z = np.array([[1.0, 0.0], [0.0, 1.0]])  # mean (½, ½)
        z_x, z_phi = np.array([[0.5, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.5], [0.5, 0.5]])
        # Targets (1, 0) and (0, 0): parallel to the first candidate; no direction at all for the second.
        got = self.variant(causal.causal_factor)(z, z_x, z_phi)
        np.testing.assert_allclose(got, [2.0, 0.0], atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_euclidean_and_gaussian_factors(self):
        z = np.array([[0.0, 0.0], [6.0, 8.0], [0.0, 1.0]])  # mean (2, 3)
        distance = np.array([np.sqrt(13), np.sqrt(41), np.sqrt(8)])
        zero = np.zeros_like(z)
        euclidean = self.variant(lambda: causal.causal_factor(z, zero, zero, 1.5, "euclidean"))()
        np.testing.assert_allclose(euclidean, -1.5 * distance, rtol=1e-6)
        gaussian = self.variant(lambda: causal.causal_factor(z, zero, zero, 1.0, "gaussian"))()
        np.testing.assert_allclose(gaussian, np.exp(-(distance**2) / (2 * 13)), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_projected_reference_of_eq_13(self):
        got = self.variant(causal.projected_probs)(
            np.array([0.5, 0.1, 0.9, 0.3]), np.array([0.25, 0.6, 0.2, 0.3]), np.array([0.1, 0.2, 0.7, 0.4])
        )
        np.testing.assert_allclose(got, [0.35, 1e-4, 1.0, 0.4], rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_bayes_weights_are_the_tempered_posterior(self):
        loglik = np.log(np.array([[[0.16, 0.04], [0.25, 0.25]]]))
        weights, effective = self.variant(causal.bayes_weights)(loglik, np.array([2]))
        np.testing.assert_allclose(weights, [[[2 / 3, 1 / 3], [0.5, 0.5]]], rtol=1e-5)
        np.testing.assert_allclose(effective, [[9 / 5, 2.0]], rtol=1e-5)


@given(numbers, hnp.arrays(np.float32, (5,), elements=st.floats(-10, 10, width=32, allow_subnormal=False)))
@properties
def test_projecting_twice_is_projecting_once_and_the_correction_is_orthogonal(f, baseline):
    # Φ: the mean over the rows, a conditional expectation under the uniform law on them.
    b = np.broadcast_to(baseline, f.shape)
    once = causal.project(f, np.broadcast_to(f.mean(0), f.shape), b)
    phi = np.broadcast_to(once.mean(0), f.shape)
    np.testing.assert_allclose(phi, b, atol=1e-5)
    np.testing.assert_allclose(causal.project(once, phi, b), once, atol=1e-5)
    # f - f_proj = Φf - b is constant over the rows, f_proj - b has mean zero there: orthogonal, for every f and b.
    np.testing.assert_allclose(np.sum((f - once) * (once - b), 0), 0, atol=1e-2)


@given(numbers)
@properties
def test_identical_representations_without_correction_give_exactly_alpha(z):
    z = np.broadcast_to(np.where(np.abs(z[:1]).max() > 0, z[:1], 1), z.shape).astype(np.float32)
    assert np.all(causal.causal_factor(z, z, z, alpha=1.0) == 1)
    assert np.all(causal.causal_factor(z, z, z, alpha=0.5) == 0.5)


@given(numbers, numbers, numbers)
@properties
def test_the_cosine_is_bounded_and_that_of_float64(z, z_x, z_phi):
    got = causal.causal_factor(z, z_x, z_phi, alpha=1.0)
    target = z_x.astype(np.float64) - z_phi + z.mean(0, dtype=np.float64)
    norms = np.linalg.norm(z.astype(np.float64), axis=-1) * np.linalg.norm(target, axis=-1)
    clear = (norms > 1e-2) & (np.linalg.norm(target, axis=-1) > 1e-2)
    expected = np.sum(z * target, -1) / np.maximum(norms, 1e-30)
    np.testing.assert_allclose(np.where(clear, got, 0), np.where(clear, expected, 0), atol=1e-4)
    assert np.all(np.abs(got) <= 1 + 1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_cosine_does_not_depend_on_the_scale(scale):
    rng = np.random.default_rng(0)
    z, z_x, z_phi = rng.normal(size=(3, 4, 6))
    expected = causal.causal_factor(z, z_x, z_phi)
    np.testing.assert_allclose(causal.causal_factor(z * scale, z_x * scale, z_phi * scale), expected, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
@pytest.mark.parametrize("z", [np.zeros((3, 4)), np.ones((3, 4)), np.eye(3, 4)])
def test_gradients_are_finite_at_zero_norm_and_zero_distance(similarity, z):
    def total(z, z_x, z_phi):
        return causal.causal_factor(z, z_x, z_phi, similarity=similarity).sum()

    z = jnp.float32(z)
    chex.assert_tree_all_finite(jax.value_and_grad(total, argnums=(0, 1, 2))(z, z, z))
    chex.assert_tree_all_finite(jax.value_and_grad(total, argnums=(0, 1, 2))(z, z - z.mean(0)[None], z))


@given(probabilities, probabilities, probabilities)
@properties
def test_projected_probabilities_are_in_range_and_exact_inside_it(p_x, p_phi, p_q):
    got = np.asarray(causal.projected_probs(p_x, p_phi, p_q))
    assert np.all((got >= np.float32(1e-4)) & (got <= 1))
    raw = p_x - p_phi + p_q
    inside = (raw > 1e-4) & (raw < 1)
    np.testing.assert_allclose(got[inside], raw[inside], atol=1e-6)


@given(st.sampled_from([2, 8]), st.integers(0, 1000))
@properties
def test_with_one_context_psi_vanishes_and_only_the_centroid_is_left(n, seed):
    rng = np.random.default_rng(seed)
    z, z_x = rng.normal(size=(2, n, 5)).astype(np.float32)
    z_phi = z_x  # L = 1: the mean over {y_n} is y_n itself
    centroid = causal.causal_factor(z, np.zeros_like(z), np.zeros_like(z))
    np.testing.assert_allclose(causal.causal_factor(z, z_x, z_phi), centroid, atol=1e-6)
    p_x, p_q = rng.uniform(1e-3, 1, (2, 8)).astype(np.float32)
    np.testing.assert_allclose(causal.projected_probs(p_x, p_x, p_q), p_q, atol=1e-6)


def test_the_mass_of_eq_13_is_one_with_a_mean_and_two_minus_n_with_the_printed_sum():
    rng = np.random.default_rng(0)
    for n in (2, 3, 8):
        p_x = rng.dirichlet(np.ones(11), size=n)  # π(. | x_i with y_n,l), l = 0 .. n - 1
        p_q = rng.dirichlet(np.ones(11))
        with_mean = causal.project(p_x[0], p_x.mean(0), p_q)
        with_sum = causal.project(p_x[0], p_x.sum(0), p_q)
        np.testing.assert_allclose(with_mean.sum(), 1, atol=1e-5)
        np.testing.assert_allclose(with_sum.sum(), 2 - n, atol=1e-5)


def test_the_correction_averages_to_zero_over_which_draw_is_called_y_n():
    # The y_n,l are exchangeable: under shared sampling the correction is noise of mean zero, given the candidates.
    rng = np.random.default_rng(0)
    L, shape = 5, (4, 6)
    z_l = rng.normal(size=(L, *shape)).astype(np.float32)
    zero = np.zeros(shape, np.float32)
    corrections = [causal.project(z_l[first], z_l.mean(0), zero) for first in range(L)]
    assert np.abs(corrections[0]).max() > 0.1
    np.testing.assert_allclose(np.mean(corrections, 0), 0, atol=1e-6)


def test_the_factor_follows_a_permutation_of_the_candidates():
    z, z_x, z_phi = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    for similarity, order in itertools.product(("cosine", "euclidean", "gaussian"), ([3, 1, 0, 2], [1, 0, 3, 2])):
        got = causal.causal_factor(z[order], z_x[order], z_phi[order], similarity=similarity)
        expected = causal.causal_factor(z, z_x, z_phi, similarity=similarity)[jnp.array(order)]
        np.testing.assert_allclose(got, expected, atol=1e-5)


@given(st.integers(0, 1000), st.floats(-1e4, 0))
@properties
def test_bayes_weights_sum_to_one_and_keep_between_one_and_n_candidates(seed, low):
    loglik = np.random.default_rng(seed).uniform(low, 0, (2, 3, 3))
    weights, effective = causal.bayes_weights(loglik, np.array([1, 40]))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.all((effective >= 1 - 1e-4) & (effective <= 3 + 1e-4))


def test_equally_likely_candidates_get_equal_bayes_weights_and_the_factor_of_the_centroid():
    z = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    weights, effective = causal.bayes_weights(np.full((4, 4), -30.0), np.int32(7))
    np.testing.assert_allclose(weights, 0.25)
    np.testing.assert_allclose(effective, 4.0)
    mean = np.broadcast_to(z.mean(0), z.shape)
    got = causal.causal_factor(z, weights @ z, mean)
    np.testing.assert_allclose(got, causal.causal_factor(z, mean, mean), atol=1e-6)


def test_bfloat16_and_float64_inputs_are_computed_in_float32_over_any_leading_axes():
    rng = np.random.default_rng(0)
    low = [jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(3, 2, 3, 4, 6))]
    high = [np.asarray(x, np.float64) for x in low]
    for similarity in ("cosine", "euclidean", "gaussian"):
        got = causal.causal_factor(*low, similarity=similarity)
        assert got.dtype == jnp.float32 and got.shape == (2, 3, 4)
        chex.assert_trees_all_equal(got, causal.causal_factor(*high, similarity=similarity))
        part = causal.causal_factor(*(x[1, 2] for x in low), similarity=similarity)
        np.testing.assert_allclose(got[1, 2], part, atol=1e-6)
    assert causal.projected_probs(*low).dtype == causal.project(*low).dtype == jnp.float32


def test_an_unknown_similarity_is_named():
    with pytest.raises(ValueError, match="similarity='dot'"):
        causal.causal_factor(*np.ones((3, 2, 2)), similarity="dot")

"""What holds of projection and integrated outputs where the structural model is known exactly.

Candidates y_i are independent given q, the integrated output y_n depends on all of them, x_i is everything but y_i,
Φ = E[. | q, y_{-i}], b = E[y_i | q]. The risk of f as a predictor of y_0 is E(y_0 - f)². Two claims of the paper hold
in a corrected form, which is tested: Theorem 1, risk(f) - risk(f_proj) = E(Φf - b)²; Corollary 2, risk(b) -
risk(f_proj) = E(Ψf*)² - E(Ψf - Ψf*)², f* the exact conditional expectation, and not always above 0.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcpo_jax import causal, objectives

SAMPLES, N, L = 400_000, 5, 8
A, C, SIGMA, TAU = 0.8, 0.3, 1.0, 1.0
W = np.full(N, 1.0)  # b_i, the weights of the candidates in y_n
S2 = W[0] ** 2 * SIGMA**2 + TAU**2  # Var(y_n | q, y_{-0})
K = W[0] * SIGMA**2 / S2
GAIN = W[0] ** 2 * SIGMA**4 / S2  # E(Ψf*)² = E Var(y_0 | q) - E Var(y_0 | x)


@functools.cache
def world():
    """q, candidates y[N] and y_n of the linear-Gaussian model, one value a sample."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=SAMPLES)
    y = A * q + SIGMA * rng.normal(size=(N, SAMPLES))
    return rng, q, y, C * q + W @ y + TAU * rng.normal(size=SAMPLES)


def surprise(y_n, q, y):
    """y_n - E[y_n | q, y_{-0}]: what y_n says of y_0."""
    return y_n - (C * q + W[0] * A * q + W[1:] @ y[1:])


def risk(y, f):
    return np.mean((y[0] - np.asarray(f, np.float64)) ** 2)


def test_theorem_1_the_projection_gains_exactly_the_squared_bias_of_phi_f():
    _, q, y, y_n = world()
    h = 0.5 * np.sin(q) + 0.3 * y[1] * y[2]
    f = A * q + K * surprise(y_n, q, y) + h
    f_proj = causal.project(f, A * q + h, A * q)
    assert risk(y, f) - risk(y, f_proj) == pytest.approx(np.mean(h**2), abs=1e-2)
    assert risk(y, A * q) - risk(y, f_proj) == pytest.approx(GAIN, abs=1e-2)


def test_corollary_2_fails_where_psi_f_is_far_from_that_of_the_exact_posterior():
    _, q, y, y_n = world()
    w = surprise(y_n, q, y)
    h, g = 0.4 * y[1], 0.3 * (w**2 - S2) + 0.7 * w  # E[g | q, y_{-0}] = 0
    f = A * q + K * w + h + g
    f_proj = causal.project(f, A * q + h, A * q)
    delta_2 = risk(y, A * q) - risk(y, f_proj)
    assert risk(y, f) - risk(y, f_proj) == pytest.approx(np.mean(h**2), abs=2e-2)  # Theorem 1 does not care
    assert delta_2 == pytest.approx(GAIN - np.mean(g**2), abs=2e-2)
    assert delta_2 < -0.5


def test_theorem_1_with_an_imperfect_baseline_loses_what_the_baseline_is_off():
    _, q, y, y_n = world()
    h, d = 0.4 * y[1], 0.6 * np.cos(q)
    f = A * q + K * surprise(y_n, q, y) + h
    f_proj = causal.project(f, A * q + h, A * q + d)
    expected = np.mean(h**2) - np.mean(d**2)
    assert risk(y, f) - risk(y, f_proj) == pytest.approx(expected, abs=1e-2)


def test_theorem_1_fails_where_candidates_depend_on_each_other():
    rng, q, y, _ = world()
    y = y.copy()
    y[0] = A * q + 0.7 * (y[1] - A * q) + SIGMA * rng.normal(size=SAMPLES)
    f = A * q + 0.7 * (y[1] - A * q)  # E[y_0 | q, y_{-0}], and its own Φ
    assert risk(y, f) - risk(y, causal.project(f, f, A * q)) == pytest.approx(-0.49 * SIGMA**2, abs=1e-2)


def test_shared_sampling_gives_a_correction_without_information_and_a_higher_risk():
    rng, q, y, y_n = world()
    draws = [y_n] + [C * q + W @ y + TAU * rng.normal(size=SAMPLES) for _ in range(L - 1)]
    f = [A * q + K * surprise(u, q, y) for u in draws]
    psi = np.asarray(causal.project(f[0], np.mean(f, 0), 0 * q), np.float64)
    expected = -(K**2) * TAU**2 * (1 - 1 / L)
    assert risk(y, A * q) - risk(y, A * q + psi) == pytest.approx(expected, abs=1e-2)
    assert np.corrcoef(psi, y[0] - A * q)[0, 1] == pytest.approx(0, abs=1e-2)
    exact = K * surprise(y_n, q, y)
    assert np.corrcoef(exact, y[0] - A * q)[0, 1] == pytest.approx(np.sqrt(GAIN) / SIGMA, abs=1e-2)


def test_resampling_y_0_gains_all_but_the_self_included_share():
    rng, q, y, y_n = world()
    draws = [y_n]
    for _ in range(L - 1):
        fresh = np.concatenate([A * q[None] + SIGMA * rng.normal(size=(1, SAMPLES)), y[1:]])
        draws.append(C * q + W @ fresh + TAU * rng.normal(size=SAMPLES))
    f = [A * q + K * surprise(u, q, y) for u in draws]
    f_proj = causal.project(f[0], np.mean(f, 0), A * q)
    assert risk(y, A * q) - risk(y, f_proj) == pytest.approx((1 - 1 / L) * GAIN, abs=1e-2)


@pytest.mark.parametrize("partners", [1, N - 1])
def test_swapping_partners_gains_all_but_one_over_their_number(partners):
    rng, q, y, _ = world()
    # u_k integrates every candidate but k; with target 0 and partner k neither candidate is in the context.
    u = [C * q + W[0] * (y.sum(0) - y[k]) + TAU * rng.normal(size=SAMPLES) for k in range(N)]

    def posterior_mean(integrated, k):
        others = W[0] * (y.sum(0) - y[0] - y[k])
        return A * q + K * (integrated - (C * q + others + W[0] * A * q))

    chosen = range(1, partners + 1)
    f = np.mean([posterior_mean(u[k], k) for k in chosen], 0)
    phi = np.mean([posterior_mean(u[0], k) for k in chosen], 0)
    f_proj = causal.project(f, phi, A * q)
    assert risk(y, A * q) - risk(y, f_proj) == pytest.approx((1 - 1 / partners) * GAIN, abs=1e-2)


# The discrete twin: one-token candidates of V = 4, y_n a softmax of the candidates' counts, everything enumerable.

V = 4
P_Q = np.array([0.1, 0.2, 0.3, 0.4])
SCORES = np.random.default_rng(3).normal(size=(V, V))


def integrated_law(candidates):
    """π(y_n = . | q, candidates)."""
    logits = SCORES[:, list(candidates)].sum(1)
    p = np.exp(logits - logits.max())
    return p / p.sum()


def posterior(others, y_n):
    """p(y_i = . | q, y_{-i}, y_n), by Bayes' rule."""
    joint = P_Q * np.array([integrated_law([*others, v])[y_n] for v in range(V)])
    return joint / joint.sum()


OTHERS = list(itertools.product(range(V), repeat=2))


@pytest.mark.parametrize("others", OTHERS[::5])
def test_the_exact_posterior_averages_to_the_prior_only_if_y_i_is_redrawn(others):
    table = np.array([posterior(others, u) for u in range(V)])  # [y_n, y_i]
    redrawn = sum(P_Q[v] * integrated_law([*others, v]) for v in range(V))
    np.testing.assert_allclose(redrawn @ table, P_Q, atol=1e-12)
    # With the actual y_i = v behind every y_n, the policy's own exact posterior is pushed away from v.
    excess = np.array([integrated_law([*others, v]) @ table[:, v] - P_Q[v] for v in range(V)])
    assert np.all(excess > 0) and excess.max() > 1e-4


def toy_logits(params, context):
    """A two-layer model of the next token given one-hot contexts [..., 3, V]."""
    hidden = jnp.tanh(jnp.einsum("...sv,svh->...h", context, params["in"]))
    return jnp.einsum("...h,hv->...v", hidden, params["out"])


@functools.cache
def toy():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"in": jax.random.normal(keys[0], (3, V, 6)), "out": 0.3 * jax.random.normal(keys[1], (6, V))}
    contexts = jax.nn.one_hot(jnp.array([[0, 1, u] for u in range(V)]), V)  # x_i with y_n,l = u
    return params, contexts


@pytest.mark.parametrize("token", range(V))
def test_kl_prime_in_the_context_x_moves_the_policy_by_the_gap_of_eq_1(token):
    params, contexts = toy()

    def logp(params, which):
        return jax.nn.log_softmax(toy_logits(params, contexts[which]))[token]

    p = jnp.exp(jnp.array([logp(params, u) for u in range(V)]))
    p_0, p_bar, p_q = p[:1], p.mean()[None], jnp.float32(P_Q[token])[None]
    target = jnp.log(causal.project(p_0, p_bar, p_q))
    got = jax.grad(lambda params: objectives.kl_k3(logp(params, 0)[None], target)[0])(params)
    coefficient = (p_bar - p_q) / p_0
    expected = jax.tree.map(lambda g: coefficient[0] * g, jax.grad(logp)(params, 0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_kl_prime_in_the_context_q_averages_to_nothing():
    # Whichever of the exchangeable y_n,l is called y_n, the coefficients (p̄ - p_l) / p_q sum to zero.
    params, contexts = toy()
    p_l = np.asarray(jax.nn.softmax(toy_logits(params, contexts)))
    p_q, p_bar = P_Q[None].astype(np.float32), p_l.mean(0, keepdims=True)
    logp_q = jnp.log(p_q)
    coefficients = [
        jax.grad(lambda x, p=p: objectives.kl_k3(x, jnp.log(causal.project(p[None], p_bar, p_q))).sum())(logp_q)
        for p in 0.2 * p_l + 0.8 * p_bar  # closer to their mean, so that every target is positive
    ]
    np.testing.assert_allclose(np.mean(coefficients, 0), 0, atol=1e-6)
    assert np.abs(coefficients[0]).max() > 1e-2


@pytest.mark.parametrize("others", OTHERS[::3])
def test_bayes_weights_of_candidates_drawn_from_the_prior_are_the_exact_posterior(others):
    candidates = np.repeat(np.arange(V), (10 * P_Q).round().astype(int))  # in the prior's proportions
    n = len(candidates)
    one_hot = np.eye(V, dtype=np.float32)[candidates]
    for y_n in range(V):
        loglik = np.log([integrated_law([*others, v])[y_n] for v in candidates])
        weights, effective = causal.bayes_weights(np.broadcast_to(loglik, (n, n)), np.int32(1))
        np.testing.assert_allclose(weights[0] @ one_hot, posterior(others, y_n), atol=1e-6)
        assert 1 <= float(effective[0]) <= n


@pytest.mark.parametrize("others", OTHERS[::3])
def test_phi_of_the_bayes_form_is_the_mean_of_the_candidates_if_any_of_them_may_be_the_true_one(others):
    candidates = [0, 2, 3, 3]
    law = np.array([integrated_law([*others, v]) for v in candidates])  # [k, y_n]
    weights = np.array(
        [causal.bayes_weights(np.log(np.broadcast_to(law[:, u], (4, 4))), np.int32(1))[0][0] for u in range(V)]
    )
    np.testing.assert_allclose(law.mean(0) @ weights, 0.25, atol=1e-6)
    # Given the true one, not: it gets more than its share.
    assert all(law[k] @ weights[:, k] > 0.25 for k in range(4))


def test_a_policy_that_samples_the_tower_property_is_a_stationary_point_of_kl_prime():
    others = (0, 2)
    redrawn = sum(P_Q[v] * integrated_law([*others, v]) for v in range(V))
    exact = np.array([posterior(others, u) for u in range(V)])
    p_bar = redrawn @ exact
    for p_0 in exact:
        target = np.asarray(causal.project(p_0, p_bar, P_Q))
        gradient = jax.grad(lambda x, t=target: objectives.kl_k3(x, jnp.log(t)).sum())(jnp.log(jnp.float32(p_0)))
        np.testing.assert_allclose(gradient, 0, atol=1e-5)

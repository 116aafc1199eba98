"""The losses as pure functions: values derived by hand, limits and properties, with and without jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gcpo_jax import objectives

B, N, T = 2, 4, 5
HOWS = [("sequence_mean", None), ("token_mean", None), ("constant", 7.0)]
properties = settings(max_examples=25, deadline=None)
# Eighths: shifting them by a whole number rounds nothing.
rewards_of_groups = hnp.arrays(np.float32, (3, 4), elements=st.integers(-800, 800).map(lambda k: k / 8))


def tree(seed=0):
    """Log-probs of three policies, rewards and a ragged mask."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, N))
    logp = -rng.exponential(1.5, (B, N, T))
    return {
        "logp": jnp.float32(logp),
        "old": jnp.float32(logp + 0.3 * rng.normal(size=logp.shape)),
        "ref": jnp.float32(logp + 0.5 * rng.normal(size=logp.shape)),
        "rewards": jnp.float32(rng.normal(size=(B, N))),
        "mask": jnp.float32(np.arange(T) < lengths[..., None]),
        "logp_x": jnp.float32(-rng.exponential(1.5, logp.shape)),
        "projected": jnp.float32(rng.uniform(0.05, 1, logp.shape)),
        "klc_weight": jnp.float32([[2, 0, 2, 0], [0, 0, 2, 2]]),
    }


class Values(chex.TestCase):
    """Each function at points where pencil and paper give the answer."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_advantages_are_centred_over_the_unbiased_std(self):
        rewards = np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
        got = self.variant(objectives.group_advantages)(rewards)
        a = 0.5 / (np.sqrt(1 / 3) + 1e-4)
        np.testing.assert_allclose(got, [[a, -a, -a, a], [0, 0, 0, 0]], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_surrogate_is_the_smaller_of_the_clipped_and_the_unclipped_term(self):
        ratio = np.array([0.5, 0.9, 1.0, 1.1, 1.5])
        got = self.variant(objectives.clipped_surrogate)(np.log(ratio) - 1, -np.ones(5), 2.0, 0.2, 0.3)
        np.testing.assert_allclose(got, [1.0, 1.8, 2.0, 2.2, 2.6], rtol=1e-6)
        got = self.variant(objectives.clipped_surrogate)(np.log(ratio) - 1, -np.ones(5), -2.0, 0.2, 0.3)
        np.testing.assert_allclose(got, [-1.6, -1.8, -2.0, -2.2, -3.0], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_k3_is_r_minus_log_r_minus_1(self):
        r = np.array([1.0, 2.0, 0.5, 1e-3, 30.0])
        got = self.variant(objectives.kl_k3)(np.full(5, -0.7), np.log(r) - 0.7)
        np.testing.assert_allclose(got, r - np.log(r) - 1, rtol=1e-5, atol=1e-6)
        bounded = self.variant(objectives.kl_k3)(np.zeros(5), np.log(r), 0.5, 2.0)
        r = np.clip(r, 0.5, 2)
        np.testing.assert_allclose(bounded, r - np.log(r) - 1, rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_gvpo_is_half_the_squared_residual_over_n_minus_1(self):
        logp, old = np.array([[-1.0, -2.0], [-1.0, -3.0]]), np.array([[-2.0, -2.0], [-1.0, -1.0]])
        mask = np.array([[1, 1], [1, 0]])
        # Log-ratios 1 and 0: R = (0.5, 0), centred (0.25, -0.25); rewards centred (0.5, -0.5); residuals ∓0.25.
        got = self.variant(objectives.gvpo_loss)(logp, old, np.array([1.0, 0.0]), mask, 0.5)
        np.testing.assert_allclose(got, 0.5 * 2 * 0.25**2, rtol=1e-6)


def test_aggregates_of_a_ragged_batch_by_hand():
    values, mask = np.array([[1.0, 2.0, 3.0], [4.0, np.nan, np.inf]]), np.array([[1, 1, 1], [1, 0, 0]])
    np.testing.assert_allclose(objectives.aggregate(values, mask), (2 + 4) / 2)
    np.testing.assert_allclose(objectives.aggregate(values, mask, "token_mean"), 10 / 4)
    np.testing.assert_allclose(objectives.aggregate(values, mask, "constant", 5), (6 + 4) / 5 / 2)


@pytest.mark.parametrize(("how", "constant"), HOWS)
def test_token_weights_are_the_derivative_of_the_aggregate(how, constant):
    d = tree()
    got = jax.grad(objectives.aggregate)(d["logp"], d["mask"], how, constant)
    np.testing.assert_allclose(got, objectives.token_weights(d["mask"], how, constant), rtol=1e-6)


@given(rewards_of_groups)
@properties
def test_advantages_sum_to_zero_and_ignore_a_common_shift(rewards):
    a = objectives.group_advantages(rewards)
    np.testing.assert_allclose(a.sum(-1), 0, atol=1e-4)
    np.testing.assert_allclose(objectives.group_advantages(rewards + 64), a, atol=1e-6)
    assert np.all(np.abs(a) <= np.sqrt(3) + 1e-3)  # n - 1 over root n bounds any standardised value


@given(st.floats(-1e6, 1e6, width=32), st.sampled_from([2, 3, 8]), st.sampled_from(["std", "none"]))
@properties
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(reward, n, scale):
    rewards = np.full((2, n), reward, np.float32)
    for epsilon in (1e-4, 0.0):
        assert not np.any(objectives.group_advantages(rewards, scale, epsilon))
    chex.assert_tree_all_finite(jax.grad(lambda r: objectives.group_advantages(r, scale)[0, 0])(jnp.array(rewards)))


@given(hnp.arrays(np.float32, (2, 6), elements=st.floats(-30, 0, width=32)))
@properties
def test_k3_is_never_negative_and_zero_where_the_two_agree(pair):
    assert np.all(objectives.kl_k3(pair[0], pair[1]) >= 0)
    assert not np.any(objectives.kl_k3(pair[0], pair[0]))


@given(hnp.arrays(np.float32, (6,), elements=st.floats(-3, 3, width=32)), st.floats(-3, 3, width=32))
@properties
def test_the_surrogate_is_at_most_the_unclipped_term(log_ratio, advantage):
    got = objectives.clipped_surrogate(log_ratio, np.zeros(6), advantage)
    assert np.all(got <= np.exp(log_ratio) * advantage + 1e-5 * np.abs(got))


def test_the_derivative_of_k3_is_one_minus_the_ratio():
    # Linear in the target: an unbiased estimate of it gives an unbiased gradient.
    logp, target = jnp.float32([-1.0, -2.0, -0.1]), jnp.float32([-2.0, -0.5, -0.1])
    got = jax.grad(lambda x: objectives.kl_k3(x, target).sum())(logp)
    np.testing.assert_allclose(got, 1 - np.exp(target - logp), rtol=1e-6)


def test_extreme_log_ratios_stay_finite_in_value_and_gradient():
    extreme = jnp.float32([-1e4, -100, -30, 0, 30, 100, 1e4])
    for b in (-1.0, 0.0, 1.0):
        f = lambda x, b=b: objectives.clipped_surrogate(x, jnp.zeros(7), b).sum()  # noqa: E731
        chex.assert_tree_all_finite(jax.value_and_grad(f)(extreme))
    chex.assert_tree_all_finite(jax.value_and_grad(lambda x: objectives.kl_k3(x, jnp.zeros(7)).sum())(extreme))
    rewards, mask = jnp.arange(7.0), jnp.ones((7, 1))
    chex.assert_tree_all_finite(
        jax.value_and_grad(objectives.gvpo_loss)(extreme[:, None], jnp.zeros((7, 1)), rewards, mask)
    )
    # A policy far above its target is still pulled back with the full weight.
    np.testing.assert_allclose(jax.grad(lambda x: objectives.kl_k3(x, jnp.zeros(1)).sum())(jnp.float32([80.0])), 1.0)


def gcpo(d, logp, logp_x, rewards=None, **changes):
    b = objectives.group_advantages(d["rewards"] if rewards is None else rewards)
    causal = {"projected": d["projected"], "klc_weight": d["klc_weight"], "kappa": 0.06} | changes
    return objectives.gcpo_loss(logp, d["old"], b, d["mask"], ref_logp=d["ref"], beta=0.04, logp_x=logp_x, **causal)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_masked_values_reach_neither_value_nor_gradient(junk):
    d = tree()
    used = d["mask"] * jnp.sign(d["klc_weight"])[..., None]
    dirty = {
        name: jnp.where((used if name in ("logp_x", "projected") else d["mask"]) > 0, d[name], junk)
        for name in ("logp", "old", "ref", "logp_x", "projected")
    }
    f = jax.value_and_grad(gcpo, argnums=(1, 2))
    chex.assert_trees_all_equal(f(d | dirty, dirty["logp"], dirty["logp_x"]), f(d, d["logp"], d["logp_x"]))
    g = jax.value_and_grad(objectives.gvpo_loss)
    chex.assert_trees_all_equal(
        g(dirty["logp"], dirty["old"], d["rewards"], d["mask"]), g(d["logp"], d["old"], d["rewards"], d["mask"])
    )


def test_kappa_zero_with_unscaled_advantages_is_grpo_bit_for_bit():
    d = tree()
    b = objectives.group_advantages(d["rewards"])

    def grpo(logp):
        return objectives.grpo_loss(logp, d["old"], b, d["mask"], ref_logp=d["ref"], beta=0.04)

    expected = jax.value_and_grad(grpo)(d["logp"])
    chex.assert_trees_all_equal(jax.value_and_grad(lambda x: gcpo(d, x, d["logp_x"], kappa=0.0))(d["logp"]), expected)
    without = jax.value_and_grad(lambda x: gcpo(d, x, None, kappa=0.0))(d["logp"])
    chex.assert_trees_all_equal(without, expected)
    assert not np.allclose(gcpo(d, d["logp"], d["logp_x"]), expected[0])


def test_dr_grpo_is_grpo_without_the_std_and_with_a_constant_normaliser():
    d = tree()
    centred = objectives.group_advantages(d["rewards"], scale="none")
    got = objectives.grpo_loss(d["logp"], d["old"], centred, d["mask"], how="constant", constant=T)
    terms = np.asarray(objectives.clipped_surrogate(d["logp"], d["old"], d["rewards"] - d["rewards"].mean(1)[:, None]))
    np.testing.assert_allclose(got, -(terms * np.asarray(d["mask"])).sum() / (B * N * T), rtol=1e-5)
    std = np.std(d["rewards"], axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(objectives.group_advantages(d["rewards"]) * (std + 1e-4), centred, rtol=1e-5)


@pytest.mark.parametrize(("how", "constant"), HOWS)
def test_groups_without_spread_have_no_surrogate_gradient_and_a_finite_loss(how, constant):
    d = tree()
    b = objectives.group_advantages(jnp.full((B, N), 0.3))
    loss, grad = jax.value_and_grad(objectives.grpo_loss)(d["logp"], d["old"], b, d["mask"], how=how, constant=constant)
    assert loss == 0 and not np.any(grad)
    chex.assert_tree_all_finite(jax.value_and_grad(gcpo, argnums=(1, 2))(d, d["logp"], d["logp_x"], jnp.ones((B, N))))


def test_the_gradient_of_a_random_subset_of_kl_targets_averages_to_the_full_one():
    d = tree()
    grad = jax.jit(jax.grad(lambda x, weight: gcpo(d, d["logp"], x, klc_weight=weight)))
    pairs = [(i, k) for i in range(N) for k in range(i)]
    subsets = [jnp.zeros((B, N)).at[:, jnp.array(pair)].set(N / 2) for pair in pairs]
    mean = sum(grad(d["logp_x"], w) for w in subsets) / len(subsets)
    np.testing.assert_allclose(mean, grad(d["logp_x"], jnp.ones((B, N))), atol=1e-7)


def test_gvpo_has_the_same_gradient_with_a_detached_group_mean():
    d = tree()

    def detached(logp):
        implicit = 0.1 * jnp.sum((logp - d["old"]) * d["mask"], -1)
        centre = jax.lax.stop_gradient(implicit.mean(-1, keepdims=True))
        residual = implicit - centre - (d["rewards"] - d["rewards"].mean(-1, keepdims=True))
        return jnp.mean(0.5 * jnp.sum(residual**2, -1) / (N - 1))

    got = jax.value_and_grad(objectives.gvpo_loss)(d["logp"], d["old"], d["rewards"], d["mask"], 0.1)
    chex.assert_trees_all_close(got, jax.value_and_grad(detached)(d["logp"]), rtol=1e-5, atol=1e-7)


def test_gvpo_on_one_minibatch_is_reinforce_with_the_mean_as_baseline():
    d = tree()
    got = jax.grad(lambda x: objectives.gvpo_loss(x, jax.lax.stop_gradient(x), d["rewards"], d["mask"], 0.1))(d["logp"])
    baseline = d["rewards"].mean(-1, keepdims=True)
    reinforce = -0.1 / (N - 1) / B * (d["rewards"] - baseline)[..., None] * d["mask"]
    np.testing.assert_allclose(got, reinforce, rtol=1e-5, atol=1e-8)


def test_bfloat16_and_float64_inputs_are_computed_in_float32():
    d = tree()
    low = {name: x.astype(jnp.bfloat16) for name, x in d.items()}
    high = {name: np.asarray(x, np.float64) for name, x in low.items()}
    for f in (
        lambda d: gcpo(d, d["logp"], d["logp_x"]),
        lambda d: objectives.gvpo_loss(d["logp"], d["old"], d["rewards"], d["mask"]),
        lambda d: objectives.clipped_surrogate(d["logp"], d["old"], d["rewards"]),
    ):
        assert f(low).dtype == jnp.float32
        chex.assert_trees_all_equal(f(low), f(high))


def test_weights_of_the_terms_may_be_traced():
    d = tree()
    f = jax.jit(
        lambda beta: objectives.grpo_loss(d["logp"], d["old"], d["rewards"], d["mask"], ref_logp=d["ref"], beta=beta)
    )
    assert f(0.0) != f(0.1)


def test_leading_axes_are_batched():
    d = tree()
    for got, each in (
        (objectives.group_advantages(d["rewards"]), [objectives.group_advantages(r) for r in d["rewards"]]),
        (
            objectives.kl_k3(d["logp"], d["ref"]),
            [objectives.kl_k3(x, y) for x, y in zip(d["logp"], d["ref"], strict=True)],
        ),
    ):
        np.testing.assert_allclose(got, jnp.stack(each), rtol=1e-6)
    parts = [objectives.gvpo_loss(*(d[k][b] for k in ("logp", "old", "rewards", "mask"))) for b in range(B)]
    np.testing.assert_allclose(
        objectives.gvpo_loss(d["logp"], d["old"], d["rewards"], d["mask"]), np.mean(parts), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: objectives.group_advantages(d["rewards"], scale="var"), "scale='var'"),
        (lambda d: objectives.group_advantages(jnp.ones((3, 1))), "at least 2"),
        (lambda d: objectives.gvpo_loss(*(jnp.ones((1, 2)),) * 2, jnp.ones(1), jnp.ones((1, 2))), "at least 2"),
        (lambda d: objectives.aggregate(d["logp"], d["mask"], "mean"), "how='mean'"),
        (lambda d: objectives.aggregate(d["logp"], d["mask"], "constant"), "needs the constant"),
        (lambda d: objectives.grpo_loss(d["logp"], d["old"], d["rewards"], d["mask"], beta=0.1), "needs ref_logp"),
        (lambda d: objectives.gcpo_loss(d["logp"], d["old"], d["rewards"], d["mask"], kappa=0.1), "needs logp_x"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tree())

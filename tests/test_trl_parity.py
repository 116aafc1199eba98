"""Loss, advantages and gradients against those of TRL's GRPOTrainer, stored by scripts/trl_fixture.py.

How TRL's loss types map on ours, one process:
  grpo     how="sequence_mean"; TRL divides by the accumulation steps, so accumulated parts of equal size give the same.
  dr_grpo  how="constant", constant=max_completion_length; likewise.
  bnpo     how="token_mean" over one micro-batch: TRL's value depends on how the batch is cut, ours never.
  dapo     how="token_mean" over the batch of an optimizer step: TRL divides each part by num_items_in_batch (all of its
           tokens) / num_processes, times accumulation steps / steps_per_generation, here 1; the parts add up to it.
The KL term is Eq. 7's: use_bias_correction_kl=False, where TRL's default weighs it by the importance ratio.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

from gcpo_jax import objectives

TRL = json.loads((pathlib.Path(__file__).parent / "fixtures" / "trl.json").read_text())
SHAPE = (*np.shape(TRL["rewards"]), -1)
LOGP, OLD, REF, MASK = (np.array(TRL[k], np.float32).reshape(SHAPE) for k in ("logp", "old_logp", "ref_logp", "mask"))
HOW = {"grpo": "sequence_mean", "dr_grpo": "constant", "bnpo": "token_mean", "dapo": "token_mean"}
TOLERANCE = 5e-6


@pytest.mark.parametrize(("ours", "theirs"), [("std", "group"), ("none", "none")])
def test_advantages_are_those_of_trl(ours, theirs):
    advantages = objectives.group_advantages(np.array(TRL["rewards"], np.float32), scale=ours)
    np.testing.assert_allclose(np.ravel(advantages), TRL["advantages"][theirs], atol=TOLERANCE)


@pytest.mark.parametrize(
    "case", TRL["cases"], ids=lambda c: f"{c['loss_type']}-beta{c['beta']}-old{c['old']}-parts{c['parts']}"
)
def test_loss_and_gradient_are_those_of_trl(case):
    def loss(logp):
        old = OLD if case["old"] else jax.lax.stop_gradient(logp)
        advantages = objectives.group_advantages(np.array(TRL["rewards"], np.float32))
        constant = TRL["constant"] if HOW[case["loss_type"]] == "constant" else None
        kl = {"ref_logp": REF, "beta": case["beta"]} if case["beta"] else {}
        return objectives.grpo_loss(logp, old, advantages, MASK, how=HOW[case["loss_type"]], constant=constant, **kl)

    value, gradient = jax.value_and_grad(loss)(LOGP)
    np.testing.assert_allclose(value, case["loss"], atol=TOLERANCE)
    np.testing.assert_allclose(np.reshape(gradient, np.shape(case["gradient"])), case["gradient"], atol=TOLERANCE)
    assert np.abs(case["gradient"]).max() > 1e-2


def test_the_fixture_clips_on_both_sides_with_either_sign():
    ratio, sign = np.exp(LOGP - OLD), np.sign(np.reshape(TRL["advantages"]["group"], SHAPE[:2]))[..., None]
    for s in (-1, 1):
        for outside in (ratio < 0.8, ratio > 1.2):
            assert np.any(outside & (sign == s) & (MASK > 0))

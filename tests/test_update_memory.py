"""Of the compiled update, at lengths that are only compiled: memory grows with the tokens and not their square."""

import functools
import math
import re

import jax
import pytest

from gcpo_jax import config as config_lib
from gcpo_jax import estimate, learner, models, scorer, workload

V = 4099  # more than any other axis, and a prime, so that no other axis is taken for the vocabulary
MODEL = models.ModelConfig("qwen2", V, 64, 128, 2, 2, 1, 32, qkv_bias=True, tied_embeddings=True, eos_ids=(1,))

PRESETS = ["grpo", pytest.param("gcpo", marks=pytest.mark.slow)]  # with KL' it takes twice as long to compile


@functools.cache
def compiled(preset: str, tokens: int):
    """The update of two candidates of so many tokens, prompt included; with KL' in contexts of half as many."""
    config = config_lib.Config(
        model=config_lib.Model(remat="full"),
        rollout=config_lib.Rollout(queries=1, group_size=2, max_prompt_tokens=256, max_new_tokens=tokens - 256),
        contexts=config_lib.Contexts(cap=tokens // 4),
        algorithm=config_lib.preset(preset),
        learner=config_lib.Learner(micro_batch=2),
    )
    _, batch = workload.step(config, MODEL)
    assert batch.completions.shape == (1, 2, tokens - 256) and (batch.kl is None) == (preset == "grpo")
    optimizer, _ = learner.make_optimizer(config.learner, 10)
    program = learner.make_update(MODEL, config, optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction raises a Python float to an int32 count
        return program.lower(estimate.abstract_state(config, MODEL), batch).compile()


def growth(preset: str) -> float:
    """How many times the bytes from 8k to 16k tokens are those from 4k to 8k: twice where each token costs the same."""
    at_4k, at_8k, at_16k = (compiled(preset, k * 1024).memory_analysis().temp_size_in_bytes for k in (4, 8, 16))
    return (at_16k - at_8k) / (at_8k - at_4k)


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_grows_linearly_from_4k_to_16k_tokens(preset):
    assert growth(preset) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_array_of_all_tokens_logits_is_in_the_program(preset):
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled(preset, 16 * 1024).as_text())
    sizes = [tuple(map(int, dims.split(","))) for dims in shapes]
    largest = max(math.prod(s) for s in sizes if V in s)
    # Chunks are of equal size, so somewhat smaller than they may be.
    assert scorer.TOKENS_PER_CHUNK * V / 2 < largest <= scorer.TOKENS_PER_CHUNK * V

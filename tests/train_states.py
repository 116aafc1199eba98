"""Small train states with random numbers, for tests that save and restore them."""

import jax
import jax.numpy as jnp
import numpy as np

from gcpo_jax.config import Learner
from gcpo_jax.learner import TrainState, make_optimizer


def make_state(seed=0):
    """A train state with every number of it random and one array in bfloat16."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.zeros((32, 16)),
        "layers": {"q": jnp.zeros((2, 16, 8), jnp.bfloat16), "norm": jnp.zeros((2, 5))},
    }
    optimizer, _ = make_optimizer(Learner(), 10)
    state = TrainState(params, optimizer.init(params))
    return jax.tree.map(lambda x: jnp.asarray(rng.integers(1, 1000, x.shape) / 7).astype(x.dtype), state)


def blank(state):
    return jax.tree.map(jnp.zeros_like, state)

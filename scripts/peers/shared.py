"""What sharing a prompt saves: each part's work with one copy of a prompt for its n rows, and with n copies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import worker

from gcpo_jax import models


def prefill(spec: dict[str, Any], model_config: models.ModelConfig, params: dict):
    """Keys, values and last hidden states of the prompts: once each (`together`), or once per sample."""
    copies = 1 if spec["together"] else spec["samples"]
    tokens = jnp.asarray(np.repeat(np.array(worker.prompt_ids(spec), np.int32), copies, axis=0))
    lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    run = jax.jit(models.prefill, static_argnums=0)

    def work(_: int) -> dict[str, Any]:
        jax.block_until_ready(run(model_config, params, tokens, lengths))
        return {"tokens": tokens.size // copies * spec["samples"]}

    return work


# Of a spec's "work": build(spec, model_config, params) -> work(number of the run).
PARTS = {"prefill": prefill}

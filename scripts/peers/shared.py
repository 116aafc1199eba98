"""What sharing saves: one copy of a prompt for its n rows against n copies; contexts as a trie against each whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import worker

from gcpo_jax import batching, models, scorer


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


def contexts(spec: dict[str, Any], model_config: models.ModelConfig, params: dict):
    """As prefill, of prompts with all of n candidates behind them but one: as a trie of each query, or one by one."""
    n, rng = spec["samples"], np.random.default_rng(0)
    rows = []
    for prompt in worker.prompt_ids(spec):
        candidates = rng.integers(1, model_config.vocab_size, (n, spec["new_tokens"])).tolist()
        rows += [[*prompt, *(t for k, c in enumerate(candidates) if k != i for t in c)] for i in range(n)]
    packed = [batching.whole(row) for row in rows]
    arrays = batching.pad_packed(packed, batching.shape_of(packed, 1, family=n if spec["together"] else 1))
    trie = None if arrays.trie is None else models.Trie(*map(jnp.asarray, arrays.trie))
    tokens, lengths = jnp.asarray(arrays.first), jnp.asarray(arrays.lengths)
    run = jax.jit(models.prefill, static_argnums=0)

    def work(_: int) -> dict[str, Any]:
        jax.block_until_ready(run(model_config, params, tokens, lengths, trie))
        return {"tokens": sum(map(len, rows))}

    return work


def inputs(spec: dict[str, Any], vocab_size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Prompts, their lengths, completions and theirs: a prompt for its n completions (`together`), or for each."""
    n, T = spec["samples"], spec["new_tokens"]
    copies = 1 if spec["together"] else n
    prompts = np.repeat(np.array(worker.prompt_ids(spec), np.int32), copies, axis=0)
    rng = np.random.default_rng(0)
    completions = rng.integers(1, vocab_size, (len(prompts) * n // copies, T)).astype(np.int32)
    shape = (len(prompts), n // copies)
    lengths = np.full(len(prompts), prompts.shape[1], np.int32), np.full(shape, T, np.int32)
    completions = completions.reshape(*shape, T)
    return jnp.asarray(prompts), jnp.asarray(lengths[0]), jnp.asarray(completions), jnp.asarray(lengths[1])


def score(spec: dict[str, Any], model_config: models.ModelConfig, params: dict):
    """Log-probabilities of the completions."""
    arrays = inputs(spec, model_config.vocab_size)
    run = jax.jit(lambda params: scorer.completion_logprobs(model_config, params, *arrays)[0])

    def work(_: int) -> dict[str, Any]:
        jax.block_until_ready(run(params))
        return {"tokens": arrays[2].size}

    return work


def gradient(spec: dict[str, Any], model_config: models.ModelConfig, params: dict):
    """Their gradient: what an update computes, full rematerialisation, without the optimizer."""
    arrays = inputs(spec, model_config.vocab_size)

    def loss(params):
        return scorer.completion_logprobs(model_config, params, *arrays, remat="full")[0].mean()

    run = jax.jit(jax.grad(loss))

    def work(_: int) -> dict[str, Any]:
        jax.block_until_ready(run(params))
        return {"tokens": arrays[2].size}

    return work


# Of a spec's "work": build(spec, model_config, params) -> work(number of the run).
PARTS = {"prefill": prefill, "score": score, "gradient": gradient, "contexts": contexts}

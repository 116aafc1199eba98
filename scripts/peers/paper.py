"""Steps of gcpo_paper, and the same steps by the loop of tests/context_by_context.py: one context after the other."""

import pathlib
import sys
from typing import Any

import jax
import numpy as np
import steps
import worker

from gcpo_jax import learner, models, rollout
from gcpo_jax.contexts import ContextBuilder, read_tokenizer

TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests"


def loop(spec: dict[str, Any], model_config: models.ModelConfig, params: dict):
    """The spec's step; candidates, their rewards and the optimizer are the library's own."""
    sys.path.append(str(TESTS))
    import context_by_context  # noqa: PLC0415 - the tests' own, found by its path

    config = steps.configured(spec)
    contexts = ContextBuilder(
        read_tokenizer(spec["directory"]), config.contexts, config.data.prompt, frozenset(model_config.eos_ids)
    )
    problems = worker.problems(spec)
    optimizer, _ = learner.make_optimizer(config.learner, config.train.total_steps)
    apply = jax.jit(optimizer.update)
    reference, state = jax.tree.map(jax.numpy.copy, params), optimizer.init(params)
    actor = rollout.Actor(config, model_config, params, contexts)
    order = [list(range(spec["samples"]))] * len(problems)

    def work(number: int) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), number)
        keys = {name: jax.random.fold_in(key, k) for k, name in enumerate(("candidates", "integrated", "rollouts"))}
        prompts = [contexts.query(p) for p in problems]
        candidates = actor.sample(prompts, spec["samples"], spec["new_tokens"], keys["candidates"]).tokens
        rewards = np.array([[worker.even_share(text) for text in actor.decode(group)] for group in candidates])
        rewards = rewards.astype(np.float32)
        found = context_by_context.step(actor, reference, problems, candidates, rewards, order, keys)
        jax.block_until_ready(apply(found.gradient, state, params))
        return {"tokens": sum(len(ids) for group in candidates for ids in group), "active": 1.0}

    return work

"""Tunix: its own sampler and its own GRPO trainer, in an environment that has google-tunix.

The cache has exactly the columns that a prompt and its completion need, since each more costs it time at every step;
top_p=1 takes its short way (no sort) and top_p=None would be greedy. Log-probabilities are not asked for: its trainer
does not use them. The tokenizer is a dictionary, so next to no time goes into text.
"""

import logging
import time
import warnings
from typing import Any

import jax
import numpy as np
import optax
import worker
from flax import nnx
from tunix.generate import sampler
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

PACKAGES = ("google-tunix", "jax", "flax")


class Words:
    """The interface that Tunix asks of a tokenizer."""

    def __init__(self, vocabulary: int, end: int):
        self._words = worker.words(vocabulary)
        self._numbers = {word: k for k, word in enumerate(self._words)}
        self._end = end

    def encode(self, text: str, **_) -> list[int]:
        """Ids of words that stand apart."""
        return [self._numbers[word] for word in text.split()]

    def decode(self, ids, **_) -> str:
        """Words, apart."""
        return " ".join(self._words[k] for k in ids)

    def bos_id(self) -> int:
        """None is put in front."""
        return 0

    def eos_id(self) -> int:
        """The end."""
        return self._end

    def pad_id(self) -> int:
        """Of what only fills up."""
        return 0


def load(spec, mesh) -> nnx.Module:
    """The model directory's weights."""
    m = spec["model"]
    config = qwen2.ModelConfig(
        num_layers=m["num_layers"],
        vocab_size=m["vocab_size"],
        embed_dim=m["hidden_size"],
        hidden_dim=m["intermediate_size"],
        num_heads=m["num_heads"],
        head_dim=m["hidden_size"] // m["num_heads"],
        num_kv_heads=m["num_kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    return qwen2_params.create_model_from_safe_tensors(spec["directory"], config, mesh)


def sampling(pipe: worker.Pipe, model: Any) -> None:
    """Batches of `rows` rows one after the other."""
    spec, c = pipe.spec, model.config
    size = spec["prompt_tokens"] + spec["new_tokens"]
    generate = sampler.Sampler(
        model,
        Words(c.vocab_size, spec["end_ids"][0]),
        sampler.CacheConfig(size, c.num_layers, c.num_kv_heads, c.head_dim),
    )
    texts = [worker.prompt(p) for p in worker.problems(spec) for _ in range(spec["samples"])]
    batches = [texts[k : k + spec["rows"]] for k in range(0, len(texts), spec["rows"])]

    def work(number: int):
        tokens = 0
        for k, batch in enumerate(batches):
            out = generate(
                batch,
                max_generation_steps=spec["new_tokens"],
                max_prompt_length=spec["prompt_tokens"],
                eos_tokens=spec["end_ids"],
                temperature=1.0,
                top_p=1.0,
                seed=number * len(batches) + k,
            )
            # It leaves out the end id that it has drawn.
            tokens += sum(min(len(ids) + 1, spec["new_tokens"]) for ids in out.tokens)
        return {"tokens": tokens}

    worker.serve(pipe, PACKAGES, work)


def step(pipe: worker.Pipe, model: Any, mesh) -> None:
    """One GRPO step after the other, each from the moment its trainer asks for prompts until it asks again."""
    spec, c = pipe.spec, model.config
    texts = [worker.prompt(p) for p in worker.problems(spec)]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b1=0.9, b2=0.95, weight_decay=0.01))
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=spec["new_tokens"],
        max_prompt_length=spec["prompt_tokens"],
        kv_cache_size=spec["prompt_tokens"] + spec["new_tokens"],
        temperature=1.0,
        top_p=1.0,
        eos_tokens=spec["end_ids"],
    )
    # eval_every_n_steps without an evaluation set does nothing; one batch is one micro-batch.
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=10**9,
        max_steps=10**9,
        mini_batch_size=spec["prompts"],
        train_micro_batch_size=spec["prompts"],
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE)
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=load(spec, mesh) if spec["beta"] else None,
        tokenizer=Words(c.vocab_size, spec["end_ids"][0]),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
        ),
    )
    learner = grpo_learner.GRPOLearner(
        cluster,
        grpo_learner.GRPOConfig(num_generations=spec["samples"], num_iterations=1, beta=spec["beta"], epsilon=0.2),
        reward_fns=lambda prompts, completions, **_: [worker.even_share(text) for text in completions],
    )

    def batches():
        batch = {"prompts": np.array(texts)}
        yield batch
        yield batch
        yield batch
        pipe.ready(*PACKAGES)
        while pipe.wait():
            began = time.perf_counter()
            yield dict(batch)
            jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model)))
            pipe.done(time.perf_counter() - began, spec["prompts"] * spec["samples"] * spec["new_tokens"])

    learner.train(dict(batch) for batch in batches())


def main() -> None:
    """Do what the first line of standard input says."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pipe = worker.Pipe()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = load(pipe.spec, mesh)
        if pipe.spec["work"] == "step":
            step(pipe, model, mesh)
        else:
            sampling(pipe, model)


if __name__ == "__main__":
    main()

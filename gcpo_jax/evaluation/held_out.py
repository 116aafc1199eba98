"""Held-out accuracy of a policy: pass@1 over m samples, greedy, and majority vote, with standard errors."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gcpo_jax import sampler, tasks
from gcpo_jax.evaluation.statistics import majority, mean_and_error
from gcpo_jax.rollout import Actor


def accuracy(
    actor: Actor,
    reward: tasks.Reward,
    answer: Callable[[str], str | None],
    rows: Sequence[dict[str, Any]],
    samples: int,
) -> dict[str, float]:
    """Mean reward on `rows`, in [0, 1] for a reward of right and wrong.

    Args:
      answer: the final answer of a completion, which a majority vote compares.
      samples: m completions of each problem, at the run's temperature, top-k and top-p.

    Returns:
      pass@1, greedy, majority and the standard error of each over problems (key + "_se").
    """
    config = actor.config
    prompts = [actor.contexts.query(row["problem"]) for row in rows]
    key = jax.random.fold_in(jax.random.key(config.train.seed), 0x6576616C)
    drawn = actor.sample(prompts, samples, config.rollout.max_new_tokens, key).tokens
    greedy = sampler.sample(
        actor.model_config,
        actor.params,
        prompts,
        key=key,
        n=1,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=0.0,
        eos_ids=actor.model_config.eos_ids,
        max_rows=config.rollout.max_rows,
    ).tokens
    per_problem: dict[str, list[float]] = {"pass@1": [], "greedy": [], "majority": []}
    texts_of = [actor.decode([*group, best[0]]) for group, best in zip(drawn, greedy, strict=True)]
    with tasks.Grading(reward) as grading:
        for k, question in enumerate(actor.decode(prompts, False)):
            grading.add(k, question, texts_of[k], rows[k])
        scores_of = grading.wait()
    for k, texts in enumerate(texts_of):
        scores = scores_of[k].tolist()
        per_problem["pass@1"].append(float(np.mean(scores[:-1])))
        per_problem["greedy"].append(scores[-1])
        per_problem["majority"].append(majority([answer(t) for t in texts[:-1]], scores[:-1]))
    result = {}
    for name, values in per_problem.items():
        result[name], result[f"{name}_se"] = mean_and_error(values)
    return result

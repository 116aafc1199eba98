"""The three inputs of the paper's Fig. 6: the query q, the leave-one-out context x, and the projected input.

q          the prompt alone.
x          {q, y_1, .., y_n}: `input.candidates` answers to q are sampled, one is left out, an integrated output y_n is
           sampled after reading all of them; the policy then answers. Sample s leaves out candidate s mod n.
projected  every token is drawn from p(·|x) - mean_l p(·|x_l) + p(·|q), where the x_l differ in their integrated output
           (projected.py). The paper gives the expression and no procedure: this one is ours.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gcpo_jax import models, sampler
from gcpo_jax.batching import Prompt
from gcpo_jax.config import ConfigError
from gcpo_jax.contexts import ContextBuilder, Ids
from gcpo_jax.evaluation import projected, prompts
from gcpo_jax.evaluation.settings import EvalConfig
from gcpo_jax.tasks.benchmarks import Benchmark


@dataclasses.dataclass(frozen=True)
class Policy:
    """The policy that is evaluated, and how it is asked."""

    config: EvalConfig
    model_config: models.ModelConfig
    params: dict
    contexts: ContextBuilder


def check_length(config: EvalConfig, model_config: models.ModelConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse completions that would run past the positions that a model was made for.

    Raises:
      ConfigError: naming the setting and what would do.
    """
    longest, room = max(map(len, prompts)), model_config.max_position
    if longest + config.sampling.max_new_tokens > room:
        raise ConfigError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens}: with the longest prompt of {longest} tokens "
            f"that is past the model's {room} positions; at most {max(0, room - longest)} would do"
        )


def sample(policy: Policy, benchmark: Benchmark, places: Sequence[int], key) -> list[list[Ids]]:
    """sampling.samples completions of each of the problems at `places` of a benchmark.

    A completion depends on (key, its problem's place, its number) and, up to rounding, on nothing beside it.
    """
    config = policy.config
    rows = [benchmark.rows[k] for k in places]
    queries = [prompts.query(policy.contexts, benchmark, row, config.prompts) for row in rows]
    keys = jax.random.split(key, 3)
    n, form = config.sampling.samples, config.input.form
    if form == "q":
        return _draw(policy, queries, n, keys[0], places)
    candidates = _draw(policy, queries, config.input.candidates, keys[1], places)
    turns = [prompts.turn(benchmark, row, config.prompts) for row in rows]
    listings = [_listing(policy, drawn, place) for drawn, place in zip(candidates, places, strict=True)]
    asked = [policy.contexts.integrate(t, [q for _, q in listing]) for t, listing in zip(turns, listings, strict=True)]
    integrated = _draw(policy, asked, config.input.integrated if form == "projected" else 1, keys[2], places)
    groups = []
    for question, text, listing, outputs in zip(queries, turns, listings, integrated, strict=True):
        quoted = [policy.contexts.quote(output) for output in outputs]
        for s in range(n):
            others = [q for k, q in listing if k != s % config.input.candidates]
            groups.append([question] + [policy.contexts.leave_one_out(text, others, q) for q in quoted])
    numbers = [place * n + s for place in places for s in range(n)]
    if form == "x":
        drawn = [group[0] for group in _draw(policy, [x for _, x in groups], 1, keys[0], numbers)]
    else:
        check_length(config, policy.model_config, [ids for group in groups for ids in group])
        drawn = projected.sample(
            policy.model_config,
            policy.params,
            groups,
            key=keys[0],
            index=numbers,
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            max_rows=config.sampling.max_rows,
        )
    return [drawn[at : at + n] for at in range(0, len(drawn), n)]


def _draw(policy: Policy, asked: Sequence[Prompt], n: int, key, index: Sequence[int]) -> list[list[Ids]]:
    settings = policy.config.sampling
    check_length(policy.config, policy.model_config, asked)
    return sampler.sample(
        policy.model_config,
        policy.params,
        asked,
        key=key,
        n=n,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        eos_ids=policy.model_config.eos_ids,
        max_rows=settings.max_rows,
        index=index,
    ).tokens


def _listing(policy: Policy, candidates: Sequence[Ids], place: int) -> list[tuple[int, Ids]]:
    """(number, what is quoted) of the candidates, in the order in which contexts list them; empty ones are left out."""
    order = list(range(len(candidates)))
    if policy.config.contexts.permute:
        order = np.random.default_rng([policy.config.sampling.seed, place]).permutation(order).tolist()
    quoted = [(k, policy.contexts.quote(candidates[k])) for k in order]
    return [(k, ids) for k, ids in quoted if ids]

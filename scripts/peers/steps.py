"""Whole steps of training, as train.py makes them: of a model of a benchmark's own, or of a recipe."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import worker

from gcpo_jax import config as config_lib
from gcpo_jax import learner, metrics, models, rollout, tasks, train
from gcpo_jax.contexts import ContextBuilder, Ids, read_tokenizer


@dataclasses.dataclass(frozen=True)
class ShortIntegrator(rollout.Actor):
    """An actor whose integrated outputs end after `integrated_tokens`, as a trained model's would."""

    integrated_tokens: int = 0

    def sample(self, prompts: list[Ids], n: int, max_new_tokens: int, key, done=None, **shared: int):
        """As its parent; only candidates are drawn `group_size` at a time."""
        short = self.integrated_tokens and n != self.config.rollout.group_size
        limit = min(max_new_tokens, self.integrated_tokens) if short else max_new_tokens
        return super().sample(prompts, n, limit, key, done, **shared)


class Steps:
    """One step after the other, with the seconds of each phase."""

    def __init__(
        self,
        config: config_lib.Config,
        model_config: models.ModelConfig,
        params: dict,
        reward: tasks.Reward,
        make_actor: Callable[[dict], rollout.Actor],
        make_timers: Callable[[], metrics.Timers] = metrics.Timers,
    ):
        self._config, self._reward, self._actor, self._timers = config, reward, make_actor, make_timers
        optimizer, _ = learner.make_optimizer(config.learner, config.train.total_steps)
        self._update = learner.make_update(model_config, config, optimizer)
        self._reference = None
        if config.algorithm.beta > 0:
            self._reference = jax.tree.map(jax.numpy.copy, learner.cast(params, config.model.dtype))
        self._state = learner.init_state(model_config, optimizer, params)

    def __call__(self, number: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Step `number` on these problems."""
        timers = self._timers()
        actor = self._actor(learner.cast(self._state.params, self._config.model.dtype))
        exp = rollout.collect(actor, self._reward, rows, number, timers)
        with timers("score"):
            batch = learner.make_batch(actor, self._reference, exp)
        with timers("update"):
            self._state, values, _ = self._update(self._state, batch)
            jax.block_until_ready((self._state, values))
        tokens = sum(len(ids) for group in exp.candidates.tokens for ids in group)
        return {"tokens": tokens, "phases": timers.read(), "active": float(np.mean(exp.active))}


def change(config: config_lib.Config, spec: dict[str, Any]) -> None:
    """Set what the spec's "changes" name, {"section.field": value}."""
    for name, value in spec["changes"].items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    config_lib.validate(config)


def configured(spec: dict[str, Any]) -> config_lib.Config:
    """The settings of a spec's own model and prompts with one preset, and changes given by name."""
    config = config_lib.Config(
        model=config_lib.Model(path=spec["directory"]),
        data=config_lib.Data(path=spec["directory"]),
        rollout=config_lib.Rollout(
            queries=spec["prompts"],
            group_size=spec["samples"],
            max_prompt_tokens=spec["prompt_tokens"],
            max_new_tokens=spec["new_tokens"],
        ),
        algorithm=config_lib.preset(spec["preset"]),
        learner=config_lib.Learner(weight_decay=0.01),
    )
    change(config, spec)
    return config


def step(spec: dict[str, Any], model_config: models.ModelConfig, params: dict):
    """Steps as `configured`; with `flat` half the groups have equal rewards, `integrated_tokens` cuts outputs short."""
    config, ends = configured(spec), frozenset(model_config.eos_ids)
    contexts = ContextBuilder(read_tokenizer(spec["directory"]), config.contexts, config.data.prompt, ends)
    rows = [{"id": str(k), "problem": problem, "flat": k % 2} for k, problem in enumerate(worker.problems(spec))]
    if [contexts.query(row["problem"]) for row in rows] != worker.prompt_ids(spec):
        raise ValueError("the prompts are not those of the other contenders")

    def reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
        return 0.0 if spec.get("flat") and row["flat"] else worker.even_share(completion)

    def actor(params: dict) -> rollout.Actor:
        return ShortIntegrator(config, model_config, params, contexts, spec.get("integrated_tokens", 0))

    run = Steps(config, model_config, params, reward, actor)
    return lambda number: run(number, rows)


def recipe(spec: dict[str, Any], make_timers: Callable[[], metrics.Timers] = metrics.Timers):
    """Steps of a file of configs/ with one preset, on its own model and problems.

    The learning rate is zero, so the policy stays what it is and steps differ by their problems alone.
    """
    config = importlib.import_module(f"gcpo_jax.configs.{spec['recipe']}").get_config(spec["preset"])
    config.learner.learning_rate = 0.0
    change(config, spec)
    config_lib.check_paths(config)
    model_config = models.read_config(config.model.path, config.model.dtype)
    model_config = models.for_devices(model_config, config.model.attention)
    contexts = train.make_contexts(config, model_config)
    problems, _ = train.within_limit(config, contexts, tasks.build(config.data).train, model_config.vocab_size)
    _, params = models.load_pretrained(config.model.path, "float32")

    def actor(params: dict) -> rollout.Actor:
        return rollout.Actor(config, model_config, params, contexts)

    run = Steps(config, model_config, params, tasks.resolve_reward(config.data.reward), actor, make_timers)

    def work(number: int) -> dict[str, Any]:
        indices = tasks.batch_indices(len(problems), config.rollout.queries, number, config.train.seed)
        return run(number, [problems[k] for k in indices])

    return work

"""Finding a reward by its dotted path, and calling it so that a failure names the row."""

import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from gcpo_jax.config import ConfigError

Reward = Callable[[str, str, dict[str, Any]], float]
Answer = Callable[[str], str | None]


class RewardError(RuntimeError):
    """A reward that raised, or that returned something other than a finite number."""


def _resolve(path: str) -> tuple[Any, str]:
    module_name, _, name = path.rpartition(".")
    # "tasks.math.reward" means this package's own; a user's module is named from the import path.
    full = f"gcpo_jax.{module_name}" if module_name.startswith("tasks.") else module_name
    if not full:
        raise ConfigError(f"data.reward={path!r}: must be MODULE.FUNCTION")
    try:
        return importlib.import_module(full), name
    except ImportError as error:
        raise ConfigError(f"data.reward={path!r}: module {full} cannot be imported: {error}") from error


def resolve_reward(path: str) -> Reward:
    """The callable reward(prompt, completion, row) -> float at a dotted path.

    Raises:
      ConfigError: where there is no such module or function.
    """
    module, name = _resolve(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"data.reward={path!r}: {module.__name__} has no function {name!r}")
    return function


def resolve_answer(path: str) -> Answer:
    """The function `answer(completion)` beside a reward, which majority votes compare; else the text itself."""
    module, _ = _resolve(path)
    return getattr(module, "answer", None) or (lambda completion: completion.strip() or None)


def score(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """The reward of each completion.

    Raises:
      RewardError: naming the row, its completion and what happened.
    """
    values = []
    for prompt, completion, row in zip(prompts, completions, rows, strict=True):
        where = f"row {row.get('id')!r}, completion {completion[:200]!r}"
        try:
            value = reward(prompt, completion, row)
        except Exception as error:
            raise RewardError(f"the reward raised {type(error).__name__}: {error} ({where})") from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardError(f"the reward is {value!r}, not a finite number ({where})")
        values.append(float(value))
    return values

"""Finding a reward by its dotted path, and calling it so that a failure names the row."""

import importlib
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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
    # `python -m` looks for modules in the working directory, an installed command does not: both find the user's file.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(full), name
    except Exception as error:  # a user's module may fail in any way
        message = f"data.reward={path!r}: module {full} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(message) from error


def resolve_reward(path: str) -> Reward:
    """The callable reward(prompt, completion, row) -> float at a dotted path.

    "tasks.NAME.FUNCTION" is one of this package; any other module is looked for on the import path, and in the working
    directory.

    Raises:
      ConfigError: where there is no such module or function, or where importing the module fails.
    """
    module, name = _resolve(path)
    function: Reward | None = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"data.reward={path!r}: {module.__name__} has no function {name!r}")
    return function


def resolve_answer(path: str) -> Answer:
    """The function `answer(completion)` beside a reward, which majority votes compare; else the text itself.

    The result raises RewardError, naming the completion, where the user's function raises.
    """
    module, _ = _resolve(path)
    found = getattr(module, "answer", None)
    if not callable(found):
        return lambda completion: completion.strip() or None
    function: Any = found

    def answer(completion: str) -> str | None:
        try:
            return function(completion)
        except Exception as error:
            where = f"{module.__name__}.answer, completion {completion[:200]!r}"
            raise RewardError(f"the answer raised {type(error).__name__}: {error} ({where})") from error

    return answer


def score(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """The reward of each completion: any finite real number, of Python or NumPy, True and False counting as 1 and 0.

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
        try:
            number = float(value) if isinstance(value, numbers.Real | np.bool_) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise RewardError(f"the reward is {value!r:.200}, not a finite number ({where})")
        values.append(number)
    return values

"""Finding a reward by its dotted path, and calling it so that a failure names the row.

A reward is a function reward(prompt, completion, row) -> number. It may have a batch form, a function of three lists
that returns the numbers in order: `reward.batch = many`, or `@batched(many)`. That is used wherever there is one, and
training calls it in a thread of its own while the device works (beside.py).
"""

import functools
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
Batch = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]
Answer = Callable[[str], str | None]


class RewardError(RuntimeError):
    """A reward that raised, or that returned something other than a finite number."""


def batched(many: Callable, missing: Callable[[], list[str]] | None = None) -> Callable[[Callable], Any]:
    """Decorates a reward that has the batch form `many`.

    Args:
      missing: for a reward that runs what a policy wrote: names what this system lacks for that to be safe. The reward
        and `many` then take `unsafe`, which runs it all the same.
    """

    def decorate(reward: Any) -> Any:
        reward.batch, reward.missing = many, missing
        return reward

    return decorate


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


def resolve_reward(path: str, unsafe: bool = False) -> Reward:
    """The callable reward(prompt, completion, row) -> float at a dotted path.

    "tasks.NAME.FUNCTION" is one of this package; any other module is looked for on the import path, and in the working
    directory.

    Args:
      unsafe: a reward that runs what a policy wrote does so also where the system cannot confine it.

    Raises:
      ConfigError: where there is no such module or function, where importing the module fails, or where the system
        lacks what the reward needs.
    """
    module, name = _resolve(path)
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"data.reward={path!r}: {module.__name__} has no function {name!r}")
    reward: Any = function
    missing = getattr(reward, "missing", None)
    if missing is None:
        return reward
    if unsafe:
        return batched(functools.partial(reward.batch, unsafe=True))(functools.partial(reward, unsafe=True))
    if lacking := missing():
        raise ConfigError(
            f"data.reward={path!r} runs programs that the policy wrote, and this system cannot confine them; missing: "
            f"{'; '.join(lacking)}. data.unsafe=True runs them with less isolation"
        )
    return reward


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
) -> np.ndarray:
    """The reward of each completion, float64 [R], by the reward's batch form where it has one.

    A reward is any finite real number, of Python or NumPy, True and False counting as 1 and 0.

    Raises:
      RewardError: naming the row, its completion and what happened.
    """
    many = getattr(reward, "batch", None)
    if many is None or not len(rows):
        values = (_call(reward, given, _where(*given[1:])) for given in zip(prompts, completions, rows, strict=True))
    else:
        ends = f"one of {len(rows)} rows, {rows[0].get('id')!r} to {rows[-1].get('id')!r}"
        where = ends if len(rows) > 1 else _where(completions[0], rows[0])
        values = _call(many, (prompts, completions, rows), where)
        if not isinstance(values, Sequence | np.ndarray) or len(values) != len(rows):
            raise RewardError(f"the reward's batch form returned {values!r:.200}, not {len(rows)} numbers in order")
    return np.array([_number(*given) for given in zip(values, completions, rows, strict=True)], np.float64)


def _call(function: Callable, given: tuple, where: str) -> Any:
    try:
        return function(*given)
    except Exception as error:
        raise RewardError(f"the reward raised {type(error).__name__}: {error} ({where})") from error


def _where(completion: str, row: dict[str, Any]) -> str:
    return f"row {row.get('id')!r}, completion {completion[:200]!r}"


def _number(value: Any, completion: str, row: dict[str, Any]) -> float:
    try:
        number = float(value) if isinstance(value, numbers.Real | np.bool_) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"the reward is {value!r:.200}, not a finite number ({_where(completion, row)})")
    return number

"""Problems in, rewards out: see load.py (data), rewards.py (calling a reward), arithmetic.py and math.py (tasks)."""

from gcpo_jax.tasks.jsonl import DataError, Row
from gcpo_jax.tasks.load import Problems, Task, batch_indices, build
from gcpo_jax.tasks.rewards import Reward, RewardError, resolve_answer, resolve_reward, score

__all__ = [
    "DataError",
    "Problems",
    "Reward",
    "RewardError",
    "Row",
    "Task",
    "batch_indices",
    "build",
    "resolve_answer",
    "resolve_reward",
    "score",
]

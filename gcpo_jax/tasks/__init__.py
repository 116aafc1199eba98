"""Problems in, rewards out: see load.py (data), rewards.py and beside.py (calling a reward), and the tasks
arithmetic.py, math.py and code.py."""

from gcpo_jax.tasks.beside import Grading
from gcpo_jax.tasks.jsonl import DataError, Row
from gcpo_jax.tasks.load import Problems, Task, batch_indices, build, fingerprint
from gcpo_jax.tasks.rewards import Reward, RewardError, batched, resolve_answer, resolve_reward, score

__all__ = [
    "DataError",
    "Grading",
    "Problems",
    "Reward",
    "RewardError",
    "Row",
    "Task",
    "batch_indices",
    "batched",
    "build",
    "fingerprint",
    "resolve_answer",
    "resolve_reward",
    "score",
]

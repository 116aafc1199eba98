"""Problems in, rewards out: see load.py (data), rewards.py (calling a reward), arithmetic.py and math.py (tasks)."""

from gcpo_jax.tasks.rewards import Reward, RewardError, resolve_answer, resolve_reward, score

__all__ = ["Reward", "RewardError", "resolve_answer", "resolve_reward", "score"]

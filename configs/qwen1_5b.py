"""The paper's setting for a 1.5B policy (DeepSeek-R1-Distill-Qwen-1.5B, DeepScaleR-1.5B-Preview).

    python -m gcpo_jax.train --config configs/qwen1_5b.py:gcpo --config.model.path=DIR --config.data.path=TRAIN.jsonl

Settings: see configs/qwen7b.py, which holds them all. Hardware, time and accuracy were not measured. The paper reports
a mean over five benchmarks of 44.9 -> 47.4 for R1-Distill-1.5B and 54.5 -> 56.8 for DeepScaleR-1.5B (its Table 1).
"""

from gcpo_jax import config as config_lib
from gcpo_jax.configs import qwen7b


def get_config(variant: str | None = None) -> config_lib.Config:
    """The recipe with the preset `variant` ("gcpo" when empty)."""
    return qwen7b.get_config(variant)

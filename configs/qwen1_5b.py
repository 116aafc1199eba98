"""The paper's setting for a 1.5B policy (DeepSeek-R1-Distill-Qwen-1.5B, DeepScaleR-1.5B-Preview).

    python -m gcpo_jax.train --config configs/qwen1_5b.py:gcpo --config.model.path=DIR --config.data.path=TRAIN.jsonl

Settings: those of configs/qwen7b.py, on a smaller mesh. Time and accuracy were not measured. The paper reports a mean
over five benchmarks of 44.9 -> 47.4 for R1-Distill-1.5B and 54.5 -> 56.8 for DeepScaleR-1.5B (its Table 1).

Hardware, for which `python -m gcpo_jax.plan` says that it fits (docs/results/plan_1_5b_*.json), and flags to add:

  4 x v5p (v5p:2x2x1)       none
  8 x v6e (v6e:2x4)         --config.mesh.tensor=2
  16 x v5e (v5e:4x4)        --config.mesh.tensor=2
  8 x A100-80GB             none
  1 x H200                  none
"""

from gcpo_jax import config as config_lib
from gcpo_jax.configs import qwen7b

ARCHITECTURE = "DeepSeek-R1-Distill-Qwen-1.5B"


def get_config(variant: str | None = None) -> config_lib.Config:
    """The recipe with the preset `variant` ("gcpo" when empty)."""
    config = qwen7b.get_config(variant)
    config.mesh = config_lib.Mesh(fsdp=-1)
    config.learner.micro_batch = 8
    config.rollout.max_rows = 32
    return config

"""The paper's setting for a 7B policy (DeepSeek-R1-Distill-Qwen-7B).

    python -m gcpo_jax.train --config configs/qwen7b.py:gcpo --config.model.path=DIR --config.data.path=TRAIN.jsonl

From the paper: 4,096 prompt and 16,384 completion tokens, learning rate 1e-6, weight decay 0.01, cosine with a warm-up
of 0.1, 256 completions a step, β = 0.04, κ = 0.06, α = 2. Not in the paper, chosen here: n = 8 (so 32 queries a step),
temperature 1, ε = 0.2, total_steps. Time and accuracy were not measured. The paper reports a mean over five benchmarks
of 64.1 -> 66.5 (Table 1).

Hardware, for which `python -m gcpo_jax.plan` says that it fits (docs/results/plan_7b_*.json), and flags to add:

  64 x v5p (v5p:4x4x4)      none
  64 x v6e (v6e:8x8)        none
  256 x v5e (v5e:16x16)     --config.mesh.tensor=4 --config.learner.micro_batch=64
  8 x A100-80GB             --config.mesh.tensor=1 --config.learner.micro_batch=8 --config.rollout.max_rows=32

A micro-batch is whole groups, and a multiple of mesh.data * mesh.fsdp; 7B has heads for mesh.tensor of 1, 2 or 4.
"""

from gcpo_jax import config as config_lib

ARCHITECTURE = "DeepSeek-R1-Distill-Qwen-7B"  # what gcpo_jax.plan plans for while there is no model.path


def get_config(variant: str | None = None) -> config_lib.Config:
    """The recipe with the preset `variant` ("gcpo" when empty)."""
    return config_lib.Config(
        model=config_lib.Model(dtype="bfloat16", remat="full"),
        data=config_lib.Data(
            prompt="{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
        ),
        rollout=config_lib.Rollout(queries=32, group_size=8, max_prompt_tokens=4096, max_new_tokens=16384, max_rows=64),
        contexts=config_lib.Contexts(cap=1024),
        algorithm=config_lib.preset(variant),
        learner=config_lib.Learner(learning_rate=1e-6, weight_decay=0.01, warmup=0.1, micro_batch=32),
        mesh=config_lib.Mesh(fsdp=-1, tensor=2),
        evaluation=config_lib.Evaluation(every=50, problems=30, samples=20),
        checkpoint=config_lib.Checkpoint(every=10, keep=2),
        train=config_lib.Train(total_steps=125),
    )

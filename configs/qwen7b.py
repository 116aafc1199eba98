"""The paper's setting for a 7B policy (DeepSeek-R1-Distill-Qwen-7B).

    python -m gcpo_jax.train --config configs/qwen7b.py:gcpo --config.model.path=DIR --config.data.path=TRAIN.jsonl

From the paper: 4,096 prompt and 16,384 completion tokens, learning rate 1e-6, weight decay 0.01, cosine with a warm-up
of 0.1, 256 completions a step, β = 0.04, κ = 0.06, α = 2. Not in the paper, chosen here: n = 8 (so 32 queries a step),
temperature 1, ε = 0.2, total_steps. Hardware, time and accuracy were not measured; the program places the whole model
on one device, so that device needs room for it. The paper reports a mean over five benchmarks of 64.1 -> 66.5
(Table 1).
"""

from gcpo_jax import config as config_lib


def get_config(variant: str | None = None) -> config_lib.Config:
    """The recipe with the preset `variant` ("gcpo" when empty)."""
    return config_lib.Config(
        model=config_lib.Model(dtype="bfloat16", remat=True),
        data=config_lib.Data(
            prompt="{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
        ),
        rollout=config_lib.Rollout(queries=32, group_size=8, max_prompt_tokens=4096, max_new_tokens=16384, max_rows=64),
        contexts=config_lib.Contexts(cap=1024),
        algorithm=config_lib.preset(variant),
        learner=config_lib.Learner(learning_rate=1e-6, weight_decay=0.01, warmup=0.1, micro_batch=8),
        evaluation=config_lib.Evaluation(every=50, problems=30, samples=20),
        checkpoint=config_lib.Checkpoint(every=10, keep=2),
        train=config_lib.Train(total_steps=125),
    )

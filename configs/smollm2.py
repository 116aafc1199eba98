"""SmolLM2-135M-Instruct learns one-digit sums and times tables asked in words.

python scripts/word_problems.py words.jsonl
python -m gcpo_jax.train --config configs/smollm2.py:gcpo --config.model.path=DIR --config.data.path=words.jsonl
"""

from gcpo_jax import config as config_lib


def get_config(variant: str | None = None) -> config_lib.Config:
    """The recipe with the preset `variant` ("gcpo" when empty)."""
    return config_lib.Config(
        data=config_lib.Data(prompt="{problem} Just the number, in digits."),
        rollout=config_lib.Rollout(
            queries=4, group_size=4, max_prompt_tokens=64, max_new_tokens=16, temperature=0.5, max_rows=16
        ),
        contexts=config_lib.Contexts(cap=16),
        algorithm=config_lib.preset(variant),
        learner=config_lib.Learner(learning_rate=3e-5, warmup=0.1, weight_decay=0.0, micro_batch=8),
        evaluation=config_lib.Evaluation(problems=96, samples=4),
        checkpoint=config_lib.Checkpoint(every=10, keep=1),
        train=config_lib.Train(total_steps=30),
    )

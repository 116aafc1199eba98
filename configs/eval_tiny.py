"""The tiny model on 256 of its 1,024 held-out problems, in seconds and without any data.

Command: python -m gcpo_jax.evaluate --config configs/eval_tiny.py
         python -m gcpo_jax.evaluate --config configs/eval_tiny.py --config.model.path=runs/tiny-gcpo/policy
Hardware: any. Expected of the model as it comes: an accuracy near 40 %; after configs/tiny.py: near 89 %.
"""

import pathlib

from gcpo_jax.config import ConfigError, Contexts
from gcpo_jax.evaluation.settings import EvalConfig, Policy, Prompts, Sampling


def get_config(variant: str | None = None) -> EvalConfig:
    """The recipe; it has no variants."""
    if variant:
        raise ConfigError(f"configs/eval_tiny.py has no variant {variant!r}")
    return EvalConfig(
        benchmarks="arithmetic",
        limit=256,
        reward="tasks.arithmetic.reward",
        model=Policy(path=str(pathlib.Path(__file__).resolve().parent / "tiny_model"), dtype="float32"),
        sampling=Sampling(samples=8, temperature=1.0, top_p=1.0, max_new_tokens=16, max_rows=512),
        prompts=Prompts(answer="{problem}"),
        contexts=Contexts(cap=16),
    )

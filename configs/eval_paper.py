"""The paper's Table 1 for one policy: 20 samples of each problem of its five benchmarks.

Command: python -m gcpo_jax.evaluate --config configs/eval_paper.py --config.model.path=DIR --data=DATA
DIR is a Hugging Face directory (the policy/ of a run is one), DATA holds the benchmarks' files (docs/evaluate.md).
Code: the same with --benchmarks=humaneval,humaneval_5shot,mbpp
Hardware and time: ask with --dry_run; 17,440 completions of up to 16,384 tokens.
Expected for DeepSeek-R1-Distill-Qwen-1.5B, by the paper: 28.7, 26.0, 69.9, 80.1 and 19.8 %; not measured here.
"""

from gcpo_jax.config import ConfigError
from gcpo_jax.evaluation.settings import EvalConfig


def get_config(variant: str | None = None) -> EvalConfig:
    """The recipe; it has no variants."""
    if variant:
        raise ConfigError(f"configs/eval_paper.py has no variant {variant!r}")
    return EvalConfig()

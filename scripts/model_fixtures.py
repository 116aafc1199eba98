"""Write the model directories and expected numbers of tests/fixtures/models, with transformers and torch alone.

    python scripts/model_fixtures.py tests/fixtures/models

They let the tests compare with transformers where torch is not installed. Run it again only where a directory should
differ; a change of gcpo_jax never asks for it.
"""

import argparse
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

TOKENS = [[3, 14, 15, 9, 26, 5, 35, 8], [9, 7, 9, 3, 2, 38, 4, 6]]
FAMILIES = {
    "qwen2": dict(num_key_value_heads=1, tie_word_embeddings=False),
    "qwen3": dict(num_key_value_heads=2, tie_word_embeddings=True, head_dim=6),
    "llama": dict(num_key_value_heads=4, tie_word_embeddings=False),
}


def build(family: str, seed: int, **settings) -> transformers.PreTrainedModel:
    """A random model of which every tensor matters: biases and norms are random too."""
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.AutoConfig.for_model(family, **sizes | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = rng.normal(1.0 if "norm" in name else 0.0, 0.25, tuple(p.shape))
            p.copy_(torch.tensor(values, dtype=torch.float32))
    return model


def main() -> None:
    """One directory a family."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=pathlib.Path)
    out = p.parse_args().out
    for seed, (family, settings) in enumerate(FAMILIES.items()):
        build(family, seed, eos_token_id=[1, 2], pad_token_id=0, **settings).half().save_pretrained(out / family)
        model = transformers.AutoModelForCausalLM.from_pretrained(out / family, dtype=torch.float32).eval()
        with torch.no_grad():
            result = model(torch.tensor(TOKENS), output_hidden_states=True)
        hidden = result.hidden_states[-1].numpy()
        expected: dict[str, Any] = dict(tokens=TOKENS, logits=result.logits.numpy(), hidden=hidden)
        np.savez(out / family / "expected.npz", **expected)


if __name__ == "__main__":
    main()

"""Model directories of a few kilobytes, for tests that run the whole command."""

import functools
import importlib.util
import json
import pathlib

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models

from gcpo_jax import models

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def cold_start():
    """scripts/cold_start.py as a module."""
    spec = importlib.util.spec_from_file_location("cold_start", ROOT / "scripts" / "cold_start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_chat_tokenizer(out: pathlib.Path) -> None:
    """One id per byte and a chat template: what an instruction-tuned model's directory has, without its merges."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(token_models.BPE({c: k for k, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def write(out: pathlib.Path, *, chat: bool) -> pathlib.Path:
    """A random Qwen2 of two layers of width 32, with a byte-level chat tokenizer or that of the tiny model."""
    out.mkdir(parents=True)
    (write_chat_tokenizer if chat else cold_start().write_tokenizer)(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    config = models.ModelConfig(
        family="qwen2", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=16, qkv_bias=True, tied_embeddings=True, max_position=4096,
        eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    models.save_pretrained(out / "weights", config, models.init_params(config, 0))
    for file in (out / "weights").iterdir():
        file.replace(out / file.name)
    (out / "weights").rmdir()
    return out

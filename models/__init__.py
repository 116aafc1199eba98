"""Flax NNX ports of Qwen2/2.5, Qwen3 and Llama; nothing here knows of reinforcement learning."""

from gcpo_jax.models.config import ModelConfig, ModelError, read_config
from gcpo_jax.models.decode import Cache, Caches, by_layer, decode_step, init_cache, prefill, prefill_shared
from gcpo_jax.models.io import check_weights, load_pretrained, save_pretrained
from gcpo_jax.models.kernels import for_devices
from gcpo_jax.models.qwen import (
    constrain,
    encode,
    forward,
    init_params,
    shapes,
    turn_to,
    unembed,
)
from gcpo_jax.models.shared import Blocks, encode_shared
from gcpo_jax.models.trie import Trie

__all__ = [
    "Blocks",
    "Cache",
    "Caches",
    "ModelConfig",
    "ModelError",
    "Trie",
    "by_layer",
    "check_weights",
    "constrain",
    "decode_step",
    "encode",
    "encode_shared",
    "for_devices",
    "forward",
    "init_cache",
    "init_params",
    "load_pretrained",
    "prefill",
    "prefill_shared",
    "read_config",
    "save_pretrained",
    "shapes",
    "turn_to",
    "unembed",
]

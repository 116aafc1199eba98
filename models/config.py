"""Which model a config.json describes, and which ones are refused."""

import dataclasses
import json
import pathlib
from typing import Any

from gcpo_jax.partition import Layout


class ModelError(ValueError):
    """A model directory that cannot be used. The message names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Qwen2, Qwen3 or Llama family; they differ in qkv_bias and qk_norm alone."""

    family: str  # "qwen2" | "qwen3" | "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    max_position: int = 32_768
    dtype: str = "float32"
    attention: str = "plain"  # | "cudnn" | "splash": see models/kernels.py
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    layout: Layout | None = None  # how its arrays lie on a mesh; None: all on one device


_FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DTYPES = ("float32", "bfloat16")


def read_config(path: str | pathlib.Path, dtype: str = "float32") -> ModelConfig:
    """The ModelConfig of a Hugging Face directory; no weights are read.

    Raises:
      ModelError: where a file is missing or broken, or asks for something that is not implemented, by name.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype={dtype!r}: must be one of {', '.join(_DTYPES)}")
    path = pathlib.Path(path)
    hf = _json(path / "config.json", required=True)
    generation = _json(path / "generation_config.json", required=False)
    family = hf.get("model_type")
    if family not in _FAMILIES:
        raise ModelError(f"{path / 'config.json'}: model_type={family!r} is not one of {', '.join(_FAMILIES)}")
    if wrong := [f"{k}={hf[k]!r}" for k in _SIZES if k in hf and not (isinstance(hf[k], int) and hf[k] > 0)]:
        raise ModelError(f"{path / 'config.json'}: not a positive integer: {', '.join(wrong)}")
    _refuse_unsupported(path / "config.json", hf, family)

    eos, pad = (
        generation[key] if generation.get(key) is not None else hf.get(key) for key in ("eos_token_id", "pad_token_id")
    )
    eos_ids = tuple(int(e) for e in (eos if isinstance(eos, list) else [eos]) if e is not None)
    try:
        width, heads = hf["hidden_size"], hf["num_attention_heads"]
        config = ModelConfig(
            family=family,
            vocab_size=hf["vocab_size"],
            hidden_size=width,
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or (128 if family == "qwen3" else width // heads),
            rope_theta=float(_rope(hf).get("rope_theta", hf.get("rope_theta", 10_000.0))),
            rms_eps=float(hf.get("rms_norm_eps", 1e-6)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position=int(hf.get("max_position_embeddings", 32_768)),
            dtype=dtype,
            eos_ids=eos_ids,
            pad_id=int(pad) if pad is not None else (eos_ids[0] if eos_ids else 0),
        )
    except KeyError as missing:
        raise ModelError(f"{path / 'config.json'}: no field {missing}") from None
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{path / 'config.json'}: num_attention_heads={config.num_heads} is no multiple of "
            f"num_key_value_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ModelError(f"{path / 'config.json'}: head_dim={config.head_dim} is odd; rotary embedding turns pairs")
    return config


def _json(path: pathlib.Path, required: bool) -> dict[str, Any]:
    if not path.exists():
        if required:
            raise ModelError(f"{path} does not exist")
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, not an object")
    return content


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _slides(hf: dict[str, Any]) -> bool:
    """Whether any layer attends to a window only; Qwen directories carry the window's size even where none does."""
    if layer_types := hf.get("layer_types"):
        return "sliding_attention" in layer_types
    fully_attending = hf.get("max_window_layers", 0)
    used = bool(hf.get("use_sliding_window") and hf.get("sliding_window"))
    return used and fully_attending < hf.get("num_hidden_layers", 0)


def _refuse_unsupported(file: pathlib.Path, hf: dict[str, Any], family: str) -> None:
    rope = _rope(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1.0
    faults = [
        (kind != "default", f"rope scaling of type {kind!r}"),
        (any(isinstance(v, dict) for v in rope.values()), "rope parameters that differ between layers"),
        (partial != 1.0, "partial rotary embedding"),
        (_slides(hf), "an active sliding window"),
        (hf.get("hidden_act", "silu") != "silu", f"hidden_act={hf.get('hidden_act')!r}"),
        (family != "qwen2" and bool(hf.get("attention_bias")), "attention_bias"),
        (bool(hf.get("mlp_bias")), "mlp_bias"),
        (bool(hf.get("quantization_config")), "quantised weights"),
    ]
    if found := [name for fault, name in faults if fault]:
        raise ModelError(f"{file}: not supported: {', '.join(found)}")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers and vLLM read."""
    hf: dict[str, Any] = dict(
        architectures=[_FAMILIES[config.family]],
        model_type=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_act="silu",
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_eps,
        tie_word_embeddings=config.tied_embeddings,
        max_position_embeddings=config.max_position,
        attention_dropout=0.0,
        use_sliding_window=False,
        torch_dtype=config.dtype,
        # An absent end id would become the class's default: 2 for Llama.
        eos_token_id=config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        pad_token_id=config.pad_id,
    )
    if config.family == "llama":
        del hf["use_sliding_window"]
        hf |= dict(attention_bias=False, mlp_bias=False)
    if config.family == "qwen3":
        hf |= dict(attention_bias=False)
    return hf

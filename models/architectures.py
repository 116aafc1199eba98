"""The sizes of published models, from their config.json, so that a run can be planned before anything is downloaded."""

from gcpo_jax.models.config import ModelConfig

_1_5B = dict(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128)
_7B = dict(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128)


def _qwen2(sizes: dict[str, int], vocab_size: int, tied: bool, rope_theta: float) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab_size,
        **sizes,
        rope_theta=rope_theta,
        qkv_bias=True,
        tied_embeddings=tied,
        max_position=131_072,
        eos_ids=(151_643,),
        pad_id=151_643,
    )


ARCHITECTURES: dict[str, ModelConfig] = {
    "Qwen2.5-1.5B": _qwen2(_1_5B, 151_936, True, 1e6),
    "Qwen2.5-7B": _qwen2(_7B, 152_064, False, 1e6),
    "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(_1_5B, 151_936, False, 1e4),
    "DeepScaleR-1.5B-Preview": _qwen2(_1_5B, 151_936, False, 1e4),
    "DeepSeek-R1-Distill-Qwen-7B": _qwen2(_7B, 152_064, False, 1e4),
}

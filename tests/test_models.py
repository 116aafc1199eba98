"""models/: what is loaded computes what transformers computes, and what is written is what transformers reads."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gcpo_jax import models
from gcpo_jax.models.io import _flat

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
forward = jax.jit(models.forward, static_argnums=0)
FAMILIES = ("qwen2", "qwen3", "llama")


@pytest.fixture
def directory(tmp_path):
    """A copy of a directory that transformers wrote, to be spoilt."""
    shutil.copytree(FIXTURES / "qwen2", tmp_path / "model")
    return tmp_path / "model"


def edit(directory: pathlib.Path, file: str = "config.json", drop: tuple[str, ...] = (), **changes) -> None:
    content = json.loads((directory / file).read_text())
    content = {k: v for k, v in content.items() if k not in drop} | changes
    (directory / file).write_text(json.dumps(content))


def numpy_weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_hidden_states_equal_numbers_that_transformers_stored(family):
    """Should the directories change: python scripts/model_fixtures.py tests/fixtures/models (needs torch)."""
    expected = np.load(FIXTURES / family / "expected.npz")
    config, params = models.load_pretrained(FIXTURES / family)
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    logits, hidden = forward(config, params, tokens, jnp.full(len(tokens), tokens.shape[1]))
    np.testing.assert_allclose(logits, expected["logits"], atol=3e-4)
    np.testing.assert_allclose(hidden, expected["hidden"], atol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_directory_loads_to_the_same_config_and_bits(family, tmp_path):
    config, params = models.load_pretrained(FIXTURES / family)
    for name, limit, files in (("whole", 5_000_000_000, 1), ("shards", 6_000, 4)):
        models.save_pretrained(tmp_path / name, config, params, max_shard_bytes=limit)
        assert len(list((tmp_path / name).glob("*.safetensors"))) >= files
        again, restored = models.load_pretrained(tmp_path / name)
        assert again == config
        assert dict(_flat(restored)).keys() == dict(_flat(params)).keys()
        jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_bfloat16_parameters_are_stored_as_bfloat16_and_come_back(tmp_path):
    config, params = models.load_pretrained(FIXTURES / "qwen2", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    models.save_pretrained(tmp_path / "m", config, params)
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(tmp_path / "m", dtype="bfloat16")[1], params)
    logits, hidden = forward(config, params, jnp.ones((1, 4), jnp.int32), jnp.full(1, 4))
    assert (logits.dtype, hidden.dtype) == (jnp.float32, jnp.bfloat16)


def test_saving_replaces_an_older_directory_and_leaves_nothing_beside_it(tmp_path):
    config, params = models.load_pretrained(FIXTURES / "qwen3")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/stale.safetensors").write_text("old")
    models.save_pretrained(tmp_path / "m", config, params)
    models.save_pretrained(tmp_path / "m", config, params, source=tmp_path / "m")  # over its own source
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_parameters_can_be_placed_on_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    _, params = models.load_pretrained(FIXTURES / "qwen2", mesh=mesh)
    assert all(x.sharding.is_fully_replicated and len(x.devices()) == 8 for x in jax.tree.leaves(params))


def test_key_names_of_transformers_4_and_5_mean_the_same(directory):
    edit(directory, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    new = models.read_config(directory)
    edit(directory, drop=("rope_parameters", "dtype", "layer_types"), rope_theta=5e5, torch_dtype="float16")
    assert models.read_config(directory) == new
    edit(directory, rope_scaling=None)
    assert models.read_config(directory) == new
    assert new.rope_theta == 5e5


def test_end_ids_come_from_the_generation_config_where_it_has_them(directory):
    edit(directory, eos_token_id=7)
    assert models.read_config(directory).eos_ids == (1, 2)
    edit(directory, "generation_config.json", eos_token_id=None)
    assert models.read_config(directory).eos_ids == (7,)
    (directory / "generation_config.json").unlink()
    assert models.read_config(directory).eos_ids == (7,)
    edit(directory, eos_token_id=None)
    assert models.read_config(directory).eos_ids == ()


def test_a_model_without_end_ids_stays_one_when_saved(tmp_path):
    config, params = models.load_pretrained(FIXTURES / "llama")
    models.save_pretrained(tmp_path / "m", dataclasses.replace(config, eos_ids=()), params)
    assert models.read_config(tmp_path / "m").eos_ids == ()
    assert json.loads((tmp_path / "m/config.json").read_text())["eos_token_id"] is None


def test_every_wrong_tensor_is_named_in_one_error(directory):
    weights = numpy_weights(directory)
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.1.self_attn.q_proj.bias"] = np.zeros(3, np.float16)
    weights["model.layers.1.mlp.down_proj.weight"] = np.zeros((16, 24), np.int8)
    weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float16)
    weights["visual.patch.weight"] = np.zeros(2, np.float16)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float16)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(models.ModelError) as error:
        models.load_pretrained(directory)
    for part in (
        "missing model.layers.0.mlp.up_proj.weight",
        "missing model.norm.weight",
        "model.layers.1.self_attn.q_proj.bias has shape [3], not [16]",
        "model.layers.1.mlp.down_proj.weight has type I8",
        "unknown model.layers.2.mlp.up_proj.weight",
        "unknown visual.patch.weight",
    ):
        assert part in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_weights_saved_from_the_bare_decoder_load(directory):
    weights = {name.removeprefix("model."): w for name, w in numpy_weights(directory).items()}
    save_file(weights, directory / "model.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal,
        models.load_pretrained(directory)[1],
        models.load_pretrained(FIXTURES / "qwen2")[1],
    )


def test_a_second_copy_of_the_weights_is_not_read(directory):
    (directory / "consolidated.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    edit(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    models.load_pretrained(directory)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding window"),
        (dict(layer_types=None, use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding window"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}), "rope scaling of type 'yarn'"),
        (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "rope scaling of type 'linear'"),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope parameters that differ between layers"),
        (dict(partial_rotary_factor=0.5), "partial rotary"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}), "partial rotary"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantised"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(model_type="qwen3", attention_bias=True), "attention_bias"),
        (dict(model_type="llama", attention_bias=True), "attention_bias"),
        (dict(model_type="llama", mlp_bias=True), "mlp_bias"),
        (dict(model_type="gemma3"), "model_type='gemma3' is not one of qwen2, qwen3, llama"),
        (dict(model_type=None), "model_type=None"),
        (dict(num_key_value_heads=3), "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        (dict(hidden_size="16"), "not a positive integer: hidden_size='16'"),
        (dict(head_dim=5), "head_dim=5 is odd"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(directory, changes, named):
    edit(directory, **changes)
    with pytest.raises(models.ModelError, match=r"config\.json") as error:
        models.read_config(directory)
    assert named in str(error.value)


def test_a_sliding_window_that_no_layer_uses_is_accepted(directory):
    for changes in (
        dict(use_sliding_window=False, sliding_window=8),
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=2),
        dict(use_sliding_window=True, sliding_window=None, max_window_layers=0),
    ):
        edit(directory, drop=("layer_types",), **changes)
        models.read_config(directory)


def test_broken_directories_are_refused_with_the_file_named(directory, tmp_path):
    def refused(pattern, dtype="float32"):
        with pytest.raises(models.ModelError, match=pattern):
            models.load_pretrained(directory, dtype=dtype)

    refused("dtype='float16': must be one of float32, bfloat16", dtype="float16")
    with pytest.raises(models.ModelError, match=r"absent/config.json does not exist"):
        models.load_pretrained(tmp_path / "absent")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(r"model.safetensors cannot be read")
    (directory / "model.safetensors").unlink()
    refused(r"holds no \*.safetensors file")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    refused(r"names files that do not exist: gone.safetensors")
    (directory / "model.safetensors.index.json").write_text("[]")
    refused(r"index.json is no index of shards")
    (directory / "config.json").write_text("[]")
    refused(r"config.json holds list, not an object")
    (directory / "config.json").write_text("{")
    refused(r"config.json is not JSON")
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    refused(r"config.json: no field 'hidden_size'")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_logits_nor_hidden_states_of_real_tokens(family):
    config, params = models.load_pretrained(FIXTURES / family)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (4, 12)).astype(np.int32)
    lengths = np.array([12, 7, 1, 5], np.int32)
    outputs = forward(config, params, tokens, lengths)
    spoilt = np.where(np.arange(12)[None, :] < lengths[:, None], tokens, rng.integers(0, 40, (4, 12))).astype(np.int32)
    again = forward(config, params, spoilt, lengths)
    for r, length in [(1, 7), (2, 1)]:
        alone = forward(config, params, tokens[r : r + 1, :length], lengths[r : r + 1])
        for padded, other, single in zip(outputs, again, alone, strict=True):
            np.testing.assert_array_equal(padded[r, :length], other[r, :length])
            np.testing.assert_allclose(padded[r, :length], single[0], atol=1e-5)


def test_init_params_has_the_shapes_of_a_loaded_model_and_its_seed():
    config, params = models.load_pretrained(FIXTURES / "qwen3")
    fresh = models.init_params(config, seed=3)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    jax.tree.map(np.testing.assert_array_equal, fresh, models.init_params(config, seed=3))
    assert not np.array_equal(fresh["embed"], models.init_params(config, seed=4)["embed"])


def test_rematerialisation_changes_no_gradient():
    config, params = models.load_pretrained(FIXTURES / "qwen2")
    tokens, lengths = jnp.arange(8)[None], jnp.full(1, 8)

    def loss(params, remat):
        return jnp.sum(models.forward(config, params, tokens, lengths, remat)[0] ** 2)

    plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, remat)
    assert all(np.abs(x).max() > 0 for name, x in _flat(plain) if not name.endswith("k.bias"))

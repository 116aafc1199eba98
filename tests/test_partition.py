"""The mesh and the table of partition rules: what lies where, and which sizes are refused with what would do."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gcpo_jax import config as config_lib
from gcpo_jax import learner, models, partition
from gcpo_jax.config import ConfigError

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
MODEL = models.ModelConfig(
    family="qwen2",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=True,
)


def layout(data, fsdp, tensor, model=MODEL):
    return partition.make_layout(partition.make_mesh(config_lib.Mesh(data=data, fsdp=fsdp, tensor=tensor)), model)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 2, 1), (1, 2, 1)),
        ((8, -1, 1), (8, 1, 1)),
    ],
)
def test_the_mesh_has_the_sizes_given_and_one_may_be_inferred(sizes, shape):
    mesh = partition.make_mesh(config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))))
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((16, 1, 1), "mesh.data=16, mesh.fsdp=1, mesh.tensor=1: needs 16 devices, there are 8"),
        ((3, -1, 1), "the sizes given must divide the 8 devices"),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(sizes, words):
    with pytest.raises(ConfigError, match=words):
        partition.make_mesh(config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))))


@pytest.mark.parametrize(("change", "words"), [((0, 1), "at least 1, or -1"), ((-1, -1), "-1 for one axis at most")])
def test_mesh_fields_are_checked_with_the_others(change, words):
    config = config_lib.Config(mesh=config_lib.Mesh(data=change[0], fsdp=change[1]))
    with pytest.raises(ConfigError, match=rf"mesh\.data={change[0]}: must be {words}"):
        config_lib.validate(config)


def test_sizes_that_the_mesh_does_not_divide_are_refused_with_those_that_would_do():
    with pytest.raises(ConfigError) as error:
        layout(1, 1, 8, dataclasses.replace(MODEL, num_heads=12))
    assert "mesh.tensor=8: must divide num_heads=12 and intermediate_size=24; 1, 2, 3, 4, 6 or 12 would do" in str(
        error.value
    )
    with pytest.raises(ConfigError, match=r"mesh\.fsdp=8: must divide hidden_size=12; 1, 2, 3, 4, 6 or 12 would do"):
        layout(1, 8, 1, dataclasses.replace(MODEL, hidden_size=12))
    with pytest.raises(ConfigError, match=r"mesh axes .'x'. are not among data, fsdp, tensor"):
        partition.make_layout(jax.make_mesh((8,), ("x",)), MODEL)


def test_a_micro_batch_that_the_rows_axes_do_not_divide_is_refused_before_anything_is_loaded():
    config = config_lib.Config(mesh=config_lib.Mesh(data=2, fsdp=4))
    config.rollout.group_size, config.learner.micro_batch = 6, 20
    with pytest.raises(ConfigError, match=r"micro_batch=20: .* mesh.data \* mesh.fsdp = 8 divides; multiples of 24"):
        partition.layout_of(config, MODEL)
    config.learner.micro_batch = 24
    found = partition.layout_of(config, MODEL)
    assert found is not None and found.row_shards == 8


def test_one_device_has_no_layout():
    assert partition.layout_of(config_lib.Config(), MODEL) is None


def test_a_parameter_that_no_rule_matches_is_an_error_that_names_it():
    tree = {"layers": {"adapter": {"kernel": jax.ShapeDtypeStruct((3, 16, 4), "float32")}}}
    with pytest.raises(ConfigError, match=r"no rule .* 'layers\.adapter\.kernel'"):
        layout(1, 8, 1).shardings(tree)
    with pytest.raises(ConfigError, match=r"no rule .* 'layers\.adapter\.kernel'"):
        layout(1, 8, 1).parameter("layers.adapter.kernel")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_parameter_of_every_family_has_a_rule_and_no_layer_axis_is_cut(family):
    config, params = models.load_pretrained(FIXTURES / family)
    shardings = layout(2, 2, 2, config).shardings(params)
    for leaf, sharding in zip(jax.tree.leaves(params["layers"]), jax.tree.leaves(shardings["layers"]), strict=True):
        assert (*sharding.spec, None)[0] is None
        sharding.shard_shape(leaf.shape)  # raises where it does not divide


def test_matrices_are_cut_by_both_axes_and_norms_by_none():
    lay = layout(2, 2, 2)
    assert lay.parameter("layers.attention.q.kernel").spec == P(None, "fsdp", "tensor")
    assert lay.parameter("layers.down.kernel", of_layer=True).spec == P("tensor", "fsdp")
    assert lay.parameter("layers.down.kernel", of_layer=True, gathered=True).spec == P("tensor", None)
    assert lay.parameter("embed").spec == P("tensor", "fsdp")
    assert lay.parameter("layers.mlp_norm.weight").spec == P(None, None)
    assert lay.sharding("rows").spec == P(("data", "fsdp"))
    assert layout(8, 1, 1).sharding("cache").spec == P(None, "data", None, None, None, None)


@pytest.mark.parametrize(("heads", "cut"), [(2, None), (8, "tensor")])
def test_key_value_heads_that_tensor_does_not_divide_are_held_whole(heads, cut):
    lay = layout(1, 1, 8, dataclasses.replace(MODEL, num_kv_heads=heads))
    assert lay.parameter("layers.attention.k.kernel").spec == P(None, None, cut)
    assert lay.parameter("layers.attention.v.bias").spec == P(None, cut)
    assert lay.parameter("layers.attention.q.kernel").spec == P(None, None, "tensor")
    assert lay.sharding("cache").spec == P(None, None, None, cut, None, None)


def test_a_vocabulary_that_tensor_does_not_divide_is_held_whole():
    lay = layout(1, 1, 8, dataclasses.replace(MODEL, vocab_size=41))
    assert lay.parameter("embed").spec == P(None, None)
    assert lay.sharding("logits").spec == P(None, None, None)


def test_equal_layouts_are_equal_static_arguments():
    assert layout(2, 2, 2) == layout(2, 2, 2) and hash(layout(2, 2, 2)) == hash(layout(2, 2, 2))
    assert layout(2, 2, 2) != layout(2, 4, 1)


@pytest.mark.parametrize("settings", [{}, {"moments_dtype": "bfloat16"}, {"optimizer": "adafactor"}], ids=str)
def test_optimizer_state_lies_as_its_parameters_and_has_the_size_that_its_setting_says(settings):
    model = dataclasses.replace(MODEL, hidden_size=128, intermediate_size=256, layout=layout(2, 2, 2))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), models.shapes(model))
    params = jax.device_put(params, model.layout.shardings(params))
    optimizer, _ = learner.make_optimizer(config_lib.Learner(**settings), 10)
    state = learner.init_state(model, optimizer, params)
    named = {
        jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree_util.tree_leaves_with_path(state)
    }
    moments = {name: x for name, x in named.items() if name.endswith("layers.gate.kernel") and "opt_state" in name}
    whole = [x for x in moments.values() if x.shape == params["layers"]["gate"]["kernel"].shape]
    assert [str(x.dtype) for x in whole] == {
        "{}": ["float32", "float32"], "{'moments_dtype': 'bfloat16'}": ["bfloat16", "float32"]
    }.get(str(settings), [])  # fmt: skip
    assert all(x.sharding.spec == P(None, "fsdp", "tensor") for x in whole)
    if settings.get("optimizer") == "adafactor":
        size = sum(x.size for x in jax.tree.leaves(state.opt_state))
        assert size < 0.2 * sum(x.size for x in jax.tree.leaves(params))


def test_adafactor_steps_down_a_quadratic():
    optimizer, _ = learner.make_optimizer(
        config_lib.Learner(optimizer="adafactor", learning_rate=0.05, schedule="constant", weight_decay=0.0), 50
    )
    params = {"kernel": jnp.ones((128, 128))}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    assert float(jnp.abs(params["kernel"]).max()) < 0.7


def test_rows_put_on_the_mesh_are_cut_and_keep_their_values():
    lay = layout(2, 2, 2)
    x = np.arange(24, dtype=np.int32).reshape(8, 3)
    (put,) = partition.put_rows(lay, x)
    np.testing.assert_array_equal(put, x)
    assert put.sharding.shard_shape(put.shape) == (2, 3)
    assert partition.put_rows(None, x)[0] is x


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_directory_loads_onto_a_mesh_with_the_same_numbers_each_device_holding_its_part(family, sizes, tmp_path):
    mesh = partition.make_mesh(config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))))
    _, whole = models.load_pretrained(FIXTURES / family)
    config, params = models.load_pretrained(FIXTURES / family, mesh=mesh)
    assert config.layout is not None
    shardings = config.layout.shardings(params)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, shardings))
    models.save_pretrained(tmp_path / "m", config, params, max_shard_bytes=4000)
    jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(tmp_path / "m")[1], whole)

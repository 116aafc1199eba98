"""The kernels' attention is the plain one: values, gradients, padding, on a mesh; and who gets which kernel.

On a CPU Pallas interprets splash attention, and XLA stands in for cuDNN behind the same call.
"""

import dataclasses
import re
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from gcpo_jax import config as config_lib
from gcpo_jax import hardware, models, partition
from gcpo_jax.config import ConfigError
from gcpo_jax.models import kernels

KERNELS = ("splash", "cudnn")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "CUDNN", "xla")


def model(attention, K=2, G=2, A=8, layout=None) -> models.ModelConfig:
    return models.ModelConfig("qwen2", 11, 16, 24, 2, K * G, K, A, qkv_bias=True, layout=layout, attention=attention)


def normal(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def same(function: Callable, c, arrays, real):
    """Whether function(c, *arrays) is what it is with plain attention, and its gradients are, where results count."""

    def of(c):
        def loss(arrays):
            heads = jnp.where(real, function(c, *arrays), 0)
            return jnp.sum(jnp.sin(heads)), heads

        (_, heads), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return heads, *gradients

    plain = dataclasses.replace(c, attention="plain", layout=None)
    for expected, found in zip(of(plain), of(c), strict=True):
        assert expected.dtype == found.dtype and np.any(expected)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


def causal(c, lengths):
    R, S, K, G, A = len(lengths), 150, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    real = (jnp.arange(S)[None] < jnp.array(lengths)[:, None])[..., None, None, None]
    arrays = normal(0, (R, S, K, G, A), (R, S, K, A), (R, S, K, A))
    same(kernels.causal, c, arrays, real)


def shared(c, lengths, P=140, n=2, T=20):
    B, K, G, A = len(lengths), c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    arrays = normal(1, (B, n, T, K, G, A), (B, n, T, K, A), (B, n, T, K, A), (B, P, K, A), (B, P, K, A))
    seen = (jnp.arange(P)[None] < jnp.array(lengths)[:, None])[:, None]
    same(lambda c, *arrays: kernels.shared(c, *arrays, seen), c, arrays, True)


def cases(*quick, slow=()):
    """Interpreted, splash attention takes long to compile: what one case of it shows is shown by that case alone."""
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize(
    ("kernel", "A", "heads"),
    cases(
        ("cudnn", 64, (2, 2)),
        slow=[("splash", 64, (2, 2))]
        + [(k, A, h) for k in KERNELS for A, h in ((128, (2, 2)), (8, (1, 3)), (8, (3, 1)))],
    ),
)
def test_causal_attention_of_padded_rows_is_the_plain_one_with_its_gradients(kernel, A, heads):
    causal(model(kernel, heads[0], heads[1], A), [150, 70])


@pytest.mark.parametrize(("kernel", "T"), cases(("splash", 20), ("cudnn", 20), slow=[("splash", 130)]))
def test_attention_to_a_shared_prompt_is_the_plain_one_with_its_gradients(kernel, T, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)  # divides neither the prompt's length nor the row's
    shared(model(kernel, A=128), [140, 5], T=T)


@pytest.mark.parametrize(
    ("kernel", "sizes", "function"),
    cases(
        ("splash", (2, 1, 4), causal),
        ("cudnn", (2, 1, 4), shared),
        slow=[("splash", (1, 2, 2), causal), ("splash", (2, 1, 4), shared), ("cudnn", (1, 2, 2), causal)],
    ),
)
def test_on_a_mesh_each_device_has_its_rows_and_heads(kernel, sizes, function):
    c = model(kernel)  # four heads with two of keys, which a mesh of four holds whole and one of two cuts
    mesh = partition.make_mesh(config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))))
    function(dataclasses.replace(c, layout=partition.make_layout(mesh, c)), [140, 5])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_model_learns_the_same_with_a_kernel(kernel, remat):
    c = model(kernel)
    params = models.init_params(c)
    prompts, completions = (jax.random.randint(jax.random.key(k), s, 0, 11) for k, s in enumerate([(2, 9), (2, 2, 7)]))
    lengths = jnp.array([9, 4])

    def loss(params, c):
        return jnp.sum(jnp.sin(models.encode_shared(c, params, prompts, lengths, completions, remat)))

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    found, expected = run(params, c), run(params, dataclasses.replace(c, attention="plain"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), found, expected)


@pytest.mark.parametrize("kernel", cases("cudnn", slow=[("splash",)]))
def test_prefill_with_a_kernel_gives_the_decoder_the_same_hidden_states_and_cache(kernel):
    c = model(kernel)
    params, tokens = models.init_params(c), jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    run = jax.jit(models.prefill, static_argnums=0)
    lengths = jnp.array([9, 9])
    found, expected = (run(x, params, tokens, lengths) for x in (c, dataclasses.replace(c, attention="plain")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected"),
    [
        ("cpu", "bfloat16", 128, "plain"),
        ("tpu", "float32", 128, "splash"),
        ("tpu", "bfloat16", 80, "splash"),
        ("cuda", "bfloat16", 128, "cudnn"),
        ("cuda", "float32", 128, "plain"),
        ("cuda", "bfloat16", 256, "plain"),
        ("cuda", "bfloat16", 4, "plain"),
        ("gpu", "bfloat16", 128, "plain"),
    ],
)
def test_auto_is_the_fused_kernel_where_there_is_one(platform, dtype, head_dim, expected):
    assert kernels.choose("auto", dtype, head_dim, platform) == expected
    assert kernels.choose(expected, dtype, head_dim, platform) == expected
    assert kernels.choose("plain", dtype, head_dim, platform) == "plain"


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "head_dim", "said"),
    [
        ("splash", "cpu", "float32", 64, "'splash': needs a TPU; platform cpu, .* allow auto, plain$"),
        ("cudnn", "tpu", "bfloat16", 64, "'cudnn': needs a CUDA GPU of .* 8.0 or more; .* allow auto, plain, splash$"),
        ("cudnn", "gpu", "bfloat16", 64, "'cudnn': needs a CUDA GPU of compute capability 8.0 or more;"),
        ("cudnn", "cuda", "float32", 64, "'cudnn': needs model.dtype bfloat16; .* model.dtype float32"),
        ("cudnn", "cuda", "bfloat16", 192, "'cudnn': needs head_dim a multiple of 8 up to 128; .* head_dim 192"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused_by_name(setting, platform, dtype, head_dim, said):
    with pytest.raises(ConfigError, match=f"model.attention={said}"):
        kernels.choose(setting, dtype, head_dim, platform)


def test_the_devices_of_the_mesh_say_what_the_platform_is():
    def device(platform, version="", capability=None):
        return SimpleNamespace(
            platform=platform, client=SimpleNamespace(platform_version=version), compute_capability=capability
        )

    assert kernels.platform_of(device("tpu")) == "tpu"
    assert kernels.platform_of(device("gpu", "PJRT C API\ncuda 12090", "8.0")) == "cuda"
    assert kernels.platform_of(device("gpu", "PJRT C API\ncuda 12090", "10.3")) == "cuda"
    assert kernels.platform_of(device("gpu", "PJRT C API\ncuda 12090", "7.5")) == "gpu"
    assert kernels.platform_of(device("gpu", "rocm 60300", "gfx942")) == "gpu"
    assert models.for_devices(model("splash")).attention == "plain"  # the CPU's
    with pytest.raises(ConfigError, match="needs a TPU"):
        models.for_devices(model("plain"), "splash")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)], ids=["one device", "mesh"])
def test_the_tpu_compiler_takes_splash_attention_and_holds_no_square(sizes, monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with gcpo_jax[tpu]")
    monkeypatch.setattr(kernels, "INTERPRET", False)
    devices, _ = hardware.compile_devices(hardware.parse("v5e:2x2"))
    mesh = partition.make_mesh(config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))), devices)
    c = dataclasses.replace(model("plain", A=64), dtype="bfloat16")
    layout = partition.make_layout(mesh, c)
    c = models.for_devices(c, "auto", layout)
    assert c.attention == "splash"
    params, rows = models.shapes(c), layout.sharding("rows")
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, layout.shardings(params)
    )
    tokens = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((2, 640), (2,), (2, 2, 3456)))

    def loss(params, prompts, lengths, completions):
        return jnp.sum(models.encode_shared(c, params, prompts, lengths, completions, "full").astype(jnp.float32))

    hlo = jax.jit(jax.grad(loss)).lower(params, *tokens).compile().as_text() or ""
    # Forward, again in the backward pass, and twice there, of prompts and of completions.
    assert hlo.count('custom_call_target="tpu_custom_call"') == 8
    sizes_of = [[int(n) for n in found.split(",")] for found in re.findall(r"\w\[([\d,]+)\]", hlo)]
    assert not [s for s in sizes_of if sum(n >= 640 for n in s) > 1]


def test_for_a_gpu_the_update_is_cudnns_forward_and_backward_and_holds_no_square(monkeypatch):
    """Lowered only: no GPU is asked which cuDNN it has."""
    monkeypatch.setattr(kernels, "CUDNN", "cudnn")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    c = dataclasses.replace(model("cudnn", A=64), dtype="bfloat16")

    def loss(params, prompts, lengths, completions):
        return jnp.sum(models.encode_shared(c, params, prompts, lengths, completions, "full").astype(jnp.float32))

    tokens = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 640), (2,), (2, 2, 3456)))
    text = jax.jit(jax.grad(loss)).trace(models.shapes(c), *tokens).lower(lowering_platforms=("cuda",)).as_text()
    # Of prompts and of completions; forward, and again in the backward pass.
    assert len(re.findall(r"@__cudnn\$fmhaSoftmax\(", text)) == 4
    assert len(re.findall(r"@__cudnn\$fmhaSoftmaxBackward\(", text)) == 2
    sizes_of = [[int(n) for n in found.split("x")[:-1]] for found in re.findall(r"tensor<([\dx]+x)\w+>", text)]
    assert sizes_of and not [s for s in sizes_of if sum(n >= 640 for n in s) > 1]

"""Hugging Face directories: read, checked tensor by tensor, and written back."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from gcpo_jax import processes
from gcpo_jax.models.config import ModelConfig, ModelError, read_config, to_hf
from gcpo_jax.models.qwen import Params, shapes
from gcpo_jax.partition import fetch, make_layout

Transform = Callable[[np.ndarray], np.ndarray]
_keep: Transform = lambda w: w  # noqa: E731
_transpose: Transform = lambda w: w.T  # noqa: E731

# Their name -> (our path, transform both ways). `L` stands for the layer's number.
_NAMES: list[tuple[str, str, Transform]] = [
    ("model.embed_tokens.weight", "embed", _keep),
    ("model.norm.weight", "final_norm.weight", _keep),
    ("lm_head.weight", "unembed", _transpose),
    ("model.layers.L.input_layernorm.weight", "layers.attention_norm.weight", _keep),
    ("model.layers.L.post_attention_layernorm.weight", "layers.mlp_norm.weight", _keep),
    *((f"model.layers.L.self_attn.{x}_proj.weight", f"layers.attention.{x}.kernel", _transpose) for x in "qkvo"),
    *((f"model.layers.L.self_attn.{x}_proj.bias", f"layers.attention.{x}.bias", _keep) for x in "qkv"),
    *((f"model.layers.L.self_attn.{x}_norm.weight", f"layers.attention.{x}_norm.weight", _keep) for x in "qk"),
    *((f"model.layers.L.mlp.{x}_proj.weight", f"layers.{x}.kernel", _transpose) for x in ("gate", "up", "down")),
]
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # a constant that old exports carry
_STORED = ("F32", "BF16", "F16")
_WRITTEN = {"float32": "F32", "bfloat16": "BF16"}
_CARRIED = (
    "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip


def _flat(tree: Params, prefix: str = "") -> Iterator[tuple[str, jax.Array]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nested(flat: dict[str, jax.Array]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    return tree


def _plan(config: ModelConfig) -> dict[str, tuple[str, int | None, Transform, tuple[int, ...]]]:
    """Their name -> (our path, layer, transform, their shape) of every tensor that the model has."""
    ours = {path: spec.shape for path, spec in _flat(shapes(config))}
    plan = {}
    for name, path, transform in _NAMES:
        if path not in ours:
            continue
        if ".L." in name:
            shape = ours[path][1:]
            for layer in range(config.num_layers):
                plan[name.replace(".L.", f".{layer}.")] = (path, layer, transform, shape)
        else:
            plan[name] = (path, None, transform, ours[path])
    return {
        name: (path, layer, transform, shape[::-1] if transform is _transpose else shape)
        for name, (path, layer, transform, shape) in plan.items()
    }


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    # The order of transformers: some directories carry a second copy of the weights under another name.
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of shards: {error!r}") from None
        missing = [n for n in names if not (path / n).exists()]
        if missing:
            raise ModelError(f"{index} names files that do not exist: {', '.join(missing)}")
        return [path / n for n in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} holds no *.safetensors file")
    return files


def _canonical(name: str, plan) -> str:
    """Directories saved from the bare decoder lack the prefix "model."."""
    return name if name in plan or f"model.{name}" not in plan else f"model.{name}"


def load_pretrained(
    path: str | pathlib.Path, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face directory of the Qwen2, Qwen3 or Llama family, one file or shards.

    Every tensor is read and placed by itself, on each device only the part that lies there: beside the parameters, host
    memory holds one file's pages and one tensor at most.

    Args:
      dtype: of the parameters returned: "float32" | "bfloat16".
      mesh: of axes data, fsdp and tensor, on which they lie as gcpo_jax/partition.py says; None: the default device.

    Raises:
      ModelError: naming every missing, unknown and misshapen tensor, or what else is wrong with the directory.
      ConfigError: where the mesh does not divide the model.
    """
    path = pathlib.Path(path)
    config = read_config(path, dtype)
    if mesh is not None:
        config = dataclasses.replace(config, layout=make_layout(mesh, config))
    plan = _plan(config)
    files = _inspect(path, config, plan)
    found: dict[str, jax.Array] = {}
    for file, names in files.items():
        with safe_open(file, framework="np") as tensors:
            for theirs, name in names.items():
                our_path, layer, transform, shape = plan[name]
                value = _placed(tensors.get_slice(theirs), shape, transform, config, our_path, layer is not None)
                if layer is not None:
                    if our_path not in found:
                        lies = None if config.layout is None else config.layout.parameter(our_path)
                        found[our_path] = jnp.zeros((config.num_layers, *value.shape), value.dtype, device=lies)
                    value = _put(found[our_path], value, layer)
                # Waiting keeps the host at one tensor; without, reading would run ahead of copying.
                found[our_path] = jax.block_until_ready(value)
    return config, _nested(found)


def check_weights(path: str | pathlib.Path) -> None:
    """Look at the headers of a directory's weights: what load_pretrained would refuse is refused, nothing is loaded.

    Raises:
      ModelError: as load_pretrained.
    """
    config = read_config(path)
    _inspect(pathlib.Path(path), config, _plan(config))


def _inspect(path: pathlib.Path, config: ModelConfig, plan) -> dict[pathlib.Path, dict[str, str]]:
    """{file: {their name: our name for it}} after a look at the headers alone."""
    seen, faults, files = set(), [], {}
    for file in _files(path):
        files[file] = {}
        try:
            reader = safe_open(file, framework="np")
        except Exception as error:  # safetensors raises its own class and OSError alike
            raise ModelError(f"{file} cannot be read: {error}") from None
        with reader as tensors:
            for theirs in tensors.keys():  # noqa: SIM118 - not a mapping
                name = _canonical(theirs, plan)
                if name not in plan:
                    if not (_IGNORED.match(name) or (name == "lm_head.weight" and config.tied_embeddings)):
                        faults.append(f"unknown {theirs}")
                    continue
                files[file][theirs] = name
                shape = plan[name][3]
                given = tensors.get_slice(theirs)
                if name in seen:
                    faults.append(f"{theirs} is there twice")
                seen.add(name)
                if tuple(given.get_shape()) != shape:
                    faults.append(f"{theirs} has shape {given.get_shape()}, not {list(shape)}")
                if given.get_dtype() not in _STORED:
                    faults.append(f"{theirs} has type {given.get_dtype()}, not one of {', '.join(_STORED)}")
    faults += [f"missing {name}" for name in plan if name not in seen]
    if faults:
        raise ModelError(f"{path} does not hold a {config.family} of this config.json: {'; '.join(faults)}")
    return files


def _placed(given, shape, transform: Transform, config: ModelConfig, our_path: str, of_layer: bool) -> jax.Array:
    """A tensor of a file on the device or mesh, read in the pieces that lie on the devices of this process."""
    target = ml_dtypes.bfloat16 if config.dtype == "bfloat16" else np.float32

    def read(index: tuple[slice, ...]) -> np.ndarray:
        turned = index[::-1] if transform is _transpose else index
        return np.ascontiguousarray(transform(given[turned]).astype(target, copy=False))

    if config.layout is None:
        return jnp.array(read((slice(None),) * len(shape)))  # its own memory: an update may reuse it
    pieces: dict[tuple, np.ndarray] = {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in pieces:
            pieces[key] = read(index)
        return pieces[key]

    ours = shape[::-1] if transform is _transpose else shape
    return jax.make_array_from_callback(ours, config.layout.parameter(our_path, of_layer), piece)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, value, layer):
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def save_pretrained(
    path: str | pathlib.Path,
    model_config: ModelConfig,
    params: Params,
    source: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
) -> None:
    """Write a directory that transformers and vLLM load; an older one there is replaced once the new one is whole.

    Tensors are brought to the host and written one by one, wherever and in how many pieces they lie. With several
    processes all must call this, and the first writes.

    Args:
      source: a directory whose tokenizer, chat template and generation config are carried along.
      max_shard_bytes: above this, several files and model.safetensors.index.json.
      dtype: stored: "float32" | "bfloat16"; None: that of the parameters.

    Raises:
      ModelError: for another dtype.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    flat = dict(_flat(params))
    dtype = dtype or str(flat["embed"].dtype)
    if dtype not in _WRITTEN:
        raise ModelError(f"dtype={dtype!r}: must be one of {', '.join(_WRITTEN)}")
    if processes.is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    # By layer, as transformers writes them.
    plan = dict(sorted(_plan(model_config).items(), key=lambda item: -1 if item[1][1] is None else item[1][1]))
    nbytes = {name: math.prod(shape) * jnp.dtype(dtype).itemsize for name, (*_, shape) in plan.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name in plan:
        if size and size + nbytes[name] > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes[name]
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write(partial / file, {name: plan[name] for name in shard}, flat, dtype)
    if not processes.is_first():
        return
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    hf = to_hf(model_config) | {"torch_dtype": dtype}
    (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    generation = {"eos_token_id": list(model_config.eos_ids), "pad_token_id": model_config.pad_id}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for pattern in _CARRIED if source is not None else ():
        for file in pathlib.Path(source).glob(pattern):
            shutil.copyfile(file, partial / file.name)
    for file in partial.iterdir():
        file.chmod(0o644)
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def _write(file: pathlib.Path, plan, flat: dict[str, jax.Array], dtype: str) -> None:
    """One safetensors file, tensor by tensor: eight bytes of the header's length, the header, then the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (*_, shape) in plan.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _WRITTEN[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") if processes.is_first() else open(os.devnull, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for our_path, layer, transform, _ in plan.values():
            value = fetch(_tensor(jnp.asarray(flat[our_path]), layer, dtype))
            out.write(np.ascontiguousarray(transform(value)).reshape(-1).view(np.uint8).data)


@functools.partial(jax.jit, static_argnums=2)
def _tensor(stack, layer, dtype):
    one = stack if layer is None else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
    return one.astype(dtype)

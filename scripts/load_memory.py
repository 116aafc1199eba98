"""Host memory that reading and writing a large sharded checkpoint takes beside the parameters themselves.

    python scripts/load_memory.py DIR --out docs/results/load_memory.json

Writes a random checkpoint of about 3 GB below DIR, loads it and exports it again, on one CPU device and on a mesh of
eight, each in a process of its own, and deletes it. On CPU the parameters live in host memory too, so what is counted
is the peak of the resident set beyond what was resident before and the parameters' own bytes; pages of the files that
are mapped are in it. Exit code 1 where that is over 1.3 times the largest file.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gcpo_jax import config as config_lib
from gcpo_jax import models, partition, provenance

LIMIT = 1.3
SHARD_BYTES = 750_000_000
MESHES = {"one device": (1, 1, 1), "data=1 fsdp=4 tensor=2": (1, 4, 2)}


def model(layers: int) -> models.ModelConfig:
    """Of the Qwen2 family; 14 layers make 3.1 GB in float32."""
    return models.ModelConfig(
        family="qwen2",
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5504,
        num_layers=layers,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        qkv_bias=True,
        tied_embeddings=True,
        eos_ids=(1,),
    )


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(field)))


def peak_of(work: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes by which the resident set peaked over where it stood before, what work() returns)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = resident("VmRSS")
    result = work()
    return resident("VmHWM") - before, result


def child(directory: pathlib.Path, sizes: tuple[int, int, int]) -> None:
    """Load and export; one line of JSON on standard output."""
    mesh = partition.make_mesh(config_lib.Mesh(**dict(zip(partition.MESH_AXES, sizes, strict=True))))
    mesh = mesh if mesh.size > 1 else None
    warm = directory / "warm"
    models.save_pretrained(warm, *models.load_pretrained(warm, mesh=mesh))  # what only the first call allocates
    loading, (config, params) = peak_of(lambda: models.load_pretrained(directory / "big", mesh=mesh))
    parameters = sum(x.nbytes for x in jax.tree.leaves(params))
    copies = 1 if mesh is None else sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
    parameters = max(parameters, copies)
    exporting, _ = peak_of(
        lambda: models.save_pretrained(directory / "out", config, params, max_shard_bytes=SHARD_BYTES, dtype="bfloat16")
    )
    print(json.dumps({"parameters": parameters, "load_extra": loading - parameters, "export_extra": exporting}))


def main() -> None:
    """Make the checkpoint, measure, compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", type=pathlib.Path)
    p.add_argument("--out", type=pathlib.Path)
    p.add_argument("--mesh", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.mesh:
        child(args.directory, tuple(json.loads(args.mesh)))
        return
    args.directory.mkdir(parents=True, exist_ok=True)
    try:
        rng = np.random.default_rng(0)
        for name, layers in (("warm", 1), ("big", 14)):
            config = model(layers)
            params = jax.tree.map(lambda s: rng.random(s.shape, np.float32) - 0.5, models.shapes(config))
            models.save_pretrained(args.directory / name, config, params, max_shard_bytes=SHARD_BYTES)
        del params
        files = [f.stat().st_size for f in (args.directory / "big").glob("*.safetensors")]
        result = {
            **provenance.made("python scripts/load_memory.py DIR --out docs/results/load_memory.json"),
            "checkpoint": sum(files),
            "files": len(files),
            "largest_file": max(files),
            "limit": LIMIT,
            "meshes": {},
        }
        for name, sizes in MESHES.items():
            env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
            command = [sys.executable, __file__, str(args.directory), "--mesh", json.dumps(sizes)]
            out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            for what in ("load", "export"):
                row[f"{what}_ratio"] = round(row[f"{what}_extra"] / max(files), 3)
            result["meshes"][name] = row
            print(name, row, flush=True)
    finally:
        for name in ("warm", "big", "out"):
            shutil.rmtree(args.directory / name, ignore_errors=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    rows = result["meshes"].values()
    sys.exit(any(row[f"{what}_ratio"] > LIMIT for row in rows for what in ("load", "export")))


if __name__ == "__main__":
    main()

"""Devices by name: what their makers' data sheets say, and which of them a topology such as v5p:4x4x4 means."""

import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from gcpo_jax.config import ConfigError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator. Rates are peaks; `memory` is what a program may use."""

    kinds: tuple[str, ...]  # how jax.Device.device_kind begins
    memory: float  # bytes
    flops: float  # dense bfloat16 products, FLOP/s
    bandwidth: float  # of its memory, byte/s
    link: float  # to its neighbours, all links together, byte/s


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; memory as libtpu's compiler names its limit, a little under the
# sheet's. A v4 chip is two devices to that compiler, so no v4 slice is planned for: only its peak is of use here.
# GPUs: the data sheets of A100 (80GB SXM, 40GB SXM), H100 SXM and H200 SXM; memory as the driver reports it.
DEVICES = {
    "v4": Device(("TPU v4",), 30.5 * GIB, 275e12, 1.228e12, 300e9),
    "v5e": Device(("TPU v5 lite", "TPU v5e"), 15.75 * GIB, 197e12, 0.819e12, 200e9),
    "v5p": Device(("TPU v5", "TPU v5p"), 95.74 * GIB, 459e12, 2.765e12, 600e9),
    "v6e": Device(("TPU v6 lite", "TPU v6e"), 31.25 * GIB, 918e12, 1.64e12, 448e9),
    "A100-40GB": Device(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 39.4 * GIB, 312e12, 1.555e12, 600e9),
    "A100-80GB": Device(("NVIDIA A100",), 79.1 * GIB, 312e12, 2.039e12, 600e9),
    "H100-80GB": Device(("NVIDIA H100",), 79.1 * GIB, 989e12, 3.35e12, 900e9),
    "H200": Device(("NVIDIA H200",), 139.8 * GIB, 989e12, 4.8e12, 900e9),
}


def peak_flops(kind: str) -> float | None:
    """The data sheet's peak of a jax.Device.device_kind in bfloat16; None for a device that is not in the table."""
    fitting = [(len(k), device.flops) for device in DEVICES.values() for k in device.kinds if kind.startswith(k)]
    return max(fitting)[1] if fitting else None


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one sort."""

    name: str  # as given
    sort: str  # "tpu" | "gpu" | "cpu"
    model: str  # a name in DEVICES, or "cpu"
    count: int
    device: Device


def parse(name: str) -> Topology:
    """The Topology of "v5p:4x4x4", "gpu:8xA100-80GB", "cpu" or "cpu:8".

    A CPU device is a share of this machine's memory; its rates are of the order of a laptop's.

    Raises:
      ConfigError: for a name of another form, or a device that is not in the table.
    """
    tpu = re.fullmatch(r"(v\w+):(\d+(?:x\d+){1,2})", name)
    gpu = re.fullmatch(r"gpu:(\d+)x([\w-]+)", name)
    cpu = re.fullmatch(r"cpu(?::(\d+))?", name)
    if cpu and (count := int(cpu[1] or 1)):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
        return Topology(name, "cpu", "cpu", count, Device((), memory, 1e11 / count, 2e10 / count, 1e10))
    sort, model, count = "", "", 0
    if tpu:
        sort, model, count = "tpu", tpu[1], math.prod(map(int, tpu[2].split("x")))
    elif gpu:
        sort, model, count = "gpu", gpu[2], int(gpu[1])
    known = [m for m in DEVICES if m.startswith("v") == (sort == "tpu") and m != "v4"]
    if not count or model not in known:
        raise ConfigError(
            f"--topology={name!r}: must be a TPU slice such as v5p:4x4x4 (of v5e, v5p, v6e), "
            f"gpu:COUNTxMODEL with one of {', '.join(m for m in DEVICES if not m.startswith('v'))}, cpu or cpu:COUNT"
        )
    return Topology(name, sort, model, count, DEVICES[model])


def compile_devices(topology: Topology) -> tuple[Sequence[Any] | None, str]:
    """Devices to compile for, without using them, and the compiler's name; None and why not where there is none.

    libtpu compiles for slices that this machine does not have; a GPU program is compiled where such GPUs are.

    Raises:
      ConfigError: where libtpu knows no such slice; or with too few CPU devices.
    """
    if topology.sort == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.count:
            raise ConfigError(f"--topology={topology.name!r}: JAX was started with {len(devices)} CPU devices")
        return devices[: topology.count], f"jaxlib {importlib.metadata.version('jaxlib')}"
    if topology.sort == "gpu":
        try:
            devices = [d for d in jax.devices("gpu") if d.device_kind.startswith(topology.device.kinds)]
        except RuntimeError:
            devices = []
        if len(devices) < topology.count:
            return None, f"no {topology.count} {topology.model} here to compile for"
        return devices[: topology.count], f"jaxlib {importlib.metadata.version('jaxlib')} on {devices[0].device_kind}"
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None, 'libtpu is not installed (pip install "gcpo_jax[tpu]")'
    # What libtpu would ask a TPU machine about itself.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is touched, so no lock is needed
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.model}-{topology.count}")
    try:
        described = topologies.get_topology_desc(topology.name, platform="tpu")
    except Exception as error:  # the plugin's own
        raise ConfigError(f"--topology={topology.name!r}: libtpu knows no such slice: {error}") from error
    return described.devices, f"libtpu {libtpu}"

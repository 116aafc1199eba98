"""Strict numerics for every test: no silent rank or dtype promotion, shapes of public functions checked."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

install_import_hook("gcpo_jax", "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def programs_are_forgotten():
    """Each program's code is some maps of memory, of which Linux allows a process 65,530: all tests' would be more."""
    yield
    jax.clear_caches()

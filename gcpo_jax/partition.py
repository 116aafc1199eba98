"""The device mesh, and the one table that says how every array lies on it.

The mesh has three axes. `data` cuts rows; `fsdp` cuts rows too, and parameters with their optimizer state, which are
put together again a layer at a time where they are used; `tensor` cuts heads, the MLP's inner axis and the vocabulary.
An array is described by the names of its axes, and AXES says which mesh axes cut an axis of that name. The axes of the
models' arrays: L layers, R or B rows, n rows of one prompt, S, P or T positions, D width, H heads, K key/value heads,
A head_dim, F the MLP's inner width, V vocabulary.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gcpo_jax import processes
from gcpo_jax.config import Config, ConfigError
from gcpo_jax.config import Mesh as MeshSizes

MESH_AXES = ("data", "fsdp", "tensor")

AXES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "vocabulary": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "width": ("fsdp",),
    # One decoded token a row is far smaller than the parameters: while decoding, these stay and the rows travel.
    "step_rows": ("data",),
}

# A parameter's path, whole, or an optimizer state's, from some dot on. L is never cut: layers are scanned.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed", ("vocabulary", "width")),
    (r"unembed", ("width", "vocabulary")),
    (r"final_norm\.weight", (None,)),
    (r"layers\.(attention|mlp)_norm\.weight", (None, None)),
    (r"layers\.attention\.[qk]_norm\.weight", (None, None)),
    (r"layers\.attention\.q\.kernel", (None, "width", "heads")),
    (r"layers\.attention\.q\.bias", (None, "heads")),
    (r"layers\.attention\.[kv]\.kernel", (None, "width", "kv_heads")),
    (r"layers\.attention\.[kv]\.bias", (None, "kv_heads")),
    (r"layers\.attention\.o\.kernel", (None, "heads", "width")),
    (r"layers\.(gate|up)\.kernel", (None, "width", "mlp")),
    (r"layers\.down\.kernel", (None, "mlp", "width")),
)

ACTIVATIONS: dict[str, tuple[str | None, ...]] = {
    "rows": ("rows",),  # [R, ...], whatever follows
    "parts": (None, "rows"),  # [micro-batches, R, ...]
    "hidden": ("rows", None, None),  # [R, S, D]
    "logits": ("rows", None, "vocabulary"),  # [R, t, V]
    "prompt_cache": (None, "rows", "kv_heads", None, None),  # [L, B, K, P, A]
    "cache": (None, "rows", None, "kv_heads", None, None),  # [L, B, n, K, T, A]
    "step_hidden": ("step_rows", None, "width"),  # [B, n, D]
    "step_queries": ("rows", None, "kv_heads", None, None),  # [B, n, K, G, A]
    "step_keys": ("rows", None, "kv_heads", None),  # [B, n, K, A]
    "step_products": ("step_rows", None, "vocabulary"),  # [B, n, V]
    "step_logits": ("rows", None, None),  # [B, n, V]: a draw needs the whole distribution
}


@runtime_checkable
class Sizes(Protocol):
    """What of a model its layout depends on; a models.ModelConfig has it."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102 - the name says it

    @property
    def intermediate_size(self) -> int: ...  # noqa: D102

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    @property
    def num_heads(self) -> int: ...  # noqa: D102

    @property
    def num_kv_heads(self) -> int: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one model's arrays lie on one mesh. Hashable, so that it can be a static argument of jax.jit."""

    mesh: Any  # a Mesh; or an AbstractMesh, for shapes alone
    whole: frozenset[str]  # names of axes that the mesh does not divide and that every device therefore holds whole

    @property
    def row_shards(self) -> int:
        """Number of parts into which rows are cut: a row count must be a multiple of it."""
        return math.prod(self.mesh.shape.get(axis, 1) for axis in AXES["rows"])

    def spec(self, names: Sequence[str | None], gathered: bool = False) -> PartitionSpec:
        """The PartitionSpec of an array whose axes have these names; `gathered`: whole over fsdp."""

        def cut(name):
            if name is None or name in self.whole or (gathered and name == "width"):
                return None
            # An axis of size 1 cuts nothing; left out, equal layouts have equal specs.
            axes = tuple(axis for axis in AXES[name] if self.mesh.shape.get(axis, 1) > 1)
            return axes if len(axes) > 1 else axes[0] if axes else None

        return PartitionSpec(*map(cut, names))

    def sharding(self, name: str) -> NamedSharding:
        """Of an activation, cache or batch, by its name in ACTIVATIONS."""
        return NamedSharding(self.mesh, self.spec(ACTIVATIONS[name]))

    def parameter(self, path: str, of_layer: bool = False, gathered: bool = False) -> NamedSharding:
        """Of the parameter at a dotted path; `of_layer`: of one layer of it, without the leading axis.

        Raises:
          ConfigError: where no rule matches; it names the parameter.
        """
        names = _rule(path)
        if names is None:
            raise ConfigError(f"no rule of gcpo_jax/partition.py matches the parameter {path!r}")
        return NamedSharding(self.mesh, self.spec(names[1:] if of_layer else names, gathered))

    def shardings(self, tree: Any) -> Any:
        """Of every leaf of a parameter tree, or of a state built from one: what belongs to a parameter lies as it does.

        Leaves of another rank than their parameter's, such as counters and factored moments, are small: replicated.

        Raises:
          ConfigError: for a leaf of rank 1 or more that no rule matches; it names the leaf.
        """

        def one(path, leaf):
            whole_path = jax.tree_util.keystr(path, simple=True, separator=".")
            sections = whole_path.split(".")
            ends = (".".join(sections[k:]) for k in range(len(sections)))
            names = () if leaf.ndim == 0 else next(filter(None, map(_rule, ends)), None)
            if names is None:
                raise ConfigError(f"no rule of gcpo_jax/partition.py matches {whole_path!r}")
            return NamedSharding(self.mesh, self.spec(names) if len(names) == leaf.ndim else PartitionSpec())

        return jax.tree_util.tree_map_with_path(one, tree)

    def constrain(self, x: Any, name: str) -> Any:
        """x, or every leaf of it, told inside jax.jit to lie as ACTIVATIONS says."""
        return jax.lax.with_sharding_constraint(x, self.sharding(name))

    def gather(self, params: dict, section: str = "") -> dict:
        """Parameters put together over fsdp, for as long as they are used; gradients are scattered back.

        Args:
          params: some of the parameters or, with section="layers", those of one layer.
        """

        def one(path, w):
            dotted = jax.tree_util.keystr(path, simple=True, separator=".")
            dotted = f"{section}.{dotted}" if section else dotted
            lies, whole = (self.parameter(dotted, bool(section), gathered) for gathered in (False, True))
            return w if lies == whole else _gather(w, lies, whole)

        return jax.tree_util.tree_map_with_path(one, params)

    @property
    def gathers(self) -> bool:
        """Whether parameters lie in pieces that have to be put together."""
        return self.mesh.shape.get("fsdp", 1) > 1

    def put_rows(self, x: np.ndarray) -> jax.Array:
        """A host array on the mesh, cut along its leading axis. Every process passes the same array."""
        return jax.make_array_from_callback(x.shape, self.sharding("rows"), lambda index: x[index])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, lies, whole):
    return jax.lax.with_sharding_constraint(w, whole)


# The gradient is summed over rows as a whole and cut then, which compilers merge into one scatter where they can. Asked
# for in pieces at once, that of the embedding would have every row's cotangent brought to every device instead.
_gather.defvjp(
    lambda w, lies, whole: (jax.lax.with_sharding_constraint(w, whole), None),  # bare, so that remat can tell it
    lambda lies, whole, _, g: (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(g, whole), lies),),
)


def _rule(path: str) -> tuple[str | None, ...] | None:
    return next((names for pattern, names in PARAMETERS if re.fullmatch(pattern, path)), None)


def mesh_shape(sizes: MeshSizes, devices: int) -> tuple[int, ...]:
    """The mesh's sizes (data, fsdp, tensor) where there are so many devices.

    Raises:
      ConfigError: where the sizes need more devices than there are, or the inferred one does not come out whole.
    """
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    known = math.prod(s for s in shape if s != -1)
    fields = ", ".join(f"mesh.{axis}={s}" for axis, s in zip(MESH_AXES, shape, strict=True))
    if -1 in shape:
        if devices % known:
            raise ConfigError(f"{fields}: the sizes given must divide the {devices} devices that there are")
        shape[shape.index(-1)] = devices // known
    if (need := math.prod(shape)) > devices:
        raise ConfigError(f"{fields}: needs {need} devices, there are {devices}")
    return tuple(shape)


def make_mesh(sizes: MeshSizes, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over the first of `devices` (default: all of them).

    Raises:
      ConfigError: as mesh_shape.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(sizes, len(devices))
    # On a torus an axis may lie across a part of a physical one: slower than along a whole one, but any sizes will do.
    order = create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)
    return Mesh(order, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(sizes: MeshSizes, devices: int) -> AbstractMesh:
    """The mesh over so many devices that need not be there: what lies where can be asked of it, and no more.

    Raises:
      ConfigError: as mesh_shape.
    """
    return AbstractMesh(mesh_shape(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def make_layout(mesh: Mesh | AbstractMesh, model: Sizes) -> Layout:
    """The layout of a model on a mesh of any of the axes data, fsdp and tensor; axes that it lacks cut nothing.

    Key/value heads that `tensor` does not divide are held whole by every device, as is such a vocabulary.

    Raises:
      ConfigError: where a mesh axis does not divide what it cuts; it names the sizes that would do.
    """
    if unknown := set(mesh.axis_names) - set(MESH_AXES):
        raise ConfigError(f"mesh axes {sorted(unknown)} are not among {', '.join(MESH_AXES)}")
    # The rules are for axes whose propagation is the compiler's.
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    else:
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    wrong = []
    for axis, parts in (
        ("tensor", {"num_heads": model.num_heads, "intermediate_size": model.intermediate_size}),
        ("fsdp", {"hidden_size": model.hidden_size}),
    ):
        size = mesh.shape.get(axis, 1)
        if any(count % size for count in parts.values()):
            what = " and ".join(f"{name}={count}" for name, count in parts.items())
            wrong.append(f"mesh.{axis}={size}: must divide {what}; {_listed(math.gcd(*parts.values()))} would do")
    if wrong:
        raise ConfigError("; ".join(wrong))
    tensor = mesh.shape.get("tensor", 1)
    counts = {"kv_heads": model.num_kv_heads, "vocabulary": model.vocab_size}
    return Layout(mesh, frozenset(name for name, count in counts.items() if count % tensor))


def _listed(number: int) -> str:
    """The divisors of a number, for a message: at most the smallest dozen."""
    divisors = [d for d in range(1, number + 1) if number % d == 0][:12]
    return ", ".join(map(str, divisors[:-1])) + (" or " if divisors[1:] else "") + str(divisors[-1])


def layout_of(config: Config, model: Sizes, mesh: Mesh | AbstractMesh | None = None) -> Layout | None:
    """The layout of a run; None where its mesh is one device, which then works as if there were no mesh.

    Args:
      mesh: default: of config.mesh, over all devices that there are.

    Raises:
      ConfigError: where mesh, model and batch sizes do not fit each other; the message says which sizes would do.
    """
    if mesh is None:
        if (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, 1, 1) and processes.count() == 1:
            return None
        mesh = make_mesh(config.mesh)
    if processes.count() > 1 and mesh.size < jax.device_count():
        fields = ", ".join(f"mesh.{axis}={getattr(config.mesh, axis)}" for axis in MESH_AXES)
        raise ConfigError(
            f"{fields}: must take in all {jax.device_count()} devices of the {processes.count()} processes; -1 for one "
            "of them would"
        )
    if mesh.size == 1:
        return None
    layout = make_layout(mesh, model)
    n, shards = config.rollout.group_size, layout.row_shards
    if rows_at_a_time(config) % shards:
        least = math.lcm(n, shards)
        raise ConfigError(
            f"learner.micro_batch={config.learner.micro_batch}: must hold whole groups of rollout.group_size={n} that "
            f"mesh.data * mesh.fsdp = {shards} divides; multiples of {least} would do"
        )
    return layout


def rows_at_a_time(config: Config) -> int:
    """Rows of a micro-batch: whole groups, at least one."""
    n = config.rollout.group_size
    return max(1, config.learner.micro_batch // n) * n


def rows_of_a_prompt(config: Config, layout: Layout | None) -> int:
    """How many of a group's n rows share the update's computation of their prompt: all, or as many as lie together.

    A mesh that cuts a micro-batch into more parts than it has groups parts a group's rows; each then has the prompt.
    """
    n, shards = config.rollout.group_size, 1 if layout is None else layout.row_shards
    rows = rows_at_a_time(config)
    return next((m for m in range(n, 0, -1) if n % m == 0 and rows % (m * shards) == 0), 1)


def put_rows(layout: Layout | None, *arrays: Any) -> tuple[Any, ...]:
    """Host arrays, or trees of them, on the layout's mesh, cut along their leading axes; as they are without a mesh."""
    return arrays if layout is None else jax.tree.map(layout.put_rows, arrays)


def fetch(tree: Any) -> Any:
    """Arrays, wherever they lie, as whole host arrays. With several processes all must ask for the same ones."""

    def one(x: Any) -> np.ndarray:
        whole = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if whole else process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)

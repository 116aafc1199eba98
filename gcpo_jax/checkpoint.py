"""Save, resume, and stop in time: Orbax checkpoints that notice damage, and the signals that end a run.

A checkpoint is a directory named by its step. Orbax writes it in the background under a temporary name; SHA256SUMS,
the digests of all its files, is added before the rename that makes it a checkpoint, so there is none without. The
files say whether the disk kept what was written; a digest of every array, taken before the save and again after a
restore, says whether the same numbers came back.
"""

import asyncio
import concurrent.futures
import errno
import functools
import hashlib
import os
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from absl import logging as absl_logging

from gcpo_jax import processes

MANIFEST = "SHA256SUMS"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, is damaged, or belongs to another model. The message says what to do."""


class Checkpoints:
    """The checkpoints of one run: saved in the background, whole or not at all, the newest `keep` of them kept.

    Args:
      directory: made if absent; leftovers of saves that were cut off are removed.

    Raises:
      CheckpointError: where the directory cannot be used.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        # Every failure becomes an exception here; Orbax would print its traceback as well.
        absl_logging.get_absl_logger().addFilter(_not_from_orbax)
        if processes.count() > 1:
            # Its threads would meet in device programs, which may cross those of the run itself and wait for ever.
            flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True
        self._directory = directory.resolve()
        self._pending: int | None = None
        self._copying: concurrent.futures.Future[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._closed = False
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            lightweight_initialize=True,
            temporary_path_class=_SealedDirectory,
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except Exception as error:
            raise CheckpointError(f"{directory} cannot hold checkpoints: {_brief(error)}") from error

    def latest(self) -> int | None:
        """The newest step that was saved completely; None where there is none."""
        # As process 0 sees it: on a shared disk the others may see a rename a little later.
        return processes.by_first(lambda: max(self._steps(), default=None), CheckpointError)

    def save(self, step: int, state: Any, metadata: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
        """Start saving, unless the step is there already. `state` may be donated once `copied` has returned.

        Nothing is copied here: the caller goes on, and the arrays are read in a thread of their own.

        Args:
          state: a pytree of arrays.
          metadata: anything that JSON can hold.
          before: called in that thread; there is no checkpoint before it returns, and none at all where it raises.

        Raises:
          CheckpointError: where the save before failed (full disk, ...).
        """
        self._wait()
        if step in processes.by_first(self._steps, CheckpointError):
            return
        self._pending = step
        self._copying = self._thread.submit(self._copy, step, _flatten(state), metadata, before)
        if processes.count() > 1:  # they exchange digests, and exchanges of two threads may cross
            self.copied()

    def prepare(self, state: Any) -> None:
        """Compile, in the thread of saves, what reads such a state: else the first save would take the time for it."""
        if processes.count() == 1:
            self._thread.submit(
                _compile_digests, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(state)]
            )

    def copied(self) -> None:
        """Wait until the arrays of the last save are not read any more; the files come later.

        Raises:
          CheckpointError: where that save could not start.
        """
        if self._copying is not None:
            copying, self._copying = self._copying, None
            try:
                copying.result()
            except Exception as error:
                raise self._failed(error) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and metadata of a step, checked bit by bit. Never another step in its place.

        Args:
          like: a pytree of arrays or jax.ShapeDtypeStructs; the result has its structure and shardings (the default
            device where a leaf has none), whatever mesh the checkpoint was saved on.

        Raises:
          CheckpointError: naming the damaged files or arrays and the newest older checkpoint that is whole; or naming
            the arrays in which the checkpoint and `like` differ.
        """
        self._wait()
        if damaged := processes.by_first(lambda: damaged_files(self._directory / str(step)), CheckpointError):
            raise self._damage(step, "file", damaged)
        template = _flatten(like)
        stored = self._read(step, metadata=ocp.args.JsonRestore())
        _compare(self._directory / str(step), stored["arrays"], template)
        wanted = {name: _abstract(x) for name, x in template.items()}
        arrays = dict(self._read(step, state=ocp.args.StandardRestore(wanted)))
        described = _describe(arrays)
        if changed := [name for name in described if described[name] != stored["arrays"][name]]:
            raise self._damage(step, "array", changed)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in template]), stored["metadata"]

    def close(self) -> None:
        """Wait until everything is on disk; a second call does nothing.

        Raises:
          CheckpointError: where the last save failed.
        """
        if not self._closed:
            self._closed = True
            self._wait()
            self._thread.submit(self._manager.close).result()
            self._thread.shutdown()

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._directory.iterdir() if path.name.isdecimal() and path.is_dir()]

    def _read(self, step: int, **item: Any) -> Any:
        try:
            (value,) = dict(self._manager.restore(step, args=ocp.args.Composite(**item)).items()).values()
        except Exception as error:
            raise CheckpointError(f"{self._directory / str(step)} cannot be read: {_brief(error)}") from error
        return value

    def _copy(self, step: int, arrays: dict[str, Any], metadata: dict[str, Any], before: Callable[[], None]) -> None:
        before()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            metadata=ocp.args.JsonSave({"metadata": metadata, "arrays": _describe(arrays)}),
        )
        self._manager.save(step, args=items)

    def _wait(self) -> None:
        self.copied()
        try:
            # Orbax raises an error once in each thread that asks.
            self._thread.submit(self._manager.wait_until_finished).result()
        except Exception as error:
            raise self._failed(error) from error
        self._pending = None

    def _failed(self, error: Exception) -> CheckpointError:
        latest = max(self._steps(), default=None)  # alone: the other processes may not have failed
        kept = "there is no earlier checkpoint" if latest is None else f"the checkpoint of step {latest} is intact"
        return CheckpointError(
            f"step {self._pending} could not be saved in {self._directory}: {_brief(error)}; {kept}, "
            "and the same command goes on from there once the cause is removed"
        )

    def _damage(self, step: int, kind: str, names: list[str]) -> CheckpointError:
        return CheckpointError(processes.by_first(lambda: self._say_damage(step, kind, names), CheckpointError))

    def _say_damage(self, step: int, kind: str, names: list[str]) -> str:
        later, whole = [step], None
        for other in sorted((s for s in self._steps() if s < step), reverse=True):
            if not damaged_files(self._directory / str(other)):
                whole = other
                break
            later.append(other)
        start = "the beginning: no earlier checkpoint is whole"
        if whole is not None:
            start = f"step {whole}, whose checkpoint is whole"
        return (
            f"the checkpoint {self._directory / str(step)} is damaged: {kind} {', '.join(names)} differs from what was "
            f"saved. Nothing was restored. To go on from {start}, delete "
            f"{' and '.join(str(self._directory / str(s)) for s in later)} and run the same command again"
        )


class Preemption:
    """`with Preemption() as p:` turns SIGTERM and Ctrl-C into p.requested, to be looked at once a step.

    A second Ctrl-C is a KeyboardInterrupt. Only the main thread can do this; elsewhere nothing is changed.
    """

    def __init__(self):
        self.requested = False
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: object) -> None:
        self.requested = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt


class _SealedDirectory(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's way to commit a directory, with the manifest written before the rename.

    Orbax would also stamp the time of the commit into a file; a file may not change once the manifest has its digest.
    """

    async def finalize(self) -> None:
        if not self.get_final().name.isdecimal():  # an item inside a step
            return await super().finalize()
        if self._checkpoint_metadata_store is not None:
            await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
        await asyncio.to_thread(seal, pathlib.Path(self.get()))
        os.rename(self.get(), self.get_final())


def seal(directory: pathlib.Path) -> None:
    """Write the digests of all files below `directory`, in the format of sha256sum, under a digest of its own.

    Files and manifest are on the disk, not in its cache, when this returns.
    """
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    lines = "".join(f"{digest}  {name}\n" for name, digest in _digests(directory, names, sync=True).items())
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(f"# sha256 of the lines below: {hashlib.sha256(lines.encode()).hexdigest()}\n{lines}")
        file.flush()
        os.fsync(file.fileno())


def damaged_files(directory: pathlib.Path) -> list[str]:
    """The files of a checkpoint that are changed or missing since `seal`; the manifest alone where that is damaged."""
    try:
        head, _, lines = (directory / MANIFEST).read_bytes().decode("utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return [MANIFEST]
    if head != f"# sha256 of the lines below: {hashlib.sha256(lines.encode()).hexdigest()}":
        return [MANIFEST]
    saved = {name: digest for digest, name in (line.split("  ", 1) for line in lines.splitlines())}
    found = _digests(directory, list(saved))
    return [name for name in saved if found[name] != saved[name]]


def _digests(directory: pathlib.Path, names: list[str], sync: bool = False) -> dict[str, str | None]:
    def sha256(name: str) -> str | None:
        try:
            with (directory / name).open("rb") as file:
                if sync:
                    os.fsync(file.fileno())
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            if sync:
                raise
            return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(sha256, names), strict=True))


def _flatten(tree: Any) -> dict[str, Any]:
    """{"params.embed": leaf}: names that stay readable in a message and do not depend on classes of optax."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and digest of every array, whatever pieces it lies in.

    A digest is a sum over all elements, so each device adds up the pieces that it has, and no device waits for another.
    """
    parts = {
        name: [
            _digest(shard.data, tuple(np.uint32(s.start or 0) for s in shard.index), x.shape)
            for shard in jnp.asarray(x).addressable_shards
            if shard.replica_id == 0
        ]
        for name, x in arrays.items()
    }
    mine = {name: np.sum([np.asarray(p) for p in ps], axis=0, dtype=np.uint32).tolist() for name, ps in parts.items()}
    shares = processes.exchange({name: sums or [0, 0] for name, sums in mine.items()})

    def total(name: str) -> str:
        return "".join(f"{sum(sums) % 2**32:08x}" for sums in zip(*(share[name] for share in shares), strict=True))

    return {name: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": total(name)} for name, x in arrays.items()}


@functools.partial(jax.jit, static_argnums=2)
def _digest(x: jax.Array, begin: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """Two sums over mixed bits and places of a piece's elements; it begins there in an array of that shape.

    A change of any one element changes both sums, as the mixing is one to one.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = x.astype(unsigned) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + begin[axis]
        place = place * np.uint32(shape[axis] % 2**32) + at

    def mix(h):  # the finaliser of MurmurHash3
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return h ^ (h >> np.uint32(16))

    sums = [jnp.sum(mix(bits.astype(jnp.uint32) ^ mix(place + np.uint32(salt))), dtype=jnp.uint32) for salt in (1, 2)]
    return jnp.stack(sums)


def _compile_digests(arrays: list[jax.ShapeDtypeStruct]) -> None:
    """Of whole arrays on one device; nothing else is certain to be asked for."""
    for shape, dtype in {(x.shape, x.dtype) for x in arrays}:
        begin = tuple(np.uint32(0) for _ in shape)
        _digest.lower(jax.ShapeDtypeStruct(shape, dtype), begin, shape).compile()


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _compare(path: pathlib.Path, stored: dict[str, Any], template: dict[str, Any]) -> None:
    wrong = [f"{name} is not in the checkpoint" for name in template if name not in stored]
    wrong += [f"{name} is only in the checkpoint" for name in stored if name not in template]
    for name in template.keys() & stored.keys():
        x, entry = template[name], stored[name]
        have, need = f"{entry['dtype']}{entry['shape']}", f"{x.dtype}{list(x.shape)}"
        if have != need:
            wrong.append(f"{name} is {have} in the checkpoint and {need} in this run")
    if wrong:
        raise CheckpointError(f"{path} does not fit this run: {'; '.join(sorted(wrong))}")


def _brief(error: Exception) -> str:
    text = str(error).strip()
    # The cause that a person can act on stands deep inside what TensorStore reports.
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(code) in text:
            return os.strerror(code)
    return f"{type(error).__name__}: {text[:500]}"


def _not_from_orbax(record: Any) -> bool:
    return "orbax" not in record.pathname

"""One directory, one run: who writes there, and with which settings."""

import fcntl
import importlib.metadata
import json
import os
import pathlib
from typing import Any

from gcpo_jax import processes
from gcpo_jax.config import ConfigError, flatten

# What may differ when a run goes on: these change what is written down or where it is computed, never a number of the
# run beyond rounding.
MAY_CHANGE = frozenset(
    {
        "checkpoint.every",
        "checkpoint.keep",
        "train.log_groups",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "model.attention",
    }
)


class Run:
    """A locked run directory. The lock ends with close(), or with the process, however that ends."""

    def __init__(self, lock: int | None):
        self._lock = lock

    def close(self) -> None:
        """Let another process have the directory; a second call does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def open_run(workdir: pathlib.Path, config: Any, may_change: frozenset[str] = MAY_CHANGE) -> Run:
    """Make or reopen a run directory: lock it and write, or compare, config.json.

    Of several processes the first does it; all must have the same settings and see the directory.

    config.json holds {"version": of gcpo_jax when the run began, "config": {"section.field": value}}.

    Raises:
      ConfigError: where the directory cannot be written, holds something else, is in use by another process, or holds
        a run whose settings differ in a field outside `may_change` (every such field is named with both values); or
        where processes differ in their settings.
    """
    processes.check_same("settings", flatten(config))
    lock = processes.by_first(lambda: _open(workdir, flatten(config), may_change), ConfigError)
    processes.together(lambda: _look(workdir), ConfigError)
    return Run(lock if processes.is_first() else None)


def _look(workdir: pathlib.Path) -> None:
    if not (workdir / "config.json").exists():
        raise ConfigError(
            f"--workdir={str(workdir)!r}: process {processes.index()} does not see what process 0 wrote there; it must "
            "be on a file system that all of them share"
        )


def _open(workdir: pathlib.Path, now: dict[str, Any], may_change: frozenset[str]) -> int:
    settings = workdir / "config.json"
    lock = None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        foreign = sorted({path.name for path in workdir.iterdir()} - {"lock", "config.partial"})
        if foreign and not settings.exists():
            raise ConfigError(
                f"--workdir={str(workdir)!r} holds {', '.join(foreign[:3])} but no config.json, so it is not a run: "
                "name an empty or a new directory"
            )
        lock = _lock(workdir)
        _settle(workdir, settings, now, may_change)
    except BaseException as error:
        if lock is not None:
            os.close(lock)
        if isinstance(error, OSError):
            raise ConfigError(f"--workdir={str(workdir)!r} cannot be written: {error}") from error
        raise
    return lock


def _lock(workdir: pathlib.Path) -> int:
    lock = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 20, 0).decode() or "unknown"
        os.close(lock)
        raise ConfigError(
            f"--workdir={str(workdir)!r} is in use by the process {holder}: wait for its end or name another directory"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _settle(workdir: pathlib.Path, settings: pathlib.Path, now: dict[str, Any], may_change: frozenset[str]) -> None:
    version = importlib.metadata.version("gcpo_jax")
    if settings.exists():
        try:
            saved = json.loads(settings.read_text(encoding="utf-8"))
            before, version = saved["config"], saved["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{settings} is not the config.json of a run: {error!r}") from error
        absent = "(absent)"
        names = [*now, *(name for name in before if name not in now)]
        changed = [name for name in names if before.get(name, absent) != now.get(name, absent)]
        if refused := [name for name in changed if name not in may_change]:
            fields = (f"{name} was {before.get(name, absent)!r}, is {now.get(name, absent)!r}" for name in refused)
            raise ConfigError(
                f"--workdir={str(workdir)!r} holds a run with other settings: {'; '.join(fields)}. "
                "Name another --workdir for these, or go on with the old ones"
            )
    partial = workdir / "config.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"version": version, "config": now}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, settings)

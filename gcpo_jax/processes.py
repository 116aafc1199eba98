"""Several processes, one run: how they find each other, what they exchange, and what they do when one of them ends.

Every process runs the same host program over the same lists of ids. What the devices compute lies on the mesh in
pieces; what the host program needs of it (tokens, lengths, log-probabilities: a few bytes a token) is gathered whole
on every process, so that contexts, batches and every random choice come out equal everywhere without being sent. The
price is host memory of ids only; the gain is that the numbers are those of one process by construction, and that the
number of processes and their devices may change between a run and its restart. Divided are the things that cost:
what the devices do, the rewards (query b is graded by process b modulo their number, and the numbers are exchanged),
reading parameters, and writing checkpoints. Process 0 writes all other files of the run directory, which all
processes must see.

A process that ends takes the others along, within about HEARTBEAT_S seconds, each with one line that says so: a
collective that fails is caught in `joined`; where JAX's coordination service ends the process from within, as for an
end by kill -9, a shell that waits for the end of a pipe says the line in its place.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed as coordination  # the barrier with a bound in time has no public name
from jax.experimental.multihost_utils import process_allgather

from gcpo_jax.config import ConfigError

HEARTBEAT_S = 30  # silence after which a process is taken for dead
MEET_S = 300  # for all processes to come, or to end
_LEAVE_S = 5  # for the others to say the same error, or to come to the end

_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_COLLECTIVES = "JAX_CPU_COLLECTIVES_IMPLEMENTATION"  # JAX's own variable: "mpi" where its CPU processes have that
_LOST = re.compile("gloo|nccl|coordination|barrier|heartbeat|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED", re.I)
_SAY_LOST = (
    "another process of this run ended, or cannot be reached any more; "
    "the same command, for every process, goes on from the last checkpoint"
)


def count() -> int:
    """How many processes share the run; 1 where none was joined."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return index() == 0


def exchange(value: Any) -> list[Any]:
    """What every process passed, by process. All must call it, at the same place of the program.

    Args:
      value: anything that JSON can hold; floats come out bit for bit.
    """
    if count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.array([len(text)], np.int32)).ravel()
    # Powers of two, so that few programs are compiled.
    padded = np.zeros(max(256, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: len(text)] = text
    rows = process_allgather(padded).reshape(count(), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def together(function: Callable[[], Any], error: type[Exception]) -> list[Any]:
    """function() of every process, by process; where some raised `error`, all raise what the first of these said."""
    mine = {}
    try:
        mine["value"] = function()
    except error as raised:
        if count() == 1:
            raise
        mine["error"] = str(raised)
    answers = exchange(mine)
    for answer in answers:
        if "error" in answer:
            raise error(answer["error"])
    return [answer["value"] for answer in answers]


def by_first(function: Callable[[], Any], error: type[Exception]) -> Any:
    """function() as process 0 finds it, for all: what is seen on a disk may differ between machines for a while."""
    return together(lambda: function() if is_first() else None, error)[0]


def check_same(what: str, value: dict[str, Any]) -> None:
    """See that every process has the same.

    Raises:
      ConfigError: naming what differs between which processes.
    """
    first, *others = exchange(value)
    for k, other in enumerate(others, 1):
        if differs := [name for name in first if first[name] != other.get(name)]:
            fields = "; ".join(f"{name} is {first[name]!r} there and {other.get(name)!r} here" for name in differs)
            raise ConfigError(f"processes 0 and {k} must have the same {what}: {fields}")


@contextlib.contextmanager
def joined(
    coordinator: str, processes: int | None, process_id: int | None, distributed: str, expected: tuple
) -> Iterator[None]:
    """Be one of several processes for the time of the body; nothing at all happens where no argument is given.

    Args:
      coordinator: HOST:PORT, where process 0 listens and all others find it; with processes and process_id.
      distributed: "auto": as Slurm, a TPU pod or Open MPI say; "env": as the JAX_* variables say; "": neither.
      expected: exceptions whose text is all that a person needs.

    Raises:
      ConfigError: where the arguments do not say who this process is. Any other exception ends the process here.
    """
    given = _resolve({"coordinator": coordinator, "processes": processes, "process_id": process_id}, distributed)
    if given is None:
        yield
        return
    # Its notifier would take SIGTERM for itself; train exchanges what the processes were told, at points of its own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", os.environ.get(_COLLECTIVES, "gloo"))
    # On CPU, two programs under way at once may wait for each other's part in another process.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=MEET_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=MEET_S,
        )
    except (ValueError, RuntimeError) as error:
        if distributed == "auto" and "defined" in str(error):
            error = "neither Slurm, nor a TPU pod, nor Open MPI is found here; give --coordinator and the rest instead"
        raise ConfigError(f"this process cannot join the others: {error}") from None
    shell = _last_words(f"error: {_SAY_LOST}")
    try:
        yield
        jax.distributed.shutdown()
    except BaseException as error:
        _leave(error, expected, shell)
    _dismiss(shell)


def _resolve(given: dict[str, Any], distributed: str) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize; None: this is the only process."""
    names = {name: f"--{name}" for name in given}
    if distributed:
        if named := [names[name] for name, value in given.items() if value not in ("", None)]:
            raise ConfigError(f"--distributed={distributed} and {', '.join(named)}: one of the two ways must do")
        if distributed == "auto":
            return {}
        names = _VARIABLES
        given = {name: os.environ.get(variable) for name, variable in _VARIABLES.items()}
    missing = [names[name] for name, value in given.items() if value in ("", None)]
    if len(missing) == len(given) and not distributed:
        return None
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing; one of several processes needs {', '.join(names.values())}")
    try:
        processes, process_id = int(given["processes"]), int(given["process_id"])
    except ValueError as error:
        raise ConfigError(f"{names['processes']} and {names['process_id']} must be whole numbers: {error}") from None
    if not 0 <= process_id < processes:
        raise ConfigError(f"{names['process_id']}={process_id}: must be in [0, {names['processes']}={processes})")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{names['coordinator']}={given['coordinator']!r}: must be HOST:PORT of process 0")
    return {
        "coordinator_address": given["coordinator"],
        "num_processes": processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def _last_words(text: str) -> subprocess.Popen:
    """A shell that says `text` on standard error if this process ends without _dismiss."""
    command = 'trap "" INT TERM HUP; read -r _ || echo "$0" >&2'
    return subprocess.Popen(["sh", "-c", command, text], stdin=subprocess.PIPE, start_new_session=True)


def _dismiss(shell: subprocess.Popen) -> None:
    shell.communicate(b"\n")


def _leave(error: BaseException, expected: tuple, shell: subprocess.Popen) -> None:
    """Say what happened and end at once: threads of a save may still be waiting for a process that is gone."""
    _dismiss(shell)
    text = " ".join(str(error).split())
    by_runtime = any(isinstance(e, jax.errors.JaxRuntimeError | TimeoutError) for e in (error, error.__cause__))
    if by_runtime and _LOST.search(text):
        print(f"error: {_SAY_LOST} ({text[:300]})", file=sys.stderr)
    elif isinstance(error, expected):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # An error that all have is said by each before the first of them is missed.
    with contextlib.suppress(Exception):
        client: Any = coordination.global_state.client
        client.wait_at_barrier("leave", _LEAVE_S * 1000)
    os._exit(1)

"""The command lines: read, and what is wrong with them said in one line."""

import difflib
import pathlib
import runpy
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from gcpo_jax import config as config_lib

RECIPES = pathlib.Path(__file__).parent / "configs"


def define(kind: type = config_lib.Config, recipe: str = "tiny.py") -> None:
    """The two flags, --config and --workdir. Whatever is wrong with the command line's settings ends the program.

    Args:
      kind: the dataclass that a recipe must return.
      recipe: the one of configs/ that --config has by default.
    """
    try:
        # Overrides of the default recipe are made, and fail, while the flag is defined.
        _check_recipe(sys.argv)
        _check_names(sys.argv, kind)
        config_flags.DEFINE_config_file("config", str(RECIPES / recipe), "a file of configs/, with :preset if wanted")
    except (config_lib.ConfigError, flags.Error) as error:
        sys.exit(f"error: {_first_cause(error)}")
    flags.DEFINE_string("workdir", "", "the run directory; default runs/CONFIG-PRESET")


def define_processes() -> None:
    """The flags of one of several processes."""
    flags.DEFINE_enum(
        "distributed", "", ["", "auto", "env"],
        "one of several processes, as Slurm, a TPU pod or Open MPI say (auto), or as JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID say (env)",
    )  # fmt: skip
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; with --processes and --process_id")
    flags.DEFINE_integer("processes", None, "how many processes share the run", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0)


def processes() -> dict[str, Any]:
    """What the flags say of this process among others: arguments of processes.joined."""
    return {name: flags.FLAGS[name].value for name in ("coordinator", "processes", "process_id", "distributed")}


def parser(kind: type, words: Callable[[], int] = lambda: 0) -> Callable[[list[str]], list[str]]:
    """The function that app.run reads the command line with.

    It returns the program's name and what is left of `argv` without its flags; whatever is wrong with them ends the
    program. A recipe's own mistakes (of its Python) keep their traceback: it shows the line.

    Args:
      kind: the dataclass that a recipe must return.
      words: how many arguments must be left, asked when the flags are known.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            _check_recipe(argv)
            _check_names(argv, kind)
            try:
                program, *left = flags.FLAGS(argv)
            except (LookupError, AttributeError, TypeError):
                # A field of something that is not of that kind cannot be overridden, and what it is gets lost.
                file, *variant = _recipe(argv).split(":", 1)
                if file:
                    _check_made(argv, runpy.run_path(file)["get_config"](*variant), kind)
                raise
            if len(left) != words():
                said = f"unexpected arguments: {' '.join(left)}" if left else f"{words()} more argument is needed"
                raise config_lib.ConfigError(said)
            _check_made(argv, flags.FLAGS.config, kind)
        except (config_lib.ConfigError, flags.Error) as error:
            sys.exit(f"error: {_first_cause(error)}")
        return [program, *left]

    return parse


parse = parser(config_lib.Config)


def _recipe(argv: list[str]) -> str:
    """The file and variant that --config names; empty: none is named."""
    value = ""
    for k, argument in enumerate(argv):
        if argument in ("--config", "-config"):
            value = "".join(argv[k + 1 : k + 2])
        elif argument.startswith(("--config=", "-config=")):
            value = argument.partition("=")[2]
    return value


def _check_recipe(argv: list[str]) -> None:
    value = _recipe(argv)
    file = value.partition(":")[0]
    # ml_collections would go on with an object that fails at its first use.
    if file and not pathlib.Path(file).is_file():
        raise config_lib.ConfigError(
            f"--config={value!r}: there is no such file; gcpo_jax came with those in {RECIPES}"
        )


def _check_made(argv: list[str], made: object, kind: type) -> None:
    if not isinstance(made, kind):
        raise config_lib.ConfigError(
            f"--config={_recipe(argv)!r}: get_config() must return a {kind.__module__}.{kind.__name__}, "
            f"not {type(made).__name__}"
        )


def _check_names(argv: list[str], kind: type) -> None:
    known = config_lib.flatten(kind())
    for argument in argv[1:]:
        dashes, dot, name = argument.partition("=")[0].partition("config.")
        if dashes not in ("-", "--") or not dot or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise config_lib.ConfigError(f"--config.{name}: there is no such field{hint}")


def _first_cause(error: BaseException) -> BaseException:
    """The ConfigError that a chain of exceptions began with, else the last of them."""
    cause, found = error, error
    while cause is not None:
        found = cause if isinstance(cause, config_lib.ConfigError) else found
        cause = cause.__context__
    return found

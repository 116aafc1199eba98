"""Where, when and with what a file of results was made."""

import datetime
import os
import pathlib
import platform
import subprocess

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent


def made(command: str) -> dict[str, str | None]:
    """What every file of docs/results/ says beside its figures; `command` is as typed in a checkout's directory."""
    return {
        "command": command,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where a Python file differs from it; None of an installed package."""
    # A package that is installed below somebody's own repository is not part of that.
    if not (ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

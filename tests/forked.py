"""Runs `python -m gcpo_jax.train` many times for one import: every line read is a run, in a fork of this process.

A line is {"argv": [...], "cwd": DIR}; the answer is {"code": exit code, "said": standard output and error}.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback

import transformers

import gcpo_jax.train  # noqa: F401  with all that it imports, so that no fork has to
from gcpo_jax.tasks import builders  # noqa: F401

del sys.modules["gcpo_jax.train"]  # the forks run it anew, as __main__
transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018  loaded at first use, otherwise


def child(argv: list[str], cwd: str, output) -> int:
    """What the interpreter does with -m, up to its exit code."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.chdir(cwd)
    sys.argv = ["gcpo_jax.train", *argv]
    try:
        runpy.run_module("gcpo_jax.train", run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return int(end.code is not None) if isinstance(end.code, str | None) else end.code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


for line in sys.stdin:
    run = json.loads(line)
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            os._exit(child(run["argv"], run["cwd"], output))
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "said": output.read()}), flush=True)

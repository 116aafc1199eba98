"""Runs the hostile programs where even a sandbox that fails lets nothing of the machine be harmed; prints what happened.

Around the sandbox under test lies another wall, made of different bricks: a process-id namespace (nothing outside can be
signalled, all inside ends with it), every mount read-only, an empty /tmp of limited size, no network, limits of memory, files and
processor time, and a watchdog. Exits with 77 where that wall cannot be built.

    python contained.py SANDBOX_PACKAGE_DIRECTORY [user] [landlock]
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import forgeries
import programs

CHECK = (
    "\ndef check(candidate):\n    assert candidate(2) == 4\n    assert abs(candidate(5) - 10) < 1e-6\n\ncheck(solve)\n"
)
FORGO_NAMESPACES = """
from sandbox import kernel
def refuse(*_):
    raise PermissionError(1, "no namespaces")
kernel.unshare = refuse
"""
TIMEOUT_S, WATCHDOG_S = 1.0, 240


def load(directory: str):
    """The package of the sandbox, without the library around it."""
    path = pathlib.Path(directory)
    spec = importlib.util.spec_from_file_location(
        "confined", path / "__init__.py", submodule_search_locations=[directory]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["confined"] = module
    spec.loader.exec_module(module)
    return module


def wall(kernel) -> None:
    """Enter it; returns in the init of the new process-id namespace."""
    flags = kernel.NEWPID | kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC
    if os.geteuid() != 0:
        kernel.enter_user_namespace()
    kernel.unshare(flags)
    pid = os.fork()
    if pid:
        deadline = time.monotonic() + WATCHDOG_S
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        os._exit(os.waitstatus_to_exitcode(ended[1]) & 255)
    kernel.die_with_parent()
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.read_only("/", kernel.ATTR_RDONLY)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV)
    for path in ("/tmp", "/dev/shm"):
        kernel.mount("tmpfs", path, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=64m,mode=1777")
    for kind, value in ((resource.RLIMIT_AS, 8 << 30), (resource.RLIMIT_FSIZE, 128 << 20), (resource.RLIMIT_CPU, 200)):
        resource.setrlimit(kind, (value, value))
    probe = pathlib.Path(__file__).with_name("written")
    with contextlib.suppress(OSError):
        probe.touch()
        probe.unlink()
        raise SystemExit("the wall does not hold: a file could be written")
    if os.getpid() != 1 or {int(p) for p in os.listdir("/proc") if p.isdigit()} != {1}:
        raise SystemExit("the wall does not hold: other processes can be seen")


def usable_python(dropped: bool) -> str:
    """This interpreter, or the system's where the present user (or one without rights) may not run this one."""
    user = 64000 if dropped and os.getuid() == 0 else None
    for path in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if subprocess.run([path, "-I", "-S", "-c", "pass"], capture_output=True, env={}, user=user).returncode == 0:
                return path
    return sys.executable


def alive(expected: int) -> int:
    """How many processes there are once those that end have had a second to; this is the init, which buries the dead."""
    for _ in range(50):
        count = 0
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                count += path.read_text().rpartition(")")[2].split()[0] not in "ZX"
        if count <= expected:
            break
        time.sleep(0.02)
    with contextlib.suppress(ChildProcessError):
        while expected == 1 and os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return count


def state() -> dict:
    """What a program could leave behind."""
    with open("/proc/self/mountinfo") as mounts, open("/proc/sysvipc/shm") as shared:
        return {
            "processes": sorted(int(p) for p in os.listdir("/proc") if p.isdigit()),
            "mounts": len(mounts.readlines()),
            "shared memory": len(shared.readlines()),
            "files": sorted(str(p) for root in ("/tmp", "/dev/shm") for p in pathlib.Path(root).rglob("*")),
        }


def main() -> None:
    directory, *options = sys.argv[1:]
    confined = load(directory)
    from confined import kernel

    try:
        wall(kernel)
    except OSError as error:
        print(error)
        raise SystemExit(77) from None
    if "user" in options:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    os.environ["CANARY"] = "CANARY"
    canary = pathlib.Path("/dev/shm/canary")
    canary.write_text("CANARY")
    canary.chmod(0o666)
    before = state()
    start = confined.START
    if "landlock" in options:
        start = start.replace("; ", "\n").replace("zygote.main", FORGO_NAMESPACES + "zygote.main")
    box = confined.Sandbox(python=usable_python("landlock" in options), start=start)

    def prepared(text: str) -> str:
        return text.replace("@CANARY@", str(canary)).replace("@HERE@", os.path.dirname(os.path.abspath(__file__)))

    whole = {
        f"harm/{name}": confined.Program(programs.WRONG + prepared(code) + programs.TESTS)
        for name, code in programs.HARMING.items()
    }
    for name, code in forgeries.FORGING.items():
        whole[f"together/{name}"] = confined.Program(code + programs.TESTS)
        whole[f"check/{name}"] = confined.Program(code + CHECK)
        whole[f"apart/{name}"] = confined.Program(code, tests=CHECK, every=True)
    if wanted := [o.removeprefix("only=") for o in options if o.startswith("only=")]:
        whole = {name: program for name, program in whole.items() if any(w in name for w in wanted)}
    try:
        began = time.monotonic()
        verdicts = box.judge(list(whole.values()), TIMEOUT_S, memory_mb=256)
        seconds = time.monotonic() - began
        honest = box.judge([confined.Program("def solve(x):\n    return 2 * x" + programs.TESTS)], 10.0)[0]
    except confined.SandboxUnavailable as error:
        print(error)
        raise SystemExit(77) from None
    layers = box.layers
    running = alive(3)
    box.close()
    alive(1)
    for _ in range(100):
        if (after := state()) == before:
            break
        time.sleep(0.02)
    found = {name: dataclasses.asdict(verdict) for name, verdict in zip(whole, verdicts, strict=True)}
    print(
        json.dumps(
            {
                "verdicts": found,
                "before": before,
                "after": after,
                "running": running,
                "canary": canary.read_text(),
                "honest": dataclasses.asdict(honest),
                "layers": layers,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()

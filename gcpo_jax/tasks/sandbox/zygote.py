"""A clean single-threaded process that forks, for each program, a judge and the program's own process.

    caller ── zygote (init of a process-id namespace, in an empty file system without network)
                 └─ judge (init of its own, holds the tests and the way to the caller)
                      └─ program (init of its own, holds one pipe to the judge)

The end of each ends all below it: the kernel kills a namespace with its init. The program's process is forked before
its judge reads the job, so that no test or expected value is in its memory. Started by `python -I -S` with an empty
environment.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from . import judge, kernel, program, seccomp, wire
from .remote import Link

# What programs import most; forked processes have it in memory.
PRELOADED = """
abc array ast base64 binascii bisect calendar cmath collections collections.abc colorsys contextlib copy csv dataclasses
datetime decimal difflib encodings.idna enum fnmatch fractions functools hashlib heapq hmac html inspect io itertools
json math numbers operator os os.path pathlib pickle pprint queue random re secrets shlex statistics string struct sys
tempfile textwrap threading time timeit traceback types typing unicodedata unittest urllib.parse uuid warnings weakref
bz2 lzma zlib
"""
# What must be so before anything untrusted is run, asked from inside: harmless where it is not.
PROBE = """
import os, socket
def refused(action, *given):
    try:
        result = action(*given)
    except OSError:
        return True
    if action is os.fork and result == 0:
        os._exit(0)
    if action is os.mkdir:
        os.rmdir(*given)
    return False
def facts():
    checks = {
        "a file outside": refused(open, "/etc/passwd"), "a file of the kernel": refused(open, "/proc/self/status"),
        "the root directory": refused(os.mkdir, "/probe"), "a socket": refused(socket.socket),
        "a process": refused(os.fork), "a program": refused(os.execv, "/bin/true", ["true"]),
        "a signal": refused(os.kill, 2, 0) and refused(os.kill, -1, 0), "root": os.getuid() != 0 != os.geteuid(),
        "becoming root": refused(os.setuid, 0), "a directory to be root": refused(os.chroot, "/"),
        "environment": not os.environ, "descriptors": all(refused(os.fstat, fd) for fd in range(5, 256)),
    }
    failed = [name for name, well in checks.items() if not well]
    print("not refused:", *failed)
    return failed
"""
GRACE = 1.0  # seconds after its time limit at which a judge that has not answered is killed
JUDGE_MEMORY_MB, TMP_MB, FILE_MB, PROCESSES = 2048, 16, 8, 128


class Zygote:
    """The layers of isolation that this system has, set up in order; `missing` says which are not to be had."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.missing: list[str] = []
        self.readable = [path for path in sys.path if os.path.isdir(path)]
        self.null = os.open("/dev/null", os.O_RDWR)
        self.root = os.geteuid() == 0
        self.namespace = -1

    def leave(self) -> None:
        """New namespaces (of process ids, for the children): for root directly, else by a user namespace."""
        every = kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS
        try:
            try:
                kernel.unshare(every)
            except PermissionError:
                kernel.enter_user_namespace()
                kernel.unshare(every)
                self.root = False
                self.layers.append("user namespace")
            self.layers += ["pid namespaces", "mount namespace", "network namespace", "ipc namespace", "uts namespace"]
        except OSError as error:
            if kernel.landlock_version() and seccomp.supported():
                return  # which confine a process that can make no other, to files that it can only read
            self.missing.append(f"Landlock, or namespaces (as root, or by unprivileged user namespaces): {error}")

    def settle(self) -> None:
        """In the first process of the namespaces: the empty file system, and what else the kernel has."""
        if "mount namespace" in self.layers:
            self.namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            try:
                kernel.new_root(self.readable)
                self.layers.append("private file system")
            except OSError as error:
                self.missing.append(f"a private file system: {error}")
        if kernel.landlock_version():
            self.layers.append("landlock")
        if seccomp.supported():
            self.layers.append("seccomp")
        else:
            self.missing.append(f"system call filter for {os.uname().machine}")
        if self.root or "user namespace" in self.layers:
            self.layers.append("capabilities")
        self.layers += ["resource limits", "no new privileges"]
        if self.root:
            self.layers.append("user of its own")

    def probe(self) -> None:
        """Try out whether the layers hold."""
        ours, theirs = socket.socketpair()
        job = {"code": PROBE, "tests": "assert facts() == []", "helpers": "", "every": False}
        with ours, theirs:
            pid = self.start([ours], theirs.fileno(), 0, {"timeout": 10, "memory_mb": 512})
            ours.sendall(wire.frame(job | {"timeout": 10, "nonce": ""}))
            theirs.close()
            said = b""
            with contextlib.suppress(ConnectionResetError):  # of a judge that has died before it read its job
                said = ours.recv(1 << 16)
            os.waitpid(pid, 0)
        if b'"passed"' not in said:
            self.missing.append(f"isolation that holds: {said.decode(errors='replace')[-500:]}")

    def start(self, others: list[socket.socket], job_fd: int, slot: int, limits: dict[str, Any]) -> int:
        """Fork a judge for a job; returns its process id."""
        if self.namespace >= 0:
            kernel.unshare(kernel.NEWPID)
        pid = os.fork()
        if pid:
            if self.namespace >= 0:
                kernel.return_to(self.namespace)
            return pid
        _or_die(lambda: self._judge(others, job_fd, slot, limits), job_fd)
        raise AssertionError

    def _judge(self, others: list[socket.socket], job_fd: int, slot: int, limits: dict[str, Any]) -> None:
        for other in others:
            other.close()
        if self.namespace >= 0:
            os.close(self.namespace)
            kernel.unshare(kernel.NEWNS | kernel.NEWIPC | kernel.NEWPID)
            kernel.private_tmp(TMP_MB)
        requests, answers, output = os.pipe(), os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            _or_die(lambda: self._program(requests[0], answers[1], output[1], slot, limits), 2)
        for fd in (requests[0], answers[1], output[1], self.null):
            os.close(fd)
        link = Link(pid, requests[1], answers[0], output[0], time.monotonic() + limits["timeout"])
        kernel.limit(limits["timeout"] + GRACE, JUDGE_MEMORY_MB, 0, PROCESSES if self.namespace >= 0 else None)
        # Of one user with the program only where no namespace ends the program with its judge.
        uid = kernel.FIRST_UID + (0 if self.namespace >= 0 else 1 + slot)
        kernel.confine(uid if self.root else None, self.readable, [], self.layers, signals=True)
        judge.serve(job_fd, link)

    def _program(self, requests: int, answers: int, output: int, slot: int, limits: dict[str, Any]) -> None:
        for fd, wanted in ((self.null, 0), (output, 1), (output, 2)):
            os.dup2(fd, wanted)
        # Numbers above all others first: the two pipes may lie where they are to go.
        high = [os.dup(requests), os.dup(answers)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)
        os.closerange(5, 1024)
        for fd, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))
        for number in range(1, signal.NSIG):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        writable = ["/tmp"] if self.namespace >= 0 else []
        if writable:
            os.chdir("/tmp")
        os.setsid()
        kernel.limit(limits["timeout"], limits["memory_mb"], FILE_MB, PROCESSES if writable else None)
        uid = kernel.FIRST_UID + 1 + slot if self.root else None
        kernel.confine(uid, self.readable, [*writable, "/dev/null"], self.layers)
        program.serve(3, 4)


def _or_die(action: Callable[[], None], complaints: int) -> None:
    """Run what a forked process is for, and never return into its parent's code; errors are written to a descriptor."""
    try:
        action()
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(complaints, f"{type(error).__name__}: {error}\n".encode())
        os._exit(70)
    os._exit(0)


def main(control_fd: int, unsafe: bool) -> None:
    """Set up, say what there is, and start jobs until the caller hangs up."""
    os.umask(0o022)
    os.environ.clear()
    control = socket.socket(fileno=control_fd)
    for name in PRELOADED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.setsid()
    zygote = Zygote()
    zygote.leave()
    pid = os.fork()
    if pid:
        control.close()
        os.waitpid(pid, 0)
        os._exit(0)
    kernel.die_with_parent()
    _or_die(lambda: _serve(zygote, control, unsafe), 2)


def _serve(zygote: Zygote, control: socket.socket, unsafe: bool) -> None:
    kernel.adopt()
    zygote.settle()
    if not zygote.missing:
        zygote.probe()
    control.send(json.dumps({"layers": zygote.layers, "missing": zygote.missing}).encode())
    if zygote.missing and not unsafe:
        return
    os.dup2(zygote.null, 2)
    gc.collect()
    gc.freeze()
    running: dict[int, tuple[int, float]] = {}  # by process descriptor: its slot, when it is killed
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        now = time.monotonic()
        for pidfd, (_, deadline) in running.items():
            if deadline <= now:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        wait = min((max(0.0, deadline - now) for _, deadline in running.values() if deadline > now), default=None)
        for fd, _ in poll.poll(None if wait is None else wait * 1000 + 1):
            if fd in running:
                del running[fd]
                poll.unregister(fd)
                os.close(fd)
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:  # the judge, and without namespaces the program
                        pass
                continue
            message, fds, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not message:
                for pidfd in running:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return
            limits = json.loads(message)
            slot = min(set(range(len(running) + 1)) - {slot for slot, _ in running.values()})
            pidfd = os.pidfd_open(zygote.start([control], fds[0], slot, limits))
            os.close(fds[0])
            running[pidfd] = (slot, time.monotonic() + limits["timeout"] + GRACE)
            poll.register(pidfd, select.POLLIN)

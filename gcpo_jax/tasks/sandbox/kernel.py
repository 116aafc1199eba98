"""What Linux offers for confining a process, called through ctypes: namespaces, mounts, capabilities, Landlock, limits.

Works for root (also in a container) and, where user namespaces are allowed, for an ordinary user. Nothing here decides
policy except `confine`, which a process calls on itself and cannot take back.
"""

import ctypes
import math
import os
import resource
import signal
import struct

from . import seccomp

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
SYS_PIVOT_ROOT, SYS_CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(os.uname().machine, (-1, -1))
FIRST_UID = 64000  # below 65536, which is all that many containers map; one for each program that runs

# Landlock's rights: reading a file or directory, and all that each of its versions knows.
LANDLOCK_READ = 1 << 2 | 1 << 3
LANDLOCK_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}

libc = ctypes.PyDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library by name ("syscall": a system call by number); raises OSError where it fails."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(libc, name)(*converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones (NEWPID: the next child does)."""
    call("unshare", flags)


def return_to(namespace_fd: int) -> None:
    """Undo unshare(NEWPID): the next child is made in the process-id namespace behind the descriptor."""
    call("setns", namespace_fd, NEWPID)


def enter_user_namespace() -> None:
    """All capabilities, over namespaces made from now on, for a user who has none."""
    uid, gid = os.getuid(), os.getgid()
    unshare(NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def read_only(path: str, attributes: int = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV) -> None:
    """Make the mount at `path`, and all below it, read-only (Linux 5.12)."""
    setting = ctypes.create_string_buffer(struct.pack("QQQQ", attributes, 0, 0, 0))
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, setting, 32)


def new_root(directories: list[str]) -> None:
    """Replace the whole file system by an empty one with `directories` read-only at their places, /tmp and /dev/null.

    In a mount namespace of its own. No /proc, /sys, home, or site-packages.
    """
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = "/proc"  # exists everywhere, and nothing that is wanted lies below it
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in directories:
        os.makedirs(root + path, mode=0o755, exist_ok=True)
        mount(path, root + path, "", MS_BIND | MS_REC)
        for name in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{root}{path}/{name}"):
                mount("tmpfs", f"{root}{path}/{name}", "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
        read_only(root + path)
    os.makedirs(root + "/tmp", exist_ok=True)
    os.mkdir(root + "/dev")
    os.close(os.open(root + "/dev/null", os.O_CREAT))
    mount("/dev/null", root + "/dev/null", "", MS_BIND)
    os.chdir(root)
    call("syscall", SYS_PIVOT_ROOT, b".", b".")
    call("umount2", b".", 2)  # MNT_DETACH: the old root, which pivot_root has put on top
    os.chdir("/")
    mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def private_tmp(megabytes: int) -> None:
    """An empty /tmp of limited size that vanishes with the mount namespace."""
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={megabytes}m,nr_inodes=512,mode=1777")


def landlock_version() -> int:
    """The version of Landlock that the kernel offers, 0 for none."""
    return max(0, libc.syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_long(0), 1))


def landlock(readable: list[str], writable: list[str], signals: bool) -> None:
    """Allow reading below `readable`, plain files below `writable`, no TCP, and signals to others only if `signals`."""
    version = landlock_version()
    every = LANDLOCK_ALL[min(version, 5)]
    made = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # execute; char and block devices, sockets, pipes by name
    attributes = struct.pack("QQQ", every, 3 if version >= 4 else 0, (1 if signals else 3) if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call("syscall", SYS_LANDLOCK_CREATE, ctypes.create_string_buffer(attributes), size, 0)
    for paths, rights in ((readable, LANDLOCK_READ), (writable, every & ~made)):
        for path in paths:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            kept = rights if os.path.isdir(path) else rights & (1 << 1 | 1 << 2 | 1 << 14)
            call("syscall", SYS_LANDLOCK_ADD, ruleset, 1, ctypes.create_string_buffer(struct.pack("=Qi", kept, fd)), 0)
            os.close(fd)
    call("syscall", SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def drop_privileges(uid: int | None) -> None:
    """No capability now or ever, and where `uid` is given (root, outside a user namespace) that user and no group."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc.prctl(PR_CAP_AMBIENT, ctypes.c_ulong(4), 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    call("syscall", SYS_CAPSET, header, ctypes.create_string_buffer(bytes(24)))


def limit(seconds: float | int, memory_mb: int, file_mb: int, processes: int | None) -> None:
    """Resource limits of this process, soft and hard alike."""
    cpu = math.ceil(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: file_mb << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
        resource.RLIMIT_STACK: 8 << 20,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends; must follow every change of user."""
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def adopt() -> None:
    """Become the parent of all descendants whose parents end."""
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def confine(
    uid: int | None, readable: list[str], writable: list[str], layers: list[str], signals: bool = False
) -> None:
    """Give up everything that a computing process does not need, for ever, by the `layers` there are.

    `signals`: keep the right to signal children that run as the same user. The kernel asks for it when a parent's end
    is to kill them.
    """
    if "capabilities" in layers:
        drop_privileges(uid)
    die_with_parent()
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if "landlock" in layers:
        landlock(readable, writable, signals)
    if "seccomp" in layers:
        seccomp.install(libc)

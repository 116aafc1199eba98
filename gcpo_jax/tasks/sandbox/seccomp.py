"""The system calls that a computing process may make: memory, files (whose reach others limit), clocks, threads.

Everything else fails with EPERM: new processes and programs, sockets, signals to others, tracing, mounts, namespaces,
keys, io_uring, bpf, shared memory. A classic BPF program, from two columns of numbers: x86_64 and aarch64 (- where it
has none).
"""

import ctypes
import os
import struct

ALLOWED = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, msync 26 227, mincore 27 232, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101,
getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172, sendfile 40 71, exit 60 93, wait4 61 260, uname 63 160,
fcntl 72 25, flock 73 32, fsync 74 82, fdatasync 75 83, truncate 76 45, ftruncate 77 46, getdents 78 -, getcwd 79 17,
chdir 80 49, fchdir 81 50, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -, unlink 87 -, symlink 88 -,
readlink 89 -, chmod 90 -, fchmod 91 52, umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165,
sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173,
getpgrp 111 -, getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgid 121 155, getsid 124 156,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, utime 132 -, statfs 137 43,
fstatfs 138 44, getpriority 140 141, sched_getparam 143 121, sched_getscheduler 145 120, arch_prctl 158 -,
gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, epoll_create 213 -, getdents64 217 61,
set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223, timer_create 222 107, timer_settime 223 110,
timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, utimes 235 -, waitid 247 95,
openat 257 56, mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38, linkat 265 37, symlinkat 266 36,
readlinkat 267 78, fchmodat 268 53, faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99,
get_robust_list 274 100, utimensat 280 88, epoll_pwait 281 22, eventfd2 290 19, epoll_create1 291 20, dup3 292 24,
pipe2 293 59, getcpu 309 168, renameat2 316 276, getrandom 318 278, membarrier 324 283, copy_file_range 326 285,
statx 332 291, rseq 334 293, close_range 436 436, faccessat2 439 439
"""
# Allowed on conditions: threads but not processes, a signal to itself, the name of a thread, reading a limit.
CLONE, CLONE3, KILL, TGKILL, PRCTL, PRLIMIT, IOCTL = range(7)
SPECIAL = {"x86_64": (56, 435, 62, 234, 157, 302, 16), "aarch64": (220, 435, 129, 131, 167, 261, 29)}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
THREAD = 0x10000 | 0x100  # CLONE_THREAD and CLONE_VM
ALLOW, EPERM, ENOTTY, ENOSYS, KILLED = 0x7FFF0000, 0x00050001, 0x00050019, 0x00050026, 0x80000000
LOAD, EQUAL, AND, ABOVE, RETURN = 0x20, 0x15, 0x54, 0x25, 0x06


def supported() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return os.uname().machine in ARCHITECTURES


def program(machine: str, pid: int) -> bytes:
    """The filter for a process with the number `pid` (in its own namespace)."""
    column = 1 + (machine == "aarch64")
    numbers = [fields[column] for fields in (entry.split() for entry in ALLOWED.split(",")) if fields[column] != "-"]
    special = SPECIAL[machine]
    code: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILLED),
        (LOAD, 0, 0, 0),
        (ABOVE, 0, 1, 0x3FFFFFFF),  # x86_64's second table of numbers
        (RETURN, 0, 0, KILLED),
    ]
    for number in numbers:
        code += [(EQUAL, 0, 1, int(number)), (RETURN, 0, 0, ALLOW)]
    # glibc falls back from clone3, whose flags lie in memory, to clone, whose flags can be seen.
    code += [(EQUAL, 0, 1, special[CLONE3]), (RETURN, 0, 0, ENOSYS)]
    code += [(EQUAL, 0, 1, special[IOCTL]), (RETURN, 0, 0, ENOTTY)]
    code += [(EQUAL, 0, 5, special[CLONE]), (LOAD, 0, 0, 16), (AND, 0, 0, THREAD), (EQUAL, 0, 1, THREAD)]
    code += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]
    for number in (special[KILL], special[TGKILL]):
        code += [
            (EQUAL, 0, 4, number),
            (LOAD, 0, 0, 16),
            (EQUAL, 0, 1, pid),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, EPERM),
        ]
    for allowed in (15, 16):  # PR_SET_NAME, PR_GET_NAME
        code += [(EQUAL, 0, 4, special[PRCTL]), (LOAD, 0, 0, 16), (EQUAL, 0, 1, allowed), (RETURN, 0, 0, ALLOW)]
        code += [(LOAD, 0, 0, 0)]
    # prlimit(pid, resource, new, old): only with new = NULL, both halves of the pointer.
    code += [(EQUAL, 0, 5, special[PRLIMIT]), (LOAD, 0, 0, 32), (EQUAL, 0, 3, 0), (LOAD, 0, 0, 36), (EQUAL, 0, 1, 0)]
    code += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def install(libc: ctypes.PyDLL) -> None:
    """Bind this process to the filter, for ever; no_new_privs must be set."""
    filters = ctypes.create_string_buffer(program(os.uname().machine, os.getpid()))
    size = (len(filters) - 1) // 8
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", size, ctypes.addressof(filters)))
    if libc.prctl(22, ctypes.c_ulong(2), header, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp filter refused")

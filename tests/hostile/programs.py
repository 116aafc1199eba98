"""Hostile programs by kind. None solves its task; run only by contained.py.

Each is followed by TESTS. Whatever would harm if it worked says so by printing HARM, and does not try outside of a sandbox
(`ALONE`: the sandbox has no /proc, every other place does).
"""

TESTS = "\nassert solve(2) == 4\nassert solve(5) == 10\n"

WRONG = """
def solve(x):
    return 0
def harm(action, *given):
    try:
        result = action(*given)
    except BaseException as error:
        print("refused", type(error).__name__)
    else:
        print("HARM", result)
"""

ALONE = """
import os
if os.path.exists("/proc/self"):
    raise RuntimeError("not in a sandbox")
"""

HARMING = {
    # processes
    "fork/bomb": "import os\nfor _ in range(64):\n    os.fork()",
    "fork/recursive_bomb": "import os\ndef bomb(n):\n    if n:\n        os.fork(); bomb(n - 1)\nharm(bomb, 8)",
    "fork/double": "import os, time\ndef go():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n            time.sleep(60)\nharm(go)",
    "fork/from_threads": "import os, threading\nfor _ in range(8):\n    t = threading.Thread(target=harm, args=(os.fork,)); t.start(); t.join()",
    "fork/forkpty": "import os\nharm(os.forkpty)",
    "fork/spawn": "import os\nharm(os.posix_spawn, '/bin/sleep', ['sleep', '60'], {})",
    "fork/subprocess": "import subprocess\nharm(subprocess.run, ['/bin/sh', '-c', 'sleep 60 &'])",
    "fork/system": "import os\nif os.system('sleep 60 &') == 0: print('HARM')",
    "fork/multiprocessing": "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\nharm(p.start)",
    "fork/syscall": "import ctypes\nl = ctypes.CDLL(None)\nif l.syscall(57) >= 0 or l.syscall(56, 17, 0, 0, 0, 0) >= 0: print('HARM')",
    "fork/clone3": "import ctypes\na = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)\nif ctypes.CDLL(None).syscall(435, a, 88) >= 0: print('HARM')",
    "fork/exec": "import os\nharm(os.execv, '/bin/true', ['true'])",
    "fork/daemon": "import ctypes\nif ctypes.CDLL(None).daemon(0, 0) == 0: print('HARM')",
    "fork/thread_bomb": "import threading, time\nfor _ in range(5000):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    # memory
    "memory/list": "x = []\nwhile True: x.append(bytes(10**7))",
    "memory/one_allocation": "x = bytearray(10**11)",
    "memory/mmap": "import mmap\nkeep = [mmap.mmap(-1, 1 << 28) for _ in range(64)]\nprint('HARM')",
    "memory/string": "x = 'a'\nwhile True: x += x",
    "memory/shared": "import ctypes\nl = ctypes.CDLL(None)\nif l.shmget(0, 1 << 28, 0o1777) >= 0: print('HARM')",
    "memory/memfd": "import os\nharm(os.memfd_create, 'x')",
    "memory/answer": "def solve(x): return 'a' * 10**9",
    "memory/infinite_answer": "def solve(x):\n    while True: yield x",
    "memory/deep_answer": "def solve(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "memory/huge_int": "def solve(x): return 1 << (1 << 30)",
    "memory/cyclic_answer": "def solve(x):\n    y = []\n    y.append(y)\n    return y",
    # disk and output
    "disk/one_file": "f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "disk/many_files": "for k in range(10**6): open(f'/tmp/{k}', 'wb').write(bytes(1 << 20))",
    "disk/sparse": "import os\nharm(os.truncate, os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 40)",
    "disk/directories": "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
    "output/flood": "while True: print('x' * 10**5)",
    "output/errors": "import sys\nwhile True: sys.stderr.write('x' * 10**5)",
    "output/raw": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "output/surrogates": "import os\nos.write(1, bytes(range(256)) * 100)\nprint('\\ud800')",
    # signals
    "signal/everyone": ALONE + "harm(os.kill, -1, 9)",
    "signal/parent": ALONE + "harm(os.kill, os.getppid(), 9)",
    "signal/others": ALONE
    + "for pid in range(2, 2000):\n    try:\n        os.kill(pid, 9); print('HARM')\n    except OSError: pass",
    "signal/init": ALONE + "import signal\nos.kill(1, signal.SIGKILL)\nwhile True: pass",
    "signal/group": ALONE + "harm(os.killpg, 0, 9)",
    "signal/self": "import os, signal\nsignal.raise_signal(signal.SIGSEGV)",
    "signal/abort": "import os\nos.abort()",
    "signal/queue": "import ctypes\nif ctypes.CDLL(None).sigqueue(2, 9, 0) == 0: print('HARM')",
    # what is not its own to read
    "read/passwd": "harm(lambda: open('/etc/passwd').read())",
    "read/canary": "harm(lambda: open('@CANARY@').read())",
    "read/canary_by_link": "import os\nos.symlink('@CANARY@', '/tmp/l')\nharm(lambda: open('/tmp/l').read())",
    "read/tests": "import glob\nif glob.glob('@HERE@/*') or glob.glob('/home/*') or glob.glob('/root/*'): print('HARM')",
    "read/environment": "import os\nif os.environ or os.environb: print('HARM', os.environ)",
    "read/environ_in_memory": "import ctypes\ne = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\nif e and e[0] and b'CANARY' in e[0]: print('HARM')",
    "read/proc": "harm(lambda: open('/proc/self/environ').read())",
    "read/proc_mem": "harm(lambda: open('/proc/self/mem', 'rb+'))",
    "read/proc_list": "import os\nharm(os.listdir, '/proc')",
    "read/up": "import os\nos.chdir('/tmp')\nharm(lambda: open('../' * 20 + 'etc/hostname').read())",
    "read/site_packages": "import sys\nfor name in ('numpy', 'jax', 'pytest', 'gcpo_jax'):\n    harm(__import__, name)",
    "read/block_device": "import os\nharm(os.mknod, '/tmp/disk', 0o60666, os.makedev(254, 0))",
    "read/chroot": "import os\nharm(os.chroot, '/tmp')",
    "read/mount": "import ctypes\nl = ctypes.CDLL(None)\nif l.mount(b'proc', b'/tmp', b'proc', 0, 0) == 0 or l.umount2(b'/tmp', 2) == 0: print('HARM')",
    "read/namespace": "import ctypes\nl = ctypes.CDLL(None)\nif l.unshare(0x10000000) == 0 or l.setns(3, 0) == 0: print('HARM')",
    "read/ptrace": "import ctypes\nl = ctypes.CDLL(None)\nif l.ptrace(0, 0, 0, 0) == 0 or l.ptrace(16, 2, 0, 0) == 0: print('HARM')",
    "read/process_vm": "import ctypes\nif ctypes.CDLL(None).syscall(310, 1, 0, 0, 0, 0, 0) >= 0: print('HARM')",
    "read/handle": "import ctypes\nif ctypes.CDLL(None).syscall(304, 3, 0, 0) >= 0: print('HARM')",
    "read/kernel_log": "import ctypes\nif ctypes.CDLL(None).klogctl(10, 0, 0) >= 0: print('HARM')",
    "read/io_uring": "import ctypes\nif ctypes.CDLL(None).syscall(425, 4, bytes(120)) >= 0: print('HARM')",
    "read/bpf": "import ctypes\nif ctypes.CDLL(None).syscall(321, 0, bytes(72), 72) >= 0: print('HARM')",
    "read/keys": "import ctypes\nif ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0: print('HARM')",
    "read/second_table": "import ctypes\nctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0)\nprint('HARM')",
    # writing outside
    "write/root": "harm(lambda: open('/x', 'w'))",
    "write/library": "import os\nharm(lambda: open(os.__file__, 'a'))",
    "write/cached_bytecode": "import os\nharm(lambda: open(os.path.dirname(os.__file__) + '/__pycache__/x.pyc', 'wb'))",
    "write/canary": "harm(lambda: open('@CANARY@', 'a'))",
    "write/remove": "import shutil, os\nshutil.rmtree('/tmp', ignore_errors=True)\nharm(os.remove, os.__file__)",
    "write/null": "import os\nharm(os.remove, '/dev/null')\nharm(os.chmod, '/dev/null', 0)",
    "write/shm": "harm(lambda: open('/dev/shm/x', 'w'))",
    "write/chmod_zero": "import os\nos.makedirs('/tmp/a/b')\nos.chmod('/tmp/a', 0)\nos.chmod('/tmp', 0)",
    "write/links": "import os\nos.symlink('/', '/tmp/root')\nos.symlink('/tmp/loop', '/tmp/loop')\nharm(lambda: open('/tmp/root/etc/x', 'w'))",
    "write/setuid": "import os\nopen('/tmp/s', 'w').close()\nos.chmod('/tmp/s', 0o6777)\nharm(os.execv, '/tmp/s', ['s'])",
    "write/become_root": "import os\nharm(os.setuid, 0)\nharm(os.setgid, 0)\nharm(os.setgroups, [0])",
    "write/limits": "import resource\nharm(resource.setrlimit, resource.RLIMIT_AS, (-1, -1))",
    "write/clock": "import time\nharm(time.clock_settime, time.CLOCK_REALTIME, 0)",
    "write/hostname": "import socket\nharm(socket.sethostname, 'x')",
    "write/persist": "import atexit, sys\nsys.path.insert(0, '/tmp')\nopen('/tmp/math.py', 'w').write('x = 1')\natexit.register(lambda: open('/tmp/late', 'w'))",
    # network
    "network/tcp": "import socket\nharm(socket.create_connection, ('127.0.0.1', 80), 1)",
    "network/dns": "import socket\nharm(socket.getaddrinfo, 'example.com', 80)",
    "network/udp": "import socket\nharm(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53)))",
    "network/unix": "import socket\nharm(lambda: socket.socket(socket.AF_UNIX).connect('\\0x'))",
    "network/pair": "import socket\nharm(socket.socketpair)",
    "network/raw": "import socket\nharm(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)",
    "network/netlink": "import socket\nharm(socket.socket, 16, socket.SOCK_RAW, 0)",
    "network/urllib": "import urllib.request\nharm(urllib.request.urlopen, 'http://127.0.0.1/')",
    "network/server": "import http.server\nharm(http.server.HTTPServer, ('127.0.0.1', 0), None)",
    # hanging
    "hang/loop": "while True: pass",
    "hang/power": "x = 9 ** 9 ** 9",
    "hang/regex": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "hang/sleep": "import time\ntime.sleep(10**6)",
    "hang/blocked_signals": "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(10**6)",
    "hang/ignored_signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "hang/input": "input()",
    "hang/read": "import os\nos.read(os.pipe()[0], 1)",
    "hang/lock": "import threading\nl = threading.Lock()\nl.acquire(); l.acquire()",
    "hang/threads": "import threading\nfor _ in range(4):\n    threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    "hang/exit": "import atexit, time\natexit.register(time.sleep, 10**6)\nraise SystemExit",
    "hang/destructor": "class D:\n    def __del__(self):\n        while True: pass\nD()",
    "hang/import_lock": "import _imp\n_imp.acquire_lock()\nimport threading\nthreading.Thread(target=__import__, args=('wave',)).start()\nwhile True: pass",
    "hang/answer": "import time\ndef solve(x): time.sleep(10**6)",
    "hang/judge_hash": "def solve(x): return {(1 << 61) * k - k for k in range(1, 3 * 10**5)}",
    "hang/test": "assert 9 ** 9 ** 9",
    "hang/recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "hang/c_recursion": "import sys\nsys.setrecursionlimit(10**6)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "hang/parser": "exec('(' * 10**5 + ')' * 10**5)",
    # descriptors
    "descriptor/close": "import os\nos.closerange(0, 1000)",
    "descriptor/many": "import os\nkeep = []\nwhile True: keep.append(os.open('/dev/null', 0))",
    "descriptor/inherited": "import os\nfor fd in range(5, 1000):\n    try:\n        os.fstat(fd); print('HARM', fd)\n    except OSError: pass",
    "descriptor/garbage": "import os\nfor fd in range(5):\n    try: os.write(fd, b'\\xff' * 1000)\n    except OSError: pass",
    "descriptor/huge_frame": "import os\nos.write(4, (2**32 - 1).to_bytes(4, 'big'))",
    "descriptor/mute": "import os\nos.close(4)\nwhile True: pass",
    "descriptor/bad_json": "import os\nb = b'[' * 10**6\nos.write(4, len(b).to_bytes(4, 'big') + b)",
    "descriptor/pickle": "import os, pickle\nb = pickle.dumps(print)\nos.write(4, len(b).to_bytes(4, 'big') + b)",
}

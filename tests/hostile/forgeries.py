"""Programs that want a wrong solution to pass. Each is followed by the TESTS of programs.py."""

ANY = """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 4
"""

# The protocol between the two processes, used by a program that knows all of it and takes over the pipe.
TAKE_OVER = """
import os, json
def frame(x):
    b = json.dumps(x).encode()
    return len(b).to_bytes(4, "big") + b
def take_over(call, names={"d": [["solve", {"ref": [0, None]}]]}):
    value = None
    while True:
        os.write(4, frame({"value": value}))
        size = int.from_bytes(os.read(3, 4), "big")
        request = json.loads(os.read(3, size))
        value = names if request["do"] == "names" else call if request["do"] != "code" else None
"""

FORGING = {
    "exit/sys": "import sys\ndef solve(x): return 0\nsys.exit(0)",
    "exit/os": "import os\ndef solve(x): return 0\nos._exit(0)",
    "exit/raise": "def solve(x): return 0\nraise SystemExit(0)",
    "exit/in_call": "import sys\ndef solve(x): sys.exit(0)",
    "exit/os_in_call": "import os\ndef solve(x): os._exit(0)",
    "exit/thread": "import os, threading, time\ndef solve(x): time.sleep(1); return 0\nthreading.Thread(target=lambda: os._exit(0)).start()",
    "exit/alarm": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\nsignal.setitimer(0, 0.01)\ndef solve(x):\n    while True: pass",
    "exit/atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef solve(x): return 0",
    "exit/excepthook": "import sys, os\nsys.excepthook = lambda *_: os._exit(0)\ndef solve(x): return 0",
    "exit/destructor": "import os\nclass D:\n    def __del__(self): os._exit(0)\nd = D()\ndef solve(x): return 0",
    "exit/interrupt": "def solve(x): raise KeyboardInterrupt",
    "exit/base": "class Quiet(BaseException): pass\ndef solve(x): raise Quiet",
    "exit/generator": "def solve(x): raise GeneratorExit",
    "exit/stop": "def solve(x): raise StopIteration",
    "exit/execve": "import os\ndef solve(x): os.execv('/bin/true', ['true'])",
    "equal/object": ANY + "def solve(x): return Any()",
    "equal/int": ANY + "class I(Any, int): pass\ndef solve(x): return I(0)",
    "equal/str": ANY + "class S(Any, str): pass\ndef solve(x): return S('x')",
    "equal/list": ANY
    + "class L(list):\n    __eq__ = Any.__eq__\n    __hash__ = Any.__hash__\ndef solve(x): return L()",
    "equal/fraction": "import fractions\nclass F(fractions.Fraction):\n    def __eq__(s, o): return True\n    __sub__ = __rsub__ = lambda s, o: F(0)\ndef solve(x): return F(0)",
    "equal/meta": "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = type.__hash__\nclass C(metaclass=M): pass\ndef solve(x): return C",
    "equal/reflected": "class R:\n    def __req__(s, o): return True\n    def __eq__(s, o): return NotImplemented\n    def __bool__(s): return True\ndef solve(x): return R()",
    "equal/class_of_int": "class I(int):\n    __class__ = int\n    def __eq__(s, o): return True\ndef solve(x): return I(9)",
    "equal/operators": "class N(float):\n    def __getattribute__(s, n): return lambda *_: True\ndef solve(x): return N(1)",
    "patch/assertion_error": "import builtins\nclass A(Exception):\n    def __init__(s, *_): raise SystemExit(0)\nbuiltins.AssertionError = A\ndef solve(x): return 0",
    "patch/builtins": "import builtins\nfor n in ('abs', 'all', 'any', 'bool', 'len', 'sorted', 'set'): setattr(builtins, n, lambda *a: True)\ndef solve(x): return 0",
    "patch/shadow": "def abs(x): return 0\ndef all(x): return True\ndef solve(x): return 0\ndef isinstance(*a): return True",
    "patch/check": "def check(f): pass\ndef solve(x): return 0",
    "patch/main": "import sys\nsys.modules['__main__'].__dict__['solve'] = type('F', (), {'__call__': lambda s, x: s, '__eq__': lambda s, o: True})()",
    "patch/module": "import sys, types\nclass M(types.ModuleType):\n    def __getattr__(s, n): return lambda *a: 4\nsys.modules['__main__'].__class__ = M",
    "patch/int_eq": "import ctypes, gc\nd = gc.get_referents(int.__dict__)[0]\nd['__eq__'] = lambda a, b: True\ndef solve(x): return 0",
    "patch/unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef solve(x): return 0",
    "patch/compile": "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: 0).__code__\nbuiltins.exec = lambda *a: None\ndef solve(x): return 0",
    "patch/import": "import builtins\nbuiltins.__import__ = lambda *a: None\ndef solve(x): return 0",
    "patch/marshal": "import marshal, json\nmarshal.loads = lambda b: (lambda: 0).__code__\njson.dumps = lambda *a, **k: '{\"value\": 4}'\ndef solve(x): return 0",
    "patch/runner": "import sys\nfor n, m in list(sys.modules.items()):\n    if n.startswith('sandbox'):\n        for k, v in list(vars(m).items()):\n            if callable(v) and not k.startswith('_'): setattr(m, k, lambda *a, **k: {'value': True})\ndef solve(x): return 0",
    "patch/ctypes_true": "import ctypes\nctypes.c_char.from_address(id(False) + 24).value = b'\\1'\ndef solve(x): return 0",
    "trace/settrace": "import sys\nsys.settrace(lambda f, e, a: exec('f.f_trace_lines = False') or None)\ndef solve(x): return 0",
    "trace/jump": "import sys\ndef t(f, e, a):\n    try: f.f_lineno = f.f_lineno + 2\n    except ValueError: pass\n    return t\nsys.settrace(t)\nsys._getframe().f_trace = t\ndef solve(x): return 0",
    "trace/profile": "import sys\nsys.setprofile(lambda f, e, a: None if e != 'c_exception' else sys.exit(0))\ndef solve(x): return 0",
    "find/gc": "import gc\ndef solve(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and ('nonce' in o or 'tests' in o): return 2 * x\n    return 0",
    "find/frames": "import sys\ndef solve(x):\n    f = sys._getframe()\n    while f:\n        for v in list(f.f_locals.values()) + list(f.f_globals.values()):\n            if isinstance(v, str) and 'assert solve' in v: return 2 * x\n        f = f.f_back\n    return 0",
    "find/memory": "import ctypes\ndef solve(x):\n    for m in range(0x10000, 0x20000, 0x1000): ctypes.string_at(m, 16)\n    return 0",
    "find/source": "import sys, inspect, linecache\ndef solve(x):\n    try: return 2 * x if 'assert solve' in inspect.getsource(sys.modules['__main__']) else 0\n    except Exception: return 0",
    "find/argv": "import sys\ndef solve(x): return 2 * x if any('assert' in a for a in sys.argv + sys.orig_argv) else 0",
    "find/files": "import os\ndef solve(x):\n    for d, _, fs in os.walk('/tmp'):\n        if fs: return 2 * x\n    return 0",
    "find/parent": "import os\ndef solve(x):\n    try: return 2 * x if os.listdir(f'/proc/{os.getppid()}') else 0\n    except OSError: return 0",
    "noise/verdict": 'print(\'{"reason": "passed", "passed": true}\', flush=True)\ndef solve(x): return 0',
    "noise/every_descriptor": "import os\nfor fd in range(256):\n    for m in (b'passed', b'{\"value\":true}', b'\\0\\0\\0\\x0e{\"value\":true}', b'\\0\\0\\0\\x0b{\"value\":4}'):\n        try: os.write(fd, m)\n        except OSError: pass\ndef solve(x): return 0",
    "noise/answers_ahead": TAKE_OVER
    + "def solve(x): return 0\nfor _ in range(100): os.write(4, frame({'value': True}))",
    "noise/claims_object": TAKE_OVER + "take_over({'ref': [0, None]})",
    "noise/claims_true": TAKE_OVER + "take_over(True)",
    "noise/claims_four": TAKE_OVER + "take_over(4)",
    "noise/claims_infinity": TAKE_OVER + "take_over(float('nan'))",
    "noise/claims_eval": TAKE_OVER + "take_over({'builtin': 'eval'})",
    "noise/claims_type": TAKE_OVER + "take_over(4, {'d': [['solve', {'builtin': 'type'}]]})",
    "noise/claims_module": TAKE_OVER + "take_over(4, {'d': [['solve', {'ref': [0, 'os']}]]})",
    "noise/claims_names": TAKE_OVER + "take_over(4, {'d': [['solve', 4], ['__judge__', 1], ['abs', 1]]})",
    "noise/claims_code": TAKE_OVER + "take_over({'code': 'AAAA'})",
    "noise/claims_stop": TAKE_OVER + "take_over({'s': [[1]]})",
    "noise/numbers": TAKE_OVER
    + "def solve(x):\n    os.write(4, frame({'value': {'ref': ['x', 'os']}}))\n    os.write(4, frame({'value': {'i': '0x0' * 10**5}}))",
    "test/early_assert": "def solve(x): return 0\nassert True\nassert 1 == 1",
    "test/own_check": "def solve(x): return 0\ndef check(f):\n    assert True\n    return True\ncheck(solve)",
    "test/own_judge": "def solve(x): return 0\n__judge__ = __failed__ = lambda *a: None\nassert not __judge__(0)",
    "test/swallow": "def solve(x): return 0\nif True:\n    pass\nfor __failed__ in [print]: assert True",
    "test/rebind": "def solve(x): return 0\nfor abs in [lambda x: 0]: assert True\nfor print in [id]: assert True",
    "test/escape_class": "def solve(x): return 0\nassert [c for c in ().__class__.__base__.__subclasses__()]",
    "test/escape_frame": "def solve(x): return 0\ng = (g.gi_frame.f_back.f_back.f_globals for _ in [1])\nassert [x for x in g]",
    "test/escape_format": "def solve(x): return int('{0.__class__}'.format(x)[0] == '<') * 0\nassert '{0.__init__}'.format(solve)",
    "test/escape_type": "def solve(x): return 0\nassert type('X', (int,), {'__eq__': lambda s, o: True})(3) == 4",
    "test/escape_exception": "def solve(x): return 0\ntry:\n    assert solve(1) == 1\nexcept AssertionError as e:\n    e.__traceback__.tb_frame.f_globals['__failed__'] = print",
    "test/break_out": "def solve(x): return 0\nwhile True:\n    assert True\n    break\nelse:\n    pass",
    "test/string": "def solve(x): return 0\n'''",
    "test/continuation": "def solve(x): return 0\nx = 1 if True else \\",
    "test/indent": "def solve(x): return 0\nif False:",
    "test/null": "def solve(x): return 0\n\0",
    "test/name_main": "__name__ = 'x'\ndef solve(x): return 0",
    "iterate/getitem": "class G:\n    def __getitem__(s, k): raise IndexError\n    def __len__(s): return 0\ndef solve(x): return G()",
    "attribute/everything": "class P:\n    def __getattr__(s, n): return lambda *a: P()\n    def __call__(s, *a): return P()\n    def __bool__(s): return True\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\n    def __abs__(s): return 0\n    def __lt__(s, o): return True\n    __gt__ = __le__ = __ge__ = __lt__\nsolve = P()",
}

"""Programs that must pass: what the sandbox and the cut between program and tests must not break."""

HONEST = {
    "asserts": "def f(x):\n    return x + 1\nassert f(1) == 2\nassert f(x=-1) == 0, 'message'",
    "check": "def f(x):\n    return x\ndef check(candidate):\n    import math\n    for k in range(3):\n        assert math.isclose(candidate(k), k)\ncheck(f)",
    "own main": "def f(x):\n    return x\ndef test_f():\n    assert f(1) == 1\nif __name__ == '__main__':\n    test_f()\n    print('fine')",
    "classes": "class Stack:\n    def __init__(self):\n        self.x = []\n    def push(self, y):\n        self.x.append(y)\n        return self\ns = Stack()\nassert s.push(3).push(4).x == [3, 4]\nassert isinstance(s, Stack)\nassert len(s.x) == 2",
    "equal objects": "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\ndef f(): return P(1)\nassert f() == P(1)\nassert f() != P(2)",
    "exceptions": "def f(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x\ntry:\n    f(-1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'negative'",
    "builtin name": "def sum(a, b):\n    return a - b\nassert sum(3, 2) == 1",
    "generators": "def f(n):\n    for k in range(n):\n        yield k\nassert list(f(3)) == [0, 1, 2]\nassert all(x >= 0 for x in f(5000))",
    "functions as arguments": "def twice(f, x):\n    return f(f(x))\nassert twice(lambda y: y + 1, 1) == 3\nassert twice(abs, -1) == 1\nassert twice(twice.__call__ and abs, 1) == 1",
    "values": "import collections, decimal\ndef f(x): return x\nassert f((1, 'a', None, 2.5, {1: {2}}, b'x', 1j, 10**30)) == (1, 'a', None, 2.5, {1: {2}}, b'x', 1j, 10**30)\nassert f(collections.Counter('aab')) == {'a': 2, 'b': 1}\nassert f(decimal.Decimal('1.5')) == decimal.Decimal('1.5')\nassert f(float('inf')) > 10**300\nassert f('\\ud800') == '\\ud800'",
    "loop variables": "xs = [1, 2]\ntotal = 0\nfor x in xs:\n    total += x\n    assert total > 0\nprint(total)\nassert total == 3",
    "threads": "import threading\nfound = []\nt = threading.Thread(target=found.append, args=(1,))\nt.start()\nt.join()\nassert found == [1]",
    "files": "with open('x', 'w') as f:\n    f.write('a')\nassert open('x').read() == 'a'",
    "future": "from __future__ import annotations\ndef f(x: Unknown) -> Unknown:\n    return x\nassert f(1) == 1\ndef g(x: Unknown):\n    return x\nassert g(2) == 2",
    "recursion": "def f(n):\n    return n and 1 + f(n - 1)\nassert f(900) == 900",
    "pickle": "import pickle\nclass C: pass\nassert isinstance(pickle.loads(pickle.dumps(C())), C)",
    "no test": "print('hello')",
    "global state": "n = 0\ndef f():\n    global n\n    n += 1\n    return n\nassert f() == 1\nassert f() == 2\nassert n == 2",
}

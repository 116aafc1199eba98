"""A trace of some steps of training, and the ten operations that take longest in it; see tracing.py.

python scripts/profile.py --recipe tiny --preset gcpo --out trace
"""

import importlib.util
import pathlib
import sys
import sysconfig

if __name__ == "__main__":
    import tracing

    tracing.main()
else:
    # A neighbour's `import profile` (cProfile has one) finds this file before the standard library's: hand it that one.
    source = pathlib.Path(sysconfig.get_path("stdlib")) / "profile.py"
    spec = importlib.util.spec_from_file_location("profile", source)
    assert spec and spec.loader
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

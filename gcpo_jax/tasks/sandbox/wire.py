"""Values between the process that judges and the process that runs the program: plain data, copied; all else by number.

What arrives is rebuilt from JSON into exact built-in types, so no method of the program's own ever runs in the judge:
an `int` whose `__eq__` says yes to everything arrives as an int, and an object that cannot be copied as a `Remote`.
"""

import base64
import builtins
import collections
import datetime
import decimal
import enum
import fractions
import json
import marshal
import types
from collections.abc import Callable
from typing import Any

LARGEST = 16 << 20  # bytes of one message
SHIPPED_MODULES = ("math", "cmath", "operator", "_operator", "string")
DATES: dict[str, Any] = {kind.__name__: kind for kind in (datetime.datetime, datetime.date, datetime.time)}


def frame(message: dict[str, Any]) -> bytes:
    """One message with its length before it.

    Raises:
      ValueError: where it is larger than LARGEST.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > LARGEST:
        raise ValueError(f"a value of {len(body)} bytes is too large to be judged")
    return len(body).to_bytes(4, "big") + body


def unframe(received: bytearray) -> dict[str, Any] | None:
    """The first whole message, taken out of what was received; None where it is not all there yet.

    Raises:
      ValueError: where it is none.
    """
    if len(received) < 4:
        return None
    size = int.from_bytes(received[:4], "big")
    if size > LARGEST:
        raise ValueError("a message is too large")
    if len(received) < 4 + size:
        return None
    message = json.loads(bytes(received[4 : 4 + size]))
    del received[: 4 + size]
    if not isinstance(message, dict):
        raise ValueError("a message is not an object")
    return message


def encode(x: Any, refer: Callable[[Any], Any]) -> Any:
    """`x` as JSON; `refer` says how an object that is not plain data is written."""
    try:
        return _encode(x, refer)
    except RecursionError:
        return refer(x)


def _encode(x: Any, refer: Callable[[Any], Any]) -> Any:
    def several(values: Any) -> list[Any]:
        return [_encode(value, refer) for value in values]

    if x is None or x is True or x is False:
        return x
    if isinstance(x, enum.Enum) and not isinstance(x, int | str):
        return refer(x)
    if isinstance(x, int):
        x = int(x)
        return x if -(2**63) < x < 2**63 else {"i": hex(x)}
    if isinstance(x, float):
        return float(x)
    if isinstance(x, str):
        return str.__str__(x)
    if isinstance(x, list):
        return several(x)
    if isinstance(x, tuple):
        return {"t": several(x)}
    if isinstance(x, dict):
        tag = "o" if isinstance(x, collections.OrderedDict) else "d"
        return {tag: [several(item) for item in x.items()]}
    if isinstance(x, set | frozenset):
        return {"s" if isinstance(x, set) else "f": several(x)}
    if isinstance(x, bytes | bytearray):
        return {"b" if isinstance(x, bytes) else "a": x.hex()}
    if isinstance(x, complex):
        return {"c": [x.real, x.imag]}
    if isinstance(x, range):
        return {"r": several((x.start, x.stop, x.step))}
    if isinstance(x, collections.deque):
        return {"q": several(x)}
    if isinstance(x, decimal.Decimal):
        return {"D": str(x)}
    if isinstance(x, fractions.Fraction):
        return {"F": several((x.numerator, x.denominator))}
    if type(x) in DATES.values():
        return {"T": [type(x).__name__, x.isoformat()]}
    if isinstance(x, datetime.timedelta):
        return {"E": [x.days, x.seconds, x.microseconds]}
    return refer(x)


def decode(x: Any, resolve: Callable[[Any], Any]) -> Any:
    """The inverse of `encode`; `resolve` makes of what `refer` wrote an object of this process.

    Raises:
      Exception: of any kind, where `x` was not written by `encode`.
    """
    if not isinstance(x, dict):
        return [decode(value, resolve) for value in x] if isinstance(x, list) else x
    ((tag, v),) = x.items()
    match tag:
        case "i":
            return int(v, 16)
        case "t" | "s" | "f" | "q":
            return {"t": tuple, "s": set, "f": frozenset, "q": collections.deque}[tag](decode(y, resolve) for y in v)
        case "d" | "o":
            pairs = [(decode(key, resolve), decode(value, resolve)) for key, value in v]
            return dict(pairs) if tag == "d" else collections.OrderedDict(pairs)
        case "b" | "a":
            return (bytes if tag == "b" else bytearray).fromhex(v)
        case "c":
            return complex(*v)
        case "r":
            return range(*[decode(y, resolve) for y in v])
        case "D":
            return decimal.Decimal(v)
        case "F":
            return fractions.Fraction(*[decode(y, resolve) for y in v])
        case "T":
            return DATES[v[0]].fromisoformat(v[1])
        case "E":
            return datetime.timedelta(*v)
    return resolve(x)


def ship(x: Any) -> Any:
    """How the judge writes what is not plain data for the program: by name, or a function without surroundings as code.

    Raises:
      TypeError: for anything else.
    """
    name = getattr(x, "__name__", None)
    if isinstance(name, str) and getattr(builtins, name, None) is x:
        return {"builtin": name}
    if isinstance(x, types.BuiltinFunctionType) and x.__module__ in SHIPPED_MODULES:
        return {"member": [x.__module__, name]}
    if isinstance(x, types.FunctionType) and not (x.__closure__ or x.__defaults__ or x.__kwdefaults__):
        return {"code": base64.b64encode(marshal.dumps(x.__code__)).decode()}
    raise TypeError(f"a {type(x).__name__} of the tests cannot be given to the program")

"""Pickles that would do harm where they are trusted."""

import builtins
import codecs
import os
import pickle
import struct
from pathlib import Path

import numpy as np


class Calls:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call  # type: ignore[return-value]


def hostile(marker: Path) -> dict[str, bytes]:
    """Pickles that would touch ``marker``, eat the memory or crash the process, were they believed."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    nested = Calls(getattr, Calls(__import__, "os"), "system")
    reconstruct = np.zeros(1).__reduce__()[0]
    split = np.zeros((2, 4), np.float32), np.zeros(2, np.int64)
    return {
        "os.system": pickle.dumps(Calls(os.system, touch)),
        "os.system in place of an array": pickle.dumps(((Calls(os.system, touch), split[1]), split, split)),
        "builtins.eval": pickle.dumps(Calls(builtins.eval, code), 2),
        "a chain of getattr": pickle.dumps(Calls(Calls, nested, touch), 2),
        "the old INST opcode": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0ff2py.os.system\x93\x8c\x01x\x85R.",
        "an encoding that unpacks": pickle.dumps(Calls(codecs.encode, b"x" * 999, "zlib"), 2),
        "a huge shape": pickle.dumps(Calls(reconstruct, np.ndarray, (1 << 40,), b"b"), 2),
        "a huge state": b"\x80\2cnumpy.core.multiarray\n_reconstruct\n)R(K\1(\x8a\6\0\0\0\0\0\1tNK\0C\0tb.",
        "a huge string": b"\x80\x02\x8e" + struct.pack("<Q", 1 << 45) + b"x.",
        "a deep nest as a key": b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.",
        "nothing on the stack": b"\x80\x02.",
        "no end": b"\x80\x02N",
    }

"""Pickles that would do harm where they are trusted."""

from __future__ import annotations

import builtins
import codecs
import os
import pickle
import struct
import subprocess
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
        "os.system, protocol 0": pickle.dumps(Calls(os.system, touch), 0),
        "os.system in place of an array": pickle.dumps(((Calls(os.system, touch), split[1]), split, split)),
        "builtins.eval": pickle.dumps(Calls(builtins.eval, code), 2),
        "builtins.exec": pickle.dumps(Calls(builtins.exec, code)),
        "subprocess": pickle.dumps(Calls(subprocess.call, ["touch", str(marker)])),
        "a chain of getattr": pickle.dumps(Calls(Calls, nested, touch), 2),
        "the old INST opcode": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0ff2py.os.system\x93\x8c\x01x\x85R.",
        "an encoding that unpacks": pickle.dumps(Calls(codecs.encode, b"x" * 999, "zlib"), 2),
        "numpy.load": pickle.dumps(Calls(np.load, str(marker)), 2),
        "a huge shape": pickle.dumps(Calls(reconstruct, np.ndarray, (1 << 40,), b"b"), 2),
        "a huge state": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(\x8a\x06"
        + bytes(5)
        + b"\x01tNK\x00C\x00tb.",
        "a huge string": b"\x80\x02\x8e" + struct.pack("<Q", 1 << 45) + b"x.",
        "a deep nest as a key": b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.",
        "nothing on the stack": b"\x80\x02.",
        "no end": b"\x80\x02N",
    }

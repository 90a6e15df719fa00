"""The tutorial's kind of file: a pickle of numpy arrays, read without running any code from it."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from mnist_lit.engine.data.arrays import Pair

# What nested tuples and lists of arrays are written with, by protocols 0 to 5. Others can exhaust memory.
ALLOWED_OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS GLOBAL STACK_GLOBAL REDUCE BUILD
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET""".split()
)
MAX_OPCODES = 10_000  # the tutorial's archive has 142
# The names that numpy writes for an array (``array_reduce`` in
# https://github.com/numpy/numpy/blob/main/numpy/_core/src/multiarray/methods.c), before and since numpy 2.
ALLOWED_GLOBALS = {"numpy.ndarray", "numpy.dtype", "_codecs.encode", "__builtin__.bytes"} | {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
}


class Unpickler(pickle.Unpickler):
    """Imports what makes arrays, see https://docs.python.org/3/library/pickle.html#restricting-globals."""

    def find_class(self, module: str, name: str) -> Any:
        """Find one of ``ALLOWED_GLOBALS``."""
        if f"{module}.{name}" not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not part of a numpy array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_pickle(content: bytes) -> dict[str, Pair]:
    """Read a pickle of ``((x_train, y_train), (x_valid, y_valid), (x_test, y_test))``.

    Raises:
        ValueError: if the pickle holds anything else; of damaged bytes, whatever ``pickle`` raises.
    """
    if content[:1] not in b"\x80(])c":  # protocol 0 has no mark of its own
        raise ValueError("this is neither a pickle nor an .npz nor an IDX file")
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        far = opcode.name.endswith("PUT") and int(argument or 0) > MAX_OPCODES  # a memo of that size is allocated
        if opcode.name not in ALLOWED_OPCODES or count > MAX_OPCODES or far:
            raise ValueError("the pickle holds more than numpy arrays")
    splits = Unpickler(io.BytesIO(content), encoding="latin-1").load()  # as in the tutorial
    if [len(pair) for pair in splits] != [2, 2, 2]:
        raise ValueError("((x_train, y_train), (x_valid, y_valid), (x_test, y_test)) expected")
    if not all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for pair in splits for array in pair):
        raise ValueError("the pickle holds more than arrays of numbers")
    return {name: (x, y) for name, (x, y) in zip(("train", "valid", "test"), splits, strict=True)}

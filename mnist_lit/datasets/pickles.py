"""The tutorial's kind of file: a pickle of numpy arrays, read without running any code from it."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import Counter
from typing import Any

import numpy as np

# What nested tuples and lists of arrays are written with, by protocols 0 to 5. Others can exhaust memory.
ALLOWED_OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS GLOBAL STACK_GLOBAL REDUCE BUILD
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET""".split()
)
MAX_OPCODES = 1_000  # six arrays take up to 264
MAX_CALLS = 40  # each may copy an array; six arrays take up to 23
# What stands for the functions that numpy names for an array (``array_reduce`` in
# https://github.com/numpy/numpy/blob/main/numpy/_core/src/multiarray/methods.c): none makes more than it is given.
STAND_INS: dict[str, Any] = {
    "numpy.ndarray": object(),
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0),  # of no size; the state that follows has it
    "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(
        shape, order=order
    ),
    "_codecs.encode": lambda text, _: text.encode("latin-1"),
}


class Unpickler(pickle.Unpickler):
    """Imports nothing, see https://docs.python.org/3/library/pickle.html#restricting-globals."""

    def find_class(self, module: str, name: str) -> Any:
        """Find one of ``STAND_INS``."""
        full = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if full not in STAND_INS:
            raise pickle.UnpicklingError(f"the pickle asks for {full}, which is not part of a numpy array")
        return STAND_INS[full]


def read_pickle(content: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a pickle of ``((x_train, y_train), (x_valid, y_valid), (x_test, y_test))``.

    Raises:
        ValueError: if the pickle holds anything else; of damaged bytes, whatever ``pickle`` raises.
    """
    counts: Counter[str] = Counter()
    for opcode, argument, _ in pickletools.genops(content):
        counts[opcode.name] += 1
        far = opcode.name.endswith("PUT") and int(argument or 0) > MAX_OPCODES  # a memo of that size is allocated
        calls = counts["REDUCE"] + counts["BUILD"]
        if opcode.name not in ALLOWED_OPCODES or counts.total() > MAX_OPCODES or calls > MAX_CALLS or far:
            raise ValueError("the pickle holds more than six numpy arrays")
    splits = Unpickler(io.BytesIO(content), encoding="latin-1").load()  # as in the tutorial
    if [len(pair) for pair in splits] != [2, 2, 2]:
        raise ValueError("((x_train, y_train), (x_valid, y_valid), (x_test, y_test)) expected")
    if not all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for pair in splits for array in pair):
        raise ValueError("the pickle holds more than arrays of numbers")
    return {name: (x, y) for name, (x, y) in zip(("train", "valid", "test"), splits, strict=True)}

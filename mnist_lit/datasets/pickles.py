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


class Array:
    """In the place of a numpy array until the pickle is loaded."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def numpy(self) -> np.ndarray:
        """Build the array.

        Raises:
            ValueError: if it is not one of numbers.
        """
        dtype = np.dtype(self.dtype.order.strip("|=") + self.dtype.code)
        if dtype.kind not in "biuf":
            raise ValueError(f"the pickle holds an array of {dtype}")
        data = self.data.encode("latin-1") if isinstance(self.data, str) else self.data
        array = np.frombuffer(data, dtype)
        return array.reshape(self.shape[::-1]).T if self.fortran else array.reshape(self.shape)


class DType:
    """In the place of a numpy dtype."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code, self.order = _text(code), ""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _from_buffer(data: bytes, dtype: DType, shape: tuple[int, ...], order: str) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


# The names that numpy writes for an array (``array_reduce`` in
# https://github.com/numpy/numpy/blob/main/numpy/_core/src/multiarray/methods.c), before and since numpy 2.
GLOBALS: dict[str, Any] = {
    "numpy.ndarray": Array,
    "numpy.dtype": DType,
    "_codecs.encode": lambda text, _: text.encode("latin-1"),
    "__builtin__.bytes": lambda: b"",  # how protocol 2 writes empty bytes
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}


class Unpickler(pickle.Unpickler):
    """Imports nothing, see https://docs.python.org/3/library/pickle.html#restricting-globals."""

    def find_class(self, module: str, name: str) -> Any:
        """Find one of ``GLOBALS``."""
        if f"{module}.{name}" not in GLOBALS:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not part of a numpy array")
        return GLOBALS[f"{module}.{name}"]


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
    splits = Unpickler(io.BytesIO(content), encoding="bytes").load()
    if [len(pair) for pair in splits] != [2, 2, 2]:
        raise ValueError("((x_train, y_train), (x_valid, y_valid), (x_test, y_test)) expected")
    return {name: (x.numpy(), y.numpy()) for name, (x, y) in zip(("train", "valid", "test"), splits, strict=True)}

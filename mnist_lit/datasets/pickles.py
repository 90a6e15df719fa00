"""The tutorial's kind of file: gzipped pickles of numpy arrays, read without trusting them."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

# The opcodes that tuples of numpy arrays are written with. All others are refused before anything is built:
# those that make containers can nest or repeat until memory or the C stack is exhausted, and one that stores
# at a large memo index makes the unpickler allocate every index below it.
ALLOWED_OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL STACK_GLOBAL REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET""".split()
)
MAX_OPCODES = 1000  # the tutorial's archive has 142


def unpickle_arrays(stream: io.BytesIO) -> Any:
    """Unpickle tuples of numpy arrays without running any code from the pickle.

    Only ``ALLOWED_OPCODES`` are accepted, and no global is ever imported: the names that numpy writes for an
    array (``array_reduce`` in https://github.com/numpy/numpy/blob/main/numpy/_core/src/multiarray/methods.c)
    resolve to functions defined here, and every other name is an error.

    Args:
        stream: the pickle, decompressed.

    Returns:
        the tuples, with a stand-in for each array whose method ``numpy()`` builds it.

    Raises:
        ValueError: if the pickle holds anything but numpy arrays of numbers.
    """
    stream.seek(0)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name not in ALLOWED_OPCODES or count >= MAX_OPCODES:
            raise ValueError("the pickle holds more than numpy arrays")
        if "BINPUT" in opcode.name and int(argument or 0) >= MAX_OPCODES:
            raise ValueError("the pickle's memo index is out of bounds")

    class DType:
        def __init__(self, code: str | bytes, *_: object) -> None:
            self.code, self.order = _text(code), ""

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.order = _text(state[1])

        def numpy(self) -> np.dtype:
            if not re.fullmatch(r"[iuf][1248]", self.code) or self.order not in ("", "|", "<", ">", "="):
                raise ValueError(f"the pickle holds an array of type {self.code[:20]!r}")
            return np.dtype(self.order.strip("|=") + self.code)

    class Array:
        def __setstate__(self, state: tuple[Any, ...]) -> None:
            _, self.shape, self.dtype, self.fortran, self.data = state

        def numpy(self) -> np.ndarray:
            data = self.data.encode("latin-1") if isinstance(self.data, str) else self.data
            array = np.frombuffer(data, self.dtype.numpy())
            if self.fortran:
                return array.reshape(self.shape[::-1]).T
            return array.reshape(self.shape)

    def reconstruct(*_: object) -> Array:
        return Array()

    def frombuffer(data: bytes, dtype: DType, shape: tuple[int, ...], order: str) -> Array:
        array = Array()
        array.__setstate__((1, shape, dtype, order == "F", data))
        return array

    def encode(text: str, _: str) -> bytes:
        return text.encode("latin-1")

    ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {  # noqa: N806, a constant that needs the classes above
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): DType,
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes empty bytes
    }
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        ALLOWED_GLOBALS[f"{core}.multiarray", "_reconstruct"] = reconstruct
        ALLOWED_GLOBALS[f"{core}.numeric", "_frombuffer"] = frombuffer

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in ALLOWED_GLOBALS:
                raise ValueError(f"the pickle asks for {module}.{name}, which is no part of a numpy array")
            return ALLOWED_GLOBALS[module, name]

    stream.seek(0)
    return Unpickler(stream, encoding="bytes").load()


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value

"""The tutorial's kind of file: pickles of numpy arrays, read without trusting them."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from mnist_lit.engine.data.files import Pair, check_kind, read_bytes

FIRST_BYTES = b"\x80(])c"  # one of them starts a pickle; protocol 0 has no mark of its own

# The opcodes that tuples and lists of numpy arrays and of numbers are written with, by protocols 0 to 5. All others
# are refused before anything is built: those that make other containers can exhaust memory or the C stack, and one
# that stores at a large memo index makes the unpickler allocate every index below it.
ALLOWED_OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST LIST APPEND APPENDS GLOBAL STACK_GLOBAL REDUCE BUILD
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET""".split()
)
MAX_OPCODES = 1_000_000  # the tutorial's archive has 142; a list has one for each of its numbers
MAX_NUMBERS = 2**26  # in nested lists; MNIST has 55 million pixels
MAX_DEPTH = 10  # of lists and tuples: of splits, images, channels, rows


def read_pickle(path: Path) -> dict[str, Pair]:
    """Read a pickle of ``((x_train, y_train), (x_valid, y_valid), (x_test, y_test))``, gzipped or not.

    Raises:
        ValueError: if the pickle holds anything else.
    """
    content = read_bytes(path)
    check_kind(content[:1024])
    if content[:1] not in FIRST_BYTES:
        raise ValueError("this is neither a pickle nor an .npz nor an IDX file")
    splits = unpickle_arrays(io.BytesIO(content))
    if [len(pair) for pair in splits] != [2, 2, 2]:
        raise ValueError("((x_train, y_train), (x_valid, y_valid), (x_test, y_test)) expected")
    return {name: (to_array(x), to_array(y)) for name, (x, y) in zip(("train", "valid", "test"), splits, strict=True)}


def unpickle_arrays(stream: io.BytesIO) -> Any:
    """Unpickle tuples and lists of numpy arrays or numbers without running any code from the pickle.

    Only ``ALLOWED_OPCODES`` are accepted, and no global is ever imported: the names that numpy writes for an
    array (``array_reduce`` in https://github.com/numpy/numpy/blob/main/numpy/_core/src/multiarray/methods.c)
    resolve to functions defined here, and every other name is an error.

    Args:
        stream: the pickle, decompressed.

    Returns:
        the tuples and lists, with a stand-in for each array; ``to_array`` makes arrays of them.

    Raises:
        ValueError: if the pickle holds anything but arrays and numbers.
    """
    stream.seek(0)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name not in ALLOWED_OPCODES or count >= MAX_OPCODES:
            raise ValueError("the pickle holds more than numpy arrays")
        if opcode.name.endswith("PUT") and int(argument or 0) >= MAX_OPCODES:
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

    class Array(StandIn):
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


class StandIn:
    """In the place of an array that is not built yet."""

    def numpy(self) -> np.ndarray:
        """Build the array."""
        raise NotImplementedError


def to_array(value: Any) -> np.ndarray:
    """Make an array of a stand-in, or of nested lists of numbers or stand-ins.

    Raises:
        ValueError: if it holds anything else, or repeats its parts until they are more than the pickle could hold.
    """
    if isinstance(value, StandIn):
        return value.numpy()
    if _count(value, {}) > MAX_NUMBERS:
        raise ValueError(f"the pickle holds lists of more than {MAX_NUMBERS:,} numbers")
    return np.array(_plain(value))


def _count(value: Any, known: dict[int, int], depth: int = 0) -> int:
    """Number of numbers in nested lists. A part counts as often as it is repeated, and is looked at once."""
    if isinstance(value, StandIn):
        return value.numpy().size
    if not isinstance(value, (list, tuple)):
        return 1
    if depth == MAX_DEPTH:
        raise ValueError("the pickle holds lists that are nested too deeply")
    if id(value) not in known:
        known[id(value)] = 1  # of a list in itself
        known[id(value)] = max(sum(_count(part, known, depth + 1) for part in value), 1)
    return known[id(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, StandIn):
        return value.numpy()
    if type(value) not in (bool, int, float):
        raise ValueError(f"the pickle holds a {type(value).__name__} in the place of a number")
    return value


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value

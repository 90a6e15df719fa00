"""The tutorial's kind of file: a pickle of numpy arrays, read without running any code from it."""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

# What numpy names for an array (``array_reduce`` in
# https://github.com/numpy/numpy/blob/main/numpy/_core/src/multiarray/methods.c).
ALLOWED = """numpy.ndarray numpy.dtype numpy.core.multiarray._reconstruct numpy.core.numeric._frombuffer
_codecs.encode""".split()
CORE = np.zeros(0).__reduce__()[0].__module__.removesuffix(".multiarray")  # numpy._core since numpy 2
MAX_OPCODES = 1_000  # six arrays take up to 264; others can exhaust memory or crash the process


class Unpickler(pickle.Unpickler):
    """Imports nothing else, see https://docs.python.org/3/library/pickle.html#restricting-globals."""

    def find_class(self, module: str, name: str) -> Any:
        """Find one of ``ALLOWED``."""
        module = module.replace("numpy._core", "numpy.core")
        if f"{module}.{name}" not in ALLOWED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not part of a numpy array")
        return super().find_class(module.replace("numpy.core", CORE), name)


def read_pickle(content: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a pickle of ``((x_train, y_train), (x_valid, y_valid), (x_test, y_test))``; pixels k/256 become bytes.

    Raises:
        ValueError: if the pickle holds anything else; of damaged bytes, whatever ``pickle`` raises.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count > MAX_OPCODES or (opcode.name.endswith("PUT") and int(argument or 0) > MAX_OPCODES):
            raise ValueError("the pickle holds more than six numpy arrays")
    splits = Unpickler(io.BytesIO(content), encoding="latin-1").load()  # as in the tutorial
    if [len(pair) for pair in splits] != [2, 2, 2] or any(type(x) is not np.ndarray for pair in splits for x in pair):
        raise ValueError("((x_train, y_train), (x_valid, y_valid), (x_test, y_test)) expected")
    return {name: (_bytes(x), y) for name, (x, y) in zip(("train", "valid", "test"), splits, strict=True)}


def _bytes(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind != "f":
        return x
    with np.errstate(invalid="ignore"):  # of what is out of range
        k = (x * 256).astype(np.uint8)
    return k if (k == x * 256).all() else x

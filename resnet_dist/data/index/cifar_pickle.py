"""Reads CIFAR's Python batches, which are pickles, without running code from them.

Imports only the standard library, so that a login node can make a plan.
"""

import pickle
from pathlib import Path
from typing import Any, Literal

from resnet_dist.errors import UserError


class PlainArray:
    """A NumPy array in a pickle. `data` is uint8; `shape` and `order` are as in NumPy."""

    shape: tuple[int, ...] = ()
    order: Literal["C", "F"] = "C"
    data = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, kind, fortran, data = state
        if getattr(kind, "name", None) not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError("its pixels are not of type uint8")
        self.order = "F" if fortran else "C"
        # Bytes that Python 2 has pickled arrive as text, one character per byte.
        self.data = data.encode("latin1") if isinstance(data, str) else bytes(data)


class _PlainType:
    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and alignment, which bytes do not have."""


def _reconstruct(*_: Any) -> PlainArray:
    return PlainArray()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> PlainArray:
    array = PlainArray()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _encode(text: Any, *_: Any) -> bytes:
    return str.encode(text, "latin1")  # Python 3 pickles bytes like this in old protocols


# Everything that NumPy 1 and 2 refer to in the pickle of an array, and our replacement for it.
_ALLOWED = {
    ("numpy", "ndarray"): PlainArray,
    ("numpy", "dtype"): _PlainType,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


def read_pickle(file: Path) -> dict[str, Any]:
    """Returns the dictionary in a file: plain data and `PlainArray`s.

    Raises:
        UserError: the file cannot be read, is not such a pickle, or refers to anything else.
    """
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream, encoding="latin1").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError("it does not contain a dictionary")
        return {key.decode() if isinstance(key, bytes) else str(key): found[key] for key in found}
    except Exception as error:  # a damaged pickle may raise anything
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{file}: not a CIFAR batch ({reason}); copy it again") from None

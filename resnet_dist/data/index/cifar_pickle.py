"""CIFAR's Python batches, which are pickles, read without running what a pickle may ask for.

Only the standard library is imported here, so that a plan can be made on a login node.
"""

import pickle
from pathlib import Path
from typing import Any, Literal

from resnet_dist.errors import UserError


class PlainArray:
    """What a pickle says of a NumPy array. `data` is uint8, `shape` and `order` NumPy's."""

    shape: tuple[int, ...] = ()
    order: Literal["C", "F"] = "C"
    data = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, kind, fortran, data = state
        if getattr(kind, "name", None) not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError("its pixels are not of type uint8")
        self.order = "F" if fortran else "C"
        # Python 2's bytes come as text of as many characters.
        self.data = data.encode("latin1") if isinstance(data, str) else bytes(data)


class _PlainType:
    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: a byte has none."""


def _reconstruct(*_: Any) -> PlainArray:
    return PlainArray()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> PlainArray:
    array = PlainArray()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _encode(text: Any, *_: Any) -> bytes:
    return str.encode(text, "latin1")  # how Python 3 writes bytes into an old protocol


# All that NumPy, 1 or 2, names in the pickle of an array. Our own stand-ins take it in.
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
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_pickle(file: Path) -> dict[str, Any]:
    """The dictionary in `file`: plain data, and `PlainArray`s.

    Raises:
        UserError: the file cannot be read, is no such pickle, or asks for anything else.
    """
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream, encoding="latin1").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
        return {key.decode() if isinstance(key, bytes) else str(key): found[key] for key in found}
    except Exception as error:  # a damaged pickle fails in any way
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{file}: not a batch of CIFAR ({reason}); copy it again") from None

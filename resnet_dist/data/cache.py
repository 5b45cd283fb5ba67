"""Arrays that take long to compute, kept on disk. A help, not a need: no error, only lost time."""

import os
import tempfile
from pathlib import Path

import numpy as np


def load_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in `path`; None where there is none of that shape to rely on."""
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


def save_array(path: Path, array: np.ndarray) -> None:
    """Atomic: a name that stands is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, array)
        os.chmod(file.name, 0o644)  # run folders are shared
        os.replace(file.name, path)
    except OSError:
        return

"""Putting on the disk what the kernel only remembers."""

import os
from pathlib import Path


def flush_folder(folder: Path) -> None:
    """Puts the names in it on the disk; a file's fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

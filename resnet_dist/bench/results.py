"""Writes the results of a benchmark with the machine and the package versions that produced
them."""

import contextlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from resnet_dist.errors import UserError

DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # one of them is installed
PACKAGES = ("torch", "torchvision", *DALI, "pillow", "numpy", "pyarrow")


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cores_per_gpu() -> int:
    """Returns the number of CPU cores for each rank, with one rank per GPU."""
    import torch  # not at the top, because `bench index` measures processes without torch

    return max(1, cores() // max(1, torch.cuda.device_count()))


def machine() -> dict[str, Any]:
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of those PACKAGES that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(path: Path | None, benchmark: str, figures: dict[str, Any]) -> None:
    """Writes the figures as JSON to `path`, unless it is None.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps({"benchmark": benchmark, "machine": machine(), **figures}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    print(f"\nwritten: {path}")


def columns(rows: list[list[str]]) -> str:
    """Formats a table whose first row is the header. Left-aligns the first column, right-aligns the
    others."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

"""Prints the GPU, the driver and the package versions that the other results were measured with.

python benchmarks/gpu_environment.py [FILE.json]
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "pillow", "pyarrow", "pytest"),
    *("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"),
    # The same packages for CUDA 12, and optional ones.
    *("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12", "mlflow", "submitit"),
)


def main(output: str | None) -> None:
    print(output_of("nvidia-smi"))
    facts = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packages": {package: version_of(package) for package in PACKAGES},
        # torch.compile needs a C compiler and Python's headers.
        "c_compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "python_headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        # DALI warns if it finds no NPP libraries.
        "npp": npp_libraries(),
        "gpu": None,
    }
    line = f"{facts['cores']} cores, torch {torch.__version__}, no GPU"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        query = ["--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "gpu": gpu.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "driver": output_of("nvidia-smi", *query).strip().splitlines()[:1],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
        # Runs a first kernel, which fails if the driver is too old.
        assert torch.ones(2, device="cuda").sum().item() == 2
        line = f"{gpu.name}, driver {facts['driver']}, torch {torch.__version__}"
    if output is not None:
        Path(output).write_text(json.dumps(facts, indent=1) + "\n")
    print(line)


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def npp_libraries() -> list[str]:
    known = output_of("ldconfig", "-p").splitlines()
    found = {line.rpartition("=> ")[2] for line in known if "libnpp" in line}
    return sorted(found | {str(p) for p in Path("/usr/local/cuda/lib64").glob("libnpp*")})


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}\n"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)

"""The GPU proof in one command: GPU tests, the quickstart, ResNet-50 at 224 px, the loader alone,
side by side with DALI's own and torchvision's, and what saving and deterministic mode cost.

    python benchmarks/gpu.py [data.root=/data/imagenet] [key.sub=value ...]

Writes benchmarks/results/<device>.json: img/s and data-wait % by logging step, with the versions
that made them; the other figures go to loader-, checkpoint- and deterministic-<device>.json.
Without data.root it trains on JPEGs of 500 x 375 pixels that it makes itself (smooth noise: to
decode, about as dear as photos).
Overrides go to the ResNet-50 run. Without a GPU everything runs on the CPU, which shows that this
script works and nothing else.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS = 10, 512, 32
RESNET50 = ["name=resnet50", "optim.warmup_epochs=0.5", "train.epochs=4", "train.log_every_steps=5"]


def main(overrides: list[str]) -> None:
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if gpu else platform.processor() or "cpu"
    ranks = max(1, torch.cuda.device_count())
    name = "-".join(device.lower().split())
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if not any(text.startswith("data.root=") for text in overrides):
            make_photos(scratch / "photos")
            overrides = [f"data.root={scratch}/photos", *overrides]
        tests = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"])
        run([sys.executable, "-m", "resnet_dist", "prepare", "digits", f"{scratch}/digits"])
        digits = [f"data.root={scratch}/digits"]
        result = {
            "device": device,
            "ranks": ranks,
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "torchvision", "nvidia-dali-cuda130")},
            "gpu_tests": tests.splitlines()[-1],
            "quickstart": train(scratch, 2, "configs/quickstart.yaml", digits),
            "resnet50": train(
                scratch, ranks, "configs/imagenet/resnet50.yaml", [*RESNET50, *overrides]
            ),
        }
        RESULTS.mkdir(exist_ok=True)
        bench_loader(overrides, RESULTS / f"loader-{name}.json")
        bench_exactness(scratch, ranks, name)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def train(scratch: Path, ranks: int, config: str, overrides: list[str]) -> dict[str, object]:
    """Trains, and returns what the journal says of it."""
    began = time.monotonic()
    fixed = [f"tracking.run_root={scratch}/runs", "tracking.mlflow=false"]
    command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "resnet_dist", "train", config, *overrides, *fixed]
    run([sys.executable, "-m", *command])
    run_dir = max((scratch / "runs").glob("*/journal.jsonl"), key=os.path.getmtime).parent
    steps: dict[int, dict[str, float]] = {}
    for line in (run_dir / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps.setdefault(record["step"], {}).update(record["metrics"])
    return {
        "command": " ".join(["train", config, *overrides]).replace(str(scratch), "SCRATCH"),
        "seconds": round(time.monotonic() - began, 1),
        "images_per_sec": [round(m["perf/images_per_sec"], 1) for m in steps.values()],
        "data_wait_pct": [round(m["perf/data_wait_pct"], 1) for m in steps.values()],
        "last": steps[max(steps)],
    }


def bench_loader(overrides: list[str], output: Path) -> None:
    """Over the photos of data.root, at the batch of a large GPU; and its fastest settings."""
    (root,) = (text.partition("=")[2] for text in overrides if text.startswith("data.root="))
    bench = [sys.executable, "-m", "resnet_dist", "bench", "loader", root]
    run([*bench, "--batch-size", "256", "--output", str(output)])
    run([*bench, "--batch-size", "256", "--tune"])


def bench_exactness(scratch: Path, ranks: int, name: str) -> None:
    """What saving costs, and deterministic mode."""
    bench = ["-m", "resnet_dist", "bench"]
    output = ["--output", f"{RESULTS}/checkpoint-{name}.json"]
    run([sys.executable, *bench, "checkpoint", str(scratch), *output])
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    output = ["--output", f"{RESULTS}/deterministic-{name}.json"]
    run([sys.executable, *torchrun, *bench, "deterministic", *output])


def run(command: list[str]) -> str:
    """Runs from the checkout, shows and returns the output; a failure ends this script."""
    print("+", *command, flush=True)
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    no_tests_collected = 5  # pytest's code where all are deselected
    if done.returncode not in (0, no_tests_collected):
        sys.exit(done.returncode)
    return done.stdout


def make_photos(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
                fine = rng.integers(-12, 13, (375, 500, 3))
                smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
                pixels = np.clip(smooth + fine, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Trains on photos with `resnet-dist train`, to measure speed or to check that resuming is exact.

    python benchmarks/gpu_train.py speed PHOTOS RUNS [--small] [--output FILE.json]
    python benchmarks/gpu_train.py resume PHOTOS RUNS [--small] [--output FILE.json]

speed: trains ResNet-50 for 100 steps with two evaluations and two saves, and reports img/s and
data-wait % of each log line. resume: trains with train.deterministic=true, then resumes a copy of
the run from the checkpoint in the middle. All values in the two last checkpoints must be the same,
bit for bit.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.checkpoints.folders import step_folders

SMALL = [
    *("model.name=resnet18", "data.crop_px=64", "data.scale_px=[64,80]"),
    *("data.eval_crop_px=64", "data.eval_resize_px=64"),
    *("train.global_batch_size=8", "train.max_local_batch_size=8"),
]
STATE = ("model", "optimizer", "scaler", "ema", "meter", "step", "best")  # compared by `resume`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("speed", "resume"))
    parser.add_argument("photos", type=Path)
    parser.add_argument("runs", type=Path, help="folder for the run folders")
    parser.add_argument("--small", action="store_true", help="ResNet-18 at 64 px, a few steps")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    what = {"speed": speed, "resume": resume}[given.what]
    figures, line = what(given.photos, given.runs, given.small)
    if given.output is not None:
        given.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(line)
    if figures.get("differing"):
        sys.exit(1)


def speed(photos: Path, runs: Path, small: bool) -> tuple[dict[str, Any], str]:
    train("speed", photos, runs, 4 if small else 100, small, [])
    metrics: dict[str, list[float]] = {}
    for line in (runs / "speed" / "journal.jsonl").read_text().splitlines():
        for name, value in json.loads(line)["metrics"].items():
            metrics.setdefault(name, []).append(round(value, 3))
    speeds, waits = metrics["perf/images_per_sec"], metrics["perf/data_wait_pct"]
    line = f"{speeds[-1]:,.0f} img/s at the end, {waits[-1]:.0f} % of the time waiting for data; "
    line += f"loss {metrics['train/loss'][0]:.2f} to {metrics['train/loss'][-1]:.2f}"
    return metrics, line


def resume(photos: Path, runs: Path, small: bool) -> tuple[dict[str, Any], str]:
    steps = 4 if small else 40
    whole, second_half = runs / "whole", runs / "second-half"
    train("whole", photos, runs, steps, small, ["train.deterministic=true"])
    last = step_folders(whole)[-1]
    shutil.copytree(whole, second_half, symlinks=True)
    shutil.rmtree(second_half / "checkpoints" / last.name)
    train("second-half", photos, runs, steps, small, ["train.deterministic=true"])
    saved, again = (
        Checkpoint.load(path).to_dict() for path in (last, step_folders(second_half)[-1])
    )
    differing = [name for key in STATE for name in differences(key, saved[key], again[key])]
    line = f"{steps} steps, and resumed from step {steps // 2}: "
    line += f"{len(differing)} values differ, such as {differing[0]}" if differing else "same bits"
    return {"steps": steps, "differing": differing}, line


def train(
    name: str, photos: Path, runs: Path, steps: int, small: bool, overrides: list[str]
) -> None:
    """Trains a run that evaluates and saves in the middle and at the end. Exits if it fails."""
    settings = [
        f"name={name}",
        f"data.root={photos}",
        f"tracking.run_root={runs}",
        "tracking.mlflow=false",
        f"train.iterations={steps}",
        f"train.eval_every_iterations={steps // 2}",
        f"train.save_every_iterations={steps // 2}",
        f"train.log_every_steps={max(1, steps // 5)}",
        f"optim.warmup_iterations={steps // 2}",
        f"optim.milestones_iterations=[{steps - 1}]",
    ]
    command = [sys.executable, "-m", "resnet_dist", "train", "configs/imagenet/resnet50.yaml"]
    done = subprocess.run([*command, *settings, *(SMALL if small else []), *overrides])
    if done.returncode != 0:  # the command has printed the reason
        sys.exit(done.returncode)


def differences(where: str, one: Any, other: Any) -> Iterator[str]:
    """Yields the names of the values in `one` and `other` that are not bit for bit the same."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(f"{where}.{key}", one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(f"{where}.{i}", a, b)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield where
    elif one != other:
        yield where


if __name__ == "__main__":
    main()

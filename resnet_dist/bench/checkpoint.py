"""`bench checkpoint`: what saving costs training, at ResNet-50's sizes, and what a save is made of.

So many steps as a save takes, or more, without one, with one by the Saver (copy, and write
behind), and with one written while training waits, in turn (A B C, B C A, ...), so that whatever
else the machine does meets all of them. What a save costs is the median of the differences within a
round. Its time is counted to its end: the next steps do not start before.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.nn import functional as F

from resnet_dist.bench import results
from resnet_dist.checkpoints import folders, writer
from resnet_dist.checkpoints.content import Checkpoint, Facts
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.checkpoints.writer import Saver
from resnet_dist.config import Config, ModelConfig, OptimConfig
from resnet_dist.models.build import build_model
from resnet_dist.optim import build_optimizer, set_lr
from resnet_dist.precision import autocast, grad_scaler
from resnet_dist.state import TrainState

STEPS_PER_SAVE = 100
TIMED_SECONDS = 1.5  # of steps, at least: a write may take half a second
PARTS_RUNS = 7
CROP_PX = 224
GPU_BATCH_SIZE = 128
CLASSES = tuple(f"class{label}" for label in range(1000))
HOST_STEP_MS = 50
HOST_SIDE = (
    f"{HOST_STEP_MS} ms of Python that calls torch on one element, without a pause: a step as long "
    f"as a GPU's at {1000 * GPU_BATCH_SIZE // HOST_STEP_MS:,} images/s, and bound by its host, "
    "which so loses all that saving takes from it"
)
CPU_BATCH_SIZE = 8
REAL_STEP = "a ResNet-50 step, batch {}, images that stand ready"


def bench_checkpoint(folder: Path, runs: int, output: Path | None) -> None:
    """Prints both tables, and writes the figures to `output`.

    folder: where checkpoints would go; what is written there is removed again.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder) as name:
        state, config = trained_state(device), Config(model=ModelConfig("resnet50"))
        content = state.checkpoint(config, Facts(classes=CLASSES))
        batch_size = GPU_BATCH_SIZE if device.type == "cuda" else CPU_BATCH_SIZE
        steps = {REAL_STEP.format(batch_size): real_step(state, device, batch_size)}
        if device.type == "cpu":  # its steps are so long that they hide everything
            steps[HOST_SIDE] = host_side_step()
        figures = {
            "steps_per_save": STEPS_PER_SAVE,
            "steps": [
                {"step": what, **overhead(step, content, Path(name) / str(number), runs)}
                for number, (what, step) in enumerate(steps.items())
            ],
            "parts": parts(content, Path(name), min(runs, PARTS_RUNS)),
        }
    print(describe_figures(figures))
    results.write(output, "checkpoint", figures)


def trained_state(device: torch.device) -> TrainState:
    """ResNet-50 with its momentum, after a step."""
    network = build_model("resnet50", len(CLASSES)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(
        network, build_optimizer(network, OptimConfig()), grad_scaler(device, "bf16")
    )
    set_lr(state.optimizer, 0.1)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    return state


def real_step(state: TrainState, device: torch.device, batch_size: int) -> Callable[[], None]:
    precision = "bf16" if device.type == "cuda" else "fp32"
    images = torch.randn(batch_size, 3, CROP_PX, CROP_PX, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device)

    def step() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = F.cross_entropy(state.model(images), labels)
        loss.backward()
        state.optimizer.step()

    return step


def say_warnings(line: str) -> None:
    if line.startswith("warning"):
        print(line)


def host_side_step() -> Callable[[], None]:
    one = torch.zeros(())

    def seconds(operations: int) -> float:
        began = time.perf_counter()
        for _ in range(operations):
            one.add_(1)
        return time.perf_counter() - began

    each = min(seconds(10_000) for _ in range(20)) / 10_000  # a quiet moment's
    operations = round(HOST_STEP_MS / 1000 / each)

    def step() -> None:
        seconds(operations)

    return step


def overhead(
    step: Callable[[], None], content: Checkpoint, folder: Path, runs: int
) -> dict[str, Any]:
    """Milliseconds of a step, and what a save of each kind adds."""
    saver = Saver(folder / "behind", Retention(1), say_warnings)
    number = 0

    def saved_behind() -> None:
        saver.save(replace(content, step=number))

    def saved_here() -> None:
        writer.save(folder / "here", replace(content, step=number), Retention(1))

    kinds: dict[str, Callable[[], None]] = {
        "none": lambda: None,
        "behind": saved_behind,
        "waited for": saved_here,
    }
    for kind in kinds.values():  # buffers, imports, the allocator
        step()
        kind()
    saver.finish()
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    timed_steps = math.ceil(TIMED_SECONDS / (time.perf_counter() - began))
    ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(1, runs + 1):
        turn = list(kinds)[number % 3 :] + list(kinds)[: number % 3]
        for name in turn:
            synchronize()
            began = time.perf_counter()
            kinds[name]()
            for _ in range(timed_steps):
                step()
            synchronize()
            saver.finish()
            ms[name].append(1000 * (time.perf_counter() - began))
    step_ms = median(ms["none"]) / timed_steps
    rows = []
    for name in ("behind", "waited for"):
        added = [one - none for one, none in zip(ms[name], ms["none"], strict=True)]
        low, middle, high = quantiles(added, n=4) if runs > 1 else added * 3
        rows.append(
            {
                "save": name,
                "added_ms": round(middle, 1),
                "added_ms_quartiles": [round(low, 1), round(high, 1)],
                "overhead_pct": round(100 * middle / (STEPS_PER_SAVE * step_ms), 2),
            }
        )
    return {"step_ms": round(step_ms, 2), "rounds": runs, "kinds": rows}


def parts(content: Checkpoint, folder: Path, runs: int) -> dict[str, float]:
    """Medians of milliseconds, each measured alone; and the size."""
    file, saver = folder / "state.pt", Saver(folder / "parts", Retention(1))
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        result = function(*args)
        synchronize()
        times.setdefault(name, []).append(1000 * (time.perf_counter() - began))
        return result

    def flush() -> None:
        with open(file, "rb") as written:
            os.fsync(written.fileno())

    def digest() -> None:
        with open(file, "rb") as written:
            hashlib.file_digest(written, "sha256")

    held = content.to_dict()
    for number in range(runs):
        copy = timed("copy_to_host" if number else "first_copy_to_host", saver.copy_to_host, held)
        file.unlink(missing_ok=True)
        timed("torch_save", torch.save, copy, file)
        timed("fsync", flush)
        timed("sha256", digest)
        path = folder / "written"
        timed("whole_write", writer.write, path, Checkpoint.from_dict(copy))
        timed("check", folders.why_damaged, path)
        timed("load", Checkpoint.load, path)
        shutil.rmtree(path)
    megabytes = file.stat().st_size / 1e6
    medians = {f"{name}_ms": round(median(all_runs), 1) for name, all_runs in times.items()}
    return {"state_mb": round(megabytes, 1), **medians}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_figures(figures: dict[str, Any]) -> str:
    text = ""
    for step in figures["steps"]:
        table = [["a save", "adds ms", "quartiles", f"one in {STEPS_PER_SAVE} steps"]]
        for row in step["kinds"]:
            low, high = row["added_ms_quartiles"]
            cost = [f"{row['added_ms']:.1f}", f"{low:.1f}..{high:.1f}"]
            table.append([row["save"], *cost, f"{row['overhead_pct']:+.2f} %"])
        text += f"\nA step: {step['step']}; measured {step['step_ms']:.1f} ms\n\n"
        text += results.columns(table) + "\n"
    names = {"state_mb": "state.pt, MB", "whole_write_ms": "all of a write, ms"}
    alone = [["alone", "median"]]
    for name, value in figures["parts"].items():
        label = names.get(name, name.replace("_", " ").removesuffix(" ms") + ", ms")
        alone.append([label, f"{value:,.1f}"])
    return f"{text}\n{results.columns(alone)}"

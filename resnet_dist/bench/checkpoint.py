"""`bench checkpoint`: how much saving a ResNet-50 slows down training, and the time of each phase.

Times a run of steps, at least as long as a save takes, in three variants: without a save, with a
save by the Saver (which copies the state and writes it in a background thread), and with a save
that training waits for. The variants alternate (A B C, B C A, ...), so that other load on the
machine affects all of them alike. The cost of a save is the median of the differences within a
round. The timing of a variant ends when its save is complete, even if its steps end earlier.

Next to a step that does nothing but run Python, the cost is the time in which the training thread
did not run its steps, because it was copying, or waited for the GIL, a core or the disk, relative
to the steps of the same turn. On a shared machine the speed of a core may vary by a factor of two
from second to second, without any sign in /proc, and differences between turns vary as much. Not
counted is that the writing thread's core may slow down the other one, if they share hardware.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from resnet_dist.bench import results
from resnet_dist.bench.turns import Spread, figures_of, spread, take_turns
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
TIMED_SECONDS = 2.5  # minimum duration of the timed steps; a write may take a second
PARTS_RUNS = 7
CROP_PX = 224
GPU_BATCH_SIZE = 128
CLASSES = tuple(f"class{label}" for label in range(1000))
HOST_STEP_MS = 50
HOST_SIDE = (
    f"{HOST_STEP_MS} ms of Python calling torch on one element without a pause: as long as a GPU's "
    f"step at {1000 * GPU_BATCH_SIZE // HOST_STEP_MS:,} images/s, but limited by the host, so that "
    "all host time taken by saving is lost (the worst case)"
)
CPU_BATCH_SIZE = 8
REAL_STEP = "a ResNet-50 step, batch {}, images already in memory"


@dataclass(frozen=True)
class Step:
    """A step to train while saving.

    host_ms: the nominal duration of a step that is nothing but CPU time of one thread; None for
    any other step.
    """

    what: str
    train: Callable[[], None]
    host_ms: float | None = None


def bench_checkpoint(folder: Path, runs: int, output: Path | None) -> None:
    """Prints the costs of saving and the times of its phases, and writes them to `output`.

    folder: on the disk to measure. The checkpoints written there are removed afterwards.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder) as name:
        state, config = trained_state(device), Config(model=ModelConfig("resnet50"))
        content = state.checkpoint(config, Facts(classes=CLASSES))
        batch_size = GPU_BATCH_SIZE if device.type == "cuda" else CPU_BATCH_SIZE
        steps = [Step(REAL_STEP.format(batch_size), real_step(state, device, batch_size))]
        if device.type == "cpu":  # a real step takes so long on a CPU that it hides all other costs
            steps.append(Step(HOST_SIDE, host_side_step(), HOST_STEP_MS))
        figures = {
            "steps_per_save": STEPS_PER_SAVE,
            "steps": [
                {"step": step.what, **overhead(step, content, Path(name) / str(number), runs)}
                for number, step in enumerate(steps)
            ],
            "parts": parts(content, Path(name), min(runs, PARTS_RUNS)),
        }
    print(describe_figures(figures))
    results.write(output, "checkpoint", figures)


def trained_state(device: torch.device) -> TrainState:
    """Returns ResNet-50 with its optimizer after one step, so that the momentum exists."""
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
    """Prints the Saver's warnings, but not its other lines."""
    if line.startswith("warning"):
        print(line)


def host_side_step() -> Callable[[], None]:
    """Returns a function that keeps the host busy for HOST_STEP_MS, as HOST_SIDE describes."""
    one = torch.zeros(())

    def seconds(operations: int) -> float:
        began = time.perf_counter()
        for _ in range(operations):
            one.add_(1)
        return time.perf_counter() - began

    each = min(seconds(10_000) for _ in range(20)) / 10_000  # the minimum has the least other load
    operations = round(HOST_STEP_MS / 1000 / each)

    def step() -> None:
        seconds(operations)

    return step


def overhead(step: Step, content: Checkpoint, folder: Path, runs: int) -> dict[str, Any]:
    """Measures the duration of a step, and the time that each kind of save takes from training, in
    milliseconds."""
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
    for kind in kinds.values():  # warm-up: buffers, imports, the allocator
        step.train()
        kind()
    saver.finish()
    synchronize()
    began = time.perf_counter()
    step.train()
    synchronize()
    timed_steps = math.ceil(TIMED_SECONDS / (time.perf_counter() - began))

    def timed(save: Callable[[], None]) -> float:
        nonlocal number
        number += 1
        synchronize()
        began = time.perf_counter()
        save()
        saved = time.thread_time()
        for _ in range(timed_steps):
            step.train()
        trained = time.thread_time() - saved  # CPU time, so without any waiting
        synchronize()
        saver.finish()
        seconds = time.perf_counter() - began
        if step.host_ms is None:
            return 1000 * seconds
        return step.host_ms * timed_steps * (seconds - trained) / trained

    turns = take_turns({name: partial(timed, save) for name, save in kinds.items()}, runs)
    step_ms = step.host_ms or spread(turns["none"]).median / timed_steps
    rows = []
    for name in ("behind", "waited for"):
        pairs = zip(turns[name], turns["none"], strict=True)
        added = Spread.of([one.value - none.value for one, none in pairs])
        rows.append(
            {
                "save": name,
                "added_ms": round(added.median, 1),
                "added_ms_quartiles": [round(added.low, 1), round(added.high, 1)],
                "overhead_pct": round(100 * added.median / (STEPS_PER_SAVE * step_ms), 2),
                "ms": figures_of(turns[name]),
            }
        )
    return {
        "step_ms": round(step_ms, 2),
        "timed": "the whole turn" if step.host_ms is None else "what the steps did not use of it",
        "rounds": runs,
        "kinds": rows,
        "without_ms": figures_of(turns["none"]),
    }


def parts(content: Checkpoint, folder: Path, runs: int) -> dict[str, float]:
    """Measures each phase of saving and loading separately.

    Returns the size of state.pt in MB, and the median milliseconds of each phase.
    """
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

    state = content.to_dict()
    for number in range(runs):
        copy = timed("copy_to_host" if number else "first_copy_to_host", saver.copy_to_host, state)
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
        torch.cuda.synchronize()  # CPU-GPU sync point


def describe_figures(figures: dict[str, Any]) -> str:
    text = ""
    kinds = {"behind": "in the background", "waited for": "blocking"}
    for step in figures["steps"]:
        table = [["save", "adds ms", "quartiles", f"one in {STEPS_PER_SAVE} steps"]]
        for row in step["kinds"]:
            low, high = row["added_ms_quartiles"]
            cost = [f"{row['added_ms']:.1f}", f"{low:.1f}..{high:.1f}"]
            table.append([kinds[row["save"]], *cost, f"{row['overhead_pct']:+.2f} %"])
        text += f"\nStep: {step['step']}; {step['step_ms']:.1f} ms\n\n"
        text += results.columns(table) + "\n"
    names = {"state_mb": "state.pt, MB", "whole_write_ms": "whole write, ms"}
    alone = [["measured separately", "median"]]
    for name, value in figures["parts"].items():
        label = names.get(name, name.replace("_", " ").removesuffix(" ms") + ", ms")
        alone.append([label, f"{value:,.1f}"])
    return f"{text}\n{results.columns(alone)}"

"""`bench loop`: what training's loop adds to a bare `for` around the same step.

Both run the same network on the same batch of noise. The bare loop has the forward pass, the
backward pass and the optimizer. Training's loop is train.run itself, which also counts the loss and
accuracy, looks one step ahead, asks whether to stop, and writes the journal and the progress line.
Evaluations, saves and MLflow's thread are not part of it.
"""

import signal
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from resnet_dist.bench import results
from resnet_dist.bench.turns import Spread, figures_of, ratio, spread, take_turns
from resnet_dist.config import Config, DataConfig, ModelConfig, TrackingConfig, TrainConfig
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.prepare.digits import write_digits
from resnet_dist.distributed import World
from resnet_dist.job import Job, build
from resnet_dist.precision import autocast
from resnet_dist.run.folder import open_run_folder
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.lookahead import Lookahead
from resnet_dist.run.progress import Console
from resnet_dist.run.startup import Startup
from resnet_dist.tracking.journal import Tracker
from resnet_dist.train import Loop, run

MODEL, PX, BATCH_SIZE = "resnet20", 32, 32
BARE, LOOP = "bare for", "training's loop"


def bench_loop(world: World, runs: int, steps: int, output: Path | None) -> None:
    """Prints the milliseconds of a step in both loops. steps: timed in each turn."""
    with tempfile.TemporaryDirectory(prefix="bench-loop-") as name, Console(False) as console:
        write_digits(Path(name) / "digits")
        config = _config(Path(name))
        job = build(config, world, say=lambda _: None)
        open_run_folder(config, 0, job.previous.changes, job.is_finished)
        console.keep_in(config.run_dir)
        images = torch.randn(BATCH_SIZE, 3, PX, PX, device=world.device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.arange(BATCH_SIZE, device=world.device) % 10
        batch = Batch(images, labels, step=0, positions=range(BATCH_SIZE))
        contestants = {
            BARE: lambda: _bare(job, batch, steps),
            LOOP: lambda: _with_training_s_loop(job, batch, steps, console),
        }
        turns = take_turns(contestants, runs)
    times = ratio(turns[LOOP], turns[BARE])
    figures = {
        "model": MODEL,
        "batch_size": BATCH_SIZE,
        "log_every_steps": config.train.log_every_steps,
        "steps": steps,
        "ms_per_step": {name: figures_of(of_this) for name, of_this in turns.items()},
        "overhead_pct": Spread(
            *(100 * (x - 1) for x in (times.median, times.low, times.high))
        ).figures(2),
    }
    print(describe_figures(figures, runs, {n: spread(t) for n, t in turns.items()}))
    results.write(output, "loop", figures)


def _config(folder: Path) -> Config:
    return Config(
        model=ModelConfig(name=MODEL),
        data=DataConfig(root=str(folder / "digits"), crop_px=PX, scale_px=(PX, PX)),
        train=TrainConfig(
            epochs=None,
            iterations=10**6,
            global_batch_size=BATCH_SIZE,
            eval_every_epochs=None,
            eval_every_iterations=10**6,
            save_every_epochs=None,
            save_every_iterations=10**6,
        ),
        tracking=TrackingConfig(run_root=str(folder / "runs"), mlflow=False),
    )


def _bare(job: Job, batch: Batch, steps: int) -> float:
    """Returns milliseconds per step."""
    model, optimizer, device = job.model, job.state.optimizer, job.world.device
    model.train()
    began = _now(device)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, job.config.train.precision):
            loss = F.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
    return 1000 * (_now(device) - began) / steps


def _with_training_s_loop(job: Job, batch: Batch, steps: int, console: Console) -> float:
    """Returns milliseconds per step."""
    interrupt, times = Interrupt(), []

    def noise() -> Generator[Batch]:
        yield batch  # fetched before the first step, and each other one before the step before it
        times.append(_now(job.world.device))
        for _ in range(steps):
            yield batch
        times.append(_now(job.world.device))
        interrupt.received.add(signal.SIGTERM)
        while True:
            yield batch

    tracker = Tracker(job.config, {}, records=True, warn=console.say)
    loop = Loop.of(job, interrupt, tracker, console, Startup(time.monotonic()))
    loop.lookahead = Lookahead(noise, 1, loop.meter, interrupt)
    run(loop)
    job.saver.wait()
    tracker.close("FINISHED", {})
    began, ended = times
    return 1000 * (ended - began) / steps


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # CPU-GPU sync point
    return time.perf_counter()


def describe_figures(figures: dict[str, Any], runs: int, spreads: dict[str, Spread]) -> str:
    table = [["", "ms per step", "quartiles"]]
    for name, ms in spreads.items():
        table.append([name, f"{ms.median:.2f}", ms.text(2)])
    cost = figures["overhead_pct"]
    return (
        f"\n{MODEL}, batch {BATCH_SIZE}, medians of {runs} runs of {figures['steps']} steps\n\n"
        f"{results.columns(table)}\n\nthe loop adds {cost['median']:+.2f} % "
        f"({cost['low']:+.2f}..{cost['high']:+.2f})"
    )

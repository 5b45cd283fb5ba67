"""`bench loop`: what training's loop adds to a bare `for` around the same step.

Both run the same step on the same batch of noise. The bare loop has the forward pass, the
backward pass and the optimizer. Training's loop is train.run itself, which also counts the loss and
accuracy, looks one step ahead, asks whether to stop, and writes the journal and the progress line.
Evaluations, saves and MLflow's thread are not part of it.

What the loop adds is far less than a step varies by. So it is measured around hardly a step, a
linear layer without an optimizer, and then compared with the bare step of a network.
"""

import signal
import tempfile
import time
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from resnet_dist.bench import results
from resnet_dist.bench.turns import Spread, figures_of, now, spread, take_turns
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
BARE = "bare for"
SHORT_BARE, SHORT_LOOP = "bare for, hardly a step", "training's loop, hardly a step"
SHORT_STEPS = 20  # times as many of them


def bench_loop(world: World, runs: int, steps: int, output: Path | None) -> None:
    """Prints the milliseconds of a step in both loops. steps: timed in each turn."""
    with tempfile.TemporaryDirectory(prefix="bench-loop-") as name, Console(False) as console:
        write_digits(Path(name) / "digits")
        config = _config(Path(name))
        job = build(config, world, say=lambda _: None)
        open_run_folder(config, 0, job.previous.changes, job.is_finished)
        console.keep_in(config.run_dir)
        batch = _noise(world.device)
        # Its optimizer finds no gradients, and does nothing.
        nothing = nn.Sequential(nn.Flatten(), nn.Linear(3 * PX * PX, 10)).to(world.device)
        short = replace(job, model=nothing)
        many = steps * SHORT_STEPS
        contestants = {
            BARE: partial(_bare, job, batch, steps),
            SHORT_BARE: partial(_bare, short, batch, many),
            SHORT_LOOP: partial(_with_training_s_loop, short, batch, many, console),
        }
        turns = take_turns(contestants, runs)
    whole, bare, loops = ([turn.value for turn in turns[name]] for name in contestants)
    more = [1000 * (loop - alone) for alone, loop in zip(bare, loops, strict=True)]
    added = Spread.of(more)
    share = Spread.of([us / ms / 10 for us, ms in zip(more, whole, strict=True)])
    figures = {
        "model": MODEL,
        "log_every_steps": config.train.log_every_steps,
        "steps": steps,
        "ms_per_step": {name: figures_of(of_this) for name, of_this in turns.items()},
        "added_microseconds_per_step": added.figures(1),
        "overhead_pct": share.figures(3),
    }
    print(describe_figures(figures, runs, {n: spread(t) for n, t in turns.items()}))
    results.write(output, "loop", figures)


def _noise(device: torch.device) -> Batch:
    images = torch.randn(BATCH_SIZE, 3, PX, PX, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH_SIZE, device=device) % 10
    return Batch(images, labels, step=0, positions=range(BATCH_SIZE))


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
    began = now(job.world)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, job.config.train.precision):
            loss = F.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
    return 1000 * (now(job.world) - began) / steps


def _with_training_s_loop(job: Job, batch: Batch, steps: int, console: Console) -> float:
    """Returns milliseconds per step."""
    interrupt, times = Interrupt(), []

    def noise() -> Generator[Batch]:
        yield batch  # fetched before the first step, and each other one before the step before it
        times.append(now(job.world))
        for _ in range(steps):
            yield batch
        times.append(now(job.world))
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


def describe_figures(figures: dict[str, Any], runs: int, spreads: dict[str, Spread]) -> str:
    table = [["", "ms per step", "quartiles"]]
    for name, ms in spreads.items():
        table.append([name, f"{ms.median:.2f}", ms.text(2)])
    added, cost = figures["added_microseconds_per_step"], figures["overhead_pct"]
    return (
        f"\n{MODEL}, medians of {runs} runs of {figures['steps']} steps\n\n"
        f"{results.columns(table)}\n\nthe loop adds {added['median']:,.0f} us "
        f"({added['low']:,.0f}..{added['high']:,.0f}), {cost['median']:.2f} % of the bare step on "
        f"a batch of {BATCH_SIZE}"
    )

"""`bench peers`: compares whole trainers, loading and training, on the same photos.

The network, the batch size, the precision, the photos and the machine are the same for all.
"""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resnet_dist.bench import results
from resnet_dist.bench.machine_floor import floor_of_a_step
from resnet_dist.bench.peers import trainers as peers
from resnet_dist.bench.peers.trainers import Training
from resnet_dist.bench.photos import photo_folder
from resnet_dist.bench.streams import (
    HEAD,
    Contestant,
    Settings,
    columns_of,
    interleave,
    summary,
    warm_page_cache,
)
from resnet_dist.config import DataConfig
from resnet_dist.data.load.build import agreed_decoding

OURS = "resnet-dist"


def bench_peers(
    photos: Path,
    settings: Settings,
    output: Path | None,
    *,
    model: str,
    precision: str,
    sleep_ms: float | None,
) -> None:
    """Prints a table of the trainers, and writes the figures to `output`.

    sleep_ms: sleeps for so long instead of each step.

    Raises:
        UserError: there are no photos in `photos`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        folder = stack.enter_context(photo_folder(photos, settings.images))
        training = Training(
            data=DataConfig(root=str(folder), decode_threads=settings.threads),
            images=max(settings.images, settings.batch_size),
            batch_size=settings.batch_size,
            batches=settings.batches,
            device=device,
            run_root=settings.run_root or str(folder),
            model=model,
            precision=precision,
            sleep_ms=sleep_ms,
        )
        agreed_decoding(training.config, training.world)  # probes a GPU now, rather than later
        warm_page_cache(folder)
        contestants = side_by_side(training)
        rounds = interleave(contestants, settings)
    ours = contestants[0]
    rows = [{"trainer": one.name, **summary(one, rounds, contestants, ours)} for one in contestants]
    figures: dict[str, Any] = {
        "settings": asdict(settings),
        "model": model,
        "precision": precision,
        "sleep_ms": sleep_ms,
        "trainers": rows,
        "floor": None,
    }
    if sleep_ms is None:
        px = training.data.crop_px
        floor = floor_of_a_step(model, training.batch_size, px, precision, torch.device(device))
        figures["floor"] = floor.figures()
        for row in rows:  # of a step alone, without loading
            fraction = row["images_per_sec"] / floor.images_per_sec
            row["fraction_of_the_floor"] = round(fraction, 4)
    print(describe_results(figures, settings))
    results.write(output, "peers", figures)


def side_by_side(training: Training) -> list[Contestant]:
    """Returns the trainers that this machine can run; ours comes first."""
    contestants = [
        Contestant(OURS, peers.ours, training),
        Contestant("torchvision, plain loop", peers.torchvision_plain, training),
        Contestant("timm", peers.timm_train, training),
    ]
    if training.device == "cuda":
        contestants.append(Contestant("NVIDIA's recipe", peers.nvidia_recipe, training))
    else:
        print("skipped: NVIDIA's recipe (channels last, fp16, DALI alone), which needs a GPU")
    try:
        import timm  # noqa: F401
    except ImportError:
        print("skipped: timm, which is not installed")
        contestants = [one for one in contestants if one.stream is not peers.timm_train]
    return contestants


def describe_results(figures: dict[str, Any], settings: Settings) -> str:
    rows, sleep_ms = figures["trainers"], figures["sleep_ms"]
    what = f"{figures['model']}, {figures['precision']}"
    if sleep_ms is not None:
        what = f"no training, but {sleep_ms:g} ms of sleep per batch"
    table = [["", *HEAD], *([row["trainer"], *columns_of(row)] for row in rows)]
    lines = [
        f"\n{what}, batch {settings.batch_size}, {settings.threads} threads, {rows[0]['device']}; "
        f"median of {settings.runs} runs of {settings.timed_batches} steps\n",
        results.columns(table),
    ]
    if figures["floor"] is not None:
        most = figures["floor"]["images_per_sec"]
        reached = ", ".join(f"{row['trainer']} {row['fraction_of_the_floor']:.0%}" for row in rows)
        lines.append(f"\nfloor of a step on this machine: {most:,.1f} img/s; reached: {reached}")
    return "\n".join(lines)

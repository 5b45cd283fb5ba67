"""Profiles the loader on a CPU by part: what each costs alone, and what is left for the whole.

    python benchmarks/loader_profile.py PHOTOS [--threads N] [--output FILE.json]

Each part runs alone, on the same windows of the same photos, and its CPU time is measured. "Python
and waiting for each other" is what the whole loader takes beyond the sum of its parts. "Idle" is
the share of the threads' time in which no part of the loader ran.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from resnet_dist.bench import results
from resnet_dist.bench.peers import loaders
from resnet_dist.bench.photos import photo_folder
from resnet_dist.bench.quiet import Disturbance, undisturbed, wait_until_quiet
from resnet_dist.bench.streams import warm_page_cache
from resnet_dist.config import DataConfig
from resnet_dist.data.index.image_file import read_image_file
from resnet_dist.data.index.plain import why_not_plain
from resnet_dist.data.load.boxes import boxes_of
from resnet_dist.data.load.dali_graphs import decode_graph
from resnet_dist.data.load.decoding import Decoding
from resnet_dist.data.load.resample import Resampler
from resnet_dist.data.view.augment import Request

BATCH_SIZE, BATCHES, RUNS = 64, 24, 5
PREFETCH = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--threads", type=int, default=results.cores())
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with photo_folder(given.photos, BATCH_SIZE * BATCHES) as folder:
        warm_page_cache(folder)
        work = loaders.Work(
            data=DataConfig(root=str(folder), decode_threads=given.threads),
            images=BATCH_SIZE * BATCHES,
            batch_size=BATCH_SIZE,
            batches=BATCHES,
            device="cpu",
            run_root=str(folder),
        )
        wait_until_quiet()
        rounds = [undisturbed(lambda: measure(work)) for _ in range(RUNS)]
    figures = summary(rounds)
    rows = [["part", "CPU ms/img"], *([k, f"{v:.3f}"] for k, v in figures["cpu_ms"].items())]
    print(results.columns(rows))
    print(f"\nidle: {figures['idle_pct']:.1f} % of {given.threads} threads")
    results.write(given.output, "loader profile", {"threads": given.threads, **figures})


def summary(rounds: list[tuple[dict[str, float], Disturbance]]) -> dict[str, Any]:
    """Returns the medians over the rounds."""
    values = {part: median(one[part] for one, _ in rounds) for part in rounds[0][0]}
    idle_pct = 100 * values.pop("idle")
    return {
        "cpu_ms": {part: round(value, 3) for part, value in values.items()},
        "idle_pct": round(idle_pct, 1),
        "steal_pct": [seen.steal_pct for _, seen in rounds],
        "others_pct": [seen.others_pct for _, seen in rounds],
        "repeats": sum(seen.repeats for _, seen in rounds),
    }


def measure(work: loaders.Work) -> dict[str, float]:
    """Returns the CPU milliseconds per image of each part, and the idle share."""
    index = loaders.index_of(work)
    requests = list(loaders.requests_of(work))
    paths = [index.paths[sample] for request in requests for sample in request.samples]
    sizes = [tuple(index.sizes[sample]) for request in requests for sample in request.samples]
    cpu: dict[str, float] = {}

    def timed(part: str, once: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = once()
        spent = 1000 * (time.process_time() - began) / len(paths)
        cpu[part] = cpu.get(part, 0.0) + spent
        return result

    timed("requests", lambda: list(loaders.requests_of(work)))
    batches = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
    for batch in batches:  # the memory of one batch is used for the next, as in the loader
        timed("read", lambda batch=batch: list(map(read_image_file, batch)))
    files = list(map(read_image_file, paths))
    timed("check the header", lambda: list(map(why_not_plain, files, sizes)))
    encoded = [np.frombuffer(file, np.uint8) for file in files]
    decoding = partial(decoded, work, requests, index.sizes, encoded)
    timed("decode", lambda: sum(1 for _ in decoding()))
    px = work.data.crop_px
    out = torch.empty(px, px, 3, dtype=torch.uint8).permute(2, 0, 1)[None]
    cpu["resize"] = 0.0
    for windows in decoding():
        began = time.thread_time()  # DALI decodes the next batch in its own threads
        for window in windows:
            seen = window.permute(2, 0, 1)[None]
            torch.ops.aten._upsample_bilinear2d_aa.out(seen, [px, px], False, out=out)
        cpu["resize"] += 1000 * (time.thread_time() - began) / len(paths)
    mean, std = (255 * np.array(levels) for levels in (work.data.mean, work.data.std))
    resampler = Resampler(mean.astype(np.float32), list(std), torch.float32, threads=1)
    pairs = zip(decoding(), requests, strict=True)
    timed("both", lambda: [resampler.start(batch, one.windows)() is None for batch, one in pairs])
    cpu["normalize and copy"] = cpu.pop("both") - cpu["decode"] - cpu["resize"]
    parts = sum(cpu.values())
    began = time.perf_counter()
    timed("whole", lambda: sum(1 for _ in loaders.ours(work)))
    seconds = time.perf_counter() - began
    whole = cpu.pop("whole")
    cpu["Python and waiting for each other"] = whole - parts
    cpu["whole"] = whole
    used = whole * len(paths) / 1000
    timed("libjpeg-turbo alone", lambda: sum(1 for _ in loaders.bare_libjpeg(work)))
    timed("plain C", lambda: sum(1 for _ in loaders.plain_c_loader(work)))
    return cpu | {"idle": 1 - used / (seconds * work.threads)}


def decoded(
    work: loaders.Work, requests: list[Request], sizes: np.ndarray, encoded: list[np.ndarray]
) -> Iterator[list[torch.Tensor]]:
    """Yields the windows of each batch, which DALI decodes, as the loader does."""
    inputs = []
    for number, request in enumerate(requests):
        boxes = boxes_of(request.windows, sizes[request.samples])
        corners = (np.ascontiguousarray(boxes[:, edge : edge + 2]) for edge in (0, 2))
        inputs.append((encoded[number * BATCH_SIZE : (number + 1) * BATCH_SIZE], *corners))
    ready = iter(inputs)
    pipe = decode_graph(
        lambda: next(ready),
        input_kind="window",
        cut=True,
        decoding=Decoding(),
        batch_size=BATCH_SIZE,
        num_threads=work.threads,
        device_id=None,
        prefetch_queue_depth=PREFETCH,
    )
    for _ in requests:
        (windows,) = pipe.run()
        yield [torch.from_dlpack(window.__dlpack__()) for window in windows]


if __name__ == "__main__":
    main()

"""`bench loader --tune`: finds the fastest value of each loader setting, one after another."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from resnet_dist.bench import results
from resnet_dist.bench.peers.loaders import Work, index_of, ours
from resnet_dist.bench.photos import photo_folder
from resnet_dist.bench.streams import Contestant, Settings, interleave, warm_page_cache
from resnet_dist.config import DataConfig
from resnet_dist.data.load.build import agreed_decoding
from resnet_dist.data.load.cache import SHARED_MEMORY
from resnet_dist.errors import UserError

WORTH_A_CHANGE = 1.02  # a gain below 2 % is noise, and the value is not changed


def tune(data: Path, settings: Settings, output: Path | None) -> None:
    """Prints the measurements, and the best values as YAML. settings.threads: cores of one rank.

    Raises:
        UserError: there are no photos in `data`.
    """
    rows: list[dict[str, Any]] = []
    with photo_folder(data, settings.images) as folder:
        warm_page_cache(folder)
        best = Work(
            data=DataConfig(root=str(folder), decode_threads=settings.threads),
            images=max(settings.batch_size, photo_count(folder)),
            batch_size=settings.batch_size,
            batches=settings.batches,
            device="cuda" if torch.cuda.is_available() else "cpu",
            run_root=settings.run_root or str(folder),
        )
        for knob, values in knobs(best).items():
            loaders = [
                Contestant(
                    f"{knob}={value}",
                    ours,
                    replace(best, data=replace(best.data, **{knob: value})),
                )
                for value in values
            ]
            print(f"\n{knob}: {', '.join(map(str, values))}")
            rounds = interleave(loaders, settings)
            speeds = [median(one[i].images_per_sec for one in rounds) for i in range(len(values))]
            rows += [
                {"knob": knob, "value": value, "images_per_sec": round(speed, 1)}
                for value, speed in zip(values, speeds, strict=True)
            ]
            current = values.index(getattr(best.data, knob))
            fastest = max(range(len(values)), key=speeds.__getitem__)
            if speeds[fastest] > WORTH_A_CHANGE * speeds[current]:
                best = loaders[fastest].work
    chosen = {row["knob"]: getattr(best.data, row["knob"]) for row in rows}
    table = [["knob", "value", "img/s", ""]]
    for row in rows:
        mark = "<-" if chosen[row["knob"]] == row["value"] else ""
        table.append([row["knob"], str(row["value"]), f"{row['images_per_sec']:,.0f}", mark])
    print("\n" + results.columns(table))
    print(f"\n{yaml.safe_dump({'data': chosen}, sort_keys=False)}", end="")
    results.write(output, "tune", {"settings": asdict(settings), "tried": rows, "best": chosen})


def knobs(work: Work) -> dict[str, list[Any]]:
    """Returns the values to try for each setting, including the value that `work` has.

    cache=encoded is left out: it helps when files are slow to read, but here all files are in the
    page cache.
    """
    threads = work.threads
    tried: dict[str, list[Any]] = {
        "decode_threads": sorted({max(1, threads // 2), threads, threads + threads // 2 + 1}),
        "read_threads": [2, 8, 16],
        "prefetch_batches": [1, 2, 4],
    }
    ways: dict[str, list[Any]] = {"decode": ["auto", "image"]}  # on a CPU, auto means "window"
    if work.device == "cuda":
        ways["decode"].append("window")
        ways["hw_decoder_load"] = [None, 0.0, 0.5, 0.8, 1.0]
    for knob, values in ways.items():
        tried[knob] = [value for value in values if _is_sound(work, knob, value)]
    memory = os.statvfs(SHARED_MEMORY)
    pixels = 3 * int(index_of(work).sizes.astype(int).prod(axis=1).sum())
    if pixels < memory.f_bavail * memory.f_frsize / 2:
        tried["cache"] = ["none", "decoded"]
    return tried


def _is_sound(work: Work, knob: str, value: Any) -> bool:
    """Returns whether images can be decoded this way; False if the probe of this GPU's decoders
    found the way to be broken."""
    changed = replace(work, data=replace(work.data, **{knob: value}))
    try:
        agreed_decoding(changed.config, changed.world)
    except UserError:
        return False
    return True


def photo_count(folder: Path) -> int:
    return sum(1 for _ in (folder / "train").glob("*/*"))

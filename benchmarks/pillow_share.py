"""Measures what images cost the loader that Pillow decodes in place of DALI.

    python benchmarks/pillow_share.py PHOTOS [--rounds 9] [--threads 2] [--output FILE]

PHOTOS: a folder of JPEGs. Each loader reads the same photos; a share of them gets an EXIF block
whose prefix is doubled, which changes nothing but that Pillow must decode them. The loaders run in
turn, each in a process of its own. A figure is the median of the rounds, and a ratio is the median
of the ratios within a round.
"""

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median

from resnet_dist.bench import results
from resnet_dist.bench.peers.loaders import Work, ours
from resnet_dist.config import DataConfig
from resnet_dist.data.index.listing import images_below
from resnet_dist.data.index.plain import JPEG_SIGNATURE
from resnet_dist.process import set_up_process

SHARES_PCT = (0, 1, 10, 100)
BATCH_SIZE, WARM_BATCHES, BATCHES = 64, 6, 40
EXIF = b"Exif\0\0" * 2 + b"II" + struct.pack("<HIHHHIIxxxx", 42, 8, 1, 0x0112, 3, 1, 1)


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("photos", type=Path, metavar="PHOTOS")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=results.cores(), help="to decode with")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--measure", action="store_true", help="PHOTOS is one of the folders")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.photos, given.threads)))
        return
    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as name:
        roots = [Path(name, f"{share}") for share in SHARES_PCT]
        for root, share in zip(roots, SHARES_PCT, strict=True):
            write_photos(given.photos, root, share)
        options = ["--measure", "--threads", str(given.threads)]
        runs = [
            [
                json.loads(
                    subprocess.run(
                        [sys.executable, __file__, str(root), *options],
                        check=True,
                        stdout=subprocess.PIPE,
                    ).stdout
                )
                for root in roots
            ]
            for _ in range(given.rounds)
        ]
    rows = [row(share, number, runs) for number, share in enumerate(SHARES_PCT)]
    for one in rows:
        print("  ".join(f"{key} {value:g}" for key, value in one.items()))
    results.write(given.output, "pillow_share", {"threads": given.threads, "shares": rows})


def write_photos(photos: Path, root: Path, share_pct: int) -> None:
    """Writes the photos to root/train, with the odd block in `share_pct` percent of them."""
    (root / "train/a").mkdir(parents=True)
    number = odd = 0
    for name in sorted(images_below(photos, "")):
        data = (photos / name).read_bytes()
        if not data.startswith(JPEG_SIGNATURE):
            continue
        number += 1
        if odd * 100 < number * share_pct:
            odd += 1
            data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(EXIF) + 2) + EXIF + data[2:]
        (root / f"train/a/{number:06}.jpg").write_bytes(data)


def measure(root: Path, threads: int) -> dict[str, float]:
    data = DataConfig(root=str(root), train_crop="random_resized", decode_threads=threads)
    batches = WARM_BATCHES + BATCHES
    work = Work(data, BATCH_SIZE * batches, BATCH_SIZE, 2 * batches, "cpu", str(root))
    stream = ours(work)
    for _ in islice(stream, WARM_BATCHES):
        pass
    began, cpu = time.perf_counter(), time.process_time()
    for _ in islice(stream, BATCHES):
        pass
    images = BATCHES * BATCH_SIZE
    return {
        "images_per_sec": images / (time.perf_counter() - began),
        "cpu_ms_per_image": 1000 * (time.process_time() - cpu) / images,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def row(share: int, number: int, runs: Sequence[Sequence[dict[str, float]]]) -> dict[str, float]:
    def middle(key: str) -> float:
        return round(median(one[number][key] for one in runs), 2)

    speed, cpu = "images_per_sec", "cpu_ms_per_image"
    return {
        "share_pct": share,
        speed: middle(speed),
        cpu: middle(cpu),
        "peak_rss_mib": middle("peak_rss_mib"),
        "speed_ratio": round(median(one[number][speed] / one[0][speed] for one in runs), 3),
        "cpu_ratio": round(median(one[number][cpu] / one[0][cpu] for one in runs), 3),
    }


if __name__ == "__main__":
    main()

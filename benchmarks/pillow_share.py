"""Measures what images cost the loader that Pillow decodes in place of DALI.

    python benchmarks/pillow_share.py PHOTOS [--runs 7] [--threads N] [--output FILE.json]

PHOTOS: a folder of JPEGs. Each loader reads the same photos; a share of them gets an EXIF block
whose prefix is doubled, which changes nothing but that Pillow must decode them.
"""

import argparse
import struct
import tempfile
from pathlib import Path
from typing import Any

from resnet_dist.bench import results
from resnet_dist.bench.peers.loaders import Work, ours
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
from resnet_dist.data.index.listing import images_below
from resnet_dist.data.index.plain import JPEG_SIGNATURE
from resnet_dist.process import set_up_process

SHARES_PCT = (0, 1, 10, 100)
BATCH_SIZE, IMAGES = 64, 2560
EXIF = b"Exif\0\0" * 2 + b"II" + struct.pack("<HIHHHIIxxxx", 42, 8, 1, 0x0112, 3, 1, 1)


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("photos", type=Path, metavar="PHOTOS")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=results.cores(), help="to decode with")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    rows = measure(given.photos, Settings(BATCH_SIZE, given.threads, IMAGES, given.runs))
    head = ["decoded by Pillow", *HEAD[:-2], "without Pillow", HEAD[-1]]
    cells = [[f"{row['share_pct']} %", *columns_of(row)] for row in rows]
    print(results.columns([head, *cells]))
    results.write(given.output, "pillow_share", {"threads": given.threads, "shares": rows})


def measure(photos: Path, settings: Settings) -> list[dict[str, Any]]:
    """Returns the figures of each share. In them, "ours" is the loader that has no odd photos."""
    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as name:
        loaders = []
        for share_pct in SHARES_PCT:
            root = Path(name, str(share_pct))
            write_photos(photos, root, share_pct)
            data = DataConfig(
                root=str(root), train_crop="random_resized", decode_threads=settings.threads
            )
            work = Work(
                data, settings.images, settings.batch_size, settings.batches, "cpu", str(root)
            )
            loaders.append(Contestant(f"{share_pct} %", ours, work))
        warm_page_cache(Path(name))
        rounds = interleave(loaders, settings)
    return [
        {"share_pct": share_pct, **summary(loader, rounds, loaders, loaders[0])}
        for share_pct, loader in zip(SHARES_PCT, loaders, strict=True)
    ]


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


if __name__ == "__main__":
    main()

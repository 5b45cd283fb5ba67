"""Makes photos of noise (500 x 375 pixels, 10 classes) that take about as long to decode as
ImageNet's. Uses all cores.

    python benchmarks/noise_photos.py FOLDER TRAIN VAL      (TRAIN, VAL: number of photos)
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10


def main(root: Path, counts: dict[str, int]) -> None:
    paths = []
    for split, count in counts.items():
        for number in range(count):
            folder = root / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{number:05}.jpg")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(make, paths, range(len(paths)), chunksize=16))
    print(f"{len(paths):,} photos")


def make(path: Path, seed: int) -> None:
    """Writes one photo: smooth noise with fine noise on top."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"train": int(sys.argv[2]), "val": int(sys.argv[3])})

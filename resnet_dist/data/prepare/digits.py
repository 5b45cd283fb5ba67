"""Writes scikit-learn's handwritten digits as an image folder: real data without a download."""

from pathlib import Path

import numpy as np
from PIL import Image

from resnet_dist.errors import UserError

DIGITS_PX = 32
VAL_EVERY = 5  # every fifth image of a class goes to val


def write_digits(root: Path) -> tuple[int, int]:
    """Writes 1,797 real 8x8 digits (Alpaydin & Kaynak 1998) as 32x32 PNG files.

    root/train/<digit>/*.png and root/val/<digit>/*.png. Returns (train images, val images).
    Images that exist are not written again.

    Raises:
        UserError: the folder cannot be written.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this verb needs it

    bunch = load_digits()
    counts = {"train": 0, "val": 0}
    seen = [0] * 10
    try:
        for image, label in zip(bunch.images, bunch.target, strict=True):
            split = "val" if seen[label] % VAL_EVERY == 0 else "train"
            path = root / split / str(label) / f"{seen[label]:03}.png"
            seen[label] += 1
            counts[split] += 1
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                grey = np.round(image * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
                size = (DIGITS_PX, DIGITS_PX)
                fresh = path.with_name(f".{path.name}")  # renamed when complete
                Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).save(fresh)
                fresh.rename(path)
    except OSError as error:
        raise UserError(f"{root}: cannot be written: {error.strerror}") from None
    return counts["train"], counts["val"]

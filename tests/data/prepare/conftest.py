"""The photos of which the tests of `prepare` make their sources."""

import pytest

from tests.support.sources import SYNSETS, Photos, photo


@pytest.fixture(scope="module")
def photos() -> Photos:
    """13 train and 6 val images. An empty one, a torn header, a PNG named JPEG, a CMYK JPEG."""
    train = {
        (synset, f"{synset}_{n}.JPEG"): photo(10 * label + n)
        for label, synset in enumerate(SYNSETS)
        for n in range(4 + (label == 0))
    }
    train[SYNSETS[0], "n01440764_1.JPEG"] = b""
    train[SYNSETS[1], "n01443537_2.JPEG"] = photo(3)[:40]
    train[SYNSETS[1], "n01443537_3.JPEG"] = photo(4, "PNG")
    train[SYNSETS[2], "n02123045_0.JPEG"] = photo(5, mode="CMYK")
    val = {(SYNSETS[n % 3], f"ILSVRC2012_val_{n + 1:08}.JPEG"): photo(100 + n) for n in range(6)}
    return {"train": dict(sorted(train.items())), "val": dict(sorted(val.items()))}

"""The mean image of the training set: by hand, and the same bits on any number of ranks."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist import distributed
from resnet_dist.config import Config
from resnet_dist.data.load.build import load_index
from resnet_dist.data.load.mean_image import mean_image
from resnet_dist.errors import UserError
from resnet_dist.job import Job, build
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.train import train
from tests.support.multirank import run_ranks


def mean_or_error(rank: int, world_size: int, config: Config) -> str:
    world = distributed.start()
    try:
        mean_image(load_index(config, "train", world), config, world)
    except UserError as error:
        return str(error)
    return "made"


def test_a_rank_with_too_many_bad_images_tells_the_others(
    tiny_config: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "data")
    (tmp_path / "data/train/class2/7.jpg").write_bytes(b"")  # of the last rank's part
    config = tiny_config(
        f"data.root={tmp_path}/data", "data.per_pixel_mean=true", "data.max_bad_samples=0"
    )
    said = run_ranks(mean_or_error, 2, config, init_process_group=False)
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: more than data.max_bad_samples=0 images cannot be read")


def mean_of(rank: int, world_size: int, config: Config) -> np.ndarray | None:
    world = distributed.start()
    return mean_image(load_index(config, "train", world), config, world)


def test_of_a_folder_by_hand_and_on_any_world(
    tiny_config: Callable[..., Config], tiny_folder: Path
) -> None:
    means = {}
    for world_size in (1, 2, 3):
        config = tiny_config(
            "data.per_pixel_mean=true",
            "data.eval_resize_px=40",
            "train.max_local_batch_size=4",
        )
        ranks = run_ranks(mean_of, world_size, config, init_process_group=False)
        assert all(np.array_equal(mean, ranks[0]) for mean in ranks)
        means[world_size] = ranks[0]
    assert np.array_equal(means[1], means[2])
    assert np.array_equal(means[1], means[3])

    total, paths = np.zeros((32, 32, 3)), sorted((tiny_folder / "train").rglob("*.jpg"))
    for path in paths:
        with Image.open(path) as image:
            width, height = image.size
            scale = min(width, height) / 40
            new_width, new_height = 40 * width // min(width, height), 40 * height // min(image.size)
            left, top = round((new_width - 32) / 2), round((new_height - 32) / 2)
            x, y = width / new_width, height / new_height
            box = (left * x, top * y, (left + 32) * x, (top + 32) * y)
            assert scale > 0
            total += np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, box=box))
    assert np.abs(means[1] * 255 - total / len(paths)).max() < 0.6  # Pillow rounds each image twice


def mean_in(job: Job) -> np.ndarray:
    assert job.facts.mean_image is not None
    return job.facts.mean_image.numpy()


def test_a_resumed_run_keeps_its_own(
    tiny_config: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    """Files of the same names and pixel sizes, but other pixels: their mean is not this run's."""
    root = tmp_path / "data"
    shutil.copytree(tiny_folder, root)
    config = tiny_config(f"data.root={root}", "data.per_pixel_mean=true", "train.epochs=1")
    train(config, "test", Interrupt())
    kept = mean_in(build(config, distributed.start()))
    for path in (root / "train").rglob("*.jpg"):
        with Image.open(path) as image:
            Image.new("RGB", image.size, "white").save(path)
    with pytest.raises(UserError, match="different training images in bytes"):
        build(config, distributed.start())
    again = mean_in(build(config, distributed.start(), resume_anyway=True))
    fresh = mean_in(build(replace(config, name="fresh"), distributed.start()))
    assert kept is not None
    assert again is not None
    assert fresh is not None
    assert np.array_equal(again, kept)
    assert fresh.min() == pytest.approx(1, abs=1e-5)


def test_none_where_none_is_wanted(tiny_config: Callable[..., Config]) -> None:
    assert mean_of(0, 1, tiny_config()) is None


def test_of_raw_pixels(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        records = rng.integers(0, 256, (7, 3073), np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / f"data_batch_{number}.bin")
    cifar = ["data.format=cifar10", f"data.root={tmp_path}", "data.train_crop=pad"]
    config = tiny_config(*cifar, "data.per_pixel_mean=true", "data.holdout_images=5")
    world = distributed.start()
    index = load_index(config, "train", world)
    assert len(index) == 30
    assert len(load_index(config, "val", world)) == 5
    mean = mean_image(index, config, world)
    assert mean is not None
    assert index.pixels is not None
    assert mean == pytest.approx(index.pixels.astype(float).mean(0) / 255, abs=1e-7)

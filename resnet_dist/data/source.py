"""A config's data set, opened: the index of a split, its mean image, and the loader over it."""

from pathlib import Path

import numpy as np

from resnet_dist.config import Config
from resnet_dist.data.dali import Loader
from resnet_dist.data.index import Index, build_index
from resnet_dist.data.order import holdout
from resnet_dist.distributed import World
from resnet_dist.precision import DTYPES


def load_index(config: Config, split: str, world: World) -> Index:
    """The index of "train" or "val", the same on every rank. A collective.

    Folders are walked by rank 0 alone, CIFAR's files are read by each rank. With
    data.holdout_images, both splits are parts of the training images.

    Raises:
        UserError: what `build_index` raises, or fewer images than data.holdout_images.
    """
    root, cache = Path(config.data.root), config.run_dir.parent / ".index"
    held = config.data.holdout_images
    source = "train" if held else split
    if config.data.format == "folder":
        index = world.on_main(lambda: build_index("folder", root, source, cache))
    else:
        index = world.on_all(lambda: build_index(config.data.format, root, source, None))
    if not held:
        return index
    held = config.held_out_of(len(index))
    return index.take(holdout(len(index), held)[split == "val"])


def make_loader(
    index: Index, config: Config, world: World, mean_image: np.ndarray | None = None
) -> Loader:
    """Batches of at most train.max_local_batch_size images. mean_image: in place of data.mean."""
    return Loader(
        index,
        mean=config.data.mean if mean_image is None else mean_image,
        std=config.data.std,
        device=world.device,
        dtype=DTYPES[config.train.precision],
        max_batch_size=config.train.max_local_batch_size,
        num_threads=config.data.decode_threads,
    )

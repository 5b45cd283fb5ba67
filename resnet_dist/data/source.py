"""A config's data set, opened: the index of a split and the loader over it."""

from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.data.dali import Loader
from resnet_dist.data.index import Index, build_index
from resnet_dist.distributed import World
from resnet_dist.precision import DTYPES


def load_index(config: Config, split: str, world: World) -> Index:
    """The index of "train" or "val", the same on every rank. A collective.

    Folders are walked by rank 0 alone, CIFAR's files are read by each rank.
    """
    root, cache = Path(config.data.root), config.run_dir.parent / ".index"
    if config.data.format == "folder":
        return world.on_main(lambda: build_index("folder", root, split, cache))
    return world.on_all(lambda: build_index(config.data.format, root, split, None))


def make_loader(index: Index, config: Config, world: World, output_px: int) -> Loader:
    """Batches of at most train.max_local_batch_size images of output_px x output_px pixels."""
    return Loader(
        index,
        output_px=output_px,
        mean=config.data.mean,
        std=config.data.std,
        device=world.device,
        dtype=DTYPES[config.train.precision],
        max_batch_size=config.train.max_local_batch_size,
        num_threads=config.data.decode_threads,
    )

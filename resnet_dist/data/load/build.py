"""Builds what a config says about data: the index of a split, the way of decoding, the loader."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from resnet_dist.config import Config, DataConfig
from resnet_dist.data.formats import FORMATS
from resnet_dist.data.index.index import Index, set_aside, without
from resnet_dist.data.index.quarantine import read_quarantine
from resnet_dist.data.load.cache import DecodedCache, EncodedCache
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.decoding import (
    BROKEN,
    HOST,
    Decoding,
    Report,
    allowed_ways,
    choose,
    is_probed,
)
from resnet_dist.data.load.nodes import agreed_index
from resnet_dist.data.load.probe import report_of, versions_of
from resnet_dist.data.load.reader import Reader
from resnet_dist.data.view.order import holdout, slice_of
from resnet_dist.distributed import World
from resnet_dist.precision import DTYPES

T = TypeVar("T")
DECODED_TOGETHER = 32
MAX_DECODE_THREADS = 16


def load_index(config: Config, split: str, world: World) -> Index:
    """Returns the index of "train" or "val", the same on every rank. A collective.

    Each node must have the same data as rank 0. Images in the data's quarantine are in the index's
    `bad`. With data.holdout_images, both splits are taken from the training images.

    Raises:
        UserError: what `agreed_index` raises, or there are fewer images than data.holdout_images.
    """
    root, cache = Path(config.data.root), _kept_in(config)
    holdout_images = config.data.holdout_images
    with world.patiently(f"data index, {split}") as patient:
        index = agreed_index(
            config.data.format, root, "train" if holdout_images else split, cache, patient
        )
    index = without(index, world.on_main(lambda: set_aside(index, root, read_quarantine(root))))
    if not holdout_images:
        return index
    holdout_images = config.holdout_images_of(len(index))
    return index.take(holdout(len(index), holdout_images)[split == "val"])


def agreed_decoding(
    config: Config, world: World, recorded: str | None = None
) -> tuple[Decoding, str]:
    """Chooses how images are decoded, the same on every rank. Returns it and the reason.

    On a GPU it is the fastest way that the config allows and that works correctly on each kind of
    machine in the world. One rank per kind of machine reads the probe's report, which is kept next
    to the indexes, or probes now. recorded: the way that the run has used so far. It is kept, and
    no other is probed, unless it is broken here. A collective.

    Raises:
        UserError: the config demands a way that the probe found broken.
    """
    if not _decodes_on_gpu(config, world.device):
        extent = "window" if config.data.decode == "auto" else config.data.decode
        return Decoding(extent), "the CPU's decoder"
    if recorded == str(HOST) and is_probed(config):
        return HOST, "as before in this run"
    kind = json.dumps(versions_of(world.device))
    say = partial(print, file=sys.stderr, flush=True)

    def reports_of(ways: list[Decoding]) -> list[Report]:
        probe = partial(report_of, world.device, _kept_in(config), say, ways)
        return once_per_kind(kind, probe, world)

    ways = allowed_ways(config)
    before = [way for asked, way in ways.items() if str(asked) == recorded]
    reports = reports_of(before or list(ways.values()))
    if any(report[str(way)].verdict in BROKEN for report in reports for way in before):
        reports = reports_of(list(ways.values()))
    return choose(config, reports, recorded)


def once_per_kind(kind: str, make: Callable[[], T], world: World) -> list[T]:
    """Calls `make` on the first rank of each kind of machine; returns the results on every rank.

    kind: the kind of this rank's machine. A collective; raises what `World.on_all` raises.
    """
    kinds = world.gather(kind)
    is_first = kinds.index(kind) == world.rank
    made = world.gather(world.on_all(lambda: [make()] if is_first else []))
    return [one for some in made for one in some]


def _kept_in(config: Config) -> Path:
    """The folder of indexes and probe reports, which take long to make."""
    return config.run_dir.parent / ".index"


def make_loader(
    index: Index,
    config: Config,
    world: World,
    mean_image: np.ndarray | None = None,
    decoding: Decoding | None = None,
) -> Loader:
    """Returns a loader for batches of at most train.max_local_batch_size images. A collective.

    mean_image: replaces data.mean. decoding: None means agreed_decoding's. It is a collective
    because the ranks of a node share data.cache.

    Raises:
        UserError: data.cache does not fit in memory, or what `agreed_decoding` raises.
    """
    data = config.data
    if decoding is None:
        decoding, _ = agreed_decoding(config, world)
    if data.decode_threads is None:
        cores = len(os.sched_getaffinity(0)) // world.local_size
        data = replace(data, decode_threads=min(max(1, cores), MAX_DECODE_THREADS))
    reader: Reader | DecodedCache | None = None
    if data.cache != "none":
        # This may take a while: memory for all images is reserved, and perhaps filled.
        with world.patiently(f"data.cache={data.cache}") as patient:
            if data.cache == "decoded":
                reader = _decoded_cache(index, data, patient)
            else:
                assert index.nbytes is not None
                reader = Reader(index, data.read_threads, EncodedCache(index.nbytes, patient))
    return Loader(
        index,
        data,
        device=world.device,
        dtype=DTYPES[config.train.precision],
        max_batch_size=config.train.max_local_batch_size,
        mean_image=mean_image,
        reader=reader,
        decoding=decoding,
    )


def _decodes_on_gpu(config: Config, device: torch.device) -> bool:
    is_pixels = FORMATS[config.data.format].is_pixels or config.data.cache == "decoded"
    return device.type == "cuda" and not is_pixels


def _decoded_cache(index: Index, data: DataConfig, world: World) -> DecodedCache:
    """Returns a cache of all images; the ranks of each node decode a share of them each."""
    cache = DecodedCache(index, world)
    mine = slice_of(np.arange(len(index)), world.local_rank, world.local_size)
    samples = mine[(index.sizes[mine] > 0).all(axis=1)]
    batches = [samples[i : i + DECODED_TOGETHER] for i in range(0, len(samples), DECODED_TOGETHER)]
    loader = Loader(
        index,
        data,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_batch_size=DECODED_TOGETHER,
    )

    def fill() -> None:
        for sample, pixels in loader.decoded(batches):
            cache.put(sample, pixels)

    world.on_all(fill)
    return cache

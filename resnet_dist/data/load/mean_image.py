"""The mean image of the training set, for data.per_pixel_mean.

He et al. 2015, sections 3.4 and 4.2, after Krizhevsky et al. 2012.
"""

from dataclasses import replace

import numpy as np
import torch

from resnet_dist.config import Config
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.build import make_loader
from resnet_dist.data.view.augment import Request, center_windows
from resnet_dist.data.view.order import slice_of
from resnet_dist.distributed import World

MAX_IMAGES = 50_000  # evenly spaced: a standard error of about 64 / sqrt(50,000) = 0.3 grey levels
FIXED_POINT = 2**20  # sums of integers do not depend on their order, so not on the number of ranks


def mean_image(index: Index, config: Config, world: World) -> np.ndarray | None:
    """Returns the mean of the training images' central crops, or None if it is not wanted.

    float32 [crop_px, crop_px, 3] on the 0..1 scale, with the same bits on any number of ranks. For
    ImageNet it takes seconds to a minute at the first start of a run; after that it is in the
    checkpoint. A collective.
    """
    if not config.data.per_pixel_mean:
        return None
    if index.pixels is not None:
        return (index.pixels.mean(axis=0, dtype=np.float64) / 255).astype(np.float32)
    data, px, batch = config.data, config.data.crop_px, config.train.max_local_batch_size
    count = min(len(index), MAX_IMAGES)
    samples = np.arange(count) * len(index) // count
    mine = slice_of(samples, world.rank, world.size)
    plain = replace(data, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), cache="none")
    exact = replace(config.train, precision="fp32")
    loader = make_loader(index, replace(config, data=plain, train=exact), world)
    batches = (mine[start : start + batch] for start in range(0, len(mine), batch))
    requests = (
        Request(numbers, center_windows(index.sizes[numbers], data.eval_resize_px, px))
        for numbers in batches
    )
    total = torch.zeros(3, px, px, dtype=torch.int64, device=world.device)
    readable = torch.zeros((), dtype=torch.int64, device=world.device)

    def add_up() -> None:
        for loaded in loader.batches(requests):
            is_real = loaded.labels >= 0
            images = loaded.images * FIXED_POINT * is_real[:, None, None, None]
            total.add_(images.round().to(torch.int64).sum(dim=0))
            readable.add_(is_real.sum())

    with world.patiently("mean image") as patient:
        patient.on_all(add_up)
    mean = world.sum(total).double() / (FIXED_POINT * world.sum(readable))
    return mean.permute(1, 2, 0).float().cpu().numpy()  # CPU-GPU sync point

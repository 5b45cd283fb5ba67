"""Measures layer responses: the standard deviation of each layer's output in a trained network
(He et al. 2015, section 4.2, figure 7)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnet_dist import distributed
from resnet_dist.config import Config
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.build import make_loader
from resnet_dist.data.load.dali import Batch
from resnet_dist.data.view.augment import Request, eval_windows
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.models.residual import shortcut_modules
from resnet_dist.precision import autocast
from resnet_dist.verbs.evaluate import val_index
from resnet_dist.verbs.trained import load_trained


@dataclass(frozen=True)
class Responses:
    """The layer responses of one checkpoint."""

    name: str
    images: int  # number of images measured
    stds: dict[str, float]  # name of a layer's BN -> standard deviation, in forward order


def analyze_responses(
    paths: Sequence[Path], overrides: list[str], images: int | None
) -> list[Responses]:
    """Measures the responses of checkpoints to the validation images of their configs.

    Runs in a single process. images: number of images to use, evenly spaced over the classes; None:
    all. Checkpoints are named after their runs, or by their paths if two of the names are the same.

    Raises:
        UserError: no such checkpoint, its classes differ from the data's, or the network has no BN.
            Raised before anything is measured.
    """
    if not paths:
        raise UserError("command line: no checkpoint; give a folder such as RUN/checkpoints/best")
    world = distributed.start_alone("analyze responses")
    # Loads all checkpoints first, so that an error in the last one shows up before the first one is
    # measured, which takes minutes.
    loaded = []
    for path in paths:
        trained = load_trained(path, overrides, world)
        if not main_path_norms(trained.network):
            name = trained.config.model.name
            raise UserError(f"{path}: {name} has no BN layers to measure; leave it out")
        loaded.append((trained, val_index(trained, path, world)))
    names = [trained.config.name for trained, _ in loaded]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    measured = []
    for name, (trained, index) in zip(names, loaded, strict=True):
        config, count = trained.config, min(images or len(index), len(index))
        loader = make_loader(index, config, world, trained.mean_image, trained.decoding(world))
        batches = loader.batches(_requests(config, index, count))
        stds = layer_stds(trained.network, batches, world, config.train.precision)
        measured.append(Responses(name, count, stds))
    return measured


@torch.inference_mode()
def layer_stds(
    model: nn.Module, batches: Iterable[Batch], world: World, precision: str
) -> dict[str, float]:
    """Returns name of a layer's BN -> standard deviation of its output, in forward order.

    This is the population standard deviation over all images, channels and pixels, in evaluation
    mode, before the nonlinearity and the addition.
    """
    sums: dict[str, Tensor] = {}  # [3] float64: sum, sum of squares, count

    def add(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        values = output.double()  # a copy, because an in-place ReLU follows
        count = torch.full_like(values[0, 0, 0, 0], values.numel())
        batch_sums = torch.stack([values.sum(), values.square().sum(), count])
        sums[name] = sums[name] + batch_sums if name in sums else batch_sums

    hooks = [
        norm.register_forward_hook(partial(add, name))
        for name, norm in main_path_norms(model).items()
    ]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            with autocast(world.device, precision):
                model(batch.images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    total, squares, count = torch.stack(list(sums.values())).unbind(1)
    variances = squares / count - (total / count).square()
    # CPU-GPU sync point
    return dict(zip(sums, variances.clamp(min=0).sqrt().tolist(), strict=True))


def main_path_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Returns name -> BN, one per convolution, except for projections in shortcuts, which the paper
    does not count as layers."""
    shortcuts = shortcut_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module not in shortcuts
    }


def describe_responses(measured: Sequence[Responses]) -> str:
    """Formats a table with a row per checkpoint."""
    rows = [("checkpoint", "layers", "images", "mean std", "median std", "smallest", "largest")]
    for responses in measured:
        stds = responses.stds
        low, high = min(stds, key=stds.__getitem__), max(stds, key=stds.__getitem__)
        rows.append(
            (
                responses.name,
                f"{len(stds)}",
                f"{responses.images:,}",
                f"{fmean(stds.values()):.4f}",
                f"{median(stds.values()):.4f}",
                f"{stds[low]:.4f} {low}",
                f"{stds[high]:.4f} {high}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _requests(config: Config, index: Index, count: int) -> Iterator[Request]:
    """Yields requests for `count` images, evenly spaced because the index is sorted by class."""
    chosen = np.arange(count) * len(index) // count
    for start in range(0, count, config.train.max_local_batch_size):
        samples = chosen[start : start + config.train.max_local_batch_size]
        yield Request(samples, eval_windows(config.data, index.sizes[samples]))

"""BN statistics taken after training, over many images, in place of the moving averages.

He et al.'s released models hold such (github.com/KaimingHe/deep-residual-networks, "Disclaimer and
known issues": an average over a large training batch after training, not a moving one). Wu &
Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3: precise BN.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resnet_dist.data.load.build import load_index, make_loader
from resnet_dist.data.view.order import epoch_order, slice_of
from resnet_dist.data.view.requests import train_request
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.models.parts import parts
from resnet_dist.precision import autocast
from resnet_dist.verbs.trained import Trained


@torch.no_grad()
def recalibrate(trained: Trained, images: int, world: World) -> None:
    """Gives each BN layer that was trained, not frozen, the mean and variance of its inputs over
    `images` training images.

    The images are the first of epoch 0, as training sees them. Each batch is normalized by itself,
    as in training; the statistics of the batches are then joined exactly. Every rank calls it, and
    gets the same bits on any number of ranks.

    Raises:
        UserError: a network without BN, more images than there are, or too few for a variance.
    """
    config, network = trained.config, trained.network
    layers = _layers(network, config.optim.lr_scales)
    if not layers:
        raise UserError(f"--recalibrate-bn: {config.model.name} trains no BN; leave it out")
    index = load_index(config, "train", world)
    if images > len(index):
        raise UserError(
            f"--recalibrate-bn {images}: {config.data.root} has {len(index)} training images; "
            "give at most these"
        )
    samples = epoch_order(config.seed, 0, len(index))[:images]
    count = -(-images // config.train.max_local_batch_size)
    # Of nearly one size, as each is normalized by itself; the same ones for any number of ranks.
    slices = [slice_of(samples, number, count) for number in range(count)]
    if len(slices[0]) < 2:  # the smallest; a map of one pixel then is a single value
        raise UserError(
            "--recalibrate-bn: a batch of one image has no variance; give more images, or a larger "
            "train.max_local_batch_size"
        )
    requests = (train_request(config, index, 0, p) for p in slices[world.rank :: world.size])
    loader = make_loader(index, config, world, trained.mean_image, trained.decoding(world))
    batches = loader.batches(requests)

    channels = [layer.num_features for layer in layers]
    total = torch.zeros(3, sum(channels), dtype=torch.float64, device=world.device)
    with _normalizing_by_batch(network, layers) as seen:
        for first in range(0, count, world.size):
            # A row per rank, zero but for our own: the sum over the ranks is exact.
            rows = total.new_zeros(world.size, *total.shape)
            batch = world.on_all(lambda: next(batches, None))
            if batch is not None:
                with autocast(world.device, config.train.precision):
                    network(batch.images)
                rows[world.rank] = torch.cat([seen[layer] for layer in layers], dim=1)
            for row in world.sum(rows)[: count - first]:  # in the order of the batches
                total = _joined(total, row)
    for layer, (values, mean, squares) in zip(layers, total.split(channels, dim=1), strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(squares / (values - 1))  # unbiased, as torch keeps it
        layer.num_batches_tracked.fill_(count)


@contextmanager
def _normalizing_by_batch(
    network: nn.Module, layers: list[nn.BatchNorm2d]
) -> Iterator[dict[nn.Module, Tensor]]:
    """`layers` normalize as in training, all else (dropout) is as in evaluation.

    Yields what each layer was given in the last forward pass: see `_statistics`.
    """
    seen: dict[nn.Module, Tensor] = {}

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen[layer] = _statistics(*inputs)

    network.eval()
    hooks = [layer.train().register_forward_pre_hook(look) for layer in layers]
    try:
        yield seen
    finally:
        network.eval()
        for hook in hooks:
            hook.remove()


def _layers(network: nn.Module, lr_scales: dict[str, float]) -> list[nn.BatchNorm2d]:
    """All BN layers but those of frozen parts, whose statistics training left as they were."""
    frozen = {
        layer
        for name, modules in parts(network).items()
        if lr_scales.get(name) == 0
        for module in modules
        for layer in module.modules()
    }
    layers = (layer for layer in network.modules() if layer not in frozen)
    return [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]


def _statistics(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> float64 [3, C]: how many values, their mean, sum of squares about it."""
    values = x.numel() // x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    var, mean = var.double(), mean.double()
    return torch.stack([torch.full_like(mean, values), mean, values * var])


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Chan, Golub & LeVeque 1979: the statistics of both parts, from those of each."""
    count, delta = a[0] + b[0], b[1] - a[1]
    share = b[0] / count
    return torch.stack([count, a[1] + delta * share, a[2] + b[2] + delta.square() * a[0] * share])

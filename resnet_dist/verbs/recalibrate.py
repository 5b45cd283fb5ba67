"""Recomputes BN statistics over many images after training, to replace the moving averages.

He et al.'s released models have such statistics (github.com/KaimingHe/deep-residual-networks,
"Disclaimer and known issues": an average over a large training batch after training, not a moving
average). Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3, call
this precise BN.
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
    """Sets the running statistics of each BN layer that was not frozen to the mean and variance of
    its inputs over `images` training images. A collective.

    The images are the first ones of epoch 0, augmented as in training. Each batch is normalized by
    its own statistics, as in training, and the statistics of all batches are then combined exactly.
    The result is bit for bit the same for any number of ranks.

    Raises:
        UserError: the network trains no BN, there are fewer training images than `images`, or there
            are too few to compute a variance.
    """
    config, network = trained.config, trained.network
    layers = _layers(network, config.optim.lr_scales)
    if not layers:
        raise UserError(f"--recalibrate-bn: {config.model.name} trains no BN; leave it out")
    index = load_index(config, "train", world)
    if images > len(index):
        raise UserError(
            f"--recalibrate-bn {images}: {config.data.root} has {len(index)} training images; "
            "give at most that many"
        )
    samples = epoch_order(config.seed, 0, len(index))[:images]
    count = -(-images // config.train.max_local_batch_size)
    # The batches have nearly the same size, because each is normalized by its own statistics. They
    # do not depend on the number of ranks.
    slices = [slice_of(samples, number, count) for number in range(count)]
    # slices[0] is the smallest. With one image, a map of one pixel has a single value per channel.
    if len(slices[0]) < 2:
        raise UserError(
            "--recalibrate-bn: a batch of one image has no variance; give more images or a larger "
            "train.max_local_batch_size"
        )
    requests = (train_request(config, index, 0, p) for p in slices[world.rank :: world.size])
    loader = make_loader(index, config, world, trained.mean_image, trained.decoding(world))
    batches = loader.batches(requests)

    channels = [layer.num_features for layer in layers]
    total = torch.zeros(3, sum(channels), dtype=torch.float64, device=world.device)
    with _normalizing_by_batch(network, layers) as seen:
        for first in range(0, count, world.size):
            # One row per rank. Each rank fills in only its own, so the sum over the ranks is exact.
            rows = total.new_zeros(world.size, *total.shape)
            batch = world.on_all(lambda: next(batches, None))
            if batch is not None:
                with autocast(world.device, config.train.precision):
                    network(batch.images)
                rows[world.rank] = torch.cat([seen[layer] for layer in layers], dim=1)
            for row in world.sum(rows)[: count - first]:  # in the order of the batches
                total = _combined(total, row)
    for layer, (values, mean, squares) in zip(layers, total.split(channels, dim=1), strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(squares / (values - 1))  # unbiased, like torch's running variance
        layer.num_batches_tracked.fill_(count)


@contextmanager
def _normalizing_by_batch(
    network: nn.Module, layers: list[nn.BatchNorm2d]
) -> Iterator[dict[nn.Module, Tensor]]:
    """Puts `layers` into training mode, and everything else, such as dropout, into eval mode.

    Yields a dict that holds the `_statistics` of each layer's input in the last forward pass.
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
    """Returns all BN layers except those in frozen parts, whose statistics training did not
    change."""
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
    """Returns float64 [3, C] for x [B, C, H, W]: number of values, mean, sum of squared deviations
    from the mean."""
    values = x.numel() // x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    var, mean = var.double(), mean.double()
    return torch.stack([torch.full_like(mean, values), mean, values * var])


def _combined(a: Tensor, b: Tensor) -> Tensor:
    """Combines the `_statistics` of two sets of values (Chan, Golub & LeVeque 1979)."""
    count, delta = a[0] + b[0], b[1] - a[1]
    share = b[0] / count
    return torch.stack([count, a[1] + delta * share, a[2] + b[2] + delta.square() * a[0] * share])

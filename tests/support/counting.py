"""Counts the size of a network: its parameters, and its multiply-adds as the paper counts them."""

import torch
from torch import nn

from resnet_dist.models.residual import shortcut_modules


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_layers(model: nn.Module) -> int:
    """Returns the depth in a network's name: its convolutions and linear layers, except on
    shortcuts."""
    weighted = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return len(set(weighted) - shortcut_modules(model))


def count_multiply_adds(model: nn.Module, px: int) -> int:
    """Counts the multiply-adds for one px x px image in all convolutions and linear layers.

    These are the "FLOPs" of He et al. 2015, table 1. Projections on shortcuts are counted; BN,
    biases, activations, pooling and additions are not. The model may be on the meta device.
    """
    total = 0

    def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        # A layer uses each of its weights once per output pixel: weights x (H_out * W_out).
        total += module.weight.numel() * output[0, 0].numel()  # type: ignore[operator]

    hooks = [
        module.register_forward_hook(add)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(torch.empty(1, 3, px, px, device=device))
    for hook in hooks:
        hook.remove()
    return total

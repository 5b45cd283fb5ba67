"""The size of a network: its parameters, and its multiply-adds as the paper counts them."""

import torch
from torch import nn

from resnet_dist.models.build import build_model
from resnet_dist.models.depths import DEPTHS
from resnet_dist.models.residual import shortcut_modules

INPUT_PX = {"imagenet": 224, "vgg": 224, "cifar": 32}
NUM_CLASSES = {"imagenet": 1000, "vgg": 1000, "cifar": 10}


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


def table_of_networks() -> str:
    """Returns a table with a line for each network in DEPTHS."""
    lines = [f"{'network':<14}{'layers':>7}{'input':>7}{'parameters':>13}{'multiply-adds':>18}"]
    for name, net in DEPTHS.items():
        with torch.device("meta"):
            model = build_model(name, NUM_CLASSES[net.form]).eval()
        px = INPUT_PX[net.form]
        lines.append(
            f"{name:<14}{count_layers(model):>7}{px:>7}{count_parameters(model):>13,}"
            f"{count_multiply_adds(model, px):>18,}"
        )
    return "\n".join(lines)

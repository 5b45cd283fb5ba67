"""The optimizer: parameter groups by structure, SGD."""

import torch
from torch import nn

from resnet_dist.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """SGD with momentum. Its lr is set before each step from `Plan.lr_at`.

    PyTorch multiplies the lr at the update (v = m*v + g; w -= lr*v), so a changing lr needs no
    momentum correction (Goyal et al. 2017, remark 2).
    """
    weights = [p for p in model.parameters() if p.ndim >= 2]
    norms_and_biases = [p for p in model.parameters() if p.ndim < 2]
    norm_decay = optim.weight_decay if optim.decay_norm_and_bias else 0.0
    return torch.optim.SGD(
        [
            {"params": weights, "weight_decay": optim.weight_decay},
            {"params": norms_and_biases, "weight_decay": norm_decay},
        ],
        lr=0.0,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr

"""The optimizer: SGD, with parameter groups that follow from the network's structure."""

from typing import Any

import torch
from torch import nn

from resnet_dist.config import OptimConfig
from resnet_dist.models.parts import parts

KERNELS = ("fused", "foreach", "capturable")  # settings of an optimizer that choose its kernels


def build_optimizer(
    model: nn.Module, optim: OptimConfig, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Returns SGD with momentum. Its lr is set before each step, from `Plan.lr_at`.

    For each factor in optim.lr_scales there are two parameter groups: weights, and norms with
    biases, which may have a different weight decay. Frozen parameters are left out, as weight decay
    would change them.

    PyTorch applies the lr at the update (v = m*v + g; w -= lr*v), so a change of the lr needs no
    momentum correction (Goyal et al. 2017, remark 2).

    fused: use torch's fused kernels, which take a few launches per step, and in fp16 do not make
    the host wait to know whether gradients have overflowed. None: use them on a GPU.
    """
    scales = {
        parameter: optim.lr_scales.get(name, 1.0)
        for name, modules in parts(model).items()
        for module in modules
        for parameter in module.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    norm_decay = optim.weight_decay if optim.decay_norm_and_bias else 0.0
    groups = []
    for scale in dict.fromkeys(scales.get(p, 1.0) for p in trained):
        same = [p for p in trained if scales.get(p, 1.0) == scale]
        weights = [p for p in same if p.ndim >= 2]
        norms_and_biases = [p for p in same if p.ndim < 2]
        groups += [
            {"params": weights, "weight_decay": optim.weight_decay, "lr_scale": scale},
            {"params": norms_and_biases, "weight_decay": norm_decay, "lr_scale": scale},
        ]
    if fused is None:
        fused = all(parameter.is_cuda for parameter in trained)
    optimizer = torch.optim.SGD(
        groups, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov, fused=fused or None
    )
    _start_momentum(optimizer)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads a saved state, except for the choice of kernels, which belongs to this machine."""
    own = [{key: group[key] for key in KERNELS if key in group} for group in optimizer.param_groups]
    # Before loading, as torch goes by them when it chooses the device of a state, such as AdamW's
    # number of steps.
    groups = [group | kept for group, kept in zip(saved["param_groups"], own, strict=True)]
    optimizer.load_state_dict(saved | {"param_groups": groups})
    _start_momentum(optimizer)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Sets the momentum of a fused optimizer to zero where there is none yet.

    torch's first fused step starts from uninitialized memory and leaves it like that if fp16
    gradients overflow, which is common in the first steps; the next step would then use garbage.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group.get("momentum"):
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the lr of each parameter group: the step's lr times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]

"""The parts of a network that fine-tuning can treat differently: stem, stages, head."""

from torch import nn


def parts(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Returns the parts of a network by name, from input to output, as in optim.lr_scales.

    Each child module with parameters is a part under its own name (layer1, ..., fc; in VGG features
    and classifier), except that the layers before the first stage, conv1 and bn1, form the "stem".
    """
    children = [(name, c) for name, c in network.named_children() if list(c.parameters())]
    stages = [number for number, (_, c) in enumerate(children) if isinstance(c, nn.Sequential)]
    first = stages[0] if stages else 0
    stem = {"stem": [child for _, child in children[:first]]} if first else {}
    return stem | {name: [child] for name, child in children[first:]}


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that stays in eval mode, so that its statistics are fixed."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        return super().train(False)


def freeze(part: nn.Module) -> None:
    """Freezes parameters and BN statistics of a part, in place."""
    part.requires_grad_(False)
    for layer in part.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = FrozenBatchNorm2d  # keeps the object, as in convert_sync_batchnorm
            layer.train()


def head_name(network: nn.Module) -> str:
    """Returns the name of the layer that computes the logits: the last linear one."""
    return [n for n, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]

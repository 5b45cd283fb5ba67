"""The parts of a network that fine-tuning treats apart, and their freezing."""

from torch import nn


def parts(network: nn.Module) -> dict[str, list[nn.Module]]:
    """What optim.lr_scales may name, from the image on: the stem, the stages, the head.

    Each child that holds parameters is a part under its own name (layer1, ..., fc; of VGG features,
    classifier); the bare layers before the first stage, conv1 and bn1, are together the "stem".
    """
    children = [(name, c) for name, c in network.named_children() if list(c.parameters())]
    stages = [number for number, (_, c) in enumerate(children) if isinstance(c, nn.Sequential)]
    first = stages[0] if stages else 0
    stem = {"stem": [child for _, child in children[:first]]} if first else {}
    return stem | {name: [child] for name, child in children[first:]}


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with fixed statistics: in eval mode, whatever mode the network is put in."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        return super().train(False)


def freeze(part: nn.Module) -> None:
    """Parameters of `part` need no gradient from now on, and its BN statistics stay. In place."""
    part.requires_grad_(False)
    for layer in part.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = FrozenBatchNorm2d  # nothing to copy; see convert_sync_batchnorm
            layer.train()


def head_name(network: nn.Module) -> str:
    """The name of the layer that gives the logits: the last linear one."""
    return [n for n, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]

"""The parts of a network that fine-tuning treats differently, and how to freeze them."""

from torch import nn


def parts(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Returns a network's parts by name, from input to output: the stem, the stages, the head.

    These are the names that optim.lr_scales accepts. Each child that has parameters is a part under
    its own name (layer1, ..., fc; in VGG features, classifier). The single layers before the first
    stage, conv1 and bn1, together are the "stem".
    """
    children = [(name, c) for name, c in network.named_children() if list(c.parameters())]
    stages = [number for number, (_, c) in enumerate(children) if isinstance(c, nn.Sequential)]
    first = stages[0] if stages else 0
    stem = {"stem": [child for _, child in children[:first]]} if first else {}
    return stem | {name: [child] for name, child in children[first:]}


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with fixed statistics: it stays in eval mode even while the network trains."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        return super().train(False)


def freeze(part: nn.Module) -> None:
    """Freezes `part` in place: its parameters need no gradient, and its BN statistics are fixed."""
    part.requires_grad_(False)
    for layer in part.modules():
        if isinstance(layer, nn.BatchNorm2d):
            # Only the class changes, so nothing has to be copied; see convert_sync_batchnorm.
            layer.__class__ = FrozenBatchNorm2d
            layer.train()


def head_name(network: nn.Module) -> str:
    """Returns the name of the layer that computes the logits: the last linear layer."""
    return [n for n, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]

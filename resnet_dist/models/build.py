"""A network from its name."""

from torch import nn

from resnet_dist.models.cifar import CifarResNet
from resnet_dist.models.depths import DEPTHS
from resnet_dist.models.imagenet import ImageNetResNet


def build_model(name: str, num_classes: int, zero_init_last_gamma: bool = False) -> nn.Module:
    """A freshly initialized network; draws from torch's global generator.

    Raises:
        KeyError: `name` is not in DEPTHS (a config is checked for that before).
    """
    block, depths = DEPTHS[name]
    form = ImageNetResNet if len(depths) == 4 else CifarResNet
    return form(block, depths, num_classes, zero_init_last_gamma)

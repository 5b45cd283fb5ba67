"""Builds a network by its name."""

from torch import nn

from resnet_dist.models.cifar import CifarNet
from resnet_dist.models.depths import DEPTHS
from resnet_dist.models.imagenet import ImageNetNet
from resnet_dist.models.vgg import Vgg

FORMS = {"imagenet": ImageNetNet, "cifar": CifarNet, "vgg": Vgg}


def build_model(name: str, num_classes: int, zero_init_last_gamma: bool = False) -> nn.Module:
    """Returns a freshly initialized network. Its weights come from torch's global generator.

    Raises:
        KeyError: `name` is not in DEPTHS (configs are checked for that earlier).
    """
    net = DEPTHS[name]
    return FORMS[net.form](net, num_classes, zero_init_last_gamma)

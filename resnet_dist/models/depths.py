"""The table of networks: form, block, blocks per stage, shortcut.

He et al. 2015, table 1, figure 3 and section 4.2. Imports only the standard library, since configs
are also checked where torch is not installed.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Net:
    """A row of the table."""

    form: Literal["imagenet", "cifar", "vgg"]
    block: Literal["basic", "bottleneck", "bottleneck_v1", "conv", "conv_bn"]
    depths: tuple[int, ...]  # blocks per stage; VGG: convolutions per stage
    # Section 3.3. A: identity, with zeros for new channels; B: projection where the shape changes;
    # C: projection everywhere; none: a plain network without shortcuts.
    shortcut: Literal["A", "B", "C", "none"] = "none"


# The parts in optim.lr_scales, from input to output; "stem": the layers before the first stage.
PARTS = {
    "imagenet": ("stem", "layer1", "layer2", "layer3", "layer4", "fc"),
    "cifar": ("stem", "layer1", "layer2", "layer3", "fc"),
    "vgg": ("features", "classifier"),
}

DEPTHS: dict[str, Net] = {
    # ImageNet: stages of 64, 128, 256 and 512 channels (bottlenecks output four times as many)
    "plain18": Net("imagenet", "basic", (2, 2, 2, 2)),
    "plain34": Net("imagenet", "basic", (3, 4, 6, 3)),
    "resnet18": Net("imagenet", "basic", (2, 2, 2, 2), "B"),
    "resnet18_a": Net("imagenet", "basic", (2, 2, 2, 2), "A"),
    "resnet18_c": Net("imagenet", "basic", (2, 2, 2, 2), "C"),
    "resnet34": Net("imagenet", "basic", (3, 4, 6, 3), "B"),
    "resnet34_a": Net("imagenet", "basic", (3, 4, 6, 3), "A"),
    "resnet34_c": Net("imagenet", "basic", (3, 4, 6, 3), "C"),
    # torchvision's form, "v1.5", with the stride in the 3x3 convolution
    "resnet50": Net("imagenet", "bottleneck", (3, 4, 6, 3), "B"),
    "resnet101": Net("imagenet", "bottleneck", (3, 4, 23, 3), "B"),
    "resnet152": Net("imagenet", "bottleneck", (3, 8, 36, 3), "B"),
    # The paper's form, with the stride in the first 1x1 convolution
    "resnet50_v1": Net("imagenet", "bottleneck_v1", (3, 4, 6, 3), "B"),
    "resnet101_v1": Net("imagenet", "bottleneck_v1", (3, 4, 23, 3), "B"),
    "resnet152_v1": Net("imagenet", "bottleneck_v1", (3, 8, 36, 3), "B"),
    # The reference in figure 3: stages of 64, 128, 256, 512 and 512 channels
    "vgg19": Net("vgg", "conv", (2, 2, 4, 4, 4)),
    "vgg19_bn": Net("vgg", "conv_bn", (2, 2, 4, 4, 4)),
    # CIFAR: layers = 6n + 2, stages of 16, 32 and 64 channels
    "plain20": Net("cifar", "basic", (3, 3, 3)),
    "plain32": Net("cifar", "basic", (5, 5, 5)),
    "plain44": Net("cifar", "basic", (7, 7, 7)),
    "plain56": Net("cifar", "basic", (9, 9, 9)),
    "plain110": Net("cifar", "basic", (18, 18, 18)),
    "resnet20": Net("cifar", "basic", (3, 3, 3), "A"),
    "resnet32": Net("cifar", "basic", (5, 5, 5), "A"),
    "resnet44": Net("cifar", "basic", (7, 7, 7), "A"),
    "resnet56": Net("cifar", "basic", (9, 9, 9), "A"),
    "resnet110": Net("cifar", "basic", (18, 18, 18), "A"),
    "resnet1202": Net("cifar", "basic", (200, 200, 200), "A"),
}


def why_no_counterpart(net: Net) -> str | None:
    """Returns why torchvision and timm do not have this network; None if they do.

    Both have VGG, and residual nets in one form: ImageNet's, option B, with the stride in the 3x3.
    """
    if net.form == "vgg":
        return None
    if net.form == "cifar":
        return "it has the CIFAR form"
    if net.shortcut == "none":
        return "it is a plain network"
    if net.block == "bottleneck_v1":
        return "its stride is in the 1x1, theirs in the 3x3 (names would match, outputs would not)"
    return None if net.shortcut == "B" else f"its shortcuts are option {net.shortcut}, theirs B"

"""How large the networks are. Numbers, so that listing them needs no torch.

A test counts them again on the networks themselves (tests/models/test_models.py).
"""

from typing import NamedTuple

from resnet_dist.models.depths import DEPTHS


class Size(NamedTuple):
    """The size of a network at its data set's classes and image size."""

    layers: int  # the depth in its name: convolutions and linear layers, except on shortcuts
    parameters: int
    # For one image, in all convolutions and linear layers: the "FLOPs" of He et al. 2015, table 1.
    multiply_adds: int


INPUT_PX = {"imagenet": 224, "vgg": 224, "cifar": 32}
NUM_CLASSES = {"imagenet": 1000, "vgg": 1000, "cifar": 10}

SIZES = {
    "plain18": Size(18, 11_515_688, 1_794_805_760),
    "plain34": Size(34, 21_623_848, 3_644_493_824),
    "resnet18": Size(18, 11_689_512, 1_814_073_344),
    "resnet18_a": Size(18, 11_515_688, 1_794_805_760),
    "resnet18_c": Size(18, 12_043_816, 1_878_298_624),
    "resnet34": Size(34, 21_797_672, 3_663_761_408),
    "resnet34_a": Size(34, 21_623_848, 3_644_493_824),
    "resnet34_c": Size(34, 22_716_840, 3_830_747_136),
    "resnet50": Size(50, 25_557_032, 4_089_184_256),
    "resnet101": Size(101, 44_549_160, 7_801_405_440),
    "resnet152": Size(152, 60_192_808, 11_513_626_624),
    "resnet50_v1": Size(50, 25_557_032, 3_857_973_248),
    "resnet101_v1": Size(101, 44_549_160, 7_570_194_432),
    "resnet152_v1": Size(152, 60_192_808, 11_282_415_616),
    "vgg19": Size(19, 143_667_240, 19_632_062_464),
    "vgg19_bn": Size(19, 143_678_248, 19_632_062_464),
    "plain20": Size(20, 269_722, 40_551_040),
    "plain32": Size(32, 464_154, 68_862_592),
    "plain44": Size(44, 658_586, 97_174_144),
    "plain56": Size(56, 853_018, 125_485_696),
    "plain110": Size(110, 1_727_962, 252_887_680),
    "resnet20": Size(20, 269_722, 40_551_040),
    "resnet32": Size(32, 464_154, 68_862_592),
    "resnet44": Size(44, 658_586, 97_174_144),
    "resnet56": Size(56, 853_018, 125_485_696),
    "resnet110": Size(110, 1_727_962, 252_887_680),
    "resnet1202": Size(1202, 19_421_274, 2_829_238_912),
}


def table_of_networks() -> str:
    """Returns a table with a line for each network."""
    lines = [f"{'network':<14}{'layers':>7}{'input':>7}{'parameters':>13}{'multiply-adds':>18}"]
    for name, size in SIZES.items():
        px = INPUT_PX[DEPTHS[name].form]
        lines.append(
            f"{name:<14}{size.layers:>7}{px:>7}{size.parameters:>13,}{size.multiply_adds:>18,}"
        )
    return "\n".join(lines)

"""Blocks and stages, residual and plain (He et al. 2015, figures 2 and 5), under torchvision's
names."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class ZeroPad(nn.Module):
    """The shortcut of option A: every stride-th pixel, zeros for new channels, no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Returns the shortcut of options B and C: a 1x1 convolution and BN."""
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


def make_shortcut(
    option: str, in_channels: int, out_channels: int, stride: int
) -> nn.Module | None:
    """Returns the layers on a block's shortcut (section 3.3).

    None: the shortcut is the identity, or, with option "none", the block has no shortcut.
    """
    same_shape = in_channels == out_channels and stride == 1
    if option == "none" or (same_shape and option != "C"):
        return None
    return (ZeroPad if option == "A" else projection)(in_channels, out_channels, stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (figure 5, left). [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]."""

    expansion = 1  # output channels = expansion * channels of the stage

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = make_shortcut(shortcut, in_channels, channels, stride)
        self.is_residual = shortcut != "none"

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.is_residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (figure 5, right).

    The stride is in the 3x3 (torchvision's form, "v1.5") or, with stride_in_1x1, in the first 1x1
    (the paper's form).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        shortcut: str,
        stride_in_1x1: bool = False,
    ):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv1x1(in_channels, channels, stride if stride_in_1x1 else 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, 1 if stride_in_1x1 else stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


BLOCKS: dict[str, tuple[Callable[[int, int, int, str], nn.Module], int]] = {
    "basic": (BasicBlock, BasicBlock.expansion),
    "bottleneck": (Bottleneck, Bottleneck.expansion),
    "bottleneck_v1": (partial(Bottleneck, stride_in_1x1=True), Bottleneck.expansion),
}


def stage(block: str, in_channels: int, channels: int, blocks: int, shortcut: str) -> nn.Sequential:
    """Returns `blocks` blocks with equally many channels; the first one halves height and width.

    In the first stage of a network, no block halves them. block: "basic", "bottleneck", or
    "bottleneck_v1" with the stride in the 1x1. shortcut: "A", "B", "C" or, for the plain network of
    the same depth, "none" (basic blocks only).
    """
    make, expansion = BLOCKS[block]
    out_channels = channels * expansion
    # The first stage keeps the size of the stem's map. Every later stage doubles the channels, and
    # halves height and width in return (section 3.3).
    stride = 2 if out_channels == 2 * in_channels else 1
    first = make(in_channels, channels, stride, shortcut)
    rest = (make(out_channels, channels, 1, shortcut) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def shortcut_modules(network: nn.Module) -> set[nn.Module]:
    """Returns the modules on the shortcuts, which do not count towards the network's depth."""
    return {
        module
        for block in network.modules()
        if isinstance(block, BasicBlock | Bottleneck) and block.downsample is not None
        for module in block.downsample.modules()
    }


@torch.no_grad()
def initialize(model: nn.Module, zero_init_last_gamma: bool) -> None:
    """Initializes convolutions as He et al. 2015, arXiv:1502.01852 (fan out); biases are zero.

    BN layers start as the identity: they keep PyTorch's weight 1 and bias 0. zero_init_last_gamma:
    the last BN weight of each residual block starts at 0, so that the block starts as the identity
    (Goyal et al. 2017, section 5.1).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # N(0, std) with std = sqrt(2 / (kernel height * kernel width * output channels)).
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if zero_init_last_gamma and isinstance(module, BasicBlock | Bottleneck):
            nn.init.zeros_(module.last_bn.weight)

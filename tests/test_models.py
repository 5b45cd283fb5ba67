"""Networks against torchvision and the paper's tables."""

import pytest
import torch
import torchvision
from torch import nn

from resnet_dist.models.build import build_model
from resnet_dist.models.residual import BasicBlock, Bottleneck, ZeroPad


@pytest.mark.parametrize("name", [f"resnet{layers}" for layers in (18, 34, 50, 101, 152)])
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    torch.manual_seed(0)
    ours = build_model(name, num_classes=10).eval()
    theirs = torchvision.models.get_model(name, num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(images), theirs(images))
    other = build_model(name, num_classes=10).eval()
    theirs.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(other(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
    + [("resnet110", 1.7), ("resnet1202", 19.4)],
)
def test_cifar_parameter_counts_are_table_6(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1 if millions > 1 else 2) == millions
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert f"resnet{layers}" == name


def test_cifar_shape_and_option_a() -> None:
    model = build_model("resnet20", num_classes=7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    shortcut = ZeroPad(2, 4, 2)
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    by_hand = torch.zeros(1, 4, 2, 2)
    by_hand[:, :2] = x[:, :, [0, 2]][:, :, :, [0, 2]]
    assert torch.equal(shortcut(x), by_hand)
    assert not list(shortcut.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_zero_init_makes_each_block_its_shortcut(name: str) -> None:
    model = build_model(name, num_classes=10, zero_init_last_gamma=True)
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
    for block in blocks:
        assert not block.last_bn.weight.any()
    plain = [block for block in blocks if block.downsample is None]
    x = torch.rand(2, plain[0].conv1.in_channels, 8, 8)  # positive: ReLU changes nothing
    assert torch.equal(plain[0](x), x)
    zeros = sum(not m.weight.any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert zeros == len(blocks)
    default = build_model(name, num_classes=10)
    assert all(m.weight.eq(1).all() for m in default.modules() if isinstance(m, nn.BatchNorm2d))


def test_convolutions_start_as_he_2015_says() -> None:
    torch.manual_seed(0)
    conv = build_model("resnet18", num_classes=10).layer4[1].conv2
    fan_out = conv.out_channels * 3 * 3
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)

"""Networks against torchvision, the paper's tables, and hand-made parts."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.models.build import build_model
from resnet_dist.models.depths import DEPTHS
from resnet_dist.models.residual import BasicBlock, Bottleneck, ZeroPad, stage
from resnet_dist.models.sizes import INPUT_PX, NUM_CLASSES, SIZES, Size, table_of_networks
from resnet_dist.models.vgg import Vgg
from tests.support.counting import count_layers, count_multiply_adds, count_parameters


def with_statistics(model: nn.Module) -> nn.Module:
    """BN with random statistics, so that none can be taken for another's."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
    return model.eval()


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, NUM_CLASSES[DEPTHS[name].form]).eval()


RESNETS = [f"resnet{layers}" for layers in (18, 34, 50, 101, 152)]


@pytest.mark.parametrize("name", RESNETS)
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    torch.manual_seed(0)
    ours = build_model(name, num_classes=10).eval()
    theirs = with_statistics(torchvision.models.get_model(name, num_classes=10))
    images = torch.randn(1, 3, 64, 64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(images), theirs(images))
    other = with_statistics(build_model(name, num_classes=10))
    theirs.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(other(images), theirs(images))


@pytest.mark.parametrize("name", ["vgg19", "vgg19_bn"])
def test_vgg_is_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    ours = build_model(name, num_classes=10).eval()
    theirs = with_statistics(torchvision.models.get_model(name, num_classes=10))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.inference_mode():
        images = torch.randn(1, 3, 64, 64)
        assert torch.equal(ours(images), theirs(images))
        # The linear layers slide over a map of 8 x 7: the mean of two positions, each by hand.
        image = torch.randn(1, 3, 256, 224)
        assert isinstance(ours, Vgg)
        maps = ours.features(image)
        assert maps.shape == (1, 512, 8, 7)
        by_hand = [ours.classifier(maps[:, :, top : top + 7].flatten(1)) for top in (0, 1)]
        assert torch.allclose(ours.dense(image), torch.stack(by_hand).mean(0), atol=1e-5)


# He et al. 2015: figure 3 and table 1, in 10^9 multiply-adds; the plain nets and option A have no
# projections. The paper's bottlenecks have their stride in the 1x1.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("plain18", 1.8), ("resnet18_a", 1.8), ("resnet18", 1.8)]
    + [("plain34", 3.6), ("resnet34_a", 3.6), ("resnet50_v1", 3.8)]
    + [("resnet101_v1", 7.6), ("resnet152_v1", 11.3), ("vgg19", 19.6)],
)
def test_multiply_adds_are_table_1(name: str, billions: float) -> None:
    counted = count_multiply_adds(on_meta(name), px=224) / 1e9
    # The paper rounds 3.86 to 3.8 and 7.57 to 7.6.
    assert billions in (round(counted, 1), math.floor(10 * counted) / 10)


def test_multiply_adds_by_hand() -> None:
    """Each layer of one bottleneck stage, from its shape."""
    net = stage("bottleneck_v1", 256, 128, 1, "B")
    first = 28 * 28 * 256 * 128 + 28 * 28 * 9 * 128 * 128 + 28 * 28 * 128 * 512
    assert count_multiply_adds(Padded(net, 256), 56) == first + 28 * 28 * 256 * 512
    net = stage("bottleneck", 256, 128, 1, "B")
    first = 56 * 56 * 256 * 128 + 28 * 28 * 9 * 128 * 128 + 28 * 28 * 128 * 512
    assert count_multiply_adds(Padded(net, 256), 56) == first + 28 * 28 * 256 * 512
    assert count_multiply_adds(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 2) == 60


class Padded(nn.Module):
    """Gives a stage the channels it wants from an image's three."""

    def __init__(self, net: nn.Module, channels: int):
        super().__init__()
        self.net, self.channels = net, channels

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.pad(x, (0, 0, 0, 0, 0, self.channels - 3)))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
    + [("resnet110", 1.7), ("resnet1202", 19.4)],
)
def test_cifar_parameter_counts_are_table_6(name: str, millions: float) -> None:
    count = count_parameters(on_meta(name))
    assert round(count / 1e6, 1 if millions > 1 else 2) == millions
    if name != "resnet1202":  # option A: a plain net has exactly as many
        assert count_parameters(on_meta(name.replace("resnet", "plain"))) == count


@pytest.mark.parametrize("name", DEPTHS)
def test_a_network_has_the_layers_of_its_name(name: str) -> None:
    digits = "".join(c for c in name.partition("_")[0] if c.isdigit())
    assert count_layers(on_meta(name)) == int(digits)


@pytest.mark.parametrize("name", DEPTHS)
def test_sizes_are_what_is_counted(name: str) -> None:
    network, px = on_meta(name), INPUT_PX[DEPTHS[name].form]
    counted = count_layers(network), count_parameters(network), count_multiply_adds(network, px)
    assert SIZES[name] == Size(*counted)


def test_the_table_of_networks() -> None:
    lines = table_of_networks().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(DEPTHS)
    assert "11,282,415,616" in next(line for line in lines if line.startswith("resnet152_v1"))


@pytest.mark.parametrize("name", [n for n, net in DEPTHS.items() if net.form != "vgg"])
def test_every_convolution_is_followed_by_bn(name: str) -> None:
    """In the order of the forward pass: conv, BN, then activation or addition; no dropout."""
    model = on_meta(name)
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())
    order: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda m, _i, _o: order.append(m))
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)
    ]
    px = INPUT_PX[DEPTHS[name].form]
    model(torch.empty(1, 3, px, px, device="meta"))
    for hook in hooks:
        hook.remove()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(isinstance(m, nn.Conv2d) for m in order) == len(convolutions)
    for module, after in pairwise(order):
        if isinstance(module, nn.Conv2d):
            assert isinstance(after, nn.BatchNorm2d)
            assert after.num_features == module.out_channels
            assert module.bias is None


def test_option_a_by_hand() -> None:
    shortcut = ZeroPad(2, 4, 2)
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    by_hand = torch.zeros(1, 4, 2, 2)
    by_hand[:, :2] = x[:, :, [0, 2]][:, :, :, [0, 2]]
    assert torch.equal(shortcut(x), by_hand)
    assert not list(shortcut.parameters())


def blocks_of(name: str) -> Iterator[BasicBlock | Bottleneck]:
    for module in on_meta(name).modules():
        if isinstance(module, BasicBlock | Bottleneck):
            yield module


@pytest.mark.parametrize(
    ("name", "projections", "pads"),
    [("resnet34_a", 0, 3), ("resnet34", 3, 0), ("resnet34_c", 16, 0), ("plain34", 0, 0)]
    + [("resnet50", 4, 0), ("resnet50_v1", 4, 0), ("resnet56", 0, 2), ("plain56", 0, 0)],
)
def test_shortcut_options(name: str, projections: int, pads: int) -> None:
    shortcuts = [block.downsample for block in blocks_of(name)]
    assert sum(isinstance(s, nn.Sequential) for s in shortcuts) == projections
    assert sum(isinstance(s, ZeroPad) for s in shortcuts) == pads


@pytest.mark.parametrize("shortcut", ["none", "A", "B", "C"])
def test_a_block_by_hand(shortcut: str) -> None:
    """y = relu(F(x) + shortcut(x)); a plain block is the same without the addition."""
    torch.manual_seed(0)
    net = with_statistics(stage("basic", 4, 8, 2, shortcut))
    x = start = torch.rand(2, 4, 8, 8)
    for block in net:
        assert isinstance(block, BasicBlock)
        out = block.bn1(F.conv2d(x, block.conv1.weight, None, 8 // x.shape[1], 1)).relu()
        out = block.bn2(F.conv2d(out, block.conv2.weight, None, 1, 1))
        changes = x.shape != out.shape
        if shortcut == "A" and changes:
            out[:, :4] += x[:, :, ::2, ::2]
        elif shortcut == "C" or (shortcut == "B" and changes):
            assert isinstance(block.downsample, nn.Sequential)
            conv, bn = block.downsample
            out = out + bn(F.conv2d(x, conv.weight, None, 2 if changes else 1))
        elif shortcut != "none":
            out = out + x
        x = out.relu()
    assert torch.allclose(net(start), x, atol=1e-6)


def test_where_the_stride_is() -> None:
    for name, conv in (("resnet50", "conv2"), ("resnet50_v1", "conv1")):
        strided = {
            part
            for block in blocks_of(name)
            for part in ("conv1", "conv2", "conv3")
            if getattr(block, part).stride == (2, 2)
        }
        assert strided == {conv}


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


@pytest.mark.parametrize("name", ["resnet18", "vgg19_bn"])
def test_convolutions_start_as_he_2015_says(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions[3:]:
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize(("name", "spread"), [("plain110", 1e9), ("resnet1202", 1e4)])
def test_gradients_reach_the_first_layer(name: str, spread: float) -> None:
    """At initialization, in training mode: finite everywhere, and no layer is cut off.

    They do not vanish, as section 4.1 says. But in a plain net they grow by about 1.16 a layer
    towards the input, as BN makes them (Yang et al. 2019, arXiv:1902.08129), and in a residual net
    1,202 layers deep by less in all.
    """
    torch.manual_seed(0)
    model = build_model(name, num_classes=10)
    logits = model(torch.randn(2, 3, 16, 16))
    assert logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([1, 7])).backward()
    norms = torch.stack(
        [m.weight.grad.norm() for m in model.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
    )
    assert norms.isfinite().all()
    assert (norms > 0).all()
    assert norms.max() / norms.min() < spread

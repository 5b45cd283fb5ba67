"""Weight decay by structure, the lr by part."""

import pytest
import torch
from torch import nn

from resnet_dist.config import OptimConfig
from resnet_dist.models.build import build_model
from resnet_dist.models.depths import DEPTHS, PARTS
from resnet_dist.models.parts import freeze, parts
from resnet_dist.optim import build_optimizer, set_lr


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_no_decay_is_exactly_batchnorm_and_biases(name: str) -> None:
    model = build_model(name, num_classes=10)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=1e-4))
    undecayed = {
        id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]
    }
    expected = set()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            expected |= {id(p) for p in module.parameters()}
        elif isinstance(module, nn.Linear):
            expected.add(id(module.bias))
    assert undecayed == expected
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_all_is_decayed_if_the_config_says_so() -> None:
    optim = OptimConfig(weight_decay=1e-4, decay_norm_and_bias=True, momentum=0.8, nesterov=True)
    optimizer = build_optimizer(build_model("resnet20", num_classes=10), optim)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-4}
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.8, True)}


def test_a_step_by_hand() -> None:
    """v = m*v + g + wd*w; w -= lr*v, with the lr that was set for this step."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 1.0)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5, momentum=0.9))
    for lr in (0.1, 0.2):
        set_lr(optimizer, lr)
        optimizer.zero_grad()
        model(torch.tensor([[2.0]])).sum().backward()  # dw = 2, db = 1
        optimizer.step()
    weight = 1 - 0.1 * 2.5
    weight -= 0.2 * (0.9 * 2.5 + 2 + 0.5 * weight)
    bias = 1 - 0.1 * 1 - 0.2 * (0.9 * 1 + 1)
    assert model.weight.item() == pytest.approx(weight)
    assert model.bias.item() == pytest.approx(bias)


def test_parts_have_their_own_lr() -> None:
    model = build_model("resnet20", num_classes=10)
    before = build_optimizer(model, OptimConfig())
    assert [len(group["params"]) for group in before.param_groups] == [20, 39]
    optim = OptimConfig(weight_decay=1e-4, lr_scales={"stem": 0.0, "layer2": 0.5, "fc": 10.0})
    for part in parts(model)["stem"]:
        freeze(part)
    optimizer = build_optimizer(model, optim)
    set_lr(optimizer, 0.2)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    lrs = {"layer1": 0.2, "layer2": 0.1, "layer3": 0.2, "fc": 2.0}
    assert found == {
        id(p): (pytest.approx(lrs[name.split(".")[0]]), 1e-4 if p.ndim >= 2 else 0.0)
        for name, p in model.named_parameters()
        if name.split(".")[0] in lrs
    }


@pytest.mark.parametrize("name", ["resnet50", "plain20", "vgg19_bn"])
def test_every_parameter_is_in_one_part(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    found = parts(model)
    assert tuple(found) == PARTS[DEPTHS[name].form]
    held = [id(p) for modules in found.values() for m in modules for p in m.parameters()]
    assert sorted(held) == sorted(id(p) for p in model.parameters())

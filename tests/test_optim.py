"""Weight decay by structure, the lr by part."""

from typing import Any

import pytest
import torch
from torch import nn

from resnet_dist.config import OptimConfig
from resnet_dist.models.build import build_model
from resnet_dist.models.depths import DEPTHS, PARTS
from resnet_dist.models.parts import freeze, parts
from resnet_dist.optim import build_optimizer, load_optimizer_state, set_lr


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


# --------------------------------------------------------------------------------------------------
# The fused form, which a GPU takes. torch has it for a CPU, too.


def trained(fused: bool, steps: int, saved: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A small layer and its optimizer after some steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1), fused=fused)
    if saved is not None:
        model.load_state_dict(saved["model"])
        load_optimizer_state(optimizer, saved["optimizer"])
    set_lr(optimizer, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_the_fused_form_takes_the_same_steps() -> None:
    plain, fused = trained(False, 4)[0], trained(True, 4)[0]
    torch.testing.assert_close(fused.weight, plain.weight)
    torch.testing.assert_close(fused.bias, plain.bias)


@pytest.mark.parametrize("was", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_a_checkpoint_does_not_say_how_this_machine_steps(was: bool, now: bool) -> None:
    """torch would restore `fused` and `foreach`, from a GPU to a CPU and from before to now."""
    model, optimizer = trained(was, 2)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    built = build_optimizer(nn.Linear(3, 4), OptimConfig(), fused=now)
    resumed, again = trained(now, 2, saved)
    for group, own in zip(again.param_groups, built.param_groups, strict=True):
        assert (group["fused"], group["foreach"]) == (own["fused"], own["foreach"])
    torch.testing.assert_close(resumed.weight, trained(False, 4)[0].weight)


def test_a_checkpoint_whose_momentum_was_dropped_goes_on_from_zero() -> None:
    model, optimizer = trained(False, 2)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict() | {"state": {}}}
    results = [trained(fused, 2, saved)[0].weight for fused in (True, False)]
    torch.testing.assert_close(*results)


def test_a_first_step_that_fp16_skips_leaves_no_garbage() -> None:
    """torch's fused SGD would leave momentum as it found the memory."""
    model = nn.Linear(64, 64)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    set_lr(optimizer, 0.1)
    before = model.weight.detach().clone()
    for gradient in (float("inf"), 0.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.zeros(()))  # as the loss is, in a step
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1.0  # halved once: the first step was skipped
    assert torch.equal(model.weight, before)
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("fused", [True, False])
def test_the_kernels_of_this_machine_count_before_a_state_is_loaded(fused: bool) -> None:
    """torch's loading depends on them: fused AdamW gets its step count as float32 on the GPU."""
    model = nn.Linear(3, 4)
    other = torch.optim.AdamW(model.parameters(), fused=not fused)
    model(torch.ones(1, 3)).sum().backward()
    other.step()
    saved = other.state_dict()
    for state in saved["state"].values():
        state["step"] = state["step"].double()
    resumed = torch.optim.AdamW(model.parameters(), fused=fused)
    load_optimizer_state(resumed, saved)
    expected = torch.float32 if fused else torch.float64
    assert {state["step"].dtype for state in resumed.state.values()} == {expected}
    assert [group["fused"] for group in resumed.param_groups] == [fused]
    resumed.step()

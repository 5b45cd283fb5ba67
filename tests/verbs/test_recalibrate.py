"""BN statistics after training: those of all activations together, the same bits on any world."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resnet_dist import cli, distributed
from resnet_dist.checkpoints import writer
from resnet_dist.checkpoints.content import Checkpoint, Facts
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.config import Config
from resnet_dist.data.load.build import load_index, make_loader
from resnet_dist.data.view.augment import Request, train_windows
from resnet_dist.data.view.order import epoch_order
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import autocast
from resnet_dist.state import TrainState
from resnet_dist.verbs.evaluate import evaluate_checkpoint
from resnet_dist.verbs.recalibrate import recalibrate
from resnet_dist.verbs.trained import Trained, load_trained
from tests.support.multirank import run_ranks

N, SIZES = 20, (6, 7, 7)  # images, and the batches of at most 8 that they make


@pytest.fixture
def path(tiny_config: Callable[..., Config]) -> Path:
    """The checkpoint of a network whose BN has yet to see an image."""
    config = tiny_config()
    torch.manual_seed(0)
    network = build_model(config.model.name, 3)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    optimizer = build_optimizer(network, config.optim)
    state = TrainState(network, optimizer, torch.amp.GradScaler("cpu", enabled=False), step=5)
    facts = Facts(classes=("class0", "class1", "class2"), mean_image=None)
    content = state.checkpoint(config, facts)
    return writer.save(config.run_dir, content, Retention())


def norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}


def batches_by_hand(trained: Trained, sizes: tuple[int, ...]) -> list[Tensor]:
    """The first training images of epoch 0, cut into batches of these sizes."""
    world, config = distributed.start(), trained.config
    index = load_index(config, "train", world)
    parts = np.split(epoch_order(config.seed, 0, len(index))[: sum(sizes)], np.cumsum(sizes)[:-1])
    requests = [
        Request(part, train_windows(config.data, config.seed, 0, part, index.sizes[part]))
        for part in parts
    ]
    return [b.images.clone() for b in make_loader(index, config, world).batches(requests)]


@torch.no_grad()
def activations(trained: Trained, sizes: tuple[int, ...]) -> dict[str, list[Tensor]]:
    """BN -> what it is given, float64 [C, values], a batch each; in training mode."""
    given: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _layer, inputs: given.setdefault(name, []).append(
            inputs[0].double().transpose(0, 1).flatten(1)
        )

    trained.network.train()
    for name, layer in norms(trained.network).items():
        layer.register_forward_pre_hook(keep(name))
    for images in batches_by_hand(trained, sizes):
        with autocast(images.device, trained.config.train.precision):
            trained.network(images)
    return given


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_statistics_are_those_of_all_activations(path: Path, precision: str) -> None:
    world, overrides = distributed.start(), [f"train.precision={precision}"]
    given = activations(load_trained(path, overrides, world), SIZES)
    trained = load_trained(path, overrides, world)
    recalibrate(trained, N, world)
    layers = norms(trained.network)
    assert given.keys() == layers.keys()
    by_batch, far = 0.0, 0.0
    for name, layer in layers.items():
        together = torch.cat(given[name], dim=1)
        mean, var = together.mean(1).float(), together.var(1).float()
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-5, atol=0)
        assert layer.num_batches_tracked == 3
        # The test can fail: neither is it the mean of the batches' variances, nor are all weighted
        # alike, nor does a biased variance pass where the map is small.
        within = torch.stack([part.var(1) for part in given[name]]).mean(0).float()
        by_batch = max(by_batch, ((within - var) / var).abs().max().item())
        means = torch.stack([part.mean(1) for part in given[name]]).mean(0).float()
        far = max(far, ((means - mean) / var.sqrt()).abs().max().item())
    assert by_batch > 1e-2
    assert far > 1e-4
    assert not trained.network.training
    assert not any(layer.training or layer._forward_pre_hooks for layer in layers.values())


def test_few_images_make_evaluation_what_training_mode_is(path: Path) -> None:
    """All images in one batch: then both modes normalize that batch by the same numbers."""
    world = distributed.start()
    trained = load_trained(path, [], world)
    (images,) = batches_by_hand(trained, (6,))
    with torch.no_grad():
        moving = trained.network(images)
        recalibrate(trained, 6, world)
        exact = trained.network(images)
        training = trained.network.train()(images)
    # Of 6 x 8 x 8 values, an unbiased variance is 0.3 % larger than the one that training uses.
    assert (exact - training).abs().max() < 0.01 * training.abs().max()
    assert (moving - training).abs().max() > 0.1 * training.abs().max()


def states_of(rank: int, world_size: int, path: Path) -> list[dict[str, Tensor]]:
    """Three batches, then one: more ranks than batches."""
    world = distributed.start()
    states = []
    for images in (N, 5):
        trained = load_trained(path, [], world)
        recalibrate(trained, images, world)
        states.append(trained.network.state_dict())
    return states


def test_the_same_bits_on_any_world(
    path: Path, record_difference: Callable[[str, float], None]
) -> None:
    alone = run_ranks(states_of, 1, path, init_process_group=False)[0]
    for world_size in (2, 3, 4):
        for states in run_ranks(states_of, world_size, path, init_process_group=False):
            for state, first in zip(states, alone, strict=True):
                assert state.keys() == first.keys()
                assert all(torch.equal(state[key], first[key]) for key in first)
    record_difference("recalibrated BN on 1, 2, 3 and 4 ranks", 0.0)
    before = Checkpoint.load(path).model
    changed = [key for key in before if not torch.equal(before[key], alone[0][key])]
    assert changed == [key for key in before if "running" in key or "num_batches" in key]


def test_frozen_parts_keep_their_statistics(path: Path) -> None:
    world = distributed.start()
    trained = load_trained(path, ["optim.lr_scales={stem: 0, layer2: 0, fc: 10}"], world)
    given = norms(load_trained(path, [], world).network)
    recalibrate(trained, 4, world)
    for name, layer in norms(trained.network).items():
        kept = torch.equal(layer.running_mean, given[name].running_mean)
        assert kept == name.startswith(("bn1", "layer2"))


def with_network(path: Path, *layers: nn.Module) -> Trained:
    trained = load_trained(path, [], distributed.start())
    return replace(trained, network=nn.Sequential(*layers))


def test_dropout_is_off(path: Path) -> None:
    trained = with_network(path, nn.Dropout(), nn.BatchNorm2d(3))
    images = torch.cat(batches_by_hand(trained, SIZES))
    recalibrate(trained, N, distributed.start())
    torch.testing.assert_close(trained.network[1].running_var, images.var((0, 2, 3)))


def test_bad_input(path: Path) -> None:
    world = distributed.start()
    with pytest.raises(UserError, match="--recalibrate-bn: resnet20 trains no BN"):
        recalibrate(with_network(path, nn.Conv2d(3, 4, 1)), 1, world)
    with pytest.raises(UserError, match=r"--recalibrate-bn 31: .* has 30 training images"):
        recalibrate(load_trained(path, [], world), 31, world)
    pooled = with_network(path, nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="--recalibrate-bn: a batch of one image"):
        recalibrate(pooled, 1, world)
    recalibrate(pooled, 2, world)


def test_the_command_line_keeps_them(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "new" / "kept"
    command = ["evaluate", str(path), "--recalibrate-bn", "20"]
    cli.main([*command, "--save-to", str(kept)])
    first, second, score = capsys.readouterr().out.splitlines()
    assert first == "BN statistics of 20 training images"
    assert second == f"checkpoint  {kept}"
    assert score != str(evaluate_checkpoint(path, []))
    assert score == str(evaluate_checkpoint(kept, []))

    content, before = Checkpoint.load(kept), Checkpoint.load(path)
    assert (content.step, content.config) == (5, before.config)
    trained = load_trained(path, [], distributed.start())
    recalibrate(trained, 20, distributed.start())
    for key, value in trained.network.state_dict().items():
        assert torch.equal(content.model[key], value)

    for folder, line in [(kept, "already exists"), (path / "state.pt" / "x", "not written")]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, "--save-to", str(folder)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    cli.main(command)
    assert capsys.readouterr().out.splitlines() == [first, score]
    with pytest.raises(SystemExit):
        cli.main([*command[:-1], "0"])
    assert "whole number above zero" in capsys.readouterr().err

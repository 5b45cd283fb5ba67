"""Layer responses against a slow computation by hand."""

import re
from collections.abc import Callable, Iterator
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
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.build import load_index, make_loader
from resnet_dist.data.view.augment import Request, eval_windows
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model
from resnet_dist.models.residual import BasicBlock, Bottleneck
from resnet_dist.state import TrainState
from resnet_dist.verbs.responses import analyze_responses, layer_stds, main_path_norms
from tests.support.needs import needs


def checkpoint_of(config: Config) -> Path:
    """A network with statistics and scales that no two channels share, saved untrained."""
    torch.manual_seed(0)
    model = build_model(config.model.name, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2.0)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return save(model, config)


def save(model: nn.Module, config: Config) -> Path:
    optimizer = torch.optim.SGD(model.parameters())
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), step=1)
    classes = ["class0", "class1", "class2"]
    facts = Facts(classes=tuple(classes), mean_image=None)
    content = state.checkpoint(config, facts)
    return writer.save(config.run_dir, content, Retention())


def val_batches(config: Config, samples: list[list[int]]) -> Iterator[Batch]:
    world = distributed.start()
    index = load_index(config, "val", world)
    requests = [
        Request(np.array(part), eval_windows(config.data, index.sizes[part])) for part in samples
    ]
    return make_loader(index, config, world).batches(requests)


def by_hand(path: Path, config: Config) -> list[float]:
    """The forward pass written out; all outputs kept, then torch.std. All val images in turn."""
    model = build_model(config.model.name, 3)
    model.load_state_dict(Checkpoint.load(path).model)
    model.eval()
    outputs: list[list[Tensor]] = []
    for batch in val_batches(config, [[i] for i in range(17)]):
        found: list[Tensor] = []

        def norm(bn: nn.Module, x: Tensor, found: list[Tensor] = found) -> Tensor:
            out: Tensor = bn(x)
            found.append(out.clone().flatten())
            return out

        x = norm(model.bn1, model.conv1(batch.images)).relu()  # type: ignore[operator, arg-type]
        if hasattr(model, "maxpool"):
            x = model.maxpool(x)  # type: ignore[operator]
        blocks = [b for b in model.modules() if isinstance(b, BasicBlock | Bottleneck)]
        for block in blocks:
            out = norm(block.bn1, block.conv1(x)).relu()
            out = norm(block.bn2, block.conv2(out))
            if isinstance(block, Bottleneck):
                out = norm(block.bn3, block.conv3(out.relu()))
            if isinstance(block, Bottleneck) or block.is_residual:
                out = out + (x if block.downsample is None else block.downsample(x))
            x = out.relu()
        outputs.append(found)
    return [
        torch.cat(layer).double().std(correction=0).item() for layer in zip(*outputs, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet20", 19), ("plain20", 19), ("resnet18_c", 17), ("resnet50", 49)]
)
@torch.inference_mode()
def test_the_standard_deviation_of_each_layer(
    tiny_config: Callable[..., Config], name: str, layers: int
) -> None:
    """17 images in batches of 8, 8 and 1: over all of them, in forward order, before ReLU and
    addition, and without the projections of option B and C."""
    config = tiny_config(f"model.name={name}")
    path = checkpoint_of(config)
    (measured,) = analyze_responses([path], [], None)
    assert (measured.name, measured.images) == ("tiny", 17)
    assert len(measured.stds) == layers
    expected = by_hand(path, config)
    assert list(measured.stds.values()) == pytest.approx(expected, rel=1e-5)
    assert len({round(std, 3) for std in expected}) > layers / 2  # the order is seen
    assert next(iter(measured.stds)) == "bn1"
    assert not any("downsample" in layer for layer in measured.stds)


@pytest.mark.parametrize(
    ("name", "convolutions"), [("resnet56", 55), ("resnet101", 100), ("vgg19_bn", 16), ("vgg19", 0)]
)
def test_one_norm_per_convolution_of_the_main_path(name: str, convolutions: int) -> None:
    with torch.device("meta"):
        assert len(main_path_norms(build_model(name, 10))) == convolutions


def test_measuring_leaves_no_trace(tiny_config: Callable[..., Config]) -> None:
    model = build_model("resnet20", 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    world = distributed.start()
    with pytest.raises(AttributeError):
        layer_stds(model, [None], world, "fp32")  # type: ignore[list-item]
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_some_images_are_of_all_classes(tiny_config: Callable[..., Config]) -> None:
    """Six of 17 images: every 17/6th, rounded down, in the folder's order by class."""
    config = tiny_config()
    path = checkpoint_of(config)
    (measured,) = analyze_responses([path], [], 6)
    assert measured.images == 6
    model = build_model("resnet20", 3)
    model.load_state_dict(Checkpoint.load(path).model)
    (batch,) = val_batches(config, [[0, 2, 5, 8, 11, 14]])
    assert set(batch.labels.tolist()) == {0, 1, 2}
    expected = layer_stds(model, [batch], distributed.start(), "fp32")
    assert measured.stds == pytest.approx(expected)
    (more,) = analyze_responses([path], [], 1000)
    assert more.images == 17


@needs("matplotlib")
def test_the_command_line(
    tiny_config: Callable[..., Config],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Overrides stand before or after the options, and count for every checkpoint."""
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_folder)
    paths = [
        str(checkpoint_of(tiny_config(f"name={name}", f"model.name={name}", "data.root=gone")))
        for name in ("resnet20", "plain32")
    ]
    figure = tmp_path / "responses.png"
    cli.main(["analyze", "responses", *paths, "--output", str(figure), f"data.root={moved}"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows[1:3]] == [
        ["resnet20", "19", "17"],
        ["plain32", "31", "17"],
    ]
    assert rows[-1] == f"figure  {figure}"
    assert figure.read_bytes().startswith(b"\x89PNG")
    cli.main(["analyze", "responses", paths[0], paths[0], f"data.root={moved}", "--images", "2"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows[1:]] == [[paths[0], "19", "2"]] * 2


@needs("matplotlib")
def test_the_figure() -> None:
    from resnet_dist.verbs import plots  # it imports matplotlib

    figure = plots.response_figure({"a": [1.0, 3.0, 2.0], "b": [0.5, 0.4]})
    original, by_size = figure.axes
    for ax, a in ((original, [1, 3, 2]), (by_size, [3, 2, 1])):
        lines = ax.get_lines()
        assert [line.get_label() for line in lines] == ["a", "b"]
        assert list(lines[0].get_xdata()) == [1, 2, 3]
        assert list(lines[0].get_ydata()) == a
        assert lines[0].get_color() != lines[1].get_color()


def test_what_cannot_be_measured(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    good = checkpoint_of(tiny_config())
    with torch.device("meta"):
        model = build_model("vgg19", 3)
    small = {key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(small, assign=True)  # 140 M weights in one number each
    vgg = save(model, tiny_config("name=vgg", "model.name=vgg19"))
    with pytest.raises(UserError, match=f"^{re.escape(str(vgg))}: vgg19 has no BN layers"):
        analyze_responses([good, vgg], [], None)
    with pytest.raises(UserError, match="command line: no checkpoint"):
        analyze_responses([], ["data.root=x"], None)
    with pytest.raises(UserError, match="nothing: no checkpoint; give a folder"):
        analyze_responses([good, tmp_path / "nothing"], [], None)

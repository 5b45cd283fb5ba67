"""Exports are loaded by the programs they are for, and give the checkpoint's outputs."""

import copy
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import resnet_dist
from resnet_dist import cli
from resnet_dist.checkpoints import writer
from resnet_dist.checkpoints.content import Facts
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.config import Config, DataConfig, ModelConfig, TrackingConfig
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model
from resnet_dist.models.depths import DEPTHS, why_no_counterpart
from resnet_dist.state import TrainState
from resnet_dist.verbs.export import export, timm_state_dict

CLASSES = ["ant", "bée", "cow"]
STEP = 7
DATA = DataConfig(eval_resize_px=72, eval_crop_px=64, std=(0.2, 0.3, 0.4))
LIBRARIES = ("torchvision", "safetensors")


def random_network(name: str) -> nn.Module:
    """Not as initialized: with its statistics as they are, BN would hide a wrong mapping."""
    torch.manual_seed(0)
    model = build_model(name, len(CLASSES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def save_run(root: Path, name: str, model: nn.Module, **facts: Any) -> Path:
    """A run folder with one checkpoint, as training leaves it: in channels last."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    config = Config(name, 0, ModelConfig(name), DATA, tracking=TrackingConfig(str(root)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, optimizer, scaler, step=STEP, best_step=STEP)
    content = state.checkpoint(config, Facts(classes=tuple(CLASSES), **facts))
    writer.save(config.run_dir, content, Retention())
    return config.run_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """trained(name): a run folder and its network; made once, removed at the end."""
    root = tmp_path_factory.mktemp("runs")
    made: dict[str, tuple[Path, nn.Module]] = {}

    def make(name: str) -> tuple[Path, nn.Module]:
        if name not in made:
            model = random_network(name)
            made[name] = save_run(root, name, model), model
        return made[name]

    yield make
    shutil.rmtree(root)


def outputs(model: Callable[..., Any], images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def in_one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says of bad input."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("name", [f"resnet{layers}" for layers in (18, 34, 50, 101, 152)])
def test_torchvision_and_timm_load_the_resnets(
    trained: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    run, model = trained(name)
    images = torch.randn(2, 3, 64, 64)
    expected = outputs(model, images)
    with torch.device("meta"):  # no weights of their own
        networks = {
            "torchvision": torchvision.models.get_model(name, num_classes=len(CLASSES)),
            "safetensors": timm.create_model(name, num_classes=len(CLASSES)),
        }
    for target, theirs in networks.items():
        file = tmp_path / target
        cli.main(["export", str(run), "--to", target, "--output", str(file)])
        if target == "torchvision":
            weights = torch.load(file, weights_only=True)
        else:
            weights = safetensors.torch.load_file(file)
        assert all(type(value) is torch.Tensor for value in weights.values())
        dtypes = {v.dtype for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        assert dtypes == {torch.float32}
        theirs.load_state_dict(weights, strict=True, assign=True)
        assert torch.equal(outputs(theirs.eval(), images), expected)
        file.unlink()


@pytest.mark.slow
def test_torchvision_timm_and_pt2_take_vgg_with_bn(tmp_path: Path) -> None:
    """At 224 pixels, the map that its head is made for. The files are large: one at a time."""
    timm = pytest.importorskip("timm")
    model = random_network("vgg19_bn")
    run = save_run(tmp_path, "vgg19_bn", model)
    images = torch.randn(2, 3, 224, 224)
    expected = outputs(model, images)
    assert expected.std() > 1e-3  # the comparison is of something
    file = tmp_path / "vgg"

    export(run, "torchvision", file)
    with torch.device("meta"):
        theirs = torchvision.models.vgg19_bn(num_classes=len(CLASSES))
    theirs.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=True)
    assert torch.equal(outputs(theirs.eval(), images), expected)

    export(run, "safetensors", file)
    with torch.device("meta"):
        theirs = timm.create_model("vgg19_bn", num_classes=len(CLASSES))
    theirs.load_state_dict(safetensors.torch.load_file(file), strict=True, assign=True)
    torch.testing.assert_close(outputs(theirs.eval(), images), expected)

    export(run, "pt2", file.with_suffix(".pt2"))
    file.unlink()
    program = torch.export.load(file.with_suffix(".pt2")).module()
    images = torch.randn(2, 3, DATA.eval_crop_px, DATA.eval_crop_px)  # what pt2 is made for
    torch.testing.assert_close(outputs(program, images), outputs(model, images))
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", ["vgg19", "vgg19_bn"])
def test_vgg_has_timms_names(name: str) -> None:
    """Each of our tensors holds its own number; both list their layers from first to last."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = build_model(name, len(CLASSES))
        theirs = timm.create_model(name, num_classes=len(CLASSES)).state_dict()
    numbered = {
        key: torch.tensor(float(number)).expand(value.shape)
        for number, (key, value) in enumerate(ours.state_dict().items())
    }
    ours.load_state_dict(numbered, strict=True, assign=True)
    mapped = timm_state_dict(ours, DEPTHS[name])
    assert list(mapped) == list(theirs)
    assert [v.shape for v in mapped.values()] == [v.shape for v in theirs.values()]
    assert [int(v.flatten()[0]) for v in mapped.values()] == list(range(len(numbered)))


def test_a_network_has_a_counterpart_or_is_refused() -> None:
    timm = pytest.importorskip("timm")
    with_counterpart = {name for name, net in DEPTHS.items() if why_no_counterpart(net) is None}
    assert with_counterpart == set(DEPTHS) & set(torchvision.models.list_models())
    assert with_counterpart == set(DEPTHS) & set(timm.list_models())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnet50_v1", "its stride is in the 1x1"),
        ("plain18", "it is a plain network"),
        ("resnet18_a", "its shortcuts are option A"),
        ("resnet34_c", "its shortcuts are option C"),
        ("resnet20", "it has the CIFAR form"),
        ("plain20", "it has the CIFAR form"),
    ],
)
def test_refusals_are_one_line(
    name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path, name, nn.Linear(1, 1))  # refused before the weights are looked at
    before = sorted(tmp_path.rglob("*"))
    for target in LIBRARIES:
        said = in_one_line(capsys, str(run), "--to", target)
        assert f"has no {name}: {why}" in said
        assert "--to onnx or --to pt2" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_onnx_runs_at_any_batch_and_image_size(
    trained: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run, model = trained(name)
    file = tmp_path / "network.onnx"
    export(run, "onnx", file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 3, "height", "width"])
    assert (logits.name, logits.shape) == ("logits", ["batch", len(CLASSES)])
    # At 32 pixels the last map of the ImageNet form is a single one.
    for shape in [(1, 3, 64, 64), (5, 3, 64, 64), (2, 3, 32, 32), (1, 3, 97, 130)]:
        x = torch.randn(shape)
        (ours,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(ours), outputs(model, x), atol=1e-4, rtol=1e-4)
    names_nothing_of_this_machine(file)


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_pt2_runs_at_any_batch_size(trained: Callable[..., Any], name: str, tmp_path: Path) -> None:
    run, model = trained(name)
    file = tmp_path / "network.pt2"
    export(run, "pt2", file)
    program = torch.export.load(file).module()
    for batch in (1, 5):
        images = torch.randn(batch, 3, DATA.eval_crop_px, DATA.eval_crop_px)
        assert torch.equal(outputs(program, images), outputs(model, images))
    names_nothing_of_this_machine(file)


def names_nothing_of_this_machine(file: Path) -> None:
    content = file.read_bytes()
    assert str(Path(resnet_dist.__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_the_sidecar_tells_what_the_weights_do_not(tmp_path: Path) -> None:
    mean_image = torch.rand(64, 64, 3)
    run = save_run(tmp_path, "resnet18", random_network("resnet18"), mean_image=mean_image)
    file = tmp_path / "network.safetensors"
    export(run, "safetensors", file)
    about = json.loads((tmp_path / "network.safetensors.json").read_text())
    assert about == {
        "model": "resnet18",
        "classes": CLASSES,
        "num_classes": 3,
        "preprocessing": {
            "eval_resize_px": 72,
            "eval_crop_px": 64,
            "interpolation": "bilinear, antialias",
            "mean": None,
            "mean_image": "network.safetensors.mean_image.npy",
            "std": [0.2, 0.3, 0.4],
        },
        "step": STEP,
        "resnet_dist": resnet_dist.__version__,
    }
    saved_mean = np.load(tmp_path / about["preprocessing"]["mean_image"])
    np.testing.assert_array_equal(saved_mean, mean_image.numpy(), strict=True)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["model"] == "resnet18"
    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["preprocessing"]) == about["preprocessing"]


def test_without_a_mean_image_the_sidecar_has_the_mean(
    trained: Callable[..., Any], tmp_path: Path
) -> None:
    export(trained("resnet20")[0], "pt2", tmp_path / "network.pt2")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["network.pt2", "network.pt2.json"]
    about = json.loads((tmp_path / "network.pt2.json").read_text())
    assert about["preprocessing"]["mean"] == list(DATA.mean)
    assert about["preprocessing"]["mean_image"] is None


def test_the_default_output_is_in_the_run(
    trained: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = trained("resnet18")
    copied = tmp_path / "copied"
    shutil.copytree(run / "checkpoints" / "best", copied)
    for path, folder in {run: run, run / "checkpoints" / "best": run, copied: copied}.items():
        cli.main(["export", str(path), "--to", "torchvision"])
        file = folder / "export" / f"resnet18-step{STEP}.pth"
        parameters = sum(p.numel() for p in model.parameters())
        said = f"{file}: resnet18 of step {STEP}, {parameters:,} parameters\n"
        assert capsys.readouterr().out == said
        assert sorted(file.parent.iterdir()) == [file, file.with_name(f"{file.name}.json")]
        shutil.rmtree(file.parent)


@pytest.mark.parametrize("target", ["torchvision", "safetensors", "pt2"])
def test_a_failed_export_leaves_the_old_one(
    trained: Callable[..., Any], tmp_path: Path, target: str
) -> None:
    """The disk takes 100 kB of 1.1 MB: what a full disk or a quota does."""
    run = save_run(tmp_path / "runs", "resnet20", random_network("resnet20"))
    if target in LIBRARIES:
        run = trained("resnet18")[0]
    file, sidecar = tmp_path / "network", tmp_path / "network.json"
    file.write_text("old")
    sidecar.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="network: not written: File too large"):
            export(run, target, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (file.read_text(), sidecar.read_text()) == ("old", "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network", "network.json", "runs"]


def test_bad_input_is_one_line(
    trained: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained("resnet18")[0])
    to = ("--to", "torchvision", "--output")
    assert "no such folder" in in_one_line(capsys, run, *to, str(tmp_path / "missing" / "x.pth"))
    assert "is a folder" in in_one_line(capsys, run, *to, str(tmp_path))
    assert "no checkpoint" in in_one_line(capsys, str(tmp_path), "--to", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages_is_one_line(
    trained: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # Python's own way to forbid an import
    said = in_one_line(capsys, str(trained("resnet18")[0]), "--to", "onnx")
    assert "pip install 'resnet-dist[export]'" in said


def test_a_detector_takes_the_backbone(trained: Callable[..., Any], tmp_path: Path) -> None:
    """Faster R-CNN with FPN over C2..C5, its BN frozen: section 4.3's use of the network."""
    run, model = trained("resnet18")
    file = tmp_path / "resnet18.pth"
    export(run, "torchvision", file)
    weights = torch.load(file, weights_only=True)

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    missing, unexpected = backbone.body.load_state_dict(weights, strict=False)
    assert (missing, sorted(unexpected)) == ([], ["fc.bias", "fc.weight"])
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])

    images = torch.randn(2, 3, 64, 96)
    maps: list[torch.Tensor] = []
    layers = [model.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)]
    hooks = [layer.register_forward_hook(lambda m, i, out: maps.append(out)) for layer in layers]
    outputs(model, images)
    for hook in hooks:
        hook.remove()
    theirs = outputs(backbone.body, images)
    assert [c.shape[1] for c in theirs.values()] == [64, 128, 256, 512]
    for ours, c in zip(maps, theirs.values(), strict=True):
        torch.testing.assert_close(c, ours, atol=1e-5 * ours.abs().max().item(), rtol=1e-4)

    detector = FasterRCNN(backbone, num_classes=4, min_size=64, max_size=96)
    targets = [
        {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[20.0, 8.0, 80.0, 60.0]]), "labels": torch.tensor([3])},
    ]
    losses = detector(list(torch.rand(2, 3, 64, 96)), targets)
    assert len(losses) == 4
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert backbone.body.layer4[0].conv1.weight.grad.abs().sum() > 0

"""Fine-tuning: weights from elsewhere, a new head, frozen parts."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from resnet_dist import cli, distributed
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.job import build, restore, save
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.meter import Meter
from resnet_dist.train import train
from tests.support.multirank import run_ranks
from tests.support.paths import GOLDEN

Weights = dict[str, Tensor]


def weights(run: Path) -> Weights:
    return Checkpoint.load(run / "checkpoints/latest").model


def part_of(key: str) -> str:
    child = key.partition(".")[0]
    return "stem" if child in ("conv1", "bn1") else child


def moved(before: Weights, after: Weights) -> set[str]:
    """The parts in which a tensor, BN's buffers included, is not the same to the last bit."""
    return {part_of(key) for key in before if not torch.equal(before[key], after[key])}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class for each of scikit-learn's two photographs: crops of its left part to train on, of
    its right part to validate."""
    datasets = pytest.importorskip("sklearn.datasets")
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name in ("china", "flower"):
        photo = Image.fromarray(datasets.load_sample_image(f"{name}.jpg"))  # 640 x 427
        for split, first, last, count in (("train", 0, 340, 20), ("val", 420, 560, 10)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                left, top = int(random.integers(first, last)), int(random.integers(0, 340))
                photo.crop((left, top, left + 80, top + 80)).save(folder / f"{number}.jpg")
    return root


def test_imagenet_weights_learn_the_photos(
    tiny_yaml: Path, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchvision's ResNet-18 of 1000 classes; stem and layer1 frozen; predicts the val photos."""
    torch.manual_seed(1)
    file = tmp_path / "resnet18.pth"
    torchvision_weights = torchvision.models.resnet18().state_dict()
    torch.save(torchvision_weights, file)
    command = ["train", str(tiny_yaml), "model.name=resnet18", "train.epochs=4"]
    command += [f"data.root={photos}", "data.scale_px=[64, 80]", "data.crop_px=64"]
    command += ["data.eval_resize_px=72", "data.eval_crop_px=64"]
    command += ["optim.base_lr=0.1", "optim.lr_scales={stem: 0, layer1: 0, fc: 10}"]
    command += ["--init-from", f"torchvision:{file}"]
    cli.main(command)
    said = capsys.readouterr().out
    assert f"initialized from torchvision:{file}: 100 tensors; new head for 2 classes\n" in said
    run = tmp_path / "runs/tiny"
    after = weights(run)
    assert after["fc.weight"].shape == (2, 512)
    assert moved(torchvision_weights, after | {"fc.weight": torch.zeros(1)}) == {
        *("layer2", "layer3", "layer4", "fc")
    }
    cli.main(["predict", str(run), str(photos / "val"), "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    right = sum(f"/{row['class']}/" in row["path"] for row in rows)
    assert len(rows) == 20
    assert right >= 17
    # The same command resumes with what the run itself has learnt: the file may be gone.
    file.unlink()
    cli.main(command)
    said = capsys.readouterr().out
    assert "already finished at step" in said
    assert "initialized" not in said


def pretrained(config: Config) -> Path:
    """The run folder of a checkpoint whose weights and BN statistics are all random."""
    job = build(config, distributed.start())
    generator = torch.Generator().manual_seed(0)
    for tensor in job.state.model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.05 + 0.1 * torch.rand(tensor.shape, generator=generator))
    save(job, Meter(job.world))
    job.saver.finish()
    return config.run_dir


def fail_then_train(
    rank: int, world_size: int, broken: Config, config: Config
) -> tuple[str, Weights]:
    """The line that this rank raises, and the weights that it then starts from."""
    with pytest.raises(UserError) as raised:
        train(broken, "test", Interrupt())
    job = build(config, distributed.start())
    first = {key: tensor.clone() for key, tensor in job.state.model.state_dict().items()}
    assert train(config, "test", Interrupt()).name == "FINISHED"
    return str(raised.value), first


@pytest.mark.parametrize(("world_size", "sync"), [(2, "world"), (3, "none")])
def test_frozen_parts_stay_to_the_bit_on_several_ranks(
    tiny_config: Callable[..., Config], world_size: int, sync: str
) -> None:
    """All but the head is frozen, with a weight decay that would move it, and evaluations between
    the steps. A missing file is the same line on all ranks, and leaves no run folder."""
    broken = tiny_config("name=broken", "model.name=resnet18", "model.init_from=torchvision:x.pth")
    source = pretrained(tiny_config("name=source"))
    config = tiny_config(
        f"model.init_from={source}",
        f"model.sync_batchnorm={sync}",
        "optim.lr_scales={stem: 0, layer1: 0, layer2: 0, layer3: 0}",
        "optim.weight_decay=0.1",
        "optim.decay_norm_and_bias=true",
        "optim.base_lr=0.01",
        "train.epochs=1",
        "train.eval_every_iterations=1",
    )
    answers = run_ranks(fail_then_train, world_size, broken, config, init_process_group=False)
    for line, first in answers:
        assert line == (
            "model.init_from=torchvision:x.pth: cannot be read: No such file or directory; "
            "give torchvision:FILE.pth"
        )
        assert moved(weights(source), first) == set()  # the head too: the classes are the same
    assert [path.name for path in broken.run_dir.iterdir()] == ["outcome.json"]
    assert moved(weights(source), weights(config.run_dir)) == {"fc"}


def test_a_checkpoints_head_is_kept_for_its_own_classes_only(
    tiny_config: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    source = pretrained(tiny_config("name=source"))
    world = distributed.start()
    same = build(tiny_config(f"model.init_from={source}"), world)
    assert restore(same) == f"initialized from {source}: 97 tensors; the head too"
    assert moved(weights(source), same.state.model.state_dict()) == set()
    for split in ("train", "val"):
        for number in range(3):
            other = tmp_path / "other" / split / f"other{number}"
            other.parent.mkdir(parents=True, exist_ok=True)
            other.symlink_to(tiny_folder / split / f"class{number}")
    config = tiny_config(f"model.init_from={source}", f"data.root={tmp_path}/other")
    fresh = build(config, world)
    assert restore(fresh) == f"initialized from {source}: 95 tensors; new head for 3 classes"
    assert moved(weights(source), fresh.state.model.state_dict()) == {"fc"}


def test_other_networks_are_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    world = distributed.start()
    checkpoint_of_plain20 = pretrained(tiny_config("name=source", "model.name=plain20"))
    good = torchvision.models.resnet18().state_dict()
    files = {
        "lacks": {key: good[key] for key in good if key != "layer2.0.bn1.weight"},
        "more": good | {"layer2.2.conv1.weight": torch.zeros(1)},
        "shape": good | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
        "wrapped": {"state_dict": good, "epoch": 3},
        "headless": {key: good[key] for key in good if not key.startswith("fc.")},
        "old": {key: good[key] for key in good if not key.endswith("num_batches_tracked")},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("no weights")

    def said(init_from: object, model: str) -> str:
        config = tiny_config(f"model.init_from={init_from}", f"model.name={model}")
        try:
            return str(restore(build(config, world)))
        except UserError as error:
            text = str(error)
            assert text.startswith(f"model.init_from={init_from}: ")
            assert "\n" not in text
            return text.removeprefix(f"model.init_from={init_from}: ")

    way_out = "give the weights of a resnet18, or set model.name to the network that they belong to"
    assert said(checkpoint_of_plain20, "resnet20") == (
        "holds a plain20, this run trains a resnet20; "
        "give model.name=plain20, or another checkpoint"
    )
    for name, refusal in {
        "lacks": f"has no layer2.0.bn1.weight, which resnet18 has; {way_out}",
        "more": f"has layer2.2.conv1.weight, which resnet18 does not have; {way_out}",
        "shape": "layer1.0.conv1.weight is [64, 64, 1, 1], in resnet18 [64, 64, 3, 3]; " + way_out,
        "wrapped": "is not a state dict (tensors by name, as in torchvision's .pth files); "
        "save model.state_dict() alone",
        "text": "is not a file of weights; download it again",
    }.items():
        assert said(f"torchvision:{tmp_path}/{name}.pth", "resnet18") == refusal
    for name in ("headless", "old"):
        file = f"torchvision:{tmp_path}/{name}.pth"
        expected = f"initialized from {file}: 100 tensors; new head for 3 classes"
        assert said(file, "resnet18") == expected
    for name in ("resnet50_v1", "resnet18_a", "resnet20"):
        refusal = said(f"torchvision:{tmp_path}/old.pth", name)
        assert refusal.startswith(f"torchvision has no {name}: ")
    assert not tiny_config().run_dir.exists()


def test_parts_that_a_network_has_not_are_refused(tiny_config: Callable[..., Config]) -> None:
    world = distributed.start()
    for scales, why in {
        "{layer4: 0}": r"resnet20 has no part layer4, only stem, layer1, layer2, layer3, fc; "
        r"the nearest valid value is {layer3: 0.0}",
        "{stem: 0, layer1: 0, layer2: 0, layer3: 0, fc: 0}": "freezes all parts",
    }.items():
        with pytest.raises(UserError, match=f"command line: optim.lr_scales=.*: {why}"):
            build(tiny_config(f"optim.lr_scales={scales}"), world)


def test_frozen_batchnorm_stays_in_eval_mode(tiny_config: Callable[..., Config]) -> None:
    network = build(tiny_config("optim.lr_scales={stem: 0, layer2: 0}"), distributed.start()).model
    network.eval()
    network.train()
    training = {
        part_of(name)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.BatchNorm2d) and layer.training
    }
    assert training == {"layer1", "layer3"}


def test_weights_of_a_format_that_does_not_note_its_network_are_compared_too(
    tiny_config: Callable[..., Config],
) -> None:
    """plain20 and resnet20 have the same parameters, by name and shape."""
    config = tiny_config(f"model.init_from={GOLDEN / 'format2'}", "model.name=plain20")
    with pytest.raises(UserError, match="holds a resnet20, this run trains a plain20"):
        build(config, distributed.start())

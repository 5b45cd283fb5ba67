"""The paper's three ways to test a network, against slow versions; the same on any world."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from resnet_dist import cli, distributed
from resnet_dist.checkpoints import writer
from resnet_dist.checkpoints.content import Facts
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.config import Config, DataConfig, TrainConfig
from resnet_dist.config_file import load_config
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.build import load_index, make_loader
from resnet_dist.data.view.augment import Request, unchanged, whole_windows
from resnet_dist.data.view.protocol import CENTER_CROP, MULTI_SCALE, TEN_CROP, Protocol
from resnet_dist.data.view.requests import eval_requests
from resnet_dist.errors import UserError
from resnet_dist.evaluate import Score, evaluate
from resnet_dist.models.build import build_model
from resnet_dist.models.depths import Net
from resnet_dist.models.vgg import Vgg
from resnet_dist.optim import build_optimizer
from resnet_dist.state import TrainState
from resnet_dist.verbs.evaluate import check_protocol, evaluate_checkpoint
from resnet_dist.verbs.trained import Trained, load_trained
from tests.support.multirank import run_ranks

SCALES = replace(MULTI_SCALE, scales_px=(32, 48, 36))
# Height, width and number of the images: one shape fills batches, others are of fewer images than
# there are ranks; the third and fourth have one shape at the scales above.
SHAPES = [(60, 44, 9), (44, 60, 2), (48, 48, 3), (50, 50, 2), (41, 97, 1), (97, 41, 1)]
IMAGES = 18

CONFIG = """
name: tested
model: {name: resnet20}
data: {crop_px: 32, scale_px: [40, 48], eval_resize_px: 40, eval_crop_px: 32, decode_threads: 1}
train: {global_batch_size: 8, max_local_batch_size: 4}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 JPEGs of three classes and six shapes."""
    root, rng, number = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0), 0
    for height, width, count in SHAPES:
        for _ in range(count):
            folder = root / "val" / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3)).astype(np.uint8))
            coarse.resize((width, height)).save(folder / f"{number:02}.jpg", quality=95)
            number += 1
    assert number == IMAGES
    return root


@pytest.fixture(scope="module")
def saved(root: Path) -> Callable[..., Path]:
    """saved("data.per_pixel_mean=true"): the checkpoint of a network that is sure of itself, so
    that a view more or less counts."""
    yaml = root / "config.yaml"
    yaml.write_text(f"{CONFIG}data.root: {root}\ntracking.run_root: {root}/runs\n")

    def save(*overrides: str) -> Path:
        name = "-".join(("run", *overrides)).replace("/", "")
        config = load_config(yaml, [f"name={name}", *overrides])
        torch.manual_seed(0)
        network = build_model(config.model.name, 3)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, std=0.3)
                nn.init.uniform_(layer.running_var, 0.5, 2)
        nn.init.normal_(network.fc.weight, std=0.8)
        mean_image = None
        if config.data.per_pixel_mean:
            mean_image = torch.rand(32, 32, 3) * torch.tensor([0.2, 0.6, 1.0])
        optimizer = build_optimizer(network, config.optim)
        state = TrainState(network, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        facts = Facts(classes=("class0", "class1", "class2"), mean_image=mean_image)
        content = state.checkpoint(config, facts)
        return writer.save(config.run_dir, content, Retention())

    return save


# --------------------------------------------------------------------------------------------------
# The slow version: one image at a time, crops cut by hand out of the whole resized image.


class Images:
    """Whole, on the 0..1 scale."""

    def __init__(self, index: Index, config: Config):
        self.index, self.std = index, np.float32(config.data.std)
        self.loader = make_loader(index, config, distributed.start(), np.zeros(3, np.float32))

    def resized(self, sample: int, shorter_px: int) -> np.ndarray:
        """float32 [h, w, 3]."""
        height, width = self.index.sizes[sample].tolist()
        longer_px = shorter_px * max(height, width) // min(height, width)
        size = (shorter_px, longer_px) if height <= width else (longer_px, shorter_px)
        window = unchanged(np.array([[0.0, 0, height, width]]), size)
        (batch,) = self.loader.batches([Request(np.array([sample]), window)])
        return batch.images[0].permute(1, 2, 0).numpy() * self.std


def ten_views(images: Images, sample: int, mean: np.ndarray) -> Iterator[np.ndarray]:
    whole = images.resized(sample, 40)
    height, width = whole.shape[:2]
    middle = round((height - 32) / 2), round((width - 32) / 2)
    corners = [(0, 0), (0, width - 32), (height - 32, 0), (height - 32, width - 32)]
    for top, left in [*corners, middle]:
        crop = whole[top : top + 32, left : left + 32] - mean
        yield crop
        yield crop[:, ::-1]


def scale_views(images: Images, sample: int, mean: np.ndarray) -> Iterator[np.ndarray]:
    for shorter_px in SCALES.scales_px:
        whole = images.resized(sample, shorter_px) - mean.reshape(-1, 3).mean(0)
        yield whole
        yield whole[:, ::-1]


def dense_logits(network: nn.Module, x: Tensor) -> Tensor:
    """The classifier at each position of the last map; then the mean over the positions."""
    x = network.relu(network.bn1(network.conv1(x)))
    x = network.layer3(network.layer2(network.layer1(x)))
    return network.fc(x.permute(0, 2, 3, 1)).mean((1, 2))


@torch.no_grad()
def slow(path: Path, views: Callable[..., Iterator[np.ndarray]]) -> tuple[Score, float]:
    """The score, and the loss if the logits were averaged, not the probabilities."""
    trained = load_trained(path, [], distributed.start())
    config, index = trained.config, load_index(trained.config, "val", distributed.start())
    mean = np.float32(config.data.mean) if trained.mean_image is None else trained.mean_image
    images = Images(index, config)
    right, loss, loss_of_logits = 0, 0.0, 0.0
    for sample, label in enumerate(index.labels.tolist()):
        logits = []
        for view in views(images, sample, mean):
            pixels = torch.from_numpy(view / images.std).permute(2, 0, 1)
            logits.append(dense_logits(trained.network, pixels[None])[0].double())
        p = torch.stack([one.softmax(0) for one in logits]).mean(0)
        right += int(p.argmax()) == label
        loss -= float(p[label].log())
        loss_of_logits -= float(torch.stack(logits).mean(0).log_softmax(0)[label])
    return Score(right, IMAGES, loss, IMAGES), loss_of_logits / IMAGES


@pytest.mark.parametrize("mean", ["false", "true"])
@pytest.mark.parametrize(("protocol", "views"), [(TEN_CROP, ten_views), (SCALES, scale_views)])
def test_a_protocol_is_the_slow_version(
    saved: Callable[..., Path], protocol: Protocol, views: Callable[..., Iterator], mean: str
) -> None:
    path = saved(f"data.per_pixel_mean={mean}")
    by_hand, loss_of_logits = slow(path, views)
    score = evaluate_checkpoint(path, [], protocol)
    assert (score.correct1, score.correct5, score.images) == (by_hand.correct1, IMAGES, IMAGES)
    assert score.loss == pytest.approx(by_hand.loss, rel=1e-4)
    # The test can fail.
    assert abs(loss_of_logits - by_hand.loss) > 0.01
    assert abs(evaluate_checkpoint(path, []).loss - by_hand.loss) > 0.01


def test_ten_crops_are_where_the_paper_has_them() -> None:
    """60 x 80 is resized to 40 x 53, so that 8 and 21 pixels are left for a crop to move."""
    data = DataConfig(eval_resize_px=40, eval_crop_px=32)
    windows = TEN_CROP.windows(data, np.array([[60, 80]]))
    corners = [(0, 0), (0, 21), (8, 0), (8, 21), (4, 10)]
    down, across = 60 / 40, 80 / 53
    for seen, (top, left) in zip(windows, corners, strict=True):
        expected = [top * down, left * across, (top + 32) * down, (left + 32) * across]
        assert seen.roi[0] == pytest.approx(expected)
        assert seen.size_px == (32, 32)
        assert not seen.flip.any()
    assert (CENTER_CROP.views, TEN_CROP.views, MULTI_SCALE.views) == (1, 10, 10)


def test_batches_of_one_shape_and_bounded() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([100, 150, 151, 900], (2000, 2)).astype(np.int32)
    config = Config(train=TrainConfig(max_local_batch_size=64))
    batches = MULTI_SCALE.batches(config, sizes)
    assert sorted(np.concatenate(batches)) == list(range(2000))
    assert max(map(len, batches)) > 1
    for samples in batches:
        windows = MULTI_SCALE.windows(config.data, sizes[samples])  # raises if shapes differ
        height, width = windows[-1].size_px
        assert min(height, width) == 640
        assert len(samples) == 1 or len(samples) * height * width <= 64 * 224**2
    # Small scales: no more images than the loader takes.
    small = replace(MULTI_SCALE, scales_px=(32,)).batches(config, sizes)
    assert max(map(len, small)) == 64
    # 100 x 150 and 200 x 300 are one at every scale, 100 x 151 is not at 640.
    same = replace(MULTI_SCALE, scales_px=(224, 640))
    groups = same.batches(Config(), np.array([[100, 150], [100, 151], [200, 300]]))
    assert [group.tolist() for group in groups] == [[0, 2], [1]]
    with pytest.raises(ValueError, match="cannot form a batch"):
        whole_windows(np.array([[100, 150], [100, 151]]), 640)


# --------------------------------------------------------------------------------------------------
# On any world


def scores_of(rank: int, world_size: int, path: Path) -> list[Score]:
    """In batches of 4 images, and of all of them: then most ranks have none."""
    world = distributed.start()
    trained, scores = load_trained(path, [], world), []
    index = load_index(trained.config, "val", world)
    for most in (4, 64):
        train = replace(trained.config.train, max_local_batch_size=most)
        config = replace(trained.config, train=train)
        loader = make_loader(index, config, world)
        for protocol in (CENTER_CROP, TEN_CROP, SCALES):
            requests = eval_requests(config, index, protocol, rank, world_size)
            batches = loader.batches(requests)
            scores.append(evaluate(trained.network, batches, world, "fp32", protocol))
    return scores


def test_scores_are_the_same_on_any_world(
    saved: Callable[..., Path], record_difference: Callable[[str, float], None]
) -> None:
    path = saved()
    alone = run_ranks(scores_of, 1, path, init_process_group=False)[0]
    assert all(score.images == IMAGES for score in alone)
    assert len({score.loss for score in alone[:3]}) == 3  # the protocols differ
    for world_size in (2, 3, 4):
        for of_rank in run_ranks(scores_of, world_size, path, init_process_group=False):
            for score, first in zip(of_rank, alone, strict=True):
                assert replace(score, loss_sum=0.0) == replace(first, loss_sum=0.0)
                assert score.loss_sum == pytest.approx(first.loss_sum, rel=1e-12)
    what = "right answers, centre crop, ten-crop and multi-scale, on 1, 2, 3 and 4 ranks"
    record_difference(f"{what}", 0.0)


# --------------------------------------------------------------------------------------------------
# VGG


@pytest.fixture(scope="module")
def vgg() -> Vgg:
    """A convolution per stage, and all of the fully connected layers."""
    torch.manual_seed(0)
    network = Vgg(Net("vgg", "conv", (1, 1, 1, 1, 1)), num_classes=3).eval()
    nn.init.normal_(network.classifier[6].weight, std=0.5)
    return network


@torch.no_grad()
def test_vgg_is_fully_convolutional_on_whole_images_only(vgg: Vgg) -> None:
    images, labels, world = torch.randn(1, 3, 224, 256), torch.tensor([1]), distributed.start()
    slides, pools = vgg.dense(images).log_softmax(1)[0, 1], vgg(images).log_softmax(1)[0, 1]
    assert abs(slides - pools) > 1e-3
    for protocol, log_p in [(Protocol("", scales_px=(224,)), slides), (CENTER_CROP, pools)]:
        score = evaluate(vgg, [Batch(images, labels)], world, "fp32", protocol)
        assert score.loss == pytest.approx(-log_p.item(), rel=1e-5)


def test_protocols_that_cannot_be_followed(vgg: Vgg) -> None:
    labels, sizes = np.zeros(2, np.int64), np.full((2, 2), 32)
    photos = Index(("a",), labels, sizes, ("a.jpg", "b.jpg"), None, "")
    trained = Trained(Config(), vgg, ("a",), None, {})
    check_protocol(MULTI_SCALE, trained, photos)
    small = replace(MULTI_SCALE, scales_px=(256, 223))
    with pytest.raises(UserError, match="223 px: resnet50 needs at least 224"):
        check_protocol(small, trained, photos)
    check_protocol(small, replace(trained, network=nn.Linear(1, 1)), photos)
    raw = replace(photos, paths=(), pixels=np.zeros((2, 32, 32, 3), np.uint8))
    check_protocol(CENTER_CROP, trained, raw)
    for protocol in (TEN_CROP, MULTI_SCALE):
        with pytest.raises(UserError, match=f"--protocol {protocol.name}: .* use center-crop"):
            check_protocol(protocol, trained, raw)


# --------------------------------------------------------------------------------------------------
# The command line


def test_the_command_line(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = saved()
    cli.main(["evaluate", str(path)])
    assert capsys.readouterr().out == f"{evaluate_checkpoint(path, [])}\n"
    cli.main(["evaluate", str(path), "--protocol", "ten-crop", "data.decode_threads=2"])
    assert capsys.readouterr().out == f"ten-crop\n{evaluate_checkpoint(path, [], TEN_CROP)}\n"
    cli.main(["evaluate", str(path), "--protocol", "multi-scale", "--scales", "32,48,36"])
    score = evaluate_checkpoint(path, [], SCALES)
    expected = f"multi-scale  shorter side 32, 48, 36 px\n{score}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--scales 224", "--scales needs --protocol multi-scale"),
        ("--protocol multi-scale --scales 224,x", "--scales 224,x: must be distinct"),
        ("--protocol multi-scale --scales 224,224", "must be distinct whole numbers above zero"),
        ("--protocol multi-scale --scales 0", "must be distinct whole numbers above zero"),
        ("--save-to here", "--save-to goes with --recalibrate-bn"),
        ("model.name=resnet32", "command line: model.name=resnet32: "),
    ],
)
def test_bad_input_is_one_line(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str], arguments: str, line: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", str(saved()), *arguments.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_an_unreadable_image_counts_as_wrong_with_the_loss_of_a_guess() -> None:
    class Sure(nn.Module):  # of class 3, always
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[0.0, 0, 0, 9, 0, 0]]).expand(len(images), 6)

    def score(labels: list[int]) -> Score:
        batch = Batch(torch.zeros(len(labels), 3, 8, 8), torch.tensor(labels))
        return evaluate(Sure(), [batch], distributed.start(), "fp32")

    whole, spoiled = score([3, 3, 0]), score([3, -1, 0])
    assert (whole.correct1, whole.images) == (2, 3)
    assert (spoiled.correct1, spoiled.correct5, spoiled.images) == (1, whole.correct5 - 1, 3)
    right = score([3]).loss_sum
    assert spoiled.loss_sum == pytest.approx(whole.loss_sum - right + math.log(6))
    # Unreadable in one view is unreadable.
    views = [Batch(torch.zeros(2, 3, 8, 8), torch.tensor(labels)) for labels in ([3, 3], [3, -1])]
    twice = Protocol("two", crops=((0, 0), (1, 1)))
    assert evaluate(Sure(), views, distributed.start(), "fp32", twice).correct1 == 1

"""A run on 2, 3 and 4 ranks is the run on one: what is seen, what is learned, and what BN sees.

In float64, where nothing but the order of sums differs, to 1e-12. In float32 that is not enough:
of the millions of values that reach a ReLU in a step, some lie so near 0 that rounding decides
whether they pass, and each that does shows in the gradient. So there the runs may differ as much
as rounding alone makes one rank differ from itself in float64.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from resnet_dist import distributed
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.config_file import load_config
from resnet_dist.data.load.batch import Batch
from resnet_dist.job import build, train_batches
from resnet_dist.plan import Plan
from resnet_dist.run.lookahead import take
from resnet_dist.run.meter import Meter
from resnet_dist.run.plan_text import describe_plan
from resnet_dist.train import train_step
from tests.support.multirank import run_ranks
from tests.support.recorded import (
    Run,
    double_precision,
    global_batches,
    journal,
    loss_differences,
    record,
    relative_difference,
)
from tests.support.slow import slow

STEPS = 50
BATCH = 256
TRAIN_IMAGES = 600  # two steps an epoch, and 88 images that are left out of each

# The network is ResNet-20, the images are small: 50 steps of 256 on a CPU.
CONFIG = f"""
name: w1
model: {{name: resnet20}}
data:
  train_crop: scale
  scale_px: [7, 12]
  crop_px: 6
  eval_resize_px: 7
  eval_crop_px: 6
  decode_threads: 1
optim: {{base_lr: 0.05, schedule: cosine, warmup_epochs: 2, clip_grad_norm: 0.5}}
train:
  epochs: null
  iterations: {STEPS}
  global_batch_size: {BATCH}
  max_local_batch_size: {BATCH}
  log_every_steps: 1
  eval_every_epochs: null
  eval_every_iterations: {STEPS}
  save_every_epochs: null
  save_every_iterations: {STEPS}
tracking: {{mlflow: false}}
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small JPEGs of four classes and many shapes; a third have another's colour, so that there is
    a loss to the end."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 90, (4, 3))
    for split, images in {"train": TRAIN_IMAGES, "val": 8}.items():
        for number in range(images):
            label = number % 4
            height, width = rng.integers(10, 18, 2)
            colour = colours[label if rng.random() < 2 / 3 else rng.integers(4)]
            pixels = colour + rng.integers(0, 166, (height, width, 3))
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def config_of(photos: Path) -> Callable[..., Config]:
    yaml = photos / "config.yaml"
    yaml.write_text(f"{CONFIG}data.root: {photos}\ntracking.run_root: {photos}/runs\n")
    return lambda *overrides: load_config(yaml, overrides)


def run(rank: int, world_size: int, config: Config, per_node: int, float64: bool) -> Run:
    os.environ.update(LOCAL_RANK=str(rank % per_node), LOCAL_WORLD_SIZE=str(per_node))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return record(config, float64=float64)


def run_on(
    world_size: int, config: Config, *, float64: bool, per_node: int | None = None
) -> list[Run]:
    arguments = (config, per_node or world_size, float64)
    ranks = run_ranks(run, world_size, *arguments, init_process_group=False)
    assert [r.outcome for r in ranks] == ["FINISHED"] * world_size
    return ranks


def weights(config: Config) -> dict[str, Tensor]:
    return Checkpoint.load(config.run_dir / "checkpoints" / "latest").model


def distance(ours: Config, theirs: Config) -> float:
    """Between the parameters as two points, relative to their size."""
    a, b = (
        torch.cat([v.double().flatten() for k, v in weights(c).items() if "running" not in k])
        for c in (ours, theirs)
    )
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def alone(config_of: Callable[..., Config]) -> tuple[Config, list[Run]]:
    """One rank, in float64."""
    config = config_of("name=w1")
    return config, run_on(1, config, float64=True)


def assert_same_data(ranks: list[Run], alone: list[Run]) -> None:
    """The sample numbers, windows, labels and pixels of each step, in order, bit for bit."""
    seen, expected = global_batches(ranks), global_batches(alone)
    assert list(seen) == list(expected) == list(range(STEPS))
    assert all(seen[step].equals(expected[step]) for step in range(STEPS))
    assert {len(batch.samples) for batch in seen.values()} == {BATCH}


@pytest.mark.parametrize("world_size", [2, slow(3), slow(4)])
def test_n_ranks_equal_one(
    config_of: Callable[..., Config],
    alone: tuple[Config, list[Run]],
    world_size: int,
    record_difference: Callable[[str, float], None],
) -> None:
    """50 steps of 256 images, 85, 85 and 86 of them on 3 ranks; synchronized BN."""
    one, its_run = alone
    config = config_of(f"name=w{world_size}")
    ranks = run_on(world_size, config, float64=True)
    assert {len(r.steps[0][0].labels) for r in ranks} == {256 // world_size, -(-256 // world_size)}
    assert_same_data(ranks, its_run)
    of_losses = loss_differences(journal(config), journal(one))
    of_weights = relative_difference(weights(config), weights(one))
    assert len(of_losses) == STEPS
    assert of_losses.max() < 1e-12
    assert of_weights < 1e-12
    what = f"{world_size} ranks and 1, {STEPS} steps of {BATCH}, float64"
    record_difference(f"{what}: samples, windows, pixels", 0.0)
    record_difference(f"{what}: loss", of_losses.max())
    record_difference(f"{what}: weights and BN statistics", of_weights)


@pytest.mark.slow
def test_float32_differs_by_rounding(
    config_of: Callable[..., Config],
    alone: tuple[Config, list[Run]],
    record_difference: Callable[[str, float], None],
) -> None:
    exact, its_run = alone
    one, three = config_of("name=w1-float32"), config_of("name=w3-float32")
    run_on(1, one, float64=False)
    assert_same_data(run_on(3, three, float64=False), its_run)
    of_losses, of_weights = loss_differences(journal(three), journal(one)), distance(three, one)
    assert of_losses[:3].max() < 5e-5
    assert of_losses.max() < 2e-2
    assert of_weights < 2e-2
    assert of_losses.max() < 4 * loss_differences(journal(one), journal(exact)).max()
    assert of_weights < 4 * distance(one, exact)
    what = f"3 ranks and 1, {STEPS} steps of {BATCH}, float32"
    record_difference(f"{what}: loss of the first 3", of_losses[:3].max())
    record_difference(f"{what}: loss", of_losses.max())
    record_difference(f"{what}: weights, as a distance", of_weights)
    what = "1 rank, float32 and float64"
    rounding = loss_differences(journal(one), journal(exact)).max(), distance(one, exact)
    record_difference(f"{what} (what rounding does): loss", rounding[0])
    record_difference(f"{what} (what rounding does): weights", rounding[1])


def test_without_synchronized_bn_it_is_another_run(
    config_of: Callable[..., Config], alone: tuple[Config, list[Run]]
) -> None:
    """So the tests above can fail. The warm-up, 4 steps, is the same in a run of 4."""
    config = config_of("name=local", "model.sync_batchnorm=none", "train.iterations=4")
    run_on(2, config, float64=True)
    assert len(loss_differences(journal(config), journal(alone[0]))) == 4
    assert loss_differences(journal(config), journal(alone[0])).max() > 1e-3


# --------------------------------------------------------------------------------------------------
# What is normalized together: 64 images in 8 slices of 8, as ranks or as passes.

SLICES = ("train.global_batch_size=64", "train.max_local_batch_size=8")
# model.sync_batchnorm, ranks per node, images per pass, BN in evaluation mode
Way = tuple[str, int, int, bool]
WAYS: dict[int, list[Way]] = {
    8: [("world", 8, 8, True), ("none", 8, 8, False), ("world", 8, 8, False),
        ("node", 4, 8, False), ("node", 2, 8, False)],
    4: [("world", 4, 8, True), ("none", 4, 8, False), ("world", 4, 8, False),
        ("node", 2, 8, False)],
    2: [("world", 2, 8, True), ("none", 2, 8, False), ("world", 2, 8, False)],
    # One rank needs no synchronization: these are what the others must equal.
    1: [("none", 1, 8, True), *(("none", 1, images, False) for images in (8, 16, 32, 64))],
}  # fmt: skip


def images_together(world_size: int, way: Way) -> int:
    """Which BN normalizes together; 0 in evaluation mode."""
    sync_batchnorm, per_node, per_pass, evaluates = way
    sharing = {"none": 1, "node": per_node, "world": world_size}[sync_batchnorm]
    return 0 if evaluates else per_pass * sharing


def gradients(rank: int, world_size: int, config: Config) -> dict[int, dict[str, Tensor]]:
    """Of the first step, in float64, for each number of images that are normalized together."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found: dict[int, dict[str, Tensor]] = {}
    passes: dict[int, list[Batch]] = {}  # by their number
    for way in WAYS[world_size]:
        sync_batchnorm, per_node, per_pass, evaluates = way
        os.environ.update(LOCAL_RANK=str(rank % per_node), LOCAL_WORLD_SIZE=str(per_node))
        model = replace(config.model, sync_batchnorm=sync_batchnorm)
        train = replace(config.train, max_local_batch_size=per_pass)
        with double_precision():
            job = build(replace(config, model=model, train=train), distributed.start())
        for layer in job.state.model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train(not evaluates)
        count = job.plan.accumulation
        assert count * world_size * per_pass == 64
        if count not in passes:
            batches = train_batches(job)
            taken, _ = take(batches, count)
            passes[count] = [
                replace(b, images=b.images.clone(), labels=b.labels.clone()) for b in taken
            ]
            batches.close()
        train_step(job, passes[count], Meter(job.world))
        together = images_together(world_size, way)
        found[together] = {k: p.grad.clone() for k, p in job.state.model.named_parameters()}
    return found


@pytest.mark.slow
def test_accumulation_gives_the_same_gradients_where_bn_sees_the_same(
    config_of: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    """8 ranks x 1 pass, 4 x 2, 2 x 4. With BN in training, who is normalized with whom decides."""
    config = config_of("name=accumulated", *SLICES)
    alone = run_ranks(gradients, 1, config, init_process_group=False)[0]
    largest = dict.fromkeys(alone, 0.0)
    for world_size in (8, 4, 2):
        of_world = run_ranks(gradients, world_size, config, init_process_group=False)[0]
        for together, ours in of_world.items():
            difference = relative_difference(ours, alone[together])
            assert difference < 1e-12, f"{world_size} ranks, {together} images together"
            largest[together] = max(largest[together], difference)
    for together, difference in largest.items():
        what = f"BN of {together} images" if together else "BN in evaluation mode"
        what = f"gradients of 8 ranks x 1 pass, 4 x 2, 2 x 4 and 1 rank, float64: {what}"
        record_difference(f"{what}", difference)
    # 8, 16, 32 or 64 images together, or none: all different.
    assert list(alone) == [0, 8, 16, 32, 64]
    for ours, theirs in combinations(alone.values(), 2):
        assert relative_difference(ours, theirs) > 1e-3


def test_the_plan_says_what_bn_sees(config_of: Callable[..., Config]) -> None:
    """The same numbers as in the test above."""
    for world_size, ways in WAYS.items():
        for way in ways:
            sync_batchnorm, per_node, per_pass, evaluates = way
            settings = (
                f"model.sync_batchnorm={sync_batchnorm}",
                f"train.max_local_batch_size={per_pass}",
            )
            plan = Plan.of(config_of(*SLICES, *settings), world_size, TRAIN_IMAGES, 8, per_node)
            if not evaluates:
                assert plan.bn_batch_size == images_together(world_size, way)
                assert f"BN batch         {plan.bn_batch_size} images = " in describe_plan(plan)


@pytest.mark.slow
def test_a_node_is_a_rank_to_bn(
    config_of: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    """2 nodes of 2 ranks with BN per node, and 2 ranks without: the same halves of each batch."""
    settings = ("train.iterations=5", "train.global_batch_size=64", "optim.warmup_epochs=0")
    nodes = config_of("name=nodes", "model.sync_batchnorm=node", *settings)
    ranks = config_of("name=ranks", "model.sync_batchnorm=none", *settings)
    world = config_of("name=world", "model.sync_batchnorm=world", *settings)
    run_on(4, nodes, float64=True, per_node=2)
    run_on(2, ranks, float64=True)
    run_on(2, world, float64=True)
    of_losses = loss_differences(journal(nodes), journal(ranks)).max()
    of_weights = relative_difference(weights(nodes), weights(ranks))
    assert of_losses < 1e-12
    assert of_weights < 1e-12
    assert loss_differences(journal(nodes), journal(world)).max() > 1e-3  # the test can fail
    what = "2 nodes of 2 ranks, BN per node, and 2 ranks, BN alone; 5 steps, float64"
    record_difference(f"{what}: loss", of_losses)
    record_difference(f"{what}: weights and BN statistics", of_weights)

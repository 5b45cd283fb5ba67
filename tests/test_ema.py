"""Averaged weights: their arithmetic, who uses them, and that they outlive a stop."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_dist import distributed
from resnet_dist.checkpoints import writer
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.determinism import fix_algorithms
from resnet_dist.ema import AveragedNetwork
from resnet_dist.job import Job, agree_on_running_stats, build, train_batches
from resnet_dist.models import vgg
from resnet_dist.models.build import build_model
from resnet_dist.optim import set_lr
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.lookahead import take
from resnet_dist.run.meter import Meter
from resnet_dist.train import train, train_step
from resnet_dist.verbs.evaluate import evaluate_checkpoint
from resnet_dist.verbs.export import export
from resnet_dist.verbs.predict import classify, find_images
from resnet_dist.verbs.trained import load_trained
from tests.support.host_sync import no_host_sync
from tests.support.multirank import run_ranks
from tests.support.recorded import record
from tests.support.slow import slow

State = dict[str, Tensor]
Record = Callable[[str, float], None]
EMA = ("train.ema_decay=0.7", "optim.base_lr=0.05")


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()


def on_meta(build: Callable[[], nn.Module] = small) -> nn.Module:
    with torch.device("meta"):
        return build()


def copied(state: State) -> State:
    return {key: tensor.clone() for key, tensor in state.items()}


def difference(a: State, b: State) -> float:
    assert list(a) == list(b)
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def saved(config: Config, which: str = "latest") -> dict[str, Any]:
    return Checkpoint.load(config.run_dir / "checkpoints" / which).to_dict()


def journal(config: Config) -> dict[int, dict[str, float]]:
    metrics: dict[int, dict[str, float]] = {}
    for line in (config.run_dir / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        metrics.setdefault(record["step"], {}).update(record["metrics"])
    return {
        s: {k: v for k, v in m.items() if not k.startswith("perf/")} for s, m in metrics.items()
    }


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_is_that_of_the_formula(decay: float, record_difference: Record) -> None:
    trained = small()
    average = AveragedNetwork(trained, on_meta(), decay)
    expected, largest = copied(trained.state_dict()), 0.0
    for step in range(1, 31):
        for tensor in trained.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor))
            else:
                tensor += 3
        average.update(step)
        d = min(decay, (1 + step) / (10 + step))
        for key, tensor in trained.state_dict().items():
            if tensor.is_floating_point():
                expected[key] = d * expected[key] + (1 - d) * tensor
            else:
                expected[key] = tensor.clone()
        largest = max(largest, difference(average.network.state_dict(), expected))
    assert 0 < largest < 1e-14
    assert average.network.state_dict()["1.num_batches_tracked"] == 90
    record_difference(f"EMA and its formula, decay {decay}, float64", largest)


def test_what_does_not_change_stays_to_the_last_bit() -> None:
    trained = small().float()
    average = AveragedNetwork(trained, on_meta(), 0.9)
    before = copied(trained.state_dict())
    for step in range(1, 100):
        average.update(step)
    assert all(torch.equal(t, before[key]) for key, t in average.network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet20", "resnet18_a", "plain18", "vgg19_bn"])
def test_it_starts_as_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every form, all tensors are there, and apart from the trained ones."""
    monkeypatch.setattr(vgg, "MAP_PX", 1)  # a small head
    trained = build_model(name, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedNetwork(trained, on_meta(lambda: build_model(name, 3)), 0.9)
    ours, theirs = average.network.state_dict(), trained.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(ours[key].stride() == theirs[key].stride() for key in theirs)
    assert not {t.data_ptr() for t in ours.values()} & {t.data_ptr() for t in theirs.values()}
    everything = [*average.network.parameters(), *average.network.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in everything)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(average.network(images), trained.eval()(images))


@pytest.fixture
def averaged(tiny_config: Callable[..., Config]) -> Config:
    config = tiny_config(*EMA)
    train(config, "test", Interrupt())
    return config


def test_the_training_does_not_notice(
    averaged: Config, tiny_config: Callable[..., Config], record_difference: Record
) -> None:
    plain = tiny_config("name=plain", "optim.base_lr=0.05")
    train(plain, "test", Interrupt())
    assert saved(plain)["ema"] is None
    largest = difference(saved(averaged)["model"], saved(plain)["model"])
    assert largest == 0
    record_difference("trained weights, with EMA and without", largest)
    assert difference(saved(averaged)["ema"], saved(plain)["model"]) > 1e-3


def test_the_averaged_weights_are_what_is_used(averaged: Config, tiny_folder: Path) -> None:
    """By evaluations in training, hence the best, and by every verb that reads a checkpoint."""
    best, world = averaged.run_dir / "checkpoints/best", distributed.start()
    content = Checkpoint.load(best).to_dict()
    scored = journal(averaged)[content["step"]]
    assert evaluate_checkpoint(best, []).metrics() == {k: scored[k] for k in scored if "val/" in k}
    assert content["best"]["acc1"] == scored["val/acc1"]

    trained = load_trained(best, [], world)
    assert difference(trained.network.state_dict(), content["ema"]) == 0
    # The test can fail: the weights themselves have another loss.
    trained.write(averaged.run_dir / "weights")
    loose = Checkpoint.load(averaged.run_dir / "weights").to_dict()
    assert difference(loose["ema"], content["ema"]) == 0
    writer.write(averaged.run_dir / "trained", Checkpoint.from_dict(content | {"ema": None}))
    assert evaluate_checkpoint(averaged.run_dir / "trained", []).loss != scored["val/loss"]

    found = classify(trained, find_images([str(tiny_folder / "val")]), world)
    assert found
    fine = replace(averaged, name="fine", model=replace(averaged.model, init_from=str(best)))
    job = build(fine, world)
    assert job.state.ema is not None
    for network in (job.state.model, job.state.ema.network):
        ours = network.state_dict()
        assert all(torch.equal(ours[k], content["ema"][k]) for k in ours if "num_b" not in k)


def test_the_averaged_weights_are_exported(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config(*EMA, "model.name=resnet18", "train.iterations=2")
    train(config, "test", Interrupt())
    export(config.run_dir, "torchvision", tmp_path / "x.pth")
    weights = torch.load(tmp_path / "x.pth", weights_only=True)
    assert difference(weights, saved(config)["ema"]) == 0
    assert difference(weights, saved(config)["model"]) > 1e-3


def test_new_bn_statistics_are_written_with_the_averaged_weights(averaged: Config) -> None:
    before, folder = saved(averaged, "best"), averaged.run_dir / "recalibrated"
    score = evaluate_checkpoint(averaged.run_dir, [], bn_images=30, save_to=folder)
    after = Checkpoint.load(folder).to_dict()
    assert evaluate_checkpoint(folder, []) == score
    assert torch.equal(after["ema"]["conv1.weight"], before["ema"]["conv1.weight"])
    assert not torch.equal(after["ema"]["bn1.running_mean"], before["ema"]["bn1.running_mean"])
    assert difference(after["model"], before["model"]) == 0


# --------------------------------------------------------------------------------------------------
# Across a stop

ACROSS = [*EMA, "train.epochs=3", "train.log_every_steps=4", "optim.lr_scales={stem: 0, fc: 2}"]


def record_on(rank: int, world_size: int, config: Config, stop_before: int | None) -> str:
    return record(config, stop_before).outcome


def run_on(world_size: int, config: Config, stop_before: int | None = None) -> str:
    if world_size == 1:
        return record(config, stop_before).outcome
    arguments = (config, stop_before)
    return run_ranks(record_on, world_size, *arguments, init_process_group=False)[0]


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, ()),
        (1, ("train.precision=bf16",)),
        slow(2, ()),
        slow(3, ("model.sync_batchnorm=none", "train.deterministic=true")),
    ],
)
def test_a_stop_changes_nothing(
    tiny_config: Callable[..., Config],
    record_difference: Record,
    world_size: int,
    more: tuple[str, ...],
) -> None:
    """9 steps, and stopped before the 3rd, and alone the 4th and 9th; a log line every 4 steps."""
    stops = (2, 3, 8) if world_size == 1 else (2,)
    whole = tiny_config("name=whole", *ACROSS, *more)
    parts = replace(whole, name="parts")
    assert run_on(world_size, whole) == "FINISHED"
    for stop_before in stops:
        assert run_on(world_size, parts, stop_before) == "STOPPED"
    assert run_on(world_size, parts) == "FINISHED"
    ours, theirs = saved(parts), saved(whole)
    how = " ".join((f"stopped {len(stops)} times, {world_size} ranks", *more))
    for key in ("ema", "model"):
        largest = difference(ours[key], theirs[key])
        assert largest == 0
        record_difference(f"{key}, {how}", largest)
    assert torch.equal(ours["meter"], theirs["meter"])
    assert ours["train_loss"] == theirs["train_loss"]
    assert journal(parts) == journal(whole)
    assert list(journal(whole)) == [3, 4, 6, 8, 9]


def test_it_may_be_switched_on_and_off(averaged: Config) -> None:
    """Only with --resume-anyway: on, it starts from the weights there are."""
    world, content = distributed.start(), saved(averaged)
    averaged = replace(averaged, name="another")
    plain = build(replace(averaged, train=replace(averaged.train, ema_decay=None)), world)
    plain.state.restore(Checkpoint.from_dict(content))
    assert plain.state.ema is None
    again = build(averaged, world)
    again.state.restore(Checkpoint.from_dict(content | {"ema": None}))
    assert again.state.ema is not None
    assert difference(again.state.ema.network.state_dict(), content["model"]) == 0


# --------------------------------------------------------------------------------------------------
# Local BN, and steps that fp16 skips


def averages_of_ranks(rank: int, world_size: int, config: Config) -> tuple[State, State]:
    """The averaged network's state after three steps, before and after the ranks agreed."""
    fix_algorithms(config.train.deterministic)
    job = build(config, distributed.start())
    assert job.state.ema is not None
    for network in (job.state.model, job.state.ema.network):  # whose mean over 3 ranks is rounded
        network.bn1.running_var.copy_(torch.linspace(0.1, 1, 16))  # type: ignore[union-attr, operator]
    three_steps(job)
    own = copied(job.state.ema.network.state_dict())
    agree_on_running_stats(job)
    return own, copied(job.state.ema.network.state_dict())


def three_steps(job: Job) -> None:
    batches = train_batches(job)
    for _ in range(3):
        set_lr(job.state.optimizer, 0.05)
        train_step(job, take(batches, job.plan.accumulation)[0], Meter(job.world))
        job.state.step += 1
    batches.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_local_bn_is_averaged_over_the_ranks(
    tiny_config: Callable[..., Config], record_difference: Record, deterministic: bool
) -> None:
    """The frozen stem's statistics apart, which are equal, and stay so to the last bit."""
    settings = [*ACROSS, "model.sync_batchnorm=none"]
    config = tiny_config(*settings, f"train.deterministic={str(deterministic).lower()}")
    results = run_ranks(averages_of_ranks, 3, config, init_process_group=False)
    own, agreed = [r[0] for r in results], [r[1] for r in results]
    assert difference(agreed[0], agreed[1]) == difference(agreed[0], agreed[2]) == 0
    key = "layer1.0.bn1.running_mean"
    assert torch.equal(own[0][key], own[1][key]) == deterministic  # else there is nothing to do
    expected = {k: torch.stack([s[k].double() for s in own]).mean(0) for k in own[0]}
    largest = difference(agreed[0], expected)
    assert largest < 1e-6
    assert torch.equal(agreed[0]["bn1.running_var"], own[0]["bn1.running_var"])
    mode = "deterministic" if deterministic else "float32"
    what = f"EMA of local BN and the mean over 3 ranks, {mode}"
    record_difference(what, largest)


def test_a_skipped_step_counts(tiny_config: Callable[..., Config]) -> None:
    """fp16: the weights stay, and the average goes on towards them."""
    job = build(tiny_config(*EMA, "train.precision=fp16"), distributed.start())
    job.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    assert job.state.ema is not None
    average = job.state.ema.network.state_dict()["fc.weight"]
    average.zero_()
    before = job.state.model.fc.weight.detach().clone()  # type: ignore[union-attr, operator]
    passes = take(train_batches(job), job.plan.accumulation)[0]
    train_step(job, passes, Meter(job.world))
    assert torch.equal(job.state.model.fc.weight, before)  # type: ignore[arg-type]
    torch.testing.assert_close(average, before * 9 / 11)  # 1 - (1 + 1) / (10 + 1)


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_gpu() -> None:
    trained = build_model("resnet18", 3).cuda()
    average = AveragedNetwork(trained, on_meta(lambda: build_model("resnet18", 3)), 0.9)
    with no_host_sync():
        average.update(1)
    assert all(tensor.is_cuda for tensor in average.network.state_dict().values())

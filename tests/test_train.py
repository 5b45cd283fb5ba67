"""Training end to end. That worlds and stops change nothing: test_worlds.py, test_resume.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from resnet_dist import cli, distributed
from resnet_dist.checkpoints import folders
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.view.requests import train_requests
from resnet_dist.errors import UserError
from resnet_dist.evaluate import Score
from resnet_dist.job import Job, build
from resnet_dist.models import vgg
from resnet_dist.optim import set_lr
from resnet_dist.plan import Plan
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.lookahead import take
from resnet_dist.run.meter import Meter
from resnet_dist.run.outcome import Outcome
from resnet_dist.state import TrainState
from resnet_dist.tracking.mirror import mlflow_client
from resnet_dist.train import train, train_step
from resnet_dist.verbs.evaluate import evaluate_checkpoint
from tests.support.multirank import run_ranks
from tests.support.needs import needs
from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS


def run(rank: int, world_size: int, config: Config) -> str:
    with Interrupt() as interrupt:
        return train(config, "test", interrupt).name


def weights(config: Config, which: str = "latest") -> dict[str, torch.Tensor]:
    return Checkpoint.load(config.run_dir / "checkpoints" / which).model


def journal(config: Config) -> dict[int, dict[str, float]]:
    metrics: dict[int, dict[str, float]] = {}
    for line in (config.run_dir / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        metrics.setdefault(record["step"], {}).update(record["metrics"])
    return metrics


def run_on(world_size: int, config: Config) -> dict[str, torch.Tensor]:
    outcomes = run_ranks(run, world_size, config, init_process_group=False)
    assert outcomes == ["FINISHED"] * world_size
    return weights(config)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert list(a) == list(b)
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def reductions_in_one_step(rank: int, world_size: int, config: Config) -> int:
    job = build(config, distributed.start())
    count = 0

    def counting(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal count
        count += 1
        return default_hooks.allreduce_hook(None, bucket)

    job.model.register_comm_hook(None, counting)  # type: ignore[operator]
    requests = train_requests(config, job.plan, job.train_index, rank, first_step=0)
    assert job.plan.accumulation == 4
    passes, _ = take(job.train_loader.batches(requests), job.plan.accumulation)
    train_step(job, passes, Meter(job.world))
    return count


def test_gradients_are_reduced_once_per_step(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.max_local_batch_size=1", "model.sync_batchnorm=none")
    assert run_ranks(reductions_in_one_step, 2, config, init_process_group=False) == [1, 1]


def test_resume_equals_no_stop(tiny_config: Callable[..., Config]) -> None:
    """Stopped by a signal to one of two ranks; the same command resumes, to the last bit."""
    whole = tiny_config("name=whole", "train.epochs=4")
    run_on(2, whole)
    parts = replace(whole, name="parts")
    outcomes = run_ranks(run_and_interrupt, 2, parts, init_process_group=False)
    assert outcomes == ["STOPPED"] * 2
    stopped = Checkpoint.load(parts.run_dir / "checkpoints" / "latest").step
    assert 0 < stopped < 12
    run_on(2, parts)
    assert largest_difference(weights(parts), weights(whole)) == 0
    ours, theirs = journal(parts), journal(whole)
    assert list(ours) == list(theirs)
    for step in theirs:
        for name in ("train/loss", "train/acc1", "train/lr", "val/acc1", "val/loss"):
            assert ours[step].get(name) == theirs[step].get(name)
    # Once more: nothing is left to do, and nothing is logged.
    before = (parts.run_dir / "journal.jsonl").read_bytes()
    run_on(2, parts)
    assert (parts.run_dir / "journal.jsonl").read_bytes() == before


def run_and_interrupt(rank: int, world_size: int, config: Config) -> str:
    """Rank 1 is told to stop once the first step is on record."""
    if rank == 1:

        def watch() -> None:
            path = config.run_dir / "journal.jsonl"
            while not (path.exists() and path.stat().st_size):
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()
    return run(rank, world_size, config)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("train.save_every_iterations=2", "train.epochs=2")
    whole, torn = tiny_config("name=whole", *settings), tiny_config("name=torn", *settings)
    for config in (whole, torn):
        run(0, 1, config)
    newest = folders.latest(torn.run_dir)
    assert newest is not None
    os.truncate(newest / "state.pt", 1000)
    capsys.readouterr()
    assert run(0, 1, torn) == "FINISHED"
    said = capsys.readouterr().out
    assert said.count(f"warning: {newest}: damaged") == 1
    assert "resumes at step" in said
    assert largest_difference(weights(torn), weights(whole)) == 0


@pytest.mark.slow
def test_dropout_resumes_exactly(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """VGG, its head shrunk, from the checkpoint of step 2 and without a stop."""
    monkeypatch.setattr(vgg, "MAP_PX", 1)
    settings = ["train.iterations=4", "train.save_every_iterations=2", "train.keep_checkpoints=9"]
    config = tiny_config("model.name=vgg19_bn", "train.eval_every_iterations=4", *settings)
    train(config, "test", Interrupt())
    whole = weights(config)
    shutil.rmtree(config.run_dir / "checkpoints/step-00000004")
    train(config, "test", Interrupt())
    assert largest_difference(weights(config), whole) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_is_exact_on_any_world(
    tiny_config: Callable[..., Config], world_size: int
) -> None:
    """17 images, uneven batches of at most 4. `evaluate` gives what training printed."""
    config = tiny_config("train.epochs=1", "train.max_local_batch_size=4")
    run_on(2, config)
    last = journal(config)[3]
    path = config.run_dir / "checkpoints" / "latest"
    scores = run_ranks(score_of, world_size, path, init_process_group=False)
    assert len(set(scores)) == 1
    assert scores[0].images == 17
    assert scores[0].acc1 == pytest.approx(last["val/acc1"])
    assert scores[0].acc5 == 100  # of three classes
    assert scores[0].loss == pytest.approx(last["val/loss"], rel=1e-5)


def score_of(rank: int, world_size: int, path: Path) -> Score:
    return evaluate_checkpoint(path, [])


def test_local_batchnorm_agrees_before_it_is_used(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.epochs=1", "model.sync_batchnorm=none", "optim.base_lr=0.05")
    run_on(2, config)
    score = run_ranks(score_of, 1, config.run_dir, init_process_group=False)[0]
    assert score.loss == pytest.approx(journal(config)[3]["val/loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(tiny_config: Callable[..., Config], precision: str) -> None:
    config = tiny_config("train.epochs=1", f"train.precision={precision}")
    run_on(2, config)
    losses = [metrics["train/loss"] for metrics in journal(config).values()]
    assert all(0 < loss < 20 for loss in losses)
    content = Checkpoint.load(config.run_dir)
    assert bool(content.scaler) == (precision == "fp16")
    assert content.model["conv1.weight"].dtype == torch.float32


def job_and_batches(config: Config) -> tuple[Job, Callable[[], Iterator[Batch]]]:
    job = build(config, distributed.start())
    requests = train_requests(config, job.plan, job.train_index, rank=0, first_step=0)
    first = next(requests)
    set_lr(job.state.optimizer, 0.1)
    return job, lambda: job.train_loader.batches(iter([first]))


def flat(job: Job) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in job.state.model.parameters()])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped(tiny_config: Callable[..., Config], precision: str) -> None:
    plain = ["optim.momentum=0", "optim.weight_decay=0", f"train.precision={precision}"]
    job, batches = job_and_batches(tiny_config("optim.clip_grad_norm=0.01", *plain))
    job.state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
    before = flat(job)
    train_step(job, batches(), Meter(job.world))
    assert (flat(job) - before).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-2)  # lr * norm
    job, batches = job_and_batches(tiny_config(*plain))
    job.state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
    train_step(job, batches(), Meter(job.world))
    assert (flat(job) - before).norm().item() > 0.01


def test_label_smoothing_is_in_the_loss(tiny_config: Callable[..., Config]) -> None:
    job, batches = job_and_batches(tiny_config("optim.label_smoothing=0.1"))
    meter = Meter(job.world)
    (batch,) = batches()
    log_p = job.state.model(batch.images).log_softmax(dim=1)
    right = log_p[torch.arange(len(batch.labels)), batch.labels]
    expected = -(0.9 * right + 0.1 * log_p.mean(dim=1)).mean().item()
    train_step(job, batches(), meter)
    assert meter.drain()["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_an_fp16_overflow_is_skipped(tiny_config: Callable[..., Config]) -> None:
    job, batches = job_and_batches(tiny_config("train.precision=fp16", "optim.clip_grad_norm=1.0"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    job = replace(job, state=replace(job.state, scaler=scaler))
    before = flat(job)
    train_step(job, batches(), Meter(job.world))
    assert torch.equal(flat(job), before)
    assert scaler.get_scale() == 2.0**119
    job, batches = job_and_batches(tiny_config("train.precision=fp16", "optim.clip_grad_norm=1.0"))
    train_step(job, batches(), Meter(job.world))
    assert not torch.equal(flat(job), before)
    assert flat(job).isfinite().all()


def test_waiting_for_data_is_measured(tiny_config: Callable[..., Config]) -> None:
    job, _ = job_and_batches(tiny_config())
    meter = Meter(job.world)
    meter.add(torch.tensor(6.0), torch.tensor(2), 3)
    with meter.waiting():
        time.sleep(0.2)
    with meter.paused():
        time.sleep(0.4)
    time.sleep(0.2)
    metrics = meter.drain()
    assert metrics["train/loss"] == 2.0
    assert metrics["train/acc1"] == pytest.approx(200 / 3)
    assert 35 < metrics["perf/data_wait_pct"] < 65
    assert 5 < metrics["perf/images_per_sec"] < 8  # 3 images in 0.4 s


def test_the_plateau_rule_drops_and_remembers(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("optim.schedule=plateau", "optim.plateau_patience_evals=2")
    state = TrainState(torch.nn.Linear(1, 1), None, None)  # type: ignore[arg-type]
    plan = Plan.of(config, 1, 30, 17)
    for step, right in enumerate([5, 6, 6, 4, 6, 7, 1, 1], start=1):
        state.step = step
        state.remember_evaluation(10.0 * right, 1.0, plan)
    assert (state.best_acc1, state.best_step) == (70.0, 6)
    assert state.lr_memory.plateau_drops == (4, 8)


@pytest.mark.slow
def test_the_warmup_by_training_error_resumes_exactly(tiny_config: Callable[..., Config]) -> None:
    """The rule fires at one step, on any world, and its memory outlives a stop."""
    settings = ["optim.warmup_epochs=0", "optim.warmup_until_train_error_pct=63", "seed=3"]
    settings += ["train.iterations=30", "optim.schedule=step", "optim.base_lr=3"]
    whole = tiny_config("name=whole", *settings)
    run_on(2, whole)
    lrs = [journal(whole)[step]["train/lr"] for step in range(1, 31)]
    memory = Checkpoint.load(whole.run_dir / "checkpoints/latest").lr_memory
    fired = memory.warmup_end
    assert fired is not None
    assert 20 <= fired < 30
    peak = 3 * 8 / 256
    assert lrs == pytest.approx([0.1 * peak] * fired + [peak] * (30 - fired))
    parts = tiny_config("name=parts", *settings)
    outcomes = run_ranks(run_and_interrupt, 2, parts, init_process_group=False)
    assert outcomes == ["STOPPED"] * 2
    stopped = Checkpoint.load(parts.run_dir / "checkpoints" / "latest")
    assert len(stopped.lr_memory.correct_per_step) == min(stopped.step, 20)
    run_on(2, parts)
    assert largest_difference(weights(parts), weights(whole)) == 0


def test_held_out_images_with_a_mean_image(tiny_config: Callable[..., Config]) -> None:
    """The 45k/5k split in small: val is a part of train, and the real val set is a flag away."""
    config = tiny_config("train.iterations=3", "data.holdout_images=9", "data.per_pixel_mean=true")
    run_on(2, config)
    assert len(Checkpoint.load(config.run_dir).mean_image) == 32
    held = run_ranks(score_of, 2, config.run_dir, init_process_group=False)[0]
    assert held.images == 9
    assert held.acc1 == pytest.approx(journal(config)[3]["val/acc1"])
    assert evaluate_checkpoint(config.run_dir, ["data.holdout_images=0"]).images == 17
    with pytest.raises(UserError, match="holdout_images=30: leaves none of the 30 training images"):
        train(tiny_config("name=x", "data.holdout_images=30"), "test", Interrupt())


def test_train_and_val_must_have_the_same_classes(
    tiny_config: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    for split, classes in {"train": (0, 1, 2), "val": (0, 1)}.items():
        for label in classes:
            (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
            source = tiny_folder / split / f"class{label}"
            (tmp_path / "data" / split / f"class{label}").symlink_to(source)
    with pytest.raises(UserError, match="differ in 1 classes, such as class2"):
        train(tiny_config(f"data.root={tmp_path}/data"), "test", Interrupt())


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, "-m", "resnet_dist", *arguments],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@needs("mlflow")
def test_the_command_line_of_the_readme(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun, two ranks, MLflow; only rank 0 speaks, and its words lead to what is there."""
    # MLflow may take longer to make its database than a run waits for it at its end.
    (tmp_path / "runs").mkdir()
    mlflow_client(f"sqlite:///{tmp_path}/runs/mlflow.db").search_experiments()
    done = torchrun("train", str(tiny_yaml), "tracking.mlflow=true", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiny: resnet20 on 2 x") == 1
    assert done.stdout.count("finished at step 3") == 1
    for part in ("best val", "mlflow ui --backend-store-uri sqlite:///", "/model-metrics"):
        assert part in done.stdout
    assert (tmp_path / "runs/tiny/checkpoints/best/state.pt").exists()
    assert (tmp_path / "runs/tiny/config.yaml").exists()
    lines = (tmp_path / "runs/tiny/journal.jsonl").read_text().splitlines()
    assert {name for line in lines for name in json.loads(line)["metrics"]} == {
        *("train/loss", "train/acc1", "train/lr", "val/loss", "val/acc1", "val/acc5"),
        *("perf/images_per_sec", "perf/data_wait_pct", "progress/epoch", "data/bad_samples"),
    }
    best = str(tmp_path / "runs/tiny/checkpoints/best")
    evaluated = torchrun("evaluate", best)
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.strip() in done.stdout  # the very line that training printed
    assert evaluated.stdout.count("acc1") == 1
    cli.main(["compare", "tiny", "--run-root", str(tmp_path / "runs")])
    assert "best val/acc1" in capsys.readouterr().out
    wrong = torchrun("train", str(tiny_yaml), "name=wrong", "train.global_batch_size=1")
    assert wrong.returncode != 0
    assert wrong.stderr.count("resnet-dist: command line: train.global_batch_size=1: cannot") == 1
    assert [path.name for path in (tmp_path / "runs/wrong").iterdir()] == ["outcome.json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["status", "wrong", "--run-root", str(tmp_path / "runs"), "--exit-code"])
    assert stopped.value.code == 2


class AskedAt(Interrupt):
    """Asks to stop at the given poll, counted from 0."""

    def __init__(self, poll: int) -> None:
        super().__init__()
        self.left = poll

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0

    @requested.setter
    def requested(self, _: Any) -> None: ...


def test_an_evaluation_that_was_made_up_for_is_kept(tiny_config: Callable[..., Config]) -> None:
    """Stopped after the last step and before its evaluation. Later starts do not repeat it."""

    def saved(config: Config) -> Checkpoint:
        return Checkpoint.load(config.run_dir / "checkpoints/latest")

    for poll in range(10):
        config = tiny_config("train.epochs=1", f"name=poll{poll}")
        stopped = train(config, "test", AskedAt(poll)) is Outcome.STOPPED
        if stopped and saved(config).step == 3:
            break
    assert (saved(config).step, saved(config).evaluated_step) == (3, 0)
    for start in range(2):
        assert train(config, "test", Interrupt()) is Outcome.FINISHED
        assert (saved(config).evaluated_step, saved(config).best_step) == (3, 3), start
        assert (config.run_dir / "checkpoints/best").resolve().name == "step-00000003"
    lines = map(json.loads, (config.run_dir / "journal.jsonl").read_text().splitlines())
    assert sum("val/acc1" in line.get("metrics", {}) for line in lines) == 1


def test_relative_data_are_found_from_another_folder(
    tiny_folder: Path,
    tiny_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work/photos").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path / "work")
    given = ("data.root=photos", "tracking.run_root=out/runs", "train.epochs=1", "name=rel")
    cli.main(["train", str(tiny_yaml), *given])
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.main(["evaluate", "../work/out/runs/rel"])
    assert "of 17 correct" in capsys.readouterr().out
    (tmp_path / "work/photos").unlink()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "../work/out/runs/rel"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "data.root=photos: no such folder; it must contain train/ and val/ (looked" in line

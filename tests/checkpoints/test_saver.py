"""Saving behind the back of training: what is written is what was, and a failure loses nothing."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resnet_dist.bench import checkpoint as bench
from resnet_dist.bench import quiet
from resnet_dist.checkpoints import folders, writer
from resnet_dist.checkpoints.content import Checkpoint, leaf_values
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.checkpoints.writer import Saver
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.plan import LrMemory
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.state import TrainState
from resnet_dist.train import train
from tests.support.checkpoints import content_of, make_state, small_state
from tests.support.host_sync import no_host_sync
from tests.support.multirank import run_ranks
from tests.support.waiting import HANG_SECONDS


class Gate:
    """Holds the writer up at its first system call, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        mkdir = os.mkdir

        def held_up(path: Any, *args: Any, **kwargs: Any) -> None:
            if ".partial-step" in str(path):
                self.reached.set()
                assert self.opened.wait(HANG_SECONDS)
            mkdir(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", held_up)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture
def saver(tiny_config: Callable[..., Config]) -> Saver:
    return Saver(tiny_config().run_dir, Retention(2))


def flat(content: Any) -> torch.Tensor:
    """All numbers of the model and the optimizer."""
    tensors = [leaf for leaf in leaf_values(content.to_dict()) if isinstance(leaf, torch.Tensor)]
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def test_training_goes_on_while_the_writer_is_held_up(
    tiny_config: Callable[..., Config],
    saver: Saver,
    gate: Gate,
    record_difference: Callable[[str, float], None],
) -> None:
    """What is on the disk in the end is the state at the save, to the bit."""
    state = make_state(0, step=1)
    state.lr_memory = LrMemory(correct_per_step=(1, 2))
    content = content_of(state, tiny_config())
    before = flat(content).clone()
    saver.save(content)
    assert gate.reached.wait(HANG_SECONDS)
    for _ in range(3):  # in place, as optimizers do
        state.model(torch.randn(4, 3, 32, 32)).sum().backward()
        state.optimizer.step()
    state.step = 4
    state.lr_memory = LrMemory(correct_per_step=(1, 2, 3))
    assert folders.latest(saver.run_dir) is None
    assert not torch.equal(flat(content_of(state, tiny_config())), before)
    gate.opened.set()
    saver.finish()
    saved = Checkpoint.load(saver.run_dir)
    assert torch.equal(flat(saved), before)
    record_difference("a save while training continues, to the state then", 0.0)
    assert (saved.step, saved.lr_memory.correct_per_step) == (1, (1, 2))


def test_one_save_at_a_time(tiny_config: Callable[..., Config], saver: Saver, gate: Gate) -> None:
    """The second waits for the first, whose buffers it takes."""
    first, second = (content_of(small_state(step), tiny_config()) for step in (1, 2))
    saver.save(first)
    assert gate.reached.wait(HANG_SECONDS)
    returned = threading.Event()

    def save_again() -> None:
        saver.save(second)
        returned.set()

    thread = threading.Thread(target=save_again)
    thread.start()
    assert not returned.wait(0.3)
    gate.opened.set()
    thread.join(HANG_SECONDS)
    assert returned.is_set()
    saver.finish()
    for step, content in ((1, first), (2, second)):
        saved = Checkpoint.load(saver.run_dir / f"checkpoints/step-0000000{step}")
        assert torch.equal(flat(saved), flat(content))


def test_buffers_are_used_again(tiny_config: Callable[..., Config], saver: Saver) -> None:
    state = make_state(0, step=1)
    content = content_of(state, tiny_config())
    buffers = copies(saver, content)  # kept, so that their memory is not free for others
    assert len(buffers) > 100
    saver.save(content)
    saver.wait()
    again = copies(saver, content)
    assert [one.data_ptr() for one in again] == [one.data_ptr() for one in buffers]
    state.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fresh = Saver(saver.run_dir, Retention())
    copy = fresh.copy_to_host(content_of(state, tiny_config()).to_dict())
    conv = copy["model"]["conv1.weight"]
    assert conv.is_contiguous(memory_format=torch.channels_last)


def copies(saver: Saver, content: Checkpoint) -> list[torch.Tensor]:
    """The tensors of `content` in the saver's buffers."""
    leaves = leaf_values(saver.copy_to_host(content.to_dict()))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def test_a_full_disk_loses_nothing(tiny_config: Callable[..., Config], disk: Path) -> None:
    said: list[str] = []
    saver = Saver(disk, Retention(2), said.append)
    state = small_state(1)
    saver.save(content_of(state, tiny_config()))
    saver.finish()
    folder = disk / "checkpoints"
    for room in (0, 2000, 7000):  # none, and as full in the middle of state.pt, and at its end
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast = disk / f"ballast-{room}"
        ballast.write_bytes(bytes(max(0, free - room)))
        state.step = 2
        saver.save(content_of(state, tiny_config()))  # training continues
        saver.wait()
        assert "checkpoint of step 2: not written: " in said[-1]
        assert "No space left on device" in said[-1]
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000001"]
        assert Checkpoint.load(disk).step == 1
        with pytest.raises(UserError, match=r"No space left.*the last one is .*step-00000001"):
            saver.finish()
        ballast.unlink()
    assert [line.split()[0] for line in said] == ["saved", *["warning:"] * 3]  # once each
    state.step = 3
    saver.save(content_of(state, tiny_config()))  # the next save tries again
    saver.finish()
    assert Checkpoint.load(disk / "checkpoints/latest").step == 3
    assert said[4:] == ["saved step 3"]


def test_what_is_durable_is_said_and_does_not_drown_the_log(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still: the first, one a minute, and the last."""
    now, said = 1000.0, list[str]()
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=lambda: now))
    saver = Saver(tiny_config().run_dir, Retention(2), said.append)
    for step in range(1, 8):
        now += 25
        saver.save(content_of(small_state(step), tiny_config()))
        saver.wait()
        newest = folders.latest(saver.run_dir)
        assert newest is not None
        assert newest.name == f"step-{step:08}"
    assert said == ["saved step 1", "saved step 4", "saved step 7"]
    now += 25
    saver.save(content_of(small_state(8), tiny_config()))
    saver.finish()
    assert said[3:] == ["saved step 8"]


def test_more_than_plain_data_is_not_saved(
    tiny_config: Callable[..., Config],
) -> None:
    said: list[str] = []
    saver = Saver(tiny_config().run_dir, Retention(2), said.append)
    saver.save(replace(content_of(small_state(1), tiny_config()), scaler={"x": {1, 2}}))
    with pytest.raises(UserError, match="only tensors and plain data"):
        saver.finish()
    assert len(said) == 1


class FileInTheWay(Interrupt):
    """Made where the checkpoints should be, once training has begun."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir

    @property
    def requested(self) -> bool:
        (self.run_dir / "checkpoints").write_text("mine")
        return False


def train_on(rank: int, world_size: int, config: Config) -> str:
    try:
        return train(config, "test", FileInTheWay(config.run_dir)).name
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failure_of_the_last_save_is_told_on_all_ranks(
    tiny_config: Callable[..., Config], world_size: int
) -> None:
    """A file stands where checkpoints should be: training continues, and its end is an error."""
    config = tiny_config("train.epochs=1", "train.save_every_iterations=1")
    said = run_ranks(train_on, world_size, config, init_process_group=False)
    assert len(set(said)) == 1
    assert said[0].startswith("checkpoint of step 3: not written: ")
    assert "checkpoints: cannot be listed: Not a directory" in said[0]
    assert (config.run_dir / "checkpoints").read_text() == "mine"
    assert '"step": 3' in (config.run_dir / "journal.jsonl").read_text()  # it continued to the end


class CtrlCTwice(Interrupt):
    """Asked after step 2, whose checkpoint is then being written, of the step after the next."""

    polls = 0

    @property
    def requested(self) -> bool:
        self.polls += 1
        if self.polls == 4:
            raise KeyboardInterrupt
        return False


def crash_after_the_first_save(rank: int, world_size: int, config: Config) -> None:
    fsync = os.fsync
    main = threading.main_thread()

    def slow(descriptor: int) -> None:
        if threading.current_thread() is not main:
            threading.Event().wait(0.3)
        fsync(descriptor)

    os.fsync = slow
    with pytest.raises(KeyboardInterrupt):
        train(config, "test", CtrlCTwice())
    newest = folders.latest(config.run_dir)
    assert newest is not None
    assert Checkpoint.load(newest).step == 2


def test_what_was_saved_is_written_before_a_crash_ends_the_run(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config("train.save_every_iterations=2", "train.eval_every_epochs=2")
    run_ranks(crash_after_the_first_save, 1, config, init_process_group=False)


def test_a_wait_that_is_interrupted_can_be_taken_up_again(
    tiny_config: Callable[..., Config], saver: Saver, gate: Gate
) -> None:
    """Python 3.11's Thread.join would return at once, the second time."""
    saver.save(content_of(small_state(1), tiny_config()))
    assert gate.reached.wait(HANG_SECONDS)
    main = threading.main_thread().ident
    threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        saver.wait()
    threading.Timer(0.3, gate.opened.set).start()
    saver.finish()
    assert Checkpoint.load(saver.run_dir).step == 1


@pytest.mark.gpu
def test_the_training_thread_does_not_wait_for_the_gpu(
    tiny_config: Callable[..., Config], saver: Saver
) -> None:
    model = torch.nn.Linear(4096, 4096, device="cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = TrainState(model, optimizer, scaler)
    images = torch.randn(4096, 4096, device="cuda")
    saved = []
    for step in (1, 2, 3):
        model(images).square().mean().backward()
        optimizer.step()
        state.step = step
        saved.append(model.weight.detach().clone())
        saver.wait()
        with no_host_sync() if step > 1 else nullcontext():  # step 1 allocates the pinned buffers
            saver.save(content_of(state, tiny_config()))
            for _ in range(20):  # queued behind the copies
                model(images).square().mean().backward()
                optimizer.step()
    copy = saver.copy_to_host(content_of(state, tiny_config()).to_dict())
    assert copy["model"]["weight"].is_pinned()
    saver.finish()
    for step in (2, 3):
        content = Checkpoint.load(saver.run_dir / f"checkpoints/step-0000000{step}")
        assert torch.equal(content.model["weight"], saved[step - 1].cpu())


def test_one_checkpoint_in_so_many_epochs_stays(tiny_config: Callable[..., Config]) -> None:
    """3 steps per epoch; nothing but train.keep_every_epochs asks for a save at step 6."""
    settings = ["train.epochs=4", "train.save_every_epochs=4", "train.eval_every_epochs=4"]
    settings += ["train.keep_checkpoints=1", "train.keep_every_epochs=1.7"]
    config = tiny_config(*settings)
    train(config, "test", Interrupt())
    names = sorted(p.name for p in (config.run_dir / "checkpoints").iterdir())
    assert names == ["best", "latest", "step-00000005", "step-00000010", "step-00000012"]


def test_the_benchmark_counts_what_a_save_takes_from_steps_of_python(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else the machine does: compared with the clocks of the steps themselves."""
    monkeypatch.setattr(bench, "TIMED_SECONDS", 0.4)
    monkeypatch.setattr(quiet, "at_once", True)
    clocks: list[tuple[float, float]] = []  # wall and CPU time at both ends of each step

    def burn() -> None:
        clocks.append((time.perf_counter(), time.thread_time()))
        while time.thread_time() < clocks[-1][1] + 0.02:
            pass
        clocks.append((time.perf_counter(), time.thread_time()))

    step = bench.Step("burn", burn, host_ms=50)
    figures = bench.overhead(step, content_of(small_state(1), tiny_config()), tmp_path, 1)
    # Four steps to warm up, then three kinds of turns to warm up, and once more.
    count = (len(clocks) // 2 - 4) // 6
    ends = clocks[2 * (4 + 3 * count) : 2 * (4 + 4 * count)]  # of the turn without a save
    wall, cpu = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    whole_turn = 50 * count
    waited = whole_turn * (wall - cpu) / cpu
    assert figures["without_ms"]["median"] == pytest.approx(waited, abs=0.4 * whole_turn)


@pytest.mark.slow
def test_the_benchmark_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TIMED_SECONDS", 0.01)
    monkeypatch.setattr(bench, "CROP_PX", 32)
    monkeypatch.setattr(bench, "HOST_STEP_MS", 1)
    monkeypatch.setattr(quiet, "at_once", True)
    bench.bench_checkpoint(tmp_path / "runs", 1, tmp_path / "figures.json")
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["save"] for step in figures["steps"] for row in step["kinds"]] == 2 * [
        "behind",
        "waited for",
    ]
    # 25,557,032 parameters with their momenta, and BN's statistics, in float32.
    assert figures["parts"]["state_mb"] == pytest.approx(4e-6 * (2 * 25_557_032 + 53_120), rel=0.01)
    assert all(value > 0 for value in figures["parts"].values())
    assert "one in 100 steps" in said
    assert not any((tmp_path / "runs").iterdir())

"""The journal is the truth: no line is lost on a full disk, and no step is logged twice."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.outcome import Outcome
from resnet_dist.tracking.journal import Tracker
from resnet_dist.train import train
from tests.support.tracking import TAGS, losses, start


def test_the_journal_alone(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    tracker = start(config)
    tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": 0.5, "val/acc1": 3.0})
    assert tracker.close("FINISHED", {}) is None
    journal = config.run_dir / "journal.jsonl"
    with open(journal, "a") as file:
        file.write('{"step": 3, "metr')  # the last write of a killed process
    tracker = start(config)
    tracker.log(2, {"train/loss": 7.0})
    tracker.log(3, {"train/loss": 0.25})
    tracker.close("FINISHED", {})
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(r["step"], r["metrics"]) for r in records] == [
        (1, {"train/loss": 1.0}),
        (2, {"train/loss": 0.5, "val/acc1": 3.0}),
        (3, {"train/loss": 0.25}),
    ]
    assert all(abs(r["time_ms"] / 1000 - time.time()) < 600 for r in records)


def fill(disk: Path) -> None:
    free = os.statvfs(disk)
    with open(disk / "ballast", "wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize))


def begin_journal(config: Config, room: int) -> Path:
    """A journal that has room for so many bytes in its last block, which the disk has given it."""
    path = config.run_dir / "journal.jsonl"
    path.parent.mkdir(parents=True)
    line = json.dumps({"step": 0, "metrics": {}, "filler": ""})
    path.write_text(line.replace('""', f'"{"x" * (4096 - room - len(line) - 1)}"') + "\n")
    assert path.stat().st_size == 4096 - room
    return path


@pytest.mark.parametrize("room", [0, 40, 1000])  # 40: a line is written in part
def test_a_full_disk_loses_no_line(
    tiny_config: Callable[..., Config], disk: Path, room: int
) -> None:
    config = tiny_config(f"tracking.run_root={disk}/runs")
    journal = begin_journal(config, room)
    warnings: list[str] = []
    tracker = start(config, warnings)
    told = 0
    for step in range(1, 61):
        if step in (5, 35):
            fill(disk)
        if step in (25, 55):
            (disk / "ballast").unlink()
            assert len(warnings) > told  # and once each time that it is full
            told = len(warnings)
        tracker.log(step, {"train/loss": step / 2, "filler " + "x" * 1000: 0.0})
    tracker.close("FINISHED", {})
    assert losses(journal) == [(step, step / 2) for step in range(1, 61)]
    assert len(warnings) == 2
    assert all("No space left on device; training continues" in line for line in warnings)


def test_what_could_not_be_written_is_tried_at_the_end(
    tiny_config: Callable[..., Config], disk: Path
) -> None:
    config = tiny_config(f"tracking.run_root={disk}/runs")
    journal = begin_journal(config, 0)
    warnings: list[str] = []
    for step, is_freed in ((1, True), (2, False)):
        tracker = start(config, warnings)
        fill(disk)
        journal_before = journal.read_bytes()
        for part in (0, 1):
            tracker.log(10 * step + part, {"train/loss": 1.0, "filler " + "x" * 4096: 0.0})
        if is_freed:
            (disk / "ballast").unlink()
        assert tracker.close("FAILED", {}) is None  # and raises nothing
    assert len(warnings) == 3
    assert warnings[-1] == f"warning: {journal}: 2 lines were lost: No space left on device"
    # A torn line is no line: the next start cuts it.
    (disk / "ballast").unlink()
    start(config, warnings).close("FINISHED", {})
    assert journal.read_bytes() == journal_before
    assert losses(journal) == [(10, 1.0), (11, 1.0)]


class DiskIsFullForAWhile(Interrupt):
    """From before the first step until after the fourth."""

    polls = 0

    def __init__(self, disk: Path) -> None:
        super().__init__()
        self.disk = disk

    @property
    def requested(self) -> bool:
        self.polls += 1
        if self.polls == 1:
            fill(self.disk)
        if self.polls == 6:  # asked before the fifth step, of the sixth
            (self.disk / "ballast").unlink()
        return False


def test_a_run_outlives_a_full_disk(
    tiny_config: Callable[..., Config], disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config("name=other"), "test", Interrupt())
    config = tiny_config("train.save_every_iterations=2", f"tracking.run_root={disk}/runs")
    journal = begin_journal(config, 0)
    assert train(config, "test", DiskIsFullForAWhile(disk)) is Outcome.FINISHED
    other = tiny_config("name=other").run_dir / "journal.jsonl"
    assert losses(journal) == losses(other)
    assert [step for step, _ in losses(journal)] == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().out
    assert said.count("journal.jsonl: not written: No space left on device") == 1
    assert "checkpoint of step 2: not written" in said
    assert (config.run_dir / "checkpoints/step-00000006").is_dir()


def test_a_full_disk_at_the_start_is_one_line(
    tiny_config: Callable[..., Config], disk: Path
) -> None:
    config = tiny_config(f"tracking.run_root={disk}/runs")
    fill(disk)
    with pytest.raises(UserError, match=r"/runs.*: cannot be written: No space left on device; "):
        train(config, "test", Interrupt())


def test_other_ranks_write_nothing(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("tracking.mlflow=true")
    tracker = Tracker(config, TAGS, records=False, warn=print)
    tracker.log(1, {"train/loss": 1.0})
    assert tracker.close("FINISHED", {}) is None
    assert not config.run_dir.exists()

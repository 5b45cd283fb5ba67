"""What a run finds of its checkpoints after copies, losses and a user's hand: none is missed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist.checkpoints import folders, writer
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.checkpoints.writer import Saver
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.train import train
from tests.support.checkpoints import (
    ALL,
    SPOILS,
    Spoil,
    content_of,
    flip_a_bit,
    lose_everything,
    small_state,
)
from tests.support.waiting import HANG_SECONDS


@pytest.fixture
def config(tiny_config: Callable[..., Config]) -> Config:
    return tiny_config()


def save(config: Config, step: int, best: int = -1, retention: Retention = ALL) -> Path:
    state = small_state(step)
    state.best_step = best
    return writer.save(config.run_dir, content_of(state, config), retention)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def prepare_to_resume(config: Config) -> list[str]:
    return folders.prepare_to_resume(config.run_dir)


def a_file(folder: Path) -> None:
    folder.write_text("mine")


def a_loop(folder: Path) -> None:
    folder.symlink_to(folder.name)


def a_disk_that_is_not_mounted(folder: Path) -> None:
    folder.symlink_to(folder.with_name("elsewhere"))


def not_readable(folder: Path) -> None:
    folder.mkdir(mode=0)
    if os.access(folder, os.R_OK):
        pytest.skip("root reads all")


@pytest.mark.parametrize(
    "make", [a_file, a_loop, a_disk_that_is_not_mounted, not_readable], ids=lambda f: f.__name__
)
def test_what_cannot_be_listed_is_not_empty(config: Config, make: Callable[[Path], None]) -> None:
    """A run would start anew, beside 80 epochs of work."""
    assert folders.step_folders(config.run_dir) == []
    config.run_dir.mkdir(parents=True)
    make(config.run_dir / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints: cannot be listed: .*move it away to start"):
        prepare_to_resume(config)
    with pytest.raises(UserError, match="cannot be listed"):
        folders.latest(config.run_dir)
    with pytest.raises(UserError, match="cannot be listed"):
        train(config, "test", Interrupt())
    assert not (config.run_dir / "journal.jsonl").exists()
    said: list[str] = []
    saver = Saver(config.run_dir, ALL, said.append)
    saver.save(content_of(small_state(1), config))
    with pytest.raises(UserError, match=r"step 1: not written.*cannot be listed"):
        saver.finish()
    assert len(said) == 1
    if make is not_readable:
        (config.run_dir / "checkpoints").chmod(0o755)  # for who cleans up


def test_what_may_not_be_read_is_not_empty(config: Config) -> None:
    """As nobody where the tests run as root, who may read all."""
    save(config, 1)
    (config.run_dir / "checkpoints").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match="cannot be listed: Permission denied"):
            folders.step_folders(config.run_dir)
    finally:
        os.seteuid(user)
        (config.run_dir / "checkpoints").chmod(0o755)  # for who cleans up
    assert len(folders.step_folders(config.run_dir)) == 1


def test_a_login_node_needs_no_torch_to_look() -> None:
    program = "import sys, resnet_dist.checkpoints.folders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=HANG_SECONDS).returncode == 0


def test_what_was_just_written_stays(config: Config) -> None:
    """Even beside later ones, which somebody may have put there."""
    save(config, 9)
    path = save(config, 5, retention=Retention(1))
    assert names_in(path.parent) == ["latest", "step-00000005", "step-00000009"]


def test_a_run_that_was_copied_with_links_followed_resumes(config: Config) -> None:
    """cp -rL: `latest` and `best` are folders then."""
    train(config, "test", Interrupt())
    folder = config.run_dir / "checkpoints"
    followed = folder.with_name("followed")
    shutil.copytree(folder, followed, symlinks=False)
    shutil.rmtree(folder)
    followed.rename(folder)
    assert not (folder / "latest").is_symlink()
    assert Checkpoint.load(config.run_dir).step == Checkpoint.load(folder / "best").step
    lines = prepare_to_resume(config)
    assert ["a folder instead of a link" in line for line in lines] == [True] * 2
    assert (folder / "latest").readlink() == Path("step-00000006")
    assert (folder / "best").is_symlink()
    copies = [name for name in names_in(folder) if name.startswith("copied-")]
    assert [name.split("-")[1] for name in copies] == ["best", "latest"]  # nothing is thrown away
    assert prepare_to_resume(config) == []


def test_a_copy_in_the_place_of_a_link_does_not_stop_a_save(config: Config) -> None:
    """Made while the run is under way."""
    path = save(config, 1, best=1)
    for name in ("latest", "best"):
        (path.parent / name).unlink()
        shutil.copytree(path, path.parent / name)
    said: list[str] = []
    saver = Saver(config.run_dir, Retention(1), said.append)
    state = small_state(2)
    state.best_step = 2
    saver.save(content_of(state, config))
    saver.finish()
    assert ["a folder instead of a link" in line for line in said] == [True, True, False]
    assert said[2] == "saved step 2"
    for name in ("latest", "best"):
        assert (path.parent / name).readlink() == Path("step-00000002")
    left = [name for name in names_in(path.parent) if not name.startswith("copied-")]
    assert left == ["best", "latest", "step-00000002"]


@pytest.mark.parametrize("names", [["latest"], ["latest", "best"]])
def test_copies_of_links_alone_are_checkpoints(config: Config, names: list[str]) -> None:
    """All that somebody copied: the run resumes from there."""
    save(config, 1, best=1)
    path = save(config, 2, best=1)
    for name in names:
        target = (path.parent / name).resolve()
        (path.parent / name).unlink()
        shutil.copytree(target, path.parent / name)
    for step in path.parent.glob("step-*"):
        shutil.rmtree(step)
    assert Checkpoint.load(config.run_dir).step == (2 if names == ["latest"] else 1)
    prepare_to_resume(config)
    newest = folders.latest(config.run_dir)
    assert newest == path
    assert Checkpoint.load(newest).step == 2
    assert (path.parent / "latest").readlink() == Path(path.name)


@pytest.mark.parametrize("call", ["symlink", "replace"])
def test_without_links_there_are_checkpoints_all_the_same(
    config: Config, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A file system such as FAT has none: one warning, no failure, old ones are removed."""

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, call, refused)
    said: list[str] = []
    saver = Saver(config.run_dir, Retention(1), said.append)
    for step in (1, 2, 3):
        state = small_state(step)
        state.best_step = min(step, 2)
        saver.save(content_of(state, config))
    saver.finish()
    folder = config.run_dir / "checkpoints"
    line, *saved = said
    assert saved == ["saved step 1", "saved step 3"]
    assert line == f"warning: {folder}: latest and best cannot be set: Operation not permitted"
    assert prepare_to_resume(config) == [line]
    assert names_in(folder) == ["step-00000002", "step-00000003"]
    assert Checkpoint.load(config.run_dir).step == 2


def test_links_that_were_lost_are_found_and_set_again(config: Config) -> None:
    save(config, 1)
    save(config, 2, best=2)
    path = save(config, 3, best=2)
    for name in ("latest", "best"):
        (path.parent / name).unlink()
    assert Checkpoint.load(config.run_dir).step == 2
    assert prepare_to_resume(config) == []
    assert (path.parent / "latest").readlink() == Path("step-00000003")
    assert (path.parent / "best").readlink() == Path("step-00000002")
    shutil.rmtree(path.parent / "step-00000002")
    assert Checkpoint.load(config.run_dir).step == 3  # the newest, as the best is gone


def test_a_finished_run_that_is_started_again_sets_its_links(config: Config) -> None:
    train(config, "test", Interrupt())
    folder = config.run_dir / "checkpoints"
    links = {name: (folder / name).readlink() for name in ("latest", "best")}
    for name in links:
        (folder / name).unlink()
    train(config, "test", Interrupt())
    assert {name: (folder / name).readlink() for name in links} == links


class FolderInTheWay(Interrupt):
    """Made before step 3 is saved."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.folder = run_dir / "checkpoints" / "step-00000003"
        self.polls = 0

    @property
    def requested(self) -> bool:
        self.polls += 1
        if self.polls == 3:
            self.folder.mkdir(parents=True)
        return False


def test_a_best_checkpoint_that_was_not_saved_is_not_claimed(
    tiny_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is `best` left at what was the best before it."""
    settings = ["optim.base_lr=1e-9", "train.save_every_iterations=1"]  # the first one is the best
    config = tiny_config(*settings)
    assert train(config, "test", FolderInTheWay(config.run_dir)).name == "FINISHED"
    said = capsys.readouterr().out
    folder = config.run_dir / "checkpoints"
    assert said.count("checkpoint of step 3: not written") == 1
    assert said.count("step-00000003, the best checkpoint, is not on the disk") == 1
    assert "best" not in names_in(folder)
    assert f"{folder}/best" not in said.split("is not on the disk")[1].partition("saved")[2]
    assert f"{folder}/latest" in said

    before = tiny_config("name=before")
    save(before, 1, best=1)
    shutil.rmtree(save(before, 2, best=2))
    path = save(before, 3, best=2)
    assert not os.path.lexists(path.parent / "best")


@pytest.mark.parametrize("spoil", [*SPOILS, lose_everything])
def test_a_run_without_a_whole_checkpoint_does_not_start_anew(config: Config, spoil: Spoil) -> None:
    paths = [save(config, step) for step in (1, 2)]
    for path in paths:
        spoil(path)
    names = names_in(paths[0].parent)
    with pytest.raises(
        UserError, match=r"none of the 2 checkpoints is intact.*to start from scratch"
    ):
        prepare_to_resume(config)
    assert names_in(paths[0].parent) == names


def test_training_does_not_start_anew_over_damaged_checkpoints(config: Config) -> None:
    flip_a_bit(save(config, 1))
    with pytest.raises(
        UserError, match=r"none of the 1 checkpoints is intact \(step-00000001: the"
    ):
        train(config, "test", Interrupt())
    assert names_in(config.run_dir / "checkpoints") == ["latest", "step-00000001"]

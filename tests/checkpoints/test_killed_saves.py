"""A process that saves is killed at every write boundary; the newest whole checkpoint is found.

The boundaries are not marked in the code: they are the events that Python's audit hooks report
before a file is made, renamed, linked or removed, and each fsync. A kill cannot lose what the
kernel has; the order of writes, fsyncs and renames, which a power cut needs, is asserted besides.
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.checkpoints import folders
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.checkpoints.writer import Saver
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.train import train
from tests.support.checkpoints import content_of, small_state
from tests.support.waiting import HANG_SECONDS

# Children are forks of a server without threads that has imported everything: see multirank.py.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "resnet_dist.train"])
WRITES = ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.link", "os.truncate")
TOO_LARGE = 27  # errno
Call = tuple[Callable[..., None], tuple[Any, ...]]
Boundary = tuple[str, str]  # what is about to happen, and to which file


def watch_writes(folder: Path, at_boundary: Callable[[Boundary], None]) -> None:
    """Calls `at_boundary` before each write to `folder`, in this process, from here on."""

    def within(path: Any) -> bool:  # a removal of a tree names files relative to a descriptor
        return isinstance(path, str | os.PathLike) and (
            not os.path.isabs(path) or Path(path).is_relative_to(folder)
        )

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in WRITES:
            path = args[1] if event in ("os.rename", "os.symlink") else args[0]
        else:
            return
        if within(path):
            at_boundary((event, str(path)))

    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:  # it has no audit event
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if within(path):
            at_boundary(("os.fsync", path))
        fsync(descriptor)

    os.fsync = watched_fsync
    sys.addaudithook(audit)


def run_each(calls: list[Call], config: Config) -> list[int]:
    """Runs each in a process of its own, one after the other.

    Returns their exit codes, or minus the signals that ended them.
    """
    report = config.run_dir / "codes.json"
    process = CONTEXT.Process(target=_fork_each, args=(calls, config, report))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == 0
    process.close()
    codes: list[int] = json.loads(report.read_text())
    return codes


def _fork_each(calls: list[Call], config: Config, report: Path) -> None:
    """In a process without threads, which has all imports behind it: a fork takes milliseconds."""
    torch.set_num_threads(1)
    save_step(report.with_name("warm"), config, 1)
    codes = []
    for function, args in calls:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                function(*args)
                code = 0
            except UserError as error:
                code = TOO_LARGE if "step 2: not written: [Errno 27] File too" in str(error) else 2
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    report.write_text(json.dumps(codes))


def save_step(run_dir: Path, config: Config, step: int, evaluated: bool = False) -> None:
    """The best one so far, with room for one: all that a save can do happens."""
    state = small_state(step)
    state.best_step, state.best_acc1 = step, float(step)
    state.evaluated_step = step if evaluated else 0
    saver = Saver(run_dir, Retention(1), say=lambda line: None)
    saver.save(content_of(state, config))
    saver.finish()


def save_until(
    run_dir: Path, config: Config, step: int, survives: int | None, evaluated: bool = False
) -> None:
    """Dies before write number `survives`; None: lives, and lists them in RUN/writes.json."""
    seen: list[Boundary] = []

    def at_boundary(boundary: Boundary) -> None:
        if len(seen) == survives:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(boundary)

    watch_writes(run_dir / "checkpoints", at_boundary)
    save_step(run_dir, config, step, evaluated)
    (run_dir / "writes.json").write_text(json.dumps(seen))


def assert_whole_and_alive(run_dir: Path, config: Config, steps: tuple[int, ...]) -> int | None:
    """What a killed save leaves. Returns the step to resume from, one of `steps`."""
    folder = run_dir / "checkpoints"
    links = {link for link in ("latest", "best") if os.path.lexists(folder / link)}
    assert links == {"latest", "best"} or steps[0] == 0  # a run's first save
    assert all(folders.why_damaged(folder / link) is None for link in links)
    assert folders.prepare_to_resume(run_dir) == []  # whatever has a name is whole
    newest = folders.latest(run_dir)
    found = None
    if newest is not None:
        found = Checkpoint.load(newest).step
        weights = small_state(found).model.state_dict()
        for key, value in Checkpoint.load(newest).model.items():
            assert torch.equal(value, weights[key])
    assert found in steps or (found is None and steps[0] == 0)
    if found is not None:
        assert (folder / "latest").resolve() == newest  # set again
        assert (folder / "best").resolve() == newest
    save_step(run_dir, config, 3)  # the next incarnation
    assert sorted(p.name for p in folder.iterdir()) == ["best", "latest", "step-00000003"]
    for link in ("latest", "best"):
        assert Checkpoint.load(folder / link).step == 3
    return found


@pytest.mark.parametrize("before", [0, 1])  # a run's first save, and one with another before it
def test_killed_at_every_write(tiny_config: Callable[..., Config], before: int) -> None:
    config = tiny_config()
    template = config.run_dir / "template"
    template.mkdir(parents=True)
    if before:
        save_step(template, config, before)
    writes = recorded_writes(template, config)
    assert len(writes) == (20 if before else 16)
    copies = [copied(template, f"run{survives}") for survives in range(len(writes) + 1)]
    calls: list[Call] = [(save_until, (copy, config, 2, n)) for n, copy in enumerate(copies)]
    assert run_each(calls, config) == [-signal.SIGKILL] * len(writes) + [0]
    found = [assert_whole_and_alive(copy, config, (before, 2)) for copy in copies]
    renamed = next(n for n, (event, _) in enumerate(writes) if event == "os.rename")
    assert found == [before or None] * (renamed + 1) + [2] * (len(writes) - renamed)


def test_killed_while_a_step_is_saved_again_as_it_is_evaluated_by_now(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config()
    template = config.run_dir / "template"
    save_step(template, config, 1)
    writes = recorded_writes(template, config, 1, evaluated=True)
    copies = [copied(template, f"run{survives}") for survives in range(len(writes) + 1)]
    calls: list[Call] = [(save_until, (copy, config, 1, n, True)) for n, copy in enumerate(copies)]
    assert run_each(calls, config) == [-signal.SIGKILL] * len(writes) + [0]
    found = []
    for copy in copies:
        assert folders.prepare_to_resume(copy) == []
        (only,) = folders.step_folders(copy)
        assert folders.why_damaged(only) is None
        assert {(only.parent / link).resolve() for link in ("latest", "best")} == {only}
        found.append(Checkpoint.load(only).evaluated_step)
        save_step(copy, config, 1, evaluated=True)
        assert Checkpoint.load(only).evaluated_step == 1
        assert folders.read_meta(only)["best"]["step"] == 1
        assert sorted(p.name for p in only.parent.iterdir()) == ["best", "latest", only.name]
    renames = [n for n, (event, _) in enumerate(writes) if event == "os.rename"]
    replaced = renames[2]  # after those of the complete new folder and of the old one
    assert found == [0] * (replaced + 1) + [1] * (len(writes) - replaced)


def copied(template: Path, name: str) -> Path:
    return shutil.copytree(template, template.with_name(name), symlinks=True)


def recorded_writes(
    template: Path, config: Config, step: int = 2, evaluated: bool = False
) -> list[Boundary]:
    """Of a save on top of `template`."""
    run_dir = copied(template, "recorded")
    assert run_each([(save_until, (run_dir, config, step, None, evaluated))], config) == [0]
    return [(event, path) for event, path in json.loads((run_dir / "writes.json").read_text())]


def save_limited(run_dir: Path, config: Config, bytes_per_file: int, action: Any) -> None:
    """In the middle of a file the kernel ends the process, or (SIG_IGN) refuses to write."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, action)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, limits[1]))
    save_step(run_dir, config, 2)


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN], ids=["killed", "full"])
def test_cut_in_the_middle_of_a_file(tiny_config: Callable[..., Config], action: Any) -> None:
    """After so many bytes of a file. Killed: as everywhere. Refused: nothing of it stays."""
    config = tiny_config()
    template = config.run_dir / "template"
    save_step(template, config, 1)
    size = (template / "checkpoints/latest/state.pt").stat().st_size
    limits = [0, 1, 100, 150, 200, *range(300, size, size // 8), size - 1]
    copies = [copied(template, f"run{limit}") for limit in limits]
    calls: list[Call] = [
        (save_limited, (copy, config, limit, action))
        for copy, limit in zip(copies, limits, strict=True)
    ]
    codes = run_each(calls, config)
    killed = action == signal.SIG_DFL
    assert codes == [-signal.SIGXFSZ if killed else TOO_LARGE] * len(limits)
    for copy in copies:
        names = {p.name for p in (copy / "checkpoints").iterdir()}
        left = names - {"best", "latest", "step-00000001"}
        assert len(left) == killed  # the folder that was being written
        assert assert_whole_and_alive(copy, config, (1,)) == 1


def test_the_order_of_writes(tiny_config: Callable[..., Config]) -> None:
    """Files and their sums reach the disk before the name, and the name before the links."""
    config = tiny_config()
    save_step(config.run_dir / "template", config, 1)
    prefix = str(config.run_dir / "recorded" / "checkpoints")
    done = []
    for event, path in recorded_writes(config.run_dir / "template", config):
        name = re.sub(r"(\.partial-.*)-[0-9a-f]{8}", r"\1", path).removeprefix(prefix)
        done.append(f"{event.removeprefix('os.')} {name.removeprefix('/')}".rstrip())
    new = ".partial-step-00000002"
    assert done[:16] == [
        f"mkdir {new}",
        # torch opens and writes state.pt by itself
        f"fsync {new}/state.pt",
        f"open {new}/meta.json",
        f"fsync {new}/meta.json",
        f"open {new}/SHA256SUMS",
        f"fsync {new}/SHA256SUMS",
        f"fsync {new}",
        "rename step-00000002",
        "fsync",  # the folder of the checkpoints
        "symlink .partial-latest",
        "rename latest",
        "fsync",
        "symlink .partial-best",
        "rename best",
        "fsync",
        "rename .removed-step-00000001",
    ]
    assert {line.split()[0] for line in done[16:]} == {"remove", "rmdir"}
    assert len(done) == 16 + 4


def train_until(config: Config, survives: int) -> None:
    """Dies before write number `survives` to the checkpoints."""
    lock, seen = threading.Lock(), 0

    def at_boundary(boundary: Boundary) -> None:
        nonlocal seen
        with lock:
            if seen == survives:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    watch_writes(config.run_dir / "checkpoints", at_boundary)
    train(config, "test", Interrupt())


def test_a_run_that_is_killed_while_it_saves_resumes(
    tiny_config: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    """In the first save, the second, and its removal of the first: the same end, to the bit."""
    settings = ("train.save_every_iterations=1", "train.keep_checkpoints=1", "train.epochs=1")
    whole = tiny_config("name=whole", *settings)
    killed = {survives: replace(whole, name=f"killed{survives}") for survives in (5, 28, 36)}
    calls: list[Call] = [(train_until, (whole, 10**6))]
    for survives, config in killed.items():
        calls += [(train_until, (config, survives)), (train_until, (config, 10**6))]
    assert run_each(calls, whole) == [0, *[-signal.SIGKILL, 0] * len(killed)]
    theirs = Checkpoint.load(whole.run_dir / "checkpoints/latest")
    names = sorted(p.name for p in (whole.run_dir / "checkpoints").iterdir())
    for config in killed.values():
        ours = Checkpoint.load(config.run_dir / "checkpoints/latest")
        assert ours.step == theirs.step == 3
        assert all(torch.equal(ours.model[key], theirs.model[key]) for key in ours.model)
        assert sorted(p.name for p in (config.run_dir / "checkpoints").iterdir()) == names
    record_difference("weights, killed while saving and resumed, to whole", 0.0)

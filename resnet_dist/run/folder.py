"""The folder of a run: one process at a time, its merged config, no going on as another run.

No torch here: a login node checks the config before a job is queued. resume.py also compares what
needs the data and the device.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from resnet_dist.checkpoints import folders
from resnet_dist.config import Config, flat_settings, to_yaml
from resnet_dist.config_file import config_from_dict, load_config
from resnet_dist.errors import UserError, as_yaml
from resnet_dist.files import replace_file

# What may differ when a run goes on: it changes where and how, not what is computed. (data.cache
# does, for an image that is damaged in part: a cache of decoded images needs the whole. How images
# are decoded does, too: resume.py compares the way that was taken.)
FREE_TO_CHANGE = (
    "name",
    "data.root",
    "data.decode",
    "data.hw_decoder_load",
    "data.read_threads",
    "data.prefetch_batches",
    "data.max_bad_samples",
    "train.max_local_batch_size",
    "train.log_every_steps",
    "train.save_every_",
    "train.keep_",
    "tracking.",
)

LOCK_WAIT_SECONDS = 60.0
LOCK_POLL_SECONDS = 0.2


@contextlib.contextmanager
def sole_process(config: Config) -> Iterator[None]:
    """Two processes under one name would remove each other's checkpoints. For one rank only.

    Waits for a while: the job before, which was told to end, may still be writing. Where no lock
    can be had (a file system without them), it goes on.

    Raises:
        UserError: another process trains under this name.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path = lock_of(config.run_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "ab"))
            _wait_for_lock(file.fileno(), path, config)
            # Said aloud: a process that was forked meanwhile has the file open, too.
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield


def lock_of(run_dir: Path) -> Path:
    """The file that `sole_process` has locked."""
    return run_dir.parent / ".locks" / run_dir.name


def _wait_for_lock(descriptor: int, path: Path, config: Config) -> None:
    deadline: float | None = None
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = path.read_text() or "another process"
        if deadline is None:
            deadline = time.monotonic() + LOCK_WAIT_SECONDS
            print(f"{config.run_dir}: waits for {other}, which trains it", flush=True)
        elif time.monotonic() > deadline:
            raise UserError(
                f"{config.run_dir}: {other} trains under this name; end it, or give another name="
            )
        time.sleep(LOCK_POLL_SECONDS)


def open_run_folder(config: Config, step: int, changes: Sequence[str]) -> None:
    """Makes RUN, RUN/config.yaml and the journal. For one rank only.

    step: from which the run goes on. changes: what differs from there, by the user's wish;
    RUN/changes.txt has a line for each such step.

    Raises:
        UserError: it cannot be written.
    """
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # A line "from step 5" of a run that starts at 5 again: nothing was saved under it. At step
        # 0 nothing need be: config.yaml is what counts, until there is a checkpoint.
        before = changes_so_far(run_dir).splitlines(keepends=True)
        lines = [line for line in before if _first_step(line) < max(step, 1)]
        line = f"from step {step}: {'; '.join(changes)}\n"
        if changes and line not in lines:
            lines.append(line)
        if lines:
            replace_file(run_dir / "changes.txt", "".join(lines))
        else:
            (run_dir / "changes.txt").unlink(missing_ok=True)
        replace_file(run_dir / "config.yaml", to_yaml(config))
        open(run_dir / "journal.jsonl", "ab").close()  # or Tracker would fail, on one rank alone
    except OSError as error:
        raise UserError(
            f"{error.filename or run_dir}: cannot be written: {error.strerror}; mend that, or give "
            "another tracking.run_root="
        ) from None


def changes_so_far(run_dir: Path) -> str:
    """RUN/changes.txt: a line for each step from which something else was computed; or ""."""
    try:
        return (run_dir / "changes.txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _first_step(line: str) -> int:
    found = re.match(r"from step (\d+): ", line)
    return int(found[1]) if found else -1  # what a person wrote stays


def differing_settings(before: Config, now: Config) -> list[str]:
    """What changes what is computed: "optim.base_lr 0.1 -> 0.2"."""
    saved = flat_settings(before)
    return [
        f"{key} {as_yaml(saved[key])} -> {as_yaml(value)}"
        for key, value in flat_settings(now).items()
        if value != saved[key] and not key.startswith(FREE_TO_CHANGE)
    ]


def check_run_folder(config: Config, anyway: bool) -> list[str]:
    """What differs from the newest checkpoint's config, or from RUN/config.yaml if there is none.

    Raises:
        UserError: something does, and not `anyway`; or the folder cannot be read.
    """
    step, before = _made_as(config.run_dir)
    differing = [] if before is None else differing_settings(before, config)
    if differing and not anyway:
        raise refusal(config, step, differing, can_be_told_to=True)
    return differing


def _made_as(run_dir: Path) -> tuple[int | None, Config | None]:
    """The step and the config of the newest checkpoint that tells them; or RUN/config.yaml's.

    config.yaml is new before a step is done under it, so a checkpoint knows better.
    """
    for path in reversed(folders.step_folders(run_dir)):
        note = folders.read_meta(path)
        if isinstance(note.get("config"), dict):  # format 2 had none, and the file may be damaged
            return note.get("step"), config_from_dict(note["config"], f"{path}/meta.json")
    path = run_dir / "config.yaml"
    if not path.exists():
        return None, None
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise UserError(f"{path}: is empty")
        return None, load_config(path)
    except UserError as error:
        raise UserError(f"{error}; mend it or move it away, or give another name=") from None


def refusal(
    config: Config, step: int | None, differing: Sequence[str], can_be_told_to: bool
) -> UserError:
    """The one line that lists all that differs.

    step: of the checkpoint, where one is known. can_be_told_to: --resume-anyway would help.
    """
    where = "" if step is None else f" from step {step}"
    ways = "Go on as it was, or give another name="
    if can_be_told_to:
        ways = "Go on as it was, give another name=, or add --resume-anyway"
    return UserError(
        f"{config.run_dir}: cannot go on{where}, as these differ: {'; '.join(differing)}. {ways}"
    )

"""The folder of a run: its lock, its config, and the refusal to resume it as a different run.

No torch here: a login node checks the config before a job is queued. resume.py compares what needs
the data and the device.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from resnet_dist.checkpoints import folders
from resnet_dist.config import Config, flat_settings, to_yaml
from resnet_dist.config_file import config_from_dict, load_config
from resnet_dist.errors import UserError, as_yaml
from resnet_dist.files import replace_file

# Settings that may change when a run resumes, as they decide where and how something is computed,
# not what. (data.cache is not among them: a partly damaged image may still give its window, but a
# cache of decoded images needs all of it. The way of decoding matters too, and resume.py compares
# the way that was actually taken.)
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
    "train.max_nonfinite_logs",
    "train.save_every_",
    "train.keep_",
    "tracking.",
)

LOCK_WAIT_SECONDS = 60.0
LOCK_POLL_SECONDS = 0.2


@contextlib.contextmanager
def sole_process(
    config: Config,
    say: Callable[[str], None] = print,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[bool]:
    """Locks the run, so that two processes do not remove each other's checkpoints. One rank only.

    Waits a while for the lock, as the previous job may still be writing its last checkpoint. Gives
    False if it was asked to stop while waiting. On a file system without locks the run continues
    without one. say: prints a line.

    Raises:
        UserError: another process is training under this name.
    """
    with contextlib.ExitStack() as stack:
        goes_ahead = True
        with contextlib.suppress(OSError):
            path = lock_of(config.run_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "ab"))
            goes_ahead = _wait_for_lock(file.fileno(), path, config, say, stop_requested)
            if goes_ahead:
                # Unlocked explicitly: a child process that inherited the file would keep the lock.
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
                os.ftruncate(file.fileno(), 0)
                name = f"process {os.getpid()} on {os.uname().nodename}"
                os.write(file.fileno(), name.encode())
        yield goes_ahead


def lock_of(run_dir: Path) -> Path:
    """Returns the file that `sole_process` locks."""
    return run_dir.parent / ".locks" / run_dir.name


def _wait_for_lock(
    descriptor: int,
    path: Path,
    config: Config,
    say: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Returns True when it has the lock, and False when it is asked to stop."""
    deadline: float | None = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            other = path.read_text() or "another process"
        if deadline is None:
            deadline = time.monotonic() + LOCK_WAIT_SECONDS
            say(f"{config.run_dir}: waiting for {other} to release it")
        elif time.monotonic() > deadline:
            raise UserError(
                f"{config.run_dir}: {other} is training under this name; stop it, or use "
                "another name="
            )
        if stop_requested():
            return False
        time.sleep(LOCK_POLL_SECONDS)


def open_run_folder(
    config: Config, step: int, changes: Sequence[str], is_finished: bool = False
) -> None:
    """Creates RUN, RUN/config.yaml and the journal. One rank only.

    step: the step from which the run resumes. changes: what --resume-anyway has accepted; each such
    step has a line in RUN/changes.txt. is_finished: no step is left to do, so nothing changes, and
    config.yaml stays as it is, unless it does not say what the checkpoint says.

    Raises:
        UserError: the folder cannot be written.
    """
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        trained = _last_config(run_dir)[1] if is_finished else None
        if trained is not None:
            config, changes = trained, ()
        # A line "from step 5" is dropped when the run resumes from step 5 again, as nothing was
        # saved under that change. A line "from step 0" stays at step 0: until the first checkpoint,
        # config.yaml counts as the run's config.
        before = changes_so_far(run_dir).splitlines(keepends=True)
        lines = [line for line in before if _first_step(line) < max(step, 1)]
        line = f"from step {step}: {'; '.join(changes)}\n"
        if changes and line not in lines:
            lines.append(line)
        if lines:
            replace_file(run_dir / "changes.txt", "".join(lines))
        else:
            (run_dir / "changes.txt").unlink(missing_ok=True)
        if trained is None or not _has_settings(run_dir / "config.yaml", trained):
            replace_file(run_dir / "config.yaml", to_yaml(config))
        open(run_dir / "journal.jsonl", "ab").close()  # here, where an error reaches all ranks
    except OSError as error:
        raise cannot_be_written(error.filename or run_dir, error) from None


def cannot_be_written(path: object, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written: {error.strerror}; fix that, or give another tracking.run_root="
    )


def _has_settings(path: Path, config: Config) -> bool:
    try:
        return path.stat().st_size > 0 and not differing_settings(load_config(path), config)
    except (OSError, UserError):
        return False


def changes_so_far(run_dir: Path) -> str:
    """Returns RUN/changes.txt, one line per step at which the settings or data changed; or ""."""
    try:
        return (run_dir / "changes.txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _first_step(line: str) -> int:
    found = re.match(r"from step (\d+): ", line)
    return int(found[1]) if found else -1  # keep lines that a person wrote


def differing_settings(before: Config, now: Config) -> list[str]:
    """Lists the settings that differ and change what is computed: "optim.base_lr 0.1 -> 0.2"."""
    saved = flat_settings(before)
    return [
        f"{key} {as_yaml(saved[key])} -> {as_yaml(value)}"
        for key, value in flat_settings(now).items()
        if value != saved[key] and not key.startswith(FREE_TO_CHANGE)
    ]


def check_run_folder(config: Config, anyway: bool) -> list[str]:
    """Lists what differs from the newest checkpoint's config, or else from RUN/config.yaml.

    Raises:
        UserError: something differs and `anyway` is False, or the folder cannot be read.
    """
    step, before = _last_config(config.run_dir)
    differing = [] if before is None else differing_settings(before, config)
    if differing and not anyway:
        raise refusal(config, step, differing, can_resume_anyway=True)
    return differing


def _last_config(run_dir: Path) -> tuple[int | None, Config | None]:
    """Returns step and config of the newest checkpoint that has them, or RUN/config.yaml's config.

    A checkpoint comes first: config.yaml is written before any step is done under it.
    """
    for path in reversed(folders.step_folders(run_dir)):
        meta = folders.read_meta(path)
        if isinstance(meta.get("config"), dict):  # missing in format 2 and in a damaged file
            return meta.get("step"), config_from_dict(meta["config"], f"{path}/meta.json")
    path = run_dir / "config.yaml"
    if not path.exists():
        return None, None
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise UserError(f"{path}: is empty")
        return None, load_config(path)
    except UserError as error:
        raise UserError(f"{error}; repair it or move it away, or give another name=") from None


def refusal(
    config: Config, step: int | None, differing: Sequence[str], can_resume_anyway: bool
) -> UserError:
    """Returns the error that lists everything that differs.

    step: of the checkpoint, if there is one. can_resume_anyway: whether --resume-anyway would help.
    """
    before = "config.yaml" if step is None else f"the checkpoint of step {step}"
    ways = "undo that or use another name="
    if can_resume_anyway:
        ways = "undo that, use another name=, or add --resume-anyway"
    return UserError(f"{config.run_dir}: differs from {before}: {'; '.join(differing)}; {ways}")

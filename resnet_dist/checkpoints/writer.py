"""Writes checkpoints in a background thread.

`Saver.save` copies the state to host memory and returns; a thread then writes the copy. A
checkpoint is durable, and a run can resume from it, once `write` has returned: by then its files
are flushed, the folder has been renamed to its final name, and that name is flushed. The Saver
reports it with "saved step 440".
"""

import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from resnet_dist.checkpoints import folders
from resnet_dist.checkpoints.content import FORMAT, Checkpoint, leaf_values
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.errors import UserError
from resnet_dist.files import flush_file, new_folder, temporary_name

REPORT_EVERY_SECONDS = 60.0  # at most one "saved step 440" per minute, to keep the log readable


class Saver:
    """Saves the checkpoints of a run. Used on one rank only; at most one save is in progress."""

    def __init__(self, run_dir: Path, retention: Retention, say: Callable[[str], None] = print):
        """say: prints a line about a save or its failure."""
        self.run_dir = run_dir
        self.retention = retention
        self._say = say
        self._buffers: dict[tuple[Any, ...], Tensor] = {}  # key path in the checkpoint -> host copy
        self._written = Event()  # set when the newest save has been written or has failed
        self._written.set()
        self._failure: str | None = None  # why the newest save failed
        self._warned: set[str] = set()  # warnings that have been printed
        self._unreported: str | None = None  # line about the newest save, if not printed yet
        self._reported_at = -math.inf  # on the clock of time.monotonic()

    def save(self, checkpoint: Checkpoint) -> None:
        """Copies the checkpoint and starts writing it, after waiting for the previous save.

        If the save fails, a warning is printed and training continues.
        """
        self.wait()
        copy = Checkpoint.from_dict(self.copy_to_host(checkpoint.to_dict()))
        copied = None
        if torch.cuda.is_available():
            # The copies have only been queued; the writer thread waits for them, not this one.
            copied = torch.cuda.Event()
            copied.record()
        self._written.clear()
        try:
            # Not a daemon thread: the process must not end before the checkpoint is written.
            Thread(target=self._write, args=(copy, copied), name="checkpoint-writer").start()
        except RuntimeError:  # the thread could not be started
            self._written.set()
            raise

    def wait(self) -> None:
        """Waits until the newest save is on the disk or has failed."""
        # Not Thread.join: if Ctrl-C interrupts it, Python 3.11 considers the thread finished, both
        # here and at the end of the process.
        self._written.wait()

    def finish(self) -> None:
        """Waits for the newest save at the end of a run.

        Raises:
            UserError: the newest save has failed.
        """
        self.wait()
        if self._unreported is not None:
            self._say(self._unreported)
        if self._failure is not None:
            try:
                newest = folders.latest(self.run_dir)
                last = "no earlier checkpoint" if newest is None else f"the last one is {newest}"
            except UserError as error:
                last = str(error)
            raise UserError(
                f"{self._failure}; {last}; fix the cause, and the same command resumes from there"
            )

    def copy_to_host(self, value: Any, key_path: tuple[Any, ...] = ()) -> Any:
        """Returns `value` with its tensors copied to host memory, in buffers that are reused.

        key_path: the keys that lead to `value` in the content of the checkpoint.
        """
        if isinstance(value, dict):
            return {key: self.copy_to_host(item, (*key_path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [
                self.copy_to_host(item, (*key_path, number)) for number, item in enumerate(value)
            ]
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(key_path)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            # Pinned memory, so that a copy from the GPU does not block. The strides are kept
            # (channels_last).
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[key_path] = buffer
        return buffer.copy_(value, non_blocking=True)

    def _write(self, checkpoint: Checkpoint, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()  # CPU-GPU sync point, in this thread only
            save(self.run_dir, checkpoint, self.retention, self._warn_once)
            self._failure = None
            self._report(checkpoint.step)
        except Exception as error:  # whatever goes wrong on the disk must not end training
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._failure = f"checkpoint of step {checkpoint.step}: not written: {reason}"
            self._say(
                f"warning: {self._failure}; training continues, and the next save tries again"
            )
        finally:
            self._written.set()

    def _report(self, step: int) -> None:
        self._unreported = f"saved step {step}"
        if time.monotonic() - self._reported_at >= REPORT_EVERY_SECONDS:
            self._say(self._unreported)
            self._unreported, self._reported_at = None, time.monotonic()

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self._say(line)


def save(
    run_dir: Path,
    checkpoint: Checkpoint,
    retention: Retention,
    warn: Callable[[str], None] = print,
) -> Path:
    """Writes a checkpoint, updates the links `latest` and `best`, and removes old checkpoints.

    If there is an intact checkpoint of the same step already, it is kept, unless the step has been
    evaluated since. For one process only.

    warn: prints a line about what went wrong after the checkpoint was written.

    Raises:
        OSError, UserError: the checkpoint cannot be written, for example on a full disk. Older
            checkpoints are unchanged.
    """
    step, best_step = checkpoint.step, checkpoint.best_step
    final = run_dir / "checkpoints" / folders.name_of(step)
    if folders.why_damaged(final) is not None or folders.read_meta(final).get("step") != step:
        write(final, checkpoint)
    elif Checkpoint.load(final).evaluated_step != checkpoint.evaluated_step:
        fresh = temporary_name(final)
        write(fresh, checkpoint)
        folders.replace(final, fresh)
    # The checkpoint is written. That the file system has no links, or that an old file cannot be
    # removed, is only worth a warning.
    for line in folders.set_links(final, best_step):
        warn(line)
    try:
        folders.remove_old(run_dir, retention, final, best_step)
    except (OSError, UserError) as error:
        warn(f"warning: some old checkpoints could not be removed: {error}")
    return final


def write(final: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint to the new folder `final`, completely or not at all. One rank only.

    Raises:
        OSError: it cannot be written, or `final` exists. Then nothing of it remains.
    """
    if os.path.lexists(final):  # checked here, as a rename would replace an empty folder
        raise FileExistsError(errno.EEXIST, "exists, and is not an intact checkpoint", final)
    with new_folder(final) as folder:
        content = checkpoint.to_dict()
        _write_state(folder / "state.pt", content)
        flush_file(folder / "state.pt")
        _write_flushed(folder / "meta.json", json.dumps(_meta_of(checkpoint, content), indent=1))
        names = ("state.pt", "meta.json")
        sums = "".join(f"{folders.sha256(folder / name)}  {name}\n" for name in names)
        _write_flushed(folder / "SHA256SUMS", sums)


def _write_flushed(path: Path, text: str) -> None:
    path.write_text(text)
    flush_file(path)


def _write_state(path: Path, content: dict[str, Any]) -> None:
    """Writes state.pt with torch's own writer.

    Writing to a Python file object instead would need the GIL, and so interrupt training, for each
    of some thousand pieces.
    """
    try:
        torch.save(content, path)
    except RuntimeError:  # torch reports a full disk as "unexpected pos"
        with open(path, "ab") as file:
            file.write(bytes(2**20))  # raises the true reason if the disk is full
        raise


def _meta_of(checkpoint: Checkpoint, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of meta.json. "sound": see folders.py."""
    loss = checkpoint.mean_loss
    tensors = [leaf for leaf in leaf_values(content) if isinstance(leaf, Tensor)]
    finite = all(_is_finite(tensor) for tensor in tensors)
    finite = finite and (loss is None or math.isfinite(loss))
    # A uniform guess has the loss ln(classes), with any label smoothing. A network that does worse
    # is diverging or in its first steps; a false alarm costs some disk space, nothing else.
    uniform = math.log(max(1, len(checkpoint.classes)))
    return {
        "format": FORMAT,
        "step": checkpoint.step,
        "best": content["best"],
        "train_loss": loss if finite else None,
        "finite": finite,
        "sound": finite and (loss is None or loss <= uniform),
        "config": checkpoint.config,
    }


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # NumPy works in this thread alone; torch would use all cores and slow down training.
    values = tensor.detach().float().cpu().numpy()
    return math.isfinite(values.min()) and math.isfinite(
        values.max()
    )  # both are NaN if any value is

"""How a checkpoint gets to the disk, behind the back of training.

`Saver.save` copies the state to the host's memory and returns; a thread then writes it. It is
durable, and may be gone on from, once `write` has returned: the files are flushed, the folder has
its name, and the name is flushed. `Saver` says so: "saved step 440".
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
from resnet_dist.files import flush_file, new_folder

SAID_EVERY_SECONDS = 60.0  # "saved step 440": the log is for the loss, too


class Saver:
    """The checkpoints of a run. Used on one rank only; at most one save is under way."""

    def __init__(self, run_dir: Path, retention: Retention, say: Callable[[str], None] = print):
        """say: takes a line about what was saved, or was not."""
        self.run_dir = run_dir
        self.retention = retention
        self._say = say
        self._buffers: dict[tuple[Any, ...], Tensor] = {}  # key_path in the content -> its copy
        self._written = Event()  # or failed: the newest save
        self._written.set()
        self._failure: str | None = None  # of the newest save
        self._told: set[str] = set()  # of what does not keep a checkpoint from being written
        self._unsaid: str | None = None  # the newest save, if nobody was told
        self._said_at = -math.inf  # on the clock of time.monotonic()

    def save(self, checkpoint: Checkpoint) -> None:
        """Copies it as it is now, and has it written. Waits for the save before, if need be.

        A save that fails is warned of, and training goes on.
        """
        self.wait()
        copy = Checkpoint.from_dict(self.copy_to_host(checkpoint.to_dict()))
        copied = None
        if torch.cuda.is_available():
            # The copies are only queued: the writer waits for them, this thread does not.
            copied = torch.cuda.Event()
            copied.record()
        self._written.clear()
        try:
            # No daemon: the process does not end before the thread has.
            Thread(target=self._write, args=(copy, copied), name="checkpoint-writer").start()
        except RuntimeError:  # no thread was made
            self._written.set()
            raise

    def wait(self) -> None:
        """Until what was saved is on the disk, or has failed."""
        # Not Thread.join: interrupted by Ctrl-C, Python 3.11's takes the thread for finished, here
        # and at the end of the process.
        self._written.wait()

    def finish(self) -> None:
        """At the end of a run.

        Raises:
            UserError: the newest save is not on the disk.
        """
        self.wait()
        if self._unsaid is not None:
            self._say(self._unsaid)
        if self._failure is not None:
            try:
                newest = folders.latest(self.run_dir)
                there = "none is there" if newest is None else f"the newest is {newest}"
            except UserError as error:
                there = str(error)
            raise UserError(
                f"{self._failure}; of the checkpoints before, {there}: mend that, and the same "
                "command goes on from there"
            )

    def copy_to_host(self, value: Any, key_path: tuple[Any, ...] = ()) -> Any:
        """`value` with its tensors in host memory, in buffers that are used again each time.

        key_path: where in the content of a checkpoint `value` is.
        """
        if isinstance(value, dict):
            return {key: self.copy_to_host(part, (*key_path, key)) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [
                self.copy_to_host(part, (*key_path, number)) for number, part in enumerate(value)
            ]
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(key_path)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            # Pinned, or a copy from the GPU would be waited for. Strides (channels_last) stay.
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[key_path] = buffer
        return buffer.copy_(value, non_blocking=True)

    def _write(self, checkpoint: Checkpoint, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()  # CPU-GPU sync point, of this thread alone
            save(self.run_dir, checkpoint, self.retention, self._warn_once)
            self._failure = None
            self._say_saved(checkpoint.step)
        except Exception as error:  # whatever a disk, a file system or a user's hand does to it
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._failure = f"checkpoint of step {checkpoint.step}: not written: {reason}"
            self._say(f"warning: {self._failure}; training goes on, and the next save tries again")
        finally:
            self._written.set()

    def _say_saved(self, step: int) -> None:
        self._unsaid = f"saved step {step}"
        if time.monotonic() - self._said_at >= SAID_EVERY_SECONDS:
            self._say(self._unsaid)
            self._unsaid, self._said_at = None, time.monotonic()

    def _warn_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)


def save(
    run_dir: Path,
    checkpoint: Checkpoint,
    retention: Retention,
    warn: Callable[[str], None] = print,
) -> Path:
    """Writes a checkpoint, points `latest` and `best` at what they mean, and removes old ones.

    A whole checkpoint of the same step is not written again. For one process only.

    warn: takes a line about what did not work once the checkpoint was written.

    Raises:
        OSError, UserError: it is not written (the disk is full, say). Older checkpoints stay as
            they are.
    """
    step, best_step = checkpoint.step, checkpoint.best_step
    final = run_dir / "checkpoints" / folders.name_of(step)
    if folders.why_damaged(final) is not None or folders.read_meta(final).get("step") != step:
        write(final, checkpoint)
    # A file system without links, or a file that is held open, does not unmake the checkpoint.
    for line in folders.set_links(final, best_step):
        warn(line)
    try:
        folders.remove_old(run_dir, retention, final, best_step)
    except (OSError, UserError) as error:
        warn(f"warning: not all old checkpoints are removed: {error}")
    return final


def write(final: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to a folder that does not exist yet: whole, or not at all. One rank only.

    Raises:
        OSError: it is not written, and nothing of it stays.
    """
    if os.path.lexists(final):  # a rename would replace an empty folder
        raise FileExistsError(
            errno.EEXIST, "is there already, and is not a whole checkpoint", final
        )
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
    """By torch's own writer: a Python file would take the interpreter from training, for each of
    some thousand pieces."""
    try:
        torch.save(content, path)
    except RuntimeError:  # its word for a full disk is "unexpected pos"
        with open(path, "ab") as file:
            file.write(bytes(2**20))  # raises the reason, if it is the disk
        raise


def _meta_of(checkpoint: Checkpoint, content: dict[str, Any]) -> dict[str, Any]:
    """meta.json. "sound": worth going on from, as far as can be told without the data."""
    loss = checkpoint.mean_loss
    tensors = [leaf for leaf in leaf_values(content) if isinstance(leaf, Tensor)]
    finite = all(_is_finite(tensor) for tensor in tensors)
    finite = finite and (loss is None or math.isfinite(loss))
    # A blind guess has the loss ln(classes), whatever the label smoothing. A network that does
    # worse may be exploding, or in its first steps: a false alarm costs some disk space, no more.
    blind = math.log(max(1, len(checkpoint.classes)))
    return {
        "format": FORMAT,
        "step": checkpoint.step,
        "best": content["best"],
        "train_loss": loss if finite else None,
        "finite": finite,
        "sound": finite and (loss is None or loss <= blind),
        "config": checkpoint.config,
    }


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # By NumPy, in this thread alone: torch would take all cores from the training beside it.
    values = tensor.detach().float().cpu().numpy()
    return math.isfinite(values.min()) and math.isfinite(values.max())  # NaN is both

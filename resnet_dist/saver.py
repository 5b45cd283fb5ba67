"""Saves behind the back of training: a copy in the host's memory, which a thread writes to disk."""

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from resnet_dist import checkpoint_history, checkpoint_list
from resnet_dist.errors import UserError
from resnet_dist.retention import Retention


class Saver:
    """The checkpoints of a run. Used on one rank only; at most one save is under way."""

    def __init__(self, run_dir: Path, retention: Retention):
        self.run_dir = run_dir
        self.retention = retention
        self.warn: Callable[[str], None] = print  # takes a line about what failed
        self._buffers: dict[tuple[Any, ...], Tensor] = {}  # place in the content -> its copy
        self._written = Event()  # or failed: the newest save
        self._written.set()
        self._failure: str | None = None  # of the newest save
        self._said: set[str] = set()  # of what does not keep a checkpoint from being written

    def save(self, content: dict[str, Any]) -> None:
        """Copies `content` as it is now, and has it written. Waits for the save before, if need be.

        content: see checkpoint.content_of. A save that fails is warned of, and training goes on.
        """
        self.wait()
        copy = self.copy_to_host(content)
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
        if self._failure is not None:
            try:
                newest = checkpoint_list.latest(self.run_dir)
                there = "none is there" if newest is None else f"the newest is {newest}"
            except UserError as error:
                there = str(error)
            raise UserError(
                f"{self._failure}; of the checkpoints before, {there}: mend that, and the same "
                "command goes on from there"
            )

    def copy_to_host(self, value: Any, place: tuple[Any, ...] = ()) -> Any:
        """`value` with its tensors in host memory, in buffers that are used again each time.

        place: where in the content of a checkpoint `value` is.
        """
        if isinstance(value, dict):
            return {key: self.copy_to_host(part, (*place, key)) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy_to_host(part, (*place, number)) for number, part in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            # Pinned, or a copy from the GPU would be waited for. Strides (channels_last) stay.
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[place] = buffer
        return buffer.copy_(value, non_blocking=True)

    def _write(self, content: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()  # CPU-GPU sync point, of this thread alone
            checkpoint_history.save(self.run_dir, content, self.retention, self._warn_once)
            self._failure = None
        except Exception as error:  # whatever a disk, a file system or a user's hand does to it
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._failure = f"checkpoint of step {content['step']}: not written: {reason}"
            self.warn(f"warning: {self._failure}; training goes on, and the next save tries again")
        finally:
            self._written.set()

    def _warn_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.warn(line)

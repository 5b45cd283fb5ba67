"""Saves behind the back of training: a copy in the host's memory, which a thread writes to disk."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from resnet_dist import checkpoint_history
from resnet_dist.errors import UserError
from resnet_dist.retention import Retention


class Saver:
    """The checkpoints of a run. Used on one rank only; at most one save is under way."""

    def __init__(self, run_dir: Path, retention: Retention):
        self.run_dir = run_dir
        self.retention = retention
        self.warn: Callable[[str], None] = print  # a line about a save that failed
        self._buffers: dict[tuple[Any, ...], Tensor] = {}  # place in the content -> its copy
        self._writer: Thread | None = None
        self._failure: str | None = None  # of the newest save

    def save(self, content: dict[str, Any]) -> None:
        """Copies `content` as it is now, and has it written. Waits for the save before, if need be.

        content: see checkpoint.content_of. A save that fails is warned of, and training goes on.
        """
        self.wait()
        copy = self._copy(content, ())
        copied = None
        if torch.cuda.is_available():
            # The copies are only queued: the writer waits for them, this thread does not.
            copied = torch.cuda.Event()
            copied.record()
        # No daemon: the process does not end before the thread has.
        self._writer = Thread(target=self._write, args=(copy, copied), name="checkpoint-writer")
        self._writer.start()

    def wait(self) -> None:
        """Until what was saved is on the disk, or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def finish(self) -> None:
        """At the end of a run.

        Raises:
            UserError: the newest save is not on the disk.
        """
        self.wait()
        if self._failure is not None:
            newest = checkpoint_history.latest(self.run_dir)
            there = "none is there" if newest is None else f"the newest is {newest}"
            raise UserError(
                f"{self._failure}; of the checkpoints before, {there}: mend that, and the same "
                "command goes on from there"
            )

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        """`value` with its tensors in host memory, in buffers that are used again each time."""
        if isinstance(value, dict):
            return {key: self._copy(part, (*place, key)) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._copy(part, (*place, number)) for number, part in enumerate(value)]
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
            checkpoint_history.save(self.run_dir, content, self.retention)
            self._failure = None
        except Exception as error:  # whatever a disk, a file system or a user's hand does to it
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._failure = f"checkpoint of step {content['step']}: not written: {reason}"
            self.warn(f"warning: {self._failure}; training goes on, and the next save tries again")

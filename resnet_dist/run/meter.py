"""Training loss, accuracy and throughput since the last log line.

Sums are kept on the device, added over the ranks when a line is due, and only then divided.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from resnet_dist.checkpoints.content import NO_SUMS
from resnet_dist.distributed import World
from resnet_dist.tracking import metrics


class Meter:
    """Running sums of loss, correct answers and images.

    They survive a stop: `gather` returns them for the checkpoint, `saved` brings them back.
    """

    def __init__(self, world: World, saved: Tensor = NO_SUMS, last_loss: float | None = None):
        """saved: what `gather` returned before a stop, on a world of any size."""
        self.world = world
        self.last_loss = last_loss  # mean loss in the last log line; None before the first
        self._restart()
        # On as many ranks as before, each continues with its own sums, which gives the same bits.
        # Otherwise rank 0 takes the total.
        if len(saved) == world.size:
            self.sums += saved[world.rank].to(world.device)
        elif world.rank == 0:
            self.sums += saved.sum(0).to(world.device)
        self.images_before_start = self.sums[2].clone()

    def _restart(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        self.images_before_start = torch.zeros_like(self.sums[2])
        self.wait_seconds = 0.0
        self.started = time.monotonic()

    def add(self, loss_sum: Tensor, correct: Tensor, images: int) -> None:
        """Adds one pass. loss_sum, correct: scalars on the device. No CPU-GPU sync."""
        count = torch.full_like(correct, images)
        self.sums += torch.stack([loss_sum.double(), correct.double(), count.double()])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent in this block as waiting for data."""
        began = time.monotonic()
        yield
        self.wait_seconds += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in this block, on an evaluation or a save, from training time."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def gather(self) -> Tensor:
        """Returns every rank's sums of loss, correct answers and images. A collective; no sync.

        float64 [world size, 3], on the device.
        """
        # Each rank fills its own row of a table of zeros. Adding zeros is exact, so the sum over
        # the ranks is the table of all rows, bit for bit.
        rows = self.sums.new_zeros(self.world.size, 3)
        rows[self.world.rank] = self.sums
        return self.world.sum(rows)

    def drain(self) -> dict[str, float]:
        """Returns the metrics over all ranks and resets the sums. A collective, a CPU-GPU sync."""
        waited = torch.tensor([self.wait_seconds], dtype=torch.float64, device=self.world.device)
        sums = torch.cat([self.sums, self.images_before_start[None], waited])
        # CPU-GPU sync point
        loss_sum, correct, images, before, wait_seconds = self.world.sum(sums).tolist()
        seconds = time.monotonic() - self.started
        measured = images - before
        self._restart()
        self.last_loss = loss_sum / images
        return {
            metrics.TRAIN_LOSS: self.last_loss,
            metrics.TRAIN_ACC1: 100 * correct / images,
            metrics.IMAGES_PER_SEC: measured / seconds,
            metrics.DATA_WAIT_PCT: 100 * wait_seconds / (seconds * self.world.size),
        }

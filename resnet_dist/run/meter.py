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
        # Before the last log line: how many passes there were from the first one on whose loss was
        # not finite, on the rank where that came first.
        self.nonfinite_passes = 0
        self._restart()
        # On as many ranks as before, each continues with its own sums, which gives the same bits.
        # Otherwise rank 0 takes the total.
        if len(saved) == world.size:
            self.sums += saved[world.rank].to(world.device)
        elif world.rank == 0:
            self.sums += saved.sum(0).to(world.device)

    def _restart(self) -> None:
        # Loss, correct answers, and images before this start: those since are counted on the host.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        self.finite_passes = torch.zeros_like(self.sums[0])
        self.passes = self.images = 0
        self.wait_seconds = 0.0
        self.started = time.monotonic()

    def add(self, loss_sum: Tensor, correct: Tensor, images: int) -> None:
        """Adds one pass. loss_sum, correct: scalars on the device. No CPU-GPU sync."""
        self.sums[:2].add_(torch.stack([loss_sum.double(), correct.double()]))
        self.images += images
        self.passes += 1
        # A sum that has met a NaN or an infinity is not finite ever after. So what is counted here
        # are the passes before the first one with such a loss. (x - x is 0 only for a finite x.)
        loss = self.sums[0]
        self.finite_passes += loss - loss == 0

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
        rows[self.world.rank, 2] += self.images
        return self.world.sum(rows)

    def drain(self) -> dict[str, float]:
        """Returns the metrics over all ranks and resets the sums. A collective, a CPU-GPU sync."""
        finite_passes = self.sums.new_zeros(self.world.size)
        finite_passes[self.world.rank] = self.finite_passes
        known = self.sums.new_tensor([self.images, self.wait_seconds])
        sums = self.world.sum(torch.cat([self.sums, known, finite_passes]))
        # CPU-GPU sync point
        loss_sum, correct, before, measured, wait_seconds, *finite = sums.tolist()
        self.nonfinite_passes = self.passes - int(min(finite))
        seconds = time.monotonic() - self.started
        images = before + measured
        self._restart()
        self.last_loss = loss_sum / images
        return {
            metrics.TRAIN_LOSS: self.last_loss,
            metrics.TRAIN_ACC1: 100 * correct / images,
            metrics.IMAGES_PER_SEC: measured / seconds,
            metrics.DATA_WAIT_PCT: 100 * wait_seconds / (seconds * self.world.size),
        }

"""Sums of the steps since the last log line: on the device, added over ranks, then divided."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from resnet_dist.checkpoints.content import NO_SUMS
from resnet_dist.distributed import World
from resnet_dist.tracking import metrics


class Meter:
    """Sums of loss, right answers and images; `gather` and `saved` carry them over a stop."""

    def __init__(self, world: World, saved: Tensor = NO_SUMS, last_loss: float | None = None):
        """saved: what `gather` returned before a stop, on this world or another one."""
        self.world = world
        self.last_loss = last_loss  # of the last log line; None before there is one
        self._restart()
        if len(saved) == world.size:  # each rank goes on with its own: the same sums, bit for bit
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
        """One pass. loss_sum, correct: scalars on the device. No sync."""
        count = torch.full_like(correct, images)
        self.sums += torch.stack([loss_sum.double(), correct.double(), count.double()])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The host waits for data in here."""
        began = time.monotonic()
        yield
        self.wait_seconds += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and checkpoints are no training time."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def gather(self) -> Tensor:
        """Every rank's sums (of loss, right answers, images): float64 [world size, 3], on the
        device. A collective; no sync."""
        # A row per rank, zero but for our own: the sum over the ranks is exact.
        rows = self.sums.new_zeros(self.world.size, 3)
        rows[self.world.rank] = self.sums
        return self.world.sum(rows)

    def drain(self) -> dict[str, float]:
        """Figures over all ranks, and a new start. A collective, and a CPU-GPU sync point."""
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

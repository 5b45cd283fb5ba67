"""Sums of the steps since the last log line: on the device, added over ranks, then divided."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from resnet_dist.distributed import World


class Meter:
    def __init__(self, world: World):
        self.world = world
        self._restart()

    def _restart(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
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

    def drain(self) -> dict[str, float]:
        """Figures over all ranks, and a new start. A collective, and a CPU-GPU sync point."""
        waited = torch.tensor([self.wait_seconds], dtype=torch.float64, device=self.world.device)
        sums = self.world.sum(torch.cat([self.sums, waited]))
        loss_sum, correct, images, wait_seconds = sums.tolist()  # CPU-GPU sync point
        seconds = time.monotonic() - self.started
        self._restart()
        return {
            "train/loss": loss_sum / images,
            "train/acc1": 100 * correct / images,
            "perf/images_per_sec": images / seconds,
            "perf/data_wait_pct": 100 * wait_seconds / (seconds * self.world.size),
        }

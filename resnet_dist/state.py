"""The state of training: everything that changes from step to step."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resnet_dist.checkpoints.content import NO_SUMS, Checkpoint, Facts
from resnet_dist.config import Config, to_dict
from resnet_dist.ema import AveragedNetwork
from resnet_dist.optim import load_optimizer_state
from resnet_dist.plan import LrMemory, Plan


@dataclass
class TrainState:
    """What a checkpoint saves and restores; checkpoints/content.py explains each field."""

    model: nn.Module  # the bare network, without DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    evaluated_step: int = 0
    best_acc1: float = -1.0
    best_step: int = -1
    lr_memory: LrMemory = field(default_factory=LrMemory)
    ema: AveragedNetwork | None = None  # None without train.ema_decay
    meter: Tensor = NO_SUMS  # result of Meter.gather at the time of a save
    train_loss: float | None = None

    def checkpoint(self, config: Config, facts: Facts) -> Checkpoint:
        """Returns the state as a Checkpoint. Its tensors are the state's own, not copies."""
        return Checkpoint(
            **vars(facts),
            config=to_dict(config),
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            # CPU-GPU sync point in fp16, where the scale is read.
            scaler=self.scaler.state_dict(),
            ema=None if self.ema is None else self.ema.network.state_dict(),
            meter=self.meter,
            train_loss=self.train_loss,
            evaluated_step=self.evaluated_step,
            best_acc1=self.best_acc1,
            best_step=self.best_step,
            lr_memory=self.lr_memory,
            saved_at=time.strftime("%Y-%m-%d %H:%M %Z"),
        )

    def remember_evaluation(self, acc1: float, loss: float, plan: Plan) -> None:
        """Records what an evaluation means for the best score and for the plateau schedule.

        One whose loss is not finite is never the best: the network's answers mean nothing then.
        """
        is_best = acc1 > self.best_acc1 and math.isfinite(loss)
        if is_best:
            self.best_acc1, self.best_step = acc1, self.step
        self.evaluated_step = self.step
        self.lr_memory = plan.after_evaluation(self.lr_memory, self.step, is_best)

    def restore(self, saved: Checkpoint) -> None:
        """Loads a checkpoint, bit for bit."""
        self.model.load_state_dict(saved.model)
        load_optimizer_state(self.optimizer, saved.optimizer)
        self.scaler.load_state_dict(saved.scaler)
        if self.ema is not None:
            self.ema.network.load_state_dict(saved.weights)
        self.step, self.evaluated_step = saved.step, saved.evaluated_step
        self.best_acc1, self.best_step = saved.best_acc1, saved.best_step
        self.lr_memory = saved.lr_memory
        self.meter, self.train_loss = saved.meter, saved.train_loss

"""Every number that follows from a config, a world and a data set; and nothing else.

Pure and free of torch: `--dry-run` and the launchers print it on a login node.
"""

import math
from dataclasses import dataclass

from resnet_dist.config import Config, OptimConfig


@dataclass(frozen=True)
class Plan:
    """The run in numbers. Make it with `Plan.of`; steps are optimizer steps, counted from 0."""

    optim: OptimConfig
    world_size: int
    train_images: int
    val_images: int | None  # None: unknown here (a plan made without the data)
    global_batch_size: int
    accumulation: int  # forward and backward passes per optimizer step
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int

    @classmethod
    def of(
        cls, config: Config, world_size: int, train_images: int, val_images: int | None
    ) -> "Plan":
        """Raises UserError where the batch fits neither the world nor the data."""
        train, optim = config.train, config.optim
        global_batch_size = train.global_batch_size
        if global_batch_size < world_size:
            why = f"cannot be divided over {world_size} ranks: each needs an image in every step"
            raise config.invalid("train.global_batch_size", why, world_size)
        if global_batch_size > train_images:
            why = (
                f"is larger than the {train_images:,} training images: an epoch would have no step"
            )
            raise config.invalid("train.global_batch_size", why, train_images)

        # The fewest passes whose slices fit. Slices differ by one image where it does not divide:
        # 256 images on 3 ranks are 85, 85 and 86, and gradients are weighted by count.
        accumulation = math.ceil(global_batch_size / (world_size * train.max_local_batch_size))
        if world_size * accumulation > global_batch_size:
            why = f"leaves some of {world_size} ranks x {accumulation} passes without an image"
            raise config.invalid(
                "train.max_local_batch_size", why, math.ceil(global_batch_size / world_size)
            )
        # The last, partial batch of an epoch is dropped: every step has the same size, and as each
        # epoch has its own permutation, other images are left out each time.
        steps_per_epoch = train_images // global_batch_size
        total_steps = max(1, round(train.epochs * steps_per_epoch))
        return cls(
            optim=optim,
            world_size=world_size,
            train_images=train_images,
            val_images=val_images,
            global_batch_size=global_batch_size,
            accumulation=accumulation,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
            peak_lr=optim.base_lr * global_batch_size / 256,  # Goyal et al. 2017, section 2.1
            log_every_steps=train.log_every_steps,
            eval_every_steps=max(1, round(train.eval_every_epochs * steps_per_epoch)),
            save_every_steps=max(1, round(train.save_every_epochs * steps_per_epoch)),
        )

    @property
    def local_batch_size(self) -> int:
        """The most images one rank takes through the network at once."""
        return math.ceil(self.global_batch_size / (self.world_size * self.accumulation))

    @property
    def dropped_images_per_epoch(self) -> int:
        return self.train_images - self.steps_per_epoch * self.global_batch_size

    def lr_at(self, step: int, plateau_drops: tuple[int, ...] = ()) -> float:
        """Learning rate of `step`: a function of the step alone.

        The paper's plateau rule has a memory: `plateau_drops`, the steps at which it fired.
        Warm-up is linear, per step: the first step has 1/warmup_steps of the peak.
        """
        optim = self.optim
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if optim.schedule == "cosine":  # Loshchilov & Hutter 2017, one cycle
            return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))
        if optim.schedule == "polynomial":
            return self.peak_lr * (1 - progress) ** optim.power
        if optim.schedule == "step":
            epoch = step / self.steps_per_epoch
            drops = sum(epoch >= milestone for milestone in optim.milestones_epochs)
        else:
            drops = sum(step >= drop for drop in plateau_drops)
        return self.peak_lr * optim.gamma**drops

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def logs_after(self, step: int) -> bool:
        return step % self.log_every_steps == 0 or step == self.total_steps

    def evals_after(self, step: int) -> bool:
        return step % self.eval_every_steps == 0 or step == self.total_steps

    def saves_after(self, step: int) -> bool:
        return step % self.save_every_steps == 0 or step == self.total_steps

    def describe(self) -> str:
        """The plan as a table, with the arithmetic that made each number."""
        optim, batch = self.optim, self.global_batch_size
        per_rank = f"{batch // self.world_size}" + (
            f" or {batch // self.world_size + 1}" if batch % self.world_size else ""
        )
        passes = self.world_size * self.accumulation
        per_pass = f"{batch // passes}" + (f" or {batch // passes + 1}" if batch % passes else "")
        val = "unknown (no data here)" if self.val_images is None else f"{self.val_images:,}"
        rows = [
            ("ranks", f"{self.world_size}"),
            ("images", f"{self.train_images:,} train, {val} val"),
            ("global batch", f"{batch} = {per_rank} on each of {self.world_size} ranks"),
            ("per-rank batch", f"{per_pass} images per pass"),
            ("accumulation", f"{self.accumulation} x forward and backward per step"),
            (
                "steps per epoch",
                f"{self.steps_per_epoch:,} = {self.train_images:,} // {batch} "
                f"({self.dropped_images_per_epoch} images dropped, others in each epoch)",
            ),
            (
                "total steps",
                f"{self.total_steps:,} = {self.epoch_at(self.total_steps):g} epochs",
            ),
            ("warm-up", f"{self.warmup_steps:,} steps = {optim.warmup_epochs:g} epochs"),
            ("peak lr", f"{self.peak_lr:g} = {optim.base_lr:g} * {batch} / 256"),
            ("schedule", self._describe_schedule()),
            (
                "evaluation",
                f"every {self.eval_every_steps:,} steps "
                f"({self.epoch_at(self.eval_every_steps):g} epochs) and at the end",
            ),
            ("checkpoints", f"every {self.save_every_steps:,} steps and at the end"),
        ]
        return "\n".join(f"{name:<16} {text}" for name, text in rows)

    def _describe_schedule(self) -> str:
        optim = self.optim
        if optim.schedule == "step":
            at = ", ".join(f"{milestone:g}" for milestone in optim.milestones_epochs)
            return f"step: times {optim.gamma:g} at epochs {at}"
        if optim.schedule == "plateau":
            patience = optim.plateau_patience_evals
            return f"plateau: times {optim.gamma:g} after {patience} evaluations without a new best"
        if optim.schedule == "polynomial":
            return f"polynomial: to 0 with power {optim.power:g}"
        return "cosine: to 0"

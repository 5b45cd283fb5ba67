"""Every number that follows from a config, a world and a data set; and nothing else.

Pure and free of torch: `--dry-run` and the launchers print it on a login node.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resnet_dist.config import UNITS, Config, OptimConfig, flat_settings
from resnet_dist.models.depths import DEPTHS

TRAIN_ERROR_WARMUP_FACTOR = 0.1  # lr 0.01 before 0.1: He et al. 2015, section 4.2
TRAIN_ERROR_WINDOW_STEPS = 20


@dataclass(frozen=True)
class LrMemory:
    """What two rules remember: the steps at which they fired. Part of a checkpoint.

    All else of the schedule is a function of the step alone.
    """

    plateau_drops: tuple[int, ...] = ()  # steps from which the lr is lower
    evals_since_best: int = 0  # or since the last plateau drop
    warmup_end: int | None = None  # the first step at the peak; None: the error is still above
    # Right answers of the latest steps' global batches, while the rule watches them.
    correct_per_step: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint: tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "LrMemory":
        """The inverse of `to_dict`. Raises TypeError where `saved` is something else."""
        settled: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
        }
        return cls(**settled)


@dataclass(frozen=True)
class Plan:
    """The run in numbers. Make it with `Plan.of`; steps are optimizer steps, counted from 0."""

    optim: OptimConfig
    world_size: int
    train_images: int
    val_images: int | None  # None: unknown here (a plan made without the data)
    global_batch_size: int
    neighbours_kept: int  # of the config: images in a group that is never split over slices
    accumulation: int  # forward and backward passes per optimizer step
    sync_batchnorm: str  # of the config
    bn_ranks: int  # ranks that share BN statistics; 0: the network has no BN
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    milestone_steps: tuple[int, ...]
    peak_lr: float
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int
    keep_checkpoints: int
    keep_every_steps: int | None  # one checkpoint in so many steps stays for good; None: none

    @classmethod
    def of(
        cls,
        config: Config,
        world_size: int,
        train_images: int,
        val_images: int | None,
        local_world_size: int | None = None,
    ) -> "Plan":
        """local_world_size: ranks per node; None stands for all of them on one.

        Raises:
            UserError: the batch fits neither the world nor the data.
        """
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
        # 256 images on 3 ranks are 85, 85 and 86, and gradients are weighted by count. Where
        # neighbours are kept together, whole groups of them are dealt out.
        kept = config.neighbours_kept
        if global_batch_size % kept:
            why = f"must be a multiple of {kept}: images are mixed in groups of {kept}"
            raise config.invalid(
                "train.global_batch_size", why, max(1, global_batch_size // kept) * kept
            )
        if train.max_local_batch_size < kept:
            why = f"splits groups of {kept} images that are mixed with each other"
            raise config.invalid("train.max_local_batch_size", why, kept)
        groups = global_batch_size // kept
        accumulation = _passes(groups, world_size, train.max_local_batch_size // kept)
        if world_size * accumulation > groups:
            why = f"leaves some of {world_size} ranks x {accumulation} passes without an image"
            raise config.invalid(
                "train.max_local_batch_size", why, math.ceil(groups / world_size) * kept
            )
        # The last, partial batch of an epoch is dropped: every step has the same size, and as each
        # epoch has its own permutation, other images are left out each time.
        steps_per_epoch = train_images // global_batch_size
        settings = flat_settings(config)

        def steps(key: str) -> int:
            """The quantity `key`, in whichever unit it is given."""
            in_epochs, in_iterations = settings[key], settings[UNITS[key]]
            return in_iterations if in_epochs is None else round(in_epochs * steps_per_epoch)

        total_steps = max(1, steps("train.epochs"))
        warmup_steps = steps("optim.warmup_epochs")
        if warmup_steps > total_steps:
            key = "optim.warmup_epochs"
            unit = total_steps / steps_per_epoch
            if settings[key] is None:
                key, unit = UNITS[key], total_steps
            why = f"is longer than the run's {total_steps:,} steps"
            raise config.invalid(key, why, unit)
        milestones: Sequence[float] = optim.milestones_iterations or ()
        if optim.milestones_epochs is not None:
            milestones = [m * steps_per_epoch for m in optim.milestones_epochs]
        sharing = {"world": world_size, "node": local_world_size or world_size, "none": 1}
        has_bn = DEPTHS[config.model.name].block != "conv"
        return cls(
            optim=optim,
            world_size=world_size,
            train_images=train_images,
            val_images=val_images,
            global_batch_size=global_batch_size,
            neighbours_kept=kept,
            accumulation=accumulation,
            sync_batchnorm=config.model.sync_batchnorm,
            bn_ranks=sharing[config.model.sync_batchnorm] if has_bn else 0,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            milestone_steps=tuple(math.ceil(m) for m in milestones),
            peak_lr=optim.base_lr * global_batch_size / 256,  # Goyal et al. 2017, section 2.1
            log_every_steps=train.log_every_steps,
            eval_every_steps=max(1, steps("train.eval_every_epochs")),
            save_every_steps=max(1, steps("train.save_every_epochs")),
            keep_checkpoints=train.keep_checkpoints,
            keep_every_steps=(
                None
                if train.keep_every_epochs is None
                else max(1, round(train.keep_every_epochs * steps_per_epoch))
            ),
        )

    @property
    def local_batch_size(self) -> int:
        """The most images one rank takes through the network at once."""
        groups = self.global_batch_size // self.neighbours_kept
        return math.ceil(groups / (self.world_size * self.accumulation)) * self.neighbours_kept

    @property
    def bn_batch_size(self) -> int:
        """The most images that are normalized together; 0: the network has no BN.

        The slices of the ranks that share statistics stand side by side in the global batch.
        """
        groups = self.global_batch_size // self.neighbours_kept
        slices = self.world_size * self.accumulation
        return math.ceil(groups * self.bn_ranks / slices) * self.neighbours_kept

    def max_local_batch_size_for(self, bn_batch_size: int) -> int | None:
        """With which BN would average over so many images; None: with none on this world."""
        if bn_batch_size == 0 or self.bn_ranks == 0:  # a network without BN
            return None
        kept = self.neighbours_kept
        local = math.ceil(bn_batch_size / kept / self.bn_ranks) * kept
        groups = self.global_batch_size // kept
        accumulation = _passes(groups, self.world_size, local // kept)
        fits = self.world_size * accumulation <= groups
        same = replace(self, accumulation=accumulation).bn_batch_size == bn_batch_size
        return local if fits and same else None

    def positions(self, rank: int, accumulated: int) -> range:
        """Where the images of pass `accumulated` of a rank stand in the step's global batch."""
        slices = self.accumulation * self.world_size
        part = accumulated * self.world_size + rank
        kept, groups = self.neighbours_kept, self.global_batch_size // self.neighbours_kept
        return range(part * groups // slices * kept, (part + 1) * groups // slices * kept)

    @property
    def dropped_images_per_epoch(self) -> int:
        return self.train_images - self.steps_per_epoch * self.global_batch_size

    def lr_at(self, step: int, memory: LrMemory | None = None) -> float:
        """Learning rate of `step`: a function of the step alone, but for the rules with a memory.

        Warm-up is linear, per step: the first step has 1/warmup_steps of the peak.
        """
        optim, memory = self.optim, memory or LrMemory()
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.watches_train_error(memory):
            return self.peak_lr * TRAIN_ERROR_WARMUP_FACTOR
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if optim.schedule == "cosine":  # Loshchilov & Hutter 2017, one cycle
            return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))
        if optim.schedule == "polynomial":
            return self.peak_lr * (1 - progress) ** optim.power
        fired = self.milestone_steps if optim.schedule == "step" else memory.plateau_drops
        return self.peak_lr * optim.gamma ** sum(step >= at for at in fired)

    def watches_train_error(self, memory: LrMemory) -> bool:
        """True while the lr is low because the training error is still high."""
        return self.optim.warmup_until_train_error_pct is not None and memory.warmup_end is None

    def after_train_step(self, memory: LrMemory, step: int, correct: int) -> LrMemory:
        """The memory after step `step - 1`, of whose global batch `correct` images were right."""
        window = (*memory.correct_per_step, correct)[-TRAIN_ERROR_WINDOW_STEPS:]
        images = TRAIN_ERROR_WINDOW_STEPS * self.global_batch_size
        limit_pct = self.optim.warmup_until_train_error_pct
        assert limit_pct is not None
        if len(window) == TRAIN_ERROR_WINDOW_STEPS and 100 * (1 - sum(window) / images) < limit_pct:
            return replace(memory, warmup_end=step, correct_per_step=())
        return replace(memory, correct_per_step=window)

    def after_evaluation(self, memory: LrMemory, step: int, is_best: bool) -> LrMemory:
        """The memory after an evaluation: the plateau rule."""
        evals_since_best = 0 if is_best else memory.evals_since_best + 1
        patience = self.optim.plateau_patience_evals
        if self.optim.schedule == "plateau" and evals_since_best >= patience:
            drops = (*memory.plateau_drops, step)
            return replace(memory, plateau_drops=drops, evals_since_best=0)
        return replace(memory, evals_since_best=evals_since_best)

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def logs_after(self, step: int) -> bool:
        return step % self.log_every_steps == 0 or step == self.total_steps

    def evals_after(self, step: int) -> bool:
        return step % self.eval_every_steps == 0 or step == self.total_steps

    def saves_after(self, step: int) -> bool:
        due = step % self.save_every_steps == 0 or step == self.total_steps
        return due or (self.keep_every_steps is not None and step % self.keep_every_steps == 0)


def _passes(groups: int, world_size: int, most: int) -> int:
    """The fewest passes in which no rank has more than `most` groups of images at once."""
    return math.ceil(groups / (world_size * most))

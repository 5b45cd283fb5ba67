"""Every number that follows from a config, a world and a data set; nothing else.

A Plan is pure arithmetic and needs no torch, so a login node can print it (`--dry-run`). The chain:

    global batch B, ranks W  ->  accumulation A: the fewest passes with B / (W * A) images or fewer
                                 than fit on a rank (train.max_local_batch_size)
    B, training images N     ->  steps per epoch: N // B
    steps per epoch, epochs  ->  total, warm-up and milestone steps
    B, base_lr               ->  peak lr: base_lr * B / 256; `lr_at(step)` does the rest
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resnet_dist.config import UNITS, Config, OptimConfig, flat_settings
from resnet_dist.models.depths import DEPTHS

TRAIN_ERROR_WARMUP_FACTOR = 0.1  # lr 0.01, then 0.1: He et al. 2015, section 4.2
TRAIN_ERROR_WINDOW_STEPS = 20


@dataclass(frozen=True)
class LrMemory:
    """The memory of the two learning-rate rules that react to results. Saved in checkpoints.

    Everything else about the learning rate is a function of the step alone.
    """

    plateau_drops: tuple[int, ...] = ()  # the steps at which the plateau rule lowered the lr
    evals_since_best: int = 0  # evaluations since the best one or the last plateau drop
    # The first step at the peak lr after warmup_until_train_error_pct; None: not reached yet.
    warmup_end: int | None = None
    # Correct answers in the global batches of the latest steps, until the warm-up ends.
    correct_per_step: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for a checkpoint, with tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "LrMemory":
        """The inverse of `to_dict`. Raises TypeError if `saved` has other fields."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """A run in numbers, made by `Plan.of`. Steps are optimizer steps, counted from 0."""

    optim: OptimConfig
    world_size: int
    train_images: int
    val_images: int | None  # None: unknown, as the plan was made without the data
    global_batch_size: int
    neighbours_kept: int  # Config.neighbours_kept: images per group that no slice may split
    accumulation: int  # forward and backward passes per optimizer step
    sync_batchnorm: str  # model.sync_batchnorm
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
    keep_every_steps: int | None  # interval of checkpoints that are kept for good; None: none are

    @classmethod
    def of(
        cls,
        config: Config,
        world_size: int,
        train_images: int,
        val_images: int | None,
        local_world_size: int | None = None,
    ) -> "Plan":
        """Computes the plan. local_world_size: ranks per node; None: all ranks are on one node.

        Raises:
            UserError: the global batch does not fit the world or the data.
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

        # The global batch is cut into one slice per rank and pass, with the fewest passes whose
        # slices fit on a rank. If it does not divide evenly, slices differ by one image: 256 images
        # on 3 ranks are 85, 85 and 86 (gradients are weighted by count, see train_step). If
        # neighbours are to stay together, whole groups of them are dealt out instead of images.
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
        # The last, partial batch of an epoch is dropped, so that all steps have the same size. Each
        # epoch has its own permutation, so the images that are left out differ from epoch to epoch.
        steps_per_epoch = train_images // global_batch_size
        settings = flat_settings(config)

        def steps(key: str) -> int:
            """Returns a quantity in steps, whether it was given in epochs or in iterations."""
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
        """The largest number of images that a rank takes through the network at once."""
        groups = self.global_batch_size // self.neighbours_kept
        return math.ceil(groups / (self.world_size * self.accumulation)) * self.neighbours_kept

    @property
    def bn_batch_size(self) -> int:
        """The largest number of images that BN normalizes together; 0: the network has no BN.

        The slices of the ranks that share statistics are contiguous in the global batch, so their
        union is a slice too, and its size is rounded up once.
        """
        groups = self.global_batch_size // self.neighbours_kept
        slices = self.world_size * self.accumulation
        return math.ceil(groups * self.bn_ranks / slices) * self.neighbours_kept

    def max_local_batch_size_for(self, bn_batch_size: int) -> int | None:
        """Returns the train.max_local_batch_size that gives this BN batch; None if none does."""
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
        """Returns the positions in the step's global batch of a rank's images in one pass.

        The first pass of all ranks comes first, then the second pass of all ranks, and so on. Slice
        i of n runs from i * B // n to (i + 1) * B // n, which covers every image exactly once.
        """
        slices = self.accumulation * self.world_size
        number = accumulated * self.world_size + rank
        kept, groups = self.neighbours_kept, self.global_batch_size // self.neighbours_kept
        return range(number * groups // slices * kept, (number + 1) * groups // slices * kept)

    @property
    def dropped_images_per_epoch(self) -> int:
        return self.train_images - self.steps_per_epoch * self.global_batch_size

    def lr_at(self, step: int, memory: LrMemory | None = None) -> float:
        """Returns the learning rate of a step.

        It is a function of the step alone, except under the two rules that have a memory. Warm-up
        is linear in steps: the first step has 1/warmup_steps of the peak, the last one all of it.
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
        """Whether the lr is still low because the training error is still high."""
        return self.optim.warmup_until_train_error_pct is not None and memory.warmup_end is None

    def after_train_step(self, memory: LrMemory, step: int, correct: int) -> LrMemory:
        """Returns the memory after `step` steps: the rule that waits for the training error.

        correct: correctly classified images in the global batch of the last step. The error is
        averaged over TRAIN_ERROR_WINDOW_STEPS steps.
        """
        window = (*memory.correct_per_step, correct)[-TRAIN_ERROR_WINDOW_STEPS:]
        images = TRAIN_ERROR_WINDOW_STEPS * self.global_batch_size
        limit_pct = self.optim.warmup_until_train_error_pct
        assert limit_pct is not None
        if len(window) == TRAIN_ERROR_WINDOW_STEPS and 100 * (1 - sum(window) / images) < limit_pct:
            return replace(memory, warmup_end=step, correct_per_step=())
        return replace(memory, correct_per_step=window)

    def after_evaluation(self, memory: LrMemory, step: int, is_best: bool) -> LrMemory:
        """Returns the memory after an evaluation: the plateau rule."""
        evals_since_best = 0 if is_best else memory.evals_since_best + 1
        patience = self.optim.plateau_patience_evals
        if self.optim.schedule == "plateau" and evals_since_best >= patience:
            drops = (*memory.plateau_drops, step)
            return replace(memory, plateau_drops=drops, evals_since_best=0)
        return replace(memory, evals_since_best=evals_since_best)

    def epoch_at(self, step: int) -> float:
        """Returns the epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def logs_after(self, step: int) -> bool:
        return step % self.log_every_steps == 0 or step == self.total_steps

    def evals_after(self, step: int) -> bool:
        return step % self.eval_every_steps == 0 or step == self.total_steps

    def saves_after(self, step: int) -> bool:
        due = step % self.save_every_steps == 0 or step == self.total_steps
        return due or (self.keep_every_steps is not None and step % self.keep_every_steps == 0)


def _passes(groups: int, world_size: int, most: int) -> int:
    """Returns the fewest passes in which no rank has more than `most` groups of images at once."""
    return math.ceil(groups / (world_size * most))

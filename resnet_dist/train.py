"""Training: build, restore, loop. Start here.

The images of global step s depend on (seed, s) alone, the lr on s alone, and the gradient is the
mean over the global batch, whoever computed which part. So the same command, on any number of
ranks, goes on where the last one stopped.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist import distributed
from resnet_dist.bad_samples import BadSamples
from resnet_dist.config import Config
from resnet_dist.data.dali import Batch
from resnet_dist.determinism import agree_after_step, fix_algorithms
from resnet_dist.errors import UserError
from resnet_dist.evaluate import Score
from resnet_dist.interrupt import Interrupt
from resnet_dist.job import Job, build, evaluate_now, restore, save, tags, train_batches
from resnet_dist.lookahead import Upcoming, look_ahead
from resnet_dist.meter import Meter
from resnet_dist.models.dropout import set_dropout_keys
from resnet_dist.optim import set_lr
from resnet_dist.outcome import Outcome, artifacts, summary
from resnet_dist.precision import autocast
from resnet_dist.progress import Progress
from resnet_dist.run_folder import open_run_folder, sole_process
from resnet_dist.startup import startup
from resnet_dist.tracking import Tracker


def train(
    config: Config, recipe: str, interrupt: Interrupt, resume_anyway: bool = False
) -> Outcome:
    """Trains until the plan's last step or a request to stop; every rank calls it.

    recipe: the config file's name, for the record. interrupt: listens for requests to stop.
    resume_anyway: also where the run folder was made with another config or other data.

    Raises:
        UserError: the config does not fit the data, the world or the run folder.
    """
    fix_algorithms(config.train.deterministic)
    startup.mark("imports")
    world = distributed.start()
    startup.mark("process group")
    with contextlib.ExitStack() as held:
        world.on_main(lambda: held.enter_context(sole_process(config)))
        job = build(config, world, resume_anyway)
        resumed = restore(job)
        world.on_main(lambda: open_run_folder(config, job.state.step, job.previous.changes))
        progress = Progress(job.plan, job.state.step, speaks=world.is_main)
        progress.say(f"{config.name}: {config.model.name} on {world.size} x {world.device.type}\n")
        progress.say(job.plan.describe(job.decoding) + "\n")
        if resumed:
            progress.say(resumed + "\n")
        notes = tags(job, recipe) if world.is_main else {}
        tracker = Tracker(config, notes, records=world.is_main, warn=progress.say)
        job.saver.warn = progress.say
        try:
            outcome, score = run(job, interrupt, tracker, progress)
            world.on_main(job.saver.finish)
        except BaseException:
            job.saver.wait()
            tracker.close("FAILED", {})
            raise
        record = tracker.close(outcome.value, artifacts(outcome, config.run_dir))
        progress.say(summary(job, outcome, score, record, progress))
    distributed.stop()
    return outcome


def run(
    job: Job, interrupt: Interrupt, tracker: Tracker, progress: Progress
) -> tuple[Outcome, Score | None]:
    """The loop. Returns the last score, None if nothing was evaluated."""
    plan, state, world = job.plan, job.state, job.world
    meter = Meter(world, state.meter, state.train_loss)
    score: Score | None = None
    bad = BadSamples(job.config, world, progress.say)
    bad.share(job.train_index, job.train_index.bad)
    bad.share(job.val_index, job.val_index.bad)
    bad.check_budget()
    if plan.evals_after(state.step) and state.evaluated_step < state.step:
        # The last try was stopped before this evaluation, or could not read too many of its images.
        score = evaluated(job, meter, bad, tracker, progress)
        save(job, meter)
    batches = train_batches(job)
    startup.mark("rest")
    upcoming: Upcoming | None = None
    for step in range(state.step, plan.total_steps):
        if upcoming is None:  # at the start, and after an evaluation
            upcoming = look_ahead(job, batches, meter, interrupt)
            startup.mark("first batch")
        # Asked a step ago: the hosts hardly wait for each other here, and never for a GPU.
        if upcoming.is_stop():
            save(job, meter)
            world.raise_any(upcoming.failure)
            return Outcome.PREEMPTED, score
        passes, upcoming = upcoming.passes, None
        if not plan.evals_after(step + 1):
            upcoming = look_ahead(job, batches, meter, interrupt)
        lr = plan.lr_at(step, state.lr_memory)
        set_lr(state.optimizer, lr)
        correct = train_step(job, passes, meter)
        state.step = step + 1
        if plan.watches_train_error(state.lr_memory):
            total = int(world.sum(correct))  # CPU-GPU sync point, in the first few hundred steps
            plan.remember_train_error(state.lr_memory, state.step, total)
        progress.tick(state.step)
        startup.end(world.device, progress.say)

        if plan.logs_after(state.step):
            epoch = plan.epoch_at(state.step)
            bad.share(job.train_index, job.train_loader.bad)
            metrics = meter.drain() | {"train/lr": lr, "progress/epoch": epoch}
            tracker.log(state.step, metrics)
            progress.update(state.step, metrics)
        with meter.paused():
            if plan.evals_after(state.step):
                # An evaluation may take longer than who stops us waits: it is made up for later.
                if world.any(interrupt.requested):
                    save(job, meter)
                    return Outcome.PREEMPTED, score
                # Training's and evaluation's buffers do not exist together.
                passes.clear()
                batches.close()
                score = evaluated(job, meter, bad, tracker, progress)
                batches = train_batches(job)
            elif plan.logs_after(state.step):
                tracker.log(state.step, {"data/bad_samples": bad.count})
            if plan.saves_after(state.step) or state.best_step == state.step or bad.too_many:
                save(job, meter)
            bad.check_budget()
    return Outcome.FINISHED, score


def train_step(job: Job, passes: Iterable[Batch], meter: Meter) -> Tensor:
    """One optimizer step over the global batch, in `plan.accumulation` passes.

    Returns how many of this rank's images were right: int64, a scalar on the device.
    """
    config, plan, state = job.config, job.plan, job.state
    correct = torch.zeros((), dtype=torch.int64, device=job.world.device)
    state.optimizer.zero_grad(set_to_none=True)
    for accumulated, batch in enumerate(passes):
        # DDP reduces in the last pass only: its own flag, flipped, instead of a second code path
        # under no_sync(). To a bare network it means nothing.
        job.model.require_backward_grad_sync = accumulated == plan.accumulation - 1  # type: ignore[assignment]
        if job.dropouts:
            places = plan.places(job.world.rank, accumulated)
            set_dropout_keys(job.dropouts, config.seed, state.step, places, job.world.device)
        with autocast(job.world.device, config.train.precision):
            logits = job.model(batch.images)
            loss_sum = F.cross_entropy(
                logits, batch.labels, reduction="sum", label_smoothing=config.optim.label_smoothing
            )
        # DDP takes the mean over ranks, whose slices may differ by an image. So: sum, divide by
        # the global count, and multiply by the ranks that DDP will divide by.
        loss = loss_sum * plan.world_size / plan.global_batch_size
        state.scaler.scale(loss).backward()
        right = (logits.detach().argmax(dim=1) == batch.labels).sum()
        meter.add(loss_sum.detach(), right, len(batch.labels))
        correct += right
    if config.optim.clip_grad_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_grad_norm)
    # fp16: a step whose gradients overflow is skipped, on all ranks alike, and the scale halved.
    state.scaler.step(state.optimizer)
    state.scaler.update()
    agree_after_step(state.model, job.world)
    if state.ema is not None:
        state.ema.update(state.step + 1)
    return correct


def evaluated(
    job: Job, meter: Meter, bad: BadSamples, tracker: Tracker, progress: Progress
) -> Score:
    """The score, remembered and told. Where too many images cannot be read the state is saved."""
    try:
        score = evaluate_now(job)
    except UserError:  # the same on all ranks
        save(job, meter)
        raise
    bad.share(job.val_index, job.val_loader.bad)
    remember(job, score)
    step = job.state.step
    tracker.log(step, score.metrics())
    tracker.log(step, {"data/bad_samples": bad.count})
    progress.say(f"epoch {job.plan.epoch_at(step):.2f}  val {score}")
    return score


def remember(job: Job, score: Score) -> None:
    """What outlives an evaluation: the best one, and the plateau schedule's drops."""
    state = job.state
    state.evaluated_step = state.step
    is_best = score.acc1 > state.best_acc1
    if is_best:
        state.best_acc1, state.best_step = score.acc1, state.step
    job.plan.remember_score(state.lr_memory, state.step, is_best)

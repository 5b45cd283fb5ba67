"""Training: build, restore, loop. Start here.

The images of global step s depend on (seed, s) alone, the lr on s alone, and the gradient is the
mean over the global batch, whoever computed which part. So the same command, on any number of
ranks, goes on where the last one stopped.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist import distributed
from resnet_dist.config import Config
from resnet_dist.data.load.batch import Batch
from resnet_dist.determinism import fix_algorithms
from resnet_dist.errors import UserError
from resnet_dist.evaluate import Score, evaluate
from resnet_dist.job import (
    Job,
    agree_after_step,
    agree_on_running_stats,
    build,
    restore,
    save,
    tags,
    train_batches,
    val_batches,
)
from resnet_dist.models.dropout import set_dropout_keys
from resnet_dist.optim import set_lr
from resnet_dist.precision import autocast
from resnet_dist.run.bad_samples import BadSamples
from resnet_dist.run.folder import open_run_folder, sole_process
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.lookahead import Ahead
from resnet_dist.run.meter import Meter
from resnet_dist.run.outcome import Outcome, OutcomeFile
from resnet_dist.run.plan_text import describe_plan
from resnet_dist.run.progress import Console, Progress, table
from resnet_dist.run.startup import Startup, process_began
from resnet_dist.run.summary import artifacts, summary, where_to_look
from resnet_dist.tracking import metrics
from resnet_dist.tracking.journal import Tracker


def train(
    config: Config, recipe: str, interrupt: Interrupt, resume_anyway: bool = False
) -> Outcome:
    """Trains until the plan's last step or a request to stop; every rank calls it.

    recipe: the config file's name, for the record. interrupt: listens for requests to stop.
    resume_anyway: also where the run folder was made with another config or other data.

    Raises:
        UserError: the config does not fit the data, the world or the run folder.
    """
    startup = Startup(process_began())
    fix_algorithms(config.train.deterministic)
    startup.mark("imports")
    world = distributed.start()
    startup.mark("process group")
    console = Console(speaks=world.is_main)
    with contextlib.ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(sole_process(config)))
        written = stack.enter_context(OutcomeFile(config.run_dir, world.is_main, console.say))
        job = build(config, world, resume_anyway, console.say, startup)
        resumed = restore(job)
        startup.mark("checkpoint")
        world.on_main(lambda: open_run_folder(config, job.state.step, job.previous.changes))
        written.resumes_from(job.state.step)
        console.say(f"{config.name}: {config.model.name} on {world.size} x {world.device.type}\n")
        console.say(describe_plan(job.plan, job.decoding) + "\n")
        if resumed:
            console.say(resumed + "\n")
        run_tags = tags(job, recipe) if world.is_main else {}
        tracker = Tracker(config, run_tags, records=world.is_main, warn=console.say)
        try:
            loop = Loop.of(job, interrupt, tracker, console, startup)
            outcome = run(loop)
            world.on_main(job.saver.finish)
        except BaseException:
            job.saver.wait()
            tracker.close(Outcome.FAILED.mlflow_status, {})
            raise
        written.end(outcome, job.state.step)
        record = tracker.close(outcome.mlflow_status, artifacts(outcome, config.run_dir))
        rows = summary(config.run_dir, job.state, loop.progress, outcome, loop.score)
        console.say(table(rows + where_to_look(record)))
    distributed.stop()
    return outcome


@dataclass
class Loop:
    """What the chapters of a run share."""

    job: Job
    interrupt: Interrupt
    ahead: Ahead
    meter: Meter
    bad: BadSamples
    tracker: Tracker
    progress: Progress
    startup: Startup
    lr: float = 0.0  # of the last step
    score: Score | None = None  # of the last evaluation

    @classmethod
    def of(
        cls, job: Job, interrupt: Interrupt, tracker: Tracker, console: Console, startup: Startup
    ) -> "Loop":
        meter = Meter(job.world, job.state.meter, job.state.train_loss)
        return cls(
            job=job,
            interrupt=interrupt,
            ahead=Ahead(lambda: train_batches(job), job.plan.accumulation, meter, interrupt),
            meter=meter,
            bad=BadSamples(job.config, job.world, console.say),
            tracker=tracker,
            progress=Progress(console, job.plan, job.state.step),
            startup=startup,
        )


def run(loop: Loop) -> Outcome:
    """The loop: step, log, evaluate, save."""
    job, plan, state = loop.job, loop.job.plan, loop.job.state
    loop.bad.share(job.train_index, job.train_index.bad)
    loop.bad.share(job.val_index, job.val_index.bad)
    loop.bad.check_budget()
    if plan.evals_after(state.step) and state.evaluated_step < state.step:
        # The last start was stopped before this evaluation, or could not read too many of its
        # images.
        validate(loop)
        save(job, loop.meter)
    loop.startup.mark("rest")
    if state.step < plan.total_steps:
        loop.ahead.look()
        loop.startup.mark("first batch")
    while state.step < plan.total_steps:
        passes = loop.ahead.take(looks_on=not plan.evals_after(state.step + 1))
        if passes is None:
            save(job, loop.meter)
            job.world.raise_any(loop.ahead.failure)
            return Outcome.STOPPED
        step(loop, passes)
        passes.clear()  # or they would be held while the loader makes more
        if plan.logs_after(state.step):
            log(loop)
        with loop.meter.paused():
            if plan.evals_after(state.step):
                # An evaluation may take longer than who stops us waits: it is made up for later.
                if job.world.any(loop.interrupt.requested):
                    save(job, loop.meter)
                    return Outcome.STOPPED
                # Training's and evaluation's buffers do not exist together.
                loop.ahead.close()
                validate(loop)
            if plan.saves_after(state.step) or state.best_step == state.step or loop.bad.too_many:
                save(job, loop.meter)
            loop.bad.check_budget()
    return Outcome.FINISHED


# --------------------------------------------------------------------------------------------------
# Step


def step(loop: Loop, passes: list[Batch]) -> None:
    """The next optimizer step, at its lr."""
    job, plan, state = loop.job, loop.job.plan, loop.job.state
    loop.lr = plan.lr_at(state.step, state.lr_memory)
    set_lr(state.optimizer, loop.lr)
    correct = train_step(job, passes, loop.meter)
    state.step += 1
    if plan.watches_train_error(state.lr_memory):
        total = int(job.world.sum(correct))  # CPU-GPU sync point, in the first few hundred steps
        state.lr_memory = plan.after_train_step(state.lr_memory, state.step, total)
    loop.progress.tick(state.step)
    loop.startup.end(job.world.device, loop.progress.console.say)


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
            set_dropout_keys(
                job.dropouts, config.seed, batch.step, batch.positions, job.world.device
            )
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


# --------------------------------------------------------------------------------------------------
# Log and evaluate; `save` is the job's


def log(loop: Loop) -> None:
    """Means since the last line, over all ranks. A collective, and a CPU-GPU sync point."""
    job, done = loop.job, loop.job.state.step
    loop.bad.share(job.train_index, job.train_loader.bad)
    figures = loop.meter.drain() | {
        metrics.TRAIN_LR: loop.lr,
        metrics.EPOCH: job.plan.epoch_at(done),
    }
    loop.tracker.log(done, figures)
    loop.progress.update(done, figures)
    if not job.plan.evals_after(done):  # it may find more
        loop.tracker.log(done, {metrics.BAD_SAMPLES: loop.bad.count})


def validate(loop: Loop) -> None:
    """Scores the network, the averaged one with train.ema_decay, on the validation images;
    remembers the score, logs and tells it. A collective.

    Raises:
        UserError: more images than data.max_bad_samples cannot be read; the state is saved.
    """
    job, state, world = loop.job, loop.job.state, loop.job.world
    agree_on_running_stats(job)
    network = state.model if state.ema is None else state.ema.network
    try:
        score = evaluate(network, val_batches(job), world, job.config.train.precision)
    except UserError:  # the same on all ranks
        save(job, loop.meter)
        raise
    loop.bad.share(job.val_index, job.val_loader.bad)
    state.remember_evaluation(score.acc1, job.plan)
    loop.score = score
    loop.tracker.log(state.step, score.metrics())
    loop.tracker.log(state.step, {metrics.BAD_SAMPLES: loop.bad.count})
    loop.progress.console.say(f"epoch {job.plan.epoch_at(state.step):.2f}  val {score}")

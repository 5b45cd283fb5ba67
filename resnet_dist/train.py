"""Training: build, restore, loop. Start reading here.

A run is a pure function of its config. The images, crops and flips of global step s depend on
(seed, s) alone, the learning rate depends on s alone, and the gradient is the mean over the global
batch no matter which rank computed which slice of it. That is why the same command, on any number
of ranks, resumes where the last one stopped, and why no loader, scheduler or RNG state is saved.

    train()       one start of a run, from the process group to the table at the end
    run()         the loop: step, log, evaluate, save
    train_step()  one optimizer step: forward, loss, backward, accumulate, update
    log(), validate()

job.py builds the parts (data, network, optimizer) and has the verbs that the loop calls on them;
plan.py has all the arithmetic; run/lookahead.py decides, one step in advance, whether to stop.
"""

import contextlib
import math
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
from resnet_dist.run.lookahead import Lookahead
from resnet_dist.run.meter import Meter
from resnet_dist.run.nonfinite import NonfiniteLoss
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
    """Trains until the last step of the plan or a request to stop. Every rank calls it.

    recipe: name of the config file, recorded as a tag. interrupt: listens for requests to stop.
    resume_anyway: resume even if the run folder was made with other settings or other data.

    Raises:
        UserError: the config does not fit the data, the world or the run folder.
    """
    startup = Startup(process_began())
    fix_algorithms(config.train.deterministic)
    startup.mark("imports")
    world = distributed.start()
    startup.mark("process group")
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Console(speaks=world.is_main))
        # Rank 0 locks the run folder: two processes writing to one run would remove each other's
        # checkpoints. From here on outcome.json says "running", and at the end how the run ended.
        lock = sole_process(config, console.say, lambda: interrupt.requested)
        if not world.on_main(lambda: stack.enter_context(lock)):
            console.say("stopped while waiting; nothing has changed")
            distributed.stop()
            return Outcome.STOPPED
        ending = stack.enter_context(OutcomeFile(config.run_dir, world.is_main, console.say))

        # Build everything for this world, then load the newest checkpoint on top, if there is one.
        job = build(config, world, resume_anyway, console.say, startup)
        resumed = restore(job)
        startup.mark("checkpoint")
        world.on_main(
            lambda: open_run_folder(config, job.state.step, job.previous.changes, job.is_finished)
        )
        console.keep_in(config.run_dir)
        ending.resumes_from(job.state.step)
        console.say(f"{config.name}: {config.model.name} on {world.size} x {world.device.type}\n")
        console.say(describe_plan(job.plan, job.decoding, job.classes) + "\n")
        if resumed:
            console.say(resumed + "\n")

        # The journal is the record of the run; MLflow gets a copy of it from a background thread.
        run_tags = tags(job, recipe) if world.is_main else {}
        tracker = Tracker(config, run_tags, records=world.is_main, warn=console.say)
        try:
            loop = Loop.of(job, interrupt, tracker, console, startup)
            outcome = run(loop)
            world.on_main(job.saver.finish)  # the last checkpoint must be on the disk
        except BaseException:
            job.saver.wait()
            tracker.close(Outcome.FAILED.mlflow_status, {})
            raise
        ending.end(outcome, job.state.step)
        record = tracker.close(outcome.mlflow_status, artifacts(outcome, config.run_dir))
        rows = summary(config.run_dir, job.state, loop.progress, outcome, loop.score)
        console.say(table(rows + where_to_look(record)))
    distributed.stop()
    return outcome


@dataclass
class Loop:
    """What the functions below share while the run goes through its steps."""

    job: Job
    interrupt: Interrupt
    lookahead: Lookahead
    meter: Meter
    bad: BadSamples
    tracker: Tracker
    progress: Progress
    startup: Startup
    nonfinite: NonfiniteLoss
    lr: float = 0.0  # learning rate of the last step
    score: Score | None = None  # result of the last evaluation

    @classmethod
    def of(
        cls, job: Job, interrupt: Interrupt, tracker: Tracker, console: Console, startup: Startup
    ) -> "Loop":
        meter = Meter(job.world, job.state.meter, job.state.train_loss)
        return cls(
            job=job,
            interrupt=interrupt,
            lookahead=Lookahead(
                lambda: train_batches(job), job.plan.accumulation, meter, interrupt
            ),
            meter=meter,
            bad=BadSamples(job.config, job.world, console.say),
            tracker=tracker,
            progress=Progress(console, job.plan, job.state.step),
            startup=startup,
            nonfinite=NonfiniteLoss(
                job.config.train.max_nonfinite_logs, job.config.run_dir, job.world, console.say_at
            ),
        )


# --------------------------------------------------------------------------------------------------
# The loop


def run(loop: Loop) -> Outcome:
    """Runs the steps that are left: step, log, evaluate, save."""
    job, plan, state = loop.job, loop.job.plan, loop.job.state
    loop.bad.share(job.train_index, job.train_index.bad)
    loop.bad.share(job.val_index, job.val_index.bad)
    loop.bad.check_budget()
    if plan.evals_after(state.step) and state.evaluated_step < state.step:
        # The last start did all the steps up to this evaluation, but not the evaluation itself: it
        # was asked to stop first, or too many validation images could not be read.
        validate(loop)
        save(job, loop.meter)
    loop.startup.mark("rest")
    if state.step < plan.total_steps:
        loop.lookahead.prefetch()
        loop.startup.mark("first batch")

    while state.step < plan.total_steps:
        # Whether to stop was decided by all ranks together while the previous step ran, so no rank
        # can be left waiting in a collective that another one never enters. Nothing is prefetched
        # across an evaluation, which needs the memory.
        passes = loop.lookahead.take(prefetch_next=not plan.evals_after(state.step + 1))
        if passes is None:  # a rank was asked to stop (SIGTERM, SIGUSR1, Ctrl-C), or has no data
            save(job, loop.meter)
            job.world.raise_any(loop.lookahead.failure)
            return Outcome.STOPPED
        step(loop, passes)
        passes.clear()  # frees the batches before the loader makes the next ones

        if plan.logs_after(state.step):
            log(loop)
        with loop.meter.paused():  # neither evaluations nor saves count as training time
            if plan.evals_after(state.step):
                # A scheduler's grace period may be shorter than an evaluation. So a request to stop
                # is answered before it, and the next start makes up for it (see above).
                if job.world.any(loop.interrupt.requested):
                    save(job, loop.meter)
                    return Outcome.STOPPED
                loop.lookahead.close()  # training's buffers are freed before evaluation's are made
                validate(loop)
            if plan.saves_after(state.step) or state.best_step == state.step or loop.bad.too_many:
                save(job, loop.meter)
            loop.bad.check_budget()
    return Outcome.FINISHED


# --------------------------------------------------------------------------------------------------
# One step


def step(loop: Loop, passes: list[Batch]) -> None:
    """Does the next optimizer step at the learning rate that the plan has for it."""
    job, plan, state = loop.job, loop.job.plan, loop.job.state
    # There is no scheduler object: lr is a function of the step (and, for the two rules that react
    # to results, of the steps at which they fired, which the checkpoint keeps in lr_memory).
    loop.lr = plan.lr_at(state.step, state.lr_memory)
    set_lr(state.optimizer, loop.lr)
    correct = train_step(job, passes, loop.meter)
    state.step += 1  # from here on it counts the steps done
    if plan.watches_train_error(state.lr_memory):
        total = int(job.world.sum(correct))  # CPU-GPU sync point, in the first few hundred steps
        state.lr_memory = plan.after_train_step(state.lr_memory, state.step, total)
    loop.progress.tick(state.step)
    loop.startup.end(job.world.device, loop.progress.console.say)


def train_step(job: Job, passes: Iterable[Batch], meter: Meter) -> Tensor:
    """Does one optimizer step over the global batch, in `plan.accumulation` passes.

    Returns how many of this rank's images were classified correctly: int64, a scalar on the device.
    """
    config, plan, state = job.config, job.plan, job.state
    correct = torch.zeros((), dtype=torch.int64, device=job.world.device)
    state.optimizer.zero_grad(set_to_none=True)
    for accumulated, batch in enumerate(passes):
        # Gradients add up over the passes, and DDP exchanges them in the last one only. Setting
        # DDP's own flag avoids a second code path under no_sync(); a bare network ignores it.
        job.model.require_backward_grad_sync = accumulated == plan.accumulation - 1  # type: ignore[assignment]

        # Dropout masks are drawn from (seed, step, position in the global batch), so an image gets
        # the same mask whichever rank it is on.
        if job.dropouts:
            set_dropout_keys(
                job.dropouts, config.seed, batch.step, batch.positions, job.world.device
            )

        with autocast(job.world.device, config.train.precision):
            logits = job.model(batch.images)  # synchronized BN communicates in here
            loss_sum = F.cross_entropy(
                logits, batch.labels, reduction="sum", label_smoothing=config.optim.label_smoothing
            )
        # We want the gradient of the mean loss over the global batch of B images. DDP averages
        # gradients over the W ranks, but rank r may have one image more than rank q, so a mean of
        # per-rank means would be wrong. Scale each rank's sum instead:
        #     mean over ranks of (sum_r * W / B)  =  1/W * sum over r of (sum_r * W / B)  =  sum / B
        loss = loss_sum * plan.world_size / plan.global_batch_size
        state.scaler.scale(loss).backward()  # scales in fp16 only

        # Sums stay on the device: reading them here would make the host wait for the GPU.
        right = (logits.detach().argmax(dim=1) == batch.labels).sum()
        meter.add(loss_sum.detach(), right, len(batch.labels))
        correct += right

    if config.optim.clip_grad_norm is not None:
        state.scaler.unscale_(state.optimizer)  # the limit is for true gradients
        nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_grad_norm)
    # In fp16 the scaler skips a step whose gradients overflow and halves its scale. The gradients
    # have been averaged by then, so all ranks skip the same steps.
    state.scaler.step(state.optimizer)
    state.scaler.update()
    agree_after_step(state.model, job.world)
    if state.ema is not None:
        state.ema.update(state.step + 1)
    return correct


# --------------------------------------------------------------------------------------------------
# Log and evaluate (`save` is in job.py)


def log(loop: Loop) -> None:
    """Logs the means over all ranks since the last line. A collective, and a CPU-GPU sync point.

    Raises:
        Diverged: the loss was not finite for too long.
    """
    job, done = loop.job, loop.job.state.step
    loop.bad.share(job.train_index, job.train_loader.bad)
    figures = loop.meter.drain() | {
        metrics.TRAIN_LR: loop.lr,
        metrics.EPOCH: job.plan.epoch_at(done),
    }
    loop.tracker.log(done, figures)
    loop.progress.update(done, figures, job.state.best_acc1)
    if not job.plan.evals_after(done):  # otherwise `validate` logs the count, with what it adds
        loop.tracker.log(done, {metrics.BAD_SAMPLES: loop.bad.count})
    passes = loop.meter.nonfinite_passes
    first = done + 1 - math.ceil(passes / job.plan.accumulation) if passes else None
    lr = 0.0 if first is None else job.plan.lr_at(first - 1, job.state.lr_memory)
    loop.nonfinite.check(first, lr, job.state.model)


def validate(loop: Loop) -> None:
    """Evaluates the network on the validation images, then logs and remembers the score.

    With train.ema_decay it is the averaged network that is evaluated. A collective.

    Raises:
        UserError: more images than data.max_bad_samples cannot be read; the state has been saved.
    """
    job, state, world = loop.job, loop.job.state, loop.job.world
    agree_on_running_stats(job)
    network = state.model if state.ema is None else state.ema.network
    try:
        score = evaluate(network, val_batches(job), world, job.config.train.precision)
    except UserError:  # raised on all ranks alike, so all ranks save
        save(job, loop.meter)
        raise
    loop.bad.share(job.val_index, job.val_loader.bad)
    # Updates the best score, and the plateau schedule if the run has one.
    state.remember_evaluation(score.acc1, score.loss, job.plan)
    loop.score = score
    loop.tracker.log(state.step, score.metrics())
    loop.tracker.log(state.step, {metrics.BAD_SAMPLES: loop.bad.count})
    loop.progress.console.say_at(f"epoch {job.plan.epoch_at(state.step):.2f}  val {score}")

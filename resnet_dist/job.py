"""What a training run is built from, the same way on every rank, and what can be done with it.

`build` makes a Job from a config: data, network, optimizer, checkpoint writer. The functions below
it are the verbs of the training loop: restore, save, and the batches to train and to evaluate on.
"""

import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.checkpoints.content import Facts
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.checkpoints.writer import Saver
from resnet_dist.config import Config
from resnet_dist.data.index.index import Index, notes_of
from resnet_dist.data.index.survey import describe_classes
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.build import agreed_decoding, load_index, make_loader
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.mean_image import mean_image
from resnet_dist.data.view.protocol import CENTER_CROP
from resnet_dist.data.view.requests import eval_requests, train_requests
from resnet_dist.determinism import is_deterministic
from resnet_dist.distributed import World, reduce_gradients_in_rank_order
from resnet_dist.draws import seed_weights
from resnet_dist.ema import AveragedNetwork
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model
from resnet_dist.models.depths import DEPTHS
from resnet_dist.models.dropout import KeyedDropout
from resnet_dist.models.parts import freeze, parts
from resnet_dist.models.sync_batchnorm import average_running_stats, convert_sync_batchnorm
from resnet_dist.models.vgg import MAP_PX
from resnet_dist.optim import build_optimizer
from resnet_dist.plan import Plan
from resnet_dist.precision import grad_scaler
from resnet_dist.run.folder import changes_so_far
from resnet_dist.run.init_from import load_initial_weights
from resnet_dist.run.meter import Meter
from resnet_dist.run.resume import (
    Previous,
    adapt_checkpoint,
    bn_batch_warning,
    describe_resume,
    environment_warning,
    find_previous,
    made_with,
    with_changes,
)
from resnet_dist.run.startup import Startup, process_began
from resnet_dist.state import TrainState
from resnet_dist.tracking.mirror import TAG_CHARACTERS, git_commit


@dataclass(frozen=True)
class Job:
    """Everything that training works with; only `state` changes during a run."""

    config: Config
    plan: Plan
    world: World
    state: TrainState
    model: nn.Module  # state.model, or DDP around it
    train_index: Index
    train_loader: Loader
    val_index: Index
    val_loader: Loader
    saver: Saver
    facts: Facts  # about the data and the machine, recorded in checkpoints
    previous: Previous
    dropouts: tuple[KeyedDropout, ...] = ()  # in state.model
    initialized: str | None = None  # a line about model.init_from, to print
    decoding: str = ""  # how images are decoded, and the reason
    classes: str = ""  # how many there are, and the names of some

    @property
    def is_finished(self) -> bool:
        """Whether the last step and the last evaluation of the plan are done."""
        last = self.plan.total_steps
        return self.state.step >= last and self.state.evaluated_step >= last


def build(
    config: Config,
    world: World,
    resume_anyway: bool = False,
    say: Callable[[str], None] = print,
    startup: Startup | None = None,
) -> Job:
    """Builds everything that a run needs, up to but not including its checkpoint's state.

    Every rank calls it. resume_anyway: accept a run folder that was made with other settings or
    other data. say: prints a line, on rank 0. startup: measures where the time
    goes.

    Raises:
        UserError: the config does not fit the data, the world, the run folder or model.init_from.
    """
    startup = startup or Startup(process_began())
    train_index = load_index(config, "train", world)
    val_index = load_index(config, "val", world)
    differing = set(train_index.classes) ^ set(val_index.classes)
    if differing:
        raise UserError(
            f"data.root={config.data.root}: train and val differ in {len(differing)} classes, such "
            f"as {min(differing)}; they must have the same classes (shards that other tools wrote "
            "may need a classes.txt with one class name per line)"
        )
    for note in (*notes_of(train_index, "train"), *val_index.notes):
        say(f"note: {note}")
    startup.mark("data index")
    previous = find_previous(config, world)
    saved = previous.checkpoint
    startup.mark("checkpoint")
    decoding, reason = agreed_decoding(config, world, None if saved is None else saved.decoder)
    startup.mark("decoder")
    facts = Facts(
        classes=train_index.classes,
        fingerprints=train_index.fingerprints("training") | val_index.fingerprints("validation"),
        decoder=str(decoding),
        made_with=made_with(world),
    )
    # Refuse a changed config here, before anything slow: networks, a mean image, caches.
    previous = with_changes(previous, config, facts, world, resume_anyway)
    images = len(train_index), len(val_index)
    plan = Plan.of(config, world.size, *images, world.local_size)
    check_deterministic_form(config, world.device)
    network = build_network(config, world, len(train_index.classes))
    initialized = None
    if config.model.init_from is not None and saved is None:
        initialized = load_initial_weights(network, config, train_index.classes, world)
    optimizer = build_optimizer(network, config.optim)
    startup.mark("network and optimizer")
    # A network keeps the mean image that it has been trained with, even if the images changed.
    kept = saved.mean_image if saved is not None and config.data.per_pixel_mean else None
    if kept is not None and len(kept) == config.data.crop_px:
        mean: np.ndarray | None = kept.numpy()
    else:
        mean = mean_image(train_index, config, world)
    facts = replace(
        facts,
        made_with=facts.made_with | {"passes_per_step": str(plan.accumulation)},
        bn_batch_size=plan.bn_batch_size,
        mean_image=None if mean is None else torch.from_numpy(mean),
    )
    state = TrainState(network, optimizer, grad_scaler(world.device, config.train.precision))
    state.ema = _averaged(network, config, len(train_index.classes))
    job = Job(
        config=config,
        plan=plan,
        world=world,
        state=state,
        model=distribute(network, world),
        train_index=train_index,
        train_loader=make_loader(train_index, config, world, mean, decoding),
        val_index=val_index,
        val_loader=make_loader(val_index, config, world, mean, decoding),
        saver=Saver(config.run_dir, Retention(plan.keep_checkpoints, plan.keep_every_steps), say),
        facts=facts,
        previous=previous,
        dropouts=tuple(m for m in network.modules() if isinstance(m, KeyedDropout)),
        initialized=initialized,
        decoding=f"{decoding} ({reason})",
        classes=describe_classes(train_index.classes),
    )
    startup.mark("loaders")
    return job


def check_deterministic_form(config: Config, device: torch.device) -> None:
    """Raises UserError if a layer of the network has no deterministic form on this device.

    Otherwise training would fail in its first step. The one such layer is VGG's average pooling on
    a GPU, except at the size where it has nothing to average (models/vgg.py).
    """
    pools = DEPTHS[config.model.name].form == "vgg" and config.data.crop_px // 2**5 != MAP_PX
    if config.train.deterministic and device.type == "cuda" and pools:
        why = f"{config.model.name} has a deterministic form on a GPU at data.crop_px=224 only"
        raise config.invalid("train.deterministic", why, False)


def build_network(config: Config, world: World, num_classes: int) -> nn.Module:
    """Returns the config's network on the device, with frozen parts and BN synchronized."""
    seed_weights(config.seed)  # the same on every rank
    model = _build_frozen(config, num_classes)
    if world.size > 1 and config.model.sync_batchnorm == "world":
        model = convert_sync_batchnorm(model, world.group)
    elif world.size > 1 and config.model.sync_batchnorm == "node":
        group = world.node_group()
        model = model if group is None else convert_sync_batchnorm(model, group)
    # Tensor cores are fastest with channels last, which is also how the loader lays out images.
    return model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build_frozen(config: Config, num_classes: int) -> nn.Module:
    """Returns a freshly initialized network whose parts with lr_scale 0 are frozen.

    Freezing comes first: frozen BN must not be synchronized, and DDP must not expect its gradients.
    """
    model = build_model(config.model.name, num_classes, config.model.zero_init_last_gamma)
    for name, modules in parts(model).items():
        if config.optim.lr_scales.get(name) == 0:
            for module in modules:
                freeze(module)
    return model


def _averaged(network: nn.Module, config: Config, num_classes: int) -> AveragedNetwork | None:
    if config.train.ema_decay is None:
        return None
    with torch.device("meta"):  # no storage: it is given copies of the network's tensors
        same = _build_frozen(config, num_classes)
    return AveragedNetwork(network, same, config.train.ema_decay)


def distribute(network: nn.Module, world: World, even_alone: bool = False) -> nn.Module:
    """Wraps the network in DDP; a world of one rank needs none, but may ask for it."""
    if world.size == 1 and not even_alone:
        return network
    # DDP would broadcast buffers (BN's running statistics) from rank 0 before each forward pass.
    # There is no need: synchronized BN keeps them equal, and otherwise they are averaged before
    # they are used (agree_on_running_stats). torch 2.14 renamed the switch.
    switches = ("forward_sync_buffers", "broadcast_buffers")
    known = inspect.signature(DistributedDataParallel).parameters
    off: dict[str, Any] = {next(name for name in switches if name in known): False}
    model = DistributedDataParallel(
        network,
        process_group=world.group,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **off,
    )
    if is_deterministic():
        reduce_gradients_in_rank_order(model)
    return model


def restore(job: Job) -> str | None:
    """Resumes from the newest checkpoint in the run folder, if there is one.

    Every rank calls it, once. Returns lines to print: from where the run resumes and what has
    changed, or which weights a new run starts from; None if there is nothing to say.
    """
    previous, said = job.previous, list(job.previous.warnings)
    saved = previous.checkpoint
    if previous.path is None or saved is None:
        return "\n".join([*said, *filter(None, [job.initialized])]) or None
    is_finished = min(saved.step, saved.evaluated_step) >= job.plan.total_steps
    said += [describe_resume(previous.path, saved, job.plan, is_finished)]
    if previous.changes and is_finished:
        said += [f"warning: no step is left to do, so this has no effect: {_listed(previous)}"]
    elif previous.changes:
        said += [f"warning: from here on this is a different run: {_listed(previous)}"]
    if previous.changes:
        saved, warnings = adapt_checkpoint(saved, job.config, job.state)
        said += warnings
    if is_deterministic():
        said += environment_warning(saved.made_with, job.facts.made_with)
    said += bn_batch_warning(saved.bn_batch_size, job.plan)
    job.state.restore(saved)
    for restored in (saved.model, saved.optimizer, saved.ema or {}):
        restored.clear()  # frees as much memory as the state itself takes
    return "\n".join(said)


def _listed(previous: Previous) -> str:
    return "; ".join(previous.changes)


def save(job: Job, meter: Meter) -> None:
    """Saves the state as it is now. Every rank calls it.

    Rank 0 copies the state to host memory; a background thread then writes it to the disk.
    """
    agree_on_running_stats(job)
    job.state.meter, job.state.train_loss = meter.gather(), meter.last_loss
    if job.world.is_main:
        job.saver.save(job.state.checkpoint(job.config, job.facts))


def train_batches(job: Job) -> Generator[Batch]:
    """Returns this rank's batches, from the next step to the end of the run.

    Close the generator to free its memory. Calling this again later continues in the right place,
    since the batches of a step depend on nothing but the step.
    """
    config, plan, world = job.config, job.plan, job.world
    requests = train_requests(config, plan, job.train_index, world.rank, job.state.step)
    return job.train_loader.batches(requests)


def val_batches(job: Job) -> Generator[Batch]:
    """Returns this rank's share of the validation images, in batches."""
    config, world = job.config, job.world
    requests = eval_requests(config, job.val_index, CENTER_CROP, world.rank, world.size)
    return job.val_loader.batches(requests)


def agree_on_running_stats(job: Job) -> None:
    """Averages BN statistics that ranks or nodes keep separately. A collective.

    Called before the statistics are used: before an evaluation and before a save.
    """
    if is_deterministic():  # then `agree_after_step` has done it after each step
        return
    average_running_stats(job.state.model, job.world.group)
    # The averaged network's BN is never synchronized; with "world" it is equal on all ranks anyway.
    if job.state.ema is not None and job.config.model.sync_batchnorm != "world":
        average_running_stats(job.state.ema.network, job.world.group)


def agree_after_step(network: nn.Module, world: World) -> None:
    """In deterministic mode, averages BN statistics that ranks or nodes keep separately.

    Outside of it, `agree_on_running_stats` averages them when they are used. But averages are
    rounded, so a run that was stopped and saved in between, and so averaged once more, would differ
    in the last bits from a run that was not. Averaging after every step makes them the same.
    """
    if is_deterministic():
        average_running_stats(network, world.group)


def tags(job: Job, recipe: str) -> dict[str, str]:
    """Returns the MLflow tags of the run, for filtering and sorting, besides the settings."""
    # MLflow's params are immutable, so a tag says which settings changed, and at which step.
    changes = changes_so_far(job.config.run_dir)[:TAG_CHARACTERS]
    return {
        "changes": changes or "none",  # always set, because it may have to replace an earlier tag
        "git.commit": git_commit(),
        "world_size": str(job.world.size),
        "precision": job.config.train.precision,
        "recipe": recipe,
        "model": job.config.model.name,
        "device": job.world.device.type,
        "global_batch_size": str(job.plan.global_batch_size),
    }

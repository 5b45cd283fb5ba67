"""The parts of a training run, built the same on every rank, and the verbs that use them."""

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
from resnet_dist.data.index.index import Index
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
    """What training works on; only `state` changes."""

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
    facts: Facts  # about data and machine, for checkpoints
    previous: Previous
    dropouts: tuple[KeyedDropout, ...] = ()  # of state.model
    initialized: str | None = None  # what there is to say about model.init_from
    decoding: str = ""  # how images are decoded, and why so


def build(
    config: Config,
    world: World,
    resume_anyway: bool = False,
    say: Callable[[str], None] = print,
    startup: Startup | None = None,
) -> Job:
    """resume_anyway: goes on where another config or other data have been, too. say: takes the
    lines of the Saver. startup: told where the time goes.

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
            f"as {min(differing)}; they must have the same (shards from elsewhere may need a "
            "classes.txt that names them, a line each)"
        )
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
    # Before all that takes long: networks, a mean image, caches.
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
    # One that the network has been trained with stays, whatever the images.
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
    )
    startup.mark("loaders")
    return job


def check_deterministic_form(config: Config, device: torch.device) -> None:
    """Raises UserError where training would end in its first step, as a layer has none.

    On a GPU that is VGG's average pooling, but at a size where it changes nothing (models/vgg.py).
    """
    pools = DEPTHS[config.model.name].form == "vgg" and config.data.crop_px // 2**5 != MAP_PX
    if config.train.deterministic and device.type == "cuda" and pools:
        why = f"{config.model.name} has a deterministic form on a GPU at data.crop_px=224 only"
        raise config.invalid("train.deterministic", why, False)


def build_network(config: Config, world: World, num_classes: int) -> nn.Module:
    """The network of the config, on the device, parts frozen and BN synchronized as asked."""
    seed_weights(config.seed)  # the same on every rank
    model = _build_frozen(config, num_classes)
    if world.size > 1 and config.model.sync_batchnorm == "world":
        model = convert_sync_batchnorm(model, world.group)
    elif world.size > 1 and config.model.sync_batchnorm == "node":
        group = world.node_group()
        model = model if group is None else convert_sync_batchnorm(model, group)
    # Tensor cores want channels last; the loader delivers images so.
    return model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build_frozen(config: Config, num_classes: int) -> nn.Module:
    """Freshly initialized, parts frozen: before other BN is synchronized, and before DDP looks."""
    model = build_model(config.model.name, num_classes, config.model.zero_init_last_gamma)
    for name, modules in parts(model).items():
        if config.optim.lr_scales.get(name) == 0:
            for module in modules:
                freeze(module)
    return model


def _averaged(network: nn.Module, config: Config, num_classes: int) -> AveragedNetwork | None:
    if config.train.ema_decay is None:
        return None
    with torch.device("meta"):  # nothing to initialize: it gets the network's tensors
        same = _build_frozen(config, num_classes)
    return AveragedNetwork(network, same, config.train.ema_decay)


def distribute(network: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return network
    # Running statistics are equal (synchronized BN), or averaged where they are used: DDP need not
    # send them before each forward. torch 2.14 gave the switch a new name.
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
    """Goes on from the run folder's newest checkpoint, if it has one. On every rank, and once.

    Returns what there is to say about it, or about the weights that a new run starts from.
    """
    previous, said = job.previous, list(job.previous.warnings)
    saved = previous.checkpoint
    if previous.path is None or saved is None:
        return "\n".join([*said, *filter(None, [job.initialized])]) or None
    said += [describe_resume(previous.path, saved, job.plan)]
    if previous.changes:
        said += [f"warning: not the same run from here on: {'; '.join(previous.changes)}"]
        saved, warnings = adapt_checkpoint(saved, job.config, job.state)
        said += warnings
    if is_deterministic():
        said += environment_warning(saved.made_with, job.facts.made_with)
    said += bn_batch_warning(saved.bn_batch_size, job.plan)
    job.state.restore(saved)
    for held in (saved.model, saved.optimizer, saved.ema or {}):
        held.clear()  # together as large as the state itself
    return "\n".join(said)


def save(job: Job, meter: Meter) -> None:
    """Saves the state as it is now. Every rank calls it; rank 0 copies it, and writes it behind."""
    agree_on_running_stats(job)
    job.state.meter, job.state.train_loss = meter.gather(), meter.last_loss
    if job.world.is_main:
        job.saver.save(job.state.checkpoint(job.config, job.facts))


def train_batches(job: Job) -> Generator[Batch]:
    """This rank's batches, from the next step to the end of the run. Close it to free its memory,
    and ask anew: what comes depends on the step alone."""
    config, plan, world = job.config, job.plan, job.world
    requests = train_requests(config, plan, job.train_index, world.rank, job.state.step)
    return job.train_loader.batches(requests)


def val_batches(job: Job) -> Generator[Batch]:
    """This rank's share of the validation images."""
    config, world = job.config, job.world
    requests = eval_requests(config, job.val_index, CENTER_CROP, world.rank, world.size)
    return job.val_loader.batches(requests)


def agree_on_running_stats(job: Job) -> None:
    """Before an evaluation or a save: averages BN statistics that are local to ranks or nodes. A
    collective."""
    if is_deterministic():  # there they agree after each step
        return
    average_running_stats(job.state.model, job.world.group)
    # The averaged network has no synchronized layers, but in "world" equal statistics.
    if job.state.ema is not None and job.config.model.sync_batchnorm != "world":
        average_running_stats(job.state.ema.network, job.world.group)


def agree_after_step(network: nn.Module, world: World) -> None:
    """In deterministic mode, averages BN statistics that are local to ranks or nodes.

    Otherwise `agree_on_running_stats` does so where they are used. But an average is rounded: a
    run that was saved at a stop would differ in the last bit from one that was not.
    """
    if is_deterministic():
        average_running_stats(network, world.group)


def tags(job: Job, recipe: str) -> dict[str, str]:
    """What MLflow's table can be filtered by, besides the config."""
    # MLflow's params cannot change: the tag says what did, and from which step on.
    changes = changes_so_far(job.config.run_dir)[:TAG_CHARACTERS]
    return {
        "changes": changes or "none",  # said: an earlier tag may have to be taken back
        "git.commit": git_commit(),
        "world_size": str(job.world.size),
        "precision": job.config.train.precision,
        "recipe": recipe,
        "model": job.config.model.name,
        "device": job.world.device.type,
        "global_batch_size": str(job.plan.global_batch_size),
    }

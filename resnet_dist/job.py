"""The parts of a training run, built the same on every rank, and the verbs that use them."""

import inspect
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist import checkpoint
from resnet_dist.checkpoint import TrainState
from resnet_dist.config import Config
from resnet_dist.data.dali import Batch, Loader
from resnet_dist.data.index import Index
from resnet_dist.data.mean_image import mean_image
from resnet_dist.data.protocol import CENTER_CROP
from resnet_dist.data.source import load_index, make_loader
from resnet_dist.data.stream import eval_requests, train_requests
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.evaluate import Score, evaluate
from resnet_dist.init_from import load_initial_weights
from resnet_dist.models.build import build_model
from resnet_dist.models.dropout import KeyedDropout
from resnet_dist.models.parts import FrozenBatchNorm2d, freeze, parts
from resnet_dist.models.sync_batchnorm import average_running_stats, convert_sync_batchnorm
from resnet_dist.optim import build_optimizer
from resnet_dist.plan import Plan
from resnet_dist.precision import grad_scaler
from resnet_dist.tracking import git_commit


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
    mean_image: np.ndarray | None  # float32 [crop_px, crop_px, 3], if the config asks for it
    dropouts: tuple[KeyedDropout, ...] = ()  # of state.model
    initialized: str | None = None  # what there is to say about model.init_from
    warnings: tuple[str, ...] = ()  # about checkpoints that are passed over


def build(config: Config, world: World) -> Job:
    """Raises UserError where the config does not fit the data, the world or model.init_from."""
    train_index = load_index(config, "train", world)
    val_index = load_index(config, "val", world)
    differing = set(train_index.classes) ^ set(val_index.classes)
    if differing:
        raise UserError(
            f"data.root={config.data.root}: train and val differ in {len(differing)} classes, such "
            f"as {min(differing)}; they must have the same (shards from elsewhere may need a "
            "classes.txt that names them, a line each)"
        )
    plan = Plan.of(config, world.size, len(train_index), len(val_index))
    network = build_network(config, world, len(train_index.classes))
    warnings = world.on_main(lambda: checkpoint.set_damaged_aside(config.run_dir))
    newest, initialized = _newest_checkpoint(config, world), None
    if config.model.init_from is not None and newest is None:
        initialized = load_initial_weights(network, config, train_index.classes, world)
    optimizer = build_optimizer(network, config.optim)
    if config.data.per_pixel_mean and newest is not None:
        mean = world.on_all(lambda: checkpoint.load(newest))["mean_image"].numpy()
    else:
        mean = mean_image(train_index, config, world)
    state = TrainState(network, optimizer, grad_scaler(world.device, config.train.precision))
    return Job(
        config=config,
        plan=plan,
        world=world,
        state=state,
        model=distribute(network, world),
        train_index=train_index,
        train_loader=make_loader(train_index, config, world, mean),
        val_index=val_index,
        val_loader=make_loader(val_index, config, world, mean),
        mean_image=mean,
        dropouts=tuple(m for m in network.modules() if isinstance(m, KeyedDropout)),
        initialized=initialized,
        warnings=tuple(warnings),
    )


def build_network(config: Config, world: World, num_classes: int) -> nn.Module:
    """The network of the config, on the device, parts frozen and BN synchronized as asked."""
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = build_model(config.model.name, num_classes, config.model.zero_init_last_gamma)
    for name, modules in parts(model).items():
        if config.optim.lr_scales.get(name) == 0:
            for module in modules:  # before other BN is synchronized, and before DDP looks at it
                freeze(module)
    if world.size > 1 and config.model.sync_batchnorm == "world":
        model = convert_sync_batchnorm(model, world.group)
    elif world.size > 1 and config.model.sync_batchnorm == "node":
        group = world.node_group()
        model = model if group is None else convert_sync_batchnorm(model, group)
    # Tensor cores want channels last; the loader delivers images so.
    return model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def distribute(network: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return network
    # Running statistics are equal (synchronized BN), or averaged where they are used: DDP need not
    # send them before each forward. torch 2.14 gave the switch a new name.
    switches = ("forward_sync_buffers", "broadcast_buffers")
    known = inspect.signature(DistributedDataParallel).parameters
    off: dict[str, Any] = {next(name for name in switches if name in known): False}
    return DistributedDataParallel(
        network,
        process_group=world.group,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **off,
    )


def restore(job: Job) -> str | None:
    """Goes on from the run folder's newest checkpoint, if it has one. Every rank reads it.

    Returns what there is to say about it, or about the weights that a new run starts from.
    """
    path = _newest_checkpoint(job.config, job.world)
    if path is None:
        return "\n".join([*job.warnings, *filter(None, [job.initialized])]) or None
    saved = job.world.on_all(lambda: checkpoint.load(path))
    if saved["data_fingerprint"] != job.train_index.fingerprint:
        raise UserError(
            f"data.root={job.config.data.root}: not the training images that {path} was made with; "
            "give the same images, or another name="
        )
    job.state.load_state_dict(saved)
    said = "\n".join([*job.warnings, f"resumed from {path}"])
    before, now = saved["bn_batch_size"], bn_batch_size(job)
    if before != now:
        said += (
            f"\nwarning: BN normalizes {now} images together, {before} before: the world or "
            "train.max_local_batch_size has changed"
        )
    return said


def _newest_checkpoint(config: Config, world: World) -> Path | None:
    return world.on_main(lambda: checkpoint.latest(config.run_dir))


def bn_batch_size(job: Job) -> int:
    """The most images that are normalized together: local batch x the ranks that share BN."""
    sharing = {"world": job.world.size, "node": job.world.local_size, "none": 1}
    local = job.plan.local_batch_size * sharing[job.config.model.sync_batchnorm]
    return min(local, job.plan.global_batch_size)


def save(job: Job) -> None:
    """Writes a checkpoint. Every rank calls it; rank 0 writes, the others wait."""
    _agree_on_running_stats(job)
    facts = {
        "classes": list(job.train_index.classes),
        "data_fingerprint": job.train_index.fingerprint,
        "bn_batch_size": bn_batch_size(job),
        "mean_image": None if job.mean_image is None else torch.from_numpy(job.mean_image),
    }
    job.world.on_main(lambda: checkpoint.save(job.state, job.config, facts))


def train_batches(job: Job) -> Generator[Batch]:
    """This rank's batches, from the next step to the end of the run. Close it to free its memory,
    and ask anew: what comes depends on the step alone."""
    config, plan, world = job.config, job.plan, job.world
    requests = train_requests(config, plan, job.train_index, world.rank, job.state.step)
    return job.train_loader.batches(requests)


def take(batches: Iterator[Batch], count: int) -> tuple[list[Batch], str | None]:
    """The next `count` batches, or why there are none: not to be raised on one rank alone."""
    try:
        return [next(batches) for _ in range(count)], None
    except UserError as error:
        return [], str(error)


def evaluate_now(job: Job) -> Score:
    """The network's score on the validation images. Every rank calls it.

    Raises:
        UserError: more of them than data.max_bad_samples cannot be read.
    """
    _agree_on_running_stats(job)
    config, world = job.config, job.world
    requests = eval_requests(config, job.val_index, CENTER_CROP, world.rank, world.size)
    batches = job.val_loader.batches(requests)
    return evaluate(job.state.model, batches, world, config.train.precision)


def _agree_on_running_stats(job: Job) -> None:
    if job.config.model.sync_batchnorm != "world":
        # Frozen statistics are equal already, and an average of them would be rounded.
        bns = (m for m in job.state.model.modules() if isinstance(m, nn.BatchNorm2d))
        live = nn.ModuleList(bn for bn in bns if not isinstance(bn, FrozenBatchNorm2d))
        average_running_stats(live, job.world.group)


def tags(job: Job, recipe: str) -> dict[str, str]:
    """What MLflow's table can be filtered by, besides the config."""
    return {
        "git.commit": git_commit(),
        "world_size": str(job.world.size),
        "precision": job.config.train.precision,
        "recipe": recipe,
        "model": job.config.model.name,
        "device": job.world.device.type,
        "global_batch_size": str(job.plan.global_batch_size),
    }

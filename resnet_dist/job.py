"""The parts of a training run, built the same on every rank, and the verbs that use them."""

import inspect
import time
from collections.abc import Generator
from dataclasses import dataclass
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
from resnet_dist.data.source import agreed_decoding, load_index, make_loader
from resnet_dist.data.stream import eval_requests, train_requests
from resnet_dist.determinism import check_deterministic_form, reduce_gradients_in_rank_order
from resnet_dist.distributed import World
from resnet_dist.ema import AveragedNetwork
from resnet_dist.errors import UserError
from resnet_dist.evaluate import Score, evaluate
from resnet_dist.init_from import load_initial_weights
from resnet_dist.meter import Meter
from resnet_dist.models.build import build_model
from resnet_dist.models.dropout import KeyedDropout
from resnet_dist.models.parts import freeze, parts
from resnet_dist.models.sync_batchnorm import average_running_stats, convert_sync_batchnorm
from resnet_dist.optim import build_optimizer
from resnet_dist.plan import Plan
from resnet_dist.precision import grad_scaler
from resnet_dist.resume import (
    Previous,
    another_bn_batch,
    compared,
    describe,
    look_back,
    made_with,
    not_bit_for_bit,
    take_over,
)
from resnet_dist.retention import Retention
from resnet_dist.run_folder import changes_so_far
from resnet_dist.saver import Saver
from resnet_dist.startup import startup
from resnet_dist.tracking import TAG_CHARACTERS, git_commit


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
    facts: dict[str, Any]  # about data and machine, for a checkpoint
    previous: Previous
    mean_image: np.ndarray | None  # float32 [crop_px, crop_px, 3], if the config asks for it
    dropouts: tuple[KeyedDropout, ...] = ()  # of state.model
    initialized: str | None = None  # what there is to say about model.init_from
    decoding: str = ""  # how images are decoded, and why so


def build(config: Config, world: World, resume_anyway: bool = False) -> Job:
    """resume_anyway: goes on where another config or other data have been, too.

    Raises:
        UserError: the config does not fit the data, the world, the run folder or model.init_from.
    """
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
    previous = look_back(config, world)
    startup.mark("checkpoint")
    decoding, reason = agreed_decoding(config, world, previous.content.get("decoder"))
    startup.mark("decoder")
    facts: dict[str, Any] = {
        "classes": list(train_index.classes),
        "fingerprints": train_index.fingerprints("training") | val_index.fingerprints("validation"),
        "decoder": str(decoding),
        "made_with": made_with(world),
    }
    # Before all that takes long: networks, a mean image, caches.
    previous = compared(previous, config, facts, world, resume_anyway)
    images = len(train_index), len(val_index)
    plan = Plan.of(config, world.size, *images, world.local_size)
    facts["made_with"]["passes_per_step"] = str(plan.accumulation)
    check_deterministic_form(config, world.device)
    network = build_network(config, world, len(train_index.classes))
    initialized = None
    if config.model.init_from is not None and previous.path is None:
        initialized = load_initial_weights(network, config, train_index.classes, world)
    optimizer = build_optimizer(network, config.optim)
    startup.mark("network and optimizer")
    # One that the network has been trained with stays, whatever the images.
    kept = previous.content.get("mean_image") if config.data.per_pixel_mean else None
    if kept is not None and len(kept) == config.data.crop_px:
        mean = kept.numpy()
    else:
        mean = mean_image(train_index, config, world)
    state = TrainState(network, optimizer, grad_scaler(world.device, config.train.precision))
    state.ema = _averaged(network, config, len(train_index.classes))
    return Job(
        config=config,
        plan=plan,
        world=world,
        state=state,
        model=distribute(network, world),
        train_index=train_index,
        train_loader=make_loader(train_index, config, world, mean, decoding),
        val_index=val_index,
        val_loader=make_loader(val_index, config, world, mean, decoding),
        saver=Saver(config.run_dir, Retention(plan.keep_checkpoints, plan.keep_every_steps)),
        facts=facts,
        previous=previous,
        mean_image=mean,
        dropouts=tuple(m for m in network.modules() if isinstance(m, KeyedDropout)),
        initialized=initialized,
        decoding=f"{decoding} ({reason})",
    )


def build_network(config: Config, world: World, num_classes: int) -> nn.Module:
    """The network of the config, on the device, parts frozen and BN synchronized as asked."""
    torch.manual_seed(config.seed)  # the same weights on every rank
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
    if torch.are_deterministic_algorithms_enabled():
        reduce_gradients_in_rank_order(model)
    return model


def restore(job: Job) -> str | None:
    """Goes on from the run folder's newest checkpoint, if it has one. On every rank, and once.

    Returns what there is to say about it, or about the weights that a new run starts from.
    """
    startup.mark("loaders")
    previous, said = job.previous, list(job.previous.warnings)
    if previous.path is None:
        return "\n".join([*said, *filter(None, [job.initialized])]) or None
    saved = previous.content
    said += [describe(previous.path, saved, job.plan)]
    if previous.changes:
        said += [f"warning: not the same run from here on: {'; '.join(previous.changes)}"]
        said += take_over(saved, job.config, job.state)
    if torch.are_deterministic_algorithms_enabled():
        said += not_bit_for_bit(saved["made_with"], job.facts["made_with"])
    said += another_bn_batch(saved["bn_batch_size"], job.plan)
    job.state.load_state_dict(saved)
    saved.clear()  # as large as the state itself
    startup.mark("checkpoint")
    return "\n".join(said)


def save(job: Job, meter: Meter) -> None:
    """Saves the state as it is now. Every rank calls it; rank 0 copies it, and writes it behind."""
    _agree_on_running_stats(job)
    job.state.meter, job.state.train_loss = meter.gather(), meter.last_loss
    facts = job.facts | {
        "bn_batch_size": job.plan.bn_batch_size,
        "mean_image": None if job.mean_image is None else torch.from_numpy(job.mean_image),
        "saved_at": time.strftime("%Y-%m-%d %H:%M %Z"),
    }
    if job.world.is_main:
        # CPU-GPU sync point in fp16, for the scaler's scale.
        job.saver.save(checkpoint.content_of(job.state, job.config, facts))


def train_batches(job: Job) -> Generator[Batch]:
    """This rank's batches, from the next step to the end of the run. Close it to free its memory,
    and ask anew: what comes depends on the step alone."""
    config, plan, world = job.config, job.plan, job.world
    requests = train_requests(config, plan, job.train_index, world.rank, job.state.step)
    return job.train_loader.batches(requests)


def evaluate_now(job: Job) -> Score:
    """The score of the network, averaged if train.ema_decay is set, on the validation images.
    Every rank calls it.

    Raises:
        UserError: more of them than data.max_bad_samples cannot be read.
    """
    _agree_on_running_stats(job)
    config, world = job.config, job.world
    requests = eval_requests(config, job.val_index, CENTER_CROP, world.rank, world.size)
    batches = job.val_loader.batches(requests)
    network = job.state.model if job.state.ema is None else job.state.ema.network
    return evaluate(network, batches, world, config.train.precision)


def _agree_on_running_stats(job: Job) -> None:
    if torch.are_deterministic_algorithms_enabled():  # there they agree after each step
        return
    average_running_stats(job.state.model, job.world.group)
    # The averaged network has no synchronized layers, but in "world" equal statistics.
    if job.state.ema is not None and job.config.model.sync_batchnorm != "world":
        average_running_stats(job.state.ema.network, job.world.group)


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

"""A training job that runs the package's own training step on noise images in memory."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn

from resnet_dist.config import Config
from resnet_dist.data.load.batch import Batch
from resnet_dist.determinism import fix_algorithms
from resnet_dist.distributed import World
from resnet_dist.ema import AveragedNetwork
from resnet_dist.job import build_network, distribute
from resnet_dist.models.build import build_model
from resnet_dist.models.sync_batchnorm import SyncBatchNorm2d
from resnet_dist.optim import build_optimizer, set_lr
from resnet_dist.plan import Plan
from resnet_dist.precision import DTYPES, grad_scaler
from resnet_dist.run.meter import Meter
from resnet_dist.state import TrainState
from resnet_dist.train import train_step

CLASSES = 1000
IMAGES = 1_281_167  # per epoch, as in ImageNet
LR = 0.1


class NoiseJob:
    """Trains a network on one batch of noise, train.max_local_batch_size images on each rank."""

    def __init__(self, world: World, config: Config, px: int, *, channels_last: bool = True):
        """Builds the network, its optimizer and one batch of noise. px: height and width."""
        fix_algorithms(config.train.deterministic)
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = build_network(config, world, CLASSES)
        network = network.to(memory_format=layout)
        optimizer = build_optimizer(network, config.optim)
        set_lr(optimizer, LR)
        self.px = px
        self.batch_size = config.train.max_local_batch_size
        self.state = TrainState(
            network, optimizer, grad_scaler(world.device, config.train.precision)
        )
        if config.train.ema_decay is not None:
            with torch.device("meta"):
                same = build_model(config.model.name, CLASSES, zero_init_last_gamma=False)
            self.state.ema = AveragedNetwork(network, same, config.train.ema_decay)
        # train_step uses only these fields of a Job; the others are for data and the run folder.
        self._job = SimpleNamespace(
            config=config,
            plan=Plan.of(config, world.size, IMAGES, None),
            world=world,
            state=self.state,
            model=distribute(network, world),
            dropouts=(),
        )
        images = torch.randn(self.batch_size, 3, px, px, device=world.device)
        images = images.to(DTYPES[config.train.precision], memory_format=layout)
        labels = torch.randint(CLASSES, (self.batch_size,), device=world.device)
        self.batch = Batch(images, labels, step=0, positions=range(self.batch_size))
        self._meter = Meter(world)

    @property
    def model(self) -> nn.Module:
        """The network, or what wraps it."""
        return self._job.model

    def compile(self, backend: str = "inductor") -> None:
        """Compiles the network with torch.compile."""
        self._job.model = torch.compile(self._job.model, backend=backend)

    def synchronize_batchnorm(self) -> None:
        """Makes BN, if converted, communicate even in a group of one rank."""
        force_synchronized_batchnorm(self.state.model)

    def distribute(self, world: World) -> None:
        """Wraps the network in DDP over the world's ranks, even if there is only one."""
        self._job.model = distribute(self.state.model, world, even_alone=True)

    def step(self, batch: Batch | None = None) -> None:
        """Runs one optimizer step without waiting for it. batch: replaces the batch of noise."""
        train_step(self._job, [batch or self.batch], self._meter)  # type: ignore[arg-type]

    def mean_loss(self) -> float:
        """Returns the mean loss of the steps since the last call. CPU-GPU sync point."""
        return self._meter.drain()["train/loss"]


def alone(world: World) -> World:
    """Returns the world of this rank's device without any other rank."""
    return replace(world, rank=0, size=1, group=None)


def force_synchronized_batchnorm(network: nn.Module) -> None:
    """Makes SyncBatchNorm2d layers communicate even in a group of one rank, where they normally
    skip it."""
    for layer in network.modules():
        if isinstance(layer, SyncBatchNorm2d):
            layer.forward = layer.forward_joined  # type: ignore[method-assign]

"""A training job that runs the package's own training step on noise images in memory."""

from types import SimpleNamespace

import torch
from torch import nn

from resnet_dist.config_file import load_config
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
    """Trains ResNet-50 at 224 px or, for a rehearsal, ResNet-18 at 64 px."""

    def __init__(
        self,
        world: World,
        batch_size: int,
        overrides: list[str],
        *,
        small: bool = False,
        channels_last: bool = True,
    ) -> None:
        """Builds the network, its optimizer and one batch of noise.

        batch_size: of this rank, independent of the world size. overrides: key=value settings of
        the config.
        """
        path = f"configs/imagenet/{'resnet18' if small else 'resnet50'}.yaml"
        sizes = ("train.global_batch_size", "train.max_local_batch_size")
        config = load_config(path, [*(f"{size}={batch_size}" for size in sizes), *overrides])
        fix_algorithms(config.train.deterministic)
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = build_network(config, world, CLASSES)
        network = network.to(memory_format=layout)
        optimizer = build_optimizer(network, config.optim)
        set_lr(optimizer, LR)
        self.state = TrainState(
            network, optimizer, grad_scaler(world.device, config.train.precision)
        )
        if config.train.ema_decay is not None:
            with torch.device("meta"):
                same = build_model(config.model.name, CLASSES, zero_init_last_gamma=False)
            self.state.ema = AveragedNetwork(network, same, config.train.ema_decay)
        self.px = 64 if small else config.data.crop_px
        # train_step uses only these fields of a Job; the others are for data and the run folder.
        self._job = SimpleNamespace(
            config=config,
            plan=Plan.of(config, 1, IMAGES, None),
            world=world,
            state=self.state,
            model=distribute(network, world),
            dropouts=(),
        )
        images = torch.randn(batch_size, 3, self.px, self.px, device=world.device)
        images = images.to(DTYPES[config.train.precision], memory_format=layout)
        labels = torch.randint(CLASSES, (batch_size,), device=world.device)
        self._batch = Batch(images, labels, step=0, positions=range(batch_size))
        self._meter = Meter(world)

    def compile(self) -> None:
        """Compiles the network with torch.compile: with "inductor" on a GPU, else "aot_eager"."""
        backend = "inductor" if self._job.world.device.type == "cuda" else "aot_eager"
        self._job.model = torch.compile(self._job.model, backend=backend)

    def step(self, batch: Batch | None = None) -> None:
        """Runs one optimizer step without waiting for it. batch: replaces the batch of noise."""
        train_step(self._job, [batch or self._batch], self._meter)

    def mean_loss(self) -> float:
        """Returns the mean loss of the steps since the last call. CPU-GPU sync point."""
        return self._meter.drain()["train/loss"]


def force_synchronized_batchnorm(network: nn.Module) -> None:
    """Makes SyncBatchNorm2d layers communicate even in a group of one rank, where they normally
    skip it."""
    for layer in network.modules():
        if isinstance(layer, SyncBatchNorm2d):
            layer.forward = layer.forward_joined

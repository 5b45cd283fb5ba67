"""The trainers that `bench peers` compares. Each is a stream that does a training step at a time.

All train the same network on the same photos with the same batch size and precision, on random
resized crops with random flips, with SGD. Instead of a step, each can sleep for a given time, as if
a fast GPU did the step: that compares their loaders in a training loop.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.bench.noise_job import CLASSES, LR, NoiseJob
from resnet_dist.bench.peers.loaders import (
    Stream,
    Work,
    index_of,
    requests_of,
    torchvision_batches,
    train_folder,
)
from resnet_dist.config import Config, ModelConfig
from resnet_dist.data.load.build import make_loader
from resnet_dist.precision import autocast, grad_scaler

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
STATIC_LOSS_SCALE = 128.0  # of NVIDIA's recipe
Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Training(Work):
    """What a trainer has to do: a step on each of `batches` batches."""

    model: str = "resnet50"
    precision: str = "fp32"
    sleep_ms: float | None = None  # instead of a step

    @property
    def config(self) -> Config:
        config = super().config
        train = replace(config.train, precision=self.precision)  # type: ignore[arg-type]
        return replace(config, model=ModelConfig(name=self.model), train=train)

    def step_of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        """Returns a plain training step."""
        if self.sleep_ms is not None:
            return sleeper(self.sleep_ms)
        device = torch.device(self.device)
        scaler = grad_scaler(device, self.precision)

        def step(images: Tensor, labels: Tensor) -> None:
            with autocast(device, self.precision):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return step


def sleeper(milliseconds: float) -> Step:
    return lambda images, labels: time.sleep(milliseconds / 1000)


def ours(training: Training) -> Stream:
    """Our loader and our training step; the next batch is fetched before the step, as in train."""
    config, world = training.config, training.world
    loader = make_loader(index_of(training), config, world)
    job = NoiseJob(world, config, training.data.crop_px) if training.sleep_ms is None else None
    batches = loader.batches(requests_of(training))
    upcoming = next(batches, None)
    while upcoming is not None:
        batch, upcoming = upcoming, next(batches, None)
        if job is None:
            time.sleep((training.sleep_ms or 0) / 1000)
        else:
            job.step(batch)
        yield batch.images


def torchvision_plain(training: Training) -> Stream:
    """torchvision's network, ImageFolder and transforms in a plain loop with autocast."""
    from torchvision import models

    model = getattr(models, training.model)(num_classes=CLASSES).to(training.device)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    return _trained(torchvision_batches(training), training.step_of(model, optimizer))


def timm_train(training: Training) -> Stream:
    """timm's network, loader and optimizer, channels last, as timm's train.py puts them together.

    Without the color jitter that is its default, because none of the others has any.
    """
    import timm
    from timm.optim import create_optimizer_v2

    data, device = training.data, torch.device(training.device)
    # For its workers, as with the other loaders. This process is the trainer's own.
    multiprocessing.set_start_method("fork", force=True)

    class Repeated(timm.data.ImageDataset):
        """The photos as an epoch of training.images, as for all others."""

        def __len__(self) -> int:
            return training.images

        def __getitem__(self, number: int) -> object:
            return super().__getitem__(number % super().__len__())

    loader = timm.data.create_loader(
        Repeated(train_folder(training)),
        input_size=(3, data.crop_px, data.crop_px),
        batch_size=training.batch_size,
        is_training=True,
        scale=data.area,
        ratio=data.aspect,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=data.mean,
        std=data.std,
        num_workers=training.threads,
        pin_memory=device.type == "cuda",
        device=device,
    )
    model = timm.create_model(training.model, num_classes=CLASSES)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model, "sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for images, labels in loader:
                yield images.contiguous(memory_format=torch.channels_last), labels

    return _trained(batches(), training.step_of(model, optimizer))


def nvidia_recipe(training: Training) -> Stream:
    """The recipe of NVIDIA's ResNet-50 example: DALI alone loads, channels last, float16, and a
    static loss scale. Needs a GPU."""
    from torchvision import models

    from resnet_dist.bench.peers.dali_reader import dali_batches

    device = torch.device(training.device)
    model = getattr(models, training.model)(num_classes=CLASSES)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), LR / STATIC_LOSS_SCALE, MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    def step(images: Tensor, labels: Tensor) -> None:
        with autocast(device, "fp16"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        (loss * STATIC_LOSS_SCALE).backward()
        optimizer.step()

    batches = (
        (images.permute(0, 3, 1, 2), labels.flatten().long())  # channels last, without a copy
        for images, labels in dali_batches(
            index_of(training), training.data, training.batch_size, training.device
        )
    )
    return _trained(batches, step if training.sleep_ms is None else sleeper(training.sleep_ms))


def _trained(batches: Iterator[tuple[Tensor, Tensor]], step: Step) -> Stream:
    for images, labels in batches:
        step(images, labels)
        yield images

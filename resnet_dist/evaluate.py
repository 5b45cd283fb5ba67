"""Exact evaluation: each image counts once, on any number of ranks. Sum, count, then divide."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist import distributed
from resnet_dist.bad_samples import named
from resnet_dist.data.dali import Batch
from resnet_dist.data.feed import BLANK_LABEL
from resnet_dist.data.index import Index
from resnet_dist.data.protocol import CENTER_CROP, Protocol
from resnet_dist.data.source import load_index, make_loader
from resnet_dist.data.stream import eval_requests
from resnet_dist.determinism import fix_algorithms
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.models.vgg import MAP_PX, Vgg
from resnet_dist.precision import autocast
from resnet_dist.recalibrate import recalibrate
from resnet_dist.trained import Trained, load_trained

MIN_DENSE_PX = 2**5 * MAP_PX  # five times halved, the map is as large as VGG's kernel


@dataclass(frozen=True)
class Score:
    """Sums over the evaluated images; percentages are properties."""

    correct1: int
    correct5: int
    loss_sum: float
    images: int

    @property
    def acc1(self) -> float:
        return 100 * self.correct1 / self.images

    @property
    def acc5(self) -> float:
        return 100 * self.correct5 / self.images

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images

    def metrics(self) -> dict[str, float]:
        return {"val/loss": self.loss, "val/acc1": self.acc1, "val/acc5": self.acc5}

    def __str__(self) -> str:
        return (
            f"acc1 {self.acc1:.2f} %  acc5 {self.acc5:.2f} %  loss {self.loss:.4f}  "
            f"({self.correct1:,} of {self.images:,} right)"
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    precision: str,
    protocol: Protocol = CENTER_CROP,
) -> Score:
    """Scores this rank's batches and adds up over the ranks. Every rank calls it.

    An image's score is the mean of the softmax probabilities over its views (Krizhevsky et al.
    2012, section 4.1), in a view of the whole image of the logits' mean over all positions; the
    loss is -log of that score for the right class.

    batches: `eval_requests` of the protocol. The ranks may hold different numbers of them, even
    none: they meet at the end alone. With fewer than five classes, acc5 is the accuracy
    among all of them: 100 %. An image that cannot be read counts, as wrong.
    """
    was_training = model.training
    model.eval()
    # A rank whose data fail tells the others, who would wait for its sums.
    sums = world.on_all(lambda: _sums(model, batches, world.device, precision, protocol))
    model.train(was_training)
    correct1, correct5, total_loss, count = world.sum(sums).tolist()  # CPU-GPU sync point
    return Score(int(correct1), int(correct5), total_loss, int(count))


def _sums(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    precision: str,
    protocol: Protocol,
) -> Tensor:
    """float64 [4]: right answers, right among five, loss and images, of this rank."""
    # Average pooling and the linear layer after it commute: only VGG needs another forward pass to
    # be fully convolutional.
    network = model.dense if protocol.scales_px and isinstance(model, Vgg) else model
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    log_p: list[Tensor] = []  # of the views of one batch so far, each float64 [B, classes]
    labels: list[Tensor] = []  # the same in each view, but where it cannot be read: -1
    for batch in batches:
        mirror = [batch.images.flip(3)] if protocol.mirrored else []
        for view in [batch.images, *mirror]:
            with autocast(device, precision):
                logits = network(view)
            log_p.append(logits.double().log_softmax(dim=1))
            labels.append(batch.labels)
        if len(log_p) < protocol.views:
            continue
        mean = torch.stack(log_p).logsumexp(dim=0) - math.log(protocol.views)  # log of the mean p
        label = torch.stack(labels).amin(dim=0)
        log_p, labels = [], []
        # An image that cannot be read is wrong, and has the loss of a blind guess.
        right = mean.topk(min(5, mean.shape[1])).indices == label[:, None]  # [B, 5]
        loss_sum = F.nll_loss(mean, label, reduction="sum", ignore_index=BLANK_LABEL)
        loss_sum += (label == BLANK_LABEL).sum() * math.log(mean.shape[1])
        images = torch.full_like(loss_sum, len(label))
        sums += torch.stack([right[:, 0].sum(), right.sum(), loss_sum, images])
    return sums


def evaluate_checkpoint(
    path: Path,
    overrides: list[str],
    protocol: Protocol = CENTER_CROP,
    bn_images: int | None = None,
    save_to: Path | None = None,
) -> Score:
    """The score of a checkpoint on the validation images of its config; every rank calls it.

    bn_images: first take the BN statistics anew, from so many training images (recalibrate.py),
    and write the checkpoint with them to save_to, a new folder.

    Raises:
        UserError: no such checkpoint, its classes are not those of the data, a protocol that the
            data or the network cannot follow, or what `recalibrate` and writing raise.
    """
    world = distributed.start()
    if save_to is not None and world.on_main(save_to.exists):
        raise UserError(f"--save-to {save_to}: is there already; give a new folder")
    trained = load_trained(path, overrides, world)
    config, index = trained.config, val_index(trained, path, world)
    if config.train.deterministic:  # no autotuning otherwise: the shapes of multi-scale vary
        fix_algorithms(True)
    check_protocol(protocol, trained, index)
    if bn_images is not None:
        recalibrate(trained, bn_images, world)
    if save_to is not None:
        world.on_main(lambda: trained.write(save_to))
    mean = trained.mean_image
    if mean is not None and protocol.scales_px:
        mean = mean.mean(axis=(0, 1))  # the mean image fits the crop alone: its channels' means
    loader = make_loader(index, config, world, mean, trained.decoding(world))
    requests = eval_requests(config, index, protocol, world.rank, world.size)
    batches = loader.batches(requests)
    score = evaluate(trained.network, batches, world, config.train.precision, protocol)
    for bad in world.gather(named(index, loader.bad, config.data.root)):
        for name, why in bad.items():
            if world.is_main:
                print(f"bad sample: {name}: {why}; it counts as wrong", file=sys.stderr)
    distributed.stop()
    return score


def val_index(trained: Trained, path: Path, world: World) -> Index:
    """Its validation images. Raises UserError where they are of other classes. A collective."""
    index = load_index(trained.config, "val", world)
    if index.classes != trained.classes:
        raise UserError(
            f"data.root={trained.config.data.root}: has {len(index.classes)} classes that are not "
            f"the {len(trained.classes)} of {path}; give its data with data.root=..."
        )
    return index


def check_protocol(protocol: Protocol, trained: Trained, index: Index) -> None:
    """Raises UserError where the data or the network cannot follow the protocol."""
    if index.pixels is not None and protocol != CENTER_CROP:
        raise UserError(
            f"--protocol {protocol.name}: the images of data.format={trained.config.data.format} "
            "are seen whole, at their own size; use center-crop"
        )
    smallest = min(protocol.scales_px, default=MIN_DENSE_PX)
    if isinstance(trained.network, Vgg) and smallest < MIN_DENSE_PX:
        name = trained.config.model.name
        raise UserError(
            f"--scales: {smallest} px: {name} needs at least {MIN_DENSE_PX}; give larger ones"
        )

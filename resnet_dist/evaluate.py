"""Exact evaluation: each image counts once, on any number of ranks. Sum, count, then divide."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from resnet_dist import checkpoint, distributed
from resnet_dist.config_file import config_from_dict
from resnet_dist.data.dali import Batch
from resnet_dist.data.source import load_index, make_loader
from resnet_dist.data.stream import eval_requests
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model
from resnet_dist.precision import autocast


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
def evaluate(model: nn.Module, batches: Iterable[Batch], world: World, precision: str) -> Score:
    """Scores this rank's batches and adds up over the ranks. Every rank calls it.

    The ranks may hold different numbers of batches, even none: there is one collective, at the end.
    With fewer than five classes, acc5 is the accuracy among all of them: 100 %.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for batch in batches:
        with autocast(world.device, precision):
            logits = model(batch.images)
        logits = logits.float()
        right = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]  # [B, 5]
        loss_sum = F.cross_entropy(logits, batch.labels, reduction="sum")
        images = torch.full_like(loss_sum, len(batch.labels))
        sums += torch.stack([right[:, 0].sum(), right.sum(), loss_sum, images])
    model.train(was_training)
    correct1, correct5, total_loss, count = world.sum(sums).tolist()  # CPU-GPU sync point
    return Score(int(correct1), int(correct5), total_loss, int(count))


def evaluate_checkpoint(path: Path, overrides: list[str]) -> Score:
    """The score of a checkpoint on the validation images of its config; every rank calls it.

    Raises:
        UserError: no such checkpoint, or its classes are not those of the data.
    """
    world = distributed.start()
    saved = world.on_all(lambda: checkpoint.load(path))
    config = config_from_dict(saved["config"], str(path), overrides)
    index = load_index(config, "val", world)
    if list(index.classes) != saved["classes"]:
        raise UserError(
            f"data.root={config.data.root}: has {len(index.classes)} classes that are not the "
            f"{len(saved['classes'])} of {path}; give its data with data.root=..."
        )
    model = build_model(config.model.name, len(index.classes))
    model.load_state_dict(saved["model"])
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean_image = saved["mean_image"]
    loader = make_loader(
        index, config, world, None if mean_image is None else mean_image.numpy()
    )
    batch_size = config.train.max_local_batch_size
    requests = eval_requests(config, index, world.rank, world.size, batch_size)
    score = evaluate(model, loader.batches(requests), world, config.train.precision)
    distributed.stop()
    return score

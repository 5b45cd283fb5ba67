"""Dropout masks belong to (seed, step, position), not to a rank, a batch or a restart."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resnet_dist import distributed
from resnet_dist.config import Config
from resnet_dist.job import build, train_batches
from resnet_dist.models.build import build_model
from resnet_dist.models.dropout import KeyedDropout, set_dropout_keys
from resnet_dist.run.lookahead import take
from resnet_dist.run.meter import Meter
from resnet_dist.train import train_step
from tests.support.host_sync import no_host_sync
from tests.support.multirank import run_ranks


def masks(seed: int, step: int, positions: range, layer: int = 1, p: float = 0.5) -> Tensor:
    dropout = KeyedDropout(layer, p)
    set_dropout_keys([dropout], seed, step, positions, torch.device("cpu"))
    return dropout(torch.ones(len(positions), 4096))


def test_masks_are_random_and_scaled() -> None:
    for p in (0.5, 0.2):
        mask = masks(1, 2, range(100), p=p)
        assert mask.unique().tolist() == [0, pytest.approx(1 / (1 - p))]
        assert (mask == 0).double().mean().item() == pytest.approx(p, abs=3e-3)
    kept = (masks(1, 2, range(300)) > 0).double().numpy()
    assert np.abs(np.corrcoef(kept)[np.triu_indices(300, 1)]).max() < 0.08  # rows are independent
    model = build_model("resnet20", 3)
    assert not any(isinstance(m, KeyedDropout | nn.Dropout) for m in model.modules())


def test_every_part_of_the_key_counts() -> None:
    positions = range(8)
    base = masks(1, 2, positions)
    assert torch.equal(base, masks(1, 2, positions))
    assert torch.equal(base[3:5], masks(1, 2, positions[3:5]))  # whatever stands beside
    for other in (masks(2, 2, positions), masks(1, 3, positions), masks(1, 2, positions, layer=2)):
        assert not any(torch.equal(a, b) for a, b in zip(base, other, strict=True))
    dropout = KeyedDropout(1).eval()
    assert torch.equal(dropout(base), base)


class Dropping(nn.Module):
    """A network that keeps the masks it was given, in the position of VGG, whose head is 120 M."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dropout = nn.Linear(3, 64), KeyedDropout(1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.dropout(torch.ones(len(x), 64)))
        return self.fc(x.mean((2, 3))) * self.seen[-1]


def masks_in_training(rank: int, world_size: int, config: Config, step: int) -> list[Tensor]:
    job = build(config, distributed.start())
    network = Dropping()
    job = replace(job, model=network, dropouts=(network.dropout,))
    job.state.model, job.state.step = network, step
    passes, failure = take(train_batches(job), job.plan.accumulation)
    assert failure is None
    train_step(job, passes, Meter(job.world))
    return network.seen


@pytest.mark.parametrize("local", [8, 2])
def test_ranks_draw_what_one_rank_draws(tiny_config: Callable[..., Config], local: int) -> None:
    """A global batch of 8, in one pass or in several: over all ranks and passes the same masks."""
    alone = torch.cat(masks_in_training(0, 1, tiny_config("train.max_local_batch_size=8"), 4))
    config = tiny_config(f"train.max_local_batch_size={local}")
    ranks = run_ranks(masks_in_training, 3, config, 4, init_process_group=False)
    together = [ranks[rank][number] for number in range(len(ranks[0])) for rank in range(3)]
    assert torch.equal(torch.cat(together), alone)
    assert not torch.equal(torch.cat(masks_in_training(0, 1, config, 5)), alone)


@pytest.mark.gpu
def test_gpu_dropout_draws_the_cpus_masks() -> None:
    x = torch.ones(4, 4096)
    answers = []
    for device in ("cuda", "cpu"):
        dropout = KeyedDropout(1).to(device)
        values = x.to(device)
        with no_host_sync() if device == "cuda" else nullcontext():
            set_dropout_keys([dropout], 2**63 - 1, 7, range(4), torch.device(device))
            dropped = dropout(values)
        answers.append(dropped.cpu())
    assert torch.equal(*answers)

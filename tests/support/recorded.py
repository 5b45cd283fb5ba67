"""Training as it is, in this process, with a record of what each step was given, for the tests."""

import io
import json
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resnet_dist import job as job_module
from resnet_dist import train as train_module
from resnet_dist.config import Config
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.view.augment import Request
from resnet_dist.job import Job
from resnet_dist.run import lookahead as lookahead_module
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.lookahead import Upcoming

Journal = list[tuple[int, dict[str, float]]]  # step, metrics


@dataclass(frozen=True)
class Pass:
    """What one rank takes through the network at once."""

    samples: np.ndarray  # int64 [B]
    roi: np.ndarray  # float64 [B, 4]
    flip: np.ndarray  # bool [B]
    labels: np.ndarray  # int64 [B]
    pixels: Tensor  # [B, 3, H, W], normalized

    @classmethod
    def joined(cls, passes: list["Pass"]) -> "Pass":
        """One after the other."""
        return cls(
            *(np.concatenate([getattr(p, name) for p in passes])
              for name in ("samples", "roi", "flip", "labels")),
            torch.cat([p.pixels for p in passes]),
        )  # fmt: skip

    def equals(self, other: "Pass") -> bool:
        """To the last bit."""
        return torch.equal(self.pixels, other.pixels) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("samples", "roi", "flip", "labels")
        )


@dataclass
class Run:
    """A rank's run: how it ended, what it said, and the passes of each step that it trained on."""

    outcome: str = ""
    said: str = ""
    steps: dict[int, list[Pass]] = field(default_factory=dict)


class StopsBefore(Interrupt):
    """Requests a stop before `step`, when the loop looks ahead to it: past an evaluation."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step: int | None = step
        self.ahead = -1  # the step that was looked ahead to last

    @property
    def requested(self) -> bool:
        return self.step is not None and self.ahead >= self.step


def record(config: Config, stop_before: int | None = None, *, float64: bool = False) -> Run:
    """`train`, and what it trained on. Every rank calls it.

    stop_before: the step before which all ranks are asked to stop. float64: the network computes,
    and is saved, in double precision.
    """
    run, asked, interrupt = Run(), deque[Request](), StopsBefore(stop_before)
    train_requests, train_step = job_module.train_requests, train_module.train_step
    look_ahead = lookahead_module.look_ahead

    def noted_requests(*arguments: Any) -> Iterator[Request]:
        asked.clear()
        interrupt.ahead = arguments[-1] - 1  # the first step is looked at next
        return noted(train_requests(*arguments))

    def noted(requests: Iterator[Request]) -> Iterator[Request]:
        for request in requests:
            asked.append(request)
            yield request

    def noted_look_ahead(*arguments: Any) -> Upcoming:
        interrupt.ahead += 1
        return look_ahead(*arguments)

    def noted_step(job: Job, passes: list[Batch], *rest: Any) -> Tensor:
        assert job.state.step not in run.steps
        run.steps[job.state.step] = [_pass(asked.popleft(), batch) for batch in passes]
        return train_step(job, passes, *rest)

    with ExitStack() as patches:
        patch = patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(job_module, "train_requests", noted_requests)
        patch.setattr(lookahead_module, "look_ahead", noted_look_ahead)
        patch.setattr(train_module, "train_step", noted_step)
        if float64:
            patches.enter_context(double_precision())
        said = patches.enter_context(redirect_stdout(io.StringIO()))
        run.outcome = train_module.train(config, "test", interrupt).name
        run.said = said.getvalue()
    return run


@contextmanager
def double_precision() -> Iterator[None]:
    """In here `build` makes networks of float64, which take the loader's float32 images."""
    build_network = job_module.build_network

    def double_network(*arguments: Any) -> nn.Module:
        network = build_network(*arguments).double()
        network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "build_network", double_network)
        yield


def _pass(request: Request, batch: Batch) -> Pass:
    assert len(request.samples) == len(batch.labels)
    pixels = batch.images.clone().contiguous().cpu()  # the loader uses its memory again
    labels = batch.labels.cpu().numpy().copy()
    return Pass(request.samples, request.windows.roi, request.windows.flip, labels, pixels)


def global_batches(ranks: list[Run]) -> dict[int, Pass]:
    """Maps each step to its global batch, in the order of positions: by pass, then by rank."""
    return {
        step: Pass.joined([p for turn in zip(*(r.steps[step] for r in ranks), strict=True)
                           for p in turn])
        for step in ranks[0].steps
    }  # fmt: skip


def journal(config: Config) -> Journal:
    """A run's, line by line, without what a clock measures."""
    lines = (config.run_dir / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        (r["step"], {k: v for k, v in r["metrics"].items() if not k.startswith("perf/")})
        for r in records
    ]


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest over all tensors of max |a - b| / max |b|, in double precision."""
    assert list(ours) == list(theirs)
    largest = 0.0
    for key, value in theirs.items():
        assert ours[key].isfinite().all()  # a comparison with NaN would pass
        difference = (ours[key].double() - value.double()).abs().max().item()
        if difference:
            largest = max(largest, difference / value.double().abs().max().item())
    return largest


def loss_differences(ours: Journal, theirs: Journal) -> np.ndarray:
    """Of the lines of the log that both have, each relative to the loss."""
    a, b = ({s: m["train/loss"] for s, m in j if "train/loss" in m} for j in (ours, theirs))
    return np.array([abs(a[step] - b[step]) / b[step] for step in b if step in a])

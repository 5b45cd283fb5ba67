"""Runs of three steps that resume, or are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from resnet_dist import distributed
from resnet_dist.checkpoints import folders, writer
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.job import Job, build, restore
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.train import train

ONE_EPOCH = ("train.epochs=1", "train.eval_every_iterations=100")  # 3 steps


def refused(config: Config, resume_anyway: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        train(config, "test", Interrupt(), resume_anyway)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resumed(config: Config, resume_anyway: bool = False) -> tuple[Job, str]:
    job = build(config, distributed.start(), resume_anyway)
    return job, str(restore(job))


def newest(config: Config) -> Path:
    path = folders.latest(config.run_dir)
    assert path is not None
    return path


def rewrite(config: Config, **changed: Any) -> None:
    """The newest checkpoint, as if it had been made by another machine or version."""
    path = newest(config)
    content = Checkpoint.load(path).to_dict() | changed
    content = {key: value for key, value in content.items() if value is not ...}
    shutil.rmtree(path)
    writer.write(path, Checkpoint.from_dict(content))

"""The folder of a run: its merged config, and the refusal to go on as another run.

No torch here: a login node checks the config before a job is queued. resume.py also compares what
needs the data and the device.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from resnet_dist.config import Config, leaves, to_yaml
from resnet_dist.config_file import config_from_dict
from resnet_dist.errors import UserError, as_yaml

# What may differ when a run goes on: it changes where and how, not what is computed. (data.cache
# does, for an image that is damaged in part: a cache of decoded images needs the whole.)
FREE_TO_CHANGE = (
    "data.root",
    "data.decode_threads",
    "data.read_threads",
    "data.prefetch_batches",
    "data.max_bad_samples",
    "train.max_local_batch_size",
    "train.log_every_steps",
    "train.save_every_",
    "train.keep_",
    "tracking.",
)


def open_run_folder(config: Config, step: int, changes: Sequence[str]) -> None:
    """Makes RUN and writes RUN/config.yaml. For one rank only.

    changes: what differs from `step` on, by the user's wish; RUN/changes.txt has a line for each
    such step.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    line = f"from step {step}: {'; '.join(changes)}\n"
    if changes and line not in changes_so_far(config.run_dir):
        with open(config.run_dir / "changes.txt", "a", encoding="utf-8") as file:
            file.write(line)
    fresh = config.run_dir / ".config.yaml"
    fresh.write_text(to_yaml(config))
    os.replace(fresh, config.run_dir / "config.yaml")


def changes_so_far(run_dir: Path) -> str:
    """RUN/changes.txt: a line for each step from which something else was computed; or ""."""
    path = run_dir / "changes.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def differing_settings(before: Config, now: Config) -> list[str]:
    """What changes what is computed: "optim.base_lr 0.1 -> 0.2"."""
    saved = leaves(before)
    return [
        f"{key} {as_yaml(saved[key])} -> {as_yaml(value)}"
        for key, value in leaves(now).items()
        if value != saved[key] and not key.startswith(FREE_TO_CHANGE)
    ]


def check_run_folder(config: Config, anyway: bool) -> list[str]:
    """What differs from RUN/config.yaml, if that is there.

    Raises:
        UserError: something does, and not `anyway`.
    """
    path = config.run_dir / "config.yaml"
    if not path.exists():
        return []
    before = config_from_dict(yaml.safe_load(path.read_text()), str(path))
    differing = differing_settings(before, config)
    if differing and not anyway:
        raise refusal(config, None, differing, can_be_told_to=True)
    return differing


def refusal(
    config: Config, step: int | None, differing: Sequence[str], can_be_told_to: bool
) -> UserError:
    """The one line that lists all that differs.

    step: of the checkpoint, where one is known. can_be_told_to: --resume-anyway would help.
    """
    where = "" if step is None else f" from step {step}"
    ways = "Go on as it was, or give another name="
    if can_be_told_to:
        ways = "Go on as it was, give another name=, or add --resume-anyway"
    return UserError(
        f"{config.run_dir}: cannot go on{where}, as these differ: {'; '.join(differing)}. {ways}"
    )

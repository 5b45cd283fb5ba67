"""The folder of a run: its merged config, and the refusal to go on with another one."""

import os

import yaml

from resnet_dist.config import Config, leaves, to_yaml
from resnet_dist.config_file import config_from_dict

# What may differ when a run goes on: it changes where and how, not what is computed.
FREE_TO_CHANGE = (
    "data.root",
    "data.decode_threads",
    "data.read_threads",
    "data.prefetch_batches",
    "data.max_bad_samples",
    "train.max_local_batch_size",
    "train.log_every_steps",
    "train.save_every_",
    "train.keep_checkpoints",
    "tracking.",
)


def open_run_folder(config: Config) -> None:
    """Makes RUN and writes RUN/config.yaml; in a folder that has one, checks that it is the same.

    Raises:
        UserError: the folder belongs to a run with other settings.
    """
    check_run_folder(config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    fresh = config.run_dir / ".config.yaml"
    fresh.write_text(to_yaml(config))
    os.replace(fresh, config.run_dir / "config.yaml")


def check_run_folder(config: Config) -> None:
    """Raises UserError where the folder belongs to a run with other settings."""
    path = config.run_dir / "config.yaml"
    if not path.exists():
        return
    saved = leaves(config_from_dict(yaml.safe_load(path.read_text()), str(path)))
    for key, value in leaves(config).items():
        if value != saved[key] and not key.startswith(FREE_TO_CHANGE):
            why = (
                f"differs from {config.run_dir}/config.yaml: give another name=, or go on as it was"
            )
            raise config.invalid(key, why, saved[key])

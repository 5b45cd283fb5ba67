"""What can be refused before torch is imported, which takes seconds."""

import os
import tempfile
from pathlib import Path
from typing import Any

from resnet_dist.checkpoints import folders
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.models.depths import DEPTHS, why_no_counterpart
from resnet_dist.run.folder import cannot_be_written, check_run_folder

TORCHVISION = "torchvision:"


def check_start(config: Config, resume_anyway: bool, is_main: bool) -> None:
    """Checks a start of training as far as the config and the files on the disk can tell.

    is_main: True on rank 0, which writes the run folder and reads model.init_from for all ranks.

    Raises:
        UserError: the run folder has other settings or cannot be written, or model.init_from has
            no weights for this network.
    """
    if is_main:
        check_writable(config.run_dir)
    check_run_folder(config, resume_anyway)
    is_new = folders.latest(config.run_dir) is None
    if is_main and is_new and config.model.init_from is not None:
        check_init_from(config)


def check_writable(run_dir: Path) -> None:
    """Raises UserError if no file can be made where the run and its checkpoints will be."""
    for folder in (run_dir, run_dir / "checkpoints"):
        # Not Path.exists, which raises where a folder above may not be entered.
        while not os.path.exists(folder) and folder != folder.parent:
            folder = folder.parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise cannot_be_written(folder, error) from None


def check_init_from(config: Config) -> None:
    """Raises UserError if model.init_from is not there, or is known to be of another network."""
    origin, name = str(config.model.init_from), config.model.name
    if origin.startswith(TORCHVISION):
        why_not = why_no_counterpart(DEPTHS[name])
        if why_not is not None:
            raise wrong_weights(
                config, f"torchvision has no {name}: {why_not}", "give a checkpoint"
            )
        path = torchvision_file(config)
        try:
            open(path, "rb").close()
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            raise wrong_weights(config, why, "give torchvision:FILE.pth") from None
        return
    if os.path.isfile(origin) or origin.endswith((".pth", ".pt")):
        why = "is not a checkpoint folder"
        raise wrong_weights(config, why, f"for torchvision's weights write {TORCHVISION}{origin}")
    saved = folders.read_meta(folders.find(Path(origin))).get("config")
    if isinstance(saved, dict):  # missing in format 2 and in a damaged file
        check_network(config, saved)


def check_network(config: Config, saved: dict[str, Any]) -> None:
    """Raises UserError if model.init_from is of another network. saved: its config."""
    saved_name, name = saved["model"]["name"], config.model.name
    if saved_name != name:  # keys and shapes alone cannot tell resnet50 from resnet50_v1
        why = f"holds a {saved_name}, this run trains a {name}"
        raise wrong_weights(config, why, f"give model.name={saved_name}, or another checkpoint")


def torchvision_file(config: Config) -> Path:
    """Returns FILE for model.init_from=torchvision:FILE."""
    return Path(str(config.model.init_from).removeprefix(TORCHVISION)).expanduser()


def wrong_weights(config: Config, why: str, way_out: str) -> UserError:
    return UserError(f"model.init_from={config.model.init_from}: {why}; {way_out}")

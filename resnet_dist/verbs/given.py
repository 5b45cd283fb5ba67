"""What a user gives the verbs on trained networks, checked before torch is imported."""

from collections.abc import Sequence
from pathlib import Path

from resnet_dist.checkpoints import folders
from resnet_dist.config_file import config_from_dict


def check_trained(path: Path, overrides: Sequence[str] = ()) -> None:
    """Checks that there is a checkpoint, and that the overrides fit its config.

    Raises:
        UserError: there is none, or they do not fit.
    """
    config = folders.read_meta(folders.find(path)).get("config")
    if isinstance(config, dict):  # missing in format 2 and in a damaged file
        config_from_dict(config, str(path), overrides)


def split_arguments(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separates checkpoint paths from overrides, which may come in any order.

    An argument with "=" is an override, unless a file or folder of that name exists.
    """
    overrides = [text for text in given if "=" in text and not Path(text).exists()]
    return [Path(text) for text in given if text not in overrides], overrides

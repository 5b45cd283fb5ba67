"""The one exception that speaks to the user: one line, no traceback, exit code 2."""

from typing import Any


class UserError(Exception):
    """What is wrong, where (file, key, sample), and how to mend it, in one line."""

    exit_code = 2


class RankFailure(UserError):
    """A bug, or a machine that fails, met by one rank: the user's input is not to blame. That rank
    prints the traceback, and all ranks end with this line."""

    exit_code = 1


# What pip calls a package that Python imports under another name.
DALI = "nvidia-dali-cuda130 (for CUDA 12 as README.md says)"
PIP_NAMES = {
    "nvidia": DALI,
    "nvidia.dali": DALI,  # CUDA's libraries lie in `nvidia` too
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def not_installed(error: ModuleNotFoundError) -> UserError:
    """The line for a package that is missing. Raises `error` itself if only a part of one is."""
    name = error.name or ""
    if not name or ("." in name and name not in PIP_NAMES):
        raise error
    return UserError(
        f"Python package {name}: not installed; pip install {PIP_NAMES.get(name, name)}"
    )


def invalid_value(origin: str, key: str, value: Any, why: str, nearest: object) -> UserError:
    """The line for a bad setting: file, key, value, reason, and the nearest valid value."""
    nearest_text = as_yaml(nearest)
    return UserError(
        f"{origin}: {key}={as_yaml(value)}: {why}; the nearest valid value is {nearest_text}"
    )


def as_yaml(value: Any) -> str:
    """A plain value as it would stand in a config file."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(as_yaml(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(part)}" for key, part in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Errors for the user: one line instead of a traceback, and an exit code."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MAX_LINE = 300  # characters of a message
NAMED = 5  # how many of many things a message names


class UserError(Exception):
    """Bad input. The message says in one line what is wrong, where, and how to fix it."""

    exit_code = 2


class Diverged(UserError):
    """The loss is not finite any more. All ranks raise it together."""

    exit_code = 1


class RankFailure(UserError):
    """A bug or a failing machine on one rank; the user's input is not to blame.

    That rank prints the traceback, and all ranks end with this line.
    """

    exit_code = 1


# Python module -> pip package, where the names differ.
DALI = "nvidia-dali-cuda130 (for CUDA 12 as README.md says)"
PIP_NAMES = {
    "nvidia": DALI,
    "nvidia.dali": DALI,  # CUDA's wheels install into `nvidia` too
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def not_installed(error: ModuleNotFoundError) -> UserError:
    """Returns the error for a package that is not installed.

    Raises `error` itself if the package is there but one of its modules is missing.
    """
    name = error.name or ""
    if not name or ("." in name and name not in PIP_NAMES):
        raise error
    return UserError(
        f"Python package {name}: not installed; pip install {PIP_NAMES.get(name, name)}"
    )


NO_HINT = object()  # a valid value that is near is not known


def invalid_value(origin: str, key: str, value: Any, why: str, nearest: object) -> UserError:
    """Returns the error for a bad setting: file, key, value, reason and nearest valid value."""
    line = f"{origin}: {key}={as_yaml(value)}: {why}"
    if nearest is not NO_HINT:
        line += f"; the nearest valid value is {as_yaml(nearest)}"
    return UserError(line)


def nearest_name(name: str, known: Iterable[str]) -> str | object:
    """Returns the name among `known` that looks like `name`, or NO_HINT if none does."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return near[0] if near else NO_HINT


def as_yaml(value: Any) -> str:
    """Formats a plain value as it would be written in a config file."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(as_yaml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def some_of(names: Sequence[str]) -> str:
    """Joins names for a message; of many, the first few and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def shortened(line: str) -> str:
    """Returns a line of at most MAX_LINE characters. Of a longer one, the middle is left out."""
    if len(line) <= MAX_LINE:
        return line
    end = MAX_LINE // 3  # where a message says what to do
    return f"{line[: MAX_LINE - end - 5]} ... {line[-end:]}"

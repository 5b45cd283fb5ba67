"""Reads a config from YAML: `base:` inheritance first, then `key.sub=value` overrides.

An unknown key, a wrong type or an impossible value is an error of one line with the file, the key,
the value and the nearest valid one.
"""

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from resnet_dist.config import UNITS, Config, flat_settings, impossible
from resnet_dist.errors import UserError, as_yaml, invalid_value

PATHS = ("data.root", "tracking.run_root", "model.init_from")  # `~` in them is expanded


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file with its bases, then applies the overrides ("optim.base_lr=0.2").

    Raises:
        UserError: a file cannot be read, a key is unknown, a type is wrong, or a value is
            impossible.
    """
    return _build(_merge(_read_file(Path(path), ()), _read_overrides(overrides)))


def config_from_dict(nested: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The inverse of `to_dict`, plus overrides. origin: where `nested` is from, for messages."""
    return _build(_merge(_flatten(nested, origin), _read_overrides(overrides)))


def recipe_name(path: str) -> str:
    """Returns imagenet/resnet50 for configs/imagenet/resnet50.yaml."""
    parts = Path(path).with_suffix("").parts
    return "/".join(parts[parts.index("configs") + 1 :]) if "configs" in parts else parts[-1]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2: 1e-4 is a float; 1:30, 010 and dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.split(":")[-1] in ("bool", "null", "merge")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER_START = list("-+.0123456789")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), _NUMBER_START
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    _NUMBER_START,
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Refuses a key that is given twice; PyYAML would silently take the last one."""
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise yaml.constructor.ConstructorError(
                problem=f"the key {key!r} is given twice",
                problem_mark=node.value[number][0].start_mark,
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}: not valid YAML: {' '.join(problem.split())}") from None
    except (
        ValueError,
        RecursionError,
        TypeError,
    ) as error:  # PyYAML lets some of its internal errors out
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_file(path: Path, children: tuple[Path, ...]) -> dict[str, tuple[Any, str]]:
    """Returns dotted key -> (value, file), with the bases of `path` merged in.

    children: the files whose `base:` led here, to detect cycles.
    """
    if path.resolve() in children:
        raise UserError(f"{path}: base: leads back to this file; remove it in one of them")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        named = f" (base of {children[-1]})" if children else ""
        raise UserError(f"{path}: cannot be read: {reason}{named}") from None
    content = _parse_yaml(text, str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must contain keys and values, as in 'name: quickstart'")
    base = content.pop("base", None)
    found: dict[str, tuple[Any, str]] = {}
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base={base!r}: must be one file name, relative to this file")
        found = _read_file(path.parent / base, (*children, path.resolve()))
    return _merge(found, _flatten(content, str(path)))


def _merge(
    found: dict[str, tuple[Any, str]], new: dict[str, tuple[Any, str]]
) -> dict[str, tuple[Any, str]]:
    """Merges `new` over `found`. A quantity in one unit replaces it in the other unit."""
    merged = dict(found)
    for epochs, iterations in UNITS.items():
        given = [key for key in (epochs, iterations) if new.get(key, (None,))[0] is not None]
        if len(given) == 2:
            value, origin = new[iterations]
            raise UserError(
                f"{origin}: {iterations}={as_yaml(value)}: conflicts with {epochs}="
                f"{as_yaml(new[epochs][0])}; give the quantity in one unit only"
            )
        if given:
            for key in (epochs, iterations):
                merged[key] = (None, new[given[0]][1])
        for key, other in ((epochs, iterations), (iterations, epochs)):
            if key in new and not given:
                raise UserError(
                    f"{new[key][1]}: {key}=null: a unit is needed; give {other} instead"
                )
    return merged | new


def _read_overrides(overrides: Sequence[str]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"command line: {text!r} is not an override; write key.sub=value")
        found |= _flatten({key.strip(): _parse_yaml(value, "command line")}, "command line")
    return found


def _flatten(nested: dict[Any, Any], origin: str, prefix: str = "") -> dict[str, tuple[Any, str]]:
    flat: dict[str, tuple[Any, str]] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in _SCHEMA:
            flat.update(_flatten(value, origin, f"{key}."))
        elif value is None and key in _SECTIONS:
            continue  # a section whose keys are all commented out
        else:
            flat[key] = (value, origin)
    return flat


def _build(found: dict[str, tuple[Any, str]]) -> Config:
    values: dict[str, dict[str, Any]] = {}
    for key, (value, origin) in found.items():
        if key not in _SCHEMA:
            raise _unknown(key, value, origin)
        section, _, name = key.rpartition(".")
        if key in PATHS and isinstance(value, str):
            value = os.path.expanduser(value)
        values.setdefault(section, {})[name] = _typed(value, _SCHEMA[key], key, origin)
    sections: dict[str, Any] = {
        name: kind(**values.pop(name, {})) for name, kind in _SECTIONS.items()
    }
    origins = {key: origin for key, (_, origin) in found.items()}
    config = Config(**values.get("", {}), **sections, origins=origins)
    for key, why, nearest in impossible(config):
        raise config.invalid(key, why, nearest)
    return config


def _unknown(key: str, value: Any, origin: str) -> UserError:
    if key in _SECTIONS:
        return UserError(
            f"{origin}: {key}={as_yaml(value)}: is a section; write one of its keys, "
            f"such as {key}.{fields(_SECTIONS[key])[0].name}"
        )
    # First try a misspelt key, then a correct name in the wrong section.
    near = difflib.get_close_matches(key, _SCHEMA, n=1, cutoff=0.75)
    near = near or [known for known in _SCHEMA if known.split(".")[-1] == key.split(".")[-1]]
    near = near or difflib.get_close_matches(key, _SCHEMA, n=1, cutoff=0.0)
    return UserError(f"{origin}: {key}={as_yaml(value)}: unknown key; did you mean {near[0]}?")


# --------------------------------------------------------------------------------------------------
# Types


def _typed(value: Any, kind: Any, key: str, origin: str) -> Any:
    """Returns `value` as type `kind`. An int is accepted as a float; a bool is not a number.

    Raises:
        UserError: it has another type.
    """
    if get_origin(kind) is Literal:
        options = get_args(kind)
        if value not in options:
            nearest = (difflib.get_close_matches(str(value), options, 1, 0.0) or options)[0]
            raise invalid_value(origin, key, value, f"must be one of {', '.join(options)}", nearest)
        return value
    if isinstance(kind, UnionType):  # `X | None`
        if value is None:
            return None
        return _typed(value, next(k for k in get_args(kind) if k is not NoneType), key, origin)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise invalid_value(origin, key, value, "must be {part: number}", {"fc": 10})
        return {str(part): _typed(v, float, key, origin) for part, v in value.items()}
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        default = _DEFAULTS[key]
        if not isinstance(value, list | tuple):
            raise invalid_value(origin, key, value, "must be a list in [ ]", default)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(value) != len(kinds):
            raise invalid_value(
                origin, key, tuple(value), f"must have {len(kinds)} elements", default
            )
        return tuple(_typed(v, k, key, origin) for v, k in zip(value, kinds, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise invalid_value(origin, key, value, "must be a finite number", _DEFAULTS[key])
        return float(value)
    if type(value) is kind:
        return value
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise invalid_value(origin, key, value, f"must be {named}", _nearest_of_type(value, kind, key))


def _nearest_of_type(value: Any, kind: Any, key: str) -> Any:
    """Guesses what the user meant: 64 for "64", 3 for 2.9, true for "True"; else the default."""
    try:
        if kind is str and isinstance(value, int | float):
            return f'"{as_yaml(value)}"'
        if kind is bool:
            words = ("true", "yes", "on", "1", "false", "no", "off", "0")
            near = difflib.get_close_matches(str(value).lower(), words, 1, 0.0)
            return bool(near) and words.index(near[0]) < 4  # the first four mean true
        return round(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        return _DEFAULTS[key]


def _schema() -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            kinds.update({f"{name}.{key}": k for key, k in get_type_hints(kind).items()})
        elif name != "origins":
            kinds[name] = kind
    return kinds


_SCHEMA: dict[str, Any] = _schema()
_SECTIONS: dict[str, Any] = {n: k for n, k in get_type_hints(Config).items() if is_dataclass(k)}
_DEFAULTS: dict[str, Any] = flat_settings(Config())

"""Reads a config from YAML: `base:` inheritance first, then `key.sub=value` overrides.

An unknown key, a wrong type or an impossible value is an error of one line with the file, the key,
the value and the nearest valid one.
"""

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from resnet_dist.config import UNITS, Config, flat_settings, impossible
from resnet_dist.errors import NO_HINT, UserError, as_yaml, invalid_value, nearest_name

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


def _resolve(node: yaml.Node, within: frozenset[int], done: set[int]) -> None:
    """Resolves merge keys (`<<: *other`) in place, and refuses a key that is given twice.

    PyYAML would take the last one silently, and its versions differ in what they merge. A mapping's
    own keys come first, then what it merges, in that order. within: the nodes around this one.
    done: the nodes that need no more work, as an anchor may be used often.
    """
    if isinstance(node, yaml.ScalarNode) or id(node) in done:
        return
    if id(node) in within:
        raise yaml.constructor.ConstructorError(
            problem="an anchor contains itself", problem_mark=node.start_mark
        )
    within |= {id(node)}
    if not isinstance(node, yaml.MappingNode):
        for item in node.value:
            _resolve(item, within, done)
        done.add(id(node))
        return
    own: dict[object, tuple[yaml.Node, yaml.Node]] = {}
    merged: list[yaml.Node] = []
    for key, value in node.value:
        _resolve(value, within, done)
        if key.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        elif _identity(key) in own:
            raise yaml.constructor.ConstructorError(
                problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
            )
        else:
            own[_identity(key)] = (key, value)
    for mapping in merged:
        if not isinstance(mapping, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(
                problem="<< takes a mapping, or a list of them", problem_mark=mapping.start_mark
            )
        for key, value in mapping.value:
            own.setdefault(_identity(key), (key, value))
    node.value = list(own.values())
    done.add(id(node))


def _identity(key: yaml.Node) -> object:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        node = yaml.compose(text, _Loader)
        if node is None:
            return None
        _resolve(node, frozenset(), set())
        return _Loader("").construct_document(node)
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
    if isinstance(content, dict):  # x-name: &anchor {...} is for `<<: *anchor` elsewhere
        content = {key: v for key, v in content.items() if not str(key).startswith("x-")}
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
            form = f"{text}=VALUE" if text in _SCHEMA else "key.sub=value"
            raise UserError(f"command line: {text!r} is not an override; write {form}")
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
    """Returns the config with these settings: key -> (value, origin).

    Raises what `load_config` raises.
    """
    config = _assemble(found)
    for key, why, nearest in impossible(config):
        raise config.invalid(key, why, _checked_hint(found, key, nearest))
    return config


def _assemble(found: dict[str, tuple[Any, str]]) -> Config:
    """Returns the config with these settings, whose values may be impossible."""
    values: dict[str, dict[str, Any]] = {}
    for key, (value, origin) in found.items():
        if key not in _SCHEMA:
            raise _unknown(key, value, origin)
        section, _, name = key.rpartition(".")
        if key in PATHS and isinstance(value, str):
            value = os.path.expanduser(value)
        try:
            values.setdefault(section, {})[name] = _typed(value, _SCHEMA[key], _DEFAULTS[key])
        except _Wrong as wrong:
            hint = _checked_hint(found, key, wrong.nearest)
            raise invalid_value(origin, key, value, wrong.why, hint) from None
    sections: dict[str, Any] = {
        name: kind(**values.pop(name, {})) for name, kind in _SECTIONS.items()
    }
    origins = {key: origin for key, (_, origin) in found.items()}
    return Config(**values.get("", {}), **sections, origins=origins)


def _checked_hint(found: dict[str, tuple[Any, str]], key: str, nearest: object) -> object:
    """Returns `nearest` if it is a valid value of `key` that suits the others, else NO_HINT."""
    if nearest is NO_HINT or (nearest is None and key in (*UNITS, *UNITS.values())):
        return NO_HINT
    section, _, name = key.rpartition(".")
    try:
        typed = {name: _typed(nearest, _SCHEMA[key], _DEFAULTS[key])}
        config = _assemble({other: value for other, value in found.items() if other != key})
    except (_Wrong, UserError):
        return NO_HINT
    inner = {section: replace(getattr(config, section), **typed)} if section else typed
    new = {bad for bad, _, _ in impossible(replace(config, **inner))}
    return NO_HINT if new - {bad for bad, _, _ in impossible(config)} else nearest


# What other trainers call a setting.
ALIASES = {
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "batch_size": "train.global_batch_size",
    "wd": "optim.weight_decay",
    "arch": "model.name",
    "model": "model.name",
    "pretrained": "model.init_from",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "max_steps": "train.iterations",
    "steps": "train.iterations",
    "warmup": "optim.warmup_epochs",
    "sched": "optim.schedule",
    "smoothing": "optim.label_smoothing",
    "clip_grad": "optim.clip_grad_norm",
    "amp": "train.precision",
    "model_ema_decay": "train.ema_decay",
    "workers": "data.decode_threads",
    "num_workers": "data.decode_threads",
    "data": "data.root",
    "data_path": "data.root",
    "data_dir": "data.root",
    "dataset": "data.format",
    "img_size": "data.crop_px",
    "output": "tracking.run_root",
    "output_dir": "tracking.run_root",
    "log_interval": "train.log_every_steps",
    "print_freq": "train.log_every_steps",
    "checkpoint_hist": "train.keep_checkpoints",
}


def known_as(name: str) -> str | None:
    """Returns the setting that is called `name`: by us, in another section, or by other trainers.

    "base_lr" and "lr" are optim.base_lr. None: there is none.
    """
    if name in _SCHEMA:
        return name
    end = name.rpartition(".")[2]
    return _LAST.get(end) or ALIASES.get(end)


def nearest_key(name: str) -> str | None:
    """Returns the setting whose name, or whose last part, looks most like `name`; None: no idea."""
    near = difflib.get_close_matches(name, _SCHEMA, n=1, cutoff=0.75)
    if near:
        return near[0]
    end = difflib.get_close_matches(name.rpartition(".")[2], _LAST, n=1, cutoff=0.8)
    return _LAST[end[0]] if end else None


def _unknown(key: str, value: Any, origin: str) -> UserError:
    if key in _SECTIONS:
        return UserError(
            f"{origin}: {key}={as_yaml(value)}: is a section; write one of its keys, "
            f"such as {key}.{fields(_SECTIONS[key])[0].name}"
        )
    near = nearest_key(key) or known_as(key)
    hint = "resnet_dist/config.py has all keys" if near is None else f"did you mean {near}?"
    return UserError(f"{origin}: {key}={as_yaml(value)}: unknown key; {hint}")


# --------------------------------------------------------------------------------------------------
# Types


class _Wrong(Exception):
    """A value of a wrong type."""

    def __init__(self, why: str, nearest: object):
        super().__init__(why)
        self.why = why
        self.nearest = nearest  # what was probably meant, or NO_HINT


def _typed(value: Any, kind: Any, default: Any) -> Any:
    """Returns `value` as type `kind`. An int is accepted as a float; a bool is not a number.

    default: a valid value. Raises _Wrong if it has another type.
    """
    if get_origin(kind) is Literal:
        options = get_args(kind)
        if value not in options:
            raise _Wrong(
                f"must be one of {', '.join(options)}", nearest_name(as_yaml(value), options)
            )
        return value
    if isinstance(kind, UnionType):  # `X | None`
        if value is None:
            return None
        return _typed(value, next(k for k in get_args(kind) if k is not NoneType), default)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise _Wrong("must be {part: number}", {"fc": 10})
        return dict(_typed_part(value, part) for part in value)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, list | tuple):
            raise _Wrong("must be a list in [ ]", default)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(value) != len(kinds):
            raise _Wrong(f"must have {len(kinds)} elements", default)
        return tuple(_typed_element(value, k, i, default) for i, k in enumerate(kinds))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(float_of(value)):
            raise _Wrong("must be a finite number", default)
        return float(value)
    if type(value) is kind:
        return value
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise _Wrong(f"must be {named}", _nearest_of_type(value, kind, default))


def _typed_part(value: dict[Any, Any], part: Any) -> tuple[str, float]:
    try:
        return str(part), _typed(value[part], float, 1.0)
    except _Wrong as wrong:
        raise _Wrong(f"{part} {wrong.why}", value | {part: wrong.nearest}) from None


def _typed_element(value: Sequence[Any], kind: Any, index: int, default: Any) -> Any:
    try:
        return _typed(value[index], kind, NO_HINT)
    except _Wrong as wrong:
        nearest: Any = [*value[:index], wrong.nearest, *value[index + 1 :]]
        if wrong.nearest is NO_HINT:
            nearest = default
        raise _Wrong(f"{as_yaml(value[index])} {wrong.why}", nearest) from None


def float_of(value: float) -> float:
    """Returns a whole number as a float: infinity if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _nearest_of_type(value: Any, kind: Any, default: Any) -> Any:
    """Guesses what the user meant: 64 for "64", 3 for 2.9, true for "True"; else the default."""
    try:
        if kind is str and isinstance(value, int | float):
            return f'"{as_yaml(value)}"'
        if isinstance(value, list | dict):
            return default
        if kind is bool:
            words = ("true", "yes", "on", "1", "false", "no", "off", "0")
            near = nearest_name(as_yaml(value).lower(), words)
            return near if near is NO_HINT else words.index(str(near)) < 4  # these mean true
        return round(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        return default


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
_LAST = {key.rpartition(".")[2]: key for key in _SCHEMA}  # the last part of a key -> the key

"""What a run is, and nothing that can be computed from it.

A config is closed: frozen dataclasses, read from YAML with `base:` inheritance and `key.sub=value`
overrides on top. An unknown key, a wrong type or an impossible value is one line that names the
file, the key, the value and the nearest valid one. Every derived number is plan.py's.

Only PyYAML is needed here, so that a config can be checked on a login node without torch.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from resnet_dist.errors import UserError
from resnet_dist.models.depths import DEPTHS


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet50"
    # Last BN gamma of each residual block starts at zero: Goyal et al. 2017, section 5.1.
    zero_init_last_gamma: bool = False
    # Who shares BN statistics: all ranks, the ranks of one node, or nobody.
    sync_batchnorm: Literal["world", "node", "none"] = "world"


@dataclass(frozen=True)
class DataConfig:
    format: Literal["folder", "cifar10"] = "folder"
    root: str = "data/imagenet"
    # scale: shorter side uniform in scale_px, then a crop_px crop (He et al. 2015, section 3.4).
    # random_resized: area and aspect drawn, resized to crop_px (Szegedy et al. 2015).
    # pad: pad_px zeros on each side, then a crop_px crop (He et al. 2015, section 4.2).
    train_crop: Literal["scale", "random_resized", "pad"] = "scale"
    crop_px: int = 224
    scale_px: tuple[int, int] = (256, 480)
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    pad_px: int = 4
    flip: bool = True
    eval_resize_px: int = 256
    eval_crop_px: int = 224
    # Of the training images, on the 0..1 scale (ImageNet's, as torchvision writes them).
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    decode_threads: int = 4


@dataclass(frozen=True)
class OptimConfig:
    # For 256 images: peak_lr = base_lr * global_batch_size / 256 (Goyal et al. 2017).
    base_lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    # Goyal et al. 2017 leave BN and biases out of weight decay; the 2015 paper does not.
    decay_norm_and_bias: bool = False
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    schedule: Literal["step", "cosine", "polynomial", "plateau"] = "step"
    warmup_epochs: float = 0.0
    # step: lr *= gamma at each of these.
    milestones_epochs: tuple[float, ...] = (30.0, 60.0, 80.0)
    # step and plateau: the factor of one drop.
    gamma: float = 0.1
    # polynomial: lr = peak * (1 - progress) ** power.
    power: float = 2.0
    # plateau: a drop after so many evaluations without a new best acc1.
    plateau_patience_evals: int = 5


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = 90.0
    # Images per optimizer step over all ranks; the plan finds the accumulation that keeps it.
    global_batch_size: int = 256
    # The most images one rank takes through the network at once: what fits in its memory.
    max_local_batch_size: int = 128
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    log_every_steps: int = 50
    eval_every_epochs: float = 1.0
    save_every_epochs: float = 1.0
    # Newest checkpoints that stay on disk; the best one stays besides.
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class TrackingConfig:
    # Run folders, MLflow's database and its artifacts live below it. All nodes must share it.
    run_root: str = "runs"
    experiment: str = "resnet-dist"
    mlflow: bool = True


@dataclass(frozen=True)
class Config:
    name: str = "run"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()
    # Which file or override set a leaf: for messages only.
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def run_dir(self) -> Path:
        return Path(self.tracking.run_root).absolute() / self.name

    def invalid(self, key: str, why: str, nearest: object) -> UserError:
        """The one line for an impossible value of `key`: file, key, value, reason, way out."""
        return _invalid(self.origins.get(key, "defaults"), key, leaves(self)[key], why, nearest)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, its bases, then the overrides ("optim.base_lr=0.2").

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type or an impossible value.
    """
    return _build(_read_file(Path(path), ()) | _read_overrides(overrides))


def config_from_dict(nested: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The inverse of `to_dict`, with overrides on top; `origin` names the source in messages."""
    return _build(_flatten(nested, origin) | _read_overrides(overrides))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, ready for YAML or a checkpoint."""
    nested: dict[str, Any] = {}
    for key, value in leaves(config).items():
        section, _, name = key.rpartition(".")
        plain = list(value) if isinstance(value, tuple) else value
        (nested.setdefault(section, {}) if section else nested)[name] = plain
    return nested


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def leaves(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, in the order of the dataclasses."""
    return dict(_leaves(config, ""))


# --------------------------------------------------------------------------------------------------
# Reading


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a float (YAML 1.2) and refuses a key written twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise yaml.constructor.ConstructorError(
                problem=f"the key {key!r} stands twice",
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


def _read_file(path: Path, children: tuple[Path, ...]) -> dict[str, tuple[Any, str]]:
    """Dotted key -> (value, file), the bases of `path` first; `children` led here by `base:`."""
    if path.resolve() in children:
        raise UserError(f"{path}: base: leads back to itself; remove it in one of the files")
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
        raise UserError(f"{path}: must hold keys and values, as in 'name: quickstart'")
    base = content.pop("base", None)
    found: dict[str, tuple[Any, str]] = {}
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base={base!r}: must be one file name, relative to this file")
        found = _read_file(path.parent / base, (*children, path.resolve()))
    found.update(_flatten(content, str(path)))
    return found


def _read_overrides(overrides: Sequence[str]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"command line: {text!r} is no override; write key.sub=value")
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
        values.setdefault(section, {})[name] = _typed(value, _SCHEMA[key], key, origin)
    sections: dict[str, Any] = {
        name: kind(**values.pop(name, {})) for name, kind in _SECTIONS.items()
    }
    origins = {key: origin for key, (_, origin) in found.items()}
    config = Config(**values.get("", {}), **sections, origins=origins)
    for key, why, nearest in _impossible(config):
        raise config.invalid(key, why, nearest)
    return config


def _unknown(key: str, value: Any, origin: str) -> UserError:
    if key in _SECTIONS:
        return UserError(
            f"{origin}: {key}={value!r}: is a section; write one of its keys, "
            f"such as {key}.{fields(_SECTIONS[key])[0].name}"
        )
    # A misspelt key first, then a right name in the wrong section.
    near = difflib.get_close_matches(key, _SCHEMA, n=1, cutoff=0.75)
    near = near or [known for known in _SCHEMA if known.split(".")[-1] == key.split(".")[-1]]
    near = near or difflib.get_close_matches(key, _SCHEMA, n=1, cutoff=0.0)
    return UserError(f"{origin}: {key}={value!r}: unknown key; did you mean {near[0]}?")


def _invalid(origin: str, key: str, value: Any, why: str, nearest: object) -> UserError:
    shown = _shown(value)
    return UserError(
        f"{origin}: {key}={shown}: {why}; the nearest valid value is {_shown(nearest)}"
    )


def _shown(value: Any) -> str:
    """As it would stand in YAML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(part) for part in value) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------
# Types


def _typed(value: Any, kind: Any, key: str, origin: str) -> Any:
    """`value` as `kind`, or the line that says why not. An int is a float; a bool is no number."""
    if get_origin(kind) is Literal:
        options = get_args(kind)
        if value not in options:
            nearest = (difflib.get_close_matches(str(value), options, 1, 0.0) or options)[0]
            raise _invalid(origin, key, value, f"must be one of {', '.join(options)}", nearest)
        return value
    if isinstance(kind, UnionType):  # `X | None`
        if value is None:
            return None
        return _typed(value, next(k for k in get_args(kind) if k is not NoneType), key, origin)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        default = _DEFAULTS[key]
        if not isinstance(value, list | tuple):
            raise _invalid(origin, key, value, "must be a list in [ ]", default)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(value) != len(kinds):
            raise _invalid(origin, key, tuple(value), f"must have {len(kinds)} parts", default)
        return tuple(_typed(v, k, key, origin) for v, k in zip(value, kinds, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _invalid(origin, key, value, "must be a finite number", _DEFAULTS[key])
        return float(value)
    if type(value) is kind:
        return value
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise _invalid(origin, key, value, f"must be {named}", _nearest_of_type(value, kind, key))


def _nearest_of_type(value: Any, kind: Any, key: str) -> Any:
    """What the user may have meant: 64 for "64", 3 for 2.9, true for "True"; else the default."""
    try:
        if kind is str and isinstance(value, int | float):
            return f'"{_shown(value)}"'
        if kind is bool:
            words = {"true": True, "yes": True, "on": True, "1": True}
            return words.get(str(value).lower(), False)
        return round(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        return _DEFAULTS[key]


def _leaves(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in fields(part):
        if item.name == "origins":
            continue
        value = getattr(part, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _schema() -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            kinds.update({f"{name}.{leaf}": k for leaf, k in get_type_hints(kind).items()})
        elif name != "origins":
            kinds[name] = kind
    return kinds


_SCHEMA: dict[str, Any] = _schema()
_SECTIONS: dict[str, Any] = {n: k for n, k in get_type_hints(Config).items() if is_dataclass(k)}
_DEFAULTS: dict[str, Any] = leaves(Config())


# --------------------------------------------------------------------------------------------------
# Impossible values: those that the config alone shows; plan.py finds those that need the world.

_AT_LEAST: dict[str, float] = {  # key -> smallest legal value
    "seed": 0,
    "data.crop_px": 1,
    "data.pad_px": 0,
    "data.eval_resize_px": 1,
    "data.eval_crop_px": 1,
    "data.decode_threads": 1,
    "optim.base_lr": 0,
    "optim.momentum": 0,
    "optim.weight_decay": 0,
    "optim.label_smoothing": 0,
    "optim.warmup_epochs": 0,
    "optim.gamma": 0,
    "optim.power": 0,
    "optim.plateau_patience_evals": 1,
    "train.global_batch_size": 1,
    "train.max_local_batch_size": 1,
    "train.log_every_steps": 1,
    "train.keep_checkpoints": 1,
}
_AT_MOST: dict[str, float] = {"optim.momentum": 1, "optim.label_smoothing": 1, "optim.gamma": 1}
_ABOVE_ZERO: dict[str, float] = {  # key -> a sane small value to name
    "train.epochs": 1,
    "train.eval_every_epochs": 1,
    "train.save_every_epochs": 1,
    "optim.clip_grad_norm": 1,
}


def _impossible(config: Config) -> Iterator[tuple[str, str, object]]:
    """(key, why, nearest valid value) of each impossible value."""
    flat = leaves(config)
    for key, least in _AT_LEAST.items():
        if flat[key] < least:
            yield key, f"must be at least {least}", least
    for key, most in _AT_MOST.items():
        if flat[key] > most:
            yield key, f"must be at most {most}", most
    for key, example in _ABOVE_ZERO.items():
        if flat[key] is not None and flat[key] <= 0:
            yield key, "must be above zero", example

    model, data, optim = config.model, config.data, config.optim
    if model.name not in DEPTHS:
        nearest = difflib.get_close_matches(model.name, DEPTHS, 1, 0.0) or ["resnet50"]
        yield "model.name", f"is not one of {', '.join(DEPTHS)}", nearest[0]
    if config.name != Path(config.name).name or config.name in ("", ".", ".."):
        yield "name", "must be a plain folder name", Path(config.name).name or "run"
    for key in ("scale_px", "area", "aspect"):
        low, high = flat[f"data.{key}"]
        if not 0 < low <= high:
            yield f"data.{key}", "must be [low, high] above zero", (min(low, high), max(low, high))
    if data.area[1] > 1:
        yield "data.area", "is a share of the image, at most 1", (min(data.area[0], 1.0), 1.0)
    if data.train_crop == "scale" and data.crop_px > data.scale_px[0]:
        yield (
            "data.crop_px",
            f"is larger than data.scale_px[0]={data.scale_px[0]}",
            data.scale_px[0],
        )
    if data.eval_crop_px > data.eval_resize_px:
        why = f"is larger than data.eval_resize_px={data.eval_resize_px}"
        yield "data.eval_crop_px", why, data.eval_resize_px
    if (data.format == "cifar10") != (data.train_crop == "pad"):
        why = f"does not go with data.format={data.format}"
        yield "data.train_crop", why, "pad" if data.format == "cifar10" else "scale"
    if data.format == "cifar10":
        for key in ("crop_px", "eval_resize_px", "eval_crop_px"):
            if flat[f"data.{key}"] != 32:
                yield f"data.{key}", "must be CIFAR's own size", 32
    for key in ("mean", "std"):
        low, high = min(flat[f"data.{key}"]), max(flat[f"data.{key}"])
        if low < 0 or high > 1 or (key == "std" and low == 0):
            yield f"data.{key}", "is on the 0..1 scale, not 0..255", _DEFAULTS[f"data.{key}"]
    if optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov", "needs optim.momentum above zero", False
    if list(optim.milestones_epochs) != sorted(set(optim.milestones_epochs)):
        why = "must rise"
        yield "optim.milestones_epochs", why, tuple(sorted(set(optim.milestones_epochs)))
    if optim.warmup_epochs > config.train.epochs:
        why = f"is longer than train.epochs={config.train.epochs:g}"
        yield "optim.warmup_epochs", why, config.train.epochs

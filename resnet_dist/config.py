"""The settings of a run, and nothing that can be computed from them.

Frozen dataclasses with one field per setting and units in the names; unknown settings are refused.
config_file.py reads them from YAML, plan.py computes every derived number. No torch here: a login
node checks configs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from resnet_dist.data.formats import FORMATS
from resnet_dist.errors import NO_HINT, UserError, invalid_value, nearest_name
from resnet_dist.models.depths import DEPTHS, PARTS


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet50"
    # Start the last BN gamma of each residual block at zero: Goyal et al. 2017, section 5.1.
    zero_init_last_gamma: bool = False
    # Which ranks share BN statistics: all of them, those of a node, or none.
    sync_batchnorm: Literal["world", "node", "none"] = "world"
    # Fine-tuning: a checkpoint, a run folder or torchvision:FILE. Its head is used if it fits.
    init_from: str | None = None


@dataclass(frozen=True)
class DataConfig:
    format: str = "folder"  # one of the rows in data/formats.py
    root: str = "data/imagenet"
    # scale: shorter side uniform in scale_px, then a random crop (He et al. 2015, section 3.4).
    # random_resized: a box of random area and aspect, resized (Szegedy et al. 2015).
    # pad: pad_px zeros on each side, then a random crop (He et al. 2015, section 4.2).
    # The crop has crop_px in all three.
    train_crop: Literal["scale", "random_resized", "pad"] = "scale"
    crop_px: int = 224
    scale_px: tuple[int, int] = (256, 480)
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    pad_px: int = 4
    flip: bool = True
    eval_resize_px: int = 256
    eval_crop_px: int = 224
    # Mean and standard deviation of R, G, B on the 0..1 scale; torchvision's values for ImageNet.
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # Subtract the training set's mean image instead of `mean` (He et al. 2015, sections 3.4, 4.2).
    per_pixel_mean: bool = False
    # Colour noise along the principal components of RGB (Krizhevsky et al. 2012, section 4.1: 0.1).
    pca_color_std: float = 0.0
    # Validate on this many training images, the same for every seed: 5,000 in the paper (45k/5k).
    holdout_images: int = 0
    # Unreadable images are replaced (in evaluations: counted wrong); with more, the run stops.
    max_bad_samples: int = 100
    # The next three change the speed only; `resnet-dist bench loader --tune` finds good values.
    # null: the node's cores divided by its ranks, at most 16.
    decode_threads: int | None = None
    read_threads: int = 8
    prefetch_batches: int = 2
    # Decode only the crop window with its margin, or the whole image. auto: the window on a CPU; on
    # a GPU the fastest way that decodes correctly, which data/load/probe.py finds out once per GPU
    # model and library versions.
    decode: Literal["auto", "window", "image"] = "auto"
    # Share of images for the GPU's hardware JPEG decoder (A100 and later) instead of CUDA cores. 0:
    # do not use it; null: what the probe finds fastest.
    hw_decoder_load: float | None = None
    # What is kept in memory shared by the ranks of a node: nothing, encoded files or pixels.
    cache: Literal["none", "encoded", "decoded"] = "none"


@dataclass(frozen=True)
class OptimConfig:
    # lr for 256 images: the peak is base_lr * global_batch_size / 256 (Goyal et al. 2017).
    base_lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    # Whether weight decay applies to BN and biases: yes in He et al. 2015, no in Goyal et al. 2017.
    decay_norm_and_bias: bool = False
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    # Factors on the lr of parts of the network: {stem: 0, layer1: 0, fc: 10}. 0 freezes the part,
    # including its BN statistics.
    lr_scales: dict[str, float] = field(default_factory=dict)
    schedule: Literal["step", "cosine", "polynomial", "plateau"] = "step"
    # Linear warm-up from 0 to the peak.
    warmup_epochs: float | None = 0.0
    warmup_iterations: int | None = None
    # Instead of a linear warm-up: a tenth of the peak until the training error falls below this
    # (He et al. 2015, section 4.2, for ResNet-110).
    warmup_until_train_error_pct: float | None = None
    # step: the lr is multiplied by gamma at each of these.
    milestones_epochs: tuple[float, ...] | None = (30.0, 60.0, 80.0)
    milestones_iterations: tuple[int, ...] | None = None
    # step and plateau: the factor of each drop.
    gamma: float = 0.1
    # polynomial: lr = peak * (1 - progress) ** power.
    power: float = 2.0
    # plateau: drop after this many evaluations without a new best acc1.
    plateau_patience_evals: int = 5


@dataclass(frozen=True)
class TrainConfig:
    epochs: float | None = 90.0
    iterations: int | None = None
    # Images per optimizer step, over all ranks. If they do not fit at once, gradients accumulate.
    global_batch_size: int = 256
    # Most images that a rank takes through the network at once: what fits in its memory.
    max_local_batch_size: int = 128
    # fp32: IEEE float32 on every device. tf32: a GPU rounds the factors of float32 products to ten
    # bits of mantissa; on a CPU it is the same as fp32.
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    # The same command gives the same bits: fixed kernels, no autotuning, sums in a fixed order.
    deterministic: bool = False
    # Decay d of an average of the weights, avg = d * avg + (1 - d) * weights, after every step. The
    # average is what is evaluated, exported, predicted with and fine-tuned from. null: no average.
    ema_decay: float | None = None
    log_every_steps: int = 50
    # The run ends as failed after this many log lines in a row whose loss is NaN or infinite.
    max_nonfinite_logs: int = 3
    eval_every_epochs: float | None = 1.0
    eval_every_iterations: int | None = None
    save_every_epochs: float | None = 1.0
    save_every_iterations: int | None = None
    # Newest checkpoints to keep on disk; the best is kept too, and one every keep_every_epochs.
    keep_checkpoints: int = 2
    keep_every_epochs: float | None = None


@dataclass(frozen=True)
class TrackingConfig:
    # Folder of all runs, of MLflow's database and of its artifacts. All nodes must share it.
    run_root: str = "runs"
    experiment: str = "resnet-dist"
    mlflow: bool = True


@dataclass(frozen=True)
class Config:
    # Name of the run folder. A run that was copied or renamed resumes under its new name.
    name: str = "run"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()
    # Setting -> the file or override that set it; for messages only.
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def run_dir(self) -> Path:
        return Path(self.tracking.run_root).absolute() / self.name

    @property
    def neighbours_kept(self) -> int:
        """Number of neighbouring images of the global batch that always stay in one local batch.

        2 for a method that mixes an image with its neighbour.
        """
        return 1

    def holdout_images_of(self, train_images: int) -> int:
        """Returns data.holdout_images. Raises UserError if that leaves none to train on."""
        holdout_images = self.data.holdout_images
        if holdout_images >= train_images:
            why = f"leaves none of the {train_images:,} training images to train on"
            raise self.invalid("data.holdout_images", why, train_images // 10)
        return holdout_images

    def invalid(self, key: str, why: str, nearest: object) -> UserError:
        """Returns the error for an impossible value of `key`, with the nearest valid value."""
        origin = self.origins.get(key, "defaults")
        return invalid_value(origin, key, flat_settings(self)[key], why, nearest)


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain values, for YAML or a checkpoint."""
    nested: dict[str, Any] = {}
    for key, value in flat_settings(config).items():
        section, _, name = key.rpartition(".")
        plain = list(value) if isinstance(value, tuple) else value
        (nested.setdefault(section, {}) if section else nested)[name] = plain
    return nested


def to_yaml(config: Config) -> str:
    """Returns the config as YAML that load_config reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def flat_settings(config: Config) -> dict[str, Any]:
    """Returns every setting by its dotted key, in the order of the dataclasses."""
    return dict(_flat_settings(config, ""))


def _flat_settings(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in fields(section):
        if item.name == "origins":
            continue
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _flat_settings(value, f"{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


# Quantities with two units, epochs and iterations (optimizer steps); one of the two is None.
UNITS = {
    "optim.warmup_epochs": "optim.warmup_iterations",
    "optim.milestones_epochs": "optim.milestones_iterations",
    "train.epochs": "train.iterations",
    "train.eval_every_epochs": "train.eval_every_iterations",
    "train.save_every_epochs": "train.save_every_iterations",
}


# --------------------------------------------------------------------------------------------------
# Impossible values, as far as the config alone can tell; plan.py checks what needs the world.

_AT_LEAST: dict[str, float] = {  # key -> smallest valid value
    "seed": 0,
    "data.crop_px": 1,
    "data.pad_px": 0,
    "data.eval_resize_px": 1,
    "data.eval_crop_px": 1,
    "data.pca_color_std": 0,
    "data.holdout_images": 0,
    "data.max_bad_samples": 0,
    "data.decode_threads": 1,
    "data.read_threads": 1,
    "data.prefetch_batches": 1,
    "data.hw_decoder_load": 0,
    "optim.base_lr": 0,
    "optim.momentum": 0,
    "optim.weight_decay": 0,
    "optim.label_smoothing": 0,
    "optim.warmup_epochs": 0,
    "optim.warmup_iterations": 0,
    "optim.gamma": 0,
    "optim.power": 0,
    "optim.plateau_patience_evals": 1,
    "train.iterations": 1,
    "train.eval_every_iterations": 1,
    "train.save_every_iterations": 1,
    "train.global_batch_size": 1,
    "train.max_local_batch_size": 1,
    "train.log_every_steps": 1,
    "train.max_nonfinite_logs": 1,
    "train.keep_checkpoints": 1,
}
_AT_MOST: dict[str, float] = {
    "seed": 2**63 - 1,
    "data.hw_decoder_load": 1,
    "optim.momentum": 1,
    "train.ema_decay": 1,
    "optim.label_smoothing": 1,
    "optim.gamma": 1,
    "optim.warmup_until_train_error_pct": 100,
}
_ABOVE_ZERO: dict[str, float] = {  # key -> an example of a small, sensible value
    "train.epochs": 1,
    "train.eval_every_epochs": 1,
    "train.save_every_epochs": 1,
    "train.keep_every_epochs": 1,
    "train.ema_decay": 0.9999,
    "optim.clip_grad_norm": 1,
    "optim.warmup_until_train_error_pct": 80,
}


# What tracking.run_root contains besides the folders of runs.
_NOT_RUNS = ("mlartifacts", "mlflow.db", "submitit")
_MAX_NAME_BYTES = 200  # file systems take 255; temporary names are longer than their targets


def _why_no_name(name: str) -> tuple[str | None, str]:
    """Returns why a run cannot have this name (None: it can), and a name that it could have."""
    plain = "".join(filter(str.isprintable, Path(name).name)).strip().lstrip(".")
    short = plain.encode()[:_MAX_NAME_BYTES].decode(errors="ignore") or "run"
    if name != Path(name).name or not name.strip() or name in (".", ".."):
        return "must be a plain folder name", short
    if not name.isprintable():
        return "must not contain control characters", short
    if name.startswith("."):
        return "must not begin with a dot, like the project's own files beside the runs", short
    if name in _NOT_RUNS or name.startswith("mlflow.db"):  # SQLite adds suffixes
        return "is the name of a file or folder that is kept beside the runs", f"run-{short}"
    if len(name.encode()) > _MAX_NAME_BYTES:
        return f"must have at most {_MAX_NAME_BYTES} bytes", short
    return None, name


def impossible(config: Config) -> Iterator[tuple[str, str, object]]:
    """Yields (key, reason, nearest valid value) of each impossible value."""
    flat = flat_settings(config)
    for key, least in _AT_LEAST.items():
        if flat[key] is not None and flat[key] < least:
            yield key, f"must be at least {least}", least
    for key, most in _AT_MOST.items():
        if flat[key] is not None and flat[key] > most:
            yield key, f"must be at most {most}", most
    for key, example in _ABOVE_ZERO.items():
        if flat[key] is not None and flat[key] <= 0:
            yield key, "must be above zero", example

    model, data, optim = config.model, config.data, config.optim
    if model.name not in DEPTHS:
        near = nearest_name(model.name, DEPTHS)
        yield "model.name", f"is not one of {', '.join(DEPTHS)}", near
    why_not, name = _why_no_name(config.name)
    if why_not is not None:
        yield "name", why_not, name
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
    known = FORMATS.get(data.format)
    if known is None:
        near = nearest_name(data.format, FORMATS)
        yield "data.format", f"must be one of {', '.join(FORMATS)}", near
        return
    if known.is_pixels != (data.train_crop == "pad"):
        why = f"does not go with data.format={data.format}"
        yield "data.train_crop", why, "pad" if known.is_pixels else "scale"
    if data.per_pixel_mean and data.eval_crop_px != data.crop_px:
        why = f"must be data.crop_px={data.crop_px}, the size of the mean image of per_pixel_mean"
        yield "data.eval_crop_px", why, data.crop_px
    if known.is_pixels:
        if data.pca_color_std:
            yield "data.pca_color_std", f"is for photos, not for data.format={data.format}", 0.0
        if data.cache != "none":
            yield (
                "data.cache",
                f"does not apply to data.format={data.format}, which is in memory anyway",
                "none",
            )
        for key in ("crop_px", "eval_resize_px", "eval_crop_px"):
            if flat[f"data.{key}"] != 32:
                yield f"data.{key}", "must be the size of CIFAR's images", 32
    for key in ("mean", "std"):
        low, high = min(flat[f"data.{key}"]), max(flat[f"data.{key}"])
        if low < 0 or high > 1 or (key == "std" and low == 0):
            yield (
                f"data.{key}",
                "is on the 0..1 scale, not 0..255",
                flat_settings(Config())[f"data.{key}"],
            )
    if optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov", "needs optim.momentum above zero", False
    for key in ("optim.milestones_epochs", "optim.milestones_iterations"):
        given = flat[key]
        if given is not None and list(given) != sorted(set(given)):
            yield key, "must be increasing", tuple(sorted(set(given)))
    if optim.warmup_until_train_error_pct is not None and (
        optim.warmup_epochs or optim.warmup_iterations
    ):
        why = "replaces the linear warm-up: give only one of them"
        yield "optim.warmup_until_train_error_pct", why, None
    for part, scale in optim.lr_scales.items():
        if scale < 0:
            yield "optim.lr_scales", f"{part} must be at least 0", {**optim.lr_scales, part: 0.0}
    net = DEPTHS.get(model.name)
    if net is None:
        return
    parts = PARTS[net.form]
    for part in set(optim.lr_scales) - set(parts):
        near = nearest_name(part, parts)
        why = f"{model.name} has no part {part}, only {', '.join(parts)}"
        yield "optim.lr_scales", why, near if near is NO_HINT else {near: optim.lr_scales[part]}
    if all(optim.lr_scales.get(part) == 0 for part in parts):
        why = "freezes all parts, so there is nothing to train"
        yield "optim.lr_scales", why, dict.fromkeys(parts[:-1], 0.0)
    if net.shortcut == "none" and model.zero_init_last_gamma:
        why = f"is for residual blocks, and {model.name} has none"
        yield "model.zero_init_last_gamma", why, False

"""Exports a trained network for other programs: torchvision, timm, ONNX, torch.export.

The exported weights are the checkpoint's (the averaged ones if it was trained with
train.ema_decay), in float32. The network is in eval mode and on the CPU.
"""

import importlib
import io
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from resnet_dist import __version__
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.config_file import config_from_dict
from resnet_dist.errors import UserError
from resnet_dist.files import replacing
from resnet_dist.models.build import build_model
from resnet_dist.models.depths import DEPTHS, Net, why_no_counterpart

# torch.export treats a dimension of size one in the example as fixed. With 64 pixels, no feature
# map of the network shrinks to one pixel.
ONNX_EXAMPLE_PX = 64
TIMM_VGG = {  # torchvision's name -> timm's; timm's head applies convolutions to the feature map
    "classifier.0": "pre_logits.fc1",  # [4096, 512 * 7 * 7] -> [4096, 512, 7, 7]
    "classifier.3": "pre_logits.fc2",  # [4096, 4096] -> [4096, 4096, 1, 1]
    "classifier.6": "head.fc",
}


def export(path: Path, target: str, output: Path | None = None) -> str:
    """Writes the network of a checkpoint for `target` (a key of TARGETS), and OUTPUT.json next to
    it.

    path: a checkpoint or run folder. output: None means RUN/export/<model>-step<step>.<ext>.
    OUTPUT.json has what the weights do not: the classes, and how to preprocess images. A mean
    image (float32 [H, W, 3], 0..1 scale) is written to OUTPUT.mean_image.npy. No file is ever
    visible half written.

    Returns the line to print.

    Raises:
        UserError: there is no checkpoint, `output` cannot be written, or the target library does
            not have this network.
    """
    if target == "onnx":
        _check_onnx()
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        why = "is a folder; give a file" if output.is_dir() else "no such folder; create it first"
        raise UserError(f"--output {output}: {why}")
    saved = Checkpoint.load(path)
    config = config_from_dict(saved.config, str(path))
    name = config.model.name
    if target in LIBRARIES:
        why_not = why_no_counterpart(DEPTHS[name])
        if why_not is not None:
            raise UserError(
                f"{path}: {LIBRARIES[target]} has no {name}: {why_not}; use --to onnx or --to pt2"
            )
    model = build_model(name, len(saved.classes)).eval()
    model.load_state_dict(saved.weights)
    suffix, to_bytes = TARGETS[target]
    try:
        if output is None:
            output = _run_folder(path) / "export" / f"{name}-step{saved.step}{suffix}"
            output.parent.mkdir(exist_ok=True)
        about = _about(saved, config, output)
        files = {f"{output.name}.json": (json.dumps(about, indent=1) + "\n").encode()}
        if saved.mean_image is not None:
            np.save(content := io.BytesIO(), saved.mean_image.numpy())
            files[about["preprocessing"]["mean_image"]] = content.getvalue()
        files[output.name] = to_bytes(model, config, about)
        _write(files, output.parent)
    except OSError as error:
        raise UserError(f"{output}: not written: {error.strerror or error}") from None
    parameters = sum(p.numel() for p in model.parameters())
    return f"{output}: {name} of step {saved.step}, {parameters:,} parameters"


def timm_state_dict(model: nn.Module, net: Net) -> dict[str, Tensor]:
    """Returns the weights under timm's names, which are torchvision's except for the head of VGG.

    timm's VGG slides its head over feature maps larger than 7x7, like Vgg.dense. For such maps
    (images of 256 pixels and more) its outputs differ from those of Vgg.forward, which pools the
    maps to 7x7.
    """
    if net.form != "vgg":
        return model.state_dict()
    renamed = {}
    for key, value in model.state_dict().items():
        layer, _, kind = key.rpartition(".")
        if TIMM_VGG.get(layer, "").startswith("pre_logits") and kind == "weight":
            map_px = 7 if layer == "classifier.0" else 1
            value = value.unflatten(1, (-1, map_px, map_px))
        renamed[f"{TIMM_VGG.get(layer, layer)}.{kind}"] = value
    return renamed


def _about(saved: Checkpoint, config: Config, output: Path) -> dict[str, Any]:
    """Returns the content of OUTPUT.json: everything a user needs besides the weights."""
    has_mean_image = saved.mean_image is not None
    return {
        "model": config.model.name,
        "classes": list(saved.classes),
        "num_classes": len(saved.classes),
        "preprocessing": {  # as in evaluation: resize shorter side, center crop, (x - mean) / std
            "eval_resize_px": config.data.eval_resize_px,
            "eval_crop_px": config.data.eval_crop_px,
            "interpolation": "bilinear, antialias",
            # On the 0..1 scale. "mean" is R, G, B; "mean_image", a file of means per pixel, if any,
            # replaces it.
            "mean": None if has_mean_image else list(config.data.mean),
            "mean_image": f"{output.name}.mean_image.npy" if has_mean_image else None,
            "std": list(config.data.std),
        },
        "step": saved.step,
        "resnet_dist": __version__,
    }


def _torchvision(model: nn.Module, config: Config, about: dict[str, Any]) -> bytes:
    torch.save(dict(model.state_dict()), content := io.BytesIO())
    return content.getvalue()


def _safetensors(model: nn.Module, config: Config, about: dict[str, Any]) -> bytes:
    # Metadata values must be strings. Hugging Face's readers require the key "format".
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    weights = timm_state_dict(model, DEPTHS[config.model.name])
    return safetensors.torch.save(weights, {"format": "pt", **texts})


def _onnx(model: nn.Module, config: Config, about: dict[str, Any]) -> bytes:
    """Exports images [batch, 3, height, width] -> logits [batch, num_classes], weights included.

    For VGG, height and width are fixed to eval_crop_px because of its linear layers.
    """
    axes, example_px = {0: "batch", 2: "height", 3: "width"}, ONNX_EXAMPLE_PX
    if DEPTHS[config.model.name].form == "vgg":
        axes, example_px = {0: "batch"}, config.data.eval_crop_px
    program = torch.onnx.export(
        _traced(model, example_px, tuple(axes)),
        dynamo=True,
        dynamic_shapes=(axes,),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def _pt2(model: nn.Module, config: Config, about: dict[str, Any]) -> bytes:
    """Exports images [B, 3, eval_crop_px, eval_crop_px] -> logits [B, num_classes] for any B."""
    program = _traced(model, config.data.eval_crop_px, (0,))
    torch.export.save(program, content := io.BytesIO())
    return content.getvalue()


LIBRARIES = {"torchvision": "torchvision", "safetensors": "timm"}  # target -> library to load it
TARGETS: dict[str, tuple[str, Callable[[nn.Module, Config, dict[str, Any]], bytes]]] = {
    "torchvision": (".pth", _torchvision),
    "safetensors": (".safetensors", _safetensors),
    "onnx": (".onnx", _onnx),
    "pt2": (".pt2", _pt2),
}


def _traced(
    model: nn.Module, px: int, dynamic_axes: tuple[int, ...]
) -> torch.export.ExportedProgram:
    images = torch.zeros(2, 3, px, px)  # two images, as torch.export fixes a dimension of size one
    shapes = dict.fromkeys(dynamic_axes, torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images,), dynamic_shapes=(shapes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would reveal paths on this machine
    return program


def _write(files: dict[str, bytes], folder: Path) -> None:
    """Writes all files under temporary names, and renames them in the given order once all of them
    are on disk.

    Raises:
        OSError: a file cannot be written; then none of the files appears.
    """
    with ExitStack() as stack:
        # An ExitStack exits its contexts, which rename the files, in reverse order.
        for name, content in reversed(files.items()):
            file = stack.enter_context(replacing(folder / name))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _run_folder(path: Path) -> Path:
    """Returns the run folder that a checkpoint belongs to, or the checkpoint's own folder if it is
    not inside a run folder."""
    path = path.absolute()
    above = (path, *path.parents[:2])
    return next((folder for folder in above if (folder / "checkpoints").is_dir()), path)


def _check_onnx() -> None:
    try:
        importlib.import_module("onnxscript")  # torch.onnx.export needs it; it brings onnx
    except ImportError:
        raise UserError(
            "--to onnx: needs onnxscript, not installed; pip install 'resnet-dist[export]'"
        ) from None

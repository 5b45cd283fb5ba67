"""A trained network in other programs' forms: torchvision, timm, ONNX, torch.export.

The weights are the checkpoint's, with train.ema_decay the averaged ones, in float32; the network is
in eval mode and on the CPU.
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

# torch.export takes for granted that a map which is one pixel in its example always is: at 64
# pixels no stage's map is.
ONNX_EXAMPLE_PX = 64
TIMM_VGG = {  # torchvision's name -> timm's, whose head is convolutions over the map
    "classifier.0": "pre_logits.fc1",  # [4096, 512 * 7 * 7] -> [4096, 512, 7, 7]
    "classifier.3": "pre_logits.fc2",  # [4096, 4096] -> [4096, 4096, 1, 1]
    "classifier.6": "head.fc",
}


def export(path: Path, target: str, output: Path | None = None) -> str:
    """Writes the network of a checkpoint for `target` (a key of TARGETS), and OUTPUT.json beside.

    path: a checkpoint or run folder. output: None stands for RUN/export/<model>-step<step>.<ext>.
    OUTPUT.json tells what the weights alone do not: the classes, and how images are prepared; a
    mean image (float32 [H, W, 3], 0..1 scale) is OUTPUT.mean_image.npy. All appear when complete.

    Returns the line to print.

    Raises:
        UserError: no checkpoint, no folder to write to, or a network that the target has not.
    """
    if target == "onnx":
        _check_onnx()
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        why = "is a folder; give a file" if output.is_dir() else "no such folder; make it first"
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
    """The weights under timm's names: torchvision's, but for the head of VGG.

    timm's VGG slides its head over maps above 7x7, as Vgg.dense does: there (256 pixels and more)
    the outputs are not those of Vgg.forward, which pools them to 7x7.
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
    """What the weights alone do not tell: plain values, ready for JSON."""
    has_mean_image = saved.mean_image is not None
    return {
        "model": config.model.name,
        "classes": list(saved.classes),
        "num_classes": len(saved.classes),
        "preprocessing": {  # the evaluation's: shorter side, central crop, (x - mean) / std
            "eval_resize_px": config.data.eval_resize_px,
            "eval_crop_px": config.data.eval_crop_px,
            "interpolation": "bilinear, antialias",
            # On the 0..1 scale: R, G, B, or a file with a mean per pixel in their place.
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
    # Metadata are strings; "format" is what Hugging Face's readers ask for.
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    weights = timm_state_dict(model, DEPTHS[config.model.name])
    return safetensors.torch.save(weights, {"format": "pt", **texts})


def _onnx(model: nn.Module, config: Config, about: dict[str, Any]) -> bytes:
    """images [batch, 3, height, width] -> logits [batch, num_classes], the weights inside.

    VGG's linear layers fix height and width: they are eval_crop_px.
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
    """images [B, 3, eval_crop_px, eval_crop_px] -> logits [B, num_classes], for any B."""
    program = _traced(model, config.data.eval_crop_px, (0,))
    torch.export.save(program, content := io.BytesIO())
    return content.getvalue()


LIBRARIES = {"torchvision": "torchvision", "safetensors": "timm"}  # target -> whose network it is
TARGETS: dict[str, tuple[str, Callable[[nn.Module, Config, dict[str, Any]], bytes]]] = {
    "torchvision": (".pth", _torchvision),
    "safetensors": (".safetensors", _safetensors),
    "onnx": (".onnx", _onnx),
    "pt2": (".pt2", _pt2),
}


def _traced(
    model: nn.Module, px: int, dynamic_axes: tuple[int, ...]
) -> torch.export.ExportedProgram:
    images = torch.zeros(2, 3, px, px)  # two, as one would be taken for granted
    shapes = dict.fromkeys(dynamic_axes, torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images,), dynamic_shapes=(shapes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine: not to be given away
    return program


def _write(files: dict[str, bytes], folder: Path) -> None:
    """All of them are on the disk before the first gets its name; names are given in their order.

    Raises:
        OSError: one cannot be written; then none has its name.
    """
    with ExitStack() as stack:
        # The stack is left in the opposite order.
        for name, content in reversed(files.items()):
            file = stack.enter_context(replacing(folder / name))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _run_folder(path: Path) -> Path:
    """The run that a checkpoint belongs to; of one copied elsewhere, its own folder."""
    path = path.absolute()
    above = (path, *path.parents[:2])
    return next((folder for folder in above if (folder / "checkpoints").is_dir()), path)


def _check_onnx() -> None:
    try:
        importlib.import_module("onnxscript")  # torch.onnx.export needs it; it brings onnx
    except ImportError:
        raise UserError(
            "--to onnx: needs onnxscript, which is not here; pip install 'resnet-dist[export]'"
        ) from None

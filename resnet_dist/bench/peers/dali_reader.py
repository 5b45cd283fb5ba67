"""A typical DALI pipeline, with DALI's own file reader, shuffle and random crops.

It only serves as a baseline for `bench loader` and `bench peers`. Training uses data/load/dali.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from resnet_dist.config import DataConfig
from resnet_dist.data.index.index import Index


def dali_batches(
    index: Index, data: DataConfig, batch_size: int, device: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields images [B, H, W, 3], random resized crops, and labels [B, 1], without end.

    Images are float16 on a GPU and float32 on a CPU.
    """
    gpu = device == "cuda"
    pipe = peer_graph(
        index,
        data,
        batch_size=batch_size,
        num_threads=data.decode_threads,
        device_id=0 if gpu else None,
        seed=0,
    )
    while True:
        images, labels = pipe.run(torch.cuda.current_stream() if gpu else None)
        yield (torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor()))


@pipeline_def
def peer_graph(index: Index, data: DataConfig) -> tuple[object, object]:
    gpu = Pipeline.current().device_id is not None
    encoded, labels = fn.readers.file(
        files=list(index.paths), labels=index.labels.tolist(), random_shuffle=True
    )
    # The size of ImageNet's largest image, as in NVIDIA's own ResNet-50 example.
    largest: dict[str, Any] = {"preallocate_width_hint": 5980, "preallocate_height_hint": 6430}
    images = fn.decoders.image_random_crop(
        encoded,
        device="mixed" if gpu else "cpu",
        random_area=list(data.area),
        random_aspect_ratio=list(data.aspect),
        num_attempts=10,
        **(largest if gpu else {}),
    )
    images = fn.resize(
        images, size=[data.crop_px, data.crop_px], interp_type=types.INTERP_LINEAR, antialias=True
    )
    images = fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(),
        mean=[255 * mean for mean in data.mean],
        std=[255 * std for std in data.std],
        dtype=types.FLOAT16 if gpu else types.FLOAT,
        output_layout="HWC",
    )
    return images, labels.gpu() if gpu else labels

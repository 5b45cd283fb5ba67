"""Tests whether an image can be decoded, by itself and on the CPU.

Decoded together with others, a damaged image makes the whole pipeline fail, and in some formats it
crashes the process.
"""

import numpy as np
from nvidia.dali import Pipeline

from resnet_dist.data.index.headers import why_undecodable
from resnet_dist.data.load.dali_graphs import check_graph


class ImageCheck:
    """Decodes one whole image at a time, in a small pipeline that is kept.

    It decodes the whole image, not only its window, so that the answer depends on the image's bytes
    alone and is the same in every epoch, on every rank and on every device.
    """

    def __init__(self) -> None:
        self._pipe: Pipeline | None = None  # None before the first image and after a bad one

    def __call__(self, data: np.ndarray) -> str | None:
        """Returns what is wrong with an encoded image (uint8 [bytes]), or None."""
        if self._pipe is None:
            self._pipe = check_graph(
                batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1
            )
        try:
            self._pipe.feed_input("image", [data])
            self._pipe.run()
        except RuntimeError:
            self._pipe = None
            return why_undecodable(data.tobytes())
        return None

"""Whether an image decodes, tried by itself on the CPU.

Among others a damaged image ends the whole pipeline, and in some formats the process.
"""

import numpy as np
from nvidia.dali import Pipeline

from resnet_dist.data.index.headers import why_undecodable
from resnet_dist.data.load.dali_graphs import check_graph


class ImageCheck:
    """Decodes one image after the other, whole, in a small pipeline that is kept.

    The whole image, whatever its window: so the answer depends on its bytes alone, and is the same
    in every epoch, on every rank and on every device.
    """

    def __init__(self) -> None:
        self._pipe: Pipeline | None = None  # none before the first image, and after a bad one

    def __call__(self, data: np.ndarray) -> str | None:
        """What is wrong with an encoded image (uint8 [bytes]); None: nothing."""
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

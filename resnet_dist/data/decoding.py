"""How encoded images become pixels: what of a file is decoded, and by what."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Decoding:
    """One way of decoding. Pixels of two ways differ in the last bits."""

    # The crop window and the margin that resampling reaches, or the whole image.
    part: Literal["window", "image"] = "window"
    # "mixed": the GPU, with the CPU's help.
    device: Literal["cpu", "mixed"] = "cpu"
    # Share of a batch for the GPU's own JPEG decoder (A100, H100 and later), not its CUDA cores.
    hw_decoder_load: float = 0.0
    # Chroma is interpolated, as libjpeg does it; otherwise each value is repeated.
    fancy_upsampling: bool = True

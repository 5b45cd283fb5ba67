"""From files to batches: listing -> index -> order -> augment -> dali."""

import warnings

# Said once per process, when the first pipeline for a GPU is built where NPP or cuFFT is not
# installed, and DALI's CUDA 13 build says "cuda120" too. No operator that this package uses needs
# either library. In this file, so that it is in force whichever module imports DALI first.
warnings.filterwarnings(
    "ignore", "nvidia-dali-cuda120 is no longer shipped with CUDA runtime", module=r"nvidia\.dali"
)

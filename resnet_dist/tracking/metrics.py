"""The names of what a run logs, once, and what `compare` shows of each.

A new metric is a line here, and the line that logs it.
"""

from collections.abc import Callable
from typing import Any

TRAIN_LOSS = "train/loss"  # mean over the images since the last line
TRAIN_ACC1 = "train/acc1"  # of the same images, in percent
TRAIN_LR = "train/lr"  # of the last step
VAL_LOSS = "val/loss"
VAL_ACC1 = "val/acc1"  # in percent
VAL_ACC5 = "val/acc5"
IMAGES_PER_SEC = "perf/images_per_sec"  # over all ranks, evaluations and saves left out
DATA_WAIT_PCT = "perf/data_wait_pct"  # of the time, that hosts waited for data
EPOCH = "progress/epoch"  # epochs done
BAD_SAMPLES = "data/bad_samples"  # images that could not be read so far

# Of a run's points, `compare` shows the best, or the last; of the others none.
BEST: dict[str, Callable[..., Any]] = {VAL_ACC1: max, VAL_ACC5: max, VAL_LOSS: min}
LAST = (TRAIN_LOSS, TRAIN_ACC1, IMAGES_PER_SEC, DATA_WAIT_PCT, EPOCH)

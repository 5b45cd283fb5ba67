"""The names of all metrics that a run logs, and which of them `compare` shows.

To add a metric, add its name here and the line that logs it.
"""

from collections.abc import Callable
from typing import Any

TRAIN_LOSS = "train/loss"  # mean over the images since the previous log line
TRAIN_ACC1 = "train/acc1"  # over the same images, in percent
TRAIN_LR = "train/lr"  # learning rate of the last step
VAL_LOSS = "val/loss"
VAL_ACC1 = "val/acc1"  # in percent
VAL_ACC5 = "val/acc5"
IMAGES_PER_SEC = "perf/images_per_sec"  # over all ranks, excluding evaluations and saves
DATA_WAIT_PCT = "perf/data_wait_pct"  # percentage of time that hosts waited for data
EPOCH = "progress/epoch"  # epochs completed
BAD_SAMPLES = "data/bad_samples"  # unreadable images so far

# `compare` shows the best value of the metrics in BEST and the last value of those in LAST. It does
# not show the other metrics.
BEST: dict[str, Callable[..., Any]] = {VAL_ACC1: max, VAL_ACC5: max, VAL_LOSS: min}
LAST = (TRAIN_LOSS, TRAIN_ACC1, IMAGES_PER_SEC, DATA_WAIT_PCT, EPOCH)

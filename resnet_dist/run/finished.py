"""A finished run that is started again: its result, at once and without torch."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from resnet_dist.checkpoints import folders
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.run.folder import check_run_folder
from resnet_dist.run.outcome import START_TOKEN, Ending, Outcome
from resnet_dist.run.progress import table
from resnet_dist.tracking.metrics import VAL_ACC1, VAL_ACC5, VAL_LOSS
from resnet_dist.tracking.mirror import is_mirrored


def result_if_finished(config: Config) -> str | None:
    """Returns the result of a finished run with these settings; None if a start has work to do.

    None also wherever that is in doubt, and where MLflow has not got all of the journal: a start
    would send the rest. A launcher that set $RESNET_DIST_START waits for the outcome of its start,
    so the start has to be made.
    """
    try:
        return _result(config)
    except UserError:  # the run folder cannot be read, which the start will say
        return None


def _result(config: Config) -> str | None:
    run_dir = config.run_dir
    newest, ending = folders.latest(run_dir), Ending.read(run_dir)
    if newest is None or ending is None or ending.outcome is not Outcome.FINISHED:
        return None
    meta = folders.read_meta(newest)
    if meta.get("step") != ending.step or os.environ.get(START_TOKEN, ending.start) != ending.start:
        return None
    if check_run_folder(config, anyway=True) or not is_mirrored(config):
        return None
    rows = [("run", f"{config.name}, already finished at step {ending.step}, {ending.time}")]
    last = _last_evaluation(run_dir)
    if last is not None:
        acc5 = f"acc5 {last[VAL_ACC5]:.2f} %  " if last.get(VAL_ACC5) is not None else ""
        loss = "not finite" if last.get(VAL_LOSS) is None else f"{last[VAL_LOSS]:.4f}"
        rows += [("last val", f"acc1 {last[VAL_ACC1]:.2f} %  {acc5}loss {loss}")]
    best = meta.get("best")
    if isinstance(best, dict) and best.get("step", -1) >= 0:
        rows += [("best val", f"acc1 {best['acc1']:.2f} % at step {best['step']}")]
    rows += [("checkpoint", str(folders.best(run_dir)))]
    rows += [("to train on", "more train.epochs= with --resume-anyway, or another name=")]
    return table(rows)


def _last_evaluation(run_dir: Path) -> dict[str, Any] | None:
    """Returns the metrics of the last evaluation in the journal; None if it has none."""
    last = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for line in (run_dir / "journal.jsonl").read_text().splitlines():
            metrics = json.loads(line)["metrics"]
            if VAL_ACC1 in metrics:
                last = metrics
    return last

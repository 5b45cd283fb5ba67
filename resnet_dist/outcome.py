"""How a run ended: in a word, and as the table at the end."""

import os
import sys
import time
from enum import Enum
from pathlib import Path

from resnet_dist.evaluate import Score
from resnet_dist.job import Job
from resnet_dist.progress import Progress, duration, table
from resnet_dist.tracking import RunRecord


class Outcome(Enum):
    """In MLflow's words."""

    FINISHED = "FINISHED"
    PREEMPTED = "KILLED"


def artifacts(outcome: Outcome, run_dir: Path) -> dict[str, Path]:
    """What MLflow gets of a run that ended so: the best checkpoint, unless its save failed."""
    best = run_dir / "checkpoints" / "best"
    return {"best": best} if outcome is Outcome.FINISHED and os.path.isdir(best) else {}


def summary(
    job: Job, outcome: Outcome, score: Score | None, record: RunRecord | None, progress: Progress
) -> str:
    """The table at the end: the scores, where everything is, and how to open it."""
    plan, state, run_dir = job.plan, job.state, job.config.run_dir
    rows = [("run", f"{job.config.name}, {outcome.name.lower()} at step {state.step}")]
    if score is not None:
        rows += [("last val", str(score))]
    if state.best_step >= 0:
        epoch = plan.epoch_at(state.best_step)
        rows += [("best val", f"acc1 {state.best_acc1:.2f} % after epoch {epoch:.2f}")]
        # Its save may have failed where later ones did not.
        there = "best" if os.path.isdir(run_dir / "checkpoints/best") else "latest"
        rows += [("checkpoint", f"{run_dir}/checkpoints/{there}")]
    seconds = time.monotonic() - progress.started
    epochs = plan.epoch_at(state.step - progress.first_step)
    rows += [("time", f"{duration(seconds)} for {epochs:.2f} epochs")]
    if record is not None:
        rows += [("MLflow run", f"{record.run_id} in {record.tracking_uri}")]
        page = f"#/experiments/{record.experiment_id}/runs/{record.run_id}/model-metrics"
        if record.tracking_uri.startswith("http"):
            rows += [("curves", f"{record.tracking_uri}/{page}")]
        else:
            serve = f"{sys.executable} -m mlflow ui --backend-store-uri {record.tracking_uri}"
            rows += [("curves", f"http://127.0.0.1:5000/{page}, after:"), ("", serve)]
    if outcome is Outcome.PREEMPTED:
        rows += [("to go on", "the same command again")]
    return table(rows)

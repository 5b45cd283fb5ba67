"""The table at the end of a run: scores, where the files are, and how to open the curves."""

import os
import sys
import time
from pathlib import Path

from resnet_dist.evaluate import Score
from resnet_dist.run.outcome import Outcome
from resnet_dist.run.progress import Progress, duration
from resnet_dist.state import TrainState
from resnet_dist.tracking.mirror import RunRecord


def summary(
    run_dir: Path, state: TrainState, progress: Progress, outcome: Outcome, score: Score | None
) -> list[tuple[str, str]]:
    """Returns the rows of the table. score: of this start's last evaluation, if there was one."""
    plan = progress.plan
    rows = [("run", f"{run_dir.name}, {outcome.value} at step {state.step}")]
    if score is not None:
        rows += [("last val", str(score))]
    if state.best_step >= 0:
        epoch = plan.epoch_at(state.best_step)
        rows += [("best val", f"acc1 {state.best_acc1:.2f} % after epoch {epoch:.2f}")]
        # The save of the best checkpoint may have failed, while later ones did not.
        there = "best" if os.path.isdir(run_dir / "checkpoints/best") else "latest"
        rows += [("checkpoint", f"{run_dir}/checkpoints/{there}")]
    seconds = time.monotonic() - progress.started
    epochs = plan.epoch_at(state.step - progress.first_step)
    rows += [("time", f"{duration(seconds)} for {epochs:.2f} epochs")]
    if outcome is Outcome.STOPPED:
        rows += [("to resume", "run the same command again")]
    return rows


def where_to_look(record: RunRecord | None) -> list[tuple[str, str]]:
    """Returns the rows about the MLflow run, if there is one."""
    if record is None:
        return []
    rows = [("MLflow run", f"{record.run_id} in {record.tracking_uri}")]
    page = f"#/experiments/{record.experiment_id}/runs/{record.run_id}/model-metrics"
    if record.tracking_uri.startswith("http"):
        return [*rows, ("curves", f"{record.tracking_uri}/{page}")]
    serve = f"{sys.executable} -m mlflow ui --backend-store-uri {record.tracking_uri}"
    return [*rows, ("curves", f"http://127.0.0.1:5000/{page}, after:"), ("", serve)]


def artifacts(outcome: Outcome, run_dir: Path) -> dict[str, Path]:
    """Returns what to upload to MLflow: the best checkpoint of a finished run, if it was saved."""
    best = run_dir / "checkpoints" / "best"
    return {"best": best} if outcome is Outcome.FINISHED and os.path.isdir(best) else {}

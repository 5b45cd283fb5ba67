"""Runs side by side, from MLflow: what differs in their configs, and their scores."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.errors import UserError
from resnet_dist.tracking import RunRecord, mlflow_client, tracking_uri, without_credentials

if TYPE_CHECKING:
    from mlflow.entities import Run

BEST = {"val/acc1": max, "val/acc5": max, "val/loss": min}
LAST = ("train/loss", "train/acc1", "perf/images_per_sec", "perf/data_wait_pct", "progress/epoch")
TAGS = ("git.commit", "recipe", "world_size", "device")
COMMIT_CHARACTERS = 10


def compare(names: list[str], run_root: Path) -> str:
    """A table with a column per run. A name is a run folder, its name in run_root, or a run id.

    Raises:
        UserError: a run that MLflow does not hold.
    """
    columns = [_column(name, run_root) for name in names]
    rows = [("", *(column.pop("name") for column in columns))]
    keys = dict.fromkeys(key for column in columns for key in column)
    for key in keys:
        cells = [column.get(key, "-") for column in columns]
        is_setting = not key.startswith(("best ", "last ", "status"))
        if not (is_setting and len(set(cells)) == 1):  # what all runs share tells nothing
            rows.append((key, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _column(name: str, run_root: Path) -> dict[str, str]:
    """Row title -> cell: settings first, then scores."""
    client, run = _find(name, run_root)
    cells = {"name": run.info.run_name or run.info.run_id, "status": run.info.status}
    cells |= dict(sorted(run.data.params.items()))
    cells |= {tag: run.data.tags[tag] for tag in TAGS if tag in run.data.tags}
    if "git.commit" in cells:
        commit, dirty, _ = cells["git.commit"].partition("-dirty")
        cells["git.commit"] = commit[:COMMIT_CHARACTERS] + dirty
    for metric, pick in BEST.items():
        history = client.get_metric_history(run.info.run_id, metric)
        if history:
            best = pick(history, key=lambda point: point.value)
            cells[f"best {metric}"] = f"{best.value:.4g} (step {best.step})"
    for metric in LAST:
        if metric in run.data.metrics:
            cells[f"last {metric}"] = f"{run.data.metrics[metric]:.4g}"
    return cells


def _find(name: str, run_root: Path) -> tuple[Any, "Run"]:
    uri, run_id = tracking_uri(run_root), name
    for folder in (Path(name), run_root / name):
        record = RunRecord.read(folder)
        if record is not None:
            run_id = record.run_id
            if without_credentials(uri) != record.tracking_uri:
                uri = record.tracking_uri
            break
    local = uri.removeprefix("sqlite:///")
    if local != uri and not Path(local).is_file():
        raise UserError(f"{name}: no run folder and no {local}; give --run-root or a run folder")
    client = mlflow_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        return client, client.get_run(run_id)
    except MlflowException:
        raise UserError(
            f"{name}: no run folder below {run_root} and no run id in {uri}; "
            "give a folder such as runs/quickstart"
        ) from None

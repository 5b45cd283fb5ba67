"""Compares runs that MLflow recorded: the settings that differ, the scores and the error curves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resnet_dist.errors import UserError
from resnet_dist.models.depths import DEPTHS, Net
from resnet_dist.tracking import metrics
from resnet_dist.tracking.mirror import RunRecord, mlflow_client, tracking_uri, without_credentials

if TYPE_CHECKING:
    from mlflow.entities import Run

TAGS = ("git.commit", "recipe", "world_size", "device")
COMMIT_CHARACTERS = 10
MLFLOW_INFINITY = 1.7e308  # MLflow keeps infinity as the largest number of a database
WINDOW_EPOCHS = 0.25  # length of the moving average over the training error of the minibatches


@dataclass(frozen=True)
class ErrorCurves:
    """The errors of one run in percent, in ascending order of optimizer steps."""

    name: str
    net: Net | None  # None: a network that this version does not know
    network: str
    train: np.ndarray  # float64 [N, 2]: step, error of the minibatches since the previous point
    val: np.ndarray  # float64 [M, 2]: step, error in an evaluation; M may be 0
    steps_per_epoch: float

    @property
    def window_steps(self) -> float:
        return WINDOW_EPOCHS * self.steps_per_epoch

    def smoothed_train(self) -> np.ndarray:
        """Returns float64 [N, 2]: each step, and the mean training error of the window around it.

        At both ends of the curve, only half of the window has points.
        """
        steps, errors = self.train.T
        first = np.searchsorted(steps, steps - self.window_steps / 2, "left")
        end = np.searchsorted(steps, steps + self.window_steps / 2, "right")
        covered = self._covered_steps()
        counts = np.concatenate([[0], np.cumsum(covered)])
        sums = np.concatenate([[0], np.cumsum(errors * covered)])
        return np.column_stack([steps, (sums[end] - sums[first]) / (counts[end] - counts[first])])

    def last_train_error(self) -> tuple[float, int]:
        """Returns the mean training error of the last window, and the number of steps in it.

        The window always includes the last point.
        """
        steps, errors = self.train.T
        inside = steps > steps[-1] - self.window_steps
        inside[-1] = True
        covered = self._covered_steps()[inside]
        return float(np.average(errors[inside], weights=covered)), int(covered.sum())

    def _covered_steps(self) -> np.ndarray:
        """Returns [N]: the number of steps over whose minibatches each point is averaged."""
        return np.diff(self.train[:, 0], prepend=0)


def compare(names: list[str], run_root: Path) -> str:
    """Returns a table with a column per run, omitting the settings that all runs share.

    If the runs include plain and residual nets of the same depths, `degradation` is shown below it.
    names: each is a run folder, its name in run_root, or an MLflow run id.

    Raises:
        UserError: MLflow has no such run.
    """
    found = [_find(name, run_root) for name in names]
    columns = [_column(client, run) for client, run in found]
    rows = [("", *(column.pop("name") for column in columns))]
    keys = dict.fromkeys(key for column in columns for key in column)
    for key in keys:
        cells = [column.get(key, "-") for column in columns]
        is_setting = not key.startswith(("best ", "last ", "status"))
        if not (is_setting and len(set(cells)) == 1):  # omits settings that all runs share
            rows.append((key, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    curves = [_curves(client, run) for client, run in found]
    # A run that has not logged a point yet appears in the table only.
    block = degradation([curve for curve in curves if len(curve.train)])
    return f"{table}\n\n{block}" if block else table


def error_curves(names: list[str], run_root: Path) -> list[ErrorCurves]:
    """Reads the error curves of the runs from MLflow.

    Raises:
        UserError: MLflow has no such run, or the run has no train/acc1.
    """
    curves = [_curves(*_find(name, run_root)) for name in names]
    for name, curve in zip(names, curves, strict=True):
        if not len(curve.train):
            raise UserError(
                f"{name}: MLflow has no train/acc1 of this run, so there is no curve to draw; "
                "leave it out, or wait for its first log line (train.log_every_steps)"
            )
    return curves


def panels(curves: Sequence[ErrorCurves]) -> dict[str, list[ErrorCurves]]:
    """Assigns the curves to panels. Returns title -> curves.

    If there are both plain and residual nets, and no others, each kind has its own panel.
    Otherwise all curves share one panel.
    """
    sides: dict[str, list[ErrorCurves]] = {"plain networks": [], "residual networks": []}
    for curve in curves:
        if curve.net is not None:
            side = "plain networks" if curve.net.shortcut == "none" else "residual networks"
            sides[side].append(curve)
    both = all(sides.values()) and sum(map(len, sides.values())) == len(curves)
    return sides if both else {"": list(curves)}


def degradation(curves: Sequence[ErrorCurves]) -> str:
    """Describes how depth changes the training error of plain and of residual nets, in one line
    for each kind of network (He et al. 2015, section 4.1).

    Runs of the same network are averaged. Returns "" unless there are two or more depths at which
    both kinds were trained.
    """
    runs: dict[Net, list[ErrorCurves]] = {}
    for curve in curves:
        if curve.net is not None:
            runs.setdefault(curve.net, []).append(curve)
    # The keys are an ordered set. Each has the networks of one kind, shallow to deep.
    chains: dict[tuple[Net, ...], None] = {}
    for residual in dict.fromkeys(replace(net, depths=()) for net in runs):
        plain = replace(residual, shortcut="none")
        shared = [
            depths
            for depths in sorted({net.depths for net in runs}, key=sum)
            if {replace(kind, depths=depths) for kind in (plain, residual)} <= runs.keys()
        ]
        if residual != plain and len(shared) > 1:
            for kind in (plain, residual):
                chains[tuple(replace(kind, depths=depths) for depths in shared)] = None
    used = [run for nets in chains for net in nets for run in runs[net]]
    if not used:
        return ""
    averaged = span(run.last_train_error()[1] for run in used)
    ends = {int(run.train[-1, 0]) for run in used}
    at = f", at step {min(ends):,}" if len(ends) == 1 else ""
    title = (
        "degradation (training error, mean over the minibatches of the last "
        f"{WINDOW_EPOCHS:g} epochs: {averaged} steps{at})"
    )
    lines = [_depth_line([runs[net] for net in nets], len(ends) > 1) for nets in chains]
    return "\n".join([title, *lines])


def _depth_line(nets: list[list[ErrorCurves]], with_steps: bool) -> str:
    """Formats networks as "plain20 8.10 % -> plain56 9.30 %: +1.20 points".

    nets: the runs of each network, shallow to deep.
    """
    texts, errors = [], []
    for runs in nets:
        errors.append(sum(run.last_train_error()[0] for run in runs) / len(runs))
        text = f"{runs[0].network} {errors[-1]:.2f} %"
        if with_steps:
            text += f" at step {span(int(run.train[-1, 0]) for run in runs)}"
        if len(runs) > 1:
            text += f" (mean of {len(runs)} runs)"
        texts.append(text)
    return f"  {' -> '.join(texts)}: {errors[-1] - errors[0]:+.2f} points"


def span(numbers: Iterable[int]) -> str:
    """Formats the range of one or more numbers: "98" if all are equal, else "98 to 390"."""
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _curves(client: Any, run: "Run") -> ErrorCurves:
    network = run.data.params.get("model.name", "")
    epochs = _history(client, run, metrics.EPOCH)
    return ErrorCurves(
        name=run.info.run_name or run.info.run_id,
        net=DEPTHS.get(network),
        network=network,
        train=_history(client, run, metrics.TRAIN_ACC1) * [1, -1] + [0, 100],
        val=_history(client, run, metrics.VAL_ACC1) * [1, -1] + [0, 100],
        steps_per_epoch=epochs[-1, 0] / epochs[-1, 1] if len(epochs) else 0.0,
    )


def _history(client: Any, run: "Run", metric: str) -> np.ndarray:
    """Returns float64 [N, 2]: step and value, in ascending order of steps."""
    points = client.get_metric_history(run.info.run_id, metric)
    return np.array(sorted((p.step, p.value) for p in points), dtype=np.float64).reshape(-1, 2)


def _column(client: Any, run: "Run") -> dict[str, str]:
    """Returns row title -> cell of one run: settings first, then scores."""
    cells = {"name": run.info.run_name or run.info.run_id, "status": run.info.status}
    cells |= dict(sorted(run.data.params.items()))
    cells |= {tag: run.data.tags[tag] for tag in TAGS if tag in run.data.tags}
    if "git.commit" in cells:
        commit, dirty, _ = cells["git.commit"].partition("-dirty")
        cells["git.commit"] = commit[:COMMIT_CHARACTERS] + dirty
    # As in training, an evaluation whose loss is not finite is never the best.
    losses = client.get_metric_history(run.info.run_id, metrics.VAL_LOSS)
    not_finite = {point.step for point in losses if not abs(point.value) < MLFLOW_INFINITY}
    for metric, pick in metrics.BEST.items():
        history = client.get_metric_history(run.info.run_id, metric)
        history = [point for point in history if point.step not in not_finite]
        if history:
            best = pick(history, key=lambda point: point.value)
            cells[f"best {metric}"] = f"{best.value:.4g} (step {best.step})"
    for metric in metrics.LAST:
        if metric in run.data.metrics:
            cells[f"last {metric}"] = f"{run.data.metrics[metric]:.4g}"
    return cells


def _find(name: str, run_root: Path) -> tuple[Any, "Run"]:
    """Returns an MLflow client, and the run with this name. Raises what `compare` raises."""
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
        raise UserError(
            f"{name}: not a run folder, and there is no database {local}; give a run folder, or "
            "--run-root"
        )
    client = mlflow_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        return client, client.get_run(run_id)
    except MlflowException:
        raise UserError(
            f"{name}: neither a run folder in {run_root} nor a run id in "
            f"{without_credentials(uri)}; give a folder such as runs/quickstart"
        ) from None

"""Copies journal.jsonl to MLflow in a background thread.

A slow or unreachable server therefore does not slow down training. RUN/mlflow.json records how much
of the journal has been sent, and the MLflow run id, which a resumed run reuses.
"""

import contextlib
import fcntl
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config import Config, flat_settings
from resnet_dist.errors import not_installed
from resnet_dist.files import replace_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

POLL_SECONDS = 1.0
RETRY_SECONDS = 15.0
DRAIN_SECONDS = 60.0  # longest wait for MLflow at the end of a run
METRICS_PER_CALL = 1000  # this and the next three are limits of the MLflow server
PARAMS_PER_CALL = 100
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000


def tracking_uri(run_root: Path) -> str:
    """Returns $MLFLOW_TRACKING_URI or, by default, the URI of a database in `run_root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_root.absolute()}/mlflow.db"


@dataclass(frozen=True)
class RunRecord:
    """RUN/mlflow.json: the MLflow run that mirrors a run folder, and how much has been sent."""

    tracking_uri: str
    experiment_id: str
    run_id: str
    journal_bytes: int = 0  # bytes of journal.jsonl sent so far
    name: str = ""  # of the run; "" in a file written by an older version
    status: str = ""  # with which the run was closed in MLflow; "" while it is not

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord | None":
        path = run_dir / "mlflow.json"
        return cls(**json.loads(path.read_text())) if path.is_file() else None

    def write(self, run_dir: Path) -> None:
        replace_file(run_dir / "mlflow.json", json.dumps(vars(self), indent=1))


def is_mirrored(config: Config) -> bool:
    """Returns whether a finished run has nothing left to send to MLflow."""
    if not config.tracking.mlflow or importlib.util.find_spec("mlflow") is None:
        return True
    try:
        record = RunRecord.read(config.run_dir)
        journal_bytes = (config.run_dir / "journal.jsonl").stat().st_size
    except (OSError, ValueError, TypeError):
        return False
    uri = without_credentials(tracking_uri(config.run_dir.parent))
    return (
        record is not None
        and (record.status, record.tracking_uri) == ("FINISHED", uri)
        and (record.name, record.journal_bytes) == (config.name, journal_bytes)
    )


class Mirror(threading.Thread):
    """Sends the journal to MLflow. Training never waits for it and never fails because of it."""

    def __init__(self, config: Config, tags: Mapping[str, str], warn: Callable[[str], None]):
        super().__init__(name="mlflow-mirror", daemon=True)
        self.config = config
        self.run_dir = config.run_dir
        self.tags = dict(tags)
        self.warn = warn
        self.ending = threading.Event()
        self.status = "FINISHED"
        self.artifacts: Mapping[str, Path] = {}
        self._warned = False

    def finish(self, status: str, artifacts: Mapping[str, Path]) -> None:
        self.status, self.artifacts = status, artifacts
        self.ending.set()
        self.join(DRAIN_SECONDS)
        if self.is_alive():
            self.warn("MLflow: not all metrics were sent; journal.jsonl has all of them")

    def run(self) -> None:
        client: MlflowClient | None = None
        while True:
            # Read before sending: once `ending` is set, nothing more is added to the journal.
            last_round = self.ending.is_set()
            try:
                if client is None:
                    client = self._connect()
                self._send_journal(client)
                if last_round:
                    self._close_run(client)
                    return
            except Exception as error:  # the server and its client may raise anything
                if not self._warned:
                    rest = "training continues, journal.jsonl has the record"
                    self.warn(f"MLflow: {_reason(error)}; {rest}")
                    self._warned = True
                if last_round:
                    return
                self.ending.wait(RETRY_SECONDS)
                continue
            self.ending.wait(POLL_SECONDS)

    def _connect(self) -> "MlflowClient":
        uri = tracking_uri(self.run_dir.parent)
        with _database_lock(uri, self.run_dir.parent):
            client = mlflow_client(uri)
            record = RunRecord.read(self.run_dir)
            # A run folder that was copied to a new name still has the record of the original run.
            copied = record is not None and record.name not in ("", self.config.name)
            if record is None or copied or record.tracking_uri != without_credentials(uri):
                record = self._create_run(client, uri)
                # Written immediately, so that a retry after a failure below reuses this run.
                record.write(self.run_dir)
        client.update_run(record.run_id, status="RUNNING")
        replace(record, status="").write(self.run_dir)
        for key, value in self.tags.items():
            client.set_tag(record.run_id, key, value)
        from mlflow.entities import Param

        # MLflow does not allow a param to change, so the params of the first start are kept.
        known = client.get_run(record.run_id).data.params
        params = [
            Param(key, str(value)[:PARAM_CHARACTERS])
            for key, value in flat_settings(self.config).items()
            if key not in known
        ]
        for start in range(0, len(params), PARAMS_PER_CALL):
            client.log_batch(record.run_id, params=params[start : start + PARAMS_PER_CALL])
        self._upload(client, record.run_id, self.run_dir / "config.yaml", None)
        return client

    def _create_run(self, client: "MlflowClient", uri: str) -> RunRecord:
        name = self.config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            local = uri.startswith("sqlite:")
            root = (self.run_dir.parent / "mlartifacts").as_uri() if local else None
            experiment_id = client.create_experiment(name, artifact_location=root)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=self.config.name)
        return RunRecord(
            without_credentials(uri), experiment_id, run.info.run_id, name=self.config.name
        )

    def _upload(self, client: "MlflowClient", run_id: str, path: Path, name: str | None) -> None:
        """Uploads a file or folder. Only warns if this fails, so that metrics and status still
        reach the server."""
        try:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), name)
            else:
                client.log_artifact(run_id, str(path), name)
        except Exception as error:  # the artifact store and its client may raise anything
            self.warn(f"MLflow: {path} was not uploaded: {_reason(error)}")

    def _send_journal(self, client: "MlflowClient") -> None:
        from mlflow.entities import Metric

        record = RunRecord.read(self.run_dir)
        assert record is not None  # written by _connect
        journal = self.run_dir / "journal.jsonl"
        with open(journal, "rb") as file:
            # After a power failure the journal may be shorter than what was sent.
            start = file.seek(min(record.journal_bytes, journal.stat().st_size))
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        metrics = []
        for line in whole.splitlines():
            entry = json.loads(line)
            for name, value in entry["metrics"].items():
                number = math.nan if value is None else value  # null: it was not finite
                metrics.append(Metric(name, number, entry["time_ms"], entry["step"]))
        for first in range(0, len(metrics), METRICS_PER_CALL):
            client.log_batch(record.run_id, metrics=metrics[first : first + METRICS_PER_CALL])
        if whole:
            replace(record, journal_bytes=start + len(whole)).write(self.run_dir)

    def _close_run(self, client: "MlflowClient") -> None:
        record = RunRecord.read(self.run_dir)
        assert record is not None  # written by _connect
        for name, path in self.artifacts.items():
            self._upload(client, record.run_id, path, name)
        client.set_terminated(record.run_id, self.status)
        replace(record, status=self.status).write(self.run_dir)


@contextlib.contextmanager
def _database_lock(uri: str, run_root: Path) -> Iterator[None]:
    """Lets only one process at a time create or migrate the database.

    MLflow does this without a lock, and runs that start at the same moment would leave the database
    permanently broken.
    """
    if not uri.startswith("sqlite:"):
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without file locks, continue unprotected, like MLflow
            lock = stack.enter_context(open(run_root / ".mlflow.lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def without_credentials(text: str) -> str:
    """Removes user and password from the URIs in a text, so that it can be printed or written.

    http://user:secret@host becomes http://host.
    """
    return re.sub(r"(?<=://)[^\s/]*@", "", text)


def _reason(error: Exception) -> str:
    """Returns one short line that says why. Errors of MLflow's client contain the server's URI."""
    return without_credentials(" ".join(str(error).split()))[:200]


def mlflow_client(uri: str) -> "MlflowClient":
    """Returns a client that gives up on a dead server in seconds, not MLflow's four minutes.

    Raises:
        UserError: MLflow is not installed.
    """
    # Training prints the run's address itself, at its end and without the server's password.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # The import takes seconds. Here, only rank 0 pays for it, and only in its background thread.
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    return MlflowClient(tracking_uri=uri)


def git_commit() -> str:
    """Returns the commit of the source tree, or "unknown" outside a checkout.

    Ends with "-dirty" if there are uncommitted changes.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    tree = Path(__file__).resolve().parent.parent
    # If the package is installed inside another project's checkout, that commit is not ours.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    try:
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"

"""A real MLflow database or server mirrors the journal and never holds training up."""

import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

from resnet_dist import cli
from resnet_dist.config import Config, flat_settings
from resnet_dist.errors import UserError
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.outcome import Outcome
from resnet_dist.tracking import mirror
from resnet_dist.tracking.mirror import RunRecord, mlflow_client
from resnet_dist.train import train
from resnet_dist.verbs.compare import compare
from tests.support.multirank import run_ranks
from tests.support.needs import needs
from tests.support.tracking import TAGS, losses, start
from tests.support.waiting import HANG_SECONDS, wait_until


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # Where many tests run at once, MLflow may take longer to start than a run waits for it.
    monkeypatch.setattr(mirror, "DRAIN_SECONDS", HANG_SECONDS)


def start_and_close(rank: int, world_size: int, config: Config) -> str:
    warnings: list[str] = []
    tracker = start(replace(config, name=f"run{rank}"), warnings)
    tracker.log(1, {"train/loss": float(rank)})
    # On a busy machine MLflow may take longer to start than a run waits for it at its end.
    while not (tracker.run_dir / "mlflow.json").is_file() and not warnings:
        time.sleep(0.1)
    record = tracker.close("FINISHED", {})
    assert warnings == []
    assert record is not None
    return record.experiment_id


@pytest.mark.slow
@needs("mlflow")
def test_runs_that_start_at_once_share_a_new_database(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("tracking.mlflow=true")
    config.run_dir.parent.mkdir()
    experiments = run_ranks(start_and_close, 4, config, init_process_group=False)
    assert len(set(experiments)) == 1
    client = mlflow_client(f"sqlite:///{config.run_dir.parent}/mlflow.db")
    runs = client.search_runs(experiments[:1])
    assert sorted(run.data.metrics["train/loss"] for run in runs) == [0, 1, 2, 3]


@needs("mlflow")
def test_values_that_are_not_finite_reach_mlflow_and_are_not_the_best(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config("tracking.mlflow=true")
    tracker = start(config)
    for step, loss, acc1 in ((10, 2.0, 50.0), (20, math.nan, 99.0), (30, math.inf, 98.0)):
        tracker.log(step, {"train/loss": loss, "val/loss": loss, "val/acc1": acc1})
    record = tracker.close("FINISHED", {})
    assert record is not None
    client = mlflow_client(record.tracking_uri)
    history = client.get_metric_history(record.run_id, "train/loss")
    assert [math.isfinite(point.value) for point in history] == [True, False, False]
    rows = dict(
        line.split("  ", 1) for line in compare(["tiny"], config.run_dir.parent).splitlines()
    )
    assert rows["best val/acc1"].strip() == "50 (step 10)"
    assert rows["best val/loss"].strip() == "2 (step 10)"


@needs("mlflow")
def test_a_run_in_mlflow(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config("tracking.mlflow=true")
    warnings: list[str] = []
    tracker = start(config, warnings)
    for step in (10, 20):
        tracker.log(step, {"train/loss": 1 / step, "train/lr": 0.1})
    tracker.log(20, {"val/acc1": 55.0})
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "state.pt").write_bytes(b"weights")
    record = tracker.close("FINISHED", {"best": tmp_path / "best"})

    assert warnings == []
    assert record is not None
    assert record.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"  # absolute
    client = mlflow_client(record.tracking_uri)
    run = client.get_run(record.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert run.data.params == {key: str(value) for key, value in flat_settings(config).items()}
    assert TAGS.items() <= run.data.tags.items()
    history = client.get_metric_history(record.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(10, 0.1), (20, 0.05)]
    assert {a.path for a in client.list_artifacts(record.run_id)} == {"best", "config.yaml"}
    assert (tmp_path / "runs" / "mlartifacts" / record.run_id).is_dir()

    # The same command again: the same run resumes, and no step is logged twice.
    again = start(config, warnings)
    again.log(20, {"train/loss": 9.0, "val/acc1": 9.0})
    again.log(30, {"train/loss": 0.04})
    where = record.tracking_uri, record.experiment_id, record.run_id
    assert again.close("KILLED", {}) == RunRecord(*where, journal_size(config), "tiny", "KILLED")
    history = client.get_metric_history(record.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(10, 0.1), (20, 0.05), (30, 0.04)]
    assert client.get_metric_history(record.run_id, "val/acc1")[0].value == 55.0
    assert client.get_run(record.run_id).info.status == "KILLED"

    # Side by side with a run of another config.
    other = tiny_config("tracking.mlflow=true", "name=other", "optim.base_lr=0.8")
    tracker = start(other)
    tracker.log(10, {"val/acc1": 60.0})
    second = tracker.close("FINISHED", {})
    assert second is not None
    rows = compare(["tiny", str(other.run_dir), second.run_id], tmp_path / "runs").splitlines()
    assert rows[0].split() == ["tiny", "other", "other"]
    cells = {row.rsplit("  ", 1)[0].split("  ")[0]: row.split() for row in rows}
    assert cells["optim.base_lr"] == ["optim.base_lr", "0.4", "0.8", "0.8"]
    assert "optim.momentum" not in cells  # the same in all
    assert "best val/acc1" in cells
    assert "55 (step 20)" in compare(["tiny"], tmp_path / "runs")
    with pytest.raises(UserError, match="nobody: neither a run folder in"):
        compare(["nobody"], tmp_path / "runs")
    with pytest.raises(UserError, match="not a run folder, and there is no"):
        compare(["nobody"], tmp_path / "elsewhere")


def journal_size(config: Config) -> int:
    return (config.run_dir / "journal.jsonl").stat().st_size


@needs("mlflow")
def test_a_copied_run_folder_is_another_run_in_mlflow(
    tiny_config: Callable[..., Config],
) -> None:
    config, copy = (
        tiny_config("tracking.mlflow=true"),
        tiny_config("tracking.mlflow=true", "name=copy"),
    )
    tracker = start(config)
    tracker.log(1, {"train/loss": 1.0})
    first = tracker.close("FINISHED", {})
    shutil.copytree(config.run_dir, copy.run_dir)
    tracker = start(copy)
    tracker.log(2, {"train/loss": 0.5})
    second = tracker.close("FINISHED", {})
    assert first is not None
    assert second is not None
    client = mlflow_client(first.tracking_uri)
    for run, steps in ((first, [1]), (second, [1, 2])):  # what was before it is its own past, too
        history = client.get_metric_history(run.run_id, "train/loss")
        assert [point.step for point in history] == steps
    assert client.get_run(second.run_id).info.run_name == "copy"
    # The original resumes with its own; as does one whose record is of an older version.
    replace(first, name="").write(config.run_dir)
    again = start(config).close("FINISHED", {})
    assert again is not None
    assert again.run_id == first.run_id


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health"):
        return True
    return False


@pytest.mark.slow
@needs("mlflow")
def test_a_real_server_whose_artifact_store_fails(
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Metrics, params and status arrive in one run; nothing tells the password in the URI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "no-folder").write_text("so that nothing can be stored below it")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--no-serve-artifacts", "--default-artifact-root", f"{tmp_path}/no-folder"]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: answers(port), "the server did not start")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        config = tiny_config("tracking.mlflow=true")
        warnings: list[str] = []
        tracker = start(config, warnings)
        tracker.log(1, {"train/loss": 1.0})
        record = tracker.close("FINISHED", {"best": config.run_dir})
        assert record is not None
        assert record.tracking_uri == f"http://127.0.0.1:{port}"
        client = mlflow_client(record.tracking_uri)
        run = client.get_run(record.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.metrics == {"train/loss": 1.0}
        assert run.data.params["optim.base_lr"] == "0.4"
        assert len(client.search_runs([record.experiment_id])) == 1
        assert sum("was not uploaded" in line for line in warnings) == len(warnings) == 2
        told = [*warnings, *capfd.readouterr()]
        for text in (*told, *(path.read_text() for path in config.run_dir.iterdir())):
            assert "secret" not in text
        assert "1 (step" not in compare(["tiny"], tmp_path / "runs")
        with pytest.raises(UserError, match=f"nor a run id in {record.tracking_uri}; give"):
            compare(["nobody"], tmp_path / "runs")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(HANG_SECONDS)


@needs("mlflow")
def test_a_password_reaches_the_server_and_nothing_else(
    tiny_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    logins = set()

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            logins.add(self.headers["Authorization"])
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = tiny_config("tracking.mlflow=true")
    warnings: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            at = f"127.0.0.1:{server.server_port}"
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s%40cret@{at}")
            start(config, warnings).close("FINISHED", {})
        finally:
            server.shutdown()
    start(config, warnings).close("FINISHED", {})  # the server has gone
    assert logins == {"Basic " + b64encode(b"me:s@cret").decode()}
    told = [*warnings, *capfd.readouterr(), caplog.text]
    assert any(at in text for text in told)
    assert not any("cret" in text for text in told)


@needs("mlflow")
def test_a_warning_has_no_password(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgres-of-no-kind://me:secret@db.example/mlflow")
    warnings: list[str] = []
    start(tiny_config("tracking.mlflow=true"), warnings).close("FINISHED", {})
    (warning,) = warnings
    assert "'postgres-of-no-kind://db.example/mlflow'" in warning


@needs("mlflow")
def test_a_dead_server_costs_a_warning_and_no_record(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # closed again below: nobody listens
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = tiny_config("tracking.mlflow=true")
    warnings: list[str] = []
    tracker = start(config, warnings)
    began = time.monotonic()
    tracker.log(1, {"train/loss": 1.0})
    assert time.monotonic() - began < 2  # logging does not wait: MLflow's import alone takes longer
    assert tracker.close("FINISHED", {}) is None
    assert any("training continues" in line for line in warnings)
    assert "train/loss" in (config.run_dir / "journal.jsonl").read_text()

    # The server is back (here: the local database): the next start sends what it missed.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    record = start(config, warnings).close("FINISHED", {})
    assert record is not None
    client = mlflow_client(record.tracking_uri)
    assert client.get_metric_history(record.run_id, "train/loss")[0].value == 1.0


def test_without_mlflow_training_continues(
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is told once; what MLflow alone can do is one line."""
    monkeypatch.setitem(sys.modules, "mlflow", None)  # Python's own way to forbid an import
    config = tiny_config("tracking.mlflow=true", "train.epochs=1")
    assert train(config, "test", Interrupt()) is Outcome.FINISHED
    said = capsys.readouterr().out
    missing = "Python package mlflow: not installed; pip install mlflow"
    assert said.count(f"MLflow: {missing}; training continues, journal.jsonl has the record") == 1
    assert "MLflow run" not in said
    assert [step for step, _ in losses(config.run_dir / "journal.jsonl")] == [1, 2, 3]
    (tmp_path / "runs/mlflow.db").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "tiny", "--run-root", str(tmp_path / "runs")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"resnet-dist: {missing}\n"

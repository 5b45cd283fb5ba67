"""The record of a run: RUN/journal.jsonl is the truth, and mirror.py shows it to MLflow.

    {"step": 440, "time_ms": 1795771800000, "metrics": {"train/loss": 1.25, ...}}

metrics.py has the names. A resumed run logs no step twice.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.tracking.mirror import Mirror, RunRecord


class Tracker:
    """Writes metrics down. Made on every rank; only the one that `records` does anything."""

    def __init__(
        self,
        config: Config,
        tags: Mapping[str, str],
        records: bool,
        warn: Callable[[str], None],
    ):
        self.records = records
        self.run_dir = config.run_dir
        self._last_step: dict[str, int] = {}
        self._mirror: Mirror | None = None
        if not records:
            return
        self._journal = _Journal(self.run_dir / "journal.jsonl", self._last_step, warn)
        if config.tracking.mlflow:
            self._mirror = Mirror(config, tags, warn)
            self._mirror.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of `step`; what an earlier try of this run logged already is skipped."""
        if not self.records:
            return
        new = {name: value for name, value in metrics.items() if step > self._last(name)}
        if new:
            self._last_step.update(dict.fromkeys(new, step))
            record = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": new}
            self._journal.write(json.dumps(record) + "\n")

    def close(self, status: str, artifacts: Mapping[str, Path]) -> RunRecord | None:
        """Ends the record: MLflow's status ("FINISHED", "KILLED", "FAILED"), name -> artifact.

        Waits for the mirror, at most DRAIN_SECONDS. Returns the MLflow run, if there is one. Raises
        nothing: it would hide what ended the run.
        """
        if not self.records:
            return None
        self._journal.close()
        if self._mirror is not None:
            self._mirror.finish(status, artifacts)
        with contextlib.suppress(OSError, ValueError, TypeError):
            return RunRecord.read(self.run_dir)
        return None

    def _last(self, name: str) -> int:
        return self._last_step.get(name, -1)


class _Journal:
    """journal.jsonl. A line that the disk does not take waits in memory for the next one."""

    def __init__(self, path: Path, last_step: dict[str, int], warn: Callable[[str], None]):
        """Notes the last step of each metric, and cuts a torn last line."""
        self._path = path
        self._warn = warn
        self._warned = False
        self._unwritten = b""
        self._whole = 0  # bytes that are on the disk
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with open(path, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self._whole += len(line)
                last_step.update(dict.fromkeys(record["metrics"], record["step"]))
        os.truncate(self._descriptor, self._whole)

    def write(self, line: str) -> None:
        self._unwritten += line.encode()
        try:
            self._flush()
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"warning: {self._path}: not written: {error.strerror}; training goes on, and "
                    "its lines are kept in memory until they can be written"
                )
            self._warned = True

    def _flush(self) -> None:
        """Each time from where the disk is known to have it all: a failed fsync may have lost it,
        and a full disk may have taken a part."""
        done = 0
        while done < len(self._unwritten):
            done += os.pwrite(self._descriptor, self._unwritten[done:], self._whole + done)
        # Before a checkpoint of the same step can be: a resumed run logs no step again.
        os.fsync(self._descriptor)
        self._whole += done
        self._unwritten = b""

    def close(self) -> None:
        try:
            self._flush()
        except OSError as error:
            lines = self._unwritten.count(b"\n")
            self._warn(f"warning: {self._path}: {lines} lines are lost: {error.strerror}")
        with contextlib.suppress(OSError):  # it has been flushed, or warned of
            os.close(self._descriptor)

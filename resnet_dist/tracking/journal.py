"""Writes a run's metrics to RUN/journal.jsonl, the authoritative record of the run.

    {"step": 440, "time_ms": 1795771800000, "metrics": {"train/loss": 1.25, ...}}

metrics.py has the names of the metrics, and mirror.py copies the journal to MLflow. A resumed run
does not log a step again. JSON has neither NaN nor infinity: a value that is not finite is null.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.tracking.mirror import Mirror, RunRecord


class Tracker:
    """Records metrics. Created on every rank, but does nothing unless `records` is true."""

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
        """Records the metrics of `step`, except those that this run logged before a restart."""
        if not self.records:
            return
        new = {name: value for name, value in metrics.items() if step > self._last(name)}
        if new:
            self._last_step.update(dict.fromkeys(new, step))
            finite = {name: value if math.isfinite(value) else None for name, value in new.items()}
            record = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": finite}
            self._journal.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self, status: str, artifacts: Mapping[str, Path]) -> RunRecord | None:
        """Closes the journal and the MLflow run. Returns the record of the MLflow run, if any.

        status: MLflow's "FINISHED", "KILLED" or "FAILED". artifacts: name -> path. Waits at most
        DRAIN_SECONDS for the mirror. Does not raise, because an exception from here would hide the
        one that ended the run.
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
    """journal.jsonl. Keeps lines that cannot be written in memory and retries with the next one."""

    def __init__(self, path: Path, last_step: dict[str, int], warn: Callable[[str], None]):
        """Reads the last step of each metric into `last_step`, and removes an incomplete last
        line."""
        self._path = path
        self._warn = warn
        self._warned = False
        self._unwritten = b""
        self._whole = 0  # bytes known to be on disk
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
                    f"warning: {self._path}: not written: {error.strerror}; training continues, "
                    "and the lines are kept in memory until they can be written"
                )
            self._warned = True

    def _flush(self) -> None:
        """Writes all unwritten lines, starting at the last byte known to be on disk.

        A failed fsync may have lost what was written after that byte, and a full disk may have
        accepted only some of it.
        """
        done = 0
        while done < len(self._unwritten):
            done += os.pwrite(self._descriptor, self._unwritten[done:], self._whole + done)
        # The lines must be on disk before a checkpoint of the same step is, because a run that
        # resumes from that checkpoint does not log the step again.
        os.fsync(self._descriptor)
        self._whole += done
        self._unwritten = b""

    def close(self) -> None:
        try:
            self._flush()
        except OSError as error:
            lines = self._unwritten.count(b"\n")
            self._warn(f"warning: {self._path}: {lines} lines were lost: {error.strerror}")
        with contextlib.suppress(OSError):  # already flushed, or already warned about
            os.close(self._descriptor)

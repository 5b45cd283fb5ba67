"""Tries the ways to decode JPEGs on this GPU, once per GPU model and library versions.

    python -m resnet_dist.data.load.probe [--device cuda:0] [--output FILE] [--keep RUN_ROOT/.index]

Why: nvImageCodec 0.9.0 crashes on an H100 or B200 when it decodes windows (nvImageCodec issue 55),
and the hardware JPEG decoder changed pixels in 134 of 200 repeats on an H100 (torchcodec issue
1634, torchvision issue 9606). Only a trial tells whether a given machine is affected.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch

import resnet_dist
from resnet_dist.data.load.dali import DALI_VERSION
from resnet_dist.data.load.decoding import WAYS, Decoding, Report, Trial
from resnet_dist.data.load.probe_way import READY
from resnet_dist.files import replace_file
from resnet_dist.process import set_up_process

PROBE_VERSION = "3"  # a new version makes older reports invalid
LIMIT_SECONDS = 60.0  # for all ways together
WAY_LIMIT_SECONDS = 20.0
KILL_SECONDS = 5.0
# Signals of a crash. Others come from a scheduler, a user or the out-of-memory killer.
FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
# How torch, CUDA, DALI, nvJPEG, C++, Python and the system report a lack of resources. That is not
# the decoder's fault, and the next start may have enough.
OUT_OF_RESOURCES = re.compile(
    r"out.of.memory|memory.?(allocat|error)|bad_?alloc|alloc(at\w+)?.(failure|failed|error)"
    r"|(can.?t|cannot|unable to|failed to|could not) allocate|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|start new thread|temporarily unavailable|no space left|too many open files|\bECC\b",
    re.IGNORECASE,
)


def versions_of(device: torch.device) -> dict[str, str]:
    """Returns the versions on which it may depend whether a way of decoding works."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "probe": PROBE_VERSION,
        "gpu": gpu,
        "driver": _driver(),
        "dali": DALI_VERSION,
        "nvimagecodec": _version_of("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
        "nvjpeg": _version_of("nvidia-nvjpeg", "nvidia-nvjpeg-cu12"),
    }


def _driver() -> str:
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        words = [word for word in line.split() if word[:1].isdigit() and "." in word]
    except (OSError, IndexError):  # missing in some containers and in WSL
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
            words = done.stdout.split() if done.returncode == 0 else []
        except (OSError, subprocess.TimeoutExpired):
            words = []
    return next(iter(words), "unknown")


def _version_of(*packages: str) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def report_of(
    device: torch.device,
    folder: Path,
    say: Callable[[str], None],
    ways: Sequence[Decoding] = WAYS,
    try_ways: Callable[[torch.device, Sequence[Decoding]], Iterable[tuple[str, Trial]]]
    | None = None,
) -> Report:
    """Returns the trials of `ways`, and perhaps of others, on this GPU.

    Ways without a trial in `folder` are tried now, in the given order, and each trial is kept there
    (except "not tried").
    """
    found = versions_of(device)
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"decoding-{key}.json"
    kept = _read(path, found)
    missing = [way for way in ways if str(way) not in kept]
    if not missing:
        return kept
    say(
        f"probing {len(missing)} of {len(WAYS)} JPEG decoders of {found['gpu']} (driver "
        f"{found['driver']}, DALI {found['dali']}), once, up to {LIMIT_SECONDS:.0f} s"
    )
    failure = None
    for name, trial in (try_ways or probe)(device, missing):
        say(f"  {describe_trial(name, trial)}")
        if trial.verdict != "not tried":
            failure = _keep(path, found, {name: trial})
        kept[name] = trial
    if failure is not None:
        say(f"warning: {path}: cannot be written: {failure}; the next start will probe again")
    return kept


def _keep(path: Path, found: Mapping[str, str], seen: Report) -> str | None:
    """Adds trials to the report on disk. Returns why that failed, or None."""
    ways = {name: asdict(trial) for name, trial in (_read(path, found) | seen).items()}
    text = json.dumps({"versions": found, "ways": ways}, indent=1) + "\n"
    try:
        replace_file(path, text)
    except OSError as error:
        return error.strerror
    return None


def _read(path: Path, found: Mapping[str, str]) -> Report:
    """Reads a report; it is empty if there is none or if it is damaged."""
    try:
        content = json.loads(path.read_text())
        if content["versions"] != found:
            return {}
        return {name: Trial(**trial) for name, trial in content["ways"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def probe(
    device: torch.device,
    ways: Sequence[Decoding] = WAYS,
    limit_seconds: float = LIMIT_SECONDS,
    way_limit_seconds: float = WAY_LIMIT_SECONDS,
    options: Sequence[str] = (),
) -> Iterator[tuple[str, Trial]]:
    """Tries ways of decoding, each in a process of its own that has way_limit_seconds.

    limit_seconds: for all of them together. options: further arguments for probe_way.
    """
    if device.type == "cuda" and device.index is None:  # the current device is this process's own
        device = torch.device("cuda", torch.cuda.current_device())
    ends = time.monotonic() + limit_seconds
    for way in ways:
        if ends - time.monotonic() < way_limit_seconds:  # a shorter trial would prove nothing
            yield str(way), Trial("not tried", said="no time was left")
            continue
        command = [sys.executable, "-m", "resnet_dist.data.load.probe_way", str(WAYS.index(way))]
        command += ["--device", str(device), "--limit", str(way_limit_seconds), *options]
        yield str(way), run_apart(command, way_limit_seconds)


def run_apart(command: Sequence[str], limit_seconds: float) -> Trial:
    """Runs a command that prints READY and then a Trial as JSON; returns what came of it."""
    code = str(Path(resnet_dist.__file__).parent.parent)
    paths = [code, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                # Ctrl-C in the terminal must not reach it, as it would look like a crash.
                start_new_session=True,
            )
            returncode = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    returncode = process.wait(limit_seconds)
            finally:
                process.kill()
                # A process that waits for a broken driver cannot be killed, and is left behind.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(KILL_SECONDS)
                # A process that hangs has written nothing since READY.
                since_ready = time.time() - os.fstat(output.fileno()).st_mtime
            told, complained = _text(output), _text(errors)
    except OSError as error:
        return Trial("not tried", said=f"no process could be started: {error.strerror}")
    if returncode is None and since_ready < limit_seconds / 2:
        return Trial("not tried", said=f"too slow to start: ended after {limit_seconds:.0f} s")
    return judge(returncode, told, complained, limit_seconds)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def judge(returncode: int | None, output: str, errors: str, limit_seconds: float) -> Trial:
    """Derives the trial from how the process ended. returncode: None if it reached its limit."""
    lines = output.splitlines()
    if returncode == 0:
        with contextlib.suppress(ValueError, TypeError, IndexError):
            return Trial(**json.loads(lines[-1]))
    if returncode is None:
        said, is_fault = f"no end after {limit_seconds:.0f} s", True
    elif returncode < 0:
        names = {one.value: one.name for one in signal.Signals}
        killer = names.get(-returncode, f"signal {-returncode}")
        said, is_fault = f"the process ended with {killer}", -returncode in FAULTS
    else:
        said, is_fault = _reason(errors), True
    if READY not in lines or not is_fault or OUT_OF_RESOURCES.search(errors):
        return Trial("not tried", said=said)
    return Trial("hung" if returncode is None else "crash", said=said)


def _reason(errors: str) -> str:
    """Returns the line of a traceback with the error. In DALI's it comes after "encountered:"."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    for number in reversed(range(len(lines) - 1)):
        if lines[number].endswith("encountered:"):
            return lines[number + 1][:200]
    return (lines or ["no reason given"])[-1][:200]


def describe_trial(name: str, trial: Trial) -> str:
    """Returns a row of the table of trials."""
    speed = "" if trial.images_per_sec is None else f"{trial.images_per_sec:,.0f} images/s, "
    return f"{name:<52} {trial.verdict:<9} {speed}{trial.said}"


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--output", type=Path, help="write the report as JSON")
    parser.add_argument("--keep", type=Path, help="keep the report for runs, in RUN_ROOT/.index")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for all ways")
    parser.add_argument(
        "--way-limit", type=float, default=WAY_LIMIT_SECONDS, help="seconds for one way"
    )
    parser.add_argument("--images", type=int, default=64, help="images per batch")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds to measure the speed of a way"
    )
    given = parser.parse_args()
    options = ["--images", str(given.images), "--seconds", str(given.seconds)]
    try_ways = partial(
        probe, limit_seconds=given.limit, way_limit_seconds=given.way_limit, options=options
    )
    if given.keep is None:
        report = dict(try_ways(given.device))
    else:
        say = partial(print, file=sys.stderr, flush=True)
        report = report_of(given.device, given.keep, say, try_ways=try_ways)
    for name, trial in report.items():
        print(describe_trial(name, trial))
    if given.output is not None:
        ways = {name: asdict(trial) for name, trial in report.items()}
        content = {"versions": versions_of(given.device), "ways": ways}
        given.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tries each way of decoding on this GPU, once per GPU and versions, and keeps what it saw.

    python -m resnet_dist.data.probe [--device cuda:0] [--output FILE] [--keep RUN_ROOT/.index]

The sums of what is known: nvImageCodec 0.9.0 ends the process on an H100 or B200 when it decodes
windows (nvImageCodec issue 55); the hardware JPEG decoder changed pixels in 134 of 200 repeats on
an H100 (torchcodec issue 1634, torchvision issue 9606). Which of it holds on a machine only trying
tells.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import resnet_dist
from resnet_dist.data.dali import DALI_VERSION
from resnet_dist.data.decoding import WAYS, Report, Trial
from resnet_dist.data.index_file import replace_file
from resnet_dist.data.probe_way import READY

PROBE_VERSION = "1"  # another one is another question: what is kept is asked anew
LIMIT_SECONDS = 60.0  # for all ways
WAY_LIMIT_SECONDS = 20.0
# The process's own fault. Other signals come from a scheduler, a user or the out-of-memory killer.
FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


def versions_of(device: torch.device) -> dict[str, str]:
    """What a way of decoding may work with, or not."""
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
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), "unknown")


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
    try_all: Callable[[torch.device], tuple[Report, bool]] | None = None,
) -> Report:
    """What the probe saw on this GPU: read from `folder`, or seen now and kept there."""
    found = versions_of(device)
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"decoding-{key}.json"
    kept = _read(path, found)
    if kept is not None:
        return kept
    say(
        f"probing the JPEG decoders of {found['gpu']} (driver {found['driver']}, DALI "
        f"{found['dali']}), once, up to {LIMIT_SECONDS:.0f} s"
    )
    report, is_whole = (try_all or probe)(device)
    for name, trial in report.items():
        say(f"  {describe(name, trial)}")
    if is_whole:
        content = {"versions": found, "ways": {name: asdict(t) for name, t in report.items()}}
        try:
            text = json.dumps(content, indent=1) + "\n"
            replace_file(path, lambda file: file.write(text.encode()))
        except OSError as error:
            say(f"warning: {path}: not kept: {error.strerror}; the next start probes again")
    return report


def _read(path: Path, found: Mapping[str, str]) -> Report | None:
    try:
        content = json.loads(path.read_text())
        if content["versions"] != found:
            return None
        report = {name: Trial(**trial) for name, trial in content["ways"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return report if {str(way) for way in WAYS} <= report.keys() else None


def probe(device: torch.device, options: Sequence[str] = ()) -> tuple[Report, bool]:
    """Tries all ways, each in a process of its own. Takes at most LIMIT_SECONDS.

    Returns what was seen, and whether it says something about the decoders, so that it is worth
    keeping: a GPU that this process may not use, or a request to stop, says nothing.
    """
    if device.type == "cuda" and device.index is None:  # another process has another current one
        device = torch.device("cuda", torch.cuda.current_device())
    report: Report = {}
    is_whole = True
    ends = time.monotonic() + LIMIT_SECONDS
    for number, way in enumerate(WAYS):
        left = ends - time.monotonic()
        if left < 1:
            report[str(way)] = Trial("not tried", said="no time was left")
            continue
        command = [sys.executable, "-m", "resnet_dist.data.probe_way", str(number)]
        command += ["--device", str(device), *options]
        trial = run_apart(command, min(left, WAY_LIMIT_SECONDS))
        if left < WAY_LIMIT_SECONDS and trial.said.startswith("hung"):
            trial = Trial("not tried", said="no time was left")  # it was not given its due
        report[str(way)] = trial
        if report[str(way)].verdict == "not tried":
            is_whole = False
    return report, is_whole


def run_apart(command: Sequence[str], limit_seconds: float) -> Trial:
    """Runs a command that prints READY and then a Trial as JSON, and tells how it ended."""
    code = str(Path(resnet_dist.__file__).parent.parent)
    paths = [code, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        # A session of its own: Ctrl-C in the terminal is for us, and would look like a crash there.
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_seconds,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        if READY not in text.splitlines():
            return Trial("not tried", said=f"not ready after {limit_seconds:.0f} s")
        return Trial("crash", said=f"hung: no end after {limit_seconds:.0f} s")
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        with contextlib.suppress(ValueError, TypeError, IndexError):
            return Trial(**json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode)
        last = f"the process ended with {killer.name}"
        if killer not in FAULTS:
            return Trial("not tried", said=last)
    out_of_memory = "out of memory" in last.lower() or "memory allocation" in last.lower()
    if READY not in lines or out_of_memory:
        return Trial("not tried", said=last)
    return Trial("crash", said=last)


def describe(name: str, trial: Trial) -> str:
    speed = "" if trial.images_per_sec is None else f"{trial.images_per_sec:,.0f} images/s, "
    return f"{name:<52} {trial.verdict:<9} {speed}{trial.said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--output", type=Path, help="also as JSON")
    parser.add_argument(
        "--keep", type=Path, help="a folder for runs to find it in, RUN_ROOT/.index"
    )
    parser.add_argument("--images", type=int, default=64, help="in a batch")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the speed of a way")
    given = parser.parse_args()
    options = ["--images", str(given.images), "--seconds", str(given.seconds)]
    try_all = partial(probe, options=options)
    if given.keep is None:
        report, _ = try_all(given.device)
    else:
        report = report_of(given.device, given.keep, print, try_all)
    for name, trial in report.items():
        print(describe(name, trial))
    if given.output is not None:
        ways = {name: asdict(trial) for name, trial in report.items()}
        content = {"versions": versions_of(given.device), "ways": ways}
        given.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

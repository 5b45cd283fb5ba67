"""The ways to decode images, and the choice of one of them on a GPU.

A GPU's decoders are not simply trusted: some combinations of driver, GPU and library versions crash
or silently change pixels. probe.py tries each way in a process of its own; this module chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from resnet_dist.config import Config

DEFAULT_HW_LOAD = 0.65  # DALI's default: hardware engine and CUDA cores take equally long
FAST_ENOUGH = 0.95  # of the fastest: a smaller difference is noise, and the order of WAYS decides


@dataclass(frozen=True)
class Decoding:
    """One way to decode images. The pixels of two ways differ in the last bits."""

    # What is decoded: the crop window with the margin that resampling needs, or the whole image.
    extent: Literal["window", "image"] = "window"
    # "mixed": the GPU decodes, helped by the CPU. "host": the CPU decodes, the GPU does the rest.
    # "cpu": the CPU does everything.
    device: Literal["cpu", "mixed", "host"] = "cpu"
    # Share of a batch for the GPU's hardware JPEG decoder (A100, H100 and later).
    hw_decoder_load: float = 0.0
    # True: chroma is interpolated, as libjpeg does; False: each value is repeated.
    fancy_upsampling: bool = True

    def __str__(self) -> str:
        """Returns the name of this way in the plan, in checkpoints and in messages."""
        words = [{"cpu": "cpu", "mixed": "gpu", "host": "cpu before the gpu"}[self.device]]
        if self.extent == "image":
            words += ["whole images"]
        elif self.device != "cpu":
            words += ["windows"]
        if self.hw_decoder_load:
            words += [f"hardware decoder {self.hw_decoder_load:g}"]
        if not self.fancy_upsampling:
            words += ["plain upsampling"]
        return ", ".join(words)


# The default on a GPU without a probe. Windows crash on H100 and B200 with nvImageCodec 0.9.0
# (nvImageCodec issue 55), and the hardware decoder may change pixels (torchcodec issue 1634).
UNPROBED = Decoding("image", "mixed")
# For a GPU on which no way works: the CPU decodes, and the GPU does the rest.
HOST = Decoding("window", "host")
# The ways to try, in order of preference among equally fast ones. Interpolated chroma agrees with
# the CPU's; as it may slow down the hardware decoder, that is also tried without it.
WAYS = (
    UNPROBED,
    Decoding("window", "mixed"),
    Decoding("image", "mixed", DEFAULT_HW_LOAD),
    Decoding("window", "mixed", DEFAULT_HW_LOAD),
    Decoding("image", "mixed", DEFAULT_HW_LOAD, fancy_upsampling=False),
    Decoding("window", "mixed", DEFAULT_HW_LOAD, fancy_upsampling=False),
)


@dataclass(frozen=True)
class Trial:
    """What the probe found out about one way.

    verdict: "ok"; "crash" (the process died, or DALI raised an error); "hung"; "changed"
    (different pixels when repeated); "differs" (from the CPU's pixels, by more than the tolerance);
    "not tried".
    """

    verdict: Literal["ok", "crash", "hung", "changed", "differs", "not tried"]
    images_per_sec: float | None = None
    said: str = ""  # the reason, or the figures


UNTRIED = Trial("not tried")
BROKEN = ("crash", "hung", "changed", "differs")
Report = dict[str, Trial]  # str(way) -> its trial on one kind of machine


def allowed_ways(config: Config) -> dict[Decoding, Decoding]:
    """Returns the ways that the config allows, each with the way that is probed for it.

    They differ in hw_decoder_load: any share is probed as DEFAULT_HW_LOAD.
    """
    extent, load = config.data.decode, config.data.hw_decoder_load
    return {
        replace(way, hw_decoder_load=load) if load else way: way
        for way in WAYS
        if extent in ("auto", way.extent)
        and (load is None or bool(load) == bool(way.hw_decoder_load))
    }


def is_probed(config: Config) -> bool:
    """Whether the config leaves the choice to the probe."""
    return config.data.decode == "auto" and config.data.hw_decoder_load is None


def choose(config: Config, reports: Sequence[Report], recorded: str | None) -> tuple[Decoding, str]:
    """Chooses the way for all machines. Returns it and the reason.

    reports: one per kind of machine; a way that is missing was not tried there. recorded: str() of
    the way that the run has used so far, if any.

    Raises:
        UserError: the config demands a way that is broken on one of the machines.
    """
    trials = {
        asked: [report.get(str(way), UNTRIED) for report in reports]
        for asked, way in allowed_ways(config).items()
    }
    load = config.data.hw_decoder_load
    for way, seen in trials.items():
        if str(way) == recorded and not any(trial.verdict in BROKEN for trial in seen):
            is_sound = all(trial.verdict == "ok" for trial in seen)
            return way, f"as before in this run; {'sound' if is_sound else 'not probed'} here"
    # The slowest machine determines the speed of a way.
    speeds = {
        way: min(trial.images_per_sec or 0.0 for trial in seen)
        for way, seen in trials.items()
        if all(trial.verdict == "ok" for trial in seen)
    }
    for way, speed in speeds.items():
        if speed >= FAST_ENOUGH * max(speeds.values()):
            return way, f"{speed:,.0f} images/s when this GPU's decoders were probed"
    safest, seen = next(iter(trials.items()))
    broken = [trial for trial in seen if trial.verdict in BROKEN]
    if not broken:
        return safest, "not probed"
    why = f"{broken[0].verdict}: {broken[0].said}"
    if is_probed(config):
        return HOST, f"the CPU's decoder, because none of this GPU's works correctly ({why})"
    key, nearest = ("data.decode", "auto") if load is None else ("data.hw_decoder_load", None)
    raise config.invalid(key, f"was found broken when this GPU was probed ({why})", nearest)

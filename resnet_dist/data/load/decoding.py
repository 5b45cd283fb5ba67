"""How encoded images become pixels, and which of the ways is taken on a GPU.

A GPU's decoders are not taken on trust: some driver, GPU and library versions together crash, or
change pixels without a word. probe.py tries each way in a process of its own; here one is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from resnet_dist.config import Config

DEFAULT_HW_LOAD = 0.65  # DALI's own default: the hardware engine and the CUDA cores end together
FAST_ENOUGH = 0.95  # of the fastest way: less than 5 % is noise, and the order of WAYS decides


@dataclass(frozen=True)
class Decoding:
    """One way of decoding. Pixels of two ways differ in the last bits."""

    # The crop window and the margin that resampling reaches, or the whole image.
    extent: Literal["window", "image"] = "window"
    # "mixed": the GPU, with the CPU's help. "host": the CPU, and the GPU does all else. "cpu": the
    # CPU does everything.
    device: Literal["cpu", "mixed", "host"] = "cpu"
    # Share of a batch for the GPU's own JPEG decoder (A100, H100 and later), not its CUDA cores.
    hw_decoder_load: float = 0.0
    # Chroma is interpolated, as libjpeg does it; otherwise each value is repeated.
    fancy_upsampling: bool = True

    def __str__(self) -> str:
        """As the plan, a checkpoint and messages name it."""
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


# What a GPU does until a probe has said otherwise. Windows crash on H100 and B200 with nvImageCodec
# 0.9.0 (nvImageCodec issue 55); the hardware decoder may change pixels (torchcodec issue 1634).
UNPROBED = Decoding("image", "mixed")
# Where no way of the GPU works: the CPU's decoder, and the GPU does the rest.
HOST = Decoding("window", "host")
# What is tried, in order of preference: of ways that are as fast, the first. Interpolated chroma
# agrees with the CPU's; the hardware decoder may lose speed by it, so it is tried without, too.
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
    """What the probe saw of one way.

    verdict: "ok"; "crash" (the process died, or DALI raised an error); "hung"; "changed" (other
    pixels when repeated); "differs" (from the CPU's pixels, beyond the tolerance); "not tried".
    """

    verdict: Literal["ok", "crash", "hung", "changed", "differs", "not tried"]
    images_per_sec: float | None = None
    said: str = ""  # the reason, or the figures


UNTRIED = Trial("not tried")
BROKEN = ("crash", "hung", "changed", "differs")
Report = dict[str, Trial]  # str(way) -> what was seen of it, on one kind of machine


def allowed_ways(config: Config) -> dict[Decoding, Decoding]:
    """The ways that the config allows: as it asks for them -> as they are probed."""
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
    """The way that all machines take, and why.

    reports: one for each kind of machine; a way that is missing from one was not tried there.
    recorded: str() of the run's way so far, if any.

    Raises:
        UserError: the config asks for a way that is broken on one of them.
    """
    trials = {
        asked: [report.get(str(way), UNTRIED) for report in reports]
        for asked, way in allowed_ways(config).items()
    }
    load = config.data.hw_decoder_load
    for way, seen in trials.items():
        if str(way) == recorded and not any(trial.verdict in BROKEN for trial in seen):
            is_sound = all(trial.verdict == "ok" for trial in seen)
            return way, f"as this run has had it, {'and sound' if is_sound else 'not probed'} here"
    # The slowest machine sets the pace.
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
        return HOST, f"the CPU's decoder, as none of this GPU's is sound ({why})"
    key, nearest = ("data.decode", "auto") if load is None else ("data.hw_decoder_load", None)
    raise config.invalid(key, f"was found broken when this GPU was probed ({why})", nearest)

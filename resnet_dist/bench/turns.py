"""Lets contestants take turns, so that other load on the machine affects all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch

from resnet_dist.bench.quiet import Disturbance, root_of, undisturbed, wait_until_quiet
from resnet_dist.distributed import World

FIRST_CALLS = 2  # untimed: to compile, to allocate


@dataclass(frozen=True)
class Turn:
    """One measurement of one contestant."""

    value: float
    disturbance: Disturbance


def take_turns(
    contestants: Mapping[str, Callable[[], float]],
    runs: int,
    world: World | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[Turn]]:
    """Measures each contestant `runs` times: A B C, B C A, C A B, ...

    contestants: each returns its figure; the first call of each is a warm-up and not counted.
    world: of the ranks that measure together; with more than one, a collective.
    """
    for warm_up in contestants.values():
        warm_up()
    wait_until_quiet(root_of(world))
    names = list(contestants)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for run in range(runs):
        first = run % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(Turn(*undisturbed(contestants[name], world, say)))
    return turns


def repeated(
    run: Callable[[int], Any], world: World, turn_seconds: float, ready: int = 0
) -> Callable[[], float]:
    """Returns a function that measures the seconds of one repetition. A collective.

    Its first call finds out how many repetitions fill `turn_seconds`. run: takes the number of
    repetitions. ready: how many are untimed at the start of each turn, because they find their work
    done already.
    """
    count = 0

    def seconds(repetitions: int) -> float:
        run(ready)
        began = now(world)
        run(repetitions)
        return (now(world) - began) / repetitions

    def measure() -> float:
        nonlocal count
        if count:
            return seconds(count)
        run(FIRST_CALLS)
        each = seconds(FIRST_CALLS)
        # The ranks must agree, because they communicate.
        count = max(1, *world.gather(round(turn_seconds / each)))
        return each

    return measure


def many(once: Callable[[], Any]) -> Callable[[int], None]:
    """Returns a function that calls `once` a given number of times."""

    def run(count: int) -> None:
        for _ in range(count):
            once()

    return run


def now(world: World) -> float:
    """Returns the time when all ranks and their devices have done their work. A collective."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)  # CPU-GPU sync point
    world.any(False)
    return time.perf_counter()


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        low, middle, high = quantiles(values, n=4) if len(values) > 1 else values * 3
        return cls(middle, low, high)

    def figures(self, digits: int = 3) -> dict[str, float]:
        return {key: round(value, digits) for key, value in asdict(self).items()}

    def text(self, digits: int = 1) -> str:
        return f"{self.low:,.{digits}f}..{self.high:,.{digits}f}"


def spread(turns: list[Turn]) -> Spread:
    return Spread.of([turn.value for turn in turns])


def ratio(turns: list[Turn], others: list[Turn]) -> Spread:
    """Returns how many times as large the values in `turns` are: of the ratios in each round."""
    pairs = zip(turns, others, strict=True)
    return Spread.of([mine.value / other.value for mine, other in pairs])


def figures_of(turns: list[Turn], digits: int = 3) -> dict[str, Any]:
    """Returns what goes into the JSON: each value, the spread, and what else the machine did."""
    return {
        **spread(turns).figures(digits),
        "values": [round(turn.value, digits) for turn in turns],
        "steal_pct": [turn.disturbance.steal_pct for turn in turns],
        "others_pct": [turn.disturbance.others_pct for turn in turns],
        "repeats": sum(turn.disturbance.repeats for turn in turns),
    }

"""Which checkpoints of a run stay on disk: a function of their steps, tested as a table."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The best one stays always; see `kept` for the rest."""

    newest: int = 2
    every_steps: int | None = None  # one in so many steps stays for good; None: none

    def kept(self, sound: Mapping[int, bool], best: int | None) -> set[int]:
        """The steps that stay, of those in `sound`.

        sound: step -> whether the state of that step was worth going on from. The newest sound
        ones stay as well as the newest ones, so that a run that explodes does not push them out.
        """
        steps = sorted(sound)
        return {
            *steps[-self.newest :],
            *[step for step in steps if sound[step]][-self.newest :],
            *(step for step in steps if self.every_steps and step % self.every_steps == 0),
            *(step for step in steps if step == best),
        }

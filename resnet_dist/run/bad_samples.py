"""Images that a run could not read: each told once, counted, and within data.max_bad_samples.

RUN/bad_samples.tsv keeps them, in the form of DATA/bad_samples.tsv (see data/index/quarantine.py).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.data.index.index import Index, name_of
from resnet_dist.data.index.quarantine import QUARANTINE, read_quarantine, write_quarantine
from resnet_dist.distributed import World
from resnet_dist.errors import UserError

TOLD_AT_ONCE = 20


class BadSamples:
    def __init__(self, config: Config, world: World, say: Callable[[str], None]) -> None:
        """say: prints a line, on rank 0. A collective."""
        self._config = config
        self._world = world
        self._say = say
        # By name, relative to data.root; the same on all ranks. What an earlier try of this run
        # met counts, too.
        self._bad = world.on_main(lambda: read_quarantine(config.run_dir))

    @property
    def count(self) -> int:
        return len(self._bad)

    def share(self, index: Index, found: Mapping[int, str]) -> None:
        """Every rank says which samples of `index` it found bad; rank 0 tells the new ones. A
        collective."""
        mine = named(index, found, self._config.data.root)
        new: dict[str, str] = {}
        for part in self._world.gather({n: why for n, why in mine.items() if n not in self._bad}):
            new |= part
        if not new:
            return
        self._bad |= new
        for name in sorted(new)[:TOLD_AT_ONCE]:
            self._say(f"bad sample: {name}: {new[name]}")
        if len(new) > TOLD_AT_ONCE:
            self._say(f"bad sample: and {len(new) - TOLD_AT_ONCE} more")
        self._world.on_main(self._write)

    def _write(self) -> None:
        try:
            write_quarantine(self._config.run_dir, self._bad)
        except OSError as error:  # a full disk must not end a run over its log
            self._say(f"warning: bad_samples.tsv is not written: {error.strerror}")

    @property
    def too_many(self) -> bool:
        return self.count > self._config.data.max_bad_samples

    def check_budget(self) -> None:
        """Raises UserError, on all ranks alike, where there are too many."""
        if self.too_many:
            name, why = next(iter(self._bad.items()))
            data = self._config.data
            raise UserError(
                f"{self.count} images cannot be read, more than data.max_bad_samples="
                f"{data.max_bad_samples}, such as {name} ({why}): they stand in "
                f"{self._config.run_dir / QUARANTINE}; mend them and remove it, or raise the limit"
            )


def named(index: Index, bad: Mapping[int, str], root: str) -> dict[str, str]:
    """The same by name, see index.name_of. root: the data's."""
    return {name_of(index.paths[sample], Path(root)): why for sample, why in bad.items()}

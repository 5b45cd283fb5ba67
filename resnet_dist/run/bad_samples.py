"""The images that a run could not read: reported once, counted, limited by data.max_bad_samples.

They are kept in RUN/bad_samples.tsv, in the format of DATA/bad_samples.tsv (see
data/index/quarantine.py).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.data.index.index import Index, name_of
from resnet_dist.data.index.quarantine import QUARANTINE, read_quarantine, write_quarantine
from resnet_dist.distributed import World
from resnet_dist.errors import UserError

REPORTED_AT_ONCE = 20


class BadSamples:
    """The unreadable images of a run, the same on all ranks."""

    def __init__(self, config: Config, world: World, say: Callable[[str], None]) -> None:
        """A collective. say: prints a line on rank 0."""
        self._config = config
        self._world = world
        self._say = say
        # Image name, relative to data.root -> reason. Earlier starts of this run count too.
        self._bad = world.on_main(lambda: read_quarantine(config.run_dir))

    @property
    def count(self) -> int:
        return len(self._bad)

    def share(self, index: Index, found: Mapping[int, str]) -> None:
        """Collects the bad samples of `index` that each rank has found; rank 0 prints the new ones.

        A collective.
        """
        mine = named(index, found, self._config.data.root)
        new: dict[str, str] = {}
        for found_by_rank in self._world.gather(
            {n: why for n, why in mine.items() if n not in self._bad}
        ):
            new |= found_by_rank
        if not new:
            return
        self._bad |= new
        for name in sorted(new)[:REPORTED_AT_ONCE]:
            self._say(f"bad sample: {name}: {new[name]}")
        if len(new) > REPORTED_AT_ONCE:
            self._say(f"bad sample: and {len(new) - REPORTED_AT_ONCE} more")
        self._world.on_main(self._write)

    def _write(self) -> None:
        try:
            write_quarantine(self._config.run_dir, self._bad)
        except OSError as error:  # a full disk must not end a run over a log file
            self._say(f"warning: bad_samples.tsv cannot be written: {error.strerror}")

    @property
    def too_many(self) -> bool:
        return self.count > self._config.data.max_bad_samples

    def check_budget(self) -> None:
        """Raises UserError, on all ranks alike, if there are more than data.max_bad_samples."""
        if self.too_many:
            name, why = next(iter(self._bad.items()))
            data = self._config.data
            raise UserError(
                f"{self.count} images cannot be read, more than data.max_bad_samples="
                f"{data.max_bad_samples}, such as {name} ({why}); all are listed in "
                f"{self._config.run_dir / QUARANTINE}: repair them and remove that file, or raise "
                "the limit"
            )


def named(index: Index, bad: Mapping[int, str], root: str) -> dict[str, str]:
    """Returns `bad` keyed by image name (see index.name_of) instead of sample number.

    root: the root folder of the data.
    """
    return {name_of(index.paths[sample], Path(root)): why for sample, why in bad.items()}

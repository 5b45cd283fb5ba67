"""Writes a source as shards, with an index for each split.

The bytes are the same for any number of workers, and after any number of kills.

    DEST/prepare.json            what it is made from, and how; a second run must agree
    DEST/classes.txt             one class per line; a label is a line number, from 0
    DEST/bad_samples.tsv         images that cannot be read; they are in the shards all the same
    DEST/train/000000.tar ...    see shard_file.py
    DEST/train/index.arrow       and index.json, see index_file.py; written last
    DEST/val/                    the same
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL

from resnet_dist.data.index.index import Index, Shards, fingerprint_of, name_of
from resnet_dist.data.index.index_file import save_index
from resnet_dist.data.index.quarantine import QUARANTINE, read_quarantine, write_quarantine
from resnet_dist.data.index.shard_files import PREPARED
from resnet_dist.data.index.worker_pool import worker_pool
from resnet_dist.data.prepare.progress import ShardProgress
from resnet_dist.data.prepare.reencode import Limit
from resnet_dist.data.prepare.shard_file import ShardFacts, ShardTask, make_shard
from resnet_dist.data.prepare.sources import Source, open_source
from resnet_dist.errors import UserError
from resnet_dist.files import PARTIAL, replace_file

VERSION = 1
QUEUED_PER_WORKER = 2  # a task of 1000 images takes 100 kB, and there may be thousands


@dataclass(frozen=True)
class Settings:
    """What determines the bytes of the shards.

    Shards are cut by number of images, which is known before an image is read or re-encoded. So any
    worker can write any shard.
    """

    images_per_shard: int
    limit: Limit | None  # None: images are not re-encoded


def prepare_shards(
    source_root: Path,
    dest: Path,
    settings: Settings,
    workers: int,
    kind: str | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Writes what is missing in `dest`. Returns a summary in words.

    kind: of the source, see sources.py; None: recognized by its files. say: prints a line.

    Raises:
        UserError: the source cannot be used, `dest` cannot be written or contains other data, or
            the run was interrupted.
    """
    if dest.resolve().is_relative_to(source_root.resolve()):
        raise UserError(f"{dest}: is inside the source; give a folder outside")
    try:
        with worker_pool(workers) as pool:
            name, source = open_source(source_root, pool.map, kind)
        say(f"{source_root}: {name}")
        with _writing(dest), worker_pool(workers) as pool:  # locked until the last worker is done
            _claim(dest, source, settings)
            progress = ShardProgress(sum(len(s.labels) for s in source.splits.values()))
            tasks = _cut(source, dest, settings)
            facts = _make_all(pool, tasks, progress, QUEUED_PER_WORKER * workers)
            return _finish(dest, source, facts)
    except (BrokenProcessPool, MemoryError):
        raise UserError(
            f"{dest}: a worker ran out of memory or was killed; run again with fewer --workers"
        ) from None
    except KeyboardInterrupt:
        raise UserError(f"{dest}: interrupted; the same command resumes") from None


@contextmanager
def _writing(dest: Path) -> Iterator[None]:
    """Creates and locks `dest`. Without a lock on file systems that have none."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(dest, os.O_RDONLY)
        try:
            with suppress(OSError):
                _lock(dest, descriptor)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {error.strerror}") from None


def _lock(dest: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{dest}: another `prepare` is writing there; wait for it") from None


def _claim(dest: Path, source: Source, settings: Settings) -> None:
    """Records what `dest` is made from, or checks that it is the same as before."""
    images = {name: len(split.labels) for name, split in source.splits.items()}
    wanted = {"version": VERSION, "images": images, "source": source.fingerprint()}
    wanted |= asdict(settings)
    if settings.limit is not None:
        wanted["pillow"] = PIL.__version__  # its version affects the bytes too
    path = dest / PREPARED
    try:
        found = json.loads(path.read_bytes())
        odd = [key for key in wanted if found.get(key) != wanted[key]]
    except FileNotFoundError:
        if any(not name.startswith(".") for name in os.listdir(dest)):
            raise UserError(
                f"{dest}: not empty, and not made by `prepare`; give a new folder"
            ) from None
        replace_file(path, json.dumps(wanted, indent=1) + "\n")
    except (ValueError, AttributeError):
        raise UserError(f"{path}: damaged; give a new folder, or remove this one") from None
    else:
        if odd:
            raise UserError(
                f"{dest}: was made with {odd[0]} {json.dumps(found.get(odd[0]))}, now it is "
                f"{json.dumps(wanted[odd[0]])}; give a new folder"
            )
    classes = "".join(f"{name}\n" for name in source.classes)
    replace_file(dest / "classes.txt", os.fsencode(classes))
    for name in source.splits:
        (dest / name).mkdir(exist_ok=True)
        for partial in (dest / name).glob(f"{PARTIAL}*"):  # left by a killed run
            partial.unlink()


def _cut(source: Source, dest: Path, settings: Settings) -> Iterator[ShardTask]:
    for name, split in source.splits.items():
        count = len(split.labels)
        for number, start in enumerate(range(0, count, settings.images_per_shard)):
            stop = min(start + settings.images_per_shard, count)
            labels = split.labels[start:stop].tolist()
            yield ShardTask(
                path=dest.absolute() / name / f"{number:06}.tar",
                first=start,
                labels=labels,
                names=split.names[start:stop],
                class_names=[source.classes[label] for label in labels],
                images=split.images.cut(start, stop),
                bad={i: split.bad[i] for i in range(start, stop) if i in split.bad},
                limit=settings.limit,
            )


def _make_all(
    pool: ProcessPoolExecutor, tasks: Iterable[ShardTask], progress: ShardProgress, most: int
) -> dict[Path, ShardFacts]:
    """Makes all shards; returns their facts by path. most: tasks in the pool at a time."""
    left = iter(tasks)
    facts: dict[Path, ShardFacts] = {}
    running: dict[Future[tuple[ShardFacts, bool]], Path] = {}
    try:
        while True:
            for task in islice(left, most - len(running)):
                running[pool.submit(make_shard, task)] = task.path
            if not running:
                return facts
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                made, fresh = future.result()
                facts[running.pop(future)] = made
                progress.add(len(made.members), int(made.nbytes.sum()), fresh)
    finally:
        pool.shutdown(cancel_futures=True)
        progress.finish()


def _finish(dest: Path, source: Source, facts: Mapping[Path, ShardFacts]) -> str:
    """Writes the quarantine and the indexes."""
    indexes = {name: _index(dest, name, source, facts) for name in source.splits}
    bad = {
        name_of(index.paths[sample], dest): why
        for index in indexes.values()
        for sample, why in index.bad.items()
    }
    if len(bad) == sum(map(len, indexes.values())):
        name, why = next(iter(bad.items()))
        raise UserError(f"{dest}: none of {len(bad):,} images can be read, such as {name} ({why})")
    # `verify` may have added images in the meantime.
    write_quarantine(dest, {**read_quarantine(dest), **bad})
    for name, index in indexes.items():
        save_index(index, dest / name / "index.arrow", dest)
    counts = " and ".join(f"{len(index):,} {name}" for name, index in indexes.items())
    nbytes = sum(os.path.getsize(path) for path in facts)
    text = (
        f"{dest}: {counts} images of {len(source.classes):,} classes in {len(facts):,} shards, "
        f"{nbytes / 1e9:.2f} GB"
    )
    if "val" not in indexes:
        text += "; without val images: train with data.holdout_images"
    return text + (f"; {len(bad):,} cannot be read: {dest / QUARANTINE}" if bad else "")


def _index(dest: Path, split: str, source: Source, facts: Mapping[Path, ShardFacts]) -> Index:
    files = sorted(path for path in facts if path.parent.name == split)
    found = [facts[path] for path in files]
    starts = np.cumsum([0] + [len(one.members) for one in found])
    sizes = np.concatenate([one.sizes for one in found])
    paths = [f"{path}/{member}" for path in files for member in facts[path].members]
    labels, names = source.splits[split].labels, (name_of(path, dest) for path in paths)
    return Index(
        classes=source.classes,
        labels=labels,
        sizes=sizes,
        paths=paths,
        pixels=None,
        fingerprint=fingerprint_of(source.classes, names, labels, sizes),
        nbytes=np.concatenate([one.nbytes for one in found]),
        shards=Shards(
            files=tuple(map(str, files)),
            shard=np.repeat(np.arange(len(files), dtype=np.int32), np.diff(starts)),
            offset=np.concatenate([one.offsets for one in found]),
        ),
        bad={
            int(start) + i: why
            for start, one in zip(starts, found, strict=False)
            for i, why in one.bad.items()
        },
    )

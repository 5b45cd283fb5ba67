"""`verify`: decodes every image as training does, and reports which can be trained on, and how."""

import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO

import numpy as np
import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.formats import FORMATS, build_index, recognized
from resnet_dist.data.index.image_facts import ends_early, particulars
from resnet_dist.data.index.index import Index, name_of, notes_of
from resnet_dist.data.index.quarantine import QUARANTINE, escape, read_quarantine, write_quarantine
from resnet_dist.data.index.survey import describe_classes
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.reader import Reader
from resnet_dist.data.view.augment import Request, unchanged
from resnet_dist.errors import UserError, shortened
from resnet_dist.run.progress import REFRESH_SECONDS, duration

SPLITS = ("train", "val")
BATCH_PER_THREAD = 8
SEEN_PX = 8  # whole images are resized to this; only decoding matters
SYNSET = re.compile(r"(?:^|_)(n[0-9]{8})(?=_|$)")  # n01440764_10026, ..._n01440764
BAD = {"train": "replaced by a stand-in", "val": "counts as wrong"}
CANNOT_TRAIN = ("empty", "truncated", "corrupt", "unreadable", "class in one split")

MATTERS = (*CANNOT_TRAIN, "other class", "two classes", "in both splits")
NAMED = 10  # findings of a kind that matters, one by one


@dataclass(frozen=True)
class Finding:
    """Something to report about an image or a class."""

    split: str
    name: str  # relative to the root of the data: train/cat/1.jpg
    kind: str
    what: str  # what is wrong, and what it means for training

    def __str__(self) -> str:
        return f"{escape(self.name)}: {self.kind}: {self.what}"


@dataclass
class Split:
    """A split, and what has been found out about its images."""

    name: str
    index: Index
    root: Path
    digests: np.ndarray  # S32 [N]: SHA-256 of each image; empty if unreadable
    bad: dict[int, str] = field(default_factory=dict)  # sample -> reason

    def name_of(self, sample: int) -> str:
        return name_of(self.index.paths[sample], self.root)

    def class_of(self, sample: int) -> str:
        return self.index.classes[self.index.labels[sample]]


class _Findings:
    """Prints findings: those that matter one by one, the others as one line for each kind."""

    def __init__(self, say: Callable[[str], None], file: IO[str] | None) -> None:
        """file: gets a line for each finding."""
        self.counts: Counter[tuple[str, str]] = Counter()  # by kind and split
        self._first: dict[tuple[str, str], Finding] = {}
        self._say = say
        self._file = file

    def add(self, one: Finding) -> None:
        key = one.kind, one.split
        self.counts[key] += 1
        self._first.setdefault(key, one)
        if self._file is not None:
            print(escape(one.name), one.kind, escape(one.what), sep="\t", file=self._file)
        if one.kind in MATTERS and self.counts[key] <= NAMED:
            self._say(str(one))

    def finish(self) -> None:
        """Prints what has not been printed yet."""
        for (kind, split), count in self.counts.items():
            if kind not in MATTERS:
                one = self._first[kind, split]
                self._say(f"{split}: {count:,} {kind}, such as {escape(one.name)}: {one.what}")
            elif count > NAMED:
                self._say(f"{split}: {kind}: and {count - NAMED:,} more; --list FILE names them")


def verify(
    root: Path, data_format: str | None, threads: int, dry_run: bool, list_to: Path | None = None
) -> bool:
    """Prints what is special about the images, and the number of findings of each kind.

    data_format: as in DataConfig; None: recognized by the files in `root`. Unless dry_run,
    unreadable images are written to root/bad_samples.tsv, replacing its content. list_to: a file
    that gets a line for each finding.

    Returns whether all images can be trained on.

    Raises:
        UserError: there are no data, a shard or CIFAR file is damaged, or list_to cannot be
            written.
    """
    data_format = data_format or recognized(root)
    there = [name for name in SPLITS if FORMATS[data_format].has_split(root, name)]
    names = there if "train" in there else SPLITS
    indexes = {name: build_index(data_format, root, name, None) for name in names}
    count = sum(map(len, indexes.values()))
    classes = describe_classes(indexes["train"].classes)
    print(shortened(f"{root}: {data_format}, classes: {classes}"))
    if "val" not in indexes:
        print("note: there are no val images: train with data.holdout_images")
    for name, index in indexes.items():
        for note in notes_of(index, name):
            print(shortened(f"note: {note}"))
    if indexes["train"].pixels is not None:
        print(
            f"all {count:,} images of {data_format} can be trained on: records and labels are valid"
        )
        return True
    quarantined = read_quarantine(root)
    progress = _Progress(count)
    splits = []
    with _opened(list_to) as file:
        findings = _Findings(progress.say, file)
        for name, index in indexes.items():
            splits.append(Split(name, index, root, np.zeros(len(index), "S32")))
            for finding in _check_images(splits[-1], threads, progress):
                findings.add(finding)
        across = list(_differing_classes(*splits)) if len(splits) == len(SPLITS) else []
        for finding in (*sorted(_duplicates(splits), key=lambda one: one.name), *across):
            findings.add(finding)
    findings.finish()
    progress.finish()
    counts = findings.counts
    if counts:
        print(f"\n{_table(counts)}")
    bad = {one.name_of(sample): why for one in splits for sample, why in one.bad.items()}
    if said := _set_aside(root, bad, quarantined, dry_run):
        print(f"\n{said}")
    print(_verdict(count, len(bad), any(kind == CANNOT_TRAIN[-1] for kind, _ in counts)))
    return not any(kind in CANNOT_TRAIN for kind, _ in counts)


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[str] | None]:
    try:
        with nullcontext() if path is None else open(path, "w", errors="surrogateescape") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


class _InspectingReader(Reader):
    """A Reader that also inspects the bytes, in the threads that read them."""

    def __init__(self, split: Split, threads: int) -> None:
        super().__init__(split.index, threads)
        self._split = split
        self.particulars: dict[int, dict[str, str]] = {}
        self.end_early: set[int] = set()

    def is_plain(self, sample: int, data: bytes) -> bool:
        self._split.digests[sample] = sha256(data).digest()
        if found := particulars(data, self._split.index.paths[sample]):
            self.particulars[sample] = found
        if ends_early(data):
            self.end_early.add(sample)
        return super().is_plain(sample, data)


def _check_images(split: Split, threads: int, progress: "_Progress") -> Iterator[Finding]:
    """Decodes all images, yields findings, and fills split.digests and split.bad."""
    index, numbers = split.index, np.arange(len(split.index))
    reader = _InspectingReader(split, threads)
    loader = Loader(
        index,
        DataConfig(decode_threads=threads, read_threads=threads, max_bad_samples=len(index)),
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_batch_size=BATCH_PER_THREAD * threads,
        reader=reader,
    )
    batches = np.split(numbers, numbers[:: BATCH_PER_THREAD * threads][1:])
    requests = (_whole(index, samples) for samples in batches)
    for samples, _ in zip(batches, loader.batches(requests), strict=True):
        for sample in samples.tolist():
            name = split.name_of(sample)
            found = reader.particulars.pop(sample, {})
            if sample in loader.bad:
                kind, why = _trouble(split, sample, loader.bad[sample], sample in reader.end_early)
                split.bad[sample], split.digests[sample] = why, b""
                found = {kind: f"{why}; {BAD[split.name]}"}
            elif other := _other_synset(name, split.class_of(sample)):
                found["other class"] = f"named after {other}; trains as {split.class_of(sample)}"
            yield from (Finding(split.name, name, kind, what) for kind, what in found.items())
        progress.add(len(samples))


def _whole(index: Index, samples: np.ndarray) -> Request:
    """Requests all pixels, since an image may be damaged outside of the window that is cut out."""
    sizes = index.sizes[samples]
    windows = unchanged(np.hstack([np.zeros_like(sizes), sizes]).astype(float), (SEEN_PX, SEEN_PX))
    return Request(samples, replace(windows, cut_first=True))  # decoded the same way as in training


def _trouble(split: Split, sample: int, why: str, end_early: bool) -> tuple[str, str]:
    """Returns the kind of trouble, and the reason in words."""
    if not why.startswith(("not a readable image", "an empty file")):
        return "unreadable", why
    nbytes = split.index.nbytes
    if nbytes is not None and not nbytes[sample]:
        return "empty", "an empty file"
    if end_early or "truncated" in why.lower():
        return "truncated", why if "truncated" in why.lower() else "its end is missing"
    return "corrupt", why


def _other_synset(name: str, trained_as: str) -> str | None:
    """Returns the class in the name of an ImageNet file, n01440764_10026.JPEG, if it differs."""
    synsets = SYNSET.findall(os.path.basename(name).partition(".")[0])
    if not synsets or not SYNSET.fullmatch(trained_as) or trained_as in synsets:
        return None
    return synsets[-1]


def _duplicates(splits: Sequence[Split]) -> Iterator[Finding]:
    """Yields images with the same bytes in both splits, or in two classes."""
    train = splits[0]
    digests = np.concatenate([split.digests for split in splits])
    order = np.argsort(digests, kind="stable")
    order = order[digests[order] != b""]
    bounds = np.flatnonzero(np.r_[True, digests[order[1:]] != digests[order[:-1]], True])
    several = np.diff(bounds) > 1
    for start, end in zip(bounds[:-1][several], bounds[1:][several], strict=True):
        train_images = len(train.index)
        copies = [
            (train, i) if i < train_images else (splits[1], i - train_images)
            for i in order[start:end]
        ]
        first: dict[str, int] = {}  # in each split
        for split, sample in copies:
            name, of_class = split.name_of(sample), split.class_of(sample)
            other = first.setdefault(split.name, sample)
            if split.class_of(other) != of_class:
                same = f"same bytes as {escape(split.name_of(other))}; has both labels"
                yield Finding(split.name, name, "two classes", same)
            if split is not train and (seen := first.get("train")) is not None:
                as_what = "" if train.class_of(seen) == of_class else " (in a different class)"
                same = f"same bytes as {escape(train.name_of(seen))}{as_what}; training sees it"
                yield Finding("val", name, "in both splits", same)


def _differing_classes(train: Split, val: Split) -> Iterator[Finding]:
    for one, other in ((train, val), (val, train)):
        for name in sorted(set(one.index.classes) - set(other.index.classes)):
            what = f"not in {other.name}/; training will refuse to start"
            yield Finding(one.name, f"{one.name}/{name}", "class in one split", what)


def _table(counts: Counter[tuple[str, str]]) -> str:
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    kinds.sort(key=lambda kind: kind not in CANNOT_TRAIN)
    rows = [["", *SPLITS, ""]]
    for kind in kinds:
        of_each = [f"{counts[kind, split]:,}" for split in SPLITS]
        rows.append([kind, *of_each, "cannot" if kind in CANNOT_TRAIN else "trains"])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{kind:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {trains}".rstrip()
        for kind, a, b, trains in rows
    )


def _set_aside(root: Path, bad: dict[str, str], before: dict[str, str], dry_run: bool) -> str:
    """Writes the quarantine. Returns lines that say so, and which images are no longer in it."""
    path = root / QUARANTINE
    removed = sorted(before.keys() - bad)
    lines = [f"{escape(name)}: removed from {path}: it decodes or is gone" for name in removed]
    if bad == before:
        lines += [f"{path} lists them already"] if bad else []
    elif dry_run:
        return f"{path} is unchanged (--dry-run)"
    else:
        try:
            write_quarantine(root, bad)
            lines += [f"{path} lists them now"] if bad else []
        except OSError as error:
            return (
                f"{path}: cannot be written: {error.strerror}; run `resnet-dist verify` where it "
                "can be, or let training find these images itself"
            )
    return "\n".join(lines)


def _verdict(count: int, bad: int, classes_differ: bool) -> str:
    most = DataConfig().max_bad_samples
    text = f"all {count:,} images can be trained on"
    if bad:
        text = (
            f"{count - bad:,} of {count:,} images can be trained on; {bad:,} cannot: training "
            "replaces them by stand-ins, evaluation counts them as wrong"
        )
    if bad > most:
        text += f"; these are more than data.max_bad_samples={most}: repair them, or raise it"
    if classes_differ:
        text += "; but first, train and val must have the same classes"
    return text


class _Progress:
    """A line that updates in place, on a terminal only. On stderr, as stdout has the findings."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._done = 0
        self._is_terminal = sys.stderr.isatty()
        self._started = self._refreshed = time.monotonic()

    def say(self, text: str) -> None:
        self._clear()
        print(shortened(text), flush=True)

    def add(self, images: int) -> None:
        self._done += images
        now = time.monotonic()
        if self._is_terminal and now - self._refreshed > REFRESH_SECONDS:
            self._refreshed = now
            rate = self._done / (now - self._started)
            left = (self._count - self._done) / rate
            line = f"{self._done:,}/{self._count:,} images  {rate:,.0f} img/s  ETA {duration(left)}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        self._clear()
        seconds = time.monotonic() - self._started
        rate = self._done / seconds
        print(
            f"{self._done:,} images in {duration(seconds)}, {rate:,.0f} img/s",
            file=sys.stderr,
            flush=True,
        )

    def _clear(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

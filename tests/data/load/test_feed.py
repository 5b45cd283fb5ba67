"""Bad images: found at any stage, replaced by the same stand-in, within a budget."""

import gc
import io
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline
from PIL import Image

from resnet_dist import distributed
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.index import Index, Shards
from resnet_dist.data.index.plain import why_not_plain
from resnet_dist.data.load import build
from resnet_dist.data.load import cache as cache_module
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.build import make_loader
from resnet_dist.data.load.cache import BLANK_GREY, SPARE_BYTES, EncodedCache, shared_bytes
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.decoding import HOST, UNPROBED, Decoding
from resnet_dist.data.load.feed import Work
from resnet_dist.data.load.reader import Reader
from resnet_dist.data.view.augment import Request, eval_windows
from resnet_dist.data.view.requests import train_request
from resnet_dist.errors import UserError

IMAGES, HEIGHT, WIDTH = 24, 60, 90
WHOLE = (0, 0, HEIGHT, WIDTH)  # box
ROWS_PER_STRIP = 278  # TIFF tag
DATA = DataConfig(
    scale_px=(40, 56), crop_px=32, eval_resize_px=40, eval_crop_px=32, decode_threads=2
)
CONFIG = Config(seed=3, data=DATA)


def jpeg(number: int, **options: object) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """JPEGs of noise; their label is their number."""
    for number in range(IMAGES):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    return Index(
        classes=tuple(map(str, range(IMAGES))),
        labels=np.arange(IMAGES),
        sizes=np.full((IMAGES, 2), (HEIGHT, WIDTH), np.int32),
        paths=tuple(str(tmp_path / f"{number}.jpg") for number in range(IMAGES)),
        pixels=None,
        fingerprint="",
        nbytes=np.array([len(jpeg(number)) for number in range(IMAGES)]),
    )


class Pipelines:
    """Batch size, threads and GPU of each DALI pipeline that was built."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int, int | None]] = []
        self._seen: WeakSet[Pipeline] = WeakSet()

    def note(self, pipe: Pipeline) -> None:
        if pipe not in self._seen:
            self._seen.add(pipe)
            self.made.append((pipe.max_batch_size, pipe.num_threads, pipe.device_id))


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Pipelines:
    noted, build = Pipelines(), Pipeline.build

    def noted_build(self: Pipeline) -> None:
        noted.note(self)
        build(self)

    monkeypatch.setattr(Pipeline, "build", noted_build)
    return noted


def loader(
    index: Index,
    data: DataConfig = DATA,
    max_batch_size: int = 32,
    device: str = "cpu",
    decoding: Decoding = Decoding(),  # noqa: B008 (it is frozen)
) -> Loader:
    return Loader(
        index,
        data,
        device=torch.device(device),
        dtype=torch.float32,
        max_batch_size=max_batch_size,
        decoding=decoding,
    )


def train_stream(index: Index, epoch: int = 0) -> Iterator[Request]:
    for start in range(0, IMAGES, 8):
        yield train_request(CONFIG, index, epoch, np.arange(start, start + 8))


def scan_start(data: bytes) -> int:
    return data.index(b"\xff\xda")


def spoiled(number: int) -> dict[str, bytes | None]:
    """Ways in which a file is bad; None: it is gone."""
    good = jpeg(number)
    scan = scan_start(good)
    other_size = io.BytesIO()
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(other_size, "JPEG")
    no_table = good.replace(b"\xff\xdb", b"\xff\xef")  # the tables pass for a program's own
    return {
        "gone": None,
        "empty": b"",
        "a web page": b"<html><body>404 Not Found</body></html>",
        "cut in the header": good[:100],
        "cut before the scan": good[:scan],
        "cut after the scan's header": good[: scan + 14],
        "cut in the middle": good[: scan + (len(good) - scan) // 2],
        "cut near the end": good[:-200],
        "no quantization tables": no_table,
        "another size": other_size.getvalue(),
        "GIF": b"GIF89a" + bytes(40),
    }


# What a decoder may still see a part of, or, of a JPEG without tables, think that it does.
CUT_IN_THE_SCAN = {
    *("cut after the scan's header", "cut in the middle", "cut near the end"),
    "no quantization tables",
}


def write(path: str, data: bytes | None) -> None:
    Path(path).unlink()
    if data is not None:
        Path(path).write_bytes(data)


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("kind", spoiled(0))
def test_a_bad_image_is_replaced_and_no_other_changes(index: Index, kind: str) -> None:
    good = list(loader(index).batches(train_stream(index)))
    # A window at the bottom: some decoders stop at the last line that they are asked for.
    request = train_request(CONFIG, index, 0, np.arange(8, 16))
    bad = 8 + int(request.windows.roi[:, 2].argmax())
    write(index.paths[bad], spoiled(bad)[kind])
    mended = loader(index)
    got = list(mended.batches(train_stream(index)))
    assert list(mended.bad) == [bad]
    assert "\n" not in mended.bad[bad]
    assert equal(got[0], good[0])
    assert equal(got[2], good[2])
    others = np.arange(8) != bad - 8
    assert torch.equal(got[1].images[others], good[1].images[others])
    assert torch.equal(got[1].labels[others], good[1].labels[others])

    # In its place: the stand-in that the request names, seen as it says.
    other, _ = request.stand_in(bad, 0)  # type: ignore[misc]
    (alone,) = loader(index).batches([train_request(CONFIG, index, 0, np.array([other]))])
    assert got[1].labels[bad - 8] == other
    assert torch.equal(got[1].images[bad - 8], alone.images[0])

    # The same as if it had been known before.
    sizes = index.sizes.copy()
    sizes[bad] = 0
    known = replace(index, bad={bad: "known"}, sizes=sizes)
    before = loader(known)
    again = list(before.batches(train_stream(known)))
    assert all(equal(a, b) for a, b in zip(again, got, strict=True))
    assert before.bad == {bad: "known"}


def test_headers_that_would_crash_dali_do_not_reach_it_among_others(tmp_path: Path) -> None:
    """Given these batches as they are, DALI 2.4 ends the process in two of three tries."""
    count = 128
    for number in range(count):
        data = jpeg(number)
        (tmp_path / f"{number}.jpg").write_bytes(data if number % 3 else data[: scan_start(data)])
    many = Index(
        classes=("a",),
        labels=np.zeros(count, np.int64),
        sizes=np.full((count, 2), (HEIGHT, WIDTH), np.int32),
        paths=tuple(str(tmp_path / f"{number}.jpg") for number in range(count)),
        pixels=None,
        fingerprint="",
    )
    request = Request(np.arange(count), eval_windows(DATA, many.sizes))
    mended = loader(many, replace(DATA, decode_threads=3), max_batch_size=count)
    for batch in mended.batches([request] * 5):
        assert (batch.labels == -1).sum() == 43
    assert sorted(mended.bad) == list(range(0, count, 3))


def test_damage_that_crashes_dali_does_not_get_there(tmp_path: Path) -> None:
    """A PNG cut in its pixels ends the process in five of six tries, given among 64 small ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for number in range(64):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[:606])
    index = Index(
        classes=("a",),
        labels=np.zeros(64, np.int64),
        sizes=np.full((64, 2), (40, 50), np.int32),
        paths=tuple(str(tmp_path / f"{number}.png") for number in range(64)),
        pixels=None,
        fingerprint="",
    )
    mended = loader(index, max_batch_size=64)
    list(mended.batches([train_request(CONFIG, index, epoch, np.arange(64)) for epoch in range(5)]))
    assert list(mended.bad) == [0]
    size, bmp = (40, 50), io.BytesIO()
    Image.fromarray(pixels).save(bmp, "BMP")
    assert why_not_plain(whole, size) is None
    assert why_not_plain(whole[:606], size) == "it ends early"
    assert why_not_plain(bmp.getvalue(), size) == "not a JPEG, PNG or WebP"
    with pytest.raises(UnreadableImage, match="wrong checksum of IDAT"):
        why_not_plain(whole[:300] + b"\x00" + whole[301:], size)


def test_a_decoder_that_fails_is_not_a_bad_image(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = Pipeline.run, []

    def broken_alone(self: Pipeline, *args: Any, **kwargs: Any) -> Any:
        """As with a GPU in an error state."""
        if self.max_batch_size == 1:
            alone.append(self)
            raise RuntimeError("an illegal memory access was encountered")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "run", broken_alone)
    write(index.paths[3], spoiled(3)["no quantization tables"])
    broken = loader(index)
    request = Request(np.arange(IMAGES), eval_windows(DATA, index.sizes))
    with pytest.raises(RuntimeError, match="decode"):
        list(broken.batches([request]))
    assert broken.bad == {}
    assert len(alone) == 2  # one image, and then one that is known to be good; not all of them


def test_a_pipe_is_not_waited_for(index: Index) -> None:
    write(index.paths[3], None)
    os.mkfifo(index.paths[3])
    with pytest.raises(UnreadableImage, match="not a regular file"):
        Reader(index, 1).read(3, WHOLE)


def test_too_many_open_files_is_not_a_bad_image(index: Index) -> None:
    reader = Reader(index, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (held, hard))
    try:
        with pytest.raises(UserError, match=r"Too many open files.*not the image's fault"):
            reader.read(3, WHOLE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held)


def test_shards_are_closed_with_their_reader(index: Index, tmp_path: Path) -> None:
    assert index.nbytes is not None
    for number in range(IMAGES):
        (tmp_path / f"{number}.tar").write_bytes(b"head" + jpeg(number))
    numbers = np.arange(IMAGES, dtype=np.int32)
    files = tuple(str(tmp_path / f"{number}.tar") for number in numbers)
    shards = Shards(files, numbers, np.full(IMAGES, 4, np.int64))
    reader = Reader(replace(index, shards=shards), 1)
    before = len(os.listdir("/proc/self/fd"))
    assert [reader.read(n, WHOLE).data.tobytes() for n in range(IMAGES)] == [
        *map(jpeg, range(IMAGES))
    ]
    assert len(os.listdir("/proc/self/fd")) == before + IMAGES
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def image_holders() -> set[int]:
    """The ids of everything that keeps a batch's encoded images or pixels."""
    return {
        id(one)
        for one in gc.get_objects()
        if type(one) is Work
        or (type(one) is list and any(isinstance(part, np.ndarray) for part in one))
    }


@pytest.mark.parametrize("how", ["closed early", "to the end", "to the end, with a bad image"])
def test_a_loader_that_is_done_keeps_no_images(index: Index, how: str) -> None:
    """The graphs of DALI's pipelines live on without a garbage collection, but what feeds them does
    not."""
    if "bad" in how:
        write(index.paths[3], spoiled(3)["no quantization tables"])
    gc.collect()
    gc.disable()
    try:
        before = image_holders()
        batches = loader(index).batches(train_stream(index))
        for _ in batches:
            if how == "closed early":
                break
        batches.close()
        assert image_holders() <= before
    finally:
        gc.enable()


def test_all_kinds_in_one_batch(index: Index) -> None:
    kinds = list(spoiled(0))
    for number, kind in enumerate(kinds):
        write(index.paths[number], spoiled(number)[kind])
    mended = loader(index, replace(DATA, decode_threads=1))
    bottom = eval_windows(DATA, index.sizes)
    bottom.roi[:, [0, 2]] += HEIGHT - bottom.roi[0, 2]
    (batch,) = mended.batches([Request(np.arange(IMAGES), bottom)])
    assert sorted(mended.bad) == list(range(len(kinds)))
    assert batch.labels.tolist() == [-1] * len(kinds) + list(range(len(kinds), IMAGES))


def test_good_images_are_decoded_once(index: Index, pipelines: Pipelines) -> None:
    once = loader(index)
    list(once.batches(train_stream(index)))
    assert len(pipelines.made) == 1
    write(index.paths[3], None)  # nor does a file that is gone reach the decoder
    list(once.batches(train_stream(index)))
    assert len(pipelines.made) == 2


def reencode(index: Index, samples: Sequence[int], kind: str, **options: Any) -> list[bytes]:
    """Writes images anew, losslessly. Returns the files' content."""
    contents = []
    for sample in samples:
        with Image.open(io.BytesIO(Path(index.paths[sample]).read_bytes())) as image:
            image.save(index.paths[sample], kind, **options)
        contents.append(Path(index.paths[sample]).read_bytes())
    return contents


def test_what_pillow_decodes_enters_the_same_pipeline(index: Index, pipelines: Pipelines) -> None:
    reencode(index, range(IMAGES), "PNG")
    expected = list(loader(index).batches(train_stream(index)))
    for kind in ("BMP", "TIFF"):
        for some in (range(0, IMAGES, 2), range(1, IMAGES, 2)):
            reencode(index, some, kind)
            pipelines.made.clear()
            mixed = loader(index)
            got = list(mixed.batches(train_stream(index)))
            assert all(equal(a, b) for a, b in zip(got, expected, strict=True))
            assert len(pipelines.made) == 1
            assert not mixed.bad


@pytest.mark.parametrize(
    "way",
    [Decoding(), *(pytest.param(way, marks=pytest.mark.gpu) for way in (UNPROBED, HOST))],
    ids=str,
)
def test_bad_images_and_odd_formats_on_either_device(
    index: Index, way: Decoding, pipelines: Pipelines
) -> None:
    """A GPU's decoder may be content with a JPEG of which the CPU's is not; with nothing else."""
    kinds = dict(enumerate(spoiled(0)))
    for number, kind in kinds.items():
        write(index.paths[number], spoiled(number)[kind])
    odd = range(len(kinds), IMAGES)
    bmp, tiff, *_ = odd
    reencode(index, [bmp], "BMP")
    (content,) = reencode(index, [tiff], "TIFF")
    write(index.paths[tiff], content[: len(content) // 2])
    device = "cpu" if way.device == "cpu" else "cuda"
    mended = loader(index, device=device, decoding=way)
    requests = [train_request(CONFIG, index, epoch, np.arange(IMAGES)) for epoch in (0, 1, 0)]
    first, _, again = mended.batches(requests)
    assert first.images.device.type == device
    in_its_scan = {number for number, kind in kinds.items() if kind in CUT_IN_THE_SCAN}
    # What a GPU's decoder makes of the missing part of an image may be other garbage each time.
    garbage = in_its_scan - set(mended.bad) if way.device == "mixed" else set()
    same = [number for number in range(IMAGES) if number not in garbage]
    assert torch.equal(first.images[same], again.images[same])
    assert torch.equal(first.labels, again.labels)
    assert {*kinds, tiff} - in_its_scan <= set(mended.bad) <= {*kinds, tiff}
    for number in set(odd) - {tiff}:
        assert first.labels[number] == number
    # None of the pipelines that had one image to decode had more threads than it needs.
    assert {one[1] for one in pipelines.made if one[0] == 1} == {1}


def windows_at(tops: Sequence[int], samples: Sequence[int], index: Index) -> Request:
    """Training images seen through windows that are 20 pixels high."""
    request = train_request(CONFIG, index, 0, np.array(samples))
    roi = np.array([[top, 20, top + 20, 60] for top in tops], np.float64)
    return request._replace(windows=replace(request.windows, roi=roi))


@pytest.mark.parametrize("top", [0, HEIGHT - 20])
def test_of_what_pillow_decodes_all_must_be_there(index: Index, top: int) -> None:
    """A window in the upper part of a TIFF that ends too early is replaced, too."""
    (content,) = reencode(index, [5], "TIFF", tiffinfo={ROWS_PER_STRIP: 4})
    write(index.paths[5], content[: len(content) // 2])
    mended = loader(index)
    requests = [
        windows_at([top] * len(samples), samples, index) for samples in ([5], [4, 5, 6], [5, 5])
    ]
    got = list(mended.batches(requests))
    assert list(mended.bad) == [5]
    other, _ = requests[0].stand_in(5, 0)  # type: ignore[misc]
    assert [batch.labels.tolist() for batch in got] == [
        [other],
        [4, other, 6],
        [other] * 2,
    ]


def test_what_an_image_is_replaced_for_does_not_depend_on_its_company(index: Index) -> None:
    """Number 2 ends too early, below its window; number 5 within its own. Both are replaced."""
    for number in (2, 5):
        write(index.paths[number], jpeg(number)[: len(jpeg(number)) * 3 // 4])
    (expected,) = loader(index).batches([windows_at([0], [2], index)])
    assert expected.labels[0] != 2
    for samples in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 7], [5, 2]):
        tops = [HEIGHT - 20 if sample == 5 else 0 for sample in samples]
        mended = loader(index)
        (got,) = mended.batches([windows_at(tops, samples, index)])
        assert set(mended.bad) == {2, 5} & set(samples)
        assert got.labels[samples.index(2)] == expected.labels[0]
        assert torch.equal(got.images[samples.index(2)], expected.images[0])


def test_a_stand_in_that_is_bad_itself(index: Index) -> None:
    request = train_request(CONFIG, index, 0, np.arange(8))
    first, second = (request.stand_in(5, attempt)[0] for attempt in (0, 1))  # type: ignore[misc]
    assert 5 not in (first, second)
    for kinds in (("gone", "cut in the middle"), ("cut in the middle", "gone")):
        write(index.paths[5], spoiled(5)[kinds[0]])
        write(index.paths[first], jpeg(first)[: scan_start(jpeg(first)) + 20])
        mended = loader(index)
        batch = next(iter(mended.batches([request])))
        assert batch.labels[5] == second
        assert list(mended.bad) == [5]
        for number in (5, first):
            Path(index.paths[number]).write_bytes(jpeg(number))


def test_in_an_evaluation_it_is_blank_and_wrong(index: Index) -> None:
    request = Request(np.arange(IMAGES), eval_windows(DATA, index.sizes))
    (good,) = loader(index).batches([request])
    write(index.paths[4], None)
    write(index.paths[7], jpeg(7)[: scan_start(jpeg(7)) + 20])
    mended = loader(index)
    (got,) = mended.batches([request])
    assert got.labels.tolist() == [-1 if i in (4, 7) else i for i in range(IMAGES)]
    others = [i for i in range(IMAGES) if i not in (4, 7)]
    assert torch.equal(got.images[others], good.images[others])
    grey = (BLANK_GREY / 255 - torch.tensor(DATA.mean)) / torch.tensor(DATA.std)
    blank = grey[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(got.images[[4, 7]], blank.expand(2, 3, 32, 32), rtol=0, atol=1e-5)
    assert sorted(mended.bad) == [4, 7]


def test_too_many_bad_ones_stop(index: Index) -> None:
    for number in range(4):
        write(index.paths[number], None)
    data = replace(DATA, max_bad_samples=3)
    with pytest.raises(UserError, match=r"more than data\.max_bad_samples=3.*No such file") as e:
        list(loader(index, data).batches(train_stream(index)))
    assert "\n" not in str(e.value)
    list(loader(index, replace(data, max_bad_samples=4)).batches(train_stream(index)))


def test_when_all_is_gone(index: Index) -> None:
    shutil.rmtree(Path(index.paths[0]).parent)
    with pytest.raises(UserError, match="the data are still there"):
        list(loader(index).batches(train_stream(index)))


needs_shared_memory = pytest.mark.skipif(
    os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize < SPARE_BYTES + 2**26,
    reason="needs 1.1 GiB of /dev/shm, which containers may have to be given",
)


@needs_shared_memory
@pytest.mark.parametrize("cache", ["none", "encoded", "decoded"])
@pytest.mark.parametrize("decode", ["window", "image"])
def test_caches_and_whole_decoding_change_no_pixel(index: Index, cache: str, decode: str) -> None:
    expected = list(loader(index).batches(train_stream(index)))
    config = replace(CONFIG, data=replace(DATA, cache=cache, decode=decode))  # type: ignore[arg-type]
    cached = make_loader(index, config, distributed.start())
    for _ in range(2):
        got = list(cached.batches(train_stream(index)))
        for a, b in zip(got, expected, strict=True):
            assert equal(a, b)
        if cache != "none":  # the second round needs no file
            for path in index.paths:
                Path(path).unlink(missing_ok=True)


@needs_shared_memory
def test_a_decoded_cache_with_bad_images(index: Index) -> None:
    write(index.paths[2], None)
    write(index.paths[9], jpeg(9)[: scan_start(jpeg(9)) + 20])
    expected = list(loader(index).batches(train_stream(index)))
    config = replace(CONFIG, data=replace(DATA, cache="decoded"))
    cached = make_loader(index, config, distributed.start())
    got = list(cached.batches(train_stream(index)))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(got, expected, strict=True))
    assert sorted(cached.bad) == [2, 9]


def test_a_cache_reserves_its_memory_and_leaves_no_name(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not in /dev/shm, where other programs take and free memory meanwhile.
    monkeypatch.setattr(cache_module, "SHARED_MEMORY", disk)
    monkeypatch.setattr(cache_module, "SPARE_BYTES", 0)
    free = os.statvfs(disk).f_bavail
    memory = shared_bytes(distributed.start(), 2**23, "data.cache=encoded")
    assert free - os.statvfs(disk).f_bavail >= 2**23 // os.statvfs(disk).f_frsize
    assert not memory.any()
    assert list(disk.iterdir()) == []
    with pytest.raises(UserError, match=rf"data\.cache=encoded: needs 1,048,576\.0 GiB of {disk}"):
        shared_bytes(distributed.start(), 2**50, "data.cache=encoded")


@needs_shared_memory
def test_the_encoded_cache(index: Index) -> None:
    reencode(index, [3], "BMP")
    nbytes = np.array([os.path.getsize(path) for path in index.paths])
    reader = Reader(index, 2, EncodedCache(nbytes, distributed.start()))
    box = (10, 20, 30, 60)
    first = [reader.read(sample, box) for sample in range(IMAGES)]
    encoded = [sample for sample in range(IMAGES) if first[sample].data.tobytes() == jpeg(sample)]
    assert encoded == [sample for sample in range(IMAGES) if sample != 3]
    assert (first[3].size, first[3].corner) == ((20, 40), (10, 20))  # decoded by Pillow
    for path in index.paths:
        write(path, None)
    for before, now in zip(first, (reader.read(i, box) for i in range(IMAGES)), strict=True):
        assert np.array_equal(before.data, now.data)
        assert (before.size, before.corner) == (now.size, now.corner)


def test_the_cores_of_a_node_are_shared_out_over_its_ranks(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[DataConfig] = []
    monkeypatch.setattr(build, "Loader", lambda _, data, **options: given.append(data))
    cores = len(os.sched_getaffinity(0))
    config = replace(CONFIG, data=replace(DATA, decode_threads=None))
    for ranks in (1, 2, 1000):
        make_loader(index, config, replace(distributed.start(), local_size=ranks))
        assert given[-1].decode_threads == min(16, max(1, cores // ranks))

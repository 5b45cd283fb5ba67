"""Which way of decoding is taken: the probe's processes, what is kept of them, and the choice."""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist import distributed
from resnet_dist.config import Config
from resnet_dist.config_file import load_config
from resnet_dist.data.load import probe
from resnet_dist.data.load.build import agreed_decoding, once_per_kind
from resnet_dist.data.load.decoding import HOST, UNPROBED, WAYS, Decoding, Report, Trial, choose
from resnet_dist.data.load.probe import report_of, run_apart
from resnet_dist.data.load.probe_way import BATCHES, KnownJpegs, Lag, compare, repeat
from resnet_dist.errors import UserError
from tests.support.multirank import run_ranks

CPU = torch.device("cpu")
STD = (0.229, 0.224, 0.225)
IMAGE, WINDOW, IMAGE_HW, WINDOW_HW, IMAGE_HW_PLAIN, WINDOW_HW_PLAIN = WAYS
SEGFAULT = Trial("crash", said="the process ended with SIGSEGV")


def report(**verdicts: float | Trial) -> Report:
    """Speeds, or what else was seen, by the number of the way: w1=2000.0."""
    seen = {f"w{number}": Trial("ok", 100.0) for number in range(len(WAYS))} | {
        key: value if isinstance(value, Trial) else Trial("ok", value)
        for key, value in verdicts.items()
    }
    return {str(way): seen[f"w{number}"] for number, way in enumerate(WAYS)}


@pytest.fixture
def asking(tmp_path: Path) -> Callable[..., Config]:
    path = tmp_path / "asking.yaml"
    path.write_text("name: asking\n")
    return lambda *overrides: load_config(path, overrides)


def test_the_fastest_sound_way_is_taken(asking: Callable[..., Config]) -> None:
    config = asking()
    assert choose(config, [report(w0=2000.0, w1=3000.0)], None)[0] == WINDOW
    assert choose(config, [report(w0=2000.0, w1=SEGFAULT)], None)[0] == IMAGE
    changed = Trial("changed", said="3 of 28 batches")
    seen = report(w0=2000.0, w2=changed, w3=Trial("differs"), w4=9000.0)
    assert choose(config, [seen], None)[0] == IMAGE_HW_PLAIN
    # Of ways that are as fast, the first: interpolated chroma, whole images, no hardware decoder.
    assert choose(config, [report(w0=2000.0, w1=2050.0, w5=2080.0)], None)[0] == IMAGE
    assert "2,000 images/s" in choose(config, [report(w0=2000.0, w1=2050.0)], None)[1]


def test_one_way_for_all_machines(asking: Callable[..., Config]) -> None:
    """Sound on each of them; the slowest sets the pace."""
    one, other = report(w0=500.0, w1=900.0, w2=800.0), report(w0=600.0, w1=SEGFAULT, w2=300.0)
    assert choose(asking(), [one, other], None)[0] == IMAGE
    assert choose(asking(), [one], None)[0] == WINDOW


def test_a_run_keeps_its_way_where_it_is_sound(asking: Callable[..., Config]) -> None:
    seen = report(w0=100.0, w1=5000.0, w2=SEGFAULT)
    for way in (IMAGE, WINDOW):
        assert choose(asking(), [seen], str(way))[0] == way
    assert choose(asking(), [seen], str(IMAGE_HW))[0] == WINDOW
    assert choose(asking(), [seen], "cpu")[0] == WINDOW
    # Sound elsewhere, and no time was left for it here.
    untried = report(w0=5000.0, w1=Trial("not tried"))
    assert choose(asking(), [untried, seen], str(WINDOW))[0] == WINDOW
    assert "not probed" in choose(asking(), [untried], str(WINDOW))[1]
    del untried[str(WINDOW)]
    assert choose(asking(), [untried], str(WINDOW))[0] == WINDOW
    assert choose(asking(), [untried, report(w1=SEGFAULT)], str(WINDOW))[0] == IMAGE
    with_load = asking("data.hw_decoder_load=0.3")
    way = replace(WINDOW_HW, hw_decoder_load=0.3)
    assert choose(with_load, [seen], str(way))[0] == way


def test_what_a_config_asks_for(asking: Callable[..., Config]) -> None:
    seen = report(w0=100.0, w1=200.0, w2=300.0, w3=900.0)
    assert choose(asking("data.decode=image"), [seen], None)[0] == IMAGE_HW
    assert choose(asking("data.hw_decoder_load=0"), [seen], None)[0] == WINDOW
    both = asking("data.decode=image", "data.hw_decoder_load=0.4")
    assert choose(both, [seen], None)[0] == replace(IMAGE_HW, hw_decoder_load=0.4)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.decode=window"], "data.decode=window"),
        (["data.hw_decoder_load=0.5"], "data.hw_decoder_load=0.5"),
        (["data.decode=window", "data.hw_decoder_load=0"], "data.hw_decoder_load=0.0"),
    ],
)
def test_a_broken_way_that_is_asked_for_is_refused(
    overrides: list[str], key: str, asking: Callable[..., Config]
) -> None:
    config = asking(*overrides)
    broken = report(w0=100.0, w1=SEGFAULT, w2=SEGFAULT, w3=SEGFAULT, w4=SEGFAULT, w5=SEGFAULT)
    with pytest.raises(UserError) as failure:
        choose(config, [broken], None)
    assert str(failure.value).startswith(f"command line: {key}: was found broken")
    assert "SIGSEGV" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_where_no_way_is_sound_the_cpu_decodes(asking: Callable[..., Config]) -> None:
    nothing = {str(way): SEGFAULT for way in WAYS}
    way, why = choose(asking(), [nothing], None)
    assert way == HOST
    assert "SIGSEGV" in why


def test_what_was_not_tried_is_not_broken(asking: Callable[..., Config]) -> None:
    some = report(w0=Trial("not tried"), w1=SEGFAULT)
    some |= {str(way): Trial("changed") for way in WAYS[2:]}
    assert choose(asking(), [some], None) == (UNPROBED, "not probed")
    assert choose(asking("data.decode=image"), [some], None) == (UNPROBED, "not probed")
    assert choose(asking(), [{}], None) == (UNPROBED, "not probed")


def test_without_a_probe_the_whole_image_and_no_hardware_decoder(
    asking: Callable[..., Config],
) -> None:
    untried = {str(way): Trial("not tried", said="not ready after 20 s") for way in WAYS}
    assert choose(asking(), [untried], None) == (UNPROBED, "not probed")
    assert Decoding("image", "mixed", 0.0, fancy_upsampling=True) == UNPROBED
    assert choose(asking("data.decode=window"), [untried], None)[0] == WINDOW


# --------------------------------------------------------------------------------------------------
# Processes of their own.


def run(program: str, limit_seconds: float = 60.0) -> Trial:
    return run_apart([sys.executable, "-c", program], limit_seconds)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_crash_is_survived_and_told(name: str) -> None:
    program = f"import os, signal; print('ready', flush=True); os.kill(os.getpid(), signal.{name})"
    assert run(program) == Trial("crash", said=f"the process ended with {name}")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGUSR1"])
def test_a_process_that_others_end_says_nothing_of_the_decoder(name: str) -> None:
    program = f"import os, signal; print('ready', flush=True); os.kill(os.getpid(), signal.{name})"
    assert run(program).verdict == "not tried"


@pytest.mark.slow
def test_a_hang_is_ended_and_told() -> None:
    began = time.monotonic()
    trial = run("import time; print('ready', flush=True); time.sleep(600)", limit_seconds=6)
    assert trial == Trial("hung", said="no end after 6 s")
    assert time.monotonic() - began < 60
    assert run("import time; time.sleep(600)", limit_seconds=1).verdict == "not tried"
    slow = "import time; time.sleep(2.5); print('ready', flush=True); time.sleep(600)"
    assert run(slow, limit_seconds=4).verdict == "not tried"


def test_errors_of_the_decoder_and_of_the_gpu() -> None:
    assert run("print('ready'); raise RuntimeError('nvjpeg: bad')") == Trial(
        "crash", said="RuntimeError: nvjpeg: bad"
    )
    assert run("raise RuntimeError('no such device')").verdict == "not tried"
    assert run("print('ready'); raise RuntimeError('CUDA out of memory')").verdict == "not tried"
    assert run("print('ready')").verdict == "crash"  # it ended well, and said nothing


DALI_FAILS = """
import sys
import numpy as np
from nvidia.dali import fn, pipeline_def
print("ready", flush=True)

@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def fails():
    images = fn.external_source(lambda: [np.zeros(10, np.uint8)])
    return fn.decoders.image(images) if sys.argv[1] == "image" else fn.python_function(
        images, function=out_of_memory, device="cpu")

def out_of_memory(images):
    raise MemoryError("cudaErrorMemoryAllocation")

fails(exec_dynamic=False).run()
"""


def test_dalis_reason_is_not_its_last_line() -> None:
    trial = run_apart([sys.executable, "-c", DALI_FAILS, "image"], 60.0)
    assert trial.verdict == "crash"
    assert "nvImageCodec failure" in trial.said
    trial = run_apart([sys.executable, "-c", DALI_FAILS, "memory"], 60.0)
    assert trial.verdict == "not tried"


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: CUDA allocation failed",
        "std::bad_alloc",
        "nvJPEG error: NVJPEG_STATUS_ALLOCATOR_FAILURE",
        "OSError: [Errno 28] No space left on device",
        "Can't allocate 1073741824 bytes on device 0.",
        "nvJPEG error: Memory allocator error",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 3. GiB",
        "OSError: [Errno 12] Cannot allocate memory",
        "RuntimeError: can't start new thread",
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`",
    ],
)
def test_what_a_machine_lacks_is_not_the_decoder_s_fault(line: str) -> None:
    assert run(f"print('ready'); import sys; sys.exit({line!r})").verdict == "not tried"


def test_a_process_that_cannot_start_says_nothing_of_the_decoder() -> None:
    trial = run_apart(["/no/such/program"], 60.0)
    assert trial.verdict == "not tried"
    assert "No such file" in trial.said


def test_a_way_ends_at_its_limit_also_if_nobody_waits_for_it() -> None:
    """The system ends it: where a way hangs in C, no Python code would run."""
    program = (
        "import sys, time, resnet_dist.data.load.probe_way as w;"
        "w.try_way = lambda *_: time.sleep(600);"
        "sys.argv = ['', '0', '--device', 'cpu', '--limit', '1']; w.main()"
    )
    assert run(program) == Trial("not tried", said="the process ended with SIGALRM")


def test_a_way_gets_all_of_its_time_or_is_not_tried() -> None:
    # A way hangs, as far as it shows.
    seen = dict(probe.probe(CPU, WAYS[:4], limit_seconds=2.9, way_limit_seconds=1.0))
    assert list(seen) == [str(way) for way in WAYS[:4]]
    lacked_time = [trial.said == "no time was left" for trial in seen.values()]
    assert lacked_time == [False, False, True, True]


def test_an_image_that_a_way_refuses_is_told_with_the_decoders_reason() -> None:
    program = (
        "import io, sys, numpy as np, resnet_dist.data.load.probe_way as w\n"
        "from resnet_dist.data.load.cache import Image\n"
        "class Damaged(w.KnownJpegs):\n"
        "    def read_ahead(self, samples, boxes):\n"
        "        asked.append(samples)\n"
        "        images = super().read_ahead(samples, boxes)()\n"
        "        if len(asked) > w.BATCHES:\n"  # not yet for the CPU
        "            images[3] = Image(gif, images[3].size)\n"  # only Pillow reads it
        "        return lambda: images\n"
        "asked, file = [], io.BytesIO()\n"
        "w.Pillow.new('RGB', (w.WIDTH_PX, w.HEIGHT_PX)).save(file, 'GIF')\n"
        "gif = np.frombuffer(file.getvalue(), np.uint8)\n"
        "w.KnownJpegs = Damaged\n"
        "sys.argv = ['', '0', '--device', 'cpu', '--images', '8']; w.main()"
    )
    trial = run(program)
    assert trial.verdict == "crash"
    assert "nvImageCodec failure" in trial.said


@pytest.mark.slow
def test_the_probe_itself_on_a_cpu(tmp_path: Path) -> None:
    """The same processes as on a GPU, with the CPU's decoder in place of each way."""
    output = tmp_path / "probe.json"
    command = ["resnet_dist.data.load.probe", "--device", "cpu", "--output", str(output)]
    limits = ["--limit", "240", "--way-limit", "120"]  # busy machines start processes slowly
    program = (
        "import sys, runpy, resnet_dist.data.load.decoding as d; d.WAYS = d.WAYS[:2];"
        f"sys.argv = {['', *command[1:], '--images', '8', '--seconds', '0.1', *limits]!r};"
        "runpy.run_module('resnet_dist.data.load.probe', run_name='__main__')"
    )
    trial = run_apart([sys.executable, "-W", "error", "-c", program], 300.0)
    written = json.loads(output.read_text())
    assert set(written["ways"]) == {str(IMAGE), str(WINDOW)}, trial
    for way in written["ways"].values():
        assert way["verdict"] == "ok"
        assert way["images_per_sec"] > 0
    assert {"gpu", "driver", "dali", "nvimagecodec", "nvjpeg"} <= written["versions"].keys()


# --------------------------------------------------------------------------------------------------
# What it looks at.


def batches(count: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-2, 2, (count, 4, 3, 32, 32)).astype(np.float32)
    return list(torch.from_numpy(pixels))


def test_pixels_that_change_when_repeated_are_counted() -> None:
    known = batches(BATCHES)
    repeated = [images.clone() for images in known * 3]
    first, changed = repeat(iter(repeated), CPU)
    assert changed == 0
    assert all(map(torch.equal, first, known))
    repeated[BATCHES + 1][2, 1, 5, 6] += 1e-6
    repeated[-1][0, 0, 0, 0] -= 1e-6
    assert repeat(iter(repeated), CPU)[1] == 2


@pytest.mark.gpu
def test_the_gpu_lags_behind_the_decoder() -> None:
    lag = Lag(torch.device("cuda"))
    for _ in range(4):
        lag.queue()
        assert not torch.cuda.current_stream().query()


def grey(levels: float) -> torch.Tensor:
    return levels / 255 / torch.tensor(STD)[:, None, None]


def test_pixels_that_are_not_the_cpus() -> None:
    cpu = batches(2)
    assert compare([images.clone() for images in cpu], cpu, STD).verdict == "ok"
    rounded = [images + grey(1.0) for images in cpu]
    assert compare(rounded, cpu, STD).verdict == "ok"
    assert "1.0 grey levels" in compare(rounded, cpu, STD).said
    block = [images.clone() for images in cpu]
    block[1][3, :, 8:16, 8:16] += grey(60.0)  # one wrong block of one image
    assert compare(block, cpu, STD).verdict == "differs"
    image = [images.clone() for images in cpu]
    image[0][2] += grey(5.0)
    assert compare(image, cpu, STD).verdict == "differs"
    holes = [images.clone() for images in cpu]
    holes[0][0, 0, 16, 16] = float("nan")
    assert compare(holes, cpu, STD).verdict == "differs"


def test_the_known_images_are_of_every_kind() -> None:
    images = KnownJpegs(16).read_ahead(np.arange(16), np.zeros((16, 4), np.int32))()
    seen = set()
    for number in range(16):
        with Image.open(io.BytesIO(images[number].data.tobytes())) as image:
            seen |= {("exif", image.getexif()[0x0112]), ("mode", image.mode)}
            seen |= {("progressive", bool(image.info.get("progressive")))}
    assert {("exif", orientation) for orientation in range(1, 9)} <= seen
    assert {("mode", "L"), ("mode", "RGB"), ("progressive", True)} <= seen


# --------------------------------------------------------------------------------------------------
# What is kept.


def test_a_report_is_kept_and_read(tmp_path: Path) -> None:
    said: list[str] = []
    seen = report(w0=2000.0, w1=SEGFAULT)
    first = report_of(CPU, tmp_path, said.append, WAYS, lambda device, ways: seen.items())
    assert first == seen
    assert any("SIGSEGV" in line for line in said)
    (path,) = tmp_path.glob("decoding-*.json")
    assert json.loads(path.read_text())["versions"] == probe.versions_of(CPU)
    said.clear()
    again = report_of(
        CPU, tmp_path, said.append, WAYS, lambda device, ways: pytest.fail("probed again")
    )
    assert again == seen
    assert not said


def test_only_what_is_missing_is_tried(tmp_path: Path) -> None:
    """A config allows only some, or there was no time for all."""
    asked: list[list[Decoding]] = []
    now = report(w0=Trial("not tried"), w1=2000.0, w2=SEGFAULT, w3=Trial("not tried"))
    now |= {str(WINDOW_HW_PLAIN): Trial("hung")}

    def try_ways(device: torch.device, ways: Sequence[Decoding]) -> list[tuple[str, Trial]]:
        asked.append(list(ways))
        return [(str(way), now[str(way)]) for way in ways]

    first = [WINDOW_HW, IMAGE, WINDOW]
    seen = report_of(CPU, tmp_path, print, first, try_ways)
    assert seen == {str(way): now[str(way)] for way in first}
    seen = report_of(CPU, tmp_path, print, WAYS, try_ways)
    assert asked == [first, [IMAGE, IMAGE_HW, WINDOW_HW, IMAGE_HW_PLAIN, WINDOW_HW_PLAIN]]
    assert seen == now
    now[str(IMAGE)] = now[str(WINDOW_HW)] = Trial("ok", 100.0)
    seen = report_of(CPU, tmp_path, print, WAYS, try_ways)
    assert asked[2:] == [[IMAGE, WINDOW_HW]]
    assert seen == report(w1=2000.0, w2=SEGFAULT, w5=Trial("hung"))
    report_of(CPU, tmp_path, print, WAYS, try_ways)
    assert len(asked) == 3


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"versions": 3}', "torn"])
def test_a_damaged_report_is_made_anew(damage: str, tmp_path: Path) -> None:
    seen = report(w0=2000.0)
    report_of(CPU, tmp_path, print, WAYS, lambda device, ways: seen.items())
    (path,) = tmp_path.glob("decoding-*.json")
    text = path.read_text()
    path.write_text(text[: len(text) // 2] if damage == "torn" else damage)
    other = report(w0=3000.0)
    assert report_of(CPU, tmp_path, print, WAYS, lambda device, ways: other.items()) == other
    assert report_of(CPU, tmp_path, print, WAYS, lambda device, ways: seen.items()) == other


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    seen = report(w0=2000.0)
    folder = tmp_path / "file" / "below"
    assert report_of(CPU, folder, said.append, WAYS, lambda device, ways: seen.items()) == seen
    assert "warning" in said[-1]
    assert "will probe again" in said[-1]


@pytest.fixture
def on_an_h100(
    asking: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Decoding]:
    """on_an_h100(report, recorded, "data.decode=image"): what agreed_decoding chooses there, where
    a report has been kept. It has no GPU that works, so that no way can be tried now."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    gpu = replace(distributed.start(), device=torch.device("cuda", 0))
    folders = count()

    def chosen(kept: Report, recorded: str | None, *overrides: str) -> Decoding:
        root = tmp_path / str(next(folders))
        ways = [way for way in WAYS if str(way) in kept]
        report_of(gpu.device, root / ".index", print, ways, lambda device, ways: kept.items())
        return agreed_decoding(asking(f"tracking.run_root={root}", *overrides), gpu, recorded)[0]

    return chosen


def test_of_a_run_that_goes_on_only_its_way_is_probed(
    on_an_h100: Callable[..., Decoding], capfd: pytest.CaptureFixture[str]
) -> None:
    alone = {str(IMAGE_HW): Trial("ok", 100.0)}
    assert on_an_h100(alone, str(IMAGE_HW)) == IMAGE_HW
    with_load = replace(IMAGE_HW, hw_decoder_load=0.3)
    assert on_an_h100(alone, str(with_load), "data.hw_decoder_load=0.3") == with_load
    # The CPU's decoder, of a run that began where none of the GPU's was sound.
    assert on_an_h100(report(w1=900.0), str(HOST)) == HOST
    assert on_an_h100({}, str(HOST)) == HOST
    assert on_an_h100(report(w0=900.0), str(HOST), "data.decode=image") == IMAGE
    # Broken here: any other may take its place.
    assert on_an_h100(report(w1=900.0, w3=SEGFAULT), str(WINDOW_HW)) == WINDOW
    assert capfd.readouterr().err == ""  # nothing had to be probed
    assert on_an_h100({str(IMAGE): Trial("ok", 100.0)}, str(WINDOW)) == WINDOW
    said = capfd.readouterr().err
    assert said.count("probing 1 of 6") == 1
    assert said.count("not tried") == 1


def test_a_verdict_is_kept_at_once(tmp_path: Path) -> None:
    """Whoever ends a probe loses no more than the way that was being tried."""

    def stopped(device: torch.device, ways: Sequence[Decoding]) -> Iterator[tuple[str, Trial]]:
        yield str(ways[0]), SEGFAULT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_of(CPU, tmp_path, print, WAYS, stopped)
    rest = report(w0=SEGFAULT)
    assert report_of(CPU, tmp_path, print, WAYS[:1], stopped) == {str(IMAGE): SEGFAULT}
    assert report_of(CPU, tmp_path, print, WAYS, lambda device, ways: rest.items()) == rest


# --------------------------------------------------------------------------------------------------
# Over ranks.


def test_one_rank_of_each_kind_of_machine_probes(tmp_path: Path) -> None:
    reports = run_ranks(_report_by_kind, 4, tmp_path, init_process_group=False)
    assert reports == [[report(w0=1000.0), report(w0=1001.0)]] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def _report_by_kind(rank: int, world_size: int, folder: Path) -> list[Report]:
    def make() -> Report:
        (folder / str(rank)).touch()
        return report(w0=1000.0 + rank)

    return once_per_kind("H100" if rank % 2 == 0 else "A100", make, distributed.start())


def test_a_probe_that_fails_keeps_no_rank_waiting(tmp_path: Path) -> None:
    said = run_ranks(_failing_probe, 3, init_process_group=False)
    told = "RankFailure: rank 1: OSError: no room"
    assert said == [told, "OSError: no room", told]


def _failing_probe(rank: int, world_size: int) -> str:
    def make() -> Report:
        if rank == 1:
            raise OSError("no room")
        return report()

    try:
        once_per_kind(f"kind {rank}", make, distributed.start())
    except (OSError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

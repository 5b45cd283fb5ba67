"""What may not have changed when a run resumes, and what --resume-anyway makes of it."""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from resnet_dist import distributed
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.data.index.quarantine import write_quarantine
from resnet_dist.data.load.build import agreed_decoding
from resnet_dist.determinism import fix_algorithms
from resnet_dist.errors import UserError
from resnet_dist.job import build
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.outcome import OUTCOME
from resnet_dist.run.resume import describe_resume, environment_warning, made_with
from resnet_dist.train import train
from tests.support.multirank import run_ranks
from tests.support.resuming import ONE_EPOCH, newest, refused, resumed, rewrite


def files_of(folder: Path) -> dict[Path, str]:
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != OUTCOME]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_one_refusal_lists_all_that_differs(
    trained: Callable[..., Config], other_data: Path, tiny_folder: Path
) -> None:
    """And nothing in the run folder is touched, but for how this start ended."""
    rewrite(trained(), decoder="mixed")
    before = files_of(trained().run_dir)
    # The batch is larger than the data: this would be told first, had the plan been made before.
    now = trained("optim.base_lr=0.2", "train.global_batch_size=1000", f"data.root={other_data}")
    line = refused(now)
    parts = re.fullmatch(
        r"(.+): differs from the checkpoint of step 3: (.+); undo that, use another "
        r"name=, or add --resume-anyway",
        line,
    )
    assert parts is not None, line
    assert parts[1] == str(trained().run_dir)
    old = Checkpoint.load(newest(trained())).fingerprints["training images"]
    facts = build(replace(now, name="x", train=trained().train), distributed.start()).facts
    new = facts.fingerprints["training images"]
    assert parts[2].split("; ") == [
        "optim.base_lr 0.4 -> 0.2",
        "train.global_batch_size 8 -> 1000",
        f"data: different training images ({tiny_folder} {old[:12]} -> {other_data} {new[:12]})",
        "decoder mixed -> cpu",
    ]
    assert files_of(trained().run_dir) == before


def test_all_ranks_refuse_alike(trained: Callable[..., Config]) -> None:
    lines = run_ranks(refusal_of, 2, trained("seed=5"), init_process_group=False)
    assert len(set(lines)) == 1
    assert "differs from the checkpoint of step 3: seed 0 -> 5; undo" in lines[0]


def refusal_of(rank: int, world_size: int, config: Config) -> str:
    try:
        build(config, distributed.start())
    except UserError as error:
        return str(error)
    return "not refused"


def test_the_line_says_from_where_and_by_whom(trained: Callable[..., Config]) -> None:
    job, said = resumed(trained())
    assert re.fullmatch(
        rf"already finished at step 3 \(epoch 1\.00\) from {newest(trained())}, "
        r"saved 20\d\d-\d\d-\d\d \d\d:\d\d \S+ by 1 rank",
        said,
    )
    saved = replace(
        Checkpoint.load(newest(trained())),
        step=5,
        made_with={"world_size": "4"},
        saved_at="on Monday",
    )
    assert describe_resume(Path("x"), saved, job.plan) == (
        "resumes at step 5 (epoch 1.67) from x, saved on Monday by 4 ranks"
    )


def test_an_older_checkpoint_says_less_and_is_not_refused(trained: Callable[..., Config]) -> None:
    """Format 2 told neither the decoder nor who made it, and when: as its migration fills it in."""
    rewrite(trained(), decoder=None, made_with={}, saved_at=...)
    _, said = resumed(trained())
    assert said == f"already finished at step 3 (epoch 1.00) from {newest(trained())}"


@pytest.fixture
def own_data(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "own"))


@pytest.mark.parametrize(
    ("image", "other"),
    [
        ("train/class0/0.jpg", "training images in bytes"),
        ("val/class0/0.jpg", "validation images in bytes"),
    ],
)
def test_images_that_were_encoded_anew_are_other_data(
    trained: Callable[..., Config], own_data: Path, image: str, other: str
) -> None:
    """Of the same names and sizes in pixels."""
    assert "warning" not in resumed(trained(f"data.root={own_data}"))[1]  # a copy is the same
    with Image.open(own_data / image) as opened:
        opened.load()
        opened.save(own_data / image, quality=50)
    assert differing_data(trained(f"data.root={own_data}")) == [other]


def test_other_validation_images_are_other_data(
    trained: Callable[..., Config], own_data: Path
) -> None:
    """They choose the best checkpoint, and drop the plateau schedule's lr."""
    (own_data / "val/class0/0.jpg").unlink()
    assert differing_data(trained(f"data.root={own_data}")) == ["validation images"]


def differing_data(config: Config) -> list[str]:
    return re.findall(r"data: different ([a-z ]+) \(", refused(config))


def test_a_quarantine_is_no_other_data(trained: Callable[..., Config], own_data: Path) -> None:
    write_quarantine(own_data, {f"{part}/class0/1.jpg": "truncated" for part in ("train", "val")})
    job, said = resumed(trained(f"data.root={own_data}"))
    assert len(job.train_index.bad) == len(job.val_index.bad) == 1
    assert "warning" not in said


def test_format_2_knew_the_training_images_alone(
    trained: Callable[..., Config], own_data: Path
) -> None:
    known = Checkpoint.load(newest(trained())).fingerprints
    assert len(known) == 4
    rewrite(trained(), fingerprints={"training images": known["training images"]})
    (own_data / "val/class0/0.jpg").unlink()
    assert "warning" not in resumed(trained(f"data.root={own_data}"))[1]
    rewrite(trained(), fingerprints={"training images": "0" * 64})
    assert differing_data(trained()) == ["training images"]


def test_resume_anyway_takes_the_new_settings_and_keeps_the_state(
    trained: Callable[..., Config],
) -> None:
    """torch would put back momentum and weight decay as they were saved."""
    saved = Checkpoint.load(newest(trained())).to_dict()
    now = trained("optim.momentum=0.5", "optim.weight_decay=0.01", "train.epochs=2")
    job, _ = resumed(now, resume_anyway=True)
    groups = job.state.optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.5}
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    state = job.state.optimizer.state_dict()["state"]
    assert state.keys() == saved["optimizer"]["state"].keys()
    assert len(state) > 50
    for number, of in saved["optimizer"]["state"].items():
        assert torch.equal(state[number]["momentum_buffer"], of["momentum_buffer"])
    assert all(
        torch.equal(value, saved["model"][key])
        for key, value in job.state.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "change",
    [
        "train.precision=fp16",
        "train.ema_decay=0.9",
        "data.per_pixel_mean=true",
        "optim.lr_scales={stem: 0, fc: 10}",
        "optim.schedule=plateau",
        "train.global_batch_size=10",
        "data.holdout_images=5",
        "model.sync_batchnorm=none",
    ],
)
def test_resume_anyway_resumes_with_any_setting(
    trained: Callable[..., Config], capsys: pytest.CaptureFixture[str], change: str
) -> None:
    now = trained(change, "train.epochs=2")
    key = change.partition("=")[0]
    assert key in refused(now)
    capsys.readouterr()
    train(now, "test", Interrupt(), resume_anyway=True)
    said = capsys.readouterr().out
    assert f"{key} " in said[said.index("warning: from here on this is a different run") :]
    assert ("momentum starts from zero" in said) == (key == "optim.lr_scales")
    assert Checkpoint.load(newest(now)).step > 3
    # And back: what was made with it resumes without it.
    train(trained("train.epochs=3"), "test", Interrupt(), resume_anyway=True)


def test_what_does_not_fit_is_refused_even_so(
    trained: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    for split in ("train", "val"):
        for name in ("class0", "class1"):
            shutil.copytree(tiny_folder / split / name, two / split / name)
    for override, part in (
        ("model.name=resnet32", "model.name resnet20 -> resnet32"),
        (f"data.root={two}", "classes 3 -> 2"),
    ):
        for anyway in (False, True):
            line = refused(trained(override), anyway)
            assert part in line
            assert line.endswith("; undo that or use another name=")


@pytest.mark.slow
def test_only_deterministic_mode_minds_who_made_it(
    trained: Callable[..., Config], tiny_config: Callable[..., Config]
) -> None:
    strict = tiny_config("name=strict", "train.deterministic=true", *ONE_EPOCH)
    (said,) = run_ranks(trained_and_resumed, 1, strict, init_process_group=False)
    assert said.startswith("already finished at step 3")
    assert "warning" not in said
    version = Checkpoint.load(newest(strict)).made_with["torch"]
    for config in (strict, trained()):
        rewrite(config, made_with=Checkpoint.load(newest(config)).made_with | {"torch": "2.13"})
    (said, _) = run_ranks(resumed_on, 2, strict, init_process_group=False)
    assert said.endswith(
        f"\nwarning: not bit-exact from here on: torch 2.13 -> {version}, world_size 1 -> 2"
    )
    assert "warning" not in resumed(trained())[1]


def trained_and_resumed(rank: int, world_size: int, config: Config) -> str:
    train(config, "test", Interrupt())
    return resumed(config)[1]


def resumed_on(rank: int, world_size: int, config: Config) -> str:
    fix_algorithms(config.train.deterministic)
    return resumed(config)[1]


def test_made_with_is_plain_and_compared_by_name(tmp_path: Path) -> None:
    now = made_with(distributed.start())
    torch.save(now, tmp_path / "now.pt")
    assert torch.load(tmp_path / "now.pt", weights_only=True) == now
    assert set(now) == {"torch", "dali", "pillow", "device", "world_size", "threads"}
    assert environment_warning(now, now) == []
    assert environment_warning({}, now) == []
    before = now | {"threads": "64", "device": "NVIDIA H100"}
    assert environment_warning(before, now) == [
        "warning: not bit-exact from here on: "
        f"device NVIDIA H100 -> {now['device']}, threads 64 -> {now['threads']}"
    ]


def test_what_no_gpu_has_to_decode(tiny_config: Callable[..., Config]) -> None:
    """A cache of pixels, and CIFAR: the CPU has decoded them, also where the world has GPUs."""
    gpu = replace(distributed.start(), device=torch.device("cuda", 0))
    cached = tiny_config("data.cache=decoded")
    cifar = tiny_config(
        "data.format=cifar10", "data.train_crop=pad", "data.eval_resize_px=32", "data.crop_px=32"
    )
    for config in (cached, cifar):
        assert str(agreed_decoding(config, gpu)[0]) == "cpu"


def test_on_a_cpu_what_is_decoded_is_recorded(trained: Callable[..., Config]) -> None:
    """Whole images leave an image that is damaged in part to a stand-in, windows may not."""
    assert Checkpoint.load(newest(trained())).decoder == "cpu"
    assert resumed(trained("data.decode=window"))[0].previous.changes == ()
    assert "decoder cpu -> cpu, whole images;" in refused(trained("data.decode=image"))


@pytest.mark.gpu
def test_a_run_of_the_cpu_s_decoder_is_not_the_gpu_s(trained: Callable[..., Config]) -> None:
    recorded = Checkpoint.load(newest(trained())).decoder
    assert recorded != "cpu"
    rewrite(trained(), decoder="cpu")
    assert f"as these differ: decoder cpu -> {recorded}." in refused(trained())

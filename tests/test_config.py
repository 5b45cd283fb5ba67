"""A config is closed, inherits, and answers bad input in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from resnet_dist.config import Config, flat_settings, to_dict, to_yaml
from resnet_dist.config_file import config_from_dict, load_config
from resnet_dist.errors import UserError
from resnet_dist.plan import Plan
from resnet_dist.run.plan_text import describe_plan
from tests.support.paths import REPO

CONFIGS = REPO / "configs"
SHIPPED = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.stem != "base"
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads_and_plans_for_any_world(name: str) -> None:
    config = load_config(CONFIGS / name)
    for world_size in (1, 2, 3, 8, 64):
        plan = Plan.of(config, world_size, train_images=1_281_167, val_images=50_000)
        assert describe_plan(plan)
        assert plan.local_batch_size <= config.train.max_local_batch_size
        assert plan.global_batch_size == config.train.global_batch_size
    assert config_from_dict(to_dict(config), "again") == config
    assert config_from_dict(yaml.safe_load(to_yaml(config)), "again") == config


def test_base_then_file_then_overrides(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "seed: 1\noptim: {base_lr: 0.1, momentum: 0.5}\n")
    write(tmp_path, "b.yaml", "base: a.yaml\noptim:\n  base_lr: 0.2\ntrain:\n")
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", "c.yaml", "base: ../b.yaml\nname: c\ntrain.epochs: 3\n")
    config = load_config(path, ["optim.base_lr=1e-4", "data.scale_px=[300, 400]"])
    assert (config.seed, config.name, config.train.epochs) == (1, "c", 3.0)
    assert (config.optim.base_lr, config.optim.momentum) == (1e-4, 0.5)
    assert config.data.scale_px == (300, 400)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", ".0001"])
def test_floats_are_floats(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, "a.yaml", f"optim: {{weight_decay: {text}}}"))
    assert config.optim.weight_decay == 0.0001
    assert load_config(tmp_path / "a.yaml", [f"optim.base_lr={text}"]).optim.base_lr == 0.0001


def test_a_whole_number_is_a_float_and_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "a.yaml", "train: {epochs: 3}"))
    assert isinstance(config.train.epochs, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.epochs = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "parts"),
    [  # what stands in the file; what the one line must name
        ("optim: {base_lrr: 0.1}", ["optim.base_lrr=0.1", "unknown key", "optim.base_lr?"]),
        ("base_lr: 0.1", ["base_lr=0.1", "unknown key", "optim.base_lr?"]),
        ("train: {epohcs: 5}", ["train.epohcs=5", "train.epochs?"]),
        ("optim: 3", ["optim=3", "section"]),
        ("train: {epochs: ten}", ["train.epochs=ten", "a number", "90"]),
        ("train: {epochs: true}", ["train.epochs=true", "a number"]),
        ("train: {epochs: .nan}", ["train.epochs=nan", "finite"]),
        ("train: {epochs: -1}", ["train.epochs=-1", "above zero"]),
        ("train: {global_batch_size: 64.5}", ["global_batch_size=64.5", "whole number", "is 64"]),
        ("train: {global_batch_size: '64'}", ["global_batch_size=64", "whole number", "is 64"]),
        ("data: {flip: yess}", ["data.flip=yess", "true or false", "is true"]),
        ("name: 12", ["name=12", "text", '"12"']),
        ("name: a/b", ["name=a/b", "folder name", "is b"]),
        ("model: {name: resnet51}", ["model.name=resnet51", "resnet50, resnet101"]),
        ("optim: {schedule: cosin}", ["optim.schedule=cosin", "one of", "is cosine"]),
        ("data: {scale_px: 256}", ["data.scale_px=256", "list", "[256, 480]"]),
        ("data: {scale_px: [256]}", ["data.scale_px=[256]", "2 elements", "[256, 480]"]),
        ("data: {scale_px: [480, 256]}", ["data.scale_px=[480, 256]", "is [256, 480]"]),
        ("data: {crop_px: 300}", ["data.crop_px=300", "scale_px[0]=256", "is 256"]),
        ("data: {eval_crop_px: 257}", ["data.eval_crop_px=257", "eval_resize_px=256", "is 256"]),
        ("data: {mean: [123, 116, 103]}", ["data.mean=[123", "0..1"]),
        ("data: {train_crop: pad}", ["data.train_crop=pad", "data.format=folder", "is scale"]),
        ("optim: {momentum: 1.5}", ["optim.momentum=1.5", "at most 1"]),
        ("train: {iterations: 0}", ["train.iterations=0", "at least 1"]),
        ("train: {iterations: null}", ["train.iterations=null", "give train.epochs"]),
        ("optim: {warmup_epochs: null}", ["warmup_epochs=null", "give optim.warmup_iterations"]),
        (
            "optim: {lr_scales: {cf: 1}}",
            ["lr_scales={cf: 1.0}", "no part cf, only stem", "{fc: 1.0}"],
        ),
        (
            "model: {name: vgg19}\noptim: {lr_scales: {features: 0, classifier: 0}}",
            ["freezes all parts", "is {features: 0.0}"],
        ),
        ("train: {iterations: 7, epochs: 3}", ["iterations=7", "epochs=3", "in one unit only"]),
        ("optim: {milestones_iterations: [1], milestones_epochs: [1]}", ["in one unit only"]),
        ("optim: {milestones_iterations: [9, 3]}", ["milestones_iterations=[9, 3]", "[3, 9]"]),
        ("optim: {milestones_iterations: 9}", ["milestones_iterations=9", "list"]),
        ("optim: {lr_scales: 3}", ["optim.lr_scales=3", "{part: number}"]),
        ("optim: {lr_scales: {fc: -1}}", ["optim.lr_scales={fc: -1.0}", "at least 0", "{fc: 0.0}"]),
        ("optim: {lr_scales: {fc: x}}", ["optim.lr_scales={fc: x}", "fc must be a number"]),
        ("optim: {warmup_until_train_error_pct: 0}", ["error_pct=0.0", "above zero"]),
        (
            "optim: {warmup_until_train_error_pct: 80, warmup_epochs: 1}",
            ["error_pct=80.0", "give only one of them", "is null"],
        ),
        (
            "model: {name: plain18, zero_init_last_gamma: true}",
            ["zero_init_last_gamma=true", "plain18 has none", "is false"],
        ),
        (
            "data: {per_pixel_mean: true, eval_crop_px: 200}",
            ["data.eval_crop_px=200", "crop_px=224", "is 224"],
        ),
        ("data: {holdout_images: -1}", ["data.holdout_images=-1", "at least 0"]),
        ("optim: {milestones_epochs: [9, 3]}", ["milestones_epochs=[9.0, 3.0]", "[3.0, 9.0]"]),
        ("seed: 99999999999999999999", ["seed=9999", "at most", "9223372036854775807"]),
        ("train: {epochs: 1:30}", ["train.epochs=1:30", "a number"]),
        ("name: 2024-13-45\nseed: 010", ["seed=010", "whole number", "is 10"]),
        ("seed: 1\nseed: 2", [":2:", "not valid YAML", "'seed' is given twice"]),
        ("seed: [1", ["not valid YAML"]),
        ("- 1", ["must contain keys and values"]),
        ("base: nowhere.yaml", ["nowhere.yaml", "cannot be read", "No such file"]),
        ("base: bad.yaml", ["leads back to this file"]),
        ("seed: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ["bad.yaml", *parts]:
        assert part in message


def test_an_override_is_named_as_its_own_source(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "seed: 1")
    with pytest.raises(UserError, match=r"^command line: seed=x: must be a whole number"):
        load_config(path, ["seed=x"])
    with pytest.raises(UserError, match="'seed' is not an override"):
        load_config(path, ["seed"])


def test_every_leaf_has_a_dotted_key() -> None:
    flat = flat_settings(Config())
    assert flat["optim.base_lr"] == 0.1
    assert flat["seed"] == 0
    assert len(flat) == 2 + sum(
        len(dataclasses.fields(getattr(Config(), section)))
        for section in ("model", "data", "optim", "train", "tracking")
    )


def test_config_and_plan_need_no_torch() -> None:
    """A login node plans with PyYAML alone."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'PIL', 'mlflow']))\n"
        "from resnet_dist.cli import main\n"
        f"main(['train', {str(CONFIGS / 'imagenet/resnet50.yaml')!r}, '--dry-run',"
        " '--world-size', '3', '--train-images', '1281167'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "85 or 86 on each of 3 ranks" in done.stdout


UNITS_BASE = "train: {epochs: 90, eval_every_iterations: 7}\noptim: {warmup_epochs: 5}\n"


def test_a_quantity_in_one_unit_replaces_it_in_the_other(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", UNITS_BASE)
    text = "base: base.yaml\ntrain: {iterations: 100}\noptim: {milestones_iterations: [50]}\n"
    path = write(tmp_path, "a.yaml", text)
    config = load_config(path)
    assert (config.train.epochs, config.train.iterations) == (None, 100)
    assert (config.train.eval_every_epochs, config.train.eval_every_iterations) == (None, 7)
    assert (config.optim.warmup_epochs, config.optim.warmup_iterations) == (5, None)
    assert (config.optim.milestones_epochs, config.optim.milestones_iterations) == (None, (50,))
    config = load_config(path, ["train.epochs=2"])  # and back again
    assert (config.train.epochs, config.train.iterations) == (2, None)
    with pytest.raises(UserError, match=r"^command line: train.iterations=3: conflicts with"):
        load_config(path, ["train.epochs=2", "train.iterations=3"])
    # What is saved beside a run names both, one of them as null.
    again = config_from_dict(to_dict(config), "saved", ["train.iterations=9"])
    assert (again.train.epochs, again.train.iterations) == (None, 9)


MERGED = """
x-common: &common {momentum: 0.5, base_lr: 0.3}
x-more: &more {nesterov: true, base_lr: 0.7}
optim: {<<: [*common, *more], momentum: 0.6}
data: &data {flip: false}
"""


def test_merge_keys(tmp_path: Path) -> None:
    optim = load_config(write(tmp_path, "a.yaml", MERGED)).optim
    assert (optim.base_lr, optim.momentum, optim.nesterov) == (0.3, 0.6, True)
    # An anchor that merges another one, which is needed before it is complete itself.
    nested = "x-a: &a {gamma: 0.2}\nx-b: &b {<<: *a, power: 3}\noptim: {<<: *b, gamma: 0.3}\n"
    optim = load_config(write(tmp_path, "b.yaml", nested)).optim
    assert (optim.gamma, optim.power) == (0.3, 3.0)
    top = "x-top: &top {seed: 4, name: merged}\n<<: *top\nname: mine\n"
    config = load_config(write(tmp_path, "c.yaml", top))
    assert (config.seed, config.name) == (4, "mine")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("optim: {<<: *nowhere}", "undefined alias 'nowhere'"),
        ("optim: {<<: 3}", "bad.yaml:1: not valid YAML: << takes a mapping, or a list of them"),
        ("x-a: &a {gamma: 1}\noptim: {<<: *a, gamma: 0.1, gamma: 0.2}", "'gamma' is given twice"),
        ("optim: {x-a: 1}", "optim.x-a=1: unknown key"),
        ("x-a: &a [*a]\nseed: *a", "bad.yaml:1: not valid YAML: an anchor contains itself"),
        ("x-a: &a {<<: *a}", "an anchor contains itself"),
    ],
)
def test_merge_keys_that_cannot_be_merged(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "bad.yaml", text))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why", "nearest"),
    [
        (".locks", "must not begin with a dot", "locks"),
        (".index", "must not begin with a dot", "index"),
        ("mlartifacts", "is kept beside the runs", "run-mlartifacts"),
        ("mlflow.db", "is kept beside the runs", "run-mlflow.db"),
        ("mlflow.db-journal", "is kept beside the runs", "run-mlflow.db-journal"),
        ("submitit", "is kept beside the runs", "run-submitit"),
        ("a\tb", "control characters", "ab"),
        ("a\x1b[31mb", "control characters", "a[31mb"),
        ("a\nb", "control characters", "ab"),
        ("x" * 201, "at most 200 bytes", "x" * 200),
        ("\u732b" * 67, "at most 200 bytes", "\u732b" * 66),
        ("..", "plain folder name", "run"),
        ("", "plain folder name", "run"),
        ("   ", "plain folder name", "run"),
        ("a/../b", "plain folder name", "b"),
    ],
)
def test_names_that_a_run_cannot_have(tmp_path: Path, name: str, why: str, nearest: str) -> None:
    path = write(tmp_path, "a.yaml", f"name: {json.dumps(name)}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert why in message
    assert message.endswith(f"; the nearest valid value is {nearest}")
    assert load_config(path, [f"name={json.dumps(nearest)}"]).name == nearest
    assert len(name) < 200 or load_config(path, ["name=a b, ü and 猫"]).name == "a b, ü and 猫"


BAD_VALUES = ["nan", ".nan", "inf", "-.inf", "1e999", "-1", "0", "x", "maybe", "''", "[]", "{}"]
BAD_VALUES += ["true", "null", "9" * 30, "9" * 400, "[nan, 1]", "[.nan, .nan, .nan]", "[1, 2, x]"]
BAD_VALUES += ["{fc: nan}", "{fc: .nan}", "{zz: 1}", "2.5", "[2.5, 300]", "[-1, 5]", ".locks"]


@pytest.mark.parametrize("key", flat_settings(Config()))
def test_every_hint_is_a_valid_value(tmp_path: Path, key: str) -> None:
    """Such as not "the nearest valid value is nan"."""
    path = write(tmp_path, "a.yaml", "name: a\n")
    for value in BAD_VALUES:
        try:
            load_config(path, [f"{key}={value}"])
        except UserError as error:
            _, there, hint = str(error).partition("; the nearest valid value is ")
            if there:
                load_config(path, [f"{key}={hint}"])


def test_a_name_that_looks_like_nothing_gets_no_hint(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "name: a\n")
    for override in ("model.name=efficientnet", "optim.schedule=xyz", "data.flip=perhaps"):
        with pytest.raises(UserError) as caught:
            load_config(path, [override])
        assert "nearest" not in str(caught.value)


def test_lr_scales_are_a_mapping(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "optim: {lr_scales: {stem: 0, fc: 10}}")
    config = load_config(path)
    assert config.optim.lr_scales == {"stem": 0.0, "fc": 10.0}
    assert config_from_dict(yaml.safe_load(to_yaml(config)), "again") == config
    assert load_config(path, ["optim.lr_scales={fc: 2}"]).optim.lr_scales == {"fc": 2.0}


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "x.yaml"
    file.write_text("data: {root: ~/photos}\n")
    config = load_config(file, ["tracking.run_root=~/runs", "model.init_from=~/w"])
    assert config.data.root == f"{tmp_path}/photos"
    assert config.run_dir.parent == tmp_path / "runs"
    assert config.model.init_from == f"{tmp_path}/w"

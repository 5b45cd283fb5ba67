"""One index on every rank, and a node with other data refused by name."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnet_dist.config_file import load_config
from resnet_dist.data.formats import build_index
from resnet_dist.data.index.index_file import StoredPaths, save_index
from resnet_dist.data.index.quarantine import write_quarantine
from resnet_dist.data.load.build import load_index
from resnet_dist.distributed import start
from resnet_dist.errors import UserError
from tests.support.cifar import write_binary, write_python
from tests.support.multirank import run_ranks
from tests.support.shards import hub_sample, jpeg, write_tar

HERE = os.uname().nodename


def load_on_two_nodes(rank: int, world_size: int, tiny_yaml: Path, cases: list[Any]) -> list[Any]:
    """Each case: a data set per node, the format, and overrides. Gives what each rank got."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    world = start()
    results: list[Any] = []
    for roots, data_format, *overrides in cases:
        given = [f"data.root={roots[rank]}", f"data.format={data_format}", *overrides]
        try:
            index = load_index(load_config(tiny_yaml, given), "train", world)
        except UserError as error:
            results.append(str(error))
            continue
        names = [os.path.relpath(path, roots[rank]) for path in index.paths]
        mapped = isinstance(index.paths, StoredPaths) and not index.labels.flags.owndata
        facts = index.fingerprint, index.labels.tolist(), index.sizes.tolist(), index.bad
        results.append((mapped, names, facts))
    return results


def on_two_nodes(tiny_yaml: Path, cases: list[Any]) -> list[tuple[Any, Any]]:
    ranks = run_ranks(load_on_two_nodes, 2, tiny_yaml, cases)
    return list(zip(*ranks, strict=True))


@pytest.fixture
def nodes(tmp_path: Path) -> list[Path]:
    """Where each of two nodes has its data."""
    return [tmp_path / "node0" / "data", tmp_path / "node1" / "data"]


def test_folders_of_two_nodes(tiny_folder: Path, tiny_yaml: Path, nodes: list[Path]) -> None:
    for node in nodes:
        shutil.copytree(tiny_folder, node)
    changes = {}
    for change in ("class", "bytes", "missing", "gone"):
        changes[change] = nodes[1].parent / change
        if change != "gone":
            shutil.copytree(tiny_folder, changes[change])
    shutil.rmtree(changes["class"] / "train" / "class2")
    with (changes["bytes"] / "train" / "class1" / "3.jpg").open("ab") as file:
        file.write(b"\0")
    (changes["missing"] / "train" / "class1" / "3.jpg").unlink()
    in_the_way = tiny_yaml.parent / "file"
    in_the_way.write_text("no folder")
    cases = [
        (nodes, "folder"),
        (nodes, "folder", f"tracking.run_root={in_the_way}/runs"),
        *[([nodes[0], root], "folder") for root in changes.values()],
        ([changes["gone"], nodes[1]], "folder"),
    ]
    good, sent, by_class, by_bytes, missing, gone, gone_on_main = on_two_nodes(tiny_yaml, cases)
    index = build_index("folder", tiny_folder, "train", None)
    names = [os.path.relpath(path, tiny_folder) for path in index.paths]
    facts = index.fingerprint, index.labels.tolist(), index.sizes.tolist(), {}
    assert good == ((True, names, facts), (True, names, facts))
    assert sent[0] == (False, names, facts)
    assert sent[1][2] == facts
    # Rank 0's paths, too: in real life the data have one path on all nodes.
    assert sent[1][1] == [os.path.relpath(nodes[0] / name, nodes[1]) for name in names]

    def says(pair: tuple[str, str], what: str) -> None:
        assert pair[0] == pair[1]
        assert pair[0].startswith(f"rank 1: {HERE}: data.root={nodes[1].parent}/")
        assert f"not the same train data as on rank 0: {what}" in pair[0]
        assert pair[0].endswith("; copy the data to this node again, or leave the node out")
        assert "\n" not in pair[0]

    says(by_class, "1 class folders, such as class2")
    size = (nodes[0] / "train" / "class1" / "3.jpg").stat().st_size
    file = changes["bytes"] / "train" / "class1" / "3.jpg"
    says(by_bytes, f"{file} has {size + 1} bytes here and {size} on rank 0")
    file = changes["missing"] / "train" / "class1" / "3.jpg"
    says(missing, f"{file} has 0 bytes here and {size} on rank 0")
    says(gone, f"{changes['gone']}/train: No such file or directory")
    assert gone_on_main[0] == gone_on_main[1]
    assert "no such folder" in gone_on_main[0]


def test_shards_and_cifar_of_two_nodes(tiny_yaml: Path, nodes: list[Path]) -> None:
    samples = hub_sample("n01", 3, 0, jpeg(30, 40)) + hub_sample("n02", 7, 1, jpeg(20, 10))
    for number, node in enumerate(nodes):
        write_tar(node / "foreign" / "x-train-0.tar", samples)
        write_tar(
            node / "other" / "x-train-0.tar", samples + [("note.txt", bytes(20_000 * number))]
        )
        for name, members in (
            ("own", samples),
            ("own-other", samples[3 * number :] + samples[: 3 * number]),
            ("own-short", samples),
        ):
            write_tar(node / name / "train" / "0.tar", members)
            index = build_index("shards", node / name, "train", None)
            save_index(index, node / name / "train" / "index.arrow", node / name)
        (write_binary, write_python)[number](node, "cifar100")
        write_binary(node / "cifar-other", "cifar10")
    os.truncate(nodes[1] / "own-short" / "train" / "0.tar", 1000)
    (nodes[1] / "own-gone").mkdir()
    shutil.copytree(nodes[0] / "own", nodes[0] / "own-gone")
    batch = nodes[1] / "cifar-other" / "cifar-10-batches-bin" / "data_batch_2.bin"
    batch.write_bytes(bytes(batch.stat().st_size))

    def named(name: str) -> list[Path]:
        return [node / name for node in nodes]

    cases = [
        (named("foreign"), "shards"),
        (named("own"), "shards"),
        (nodes, "cifar100", "data.train_crop=pad"),
        (named("other"), "shards"),
        (named("own-other"), "shards"),
        (named("own-short"), "shards"),
        (named("own-gone"), "shards"),
        (named("cifar-other"), "cifar10", "data.train_crop=pad"),
    ]
    foreign, own, cifar, *refused = on_two_nodes(tiny_yaml, cases)
    for pair in (foreign, own):
        assert pair[0] == pair[1]
        assert pair[0][0]  # mapped
    assert own[0][1] == ["train/0.tar/n01_3.jpg", "train/0.tar/n02_7.jpg"]
    assert cifar[0] == cifar[1]
    assert cifar[0][2][1] == [0, 99, 50, 1, 2]
    expected = (
        rf"{nodes[1]}/other/x-train-0.tar has \d+ bytes here and \d+ on rank 0",
        "its index has a different fingerprint",
        rf"{nodes[1]}/own-short/train/0.tar has 1000 bytes here and \d+ on rank 0",
        r"own-gone/train/index.arrow: not a usable index \(.*No such file",
        "its index has a different fingerprint",
    )
    for pair, what in zip(refused, expected, strict=True):
        assert pair[0] == pair[1]
        with pytest.raises(UserError, match=rf"^rank 1: {HERE}: .*{what}"):
            raise UserError(pair[0])


def test_the_quarantine_of_rank_0_counts(
    tiny_folder: Path, tiny_yaml: Path, nodes: list[Path]
) -> None:
    for node in nodes:
        shutil.copytree(tiny_folder, node)
    plain = build_index("folder", nodes[0], "train", None)
    write_quarantine(nodes[0], {"train/class0/1.jpg": "truncated", "val/class0/0.jpg": "so, too"})
    write_quarantine(nodes[1], {"train/class0/2.jpg": "truncated"})
    number = [os.path.relpath(path, nodes[0]) for path in plain.paths].index("train/class0/1.jpg")
    ((first, second),) = on_two_nodes(tiny_yaml, [(nodes, "folder")])
    assert first[1:] == second[1:]
    fingerprint, labels, sizes, bad = first[2]
    assert fingerprint == plain.fingerprint
    assert labels == plain.labels.tolist()
    assert bad == {number: "truncated"}
    assert np.flatnonzero(np.array(sizes).max(axis=1) == 0).tolist() == [number]


def test_lists_of_two_nodes(tiny_yaml: Path, nodes: list[Path]) -> None:
    """What stands in them counts, and the bytes of the images; not folders, which they have not."""
    for node in nodes:
        for name in ("same", "label", "bytes"):
            (node / name).mkdir(parents=True)
            (node / name / "1.jpg").write_bytes(jpeg(8, 9))
            (node / name / "train.csv").write_text("1.jpg,x\n1.jpg,x\n")
            (node / name / "val.csv").write_text("1.jpg,x\n")
    (nodes[1] / "label" / "train.csv").write_text("1.jpg,y\n1.jpg,y\n")
    (nodes[1] / "bytes" / "1.jpg").write_bytes(jpeg(8, 9) + b"\0")
    (nodes[0] / "gone").mkdir()
    shutil.copytree(nodes[0] / "same", nodes[0] / "gone", dirs_exist_ok=True)
    names = ("same", "label", "bytes", "gone")
    cases = [([node / name for node in nodes], "list") for name in names]
    same, label, nbytes, gone = on_two_nodes(tiny_yaml, cases)
    assert gone[0] == gone[1]
    assert gone[0].startswith(
        f"rank 1: {HERE}: data.root={nodes[1]}/gone: not the same train data as on rank 0"
    )
    assert same[0] == same[1]
    assert same[0][1] == ["1.jpg", "1.jpg"]
    assert "not the same train data as on rank 0: 1 files, such as train.csv; copy the" in label[0]
    assert f"on rank 0: {nodes[1]}/bytes/1.jpg has " in nbytes[0]

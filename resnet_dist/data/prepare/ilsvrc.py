"""ILSVRC2012 as downloaded: a tar with a tar per class, a tar of validation images, and the devkit.

The devkit has the labels of the validation images. The tars are read without unpacking them. They
are not trusted: anything but regular image files under ordinary names is refused.
"""

import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.data.index.listing import IMAGE_SUFFIXES
from resnet_dist.data.index.tar_members import RefusedTar, TarHeaders, plain_files
from resnet_dist.data.prepare.images import TarMembers, unreadable
from resnet_dist.errors import UserError
from resnet_dist.files import regular

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "data/meta.mat"

MAX_DEVKIT_FILE_BYTES = 1 << 24

Member = tuple[str, int, int]  # name, offset of the first byte in the file, size in bytes


def list_train(root: Path, map_: Callable[..., Iterable[Any]]) -> dict[str, list[Member]]:
    """Returns the training images of each class, by synset.

    map_: like the built-in `map`; may run in processes.

    Raises:
        UserError: a tar is missing, damaged, or not ILSVRC2012's.
    """
    path = root / TRAIN_TAR
    tars: dict[str, Member] = {}
    for name, offset, nbytes in _members(path, (".tar",)):
        synset = name.removesuffix(".tar")
        if not re.fullmatch(r"n\d{8}", synset) or synset in tars:
            raise UserError(f"{path}: member {name!r}: expected one nXXXXXXXX.tar of each class")
        tars[synset] = (name, offset, nbytes)
    found = map_(_class_members, [path] * len(tars), tars.values())
    return {synset: sorted(images) for synset, images in zip(tars, found, strict=True)}


def list_val(root: Path) -> dict[str, list[Member]]:
    """Returns the validation images of each class, by synset, from the devkit's ground truth.

    Raises:
        UserError: a tar is missing, damaged, or not ILSVRC2012's.
    """
    path = root / VAL_TAR
    truth, synset_of = _read_devkit(root / DEVKIT)
    classes: dict[str, list[Member]] = {}
    seen = set()
    for member in _members(path, IMAGE_SUFFIXES):
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", member[0])
        image = int(number[1]) if number else 0
        if not 1 <= image <= len(truth) or image in seen:
            raise UserError(
                f"{path}: member {member[0]!r}: expected each of ILSVRC2012_val_00000001.JPEG to "
                f"ILSVRC2012_val_{len(truth):08}.JPEG once"
            )
        seen.add(image)
        classes.setdefault(synset_of[truth[image - 1]], []).append(member)
    if len(seen) < len(truth):
        raise UserError(
            f"{path}: {len(seen):,} images, but {len(truth):,} in the devkit; copy it again"
        )
    return {synset: sorted(images) for synset, images in classes.items()}


def as_tar_members(path: Path, members: list[Member]) -> TarMembers:
    """Returns the members of one tar as images."""
    offset = np.array([offset for _, offset, _ in members], np.int64)
    nbytes = np.array([nbytes for _, _, nbytes in members], np.int64)
    return TarMembers((str(path),), np.zeros(len(members), np.int32), offset, nbytes)


def _class_members(path: Path, class_tar: Member) -> list[Member]:
    images = list(_members(path, IMAGE_SUFFIXES, class_tar))
    if not images:
        raise UserError(f"{path}: member {class_tar[0]!r}: a class without images; copy it again")
    return images


def _members(
    path: Path, suffixes: tuple[str, ...], class_tar: Member | None = None
) -> Iterator[Member]:
    """Yields the members of a tar, or of a tar inside it.

    Raises:
        UserError: a member does not belong there, or the tar cannot be read.
    """
    where, start, end = str(path), 0, None
    if class_tar is not None:
        where, start = f"{path}: member {class_tar[0]!r}", class_tar[1]
        end = start + class_tar[2]
    try:
        with TarHeaders(path) as stream:
            stream.seek(start)
            for member in plain_files(stream, end):
                if not member.name.lower().endswith(suffixes):
                    raise RefusedTar(f"member {member.name!r}: not {' or '.join(suffixes)}")
                yield posixpath.basename(member.name), member.offset_data, member.size
    except RefusedTar as error:
        raise UserError(f"{where}: {error}; refused, copy it again") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _read_devkit(path: Path) -> tuple[list[int], dict[int, str]]:
    """Returns the ILSVRC2012_ID of each validation image, and the synset of each ID.

    Raises:
        UserError: the devkit is missing, damaged, or has unexpected content.
    """
    from scipy.io import loadmat  # slow to import, and only this source needs it

    files = {}
    try:
        with (
            open(path, "rb", opener=regular) as file,
            tarfile.open(fileobj=file, mode="r:gz") as tar,
        ):
            for member in tar:
                wanted = next((n for n in (GROUND_TRUTH, SYNSETS) if member.name.endswith(n)), None)
                if wanted and member.isreg() and member.size <= MAX_DEVKIT_FILE_BYTES:
                    content = tar.extractfile(member)
                    files[wanted] = content.read() if content else b""
        truth = [int(line) for line in files[GROUND_TRUTH].split()]
        synsets = loadmat(io.BytesIO(files[SYNSETS]))["synsets"].ravel()
        synset_of = {
            int(one["ILSVRC2012_ID"].item()): str(one["WNID"].item())
            for one in synsets
            if int(one["num_children"].item()) == 0  # the others are superclasses
        }
        if not truth or not set(truth) <= set(synset_of):
            raise ValueError("a class in the ground truth that is not in meta.mat")
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]}; copy it again") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception as error:  # for damaged files, gzip, tarfile and scipy raise all kinds
        raise UserError(f"{path}: damaged ({error}); copy it again") from None
    return truth, synset_of

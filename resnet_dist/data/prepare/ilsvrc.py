"""ILSVRC2012 as it is downloaded: a tar of a tar per class, a tar of validation images, and the
devkit, which says what these show. All are read in place.

A tar from elsewhere is not trusted: what is no plain image under a plain name is refused.
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

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "data/meta.mat"

MAX_DEVKIT_FILE_BYTES = 1 << 24

Member = tuple[str, int, int]  # name, offset of its first byte in the file, nbytes


def list_train(root: Path, map_: Callable[..., Iterable[Any]]) -> dict[str, list[Member]]:
    """Images of each class, by synset. map_: as the built-in `map`; may run in processes.

    Raises:
        UserError: a missing or damaged tar, or one that is not ILSVRC2012's.
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
    """Images of each class, by synset, as the devkit's ground truth has it.

    Raises:
        UserError: a missing or damaged tar, or one that is not ILSVRC2012's.
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
            f"{path}: {len(seen):,} images, and {len(truth):,} in the devkit; copy it again"
        )
    return {synset: sorted(images) for synset, images in classes.items()}


def as_tar_members(path: Path, members: list[Member]) -> TarMembers:
    offset, nbytes = (np.array([m[part] for m in members], np.int64) for part in (1, 2))
    return TarMembers((str(path),), np.zeros(len(members), np.int32), offset, nbytes)


def _class_members(path: Path, class_tar: Member) -> list[Member]:
    images = list(_members(path, IMAGE_SUFFIXES, class_tar))
    if not images:
        raise UserError(f"{path}: member {class_tar[0]!r}: a class without images; copy it again")
    return images


def _members(
    path: Path, suffixes: tuple[str, ...], class_tar: Member | None = None
) -> Iterator[Member]:
    """Of the tar, or of one that is a member of it.

    Raises:
        UserError: a member that has no place there.
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
    """(ILSVRC2012_ID of each validation image, synset of each ID).

    Raises:
        UserError: missing, damaged, or not what it should be.
    """
    from scipy.io import loadmat  # slow to import, and only this source needs it

    files = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
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
            if int(one["num_children"].item()) == 0  # the others are above the 1000 classes
        }
        if not truth or not set(truth) <= set(synset_of):
            raise ValueError("a class in the ground truth that is not in meta.mat")
    except FileNotFoundError as error:
        raise unreadable(path, error) from None
    except KeyError as error:
        raise UserError(f"{path}: no {error.args[0]} in it; copy it again") from None
    except Exception as error:  # gzip, tarfile and scipy raise almost anything on damaged files
        raise UserError(f"{path}: damaged ({error}); copy it again") from None
    return truth, synset_of

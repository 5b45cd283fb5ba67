"""Opens the file of an image, which may turn out to be a pipe, a device, or a link to nowhere."""

import errno
import os
from typing import BinaryIO

from resnet_dist.errors import UserError
from resnet_dist.files import regular

MAX_IMAGE_BYTES = 1 << 30  # ImageNet's largest file has 15 MB
# Errors that no retry can cure. EINVAL: not a regular file.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
        errno.ENXIO, errno.ENAMETOOLONG, errno.EINVAL)  # fmt: skip


class UnreadableImage(UserError):
    """One image cannot be read. The message says why, but not which image it is."""


def open_image_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        UnreadableImage: it is too large.
        OSError: it cannot be opened, or is no regular file.
    """
    file = open(path, "rb", opener=regular)  # noqa: SIM115 (the caller closes it)
    try:
        check_bytes(os.fstat(file.fileno()).st_size)
    except UnreadableImage:
        file.close()
        raise
    return file


def check_bytes(nbytes: int) -> None:
    """Raises UnreadableImage if an encoded image is so large that it would fill the memory."""
    if nbytes > MAX_IMAGE_BYTES:
        raise UnreadableImage(f"{nbytes:,} bytes, too large for an image")


def read_image_file(path: str) -> bytes:
    """Returns the content of a regular file. Raises what `open_image_file` raises."""
    # Without a file object, which makes twice as many system calls. After each of them a thread
    # waits for its turn to run Python again.
    descriptor = regular(path, os.O_RDONLY)
    try:
        nbytes = os.fstat(descriptor).st_size
        check_bytes(nbytes)
        pieces: list[bytes] = []
        while nbytes > 0 and (piece := os.read(descriptor, nbytes)):
            pieces.append(piece)
            nbytes -= len(piece)  # a file that grows may have no end
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(descriptor)

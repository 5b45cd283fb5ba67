"""Reads the file of an image, which may turn out to be a pipe, a device, or a link to nowhere."""

import errno
import os
import stat

from resnet_dist.data.index.pillow import UnreadableImage

MAX_IMAGE_BYTES = 1 << 30  # ImageNet's largest file has 15 MB
# Errors that no retry can cure.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
        errno.ENXIO)  # fmt: skip


def read_image_file(path: str) -> bytes:
    """Returns the content of a regular file.

    Raises:
        UnreadableImage: it is no regular file, or too large.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(opened, "rb", buffering=0) as file:
        facts = os.fstat(opened)
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableImage("not a regular file")
        check_bytes(facts.st_size)
        return file.read()


def check_bytes(nbytes: int) -> None:
    """Raises UnreadableImage if an encoded image is so large that it would fill the memory."""
    if nbytes > MAX_IMAGE_BYTES:
        raise UnreadableImage(f"{nbytes:,} bytes, too large for an image")

"""Lists the regular files in an untrusted tar by its headers, without unpacking it."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from resnet_dist.files import regular

MAX_HEADER_BYTES = 1 << 20  # limit for long names, which are read into memory


class RefusedTar(Exception):
    """A tar is refused. The message names the member, but not the tar."""


class TarHeaders(io.FileIO):
    """A tar opened for `tarfile`, which alone would read as many bytes as a header says."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it cannot be opened, or is no regular file."""
        super().__init__(path, opener=regular)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise RefusedTar(f"a header of {size} bytes")
        return super().read(size) or b""


def plain_files(stream: TarHeaders, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yields the members of the tar from the stream's position to byte `end`, or the file's end.

    Their `offset_data` counts from the start of the file, so that a tar inside a tar can be read in
    place.

    Raises:
        RefusedTar: there is a link, a device, a path that leads outside or a size past the end, or
            the tar is damaged or truncated.
        OSError: it cannot be read.
    """
    end = os.fstat(stream.fileno()).st_size if end is None else end
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                # Check at once, before `tarfile` acts on what the header says.
                _check(member, end)
                if not member.isdir():
                    yield member
            mark = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise RefusedTar(f"not a readable tar ({error})") from None
    # `tarfile` takes anything that it cannot read for the end of the tar, and ignores what comes
    # after the end mark, as after `cat a.tar b.tar`. So check that only zeros follow.
    rest = os.pread(stream.fileno(), max(0, min(MAX_HEADER_BYTES, end - mark)), mark)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise RefusedTar(f"damaged or truncated at byte {mark} of {end}")


def _check(member: tarfile.TarInfo, end: int) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise RefusedTar(f"member {name!r}: a path that leads outside")
    if member.isdir():
        if member.size:
            raise RefusedTar(f"member {name!r}: a folder of {member.size} bytes")
    elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise RefusedTar(f"member {name!r}: a link, a device or another special member")
    elif not 0 <= member.size <= end - member.offset_data:
        raise RefusedTar(f"member {name!r}: {member.size} bytes, past the end of the tar")

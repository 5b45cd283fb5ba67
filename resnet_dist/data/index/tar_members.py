"""The plain files in a tar that nobody vouches for, found by its headers and never unpacked."""

import io
import os
import tarfile
from collections.abc import Iterator

MAX_HEADER_BYTES = 1 << 20  # a long name; no more of it is held in memory


class RefusedTar(Exception):
    """Why a tar is refused: one line, with the member and without the tar."""


class TarHeaders(io.FileIO):
    """A tar for `tarfile`, which would believe any length that a header of it states."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise RefusedTar(f"a header of {size} bytes")
        return super().read(size) or b""


def plain_files(stream: TarHeaders, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Members of the tar from the stream's position to byte `end`, or to the file's end.

    `offset_data` of each counts from the file's start, so that a tar inside a tar is read in place.

    Raises:
        RefusedTar: a link, a device, a path that leads elsewhere, a size past the end, or a tar
            that is damaged or cut short.
        OSError: it cannot be read.
    """
    end = os.fstat(stream.fileno()).st_size if end is None else end
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                # From here on, or `tarfile` would follow what the header says.
                _check(member, end)
                if not member.isdir():
                    yield member
            mark = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise RefusedTar(f"not a tar that can be read ({error})") from None
    # `tarfile` takes whatever it cannot read for the end, and the end of the file, too. What stands
    # behind the end mark, as after `cat a.tar b.tar`, it leaves out.
    rest = os.pread(stream.fileno(), max(0, min(MAX_HEADER_BYTES, end - mark)), mark)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise RefusedTar(f"damaged or cut short at byte {mark} of {end}")


def _check(member: tarfile.TarInfo, end: int) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise RefusedTar(f"member {name!r}: a path that leaves the tar")
    if member.isdir():
        if member.size:
            raise RefusedTar(f"member {name!r}: a folder of {member.size} bytes")
    elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise RefusedTar(f"member {name!r}: a link, a device or another special member")
    elif not 0 <= member.size <= end - member.offset_data:
        raise RefusedTar(f"member {name!r}: {member.size} bytes, past the end of the tar")

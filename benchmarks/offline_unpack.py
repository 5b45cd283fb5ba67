"""Unpacks the packages from benchmarks/offline_pack.py that this machine lacks. Installs nothing.

    python benchmarks/offline_unpack.py FOLDER SITE

Unpacks them to SITE, which must then be put on PYTHONPATH. Packages that can already be imported
are skipped.
"""

import importlib.util
import lzma
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def main(folder: Path, site: Path) -> None:
    archives = {path.name.removesuffix(".tar.xz"): path for path in folder.glob("*.tar.xz")}
    if not archives:
        sys.exit(f"{folder}: no archives found; make them with benchmarks/offline_pack.py")
    missing = sorted(module for module in archives if not is_here(module))
    with ThreadPoolExecutor() as pool:  # threads, because lzma releases the GIL
        list(pool.map(lambda module: unpack(archives[module], site), missing))
    here = ", ".join(sorted(archives.keys() - set(missing)))
    print(f"unpacked: {', '.join(missing) or 'nothing'}; here already: {here or 'nothing'}")


def is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def unpack(archive: Path, site: Path) -> None:
    try:
        with lzma.open(archive) as raw:
            with tarfile.open(fileobj=raw, mode="r|") as tar:
                tar.extractall(site, filter="data")
            while raw.read(1 << 20):  # reads to the end, so that xz verifies its checksum
                pass
    except (lzma.LZMAError, EOFError, tarfile.TarError) as error:
        sys.exit(f"{archive}: damaged ({error}); copy it here again")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

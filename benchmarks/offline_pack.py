"""Packs Python packages for a machine without internet, for one Python and one GPU architecture.

    python benchmarks/offline_pack.py FOLDER [--python 3.12] [--arch 90]

Writes one archive per package to FOLDER: DALI with its dependencies, pyarrow, PyYAML, safetensors
and pytest. On the other machine, benchmarks/offline_unpack.py unpacks the ones that are missing.
torch and torchvision must already be installed there. The archives take less than 64 MiB in total,
while the wheels would take 260 MiB. To achieve this:

1. Only the files of each wheel that this project loads are kept: the extension modules for one
   Python version, and the libraries for DALI's JPEG, PNG, BMP, PNM and TIFF decoders and for
   pyarrow's memory and IPC.
2. In every fat binary (CUDA code for many GPUs), the images for other GPU architectures and the PTX
   code are overwritten with zeros. Headers and sizes stay the same, so nothing moves.
3. Libraries that are loaded but never called here (DALI's for S3, video, audio and FITS; Arrow's
   compute engine and Parquet) are replaced by stubs with the same name and symbols.

Needs pip with access to its registry, gcc, nm and readelf. Takes a few minutes, mostly for xz.
"""

import argparse
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Bundle:
    """Wheels that go into one archive, which is named after the module that they provide."""

    wheels: dict[str, str]  # name -> version
    left_out: tuple[str, ...] = ()  # patterns of paths in the wheels to omit
    stubbed: tuple[str, ...] = ()  # patterns of names of libraries to replace by stubs


BUNDLES = {
    "nvidia.dali": Bundle(
        wheels={
            "nvidia-dali-cuda130": "2.4.0",
            "nvidia-nvimgcodec-cu13": "0.9.0.20",
            "nvidia-nvjpeg": "13.3.2.43",
            "optree": "0.20.0",
            "astunparse": "1.6.3",
            "gast": "0.7.0",
            "six": "1.17.0",
            "makefun": "1.16.0",
        },
        # Without nvJPEG2000, nvTIFF and nvCOMP, the CPU decodes files of these formats.
        left_out=(
            "nvidia/dali/include/*",
            "nvidia/dali/Acknowledgements.txt",
            "nvidia/nvimgcodec/include/*",
            "nvidia/nvimgcodec/tools/*",
            "nvidia/nvimgcodec/nvimgcodec_impl.*",  # Python binding; DALI loads the C library
            "nvidia/nvimgcodec/extensions/libnvjpeg2k_ext*",
            "nvidia/nvimgcodec/extensions/libnvtiff_ext*",
            "nvidia/cu13/include/*",
        ),
        # Google's cloud storage library must stay, because DALI calls it at startup.
        stubbed=(
            *("libaws*", "libs2n*", "libav*", "libswscale*"),
            *("libsndfile*", "libFLAC*", "libogg*", "libopus*", "libcfitsio*"),
        ),
    ),
    "pyarrow": Bundle(
        wheels={"pyarrow": "26.0.1"},
        left_out=(
            "pyarrow/include/*",
            "pyarrow/src/*",
            "pyarrow/tests/*",
            "pyarrow/_*.so",  # all extension modules except pyarrow.lib
            "pyarrow/libarrow_flight*",
            "pyarrow/libarrow_python_*",
            "pyarrow/libarrow_s3*",
        ),
        stubbed=(
            *("libarrow_acero*", "libarrow_compute*", "libarrow_dataset*", "libarrow_substrait*"),
            "libparquet*",
        ),
    ),
    "yaml": Bundle({"pyyaml": "6.0.4"}),
    "safetensors": Bundle({"safetensors": "0.8.0"}),
    "pytest": Bundle(
        {
            "pytest": "9.2.0",
            "pluggy": "1.7.0",
            "iniconfig": "2.3.1",
            "packaging": "26.3",
            "pygments": "2.21.0",
        }
    ),
}
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
KEPT_OF_DIST_INFO = ("METADATA", "RECORD", "WHEEL", "INSTALLER", "entry_points.txt")
SOURCES = (".pyi", ".pyx", ".pxd", ".pxi", ".h", ".cc")
LIMIT_MIB = 64

FATBIN_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
FATBIN_MAGIC, PTX_IMAGE, ELF_IMAGE = 0xBA55ED50, 1, 2
SHT_NOBITS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--python", default="3.12", help="Python version of the other machine; default: 3.12"
    )
    parser.add_argument(
        "--arch", type=int, default=90, help="its GPU architecture; default: 90 (H100, H200)"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        wheels = download(Path(name) / "wheels", given.python)
        trees = {}
        for module, bundle in BUNDLES.items():
            trees[module] = Path(name) / module
            unzip(wheels, bundle, trees[module], given.python)
            for library in libraries(trees[module]):
                keep_architecture(library, given.arch)
            stub(trees[module], bundle.stubbed)
        with ThreadPoolExecutor() as pool:  # threads, because lzma releases the GIL
            sizes = list(pool.map(lambda m: compress(trees[m], archive(given.folder, m)), trees))
    for module, size in zip(trees, sizes, strict=True):
        print(f"{size / 2**20:5.1f} MiB  {archive(given.folder, module)}")
    print(f"{sum(sizes) / 2**20:5.1f} MiB  in total")
    if sum(sizes) > LIMIT_MIB * 2**20:
        sys.exit(f"{given.folder}: more than {LIMIT_MIB} MiB; remove an archive")


def archive(folder: Path, module: str) -> Path:
    return folder / f"{module}.tar.xz"


def download(folder: Path, python: str) -> dict[str, Path]:
    """Downloads the wheels of all bundles. Returns name as in BUNDLES -> path."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    pins = [f"{n}=={v}" for bundle in BUNDLES.values() for n, v in bundle.wheels.items()]
    subprocess.run(command + pins, check=True)
    return {p.name.split("-")[0].lower().replace("_", "-"): p for p in folder.glob("*.whl")}


def unzip(wheels: dict[str, Path], bundle: Bundle, tree: Path, python: str) -> None:
    """Unpacks the needed files of a bundle's wheels to `tree`, laid out as in site-packages."""
    of_python = f".cpython-{python.replace('.', '')}-"
    for name in bundle.wheels:
        with zipfile.ZipFile(wheels[name]) as wheel:
            for item in wheel.infolist():
                path = item.filename
                other_python = ".cpython-" in path and of_python not in path
                unneeded_info = ".dist-info/" in path and not path.endswith(KEPT_OF_DIST_INFO)
                if other_python or unneeded_info or item.is_dir() or ".data/" in path:
                    continue
                if matches(path, bundle.left_out) or path.endswith(SOURCES):
                    continue
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(item) as source, open(tree / path, "wb") as file:
                    shutil.copyfileobj(source, file)
    if (tree / "nvidia").is_dir():
        # torch's wheels have a package of this name too; extend_path makes Python search both.
        text = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"
        (tree / "nvidia" / "__init__.py").write_text(text)
    drop_copies(tree)


def matches(text: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def drop_copies(tree: Path) -> None:
    """Removes duplicate libraries: wheels cannot hold links, so a library may be in one under
    several names. Keeps the copy whose name is the library's soname."""
    for library in libraries(tree):
        name = soname(library)
        if name not in ("", library.name) and (library.parent / name).exists():
            library.unlink()


def libraries(tree: Path) -> list[Path]:
    """Returns all ELF libraries below `tree`, including extension modules."""
    return [p for p in sorted(tree.rglob("*.so*")) if p.read_bytes()[:4] == b"\x7fELF"]


# --------------------------------------------------------------------------------------------------
# Fat binaries


def keep_architecture(library: Path, arch: int) -> None:
    """Overwrites code for other architectures than `arch` with zeros.

    A fat binary that has no code for `arch` is not changed.
    """
    data = library.read_bytes()
    with open(library, "r+b") as file:
        for images in fat_binaries(data):
            kept = [(kind, of) for kind, of, _, _ in images if (kind, of) == (ELF_IMAGE, arch)]
            for kind, of, offset, size in images:
                if kept and (kind, of) != (ELF_IMAGE, arch):
                    file.seek(offset)
                    file.write(bytes(size))


def fat_binaries(data: bytes) -> list[list[tuple[int, int, int, int]]]:
    """Returns the images of each fat binary in an ELF file: (kind, architecture, offset, bytes).

    Raises:
        ValueError: a fat binary has an unknown layout.
    """
    found = []
    for offset, size in fatbin_sections(data):
        at, end = offset, offset + size
        while at + 16 <= end:
            magic, _, header, nbytes = struct.unpack_from("<IHHQ", data, at)
            if magic != FATBIN_MAGIC:  # padding
                at += 4
                continue
            here, last, images = at + header, at + header + nbytes, []
            while here < last:
                kind, _, image_header, payload = struct.unpack_from("<HHIQ", data, here)
                (arch,) = struct.unpack_from("<I", data, here + 28)
                if kind not in (PTX_IMAGE, ELF_IMAGE) or not 64 <= image_header < 4096:
                    raise ValueError(f"unknown image at {here:#x}: kind {kind}")
                images.append((kind, arch, here + image_header, payload))
                here += image_header + payload
            if here != last:
                raise ValueError(f"the images of the fat binary at {at:#x} do not fill it")
            found.append(images)
            at = last + -last % 8
    return found


def fatbin_sections(data: bytes) -> list[tuple[int, int]]:
    """Returns (offset, bytes) of each section with CUDA code in a 64-bit little-endian ELF file."""
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    found = []
    for name_offset, kind, _, _, offset, nbytes in heads:
        name_at = heads[names][4] + name_offset
        name = data[name_at : data.index(b"\0", name_at)].decode()
        if name in FATBIN_SECTIONS and kind != SHT_NOBITS:
            found.append((offset, nbytes))
    return found


# --------------------------------------------------------------------------------------------------
# Stubs


def stub(tree: Path, patterns: tuple[str, ...]) -> None:
    """Replaces libraries by stubs that define the symbols which other libraries import from them.

    All functions of a stub return zero.
    """
    replaced = [library for library in libraries(tree) if matches(library.name, patterns)]
    wanted: set[str] = set()
    for library in set(libraries(tree)) - set(replaced):
        wanted |= symbols(library, "undefined").keys()
    for library in replaced:
        lines, versions = ['.section .note.GNU-stack,"",@progbits'], {}
        for name, (letter, size, version) in sorted(symbols(library, "defined").items()):
            if letter == "A" or name not in wanted:  # A: an absolute symbol, which names a version
                continue
            if version:
                versions.setdefault(version, []).append(name)
            if letter in "TtWi":
                lines += [".text", f'.globl "{name}"', f'.type "{name}", @function', f'"{name}":']
                lines += ["xor %eax, %eax", "ret"]
            else:
                lines += [".data", ".balign 32", f'.globl "{name}"', f'.type "{name}", @object']
                lines += [f'.size "{name}", {size}', f'"{name}":', f".zero {max(size, 8)}"]
        assemble(library, "\n".join(lines) + "\n", versions)


def assemble(library: Path, source: str, versions: dict[str, list[str]]) -> None:
    """Replaces a library by one assembled from `source`. versions: version -> symbol names."""
    command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{soname(library) or library.name}"]
    script = library.with_suffix(".versions")
    if versions:
        nodes = (f"{v} {{ global: {' '.join(n + ';' for n in versions[v])} }};" for v in versions)
        script.write_text("\n".join(nodes) + "\n")
        command.append(f"-Wl,--version-script={script}")
    library.unlink()
    command += ["-x", "assembler", "-", "-o", str(library)]
    subprocess.run(command, input=source, check=True, text=True)
    script.unlink(missing_ok=True)


def symbols(library: Path, which: str) -> dict[str, tuple[str, int, str]]:
    """Returns the dynamic symbols of a library: name -> (nm's letter, bytes, version or "").

    which: "defined" or "undefined".
    """
    command = ["nm", "-D", "-S", f"--{which}-only", str(library)]
    found = {}
    for line in output_of(command).splitlines():
        *numbers, letter, name = line.split()
        size = int(numbers[1], 16) if len(numbers) == 2 else 0
        found[name.split("@")[0]] = letter, size, name.rpartition("@")[2] if "@" in name else ""
    return found


def soname(library: Path) -> str:
    text = output_of(["readelf", "-d", str(library)])
    return text.partition("soname: [")[2].partition("]")[0]


def output_of(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# --------------------------------------------------------------------------------------------------


def compress(tree: Path, path: Path) -> int:
    """Writes the tree to a .tar.xz file, reproducibly. Returns the size of the file in bytes."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]

    def anonymous(item: tarfile.TarInfo) -> tarfile.TarInfo:
        item.uid = item.gid = item.mtime = 0
        item.uname = item.gname = ""
        return item

    with (
        lzma.open(path, "wb", filters=filters, check=lzma.CHECK_CRC64) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as tar,
    ):
        for file in sorted(p for p in tree.rglob("*") if p.is_file()):
            tar.add(file, str(file.relative_to(tree)), filter=anonymous)
    return path.stat().st_size


if __name__ == "__main__":
    main()

"""How much memory the reader takes for the images that Pillow decodes."""

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.waiting import HANG_SECONDS

IMAGES = 24
WHOLE_KB = 3000 * 4000 * 3 // 1024

# Prints by how many KB the process has grown at most, and how many bytes it still holds.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from resnet_dist.data.formats import build_index
from resnet_dist.data.load.reader import Reader

def peak_kb():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

index = build_index("folder", Path(sys.argv[1]), "train", None)
reader = Reader(index, threads=2)
reader.read(0, (0, 0, 1, 1))  # what the first one loads
before = peak_kb()
boxes = np.tile(np.array([1000, 1000, 1224, 1224], np.int32), (len(index), 1))
images = reader.read_ahead(np.arange(len(index)), boxes)()
print(peak_kb() - before, sum(image.data.nbytes for image in images))
"""


def test_few_images_are_whole_at_a_time(tmp_path: Path) -> None:
    """One for each thread, not the batch: of the others only the box is kept."""
    first = tmp_path / "train" / "class0" / "00.tif"
    first.parent.mkdir(parents=True)
    Image.new("RGB", (4000, 3000), "red").save(first, compression="tiff_adobe_deflate")
    for number in range(1, IMAGES):
        shutil.copy(first, first.with_name(f"{number:02}.tif"))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    grown_kb, held = map(int, done.stdout.split())
    assert grown_kb < IMAGES * WHOLE_KB / 3
    assert IMAGES * 224 * 224 * 3 <= held < IMAGES * 1.01 * 224 * 224 * 3

"""Keeps the image libraries' own lines off the screen: they name no file, and ours do.

libjpeg, libpng and nvImageCodec write to file descriptor 2, and have no setting for it
(DALI_NVIMGCODEC_LOG_LEVEL does not go below errors). So that descriptor leads to a small process,
which passes on everything else. It is a process of its own because a crash must not take with it
what was said about it. Python's own messages do not go through it.
"""

import contextlib
import os
import re
import subprocess
import sys

# Lines of nvImageCodec and libpng, and messages of libjpeg (jerror.h) about damaged images.
NOISE = re.compile(
    rb"(\x1b\[[0-9;]*m)?\[(ERROR|WARNING)\] *(\x1b\[0m)?\[\w+(decoder|parser)\w*\]"
    rb"|libpng (warning|error): "
    rb"|(Corrupt JPEG data|Premature end of JPEG|Invalid JPEG file structure|Invalid progressive)"
    rb"|(Inconsistent progression|Unsupported JPEG|Unsupported marker|Unknown Adobe color)"
    rb"|(Huffman table|Quantization table|Arithmetic table) 0x|Invalid SOS parameters"
    rb"|Bogus (Huffman|marker|sampling|DQT|DAC|DHT|JPEG|virtual|input|buffer)"
)


def filter_stderr() -> None:
    """Filters what is written to file descriptor 2 from now on. Only a program calls it, once."""
    try:
        screen = os.dup(2)
        passing_on = subprocess.Popen(
            [sys.executable, "-IS", __file__],
            stdin=subprocess.PIPE,
            stdout=screen,
            start_new_session=True,  # Ctrl-C in the terminal must not end it first
        )
    except OSError:  # descriptor 2 is closed, or no process can be started
        return
    assert passing_on.stdin is not None
    os.dup2(passing_on.stdin.fileno(), 2)
    passing_on.stdin.close()
    passing_on.returncode = 0  # it ends by itself; nobody waits for it
    encoding = sys.stderr.encoding
    sys.stderr = open(screen, "w", 1, encoding, "any_name")  # noqa: SIM115 (until the end)


def main() -> None:
    """Copies lines from stdin to stdout, except NOISE. A part of a line waits for its end.

    Reads to the end even if the screen has gone away: who writes here must not be stopped by that.
    """
    for line in sys.stdin.buffer:
        if not NOISE.match(line):
            with contextlib.suppress(OSError):
                os.write(1, line)


if __name__ == "__main__":
    main()

"""DATA/bad_samples.tsv: samples that are known to be unreadable, a line `name<TAB>reason` each.

Names are relative to DATA: train/cat/1.jpg, or train/000000.tar/1.jpg. They may contain any bytes
that a file system allows; tabs, line ends and backslashes are written as \\t, \\n, \\r and \\\\.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.files import replace_file

QUARANTINE = "bad_samples.tsv"

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_PLAIN = {text: character for character, text in _ESCAPES.items()}


def read_quarantine(root: Path) -> dict[str, str]:
    """Returns name -> reason; empty if there is no such file.

    Raises:
        UserError: the file cannot be read, or a line has no tab.
    """
    path = root / QUARANTINE
    if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
        raise UserError(f"{path}: not a regular file; remove it")
    try:
        text = os.fsdecode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it readable or remove it") from None
    bad = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        name, tab, reason = line.partition("\t")
        if not tab:
            raise UserError(
                f"{path}:{number}: has no tab; expected name<TAB>reason: fix or remove this line"
            )
        bad[_unescape(name)] = _unescape(reason)
    return bad


def write_quarantine(root: Path, bad: Mapping[str, str]) -> None:
    """Writes the file, sorted by name; removes it if nothing is bad.

    Raises:
        OSError: `root` cannot be written.
    """
    path = root / QUARANTINE
    if not bad:
        if path.exists():
            path.unlink()
        return
    text = "".join(f"{escape(name)}\t{escape(bad[name])}\n" for name in sorted(bad))
    replace_file(path, os.fsencode(text))


def escape(text: str) -> str:
    """Escapes tabs, line ends and backslashes, so that the text fits on one line."""
    return re.sub(r"[\\\t\n\r]", lambda found: _ESCAPES[found[0]], text)


def _unescape(text: str) -> str:
    return re.sub(r"\\[\\tnr]", lambda found: _PLAIN[found[0]], text)

"""Where the checkout and the recorded files of the tests are."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
GOLDEN = REPO / "tests" / "golden"  # files that older versions wrote

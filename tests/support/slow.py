"""Parameters of tests that only `make test-all` runs."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A row of pytest.mark.parametrize whose test is marked `slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)

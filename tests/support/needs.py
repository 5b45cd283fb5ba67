"""What a test needs beside the package and its GPU libraries: skipped by name where it is not."""

import importlib.util

import pytest


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skips a test, or with `pytestmark` a file, where one of these modules is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, not installed")

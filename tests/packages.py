"""Optional packages: their tests are skipped without them, but not where they were promised."""

import os
from importlib.util import find_spec

import pytest


def need(package: str | None, extra: str) -> None:
    """Skip where `package` isn't there, unless the environment was made for `extra`."""
    promised = os.environ.get("DBP_EXTRA") == extra
    if package is not None and find_spec(package) is None and not promised:
        pytest.skip(f"{package} is not installed")

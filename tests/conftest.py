import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from packages import need


class Said(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """``dbp-bench`` with these arguments, in this process."""
    from dbp_bench.cli import main

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("COLUMNS", raising=False)  # processes of pytest-xdist have 80

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr("sys.argv", ["dbp-bench", *map(str, arguments)])
        monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Said(code, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


_NEEDS = {
    "test_apgd": "pyautoattack",
    "test_autoattack": "pyautoattack",
    "test_diffusers": "diffusers",
    "test_square": "pyautoattack",
    "test_torchattacks": "torchattacks",
}
"""Package of the tests that are marked `extras`, by module; test_extras chooses for itself."""


@pytest.fixture(autouse=True)
def _extra_is_installed(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("extras"):
        package = _NEEDS.get(request.path.stem)
        need(package, (package or "").removeprefix("py"))

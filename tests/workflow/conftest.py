"""What the tests of commands share: this environment's programs come first, and many small jobs need no start each."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest


def first(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Look for programs in this folder before all others."""
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    first(monkeypatch, Path(sys.executable).parent)


@pytest.fixture
def forking(programs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`memdec` of the jobs without its start."""
    with forked.program(tmp_path / "bin") as folder:
        first(monkeypatch, folder)
        yield

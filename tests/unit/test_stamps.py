"""Hashes of source files that are kept between processes."""

import os
from pathlib import Path

import pytest

from memdec.artefacts import artefact
from memdec.artefacts.stamps import Stamps

_LONG_AGO = (10**18, 10**18)


def _unreadable(path: Path) -> str:
    raise AssertionError(f"{path} is read again")


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one")
    second.write_text("one")
    stamps = Stamps(tmp_path / "kept.json")
    assert stamps.of([first, second]) == [artefact.content_hash(first)] * 2
    os.utime(first, ns=_LONG_AGO)
    assert stamps.of([first, second]) == [artefact.content_hash(first)] * 2
    first.write_text("two")  # of the same size
    assert stamps.of([first, second, first]) == [artefact.content_hash(each) for each in (first, second, first)]
    second.unlink()
    second.symlink_to(first)
    assert len({*stamps.of([first, second])}) == 1


def test_what_has_settled_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = tmp_path / "a.txt", tmp_path / "kept.json"
    file.write_text("one")
    monkeypatch.setattr(artefact, "FRESH", -60.0)  # as if the process had begun a minute after the change
    found = Stamps(kept).of([file])
    monkeypatch.setattr(artefact, "content_hash", _unreadable)
    assert Stamps(kept).of([file]) == found
    os.utime(file, ns=_LONG_AGO)
    with pytest.raises(AssertionError, match="is read again"):
        Stamps(kept).of([file])


def test_what_changed_a_moment_ago_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = tmp_path / "a.txt", tmp_path / "kept.json"
    file.write_text("one")
    Stamps(kept).of([file])
    monkeypatch.setattr(artefact, "content_hash", _unreadable)
    with pytest.raises(AssertionError, match="is read again"):
        Stamps(kept).of([file])


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b'{"a": 3}', b"\xff"])
def test_lost_hashes_are_made_again(damaged: bytes, tmp_path: Path) -> None:
    file, kept = tmp_path / "a.txt", tmp_path / "kept.json"
    file.write_text("one")
    kept.write_bytes(damaged)
    assert Stamps(kept).of([file]) == [artefact.content_hash(file)]

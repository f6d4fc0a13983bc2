"""The score store: what `put` costs does not grow with the number of requests, and a part holds only what is new."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memdec.harness import scores
from memdec.harness.scores import ScoreStore, TokenScores, request_key

SETTING = {"base": "x"}
TOKENS = 4  # of each request


class Counted(np.ndarray):
    """An array that counts how often its length is asked for."""

    asked = 0

    def __len__(self) -> int:
        Counted.asked += 1
        return super().__len__()


def request(number: int) -> tuple[bytes, TokenScores]:
    """A request with scores of its own."""
    log_p: NDArray[np.float64] = np.full(TOKENS, -float(number))
    return request_key("r", [number]), TokenScores(log_p, log_p - 1)


def test_a_put_looks_at_no_earlier_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "asked", 0)
    store = ScoreStore(tmp_path, SETTING)
    counts = []
    for number in range(400):
        before = Counted.asked
        key, found = request(number)
        store.put(key, TokenScores(found.base.view(Counted), found.memory))
        counts.append(Counted.asked - before)
    assert set(counts) == {counts[0]}
    assert counts[0] > 0


def test_a_killed_run_has_what_was_flushed_and_nothing_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_FLUSH", 10 * TOKENS)
    store = ScoreStore(tmp_path, SETTING)
    for number in range(95):
        store.put(*request(number))
    parts = [scores.load(path.read_bytes()) for path in tmp_path.rglob("*.safetensors")]
    assert [len(part["lengths"]) for part in parts] == [10] * 9
    # The store is not closed, as when the process is killed; the last five requests were not yet on disk.
    resumed = ScoreStore(tmp_path, SETTING)
    assert len(resumed) == 90
    for number in range(95):
        key, found = request(number)
        known = resumed.get(key)
        assert (known is None) == (number >= 90)
        if known is None:
            resumed.put(key, found)
        else:
            np.testing.assert_array_equal(known.base, found.base)
    resumed.flush()
    assert len(ScoreStore(tmp_path, SETTING)) == 95

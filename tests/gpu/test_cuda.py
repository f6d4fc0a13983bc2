"""Search and aggregation on CUDA give what the CPU gives. Skipped without a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from making import write_store, write_tokens

from memdec import index, knn
from memdec.config import IndexSettings
from memdec.datastore import Datastore
from memdec.search import Nearest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_exact_search() -> None:
    rng = np.random.default_rng(0)
    keys = torch.from_numpy(rng.normal(size=(20_000, 64)).astype(np.float32))
    found = {}
    for device in ("cpu", "cuda"):
        nearest = Nearest(keys[:300].to(device), 50)
        for first in range(0, len(keys), 4096):
            nearest.update(keys[first : first + 4096], first)
        found[device] = [x.cpu() for x in nearest.result()]
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], atol=1e-3, rtol=1e-4)
    assert (found["cuda"][1] == found["cpu"][1]).float().mean() > 0.999  # the rest are ties up to rounding


def test_the_search_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float16)
    store = write_store(tmp_path / "s", keys, write_tokens(tmp_path / "t", np.zeros(5000, np.uint16)))
    index.run(store, tmp_path / "i", IndexSettings())
    searcher = index.load(Datastore(store), tmp_path / "i")
    own = np.arange(200)
    ours = searcher.search(keys[own].astype(np.float32), 100, own)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for one, other in zip(ours, searcher.search(keys[own].astype(np.float32), 100, own), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("top", "threshold"), [(None, 0.0), (20, 0.0), (None, 1e-3)])
def test_aggregation(top: int | None, threshold: float) -> None:
    gen = torch.Generator().manual_seed(0)
    sq_dist = torch.rand(500, 1024, generator=gen) * 60
    sq_dist[torch.rand(500, 1024, generator=gen) < 0.01] = torch.inf
    values = (torch.rand(500, 1024, generator=gen) ** 4 * 50_257).long()
    one = knn.aggregate(sq_dist, values, 16.0, top=top, threshold=threshold)
    other = [x.cpu() for x in knn.aggregate(sq_dist.cuda(), values.cuda(), 16.0, top=top, threshold=threshold)]
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[2], other[2], atol=1e-6, rtol=0)

"""Nearest keys in cells, against a plain sort of all keys of the cells; the same bits however the work is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memdec.maths import cell_join, kernels


def on_disk(keys: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    narrow = torch.from_numpy(keys).to(getattr(torch, dtype))
    return kernels.bits(narrow.view(torch.int16).numpy() if dtype == "bfloat16" else narrow.numpy())


def found(
    keys: NDArray[np.float32],
    cells: NDArray[np.int64],
    n_cells: int,
    own: NDArray[np.int64],
    probes: NDArray[np.int64],
    k: int,
    dtype: str = "float32",
    queries: NDArray[np.float32] | None = None,
) -> cell_join.Pair:
    starts, positions = cell_join.grouped(cells, n_cells)
    queries = keys[np.maximum(own, 0)] if queries is None else queries
    narrow, middle = on_disk(keys, dtype), len(keys) // 2
    parts = [(0, narrow[:middle]), (middle, narrow[middle:])]
    return cell_join.nearest(queries, own, probes, starts, positions, parts, k)


@settings(max_examples=min(60, settings().max_examples))
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 60),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_neighbours_and_distances_are_those_of_a_plain_sort(
    seed: int, n_cells: int, width: int, k: int, dtype: str
) -> None:
    """Small whole numbers: equal keys and equal distances everywhere, and every sum is exact."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 400))
    keys = rng.integers(0, 3, (n, width)).astype(np.float32)
    cells = np.where(rng.random(n) < rng.random(), 0, rng.integers(0, n_cells, n))  # one may have most keys, one none
    own = rng.integers(-1, n, 17)
    probes = np.array([rng.permutation(n_cells)[: 1 + n_cells // 2] for _ in own])
    sq_dist, ids = found(keys, cells, n_cells, own, probes, k, dtype)
    for row, me in enumerate(own):
        query = keys[max(me, 0)]
        there = [at for at in range(n) if cells[at] in probes[row] and at != me]
        true = sorted((float(((keys[at] - query) ** 2).sum()), at) for at in there)[:k]
        missing = [(np.inf, -1)] * (k - len(true))
        assert list(zip(sq_dist[row].tolist(), ids[row].tolist(), strict=True)) == true + missing


@pytest.mark.parametrize(("held", "group", "threads"), [(300, 1, 1), (8192, 4000, 2)])
def test_the_cut_of_the_work_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, held: int, group: int, threads: int
) -> None:
    rng = np.random.default_rng(0)
    keys, cells = rng.normal(size=(1500, 37)).astype(np.float32), rng.integers(0, 8, 1500)
    cells[:900] = 3  # more than a piece
    own, probes = np.arange(60), np.array([rng.permutation(8)[:4] for _ in range(60)])
    whole = found(keys, cells, 8, own, probes, 20)
    monkeypatch.setattr(cell_join, "_HELD", held)
    monkeypatch.setattr(cell_join, "_GROUP", group)
    monkeypatch.setattr(cell_join, "_FEWEST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = found(keys, cells, 8, own, probes, 20)
    finally:
        torch.set_num_threads(before)
    alone = [found(keys, cells, 8, own[i : i + 1], probes[i : i + 1, ::-1], 20) for i in range(60)]
    for other in (again, [np.concatenate(each) for each in zip(*alone, strict=True)]):
        np.testing.assert_array_equal(whole[0], other[0])
        np.testing.assert_array_equal(whole[1], other[1])


def test_distances_are_exact() -> None:
    """A common offset of 3,000 costs |k|^2 - 2 q k its digits; differences keep them, and equal keys are at 0."""
    rng = np.random.default_rng(1)
    keys = (rng.normal(size=(400, 33)) + 3000).astype(np.float16).astype(np.float32)
    keys[200:] = keys[:200]
    own = np.arange(50)
    sq_dist, ids = found(keys, np.zeros(400, np.int64), 1, own, np.zeros((50, 1), np.int64), 300, "float16")
    true = ((keys[own, None].astype(np.float64) - keys[ids]) ** 2).sum(-1)
    np.testing.assert_allclose(sq_dist, true, rtol=1e-6)
    np.testing.assert_array_equal(sq_dist[:, 0], 0)
    np.testing.assert_array_equal(ids[:, 0], own + 200)


def test_thousands_of_equal_keys_keep_the_smallest_positions() -> None:
    keys, own = np.ones((5000, 3), np.float32), np.array([0, 7, -1])
    sq_dist, ids = found(keys, np.arange(5000) % 4, 4, own, np.array([[3, 1, 0, 2]] * 3), 10)
    assert (sq_dist == 0).all()
    assert ids.tolist() == [[*range(1, 11)], [0, 1, 2, 3, 4, 5, 6, 8, 9, 10], [*range(10)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e18])
def test_a_key_that_cannot_be_compared_is_named(bad: float) -> None:
    keys = np.zeros((600, 5), np.float32)
    keys[517, 3] = bad
    with pytest.raises(cell_join.BadKeyError, match="position 517"):
        found(keys, np.arange(600) % 2, 2, np.array([-1]), np.array([[1]]), 4, queries=np.zeros((1, 5), np.float32))


def test_nearest_cells_are_sorted_with_ties_by_number() -> None:
    centroids = np.array([[2], [0], [1], [0], [5]], np.float32)
    assert cell_join.nearest_cells(np.array([[0.0], [4.0]], np.float32), centroids, 3).tolist() == [
        [1, 3, 2],
        [4, 0, 2],
    ]


@pytest.mark.parametrize("n", [1, 5, 200])
@pytest.mark.parametrize("kind", ["normal", "offset", "copies", "large", "outlier"])
def test_the_rounding_of_the_product_changes_no_nearest_cell(
    monkeypatch: pytest.MonkeyPatch, kind: str, n: int
) -> None:
    """Distances that the product cannot tell apart: those of float64 decide, and for any group of queries."""
    rng = np.random.default_rng(2)
    centroids, queries = (rng.normal(size=(size, 33)).astype(np.float32) for size in (200, 70))
    if kind == "offset":
        queries, centroids = queries + 3000, centroids + np.float32(3000)
    elif kind == "copies":
        centroids, queries = 1 + centroids[rng.integers(0, 5, 200)] * np.float32(1e-6), 1 + queries * np.float32(1e-6)
    elif kind == "large":
        queries, centroids = queries * np.float32(1e16), centroids * np.float32(1e16)
    elif kind == "outlier":
        centroids[17] *= np.float32(1e6)
    apart = (queries[:, None] - centroids).astype(np.float64)
    sq_dist = (apart**2).sum(-1).astype(np.float32)
    true = np.lexsort((np.broadcast_to(np.arange(200), sq_dist.shape), sq_dist))[:, :n]
    np.testing.assert_array_equal(cell_join.nearest_cells(queries, centroids, n), true)
    monkeypatch.setattr(cell_join, "_BOUNDS", 3 * 200)
    monkeypatch.setattr(cell_join, "_FEWEST", 1)
    np.testing.assert_array_equal(cell_join.nearest_cells(queries, centroids, n), true)


@pytest.mark.parametrize("n", [1, 2, 64])
def test_near_points_are_side_by_side(n: int) -> None:
    """Each of eight clusters, and each four of them, is one piece of the order; equal points are no trouble."""
    cluster = np.arange(n) % 8
    far = np.array([[8 * (i // 4), 4 * (i // 2 % 2), 2 * (i % 2)] for i in range(8)], np.float32)
    points = far[cluster] + np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32) * 0.01
    order = cell_join.side_by_side(points)
    assert sorted(order.tolist()) == list(range(n))
    assert np.count_nonzero(np.diff(cluster[order])) <= 7
    assert np.count_nonzero(np.diff(cluster[order] // 4)) <= 1
    assert sorted(cell_join.side_by_side(np.ones((n, 3), np.float32)).tolist()) == list(range(n))

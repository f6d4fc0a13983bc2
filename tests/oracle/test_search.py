"""Exact search, exact distances and the measures of an index, against loops over Python lists and dictionaries."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memdec.maths import kernels, knn, sparse_rows
from memdec.maths.exact_search import Nearest

# Few small integers: identical keys and equal distances everywhere, and every float type holds them exactly.
keys_of = st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=40)


def plain(queries: list[list[int]], keys: list[list[int]], neighbours: int) -> list[list[tuple[int, int]]]:
    """(squared distance, position), nearest first, ties by position."""
    return [
        sorted((sum((a - b) ** 2 for a, b in zip(query, key, strict=True)), at) for at, key in enumerate(keys))[
            :neighbours
        ]
        for query in queries
    ]


def found(nearest: Nearest) -> list[list[tuple[int, int]]]:
    sq_dist, ids = nearest.result()
    return [
        sorted((int(d), i) for d, i in zip(dist, at, strict=True) if i >= 0)
        for dist, at in zip(sq_dist.tolist(), ids.tolist(), strict=True)
    ]


@settings(max_examples=min(60, settings().max_examples))
@given(keys_of, keys_of, st.integers(1, 12), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]))
def test_search_in_blocks_equals_a_plain_sort(
    queries: list[list[int]], keys: list[list[int]], neighbours: int, block: int, dtype: torch.dtype
) -> None:
    nearest = Nearest(torch.tensor(queries, dtype=dtype), neighbours)
    every = torch.tensor(keys, dtype=torch.float32)
    for first in range(0, len(keys), block):
        nearest.update(every[first : first + block], first)
        if first == block:  # what a killed run would save, and the resumed one go on from
            state = {name: value.copy() for name, value in nearest.state().items()}
            nearest = Nearest(torch.tensor(queries, dtype=dtype), neighbours)
            nearest.restore(state)
    assert found(nearest) == plain(queries, keys, neighbours)
    sq_dist, ids = nearest.result()
    assert sq_dist.shape == ids.shape == (len(queries), neighbours)
    assert ((ids == -1) == torch.isinf(sq_dist)).all()


def test_a_buffer_that_fills_many_times() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 30, (5000, 4)).astype(np.float32)  # falling distances to the origin: the worst case
    keys = keys[np.argsort(-(keys**2).sum(1), kind="stable")]
    nearest = Nearest(torch.zeros(2, 4), 7)
    for first in range(0, 5000, 640):
        nearest.update(torch.from_numpy(keys[first : first + 640]), first)
    assert found(nearest)[0] == plain([[0] * 4], keys.astype(int).tolist(), 7)[0]


@pytest.mark.parametrize("room", [4, 5000])
def test_a_state_of_another_room_is_gone_on_from(room: int) -> None:
    """Before, the buffer had 4 k places: with k = 1 fewer than a strip."""
    keys = torch.arange(200, 0, -1, dtype=torch.float32)[:, None]
    nearest = Nearest(torch.zeros(1, 1), 1)
    nearest.update(keys[:3], 0)
    state = nearest.state()
    for name, blank in (("near", np.inf), ("ids", -1)):
        wide = np.full((1, room), blank, state[name].dtype)
        wide[:, :3] = state[name][:, :3]
        state[name] = wide
    again = Nearest(torch.zeros(1, 1), 1)
    again.restore(state)
    again.update(keys[3:], 3)
    assert found(again) == [[(1, 199)]]
    assert again.state()["near"].shape[1] >= kernels.buffer_width(1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 1e30], ids=["alike", "one far away"])
@pytest.mark.parametrize("levels", [3, 10**6], ids=["ties", "no ties"])
def test_a_cut_keeps_what_a_stable_sort_has_first(dtype: type, scale: float, levels: int) -> None:
    rng = np.random.default_rng(1)
    for end, neighbours in ((5, 7), (400, 1), (400, 57), (400, 399), (400, 400)):
        near = (rng.integers(0, levels, 500) / levels - 0.5).astype(dtype)
        near[3] *= scale
        ids = np.arange(500) * 2
        first = np.sort(np.argsort(near[:end], kind="stable")[:neighbours])
        expected, largest = near[first].copy(), near[first].max()
        kept, limit = kernels.cut(near, ids, end, neighbours)
        assert kept == len(first)
        assert limit == largest
        np.testing.assert_array_equal(near[:kept], expected)
        np.testing.assert_array_equal(ids[:kept], first * 2)


def on_disk(keys: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    narrow = torch.from_numpy(keys).to(getattr(torch, dtype))
    return kernels.bits(narrow.view(torch.int16).numpy() if dtype == "bfloat16" else narrow.numpy())


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float16", "bfloat16", "float32"]), st.integers(1, 3))
def test_exact_distances_of_any_key_type_and_any_shards(seed: int, dtype: str, n_parts: int) -> None:
    rng = np.random.default_rng(seed)
    keys = on_disk(rng.normal(size=(20, 9)).astype(np.float32) * 50, dtype)
    wide = np.empty(keys.shape, np.float32)
    assert kernels.widen(keys, wide, wide.view(np.int32))
    np.testing.assert_array_equal(
        wide, torch.from_numpy(keys.copy()).view(getattr(torch, dtype)).float().numpy()
    )  # numpy has no bfloat16
    ids = rng.integers(-1, 20, (6, 5))
    queries = wide[rng.integers(0, 20, 6)]
    edges = np.linspace(0, 20, n_parts + 1).astype(int)
    parts = [(int(a), keys[a:b]) for a, b in itertools.pairwise(edges)]
    sq_dist = knn.exact_distances(queries, parts, ids)
    for row in range(6):
        for column, at in enumerate(ids[row]):
            expected = math.inf if at < 0 else float(((queries[row].astype(float) - wide[at].astype(float)) ** 2).sum())
            assert sq_dist[row, column] == pytest.approx(expected, rel=1e-5)
            if at >= 0 and (queries[row] == wide[at]).all():
                assert sq_dist[row, column] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_widen_tells_whether_all_are_finite(bad: float, dtype: str) -> None:
    keys = np.zeros((3, 5), np.float32)
    keys[1, 3] = bad
    out = np.empty_like(keys)
    assert not kernels.widen(on_disk(keys, dtype), out, out.view(np.int32))
    np.testing.assert_array_equal(out, keys)


@settings(max_examples=min(60, settings().max_examples))
@given(st.data(), keys_of.filter(lambda keys: len(keys) > 1), st.sampled_from([0.5, 4.0]))
def test_the_whole_chain_equals_a_loop_over_dictionaries(
    data: st.DataObject, keys: list[list[int]], temperature: float
) -> None:
    """Search, removal of oneself, aggregation: duplicates, ties, k = 1 and k = all, one label only."""
    n = len(keys)
    neighbours = data.draw(st.sampled_from(sorted({1, n // 2 or 1, n - 1})))
    labels = data.draw(st.lists(st.integers(0, data.draw(st.sampled_from([0, 3]))), min_size=n, max_size=n))
    every = np.array(keys, np.float32)
    nearest = Nearest(torch.from_numpy(every), n)
    nearest.update(torch.from_numpy(every), 0)
    _, ids = nearest.result()
    exact = knn.exact_distances(every, [(0, every)], ids.numpy())
    sq_dist, kept = knn.drop_self(exact, ids.numpy(), np.arange(n), neighbours)
    counts, tokens, probs = knn.aggregate(
        torch.from_numpy(sq_dist), torch.tensor(labels)[torch.from_numpy(kept)], temperature
    )
    end = 0
    for position in range(n):
        begin, end = end, end + int(counts[position])
        row = dict(zip(tokens[begin:end].tolist(), probs[begin:end].tolist(), strict=True))
        mass: dict[int, float] = defaultdict(float)
        others = [
            (sum((a - b) ** 2 for a, b in zip(keys[position], key, strict=True)), at)
            for at, key in enumerate(keys)
            if at != position
        ]
        for d, at in sorted(others)[:neighbours]:
            mass[labels[at]] += math.exp(-d / temperature)
        assert row == pytest.approx({token: m / sum(mass.values()) for token, m in mass.items()}, abs=1e-9)


rows_of = st.lists(
    st.dictionaries(st.integers(0, 5), st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5
)


def sparse(rows: list[dict[int, int]]) -> sparse_rows.SparseRows:
    return sparse_rows.SparseRows(
        np.cumsum([0, *map(len, rows)]),
        np.array([token for row in rows for token in row]),
        np.array([p / sum(row.values()) for row in rows for p in row.values()]),
    )


@given(st.data(), rows_of)
def test_total_variation_is_half_the_l1_distance(data: st.DataObject, ours: list[dict[int, int]]) -> None:
    theirs = data.draw(st.lists(st.sampled_from(ours), min_size=len(ours), max_size=len(ours)))
    for value, a, b in zip(sparse_rows.total_variation(sparse(ours), sparse(theirs)), ours, theirs, strict=True):
        p, q = ({token: x / sum(row.values()) for token, x in row.items()} for row in (a, b))
        assert value == pytest.approx(sum(abs(p.get(t, 0) - q.get(t, 0)) for t in range(6)) / 2, abs=1e-12)


def test_recall_counts_true_neighbours_and_not_missing_ones() -> None:
    true = np.array([[1, 2, 3], [4, 5, -1]])
    assert knn.recall(np.array([[3, 9, 1], [-1, -1, -1]]), true) == pytest.approx(2 / 5)
    assert knn.recall(true, true) == 1

"""kNN distributions against loops over dictionaries."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memdec.errors import NumericsError
from memdec.maths.knn import aggregate, aggregate_torch, drop_self
from memdec.maths.sparse_rows import SparseRows, probability_of


def plain_row(sq_dist: list[float], values: list[int], temperature: float) -> dict[int, float]:
    mass: dict[int, float] = defaultdict(float)
    for d, v in zip(sq_dist, values, strict=True):
        if not math.isinf(d):
            mass[v] += math.exp(-d / temperature)
    total = sum(mass.values())
    return {v: m / total for v, m in mass.items()}


def rows_of(counts: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor) -> list[dict[int, float]]:
    ends = counts.cumsum(0).tolist()
    return [
        dict(zip(tokens[e - c : e].tolist(), probs[e - c : e].tolist(), strict=True))
        for e, c in zip(ends, counts.tolist(), strict=True)
    ]


# Few distinct distances and tokens: ties and duplicates everywhere; inf is a missing neighbour.
distance = st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0, 40.0, math.inf])


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]]]:
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(distance, min_size=k, max_size=k), min_size=n, max_size=n))
    for row in rows:
        row[draw(st.integers(0, k - 1))] = 2.0  # at least one neighbour
    values = draw(st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k), min_size=n, max_size=n))
    return rows, values


@given(blocks(), st.sampled_from([0.5, 1.0, 16.0]))
def test_equals_the_plain_sum(block: tuple[list[list[float]], list[list[int]]], temperature: float) -> None:
    sq_dist, values = block
    found = rows_of(*aggregate(torch.tensor(sq_dist), torch.tensor(values), temperature))
    for row, d, v in zip(found, sq_dist, values, strict=True):
        expected = plain_row(d, v, temperature)
        assert set(row) <= set(expected)
        assert sum(row.values()) == pytest.approx(1, abs=1e-12)
        for token, p in expected.items():
            assert row.get(token, 0.0) == pytest.approx(p, abs=1e-9)
        assert list(row) == list(dict.fromkeys(v for v, x in zip(v, d, strict=True) if not math.isinf(x) and v in row))


def rounding(k: int) -> float:
    """Relative difference of two sums of at most k weights that double precision cannot order.

    An exponential is exact to one unit in the last place, 2^-52; a sum adds half of one for each of k - 1 additions, the
    division by the total another half. Two sums may be off in opposite directions, and so may those of the oracle.
    """
    return 2 * 2 * (1 + (k - 1) / 2 + 1 / 2) * 2**-52


@given(blocks(), st.integers(1, 3), st.sampled_from([0.0, 0.2, 0.9]))
@example(([[3.0, 3.0, math.inf, 40.0, 2.0]], [[0, 1, 0, 1, 2]]), 2, 0.0)  # e^-38 decides between tokens 0 and 1
def test_top_and_threshold_renormalise(
    block: tuple[list[list[float]], list[list[int]]], top: int, threshold: float
) -> None:
    sq_dist, values = block
    found = rows_of(*aggregate(torch.tensor(sq_dist), torch.tensor(values), 1.0, top=top, threshold=threshold))
    for row, d, v in zip(found, sq_dist, values, strict=True):
        p, near = plain_row(d, v, 1.0), rounding(len(d))
        most = {how: sum(each > threshold * (1 + how * near) for each in p.values()) for how in (1, -1)}
        assert max(1, min(top, most[1])) <= len(row) <= max(1, min(top, most[-1]))
        summands = {token: [x for x, y in zip(d, v, strict=True) if y == token and x < math.inf] for token in p}
        for kept, dropped in itertools.product(row, p.keys() - row.keys()):
            assert p[kept] >= p[dropped] * (1 - near)
            assert kept < dropped or summands[kept] != summands[dropped]  # the same sum: the smaller token stays
        total = sum(p[token] for token in row)
        assert row == pytest.approx({token: p[token] / total for token in row}, abs=1e-9)


def test_fault_5_no_zero_is_stored() -> None:
    _, tokens, probs = aggregate(torch.tensor([[0.0, 1e6]]), torch.tensor([[1, 2]]), 1.0)
    assert tokens.tolist() == [1]
    assert (probs > 0).all()


def test_neighbour_order_does_not_matter() -> None:
    gen = torch.Generator().manual_seed(0)
    d, v = torch.rand(5, 40, generator=gen), torch.randint(0, 9, (5, 40), generator=gen)
    perm = torch.randperm(40, generator=gen)
    shuffled = rows_of(*aggregate(d[:, perm], v[:, perm], 0.3))
    for one, other in zip(rows_of(*aggregate(d, v, 0.3)), shuffled, strict=True):
        assert one == pytest.approx(other, abs=1e-12)


@given(blocks(), st.sampled_from([None, 1, 2]), st.sampled_from([0.0, 0.2]))
def test_the_torch_path_equals_the_compiled_one(
    block: tuple[list[list[float]], list[list[int]]], top: int | None, threshold: float
) -> None:
    sq_dist, values = torch.tensor(block[0]), torch.tensor(block[1])
    one = aggregate(sq_dist, values, 0.7, top=top, threshold=threshold)
    nearest = sq_dist.amin(1, keepdim=True)
    other = aggregate_torch(sq_dist, values, nearest, 0.7, top, threshold)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[2], other[2], atol=1e-12, rtol=0)


def test_fault_4_a_row_without_neighbours_is_an_error() -> None:
    with pytest.raises(NumericsError, match=r"row 1 .* no neighbour"):
        aggregate(torch.tensor([[1.0], [math.inf]]), torch.tensor([[1], [1]]), 1.0)


def test_nan_distance_is_an_error() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        aggregate(torch.tensor([[math.nan]]), torch.tensor([[1]]), 1.0)


def test_fault_1_self_is_removed_by_identity() -> None:
    # Three positions share one key: the query (5) comes back second; 3 and 8 are true neighbours and stay.
    sq_dist = np.array([[0.0, 0.0, 0.0, 2.0]], np.float32)
    ids = np.array([[3, 5, 8, 1]])
    _, kept = drop_self(sq_dist, ids, np.array([5]), 3)
    assert kept.tolist() == [[3, 8, 1]]


def test_self_beyond_the_searched_ranks_drops_the_farthest() -> None:
    d, kept = drop_self(np.array([[0.0, 1.0, 2.0]], np.float32), np.array([[3, 4, 6]]), np.array([5]), 2)
    assert kept.tolist() == [[3, 4]]
    assert d.tolist() == [[0.0, 1.0]]


def test_queries_from_outside_keep_everything_and_missing_ids_are_not_self() -> None:
    _, kept = drop_self(np.zeros((1, 3), np.float32), np.array([[0, 1, -1]]), np.array([-1]), 2)
    assert kept.tolist() == [[0, 1]]


@given(st.lists(st.dictionaries(st.integers(0, 5), st.floats(0, 1, width=32)), max_size=6), st.data())
def test_probability_of_a_token_is_a_look_up(rows: list[dict[int, float]], data: st.DataObject) -> None:
    """Rows that are empty or do not hold the token give zero."""
    asked = [data.draw(st.integers(0, 5)) for _ in rows]
    sparse = SparseRows(
        np.cumsum([0, *map(len, rows)]),
        np.array([token for row in rows for token in row], np.uint8),
        np.array([p for row in rows for p in row.values()], np.float32),
    )
    found = probability_of(sparse, np.array(asked, np.int64))
    assert found.tolist() == [row.get(token, 0.0) for row, token in zip(rows, asked, strict=True)]

"""kNN rows at their edges: the self match at any rank, ties, far neighbours, what a missing one leaves behind."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdec.errors import NumericsError
from memdec.maths.knn import aggregate, drop_self


@given(st.data(), st.integers(2, 9))
def test_fault_1_self_is_removed_at_any_rank_and_identical_keys_stay(data: st.DataObject, k: int) -> None:
    ids = [data.draw(st.permutations(range(12)))[:k] for _ in range(4)]
    own = [data.draw(st.sampled_from([*row, 99])) for row in ids]  # 99: not among the neighbours found
    sq_dist = np.sort(np.random.default_rng(k).integers(0, 3, (4, k)), axis=1).astype(np.float32)
    kept_dist, kept = drop_self(sq_dist, np.array(ids), np.array(own), k - 1)
    for row in range(4):
        expected = sorted((d, i) for d, i in zip(sq_dist[row], ids[row], strict=True) if i != own[row])[: k - 1]
        assert list(zip(kept_dist[row], kept[row], strict=True)) == expected


def test_fault_6_nothing_has_the_size_of_rows_times_vocabulary() -> None:
    rng = np.random.default_rng(0)
    sq_dist = torch.from_numpy(rng.random((512, 100), np.float32))
    values = torch.from_numpy(rng.integers(0, 500_000, (512, 100)))  # dense: 2 GB in float64
    aggregate(sq_dist[:1], values[:1], 1.0)
    tracemalloc.start()
    counts, _, _ = aggregate(sq_dist, values, 1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert int(counts.sum()) > 50_000
    assert peak < 20e6


def test_no_rows_are_no_entries() -> None:
    assert [len(part) for part in aggregate(torch.empty(0, 3), torch.empty(0, 3).long(), 1.0)] == [0, 0, 0]


def test_a_negative_token_is_an_error() -> None:
    with pytest.raises(NumericsError, match=r"row 1 .* a neighbour has the token -7"):
        aggregate(torch.zeros(2, 2), torch.tensor([[0, 1], [3, -7]]), 1.0)


def test_a_candidate_that_comes_twice_counts_once() -> None:
    sq_dist = np.array([[2.0, 0.0, 2.0, 2.0, np.inf, 2.0]], np.float32)
    near, kept = drop_self(sq_dist, np.array([[4, 9, 4, 3, -1, 4]]), np.array([9]), 4)
    assert kept.tolist() == [[3, 4, -1, -1]]
    assert near.tolist() == [[2.0, 2.0, math.inf, math.inf]]


def test_tokens_keep_their_order_of_appearance_and_top_keeps_the_smaller_in_a_tie() -> None:
    sq_dist, values = torch.ones(1, 4), torch.tensor([[7, 2, 5, 2]])
    assert aggregate(sq_dist, values, 1.0)[1].tolist() == [7, 2, 5]
    counts, tokens, probs = aggregate(sq_dist, values, 1.0, top=2)
    assert (counts.tolist(), tokens.tolist()) == ([2], [2, 5])
    np.testing.assert_allclose(probs, [2 / 3, 1 / 3])


def test_a_probability_at_the_threshold_is_dropped_but_the_best_stays() -> None:
    sq_dist = torch.zeros(1, 4)
    assert aggregate(sq_dist, torch.tensor([[1, 1, 1, 2]]), 1.0, threshold=0.25)[1].tolist() == [1]
    counts, tokens, probs = aggregate(sq_dist, torch.tensor([[4, 3, 2, 1]]), 1.0, threshold=0.25)
    assert (counts.tolist(), tokens.tolist(), probs.tolist()) == ([1], [1], [1.0])


def test_far_neighbours_do_not_underflow() -> None:
    # exp(-1e6) is 0 in float64; only the difference of the distances counts.
    _, tokens, probs = aggregate(torch.tensor([[1e6, 1e6 + 2]]), torch.tensor([[8, 3]]), 2.0)
    assert tokens.tolist() == [8, 3]
    assert probs[1] / probs[0] == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("left_over", [-1, 0, 6])
def test_fault_4_a_missing_neighbour_adds_nothing_whatever_its_token(left_over: int) -> None:
    counts, tokens, probs = aggregate(
        torch.tensor([[math.inf, 3.0], [0.0, math.inf]]), torch.tensor([[left_over, 5], [6, left_over]]), 1.0
    )
    assert (counts.tolist(), tokens.tolist(), probs.tolist()) == ([1, 1], [5, 6], [1.0, 1.0])


def test_one_neighbour_and_one_label() -> None:
    for k in (1, 5):
        counts, tokens, probs = aggregate(torch.rand(3, k) * 50, torch.full((3, k), 4), 0.1)
        assert (counts.tolist(), tokens.tolist(), probs.tolist()) == ([1] * 3, [4] * 3, [1.0] * 3)


def test_a_row_does_not_depend_on_the_others() -> None:
    gen = torch.Generator().manual_seed(2)
    sq_dist, values = torch.rand(6, 15, generator=gen), torch.randint(0, 7, (6, 15), generator=gen)
    counts, tokens, probs = aggregate(sq_dist, values, 0.2, top=4)
    alone = [aggregate(sq_dist[i : i + 1], values[i : i + 1], 0.2, top=4) for i in range(6)]
    assert torch.equal(tokens, torch.cat([row[1] for row in alone]))
    torch.testing.assert_close(probs, torch.cat([row[2] for row in alone]), atol=1e-15, rtol=0)
    assert probs.dtype == torch.float64
    sums = torch.zeros(6, dtype=torch.float64).index_add_(0, torch.repeat_interleave(torch.arange(6), counts), probs)
    torch.testing.assert_close(sums, torch.ones(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_one_nan_among_good_distances_is_an_error() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        aggregate(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), torch.ones(2, 2, dtype=torch.long), 1.0)

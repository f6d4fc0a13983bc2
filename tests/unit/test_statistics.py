"""Intervals that cover, tests against numbers worked out by hand, and the same answer either way round."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from memdec.maths import statistics

OUTCOMES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@pytest.mark.parametrize("binary", [True, False])
def test_the_interval_covers_the_mean_as_often_as_it_says(binary: bool) -> None:
    rng, n_sets = np.random.default_rng(0), 400
    sets = rng.random((n_sets, 80)) < 0.3 if binary else rng.exponential(0.3, (n_sets, 80))
    bounds = [statistics.mean_interval(values, n_resamples=400, seed=i) for i, values in enumerate(sets)]
    covered = np.mean([low <= 0.3 <= high for low, high in bounds])
    # The percentile interval of 80 items falls a little short of 95 %; the deviation of 400 sets is 1.1 points.
    assert 0.91 <= covered <= 0.97


def test_the_interval_equals_a_plain_loop_with_the_same_draws_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).exponential(1, 7)
    draws = np.random.default_rng(5).integers(0, 7, size=(50, 7))
    means = [sum(float(values[i]) for i in row) / 7 for row in draws]
    expected = tuple(np.quantile(means, [0.1, 0.9]))
    assert statistics.mean_interval(values, n_resamples=50, seed=5, level=0.8) == pytest.approx(expected)
    for held in (1, 7, 20, 100):
        monkeypatch.setattr(statistics, "_HELD", held)
        assert statistics.mean_interval(values, n_resamples=50, seed=5, level=0.8) == pytest.approx(expected)
        a, b = np.arange(20.0), np.arange(20.0)[::-1] * 1.1
        assert statistics.sign_flips(a, b, n_resamples=99) == statistics.sign_flips(a, b, n_resamples=99, seed=0)


def test_exact_p_values_worked_out_by_hand() -> None:
    # 6 items only a has right, 1 only b: 2 * (C(7,0) + C(7,1)) / 2^7
    a, b = [1] * 6 + [0] + [1] * 5 + [0] * 4, [0] * 6 + [1] + [1] * 5 + [0] * 4
    assert statistics.mcnemar(a, b) == pytest.approx(16 / 128)
    # 5 of 5: 2 / 2^5
    assert statistics.mcnemar([1] * 5, [0] * 5) == pytest.approx(1 / 16)
    assert statistics.mcnemar([1, 0], [0, 1]) == 1
    assert statistics.mcnemar([1, 0, 1], [1, 0, 1]) == 1
    # differences 1, 2, 3 and one 0: of 8 choices of signs only all plus and all minus reach 6
    assert statistics.sign_flips([1, 2, 3, 9], [0, 0, 0, 9]) == pytest.approx(2 / 8)
    # differences 3, 2, -1 sum to 4: +++ = 6, ++- = 4 and their mirrors
    assert statistics.sign_flips([3, 2, 0], [0, 0, 1]) == pytest.approx(4 / 8)
    assert statistics.sign_flips([0.5, 0.5], [0.5, 0.5]) == 1
    # 0.1 + 0.2 - 0.3 in another order differs in the last bit; both mirrors must count
    assert statistics.sign_flips([0.1, 0.2, 0.3], [0, 0, 0]) == pytest.approx(2 / 8)


@given(OUTCOMES)
def test_on_0_and_1_the_sign_flips_are_mcnemar(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs).T
    differ = int((a != b).sum())
    least = min(int((a > b).sum()), int((a < b).sum()))
    plain = min(Fraction(1), 2 * Fraction(sum(math.comb(differ, i) for i in range(least + 1)), 2**differ))
    assert statistics.mcnemar(a, b) == pytest.approx(float(plain))
    if differ <= 10:
        assert statistics.sign_flips(a, b) == pytest.approx(float(plain))


@given(st.integers(0, 1000), st.integers(2, 40))
def test_swapping_the_systems_mirrors_the_interval_and_keeps_p(seed: int, n_items: int) -> None:
    a, b = np.random.default_rng(seed).normal(size=(2, n_items))
    low, high = statistics.mean_interval(b - a, n_resamples=99, seed=seed)
    assert statistics.mean_interval(a - b, n_resamples=99, seed=seed) == pytest.approx((-high, -low))
    assert statistics.sign_flips(a, b, n_resamples=99) == statistics.sign_flips(b, a, n_resamples=99)
    right, wrong = (a > 0), (b > 0)
    assert statistics.mcnemar(right, wrong) == statistics.mcnemar(wrong, right)


def test_random_flips_come_near_the_exact_p_and_keep_the_level() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 13), np.zeros(13)
    exact = statistics.sign_flips(a, b, n_resamples=2**13)
    assert statistics.sign_flips(a, b, n_resamples=2**13 - 1) == pytest.approx(exact, abs=0.015)
    equal = rng.normal(size=(300, 30))
    ps = np.array([statistics.sign_flips(each, np.zeros(30), n_resamples=199) for each in equal])
    assert (ps <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert ps.min() >= 1 / 200


def test_a_paired_interval_is_narrower_than_the_systems_own() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=200)
    b = a + rng.normal(0.1, 0.1, 200)
    low, high = statistics.mean_interval(b - a)
    alone = statistics.mean_interval(b)
    assert 0 < low < high
    assert high - low < 0.2 * (alone[1] - alone[0])


@pytest.mark.parametrize("values", [[], [[1.0]], [1.0, math.nan]])
def test_bad_items(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected finite values of one item or more"):
        statistics.mean_interval(values)


def test_bad_pairs() -> None:
    with pytest.raises(ValueError, match="found 2 and 1"):
        statistics.sign_flips([1, 2], [1])
    with pytest.raises(ValueError, match="outcomes 0 and 1"):
        statistics.mcnemar([0.5], [1])


def test_one_item_has_an_interval_of_no_width() -> None:
    assert statistics.mean_interval([0.25]) == (0.25, 0.25)
    low, high = statistics.bootstrap_perplexity(np.full(5, -1.0), 8, 10, 0)
    assert low == high == pytest.approx(math.e)


def test_an_interval_of_several_rows_is_that_of_each() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 3, 9))
    low, high = statistics.bootstrap(np.median, rows, n_resamples=50, seed=4)
    assert low.shape == high.shape == (2, 3)
    alone = statistics.bootstrap(np.median, rows[1, 2], n_resamples=50, seed=4)
    assert (low[1, 2], high[1, 2]) == alone


@pytest.mark.parametrize("n_arrays", [1, 2])
def test_intervals_are_those_of_scipy_to_the_last_bit(n_arrays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_HELD", 100)  # several batches
    items = tuple(np.random.default_rng(1).exponential(size=(n_arrays, 31)))

    def ratio(*arrays: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(arrays[0].sum(axis) / arrays[-1].mean(axis))

    ours = statistics.bootstrap(ratio, *items, n_resamples=77, seed=5)
    theirs = stats.bootstrap(
        items, ratio, n_resamples=77, vectorized=True, paired=n_arrays > 1, method="percentile",
        rng=np.random.default_rng(5),
    )  # fmt: skip
    assert ours == statistics.percentiles(theirs.bootstrap_distribution, 0.95)

"""The bootstrap over seeds and items: against plain loops, paired, and wide enough where seeds differ."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from memdec.maths import paired, statistics

RNG = np.random.default_rng(7)
COUNTS = RNG.integers(20, 40, size=30)
SUMS = COUNTS * RNG.normal(3, 0.3, size=(3, 30))  # nats


def test_replicates_are_those_of_a_plain_loop() -> None:
    found = paired.ratios_by_item(SUMS, COUNTS, np.exp, seed=5, n_resamples=50)
    rng = np.random.default_rng([5, 0])
    for row in found:
        drawn = rng.integers(30, size=30)
        assert row == pytest.approx(np.exp(SUMS[:, drawn].sum(1) / COUNTS[drawn].sum()))


def value(sums: np.ndarray) -> np.ndarray:
    """Replicates of the mean over seeds of a perplexity, (R,)."""
    return paired.over_seeds(paired.ratios_by_item(sums, COUNTS, np.exp, seed=0), seed=0)


def interval(replicates: np.ndarray) -> tuple[float, float]:
    low, high = statistics.percentiles(replicates, 0.95)
    return float(low), float(high)


def test_with_one_seed_the_interval_is_that_of_windows() -> None:
    log_p = -np.repeat(SUMS[0] / COUNTS, COUNTS)
    equal = paired.ratios_by_item(20 * SUMS[0] / COUNTS, np.full(30, 20), np.exp, seed=0)
    plain = statistics.bootstrap_perplexity(-np.repeat(SUMS[0] / COUNTS, 20), 20, 10_000, seed=1)
    assert interval(paired.over_seeds(equal, seed=0)) == pytest.approx(plain, rel=0.005)
    low, high = interval(value(SUMS[0]))
    assert low < statistics.perplexity(log_p) < high


def test_draws_do_not_depend_on_the_number_of_seeds_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paired.ratios_by_item(SUMS, COUNTS, np.exp, seed=1)
    assert whole[:, :1] == pytest.approx(paired.ratios_by_item(SUMS[:1], COUNTS, np.exp, seed=1), rel=1e-12)
    monkeypatch.setattr(paired, "_HELD", 30 * 700)
    assert whole == pytest.approx(paired.ratios_by_item(SUMS, COUNTS, np.exp, seed=1), rel=1e-12)


def test_a_difference_that_is_the_same_on_every_item_has_a_narrow_interval() -> None:
    one, other = value(SUMS), value(SUMS + 0.01 * COUNTS)
    low, high = interval(other - one)
    assert low > 0
    assert high - low < 0.05 * np.subtract(*interval(one)[::-1])


def test_seeds_that_differ_widen_the_interval() -> None:
    """Three seeds that move by 10 % around no difference: items alone would call it certain, seeds do not."""
    base = SUMS[:1]
    moved = base + np.array([[-0.05], [0.1], [0.05]]) * COUNTS
    assert interval(value(moved[1]) - value(base))[0] > 0
    low, high = interval(value(moved) - value(base))
    assert low < 0 < high


def test_the_spread_over_seeds_is_that_of_a_mean_over_seeds() -> None:
    """Items that are all alike leave only seeds: the variance of the mean over S seeds is the sample variance / S."""
    values = np.array([1.0, 2.0, 4.0, 5.0])
    found = paired.over_seeds(np.tile(values, (10_000, 1)), seed=0)
    assert found.mean() == pytest.approx(3.0, abs=0.03)
    assert found.var() == pytest.approx(values.var(ddof=1) / 4, rel=0.05)


def test_the_value_of_one_seed_is_drawn_over_items_alone() -> None:
    alone = paired.ratios_by_item(SUMS[:1], COUNTS, np.exp, seed=0)
    assert np.array_equal(paired.over_seeds(alone, seed=0), alone[:, 0])


@pytest.mark.parametrize("groups", [False, True])
def test_f1_replicates_are_scikit_learns_on_the_drawn_items(groups: bool) -> None:
    gold, one, other = RNG.integers(3, size=(3, 30))
    group = np.arange(30) % 2
    labels = [np.stack([*([group] if groups else []), gold, each], axis=1) for each in (one, other)]
    found = paired.f1_by_item(labels, ("micro", "macro"), seed=3, n_resamples=20)
    rng = np.random.default_rng([3, 0])
    for row in found:
        drawn = rng.integers(30, size=30)
        for value, predicted in zip(row, (one, other), strict=True):
            parts = [drawn[group[drawn] == each] for each in (0, 1)] if groups else [drawn]
            scores = [
                [f1_score(gold[part], predicted[part], average=each, zero_division=0.0) for part in parts]
                for each in ("micro", "macro")
            ]
            assert value == pytest.approx(np.mean(scores))

"""F1 of numbers of items against scikit-learn on the items; intervals and tests against plain loops."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from memdec.maths import paired, statistics
from memdec.tasks.domain_metrics import headline_f1, macro_f1, micro_f1, micro_macro_mean, weighted_f1

AGGREGATIONS: dict[str, tuple[Any, tuple[paired.Average, ...]]] = {
    "weighted": (weighted_f1, ("weighted",)),
    "micro": (micro_f1, ("micro",)),
    "macro": (macro_f1, ("macro",)),
    "both": (micro_macro_mean, ("micro", "macro")),
}


def made(n_items: int, n_labels: int, seed: int = 0) -> tuple[list[int], list[int], list[int]]:
    """Right labels; A has most of them right, B fewer."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(n_labels, size=n_items)
    found = [np.where(rng.random(n_items) < share, gold, rng.integers(n_labels, size=n_items)) for share in (0.7, 0.4)]
    return gold.tolist(), found[0].tolist(), found[1].tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12))
def test_f1_of_numbers_is_scikit_learns_of_the_items(kinds: list[tuple[int, int, int]]) -> None:
    gold, predicted, numbers = (np.array(each) for each in zip(*kinds, strict=True))
    if not numbers.sum():
        return
    items = np.repeat(gold, numbers), np.repeat(predicted, numbers)
    for average in ("micro", "macro", "weighted"):
        found = paired.grouped_f1(numbers[None], gold, predicted, average, np.zeros_like(gold))
        assert found == pytest.approx([f1_score(*items, average=average, zero_division=0.0)])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_values_are_those_of_the_task(name: str) -> None:
    aggregate, averages = AGGREGATIONS[name]
    gold, a, b = made(50, 4)
    found = paired.f1(gold, a, b, averages)
    assert (found.a, found.b) == pytest.approx([aggregate(list(zip(gold, each, strict=True))) for each in (a, b)])
    assert found.interval[0] < found.b - found.a < found.interval[1] < 0
    assert found.p < 0.01
    mirror = paired.f1(gold, b, a, averages)
    assert (mirror.a, mirror.a_interval, mirror.p) == (found.b, found.b_interval, found.p)
    assert mirror.interval == pytest.approx([-each for each in found.interval[::-1]])
    same = paired.f1(gold, a, a, averages)
    assert (same.p, same.interval) == (1.0, (0.0, 0.0))


def test_values_of_groups_are_those_of_headline() -> None:
    gold, a, b = made(90, 2)
    groups = [i % 9 for i in range(90)]
    found = paired.f1(gold, a, b, ("weighted",), groups)
    assert (found.a, found.b) == pytest.approx(
        [headline_f1(list(zip(groups, gold, each, strict=True))) for each in (a, b)]
    )
    mixed = paired.f1(gold, a, b, ("weighted",))
    assert mixed.a != pytest.approx(found.a)


@pytest.mark.slow
def test_the_interval_is_that_of_a_plain_bootstrap_over_items() -> None:
    gold, a, b = made(60, 3)
    rng, values = np.random.default_rng(9), []
    for _ in range(2000):
        draw = rng.integers(60, size=60)
        one, other = (
            f1_score(np.array(gold)[draw], np.array(each)[draw], average="macro", zero_division=0.0) for each in (a, b)
        )
        values.append((one, other, other - one))
    expected = np.quantile(values, [0.025, 0.975], axis=0).T
    found = paired.f1(gold, a, b, ("macro",))
    # Standard error of a 2.5 % quantile of 2,000 draws is near 0.005 here.
    np.testing.assert_allclose([found.a_interval, found.b_interval, found.interval], expected, atol=0.02)


def test_the_p_value_is_that_of_all_exchanges() -> None:
    gold, a, b = [0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 2, 2, 0], [1, 0, 0, 1, 0, 0, 2, 1]
    observed = paired.f1(gold, a, b, ("weighted",))
    gaps = []
    for swaps in itertools.product([False, True], repeat=8):
        one = [y if s else x for x, y, s in zip(a, b, swaps, strict=True)]
        other = [x if s else y for x, y, s in zip(a, b, swaps, strict=True)]
        gaps.append(
            f1_score(gold, other, average="weighted", zero_division=0.0)
            - f1_score(gold, one, average="weighted", zero_division=0.0)
        )
    exact = np.mean(np.abs(gaps) >= abs(observed.b - observed.a) - 1e-12)
    assert observed.p == pytest.approx(exact, abs=0.02)  # 10,000 draws: standard error below 0.005


def test_an_item_is_exchanged_with_the_predictions_of_all_seeds() -> None:
    gold, a, b = made(40, 3)
    one = paired.f1(gold, a, b, ("macro",))
    assert paired.f1(gold, [a] * 3, [b] * 3, ("macro",)) == one  # three equal seeds say no more than one
    gold, a = [0, 0, 0, 1, 1, 2, 2, 2], [[0, 0, 1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 2, 2, 2]]
    b = [[1, 0, 0, 1, 0, 0, 2, 1], [0, 0, 1, 0, 0, 0, 2, 1]]
    observed = paired.f1(gold, a, b, ("weighted",))

    def value(predicted: list[list[int]]) -> float:
        return float(np.mean([f1_score(gold, seed, average="weighted", zero_division=0.0) for seed in predicted]))

    assert (observed.a, observed.b) == pytest.approx((value(a), value(b)))
    gaps = []
    for swaps in itertools.product([False, True], repeat=8):
        mixed = [
            [[y if s else x for x, y, s in zip(*pair, swaps, strict=True)] for pair in zip(*sides, strict=True)]
            for sides in ((a, b), (b, a))
        ]
        gaps.append(value(mixed[1]) - value(mixed[0]))
    exact = np.mean(np.abs(gaps) >= abs(observed.b - observed.a) - 1e-12)
    assert observed.p == pytest.approx(exact, abs=0.02)


def test_perplexities_of_documents() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(20, 200, size=30)
    a = -3.0 * tokens + rng.normal(0, 5, 30)
    b = a + 0.05 * tokens
    found = paired.ratios(a, b, tokens, lambda mean: np.exp(-mean))
    assert (found.a, found.b) == pytest.approx((np.exp(-a.sum() / tokens.sum()), np.exp(-b.sum() / tokens.sum())))
    draws = np.random.default_rng(0).integers(30, size=(paired.N_RESAMPLES, 30))
    ppl = [np.exp(-each[draws].sum(1) / tokens[draws].sum(1)) for each in (a, b)]
    assert found.interval == pytest.approx(np.quantile(ppl[1] - ppl[0], [0.025, 0.975]))
    assert found.p == statistics.sign_flips(a, b) < 0.001

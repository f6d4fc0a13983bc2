"""Compare two systems on the same items: the value of each, their difference, intervals and a p-value.

Intervals are bootstrap intervals over items; the results of both systems on an item are drawn together. The tests
assume that the systems are exchangeable on every item. Means of 0/1 outcomes use the exact McNemar test, other means
and ratios use sign flips, and F1 exchanges the predictions of both systems at random.

Where a system was trained with several seeds, its value is the mean over seeds, and the bootstrap draws seeds as well
as items (`ratios_by_item`, `f1_by_item`, `over_seeds`). Every seed is measured on the same items, so both are drawn
independently, and the same items for all seeds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memdec.maths import statistics

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Average = Literal["micro", "macro", "weighted"]

N_RESAMPLES = 10_000
LEVEL = 0.95
_HELD = 1 << 22  # drawn items in memory at a time (32 MiB)


@dataclass(frozen=True, slots=True)
class Paired:
    """Values of two systems, 95 % intervals of both and of B - A, two-sided p-value, name of the test."""

    a: float
    b: float
    a_interval: Interval
    b_interval: Interval
    interval: Interval
    p: float
    test: str


def means(a: ArrayLike, b: ArrayLike) -> Paired:
    """Compare means over N items, (N,) each: McNemar if all outcomes are 0 or 1, else sign flips.

    Raises:
        ValueError: Different numbers of values, or none.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    binary = statistics.is_binary(first) and statistics.is_binary(second)
    return Paired(
        float(first.mean()),
        float(second.mean()),
        statistics.mean_interval(first),
        statistics.mean_interval(second),
        statistics.mean_interval(second - first),
        statistics.mcnemar(first, second) if binary else statistics.sign_flips(first, second),
        "McNemar" if binary else "sign flips",
    )


def ratios(a: ArrayLike, b: ArrayLike, counts: ArrayLike, of: Callable[[Floats], Floats]) -> Paired:
    """Compare a monotonic function of sum / count, such as perplexity over documents.

    Args:
        a: log-likelihood (nats) of each document under A, (N,).
        b: The same under B.
        counts: Tokens, words or bytes of each document, the same for both systems.
        of: Elementwise function from the ratio sum / count to the value.
    """
    sums, units = (np.asarray(a, np.float64), np.asarray(b, np.float64)), np.asarray(counts, np.int64)

    def values(a: Floats, b: Floats, units: NDArray[np.int64], axis: int) -> Floats:
        one, other = (of(each.sum(axis) / units.sum(axis)) for each in (a, b))
        return np.stack([one, other, other - one])

    value_a, value_b, _ = values(*sums, units, -1).tolist()
    low, high = statistics.bootstrap(values, *sums, units, n_resamples=N_RESAMPLES, seed=0, level=LEVEL)
    p = statistics.sign_flips(*sums)  # a test of the sums is enough, because `of` is monotonic
    one, other, gap = zip(low.tolist(), high.tolist(), strict=True)
    return Paired(value_a, value_b, one, other, gap, p, "sign flips")


def ratios_by_item(
    sums: ArrayLike, counts: ArrayLike, of: Callable[[Floats], Floats], *, seed: int, n_resamples: int = N_RESAMPLES
) -> Floats:
    """Bootstrap replicates, over items, of a function of sum / count.

    Arrays with the same N and `seed` are resampled with the same items, so their replicates are paired.

    Args:
        sums: Sum of each of N items at each of S seeds, (S, N).
        counts: Tokens of each item, or ones, (N,).
        of: Elementwise function from the ratio to the value.
        seed: Of the draws.
        n_resamples: R.

    Returns:
        (R, S).
    """
    above, below = np.atleast_2d(np.asarray(sums, np.float64)), np.asarray(counts, np.float64)
    blocks = [of(drawn @ above.T / (drawn @ below)[:, None]) for drawn in _draws(len(below), seed, n_resamples)]
    return np.concatenate(blocks)


def f1_by_item(
    labels: Sequence[NDArray[np.int64]], averages: Sequence[Average], *, seed: int, n_resamples: int = N_RESAMPLES
) -> Floats:
    """Bootstrap replicates, over items, of F1: the mean of `averages`, and with groups the mean of that over groups.

    The items that are drawn are those of `ratios_by_item` with the same N and `seed`.

    Args:
        labels: For each of S seeds, the columns group (if there are groups), right label and prediction of N items.
        averages: Values of scikit-learn's `average`.
        seed: Of the draws.
        n_resamples: R.

    Returns:
        (R, S).
    """
    kinds = [np.unique(each, axis=0, return_inverse=True) for each in labels]
    of_kind = [np.eye(len(kind))[place.ravel()] for kind, place in kinds]  # (N, C), 1 where an item is of a kind
    blocks = []
    for drawn in _draws(len(labels[0]), seed, n_resamples):
        columns = []
        for (kind, _), member in zip(kinds, of_kind, strict=True):
            counts = np.rint(drawn @ member).astype(np.int64)
            group = kind[:, 0] if kind.shape[1] == 3 else np.zeros(len(kind), np.int64)
            found = [grouped_f1(counts, kind[:, -2], kind[:, -1], average, group) for average in averages]
            columns.append(np.mean(found, axis=0))
        blocks.append(np.stack(columns, axis=1))
    return np.concatenate(blocks)


def over_seeds(replicates: Floats, *, seed: int) -> Floats:
    """Replicates of the mean over seeds: the seeds are drawn too, if there are several.

    With S seeds the mean of drawn seeds varies by (S - 1) / S of the variance of a mean over S seeds, which for two or
    three seeds is far too little; its deviation is widened by the root of the inverse (Davison and Hinkley 1997,
    Bootstrap Methods and their Application, ch. 2.3).

    Args:
        replicates: For each draw of items the value at each seed, (R, S).
        seed: Of the draws; the same S and `seed` give the same seeds.

    Returns:
        (R,).
    """
    n_seeds = replicates.shape[1]
    centre: Floats = replicates.mean(1)
    if n_seeds == 1:
        return centre
    drawn = np.random.default_rng([seed, 1]).integers(n_seeds, size=replicates.shape)
    moved = np.take_along_axis(replicates, drawn, axis=1).mean(1)
    widened: Floats = centre + math.sqrt(n_seeds / (n_seeds - 1)) * (moved - centre)
    return widened


def _draws(n_items: int, seed: int, n_resamples: int) -> Iterator[Floats]:
    """How often each of N items is drawn in each resample, (block, N), until there are R of them."""
    rng = np.random.default_rng([seed, 0])
    step = max(1, _HELD // n_items)
    for begin in range(0, n_resamples, step):
        size = min(step, n_resamples - begin)
        drawn = rng.integers(n_items, size=(size, n_items)) + n_items * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n_items).reshape(size, n_items).astype(np.float64)


def f1(
    gold: Sequence[int],
    a: ArrayLike,
    b: ArrayLike,
    averages: Sequence[Average],
    groups: Sequence[int] | None = None,
) -> Paired:
    """Compare F1, as the mean of `averages`; with groups, as the mean of that over groups.

    Items with the same group, correct label and predictions are interchangeable, so it is enough to draw how often each
    such kind of item occurs. This is the same bootstrap as one over items. The test exchanges the two predictions of
    each item with probability 1/2 (approximate randomisation; Noreen 1989, Computer-Intensive Methods for Testing
    Hypotheses).

    Args:
        gold: Correct label of each item, (N,).
        a: Predictions of A, (N,), or (S, N) of S seeds: the mean of their F1 is compared, and an item is drawn, or exchanged,
            with the predictions of all seeds.
        b: Predictions of B, of the same shape.
        averages: Values of scikit-learn's `average`; if there are several, their mean is compared.
        groups: Group of each item.
    """
    predicted_a, predicted_b = np.atleast_2d(a), np.atleast_2d(b)
    grouped = groups if groups is not None else [0] * len(gold)
    columns = np.vstack([grouped, gold, predicted_a, predicted_b]).astype(np.int64)
    kinds, first, numbers = np.unique(columns, axis=1, return_index=True, return_counts=True)
    order = np.argsort(first)  # order of first occurrence: the draws are the same if A and B are swapped
    (group, right, *rest), numbers = kinds[:, order], numbers[order]
    by_a, by_b = np.array(rest[: len(predicted_a)]), np.array(rest[len(predicted_a) :])  # (S, kinds)

    def value(counts: NDArray[np.integer], predicted: NDArray[np.int64], fold: int = 1) -> Floats:
        groups, labels = np.tile(group, fold), np.tile(right, fold)
        found = [grouped_f1(counts, labels, seed, each, groups) for seed in predicted for each in averages]
        return np.asarray(np.mean(found, axis=0), np.float64)

    value_a, value_b = float(value(numbers[None], by_a)[0]), float(value(numbers[None], by_b)[0])
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(gold), numbers / len(gold), size=N_RESAMPLES)
    intervals = _intervals(value(drawn, by_a), value(drawn, by_b))
    moved = rng.binomial(numbers, 0.5, size=(N_RESAMPLES, len(numbers)))
    stay, both = numbers - moved, np.concatenate([by_a, by_b], axis=1)
    gaps = value(np.hstack([moved, stay]), both, 2) - value(np.hstack([stay, moved]), both, 2)
    hits = int((np.abs(gaps) >= abs(value_b - value_a) - 1e-12).sum())
    p = (1 + hits) / (1 + N_RESAMPLES) if (by_a != by_b).any() else 1.0
    return Paired(value_a, value_b, *intervals, p, "exchanged predictions")


def grouped_f1(
    counts: NDArray[np.integer],
    gold: NDArray[np.int64],
    predicted: NDArray[np.int64],
    average: Average,
    groups: NDArray[np.int64],
) -> Floats:
    """F1 for each row of counts, equal to scikit-learn's on the items; the mean over all groups that have items.

    Args:
        counts: Number of items of each kind, (R, C).
        gold: Correct label of each kind, (C,).
        predicted: Predicted label of each kind, (C,).
        average: How labels are averaged; `macro` uses the labels that are correct or predicted somewhere in the row.
        groups: Group of each kind, (C,).

    Returns:
        (R,), 0 to 1.
    """
    scores, present = np.zeros(len(counts)), np.zeros(len(counts))
    for group in np.unique(groups):
        inside = groups == group
        n_items = counts[:, inside].sum(1)
        scores += np.where(n_items > 0, _f1(counts[:, inside], gold[inside], predicted[inside], average), 0.0)
        present += n_items > 0
    return scores / present


def _f1(counts: NDArray[np.integer], gold: NDArray[np.int64], predicted: NDArray[np.int64], average: Average) -> Floats:
    labels = np.union1d(gold, predicted)
    is_gold, is_predicted = gold[:, None] == labels, predicted[:, None] == labels
    hits, n_gold, n_predicted = (counts @ each for each in (is_gold & is_predicted, is_gold, is_predicted))
    if average == "micro":
        return _divided(hits.sum(1), n_gold.sum(1))
    scores = _divided(2 * hits, n_gold + n_predicted)
    weights = n_gold if average == "weighted" else n_gold + n_predicted > 0
    return _divided((scores * weights).sum(1), weights.sum(1))


def _divided(above: NDArray[np.generic], below: NDArray[np.generic]) -> Floats:
    quotient: Floats = np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) > 0)
    return quotient


def _intervals(a: Floats, b: Floats) -> tuple[Interval, Interval, Interval]:
    low, high = statistics.percentiles(np.stack([a, b, b - a]), LEVEL)
    one, other, gap = zip(low.tolist(), high.tolist(), strict=True)
    return one, other, gap

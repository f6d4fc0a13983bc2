"""Confidence intervals of means, and tests of whether two systems differ on the same items.

Intervals are percentile bootstrap intervals (Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13).
Tests are two-sided: McNemar's exact test (1947) for 0/1 outcomes, else the sign-flip permutation test (Fisher 1935).
Results depend only on the given numbers and a seed.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_HELD = 1 << 22  # random numbers in memory at a time (32 MiB)
_STRETCH = 1024  # tokens in an item of a perplexity, if there are
_LEAST = 20  # items


def bootstrap(
    statistic: Callable[..., Any], *items: NDArray[Any], n_resamples: int, seed: int, level: float = 0.95
) -> tuple[Any, Any]:
    """Percentile bootstrap interval of a statistic of N items, with the draws of `scipy.stats.bootstrap`.

    scipy takes a second to import, which every evaluation would pay for these lines.

    Args:
        statistic: Function of arrays like `items` that reduces the axis `axis`; may return several values, (..., R).
        items: Values of the items, (..., N); the same items are drawn from all arrays.
        n_resamples: R.
        seed: Of the random draws. They are made in batches to bound memory; the batch size does not change them.
        level: Fraction of the resamples inside the interval.

    Returns:
        Lower and upper end of the interval, each with the shape of the statistic.
    """
    n, batch = items[0].shape[-1], max(1, _HELD // max(each.size for each in items))
    rng, replicates = np.random.default_rng(seed), []
    for first in range(0, n_resamples, batch):
        drawn = rng.integers(0, n, (min(batch, n_resamples - first), n))
        replicates.append(statistic(*(each[..., drawn] for each in items), axis=-1))
    return percentiles(np.concatenate(replicates, axis=-1), level)


def percentiles(replicates: NDArray[np.float64], level: float) -> tuple[Any, Any]:
    """Lower and upper bound of the middle `level` of the replicates (..., R), each (...)."""
    # scipy's own bounds may differ in the last bit; these keep published intervals the same to the digit.
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high


def mean_interval(
    values: ArrayLike, *, n_resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of N independent items.

    Given the differences of two systems on the same items, it is the paired interval: both outcomes of an item are
    drawn together.

    Raises:
        ValueError: There are no values, or the array is not one-dimensional or not finite.
    """
    low, high = bootstrap(np.mean, _items(values), n_resamples=n_resamples, seed=seed, level=level)
    return float(low), float(high)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact McNemar test of 0/1 outcomes (N,) of two systems on the same items.

    If neither system is better, then among the n items on which they differ `a` is right on Binomial(n, 1/2) items.

    Returns:
        The two-sided p-value; 1 if they never differ.

    Raises:
        ValueError: Numbers other than 0 and 1, or different numbers of items.
    """
    from scipy.stats import binomtest  # takes a second to import

    first, second = _pairs(a, b)
    if not is_binary(first) or not is_binary(second):
        raise ValueError("mcnemar: expected outcomes 0 and 1, found others")
    only_a, only_b = int((first > second).sum()), int((first < second).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flips(a: ArrayLike, b: ArrayLike, *, n_resamples: int = 10_000, seed: int = 0) -> float:
    """Sign-flip permutation test of the mean difference of two systems on the same items, (N,) each.

    If the systems are exchangeable, each difference is equally likely to have the opposite sign. With n items that
    differ there are 2^n choices of signs. If they are at most `n_resamples`, all are counted and p is exact. Else R
    random ones are drawn and p = (1 + hits) / (1 + R), which is never 0 (Phipson and Smyth 2010,
    doi:10.2202/1544-6115.1585).

    Returns:
        The two-sided p-value; 1 if they never differ.

    Raises:
        ValueError: Different numbers of values.
    """
    first, second = _pairs(a, b)
    gaps = (first - second)[first != second]
    # The tolerance covers rounding: sums of the same numbers in another order may differ in their last bits.
    least = abs(gaps.sum()) - 1e-12 * np.abs(gaps).sum()
    if 2 ** len(gaps) <= n_resamples:
        flips = np.arange(2 ** len(gaps))[:, None] >> np.arange(len(gaps)) & 1
        return float((np.abs((1 - 2 * flips) @ gaps) >= least).mean())
    rng, hits = np.random.default_rng(seed), 0
    for size in _blocks(n_resamples, len(gaps)):
        flips = rng.integers(0, 2, size=(size, len(gaps)), dtype=np.int8)
        hits += int((np.abs((1.0 - 2.0 * flips) @ gaps) >= least).sum())
    return (1 + hits) / (1 + n_resamples)


def is_binary(values: NDArray[np.float64]) -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def _blocks(n_rows: int, n_columns: int) -> Iterator[int]:
    step = max(1, _HELD // max(1, n_columns))
    for begin in range(0, n_rows, step):
        yield min(step, n_rows - begin)


def _items(values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not math.isfinite(numbers.sum()):
        raise ValueError(f"expected finite values of one item or more, found an array of shape {numbers.shape}")
    return numbers


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _items(a), _items(b)
    if len(first) != len(second):
        raise ValueError(f"expected both systems on the same items, found {len(first)} and {len(second)}")
    return first, second


def perplexity(log_p: NDArray[np.floating]) -> float:
    """exp of the mean negative log-probability (nats) of N tokens, summed in float64."""
    return math.exp(-float(np.sum(log_p, dtype=np.float64)) / len(log_p))


def item_tokens(n_tokens: int, stride: int) -> int:
    """Tokens in an item of a perplexity, which resampling keeps together: neighbouring windows of `stride` scored tokens.

    Windows of one document are alike. Drawn alone, those of 64 tokens of documentation make the interval of a perplexity
    1.7 times too narrow. An item has 1,024 tokens, or a 20th of a text that has fewer than 20 such items.
    """
    return stride * max(1, min(math.ceil(_STRETCH / stride), n_tokens // (_LEAST * stride)))


def window_sums(log_p: NDArray[np.floating], window: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum and count of consecutive blocks of `window` scored tokens (the last may be shorter)."""
    starts = np.arange(0, len(log_p), window)
    sums = np.add.reduceat(np.asarray(log_p, np.float64), starts)
    counts = np.diff(np.append(starts, len(log_p)))
    return sums, counts


def bootstrap_perplexity(
    log_p: NDArray[np.floating], window: int, n_resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the perplexity, resampling blocks of `window` tokens.

    Blocks are resampled instead of tokens because neighbouring tokens are dependent. The resampled quantity is the
    ratio sum(log p) / tokens, so a shorter last block has the correct weight.
    """

    def of(sums: NDArray[np.float64], counts: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        return np.asarray(np.exp(-sums.sum(axis) / counts.sum(axis)))

    low, high = bootstrap(of, *window_sums(log_p, window), n_resamples=n_resamples, seed=seed, level=level)
    return float(low), float(high)

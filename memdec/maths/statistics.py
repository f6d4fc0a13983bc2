"""How sure a mean over items is, and whether two systems differ on the same items.

Intervals are percentile bootstrap intervals (Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13). Tests
are two-sided: McNemar's (1947) in its exact form for 0/1 outcomes, else the sign-flip permutation test (Fisher 1935).
Everything is a function of its numbers and a seed.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

_HELD = 1 << 22  # random numbers that are held at a time (32 MiB)


def resampled_ratios(
    sums: NDArray[np.float64], counts: NDArray[np.integer], n_resamples: int, seed: int
) -> NDArray[np.float64]:
    """Ratio of sums to counts in samples of items with replacement.

    Args:
        sums: Total of each item, (N,).
        counts: Units of each item, (N,); ones make the ratio a mean.
        n_resamples: R.
        seed: Of the draws; the split into blocks of bounded memory does not change them.

    Returns:
        (R,), `sum(sums[draw]) / sum(counts[draw])`.
    """
    rng = np.random.default_rng(seed)
    ratios = []
    for size in _blocks(n_resamples, len(sums)):
        draws = rng.integers(0, len(sums), size=(size, len(sums)))
        ratios.append(sums[draws].sum(1) / counts[draws].sum(1))
    return np.concatenate(ratios)


def percentiles(replicates: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Bounds between which the middle `level` of the replicates lie."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values: ArrayLike, *, n_resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of N independent items.

    Of the differences of two systems on the same items it is the paired interval: an item is drawn with both outcomes.

    Raises:
        ValueError: No values, or not one per item.
    """
    numbers = _items(values)
    return percentiles(resampled_ratios(numbers, np.ones(len(numbers), np.int64), n_resamples, seed), level)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact McNemar test of 0/1 outcomes (N,) of two systems on the same items.

    Of the n items on which they differ, the number that `a` has right is Binomial(n, 1/2) if neither is better.

    Returns:
        The two-sided p-value; 1 where they never differ.

    Raises:
        ValueError: Other numbers than 0 and 1, or not as many.
    """
    from scipy.stats import binomtest  # takes a second to import

    first, second = _pairs(a, b)
    if not is_binary(first) or not is_binary(second):
        raise ValueError("mcnemar: expected outcomes 0 and 1, found others")
    only_a, only_b = int((first > second).sum()), int((first < second).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flips(a: ArrayLike, b: ArrayLike, *, n_resamples: int = 10_000, seed: int = 0) -> float:
    """Sign-flip permutation test of the mean difference of two systems on the same items, (N,) each.

    If they are exchangeable, every difference is as likely with the other sign. Where the 2^n choices of signs (n: items
    that differ) are no more than `n_resamples`, all are counted and p is exact; else p = (1 + hits) / (1 + R) of R random
    ones, never 0 (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).

    Returns:
        The two-sided p-value; 1 where they never differ.

    Raises:
        ValueError: Not as many values of both.
    """
    first, second = _pairs(a, b)
    gaps = (first - second)[first != second]
    # Sums of the same numbers in another order may differ in their last bits.
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
    """Whether all are 0 or 1."""
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

    Blocks, not tokens, because neighbouring tokens are dependent. The resampled quantity is the ratio
    sum(log p) / tokens, so a shorter last block is weighted right.
    """
    sums, counts = window_sums(log_p, window)
    return percentiles(np.exp(-resampled_ratios(sums, counts, n_resamples, seed)), level)

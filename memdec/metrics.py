"""Perplexity and its bootstrap interval, from per-token log-probabilities."""

import math

import numpy as np
from numpy.typing import NDArray

from memdec import statistics


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
    return statistics.percentiles(np.exp(-statistics.resampled_ratios(sums, counts, n_resamples, seed)), level)

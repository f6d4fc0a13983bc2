"""The weight of the second distribution: checks, tuning, and mixing of stored scores. No torch, so it starts fast."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from memdec.errors import ConfigError
from memdec.maths.statistics import perplexity


def check_weight(alpha: float) -> float:
    """Return alpha as a float after checking that it is in [0, 1].

    Raises:
        ConfigError: alpha is not a number in that range.
    """
    try:
        value = math.nan if isinstance(alpha, bool) else float(alpha)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"alpha: expected a number from 0 (base only) to 1 (memory only), found {alpha!r}")
    return value


def log_weights(alpha: float) -> tuple[float, float]:
    """(log alpha, log(1 - alpha)); the log of a zero weight is -inf."""
    alpha = check_weight(alpha)
    return (math.log(alpha) if alpha else -math.inf, math.log1p(-alpha) if alpha < 1 else -math.inf)


def mix_scores(log_p_base: NDArray[np.floating], log_p_mem: NDArray[np.floating], alpha: float) -> NDArray[np.float64]:
    """Mix stored per-token log-probabilities, in float64, shape (N,), so that a new alpha needs no model pass."""
    base, memory = np.asarray(log_p_base, np.float64), np.asarray(log_p_mem, np.float64)
    if alpha == 0.0:
        return base
    if alpha == 1.0:
        return memory
    log_a, log_b = log_weights(alpha)
    return np.logaddexp(memory + log_a, base + log_b)


def perplexities(
    log_p_base: NDArray[np.floating], log_p_other: NDArray[np.floating], weights: Iterable[float]
) -> dict[float, float]:
    """Perplexity of N true tokens at every weight of the second distribution.

    Args:
        log_p_base: log-probabilities (nats) under the base, (N,).
        log_p_other: log-probabilities under the memory, or under p_kNN.
        weights: alpha of the memory, or lambda of p_kNN.
    """
    return {weight: perplexity(mix_scores(log_p_base, log_p_other, weight)) for weight in weights}


def at_end(
    name: str, chosen: float, candidates: Iterable[float], limits: tuple[float, float] = (0.0, 1.0)
) -> str | None:
    """A warning if a tuned weight is the smallest or largest of its candidates, as a better one may lie beyond.

    Args:
        name: Name of the weight, for the message.
        chosen: The best candidate.
        candidates: All of them; with fewer than two nothing was tuned.
        limits: Smallest and largest possible value; alpha and lambda have 0 (the base alone) and 1.

    Returns:
        The message, or None if the weight is inside of its grid.
    """
    values = {*candidates, chosen}
    low, high = min(values), max(values)
    if low == high or low < chosen < high:
        return None
    where = f"{name}: the best of {low:g} to {high:g} is {chosen:g}, the end of the grid"
    if chosen == limits[0]:
        return f"{where}; no mixture is better than the base alone"
    if chosen == limits[1]:
        return f"{where}; no mixture is better than the second distribution alone"
    return f"{where}; try {'smaller' if chosen == low else 'larger'} ones"


def best_weight(values: Mapping[float, float], *, higher: bool = False) -> float:
    """The weight with the lowest value, or with `higher` the highest; among ties the smallest weight."""
    return min(values, key=lambda weight: (-values[weight] if higher else values[weight], weight))

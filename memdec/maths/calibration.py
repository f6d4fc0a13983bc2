"""How well p_kNN and the key model's own distribution p_key predict held-out tokens, for many k, tau and lambda at once.

The kNN-LM of the key model is lambda p_kNN + (1 - lambda) p_key (Khandelwal et al. 2020, equation 3). Its perplexity on
held-out text tells which p_kNN is worth imitating, at the cost of one search. No torch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from memdec.maths import weighing


class Choice(NamedTuple):
    """The best of a grid: number of neighbours k, tau, lambda, and the perplexity with them."""

    neighbours: int
    temperature: float
    weight: float
    perplexity: float


def label_probabilities(
    sq_dist: Float[np.ndarray, "N K"],
    same: Bool[np.ndarray, "N K"],
    neighbours: Sequence[int],
    temperatures: Sequence[float],
) -> dict[tuple[int, float], Float[np.ndarray, " N"]]:
    """p_kNN of the true token (equation 2) for every k and tau, in float64.

    Args:
        sq_dist: Squared distances of the K nearest neighbours, nearest first; +inf where there is none.
        same: Whether a neighbour's token is the true one.
        neighbours: Values of k, at most K.
        temperatures: Values of tau.
    """
    found: dict[tuple[int, float], NDArray[np.float64]] = {}
    nearer = sq_dist[:, :1] - sq_dist.astype(np.float64)  # at most 0; -inf where there is no neighbour
    for tau in temperatures:
        weight = np.exp(nearer / tau)
        total, hit = weight.cumsum(1), (weight * same).cumsum(1)
        found |= {(k, tau): hit[:, k - 1] / total[:, k - 1] for k in neighbours}
    return found


def choose(
    log_p_key: Float[np.ndarray, " N"],
    by: dict[tuple[int, float], Float[np.ndarray, " N"]],
    weights: Sequence[float],
) -> list[Choice]:
    """The best lambda for every (k, tau), the lowest perplexity first; among ties the order of `by`.

    Args:
        log_p_key: log-probabilities (nats) of the true tokens under the key model.
        by: p_kNN of the true tokens for each (k, tau), as `label_probabilities` gives it.
        weights: Values of lambda.
    """
    found = []
    for (k, tau), p in by.items():
        with np.errstate(divide="ignore"):
            values = weighing.perplexities(log_p_key, np.log(p), weights)
        best = weighing.best_weight(values)
        found.append(Choice(k, tau, best, values[best]))
    return sorted(found, key=lambda choice: choice.perplexity)


def crossing(values: Sequence[float], rising: NDArray[np.float64], wanted: float) -> float:
    """Where a rising curve has a wanted height, between its points by straight lines; an end of it if it has it nowhere."""
    return float(np.interp(wanted, rising, values))

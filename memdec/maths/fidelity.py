"""How close a model's next-token distribution is to the kNN distribution, and the shape of both.

A row of p_kNN is sparse: a few tokens with probabilities that sum to one. The model's q is dense, over all V tokens. All
comparisons need q only at the tokens of the row, and two sums over the vocabulary. So a block of rows of q is enough at a
time; nothing here needs the positions of a whole text at once.

- match: whether the most likely token of q is the most likely of p_kNN. If several tokens of p_kNN share the highest
  probability, each of them counts.
- kl: KL(p_kNN || q) in nats.
- total_variation: half the sum of |p_kNN - q| over the vocabulary, from 0 to 1.
- pearson: correlation of the V probabilities of p_kNN with those of q, at one position; 0 if q is uniform.

These are the measures of Memory Decoder at Scale (arXiv 2607.27919, Tables 7 and 19), which reports their means over
positions. What we know of it does not say which pairs of numbers its correlation is over; ours is per position.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memdec.maths.sparse_rows import SparseRows

MEASURES = ("match", "kl", "total_variation", "pearson")
SHAPES = ("top1", "entries", "entropy")


def fidelity(log_q: Float[Tensor, "N V"], rows: SparseRows) -> dict[str, Float[np.ndarray, " N"]]:
    """The four measures of N positions, in float64.

    Args:
        log_q: log-probabilities of the model, normalised over the vocabulary.
        rows: p_kNN at the same positions; every row has one token or more, without repetitions.

    Raises:
        ValueError: Another number of rows.
    """
    if len(rows) != len(log_q):
        raise ValueError(f"fidelity: expected a row of p_kNN for each of {len(log_q)} positions, found {len(rows)}")
    n, n_vocab = log_q.shape
    row, token, p = _entries(rows, log_q.device)
    log_at = log_q[row, token].double()
    q_at = log_at.exp()

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(n).index_add_(0, row, values)

    kl = summed(p * (p.log() - log_at))
    outside = (1.0 - summed(q_at)).clamp(min=0.0)  # q of the tokens that p_kNN does not have
    total_variation = 0.5 * (summed((p - q_at).abs()) + outside)
    # The mean of the probabilities is 1 / V for both, so products of deviations are sums of products minus 1 / V.
    square_q = (2 * log_q).exp().sum(1, dtype=torch.float64)
    spread = ((summed(p * p) - 1 / n_vocab).clamp(min=0.0) * (square_q - 1 / n_vocab).clamp(min=0.0)).sqrt()
    pearson = torch.where(spread > 1e-12, (summed(p * q_at) - 1 / n_vocab) / spread, 0.0)
    highest = p.new_zeros(n).scatter_reduce_(0, row, p, "amax")
    is_best = (p == highest[row]) & (token == log_q.argmax(1)[row])
    found = {"match": summed(is_best.double()), "kl": kl, "total_variation": total_variation, "pearson": pearson}
    return {name: found[name].cpu().numpy() for name in MEASURES}


def shape(log_q: Float[Tensor, "N V"], floor: float) -> dict[str, Float[np.ndarray, " N"]]:
    """Shape of N dense distributions: highest probability, number of tokens at or above `floor`, entropy (nats)."""
    q = log_q.exp()
    return {
        "top1": q.amax(1).double().cpu().numpy(),
        "entries": (q >= floor).sum(1).double().cpu().numpy(),
        "entropy": torch.special.entr(q).sum(1, dtype=torch.float64).cpu().numpy(),
    }


def sparse_shape(rows: SparseRows, floor: float) -> dict[str, Float[np.ndarray, " N"]]:
    """The same of sparse distributions, and `stored`: the number of entries of each row, however small."""
    row, _, p = (each.numpy() for each in _entries(rows, torch.device("cpu")))
    n = len(rows)
    highest = np.zeros(n)
    np.maximum.at(highest, row, p)
    return {
        "top1": highest,
        "entries": np.bincount(row[p >= floor], minlength=n).astype(np.float64),
        "entropy": np.bincount(row, -p * np.log(p), minlength=n),
        "stored": np.diff(rows.indptr).astype(np.float64),
    }


def _entries(rows: SparseRows, device: torch.device) -> tuple[Int[Tensor, " E"], Int[Tensor, " E"], Tensor]:
    """Row number, token and probability (float64, renormalised) of every entry."""
    row = np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
    p = np.asarray(rows.probs, np.float64)
    p = p / np.bincount(row, p, minlength=len(rows))[row]
    whole = np.asarray(rows.tokens, np.int64)
    return tuple(torch.from_numpy(each).to(device) for each in (row, whole, p))  # type: ignore[return-value]


def cut(rows: SparseRows, neighbours: int, top: int | None, threshold: float) -> Float[np.ndarray, " N"]:
    """Upper bound, per row, of the mass that the rows lack because only their `top` tokens above `threshold` were kept and renormalised.

    The dropped mass is not stored, but it has a bound. Every kept token has a neighbour of its own, so of k neighbours at
    most k - n are left for the tokens that a row of n entries lacks. In a row of `top` entries none of these has more
    mass than the smallest kept entry m, so they have x = (k - n) m or less beside the kept entries' 1: the fraction
    x / (1 + x) of all. Other rows lack only tokens at or below the threshold t, so (k - n) t or less. The total variation
    between the stored row and the whole one is the dropped mass.
    """
    counts = np.diff(rows.indptr)
    row = np.repeat(np.arange(len(rows)), counts)
    smallest = np.full(len(rows), np.inf)
    np.minimum.at(smallest, row, np.asarray(rows.probs, np.float64))
    left = np.maximum(neighbours - counts, 0)
    full: NDArray[np.bool_] = counts >= top if top is not None else np.zeros(len(rows), bool)
    beside = np.where(full, left * smallest, 0.0)
    bound = np.where(full, beside / (1 + beside), np.minimum(left * threshold, 1.0))
    return np.asarray(bound)

"""The work of each benchmark, ours and a plain twin written here; `run.py` measures them.

A case is made once per child process by `make(n)`, which returns two functions; what `plain` makes of their results
must agree. It runs outside of the timing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from memdec.knn import aggregate
from memdec.losses import hybrid_loss

Work = Callable[[], Any]


def _as_is(result: Any) -> tuple[Tensor, ...]:
    return tuple(result)


@dataclass(frozen=True)
class Case:
    """A benchmark; `unit` is what one call takes (seconds of CPU) or does (rows per second of CPU)."""

    name: str
    make: Callable[[int], tuple[Work, Work]]
    n: int
    n_quick: int
    unit: Literal["CPU s", "rows/s"]
    better: Literal["lower", "higher"]
    tolerance: float  # relative L2 between ours and the twin; inf where the twin is only a floor
    plain: Callable[[Any], tuple[Tensor, ...]] = _as_is


V, D, ENTRIES = 50_257, 256, 64


def _loss_inputs(n: int) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, generator=gen)
    head = torch.randn(V, D, generator=gen) * 0.05
    labels = torch.randint(0, V, (n,), generator=gen)
    tokens = torch.randint(0, V - ENTRIES, (n, 1), generator=gen) + torch.arange(ENTRIES)
    probs = torch.rand(n, ENTRIES, generator=gen)
    indptr = torch.arange(n + 1) * ENTRIES
    return hidden, head, labels, indptr, tokens.flatten(), (probs / probs.sum(1, keepdim=True)).flatten()


def _ours_loss(inputs: tuple[Tensor, ...]) -> Work:
    hidden, head, *rest = inputs

    def work() -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        hybrid_loss(h, w, *rest, 0.5)[0].backward()
        assert h.grad is not None
        assert w.grad is not None
        return h.grad, w.grad

    return work


def loss(n: int) -> tuple[Work, Work]:
    """Hybrid loss, forward and backward, against dense targets, full logits and autograd."""
    inputs = _loss_inputs(n)
    hidden, head, labels, indptr, tokens, probs = inputs

    def twin() -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        target = torch.zeros(n, V)
        rows = torch.repeat_interleave(torch.arange(n), indptr.diff())
        target[rows, tokens] = probs
        log_q = torch.log_softmax(h @ w.T, -1)
        kl = torch.nn.functional.kl_div(log_q, target, reduction="sum")
        (0.5 * kl + 0.5 * torch.nn.functional.nll_loss(log_q, labels, reduction="sum")).backward()
        assert h.grad is not None
        assert w.grad is not None
        return h.grad, w.grad

    return _ours_loss(inputs), twin


def loss_floor(n: int) -> tuple[Work, Work]:
    """The same loss against its three bare matrix products in the same chunks: what it cannot go below."""
    inputs = _loss_inputs(n)
    hidden, head = inputs[:2]

    def twin() -> tuple[Tensor, ...]:
        grad_h, grad_w = torch.empty_like(hidden), torch.zeros_like(head)
        block = torch.empty(min(256, n), V)  # reused, as ours does: fresh blocks cost page faults and are no floor
        for begin in range(0, n, 256):
            h = hidden[begin : begin + 256]
            logits = torch.mm(h, head.T, out=block[: len(h)])
            torch.mm(logits, head, out=grad_h[begin : begin + 256])
            grad_w.addmm_(logits.T, h)
        return grad_h, grad_w

    return _ours_loss(inputs), twin


def aggregation(n: int, batch: int) -> tuple[Work, Work]:
    """p_kNN rows from 1024 neighbours, against a dense scatter and a loop over rows."""
    rng = np.random.default_rng(0)
    k, temperature = 1024, 16.0
    # Tokens of neighbours: a few likely ones a row, a Zipf tail; about 280 distinct ones.
    values = torch.from_numpy((rng.zipf(1.3, (n, k)) + rng.integers(0, 40, (n, 1))) % V).split(batch)
    sq_dist = torch.from_numpy(np.sort(rng.gamma(9, 8, (n, k)), axis=1).astype(np.float32)).split(batch)

    def ours() -> list[tuple[Tensor, Tensor, Tensor]]:
        return [aggregate(d, v, temperature) for d, v in zip(sq_dist, values, strict=True)]

    def twin() -> list[tuple[list[int], list[float]]]:
        parts = []
        for d, v in zip(sq_dist, values, strict=True):
            dense = torch.zeros(len(v), V)
            dense.scatter_add_(1, v, torch.softmax(-d / temperature, dim=1))
            for row in dense:  # one row at a time, as lists, the way target files were written
                ids = row.nonzero().flatten()
                parts.append((ids.tolist(), row[ids].tolist()))
        return parts

    return ours, twin


def _cells(result: list[Any]) -> tuple[Tensor, ...]:
    """Probabilities of all rows, tokens rising, and a product that tells rows and tokens apart, from either form."""
    if len(result[0]) == 3:  # batches of (counts, tokens, probs)
        counts, tokens, probs = (torch.cat(parts) for parts in zip(*result, strict=True))
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        order = torch.argsort(rows * V + tokens)
        return probs[order], probs[order] * (tokens[order] % 97 + rows[order] % 89) / 97
    flat = [(row, token, p) for row, (ids, probs) in enumerate(result) for token, p in zip(ids, probs, strict=True)]
    rows, tokens, probs = (torch.tensor(column) for column in zip(*flat, strict=True))
    return probs, probs * (tokens % 97 + rows % 89) / 97


CASES = [
    Case("loss", loss, 8 * 512, 512, "CPU s", "lower", 2e-6),
    Case("loss_floor", loss_floor, 8 * 512, 512, "CPU s", "lower", float("inf")),
    Case("aggregation_32", partial(aggregation, batch=32), 2048, 256, "rows/s", "higher", 1e-5, _cells),
    Case("aggregation_2048", partial(aggregation, batch=2048), 2048, 256, "rows/s", "higher", 1e-5, _cells),
]

"""The work of each benchmark, ours and a plain twin written here; `run.py` measures them.

A case is made once per child process by `make(n)`, which returns two functions; both return tensors that must agree.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memdec.knn import aggregate
from memdec.losses import hybrid_loss

Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A benchmark; `unit` is what one call takes (seconds of CPU) or does (rows a second)."""

    name: str
    make: Callable[[int], tuple[Work, Work]]
    n: int
    n_quick: int
    unit: str
    tolerance: float  # relative L2 between ours and the twin; inf where the twin is only a floor


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
        for begin in range(0, n, 256):
            h = hidden[begin : begin + 256]
            logits = h @ head.T
            grad_h[begin : begin + 256] = logits @ head
            grad_w.addmm_(logits.T, h)
        return grad_h, grad_w

    return _ours_loss(inputs), twin


def aggregation(n: int) -> tuple[Work, Work]:
    """p_kNN rows from 1024 neighbours, against a dense scatter and a loop over rows."""
    rng = np.random.default_rng(0)
    k, temperature = 1024, 16.0
    # Tokens of neighbours: a few likely ones a row, a Zipf tail.
    values = torch.from_numpy((rng.zipf(1.3, (n, k)) + rng.integers(0, 40, (n, 1))) % V)
    sq_dist = torch.from_numpy(np.sort(rng.gamma(9, 8, (n, k)), axis=1).astype(np.float32))

    def ours() -> tuple[Tensor, ...]:
        counts, tokens, probs = aggregate(sq_dist, values, temperature)
        row = torch.repeat_interleave(torch.arange(n), counts)
        order = torch.argsort(row * V + tokens)
        return (probs[order].float(),)

    def twin() -> tuple[Tensor, ...]:
        dense = torch.zeros(n, V)
        dense.scatter_add_(1, values, torch.softmax(-sq_dist / temperature, dim=1))
        parts = []
        for row in dense:  # one row at a time, as lists, the way target files were written
            ids = row.nonzero().flatten().tolist()
            parts.append([float(row[i]) for i in ids])
        return (torch.tensor([p for part in parts for p in part]),)

    return ours, twin


CASES = [
    Case("loss", loss, 8 * 512, 512, "CPU s", 2e-6),
    Case("loss_floor", loss_floor, 8 * 512, 512, "CPU s", float("inf")),
    Case("aggregation", aggregation, 2048, 256, "rows/s", 1e-5),
]

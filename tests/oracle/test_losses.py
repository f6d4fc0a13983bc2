"""The fused hybrid loss against a dense twin with autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdec.maths.losses import fused_loss
from memdec.maths.objectives import Hybrid


def case(n: int, v: int, d: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(seed)
    gen = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(n, d, generator=gen, dtype=dtype), torch.randn(v, d, generator=gen, dtype=dtype)
    counts = rng.integers(1, min(v, 20) + 1, n)
    tokens = np.concatenate([rng.choice(v, c, replace=False) for c in counts])
    probs = np.concatenate([rng.dirichlet(np.ones(c)) for c in counts])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    labels = torch.randint(0, v, (n,), generator=gen)
    return hidden, head, labels, torch.from_numpy(indptr), torch.from_numpy(tokens), torch.from_numpy(probs).to(dtype)


def dense(
    hidden: Tensor, head: Tensor, labels: Tensor, indptr: Tensor, tokens: Tensor, probs: Tensor, beta: float
) -> Tensor:
    target = torch.zeros(len(hidden), len(head), dtype=hidden.dtype)
    for i in range(len(hidden)):
        target[i, tokens[indptr[i] : indptr[i + 1]]] = probs[indptr[i] : indptr[i + 1]]
    log_q = torch.log_softmax(hidden @ head.T, -1)
    kl = torch.nn.functional.kl_div(log_q, target, reduction="sum")
    return beta * kl + (1 - beta) * torch.nn.functional.nll_loss(log_q, labels, reduction="sum")


@settings(max_examples=min(40, settings().max_examples))
@given(
    n=st.integers(1, 30), v=st.integers(2, 60), seed=st.integers(0, 999), chunk=st.integers(1, 40),
    beta=st.sampled_from([0.0, 0.3, 0.5, 1.0]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_value_and_gradients_equal_the_dense_twin(
    n: int, v: int, seed: int, chunk: int, beta: float, dtype: torch.dtype
) -> None:
    hidden, head, *rest = case(n, v, 7, seed, dtype)
    results = []
    for function in (lambda *a: fused_loss(*a, Hybrid(beta), chunk).loss, lambda *a: dense(*a, beta)):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = function(h, w, *rest)
        (3.0 * loss).backward()
        assert h.grad is not None
        assert w.grad is not None
        results.append((loss.detach(), h.grad, w.grad))
    bound = 2e-6 if dtype == torch.float32 else 1e-12
    scale = max(1.0, float(results[1][0].abs()))
    assert abs(float(results[0][0] - results[1][0])) < 10 * bound * scale
    for ours, twin in zip(results[0][1:], results[1][1:], strict=True):
        assert float((ours - twin).norm()) < bound * max(1.0, float(twin.norm()))  # q - 1 cancels where q is near 1


def test_gradcheck() -> None:
    hidden, head, *rest = case(5, 6, 3, 0, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: fused_loss(h, w, *rest, Hybrid(0.5), 2).loss, (hidden.requires_grad_(), head.requires_grad_())
    )


def test_parts_add_up_and_cross_entropy_needs_no_targets() -> None:
    hidden, head, labels, indptr, tokens, probs = case(9, 12, 4, 3, torch.float64)
    loss, kl, ce = fused_loss(hidden, head, labels, indptr, tokens, probs, Hybrid(0.25))
    assert float(loss) == pytest.approx(0.25 * float(kl) + 0.75 * float(ce))
    none = torch.empty(0)
    assert float(fused_loss(hidden, head, labels, none, none, none, Hybrid(0.0)).loss) == pytest.approx(float(ce))
    assert float(kl) >= 0

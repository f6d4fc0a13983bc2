"""Hybrid loss: both parts on their own, frozen tensors, zero entries, chunks, mixed precision (dense twin again)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdec.maths.losses import fused_loss, token_log_probs
from memdec.maths.objectives import Hybrid

N, V, D = 23, 31, 6


def case(seed: int, dtype: torch.dtype = torch.float64, scale: float = 0.5) -> tuple[Tensor, ...]:
    """hidden, head, labels, dense p_kNN with 1 .. 20 entries a row; small logits, so that no gradient cancels."""
    gen, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    target = np.zeros((N, V))
    for row in target:
        count = rng.integers(1, 21)
        row[rng.choice(V, count, replace=False)] = rng.dirichlet(np.ones(count))
    hidden, head = (scale * torch.randn(n, D, generator=gen, dtype=torch.float64) for n in (N, V))
    return hidden.to(dtype), head.to(dtype), torch.randint(0, V, (N,), generator=gen), torch.from_numpy(target)


def sparse(target: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of the entries in `keep` (default: those above zero)."""
    keep = target > 0 if keep is None else keep
    return torch.cat([torch.zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)]), keep.nonzero()[:, 1], target[keep]


def parts(hidden: Tensor, head: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Dense KL and CE."""
    log_q = torch.log_softmax(hidden @ head.T, -1)
    kl = (torch.xlogy(target, target) - target * log_q).sum()
    return kl, -log_q[torch.arange(N), labels].sum()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9999), st.integers(1, N + 3), st.floats(0, 1))
def test_gradients_within_1e_12_and_both_parts(seed: int, chunk: int, beta: float) -> None:
    hidden, head, labels, target = case(seed)
    ours = [x.clone().requires_grad_() for x in (hidden, head)]
    twin = [x.clone().requires_grad_() for x in (hidden, head)]
    loss, kl, ce = fused_loss(*ours, labels, *sparse(target), Hybrid(beta), chunk)
    twin_kl, twin_ce = parts(*twin, labels, target)
    assert (loss.dtype, kl.requires_grad, ce.requires_grad) == (torch.float64, False, False)
    assert float(ce) == pytest.approx(float(twin_ce.detach()), rel=1e-12)
    assert float(kl) == (pytest.approx(float(twin_kl.detach()), rel=1e-11) if beta else 0)
    loss.backward()
    (beta * twin_kl + (1 - beta) * twin_ce).backward()
    for x, y in zip(ours, twin, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert float((x.grad - y.grad).norm() / y.grad.norm()) < 1e-12


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing_for_the_other(frozen: int) -> None:
    *pair, labels, target = case(1)
    grads = []
    for free in ({0, 1}, {1 - frozen}):
        leaves = [x.clone().requires_grad_(side in free) for side, x in enumerate(pair)]
        fused_loss(*leaves, labels, *sparse(target), Hybrid(0.5), 5).loss.backward()
        grads.append([x.grad for x in leaves])
    assert grads[1][frozen] is None
    assert torch.equal(grads[0][1 - frozen], grads[1][1 - frozen])


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, head, labels, target = case(2)
    with torch.no_grad():
        plain = fused_loss(hidden, head, labels, *sparse(target), Hybrid(0.5), 5).loss
    assert not plain.requires_grad
    with_gradients = fused_loss(hidden.requires_grad_(), head, labels, *sparse(target), Hybrid(0.5), 5).loss
    assert torch.equal(plain, with_gradients.detach())


def test_entries_of_probability_zero_change_nothing() -> None:
    hidden, head, labels, target = case(3)
    both = []
    for keep in (None, torch.ones_like(target, dtype=torch.bool)):
        h = hidden.clone().requires_grad_()
        loss = fused_loss(h, head, labels, *sparse(target, keep), Hybrid(0.7)).loss
        loss.backward()
        assert h.grad is not None
        both.append((loss.detach().item(), h.grad))
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-14)
    torch.testing.assert_close(both[0][1], both[1][1], atol=1e-14, rtol=0)


def test_kl_to_the_model_itself_is_zero_and_so_is_its_gradient() -> None:
    hidden, head, labels, _ = case(4)
    target = torch.softmax(hidden @ head.T, -1)
    loss, kl, _ = fused_loss(hidden.requires_grad_(), head, labels, *sparse(target), Hybrid(1.0), 4)
    loss.backward()
    assert abs(float(kl)) < 1e-12
    assert hidden.grad is not None
    assert float(hidden.grad.norm()) < 1e-12


@pytest.mark.parametrize("how", ["autocast", "bf16 tensors"])
def test_bf16_stays_near_float32(how: str) -> None:
    hidden, head, labels, target = case(5, torch.float32)
    twin = [x.clone().requires_grad_() for x in (hidden, head)]
    kl, ce = parts(*twin, labels, target.float())
    (0.5 * kl + 0.5 * ce).backward()
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    ours = [x.to(dtype).requires_grad_() for x in (hidden, head)]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, _, _ = fused_loss(*ours, labels, *sparse(target.float()), Hybrid(0.5), 4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float((0.5 * kl + 0.5 * ce).detach()), rel=5e-3)
    for x, y in zip(ours, twin, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == dtype
        assert float((x.grad.float() - y.grad).norm() / y.grad.norm()) < 2e-2


def test_logits_far_from_zero_are_not_rounded_under_bf16() -> None:
    """GPT-2's stand near -100, where bfloat16 has steps of 0.5; what all words have in common changes no probability."""
    hidden, head, labels, _ = case(3, torch.float32, scale=1.0)
    hidden, head = torch.cat([hidden, torch.full((N, 8), 4.0)], 1), torch.cat([head, torch.full((V, 8), -3.125)], 1)
    expected = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    none = torch.zeros(N + 1, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(token_log_probs(hidden, head, labels).double(), expected, atol=1e-3, rtol=0)
        loss = float(fused_loss(hidden, head, labels, *none, Hybrid(0.0)).loss)
    assert loss == pytest.approx(-float(expected.sum()), rel=1e-5)

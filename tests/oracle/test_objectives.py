"""Every objective against its formula written densely with autograd (paper v1, equation 5 and appendix H)."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdec.maths.losses import fused_loss, token_log_probs
from memdec.maths.objectives import BiLD, Focal, Hybrid, JensenShannon, Objective, Sparsity, by_name

ALL = [
    Hybrid(0.5),
    Hybrid(1.0),
    Hybrid(0.0),
    Sparsity(0.3),
    JensenShannon(),
    Focal(),
    Focal(0.3, 1.5),
    BiLD(8),
    BiLD(3),
]


def case(n: int, v: int, d: int, most: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden, head, labels (some ignored), dense p with 1 .. most entries a row."""
    gen, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    hidden, head = (0.7 * torch.randn(rows, d, generator=gen, dtype=torch.float64) for rows in (n, v))
    p = np.zeros((n, v))
    for row in p:
        count = rng.integers(1, min(most, v) + 1)
        row[rng.choice(v, count, replace=False)] = rng.dirichlet(np.ones(count))
    labels = torch.randint(0, v, (n,), generator=gen)
    labels[torch.rand(n, generator=gen) < 0.2] = -100
    labels[0] = 0
    return hidden.to(dtype), head.to(dtype), labels, torch.from_numpy(p).to(dtype)


def sparse(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keep = p > 0
    return torch.cat([torch.zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)]), keep.nonzero()[:, 1], p[keep]


def plain(objective: Objective, z: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    """The formulas as they are printed."""
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    kl = (torch.xlogy(p, p) - p * log_q).sum()
    if isinstance(objective, Hybrid):
        ce = -log_q[torch.arange(len(z)), labels].sum()
        return objective.kl_weight * kl + (1 - objective.kl_weight) * ce
    if isinstance(objective, Sparsity):
        return kl + objective.penalty * q[p == 0].sum()
    if isinstance(objective, JensenShannon):
        m = (p + q) / 2
        return sum((torch.xlogy(x, x) - torch.xlogy(x, m)).sum() for x in (p, q)) / 2  # type: ignore[return-value]
    if isinstance(objective, Focal):
        a, gamma = objective.weight_of_targets, objective.gamma
        return -(a * (1 - q) ** gamma * p * log_q + (1 - a) * q**gamma * (1 - p) * torch.log1p(-q)).sum()
    return sum(bild(objective.n_top, z[i], p[i]) for i in range(len(z)))  # type: ignore[return-value]


def bild(k: int, z: Tensor, p: Tensor) -> Tensor:
    by_p = [i for i in torch.argsort(p, descending=True, stable=True).tolist() if p[i] > 0][:k]
    total, log_p = z.new_zeros(()), p.clamp_min(1e-10).log()
    for leading in (by_p, z.detach().topk(k).indices.tolist()):
        pairs = [(i, j) for rank, i in enumerate(leading) for j in leading[rank + 1 :]]
        if pairs:
            teacher, student = (torch.stack([x[i] - x[j] for i, j in pairs]).log_softmax(-1) for x in (log_p, z))
            total = total + (teacher.exp() * (teacher - student)).sum()
    return total


def rounding(objective: Objective, hidden: Tensor, head: Tensor) -> float:
    """Error of a probability, relative, in the type of the two matrices.

    What goes into an exponential is a sum of products, and in BiLD also log p, which is log(1e-10) where p has no mass.
    Rounding of a number is relative to its size: of the log or the product, of the difference, of the maximum that is
    taken off, of the logarithm of the sum, of the exponential, of the difference of two probabilities.
    """
    largest = float((hidden.abs() @ head.abs().T).max())
    if isinstance(objective, BiLD):
        largest = max(largest, -math.log(objective.floor))
    return 6 * torch.finfo(hidden.dtype).eps / 2 * max(1.0, largest)


@settings(max_examples=min(60, settings().max_examples))
@given(
    objective=st.sampled_from(ALL),
    n=st.integers(1, 20), most=st.sampled_from([1, 5, 300]), chunk=st.integers(1, 25), seed=st.integers(0, 9999),
)  # fmt: skip
@example(objective=BiLD(8), n=3, most=1, chunk=1, seed=0)
def test_value_and_gradients_equal_the_formula(objective: Objective, n: int, most: int, chunk: int, seed: int) -> None:
    """In float32 the twin computes in float64 from the same numbers, so that all of the error is ours."""
    for dtype in (torch.float64, torch.float32):
        hidden, head, labels, p = case(n, 400 if most == 300 else 40, 9, most, seed, dtype)
        bound = max(1e-12, rounding(objective, hidden, head))
        ours, twin = (
            [x.to(kind, copy=True).requires_grad_() for x in (hidden, head)] for kind in (dtype, torch.float64)
        )
        loss = fused_loss(*ours, labels, *sparse(p), objective, chunk).loss
        scored = labels != -100
        expected = plain(objective, (twin[0] @ twin[1].T)[scored], p.double()[scored], labels[scored])
        assert loss.item() == pytest.approx(expected.item(), rel=5 * bound, abs=5 * bound)
        (3 * loss).backward()
        (3 * expected).backward()
        for x, y in zip(ours, twin, strict=True):
            assert x.grad is not None
            assert y.grad is not None
            # p and q may cancel: the bound is relative to gradients of size one, not to what is left.
            assert float((x.grad.double() - y.grad).norm()) <= bound * max(1.0, float(y.grad.norm()))
        assert not ours[0].grad[~scored].any()  # type: ignore[index]


def test_bild_takes_no_log_of_a_probability_below_its_floor() -> None:
    """At a small temperature the leading entries of p_kNN end in some that are almost 0."""
    hidden, head, labels, _ = case(3, 12, 4, 1, 5, torch.float64)
    p = torch.zeros(3, 12, dtype=torch.float64)
    p[:, :4] = torch.tensor([0.9, 0.1, 1e-14, 1e-30], dtype=torch.float64)
    labels[:] = 0
    ours, twin = ([x.clone().requires_grad_() for x in (hidden, head)] for _ in range(2))
    loss, expected = fused_loss(*ours, labels, *sparse(p), BiLD(4)).loss, plain(BiLD(4), twin[0] @ twin[1].T, p, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward()
    expected.backward()
    for x, y in zip(ours, twin, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_gradcheck(objective: Objective) -> None:
    hidden, head, labels, p = case(5, 9, 3, 6, 1, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: fused_loss(h, w, labels, *sparse(p), objective, 2).loss,
        (hidden.requires_grad_(), head.requires_grad_()),
    )


@pytest.mark.parametrize("offset", [0.0, 60.0, -500.0, 3000.0])
@pytest.mark.parametrize("objective", ALL, ids=str)
def test_large_logits_neither_overflow_nor_vanish(objective: Objective, offset: float) -> None:
    """The same distribution, logits moved; and labels that are far from the maximum."""
    hidden, head, labels, p = case(12, 50, 4, 9, 2, torch.float64)
    moved = torch.cat([hidden, torch.ones(12, 1, dtype=torch.float64)], 1)
    results = []
    for last in (0.0, offset):
        h, w = moved.clone().requires_grad_(), torch.cat([head, torch.full((50, 1), last, dtype=torch.float64)], 1)
        loss = fused_loss(h, w, labels, *sparse(p), objective, 5).loss
        loss.backward()
        assert h.grad is not None
        results.append((loss.item(), h.grad[:, :-1]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-9)


def test_a_label_far_below_the_maximum_is_exact() -> None:
    """The shift is taken from labels and targets; e^200 above it does not fit, so the block is made again."""
    z = torch.tensor([[0.0, 200.0, 199.0], [1.0, 2.0, 3.0], [-90.0, 0.0, 0.0]], dtype=torch.float32)
    labels, p = torch.zeros(3, dtype=torch.long), torch.eye(3)[[0, 1, 0]]
    head = torch.eye(3).requires_grad_()
    sums = fused_loss(z.clone().requires_grad_(), head, labels, *sparse(p))
    expected = plain(Hybrid(), z.double(), p.double(), labels)
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(sums.loss)


def test_backward_twice_gives_the_same() -> None:
    """The first backward pass hands its gradients over; a second one makes them again."""
    hidden, head, labels, p = case(12, 50, 4, 9, 2, torch.float64)
    h, w = hidden.requires_grad_(), head.requires_grad_()
    loss = fused_loss(h, w, labels, *sparse(p)).loss
    first = torch.autograd.grad(2 * loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (h, w))
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(1.5 * x, y)


def test_a_second_derivative_is_an_error() -> None:
    hidden, head, labels, p = case(4, 9, 3, 5, 0, torch.float64)
    h = hidden.requires_grad_()
    loss = fused_loss(h, head, labels, *sparse(p)).loss
    (grad,) = torch.autograd.grad(loss**2, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_float16_holds_the_heads_gradient_until_it_is_scaled() -> None:
    """The sum over 4,096 positions is beyond 65,504, its mean is not."""
    n = 4096
    hidden, head = torch.zeros(n, 4, dtype=torch.float16), torch.zeros(8, 4, dtype=torch.float16)
    hidden[:, 0] = 60.0
    labels, indptr, none = torch.zeros(n, dtype=torch.long), torch.zeros(n + 1, dtype=torch.long), torch.zeros(0)
    w = head.requires_grad_()
    (fused_loss(hidden, w, labels, indptr, none.long(), none, Hybrid(0.0)).loss / n).backward()
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()
    assert w.grad[0, 0].item() == pytest.approx(60 * (1 / 8 - 1), rel=1e-2)


def test_jensen_shannon_is_symmetric_bounded_and_zero_for_equals() -> None:
    hidden, head, _, _ = case(6, 12, 3, 6, 4, torch.float64)
    labels = torch.zeros(6, dtype=torch.long)
    q = torch.softmax(hidden @ head.T, -1)
    assert abs(fused_loss(hidden, head, labels, *sparse(q), JensenShannon()).loss.item()) < 1e-12
    far = fused_loss(1e3 * hidden, head, labels, *sparse(torch.eye(12, dtype=torch.float64)[:6]), JensenShannon()).loss
    assert 0 < far.item() <= 6 * math.log(2) + 1e-9


def test_no_scored_position_gives_zero() -> None:
    hidden, head, labels, p = case(4, 9, 3, 5, 0, torch.float32)
    h, w = hidden.requires_grad_(), head.requires_grad_()
    loss = fused_loss(h, w, torch.full_like(labels, -100), *sparse(p)).loss
    loss.backward()
    assert loss.item() == 0
    assert h.grad is not None
    assert w.grad is not None
    assert not h.grad.any()
    assert not w.grad.any()
    assert w.grad.shape == head.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": slice(1, None)}, "expected labels 4"),
        ({"indptr": slice(1, None)}, r"expected indptr 5"),
        ({"tokens": slice(1, None)}, "expected tokens"),
        ({"probs": slice(1, None)}, "expected probs"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, slice], message: str) -> None:
    hidden, head, labels, p = case(4, 9, 3, 5, 0, torch.float32)
    values = dict(zip(("labels", "indptr", "tokens", "probs"), (labels, *sparse(p)), strict=True))
    for name, part in change.items():
        values[name] = values[name][part]
    with pytest.raises(ValueError, match=message):
        fused_loss(hidden, head, *values.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", ALL, ids=str)
def test_half_precision_stays_near(objective: Objective, dtype: torch.dtype) -> None:
    hidden, head, labels, p = case(20, 40, 9, 9, 6, dtype)
    ours = [x.clone().requires_grad_() for x in (hidden, head)]
    twin = [x.double().requires_grad_() for x in (hidden, head)]
    loss = fused_loss(*ours, labels, *sparse(p.double()), objective, 7).loss
    scored = labels != -100
    expected = plain(objective, (twin[0] @ twin[1].T)[scored], p.double()[scored], labels[scored])
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for x, y in zip(ours, twin, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == dtype
        assert float((x.grad.double() - y.grad).norm()) < 3e-2 * float(y.grad.norm())


def test_token_log_probs() -> None:
    hidden, head, labels, _ = case(300, 40, 9, 5, 7, torch.float32)
    labels = labels.clamp_min(0)
    expected = (hidden @ head.T).log_softmax(-1)[torch.arange(300), labels]
    torch.testing.assert_close(token_log_probs(hidden, head, labels), expected)


def test_names() -> None:
    assert by_name("kl") == Hybrid(1.0)
    assert by_name("ce") == Hybrid(0.0)
    assert by_name("hybrid", kl_weight=0.2) == Hybrid(0.2)
    assert by_name("focal", focal_weight=0.1, focal_gamma=3) == Focal(0.1, 3)
    assert by_name("bild", bild_top=4) == BiLD(4)
    assert by_name("sparsity", sparsity_weight=0.5) == Sparsity(0.5)
    with pytest.raises(ValueError, match="expected one of hybrid, kl, ce, focal, jsd, bild, sparsity, found mse"):
        by_name("mse")


@pytest.mark.slow
def test_nothing_of_the_size_of_the_logits_is_alive() -> None:
    """Peak memory in a process of its own: 2,048 positions x 40,000 tokens would be 328 MB per dense copy."""
    code = """
import resource, torch
from memdec.maths.losses import fused_loss
torch.set_num_threads(1)
n, v, d = 2048, 40_000, 8
h, w = torch.randn(n, d).requires_grad_(), torch.randn(v, d).requires_grad_()
arguments = (torch.zeros(n, dtype=torch.long), torch.arange(n + 1), torch.zeros(n, dtype=torch.long), torch.ones(n))
fused_loss(h[:8], w, *(x[:m] for x, m in zip(arguments, (8, 9, 8, 8)))).loss.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fused_loss(h, w, *arguments).loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 100

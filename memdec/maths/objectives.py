"""Training objectives: the paper's hybrid loss and the losses that it reports as failed (paper v1, appendix H).

Here p = p_kNN (sparse) and q = p_mem = softmax(z). An objective gets the logits of a few positions as exp(z - shift)
with the sum over the vocabulary, and p by its sparse entries. It returns its value in nats and its gradient with
respect to z, in a form that needs no dense target:

    d loss / d z_i = scale * q_i + (values at a few tokens i)

With g_i = d loss / d q_i, the gradient with respect to z_i is q_i (g_i - sum_j q_j g_j). It sums to zero over the
vocabulary. The form above exists because all objectives but `Focal` have the same g_i wherever p_i = 0.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Positions(NamedTuple):
    """The input of an objective for n positions."""

    weight: Float[Tensor, "n V"]  # exp(z - shift); an objective may overwrite it with a dense gradient
    total: Float[Tensor, " n"]  # sum of `weight` over the vocabulary
    row: Int[Tensor, " nnz"]  # the entries of p: `row` (position), `token`, `p` (probability) and `log_q`
    token: Int[Tensor, " nnz"]
    p: Float[Tensor, " nnz"]
    log_q: Float[Tensor, " nnz"]
    kl: Float[Tensor, ""]  # `kl` and `ce` are sums over the positions
    ce: Float[Tensor, ""]
    label: Int[Tensor, " n"]
    top: tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]] | None  # the model's k largest logits and their tokens


class Sparse(NamedTuple):
    """Sparse values at (row, token); values at the same (row, token) are added."""

    row: Int[Tensor, " m"]
    token: Int[Tensor, " m"]
    value: Float[Tensor, " m"]


class Terms(NamedTuple):
    """Sum of the loss over the positions, and its gradient with respect to the logits."""

    loss: Float[Tensor, ""]
    scale: Float[Tensor, " n"] | None  # None: `weight` already holds the dense part of the gradient
    sparse: tuple[Sparse, ...]


@dataclass(frozen=True)
class Hybrid:
    """kl_weight * KL(p || q) + (1 - kl_weight) * -log q_y (equation 5; beta = 0.5).

    Weight 1 is the objective `kl`, weight 0 is `ce`.
    """

    kl_weight: float = 0.5
    n_top: ClassVar[int] = 0

    def terms(self, at: Positions) -> Terms:
        # d / d z = (beta * sum p + 1 - beta) q - beta p - (1 - beta) onehot(y)
        beta = self.kl_weight
        scale = _sum(at, beta * at.p) + (1 - beta)
        truth = Sparse(_rows(at), at.label, torch.full_like(at.total, beta - 1))
        return Terms(beta * at.kl + (1 - beta) * at.ce, scale, (Sparse(at.row, at.token, -beta * at.p), truth))


@dataclass(frozen=True)
class Sparsity:
    """KL(p || q) + penalty * sum of q_i where p_i = 0 (penalty 0.01)."""

    penalty: float = 0.01
    n_top: ClassVar[int] = 0

    def terms(self, at: Positions) -> Terms:
        # g_i = penalty where p_i = 0, so sum_j q_j g_j = penalty (1 - Q) with Q the mass of q where p > 0.
        q = _support(at)
        mass = _sum(at, q)
        loss = at.kl + self.penalty * (1 - mass).sum()
        scale = _sum(at, at.p) + self.penalty * mass
        return Terms(loss, scale, (Sparse(at.row, at.token, -at.p - self.penalty * q),))


@dataclass(frozen=True)
class JensenShannon:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2."""

    n_top: ClassVar[int] = 0

    def terms(self, at: Positions) -> Terms:
        # g_i = log(q_i / m_i) / 2, which is log(2) / 2 where p_i = 0. Relative to that constant the gradient is
        # v_i = q_i log(q_i / (p_i + q_i)) / 2 on the support, and scale = -sum v.
        q = _support(at)
        log_twice_m = torch.log(at.p + q)
        value = torch.where(at.p > 0, q * (at.log_q - log_twice_m) / 2, 0.0)
        on_support = (torch.xlogy(at.p, at.p) - torch.xlogy(at.p, at.p + q)) / 2 + value
        loss = on_support.sum() + math.log(2) / 2 * (_sum(at, at.p).sum() + len(at.total))
        return Terms(loss, -_sum(at, value), (Sparse(at.row, at.token, value),))


@dataclass(frozen=True)
class Focal:
    """-sum_i [a (1 - q_i)^g p_i log q_i + (1 - a) q_i^g (1 - p_i) log(1 - q_i)] (a = 0.5, g = 2).

    1 - q_i is clamped to at least the machine epsilon, so that a model with q_i = 1 has a finite loss.
    """

    weight_of_targets: float = 0.5
    gamma: float = 2.0
    n_top: ClassVar[int] = 0

    def terms(self, at: Positions) -> Terms:
        a, gamma = self.weight_of_targets, self.gamma
        q = at.weight.div_(at.total[:, None])  # in place; from here on `weight` is q
        eps = torch.finfo(q.dtype).eps
        rest = (1 - q).clamp_min_(eps)
        # First the loss and q_i g_i of all tokens, as if p were zero.
        power = q**gamma
        log_rest = rest.log()
        loss = -(1 - a) * torch.dot(power.flatten(), log_rest.flatten())
        weighted = log_rest.mul_(gamma).sub_(q / rest).mul_(power).mul_(a - 1)
        # Then the correction at the entries of p: q times the derivative of the terms with p.
        q_at, rest_at, power_at = q[at.row, at.token], rest[at.row, at.token], power[at.row, at.token]
        log_rest_at, rest_power = rest_at.log(), rest_at**gamma
        loss = loss + (at.p * ((1 - a) * power_at * log_rest_at - a * rest_power * at.log_q)).sum()
        slope = (1 - a) * power_at * (gamma * log_rest_at - q_at / rest_at)
        slope += a * (gamma * q_at * rest_at ** (gamma - 1) * at.log_q - rest_power)
        extra = at.p * slope
        mean = weighted.sum(-1) + _sum(at, extra)
        torch.sub(weighted, q.mul_(mean[:, None]), out=at.weight)
        return Terms(loss, None, (Sparse(at.row, at.token, extra),))


@dataclass(frozen=True)
class BiLD:
    """KL[p_led || q_cor] + KL[p_cor || q_led] over the softmax of pairwise differences of the top logits.

    The logits of p are log p. `led` are the logits of the k top tokens, ranked by p in the first term and by q in the
    second. `cor` are the other distribution's logits of the same tokens. The differences are those of all pairs i < j
    of the ranking. The formula is BiLD's (Li et al., 2024, arXiv 2406.13555) at temperature 1; the Memory Decoder paper
    prints no k. log p is at least log(1e-10), because 1e-10 is the released code's smallest probability.
    """

    n_top: int = 8
    floor: ClassVar[float] = 1e-10

    def terms(self, at: Positions) -> Terms:
        if at.top is None:
            raise ValueError(f"bild: expected the {self.n_top} leading logits, found none")
        at.weight.zero_()  # only the top tokens have a gradient
        z_led, token_led = at.top
        token_cor, log_p_led, z_cor, there = self._ranked_by_p(at)
        loss_p, grad_p = _pairs(log_p_led, z_cor, there)
        loss_q, grad_q = _pairs(self._log_p(at, token_led), z_led, torch.ones_like(there))
        rows = _rows(at)[:, None]
        sparse = (
            Sparse(rows.expand_as(token).flatten(), token.flatten(), grad.flatten())
            for token, grad in ((token_cor, grad_p), (token_led, grad_q))
        )
        return Terms(loss_p + loss_q, None, tuple(sparse))

    def _ranked_by_p(self, at: Positions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, log p, log q of the k likeliest entries of each row, and which of the k exist; all (n, k)."""
        order = torch.argsort(at.p, descending=True, stable=True)
        order = order[torch.argsort(at.row[order], stable=True)]
        row = at.row[order]
        counts = torch.bincount(row, minlength=len(at.total))
        rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        chosen = (rank < self.n_top) & (at.p[order] > 0)
        place, order = (row[chosen], rank[chosen]), order[chosen]
        shape = (len(at.total), self.n_top)
        token, there = at.token.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=row.device)
        log_p, log_q = at.p.new_zeros(shape), at.p.new_zeros(shape)
        token[place], there[place] = at.token[order], True
        log_p[place], log_q[place] = at.p[order].clamp_min(self.floor).log(), at.log_q[order]
        return token, log_p, log_q, there

    def _log_p(self, at: Positions, token: Tensor) -> Tensor:
        """log p of tokens of shape (n, k), not below log(floor)."""
        p = at.p.new_full(token.shape, self.floor)
        entry, rank = (token[at.row] == at.token[:, None]).nonzero(as_tuple=True)
        p[at.row[entry], rank] = at.p[entry].clamp_min(self.floor)
        return p.log()


def _pairs(teacher: Tensor, student: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """KL between the softmaxes over all pairwise differences, and its gradient with respect to the student's logits."""
    i, j = torch.triu_indices(teacher.shape[1], teacher.shape[1], 1, device=teacher.device)
    valid = there[:, i] & there[:, j]
    log_p, log_q = (
        torch.log_softmax((x[:, i] - x[:, j]).masked_fill(~valid, -math.inf), -1).masked_fill(~valid, 0)
        for x in (teacher, student)
    )
    p, q = (x.exp().masked_fill(~valid, 0) for x in (log_p, log_q))
    slope = q - p
    grad = torch.zeros_like(student).index_add_(1, i, slope).index_add_(1, j, slope, alpha=-1)
    return (p * (log_p - log_q)).sum(), grad


def _rows(at: Positions) -> Tensor:
    return torch.arange(len(at.total), device=at.total.device)


def _sum(at: Positions, value: Tensor) -> Tensor:
    """Sum values over the entries of each position, shape (n,)."""
    return torch.zeros_like(at.total).index_add_(0, at.row, value)


def _support(at: Positions) -> Tensor:
    """q at the entries with p > 0 and zero at the others, shape (nnz,)."""
    return torch.where(at.p > 0, at.log_q.exp(), 0.0)


Objective = Hybrid | Focal | JensenShannon | BiLD | Sparsity


def by_name(
    name: str,
    *,
    kl_weight: float = 0.5,
    focal_weight: float = 0.5,
    focal_gamma: float = 2.0,
    bild_top: int = 8,
    sparsity_weight: float = 0.01,
) -> Objective:
    """The objective with this name: hybrid, kl, ce, focal, jsd, bild or sparsity."""
    known: dict[str, Objective] = {
        "hybrid": Hybrid(kl_weight),
        "kl": Hybrid(1.0),
        "ce": Hybrid(0.0),
        "focal": Focal(focal_weight, focal_gamma),
        "jsd": JensenShannon(),
        "bild": BiLD(bild_top),
        "sparsity": Sparsity(sparsity_weight),
    }
    if name not in known:
        raise ValueError(f"objective: expected one of {', '.join(known)}, found {name}")
    return known[name]

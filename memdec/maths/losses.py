"""A training objective fused with the output head, so that neither a dense [N, V] target nor the full logits exist.

The paper's hybrid loss beta * KL(p_kNN || p_mem) + (1 - beta) * CE (equation 5) needs only the sparse entries of p_kNN
and one log-normaliser per position:

    KL = sum_j p_j log p_j - sum_j p_j h.w_j + logZ        CE = logZ - h.w_y

The forward pass handles some rows at a time: it computes their logits, loss and gradients in one reused block. The
released code keeps about eight dense [N, V] copies (6 GiB at 8 x 512 tokens, V = 50,257; here 0.09 GiB).
`memdec.maths.objectives` has the formulas. This module deals with memory, chunks and precision.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from memdec.maths.objectives import Hybrid, Objective, Positions, Terms

IGNORED = -100  # label of a position that is not scored
_BLOCK = {"cpu": 35 << 20, "cuda": 512 << 20}  # bytes of one float32 block of logits
_FEWEST = 128  # least rows of a block, because the head's whole gradient is read and written once per block
_GROUP = 2 << 20  # bytes of a softmax step on CPU: they stay in the L2 cache, and are worth the call
_FAR = 40.0  # logits up to +-40 are exponentiated without a shift: e^40 is 21 orders of magnitude from float32's limits
_SUMS = 1e-25, 1e30  # range in which a sum of exponentials loses no digits


class Sums(NamedTuple):
    """Sums over the scored positions, in nats; only `loss` carries gradients."""

    loss: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    ce: Float[Tensor, ""]


def fused_loss(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, " N"],
    indptr: Int[Tensor, " N+1"],
    tokens: Int[Tensor, " nnz"],
    probs: Float[Tensor, " nnz"],
    objective: Objective = Hybrid(),  # noqa: B008
    chunk: int | None = None,
) -> Sums:
    """Sum the loss of N positions, computed from their hidden states; gradients flow to `hidden` and `head`.

    Logits and reductions are in float32 (float64 for float64 input). The other matrix products use the type of `hidden`,
    or of autocast.

    Args:
        hidden: Final hidden states (after the last norm).
        head: Output embedding. The softmax includes the rows of a padded head, as in ordinary training of the model.
        labels: The true next tokens. A position with label -100 is left out, together with its target row.
        indptr, tokens, probs: p_kNN in CSR form: distinct tokens within a row, and rows that sum to one. All may be
            empty for cross-entropy, `Hybrid(0.0)`.
        objective: The loss to compute.
        chunk: Positions per block of logits; by default as many as fit into 35 MiB (CUDA: 512 MiB).

    Raises:
        ValueError: The shapes do not fit each other.
    """
    device = hidden.device.type
    if chunk is None:
        chunk = block_rows(len(hidden), len(head), device)
    low = _product_type(hidden)
    tensors = (hidden, head, labels, indptr, tokens, probs)
    if not torch.is_grad_enabled():  # autograd.Function would compute gradients even here
        return Sums(*_run(*tensors, objective, chunk, low, False, False)[0].unbind())
    return Sums(*_Fused.apply(*tensors, objective, chunk, low))  # type: ignore[no-untyped-call]


def block_rows(n: int, vocab: int, device: str) -> int:
    """Default number of rows of a block of logits: as many as its bytes allow, with all blocks of about equal size."""
    most = max(_FEWEST, _BLOCK.get(device, _BLOCK["cuda"]) // (4 * vocab))
    return max(1, math.ceil(n / max(1, math.ceil(n / most))))


def token_log_probs(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], labels: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """log p of the label at each position (float32), without gradients, in the same blocks and types as the loss."""
    found = []
    size = block_rows(len(hidden), len(head), hidden.device.type)
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    low = _logit_type(_product_type(hidden), acc, hidden.device.type)
    hidden, head = hidden.to(low), head.to(low)
    for first in range(0, len(hidden), size):
        with torch.autocast(hidden.device.type, enabled=False):
            logits = wide_logits(hidden[first : first + size], head, acc).float()
        log_z = torch.cat([logits[rows].logsumexp(-1) for rows in _groups(logits)])
        found.append(logits.gather(-1, labels[first : first + size, None])[:, 0] - log_z)
    return torch.cat(found) if found else hidden.new_empty(0, dtype=torch.float32)


def _product_type(hidden: Tensor) -> torch.dtype:
    """Type of the matrix products: that of autocast, or else of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logit_type(low: torch.dtype, acc: torch.dtype, device: str) -> torch.dtype:
    """Type of the factors of the logits: on a GPU the low one, whose product is summed and left in float32.

    A logit that is rounded to bfloat16 is wrong by up to 0.25 where GPT-2's stand (-35 to -110): log p has an error of
    0.14 nats then, and perplexity one of 0.8 %. A CPU has no product of low factors that is left in float32.
    """
    return low if device == "cuda" else acc


def wide_logits(h: Tensor, head: Tensor, acc: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The product `h @ head.T`, (N, D) and (V, D), left in the type `acc`; into `out` if it is given.

    Factors of another type than `acc` have to be on a GPU.
    """
    if h.dtype == acc:
        return torch.mm(h, head.T, out=out)
    found = torch.mm(h, head.T, out_dtype=acc)
    return found if out is None else out.copy_(found)


class _Fused(torch.autograd.Function):
    """Autograd function that computes the gradients in the forward pass and returns them in the backward pass.

    Backward scales them in place, which keeps one [V, D] gradient in memory instead of two. So a second backward pass
    has to compute them again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        need = ctx.needs_input_grad[:2]
        sums, *grads = _run(*arguments, *need)
        ctx.save_for_backward(*arguments[:6])
        ctx.rest, ctx.need, ctx.grads = arguments[6:], need, grads
        loss, kl, ce = sums.unbind()
        loss, kl, ce = loss.clone(), kl.clone(), ce.clone()
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = _run(*ctx.saved_tensors, *ctx.rest, *ctx.need)[1:]
        hidden, head = ctx.saved_tensors[:2]
        scaled = (
            g.mul_(grad_loss.to(g.dtype)).to(x.dtype) if needed else None
            for g, x, needed in zip(grads, (hidden, head), ctx.need, strict=True)
        )
        return (*scaled, *(None,) * 7)


def _run(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    indptr: Tensor,
    tokens: Tensor,
    probs: Tensor,
    objective: Objective,
    chunk: int,
    low: torch.dtype,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kl, ce) as one tensor, and the gradients of `hidden` and `head` (empty where not needed).

    The gradient of the head is a sum over all positions and may overflow float16, so it is float32 until it is scaled.
    """
    _check(hidden, head, labels, indptr, tokens, probs)
    if isinstance(objective, Hybrid) and objective.kl_weight == 0:
        indptr, tokens, probs = labels.new_zeros(len(labels) + 1), tokens[:0], probs[:0]
    keep = labels != IGNORED
    if bool(keep.all()):
        return _scored(hidden, head, labels, indptr, tokens, probs, objective, chunk, low, need_hidden, need_head)
    counts = indptr.diff()
    entries = torch.repeat_interleave(keep, counts)
    indptr = torch.cat([indptr.new_zeros(1), counts[keep].cumsum(0)])
    sums, grad_kept, grad_head = _scored(
        hidden[keep], head, labels[keep], indptr, tokens[entries], probs[entries], objective, chunk, low,
        need_hidden, need_head,
    )  # fmt: skip
    if need_hidden:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[keep] = grad_kept
        grad_kept = grad_hidden
    return sums, grad_kept, grad_head


def _check(hidden: Tensor, head: Tensor, labels: Tensor, indptr: Tensor, tokens: Tensor, probs: Tensor) -> None:
    n, nnz = len(hidden), int(indptr[-1]) if len(indptr) else 0
    rows = len(indptr) if len(indptr) else n + 1
    for name, expected, found in (
        ("labels", n, len(labels)),
        ("indptr", n + 1, rows),
        ("tokens", nnz, len(tokens)),
        ("probs", nnz, len(probs)),
        ("width of the head", hidden.shape[1], head.shape[1]),
    ):
        if expected != found:
            raise ValueError(f"fused_loss: expected {name} {expected} for {n} hidden states, found {found}")


def _scored(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    indptr: Tensor,
    tokens: Tensor,
    probs: Tensor,
    objective: Objective,
    chunk: int,
    low: torch.dtype,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `_run`, for rows that are all scored."""
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n, vocab = len(hidden), len(head)
    with torch.autocast(hidden.device.type, enabled=False):
        wide, h_low, w_low = low == acc, hidden.to(low), head.to(low)
        factor = _logit_type(low, acc, hidden.device.type)
        h_logit, w_logit = (h_low, w_low) if factor == low else (hidden.to(factor), head.to(factor))
        grad_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
        grad_head = head.new_zeros(head.shape if need_head and n == 0 else 0, dtype=acc)
        sums = torch.zeros(3, dtype=torch.float64 if hidden.device.type == "cpu" else acc, device=hidden.device)
        # All chunks use one block: allocating 50 MB per chunk costs 13,000 page faults, more than the softmax itself.
        block = torch.empty(min(chunk, n), vocab, dtype=acc, device=hidden.device)
        for begin in range(0, n, chunk):
            part = slice(begin, min(begin + chunk, n))
            at = _positions(h_logit[part], w_logit, labels[part], indptr, tokens, probs, begin, block, objective, wide)
            terms = objective.terms(at)
            sums += torch.stack([terms.loss, at.kl, at.ce])
            if not (need_hidden or need_head):
                continue
            # The dense part of the gradient is `rate * weight`. Multiplying the [n, D] factors of the products by
            # `rate` is cheaper than multiplying the block. float16 and bfloat16 need probabilities in the block itself.
            rate = None if terms.scale is None else terms.scale / at.total
            weight, h = _add(at, terms, rate, low), h_low[part]
            outer = wide and rate is not None
            if need_hidden:
                grad = weight @ w_low
                grad_hidden[part] = grad.mul_(rate[:, None]) if outer else grad  # type: ignore[index]
            if need_head:
                h = h * rate[:, None] if outer else h  # type: ignore[index]
                if wide and begin > 0:
                    grad_head.addmm_(weight.T, h)
                else:
                    part_of_head = _over_positions(weight.T, h, acc)
                    grad_head = part_of_head if begin == 0 else grad_head.add_(part_of_head)
        return sums.to(acc), grad_hidden, grad_head


def _over_positions(weight: Tensor, h: Tensor, acc: torch.dtype) -> Tensor:
    """The product `weight @ h`, which sums over positions; the unscaled sum may be beyond float16's range."""
    if h.dtype != torch.float16:
        return (weight @ h).to(acc)
    if h.device.type == "cuda":
        return torch.mm(weight, h, out_dtype=acc)
    return weight.to(acc) @ h.to(acc)


def _positions(
    h: Tensor,
    head: Tensor,
    labels: Tensor,
    indptr: Tensor,
    tokens: Tensor,
    probs: Tensor,
    begin: int,
    block: Tensor,
    objective: Objective,
    wide: bool,
) -> Positions:
    """Compute the logits of some rows and the values that objectives need; `block` is overwritten."""
    n = len(h)
    rows, z = torch.arange(n, device=h.device), block[:n]
    low, high = int(indptr[begin]), int(indptr[begin + n])
    row = torch.repeat_interleave(rows, indptr[begin : begin + n + 1].diff(), output_size=high - low)
    token, p = tokens[low:high].long(), probs[low:high].to(z.dtype)

    def project() -> None:
        wide_logits(h, head, z.dtype, z)

    project()
    top = z.topk(objective.n_top) if objective.n_top else None
    z_label, z_entry = z[rows, labels], z[row, token]  # before exp overwrites the logits
    # exp(z - shift) must neither overflow nor vanish. Finding each row's maximum and subtracting it would take 6 % of
    # the whole time. So the shift is only the largest label or target logit of a row, and there is no shift at all if
    # these are within +-40. If a row sum then leaves the range `_SUMS`, the block is recomputed with the true maximum.
    shift = z_label.scatter_reduce(0, row, z_entry, "amax") if wide else z.amax(-1)
    plain = wide and bool((shift.abs() < _FAR).all())
    shift = torch.zeros_like(shift) if plain else shift
    total = _exponentiate(z, None if plain else shift)
    if wide and not bool(((total > _SUMS[0]) & (total < _SUMS[1])).all()):
        project()
        shift = z.amax(-1)
        total = _exponentiate(z, shift)
    log_z = total.log() + shift
    log_q = z_entry - log_z[row]
    kl = (torch.xlogy(p, p) - p * log_q).sum()  # xlogy: p log p is 0 at p = 0
    ce = (log_z - z_label).sum()
    return Positions(z, total, row, token, p, log_q, kl, ce, labels, top)


def _exponentiate(z: Tensor, shift: Tensor | None) -> Tensor:
    """Replace z by exp(z - shift) in place; return the row sums."""
    total = z.new_empty(len(z))
    for rows in _groups(z):
        part = z[rows] if shift is None else z[rows].sub_(shift[rows, None])
        torch.sum(part.exp_(), -1, out=total[rows])
    return total


def _groups(z: Tensor) -> Iterator[slice]:
    """Rows that one step of a softmax handles: all of them, or on CPU as many as stay in the cache."""
    group = max(1, _GROUP // (z.shape[1] * z.element_size())) if z.device.type == "cpu" else len(z)
    for first in range(0, len(z), group):
        yield slice(first, first + group)


def _add(at: Positions, terms: Terms, rate: Tensor | None, low: torch.dtype) -> Tensor:
    """The gradient with respect to the logits, in the type `low`.

    Where `low` is the block's own type, the result is divided by `rate`, by which the caller multiplies the products.
    """
    weight, wide = at.weight, at.weight.dtype == low
    if rate is not None and not wide:
        weight.mul_(rate[:, None])
    for sparse in terms.sparse:
        value = sparse.value
        if rate is not None and wide:
            # All values of a row have one sign and sum to -scale, so no quotient is large.
            value = value / rate[sparse.row].clamp_min(torch.finfo(rate.dtype).tiny)
        weight.view(-1).index_add_(0, sparse.row * weight.shape[1] + sparse.token, value.to(weight.dtype))
    return weight.to(low)

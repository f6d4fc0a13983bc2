"""The hybrid loss beta * KL(p_kNN || p_mem) + (1 - beta) * CE (paper, equation 5), fused with the output head.

Only the sparse entries of p_kNN and one log-normaliser per position enter the loss:

    KL = sum_j p_j log p_j - sum_j p_j h.w_j + logZ        CE = logZ - h.w_y

so neither the dense [N, V] target nor the full logits exist: chunks of `chunk` positions are projected, reduced and
turned into gradients inside the forward pass. The released code keeps about eight dense [N, V] copies (6 GiB at
8 x 512 tokens, V = 50,257; here 0.1 GiB).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def hybrid_loss(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, " N"],
    indptr: Int[Tensor, " N+1"],
    tokens: Int[Tensor, " nnz"],
    probs: Float[Tensor, " nnz"],
    kl_weight: float,
    chunk: int = 256,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum over N positions of kl_weight * KL(p_kNN || p_mem) + (1 - kl_weight) * CE, in nats.

    Args:
        hidden: Final hidden states of the scored positions (after the last norm).
        head: Output embedding; rows of a padded head are part of the softmax, as in training the model alone.
        labels: The true next tokens.
        indptr, tokens, probs: p_kNN in CSR form, rows sum to one. May be empty when `kl_weight` is 0.
        kl_weight: beta of the paper.
        chunk: Positions projected at a time; bounds the memory at chunk x V x 4 bytes.

    Returns:
        (loss, kl, ce), each a float32 sum over positions; only `loss` carries gradients.
    """
    sums: tuple[Tensor, Tensor, Tensor] = _FusedHybrid.apply(  # type: ignore[no-untyped-call]
        hidden, head, labels, indptr, tokens, probs, float(kl_weight), chunk
    )
    return sums


class _FusedHybrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        indptr: Tensor,
        tokens: Tensor,
        probs: Tensor,
        kl_weight: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head) if need_head else None
        acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        kl = torch.zeros((), dtype=acc, device=hidden.device)
        ce = torch.zeros((), dtype=acc, device=hidden.device)
        counts = (indptr[1:] - indptr[:-1]) if kl_weight else None
        # One block for all chunks: a fresh 50 MB per chunk costs 13,000 page faults, more than the softmax itself.
        block = torch.empty(min(chunk, len(hidden)), len(head), dtype=acc, device=hidden.device)
        exact = hidden.dtype == acc and not torch.is_autocast_enabled(hidden.device.type)

        for begin in range(0, len(hidden), chunk):
            end = min(begin + chunk, len(hidden))
            rows = torch.arange(end - begin, device=hidden.device)
            h, y = hidden[begin:end], labels[begin:end]
            logits = block[: end - begin]
            if exact:
                torch.mm(h, head.T, out=logits)
            else:  # out= is outside of autocast
                logits.copy_(h @ head.T)
            logits.sub_(logits.amax(dim=-1, keepdim=True))  # log q = logits - log_z, and exp cannot overflow
            at_y, grad = logits[rows, y], logits  # what is needed of the logits goes before exp takes their place
            if counts is not None:
                lo, hi = int(indptr[begin]), int(indptr[end])
                row = torch.repeat_interleave(rows, counts[begin:end])
                tok, p = tokens[lo:hi].long(), probs[lo:hi].to(acc)
                at_tok = logits[row, tok]
            total = grad.exp_().sum(dim=-1)
            log_z = total.log()
            ce += (log_z - at_y).sum()
            if counts is not None:
                # KL = sum p (log p - log q); xlogy gives 0 at p = 0.
                kl += (torch.xlogy(p, p) - p * (at_tok - log_z[row])).sum()
            if not (need_hidden or need_head):
                continue
            # d loss / d logits = (beta * sum p + 1 - beta) * softmax - beta * p - (1 - beta) * onehot(y)
            scale = torch.full_like(total, 1 - kl_weight)
            if counts is not None:
                scale.index_add_(0, row, p, alpha=kl_weight)
            grad *= (scale / total)[:, None]
            if counts is not None:
                grad.index_put_((row, tok), -kl_weight * p, accumulate=True)
            grad[rows, y] -= 1 - kl_weight
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[begin:end] = grad @ head
            if grad_head is not None:
                grad_head.addmm_(grad.T, h)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + (1 - kl_weight) * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None, None)

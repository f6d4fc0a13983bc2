"""Mixing in log space: p(y|x) = alpha * p_mem(y|x) + (1 - alpha) * p_base(y|x) (paper, section 3.3)."""

import math
import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memdec.errors import ConfigError, NumericsError
from memdec.maths.weighing import check_weight

_NOT_FINITE = "logits hold NaN or only infinities; try dtype=float32, or check the model's weights"


def check_weights(weights: Sequence[float], n_memories: int) -> list[float]:
    """Check the weights of several memories: each is in [0, 1] and their sum is at most 1; the base has the rest.

    Raises:
        ConfigError: The number of weights or their sum is wrong.
    """
    values = [check_weight(weight) for weight in weights]
    if len(values) != n_memories:
        raise ConfigError(f"weights: expected one per memory ({n_memories}), found {len(values)}")
    total = math.fsum(values)
    if total > 1 + 1e-9:
        raise ConfigError(f"weights: expected a sum of at most 1 (the base has the rest), found {total:g}; lower them")
    return values


def base_weight(weights: Sequence[float]) -> float:
    """The weight that remains for the base. A remainder no larger than rounding error counts as 0."""
    rest = 1.0 - math.fsum(weights)
    return rest if rest > (len(weights) - 1) * sys.float_info.epsilon else 0.0


def mix(
    log_p_base: Float[Tensor, "*shape"] | None,
    log_p_mems: Sequence[Float[Tensor, "*shape"] | None],
    weights: Sequence[float],
) -> Float[Tensor, "*shape"]:
    """log(sum_i w_i p_mem,i + (1 - sum_i w_i) p_base) of log-probabilities of equal shape, in float32 or float64.

    A distribution with weight 0 is not read and may be None. A distribution with weight 1 is returned bit for bit.
    """
    weights = check_weights(weights, len(log_p_mems))
    parts = [(log_p_base, base_weight(weights)), *zip(log_p_mems, weights, strict=True)]
    mixed: Tensor | None = None
    for log_p, weight in parts:
        if weight == 0.0:
            continue
        assert log_p is not None
        wide = log_p if log_p.dtype == torch.float64 else log_p.float()
        part = wide if weight == 1.0 else wide + math.log(weight)
        mixed = part if mixed is None else torch.logaddexp(mixed, part)
    assert mixed is not None  # the weights sum to one
    return mixed


def mix_logits(
    base: Float[Tensor, "*batch V"] | None,
    memories: Sequence[Float[Tensor, "*batch V"] | None],
    weights: Sequence[float],
) -> Float[Tensor, "*batch V"]:
    """Logits of the mixture for `generate`, float32: log p_mix + sum_i w_i log Z_i, Z_i the sum of exp(logits) of model i.

    Adding a constant to a row changes no probability, but logits processors multiply scores (a repetition penalty), so
    the level of a row matters to them. With this one, a model of weight 1 keeps its logits bit for bit, and models
    with equal logits give those logits at any weights. Logits with weight 0 are not read and may be None.

    Raises:
        NumericsError: The logits hold NaN.
    """
    weights = check_weights(weights, len(memories))
    parts = [(base, base_weight(weights)), *zip(memories, weights, strict=True)]
    alone = next((logits for logits, weight in parts if weight == 1.0), None)
    if alone is not None:
        return finite(alone.float())
    log_p = [None if not weight or logits is None else log_softmax(logits) for logits, weight in parts]
    mixed = mix(log_p[0], log_p[1:], weights)
    for (logits, weight), each in zip(parts, log_p, strict=True):
        if logits is not None and each is not None:
            mixed = mixed + weight * log_z(logits, each)
    return mixed


def log_z(logits: Float[Tensor, "*batch V"], log_p: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch 1"]:
    """log of the sum of exp(logits), float32, from logits and their log-softmax."""
    return logits.amax(-1, keepdim=True).float() - log_p.amax(-1, keepdim=True)


def in_vocabulary(logits: Float[Tensor, "*batch V"], n_vocab: int) -> Float[Tensor, "*batch W"]:
    """Logits of `n_vocab` entries, those of the base's head, before the softmax.

    Families pad their heads (Qwen2.5: 151,936 rows up to 3B, 152,064 from 7B on). Padded rows that the base lacks are
    cut off. Where a memory has fewer rows than the base, its probability of the others is 0, and the base stays as it
    is alone.
    """
    logits = logits[..., :n_vocab]
    missing = n_vocab - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=-math.inf) if missing else logits


def log_softmax(
    logits: Float[Tensor, "*batch V"], n_vocab: int | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch V"]:
    """log-softmax over `n_vocab` entries, or all, computed in `dtype`.

    In float32 the rounding error of the normaliser is common to all tokens of a position. Where log-probabilities of
    many tokens of one position are added, it adds up, so they are computed in float64.

    Raises:
        NumericsError: The logits hold NaN (the released code turns them into probability one).
    """
    if n_vocab is not None:
        logits = in_vocabulary(logits, n_vocab)
    log_p = torch.log_softmax(logits, dim=-1, dtype=dtype)
    if torch.isnan(log_p[..., 0]).any():
        raise NumericsError(_NOT_FINITE)
    return log_p


def finite(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    """The logits, after a check that they have a softmax."""
    if not logits.amax(-1).isfinite().all():
        raise NumericsError(_NOT_FINITE)
    return logits


def greedy_interval(
    log_p_base: Float[Tensor, "*shape V"],
    log_p_mem: Float[Tensor, "*shape V"] | None,
    labels: Int[Tensor, "*shape"],
) -> Float[Tensor, "*shape 2"]:
    """The interval (from, to) of alphas for which the label is the mixture's most probable token; (1, 0) if empty.

    Let b and m be the probability of the label minus that of another token y, in base and memory. In the mixture this
    difference is b + alpha (m - b). So each y excludes the alphas on one side of b / (b - m), and the rest is an
    interval. It is exact for every alpha, which results stored for a grid of alphas would not be. Without a memory the
    interval is [0, 1] or empty.
    """
    p = [None if log_p is None else log_p.exp() for log_p in (log_p_base, log_p_mem)]
    lead = [None if x is None else x.gather(-1, labels[..., None]) - x for x in p]
    b, m = lead[0], lead[0] if lead[1] is None else lead[1]
    assert b is not None
    assert m is not None
    root = b / (b - m)
    low = torch.where((b < 0) & (m >= 0), root, 0.0).amax(-1)
    high = torch.where((b >= 0) & (m < 0), root, 1.0).amin(-1)
    never = ((b < 0) & (m < 0)).any(-1) | (low > high)
    interval = torch.stack([low, high], -1)
    return torch.where(never[..., None], interval.new_tensor([1.0, 0.0]), interval)

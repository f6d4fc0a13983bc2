"""Compute the scores of given tokens from the distributions of base and memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from memdec.harness.scores import TokenScores
from memdec.inference.wrapper import Which
from memdec.maths import mixing
from memdec.maths.windows import Window

_ROWS = 64  # positions whose normaliser is computed at a time: 64 x 50,257 float64 numbers are 26 MB


def score_stream(
    model: Any,
    stream: Int[np.ndarray, " N"],
    parts: Sequence[Window],
    prefix: int,
    *,
    which: Which = "both",
    batch_size: int = 8,
    quiet: bool = False,
) -> TokenScores:
    """Score every token of a stream once, in the window that gives it the most left context.

    Args:
        model: Any model with `log_probs(ids, which=, logits_to_keep=)`.
        stream: Token ids.
        parts: Windows over the stream.
        prefix: Token in front of the first one.
        which: Models that run.
        batch_size: Windows per forward pass.
        quiet: No progress bar.
    """
    log_probs = partial(model.log_probs, which=which)
    scores = score_streams(log_probs, stream, parts, prefix, batch_size=batch_size, quiet=quiet)
    return _both(scores.get(0), scores.get(1))


@torch.no_grad()
def score_streams(
    log_probs: Callable[..., Iterable[Float[Tensor, "B K V"] | None]],
    stream: Int[np.ndarray, " N"],
    parts: Sequence[Window],
    prefix: int,
    *,
    batch_size: int = 8,
    quiet: bool = False,
) -> dict[int, NDArray[np.float64]]:
    """Score a stream as `score_stream`, under each distribution of `log_probs(ids, logits_to_keep=)` that is not None.

    Returns:
        log-probabilities (nats) of the true tokens, (N,), by the number of the distribution.
    """
    scores: dict[int, NDArray[np.float64]] = {}
    bar = tqdm(total=len(parts), desc="score windows", unit="window", disable=quiet, mininterval=2)
    for batch in _batches(parts, batch_size):
        ids = np.stack([part.inputs(stream, prefix) for part in batch])
        keep = batch[0].n_scored
        log_p = log_probs(torch.from_numpy(ids), logits_to_keep=keep)
        labels = torch.from_numpy(np.stack([stream[part.end - keep : part.end] for part in batch]).astype(np.int64))
        for i, rows in enumerate(log_p):
            if rows is None:
                continue
            out = scores.setdefault(i, np.full(len(stream), np.nan))
            for part, row in zip(batch, _normalised(rows, labels.to(rows.device)).cpu().numpy(), strict=True):
                out[part.first : part.end] = row
        bar.update(len(batch))
    bar.close()
    return scores


def _normalised(log_p: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """log-probabilities of the labels, whose normaliser is computed again in float64.

    The error of a float32 normaliser does not vanish in the sum over a long text. A float64 copy of all log-probabilities
    would take twice their memory (3 GB for 8 windows of GPT-2), so the rows are taken in turns.
    """
    if log_p.device.type == "mps":  # it has no float64
        return log_p.gather(-1, labels[..., None])[..., 0]
    own = log_p.gather(-1, labels[..., None])[..., 0].double()
    rows = torch.split(log_p.flatten(0, 1), _ROWS)
    return own - torch.cat([part.double().logsumexp(-1) for part in rows]).view(own.shape)


def score_labels(
    base: Float[Tensor, "n V"] | None, memory: Float[Tensor, "n V"] | None, labels: Int[Tensor, " n"]
) -> TokenScores:
    """Scores of n consecutive tokens, from the log-probabilities of the models that ran."""
    one, other = (base, memory) if base is not None else (memory, None)
    assert one is not None
    low, high = mixing.greedy_interval(one, other, labels).unbind(-1)
    log_p = [None if x is None else x.gather(-1, labels[:, None])[:, 0].cpu().numpy() for x in (base, memory)]
    return _both(log_p[0], log_p[1], (float(low.max()), float(high.min())))


def score_words(
    base: Float[Tensor, " V"] | None, memory: Float[Tensor, " V"] | None, words: Int[Tensor, " n"]
) -> TokenScores:
    """Scores of n candidates for the next token, from one distribution of each model that ran."""
    log_p = [None if x is None else x[words.to(x.device)].cpu().numpy() for x in (base, memory)]
    return _both(log_p[0], log_p[1])


def _both(
    base: NDArray[np.floating] | None, memory: NDArray[np.floating] | None, greedy: tuple[float, float] | None = None
) -> TokenScores:
    """Make scores when base or memory may not have run."""
    if base is None:
        assert memory is not None
        base = np.full_like(memory, np.nan)
    return TokenScores(np.asarray(base, np.float64), None if memory is None else np.asarray(memory, np.float64), greedy)


def _batches(parts: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Batches of windows of equal shape: there is no padding, and no logits are computed that are not scored."""
    batch: list[Window] = []
    for part in parts:
        same = batch and (part.n_inputs, part.n_scored) == (batch[0].n_inputs, batch[0].n_scored)
        if batch and (len(batch) == batch_size or not same):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch

"""Sliding windows over a token stream that score every position exactly once, with as much left context as possible.

Position `p` is the prediction of `tokens[p]` from the tokens before it. Position 0 is predicted from the prefix token
(BOS, or EOS if the tokenizer has no BOS). With context 4 and stride 2 over ten tokens (`^` is the prefix):

    tokens          0  1  2  3  4  5  6  7  8  9
    window 0     ^  0  1  2                         scores 0 1 2 3
    window 1           1  2  3  4                   scores 4 5
    window 2                 3  4  5  6             scores 6 7
    window 3                       5  6  7  8       scores 8 9

The paper uses context 1024 and stride 512. `stride == context` gives the disjoint windows of lm-eval's own
`loglikelihood_rolling`. The released code cuts windows inside each `map` batch, so its perplexity depends on the number
of workers. Here the windows depend on (length, context, stride) only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from memdec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Window:
    """One model call: the inputs are tokens `begin - 1 .. end - 2` and the predictions positions `begin .. end - 1`.

    Attributes:
        begin: First predicted position; its input is the token before it, or the prefix.
        first: First *scored* position; earlier windows scored `begin .. first - 1`.
        end: One past the last scored position.
    """

    begin: int
    first: int
    end: int

    @property
    def n_inputs(self) -> int:
        return self.end - self.begin

    @property
    def n_scored(self) -> int:
        return self.end - self.first

    def inputs(self, tokens: NDArray[np.integer], prefix: int) -> NDArray[np.int64]:
        """Input ids of this window, shape (n_inputs,)."""
        if self.begin > 0:
            return np.asarray(tokens[self.begin - 1 : self.end - 1], dtype=np.int64)
        ids = np.empty(self.end, dtype=np.int64)
        ids[0] = prefix
        ids[1:] = tokens[: self.end - 1]
        return ids


def windows(n_tokens: int, context: int, stride: int) -> list[Window]:
    """The windows that score each of the positions `0 .. n_tokens - 1` once.

    The last window is extended to the left instead of being short, so that it has full context, too.

    Raises:
        ConfigError: `context < 1`, or `stride` outside `1 .. context`.
    """
    if context < 1 or not 1 <= stride <= context:
        raise ConfigError(f"windows: need 1 <= stride <= context, found stride {stride}, context {context}")
    return list(_generate(n_tokens, context, stride))


def places(positions: Int[np.ndarray, "*shape"], n_tokens: int, context: int, stride: int) -> Int[np.ndarray, "*shape"]:
    """Place of each of these positions among the predictions of its window, 0 to `context` - 1."""
    steps = np.maximum(0, (positions - context) // stride + 1)
    end = np.minimum(context + stride * steps, n_tokens)
    place: NDArray[np.integer] = positions - np.maximum(0, end - context)
    return place


def sample(parts: Sequence[Window], stride: int, most: int, seed: int) -> list[Window]:
    """At most `most` positions in whole windows, evenly spread: every W / M-th window from a start that the seed draws.

    It is all windows if they fit, and one window at least.
    """
    if sum(part.n_scored for part in parts) <= most:
        return list(parts)
    n = max(1, (most - parts[0].n_scored) // stride + 1)  # the first window scores more than a stride
    start = np.random.default_rng(seed).random()
    return [parts[int((i + start) * len(parts) / n)] for i in range(n)]


def _generate(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    scored = 0
    while scored < n_tokens:
        end = min(n_tokens, context if scored == 0 else scored + stride)
        yield Window(begin=max(0, end - context), first=scored, end=end)
        scored = end

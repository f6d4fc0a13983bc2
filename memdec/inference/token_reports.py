"""Report, for every token of a text, what base, memory, kNN and the mixture predict at its position."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memdec.datastore import search
from memdec.datastore.keys import Datastore
from memdec.errors import ConfigError
from memdec.inference.mixture import MemDecForCausalLM
from memdec.maths import mixing
from memdec.maths.sparse_rows import SparseRows, probability_of
from memdec.maths.windows import Window, windows
from memdec.models import loading
from memdec.settings import ExplainSettings
from memdec.text import tokens

_CHARACTER = 4  # a UTF-8 character has at most 4 bytes, so at most 4 tokens
_Row = tuple[float, list[tuple[int, float]]]  # log p of the true token; (token, p) of the most probable


@dataclass(frozen=True, slots=True)
class Guess:
    """A probable token of a distribution, and its probability."""

    token: int
    text: str
    p: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One distribution at one position: log-probability (nats) of the true token, and the most probable tokens."""

    log_p: float
    top: list[Guess]

    @property
    def p(self) -> float:
        """Probability of the true token."""
        return math.exp(self.log_p)


@dataclass(frozen=True, slots=True)
class TokenReport:
    """One token of the text and the predictions at its position; `knn` is None without a datastore."""

    position: int
    token: int
    text: str
    base: Prediction
    memory: Prediction
    joint: Prediction
    knn: Prediction | None = None

    @property
    def memory_over_base(self) -> float:
        """log(p_mem / p_base), nats."""
        return self.memory.log_p - self.base.log_p

    @property
    def gain(self) -> float:
        """log(p_joint / p_base), nats: how much the mixture improves the log-likelihood."""
        return self.joint.log_p - self.base.log_p


class Neighbours:
    """Computes p_kNN at the positions of any text; the queries come from the model that made the datastore.

    Args:
        datastore: Folders of the datastore.
        index_folder: Index over its keys.
        settings: k, temperature and nprobe.
        tokenizer: Tokenizer of the text; it must be the datastore's.
        device: Where to search; None means a GPU if there is one.

    Raises:
        ArtifactError: The index was made from other keys, or the tokenizer differs.
        ConfigError: There are fewer keys than neighbours, or fewer cells than nprobe.
    """

    def __init__(
        self,
        datastore: Sequence[Path],
        index_folder: Path,
        settings: ExplainSettings,
        tokenizer: Any,
        device: torch.device | None = None,
    ) -> None:
        self.store, self.settings = Datastore(datastore, device), settings
        search.check(self.store, index_folder, settings)
        where = f"{self.store.folder} with the models"
        tokens.check_same(tokens.fingerprint(tokenizer), self.store.facts["tokenizer_sha256"], where)
        self.searcher = search.load(self.store, index_folder, settings.nprobe, device)

    def rows(self, ids: Int[np.ndarray, " T"], part: Window) -> SparseRows:
        """p_kNN at the scored positions of a window; `ids` are its inputs."""
        point, skip = self.store.forward.point, part.first - part.begin
        hidden = point(torch.from_numpy(ids)[None].to(point.model.device))[0, skip:]
        before = np.where(np.arange(part.first, part.end) > 0, ids[skip:], -1)  # the prefix is no token of a text
        released, k = not self.store.parts, self.settings.neighbours
        near = self.searcher.search(self.store.rounded(hidden), k, inputs=before, released=released)
        sq_dist, positions = map(torch.from_numpy, near)
        return SparseRows.of(*self.searcher.rows(sq_dist, positions, self.settings.temperature))


@torch.no_grad()
def explain(
    model: MemDecForCausalLM,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    context: int,
    stride: int,
    top: int = 3,
    neighbours: Neighbours | None = None,
) -> list[TokenReport]:
    """Report every token of a text; each is predicted once, with sliding windows (`memdec.maths.windows`).

    Args:
        model: A mixture; with several memories, p_mem is their mixture.
        tokenizer: Tokenizer of the models.
        ids: Token ids of the text.
        context: Tokens of a window.
        stride: Tokens scored per window.
        top: Number of most probable tokens to report for each distribution.
        neighbours: Source of p_kNN; None leaves it out.

    Raises:
        ConfigError: There are no tokens or no memory, or the windows are longer than the models' context.
    """
    if not len(ids) or not model.memories:
        raise ConfigError(
            f"explain: expected a text and a mixture with a memory, found {len(ids)} tokens and {len(model.memories)} memories"
        )
    loading.check_positions(model.n_positions, context, "context", "lower it")
    stream, prefix = np.asarray(ids, np.int64), tokens.prefix_id(tokenizer)
    weight = min(1.0, math.fsum(model.config.weights))
    spell = _speller(tokenizer)
    reports = []
    for part in windows(len(stream), context, stride):
        inputs, labels = part.inputs(stream, prefix), stream[part.first : part.end]
        log_p = model.log_probs(torch.from_numpy(inputs)[None], logits_to_keep=part.n_scored)
        base, memory = (rows[0] for rows in log_p if rows is not None)
        told = [_dense(rows, labels, top) for rows in (base, memory, mixing.mix(base, [memory], [weight]))]
        if neighbours is not None:
            told.append(_sparse(neighbours.rows(inputs, part), labels, top))
        for position, token, *rows in zip(range(part.first, part.end), labels.tolist(), *told, strict=True):
            before = tuple(stream[max(0, position - _CHARACTER) : position].tolist())
            predictions = (Prediction(own, [Guess(t, spell(before, t), p) for t, p in best]) for own, best in rows)
            reports.append(TokenReport(position, token, spell(before, token), *predictions))
    return reports


def _dense(log_p: Float[Tensor, "n V"], labels: NDArray[np.int64], top: int) -> list[_Row]:
    own = log_p.gather(1, torch.from_numpy(labels)[:, None].to(log_p.device))[:, 0].tolist()
    best = log_p.topk(min(top, log_p.shape[1]), dim=1)
    return [
        (value, list(zip(ids, probs, strict=True)))
        for value, ids, probs in zip(own, best.indices.tolist(), best.values.double().exp().tolist(), strict=True)
    ]


def _sparse(rows: SparseRows, labels: NDArray[np.int64], top: int) -> list[_Row]:
    own, found = probability_of(rows, labels), []
    for row, p in enumerate(own.tolist()):
        span = slice(rows.indptr[row], rows.indptr[row + 1])
        best = np.argsort(-rows.probs[span], kind="stable")[:top]
        likely = list(zip(rows.tokens[span][best].tolist(), rows.probs[span][best].tolist(), strict=True))
        found.append((math.log(p) if p else -math.inf, likely))
    return found


def _speller(tokenizer: Any) -> Callable[[tuple[int, ...], int], str]:
    """Make a function (tokens before, token) -> the text that the token adds.

    A token that ends inside a character gives U+FFFD; the token that completes the character gives the whole character.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @lru_cache(maxsize=100_000)
    def spell(before: tuple[int, ...], token: int) -> str:
        known, whole = decode(before), decode([*before, token])
        same = next((i for i, (a, b) in enumerate(zip(known, whole, strict=False)) if a != b), len(known))
        text = whole[same:]
        if text.endswith("\ufffd") or (not text and whole.endswith("\ufffd")):
            return "\ufffd"
        return text or str(tokenizer.convert_ids_to_tokens(token))

    return spell

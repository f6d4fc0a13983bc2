"""In-Context RAG: `IcRagForCausalLM` is a frozen base model that reads a retrieved passage before the text.

This is In-Context RALM (Ram et al. 2023), a baseline of the paper (section 4.1). Retrieval is BM25 with the last 32
tokens as the query, and is repeated every 4 tokens. Token t of a text is predicted from

    passage found with the tokens before t0 | text before t,   t0 = t rounded down to a multiple of `every`

There is no separator between the two. The text is cut on the left to fit into the base's context. With `every` 4 and
`query` 3:

    text           0  1  2  3  4  5  6  7  8  9
    tokens 0 to 3  no passage
    tokens 4 to 7     q  q  q                      passage (q) | 0 .. 6
    tokens 8, 9                 q  q  q            passage (q) | 0 .. 8
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memdec.datastore.passages import Passages
from memdec.errors import ArtifactError, ConfigError
from memdec.inference.wrapper import MemDecConfig, Which, Wrapper, kept_positions, shared_vocabulary
from memdec.maths import mixing
from memdec.models import loading, rope
from memdec.settings import RetrievalSettings
from memdec.text import tokens

_ROWS = 16  # rows per forward pass


class _Row(NamedTuple):
    """What the base reads for the tokens of one stride."""

    ids: list[int]
    kept: list[tuple[int, int, int]]  # row and position in the output, and distance from the end of `ids`


class IcRagForCausalLM(Wrapper):
    """The base model with the best passage of a corpus in front of the text.

    Positions count from the first token of a row that is not padding. So batch size, padding and splitting a text into
    several calls do not change the result. There is no KV cache, because a new passage would change all of its entries.

    Args:
        base: Any causal LM; it is not changed.
        retriever: Passages in token ids of the base's tokenizer.
        query: The query is this many tokens, the last ones before the stride.
        every: Tokens between two retrievals.
        n_vocab: Rows that the tokenizer needs (`tokens.n_needed`), only to check that the output head has them.
        context: Maximum input length of the base in tokens; default: all positions of the base.

    Raises:
        ArtifactError: The passages have token ids that the base does not have.
        ConfigError: A number is out of its range, or the passages leave no room for text.
        ModelError: The head has fewer than `n_vocab` tokens.
    """

    def __init__(
        self,
        base: Any,
        retriever: Passages,
        *,
        query: int = 32,
        every: int = 4,
        n_vocab: int | None = None,
        context: int | None = None,
    ) -> None:
        vocab = shared_vocabulary([base], n_vocab)
        super().__init__(MemDecConfig(parts=[{"config": base.config.to_dict()}], n_vocab=vocab), base)
        self.retriever, self.query, self.every, self.n_vocab = retriever, query, every, vocab
        self.context = check_numbers(retriever, self.n_positions, query=query, every=every, context=context)
        known = base.get_input_embeddings().num_embeddings
        if retriever.facts["vocab_size"] > known:
            raise ArtifactError(
                f"{retriever.folder}: expected passages with tokens below the {known} of the base, found "
                f"{retriever.facts['vocab_size'] - 1}; run `memdec passages` on tokens of this model's tokenizer"
            )
        self.requires_grad_(False)
        self.eval()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `generate` of transformers, but without a KV cache."""
        return super().generate(inputs, *args, **(kwargs | {"use_cache": False}))

    @property
    def running(self) -> list[int]:
        """None: `forward` makes the base's inputs itself, so what a family does in `generate` has no part in it."""
        return []

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        prepared: Mapping[int, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits = normalised log-probabilities, float32 (B, T or logits_to_keep, V); uniform at padding.

        `input_ids` are whole texts. They may be longer than the context of the base. `prepared` says that this is a step
        of `generate`, where the logits are the base's own.

        Raises:
            ConfigError: `past_key_values` already holds text.
        """
        self.check_arguments(kwargs)
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ConfigError(
                f"past_key_values: expected whole texts, found a cache of {past_key_values.get_seq_length()} tokens; set "
                "use_cache=False"
            )
        made = mixing.log_softmax if prepared is None else mixing.finite
        found = self._made(input_ids, attention_mask, logits_to_keep, made, torch.float32)
        return self.output(found, labels, None, kwargs)

    def log_probs(
        self, input_ids: Tensor, *, which: Which = "base", logits_to_keep: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, Tensor | None]:
        """(log p, None) of a batch without left padding, as for `Wrapper`."""
        self.check_inputs(input_ids)
        made = partial(mixing.log_softmax, dtype=dtype)
        return self._made(input_ids, None, logits_to_keep, made, dtype), None

    def _made(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None,
        logits_to_keep: int | Tensor,
        made: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> Float[Tensor, "B K V"]:
        """`made` of the base's logits at the kept positions; uniform at padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        where = logits_to_keep.cpu() if isinstance(logits_to_keep, Tensor) else logits_to_keep
        kept = torch.arange(input_ids.shape[1])[kept_positions(where)]
        shape = (len(input_ids), len(kept), self.n_vocab)
        found = torch.full(shape, -math.log(self.n_vocab), dtype=dtype, device=self.device)
        rows = self._rows(input_ids, mask.bool(), kept.tolist())
        rows.sort(key=lambda row: len(row.ids))
        for _, same in groupby(rows, key=lambda row: rope.padded_class([self.base.config], len(row.ids))):
            group = list(same)
            for first in range(0, len(group), _ROWS):
                self._fill(found, group[first : first + _ROWS], made)
        return found

    def _rows(self, input_ids: Int[Tensor, "B T"], mask: Tensor, kept: Sequence[int]) -> list[_Row]:
        """Inputs of the base for the kept positions that are not padding: one row for each stride of a text."""
        rows = []
        places = (mask.cumsum(1) - 1).tolist()
        for number, (ids, real) in enumerate(zip(input_ids, mask, strict=True)):
            text, is_text = ids[real].tolist(), real.tolist()
            strides: dict[int, list[tuple[int, int]]] = defaultdict(list)
            for at, column in enumerate(kept):
                if is_text[column]:
                    place = places[number][column]  # predicts token place + 1
                    strides[(place + 1) // self.every * self.every].append((at, place))
            for start, wanted in strides.items():
                last = max(place for _, place in wanted)
                rows.append(_Row(self._read(text, start, last), [(number, at, last - place) for at, place in wanted]))
        return rows

    def _read(self, text: Sequence[int], start: int, last: int) -> list[int]:
        """The passage for the stride that begins at token `start`, followed by the text up to token `last`."""
        passage = self.retriever.best(text[max(0, start - self.query) : start]) if start else []
        # Always leave room for the whole stride; else the result would depend on which of its positions are kept.
        begin = max(0, start + self.every - 1 - (self.context - len(passage)))
        return [*passage, *text[begin : last + 1]]

    def _fill(self, found: Float[Tensor, "B K V"], rows: Sequence[_Row], made: Callable[[Tensor], Tensor]) -> None:
        """Run the base over some rows, padded on the left, and write `made` of its logits into `found`."""
        longest = max(len(row.ids) for row in rows)
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, longest - len(row.ids) :] = torch.tensor(row.ids)
            mask[number, longest - len(row.ids) :] = 1
        read = self.readers[0].inputs(None, (mask.cumsum(1) - 1).clamp(min=0), input_ids=ids, attention_mask=mask)
        logits = self.readers[0].logits(read, use_cache=False, logits_to_keep=self.every)
        places = [(number, -1 - back, *where) for number, row in enumerate(rows) for *where, back in row.kept]
        number, back, row_of, at = torch.tensor(places).T
        found[row_of, at] = made(logits[number, back, : self.n_vocab].float()).to(found)


def check_numbers(retriever: Passages, limit: int | None, *, query: int, every: int, context: int | None) -> int:
    """Check that a passage and a stride of text fit into the context, and return the context in tokens.

    Args:
        retriever: The passages.
        limit: Positions of the base; None if unknown.
        query: Tokens of a query.
        every: Tokens between two retrievals.
        context: Requested context; default `limit`.

    Raises:
        ConfigError: They do not fit, or a number is out of its range.
    """
    if min(query, every) < 1:
        raise ConfigError(f"query, every: expected at least 1 token, found {query} and {every}")
    size = limit if context is None else context
    if size is None or (limit is not None and size > limit):
        raise ConfigError(
            f"context: expected at most the positions of the base ({limit or 'not known'}), found {context}"
        )
    if retriever.longest + every > size:
        raise ConfigError(
            f"{retriever.folder}: expected passages of at most {size - every} tokens for a context of {size}, found "
            f"{retriever.longest}; run `memdec passages` with a smaller --passage"
        )
    return size


def check_folders(base: str | Path, words: Any, config: Any, passages: Path, settings: RetrievalSettings) -> Passages:
    """Check that passages fit the base, and return them; loads no weights.

    Raises:
        ArtifactError: The passages are incomplete, or were made with another tokenizer.
        ConfigError: The passages leave no room for text.
    """
    retriever = Passages(passages)
    ours = loading.tokenizer_sha256(base, words)
    tokens.check_same(ours, retriever.facts["tokenizer_sha256"], f"{base} with {passages}")
    limit = loading.n_positions(config)
    check_numbers(retriever, limit, query=settings.query, every=settings.every, context=None)
    return retriever

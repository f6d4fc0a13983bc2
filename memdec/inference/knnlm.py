"""The kNN-LM: `KnnLMForCausalLM` is a frozen base model with its datastore, used as one causal LM.

    p(y|x) = lambda * p_kNN(y|x) + (1 - lambda) * p_base(y|x)

(Khandelwal et al. 2020, equation 3; a baseline of the paper, section 4.1.) The forward pass that gives the logits also
gives the query of each position: the hidden state at the key point of the datastore, rounded as the keys were. Keys
depend only on hidden states, so the base's KV cache can be used. Keys that are not stored have no exact distances: then
those of the index count, as in the released code.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from memdec.artefacts import artefact
from memdec.datastore import device_search, search
from memdec.datastore.keys import Datastore
from memdec.errors import ArtifactError, NumericsError
from memdec.inference.wrapper import MemDecConfig, Which, Wrapper, kept_positions, last_positions, shared_vocabulary
from memdec.maths import kernels, mixing, weighing
from memdec.models import loading
from memdec.models.keypoints import KeyPoint
from memdec.settings import KnnLMSettings, parse
from memdec.text import tokens

_QUERIES = 1024  # queries per search on a CPU


class KnnLMForCausalLM(Wrapper):
    """The base mixed with p_kNN.

    Args:
        base: Any causal LM; it is not changed.
        store: Keys made with this model.
        searcher: Search over these keys.
        weight: lambda, from 0 (base only, no search) to 1 (p_kNN only; -inf for a token that no neighbour has).
        temperature: Divides the squared distances.
        neighbours: k.
        n_vocab: Rows that the tokenizer needs (`tokens.n_needed`), only to check that the output head has them.

    Raises:
        ArtifactError: The keys were made with another model.
        ConfigError: A number is out of its range.
        ModelError: The head has fewer than `n_vocab` tokens.
    """

    def __init__(
        self,
        base: Any,
        store: Datastore,
        searcher: search.Searcher,
        *,
        weight: float = 0.25,
        temperature: float,
        neighbours: int,
        n_vocab: int | None = None,
    ) -> None:
        vocab = shared_vocabulary([base], n_vocab)
        super().__init__(MemDecConfig(parts=[{"config": base.config.to_dict()}], n_vocab=vocab), base)
        parse(KnnLMSettings, {"temperature": temperature, "neighbours": neighbours}, "kNN-LM")
        search.check_neighbours(store, neighbours)
        self.set_weight(weight)
        self.temperature, self.neighbours, self.n_vocab = temperature, neighbours, vocab
        self._searcher = searcher
        if int(store.values.max()) >= vocab:
            raise ArtifactError(
                f"{store.folder}: expected tokens below the {vocab} of the output head, found {store.values.max()}; run "
                "`memdec tokens` and `memdec datastore` with this model's tokenizer"
            )
        self.requires_grad_(False)
        self.eval()
        self._point = KeyPoint(base, store.settings.key_point)
        store.check_model(self._point)

    def set_weight(self, weight: float) -> None:
        """Use another lambda from now on.

        Raises:
            ConfigError: It is not a number from 0 to 1.
        """
        self.weight = weighing.check_weight(weight)

    @cached_property
    def reads_on(self) -> bool:
        return self._all_attend()

    def log_probs(
        self,
        input_ids: Tensor,
        *,
        which: Which = "both",
        logits_to_keep: int = 0,
        dtype: torch.dtype = torch.float32,
        cache: Cache | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(log p_base, log p_kNN) of a batch without left padding, each (B, T or logits_to_keep, V) in `dtype`.

        Args:
            input_ids: Token ids (B, T).
            which: "base", "memory" (p_kNN) or "both".
            logits_to_keep: Number of last positions to return; 0 means all.
            dtype: float32, or float64 where many log-probabilities are added.
            cache: Keys and values of the text before `input_ids`, to which those of `input_ids` are added.
        """
        at = [self.temperature] if which != "base" else []
        base, *found = self.log_probs_at(at, input_ids, logits_to_keep=logits_to_keep, dtype=dtype, cache=cache)
        return base if which != "memory" else None, found[0] if found else None

    def log_probs_at(
        self,
        temperatures: Sequence[float],
        input_ids: Tensor,
        *,
        logits_to_keep: int = 0,
        dtype: torch.dtype = torch.float32,
        cache: Cache | None = None,
    ) -> Iterator[Tensor]:
        """log p_base, then log p_kNN at each temperature, from one pass and one search; arguments as for `log_probs`.

        They are made one after the other, so that one p_kNN is in memory at a time.
        """
        self.check_inputs(input_ids)
        kept, cached = last_positions(input_ids.shape[1], logits_to_keep), cache is not None
        read = self._inputs([0], None, cache, input_ids=input_ids.to(self.device), position_ids=None)[0]
        _, base, found = self._run(temperatures, read, None, logits_to_keep=kept, use_cache=cached, dtype=dtype)
        yield base
        yield from found

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
        """Logits = normalised log-probabilities, float32 (B, T or logits_to_keep, V); p_base at padding.

        In `generate`, `prepared` has what the base reads, and the logits stay on the level of the base's.
        """
        self.check_arguments(kwargs)
        past_key_values, use_cache = self._kept(past_key_values, use_cache)
        places_follow_mask = prepared is not None or position_ids is not None
        self.check_length(input_ids, past_key_values, attention_mask if places_follow_mask else None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        read = self._inputs([0], prepared, past_key_values, **inputs)[0]
        at = [self.temperature] if self.weight > 0 else []
        logits, base, at_each = self._run(at, read, attention_mask, use_cache=use_cache, logits_to_keep=logits_to_keep)
        found = next(at_each, None)
        mixed = mixing.mix(base, [found], [self.weight])
        if prepared is not None:
            mixed = logits.float() if found is None else mixed + mixing.log_z(logits, base)
        return self.output(mixed, labels, past_key_values, kwargs)

    def _run(
        self,
        temperatures: Sequence[float],
        read: Mapping[str, Any],
        attention_mask: Int[Tensor, "B past+T"] | None,
        *,
        logits_to_keep: int | Tensor,
        use_cache: bool,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
        """(the base's logits, log p_base, log p_kNN at each temperature) of the kept positions; log p_base at padding.

        Without temperatures nothing is searched.
        """
        with self._point.capture() as seen:
            logits = self.readers[0].logits(read, use_cache=use_cache, logits_to_keep=logits_to_keep)
        logits = logits[..., : self.n_vocab].to(self.device)
        log_p_base = mixing.log_softmax(logits, dtype=dtype)
        if not temperatures:
            return logits, log_p_base, iter(())
        input_ids, kept = read["input_ids"], kept_positions(logits_to_keep)
        (hidden,) = seen
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        there = there[:, kept].to(self.device).bool()
        vectors = hidden.reshape(*input_ids.shape, -1)[:, kept][there.to(hidden.device)]
        near = self._near(vectors, input_ids[:, kept][there], there)
        found = (self._log_p_knn(near, there, temperature, dtype) for temperature in temperatures)
        return logits, log_p_base, (log_p.where(there[..., None], log_p_base) for log_p in found)

    @property
    def _n_queries(self) -> int:
        """Queries per search: on a GPU more of them share the cost of keys that do not fit there."""
        return _QUERIES if self._searcher.on_device is None else device_search.QUERIES

    def _near(
        self, vectors: Float[Tensor, "N D"], inputs: Int[Tensor, " N"], there: Bool[Tensor, "B K"]
    ) -> list[tuple[Float[Tensor, "n K"], Int[Tensor, "n K"]]]:
        """Squared distances and positions of the neighbours of the N positions that are not padding, in parts."""
        queries, read = self._queries(vectors, there), inputs.cpu().numpy()
        streamed = not self._searcher.store.parts
        near = []
        for first in range(0, len(queries), self._n_queries):
            part = slice(first, first + self._n_queries)
            sq_dist, ids = self._searcher.search(queries[part], self.neighbours, inputs=read[part], released=streamed)
            near.append((torch.from_numpy(sq_dist), torch.from_numpy(ids)))
        return near

    def _log_p_knn(
        self, near: Sequence[tuple[Tensor, Tensor]], there: Bool[Tensor, "B K"], temperature: float, dtype: torch.dtype
    ) -> Float[Tensor, "B K V"]:
        """log p_kNN of the N positions that are not padding; -inf for a token that no neighbour has."""
        log_p = torch.full((there.numel(), self.n_vocab), -math.inf, dtype=dtype, device=self.device)
        rows = there.flatten().nonzero()[:, 0]
        for number, (sq_dist, ids) in enumerate(near):
            part = slice(number * self._n_queries, (number + 1) * self._n_queries)
            counts, found, probs = self._searcher.rows(sq_dist, ids, temperature)
            at = rows[part].repeat_interleave(counts.to(self.device))
            log_p[at, found.to(self.device)] = probs.log().to(self.device, dtype)
        return log_p.view(*there.shape, -1)

    def _queries(self, vectors: Float[Tensor, "N D"], there: Bool[Tensor, "B K"]) -> Float[np.ndarray, "N D"]:
        """Vectors rounded to the number type of the keys, as float32.

        Raises:
            NumericsError: A vector is not finite in that type; the message names its row and position.
        """
        queries = self._searcher.store.rounded(vectors)
        fits = (np.abs(queries) < kernels.LARGEST).all(1)
        if not fits.all():
            row, position = there.nonzero()[int(np.argmin(fits))].tolist()
            dtype = self._searcher.store.settings.dtype
            raise NumericsError(
                f"kNN-LM: expected finite keys within the range of {dtype}, found another one in row {row} at position "
                f"{position} of those asked for; load the base in float32, or make the datastore with another dtype"
            )
        return queries


def check_folders(
    base: str | Path, words: Any, datastore: Path | Sequence[Path], index_folder: Path, settings: KnnLMSettings
) -> Datastore:
    """Check that base, keys, index and settings match, and return the datastore; loads no weights.

    Raises:
        ArtifactError: They do not match, or one of them is incomplete.
        ConfigError: A setting is out of its range.
    """
    store = Datastore(datastore)
    search.check(store, index_folder, settings)
    ours = loading.tokenizer_sha256(base, words)
    tokens.check_same(ours, store.facts["tokenizer_sha256"], f"{base} with {store.folder}")
    # A model that is not an artefact has no recipe; its weights are compared when it is loaded.
    if artefact.kind_of(Path(base)) == "model" and loading.known(base, "model").recipe != store.model:
        raise ArtifactError(
            f"{store.folder}: expected keys of {base}, found those of another model; run `memdec datastore` with this one"
        )
    return store

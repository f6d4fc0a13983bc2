"""Stage `passages`: cut the training text into passages and build a BM25 index over them, for In-Context RAG.

Passages are consecutive pieces of a document of the train split; the last one may be shorter. With separator `eos`, the
token stream marks the ends of documents. Then no passage crosses such an end or contains the EOS token. BM25 counts
token ids of the model's own tokenizer, without a second tokenizer or a stemmer. Variant and parameters are the defaults
of bm25s (Lucene, k1 1.5, b 0.75).

Input: a token folder. Output: `tokens.npy` and `edges.npy` (passage i is tokens[edges[i]:edges[i + 1]]), and the index
in bm25s's format: .npy and JSON, no pickle. Building it takes 26 bytes of memory and 3 us per token.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from bm25s.tokenization import Tokenized
from jaxtyping import Int
from numpy.typing import NDArray

from memdec.artefacts import arrays, artefact, resources
from memdec.errors import ArtifactError, CorpusError, outside
from memdec.settings import PassageSettings
from memdec.text import tokens

_BYTES = 32  # bytes of memory per token to plan for: the 26 measured and some room
_REMEMBERED = 4096  # cached queries: generation repeats one until the next retrieval; requests often share a context


def run(stream: Path, out: Path, settings: PassageSettings) -> None:
    """Cut the train split of a token folder into passages and index them.

    Args:
        stream: Token folder.
        out: Folder to make.
        settings: Length of a passage.

    Raises:
        ArtifactError: The token folder is missing or damaged.
        CorpusError: The token stream has no text, only ends of documents.
        ResourceError: The index does not fit into memory.
    """
    source = artefact.read(stream, "tokens")
    with artefact.building(out, "passages", {"passage": settings.passage}, {"tokens": source.recipe}) as build:
        if build is None:
            return
        ids = tokens.load_stream(stream, "train")
        text, edges = cut(ids, source.facts["end"], settings.passage)
        if not len(text):
            raise CorpusError(f"{stream}: expected text in the train split, found only {len(ids)} ends of documents")
        resources.check_memory(_BYTES * len(text), "the BM25 index", "use a smaller corpus (max_bytes)")
        np.save(out / "tokens.npy", text, allow_pickle=False)
        np.save(out / "edges.npy", edges, allow_pickle=False)
        n_vocab = int(text.max()) + 1
        _index(_Pieces(text, edges), n_vocab).save(out, allow_pickle=False, show_progress=False)
        build.facts.update(
            passages=len(edges) - 1,
            tokens=len(text),
            vocab_size=n_vocab,
            tokens_sha256=source.facts["sha256"]["train"],
            tokenizer_sha256=source.facts["tokenizer_sha256"],
            corpus_sha256=source.facts["corpus_sha256"],
        )


def cut(
    ids: Int[np.ndarray, " N"], end: int | None, passage: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " passages+1"]]:
    """Return the text without end-of-document tokens, and the first position of each passage in it, then the end.

    Args:
        ids: Token stream.
        end: Token that ends a document; None if the token stream is one long document.
        passage: Most tokens of a passage.
    """
    is_end = np.zeros(len(ids), bool) if end is None else np.asarray(ids == end)
    text = np.asarray(ids)[~is_end]
    # Positions in `text` where a document begins, then the end of the text.
    bounds = np.unique(np.concatenate([[0], np.cumsum(~is_end)[is_end], [len(text)]]))
    starts = [np.arange(begin, stop, passage) for begin, stop in pairwise(bounds)]
    return text, np.concatenate([*starts, [len(text)]]).astype(np.int64)


class _Pieces:
    """Iterates over passages as lists of ints, the input of bm25s, without holding all of them in memory."""

    def __init__(self, text: NDArray[np.integer], edges: NDArray[np.int64]) -> None:
        self._text, self._edges = text, edges

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for begin, end in pairwise(self._edges):
            yield self._text[begin:end].tolist()


def _index(pieces: _Pieces, n_vocab: int) -> Any:
    """Build a BM25 index over passages; column i of its matrix is token i."""
    index = bm25s.BM25()
    vocabulary = {str(token): token for token in range(n_vocab)}
    index.index(Tokenized(ids=pieces, vocab=vocabulary), create_empty_token=False, show_progress=False)
    return index


class Passages:
    """Finds the passage with the highest BM25 score for a query.

    Attributes:
        longest: Most tokens of a passage.
        facts: The facts of the manifest.

    Raises:
        ArtifactError: The folder is incomplete.
    """

    def __init__(self, folder: Path) -> None:
        manifest = artefact.read(folder, "passages", whole=True)
        self.folder, self.facts = folder, manifest.facts
        self.longest: int = manifest.settings["passage"]
        self._text = arrays.load(folder / "tokens.npy", arrays.INTEGERS, (self.facts["tokens"],))
        self._edges = arrays.load(folder / "edges.npy", np.int64, (self.facts["passages"] + 1,))
        with outside(ArtifactError, folder, "an index of bm25s", "run `memdec passages` again"):
            self._index = bm25s.BM25.load(folder, mmap=True, allow_pickle=False, load_vocab=False)
            n_vocab = len(self._index.scores["indptr"]) - 1
        if n_vocab != self.facts["vocab_size"]:
            raise ArtifactError(
                f"{folder}: expected an index of {self.facts['vocab_size']} tokens, found one of {n_vocab}; run `memdec passages` "
                "again"
            )
        self._remembered = lru_cache(_REMEMBERED)(self._best)

    def best(self, query: Sequence[int]) -> list[int]:
        """Token ids of the best passage, the first one in a tie; empty if no passage shares a token with the query."""
        return self._remembered(tuple(query))

    def _best(self, query: tuple[int, ...]) -> list[int]:
        scores = self._index.get_scores_from_ids([token for token in query if token < self.facts["vocab_size"]])
        number = int(scores.argmax())
        if not scores[number] > 0:
            return []
        found: list[int] = self._text[self._edges[number] : self._edges[number + 1]].tolist()
        return found

"""The perplexity tasks: one row with a whole split, so that windows run over the whole token stream."""

import math
import os
from pathlib import Path
from typing import Any

from memdec import artifacts, corpora, rows
from memdec.config import SPLITS
from memdec.errors import ConfigError, CorpusError
from memdec.rows import HubRows, Rows


def load_corpus(**metadata: Any) -> dict[str, Rows]:
    """Rows of `memdec_ppl`: one row with the whole split of a corpus folder.

    The corpus is, in this order: metadata `corpus`, MEMDEC_CORPUS, the corpus the memory was trained on, the corpus the
    base model was trained on. Metadata `split` (default test) chooses the split.
    """
    folder, why = _corpus_folder(metadata)
    split = metadata.get("split", "test")
    if split not in SPLITS:
        raise ConfigError(f"memdec_ppl: expected split train, valid or test, found {split!r}; set it with --metadata")
    manifest = artifacts.read(folder, "corpus")
    words = rows.tokenizer(metadata)
    rows.log.info("memdec_ppl: %s split of %s (%s)", split, folder, why)
    text = corpora.joined(corpora.load(folder, split), manifest.facts["separator"], words.eos_token)
    return _one_row(text, words, source=f"{folder.name} {manifest.facts['sha256']} {split}")


def load_wikitext(**metadata: Any) -> dict[str, Rows]:
    """Rows of `memdec_wikitext`: WikiText-103 raw, one row with the whole test split, lines joined as they are."""
    file = rows.local_file("wikitext/wikitext-103-raw-v1/test.parquet")
    if file is not None:
        import pyarrow.parquet as pq

        lines, source = pq.read_table(file)["text"].to_pylist(), str(file)
    else:
        revision, files = str(metadata["wikitext_revision"]), "wikitext-103-raw-v1/test-*.parquet"
        hub = HubRows("Salesforce/wikitext", None, "test", revision, files)  # not the training files
        lines, source = list(rows.hub_rows(hub)["text"]), str(hub)
    rows.log.info("memdec_wikitext: %d lines of %s", len(lines), source)
    return _one_row("".join(lines), rows.tokenizer(metadata), source=source)


def _one_row(text: str, words: Any, source: str) -> dict[str, Rows]:
    from datasets import Dataset

    n_tokens = len(words.encode(text, add_special_tokens=False, verbose=False))
    row = {
        "text": text,
        "n_tokens": n_tokens,
        "n_words": len(text.split()),
        "n_bytes": len(text.encode()),
    }
    return {"test": Rows(Dataset.from_list([row]), source)}


def _corpus_folder(metadata: dict[str, Any]) -> tuple[Path, str]:
    if metadata.get("corpus"):
        return Path(str(metadata["corpus"])), "metadata"
    if os.environ.get("MEMDEC_CORPUS"):
        return Path(os.environ["MEMDEC_CORPUS"]), "MEMDEC_CORPUS"
    for role in ("memory", "peft", "pretrained"):
        folder = Path(str(metadata.get(role) or "missing"))
        kind = artifacts.kind_of(folder)
        if kind is not None:
            corpus = artifacts.read(folder, kind).facts.get("corpus")
            if corpus:
                return Path(os.path.relpath((folder / corpus).resolve())), f"what the {role} model was trained on"
    raise CorpusError(
        'memdec_ppl: expected a corpus folder, found none; give --metadata \'{"corpus": "results/mini/corpora/NAME"}\' '
        "or set MEMDEC_CORPUS (make one with `memdec corpus`)"
    )


def rolling_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Metrics of one text from its total log-likelihood (nats)."""
    (loglikelihood,) = results
    return {
        "token_perplexity": (loglikelihood, doc["n_tokens"]),
        "word_perplexity": (loglikelihood, doc["n_words"]),
        "bits_per_byte": (loglikelihood, doc["n_bytes"]),
        "loglikelihood": loglikelihood,
        "tokens": doc["n_tokens"],
    }


def perplexity_of_sums(items: list[tuple[float, int]]) -> float:
    """exp(-sum of log-likelihoods / sum of units)."""
    return math.exp(-sum(total for total, _ in items) / sum(count for _, count in items))


def total(items: list[float]) -> float:
    """Plain sum."""
    return float(sum(items))


def bits_of_sums(items: list[tuple[float, int]]) -> float:
    """Mean negative log2-likelihood per unit."""
    return -sum(total for total, _ in items) / sum(count for _, count in items) / math.log(2)

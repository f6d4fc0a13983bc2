"""The perplexity tasks. A task has one row with a whole split, so that windows run over the whole token stream."""

import math
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from memdec.artefacts import artefact
from memdec.errors import ConfigError, CorpusError, RowsMissingError, one_line_errors, reason
from memdec.settings import SPLITS
from memdec.tasks import rows, task
from memdec.tasks.rows import HubRows, Rows
from memdec.text import corpora
from memdec.text.reading import shown

WIKITEXT_FOLDER = "wikitext/wikitext-103-raw-v1"  # under MEMDEC_DATA
WIKITEXT = {
    split: HubRows(
        "Salesforce/wikitext",
        None,
        split,
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        files=f"wikitext-103-raw-v1/{split}-*.parquet",  # not the training files
    )
    for split in ("test", "validation")
}


def load_corpus(**metadata: Any) -> dict[str, Rows]:
    """Load `memdec_ppl`: one row with a whole split of a corpus folder.

    The corpus is the first that is given among metadata `corpus`, MEMDEC_CORPUS, the training corpus of the memory, of
    the peft adapter, and of the base model. Metadata `split` (default test) chooses the split.
    """
    folder, why = _corpus_folder(metadata)
    split = metadata.get("split", "test")
    if split not in SPLITS:
        raise ConfigError(f"memdec_ppl: expected split train, valid or test, found {split!r}; set it with --metadata")
    manifest = artefact.read(folder, "corpus")
    words = task.tokenizer(metadata)
    rows.log.info("memdec_ppl: %s split of %s (%s)", split, folder, why)
    text = corpora.joined_split(folder, split, words.eos_token)
    return _one_row(text, words, source=f"{folder.name} {manifest.facts['sha256']} {split}")


def load_wikitext(**metadata: Any) -> dict[str, Rows]:
    """Load `memdec_wikitext`: one row with a whole split of WikiText-103 raw, whose lines are joined unchanged.

    Metadata `split` chooses test, or validation for choosing alpha. lm-eval calls either of them test.
    """
    split = metadata.get("split", "test")
    if split not in WIKITEXT:
        raise ConfigError(
            f"memdec_wikitext: expected split test or validation, found {split!r}; set it with --metadata"
        )
    file = rows.local_file(f"{WIKITEXT_FOLDER}/{split}.parquet")
    if file is not None:
        lines, source = _lines(file), str(file)
    else:
        hub = WIKITEXT[split]
        try:
            lines, source = list(rows.hub_rows(hub)["text"]), str(hub)
        except CorpusError as error:
            raise RowsMissingError(str(error), rows.folder_of(WIKITEXT_FOLDER)) from None
    rows.log.info("memdec_wikitext: %d lines of %s", len(lines), source)
    return _one_row("".join(lines), task.tokenizer(metadata), source=source)


def _lines(file: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        lines: list[str] = pq.read_table(file, columns=["text"])["text"].to_pylist()
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise CorpusError(
            f"{file}: expected a parquet file with the field 'text', found {reason(error)}; get it again"
        ) from None
    for number, line in enumerate(lines):
        if not isinstance(line, str):
            raise CorpusError(
                f"{file}, row {number}: expected 'text' of type str, found {shown(line)}; get the file again"
            )
    return lines


def _one_row(text: str, words: Any, source: str) -> dict[str, Rows]:
    from datasets import Dataset

    n_tokens = len(words.encode(text, add_special_tokens=False, verbose=False))
    row = {
        "text": text,
        "n_tokens": n_tokens,
        "n_words": len(text.split()),
        "n_bytes": len(text.encode()),
    }
    return {"test": Rows(Dataset.from_list([row]), source, task.identity(words))}


def _corpus_folder(metadata: dict[str, Any]) -> tuple[Path, str]:
    if metadata.get("corpus"):
        return Path(str(metadata["corpus"])), "metadata"
    if os.environ.get("MEMDEC_CORPUS"):
        return Path(os.environ["MEMDEC_CORPUS"]), "MEMDEC_CORPUS"
    for role in ("memory", "peft", "pretrained"):
        folder = Path(str(metadata.get(role) or "missing"))
        kind = artefact.kind_of(folder)
        if kind is not None:
            corpus = artefact.read(folder, kind).facts.get("corpus")
            if corpus:
                return Path(os.path.relpath((folder / corpus).resolve())), f"what the {role} model was trained on"
    raise CorpusError(
        'memdec_ppl: expected a corpus folder, found none; give --metadata \'{"corpus": "results/mini/corpora/NAME"}\' '
        "or set MEMDEC_CORPUS (make one with `memdec corpus`)"
    )


class WindowSum(float):
    """Total log-likelihood (nats) of a text that also knows the part of each window.

    lm-eval hands answers of type float from model to task, so this is one.

    Attributes:
        windows: For each window `log_p`, the sum of the log-probabilities of the tokens that it scored, `tokens`, their
            number, and `begins`, the place of the first one in the text (None if the tokenizer does not tell); and
            what two runs must share to be compared: `context`, `stride` and `ids`, a hash of all token ids.
    """

    windows: dict[str, Any]


@one_line_errors()
def rolling_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Metrics of one text from its total log-likelihood (nats).

    If the model tells the windows of the text (`WindowSum`), the metric `windows` holds their log-likelihoods and their
    tokens, words and bytes. `memdec compare` reads it from the samples file: one long text is then many items.

    Raises:
        ConfigError: The model scored another number of tokens than the task counted.
    """
    (loglikelihood,) = results
    found = {
        "token_perplexity": (loglikelihood, doc["n_tokens"]),
        "word_perplexity": (loglikelihood, doc["n_words"]),
        "bits_per_byte": (loglikelihood, doc["n_bytes"]),
        "loglikelihood": loglikelihood,
        "tokens": doc["n_tokens"],
    }
    told = getattr(loglikelihood, "windows", None)
    if told is None:  # a model that is not ours
        return found
    if (n_scored := sum(told["tokens"])) != doc["n_tokens"]:
        raise ConfigError(
            f"loglikelihood_rolling: expected {doc['n_tokens']} scored tokens (the task's tokenizer), found {n_scored} (the "
            "model's); give metadata={'pretrained': BASE} with the base of the evaluated model"
        )
    units = {} if told["begins"] is None else _units(doc["text"], told["begins"])
    return found | {"windows": {name: value for name, value in told.items() if name != "begins"} | units}


def _units(text: str, begins: Sequence[int]) -> dict[str, list[int]]:
    """Words and bytes of each window, from the place of its first character; a word belongs to where it begins."""
    edges = [0, *begins[1:], len(text)]
    n_words = np.diff(np.searchsorted([word.start() for word in re.finditer(r"\S+", text)], edges))
    return {"words": n_words.tolist(), "bytes": [len(text[a:b].encode()) for a, b in pairwise(edges)]}


def n_windows(items: list[dict[str, Any]]) -> int:
    """The number of windows that scored the texts."""
    return sum(len(item["tokens"]) for item in items)


def perplexity_of_sums(items: list[tuple[float, int]]) -> float:
    """Perplexity per unit (token or word): exp(-sum of log-likelihoods / sum of units).

    A text without spaces is one word; where that is more than 709 nats, its perplexity per word is infinite.
    """
    try:
        return math.exp(-sum(total for total, _ in items) / sum(count for _, count in items))
    except OverflowError:
        return math.inf


def total(items: list[float]) -> float:
    """Plain sum."""
    return float(sum(items))


def bits_of_sums(items: list[tuple[float, int]]) -> float:
    """Bits per unit: the mean negative log2-likelihood."""
    return -sum(total for total, _ in items) / sum(count for _, count in items) / math.log(2)

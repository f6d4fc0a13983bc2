"""What the YAML tasks in `harness_tasks/` call: where their rows come from, and the metrics lm-eval lacks.

Rows come from files under MEMDEC_DATA first (`<task>/<file>`), then from the Hub at a pinned revision; which one was
used is written to the log.
"""

import logging
import math
import os
from pathlib import Path
from typing import Any

from memdec import artifacts, corpora, tokens
from memdec.config import SPLITS
from memdec.errors import ConfigError, CorpusError, one_line_errors

log = logging.getLogger("lm_eval.tasks.memdec")  # the executable shows what is under lm_eval


# --- perplexity of a corpus ---------------------------------------------------------------------------------------


def load_corpus(**metadata: Any) -> dict[str, Any]:
    """Data set of `memdec_ppl`: one row with the whole split of a corpus folder.

    The corpus is, in this order: metadata `corpus`, MEMDEC_CORPUS, the corpus the memory was trained on, the corpus the
    base model was trained on. Metadata `split` (default test) chooses the split.
    """
    with one_line_errors():
        folder, why = _corpus_folder(metadata)
        split = metadata.get("split", "test")
        if split not in SPLITS:
            raise ConfigError(
                f"memdec_ppl: expected split train, valid or test, found {split!r}; set it with --metadata"
            )
        manifest = artifacts.read(folder, "corpus")
        tokenizer = _tokenizer(metadata)
        log.info("memdec_ppl: %s split of %s (%s)", split, folder, why)
        text = corpora.joined(corpora.load(folder, split), manifest.facts["separator"], tokenizer.eos_token)
        return _one_row(text, tokenizer, source=f"{folder.name} {manifest.facts['sha256']} {split}")


def load_wikitext(**metadata: Any) -> dict[str, Any]:
    """Data set of `memdec_wikitext`: WikiText-103 raw, one row with the whole test split, lines joined as they are."""
    with one_line_errors():
        tokenizer = _tokenizer(metadata)
        local = os.environ.get("MEMDEC_DATA")
        file = Path(local) / "wikitext" / "wikitext-103-raw-v1" / "test.parquet" if local else None
        if file is not None and file.is_file():
            import pyarrow.parquet as pq

            lines, source = pq.read_table(file)["text"].to_pylist(), str(file)
        else:
            rows = hub_rows("Salesforce/wikitext", "wikitext-103-raw-v1", "test", metadata.get("wikitext_revision"))
            lines, source = list(rows["text"]), "Salesforce/wikitext wikitext-103-raw-v1"
        log.info("memdec_wikitext: %d lines of %s", len(lines), source)
        return _one_row("".join(lines), tokenizer, source=source)


def _one_row(text: str, tokenizer: Any, source: str) -> dict[str, Any]:
    from datasets import Dataset

    n_tokens = len(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    row = {
        "text": text,
        "n_tokens": n_tokens,
        "n_words": len(text.split()),
        "n_bytes": len(text.encode()),
        "source": source,
    }
    return {"test": Dataset.from_list([row])}


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


def _tokenizer(metadata: dict[str, Any]) -> Any:
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not name:
        from memdec.harness import PAPER_BASE

        name = PAPER_BASE
    return tokens.load_tokenizer(str(name), metadata.get("revision"))


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


# --- rows of the other tasks --------------------------------------------------------------------------------------


def load_adaptllm(**metadata: Any) -> dict[str, Any]:
    """Finished prompts of the AdaptLLM sets: rows with input, options, gold_index."""
    from datasets import Dataset

    with one_line_errors():
        task, local = str(metadata["adaptllm_config"]), os.environ.get("MEMDEC_DATA")
        file = Path(local) / task.lower() / "adaptllm_schema.jsonl" if local else None
        if file is not None and file.is_file():
            rows, source = Dataset.from_json(str(file), keep_in_memory=True), str(file)
        else:
            path, revision = str(metadata["adaptllm_path"]), str(metadata["adaptllm_revision"])
            rows, source = hub_rows(path, task, "test", revision), f"{path} {task} at {revision}"
        log.info("%s: %d rows of %s", task, len(rows), source)
        for number, row in enumerate(rows):
            _check_choice(row, f"{source}, row {number}")
        tokenizer = _tokenizer(metadata)
        return {"test": rows.map(lambda row: _option_tokens(row, tokenizer), desc="count option tokens")}


def _check_choice(row: Any, where: str) -> None:
    for field, kind in (("input", str), ("options", list), ("gold_index", int)):
        if not isinstance(row.get(field), kind):
            raise CorpusError(
                f"{where}: expected {field!r} of type {kind.__name__}, found {row.get(field)!r}; check the file or revision"
            )
    if len(row["options"]) < 2 or not 0 <= row["gold_index"] < len(row["options"]):
        raise CorpusError(
            f"{where}: expected at least two options and a gold_index among them, found {row['options']} and {row['gold_index']}"
        )


def hub_rows(path: str, config: str, split: str, revision: str | None) -> Any:
    """Rows of a Hub data set.

    Raises:
        CorpusError: It cannot be had.
    """
    import datasets

    try:
        return datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = " ".join(str(error).split())[:160]
        raise CorpusError(
            f"{path} {config}: expected rows from the Hub, found: {reason}; put files under MEMDEC_DATA, or check the network"
        ) from None


def token_mean_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """AdaptLLM scoring: the option with the highest mean log-likelihood per token of " " + option.

    lm-eval's own acc_norm divides by characters instead; `acc_sum` does not divide at all.
    """
    sums = [float(item[0]) for item in results]
    means = [total / size for total, size in zip(sums, doc["option_tokens"], strict=True)]
    return {"acc": float(_argmax(means) == doc["gold_index"]), "acc_sum": float(_argmax(sums) == doc["gold_index"])}


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _option_tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    n_input = len(tokenizer.encode(row["input"], verbose=False))
    return {
        "option_tokens": [
            len(tokenizer.encode(f"{row['input']} {option}", verbose=False)) - n_input for option in row["options"]
        ]
    }

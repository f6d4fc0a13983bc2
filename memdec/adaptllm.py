"""The domain tasks of AdaptLLM: finished prompts, scored by the mean log-likelihood per token of each option."""

from typing import Any

from memdec import rows
from memdec.rows import HubRows, Rows


def load_choices(**metadata: Any) -> dict[str, Rows]:
    """Rows of a multiple-choice task: input, options, gold_index; `option_tokens` is added."""
    name = str(metadata["adaptllm_config"])
    hub = HubRows(str(metadata["adaptllm_path"]), name, "test", str(metadata["adaptllm_revision"]))
    found = rows.load(name, f"{name.lower()}/adaptllm_schema.jsonl", hub)
    rows.check(found, {"input": str, "options": list, "gold_index": int})
    for number, row in enumerate(found.rows):
        rows.check_label(found, number, row["gold_index"], row["options"])
    words = rows.tokenizer(metadata)
    counted = found.rows.map(lambda row: _option_tokens(row, words), desc="count option tokens")
    return {"test": Rows(counted, found.source)}


def token_mean_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """AdaptLLM scoring: the option with the highest mean log-likelihood per token of " " + option.

    lm-eval's own acc_norm divides by characters instead; `acc_sum` does not divide at all.
    """
    sums = [float(item[0]) for item in results]
    means = [total / size for total, size in zip(sums, doc["option_tokens"], strict=True)]
    return {"acc": float(_argmax(means) == doc["gold_index"]), "acc_sum": float(_argmax(sums) == doc["gold_index"])}


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _option_tokens(row: dict[str, Any], words: Any) -> dict[str, list[int]]:
    n_input = len(words.encode(row["input"], verbose=False))
    return {
        "option_tokens": [
            len(words.encode(f"{row['input']} {option}", verbose=False)) - n_input for option in row["options"]
        ]
    }

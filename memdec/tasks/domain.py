"""The domain tasks of AdaptLLM: rows with complete prompts, and options scored by mean log-likelihood per token.

Rows come from MEMDEC_DATA/<task>/adaptllm_schema.jsonl, or else from the AdaptLLM data set on the Hub, which has the
same columns. `memdec.tasks.domain_metrics` has the metrics. `harness_tasks/domain/README.md` describes the prompts, the
sources and the differences from AdaptLLM's own code.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from memdec.errors import ConfigError, CorpusError, one_line_errors
from memdec.tasks import domain_metrics, needed, rows, task
from memdec.tasks.rows import HubRows, Rows
from memdec.tasks.task import RowsTask
from memdec.text.reading import shown

HEADLINE_QUESTIONS = 9
# Without a train file, CaseHOLD takes its demonstrations from these last rows and does not score any of them. Their
# number is the same for any number of shots, so that all of these tasks score the same rows.
HELD_OUT = 16
PLACEHOLDER = "<HOLDING>"
_ROWS = 16  # rows that are tokenized at a time: the tokenizer takes 100 bytes a token, and demonstrations are long
CASEHOLD_PROMPT = "Complete the following excerpt from a US court opinion:\n"

Pair = tuple[str, str]  # context, and the continuation that is scored


# --- rows -------------------------------------------------------------------------------------------------------------


def load_choices(**metadata: Any) -> dict[str, Rows]:
    """Load a multiple-choice task: input, options, gold_index; `option_tokens` is added.

    Raises:
        CorpusError: A row is not valid; the message names file, row and field.
    """
    found = _found(metadata, {"input": str, "options": list, "gold_index": int})
    for number, row in enumerate(found.rows):
        _check_choices(found, number, row, [row["gold_index"]])
    return {"test": _counted(found, _option_pairs, metadata)}


def load_headlines(**metadata: Any) -> dict[str, Rows]:
    """Load rows as `load_choices` does, with class_id, the number of the row's question among the nine."""
    found = _found(metadata, {"input": str, "options": list, "gold_index": int, "class_id": int})
    for number, row in enumerate(found.rows):
        _check_choices(found, number, row, [row["gold_index"]])
        if not 0 <= row["class_id"] < HEADLINE_QUESTIONS:
            raise _bad(found, number, f"'class_id' from 0 to {HEADLINE_QUESTIONS - 1}", row["class_id"])
    return {"test": _counted(found, _option_pairs, metadata)}


def load_multi_gold(**metadata: Any) -> dict[str, Rows]:
    """Load rows as `load_choices` does, with a list of correct options in gold_index."""
    found = _found(metadata, {"input": str, "options": list, "gold_index": list})
    for number, row in enumerate(found.rows):
        golds = row["gold_index"]
        if not golds or not all(type(each) is int for each in golds):
            raise _bad(found, number, "'gold_index' with the numbers of one or more options", golds)
        _check_choices(found, number, row, golds)
    return {"test": _counted(found, _option_pairs, metadata)}


def load_casehold(**metadata: Any) -> dict[str, Rows]:
    """Load CaseHOLD: input_options (one prompt per option), output (common to all), gold_index; adds `option_tokens`.

    Metadata `shots` is the number of completed excerpts before each prompt. They come from
    MEMDEC_DATA/casehold/train.jsonl (context, endings, label). Without that file they come from the last rows, which
    then are not scored.
    """
    found = _found(metadata, {"input_options": list, "output": str, "gold_index": int})
    size = len(found.rows[0]["input_options"])
    for number, row in enumerate(found.rows):
        _check_texts(found, number, "input_options", row["input_options"])
        _check_texts(found, number, "output", [row["output"]])
        if len(row["input_options"]) != size:
            raise _bad(found, number, f"{size} 'input_options' as in row 0", len(row["input_options"]))
        rows.check_label(found, number, "gold_index", row["gold_index"], "input_options", size)
    shots = int(metadata.get("shots", 0))
    if shots:
        found = _with_demonstrations(found, shots)
    return {"test": _counted(found, _prompt_pairs, metadata)}


def load_entities(**metadata: Any) -> dict[str, Rows]:
    """Load NER: input, and label as `Name (type), Name (type)`."""
    found = _completions(metadata)
    for number, row in enumerate(found.rows):
        if not domain_metrics.entities(row["label"]):
            raise _bad(found, number, "'label' with entities such as `Name (type)`", row["label"])
    return {"test": found}


def load_numbers(**metadata: Any) -> dict[str, Rows]:
    """Load ConvFinQA: input, and label with a number, or yes or no, which AdaptLLM's metric always counts as wrong."""
    found = _completions(metadata)
    for number, row in enumerate(found.rows):
        if not domain_metrics.numbers(row["label"]) and row["label"].strip().lower() not in ("yes", "no"):
            raise _bad(found, number, "'label' with a number in its first line, or yes or no", row["label"])
    return {"test": found}


def _completions(metadata: dict[str, Any]) -> Rows:
    found = _found(metadata, {"input": str, "label": str})
    for number, row in enumerate(found.rows):
        _check_texts(found, number, "input", [row["input"]])
    return found


def _found(metadata: dict[str, Any], fields: dict[str, type]) -> Rows:
    """Load the data set that the metadata names and check that its rows have these fields."""
    name = str(metadata["adaptllm_config"])
    hub = HubRows(str(metadata["adaptllm_path"]), name, "test", str(metadata["adaptllm_revision"]))
    found = rows.load(name, f"{name.lower()}/adaptllm_schema.jsonl", hub)
    rows.check(found, fields)
    return found


def _check_choices(found: Rows, number: int, row: dict[str, Any], golds: Iterable[int]) -> None:
    _check_texts(found, number, "input", [row["input"]])
    _check_texts(found, number, "options", row["options"])
    for gold in golds:
        rows.check_label(found, number, "gold_index", gold, "options", len(row["options"]))


def _check_texts(found: Rows, number: int, field: str, texts: Sequence[Any]) -> None:
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise _bad(found, number, f"text in {field!r}", text)


def _bad(found: Rows, number: int, expected: str, value: Any) -> CorpusError:
    return CorpusError(f"{found.where(number)}: expected {expected}, found {shown(value)}; check the file or revision")


# --- demonstrations of CaseHOLD ---------------------------------------------------------------------------------------


def _with_demonstrations(found: Rows, shots: int) -> Rows:
    file = needed.DEMONSTRATIONS
    if rows.local_file(file) is not None:
        train = rows.load("CaseHOLD demonstrations", file)
        texts, source, scored = _completed(train, shots), train.source, found.rows
    else:
        n_scored = len(found.rows) - HELD_OUT
        if n_scored < 1:
            raise CorpusError(
                f"{found.source}: expected more than {HELD_OUT} rows, the last of which are demonstrations, found "
                f"{len(found.rows)}; give MEMDEC_DATA/{file} or more rows"
            )
        texts = [
            row["input_options"][row["gold_index"]] + row["output"]
            for row in found.rows.select(range(n_scored, n_scored + shots))
        ]
        source, scored = f"rows {n_scored} to {n_scored + shots - 1}, not scored", found.rows.select(range(n_scored))
    front = "".join(f"{text}\n\n" for text in texts)
    prompts = [[front + prompt for prompt in row["input_options"]] for row in scored]
    scored = scored.remove_columns("input_options").add_column("input_options", prompts)
    return Rows(scored, f"{found.source}, {shots} demonstrations: {source}")


def _completed(train: Rows, shots: int) -> list[str]:
    """The first `shots` prompts with exactly one placeholder, completed by the correct ending."""
    rows.check(train, {"context": str, "endings": list, "label": int})
    texts = []
    for number, row in enumerate(train.rows):
        _check_texts(train, number, "endings", row["endings"])
        rows.check_label(train, number, "label", row["label"], "endings", len(row["endings"]))
        if row["context"].count(PLACEHOLDER) == 1:
            texts.append(CASEHOLD_PROMPT + row["context"].replace(PLACEHOLDER, row["endings"][row["label"]]))
        if len(texts) == shots:
            return texts
    raise CorpusError(
        f"{train.source}: expected {shots} rows with one {PLACEHOLDER} in 'context', found {len(texts)}; check the file"
    )


# --- scoring ----------------------------------------------------------------------------------------------------------


class ChoiceTask(RowsTask):
    """lm-eval task of rows with options, one of which is predicted."""

    def build_all_requests(self, **kwargs: Any) -> None:
        """As in `RowsTask`; a chat template is refused, as options then have other tokens than those that were counted."""
        if kwargs.get("apply_chat_template"):
            with one_line_errors():
                raise ConfigError(
                    f"{self.config.task}: expected prompts as AdaptLLM has them, found a chat template; leave "
                    "--apply_chat_template out for the domain tasks with options"
                )
        super().build_all_requests(**kwargs)

    def predictions(self, samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """The options and what `acc` predicts; where rows have different options, their places ("option 1")."""
        chosen = [_predictions(sample["doc"], sample["filtered_resps"])[0] for sample in samples]
        options = [sample["doc"].get("options") or sample["doc"]["input_options"] for sample in samples]
        if all(sorted(each) == sorted(options[0]) for each in options):
            return options[0], [each[number] for each, number in zip(options, chosen, strict=True)]
        places = [f"option {number + 1}" for number in range(max(map(len, options)))]
        return places, [places[number] for number in chosen]


def token_mean_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """AdaptLLM's scoring: the prediction is the option with the highest mean log-likelihood per token.

    lm-eval's acc_norm divides by the number of characters instead. `acc_sum` uses the undivided sum.
    """
    mean, total = _predictions(doc, results)
    golds = doc["gold_index"] if isinstance(doc["gold_index"], list) else [doc["gold_index"]]
    hit = float(mean in golds)
    return {"acc": hit, "acc_sum": float(total in golds), "score": hit}


def weighted_f1_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """`token_mean_results`, and (correct, predicted) for the weighted F1."""
    pair = doc["gold_index"], _predictions(doc, results)[0]
    return token_mean_results(doc, results) | {"weighted_f1": pair, "score": pair}


def micro_macro_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """`token_mean_results`, and (correct, predicted) for micro and macro F1."""
    pair = doc["gold_index"], _predictions(doc, results)[0]
    return token_mean_results(doc, results) | {"micro_f1": pair, "macro_f1": pair, "score": pair}


def headline_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """`token_mean_results`, and (question, correct, predicted) for the F1 of Headline."""
    triple = doc["class_id"], doc["gold_index"], _predictions(doc, results)[0]
    return token_mean_results(doc, results) | {"headline_f1": triple, "score": triple}


def entity_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """F1 of the entities of one sentence."""
    f1 = domain_metrics.entity_f1(doc["label"], results[0])
    return {"entity_f1": f1, "score": f1}


def number_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Whether a number of the answer equals the label's number."""
    hit = float(domain_metrics.same_number(doc["label"], results[0]))
    return {"exact_match": hit, "score": hit}


def _predictions(doc: dict[str, Any], results: list[Any]) -> tuple[int, int]:
    """The best option by mean log-likelihood per token, and the best by summed log-likelihood."""
    sums = [float(log_p) for log_p, _ in results]
    means = [total / size for total, size in zip(sums, doc["option_tokens"], strict=True)]
    return _argmax(means), _argmax(sums)


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _option_pairs(row: dict[str, Any]) -> list[Pair]:
    return [(row["input"], f" {option}") for option in row["options"]]


def _prompt_pairs(row: dict[str, Any]) -> list[Pair]:
    return [(prompt, row["output"]) for prompt in row["input_options"]]


def _counted(found: Rows, pairs: Callable[[dict[str, Any]], list[Pair]], metadata: dict[str, Any]) -> Rows:
    """Add `option_tokens`, the number of scored tokens of each option."""
    words = task.tokenizer(metadata)
    counts = []
    bar = tqdm(total=len(found.rows), desc=f"{metadata['adaptllm_config']}: tokens of options", unit="row", delay=2)
    for first in range(0, len(found.rows), _ROWS):
        part = [pairs(row) for row in found.rows.select(range(first, min(first + _ROWS, len(found.rows))))]
        # A space at the end of the context counts as part of the option, because lm-eval scores it, too.
        texts = {text for row in part for before, after in row for text in (before.rstrip(), before + after)}
        listed = list(texts)
        n_tokens = dict(zip(listed, map(len, words(listed, verbose=False)["input_ids"]), strict=True))
        for number, row in enumerate(part, first):
            sizes = [n_tokens[before + after] - n_tokens[before.rstrip()] for before, after in row]
            if min(sizes) < 1:
                raise CorpusError(
                    f"{found.where(number)}: expected at least one token in every option, found none in option "
                    f"{sizes.index(min(sizes))} under the tokenizer {words.name_or_path}; use another or leave the row out"
                )
            counts.append(sizes)
        bar.update(len(part))
    bar.close()
    data = found.rows.remove_columns([name for name in ("option_tokens",) if name in found.rows.column_names])
    return Rows(data.add_column("option_tokens", counts), found.source, task.identity(words))

"""Nine zero-shot tasks scored by domain-conditional PMI over label words (paper, Table 2), as tasks of lm-eval.

    s(y) = sum over words w of label y of ln(P(w|x) + 1e-10) - ln(P(w|d) + 1e-10),  P = alpha P_mem + (1 - alpha) P_base

x is the filled prompt and d the domain premise, the end of the prompt without its text. One forward pass per context
serves all words, by requests of a kind of our own, `label_word_probs`, which works with any model of lm-eval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from numpy.typing import NDArray

from memdec import rows, tokens
from memdec.errors import one_line_errors
from memdec.rows import RowsTask
from memdec.verbalizers import read_verbalizer

EPSILON = 1e-10  # on probabilities, as in the released scoring code of kNN-Prompt; many words are less likely
_PAIRS = 200_000  # (context, word) pairs that lm-eval's own models get at a time: about 0.2 GB of requests

Rule = Literal["single_token", "first_token"]


@dataclass(frozen=True, slots=True)
class LabelWords:
    """The label words of a task in one tokenizer.

    `texts` are those of distinct tokens, with their space. Per label, `labels` are numbers into `texts`, one per word, so
    that a token that is the first of two words counts twice; `canonical` has one number per label.
    """

    texts: tuple[str, ...]
    labels: tuple[NDArray[np.int64], ...]
    canonical: NDArray[np.int64]


def label_words(words: Sequence[Sequence[str]], canonical: Sequence[str], rule: Rule, tokenizer: Any) -> LabelWords:
    """Tokens of the words of each label, each with one leading space.

    Args:
        words: Per label.
        canonical: One word per label; it may be in no list. Of several tokens it gives its first one.
        rule: `single_token` leaves out words of several tokens (kNN-Prompt), `first_token` takes their first one
            (knnlm-limits).
        tokenizer: Of the model that is evaluated.
    """
    numbers: dict[int, int] = {}  # token: its number

    def first(found: list[list[int]]) -> NDArray[np.int64]:
        return np.array([numbers.setdefault(ids[0], len(numbers)) for ids in found], np.int64)

    labels = []
    for each in words:
        found = tokens.behind(tokenizer, [f" {word}" for word in each])
        labels.append(first([ids for ids in found if rule == "first_token" or len(ids) == 1]))
    heads = first(tokens.behind(tokenizer, [f" {word}" for word in canonical]))
    return LabelWords(tuple(tokens.text_behind(tokenizer, token) for token in numbers), tuple(labels), heads)


def label_scores(log_p: Sequence[float], log_p_premise: Sequence[float], words: LabelWords) -> dict[str, list[float]]:
    """Scores of the labels by the rule of each accuracy: `acc`, `acc_mean`, `acc_lm`, `acc_pmi`.

    Args:
        log_p: log-probabilities (nats) of the words after the prompt, in the order of `words.texts`.
        log_p_premise: The same after the domain premise.
        words: Which of them are whose.
    """
    p, prior = (np.exp(np.asarray(values, np.float64)) for values in (log_p, log_p_premise))
    ratios = np.log(p + EPSILON) - np.log(prior + EPSILON)
    sums = [float(ratios[label].sum()) for label in words.labels]
    return {
        "acc": sums,
        "acc_mean": [total / max(1, len(label)) for total, label in zip(sums, words.labels, strict=True)],
        "acc_lm": [float(p[label].sum()) for label in words.labels],
        "acc_pmi": ratios[words.canonical].tolist(),
    }


def dcpmi_results(doc: Mapping[str, Any], results: Sequence[Sequence[float]], words: LabelWords) -> dict[str, float]:
    """Metrics of one row from the log-probabilities after its prompt and after the premise.

    `acc` is the paper's (DCPMI, sum), `acc_mean` its mean over words, `acc_lm` the sum of probabilities (Table 12),
    `acc_pmi` DCPMI of the canonical word alone. Of equal scores the first label wins.
    """
    log_p, log_p_premise = results
    found = {name: int(np.argmax(each)) for name, each in label_scores(log_p, log_p_premise, words).items()}
    metrics = {name: float(label == doc["gold"]) for name, label in found.items()}
    return metrics | {"majority_class_rate": doc["gold"], "predicted_majority_rate": found["acc"]}


def largest_share(labels: Sequence[int]) -> float:
    """Share of the most frequent label."""
    return float(np.bincount(labels).max() / len(labels))


class DcpmiTask(RowsTask):
    """Task whose rows have the prompt and its premise scored for all label words at once.

    Metadata: `labels` (names), `canonical`, `verbalizer` (name of a file) or `words`, `word_rule`, `premise`.
    The share of rows that get label L is the metric `predicted_L`.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        plain = dict(config or {})
        shares = [
            {"metric": f"predicted_{name}", "aggregation": "mean", "higher_is_better": None}
            for name in plain["metadata"]["labels"]
        ]
        super().__init__({**plain, "metric_list": [*plain["metric_list"], *shares]})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().download(dataset_kwargs, **kwargs)
        with one_line_errors():
            self._verbalizer = read_verbalizer(self.config.metadata)

    @cached_property
    def words(self) -> LabelWords:
        """The label words in the tokenizer of the model; only a run needs one."""
        metadata = self.config.metadata
        with one_line_errors():
            tokenizer = rows.tokenizer(metadata)
        words = label_words(self._verbalizer, metadata["canonical"], metadata["word_rule"], tokenizer)
        metadata["n_words"] = {name: len(label) for name, label in zip(metadata["labels"], words.labels, strict=True)}
        for name, n_words in metadata["n_words"].items():
            if not n_words:
                rows.log.warning(
                    "%s: no word of label %s is one token of this tokenizer: its score is always 0; the _kl task counts "
                    "first tokens instead",
                    self.config.task,
                    name,
                )
        return words

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Two requests: after the prompt, after the premise."""
        plain = {key: value for key, value in kwargs.items() if key not in ("apply_chat_template", "chat_template")}
        contexts = (ctx, self.config.metadata["premise"])
        return [
            Instance("label_word_probs", doc=doc, arguments=(context, self.words.texts), idx=number, **plain)
            for number, context in enumerate(contexts)
        ]

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        """Metrics of one row."""
        metrics: dict[str, float] = self.config.process_results(doc, results, self.words)
        names = enumerate(self.config.metadata["labels"])
        chosen = metrics["predicted_majority_rate"]
        return metrics | {f"predicted_{name}": float(number == chosen) for number, name in names}


def label_word_probs(lm: Any, requests: list[Instance]) -> list[list[float]]:
    """log-probability (nats) of each of the words as the next token, through `loglikelihood` of any lm-eval model.

    `hf` runs one row per context for them (`logits_cache`); equal contexts are asked once.
    """
    asked = list(dict.fromkeys(request.args for request in requests))
    step = max(1, _PAIRS // max(len(words) for _, words in asked))
    found = {}
    for first in range(0, len(asked), step):
        part = asked[first : first + step]
        pairs = [(context, word) for context, words in part for word in words]
        answers = iter(lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]))
        found.update({(context, words): [float(next(answers)[0]) for _ in words] for context, words in part})
    return [found[request.args] for request in requests]


if not hasattr(LM, "label_word_probs"):  # the name under which lm-eval looks for what answers such requests
    LM.label_word_probs = label_word_probs

"""Nine zero-shot tasks scored by domain-conditional PMI over label words (paper, Table 2), as tasks of lm-eval.

    s(y) = sum over words w of label y of ln(P(w|x) + 1e-10) - ln(P(w|d) + 1e-10),  P = alpha P_mem + (1 - alpha) P_base

x is the prompt with its text, and d is the domain premise: the end of the prompt without the text. One forward pass per
context scores all words. For this the tasks use a request type of their own, `label_word_probs`, with the arguments
(context, words, most tokens of the context). It works with any lm-eval model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from numpy.typing import NDArray

from memdec.errors import ConfigError, one_line_errors
from memdec.tasks import task
from memdec.tasks.task import RowsTask
from memdec.tasks.verbalizers import read_verbalizer
from memdec.text import tokens

EPSILON = 1e-10  # added to probabilities, as in kNN-Prompt's released code; many words are less likely than this
CONTEXT = 1024  # number of last tokens of a prompt that are read, as in that code, even if the model could read more
COLON = ":"  # the premise of knnlm-limits' plain PMI
_PAIRS = 200_000  # (context, word) pairs that lm-eval's own models get at a time: about 0.2 GB of requests

_PREMISE = "domain premise"  # field of a document that consists of a premise only

Rule = Literal["single_token", "first_token"]
Asked = tuple[str, tuple[str, ...], int]  # context, words, most tokens of the context


@dataclass(frozen=True, slots=True)
class LabelWords:
    """The label words of a task in one tokenizer.

    `texts` are the texts of distinct tokens, with their leading space. For each label, `labels` has one index into
    `texts` per word. Two label words may share a first token; it is then summed twice. `canonical` has one index per
    label.
    """

    texts: tuple[str, ...]
    labels: tuple[NDArray[np.int64], ...]
    canonical: NDArray[np.int64]


def label_words(words: Sequence[Sequence[str]], canonical: Sequence[str], rule: Rule, tokenizer: Any) -> LabelWords:
    """Find the token of each label word, with one leading space.

    Args:
        words: The words of each label.
        canonical: One word per label, which need not be in `words`. If it has several tokens, the first one counts.
        rule: For words of several tokens: `single_token` leaves them out (kNN-Prompt), `first_token` takes their first
            token (knnlm-limits).
        tokenizer: Tokenizer of the evaluated model.
    """
    numbers: dict[int, int] = {}  # index into `texts` of each token

    def first(found: list[list[int]]) -> NDArray[np.int64]:
        return np.array([numbers.setdefault(ids[0], len(numbers)) for ids in found], np.int64)

    labels = []
    for each in words:
        found = tokens.behind(tokenizer, [f" {word}" for word in each])
        labels.append(first([ids for ids in found if rule == "first_token" or len(ids) == 1]))
    heads = first(tokens.behind(tokenizer, [f" {word}" for word in canonical]))
    return LabelWords(tuple(tokens.text_behind(tokenizer, token) for token in numbers), tuple(labels), heads)


def label_scores(
    log_p: Sequence[float], log_p_premise: Sequence[float], log_p_colon: Sequence[float], words: LabelWords
) -> dict[str, list[float]]:
    """Score each label by the rule of each accuracy: `acc`, `acc_mean`, `acc_lm`, `acc_pmi`, `acc_canonical`.

    Args:
        log_p: log-probabilities (nats) of the words after the prompt, in the order of `words.texts`.
        log_p_premise: The same after the domain premise.
        log_p_colon: The same after a colon.
        words: The words that belong to each label.
    """
    p, prior, colon = (np.exp(np.asarray(values, np.float64)) for values in (log_p, log_p_premise, log_p_colon))
    ratios, pmi = (np.log(p + EPSILON) - np.log(each + EPSILON) for each in (prior, colon))
    sums = [float(ratios[label].sum()) for label in words.labels]
    return {
        "acc": sums,
        "acc_mean": [total / max(1, len(label)) for total, label in zip(sums, words.labels, strict=True)],
        "acc_lm": [float(p[label].sum()) for label in words.labels],
        "acc_pmi": [float(pmi[label].sum()) for label in words.labels],
        "acc_canonical": ratios[words.canonical].tolist(),
    }


def dcpmi_results(doc: Mapping[str, Any], results: Sequence[Sequence[float]], words: LabelWords) -> dict[str, float]:
    """Metrics of one row from the log-probabilities after its prompt, after the premise and after a colon.

    The predicted label has the highest score; the first label wins a tie. The scores are: `acc`, the paper's sum of
    DCPMI over words; `acc_mean`, the mean over words; `acc_lm`, the sum of probabilities (Table 12); `acc_pmi`, as
    `acc` with a colon in place of the premise; `acc_canonical`, the DCPMI of the canonical word.
    """
    log_p, log_p_premise, log_p_colon = results
    scores = label_scores(log_p, log_p_premise, log_p_colon, words)
    found = {name: int(np.argmax(each)) for name, each in scores.items()}
    metrics = {name: float(label == doc["gold"]) for name, label in found.items()}
    return metrics | {"majority_class_rate": doc["gold"], "predicted_majority_rate": found["acc"]}


def largest_share(labels: Sequence[int]) -> float:
    """Fraction of rows that have the most frequent label."""
    return float(np.bincount(labels).max() / len(labels))


class DcpmiTask(RowsTask):
    """lm-eval task that scores all label words at once after the prompt, after its premise, and after a colon.

    Metadata: `labels` (names), `canonical`, `verbalizer` (name of a file) or `words`, `word_rule`, `premise`, and
    `max_context` (most tokens of a prompt that are read). Metric `predicted_L` is the fraction of rows that get label
    L.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        plain = dict(config or {})
        shares = [
            {"metric": f"predicted_{name}", "aggregation": "mean", "higher_is_better": None}
            for name in plain["metadata"]["labels"]
        ]
        super().__init__({**plain, "metric_list": [*plain["metric_list"], *shares]})
        self._premises = [self.config.metadata["premise"], COLON]

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().download(dataset_kwargs, **kwargs)
        with one_line_errors():
            self._verbalizer = read_verbalizer(self.config.metadata)

    @cached_property
    def words(self) -> LabelWords:
        """The label words in the model's tokenizer; made at first use, because only a run needs a tokenizer."""
        metadata = self.config.metadata
        with one_line_errors():
            tokenizer = task.tokenizer(metadata)
            self._tokenizer = task.identity(tokenizer)
            return self._words(tokenizer)

    def _words(self, tokenizer: Any) -> LabelWords:
        metadata = self.config.metadata
        words = label_words(self._verbalizer, metadata["canonical"], metadata["word_rule"], tokenizer)
        by_label = dict(zip(metadata["labels"], words.labels, strict=True))
        metadata["n_words"] = {name: len(label) for name, label in by_label.items()}
        # The answer to a request is one number for each of these; the labels' words are places in this list.
        metadata["scored_words"] = list(words.texts)
        metadata["label_words"] = {name: label.tolist() for name, label in by_label.items()}
        none = [str(name) for name, n_words in metadata["n_words"].items() if not n_words]
        if none:
            raise ConfigError(
                f"{self.config.task}: expected words of one token for each label in the model's tokenizer, found none for "
                f"{', '.join(none)}, whose score would always be 0; use the _kl task, which counts first tokens, or another "
                "model"
            )
        return words

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> Any:
        """The prompt of a row; for a premise document, the premise."""
        return doc[_PREMISE] if _PREMISE in doc else super().doc_to_text(doc, doc_to_text)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        """The prompt of a row. A system prompt or chat template is applied to the premises as well."""
        premises = ({_PREMISE: each, "gold": 0} for each in (self.config.metadata["premise"], COLON))
        self._premises = [super(DcpmiTask, self).fewshot_context(each, 0, *args, **kwargs) for each in premises]
        return super().fewshot_context(doc, num_fewshot, *args, **kwargs)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Make three requests: for the words after the prompt, after the premise, and after a colon."""
        plain = {key: value for key, value in kwargs.items() if key not in ("apply_chat_template", "chat_template")}
        limit = int(self.config.metadata.get("max_context", CONTEXT))
        return [
            Instance("label_word_probs", doc=doc, arguments=(context, self.words.texts, limit), idx=number, **plain)
            for number, context in enumerate((ctx, *self._premises))
        ]

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        """Metrics of one row; none with --predict_only, for which lm-eval removes our function."""
        if not callable(self.config.process_results):
            return {}
        metrics: dict[str, float] = self.config.process_results(doc, results, self.words)
        names = enumerate(self.config.metadata["labels"])
        chosen = metrics["predicted_majority_rate"]
        return metrics | {f"predicted_{name}": float(number == chosen) for number, name in names}

    def predictions(self, samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """All labels, and the label of each row that `acc` predicts."""
        labels = [str(name) for name in self.config.metadata["labels"]]
        return labels, [labels[int(sample["predicted_majority_rate"])] for sample in samples]


def label_word_probs(lm: Any, requests: list[Instance]) -> list[list[float]]:
    """log-probability (nats) of each word as the next token, from the log-likelihoods of any lm-eval model.

    Equal requests are sent once, and `hf` runs one row per context for all words (`logits_cache`). If the model works
    with tokens, a context is cut on the left to the request's limit. Every model cuts it to its own maximum.
    """
    asked = list(dict.fromkeys(request.args for request in requests))
    step = max(1, _PAIRS // max(len(words) for _, words, _ in asked))
    found = {}
    for first in range(0, len(asked), step):
        part = asked[first : first + step]
        answers = iter(_log_p_tokens(lm, part) if isinstance(lm, TemplateLM) else _log_p_texts(lm, part))
        found.update({each: [float(next(answers)[0]) for _ in each[1]] for each in part})
    return [found[request.args] for request in requests]


def _log_p_texts(lm: Any, asked: Sequence[Asked]) -> Any:
    pairs = [(context, word) for context, words, _ in asked for word in words]
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])


def _log_p_tokens(lm: TemplateLM, asked: Sequence[Asked]) -> Any:
    """Score words as the model's own `loglikelihood` does, with three differences.

    The context is cut. A space at its end (from a chat template) is part of the context and not of the word. The tokens
    of a word are computed once.
    """
    tokens_of: dict[str, list[int]] = {}
    pairs = []
    for context, words, limit in asked:
        read = lm.tok_encode(context)
        for word in words:
            if word not in tokens_of:
                tokens_of[word] = lm.tok_encode(context + word)[len(read) :]
            pairs.append(((context, word), read[-limit:], tokens_of[word]))
    return lm._loglikelihood_tokens(pairs)


if not hasattr(LM, "label_word_probs"):  # lm-eval calls the method with the name of the request type
    LM.label_word_probs = label_word_probs

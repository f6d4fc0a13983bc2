"""Nine zero-shot tasks scored by domain-conditional PMI over label words (paper, Table 2), as tasks of lm-eval.

    s(y) = sum over words w of label y of ln(P(w|x) + 1e-10) - ln(P(w|d) + 1e-10),  P = alpha P_mem + (1 - alpha) P_base

x is the filled prompt and d the domain premise, the end of the prompt without its text. One forward pass per context
serves all words, by requests of a kind of our own, `label_word_probs`: (context, words, most tokens of the context), which
works with any model of lm-eval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from numpy.typing import NDArray

from memdec.errors import one_line_errors
from memdec.tasks import rows, task
from memdec.tasks.task import RowsTask
from memdec.tasks.verbalizers import read_verbalizer
from memdec.text import tokens

EPSILON = 1e-10  # on probabilities, as in the released scoring code of kNN-Prompt; many words are less likely
CONTEXT = 1024  # last tokens of a prompt that are read, as in that code, whatever the model holds
COLON = ":"  # the premise of knnlm-limits' plain PMI
_PAIRS = 200_000  # (context, word) pairs that lm-eval's own models get at a time: about 0.2 GB of requests

_PREMISE = "domain premise"  # field of a document that is nothing else

Rule = Literal["single_token", "first_token"]
Asked = tuple[str, tuple[str, ...], int]  # context, words, most tokens of the context


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


def label_scores(
    log_p: Sequence[float], log_p_premise: Sequence[float], log_p_colon: Sequence[float], words: LabelWords
) -> dict[str, list[float]]:
    """Scores of the labels by the rule of each accuracy: `acc`, `acc_mean`, `acc_lm`, `acc_pmi`, `acc_canonical`.

    Args:
        log_p: log-probabilities (nats) of the words after the prompt, in the order of `words.texts`.
        log_p_premise: The same after the domain premise.
        log_p_colon: The same after a colon.
        words: Which of them are whose.
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

    `acc` is the paper's (DCPMI, sum), `acc_mean` its mean over words, `acc_lm` the sum of probabilities (Table 12),
    `acc_pmi` as `acc` against a colon, `acc_canonical` DCPMI of the canonical word alone. Of equal scores the first label
    wins.
    """
    log_p, log_p_premise, log_p_colon = results
    scores = label_scores(log_p, log_p_premise, log_p_colon, words)
    found = {name: int(np.argmax(each)) for name, each in scores.items()}
    metrics = {name: float(label == doc["gold"]) for name, label in found.items()}
    return metrics | {"majority_class_rate": doc["gold"], "predicted_majority_rate": found["acc"]}


def largest_share(labels: Sequence[int]) -> float:
    """Share of the most frequent label."""
    return float(np.bincount(labels).max() / len(labels))


class DcpmiTask(RowsTask):
    """Task whose rows have the prompt, its premise and a colon scored for all label words at once.

    Metadata: `labels` (names), `canonical`, `verbalizer` (name of a file) or `words`, `word_rule`, `premise`;
    `max_context`: most tokens of a prompt that are read. The share of rows that get label L is the metric `predicted_L`.
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
        """The label words in the tokenizer of the model; only a run needs one."""
        metadata = self.config.metadata
        with one_line_errors():
            tokenizer = task.tokenizer(metadata)
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

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> Any:
        """The prompt of a row, or the premise itself."""
        return doc[_PREMISE] if _PREMISE in doc else super().doc_to_text(doc, doc_to_text)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        """The prompt; a system prompt or chat template is put around the premises as well."""
        premises = ({_PREMISE: each, "gold": 0} for each in (self.config.metadata["premise"], COLON))
        self._premises = [super(DcpmiTask, self).fewshot_context(each, 0, *args, **kwargs) for each in premises]
        return super().fewshot_context(doc, num_fewshot, *args, **kwargs)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Three requests: after the prompt, after the premise, after a colon."""
        plain = {key: value for key, value in kwargs.items() if key not in ("apply_chat_template", "chat_template")}
        limit = int(self.config.metadata.get("max_context", CONTEXT))
        return [
            Instance("label_word_probs", doc=doc, arguments=(context, self.words.texts, limit), idx=number, **plain)
            for number, context in enumerate((ctx, *self._premises))
        ]

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        """Metrics of one row; none with --predict_only, for which lm-eval takes our function away."""
        if not callable(self.config.process_results):
            return {}
        metrics: dict[str, float] = self.config.process_results(doc, results, self.words)
        names = enumerate(self.config.metadata["labels"])
        chosen = metrics["predicted_majority_rate"]
        return metrics | {f"predicted_{name}": float(number == chosen) for number, name in names}


def label_word_probs(lm: Any, requests: list[Instance]) -> list[list[float]]:
    """log-probability (nats) of each of the words as the next token, through the log-likelihoods of any lm-eval model.

    `hf` runs one row per context for them (`logits_cache`); equal contexts are asked once. Where a model has tokens, a
    context is cut on the left to the limit of the request; any model cuts it to what it holds.
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
    """As the model's own `loglikelihood`, but that a context is cut, that space at its end (of a chat template) is read and
    not scored, and that a word's tokens are made once."""
    tokens_of: dict[str, list[int]] = {}
    pairs = []
    for context, words, limit in asked:
        read = lm.tok_encode(context)
        for word in words:
            if word not in tokens_of:
                tokens_of[word] = lm.tok_encode(context + word)[len(read) :]
            pairs.append(((context, word), read[-limit:], tokens_of[word]))
    return lm._loglikelihood_tokens(pairs)


if not hasattr(LM, "label_word_probs"):  # the name under which lm-eval looks for what answers such requests
    LM.label_word_probs = label_word_probs

"""NQ and HotpotQA without passages: prompt, exact match and token F1 (Geng et al. 2024; SQuAD, arXiv 1606.05250).

Prompt and scores are those of Geng et al.'s released code, unless `harness_tasks/qa/README.md` names another source.
"""

import re
import string
from collections import Counter
from typing import Any

import datasets

from memdec.errors import CorpusError
from memdec.tasks import rows
from memdec.tasks.rows import HubRows, Rows
from memdec.text.reading import shown

FIELDS = ("question", "answer")
NQ = HubRows(
    "google-research-datasets/nq_open",
    None,
    "validation",
    "5dd9790a83002ad084ddeb7c420dc716852c6f28",
    files="nq_open/validation-*.parquet",
    columns=FIELDS,
)
HOTPOTQA = HubRows(
    "hotpotqa/hotpot_qa",
    None,
    "validation",
    "1908d6afbbead072334abe2965f91bd2709910ab",
    files="distractor/validation-*.parquet",
    columns=FIELDS,
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FLAGS = ("yes", "no", "noanswer")


def load_nq(**_: Any) -> dict[str, Rows]:
    """Load `memdec_nq`: question and answers; rows with an answer ")" are left out."""
    found = rows.load("memdec_nq", "nq/validation.jsonl", NQ)
    rows.check(found, {"question": str, "answer": list})
    return _checked(found, [row["answer"] for row in found.rows], drop=")")


def load_hotpotqa(**_: Any) -> dict[str, Rows]:
    """Load `memdec_hotpotqa`: question and its one answer; passages are not used."""
    found = rows.load("memdec_hotpotqa", "hotpotqa/validation.jsonl", HOTPOTQA)
    rows.check(found, {"question": str, "answer": str})
    return _checked(found, [[row["answer"]] for row in found.rows])


def _checked(found: Rows, answers: list[list[str]], drop: str | None = None) -> dict[str, Rows]:
    kept = []
    for number, (row, listed) in enumerate(zip(found.rows, answers, strict=True)):
        if not row["question"].strip():
            raise CorpusError(
                f"{found.where(number)}: expected a 'question', found {shown(row['question'])}; check the file"
            )
        if not listed or not all(isinstance(answer, str) and answer.strip() for answer in listed):
            raise CorpusError(
                f"{found.where(number)}: expected texts in 'answer', found {shown(listed)}; check the file"
            )
        if drop not in listed:
            kept.append({"question": row["question"], "answers": list(dict.fromkeys(listed))})
    if not kept:
        raise CorpusError(
            f"{found.source}: expected rows, found only rows with the answer {drop!r}; get the file again"
        )
    return {"validation": Rows(datasets.Dataset.from_list(kept), found.source)}


def prompt(doc: dict[str, Any]) -> str:
    """The prompt of a question: its first letter becomes lower case, and a missing question mark is added.

    Spaces stay as they are.
    """
    question = doc["question"] if doc["question"].endswith("?") else f"{doc['question']}?"
    return f"Answer these questions:\nQuestion: {question[0].lower()}{question[1:]}\nAnswer:"


def qa_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Best exact match and best F1 over the answers, of the generated text up to its first line end."""
    (text,) = results
    answer = text.split("\n")[0]
    return {
        "exact_match": max(exact_match(answer, truth) for truth in doc["answers"]),
        "f1": max(f1(answer, truth) for truth in doc["answers"]),
    }


def normalised(text: str) -> str:
    """Lower-case a text and remove ASCII punctuation, articles and extra spaces (as SQuAD does)."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(prediction: str, truth: str) -> float:
    """1 if both texts are equal after normalisation, else 0."""
    return float(normalised(prediction) == normalised(truth))


def f1(prediction: str, truth: str) -> float:
    """F1 (harmonic mean of precision and recall) of the normalised words; a repeated word counts each time.

    For the answers yes, no and noanswer it is 1 if the prediction contains the answer (even within a word), else 0.
    """
    found, wanted = normalised(prediction), normalised(truth)
    if wanted in _FLAGS:
        return float(wanted in found)
    n_found, n_wanted = len(found.split()), len(wanted.split())
    n_same = (Counter(found.split()) & Counter(wanted.split())).total()
    return 2 * n_same / (n_found + n_wanted) if n_same else 0.0

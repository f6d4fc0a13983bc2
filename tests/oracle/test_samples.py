"""The values of `memdec harness`, computed again from lm-eval's samples files by plain Python.

It reads JSON and nothing else: no NumPy, no scikit-learn, no code of ours. The formulas are written anew from the paper
and from `harness_tasks`. A folder of a real run can be checked in the same way:

    MEMDEC_RUN=results/.../harness/SUITE/MEMORY/MODEL pytest tests/oracle/test_samples.py
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import TASKS, write_task_rows

Row = dict[str, Any]


@pytest.fixture(scope="module")
def run_folder(base_folder: Path, small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of a tiny base with its memory, or those of the run that MEMDEC_RUN names."""
    if "MEMDEC_RUN" in os.environ:
        return Path(os.environ["MEMDEC_RUN"])
    from memdec.results import harness
    from memdec.settings import Suite

    home = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMDEC_DATA", str(write_task_rows(home / "rows")))
        suite = Suite(tasks=TASKS, alpha=0.4)
        harness.run(str(base_folder), suite, home / "run", seed=0, memory=str(small_folder))
    return home / "run"


def numbers(texts: list[Any]) -> list[float]:
    """Answers as numbers: lm-eval writes them as texts."""
    return [float(text) for text in texts]


def best(scores: list[float]) -> int:
    return scores.index(max(scores))


# --- DCPMI ----------------------------------------------------------------------------------------------------------


def dcpmi(rows: list[Row], metadata: dict[str, Any], lm: bool) -> float:
    """Accuracy of the label with the largest sum of ln p(word | x) - ln p(word | premise), or of p(word | x)."""
    premise = numbers(rows[0]["resps"][1][0])
    right = 0
    for row in rows:
        log_p = numbers(row["resps"][0][0])
        assert len(log_p) == len(premise) == len(metadata["scored_words"])
        scores = []
        for label in metadata["labels"]:
            words = metadata["label_words"][label]
            if lm:
                scores.append(sum(math.exp(log_p[word]) for word in words))
            else:
                ratios = [(math.exp(log_p[w]) + 1e-10) / (math.exp(premise[w]) + 1e-10) for w in words]
                scores.append(sum(math.log(ratio) for ratio in ratios))
        right += best(scores) == row["doc"]["gold"]
    return right / len(rows)


# --- options --------------------------------------------------------------------------------------------------------


def predicted(row: Row) -> int:
    """The option with the highest log-likelihood per token."""
    sums = [float(answer[0][0]) for answer in row["resps"]]
    return best([total / n for total, n in zip(sums, row["doc"]["option_tokens"], strict=True)])


def accuracy(rows: list[Row]) -> float:
    def is_right(row: Row) -> bool:
        gold = row["doc"]["gold_index"]
        return predicted(row) in (gold if isinstance(gold, list) else [gold])

    return sum(map(is_right, rows)) / len(rows)


def f1_of(label: int, pairs: list[tuple[int, int]]) -> float:
    hits = sum(gold == guess == label for gold, guess in pairs)
    n_gold, n_guess = sum(gold == label for gold, _ in pairs), sum(guess == label for _, guess in pairs)
    if not hits:
        return 0.0
    precision, recall = hits / n_guess, hits / n_gold
    return 2 * precision * recall / (precision + recall)


def pairs_of(rows: list[Row]) -> list[tuple[int, int]]:
    return [(row["doc"]["gold_index"], predicted(row)) for row in rows]


def micro(rows: list[Row]) -> float:
    pairs = pairs_of(rows)
    return sum(gold == guess for gold, guess in pairs) / len(pairs)


def macro(rows: list[Row]) -> float:
    pairs = pairs_of(rows)
    labels = {label for pair in pairs for label in pair}
    return sum(f1_of(label, pairs) for label in labels) / len(labels)


def weighted(rows: list[Row]) -> float:
    pairs = pairs_of(rows)
    golds = [gold for gold, _ in pairs]
    return sum(golds.count(label) * f1_of(label, pairs) for label in set(golds)) / len(golds)


def by_question(rows: list[Row]) -> float:
    questions = {row["doc"]["class_id"] for row in rows}
    found = [weighted([row for row in rows if row["doc"]["class_id"] == each]) for each in questions]
    return sum(found) / len(found)


# --- free answers ---------------------------------------------------------------------------------------------------


def plain_words(text: str) -> list[str]:
    kept = "".join(each for each in text.lower() if each not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def exact_match(rows: list[Row]) -> float:
    def is_right(row: Row) -> bool:
        answer = plain_words(row["resps"][0][0].split("\n")[0])
        return any(answer == plain_words(truth) for truth in row["doc"]["answers"])

    return sum(map(is_right, rows)) / len(rows)


def token_f1(rows: list[Row]) -> float:
    def one(answer: list[str], truth: list[str]) -> float:
        if truth in (["yes"], ["no"], ["noanswer"]):
            return float(truth[0] in " ".join(answer))
        same = sum(min(answer.count(word), truth.count(word)) for word in set(truth))
        return 2 * same / (len(answer) + len(truth)) if same else 0.0

    total = 0.0
    for row in rows:
        answer = plain_words(row["resps"][0][0].split("\n")[0])
        total += max(one(answer, plain_words(truth)) for truth in row["doc"]["answers"])
    return total / len(rows)


CHOICES: dict[str, Callable[[list[Row]], float]] = {
    "acc": accuracy, "micro_f1": micro, "macro_f1": macro, "weighted_f1": weighted, "headline_f1": by_question,
    "exact_match": exact_match, "f1": token_f1,
}  # fmt: skip
OTHERS = ("memdec_ner", "memdec_convfinqa")  # their answers are entities and numbers


def test_every_value_is_that_of_the_samples(run_folder: Path) -> None:
    (file,) = run_folder.glob("results_*.json")
    results = json.loads(file.read_text())
    records = json.loads((run_folder / "records.json").read_text())
    checked = set()
    for task, reported in results["results"].items():
        samples = file.with_name(f"samples_{task}_{file.stem.partition('_')[2]}.jsonl")
        with samples.open(encoding="utf-8") as lines:  # `splitlines` would cut at line ends inside the texts
            rows = [json.loads(line) for line in lines]
        metadata = results["configs"][task]["metadata"]
        for record in (each for each in records if each["task"] == task):
            metric = record["metric"]
            if task.startswith("dcpmi_"):
                found = dcpmi(rows, metadata, metric == "acc_lm") if metric in ("acc", "acc_lm") else None
            else:
                found = CHOICES[metric](rows) if metric in CHOICES and task not in OTHERS else None
            if found is None:
                continue
            assert record["value"] == pytest.approx(found, abs=1e-6), (task, metric)
            assert reported[f"{metric},none"] == pytest.approx(found, abs=1e-6), (task, metric)
            assert record["low"] <= record["high"]
            assert record["n"] == len(rows)
            checked.add((task, metric))
    wanted = {("dcpmi_cb_kl", "acc"), ("dcpmi_cb_kl", "acc_lm"), ("memdec_scotus", "macro_f1"), ("memdec_nq", "f1"),
              ("memdec_headline", "headline_f1"), ("memdec_fpb", "weighted_f1"), ("memdec_casehold", "micro_f1")}  # fmt: skip
    assert len(checked) >= 3
    assert wanted <= checked or "MEMDEC_RUN" in os.environ

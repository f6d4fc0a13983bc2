"""The values of `memdec harness`, computed again from lm-eval's samples files by plain Python.

The formulas read JSON and nothing else: no NumPy, no scikit-learn, no code of ours. They are written anew from the paper and
from `harness_tasks`. A folder of a real run can be checked in the same way:

    MEMDEC_RUN=results/.../harness/SUITE/MEMORY/MODEL pytest tests/oracle/test_samples.py
"""

import json
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import TASKS, write_task_rows

from memdec.tasks import domain_metrics

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


# --- entities and numbers -------------------------------------------------------------------------------------------


def named(text: str) -> list[tuple[str, str]]:
    """(name, type) of every `name (type)`, each once: one word before the bracket, no space within."""
    pieces = re.split(r"(\s+)", text)  # word, gap, word, gap, ..., word
    found = []
    for at in range(0, len(pieces) - 2, 2):
        word, gap, after = pieces[at : at + 3]
        if word and after.startswith("(") and ")" in after[2:]:
            end = after.rindex(")")
            pair = (word + gap[:-1], after[1:end])
            pieces[at + 2] = after[end + 1 :]  # what stands behind the bracket may be the next name
            if pair not in found:
                found.append(pair)
    return found


def sentence_f1(label: str, answer: str) -> float:
    """A point each for name and type; each entity of the label takes the first of the answer that shares either."""
    right, given = named(label), named(answer)
    points = 0
    for name, kind in right:
        for other, its in given:
            if name == other or kind == its:
                points += (name == other) + (kind == its)
                break
    if not points:
        return 0.0
    precision, recall = points / (2 * len(given)), points / (2 * len(right))
    return 2 * precision * recall / (precision + recall)


def entity_f1(rows: list[Row]) -> float:
    return sum(sentence_f1(row["doc"]["label"], row["resps"][0][0]) for row in rows) / len(rows)


def amounts(text: str) -> list[float]:
    """The numbers in the first line; "%" is a hundredth, and what is no number in Python is infinite."""
    found = []
    pattern = r"([-+]?)(\.?\d+(?:,\d{3})*\.?\d*(?:[eE][-+]?\d+)?)(%*)"  # harness_tasks/domain/README.md
    for sign, digits, percent in re.findall(pattern, text.split("\n")[0]):
        plain = digits.replace(",", "")
        is_octal = plain.isdecimal() and plain.startswith("0") and plain.strip("0") != ""
        try:
            value = math.inf if is_octal else float(sign + plain)
        except ValueError:
            value = math.inf
        found.append(value / 100 ** len(percent))
    return found


def is_amount(label: str, answer: str) -> bool:
    wanted = amounts(label)
    if not wanted:
        return False
    first = wanted[0]
    return any(
        given == first
        or (math.isfinite(given - first) and abs(given - first) <= max(0.01, 1e-9 * max(abs(given), abs(first))))
        for given in amounts(answer)
    )


def amount_found(rows: list[Row]) -> float:
    return sum(is_amount(row["doc"]["label"], row["resps"][0][0]) for row in rows) / len(rows)


def test_formulas_agree_on_texts_that_no_small_model_writes() -> None:
    draw = random.Random(0)
    pieces = ["Ann", "Bo  ", " ", " (person)", " (location),", ",", "(", ")", " (a)b)", "\t(x) ", "()"]
    digits = ["0", "7", "12", "007", ",345", ".5", ".", "-", "+", "e3", "E-2", "%", "%%", " ", " and ", "\n"]
    f1s, hits = set(), set()
    for _ in range(20_000):
        label, answer = ("".join(draw.choices(pieces, k=draw.randrange(1, 9))) for _ in range(2))
        f1 = sentence_f1(label, answer)
        assert f1 == pytest.approx(domain_metrics.entity_f1(label, answer), abs=1e-12), (label, answer)
        label, answer = ("".join(draw.choices(digits, k=draw.randrange(1, 7))) for _ in range(2))
        hit = is_amount(label, answer)
        assert hit == domain_metrics.same_number(label, answer), (label, answer)
        f1s.add(f1)
        hits.add(hit)
    assert len(f1s) > 5
    assert hits == {True, False}


CHOICES: dict[str, Callable[[list[Row]], float]] = {
    "acc": accuracy, "micro_f1": micro, "macro_f1": macro, "weighted_f1": weighted, "headline_f1": by_question,
    "exact_match": exact_match, "f1": token_f1, "entity_f1": entity_f1,
}  # fmt: skip
OF_TASK = {("memdec_convfinqa", "exact_match"): amount_found}


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
                formula = OF_TASK.get((task, metric), CHOICES.get(metric))
                found = None if formula is None else formula(rows)
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

"""Metrics of AdaptLLM's domain tasks, equal to those of its released code (LMOps/adaptllm) including its oddities."""

import ast
import math
import re
from collections.abc import Sequence

from sklearn.metrics import f1_score

_ENTITY = re.compile(r"([^\s]+[\s]+)(\([^\s]+\))")
_NUMBER = re.compile(r"[-+]?[.]?[\d]+(?:,\d\d\d)*[\.]?\d*(?:[eE][-+]?\d+)?[%]*")


def weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Mean F1 of the labels, weighted by how often each is the correct one, from (correct, predicted)."""
    return _f1(pairs, "weighted")


def micro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Micro F1 from (correct, predicted); with one label per row it equals the accuracy."""
    return _f1(pairs, "micro")


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Unweighted mean F1 of the labels that are correct or predicted in some row, from (correct, predicted)."""
    return _f1(pairs, "macro")


def micro_macro_mean(pairs: Sequence[tuple[int, int]]) -> float:
    """Mean of micro and macro F1, of which the paper prints both."""
    return (micro_f1(pairs) + macro_f1(pairs)) / 2


def headline_f1(items: Sequence[tuple[int, int, int]]) -> float:
    """Unweighted mean of the questions' weighted F1, from (question, correct, predicted).

    The full data set has rows for all nine questions. With fewer rows, only the questions that have rows count.
    """
    questions = sorted({question for question, _, _ in items})
    return sum(weighted_f1([(g, p) for q, g, p in items if q == each]) for each in questions) / len(questions)


def _f1(pairs: Sequence[tuple[int, int]], average: str) -> float:
    right, predicted = zip(*pairs, strict=True)
    return float(f1_score(right, predicted, average=average, zero_division=0.0))


def entities(text: str) -> list[tuple[str, str]]:
    """(name, type) of each `Name (type)`, without repeats; a name keeps only its last word."""
    # One space is cut off the name. If two spaces precede the bracket, one remains.
    found = [(name[:-1], kind[1:-1]) for name, kind in _ENTITY.findall(text)]
    return list(dict.fromkeys(found))


def entity_f1(label: str, answer: str) -> float:
    """F1 of the entities of one sentence, from 0 to 1; name and type count one point each.

    Each entity of the label gets its points from the first entity of the answer with the same name or the same type (as
    in package nereval if all entities start at position 0). An entity of the answer may match several times: one
    correct type in the answer counts for all entities of that type in the label.
    """
    right, given = entities(label), entities(answer)
    points = 0
    for name, kind in right:
        matches = ((name == other) + (kind == its) for other, its in given)
        points += next((match for match in matches if match), 0)
    # Precision is points / (2 len(given)) and recall is points / (2 len(right)), so F1 is this.
    return points / (len(right) + len(given)) if points else 0.0


def numbers(text: str) -> list[float]:
    """The numbers in the first line of a text; "%" divides by 100, and commas between thousands are dropped.

    A number that is not valid in Python (007) or too large becomes infinity, so it equals any other such number.
    """
    return [_number(each) for each in _NUMBER.findall(text.split("\n")[0].strip())]


def _number(text: str) -> float:
    digits = text.rstrip("%")
    try:
        value = float(ast.literal_eval(digits.replace(",", "")))
    except (SyntaxError, ValueError, OverflowError):
        return math.inf
    for _ in text[len(digits) :]:
        value /= 100
    return value


def same_number(label: str, answer: str) -> bool:
    """Whether any number of the answer is within 0.01 (or 1e-9 of the larger one) of the label's first number."""
    right = numbers(label)[:1]
    return any(math.isclose(given, first, abs_tol=1e-2) for first in right for given in numbers(answer))

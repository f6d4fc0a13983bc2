"""Metrics of AdaptLLM's domain tasks, as in its released code (LMOps/adaptllm), with what is odd in them."""

import ast
import math
import re
from collections.abc import Sequence

from sklearn.metrics import f1_score

_ENTITY = re.compile(r"([^\s]+[\s]+)(\([^\s]+\))")
_NUMBER = re.compile(r"[-+]?[.]?[\d]+(?:,\d\d\d)*[\.]?\d*(?:[eE][-+]?\d+)?[%]*")


def weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of each label, weighted by how often it is right, from (right, predicted)."""
    return _f1(pairs, "weighted")


def micro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Micro F1 from (right, predicted); with one label per row it is the accuracy."""
    return _f1(pairs, "micro")


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Plain mean of the F1 of each label that is right or predicted somewhere, from (right, predicted)."""
    return _f1(pairs, "macro")


def micro_macro_mean(pairs: Sequence[tuple[int, int]]) -> float:
    """Mean of micro and macro F1: the paper prints both."""
    return (micro_f1(pairs) + macro_f1(pairs)) / 2


def headline_f1(items: Sequence[tuple[int, int, int]]) -> float:
    """Plain mean over the questions of their weighted F1, from (question, right, predicted).

    All nine questions have rows in the whole set; with fewer rows, the mean is over those that have.
    """
    questions = sorted({question for question, _, _ in items})
    return sum(weighted_f1([(g, p) for q, g, p in items if q == each]) for each in questions) / len(questions)


def _f1(pairs: Sequence[tuple[int, int]], average: str) -> float:
    right, predicted = zip(*pairs, strict=True)
    return float(f1_score(right, predicted, average=average, zero_division=0.0))


def entities(text: str) -> list[tuple[str, str]]:
    """(name, type) of each `Name (type)`, without repeats; only the last word of a name is kept."""
    # One space is cut from the name: where two stand before the bracket, one stays.
    found = [(name[:-1], kind[1:-1]) for name, kind in _ENTITY.findall(text)]
    return list(dict.fromkeys(found))


def entity_f1(label: str, answer: str) -> float:
    """F1 of the entities of one sentence, 0 to 1; name and type count one point each.

    Each entity of the label takes its points from the first one of the answer with the same name or the same type (as
    package nereval does where all entities start at 0). That one may serve again: one right type in the answer counts
    for all entities of that type in the label.
    """
    right, given = entities(label), entities(answer)
    points = 0
    for name, kind in right:
        matches = ((name == other) + (kind == its) for other, its in given)
        points += next((match for match in matches if match), 0)
    # With precision points / 2 given and recall points / 2 right, F1 is this.
    return points / (len(right) + len(given)) if points else 0.0


def numbers(text: str) -> list[float]:
    """Numbers of the first line; "%" divides by 100, thousands' commas are dropped.

    One that is no Python number (007) or too large is infinite, and so equal to any other such number.
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
    """Whether any number of the answer is within 0.01 (or 1e-9 of the larger) of the first of the label."""
    right = numbers(label)[:1]
    return any(math.isclose(given, first, abs_tol=1e-2) for first in right for given in numbers(answer))

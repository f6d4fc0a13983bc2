"""Write the task rows of the reduced run: python tests/regression/rows.py FOLDER, which is then its MEMDEC_DATA.

They are made up, so that the run needs no download, and their answers mean nothing. What counts is that a fault in a
task's scoring gives other predictions:

- `rte`: whether a hypothesis follows. Without the premise, the more frequent of the label words wins nearly always.
- `usmle`: what a parameter is, with two answers in words and two in code. Code has few letters per token. A mean per
  letter instead of per token prefers the words.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

N = 200
NAMES = [
    "alpha", "coef", "degree", "eps", "fit_intercept", "gamma", "kernel", "max_iter", "metric", "n_jobs", "p",
    "radius", "random_state", "tol", "weights",
]  # fmt: skip
NOUNS = [
    "array", "class", "cluster", "column", "component", "distance", "estimator", "feature", "kernel", "label",
    "matrix", "model", "sample", "score", "tree",
]  # fmt: skip
VERBS = [
    "computed", "estimated", "fitted", "given", "ignored", "normalized", "passed", "predicted", "returned", "scaled",
    "selected", "used",
]  # fmt: skip
TYPES = [
    "array", "bool", "callable", "dict", "float", "int", "list", "ndarray", "str", "tuple",
]  # fmt: skip


def phrase(draw: random.Random) -> str:
    one, other, verb = draw.choice(NOUNS), draw.choice(NOUNS), draw.choice(VERBS)
    return draw.choice(
        [f"the number of {one}s in the {other}", f"whether the {one} is {verb}", f"the {one} of each {other}, {verb}"]
    )


def code(draw: random.Random) -> str:
    name, kind, number = draw.choice(NAMES), draw.choice(TYPES), draw.randrange(10)
    return draw.choice([f"{kind}, default={number}", f"{kind} of shape (n_{name[0]}, {number})", f"{name}=1e-{number}"])


def pairs(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of `rte`."""
    for _ in range(N):
        text, hypothesis = f"{phrase(draw)}. {phrase(draw)} ({code(draw)}).", phrase(draw)
        yield {"premise": text, "hypothesis": hypothesis, "label": draw.choices([0, 1], [7, 3])[0]}


def questions(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of `usmle`; the correct answer is one of the two in code."""
    for _ in range(N):
        right = code(draw)
        options = [right, code(draw), phrase(draw), phrase(draw)]
        draw.shuffle(options)
        yield {"input": f"{draw.choice(NAMES)} :", "options": options, "gold_index": options.index(right)}


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1])
    for path, rows in (("rte/test", pairs), ("usmle/adaptllm_schema", questions)):
        file = folder / f"{path}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows(random.Random(0)))
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:  # Snakemake looks at its time
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

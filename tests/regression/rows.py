"""Write the task rows of the reduced run: python tests/regression/rows.py FOLDER, which is then its MEMDEC_DATA.

They are made up, so that the run needs no download, and their answers mean nothing. What counts is that a fault in a
task's scoring gives other predictions:

- `agn`: news categories. Label "world" has one word in a small vocabulary and others have four. A sum over words without
  the premise is always the highest for "world".
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
NAMES = "alpha coef degree eps fit_intercept gamma kernel max_iter metric n_jobs p radius random_state tol weights".split()
NOUNS = "array class cluster column component distance estimator feature kernel label matrix model sample score tree".split()
VERBS = "computed estimated fitted given ignored normalized passed predicted returned scaled selected used".split()
TYPES = "array bool callable dict float int list ndarray str tuple".split()


def phrase(draw: random.Random) -> str:
    one, other, verb = draw.choice(NOUNS), draw.choice(NOUNS), draw.choice(VERBS)
    return draw.choice(
        [f"the number of {one}s in the {other}", f"whether the {one} is {verb}", f"the {one} of each {other}, {verb}"]
    )


def code(draw: random.Random) -> str:
    name, kind, number = draw.choice(NAMES), draw.choice(TYPES), draw.randrange(10)
    return draw.choice([f"{kind}, default={number}", f"{kind} of shape (n_{name[0]}, {number})", f"{name}=1e-{number}"])


def news(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of `agn`; a tenth is of "world", the others are even."""
    for _ in range(N):
        title, text = phrase(draw), f"{phrase(draw)}. {phrase(draw)} ({code(draw)})."
        yield {"Title": title, "Description": text, "Class Index": draw.choices([1, 2, 3, 4], [1, 3, 3, 3])[0]}


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
    for path, rows in (("agn/test", news), ("usmle/adaptllm_schema", questions)):
        file = folder / f"{path}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(random.Random(0))), encoding="utf-8")


if __name__ == "__main__":
    main()

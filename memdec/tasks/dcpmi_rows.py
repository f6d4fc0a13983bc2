"""Rows of the nine zero-shot tasks: their text and label fields, and their sources."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.errors import ConfigError, CorpusError
from memdec.tasks import rows
from memdec.tasks.rows import HubRows, Rows
from memdec.text.reading import shown

YAHOO_TEST = 60_000  # rows of the whole test split; the published scores use 3,000 of them
_YAHOO_DRAW = "f7d4fc6f5876ed4f381ab8d16595e9f8b7a60482ccd74e00b63579938560a017"


@dataclass(frozen=True, slots=True)
class RowSet:
    """How to read the rows of one task.

    Args:
        texts: Fields of the prompt.
        label: Field of the label.
        values: Label index of each value of the label field; rows with index None are left out.
        hub: Source on the Hub of each split, used if there is no local file.
        adapt: Converts a row of the Hub to these fields.
    """

    texts: tuple[str, ...]
    label: str
    values: Mapping[int | str, int | None]
    hub: Mapping[str, HubRows] = field(default_factory=dict)
    adapt: Callable[[Any], dict[str, Any]] | None = None


def _super_glue(name: str) -> dict[str, HubRows]:
    """Splits of a SuperGLUE task: its validation split is our test, and its train split is for choosing alpha.

    The labels of its own test split are not published.
    """
    commit = "3de24cf8022e94f4ee4b9d55a6f539891524d646"
    splits = {"test": "validation", "validation": "train"}
    return {ours: HubRows("aps/super_glue", name, theirs, commit) for ours, theirs in splits.items()}


_ROTTEN = "cornell-movie-review-data/rotten_tomatoes", "aa13bc287fa6fcab6daf52f0dfb9994269ffea28"
# No commit with these files is known, so the newest one is read. The results state which commit that was.
_YAHOO = "community-datasets/yahoo_answers_topics", None, "test", rows.NEWEST
_TWO: Mapping[int | str, int | None] = {0: 0, 1: 1}
_PAIR = ("premise", "hypothesis")

SETS = {
    "sst2": RowSet(("text",), "label", {1: 0, 2: 0, 3: None, 4: 1, 5: 1}),
    "mr": RowSet(("text",), "label", _TWO),
    "cr": RowSet(("text",), "label", _TWO),
    "rt": RowSet(
        ("input",),
        "output",
        {"negative": 0, "positive": 1},
        {split: HubRows(_ROTTEN[0], None, split, _ROTTEN[1]) for split in ("test", "validation")},
        lambda row: {"input": row["text"], "output": ("negative", "positive")[row["label"]]},
    ),
    "hyp": RowSet(("text",), "label", _TWO),
    "cb": RowSet(
        _PAIR, "label", {"entailment": 0, "contradiction": 1, "neutral": 2, 0: 0, 1: 1, 2: 2}, _super_glue("cb")
    ),
    "rte": RowSet(_PAIR, "label", {"entailment": 0, "not_entailment": 1, 0: 0, 1: 1}, _super_glue("rte")),
    "agn": RowSet(("Title", "Description"), "Class Index", {1: 0, 2: 1, 3: 2, 4: 3}),
    "yahoo": RowSet(
        ("question_title", "question_content", "best_answer"),
        "topic",
        {i: i for i in range(10)},
        {"test": HubRows(*_YAHOO, files="yahoo_answers_topics/test-*.parquet")},
    ),
}


def load_rows(**metadata: Any) -> dict[str, Rows]:
    """Load the rows of the task that metadata `set` names, with their label index as `gold`.

    Metadata `split` chooses test, or validation for choosing alpha. lm-eval calls either of them test.

    Raises:
        ConfigError: The split is neither test nor validation.
        CorpusError: There are no rows, or a row has no text, no label or an unknown label.
    """
    name, split = str(metadata["set"]), metadata.get("split", "test")
    if split not in ("test", "validation"):
        raise ConfigError(f"{name}: expected split test or validation, found {split!r}; set it with --metadata")
    kind = SETS[name]
    found = rows.load(name, f"{name}/{split}.jsonl", kind.hub.get(split), adapt=kind.adapt)
    if name == "yahoo" and len(found.rows) == YAHOO_TEST:
        found = Rows(found.rows.select(yahoo_draw()), f"{found.source}, 3000 rows drawn")
    rows.check(found, dict.fromkeys(kind.texts, str) | {kind.label: (int, str)})
    labelled = _with_gold(found, kind)
    expected = metadata["paper_rows"]
    if split == "test" and len(labelled.rows) != expected:
        rows.log.warning("%s: %d rows, the published accuracy is of %d", name, len(labelled.rows), expected)
    return {"test": labelled}


def _with_gold(found: Rows, kind: RowSet) -> Rows:
    """Add the label index `gold` to the rows; a `gold` that a row already has must be the same."""
    gold: list[int] = []
    kept = []
    for number, row in enumerate(found.rows):
        value = row[kind.label]
        if value not in kind.values:
            raise CorpusError(
                f"{found.where(number)}: expected {kind.label!r} to be one of {list(kind.values)}, found {shown(value)}; check "
                "the file"
            )
        label = kind.values[value]
        if label is None:
            continue
        if row.get("gold") not in (None, label):
            raise CorpusError(
                f"{found.where(number)}: expected gold {label} for {kind.label!r} {value!r}, found {shown(row['gold'])}; check "
                "the file"
            )
        kept.append(number)
        gold.append(label)
    if not kept:
        raise CorpusError(f"{found.source}: expected rows with a label that is used, found none; get the file again")
    data = found.rows.select(kept)
    data = data.remove_columns("gold") if "gold" in data.column_names else data
    return Rows(data.add_column("gold", gold), found.source)


def yahoo_draw() -> NDArray[np.int64]:
    """Numbers of the 3,000 Yahoo rows that knnlm-limits samples, in its order.

    Raises:
        ConfigError: NumPy's legacy random generator gives other numbers on this machine.
    """
    drawn = np.random.RandomState(42).choice(YAHOO_TEST, 3000, replace=False)
    found = hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
    if found != _YAHOO_DRAW:
        raise ConfigError(
            f"yahoo: expected the draw {_YAHOO_DRAW[:16]} of NumPy's legacy generator, found {found[:16]}; use a NumPy "
            "release that draws as 1.x and 2.x do"
        )
    return np.asarray(drawn, np.int64)

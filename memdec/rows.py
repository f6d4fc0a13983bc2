"""Rows of the tasks: files under MEMDEC_DATA, else the Hub at a pinned revision; and the lm-eval task that tells which.

Layout of MEMDEC_DATA: `<task>/<split>.jsonl`, one object per line; `<task>/adaptllm_schema.jsonl` for finished prompts.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from memdec import tokens
from memdec.errors import CorpusError, one_line_errors

log = logging.getLogger("lm_eval.tasks.memdec")  # the executable shows what is under lm_eval


@dataclass(frozen=True, slots=True)
class HubRows:
    """Rows on the Hub: data set, config, split and commit."""

    path: str
    config: str | None
    split: str
    revision: str

    def __str__(self) -> str:
        return f"{self.path} {self.config or ''} {self.split} at {self.revision}".replace("  ", " ")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one split and where they are from."""

    rows: datasets.Dataset
    source: str

    def where(self, number: int) -> str:
        """A row in words, for errors."""
        return f"{self.source}, row {number}"

    def facts(self) -> dict[str, Any]:
        """What the results say of them."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        return {"source": self.source, "n": len(self.rows), "sha256": digest.hexdigest()[:32]}


def local_file(name: str) -> Path | None:
    """The file of this name under MEMDEC_DATA, if it is there."""
    folder = os.environ.get("MEMDEC_DATA")
    file = Path(folder) / name if folder else None
    return file if file is not None and file.is_file() else None


def load(task: str, file: str, hub: HubRows | None = None, *, adapt: Callable[[Any], Any] | None = None) -> Rows:
    """Rows from MEMDEC_DATA/`file`, else from the Hub.

    Args:
        task: For messages.
        file: JSON lines, relative to MEMDEC_DATA.
        hub: Where they are else; None: only the file will do.
        adapt: Gives a row of the Hub the columns that the file has (`Dataset.map`); columns that it leaves stay.

    Raises:
        CorpusError: Neither is there, the file is no JSON lines, or there are no rows.
    """
    path = local_file(file)
    if path is not None:
        rows = Rows(_read(path), str(path))
    elif hub is not None:
        found = hub_rows(hub)
        rows = Rows(found.map(adapt, desc=task) if adapt is not None else found, str(hub))
    else:
        raise CorpusError(
            f"{task}: expected rows in MEMDEC_DATA/{file}, found no such file; set MEMDEC_DATA to a folder that has it "
            "(harness_tasks/README.md says where it comes from)"
        )
    if not len(rows.rows):
        raise CorpusError(f"{task}: expected rows in {rows.source}, found none; get the file again")
    log.info("%s: %d rows of %s", task, len(rows.rows), rows.source)
    return rows


def _read(path: Path) -> datasets.Dataset:
    rows = []
    with path.open(encoding="utf-8") as file:  # `splitlines` would also part a text at U+0085 or U+2028
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(
                    f"{path}, row {number}: expected a JSON object, found {error}; get the file again"
                ) from None
            if not isinstance(row, dict):
                raise CorpusError(f"{path}, row {number}: expected a JSON object, found {row!r}; get the file again")
            rows.append(row)
    try:
        return datasets.Dataset.from_list(rows)
    except (TypeError, ValueError) as error:
        raise CorpusError(f"{path}: expected one type per field in all rows, found: {error}; check the file") from None


def hub_rows(hub: HubRows) -> datasets.Dataset:
    """Rows of a Hub data set.

    Raises:
        CorpusError: They cannot be had.
    """
    try:
        return datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = " ".join(str(error).split())[:160]
        raise CorpusError(
            f"{hub}: expected rows from the Hub, found: {reason}; put files under MEMDEC_DATA, or check the network"
        ) from None


def tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of the model that is evaluated: tasks see `--model_args` and `--metadata`."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not name:
        from memdec.harness import PAPER_BASE

        name = PAPER_BASE
    return tokens.load_tokenizer(str(name), metadata.get("revision"))


def check(rows: Rows, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """Every row has these fields, of these types.

    Raises:
        CorpusError: Names file, row and field.
    """
    for number, row in enumerate(rows.rows):
        for field, kind in fields.items():
            if not isinstance(row.get(field), kind) or (kind is int and isinstance(row[field], bool)):
                names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
                raise CorpusError(
                    f"{rows.where(number)}: expected {field!r} of type {names}, found {row.get(field)!r}; check the file "
                    "or revision"
                )


def check_label(rows: Rows, number: int, label: int, options: Sequence[str]) -> None:
    """A label is the number of one of at least two options.

    Raises:
        CorpusError: Names file and row.
    """
    if len(options) < 2 or not 0 <= label < len(options):
        raise CorpusError(
            f"{rows.where(number)}: expected at least two options and the label among them, found {list(options)} and {label}"
        )


class RowsTask(ConfigurableTask):
    """Task of lm-eval whose `custom_dataset` gives `Rows` by split; sources and counts stand in the results' config."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        with one_line_errors():
            metadata = self.config.metadata
            rows: dict[str, Rows] = self.config.custom_dataset(**metadata)
        self.dataset = {split: each.rows for split, each in rows.items()}
        metadata["rows"] = {split: each.facts() for split, each in rows.items()}

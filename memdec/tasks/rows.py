"""Rows of the tasks: files under MEMDEC_DATA, else the Hub at a pinned revision; and the lm-eval task that tells which.

Layout of MEMDEC_DATA: `<task>/<split>.jsonl`, one object per line; `<task>/adaptllm_schema.jsonl` for finished prompts.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub import HfApi

from memdec.errors import CorpusError, outside

log = logging.getLogger("lm_eval.tasks.memdec")  # the executable shows what is under lm_eval

NEWEST = "main"  # revision of a data set of which no commit is known


@dataclass(frozen=True, slots=True)
class HubRows:
    """Rows on the Hub: data set, config, split and commit, or its first digits, or `main`: the newest one."""

    path: str
    config: str | None
    split: str
    revision: str
    files: str | None = None  # pattern of the split's files; only these are downloaded
    columns: tuple[str, ...] | None = None  # of parquet files; others are not read

    @property
    def name(self) -> str:
        """Data set, config or files, split."""
        return " ".join(part for part in (self.path, self.config or self.files, self.split) if part)

    def __str__(self) -> str:
        return f"{self.name} at {self.revision}"


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
        try:
            hub = pinned(hub)
            found = hub_rows(hub)
        except CorpusError as error:
            raise CorpusError(
                f"{task}: expected rows in MEMDEC_DATA/{file} or on the Hub, found neither; {error}"
            ) from None
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
    listed = read_lines(path)
    first: dict[str, tuple[int, Any]] = {}  # of each field: the first row with a value, that value
    for number, row in enumerate(listed):
        for field, value in row.items():
            if value is None:
                continue
            row_of, known = first.setdefault(field, (number, value))
            kinds = {type(known), type(value)}
            if kinds == {list}:
                kinds = {type(each) for each in (*known, *value)}
            if len(kinds) > 1:
                raise CorpusError(
                    f"{path}, row {number}: expected {field!r} of one type in all rows, found {value!r} here and {known!r} in row "
                    f"{row_of}; check the file"
                )
    try:
        return datasets.Dataset.from_list(listed)
    except pa.ArrowException as error:
        raise CorpusError(f"{path}: expected rows that make a table, found: {' '.join(str(error).split())}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file.

    Raises:
        CorpusError: Names the file and the row that is none.
    """
    try:
        # Not splitlines: JSON leaves other separators in texts.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: expected UTF-8 text, found {error}; check the file") from None
    while lines and not lines[-1].strip():  # at the end only: rows are counted
        lines.pop()
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            shown = f"{line[:40]!r} ({error})" if line.strip() else "an empty line"
            raise CorpusError(
                f"{path}, row {number}: expected a JSON object on one line, found {shown}; check the file"
            ) from None
        if not isinstance(row, dict):
            raise CorpusError(
                f"{path}, row {number}: expected a JSON object on one line, found {line[:40]!r}; check the file"
            )
        rows.append(row)
    return rows


def pinned(hub: HubRows) -> HubRows:
    """The same rows by their whole commit, which the Hub asks for.

    Raises:
        CorpusError: The commit cannot be had.
    """
    if len(hub.revision) == 40 or Path(hub.path).is_dir():
        return hub
    with _reached(hub):
        commits = [each.commit_id for each in HfApi().list_repo_commits(hub.path, repo_type="dataset")]
    found = commits[:1] if hub.revision == NEWEST else [each for each in commits if each.startswith(hub.revision)]
    if len(found) != 1:
        raise CorpusError(
            f"{hub}: expected one commit that begins so, found {len(found)} of {len(commits)}; put "
            "the files under MEMDEC_DATA"
        )
    return replace(hub, revision=found[0])


def hub_rows(hub: HubRows) -> datasets.Dataset:
    """Rows of a Hub data set.

    Raises:
        CorpusError: They cannot be had.
    """
    with _reached(hub):
        options: dict[str, Any] = {"data_files": {hub.split: hub.files}} if hub.files is not None else {}
        if hub.columns is not None:
            options["columns"] = list(hub.columns)
        return datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision, **options)


def _reached(hub: HubRows) -> AbstractContextManager[None]:
    instead = "check the network, or set MEMDEC_DATA to a folder that `memdec data fetch` filled elsewhere"
    return outside(CorpusError, hub, "rows from the Hub", instead)


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


def check_label(rows: Rows, number: int, field: str, label: int, options: str, n_options: int) -> None:
    """A label is the number of one of at least two options; `field` and `options` are the names of both in the row.

    Raises:
        CorpusError: Names file, row and field.
    """
    if n_options < 2:
        wanted, found = f"at least two {options!r}", n_options
    elif not 0 <= label < n_options:
        wanted, found = f"{field!r} from 0 to {n_options - 1} (the number of one of {options!r})", label
    else:
        return
    raise CorpusError(f"{rows.where(number)}: expected {wanted}, found {found}; check the file or revision")

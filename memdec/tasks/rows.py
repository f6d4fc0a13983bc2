"""Loading the rows of the tasks: from files under MEMDEC_DATA, or else from the Hub at a pinned revision.

MEMDEC_DATA has `<task>/<split>.jsonl` with one object per line, and `<task>/adaptllm_schema.jsonl` for AdaptLLM's
tasks.
"""

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub import HfApi, constants

from memdec.artefacts import artefact, sources
from memdec.errors import CorpusError, RowsMissingError, outside, reason
from memdec.text import reading
from memdec.text.reading import shown

log = logging.getLogger("lm_eval.tasks.memdec")  # the lm_eval executable shows the messages of loggers under lm_eval

SOURCES = "sources.json"  # in a folder that `memdec data fetch` filled
NEWEST = "main"  # revision of a data set for which no commit is known


@dataclass(frozen=True, slots=True)
class HubRows:
    """Rows on the Hub: data set, config, split and revision (a commit, its first digits, or `main` for the newest)."""

    path: str
    config: str | None
    split: str
    revision: str
    files: str | None = None  # pattern of the split's files; only these are downloaded
    columns: tuple[str, ...] | None = None  # columns to read of parquet files; None: all

    @property
    def name(self) -> str:
        """Data set, config or files, split."""
        return " ".join(part for part in (self.path, self.config or self.files, self.split) if part)

    def __str__(self) -> str:
        return f"{self.name} at {self.revision}"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one split and their source; and the identity of the tokenizer that counted tokens for them, if one did."""

    rows: datasets.Dataset
    source: str
    tokenizer: str | None = None

    def where(self, number: int) -> str:
        """Source and number of a row, for error messages."""
        return f"{self.source}, row {number}"

    def facts(self) -> dict[str, Any]:
        """Source, number and hash of the rows, which the results state."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        return {"source": self.source, "n": len(self.rows), "sha256": digest.hexdigest()[:32]}


def local_file(name: str) -> Path | None:
    """The file of this name under MEMDEC_DATA, or None if there is none.

    Raises:
        CorpusError: `memdec data fetch` wrote it, and it has changed since.
    """
    folder = os.environ.get("MEMDEC_DATA")
    file = Path(folder) / name if folder else None
    if file is None or not file.is_file():
        return None
    stated = fetched(Path(folder or "")).get(name, {}).get("sha256")
    if stated is not None and (found := artefact.sha256(file)) != stated:
        raise CorpusError(
            f"{file}: expected the file that was fetched (sha256 {str(stated)[:16]}), found another ({found[:16]}); run `memdec "
            f"data fetch` again, or take the file out of {SOURCES} if it is yours"
        )
    return file


def fetched(folder: Path) -> dict[str, dict[str, Any]]:
    """What `memdec data fetch` wrote into a folder: an entry (origin, revision, rows, sha256) for each file.

    Raises:
        CorpusError: The list of entries is damaged.
    """
    path = folder / SOURCES
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values()):
            return entries
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        pass
    raise CorpusError(
        f"{path}: expected a JSON object with an entry per file, found another; delete it and fetch again"
    )


def load(task: str, file: str, hub: HubRows | None = None, *, adapt: Callable[[Any], Any] | None = None) -> Rows:
    """Load rows from MEMDEC_DATA/`file`, or else from the Hub.

    Args:
        task: Name of the task, for messages.
        file: JSON lines file, relative to MEMDEC_DATA.
        hub: Source on the Hub if there is no file; None if only the file is possible.
        adapt: Converts a row of the Hub to the columns of the file (`Dataset.map`); other columns stay.

    Raises:
        RowsMissingError: Both are missing.
        CorpusError: The file is not in JSON lines format, or there are no rows.
    """
    path = local_file(file)
    if path is not None:
        rows = Rows(_read(path), str(path))
    elif hub is not None:
        try:
            hub = pinned(hub)
            found = hub_rows(hub)
        except CorpusError as error:
            raise RowsMissingError(
                f"{task}: expected rows in MEMDEC_DATA/{file} or on the Hub, found neither; {error}", folder_of(file)
            ) from None
        rows = Rows(found.map(adapt, desc=task) if adapt is not None else found, str(hub))
    else:
        raise RowsMissingError(
            f"{task}: expected rows in MEMDEC_DATA/{file}, found no such file; set MEMDEC_DATA to a folder that has it "
            "(harness_tasks/README.md says where it comes from)",
            folder_of(file),
        )
    if not len(rows.rows):
        raise CorpusError(f"{task}: expected rows in {rows.source}, found none; get the file again")
    log.info("%s: %d rows of %s", task, len(rows.rows), rows.source)
    return rows


def spread(n_rows: int, limit: int | None) -> list[int]:
    """Numbers of at most `limit` rows, from all over a file: one of each of `limit` equal stretches, drawn by a fixed seed.

    Many files are sorted by label. Their first rows have one label, and the accuracy on them says nothing.
    """
    if limit is None or limit >= n_rows:
        return list(range(n_rows))
    draw = random.Random(0)  # its method `random` gives the same numbers in every version of Python
    starts = [number * n_rows // limit for number in range(limit + 1)]
    return [start + int(draw.random() * (end - start)) for start, end in pairwise(starts)]


def samples(tasks: Mapping[str, Any], limit: int | None) -> dict[str, list[int]] | None:
    """The rows of each task for the argument `samples` of lm-eval; None: all, of which it looks up no number."""
    return None if limit is None else {name: spread(len(task.eval_docs), limit) for name, task in tasks.items()}


def folder_of(file: str) -> str:
    """The first folder of a file under MEMDEC_DATA, which is its name in `memdec data fetch --task`."""
    return file.partition("/")[0]


@contextmanager
def without_hub() -> Iterator[None]:
    """Use only what the Hub's cache has, as HF_HUB_OFFLINE=1 does.

    Where the Hub cannot be reached, its clients try for 23 seconds, for every data set again.
    """
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _read(path: Path) -> datasets.Dataset:
    listed = read_lines(path)
    first: dict[str, tuple[int, Any]] = {}  # for each field: number of the first row with a value, and that value
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
                    f"{path}, row {number}: expected {shown(field)} of one type in all rows, found {shown(value)} here and "
                    f"{shown(known)} in row {row_of}; check the file"
                )
    if listed:  # the columns are the fields of the first row
        listed[0] = dict.fromkeys(field for row in listed for field in row) | listed[0]
    try:
        return datasets.Dataset.from_list(listed)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise CorpusError(f"{path}: expected rows that make a table, found: {reason(error)}; check the file") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON lines file.

    Raises:
        CorpusError: The file cannot be read, or a line is not a JSON object; the message names the file and the row.
    """
    rows: list[dict[str, Any]] = []
    for number, row in reading.json_lines(text_of(path), path):
        if number > len(rows):  # empty lines are allowed at the end only, so that row numbers stay right
            raise CorpusError(
                f"{path}, row {len(rows)}: expected a JSON object on one line, found an empty line; check the file"
            )
        if not isinstance(row, dict):
            raise CorpusError(
                f"{path}, row {number}: expected a JSON object on one line, found {shown(row, 40)}; check the file"
            )
        rows.append(row)
    return rows


def text_of(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        CorpusError: The file cannot be read or is not UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: expected a file that can be read, found {reason(error)}; check the file") from None
    return reading.decoded(data, path)


def pinned(hub: HubRows) -> HubRows:
    """Replace the revision by the full commit hash, which the Hub requires.

    Raises:
        CorpusError: The Hub cannot be reached, or no single commit begins with the revision.
    """
    if len(hub.revision) == 40 or Path(hub.path).is_dir():
        return hub
    with _reached(hub):
        commits = [each.commit_id for each in HfApi().list_repo_commits(hub.path, repo_type="dataset")]
    found = commits[:1] if hub.revision == NEWEST else [each for each in commits if each.startswith(hub.revision)]
    if len(found) != 1:
        raise CorpusError(
            f"{hub}: expected one commit that begins with this revision, found {len(found)} of {len(commits)}; put "
            "the files under MEMDEC_DATA"
        )
    return replace(hub, revision=found[0])


def hub_rows(hub: HubRows) -> datasets.Dataset:
    """Download the rows of a Hub data set.

    Raises:
        CorpusError: The rows cannot be downloaded.
    """
    with _reached(hub):
        options: dict[str, Any] = {"data_files": {hub.split: hub.files}} if hub.files is not None else {}
        if hub.columns is not None:
            options["columns"] = list(hub.columns)
        found = datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision, **options)
    if not Path(hub.path).is_dir():
        files = [Path(file["filename"]) for file in found.cache_files]
        sources.check_commit(hub, hub.revision, files, "set MEMDEC_DATA to a folder that has them")
    return found


def _reached(hub: HubRows) -> AbstractContextManager[None]:
    instead = "check the network, or set MEMDEC_DATA to a folder that `memdec data fetch` filled elsewhere"
    return outside(CorpusError, hub, "rows from the Hub", instead)


def check(rows: Rows, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check that every row has these fields with these types.

    Raises:
        CorpusError: A field is missing or has another type; the message names file, row and field.
    """
    for number, row in enumerate(rows.rows):
        for field, kind in fields.items():
            if not isinstance(row.get(field), kind) or isinstance(row[field], bool):  # a bool is an int in Python
                names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
                raise CorpusError(
                    f"{rows.where(number)}: expected {field!r} of type {names}, found {shown(row.get(field))}; check the file "
                    "or revision"
                )


def check_label(rows: Rows, number: int, field: str, label: int, options: str, n_options: int) -> None:
    """Check that a label is the number of one of at least two options.

    `field` and `options` are the names of the two fields in the row.

    Raises:
        CorpusError: The label is out of range; the message names file, row and field.
    """
    if n_options < 2:
        wanted, found = f"at least two {options!r}", n_options
    elif not 0 <= label < n_options:
        wanted, found = f"{field!r} from 0 to {n_options - 1} (the number of one of {options!r})", label
    else:
        return
    raise CorpusError(f"{rows.where(number)}: expected {wanted}, found {found}; check the file or revision")

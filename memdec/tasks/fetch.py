"""`memdec data`: download the files that the tasks read from the Hub and GitHub, and verify the files of a folder.

`tasks.files.FILES` is the list of all files. A folder made by `fetch` is a MEMDEC_DATA folder with `sources.json`,
which states the origin, commit, number of rows and sha256 of each file. A file is written atomically, after its entry.
"""

import hashlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from memdec.artefacts import artefact, sources
from memdec.errors import CorpusError
from memdec.tasks import github, rows, verbalizers
from memdec.tasks.dcpmi_rows import SETS
from memdec.tasks.files import FILES, DataFile
from memdec.tasks.github import GitHubFile
from memdec.tasks.rows import SOURCES


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of checking one file.

    Attributes:
        file: The file as it should be.
        rows: Number of rows found; None if they cannot be read.
        status: "ok", "missing" or the fault.
        commit: The commit it was fetched from; None for a file that the user put there.
    """

    file: DataFile
    rows: int | None
    status: str
    commit: str | None = None


def chosen(tasks: Sequence[str]) -> list[DataFile]:
    """The files of these tasks; if none is named, all files.

    Raises:
        CorpusError: There is no such task.
    """
    known = sorted({each.task for each in FILES})
    for task in tasks:
        if task not in known:
            raise CorpusError(f"--task: expected one of {', '.join(known)}, found {task!r}")
    return [each for each in FILES if not tasks or each.task in tasks]


def to_fetch(tasks: Sequence[str] = ()) -> list[DataFile]:
    """The files of these tasks that `fetch` can download.

    Raises:
        CorpusError: There is no such task, or the user has to provide all of its files.
    """
    files = [each for each in chosen(tasks) if each.origin is not None]
    for task in tasks:
        if task not in {each.task for each in files}:
            raise CorpusError(
                f"{task}: expected a task whose rows the Hub or GitHub has, found one whose files are put "
                "there by hand; see harness_tasks/README.md"
            )
    return files


def origins_line(files: Sequence[DataFile]) -> str:
    """One line with the data sets and repositories of the files, each with its tasks."""
    tasks: dict[str, list[str]] = {}
    for each in files:
        if each.task not in tasks.setdefault(each.publisher, []):
            tasks[each.publisher].append(each.task)
    listed = "; ".join(f"{name}: {', '.join(each)}" for name, each in tasks.items())
    return f"data of third parties, under the licences of their origins (harness_tasks/README.md). {listed}"


def fetch(out: Path, tasks: Sequence[str] = ()) -> list[Checked]:
    """Download the files that the Hub and GitHub have; files of the folder that are correct stay as they are.

    Args:
        out: Folder in the layout of MEMDEC_DATA.
        tasks: Only these tasks.

    Returns:
        The state of each file afterwards.

    Raises:
        CorpusError: A named task cannot be downloaded, an origin cannot be reached or has other rows than expected, or
            the folder has a wrong file that `fetch` did not write.
    """
    found = []
    for file in tqdm(to_fetch(tasks), desc="fetch", unit="file"):
        now = _check(out, file, rows.fetched(out))
        if now.status != "ok":
            if (out / file.file).exists() and file.file not in rows.fetched(out):
                raise CorpusError(
                    f"{out / file.file}: expected a correct file or one from an earlier fetch, found another ({now.status}); move "
                    "it, or choose another --out"
                )
            _fetch(out, file)
            now = _check(out, file, rows.fetched(out))
        found.append(now)
    return found


def _fetch(out: Path, file: DataFile) -> None:
    found: Any
    if isinstance(file.origin, GitHubFile):
        origin: Any = file.origin
        found = github.github_rows(origin)
        entry = {"origin": f"github.com/{origin.repository}", "path": origin.path, "revision": origin.revision}
    else:
        assert file.origin is not None
        origin = rows.pinned(file.origin)
        found = rows.hub_rows(origin)
        entry = {"origin": origin.name, "revision": origin.revision}
    listed = list(found)
    fault = _row_fault(file, listed) or _set_fault(file, listed)
    if fault is not None:
        raise CorpusError(f"{origin}: expected the rows of {file.file}, found: {fault}; put the file there by hand")
    if file.file.endswith(".parquet"):
        buffer = io.BytesIO()
        found.to_parquet(buffer)
        data = buffer.getvalue()
    elif file.file.endswith(".json"):
        data = (json.dumps({"labels": found}, ensure_ascii=False, indent=1) + "\n").encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode()
    known = {"rows": len(found), "sha256": hashlib.sha256(data).hexdigest()}
    lock = sources.cache() / "locks" / f"{artefact.digest(str(out.resolve()))}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # another process may write its entry
        artefact.write_json(out / SOURCES, dict(sorted({**rows.fetched(out), file.file: entry | known}.items())))
        artefact.write_bytes(out / file.file, data)


def content(file: DataFile, found: Sequence[dict[str, Any]]) -> str:
    """sha256 over the fields that the task reads, in the order of the rows.

    These are the texts and the label's index, or the words of each label. Other fields and other spellings of the same
    label make no difference.

    Raises:
        CorpusError: The task does not know a label, or a `gold` is not the label's index.
    """
    if file.task == "verbalizers":
        return verbalizers.fingerprint({each["name"]: each["words"] for each in found})
    digest = hashlib.sha256()
    for number, row in enumerate(found):
        kept = {name: row[name] for name in file.columns}
        if (kind := SETS.get(file.task)) is not None:
            label = kept.pop(kind.label)
            kept["gold"] = kind.values.get(label)
            if kept["gold"] is None or row.get("gold") not in (None, kept["gold"]):
                raise CorpusError(f"row {number}: {kind.label!r} {label!r}, gold {row.get('gold')!r}")
        digest.update((json.dumps(kept, sort_keys=True, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()


def verify(folder: Path, tasks: Sequence[str] = ()) -> list[Checked]:
    """Check the files of a folder.

    Raises:
        CorpusError: There is no such folder or task, or its `sources.json` is damaged.
    """
    if not folder.is_dir():
        raise CorpusError(
            f"{folder}: expected a folder in the layout of MEMDEC_DATA, found none; run `memdec data fetch`"
        )
    entries = rows.fetched(folder)
    return [_check(folder, each, entries) for each in chosen(tasks)]


def wrong(found: Sequence[Checked], all_needed: bool) -> bool:
    """Whether a file has a fault, or is missing although all are needed."""
    return any(each.status != "ok" and (all_needed or each.status != "missing") for each in found)


def shown(found: Sequence[Checked]) -> str:
    """A table with one line per file: task, file, rows, expected rows, origin, status."""
    import pandas as pd

    lines = [
        {
            "task": each.file.task,
            "file": each.file.file,
            "rows": "-" if each.rows is None else str(each.rows),
            "expected": "any" if each.file.rows is None else str(each.file.rows),
            "origin": _shown_origin(each),
            "status": _shown_status(each),
        }
        for each in found
    ]
    return pd.DataFrame(lines).to_string(index=False)


def _shown_status(found: Checked) -> str:
    """The status; an "ok" without a known hash says what was checked instead."""
    if found.status != "ok" or found.file.sha256 is not None:
        return found.status
    return "ok, by fields" if found.file.rows is None else "ok, by number"


def _shown_origin(found: Checked) -> str:
    if found.commit is None:
        return "-" if found.status == "missing" else "own file"
    return f"{'GitHub' if isinstance(found.file.origin, GitHubFile) else 'Hub'} {found.commit[:7]}"


def _check(folder: Path, file: DataFile, entries: dict[str, dict[str, Any]]) -> Checked:
    path = folder / file.file
    if not path.is_file():
        return Checked(file, None, "missing")
    try:
        found = _rows(path)
    except (CorpusError, pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).removeprefix(str(path)).lstrip(",: ")
        return Checked(file, None, f"not whole: {' '.join(reason.split())[:80]}")
    entry = entries.get(file.file)
    commit = str(entry["revision"]) if entry is not None and "revision" in entry else None
    return Checked(file, len(found), _fault(path, file, found, entry) or "ok", commit)


def _fault(path: Path, file: DataFile, found: list[dict[str, Any]], entry: dict[str, Any] | None) -> str | None:
    fault = _row_fault(file, found)
    if fault is None and entry is not None:
        if entry.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
            return f"not what {SOURCES} says"
        pin = None if file.origin is None or file.origin.revision == rows.NEWEST else file.origin.revision
        if pin is not None and not str(entry.get("revision")).startswith(pin):
            return f"of another commit than {pin}"
    return fault or _set_fault(file, found)


def _row_fault(file: DataFile, found: Sequence[dict[str, Any]]) -> str | None:
    for number, row in enumerate(found):
        for column in file.columns:
            if row.get(column) is None:
                return f"row {number}: no {column!r}"
    return None


def _set_fault(file: DataFile, found: Sequence[dict[str, Any]]) -> str | None:
    if not found or file.rows not in (None, len(found)):
        return "other number of rows"
    if file.sha256 is None:
        return None
    if file.drawn is not None:
        found = [found[number] for number in sorted(random.Random(0).sample(range(len(found)), file.drawn))]
    try:
        return None if content(file, found) == file.sha256 else "other rows"
    except (CorpusError, ValueError, TypeError) as error:
        return f"other rows: {error}"


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        return [{"name": name, "words": words} for name, words in verbalizers.read_words(path).items()]
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else rows.read_lines(path)

"""`memdec data`: the files that the tasks read, where the Hub has them, and whether those in a folder are right.

`FILES` is the one list of what exists. A folder made by `fetch` is a MEMDEC_DATA folder with `sources.json`, which tells
of each file its origin, commit, number of rows and sha256. A file is written whole or not at all, after its entry.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from memdec import artifacts, rows
from memdec.errors import CorpusError
from memdec.rows import HubRows

SOURCES = "sources.json"
_MEDICINE = ("AdaptLLM/medicine-tasks", "68afee8d7be55335ba0e34deacc23120233161f6")
_FINANCE = ("AdaptLLM/finance-tasks", "48d43d2")
_LAW = ("AdaptLLM/law-tasks", "9833f318db11941509f2b56a29b423757f8acbd9")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file under MEMDEC_DATA that a task reads.

    Attributes:
        file: Its name there; the first folder is the task.
        rows: How many the complete file has; None where no number is published.
        columns: What every row must have.
        hub: Where `fetch` has it from; None where no commit is known or the Hub has other rows.
    """

    file: str
    rows: int | None
    columns: tuple[str, ...]
    hub: HubRows | None = None

    @property
    def task(self) -> str:
        """Name for `--task`."""
        return self.file.split("/")[0]


def _adaptllm(source: tuple[str, str], name: str, n_rows: int, *columns: str) -> DataFile:
    path, revision = source
    kinds = columns or ("input", "options", "gold_index")
    return DataFile(f"{name.lower()}/adaptllm_schema.jsonl", n_rows, kinds, HubRows(path, name, "test", revision))


FILES = (
    _adaptllm(_MEDICINE, "ChemProt", 500),
    _adaptllm(_MEDICINE, "MQP", 610),
    _adaptllm(_MEDICINE, "PubMedQA", 1000),
    _adaptllm(_MEDICINE, "RCT", 2000),
    _adaptllm(_MEDICINE, "USMLE", 1273),
    _adaptllm(_FINANCE, "FPB", 970),
    _adaptllm(_FINANCE, "FiQA_SA", 235),
    _adaptllm(_FINANCE, "Headline", 20547, "input", "options", "gold_index", "class_id"),
    _adaptllm(_FINANCE, "NER", 98, "input", "label"),
    _adaptllm(_FINANCE, "ConvFinQA", 1490, "input", "label"),
    _adaptllm(_LAW, "SCOTUS", 60),
    _adaptllm(_LAW, "CaseHOLD", 3549, "input_options", "output", "gold_index"),
    _adaptllm(_LAW, "UNFAIR_ToS", 1607),
    DataFile(
        "wikitext/wikitext-103-raw-v1/test.parquet",
        4358,
        ("text",),
        HubRows(
            "Salesforce/wikitext",
            None,
            "test",
            "b08601e04326c79dfdd32d625aee71d233d685c3",
            files="wikitext-103-raw-v1/test-*.parquet",
        ),
    ),
    DataFile("nq/validation.jsonl", 3610, ("question", "answer")),
    DataFile("hotpotqa/validation.jsonl", 7405, ("question", "answer")),
    DataFile("sst2/test.jsonl", 1821, ("text", "label")),
    DataFile("sst2/validation.jsonl", 872, ("text", "label")),
    DataFile("mr/test.jsonl", 2000, ("text", "label")),
    DataFile("mr/validation.jsonl", None, ("text", "label")),
    DataFile("cr/test.jsonl", 2000, ("text", "label")),
    DataFile("rt/test.jsonl", 1066, ("input", "output")),
    DataFile("rt/validation.jsonl", None, ("input", "output")),
    DataFile("hyp/test.jsonl", 516, ("text", "label")),
    DataFile("hyp/validation.jsonl", 65, ("text", "label")),
    DataFile("cb/test.jsonl", 56, ("premise", "hypothesis", "label")),
    DataFile("cb/validation.jsonl", 250, ("premise", "hypothesis", "label")),
    DataFile("rte/test.jsonl", 277, ("premise", "hypothesis", "label")),
    DataFile("rte/validation.jsonl", 2490, ("premise", "hypothesis", "label")),
    DataFile("agn/test.jsonl", 7600, ("Class Index", "Title", "Description")),
    DataFile("agn/validation.jsonl", None, ("Class Index", "Title", "Description")),
    DataFile("yahoo/test.jsonl", 3000, ("topic", "question_title", "question_content", "best_answer")),
)


@dataclass(frozen=True, slots=True)
class Checked:
    """A file and what was found.

    Attributes:
        file: What it should be.
        rows: How many it has; None where that cannot be told.
        status: "ok", "missing" or what is wrong.
        commit: That it was fetched from; None for a file of another origin, whose rows may be others of the same number.
    """

    file: DataFile
    rows: int | None
    status: str
    commit: str | None = None


def chosen(tasks: Sequence[str]) -> list[DataFile]:
    """Files of these tasks; all of them where none is named.

    Raises:
        CorpusError: There is no such task.
    """
    known = sorted({each.task for each in FILES})
    for task in tasks:
        if task not in known:
            raise CorpusError(f"--task: expected one of {', '.join(known)}, found {task!r}")
    return [each for each in FILES if not tasks or each.task in tasks]


def fetch(out: Path, tasks: Sequence[str] = ()) -> list[Checked]:
    """Bring what the Hub has into a folder; what is there and right stays as it is.

    Args:
        out: Folder in the layout of MEMDEC_DATA.
        tasks: Only these.

    Returns:
        How each file is now.

    Raises:
        CorpusError: A named task is not on the Hub, the Hub cannot be reached, or a wrong file is in the way that is not
            from here.
    """
    files = chosen(tasks)
    for each in files:
        if tasks and each.hub is None:
            raise CorpusError(
                f"{each.file}: expected a task that the Hub has at a known commit, found one that is put there by hand; see "
                "harness_tasks/README.md"
            )
    found = []
    for file in tqdm([each for each in files if each.hub is not None], desc="fetch", unit="file"):
        now = _check(out, file, _sources(out))
        if now.status != "ok":
            if (out / file.file).exists() and file.file not in _sources(out):
                raise CorpusError(
                    f"{out / file.file}: expected a right file or one from an earlier fetch, found another ({now.status}); move "
                    "it, or choose another --out"
                )
            _fetch(out, file)
            now = _check(out, file, _sources(out))
        found.append(now)
    return found


def _fetch(out: Path, file: DataFile) -> None:
    assert file.hub is not None
    hub = rows.pinned(file.hub)
    found = rows.hub_rows(hub)
    if file.file.endswith(".parquet"):
        buffer = io.BytesIO()
        found.to_parquet(buffer)
        data = buffer.getvalue()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode()
    entry = {
        "origin": hub.name,
        "revision": hub.revision,
        "rows": len(found),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    artifacts.write_json(out / SOURCES, dict(sorted({**_sources(out), file.file: entry}.items())))
    artifacts.write_bytes(out / file.file, data)


def verify(folder: Path, tasks: Sequence[str] = ()) -> list[Checked]:
    """How the files of a folder are.

    Raises:
        CorpusError: There is no such folder or task, or its `sources.json` is not whole.
    """
    if not folder.is_dir():
        raise CorpusError(
            f"{folder}: expected a folder in the layout of MEMDEC_DATA, found none; run `memdec data fetch`"
        )
    entries = _sources(folder)
    return [_check(folder, each, entries) for each in chosen(tasks)]


def wrong(found: Sequence[Checked], all_needed: bool) -> bool:
    """Whether a file is not as it should be, or missing where all are needed."""
    return any(each.status != "ok" and (all_needed or each.status != "missing") for each in found)


def shown(found: Sequence[Checked]) -> str:
    """A line per file: task, file, rows, expected rows, origin, status."""
    import pandas as pd

    lines = [
        {
            "task": each.file.task,
            "file": each.file.file,
            "rows": "-" if each.rows is None else str(each.rows),
            "expected": "any" if each.file.rows is None else str(each.file.rows),
            "origin": f"Hub {each.commit[:7]}" if each.commit else "-" if each.status == "missing" else "own file",
            "status": each.status,
        }
        for each in found
    ]
    return pd.DataFrame(lines).to_string(index=False)


def _sources(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / SOURCES
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values()):
            return entries
    except FileNotFoundError:
        return {}
    except ValueError:
        pass
    raise CorpusError(
        f"{path}: expected a JSON object with an entry per file, found another; delete it and fetch again"
    )


def _check(folder: Path, file: DataFile, entries: dict[str, dict[str, Any]]) -> Checked:
    path = folder / file.file
    if not path.is_file():
        return Checked(file, None, "missing")
    try:
        found = _rows(path)
    except (CorpusError, pa.ArrowException) as error:
        return Checked(file, None, f"not whole: {' '.join(str(error).removeprefix(f'{path}, ').split())[:80]}")
    entry = entries.get(file.file)
    commit = str(entry["revision"]) if entry is not None and "revision" in entry else None
    return Checked(file, len(found), _fault(path, file, found, entry) or "ok", commit)


def _fault(path: Path, file: DataFile, found: list[dict[str, Any]], entry: dict[str, Any] | None) -> str | None:
    for number, row in enumerate(found):
        for column in file.columns:
            if row.get(column) is None:
                return f"row {number}: no {column!r}"
    if entry is not None:
        if entry.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
            return f"not what {SOURCES} says"
        if file.hub is not None and not str(entry.get("revision")).startswith(file.hub.revision):
            return f"of another commit than {file.hub.revision}"
    if not found or file.rows not in (None, len(found)):
        return "other number of rows"
    return None


def _rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else rows.read_lines(path)

"""Stage `corpus`: read documents, deduplicate them, split them by source, limit their size, and hash them.

Splitting by source keeps docstrings of one source file from being in both train and test; of other text a document is the
unit. Inputs are docstrings of installed packages (read without importing them), local files, or a data set of the Hub. The
output is a folder with one parquet file per split (columns `text`, `source`).
"""

import ast
import csv
import gc
import glob
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from memdec.artefacts import artefact, provenance, sources
from memdec.errors import ArtifactError, CorpusError, ModelError, outside, reason
from memdec.settings import SPLITS, CorpusSpec, DocstringCorpus, FileCorpus, HubCorpus, Split
from memdec.text import reading

SHINGLE = 12  # words of a shingle, the unit in which the overlap of two texts is measured
MAX_OVERLAP = 0.3  # fraction of a valid/test document's shingles that may occur in train
MAX_COPIED = 0.9  # fraction of a split's text that may be in documents of another split; published ones share some
MAX_FILE_SHARE = 0.05  # a file with a larger fraction of the text goes to train, or it might be most of the test set

_PLAIN = {"", ".txt", ".text", ".md", ".rst", ".raw", ".tokens"}  # the last two are WikiText's
_LINES = {".jsonl", ".ndjson", ".json"}
_CELLS = {".csv": ",", ".tsv": "\t"}
_TABLE = ".parquet"
_SHARES = "; about 84 % go to train, 6 % to valid and 10 % to test"  # of `_split_by_unit`
_CUTS = {"blank_line": r"(?<=\n\n)(?!\n)", "line": r"(?<=\n)"}  # after the end of a document
_ENDS = {"blank_line": "a blank line", "line": "a line end", "file": "the end of the file"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its source. All documents of one `unit` (a file, say) are in the same split."""

    text: str
    unit: str
    source: str


def run(spec: CorpusSpec, out: Path, against: Sequence[Path] = ()) -> None:
    """Stage `corpus`: make the folder `out` from a corpus description.

    Args:
        spec: The description of the corpus.
        out: Folder to make.
        against: Corpus folders whose train text must not overlap the valid and test text of this corpus.
    """
    _refuse_shared_files(spec)
    inputs = {f"against {i}": artefact.read(path, "corpus").recipe for i, path in enumerate(against)}
    inputs["origin"] = _origin(spec)
    with artefact.building(out, "corpus", spec, inputs) as build:
        if build is None:
            return
        splits = _splits(spec)
        n_read = sum(map(len, splits.values()))
        dropped = {}
        if _split_here(spec):  # published splits stay as they are, so that results compare with published ones
            texts = [doc.text for doc in splits["train"]] + [text for path in against for text in load(path, "train")]
            dropped = _drop_overlap(splits, _shingles(texts))
        facts: dict[str, Any] = {"dropped_for_overlap": dropped, "separator": spec.separator, "splits": {}}
        splits = {split: _capped(splits[split], spec.max_bytes.get(split)) for split in SPLITS}
        _refuse_copies(splits, _shown(spec))
        for split, documents in splits.items():
            n_bytes = sum(len(doc.text.encode()) for doc in documents)
            if n_bytes < spec.min_bytes:
                raise CorpusError(
                    f"{out}: expected at least {spec.min_bytes} bytes in the {split} split, found {n_bytes} in "
                    f"{len(documents)} of the {n_read} documents of {_shown(spec)}{_why(spec, split, dropped)}"
                )
            _write(out / f"{split}.parquet", documents)
            facts["splits"][split] = {"documents": len(documents), "bytes": n_bytes, "sha256": _text_hash(documents)}
        facts["sha256"] = artefact.digest(facts["splits"])
        build.facts.update(facts)


def load(path: Path, split: Split) -> list[str]:
    """The texts of one split of a corpus folder, in order."""
    artefact.read(path, "corpus", whole=True)
    file = path / f"{split}.parquet"
    with outside(ArtifactError, file, "texts in Parquet format", "run `memdec corpus` again"):
        return list(pq.read_table(file, columns=["text"])["text"].to_pylist())


def joined(texts: Iterable[str], separator: str, eos: str) -> str:
    """Join documents into one string whose tokens are the split's token stream; separator `eos` puts EOS after each."""
    return "".join(text + eos for text in texts) if separator == "eos" else "".join(texts)


def joined_split(folder: Path, split: Split, eos: str) -> str:
    """The whole text of one split of a corpus folder, as `joined` makes it."""
    return joined(load(folder, split), artefact.read(folder, "corpus").facts["separator"], eos)


def _shown(spec: CorpusSpec) -> str:
    """What the text was read from, for messages."""
    if isinstance(spec, DocstringCorpus):
        return ", ".join(spec.packages)
    return str(spec.path or ", ".join(map(str, (getattr(spec, "paths", None) or {}).values())))


def _why(spec: CorpusSpec, split: Split, dropped: Mapping[str, int]) -> str:
    """What makes a document, what was left out, and the next step: the end of the message about a small split."""
    told = f", {dropped[split]} more overlap with train" if dropped.get(split) else ""
    cap = f", max_bytes is {spec.max_bytes[split]}" if split in spec.max_bytes else ""
    if isinstance(spec, DocstringCorpus):
        return f" (docstrings; those of one module are in one split{told}{cap}); add packages, or lower min_bytes"
    if isinstance(spec, HubCorpus):
        shares = _SHARES if _split_here(spec) else ""
        return f" (one per row{shares}{told}{cap}); add text, or lower min_bytes"
    files = [file for name in _patterns(spec) for file in _matches(name)]
    ends = [_ENDS[spec.documents] if _kind(file) in _PLAIN else "the end of its row" for file in files]
    end = " or ".join(dict.fromkeys(ends))
    if spec.path is None:
        return f" (a document ends at {end}{cap}); add text, or lower min_bytes"
    return (
        f" (a document ends at {end}{_SHARES}{told}{cap}); give more "
        f"documents, choose another 'documents' ({', '.join(_ENDS)}), give a file for each split in 'paths', or lower "
        "min_bytes"
    )


# --- reading ------------------------------------------------------------------------------------------------------


def _splits(spec: CorpusSpec) -> dict[Split, list[Document]]:
    if isinstance(spec, DocstringCorpus):
        return _split_by_unit(_deduplicated(_docstring_documents(spec)))
    if isinstance(spec, FileCorpus):
        paths = spec.paths or {}
        names = _names([file for pattern in _patterns(spec) for file in _matches(pattern)])
        if spec.path is not None:
            return _split_by_unit(_deduplicated(_file_documents(str(spec.path), spec, names)))
        return {split: list(_file_documents(str(paths[split]), spec, names)) for split in SPLITS}
    if _split_here(spec):
        return _split_by_unit(_deduplicated(_hub_documents(spec, "train")))
    return {split: list(_hub_documents(spec, split)) for split in SPLITS}


def _split_here(spec: CorpusSpec) -> bool:
    """Whether the documents are split by hash, as nobody has split them before."""
    if isinstance(spec, HubCorpus):
        return set(spec.splits) == {"train"}
    return isinstance(spec, DocstringCorpus) or spec.path is not None


def _origin(spec: CorpusSpec) -> str:
    """What else decides the text: versions of packages, digests of files, or the commit of a Hub data set."""
    if isinstance(spec, DocstringCorpus):
        return ", ".join(_package(name) for name in spec.packages)
    if isinstance(spec, FileCorpus):
        files = [file for pattern in _patterns(spec) for file in _matches(pattern)]
        names = _names(files)
        return ", ".join(f"{names[file]} {artefact.file_digest(file)}" for file in files)
    return f"{spec.config or ''} {_version(spec)}"


def _package(name: str) -> str:
    """Version of a package, digest of its files, and the Python that parses them: another one may not read them all."""
    files = [(file.relative_to(root).as_posix(), artefact.hashed(file)) for root, file in _package_files(name)]
    python = ".".join(map(str, sys.version_info[:2]))
    return f"{name} {provenance.package_version(name)} {artefact.digest(files)} of Python {python}"


def _version(spec: HubCorpus) -> str:
    """The content of a local data set, or the id and commit of one of the Hub."""
    folder = Path(spec.path)
    if folder.is_dir():
        files = sources.visible(folder)
        return artefact.digest([(file.relative_to(folder).as_posix(), artefact.hashed(file)) for file in files])
    try:
        return f"{spec.path} {sources.commit(spec.path, spec.revision, 'dataset')}"
    except ModelError:  # offline, `datasets` may still have a version
        return f"{spec.path} {_cached(_loaded(spec, next(iter(spec.splits.values()))))[0].parent.name}"


def _docstring_documents(spec: DocstringCorpus) -> Iterator[Document]:
    files = [(root, file) for name in spec.packages for root, file in _package_files(name)]
    for root, file in tqdm(files, desc="read docstrings", unit="file", mininterval=2):
        unit = file.relative_to(root).as_posix()
        try:
            with warnings.catch_warnings():  # such as invalid escapes in the packages' source
                warnings.simplefilter("ignore")
                tree = _parsed(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # templates, files for other Python versions, and tests of deep nesting
        for line, text in sorted(_documentation(tree, file.stem)):
            text = _clean(text)
            if len(text) >= spec.min_chars:
                yield Document(text, unit, f"{unit}:{line}")


def _parsed(source: bytes) -> ast.Module:
    """A syntax tree. Meanwhile no garbage is collected: a tree has no cycles, and looking for some takes a third of it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if collects:
            gc.enable()


def _package_files(name: str) -> list[tuple[Path, Path]]:
    """(folder that contains the package, file) for every Python file of a package."""
    folder = provenance.package_folder(name)
    if folder is None:
        raise CorpusError(
            f"corpus packages: expected an installed package, found no {name!r}; install the pinned requirements"
        )
    root = folder if name == "stdlib" else folder.parent
    return [(root, file) for file in provenance.python_files(folder)]


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_STATEMENTS = ("body", "orelse", "finalbody", "handlers", "cases")  # fields of a node that hold statements


def _documentation(tree: ast.Module, stem: str) -> list[tuple[int, str]]:
    """(line, text) of a module's docstrings, or of all strings in documentation modules (`_torch_docs`, `topics`)."""
    if stem.endswith("_docs") or stem == "topics":
        strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
        return [(node.lineno, str(node.value)) for node in strings]
    found, todo = [], [tree]
    while todo:
        node: Any = todo.pop()
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                found.append((getattr(node, "lineno", 0), text))
        # No definition is inside of an expression, and most nodes are expressions.
        for part in _STATEMENTS:
            todo += getattr(node, part, ())
    return found


def _clean(text: str) -> str:
    """Make indentation and line ends uniform, and drop characters that UTF-8 cannot encode."""
    import inspect

    return inspect.cleandoc(text.replace("\r\n", "\n")).encode("utf-8", "ignore").decode().strip()


def _patterns(spec: FileCorpus) -> list[str]:
    return [str(each) for each in ([spec.path] if spec.path is not None else (spec.paths or {}).values())]


def _refuse_shared_files(spec: CorpusSpec) -> None:
    """Refuse a file that several of `paths` name: what a model is measured on would be what it was trained on."""
    first: dict[Path, Split] = {}
    for split, pattern in ((spec.paths if isinstance(spec, FileCorpus) else None) or {}).items():
        for file in _matches(str(pattern)):
            known = first.setdefault(file.resolve(), split)
            if known != split:
                raise CorpusError(
                    f"corpus paths: expected each file in one split, found {file} in {known} and {split}; give other files, or "
                    "'path' to have the documents split here"
                )


def _matches(pattern: str) -> list[Path]:
    # The name of an existing file is taken literally, even if it contains brackets.
    names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
    files = sorted(file for file in map(Path, names) if file.is_file())
    if not files:
        folder = Path(pattern).is_dir()
        found, instead = ("a folder", f"give '{pattern}/*.txt'") if folder else ("none", "check the path in the config")
        raise CorpusError(f"{pattern}: expected text files, found {found}; {instead}")
    return files


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """The name of each file in the sources of its documents.

    Files that share a name are named by their path below the folder that all files are in.
    """
    every = {file: file.absolute() for file in files}
    shared = {name for name, n in Counter(path.name for path in set(every.values())).items() if n > 1}
    top = os.path.commonpath([path.parent for path in every.values()])
    return {
        file: path.relative_to(top).as_posix() if path.name in shared else path.name for file, path in every.items()
    }


def _file_documents(pattern: str, spec: FileCorpus, names: Mapping[Path, str]) -> Iterator[Document]:
    for file in _matches(pattern):
        try:
            rows = list(_rows(file, spec))
        except (OSError, lzma.LZMAError, zlib.error, EOFError, pa.ArrowException, csv.Error, ValueError) as error:
            raise CorpusError(
                f"{file}: expected readable text, jsonl, csv or parquet, found: {reason(error, 160)}; check the file"
            ) from None
        for number, row in rows:
            document = _row_document(row, spec.field, f"{names[file]}:{number}", str(file))
            if document.text:
                yield document


def _kind(file: Path) -> str:
    """The suffix of a file in lower case, without that of its compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".xz")), "")


def _rows(file: Path, spec: FileCorpus) -> Iterator[tuple[int, Any]]:
    """Number and row of each document of a file; text files have rows with one field."""
    kind = _kind(file)
    if kind not in {*_PLAIN, *_LINES, *_CELLS, _TABLE}:
        raise CorpusError(
            f"{file}: expected a file that ends in .txt, .jsonl, .csv, .tsv or .parquet (or these with .gz or .xz), found "
            f"{kind}; convert a table to .csv, or rename plain text to .txt"
        )
    if kind == _TABLE:
        yield from enumerate(pq.read_table(file, columns=_columns(file, spec.field)).to_pylist())
        return
    raw = file.read_bytes()
    if file.suffix.lower() == ".gz":
        raw = gzip.decompress(raw)
    elif file.suffix.lower() == ".xz":
        raw = lzma.decompress(raw)
    content = reading.decoded(raw, file)
    if kind in _LINES:
        yield from reading.json_lines(content, file)
        return
    if kind in _CELLS:
        yield from enumerate(_cells(content, _CELLS[kind], spec.field, file))
        return
    parts: list[str] = [content] if spec.documents == "file" else re.split(_CUTS[spec.documents], content)
    if spec.separator != "none":  # else nothing is put between documents, so each keeps the end that it has
        parts = [part.strip("\n") for part in parts if part.strip()]
    yield from enumerate({spec.field: part} for part in parts)


def _cells(content: str, separator: str, field: str, file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table. One with more cells than the header is refused: its text would end at the first separator."""
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # a cell may be a whole document
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    times = list(reader.fieldnames or ()).count(field)
    if times > 1:
        raise CorpusError(f"{file}: expected one column {field!r}, found {times}; rename or remove the others")
    for row in reader:
        if None in row:
            raise CorpusError(
                f"{file}, line {reader.line_num}: expected {len(row) - 1} cells, as in the header, found "
                f"{len(row) - 1 + len(row[None])}; put texts with {separator!r} between quotes"
            )
        yield row


def _columns(file: Path, field: str) -> list[str] | None:
    """The text column alone, if there is one: other columns may hold what Python cannot read."""
    return [field] if field in pq.read_schema(file).names else None


def _hub_documents(spec: HubCorpus, split: Split) -> Iterator[Document]:
    name = spec.splits[split]
    rows = _loaded(spec, name)
    for number, row in enumerate(tqdm(rows, desc=f"read {split}", unit="row", mininterval=2)):
        document = _row_document(row, spec.field, f"{name}:{number}", spec.path)
        if document.text:
            yield document


def _loaded(spec: HubCorpus, name: str) -> Any:
    """One split of a data set, of the commit that the corpus is known by."""
    import datasets

    revision = spec.revision
    with outside(CorpusError, f"{spec.path} ({name})", "a data set", "check id, config, revision, split and network"):
        if not Path(spec.path).is_dir():
            with suppress(ModelError):
                revision = sources.commit(spec.path, spec.revision, "dataset")
        where = _prepared(spec)
        rows = datasets.load_dataset(spec.path, spec.config, split=name, revision=revision, cache_dir=where)
    if where is None:
        sources.check_commit(spec.path, revision, _cached(rows), "ask for the commit that is there")
    return rows


def _cached(rows: Any) -> list[Path]:
    """The files that `datasets` took rows from, in a folder that is named by the commit."""
    return [Path(file["filename"]) for file in rows.cache_files]


def _prepared(spec: HubCorpus) -> str | None:
    """Where `datasets` prepares a local data set: a folder for its content, as it knows files only by their times."""
    import datasets

    if not Path(spec.path).is_dir():
        return None  # the usual place
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"memdec-{_version(spec)}")


def _row_document(row: Any, field: str, source: str, where: str) -> Document:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        if isinstance(row, dict) and field in row:
            found = f"{reading.shown(row[field])} of type {type(row[field]).__name__}"
        raise CorpusError(
            f"{where}, {source}: expected a text field {field!r}, found {found[:200]}; set 'field' in the config, or check "
            "the file"
        )
    return Document(text, source, source)


# --- splitting ----------------------------------------------------------------------------------------------------


def _deduplicated(documents: Iterable[Document]) -> list[Document]:
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(document.text, document)
    return list(first.values())


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _split_by_unit(documents: list[Document]) -> dict[Split, list[Document]]:
    """Assign about 10 % of the units to test and 6 % to valid, by hash; very large units always go to train."""
    size: dict[str, int] = defaultdict(int)
    for document in documents:
        size[document.unit] += len(document.text)
    limit = MAX_FILE_SHARE * sum(size.values())
    splits: dict[Split, list[Document]] = {"train": [], "valid": [], "test": []}
    for document in documents:
        u = _fraction(document.unit)
        small = size[document.unit] <= limit
        splits["test" if small and u < 0.10 else "valid" if small and u < 0.16 else "train"].append(document)
    return splits


def _shingles(texts: Iterable[str]) -> set[int]:
    return {shingle for text in texts for shingle in _document_shingles(text)}


def _document_shingles(text: str) -> list[int]:
    words = text.split()
    return [_hash(" ".join(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1))]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _overlap(text: str, seen: set[int]) -> float:
    shingles = _document_shingles(text)
    return sum(shingle in seen for shingle in shingles) / len(shingles)


def _drop_overlap(splits: dict[Split, list[Document]], seen: set[int]) -> dict[str, int]:
    """Remove valid and test documents that overlap too much with train; return the number removed from each split."""
    dropped = {}
    for split in ("valid", "test"):
        kept = [doc for doc in splits[split] if _overlap(doc.text, seen) <= MAX_OVERLAP]
        dropped[split] = len(splits[split]) - len(kept)
        splits[split] = kept
    return dropped


def _refuse_copies(splits: Mapping[Split, Sequence[Document]], shown: str) -> None:
    """Raise an error if most of one split's text is in another: what is tuned and tested there would be known text."""
    texts = {split: {document.text for document in splits[split]} for split in SPLITS}
    for seen, split in itertools.combinations(SPLITS, 2):
        shared = texts[seen] & texts[split]
        if sum(map(len, shared)) > MAX_COPIED * sum(map(len, texts[split])):
            raise CorpusError(
                f"{shown}: expected text in the {split} split that is not in the {seen} split, found {len(shared)} of "
                f"its {len(texts[split])} different documents in both; give other text to one of them"
            )


def _capped(documents: list[Document], max_bytes: int | None) -> list[Document]:
    """Choose whole documents of at most `max_bytes` in total, in the order of a hash of their source.

    Without a limit, all documents are kept in the order in which they were read.
    """
    if max_bytes is None:
        return documents
    chosen, total = [], 0
    for document in sorted(documents, key=lambda doc: _fraction(doc.source)):
        size = len(document.text.encode())
        if total + size > max_bytes:
            continue
        chosen.append(document)
        total += size
    return chosen


def _write(path: Path, documents: list[Document]) -> None:
    table = pa.table({"text": [doc.text for doc in documents], "source": [doc.source for doc in documents]})
    pq.write_table(table, path)


def _text_hash(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()[:32]

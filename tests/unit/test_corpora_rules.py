"""How text is cut into documents, what makes a corpus again, and inputs that used to be misread."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from making import made_text

from memdec.artefacts import artefact
from memdec.errors import CorpusError
from memdec.settings import SPLITS, DocstringCorpus, FileCorpus, Split
from memdec.text import corpora

TEXT = made_text(200, 9)


def made(path: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    """Facts of a corpus of one file, split by hash."""
    corpora.run(FileCorpus.model_validate({"source": "files", "path": str(path), "min_bytes": 10} | changes), out)
    return artefact.read(out, "corpus").facts


def texts(out: Path) -> list[str]:
    return [text for split in SPLITS for text in corpora.load(out, split)]


def as_one(path: Path, split: Split = "test") -> dict[str, Any]:
    """A file, or a glob, as one split of a corpus."""
    others = {other: path.parent / f"{other}.jsonl" for other in SPLITS if other != split}
    for other, file in others.items():
        file.write_text(f'{{"text": "text of {other}"}}\n')
    return {"path": None, "paths": {name: str(file) for name, file in {**others, split: path}.items()}}


@pytest.mark.parametrize(
    ("documents", "expected"),
    [("blank_line", ["a b\nc", "d"]), ("line", ["a b", "c", "d"]), ("file", ["a b\nc\n\nd"])],
)
def test_what_parts_documents(tmp_path: Path, documents: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text("\na b\nc\n\nd\n\n\n")
    made(tmp_path / "a.txt", tmp_path / "o", documents=documents, min_bytes=1, **as_one(tmp_path / "a.txt"))
    assert corpora.load(tmp_path / "o", "test") == expected


def test_a_glob_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    made(tmp_path, tmp_path / "o", **as_one(tmp_path / "*.txt"))
    assert corpora.load(tmp_path / "o", "test") == ["text of a", "text of b", "text of c"]


def test_the_same_text_is_skipped_and_a_changed_one_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    first = made(tmp_path / "a.txt", tmp_path / "o")
    written = (tmp_path / "o" / "train.parquet").stat().st_mtime_ns
    assert made(tmp_path / "a.txt", tmp_path / "o") == first
    assert (tmp_path / "o" / "train.parquet").stat().st_mtime_ns == written
    assert made(tmp_path / "a.txt", tmp_path / "elsewhere") == first
    (tmp_path / "a.txt").write_text(TEXT.replace("kernel", "colonel"))
    assert made(tmp_path / "a.txt", tmp_path / "o")["sha256"] != first["sha256"]


def test_every_document_is_in_one_split_and_duplicates_are_in_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT + "\n\n" + TEXT)
    facts = made(tmp_path / "a.txt", tmp_path / "o")
    found = texts(tmp_path / "o")
    assert len(found) == len(set(found)) == 200 - sum(facts["dropped_for_overlap"].values())
    assert set(found) <= set(TEXT.split("\n\n"))
    assert facts["splits"]["test"]["bytes"] == sum(len(t.encode()) for t in corpora.load(tmp_path / "o", "test"))


def test_documents_of_one_unit_stay_together() -> None:
    documents = [
        corpora.Document(f"text {unit} {line}", f"module_{unit}.py", f"module_{unit}.py:{line}")
        for unit in range(100)
        for line in range(5)
    ]
    splits = corpora._split_by_unit(documents)
    units = {split: {document.unit for document in found} for split, found in splits.items()}
    assert all(units.values())
    assert sum(map(len, units.values())) == 100
    assert sum(map(len, splits.values())) == 500


def test_units_are_split_84_6_10_and_a_large_one_is_for_training() -> None:
    documents = [corpora.Document("text", f"m{n}", f"m{n}:0") for n in range(2000)]
    splits = corpora._split_by_unit(documents)
    assert [len(splits[split]) / 2000 for split in SPLITS] == pytest.approx([0.84, 0.06, 0.10], abs=0.02)
    for split in SPLITS[1:]:
        large = corpora.Document("text" * 1000, splits[split][0].unit, "large")  # most of its split, were it there
        assert large in corpora._split_by_unit([*documents, large])["train"]


def test_a_smaller_cap_draws_from_the_larger_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    drawn = []
    for cap in (1500, 6000):
        made(tmp_path / "a.txt", tmp_path / str(cap), max_bytes={"train": cap})
        drawn.append(corpora.load(tmp_path / str(cap), "train"))
    assert len(set(drawn[0]) & set(drawn[1])) >= len(drawn[0]) - 2  # the last few may be fillers of the small cap


def test_text_of_another_corpus_is_kept_out_of_valid_and_test_but_not_of_train(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    alone = made(tmp_path / "a.txt", tmp_path / "alone")
    # Half of the documents, as another corpus: everything of theirs in train by a path of its own.
    half = TEXT.split("\n\n")[::2]
    (tmp_path / "b.txt").write_text("\n\n".join(half))
    made(tmp_path / "b.txt", tmp_path / "other", **as_one(tmp_path / "b.txt", "train"))
    spec = FileCorpus(source="files", path=str(tmp_path / "a.txt"), min_bytes=10)
    corpora.run(spec, tmp_path / "apart", [tmp_path / "other"])
    assert corpora.load(tmp_path / "apart", "train") == corpora.load(tmp_path / "alone", "train")
    for split in ("valid", "test"):
        before, after = (corpora.load(tmp_path / name, split) for name in ("alone", "apart"))  # type: ignore[arg-type]
        assert set(before) & set(half)
        assert after == [text for text in before if text not in set(half)]
    assert sum(artefact.read(tmp_path / "apart", "corpus").facts["dropped_for_overlap"].values()) > sum(
        alone["dropped_for_overlap"].values()
    )


@pytest.mark.parametrize("row", ["[1]", '{"text": null}', '{"text": 3}', '"text"'])
def test_a_row_without_text_names_file_and_row(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + row)
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: expected a text field 'text'"):
        made(tmp_path / "a.jsonl", tmp_path / "o")


@pytest.mark.parametrize("copied", ["train", "valid"])
def test_a_copy_of_a_split_is_refused_under_any_name_and_limit(tmp_path: Path, copied: str) -> None:
    texts = {split: [f"{split} document {n}, which nothing else has\n\n" for n in range(30)] for split in SPLITS}
    texts["test"] = [*texts[copied][5:30], texts["test"][0]]
    for split, documents in texts.items():
        (tmp_path / f"{split}.txt").write_text("".join(documents))
    paths = {split: str(tmp_path / f"{split}.txt") for split in SPLITS}
    options: dict[str, Any] = {"path": None, "paths": paths, "max_bytes": {"test": 900}}
    with pytest.raises(
        CorpusError, match=rf"in the test split that is not in the {copied} split, found \d+ of its 2\d"
    ):
        made(tmp_path, tmp_path / "o", **options)
    texts["test"] = [*texts[copied][:20], *(f"test document {n}\n\n" for n in range(9))]  # as published ones can
    (tmp_path / "test.txt").write_text("".join(texts["test"]))
    made(tmp_path, tmp_path / "o", **options)


# --- bugs; drop the mark with the fix -----------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["b.txt", "*.txt", "link.txt", "x/../b.txt"])
def test_a_file_is_in_one_split(tmp_path: Path, test: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "c.txt").write_text("text of c")
    (tmp_path / "x").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    paths = {"train": str(tmp_path / "a.txt"), "valid": str(tmp_path / "b.txt"), "test": str(tmp_path / test)}
    with pytest.raises(CorpusError, match=r"expected each file in one split, found .*\.txt in (train|valid) and test"):
        made(tmp_path, tmp_path / "o", path=None, paths=paths, min_bytes=1)
    made(tmp_path, tmp_path / "o", path=None, paths=paths | {"test": str(tmp_path / "c.txt")}, min_bytes=1)


def test_windows_line_ends_make_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", "\r\n").encode())
    made(tmp_path / "a.txt", tmp_path / "o", **as_one(tmp_path / "a.txt"))
    assert corpora.load(tmp_path / "o", "test") == TEXT.split("\n\n")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_only(tmp_path: Path, character: str) -> None:
    row = json.dumps({"text": f"one{character}two"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(row + "\n", encoding="utf-8")
    made(tmp_path / "a.jsonl", tmp_path / "o", min_bytes=1, **as_one(tmp_path / "a.jsonl"))
    assert corpora.load(tmp_path / "o", "test") == [f"one{character}two"]


def test_a_damaged_gz_is_one_clear_error(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(TEXT.encode(), mtime=0))
    raw[200:240] = bytes(byte ^ 0xFF for byte in raw[200:240])
    (tmp_path / "a.txt.gz").write_bytes(raw)
    with pytest.raises(CorpusError, match="expected readable"):
        made(tmp_path / "a.txt.gz", tmp_path / "o")


def test_an_existing_file_is_found_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text(TEXT)
    made(tmp_path / "a[1].txt", tmp_path / "o")


def test_docstrings_do_not_depend_on_the_warning_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site" / "escpkg"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    for number, text in enumerate(TEXT.split("\n\n")[:100]):
        (folder / f"m{number}.py").write_text(f'"""{text} {text}"""\nPATTERN = "\\d"\n')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    spec = DocstringCorpus(source="docstrings", packages=["escpkg"], min_bytes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpora.run(spec, tmp_path / "quiet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpora.run(spec, tmp_path / "strict")
    assert texts(tmp_path / "strict") == texts(tmp_path / "quiet")

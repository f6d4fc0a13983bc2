"""Corpora: where text comes from, how it is split, and what is refused."""

import ast
import gzip
import json
import lzma
import sys
from pathlib import Path

import pandas as pd
import pytest
from making import made_text

from memdec.artefacts import artefact
from memdec.errors import CorpusError
from memdec.settings import SPLITS, DocstringCorpus, FileCorpus, HubCorpus
from memdec.text import corpora


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package of 60 documented modules that must not be imported."""
    folder = tmp_path / "site" / "fakepkg"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('imported')\n")
    for number, text in enumerate(made_text(60, 1).split("\n\n")):
        body = text + "\n" + f"Shared words number {number} " * 8
        (folder / f"m{number}.py").write_text(f'"""{body}"""\nraise ImportError\n\ndef f():\n    """{body}"""\n')
    (folder / "m_docs.py").write_text(
        f"add(x, r'''{made_text(1, 5)} A constant in a module of documentation. {'long ' * 40}''')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "fakepkg"


def sources(folder: Path, split: str) -> list[str]:
    return list(pd.read_parquet(folder / f"{split}.parquet")["source"])


def test_docstrings_are_read_without_import_split_by_module_and_deduplicated(package: str, tmp_path: Path) -> None:
    spec = DocstringCorpus(source="docstrings", packages=[package], min_bytes=10)
    corpora.run(spec, tmp_path / "a")
    assert package not in sys.modules
    units = {
        split: {source.split(":")[0] for source in sources(tmp_path / "a", split)}
        for split in ("train", "valid", "test")
    }
    assert not units["train"] & units["test"]
    assert not units["train"] & units["valid"]
    assert sum(len(sources(tmp_path / "a", split)) for split in units) <= 61  # the function's copy of a docstring went
    assert "fakepkg/m_docs.py" in units["train"] | units["valid"] | units["test"]
    corpora.run(spec, tmp_path / "b")
    assert artefact.read(tmp_path / "a", "corpus").facts == artefact.read(tmp_path / "b", "corpus").facts


NESTED = """
'''0'''
if a:
    def f(): "1"
elif b:
    class C:
        "2"
        async def g(self):
            "3"
            def inner(): "4"
else:
    with w:
        def h(): "5"
try:
    def f(): "6"
except E:
    def f(): "7"
except F:
    for x in y:
        def f(): "8"
    else:
        def f(): "9"
else:
    def f(): "10"
finally:
    while z:
        def f(): "11"
match m:
    case 1:
        def f(): "12"
    case _:
        class D: "13"
"""


def test_docstrings_are_found_wherever_a_definition_may_stand() -> None:
    found = corpora._documentation(ast.parse(NESTED), "module")
    assert sorted(int(text) for _, text in found) == list(range(14))
    for path in sorted(Path(corpora.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        expected = [text for node in nodes if (text := ast.get_docstring(node, clean=False)) is not None]
        assert sorted(text for _, text in corpora._documentation(tree, path.stem)) == sorted(expected)


def test_formats_give_the_same_documents(tmp_path: Path) -> None:
    text = made_text(80, 2)
    documents = text.split("\n\n")
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": d}) for d in documents))
    pd.DataFrame({"body": documents}).to_parquet(tmp_path / "a.parquet")
    paths = {split: str(tmp_path / f"{split}.txt") for split in ("train", "valid")}
    for seed, path in enumerate(paths.values(), 3):
        Path(path).write_text(made_text(80, seed))
    found = []
    for name in ("a.txt", "a.txt.xz", "a.txt.gz", "a.jsonl", "a.parquet"):
        paths["test"] = str(tmp_path / name)
        corpora.run(FileCorpus(source="files", paths=paths, field="body"), tmp_path / "out" / name)
        found.append(corpora.load(tmp_path / "out" / name, "test"))
    assert all(texts == documents for texts in found)


def test_overlapping_test_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    text = made_text(200, 3)
    # The same documents again with one word changed: near duplicates that must not be tested on.
    twins = "\n\n".join(d.replace("The", "A", 1) for d in text.split("\n\n"))
    (tmp_path / "a.txt").write_text(text + "\n\n" + twins)
    corpora.run(FileCorpus(source="files", path=str(tmp_path / "a.txt"), min_bytes=10), tmp_path / "out")
    train = corpora._shingles(corpora.load(tmp_path / "out", "train"))
    assert all(corpora._overlap(d, train) <= corpora.MAX_OVERLAP for d in corpora.load(tmp_path / "out", "test"))
    assert artefact.read(tmp_path / "out", "corpus").facts["dropped_for_overlap"]["test"] > 0


def test_caps_take_whole_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(made_text(300, 4))
    spec = FileCorpus(source="files", path=str(tmp_path / "a.txt"), max_bytes={"train": 3000}, min_bytes=10)
    corpora.run(spec, tmp_path / "out")
    facts = artefact.read(tmp_path / "out", "corpus").facts["splits"]["train"]
    assert 2000 < facts["bytes"] <= 3000
    numbers = [int(text.split()[2]) for text in corpora.load(tmp_path / "out", "train")]
    assert max(numbers) > 150  # chosen by hash, not from the beginning of the text


def test_docstrings_are_known_by_their_content(package: str, tmp_path: Path) -> None:
    spec = DocstringCorpus(source="docstrings", packages=[package], min_bytes=10)
    corpora.run(spec, tmp_path / "a")
    first = artefact.read(tmp_path / "a", "corpus")
    file = tmp_path / "site" / "fakepkg" / "m3.py"
    file.write_text(file.read_text().replace("Shared words", "Other words"))
    corpora.run(spec, tmp_path / "a")
    second = artefact.read(tmp_path / "a", "corpus")
    assert first.recipe != second.recipe
    assert first.facts["sha256"] != second.facts["sha256"]


def test_what_has_nothing_between_its_documents_is_the_text_of_its_files(tmp_path: Path) -> None:
    """WikiText's lines keep their ends."""
    whole = "\n = Title = \n\n First line , \n \n\n\nsecond\n"
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(name + whole)
    paths = {name: str(tmp_path / f"{name}.txt") for name in SPLITS}
    for documents in ("blank_line", "line", "file"):
        spec = FileCorpus(source="files", paths=paths, documents=documents, separator="none", min_bytes=1)
        corpora.run(spec, tmp_path / documents)
        assert corpora.joined_split(tmp_path / documents, "valid", "<eos>") == "valid" + whole


def test_hub_format_from_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        pd.DataFrame({"text": [f"{split} " + t for t in made_text(40, 6).split("\n\n")]}).to_parquet(
            tmp_path / "set" / f"{name}-00000-of-00001.parquet"
        )
    corpora.run(HubCorpus(source="hub", path=str(tmp_path / "set"), separator="none"), tmp_path / "out")
    for split in SPLITS:
        assert {text.split()[0] for text in corpora.load(tmp_path / "out", split)} == {split}


def test_a_data_set_with_a_train_split_alone_is_split_as_files_are(tmp_path: Path) -> None:
    texts = made_text(300, 6).split("\n\n")
    (tmp_path / "set").mkdir()
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    spec = HubCorpus(source="hub", path=str(tmp_path / "set"), splits={"train": "train"}, min_bytes=100)
    corpora.run(spec, tmp_path / "out")
    found = {split: corpora.load(tmp_path / "out", split) for split in SPLITS}
    assert len(set().union(*found.values())) == sum(map(len, found.values()))
    assert set().union(*found.values()) <= set(texts)
    assert len(found["train"]) > 5 * len(found["test"]) > 5 * len(found["valid"]) / 2 > 0


@pytest.mark.parametrize(("kind", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table_gives_the_documents_of_its_text_column(tmp_path: Path, kind: str, separator: str) -> None:
    """Quotes, separators and line ends inside of a cell belong to the text; a cell may be long."""
    texts = ['She said "no", twice.\nThen\tshe left.', "x" * 200_000, *made_text(40, 6).split("\n\n")]
    pd.DataFrame({"id": range(len(texts)), "note": texts}).to_csv(tmp_path / f"a.{kind}", sep=separator, index=False)
    for seed, name in enumerate(("b", "c"), 7):
        (tmp_path / f"{name}.txt").write_text(made_text(40, seed))
    paths = {"train": str(tmp_path / f"a.{kind}"), "valid": str(tmp_path / "b.txt"), "test": str(tmp_path / "c.txt")}
    spec = FileCorpus(source="files", paths=paths, field="note", documents="file")
    corpora.run(spec, tmp_path / "out")
    assert corpora.load(tmp_path / "out", "train") == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'id,text\n1,"never closed' + b"x" * 2000, "expected readable text, jsonl, csv or parquet"),
        ("a.csv", b"id,note\n1,x\n", "expected a text field 'text', found id, note"),
        (
            "a.csv",
            b"id,text\n1,one\n2,a, b, c\n",
            "line 3: expected 2 cells, as in the header, found 4; put texts with ','",
        ),
        (
            "a.tsv",
            b"note\none\ttwo\n",
            r"line 2: expected 1 cells, as in the header, found 2; put texts with '\\t' between",
        ),
        ("a.csv", b"text,text\nkept,lost\n", "a.csv: expected one column 'text', found 2; rename or remove the others"),
        (
            "a.txt",
            b"just ten words make no corpus at all you see",
            "expected at least 1000 bytes in the train split, found",
        ),
        ("a.txt", b"", "expected at least 1000 bytes"),
        ("a.txt", b"\xff\xfe\xfd" * 600, "expected UTF-8 text, found 0xff .* at byte 0, line 1"),
        ("a.txt.xz", b"not xz", "expected readable"),
        ("a.parquet", b"PAR1 no", "expected readable"),
        ("a.jsonl", b'{"body": "x"}\n', "expected a text field 'text', found body"),
        ("b.txt", b"x", "expected text files, found none"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    pattern = str(tmp_path / ("a*" if name.startswith("a") else "c*"))
    with pytest.raises(CorpusError, match=message) as caught:
        corpora.run(FileCorpus(source="files", path=pattern), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_unknown_package_and_data_set(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="found no 'nosuchpkg'"):
        corpora.run(DocstringCorpus(source="docstrings", packages=["nosuchpkg"]), tmp_path / "a")
    with pytest.raises(CorpusError, match="expected a data set, found"):
        corpora.run(HubCorpus(source="hub", path=str(tmp_path / "nothing")), tmp_path / "b")

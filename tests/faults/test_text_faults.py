"""Faults found in corpora, token streams and task rows: each test fails on the code before its fix."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import made_text
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as backends
from transformers import PreTrainedTokenizerFast

from memdec.artefacts import artefact
from memdec.errors import CorpusError
from memdec.settings import SPLITS, FileCorpus, HubCorpus, TokenizerSpec
from memdec.text import corpora, tokens

EOS = "</s>"
# Documents that begin and end with what tokenizers treat in their own way: spaces, line ends, marks that compose.
DOCUMENTS = [
    " the matrix  reads ",
    "the ﬁrst token of 12 models\n",
    "\u0301e starts with a mark, ends with one: e\u0301",
    "word",
    "  ",
    "Ünïcode and CAPITALS 中文字符 end\t",
    "(the) </s> inside, and </ alone",
]


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    plain = made_text(n, seed).split("\n\n")
    return [rng.choice(DOCUMENTS) if rng.random() < 0.3 else text for text in plain]


def bpe() -> Tokenizer:
    """A character BPE of a few merges that may cross spaces."""
    from tokenizers import trainers

    found = Tokenizer(backends.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", EOS], show_progress=False)
    found.train_from_iterator([text.replace(" ", "▁") for text in texts(60)], trainer)
    return found


def unigram() -> Tokenizer:
    pieces = sorted(
        {word for text in texts(40) for word in text.replace(" ", "▁").split("▁")} | set("".join(texts(40)))
    )
    vocab = [("<unk>", 0.0), (EOS, 0.0), ("▁", -2.0)] + [(piece, -3.0 - 0.1 * len(piece)) for piece in pieces if piece]
    return Tokenizer(backends.Unigram(vocab, unk_id=0))


def wordpiece() -> Tokenizer:
    characters = sorted({c for text in texts(40) for c in text.lower() if not c.isspace()})
    words = ["[UNK]", EOS, "the", "matrix", "##s", "token", "of"] + characters + [f"##{c}" for c in characters]
    return Tokenizer(backends.WordPiece({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))


def made(backend: Tokenizer, normalizer: Any = None, pre: Any = None, **eos: Any) -> PreTrainedTokenizerFast:
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    backend.add_special_tokens([AddedToken(EOS, special=True, **{"normalized": False, **eos})])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def metaspace(scheme: str, split: bool = False) -> Any:
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    from tokenizers import trainers

    backend = Tokenizer(backends.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts(60), trainer)
    return made(backend)


N = normalizers
SPIECE = N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")])
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "metaspace first": lambda: made(bpe(), pre=metaspace("first")),
    "metaspace always": lambda: made(bpe(), pre=metaspace("always")),
    "metaspace never": lambda: made(bpe(), pre=metaspace("never")),
    "metaspace first, split": lambda: made(bpe(), pre=metaspace("first", split=True)),
    "sentencepiece by normaliser": lambda: made(bpe(), SPIECE),
    "eos is normalised": lambda: made(bpe(), SPIECE, normalized=True),
    "eos takes the spaces behind": lambda: made(bpe(), pre=metaspace("never"), rstrip=True),
    "eos takes the spaces before": lambda: made(bpe(), pre=metaspace("never"), lstrip=True),
    "eos is a whole word": lambda: made(bpe(), pre=metaspace("never"), single_word=True),
    "strip": lambda: made(bpe(), N.Sequence([N.Strip(), N.Replace(" ", "▁")])),
    "strip, eos is normalised": lambda: made(bpe(), N.Sequence([N.Strip(), N.Replace(" ", "▁")]), normalized=True),
    "nfkc": lambda: made(bpe(), N.Sequence([N.NFKC(), N.Replace(" ", "▁")]), normalized=True),
    "replace over spaces": lambda: made(bpe(), N.Replace(" the", "▁the")),
    "unigram, split": lambda: made(unigram(), N.NFKC(), metaspace("always", split=True)),
    "unigram, whole": lambda: made(unigram(), N.NFKC(), metaspace("first")),
    "wordpiece": lambda: made(wordpiece(), N.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "wordpiece without words": lambda: made(wordpiece(), N.Lowercase()),
    "byte-level with a space before": lambda: byte_level(add_prefix_space=True),
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level without a pattern": lambda: byte_level(add_prefix_space=True, use_regex=False),
}


@pytest.fixture(scope="module")
def known() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.mark.parametrize("separator", ["eos", "none"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_7_the_stream_is_what_the_tokenizer_makes_of_the_joined_text(
    name: str, separator: str, known: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, documents = known[name], [text + (EOS if separator == "eos" else "") for text in texts(90, 5)]
    expected = tokenizer.encode("".join(documents), add_special_tokens=False)
    monkeypatch.setattr(tokens, "_PIECE", 900)  # 15 pieces
    monkeypatch.setattr(tokens, "_OVERLAP", 300)
    assert np.concatenate(tokens.encoded(tokenizer, documents)).tolist() == expected


@pytest.mark.parametrize("name", ["metaspace first", "byte-level with a space before", "unigram, split", "wordpiece"])
def test_7_pieces_are_joined_and_not_encoded_as_one(
    name: str, known: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PIECE", 900)
    monkeypatch.setattr(tokens, "_OVERLAP", 300)
    monkeypatch.setattr(tokens, "_longer", lambda *_: pytest.fail("pieces did not fit"))
    parts = tokens.encoded(known[name], [text + EOS for text in texts(90, 5)])
    assert len(parts) > 10


@pytest.mark.filterwarnings("error")
def test_7_a_place_where_tokens_do_not_agree_is_encoded_as_one(
    known: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PIECE", 900)
    monkeypatch.setattr(tokens, "_OVERLAP", 300)
    documents = [*texts(20, 1), "=" * 1501 + " " * 1001, *texts(20, 2)]
    tokenizer = known["byte-level"]
    expected = tokenizer.encode("".join(documents), add_special_tokens=False)
    assert np.concatenate(tokens.encoded(tokenizer, documents)).tolist() == expected


@pytest.mark.parametrize("separator", ["eos", "none"])
def test_7_tokens_of_a_corpus_are_those_of_the_text_that_is_evaluated(separator: str, tmp_path: Path) -> None:
    """Metaspace with `prepend_scheme` first puts a space before the first document only."""
    made(bpe(), pre=metaspace("first")).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(made_text(150, 3))
    spec = FileCorpus(source="files", path=str(tmp_path / "a.txt"), min_bytes=200, separator=separator)
    corpora.run(spec, tmp_path / "corpus")
    tokens.run_tokenizer(TokenizerSpec(pretrained=str(tmp_path / "tokenizer")), tmp_path / "t")
    tokens.run_tokens(tmp_path / "t", tmp_path / "corpus", tmp_path / "s")
    words = tokens.load_tokenizer(str(tmp_path / "t"))
    for split in SPLITS:
        text = corpora.joined_split(tmp_path / "corpus", split, words.eos_token)
        expected = words.encode(text, add_special_tokens=False)
        assert tokens.load_stream(tmp_path / "s", split).tolist() == expected
    facts = artefact.read(tmp_path / "s", "tokens").facts
    assert facts["end"] == (words.eos_token_id if separator == "eos" else None)


# --- corpora ------------------------------------------------------------------------------------------------------


def read(file: Path, out: Path) -> list[str]:
    """The documents of a file, as the test split of a corpus."""
    others = {split: out.parent / f"{split}.jsonl" for split in SPLITS if split != "test"}
    for other, path in others.items():
        path.write_text(f'{{"text": "text of {other}"}}\n')
    paths = {split: str(path) for split, path in {**others, "test": file}.items()}
    corpora.run(FileCorpus(source="files", paths=paths, min_bytes=1), out)
    return corpora.load(out, "test")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.GZ", "a.jsonl", "A.JSONL", "a.ndjson", "wiki.train.tokens"])
def test_18_line_ends_marks_and_capital_suffixes_change_no_document(
    name: str, mark: bytes, end: str, tmp_path: Path
) -> None:
    documents = made_text(12, 1).split("\n\n")
    lines = [json.dumps({"text": text}) for text in documents]
    content = "\n".join(lines) if "json" in name.lower() else "\n\n".join(documents)
    raw = mark + content.replace("\n", end).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("GZ") else raw)
    assert read(tmp_path / name, tmp_path / "out") == documents


def test_18_a_corpus_that_cannot_be_split_says_what_ends_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(made_text(300, 0).replace("\n\n", "\n"))
    with pytest.raises(
        CorpusError,
        match=r"0 in 0 of the 1 documents of .*a\.txt \(a document ends at a blank line; about 84 % go to train.*"
        r"'documents' \(blank_line, line, file\), give a file for each split in 'paths'",
    ) as caught:
        corpora.run(FileCorpus(source="files", path=str(tmp_path / "a.txt")), tmp_path / "out")
    assert "\n" not in str(caught.value)
    (tmp_path / "b.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(CorpusError, match=r"of the 1 documents .*ends at the end of its row"):
        corpora.run(FileCorpus(source="files", path=str(tmp_path / "b.jsonl")), tmp_path / "out2")


def test_18_files_of_one_name_are_both_read_and_told_apart(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for folder in ("x", "y/z"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(f"text of {folder}\n\nmore of {folder}")
    (tmp_path / "other.txt").write_text("alone")
    texts = read(tmp_path / "**" / "*.txt", tmp_path / "out")
    assert sorted(texts) == ["alone", "more of x", "more of y/z", "text of x", "text of y/z"]
    named = pq.read_table(tmp_path / "out" / "test.parquet")["source"].to_pylist()
    assert sorted(named) == ["other.txt:0", "x/a.txt:0", "x/a.txt:1", "y/z/a.txt:0", "y/z/a.txt:1"]


def test_18_empty_rows_are_no_documents_and_rows_keep_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    assert read(tmp_path / "a.jsonl", tmp_path / "out") == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"body": 1}\n')
    with pytest.raises(CorpusError, match=r"b\.jsonl:2: expected a text field 'text', found body"):
        read(tmp_path / "b.jsonl", tmp_path / "out2")


DEEP = "[" * 100_000 + "]" * 100_000
BAD_ROWS = {
    "deep": ('{"text": "x", "a": ' + DEEP + "}", "more than 100 levels of nesting"),
    "not too deep for Python": ('{"text": "x", "a": ' + "[" * 150 + "]" * 150 + "}", "more than 100 levels of nesting"),
    "long integer": ('{"text": "x", "a": ' + "9" * 5000 + "}", "an integer beyond 64 bits"),
    "64 bits": ('{"text": "x", "a": 9223372036854775808}', "an integer beyond 64 bits in 'a'"),
    "in a list": ('{"text": "x", "a": [{"b": -9223372036854775809}]}', "an integer beyond 64 bits in 'a'"),
    "surrogate": ('{"text": "x \\ud800 y"}', r"half of a surrogate pair \(character 2\) in 'text'"),
    "name": ('{"text": "x", "\\udfff": 1}', "half of a surrogate pair in a field's name"),
    "cut": ('{"text": "x"', r"'\{\"text\": \"x\"' \(Expecting"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_18_rows_that_no_table_can_hold_are_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memdec.tasks import rows

    bad, message = BAD_ROWS[kind]
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + bad + "\n")
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    for read_it in (lambda: read(tmp_path / "a.jsonl", tmp_path / "out"), lambda: rows.load("t", "a.jsonl")):
        with pytest.raises(CorpusError, match=rf"a\.jsonl, row 1: expected .*, found .*{message}") as caught:
            read_it()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xls", b"text,label\nx,1\n", r"a\.xls: expected a file that ends in \.txt, .* found \.xls; convert a table"),
        ("a.xlsx", b"PK", r"found \.xlsx; convert"),
        ("a.txt", b"one\n\ntwo \xe9", r"a\.txt: expected UTF-8 text, found 0xe9 \(.*\) at byte 9, line 3; convert it"),
        ("a.txt", b"\xef\xbb\xbfone\n\xff", r"found 0xff \(.*\) at byte 7, line 2"),
        ("a.txt", "text".encode("utf-16-le"), r"found a NUL at byte 1, line 1; convert it"),
        ("a.jsonl", b'{"text": 3}', r"expected a text field 'text', found 3 of type int"),
        ("a.jsonl", b'[{"text": "x"}]', r"expected a text field 'text', found list"),
    ],
)
def test_18_files_that_are_no_text_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read(tmp_path / name, tmp_path / "out")


def test_18_a_folder_instead_of_files_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"expected text files, found a folder; give '.*/\*\.txt'"):
        read(tmp_path, tmp_path / "out")


# --- rows of tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl: expected UTF-8 text, found 0xff \(.*\) at byte 16, line 2"),
        (b'{"a": 1}\n{"a": "\0"}\n', r"found a NUL at byte 16, line 2"),
        (b'{"a": [1, {"b": 2}]}', r"row 0: expected 'a' of one type in all rows, found \[1, "),
    ],
)
def test_18_rows_that_are_no_text_or_table(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memdec.tasks import rows

    (tmp_path / "a.jsonl").write_bytes(content)
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=message):
        rows.load("t", "a.jsonl")


def test_18_a_field_that_the_first_row_lacks_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memdec.tasks import rows

    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2, "gold": 3}\n')
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    assert rows.load("t", "a.jsonl").rows["gold"] == [None, 3]


def test_18_a_field_option_tokens_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memdec.tasks import domain

    byte_level(add_prefix_space=False).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "usmle").mkdir()
    row = {"input": "A question?", "options": ["a", "bc"], "gold_index": 1, "option_tokens": "mine"}
    (tmp_path / "usmle" / "adaptllm_schema.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    names = {"adaptllm_config": "USMLE", "adaptllm_path": "x", "adaptllm_revision": "y"}
    found = domain.load_choices(**names, pretrained=str(tmp_path / "tokenizer"))["test"].rows
    assert all(isinstance(n, int) for n in found["option_tokens"][0])


def test_18_a_label_true_is_not_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memdec.tasks import dcpmi_rows

    (tmp_path / "mr").mkdir()
    (tmp_path / "mr" / "test.jsonl").write_text('{"text": "good", "label": true}')
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=r"row 0: expected 'label' of type int or str, found True"):
        dcpmi_rows.load_rows(set="mr", paper_rows=1)


def test_2_a_data_set_in_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    """Another text of the same size and time behind the same path makes the corpus again, from the other text."""
    (tmp_path / "set").mkdir()
    for name in ("train", "validation", "test"):
        rows = [f"{name} {part}" for part in made_text(40, 6).split("\n\n")]
        (tmp_path / "set" / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n")
    spec = HubCorpus(source="hub", path=str(tmp_path / "set"), separator="none")
    corpora.run(spec, tmp_path / "out")
    first = artefact.read(tmp_path / "out", "corpus")
    file = tmp_path / "set" / "test.jsonl"
    time = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("matrix", "xirtam"))
    os.utime(file, ns=(time, time))
    corpora.run(spec, tmp_path / "out")
    again = artefact.read(tmp_path / "out", "corpus")
    assert again.recipe != first.recipe
    assert again.facts["sha256"] != first.facts["sha256"]
    assert "xirtam" in "".join(corpora.load(tmp_path / "out", "test"))

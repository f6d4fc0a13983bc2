"""Faults found in corpora, token streams and task rows: each test fails on the code before its fix."""

import gzip
import json
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
from memdec.settings import SPLITS, FileCorpus, TokenizerSpec
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


def bpe(n_merges: int = 60) -> Tokenizer:
    """A character BPE of a few merges that may cross spaces."""
    from tokenizers import trainers

    found = Tokenizer(backends.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", EOS], show_progress=False)
    found.train_from_iterator([text.replace(" ", "▁") for text in texts(60)], trainer)
    return found


def unigram() -> Tokenizer:
    pieces = sorted({word for text in texts(40) for word in text.replace(" ", "▁").split("▁")} | set("".join(texts(40))))
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
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
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

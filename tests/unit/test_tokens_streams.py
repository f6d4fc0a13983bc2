"""Streams without separator, fingerprints, and what a tokenizer depends on (the joined text is in test_tokens.py)."""

from pathlib import Path

import numpy as np
import pytest
from making import made_text

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, ConfigError, ModelError
from memdec.settings import FileCorpus, TokenizerSpec
from memdec.text import corpora, tokens


def made_corpus(folder: Path, seed: int, **changes: object) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text(made_text(100, seed))
    plain = {"source": "files", "path": str(folder / "text.txt"), "min_bytes": 10}
    corpora.run(FileCorpus.model_validate(plain | changes), folder / "made")
    return folder / "made"


def test_without_separator_documents_follow_each_other(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = made_corpus(tmp_path / "c", 1, separator="none")
    tokens.run_tokens(tokenizer_folder, corpus, tmp_path / "s")
    tokenizer = tokens.load_tokenizer(str(tokenizer_folder))
    expected = tokenizer.encode("".join(corpora.load(corpus, "train")), add_special_tokens=False)
    stream = tokens.load_stream(tmp_path / "s", "train")
    assert stream.tolist() == expected
    assert tokenizer.eos_token_id not in stream


def test_the_stream_is_written_narrow_hashed_and_mapped(token_folder: Path, tokenizer_folder: Path) -> None:
    facts = artefact.read(token_folder, "tokens").facts
    stream = tokens.load_stream(token_folder, "train")
    assert isinstance(stream, np.memmap)
    assert stream.dtype == facts["dtype"] == "uint16" == str(np.min_scalar_type(299))
    assert facts["sha256"]["train"] == artefact.file_digest(token_folder / "train.npy")
    assert facts["tokenizer_sha256"] == artefact.read(tokenizer_folder, "tokenizer").facts["sha256"]


def test_a_vocabulary_with_gaps_keeps_its_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The type follows from the largest id, not from the number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    corpus = made_corpus(tmp_path / "c", 1)
    backend = Tokenizer(models.WordLevel({"?": 0, "</s>": 300}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    words.save_pretrained(tmp_path / "gaps")
    tokens.run_tokenizer(TokenizerSpec(pretrained=str(tmp_path / "gaps")), tmp_path / "t")
    tokens.run_tokens(tmp_path / "t", corpus, tmp_path / "s")
    assert set(tokens.load_stream(tmp_path / "s", "train").tolist()) == {0, 300}
    monkeypatch.setattr(tokens, "n_ids", lambda _: 2)
    with pytest.raises(
        ModelError, match="expected ids below 2, the largest of the vocabulary, found 300 in the train split"
    ):
        tokens.run_tokens(tmp_path / "t", corpus, tmp_path / "x")


def test_a_saved_and_reloaded_tokenizer_has_the_same_fingerprint(tokenizer_folder: Path, tmp_path: Path) -> None:
    one = tokens.load_tokenizer(str(tokenizer_folder))
    one.save_pretrained(tmp_path)
    other = tokens.load_tokenizer(str(tmp_path))
    tokens.check_same(tokens.fingerprint(one), tokens.fingerprint(other), "here")
    other.add_tokens(["<extra>"])
    with pytest.raises(ArtifactError, match="here: expected one tokenizer, found two"):
        tokens.check_same(tokens.fingerprint(one), tokens.fingerprint(other), "here")


@pytest.mark.parametrize("offline", [False, True])
def test_a_saved_tokenizer_does_not_say_whether_the_hub_could_be_asked(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """Otherwise the same training makes a folder of other content with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    tokens.load_tokenizer(str(tokenizer_folder)).save_pretrained(tmp_path)
    assert "local_files_only" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")


def test_a_folder_per_corpus_and_of_the_right_kind(corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    spec = TokenizerSpec(train_on=["a", "b"], vocab_size=300)
    with pytest.raises(ConfigError, match="expected 2 corpus folders"):
        tokens.run_tokenizer(spec, tmp_path / "t", [corpus_folder])
    with pytest.raises(ArtifactError, match="expected a corpus artefact, found one of kind tokenizer"):
        tokens.run_tokens(tokenizer_folder, tokenizer_folder, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_tokenizer_depends_on_all_its_corpora(tmp_path: Path) -> None:
    first, second, changed = (made_corpus(tmp_path / name, seed) for seed, name in enumerate("abc"))
    spec = TokenizerSpec(train_on=["a", "b"], vocab_size=300)
    recipes = []
    for corpus in (first, changed):
        tokens.run_tokenizer(spec, tmp_path / "t", [corpus, second])
        recipes.append(artefact.read(tmp_path / "t", "tokenizer").recipe)
    assert recipes[0] != recipes[1]

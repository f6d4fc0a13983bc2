"""Tokenizers and token streams."""

from pathlib import Path

import numpy as np
import pytest

from memdec.artefacts import artefact
from memdec.errors import CorpusError, ModelError
from memdec.settings import TokenizerSpec
from memdec.text import corpora, tokens


def test_the_stream_is_what_the_tokenizer_makes_of_the_joined_text(
    corpus_folder: Path, tokenizer_folder: Path, token_folder: Path
) -> None:
    tokenizer = tokens.load_tokenizer(str(tokenizer_folder))
    for split in ("train", "valid", "test"):
        text = corpora.joined(corpora.load(corpus_folder, split), "eos", tokenizer.eos_token)  # type: ignore[arg-type]
        stream = tokens.load_stream(token_folder, split)  # type: ignore[arg-type]
        assert tokenizer.encode(text, add_special_tokens=False) == stream.tolist()
        assert stream.dtype == np.uint16
        assert artefact.read(token_folder, "tokens").facts["tokens"][split] == len(stream)


def test_a_qwen2_folder_tokenizes_as_the_others(tokenizer_folder: Path, tmp_path: Path) -> None:
    """transformers 5 rebuilds the pre-tokenizer from the model class; with a GPT-2 split this folder would differ."""
    tokenizer = tokens.load_tokenizer(str(tokenizer_folder))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    other = tokens.load_tokenizer(str(tmp_path))
    assert tokens.fingerprint(other) == tokens.fingerprint(tokenizer)
    text = "def f(x):\n\n    return  3.14 + ünï\n<|endoftext|>x"
    assert other.encode(text) == tokenizer.encode(text)


def test_fingerprints_differ_where_ids_do(corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=299), tmp_path / "t", [corpus_folder])
    one, other = (tokens.fingerprint(tokens.load_tokenizer(str(p))) for p in (tokenizer_folder, tmp_path / "t"))
    assert one != other


def test_too_little_text_and_no_tokenizer(corpus_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="lower vocab_size"):
        tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=9000), tmp_path / "t", [corpus_folder])
    with pytest.raises(ModelError, match="expected a tokenizer folder or Hub id"):
        tokens.load_tokenizer(str(tmp_path))


def test_tokenizers_of_one_vocabulary_in_other_files_are_one(tokenizer_folder: Path) -> None:
    """An extra special token and an unused normaliser change the fingerprint, not the ids of any text."""
    one, other = (tokens.load_tokenizer(str(tokenizer_folder)) for _ in range(2))
    other.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert tokens.fingerprint(one) != tokens.fingerprint(other)
    tokens.check_same_ids(one, other, "here")
    tokens.check_same_ids(other, one, "here")


def test_tokenizers_that_name_a_control_token_differently_are_one(tokenizer_folder: Path) -> None:
    """As Llama 3 and 3.1: `<|reserved_special_token_2|>` of one is `<|finetune_right_pad_id|>` of the other."""
    one, other = (tokens.load_tokenizer(str(tokenizer_folder)) for _ in range(2))
    one.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    other.add_special_tokens({"additional_special_tokens": ["<|right_pad|>"]})
    assert one.get_vocab()["<|reserved_0|>"] == other.get_vocab()["<|right_pad|>"]
    tokens.check_same_ids(one, other, "here")
    tokens.check_same_ids(other, one, "here")


def test_the_same_vocabulary_with_another_split_is_another_tokenizer(tokenizer_folder: Path) -> None:
    from tokenizers import pre_tokenizers

    one, other = (tokens.load_tokenizer(str(tokenizer_folder)) for _ in range(2))
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert one.get_vocab() == other.get_vocab()
    with pytest.raises(ModelError, match=r"^here: expected one tokenizer, found two: .* has the ids .* adapt-vocab"):
        tokens.check_same_ids(one, other, "here")


def test_a_word_with_another_id_is_named(tokenizer_folder: Path) -> None:
    one, other = (tokens.load_tokenizer(str(tokenizer_folder)) for _ in range(2))
    other.add_tokens(["The matrix"])  # no special token: it changes how text is split
    assert len(other) == len(one) + 1
    with pytest.raises(ModelError, match="'The matrix' has the ids"):
        tokens.check_same_ids(one, other, "here")

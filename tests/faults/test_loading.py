"""Faults of loading: weights that are missing, models known by their path, code of a repository, generation settings."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from making import CONTEXT, made_text
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Model
from transformers.utils import logging as transformers_logging

from memdec.artefacts import artefact, sources
from memdec.datastore import keys, teacher
from memdec.errors import ArtifactError, ModelError
from memdec.harness.baselines import of_system
from memdec.harness.models import MemDecInterp
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.models import checkpoints, loading
from memdec.settings import (
    AdaptSettings,
    DatastoreSettings,
    EvaluateSettings,
    LoraSettings,
    MemorySettings,
    ModelSpec,
    TeacherSettings,
    TokenizerSpec,
    TrainSettings,
)
from memdec.text import tokens
from memdec.training import adapt_vocab, stages

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
SHORT = TrainSettings(epochs=0.02, learning_rate=1e-3)
IDS = torch.tensor([[5, 80, 200, 31, 7, 258, 99]])
EMBEDDING, PROJECTION = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"


def plain(folder: Path, to: Path) -> Path:
    """A copy of a model folder as the Hub would give it: without our manifest and mark."""
    shutil.copytree(folder, to)
    for name in (artefact.MANIFEST, artefact.MARK, artefact.LOCK):
        (to / name).unlink(missing_ok=True)
    return to


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change the weights of a folder."""
    file = next(iter(folder.glob("*model.safetensors")))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return folder


def said(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """Change a JSON file of a folder."""
    file = folder / name
    there = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**there, **changes}))
    return folder


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{PROJECTION}s"] = weights.pop(PROJECTION)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS.to(model.device)).logits.float().log_softmax(-1)
    return found


def score(model: Any) -> float:
    request = Instance("loglikelihood", {}, ("The matrix", " returns the window"), 0)
    return float(model.loglikelihood([request], disable_tqdm=True)[0][0])


def ours(base: object, **given: Any) -> MemDecInterp:
    return MemDecInterp(pretrained=str(base), **{"device": "cpu", "dtype": "float32", **given})


# --- weights that are missing, left over or of another shape --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda weights: weights.pop(PROJECTION), {}, f"1 missing .{PROJECTION}"),
        (lambda weights: weights.pop(EMBEDDING), {}, f"missing .*{EMBEDDING}"),
        (rename, {}, f"1 missing .{PROJECTION}.*1 left over .{PROJECTION}s"),
        (lambda weights: None, {"n_layer": 1}, r"11 left over .transformer.h.1.attn.c_attn.weight, .* \.\.\."),
        (lambda weights: None, {"n_layer": 3}, r"12 missing .*transformer.h.2.attn.c_attn.bias"),
        (lambda weights: None, {"vocab_size": 310}, r"wte.weight \[300, 24\] instead of \[310, 24\]"),
        (
            lambda weights: weights.update({PROJECTION: weights[PROJECTION][:, :7].clone()}),
            {},
            rf"1 of another shape .{PROJECTION} \[24, 7\] instead of \[24, 96\]",
        ),
    ],
    ids=["removed", "no embedding", "renamed", "fewer layers", "more layers", "more tokens", "cut"],
)
def test_a_weight_is_never_filled_in(
    change: Any, config: dict[str, Any], message: str, base_folder: Path, tmp_path: Path
) -> None:
    folder = said(edited(plain(base_folder, tmp_path / "m"), change), **config)
    with pytest.raises(ModelError, match=message):
        loading.load(folder)


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_weights_of_integers_are_refused(kind: torch.dtype, base_folder: Path, tmp_path: Path) -> None:
    folder = edited(
        plain(base_folder, tmp_path / "m"), lambda weights: weights.update({PROJECTION: weights[PROJECTION].to(kind)})
    )
    with pytest.raises(ModelError, match=f"found 1 as others .{PROJECTION} [IUB]"):
        loading.load(folder)


def test_other_types_and_a_head_of_its_own_are_taken(base_folder: Path, tmp_path: Path) -> None:
    """A head that differs from the embedding counts, even if config.json says that they are one."""
    half = edited(
        plain(base_folder, tmp_path / "half"), lambda weights: weights.update({PROJECTION: weights[PROJECTION].half()})
    )
    torch.testing.assert_close(logits(loading.load(half)), logits(loading.load(base_folder)), atol=1e-2, rtol=1e-2)
    own = plain(base_folder, tmp_path / "own")
    edited(own, lambda weights: weights.update({"lm_head.weight": 2 * weights[EMBEDDING]}))
    apart = said(shutil.copytree(own, tmp_path / "apart"), tie_word_embeddings=False)
    assert torch.equal(logits(loading.load(own)), logits(loading.load(apart)))


@pytest.fixture(scope="module")
def broken(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without one tensor."""
    return edited(plain(base_folder, tmp_path_factory.mktemp("broken") / "m"), lambda weights: weights.pop(PROJECTION))


@pytest.mark.parametrize(
    "use",
    [
        lambda bad, good, stream, out: score(ours(bad)),
        lambda bad, good, stream, out: score(ours(good, memory=str(bad), alpha=0.5)),
        lambda bad, good, stream, out: score(ours(good, delta=str(bad))),
        lambda bad, good, stream, out: SYSTEMS["MemDec"].build(Parts(base=good, memory=bad)),
        lambda bad, good, stream, out: MemDecForCausalLM.from_parts(bad, [good], [0.5]),
        lambda bad, good, stream, out: MemDecForCausalLM.from_parts(good, [bad], [0.5]),
        lambda bad, good, stream, out: stages.run_finetune(bad, stream, out, SHORT, context=CONTEXT, seed=0),
        lambda bad, good, stream, out: stages.run_lora(
            bad, stream, out, LoraSettings(rank=2, epochs=0.02), context=CONTEXT, seed=0
        ),
        lambda bad, good, stream, out: stages.run_train(
            bad, stream, [], out, MemorySettings(objective="ce", epochs=0.02), context=CONTEXT, seed=0
        ),
        lambda bad, good, stream, out: keys.run(bad, stream, out, DatastoreSettings(), context=CONTEXT, stride=16),
    ],
    ids=["base", "memory", "delta", "system", "part 0", "part 1", "finetune", "lora", "train", "keys"],
)
def test_no_stage_and_no_model_takes_half_the_weights(
    use: Any, broken: Path, small_folder: Path, base_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    good = base_folder
    with pytest.raises(ModelError, match=f"1 missing .{PROJECTION}"):
        use(broken, good, short_tokens, tmp_path / "out")


def test_a_saved_mixture_without_a_weight_is_refused(base_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    MemDecForCausalLM.from_parts(base_folder, [small_folder], [0.5]).save_pretrained(tmp_path / "mix")
    edited(tmp_path / "mix" / "memory-0", lambda weights: weights.pop(PROJECTION))
    with pytest.raises(ModelError, match=f"1 missing .{PROJECTION}"):
        MemDecForCausalLM.from_pretrained(tmp_path / "mix")


def sharded(folder: Path, to: Path) -> Path:
    loading.load(folder).save_pretrained(to, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    assert len(list(to.glob("model-*.safetensors"))) > 1
    return to


def test_a_sharded_checkpoint_is_read_and_linked(base_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    parts = sharded(base_folder, tmp_path / "parts")
    loading.run_pretrained(
        ModelSpec(family="t", tokenizer="t", pretrained=str(parts)), tokenizer_folder, tmp_path / "linked"
    )
    for folder in (parts, tmp_path / "linked"):
        assert torch.equal(logits(loading.load(folder)), logits(loading.load(base_folder)))
    index = parts / "model.safetensors.index.json"
    there = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**there["weight_map"], "gone": there["weight_map"][EMBEDDING]}}))
    with pytest.raises(ModelError, match=r"found 1 that are not \(gone\)"):
        loading.load(parts)
    index.write_text(json.dumps(there))
    (parts / there["weight_map"][EMBEDDING]).unlink()
    with pytest.raises(ModelError, match="expected a whole safetensors file"):
        loading.load(parts)


def test_what_a_family_need_not_save_is_not_missing(base_folder: Path, tmp_path: Path) -> None:
    """A checkpoint of the model without its head, with old causal masks in it, is whole: the head is the embedding."""
    folder = plain(base_folder, tmp_path / "m")
    GPT2Model.from_pretrained(base_folder).save_pretrained(folder)
    assert "wte.weight" in load_file(folder / "model.safetensors")
    edited(
        folder, lambda weights: weights.update({"h.0.attn.bias": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)})
    )
    assert torch.equal(logits(loading.load(folder)), logits(loading.load(base_folder)))
    said(folder, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"1 missing .lm_head.weight"):
        loading.load(folder)


@pytest.fixture(scope="module")
def lora(base_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "lora"
    settings = LoraSettings(rank=2, epochs=0.02, learning_rate=1e-2)
    stages.run_lora(base_folder, short_tokens, out, settings, context=CONTEXT, seed=0)
    return out


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


def rename_first(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"] = weights[FIRST].clone()


@pytest.mark.parametrize("through", ["peft", "LoRA"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(FIRST), "1 missing .*h.0.attn.c_attn.lora_A"),
        (rename_first, "1 left over .*h.7.attn.c_attn.lora_A"),
        (lambda weights: weights.update({FIRST: weights[FIRST][:, :16].clone()}), "size mismatch|shape"),
    ],
    ids=["removed", "of a deeper base", "of another width"],
)
def test_an_adapter_is_whole_and_of_this_base(
    change: Any, message: str, through: str, base_folder: Path, lora: Path, tmp_path: Path
) -> None:
    adapter = edited(plain(lora, tmp_path / "lora"), change)
    uses: dict[str, Callable[[], Any]] = {
        "peft": lambda: score(ours(base_folder, peft=str(adapter))),
        "LoRA": lambda: SYSTEMS["LoRA"].build(Parts(base=base_folder, lora=adapter)),
    }
    with pytest.raises(ModelError, match=message):
        uses[through]()


def test_the_head_of_every_model_gives_float32_logits_on_a_gpu(
    base_folder: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the harness and over several GPUs, too: with rounded logits a base looks worse than it is."""
    calls = []
    monkeypatch.setattr(
        loading._Head, "forward", lambda self, x: calls.append(1) or torch.nn.functional.linear(x, self.weight)
    )
    request = Instance("loglikelihood", {}, ("Returns", " the"), 0, ("task", 0, 1))
    for words in ({}, {"peft": str(lora)}):
        calls.clear()
        MemDecInterp(pretrained=str(base_folder), device="cpu", **words).loglikelihood([request])
        assert calls
    model = loading.load(base_folder)
    head = add_hook_to_module(torch.nn.Linear(4, 9), AlignDevicesHook("cpu"))  # as accelerate spreads a model
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", lambda *_, **__: (model, {}))
    monkeypatch.setattr(checkpoints, "check_report", lambda *_: None)
    loading.from_pretrained(GPT2LMHeadModel, base_folder)
    calls.clear()
    head(torch.zeros(1, 4))
    assert calls


def test_loading_changes_no_verbosity(base_folder: Path) -> None:
    level = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_info()
        tokens.load_tokenizer(str(base_folder))
        loading.load(base_folder)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity(level)


# --- a model is known by its content --------------------------------------------------------------------------------


def bent(folder: Path, seed: int, *, pickled: bool = False) -> Path:
    """The same architecture with other weights, of equal size on disk."""
    generator = torch.Generator().manual_seed(seed)

    def change(weights: dict[str, torch.Tensor]) -> None:
        for value in weights.values():
            value += 0.3 * torch.randn(value.shape, generator=generator)

    edited(folder, change)
    if pickled:
        file = folder / "model.safetensors"
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    return folder


def test_two_bases_with_pytorch_bin_have_their_own_scores(
    base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    found = {}
    for seed in (1, 2):
        folder = bent(plain(base_folder, tmp_path / str(seed)), seed, pickled=True)
        model = ours(folder, memory=str(small_folder), alpha=0.0, scores=str(tmp_path / "scores"))
        found[seed] = score(model)
        assert found[seed] == pytest.approx(
            score(HFLM(pretrained=str(folder), device="cpu", dtype="float32")), abs=1e-4
        )
    assert abs(found[1] - found[2]) > 0.1


@pytest.mark.parametrize("part", ["peft", "delta"])
def test_two_adapters_or_deltas_with_bin_have_their_own_scores(
    part: str, base_folder: Path, lora: Path, tmp_path: Path
) -> None:
    found = {}
    for seed in (1, 2):
        folder = plain(lora if part == "peft" else base_folder, tmp_path / str(seed))
        bent(folder, seed)
        safe = next(iter(folder.glob("*model.safetensors")))
        name = "adapter_model.bin" if part == "peft" else "pytorch_model.bin"
        torch.save(load_file(safe), folder / name)
        safe.unlink()
        found[seed] = score(ours(base_folder, scores=str(tmp_path / "scores"), **{part: str(folder)}))
        hf = HFLM(pretrained=str(base_folder), device="cpu", dtype="float32", **{part: str(folder)})
        assert found[seed] == pytest.approx(score(hf), abs=1e-4)
    assert abs(found[1] - found[2]) > 0.1


def test_every_file_that_decides_a_number_counts(tmp_path: Path) -> None:
    names = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "a.bin", "a.pt"]
    names += ["config.json", "generation_config.json", "tokenizer.json", "spiece.model", "merges.txt", "vocab.txt"]
    names += ["modeling_x.py", "adapter_model.bin", "a.gguf", "chat_template.jinja", "qwen.tiktoken"]
    (tmp_path / "m").mkdir()
    seen = {sources.identity(tmp_path / "m")}
    for name in names:
        for text in ("a", "b"):  # of equal size
            (tmp_path / "m" / name).write_text(text)
            seen.add(sources.identity(tmp_path / "m"))
    assert len(seen) == 1 + 2 * len(names)
    (tmp_path / "m" / "README.md").write_text("says nothing")
    moved = shutil.copytree(tmp_path / "m", tmp_path / "moved")
    assert sources.identity(moved) == sources.identity(tmp_path / "m") in seen
    assert sources.identity(moved, weights=False) != sources.identity(moved)


def test_a_mixture_by_reference_is_known_by_the_content_of_subfolders(
    base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_folder, tmp_path / "repository" / "inner")
    made = MemDecForCausalLM.from_parts(tmp_path / "repository", [small_folder], [0.5], subfolder="inner")
    made.save_pretrained(tmp_path / "mixture", by_reference=True)
    before = sources.identity(tmp_path / "mixture")
    bent(tmp_path / "repository" / "inner", 1)
    assert sources.identity(tmp_path / "mixture") != before


def test_a_hub_id_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (refs / "main").write_text(commit)
        assert sources.identity("some/model") == f"some/model@{commit}"
    assert sources.identity("some/model", "c" * 40) == f"some/model@{'c' * 40}"
    with pytest.raises(ModelError, match="whose commit of revision v2 is on the Hub or in the cache"):
        sources.identity("some/model", "v2")
    with pytest.raises(ModelError, match="no name of a repository"):
        sources.identity("no/such/folder")


def test_replaced_weights_behind_a_link_are_noticed(
    base_folder: Path, tokenizer_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    """The recipe of `memdec model` is that of the content, and every later stage notices another content."""
    source = plain(base_folder, tmp_path / "source")
    spec = ModelSpec(family="t", tokenizer="t", pretrained=str(source))

    def made() -> artefact.Manifest:
        loading.run_pretrained(spec, tokenizer_folder, tmp_path / "linked")
        return artefact.read(tmp_path / "linked", "model", whole=True)

    first = made().recipe
    size = (source / "model.safetensors").stat().st_size
    bent(source, 1)
    assert (source / "model.safetensors").stat().st_size == size
    with pytest.raises(ArtifactError, match=r"model.safetensors: expected the content that was written"):
        stages.run_finetune(tmp_path / "linked", short_tokens, tmp_path / "f", SHORT, context=CONTEXT, seed=0)
    with pytest.raises(ArtifactError, match=r"model.safetensors: expected the content that was written"):
        loading.load(tmp_path / "linked")
    assert made().recipe != first
    moved = plain(base_folder, tmp_path / "elsewhere")
    loading.run_pretrained(spec.model_copy(update={"pretrained": str(moved)}), tokenizer_folder, tmp_path / "other")
    assert artefact.read(tmp_path / "other", "model").recipe == first


@pytest.mark.slow
def test_snakemake_notices_a_replaced_source(base_folder: Path, tmp_path: Path) -> None:
    source = plain(base_folder, tmp_path / "source")
    entry = f"{{family: t, tokenizer: bpe, pretrained: {source}}}"
    (tmp_path / "text.txt").write_text(made_text(250, 0))
    (tmp_path / "my.yaml").write_text(
        f"""
scale: tiny
seeds: [0]
context: {CONTEXT}
stride: 16
tokenizers:
  bpe: {{pretrained: {source}}}
corpora:
  made: {{source: files, path: {tmp_path}/text.txt, min_bytes: 200}}
models:
  g: {entry}
domains: [made]
key_model: g
memory_model: g
"""
    )
    root = Path(loading.__file__).parents[2]
    target, corpus = "results/tiny/models/g/manifest.json", "results/tiny/corpora/made/manifest.json"

    def snakemake(*options: str) -> str:
        command = [sys.executable, "-m", "snakemake", "-s", str(root / "Snakefile"), "--directory", str(tmp_path)]
        command += ["--cores", "1", "--configfile", str(tmp_path / "my.yaml"), *options, "--", target, corpus]
        where = {**os.environ, "PYTHONPATH": str(root), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=where)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    snakemake()
    first = artefact.read(tmp_path / target.removesuffix("/manifest.json"), "model").recipe
    assert "Nothing to be done" in snakemake("-n")
    bent(source, 1)
    texts = artefact.read(tmp_path / corpus.removesuffix("/manifest.json"), "corpus").facts["sha256"]
    (tmp_path / "text.txt").write_text(made_text(250, 1))
    snakemake()
    assert artefact.read(tmp_path / target.removesuffix("/manifest.json"), "model").recipe != first
    assert artefact.read(tmp_path / corpus.removesuffix("/manifest.json"), "corpus").facts["sha256"] != texts
    assert "Nothing to be done" in snakemake("-n")


def test_a_tokenizer_is_known_by_its_content(base_folder: Path, tmp_path: Path) -> None:
    source = plain(base_folder, tmp_path / "source")
    spec = TokenizerSpec(pretrained=str(source))

    def made() -> str:
        tokens.run_tokenizer(spec, tmp_path / "words")
        return artefact.read(tmp_path / "words", "tokenizer").recipe

    first = made()
    bent(source, 1)
    assert made() == first  # weights decide no token
    words = AutoTokenizer.from_pretrained(source)
    words.add_tokens(["window"])
    words.save_pretrained(source)
    assert made() != first
    assert len(AutoTokenizer.from_pretrained(tmp_path / "words")) == 301


def test_the_store_tells_tokenizers_given_by_path_apart(base_folder: Path, tmp_path: Path) -> None:
    words = plain(base_folder, tmp_path / "words")
    (words / "model.safetensors").unlink()
    stores = []
    for bos in ("The", "<|endoftext|>"):
        said(words, "tokenizer_config.json", bos_token=bos)
        stores.append(ours(base_folder, tokenizer=str(words), scores=str(tmp_path / "s")).store)
    assert stores[0] is not None
    assert stores[1] is not None
    assert stores[0].folder != stores[1].folder


# --- both sides of a comparison -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with 20 rows more in its head than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("padded") / "m"
    model = loading.load(base_folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


def test_a_zero_adapter_gives_the_numbers_of_the_base(padded: Path, lora: Path, tmp_path: Path) -> None:
    def zero(weights: dict[str, torch.Tensor]) -> None:
        for value in weights.values():
            value.zero_()

    adapter = edited(plain(lora, tmp_path / "lora"), zero)
    base = score(HFLM(pretrained=str(padded), device="cpu", dtype="float32"))
    assert score(ours(padded)) == pytest.approx(base, abs=1e-5)
    assert score(ours(padded, peft=str(adapter))) == pytest.approx(base, abs=1e-5)
    built = [SYSTEMS[name].build(Parts(base=padded, lora=adapter)) for name in ("base", "LoRA")]
    assert torch.equal(logits(built[0]), logits(built[1]))
    assert logits(built[0]).shape[-1] == 320
    assert score(of_system("LoRA", Parts(base=padded, lora=adapter))) == pytest.approx(base, abs=1e-5)


def test_an_adapter_with_its_own_embedding_brings_its_vocabulary(base_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = loading.load(base_folder)
    model.resize_token_embeddings(305, mean_resizing=False)
    given = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    trained = get_peft_model(model, given)
    trained.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    found = loading.adapted(loading.load(base_folder), tmp_path / "lora")
    assert torch.equal(logits(found), logits(trained))
    assert found.get_output_embeddings().weight.shape[0] == 305


def test_a_memory_with_a_shorter_head_leaves_the_base_as_it_is(padded: Path, small_folder: Path) -> None:
    """Padding rows of the base belong to its distribution with and without a memory; p_mem has none there."""
    alone = score(HFLM(pretrained=str(padded), device="cpu", dtype="float32"))
    assert score(ours(padded, memory=str(small_folder), alpha=0.0)) == pytest.approx(alone, abs=1e-5)
    mixed = MemDecForCausalLM.from_parts(padded, [small_folder], [0.4])
    base, memory = (logits(loading.load(folder)).exp() for folder in (padded, small_folder))
    expected = 0.6 * base + 0.4 * torch.nn.functional.pad(memory, (0, 20))
    torch.testing.assert_close(logits(mixed).exp(), expected, atol=1e-6, rtol=1e-4)
    both = mixed.log_probs(IDS)
    assert both[0] is not None
    assert both[1] is not None
    torch.testing.assert_close(both[0].exp(), base, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(both[1].exp()[..., :300], memory, atol=1e-6, rtol=1e-4)
    assert float(both[1][..., 300:].max()) == -float("inf")


# --- code of a repository -------------------------------------------------------------------------------------------

CODE = """
from transformers import GPT2Config, GPT2LMHeadModel
class OwnConfig(GPT2Config):
    model_type = "own_gpt2"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def coded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a model of a repository with its own code."""
    folder = plain(base_folder, tmp_path_factory.mktemp("coded") / "m")
    (folder / "modeling_own.py").write_text(CODE)
    places = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    return said(folder, model_type="own_gpt2", architectures=["OwnModel"], auto_map=places)


@pytest.mark.parametrize(
    "use",
    [
        loading.load,
        loading.config,
        loading.on_meta,
        lambda coded: ours(coded),
        lambda coded: MemDecForCausalLM.from_parts(coded, [], []),
        lambda coded: MemDecForCausalLM.from_parts(coded.parent / "base", [coded], [0.5]),
        lambda coded: ours(coded.parent / "base", memory=str(coded), alpha=0.5),
        lambda coded: ours(coded, trust_remote_code=None),
    ],
    ids=["load", "config", "on_meta", "base", "from_parts", "memory part", "memory", "no value"],
)
def test_code_of_a_repository_never_runs_unasked(
    use: Any, coded: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (coded.parent / "base").exists():
        plain(base_folder, coded.parent / "base")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked interactively"))
    with pytest.raises(
        ModelError, match=r"code that must run to read them; read that code.*trust_remote_code=True"
    ) as raised:
        use(coded)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("hub_modules")
def test_code_runs_for_base_and_memory_where_it_is_trusted(coded: Path, base_folder: Path) -> None:
    model = loading.load(coded, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert torch.equal(logits(model), logits(loading.load(base_folder)))
    mixed = ours(base_folder, memory=str(coded), alpha=0.5, trust_remote_code=True)
    assert score(mixed) == pytest.approx(score(ours(base_folder)), abs=1e-4)


@pytest.fixture
def hub_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of a repository is copied here, not into the home of the user."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


# --- generation settings --------------------------------------------------------------------------------------------

SETTINGS = {"bos_token_id": 0, "eos_token_id": [0, 7], "repetition_penalty": 1.3, "max_length": 64}


@pytest.mark.parametrize(
    "bad",
    [{"temperature": 0.9, "top_p": 0.6}, {"num_return_sequences": 3}, {"length_penalty": 2.0, "early_stopping": "no"}],
    ids=["sampling", "several", "beams"],
)
def test_bad_generation_settings_are_left_out_and_the_model_can_be_saved(
    bad: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    folder = plain(base_folder, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({**SETTINGS, **bad}))
    with pytest.warns(UserWarning, match="left out what is not valid there: .*" + next(iter(bad))):
        model = loading.load(folder)
    for key, value in SETTINGS.items():
        assert getattr(model.generation_config, key) == value
    model.generation_config.pad_token_id = 3
    model.save_pretrained(tmp_path / "saved")
    assert not set(bad) & set(json.loads((tmp_path / "saved" / "generation_config.json").read_text()))


@pytest.mark.filterwarnings("ignore:.*left out what is not valid there")
def test_no_training_is_lost_to_generation_settings(
    base_folder: Path, tokenizer_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    folder = plain(base_folder, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({**SETTINGS, "temperature": 0.9, "top_p": 0.6}))
    at: dict[str, Any] = {"context": CONTEXT, "seed": 0}
    stages.run_finetune(folder, short_tokens, tmp_path / "finetuned", SHORT, **at)
    ce = MemorySettings(objective="ce", epochs=0.02)
    stages.run_train(folder, short_tokens, [], tmp_path / "memory", ce, **at)
    stages.run_lora(folder, short_tokens, tmp_path / "lora", LoraSettings(rank=2, epochs=0.02), **at)
    adapt_vocab.run(folder, tokenizer_folder, tmp_path / "adapted", AdaptSettings(), seed=0)
    cut = ModelSpec(family="t", tokenizer="t", pretrained=str(folder), layers=1)
    loading.run_pretrained(cut, tokenizer_folder, tmp_path / "cut")
    MemDecForCausalLM.from_parts(folder, [folder], [0.5]).save_pretrained(tmp_path / "mixture")
    for name in ("finetuned", "memory", "adapted", "cut", "mixture/base"):
        there = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert there["repetition_penalty"] == 1.3
        assert "temperature" not in there


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ([], r"expected weights in model.safetensors or model.safetensors.index.json, found none"),
        (["pytorch_model.bin"], r"found pytorch_model.bin; load it with transformers and save it again"),
        (["model.safetensors"], r"model.safetensors: expected a whole safetensors file, found: .*; get it again"),
    ],
    ids=["none", "pickled", "cut"],
)
def test_a_folder_without_weights_that_can_be_read_is_refused(
    left: list[str], message: str, base_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = plain(base_folder, tmp_path / "m")
    cut = (folder / "model.safetensors").read_bytes()[:100]
    (folder / "model.safetensors").unlink()
    for name in left:
        (folder / name).write_bytes(cut)
    spec = ModelSpec(family="t", tokenizer="t", pretrained=str(folder))
    with pytest.raises(ModelError, match=message):
        loading.run_pretrained(spec, tokenizer_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=message):
        loading.load(folder)


def test_an_adapter_beside_a_model_is_refused(base_folder: Path, lora: Path, tmp_path: Path) -> None:
    folder = plain(base_folder, tmp_path / "m")
    shutil.copy(lora / "adapter_config.json", folder)
    with pytest.raises(ModelError, match=r"found a peft adapter beside its config.json"):
        loading.load(folder)


def test_a_plain_folder_is_taken_where_a_model_folder_is(
    base_folder: Path,
    small_folder: Path,
    tokenizer_folder: Path,
    corpus_folder: Path,
    token_folder: Path,
    tmp_path: Path,
) -> None:
    from memdec.results import evaluate

    base, small = plain(base_folder, tmp_path / "base"), plain(small_folder, tmp_path / "small")
    at: dict[str, Any] = {"context": CONTEXT, "seed": 0}
    stages.run_finetune(base, token_folder, tmp_path / "finetuned", SHORT, **at)
    assert artefact.read(tmp_path / "finetuned", "model").inputs["model"] == sources.identity(base)
    best = MemorySettings(objective="ce", epochs=0.02, keep_best=True)
    stages.run_train(small, token_folder, [], tmp_path / "memory", best, bases=[base], **at)
    stages.run_lora(base, token_folder, tmp_path / "lora", LoraSettings(epochs=0.02), match=small, **at)
    adapt_vocab.run(small, tokenizer_folder, tmp_path / "adapted", AdaptSettings(), seed=0)
    assert artefact.read(tmp_path / "adapted", "model").inputs["memory"] == sources.identity(small)
    window: dict[str, Any] = {"context": CONTEXT, "stride": 16}
    keys.run(base, token_folder, tmp_path / "keys", DatastoreSettings(stored=False), **window)
    store = keys.Datastore(tmp_path / "keys")
    assert store.forward.model_folder == base.resolve()
    teacher.run(base, token_folder, tmp_path / "teacher", TeacherSettings(top=4), **window)
    settings = EvaluateSettings(alphas=[0.5], resamples=10)
    for name, part in (("e", {"memory": small}), ("l", {"lora": tmp_path / "lora"})):
        evaluate.run(base, corpus_folder, tmp_path / name, settings, seed=0, **part, **window)
    ours = evaluate_records(tmp_path / "e") | evaluate_records(tmp_path / "l")
    artefacts = base_folder, corpus_folder, tmp_path / "theirs", settings
    evaluate.run(*artefacts, seed=0, memory=small_folder, **window)
    theirs = evaluate_records(tmp_path / "theirs")
    assert [ours[name] for name in ("base", "MemDec")] == [theirs[name] for name in ("base", "MemDec")]
    assert ours["LoRA"] < ours["base"] * 1.01


def evaluate_records(folder: Path) -> dict[str, float]:
    return {each["method"]: each["value"] for each in json.loads((folder / "records.json").read_text())}


def test_tokens_of_another_tokenizer_are_refused_for_a_plain_folder(
    base_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    folder = plain(base_folder, tmp_path / "m")
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["window"])
    words.save_pretrained(folder)
    for use in (
        lambda: stages.run_finetune(folder, token_folder, tmp_path / "o", SHORT, context=CONTEXT, seed=0),
        lambda: keys.run(folder, token_folder, tmp_path / "o", DatastoreSettings(), context=CONTEXT, stride=16),
    ):
        with pytest.raises(ArtifactError, match="expected one tokenizer, found two"):
            use()


def test_subfolder_and_tokenizer_of_hf_reach_every_reader(
    base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    """The repository has nothing at its root; with `tokenizer=` the base's folder has none."""
    plain(base_folder, tmp_path / "repo" / "inner")
    expected = score(ours(base_folder, memory=str(small_folder), alpha=0.5))
    given: dict[str, Any] = {"memory": str(small_folder), "alpha": 0.5, "scores": str(tmp_path / "s")}
    assert score(ours(tmp_path / "repo", subfolder="inner", **given)) == pytest.approx(expected, abs=1e-5)
    words = shutil.copytree(tmp_path / "repo" / "inner", tmp_path / "words")
    for file in (tmp_path / "repo" / "inner").glob("tokenizer*"):
        file.unlink()
    shutil.rmtree(tmp_path / "s")
    bare = ours(tmp_path / "repo" / "inner", tokenizer=str(words), **given)
    assert score(bare) == pytest.approx(expected, abs=1e-5)
    model = MemDecForCausalLM.from_parts(base_folder.parent, [small_folder], [0.5], subfolder=base_folder.name)
    assert torch.equal(logits(model), logits(MemDecForCausalLM.from_parts(base_folder, [small_folder], [0.5])))


def test_the_report_names_a_few_and_says_how_many() -> None:
    report = {"missing_keys": {f"w{i}" for i in range(9)}, "unexpected_keys": {"x"}, "mismatched_keys": set()}
    with pytest.raises(ModelError, match=r"9 missing \(w0, w1, w2 \.\.\.\), 1 left over \(x\); get the files again"):
        checkpoints.check_report(report, "m", "GPT2LMHeadModel")

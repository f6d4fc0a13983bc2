"""Datastore, targets and training: independent of batch, shard, accumulation and resume; oracles in plain loops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT
from safetensors.torch import load_file
from transformers import TrainerCallback

from memdec.artefacts import artefact
from memdec.datastore import index, targets
from memdec.datastore import keys as datastore
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, ModelError, NumericsError
from memdec.models import keypoints, loading
from memdec.settings import (
    DatastoreSettings,
    IndexSettings,
    LoraSettings,
    MemorySettings,
    TargetSettings,
    TrainSettings,
)
from memdec.text import tokens
from memdec.training import fitting, stages

WINDOW = {"context": CONTEXT, "stride": CONTEXT // 2}


@pytest.fixture(scope="module")
def store(base_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "float32"
    datastore.run(base_folder, short_tokens, out, DatastoreSettings(dtype="float32"), **WINDOW)
    return out


@pytest.fixture(scope="module")
def index_folder(store: Path) -> Path:
    index.run([store], store.parent / "index", IndexSettings())
    return store.parent / "index"


@pytest.fixture(scope="module")
def make_targets(
    store: Path, index_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Path]]:
    def make(**changes: Any) -> list[Path]:
        settings = TargetSettings(**{"neighbours": 20, "temperature": 4.0, **changes})
        root = tmp_path_factory.mktemp("targets")
        for shard in range(settings.shards):
            targets.run([store], index_folder, short_tokens, root / str(shard), settings, shard=shard)
        return [root / str(shard) for shard in range(settings.shards)]

    return make


@pytest.fixture(scope="module")
def whole(make_targets: Callable[..., list[Path]]) -> list[Path]:
    return make_targets()


def reader(folders: list[Path], stream: Path) -> TargetReader:
    return TargetReader(folders, artefact.read(stream, "tokens").facts["sha256"]["train"])


# --- datastore ----------------------------------------------------------------------------------------------------


def test_keys_are_the_input_of_the_last_mlp_one_position_before(
    base_folder: Path, short_tokens: Path, store: Path
) -> None:
    keys, stream = np.load(store / "keys.npy"), tokens.load_stream(short_tokens, "train")
    model = loading.load(base_folder)
    seen: list[torch.Tensor] = []
    model.transformer.h[-1].mlp.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([[0, *stream[: CONTEXT - 1].tolist()]]))  # the prefix is EOS, id 0
    np.testing.assert_allclose(keys[:CONTEXT], seen[0][0].numpy(), atol=1e-5)
    assert keys.shape == (len(stream), 24)


def test_keys_do_not_depend_on_the_batch_size(
    base_folder: Path, short_tokens: Path, store: Path, tmp_path: Path
) -> None:
    datastore.run(base_folder, short_tokens, tmp_path / "d", DatastoreSettings(dtype="float32", batch_size=3), **WINDOW)
    np.testing.assert_allclose(np.load(tmp_path / "d" / "keys.npy"), np.load(store / "keys.npy"), atol=1e-5)


# --- targets ------------------------------------------------------------------------------------------------------


def test_targets_equal_brute_force(store: Path, short_tokens: Path, whole: list[Path]) -> None:
    keys, values = np.asarray(np.load(store / "keys.npy"), np.float64), tokens.load_stream(short_tokens, "train")
    found = reader(whole, short_tokens)
    for position in range(0, len(keys), len(keys) // 23):
        sq_dist = ((keys - keys[position]) ** 2).sum(1)
        sq_dist[position] = np.inf
        near = np.argsort(sq_dist, kind="stable")[:20]
        weight = np.exp(-sq_dist[near] / 4)
        expected = np.bincount(values[near], weights=weight / weight.sum(), minlength=300)
        row = found.rows([(position, position + 1)])
        dense = np.zeros(300)
        dense[row.tokens] = row.probs
        np.testing.assert_allclose(dense, expected, atol=2e-5)
        assert float(row.probs.sum(dtype=np.float64)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("changes", [{"shards": 3}, {"shards": 7}, {"batch_size": 130}])
def test_targets_do_not_depend_on_shards_or_batches(
    make_targets: Callable[..., list[Path]], whole: list[Path], short_tokens: Path, changes: dict[str, int]
) -> None:
    n = len(tokens.load_stream(short_tokens, "train"))
    one, other = (
        reader(whole, short_tokens).rows([(0, n)]),
        reader(make_targets(**changes), short_tokens).rows([(0, n)]),
    )
    np.testing.assert_array_equal(one.indptr, other.indptr)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.probs, other.probs, atol=1e-5)


def test_rows_across_shards(make_targets: Callable[..., list[Path]], short_tokens: Path) -> None:
    folders = make_targets(shards=3)
    found = reader(folders[::-1], short_tokens)
    all_rows = found.rows([(0, int(found.begins[2]) + 50)])
    begin, end = int(found.begins[1]) - 5, int(found.begins[2]) + 5
    part = found.rows([(begin, end), (3, 4)])
    low, high = all_rows.indptr[[begin, end]]
    np.testing.assert_array_equal(part.tokens[: high - low], all_rows.tokens[low:high])
    assert len(part) == end - begin + 1
    with pytest.raises(ArtifactError, match="expected the shard that begins at position"):
        reader([folders[0], folders[2]], short_tokens)
    with pytest.raises(ArtifactError, match="expected shards up to position"):
        reader(folders[:2], short_tokens)
    with pytest.raises(ArtifactError, match="another"):
        TargetReader(folders, "0" * 32)
    with pytest.raises(ArtifactError, match="expected at least one shard"):
        TargetReader([], "0" * 32)
    with pytest.raises(ArtifactError, match="different settings"):
        reader([folders[0], *make_targets(shards=3, temperature=9.0)[1:]], short_tokens)


def test_bad_targets_are_refused_early(
    store: Path, index_folder: Path, short_tokens: Path, base_folder: Path, tmp_path: Path
) -> None:
    n = artefact.read(store, "datastore").facts["positions"]
    for settings, shard, message in (
        (TargetSettings(neighbours=n), 0, rf"neighbours: expected at most {n - 1} \({n} keys of .*\), found {n}"),
        (TargetSettings(neighbours=5, shards=2), 2, "expected a shard from 0 to 1, found 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            targets.run([store], index_folder, short_tokens, tmp_path / "t", settings, shard=shard)
    datastore.run(
        base_folder, short_tokens, tmp_path / "d", DatastoreSettings(), context=CONTEXT, stride=1 + CONTEXT // 2
    )
    with pytest.raises(ArtifactError, match="found one of other keys"):
        targets.run(tmp_path / "d", index_folder, short_tokens, tmp_path / "t", TargetSettings(neighbours=5), shard=0)


# --- training -----------------------------------------------------------------------------------------------------

FAST = {"epochs": 0.5, "learning_rate": 1e-2, "batch_size": 8}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def train_memory(small: Path, stream: Path, folders: list[Path], out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    stages.run_train(small, stream, folders, out, MemorySettings(**{**FAST, **changes}), context=CONTEXT, seed=3)
    return weights(out)


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def test_fault_16_accumulation_changes_nothing(
    small_folder: Path, short_tokens: Path, whole: list[Path], tmp_path: Path
) -> None:
    runs = [
        train_memory(
            small_folder,
            short_tokens,
            whole,
            tmp_path / f"{size}",
            batch_size=size,
            accumulation=8 // size,
            epochs=0.2,
            learning_rate=1e-4,
        )
        for size in (8, 4, 1)
    ]
    assert_close(runs[0], runs[1], 1e-5)
    assert_close(runs[0], runs[2], 1e-5)


def test_a_killed_training_resumes_to_the_same_weights(
    small_folder: Path, short_tokens: Path, whole: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train_memory(small_folder, short_tokens, whole, tmp_path / "straight", dropout=0.1)

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > state.max_steps // 2:
                raise KeyboardInterrupt

    plain = fitting.LossTrainer.__init__
    monkeypatch.setattr(
        fitting.LossTrainer, "__init__", lambda self, **kw: plain(self, **{**kw, "callbacks": [Kill()]})
    )
    with pytest.raises(KeyboardInterrupt):
        train_memory(small_folder, short_tokens, whole, tmp_path / "killed", dropout=0.1)
    assert list((tmp_path / "killed" / "work").glob("checkpoint-*"))
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(tmp_path / "killed", "memory")
    monkeypatch.setattr(fitting.LossTrainer, "__init__", plain)
    resumed = train_memory(small_folder, short_tokens, whole, tmp_path / "killed", dropout=0.1)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not (tmp_path / "killed" / "work").exists()


@pytest.mark.slow
def test_the_loss_goes_down_and_the_targets_matter(
    small_folder: Path, short_tokens: Path, whole: list[Path], make_targets: Callable[..., list[Path]], tmp_path: Path
) -> None:
    hybrid = train_memory(small_folder, short_tokens, whole, tmp_path / "h")
    facts = artefact.read(tmp_path / "h", "memory").facts
    assert facts["valid_perplexity"] < artefact.read(small_folder, "model").facts["valid_perplexity"]
    ce = train_memory(small_folder, short_tokens, [], tmp_path / "ce", objective="ce")
    assert any(not torch.equal(hybrid[name], ce[name]) for name in ce)
    zero = train_memory(small_folder, short_tokens, make_targets(temperature=0.5), tmp_path / "zero", kl_weight=0)
    assert_close(ce, zero, 0)


def test_targets_of_other_tokens_are_refused_before_the_model_loads(
    small_folder: Path,
    corpus_folder: Path,
    tokenizer_folder: Path,
    whole: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from memdec.settings import FileCorpus
    from memdec.text import corpora

    (tmp_path / "t.txt").write_text("\n\n".join(f"Other text number {i} about things {i * i}." for i in range(300)))
    corpora.run(FileCorpus(source="files", path=str(tmp_path / "t.txt"), min_bytes=10), tmp_path / "c")
    tokens.run_tokens(tokenizer_folder, tmp_path / "c", tmp_path / "s")
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ArtifactError, match="expected targets for this token stream"):
        train_memory(small_folder, tmp_path / "s", whole, tmp_path / "m")


def test_nan_loss_names_the_positions(
    small_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load(small_folder)
    model.transformer.h[0].ln_1.weight.data[0] = float("nan")
    monkeypatch.setattr(loading, "load", lambda *_, **__: model)
    with pytest.raises(NumericsError, match=r"the loss is nan on token positions \d+-\d+"):
        stages.run_finetune(small_folder, short_tokens, tmp_path / "f", TrainSettings(), context=CONTEXT, seed=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_lora_and_finetune_keep_the_best_epoch(base_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    before = artefact.read(base_folder, "model").facts["valid_perplexity"]
    settings: dict[str, Any] = {"epochs": 1, "learning_rate": 5e-3, "keep_best": True, "evaluate_every": 0.5}
    stages.run_finetune(base_folder, short_tokens, tmp_path / "f", TrainSettings(**settings), context=CONTEXT, seed=0)
    stages.run_lora(
        base_folder, short_tokens, tmp_path / "l", LoraSettings(**settings, rank=4), context=CONTEXT, seed=0
    )
    assert artefact.read(tmp_path / "f", "model").facts["valid_perplexity"] < before
    assert artefact.read(tmp_path / "l", "lora").facts["valid_perplexity"] < before
    adapter = load_file(tmp_path / "l" / "adapter_model.safetensors")
    # q, k, v and both MLP projections of two layers, A and B each; the attention's output projection is not adapted.
    assert len(adapter) == 2 * 3 * 2
    assert not [name for name in adapter if "attn.c_proj" in name]

    from lm_eval.models.huggingface import HFLM

    from memdec.harness.models import MemDecInterp

    ours = MemDecInterp(pretrained=str(base_folder), peft=str(tmp_path / "l"), device="cpu", stride=CONTEXT)
    theirs = HFLM(pretrained=str(base_folder), peft=str(tmp_path / "l"), device="cpu", dtype="float32")
    text = "The matrix 3 returns the token of size 4."
    ids = theirs.tokenizer.encode(text)
    log_p = theirs.model(torch.tensor([[0, *ids[:-1]]])).logits[0].log_softmax(-1)[range(len(ids)), ids]
    np.testing.assert_allclose(ours.token_scores(text).base, log_p.detach().numpy(), atol=1e-5)


def test_lora_says_what_it_does_not_know() -> None:
    from transformers import AutoModelForCausalLM, GPTJConfig, MixtralConfig, RwkvConfig

    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gptj = AutoModelForCausalLM.from_config(GPTJConfig(vocab_size=60, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    names = {name.rsplit(".", 1)[-1] for name in stages._projections(gptj)}
    assert names == {"q_proj", "k_proj", "v_proj", "fc_in", "fc_out"}
    experts = MixtralConfig(**sizes, num_key_value_heads=2, intermediate_size=8, num_local_experts=2)
    with pytest.warns(UserWarning, match="lora: knows no projection of the MLP of MixtralForCausalLM; only the others"):
        stages._projections(AutoModelForCausalLM.from_config(experts))
    rwkv = RwkvConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    with pytest.raises(ModelError, match=r"lora: expected query, key, value and MLP projections, found none .*RwkvFor"):
        stages._projections(AutoModelForCausalLM.from_config(rwkv))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_lora_targets_by_family(architecture: str) -> None:
    from making import spec

    model = loading.from_scratch(spec(16, architecture=architecture), 50, 32, 0)
    names = {name.rsplit(".", 1)[-1] for name in stages._projections(model)}
    expected = {
        "gpt2": {"c_attn", "c_fc", "c_proj"},
        "qwen2": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    }
    assert names == expected[architecture]
    assert keypoints.last_mlp(model) is (model.transformer.h if architecture == "gpt2" else model.model.layers)[-1].mlp

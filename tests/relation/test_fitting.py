"""Training as a whole: the same answer however it is split, what the released code does wrong, budgets, bad input."""

import ast
import inspect
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from making import CONTEXT, launch, signed, spec
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from memdec.artefacts import artefact, devices
from memdec.datastore import index, targets
from memdec.datastore import keys as datastore
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, ModelError, NumericsError
from memdec.maths import objectives, weighing
from memdec.models import flops, loading
from memdec.results import evaluate
from memdec.settings import (
    AUTO,
    Compute,
    DatastoreSettings,
    EvaluateSettings,
    IndexSettings,
    LoraSettings,
    MemorySettings,
    TargetSettings,
    TrainSettings,
)
from memdec.text import tokens
from memdec.training import batches, fitting, rates, stages

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., dict[str, torch.Tensor]]
FAST: dict[str, Any] = {"learning_rate": 1e-3, "epochs": 0.3}


@pytest.fixture(scope="module")
def rows(base_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    datastore.run(base_folder, short_tokens, root / "d", DatastoreSettings(), context=CONTEXT, stride=CONTEXT // 2)
    index.run([root / "d"], root / "i", IndexSettings())
    targets.run([root / "d"], root / "i", short_tokens, root / "t", TargetSettings(neighbours=20, temperature=4.0))
    return root / "t"


@pytest.fixture
def trained(small_folder: Path, short_tokens: Path, rows: Path, tmp_path: Path) -> Train:
    def run(
        name: str, bases: tuple[Path, ...] = (), precision: devices.Precision = "float32", **changes: Any
    ) -> dict[str, torch.Tensor]:
        settings = MemorySettings(**{**FAST, **changes})
        given = [] if settings.objective == "ce" else [rows]
        how = {"context": CONTEXT, "seed": 3, "bases": bases, "compute": Compute(precision=precision)}
        stages.run_train(small_folder, short_tokens, given, tmp_path / name, settings, **how)
        return load_file(tmp_path / name / "model.safetensors")

    return run


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- the answer does not depend on how it was computed -----------------------------------------------------------


@pytest.mark.parametrize("objective", ["hybrid", "jsd"])
def test_fault_16_accumulation_changes_nothing(trained: Train, objective: str) -> None:
    """A whole epoch, with the short window of the end of the text in it and a ragged last batch."""
    changes: dict[str, Any] = {"objective": objective, "epochs": 1, "learning_rate": 1e-4}
    whole = trained("1x8", batch_size=8, **changes)
    for size, steps in ((4, 2), (1, 8)):
        assert farthest(whole, trained(f"{steps}x{size}", batch_size=size, accumulation=steps, **changes)) < 1e-5


def test_fault_16_means_of_micro_batches_would_be_seen(
    trained: Train, short_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches.WindowData(tokens.load_stream(short_tokens, "train"), CONTEXT, 0)
    assert 0 < data.parts[-1].n_scored < CONTEXT
    changes: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 1, "accumulation": 8}
    right, plain = trained("right", **changes), fitting.LossModel.forward

    def means(self: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)  # divided by the tokens of the micro-batch
        return found if "log_p" in found else {"loss": found["loss"] / 8}

    monkeypatch.setattr(fitting.LossModel, "forward", means)
    assert farthest(right, trained("means", **changes)) > 1e-5


@pytest.mark.slow
def test_fault_16_and_22_two_processes_change_neither_training_nor_perplexity(
    trained: Train, small_folder: Path, short_tokens: Path, rows: Path, tmp_path: Path
) -> None:
    arguments = ["--model", small_folder, "--tokens", short_tokens, "--targets", rows, "--out", tmp_path / "two"]
    arguments += ["--context", CONTEXT, "--seed", 3, "--batch-size", 2, "--accumulation", 2, "--learning-rate", 1e-4]
    launch(2, "-m", "memdec.cli", "train", *arguments)
    one = trained("one", batch_size=8, epochs=1, learning_rate=1e-4)
    assert farthest(one, load_file(tmp_path / "two" / "model.safetensors")) < 1e-5
    a, b = (artefact.read(tmp_path / name, "memory").facts for name in ("one", "two"))
    assert a["valid_perplexity"] == pytest.approx(b["valid_perplexity"], rel=1e-5)
    assert (a["updates"], a["trained_tokens"], a["flops"]) == (b["updates"], b["trained_tokens"], b["flops"])


FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from memdec.maths import objectives
from memdec.models import loading as models
from memdec.training import fitting

dist.init_process_group("gloo")
batch = torch.load(sys.argv[2], weights_only=True)
grads = []
for shard in (False, True):
    torch.manual_seed(0)
    model = fitting.LossModel(models.load(sys.argv[1]), objectives.Hybrid())
    model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.lm.transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss = model(**batch, num_items_in_batch=100)["loss"]
    loss.backward()
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    grads.append({name: full(p.grad) for name, p in model.named_parameters()})
    model.eval()
    with torch.no_grad():
        grads[-1]["log_p"] = model(**batch, score=True)["log_p"]
assert grads[0].keys() == grads[1].keys()
for name, grad in grads[0].items():
    torch.testing.assert_close(grads[1][name], grad, atol=1e-7, rtol=1e-5)
assert any(float(g.abs().max()) > 1e-4 for g in grads[0].values())
dist.destroy_process_group()
"""


def batch_of(short_tokens: Path, rows: Path | None, indices: list[int]) -> dict[str, torch.Tensor]:
    data = batches.WindowData(tokens.load_stream(short_tokens, "train"), CONTEXT, 0)
    reader = rows and TargetReader([rows], artefact.read(short_tokens, "tokens").facts["sha256"]["train"])
    return batches.Collate(reader)([data[i] for i in indices])


@pytest.mark.slow
def test_sharded_parameters_give_the_same_gradients(
    small_folder: Path, short_tokens: Path, rows: Path, tmp_path: Path
) -> None:
    """FSDP with activation checkpointing: the head's gradient goes through the fused loss."""
    torch.save(batch_of(short_tokens, rows, [0, 3, -1]), tmp_path / "batch.pt")
    (tmp_path / "worker.py").write_text(FSDP)
    launch(2, tmp_path / "worker.py", small_folder, tmp_path / "batch.pt")


# accelerate shards over GPUs only; here the processes of a CPU pass for another kind of accelerator.
SHARDED = """
import sys, types
from accelerate import state
from accelerate.utils import DistributedType
names = {each.name: each for each in DistributedType} | {"MULTI_MLU": DistributedType.MULTI_CPU}
state.DistributedType = types.SimpleNamespace(**names)
from memdec.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_config_for_sharded_models_trains_the_same_model(
    precision: str, small_folder: Path, short_tokens: Path, rows: Path, tmp_path: Path
) -> None:
    """FSDP as config/accelerate/fsdp.yaml starts it: tied weights stay tied, and what is not a weight stays float32."""
    given = yaml.safe_load((ROOT / "config" / "accelerate" / "fsdp.yaml").read_text())["fsdp_config"]
    sharded = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    sharded |= {name.upper(): str(value) for name, value in given.items()}
    (tmp_path / "worker.py").write_text(SHARDED)
    arguments = ["train", "--model", small_folder, "--tokens", short_tokens, "--targets", rows, "--context", CONTEXT]
    arguments += ["--seed", 3, "--batch-size", 2, "--learning-rate", 1e-4, "--precision", precision, "--device", "cpu"]
    for name, environment in (("replicated", {}), ("sharded", sharded)):
        launch(2, tmp_path / "worker.py", *arguments, "--out", tmp_path / name, **environment)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("replicated", "sharded"))
    assert one.keys() == other.keys()
    far = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert far < (1e-6 if precision == "float32" else 1e-3)
    a, b = (artefact.read(tmp_path / name, "memory").facts for name in ("replicated", "sharded"))
    assert a["parameters"] == b["parameters"]
    # In bfloat16 FSDP also computes the norms in it, which autocast does not.
    assert a["valid_perplexity"] == pytest.approx(b["valid_perplexity"], rel=1e-6 if precision == "float32" else 2e-3)


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_computes_in_bfloat16_and_sums_in_float32(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", str(version))
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy="bf16")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    if version == 1:
        with pytest.raises(ConfigError, match="expected fsdp_version 2, found 1; start from config/accelerate"):
            fitting._keep_float32(accelerator)
        return
    fitting._keep_float32(accelerator)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None  # the loss and log p leave as they are
    assert not policy.cast_forward_inputs  # so do the rows of the targets and the number of tokens


def test_checkpointed_activations_change_nothing(trained: Train) -> None:
    assert farthest(trained("plain"), trained("again", gradient_checkpointing=True)) < 1e-6


def test_bf16_trains_to_about_the_same(trained: Train, tmp_path: Path) -> None:
    trained("float32", epochs=1)
    trained("bf16", epochs=1, precision="bfloat16")
    one, other = (artefact.read(tmp_path / name, "memory").facts["valid_perplexity"] for name in ("float32", "bf16"))
    assert one == pytest.approx(other, rel=0.02)
    assert one != other


def test_order_is_a_permutation_filled_up_and_depends_on_seed_and_epoch_alone() -> None:
    order = batches.Order(10, 4, seed=1)
    first = list(order)
    assert len(order) == 12
    assert sorted(first) == [-1, -1, *range(10)]
    assert first[10:] == [-1, -1]
    assert list(order) == first
    assert list(batches.Order(10, 5, seed=1)) == first[:10]  # the same for any number of processes
    order.epoch = 1
    assert list(order)[:10] != first[:10]
    assert list(batches.Order(10, 4, seed=2))[:10] != first[:10]
    assert list(batches.Order(3, 2, seed=None)) == [0, 1, 2, -1]


def test_collate_joins_rows_of_scored_positions(short_tokens: Path, rows: Path) -> None:
    data = batches.WindowData(tokens.load_stream(short_tokens, "train"), CONTEXT, 7)
    last = len(data) - 1
    batch = batch_of(short_tokens, rows, [2, last, -1])
    reader = TargetReader([rows], artefact.read(short_tokens, "tokens").facts["sha256"]["train"])
    flat, indptr = batch["labels"].flatten(), batch["target_indptr"]
    assert len(indptr) == 3 * CONTEXT + 1
    scored = (flat != -100).nonzero().flatten().tolist()
    positions = [p for i in (2, last) for p in range(data.parts[i].first, data.parts[i].end)]
    assert len(scored) == len(positions)
    for place, position in zip(scored, positions, strict=True):
        row = reader.rows([(position, position + 1)])
        part = slice(int(indptr[place]), int(indptr[place + 1]))
        assert batch["target_tokens"][part].tolist() == row.tokens.tolist()
        assert batch["target_probs"][part].tolist() == row.probs.tolist()
        assert int(flat[place]) == int(data.stream[position])
    assert int(indptr[-1]) == len(batch["target_tokens"])
    assert batch["spans"][2].tolist() == [0, 0]


# --- faults of the released code (15 to 21 of the measured list; it has no fault 15) ------------------------------


def test_fault_17_anomaly_detection_is_off(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = fitting.LossModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_anomaly_enabled())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(fitting.LossModel, "forward", forward)
    trained("m", epochs=0.05)
    assert seen
    assert not any(seen)


def test_fault_18_a_batch_holds_no_dense_target(short_tokens: Path, rows: Path) -> None:
    batch = batch_of(short_tokens, rows, list(range(8)))
    n, entries = 8 * CONTEXT, len(batch["target_tokens"])
    assert entries <= 20 * n  # k = 20 neighbours
    assert sum(x.numel() for x in batch.values()) == 2 * n + 2 * 8 + (n + 1) + 2 * entries


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_fault_19_norms_and_biases_do_not_decay(architecture: str, tmp_path: Path) -> None:
    model = loading.from_scratch(spec(16, architecture=architecture), 50, 32, 0)
    arguments = fitting._arguments(TrainSettings(weight_decay=0.1), tmp_path, 0, AUTO)
    trainer = fitting.LossTrainer(model=fitting.LossModel(model, objectives.Hybrid()), args=arguments)
    groups = trainer.create_optimizer().param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim == 2), name


def test_fault_20_windows_are_shuffled_anew_each_epoch(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    plain = batches.Collate.__call__

    def call(self: Any, items: list[dict[str, Any]]) -> Any:
        seen.append([item["first"] for item in items if item["end"]])
        return plain(self, items)

    monkeypatch.setattr(batches.Collate, "__call__", call)
    trained("m", epochs=2, batch_size=600)
    first, second = seen[0], seen[1]
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)


def test_fault_20_every_setting_is_read() -> None:
    """33 of 45 options of one released script are never used."""
    read = {
        node.attr
        for module in (fitting, rates, stages)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("settings", "memory")
    }
    for kind in (TrainSettings, LoraSettings, MemorySettings):
        assert set(kind.model_fields) <= read


def test_fault_21_a_padded_head_keeps_its_rows(
    small_folder: Path, short_tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    padded = tmp_path / "padded"
    with artefact.building(padded, "model", {}, {}) as build:
        assert build is not None
        model = loading.load(small_folder)
        model.resize_token_embeddings(320)
        model.save_pretrained(padded)
        tokens.load_tokenizer(str(tokenizer_folder)).save_pretrained(padded)
    settings = TrainSettings(epochs=0.1)
    stages.run_finetune(padded, short_tokens, tmp_path / "out", settings, context=CONTEXT, seed=0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_output_embeddings().weight.shape[0] == 320


def test_fused_activations_are_the_same_function() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    ids = torch.arange(20)[None]
    before = model(ids).logits
    loading.fuse_activations(model)
    assert all(isinstance(layer.mlp.act, torch.nn.GELU) for layer in model.transformer.h)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert model.config.activation_function == "gelu_new"


# --- evaluations, early stopping, resuming -------------------------------------------------------------------------


def test_no_base_is_kept_while_the_next_is_loaded(
    trained: Train, base_folder: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    alive: list[int] = []
    plain = loading.load

    def load(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(each() is not None for each in seen))
        model = plain(*args, **kwargs)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load", load)
    trained("m", bases=(base_folder, small_folder), epochs=0.05)
    assert alive == [0, 1, 1]  # the memory is there all the time


def test_evaluations_sweep_alpha_and_the_best_is_kept(
    trained: Train, base_folder: Path, small_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"epochs": 2, "learning_rate": 3e-2, "keep_best": True, "evaluate_every": 0.5}
    trained("m", bases=(base_folder,), alphas=[0.25, 0.5, 1.0], **changes)
    facts = artefact.read(tmp_path / "m", "memory").facts
    steps = facts["evaluations"]
    every = round(0.5 * facts["updates"] / 2)  # half of one of two epochs
    assert len(steps) == math.ceil(facts["updates"] / every) + 1  # and the final one, with the best weights
    best = min(steps[:-1], key=lambda entry: entry["score"])
    assert steps[-1]["score"] == pytest.approx(best["score"], rel=1e-6)
    # By hand: both models over valid, mixed at the alpha of the last evaluation.
    valid = tokens.load_stream(short_tokens, "valid")
    parts = batches.WindowData(valid, CONTEXT, 0)
    scores = []
    for folder in (base_folder, tmp_path / "m"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        log_p = []
        for i in range(len(parts)):
            item = parts[i]
            with torch.no_grad():
                logits = model(torch.from_numpy(item["inputs"])[None]).logits[0].log_softmax(-1)
            log_p += [float(logits[t, y]) for t, y in enumerate(item["labels"]) if y != -100]
        scores.append(np.array(log_p))
    sweep = {a: math.exp(-weighing.mix_scores(*scores, a).mean()) for a in (0.25, 0.5, 1.0)}
    alpha = min(sweep, key=sweep.__getitem__)
    assert steps[-1]["alpha_base"] == alpha
    assert steps[-1]["mixed_base"] == pytest.approx(sweep[alpha], rel=1e-5)
    assert steps[-1]["perplexity"] == pytest.approx(sweep[1.0], rel=1e-5) == facts["valid_perplexity"]
    # The losses of the training are means over the updates since the one before, so together they are its mean loss.
    begins = [0, *(entry["step"] for entry in facts["losses"])]
    sums = [entry["loss"] * (entry["step"] - begin) for begin, entry in zip(begins, facts["losses"], strict=False)]
    assert begins[-1] == facts["updates"]
    assert math.fsum(sums) / facts["updates"] == pytest.approx(facts["train_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "measured", "ends_with"),
    [
        ({"keep_best": True, "evaluate_every": 0.1}, [2, 4, 5], 2),
        ({"evaluate_every": 0.15}, [3, 5], 5),
        ({}, [5], 5),
    ],
)
def test_no_weights_are_measured_twice(
    trained: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: Any, measured: list[int], ends_with: int
) -> None:
    """The evaluation at the end is that of the weights kept, here the first ones, which were evaluated before."""
    steps: list[int] = []

    def measure(trainer: fitting.LossTrainer) -> dict[str, float]:
        steps.append(trainer.state.global_step)
        return {"loss": float(len(steps)), "perplexity": math.exp(len(steps)), "score": float(len(steps))}

    monkeypatch.setattr(fitting.LossTrainer, "measure", measure)
    trained("m", epochs=0.25, **changes)
    final = artefact.read(tmp_path / "m", "memory").facts["evaluations"][-1]
    assert steps == measured
    assert final == {
        "step": ends_with,
        "loss": 1 + measured.index(ends_with),
        "perplexity": math.exp(1 + measured.index(ends_with)),
        "score": 1 + measured.index(ends_with),
    }


def test_training_stops_when_nothing_gets_better(trained: Train, tmp_path: Path) -> None:
    trained("m", epochs=20, learning_rate=0.2, keep_best=True, patience=2, evaluate_every=0.25)
    facts = artefact.read(tmp_path / "m", "memory").facts
    assert facts["updates"] < facts["planned_updates"]
    scores = [entry["score"] for entry in facts["evaluations"][:-1]]
    assert min(scores) == scores[-3]
    with pytest.raises(ValueError, match="expected keep_best true with patience 3"):
        TrainSettings(patience=3)


@pytest.mark.slow
def test_a_killed_training_that_stops_early_resumes_to_the_same_weights(
    trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of evaluations without a better one goes on too, and a checkpoint that was cut short is passed over."""
    changes: dict[str, Any] = {"epochs": 20, "learning_rate": 0.1, "keep_best": True, "patience": 3, "dropout": 0.1}
    straight = trained("straight", evaluate_every=0.25, **changes)
    facts = artefact.read(tmp_path / "straight", "memory").facts
    assert facts["updates"] < facts["planned_updates"]
    plain = fitting.LossTrainer.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == facts["updates"]:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(fitting.LossTrainer, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        trained("killed", evaluate_every=0.25, **changes)
    monkeypatch.undo()
    (tmp_path / "killed" / "work" / "checkpoint-99999").mkdir()
    resumed = trained("killed", evaluate_every=0.25, **changes)
    assert farthest(straight, resumed) == 0
    assert artefact.read(tmp_path / "killed", "memory").facts == facts


def test_resuming_with_other_settings_names_what_changed(
    trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting.LossTrainer, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained("m")
    monkeypatch.undo()
    with pytest.raises(
        ArtifactError, match=r"changes in kl_weight \(0.5 there, 0.25 now\), warmup \(0.0 there, 0.1 now\)"
    ):
        trained("m", kl_weight=0.25, warmup=0.1)
    trained("m")  # the same settings go on
    trained("m", kl_weight=0.25)  # a finished one is made anew, as ever


def test_curves_go_where_report_to_says(trained: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected installed trackers .*, found nosuch"):
        trained("m", report_to=["nosuch"])
    assert not (tmp_path / "m").exists()
    trained("m", report_to=["tensorboard"], evaluate_every=0.1)
    written = b"".join(path.read_bytes() for path in (tmp_path / "runs" / "m").iterdir())
    assert b"eval/perplexity" in written
    recipe = artefact.read(tmp_path / "m", "memory").recipe
    trained("m", evaluate_every=0.1)  # where curves go is no part of the recipe: nothing is trained again
    assert artefact.read(tmp_path / "m", "memory").recipe == recipe


# --- budget and sizes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_flop_budget_ends_training(
    base_folder: Path, small_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    n_tokens = artefact.read(short_tokens, "tokens").facts["tokens"]["train"]
    settings = TrainSettings(epochs=3, learning_rate=1e-3)
    for folder, name in ((base_folder, "own"), (small_folder, "smaller")):
        stages.run_finetune(
            folder, short_tokens, tmp_path / name, settings, context=CONTEXT, seed=0, budget=(base_folder, 1.5)
        )
        facts = artefact.read(tmp_path / name, "model").facts
        ceiling = 1.5 * n_tokens * flops.flops_per_token(loading.load(base_folder), CONTEXT)
        assert facts["flops_ceiling"] == pytest.approx(ceiling)
        assert facts["flops"] <= ceiling
        per_update = facts["flops"] / facts["updates"]
        assert facts["flops"] > ceiling - per_update or facts["epochs"] == pytest.approx(3, abs=0.01)
    rounds = fitting._rounds(settings, len(batches.WindowData(range(n_tokens), CONTEXT, 0)), 1)  # type: ignore[arg-type]
    stages.run_finetune(
        base_folder, short_tokens, tmp_path / "all", settings, context=CONTEXT, seed=0, budget=(base_folder, 3)
    )
    assert artefact.read(tmp_path / "all", "model").facts["updates"] == 3 * rounds
    own, smaller = (artefact.read(tmp_path / name, "model").facts for name in ("own", "smaller"))
    assert 1.5 - 1 / rounds < own["epochs"] <= 1.5  # whole updates
    assert smaller["epochs"] > own["epochs"]
    with pytest.raises(ConfigError, match="which is one update, found"):
        stages.run_finetune(
            base_folder, short_tokens, tmp_path / "x", settings, context=CONTEXT, seed=0, budget=(base_folder, 1e-6)
        )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_lora_gets_the_rank_that_matches_a_model(
    base_folder: Path, small_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    settings = LoraSettings(epochs=0.1)
    arguments: dict[str, Any] = {"context": CONTEXT, "seed": 0}
    with pytest.raises(ConfigError, match="expected 'rank', or --match"):
        stages.run_lora(base_folder, short_tokens, tmp_path / "l", settings, **arguments)
    stages.run_lora(base_folder, short_tokens, tmp_path / "l", settings, match=small_folder, **arguments)
    manifest = artefact.read(tmp_path / "l", "lora")
    wanted = loading.n_parameters(loading.load(small_folder))
    per_rank = 2 * ((24 + 72) + (24 + 96) + (96 + 24))  # two layers: qkv, both MLP matrices
    assert manifest.settings["parameters_wanted"] == wanted
    assert manifest.facts["rank"] == min(round(wanted / per_rank), 24)
    assert manifest.facts["parameters"] == manifest.facts["rank"] * per_rank


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_narrow_keys_and_values_do_not_hold_back_the_other_matrices(
    base_folder: Path, tokenizer_folder: Path, token_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    """Of two heads of 12, keys and values have one: their rank ends at 12, where the others have 24."""
    from peft import PeftModel

    at: dict[str, Any] = {"context": CONTEXT}
    stages.run_pretrain(spec(24, architecture="qwen2"), tokenizer_folder, token_folder, tmp_path / "model", **at)
    model, lora = tmp_path / "model", tmp_path / "lora"
    settings = LoraSettings(epochs=0.1, scale=2.0)
    stages.run_lora(model, token_folder, lora, settings, seed=0, match=base_folder, **at)
    adapted = PeftModel.from_pretrained(loading.load(model), lora)
    layer = adapted.get_submodule("base_model.model.model.layers.1.self_attn")
    for name, rank in (("q_proj", 24), ("k_proj", 12), ("v_proj", 12)):
        part = layer.get_submodule(name)
        assert part.lora_A["default"].weight.shape[0] == rank
        assert part.scaling["default"] == 2.0
    manifest = artefact.read(lora, "lora")
    full = 2 * (24 * (24 + 24) + 2 * 12 * (24 + 12) + 3 * 24 * (24 + 64))
    assert (manifest.facts["rank"], manifest.facts["parameters"]) == (24, full)
    evaluate.run(model, corpus_folder, tmp_path / "e", EvaluateSettings(), stride=8, seed=0, lora=lora, **at)
    (record,) = json.loads((tmp_path / "e" / "records.json").read_text())
    assert record["size"] == full / loading.n_parameters(loading.load(base_folder))


def test_ranks_come_as_near_to_the_wanted_size_as_they_can() -> None:
    model = torch.nn.ModuleDict({"wide": torch.nn.Linear(8, 6), "narrow": torch.nn.Linear(8, 2)})
    for wanted, ranks in ((1, (1, 1)), (24, (1, 1)), (48, (2, 2)), (62, (3, 2)), (10**6, (6, 2))):
        assert stages.matched_ranks(model, ["wide", "narrow"], wanted) == dict(
            zip(("wide", "narrow"), ranks, strict=True)
        )


# --- bad input ----------------------------------------------------------------------------------------------------


def test_nan_names_step_positions_and_file(
    small_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third update makes the weights infinite; the fourth must say so."""
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.lm.transformer.ln_f.weight.data.fill_(float("inf"))

    plain = fitting.LossTrainer.__init__
    monkeypatch.setattr(
        fitting.LossTrainer, "__init__", lambda self, **kw: plain(self, **{**kw, "callbacks": [Spoil()]})
    )
    expected = rf"step 4: the loss is nan on token positions \d+-\d+, .* of {short_tokens}/train.npy; look at that text"
    with pytest.raises(NumericsError, match=expected):
        stages.run_finetune(small_folder, short_tokens, tmp_path / "f", TrainSettings(), context=CONTEXT, seed=0)


def test_bad_input_is_seen_before_the_model_is_loaded(
    small_folder: Path, short_tokens: Path, rows: Path, tmp_path: Path, trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short"
    short.mkdir()
    for file in small_folder.iterdir():
        if file.is_file():
            (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "vocab_size": 290}))
    signed(short)
    empty = tmp_path / "empty"
    with artefact.building(empty, "targets", {}, {}) as build:
        assert build is not None
        facts = artefact.read(rows, "targets").facts
        build.facts.update({**facts, "begin": 0, "end": 0, "positions": 0, "entries": 0})
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    out, arguments = tmp_path / "m", {"context": CONTEXT, "seed": 0}
    with pytest.raises(ModelError, match="expected a head for the tokenizer's 300 tokens, found one for 290"):
        stages.run_train(short, short_tokens, [rows], out, MemorySettings(), **arguments)
    with pytest.raises(ConfigError, match="context: expected at most 32 tokens"):
        stages.run_train(small_folder, short_tokens, [rows], out, MemorySettings(), context=64, seed=0)
    with pytest.raises(ArtifactError, match="found an empty shard"):
        stages.run_train(small_folder, short_tokens, [empty], out, MemorySettings(), **arguments)
    with pytest.raises(ArtifactError, match="expected at least one shard"):
        stages.run_train(small_folder, short_tokens, [], out, MemorySettings(), **arguments)
    with pytest.raises(ConfigError, match="expected no --targets with objective ce, found 1"):
        stages.run_train(small_folder, short_tokens, [rows], out, MemorySettings(objective="ce"), **arguments)
    assert not out.exists()


def test_a_head_that_does_more_than_a_product_is_refused() -> None:
    """Their loss would be of another function than the one that is saved."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        PhiConfig,
        PhiForCausalLM,
    )

    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    granite = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0))
    phi = PhiForCausalLM(PhiConfig(**sizes))
    torch.nn.init.normal_(phi.lm_head.bias)
    gemma2 = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8))  # its logits are too small for the cap to show
    for model in (granite, phi, gemma2):
        with pytest.raises(ModelError, match="expected logits that are the output matrix times the last hidden state"):
            loading.check_head(model)
    loading.check_head(phi, bias=True)
    loading.check_head(loading.from_scratch(spec(16), 50, 32, 0))


def test_every_rate_of_dropout_is_set() -> None:
    from transformers import BioGptConfig, GPTNeoXConfig, MptConfig

    biogpt, neox, mpt = BioGptConfig(), GPTNeoXConfig(classifier_dropout=0.1), MptConfig()
    for config in (biogpt, neox, mpt):
        loading.set_dropout(config, 0.3)
    assert (biogpt.hidden_dropout_prob, biogpt.attention_probs_dropout_prob) == (0.3, 0.3)
    assert (neox.hidden_dropout, neox.attention_dropout, neox.classifier_dropout) == (0.3, 0.3, 0.1)
    assert (mpt.resid_pdrop, mpt.attn_config.attn_pdrop) == (0.3, 0)


def test_the_card_says_what_it_was_trained_on(trained: Train, tmp_path: Path) -> None:
    trained("m")
    facts = artefact.read(tmp_path / "m", "memory").facts
    card = (tmp_path / "m" / "README.md").read_text()
    assert facts["corpus_sha256"] in card
    assert "hybrid" in card


# --- beta as a schedule -------------------------------------------------------------------------------------------


def test_beta_goes_in_a_line_from_the_first_update_to_the_last(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = [], fitting.LossModel.forward

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("score"):
            seen.append(self.objective)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(fitting.LossModel, "forward", spied)
    trained("falling", kl_weight=0.9, kl_weight_end=0.1, batch_size=4, accumulation=2)
    betas = [each.kl_weight for each in seen][::2]  # two micro-batches an update
    assert betas == [each.kl_weight for each in seen][1::2]
    assert len(betas) > 4
    np.testing.assert_allclose(betas, np.linspace(0.9, 0.1, len(betas)))


def test_a_schedule_without_a_slope_is_none(trained: Train) -> None:
    same = trained("same", kl_weight=0.3, kl_weight_end=0.3)
    assert farthest(same, trained("plain", kl_weight=0.3)) == 0
    assert farthest(same, trained("sloped", kl_weight=0.3, kl_weight_end=0.8)) > 0
    # An objective without beta has no use for it.
    assert farthest(trained("ce", objective="ce", kl_weight_end=0.8), trained("ce plain", objective="ce")) == 0

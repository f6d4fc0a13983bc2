"""Every setting of a training reaches the library that it is for: transformers' Trainer, the optimiser, peft, the loss."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import CONTEXT, spec
from torch import nn
from transformers import TrainerControl

from memdec.artefacts import artefact
from memdec.maths import objectives
from memdec.maths.losses import IGNORED
from memdec.models import loading
from memdec.settings import AUTO, Compute, LoraSettings, MemorySettings, TrainSettings
from memdec.text import tokens
from memdec.training import batches, checkpoints, fitting, stages

# No value is the library's default, and no two are alike.
CHOSEN: dict[str, Any] = {
    "learning_rate": 3e-4, "batch_size": 5, "accumulation": 3, "warmup": 0.2, "weight_decay": 0.07, "max_grad_norm": 0.6,
}  # fmt: skip
STEPS, ROUNDS = 50, 10


def planned(folder: Path, compute: Compute = AUTO, **changes: Any) -> Any:
    """Arguments of the Trainer for a training of 50 updates, ten of them an epoch."""
    settings = TrainSettings(**{**CHOSEN, **changes})
    arguments = fitting._arguments(settings, folder, 11, compute)
    fitting._plan(arguments, settings, STEPS, ROUNDS)
    return arguments


def test_the_trainer_gets_every_number(tmp_path: Path) -> None:
    given = planned(tmp_path)
    assert (given.learning_rate, given.weight_decay, given.max_grad_norm, given.seed) == (3e-4, 0.07, 0.6, 11)
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (5, 3)
    assert (given.max_steps, given.warmup_steps) == (STEPS, 10)
    assert (given.bf16, given.fp16, given.load_best_model_at_end, given.eval_strategy.value) == (
        False,
        False,
        False,
        "no",
    )


def test_the_trainer_gets_the_precision(tmp_path: Path) -> None:
    given = planned(tmp_path, Compute(precision="bfloat16"))
    assert (given.bf16, given.fp16) == (True, False)


def test_evaluations_are_counted_in_epochs(tmp_path: Path) -> None:
    assert planned(tmp_path, evaluate_every=0.3).eval_steps == 3
    best = planned(tmp_path, keep_best=True)
    assert (best.eval_steps, best.load_best_model_at_end) == (ROUNDS, True)
    assert (best.metric_for_best_model, best.greater_is_better) == ("eval_score", False)


def test_a_trial_has_its_part_of_the_checkpoints_and_evaluations_are_saved_beside_them(tmp_path: Path) -> None:
    best = planned(tmp_path, keep_best=True)
    assert best.save_steps == 2  # 20 of 50 updates, whatever the 10 between evaluations
    fitting._plan(best, TrainSettings(keep_best=True), 5, ROUNDS, 0.1)
    assert best.save_steps == 2
    for evaluated, saved, expected in ((True, False, True), (False, False, False), (False, True, True)):
        control = TrainerControl(should_evaluate=evaluated, should_save=saved)
        fitting._SaveEvaluated().on_step_end(best, None, control)
        assert control.should_save == expected


def test_the_rate_rises_over_a_share_of_the_steps_and_falls_in_a_line_to_zero(tmp_path: Path) -> None:
    model = fitting.LossModel(loading.from_scratch(spec(16), 50, 32, 0), objectives.Hybrid())
    trainer = fitting.LossTrainer(model=model, args=planned(tmp_path))
    trainer.create_optimizer_and_scheduler(num_training_steps=STEPS)
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    assert optimizer is not None
    assert schedule is not None
    rates = []
    for _ in range(STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [3e-4 * min(step / 10, (STEPS - step) / (STEPS - 10)) for step in range(STEPS + 1)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_padding_is_not_scored() -> None:
    data = batches.WindowData(np.arange(1, 8), context=5, prefix=0)  # windows of 5 and, after it, of 2 new tokens
    filler = data[-1]
    short = {"first": 0, "end": 2, "inputs": np.array([0, 1]), "labels": np.array([1, 2])}
    batch = batches.Collate(None)([data[0], short, filler])
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 5], [1, 2, *[IGNORED] * 3], [IGNORED] * 5]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0], [0] * 5]
    assert data[1]["labels"].tolist() == [*[IGNORED] * 3, 6, 7]


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path, keep_best=False) is None
    for name, whole in (("checkpoint-9", True), ("checkpoint-10", True), ("checkpoint-11", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
        if whole:
            checkpoints.seal(tmp_path / name, {"best": None})
    assert checkpoints.newest(tmp_path, keep_best=False) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "hybrid", "kl_weight": 0.3}, objectives.Hybrid(0.3)),
        ({"objective": "focal", "focal_weight": 0.3, "focal_gamma": 1.5}, objectives.Focal(0.3, 1.5)),
        ({"objective": "bild", "bild_top": 5}, objectives.BiLD(5)),
        ({"objective": "sparsity", "sparsity_weight": 0.4}, objectives.Sparsity(0.4)),
    ],
)
def test_the_loss_gets_its_numbers(settings: dict[str, Any], expected: objectives.Objective) -> None:
    assert fitting._objective(MemorySettings(**settings)) == expected


# --- what `fit` is given by the stages ----------------------------------------------------------------------------


class Given(Exception):
    """Ends a stage where its training would begin."""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, fitting.Task]]:
    """The model and the task of a stage."""

    def fit(model: Any, settings: TrainSettings, task: fitting.Task, work: Path) -> None:
        raise Given(model, task)

    def of(stage: Callable[..., None], *arguments: Any, **numbers: Any) -> tuple[Any, fitting.Task]:
        with pytest.raises(Given) as caught:
            stage(*arguments, **numbers, context=CONTEXT, seed=4)
        model, task = caught.value.args
        return model, task

    monkeypatch.setattr(fitting, "fit", fit)
    return of


def dropouts(model: nn.Module) -> dict[str, float]:
    return {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


def test_dropout_and_seed_reach_every_stage(
    given: Callable[..., Any], base_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    ce = MemorySettings(objective="ce", dropout=0.15)
    for model, task in (
        given(stages.run_finetune, base_folder, token_folder, tmp_path / "f", TrainSettings(dropout=0.15)),
        given(stages.run_train, base_folder, token_folder, [], tmp_path / "t", ce),
    ):
        assert set(dropouts(model).values()) == {0.15}
        assert (task.seed, task.context) == (4, CONTEXT)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_the_adapter_gets_every_number(
    given: Callable[..., Any], base_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    settings = LoraSettings(rank=3, scale=2.5, adapter_dropout=0.25, dropout=0.15)
    model, _ = given(stages.run_lora, base_folder, token_folder, tmp_path / "l", settings)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 2.5 * 3, 0.25)
    layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert layer.scaling["default"] == 2.5  # peft divides lora_alpha by the rank
    found = dropouts(model)
    assert {p for name, p in found.items() if "lora_dropout" in name} == {0.25}
    assert {p for name, p in found.items() if "lora_dropout" not in name} == {0.15}


def test_the_best_evaluation_is_that_of_the_mixtures(
    small_folder: Path, base_folder: Path, token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base knows every other token. Beside it the first evaluation is better, alone the second one."""
    even = np.arange(len(tokens.load_stream(token_folder, "valid"))) % 2 == 0
    base = np.where(even, math.log(0.9), math.log(0.01))
    what_it_lacks, all_a_little = np.where(even, math.log(0.001), math.log(0.5)), np.full(len(even), math.log(0.1))
    answers = iter([what_it_lacks])
    monkeypatch.setattr(fitting, "_base_scores", lambda *_: {"base": base})
    monkeypatch.setattr(fitting.LossTrainer, "scores", lambda _: next(answers, all_a_little))
    settings = MemorySettings(
        objective="ce", epochs=0.1, evaluate_every=0.05, keep_best=True, alphas=[0.5], learning_rate=1e-3
    )
    bases = [base_folder]
    stages.run_train(small_folder, token_folder, [], tmp_path / "m", settings, context=CONTEXT, seed=3, bases=bases)
    first, second, *_, final = artefact.read(tmp_path / "m", "memory").facts["evaluations"]
    assert second["loss"] < first["loss"]
    assert first["score"] == pytest.approx(math.log(first["mixed_base"]))
    assert first["score"] < second["score"]
    assert first["mixed_base"] == pytest.approx(math.exp(-(math.log(0.4505) + math.log(0.255)) / 2), rel=1e-3)
    assert final["step"] == first["step"] < second["step"]

"""Faults found in training: each test fails on the code before its fix."""

import errno
import json
import operator
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making import CONTEXT, spec
from safetensors.torch import load_file
from transformers import TrainerCallback

from memdec.artefacts import artefact
from memdec.errors import ResourceError
from memdec.settings import LoraSettings, MemorySettings, TrainSettings
from memdec.training import checkpoints, fitting, stages

# 45 updates in 1.28 epochs; a checkpoint and a line in the log at every second one, so the last one is not in the log.
PLAIN: dict[str, Any] = {"epochs": 1.28, "learning_rate": 1e-2, "objective": "ce", "dropout": 0.1, "batch_size": 4}
BEST = {**PLAIN, "learning_rate": 0.1, "keep_best": True, "evaluate_every": 0.25}  # evaluations at 9, 18, 27, 36 and 45
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(small_folder: Path, short_tokens: Path) -> Train:
    def run(out: Path, changes: dict[str, Any] = PLAIN) -> Path:
        stages.run_train(small_folder, short_tokens, [], out, MemorySettings(**changes), context=CONTEXT, seed=3)
        return out

    return run


@pytest.fixture(scope="module")
def straight(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("straight") / "m")


@pytest.fixture(scope="module")
def straight_best(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("straight") / "m", BEST)


class Kill(TrainerCallback):
    """End a run as Ctrl-C does, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def killed(train: Train, out: Path, step: int, changes: dict[str, Any] = PLAIN) -> Path:
    """A run that is killed at a step before its checkpoint, or behind the last one when the weights are gathered."""
    plain = fitting.LossTrainer.__init__

    def made(self: Any, **how: Any) -> None:
        plain(self, **{**how, "callbacks": [*how.get("callbacks", []), Kill(step)]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.LossTrainer, "__init__", made)
        patch.setattr(stages, "_whole_state", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(out, changes)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != artefact.LOCK
    }


def facts(folder: Path) -> dict[str, Any]:
    return artefact.read(folder, "memory").facts


def steps(out: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (out / "work").glob("checkpoint-*"))


# --- 8: the same facts and bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [(4, 38), (99,), pytest.param((13,), marks=pytest.mark.slow), pytest.param((40, 99), marks=pytest.mark.slow)],
)
def test_8_kills_change_nothing_in_a_trained_folder(
    at: tuple[int, ...], train: Train, straight: Path, tmp_path: Path
) -> None:
    """Step 99 is never reached: the kill comes behind the last step. The loss was that of the steps after it, or 0.0."""
    for step in at:
        killed(train, tmp_path / "m", step)
    assert content(train(tmp_path / "m")) == content(straight)
    facts = artefact.read(straight, "memory").facts
    assert facts["updates"] == facts["planned_updates"] == 45
    assert facts["train_loss"] > 1


@pytest.mark.parametrize("at", [31, 99])
def test_8_kills_change_no_evaluation_and_no_best_step(
    at: int, train: Train, straight_best: Path, tmp_path: Path
) -> None:
    killed(train, tmp_path / "m", at, BEST)
    (tmp_path / "m").rename(tmp_path / "moved")  # checkpoints name the folder of the best one by its old path
    moved = train(tmp_path / "moved", BEST)
    assert facts(moved) == facts(straight_best)
    assert content(moved) == content(straight_best)
    assert len(artefact.read(straight_best, "memory").facts["evaluations"]) == 6  # and the final one


def test_8_a_training_that_has_stopped_early_is_not_continued(train: Train, tmp_path: Path) -> None:
    changes = {**BEST, "epochs": 4, "learning_rate": 0.3, "patience": 2}
    first = train(tmp_path / "straight", changes)
    facts = artefact.read(first, "memory").facts
    assert facts["updates"] < facts["planned_updates"]
    killed(train, tmp_path / "m", 9999, changes)
    assert content(train(tmp_path / "m", changes)) == content(first)


def test_8_the_loss_is_the_mean_over_all_steps(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    plain = fitting.LossTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        seen.append(float(loss))
        return loss

    monkeypatch.setattr(fitting.LossTrainer, "training_step", step)
    killed(train, tmp_path / "m", 10)
    n_lost = 2  # steps behind the last checkpoint are made again
    seen = seen[:-n_lost]
    train(tmp_path / "m")
    facts = artefact.read(tmp_path / "m", "memory").facts
    assert len(seen) == facts["updates"]
    assert facts["train_loss"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_8_two_runs_write_the_same_bytes(
    base_folder: Path, short_tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    short = {"epochs": 0.05, "learning_rate": 1e-3}
    for run in "ab":
        stages.run_pretrain(
            spec(16, train=TrainSettings(**short)),
            tokenizer_folder,
            short_tokens,
            tmp_path / run / "p",
            context=CONTEXT,
        )
        lora = LoraSettings(**short, rank=2)
        stages.run_lora(base_folder, short_tokens, tmp_path / run / "l", lora, context=CONTEXT, seed=0)
    for name in "pl":
        assert content(tmp_path / "a" / name) == content(tmp_path / "b" / name)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_8_the_names_in_an_adapter_are_sorted(base_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    """peft keeps them in a set, whose order is another one in each process."""
    lora = LoraSettings(epochs=0.05, learning_rate=1e-3, rank=2)
    stages.run_lora(base_folder, short_tokens, tmp_path / "l", lora, context=CONTEXT, seed=0)
    names = json.loads((tmp_path / "l" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 3
    assert names == sorted(names)


# --- 11: the newest whole checkpoint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed(train, tmp_path_factory.mktemp("unfinished") / "m", 20)


@pytest.fixture(scope="module")
def unfinished_best(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed(train, tmp_path_factory.mktemp("unfinished") / "m", 31, BEST)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "whole.json"]


def test_11_two_whole_checkpoints_are_kept(unfinished: Path, unfinished_best: Path) -> None:
    assert steps(unfinished) == [16, 18]
    for folder in (unfinished / "work").glob("checkpoint-*"):
        assert {path.name for path in folder.iterdir()} >= set(FILES)
    assert len(steps(unfinished_best)) == 3  # and the best one
    for out in (unfinished, unfinished_best):
        for step in steps(out):
            known = checkpoints.facts(out / "work" / f"checkpoint-{step}")
            assert known is not None
            assert known["best"] is None or known["best"] in steps(out)


@pytest.mark.parametrize("damage", [cut, empty, flipped, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_11_a_damaged_checkpoint_is_passed_over_with_a_warning(
    name: str, damage: Callable[[Path], None], unfinished: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(unfinished / "work", tmp_path / "work")
    damage(work / "checkpoint-18" / name)
    if (work / "checkpoint-18" / "whole.json").exists():
        with pytest.warns(
            UserWarning, match=r"checkpoint-18: expected the checkpoint as it was written, found a damaged"
        ):
            assert checkpoints.newest(work, keep_best=False) == work / "checkpoint-16"
    else:  # nothing says that it ever was whole
        assert checkpoints.newest(work, keep_best=False) == work / "checkpoint-16"
    assert not (work / "checkpoint-18").exists()


def test_11_a_checkpoint_that_was_being_removed_or_written_is_no_news(unfinished: Path, tmp_path: Path) -> None:
    work = shutil.copytree(unfinished / "work", tmp_path / "work")
    (work / "checkpoint-16" / "optimizer.pt").unlink()
    shutil.copytree(work / "checkpoint-18", work / "checkpoint-20", ignore=shutil.ignore_patterns("whole.json"))
    assert checkpoints.newest(work, keep_best=False) == work / "checkpoint-18"  # warnings are errors here
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-18"]


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_11_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    name: str, train: Train, straight: Path, unfinished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(unfinished, tmp_path / "m")
    flipped(out / "work" / "checkpoint-18" / name)
    with pytest.warns(UserWarning, match="checkpoint-18: expected"):
        train(out)
    assert content(out) == content(straight)


def test_11_without_a_whole_checkpoint_the_training_begins_again(
    train: Train, straight: Path, unfinished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(unfinished, tmp_path / "m")
    for step in steps(out):
        (out / "work" / f"checkpoint-{step}" / "whole.json").unlink()  # a kill while `work` was removed
    train(out)
    assert content(out) == content(straight)


def test_11_damaged_best_weights_are_not_taken(
    train: Train, straight_best: Path, unfinished_best: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(unfinished_best, tmp_path / "m")
    best = steps(out)[0]
    flipped(out / "work" / f"checkpoint-{best}" / "model.safetensors")
    with pytest.warns(UserWarning, match=rf"checkpoint-{best}: expected the checkpoint as it was written"):
        train(out, BEST)
    assert content(out) == content(straight_best)


@pytest.mark.parametrize("function", ["torch.save", "transformers.trainer_callback.TrainerState.save_to_json"])
def test_11_a_disk_that_is_full_in_a_checkpoint_costs_only_that_checkpoint(
    function: str, train: Train, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = operator.attrgetter(function.split(".", 1)[1])(sys.modules[function.split(".")[0]])

    def write(*given: Any) -> None:
        """Write an empty file from step 20 on."""
        path = next(Path(each) for each in given if isinstance(each, str))
        if path.parent.name != "checkpoint-20":
            return plain(*given)
        path.write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(function, write)
        with pytest.raises(ResourceError, match="found it full"):
            train(tmp_path / "m")
    assert steps(tmp_path / "m") == [16, 18, 20]
    assert content(train(tmp_path / "m")) == content(straight)


def test_11_scores_of_bases_that_were_damaged_are_made_again(
    small_folder: Path, base_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    def run(out: Path) -> None:
        settings = MemorySettings(**{**BEST, "epochs": 0.2})
        stages.run_train(small_folder, short_tokens, [], out, settings, context=CONTEXT, seed=3, bases=[base_folder])

    run(tmp_path / "straight")
    killed(lambda out, _: run(out), tmp_path / "m", 2)
    flipped(tmp_path / "m" / "work" / "base-base" / "scores.npy")
    run(tmp_path / "m")
    assert content(tmp_path / "m") == content(tmp_path / "straight")


def test_11_damaged_settings_of_an_unfinished_training_do_no_harm(
    train: Train, straight: Path, unfinished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(unfinished, tmp_path / "m")
    cut(out / "work" / "settings.json")
    train(out)
    assert content(out) == content(straight)


def test_12_sharded_weights_are_an_artefact_like_others(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers writes several files from 50 GB on; a smaller limit stands for a larger model."""
    from transformers import PreTrainedModel

    from memdec.models import loading

    plain = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda self, *a, **k: plain(self, *a, **k, max_shard_size="20KB")
    )
    settings = TrainSettings(epochs=0.05)
    stages.run_finetune(base_folder, short_tokens, tmp_path / "f", settings, context=CONTEXT, seed=0)
    files = artefact.read(tmp_path / "f", "model").files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert torch.isfinite(loading.load(tmp_path / "f").get_input_embeddings().weight).all()
    stages.run_finetune(tmp_path / "f", short_tokens, tmp_path / "g", settings, context=CONTEXT, seed=0)
    assert load_file(next((tmp_path / "g").glob("*.safetensors")))

"""Candidates for a learning rate: the best on valid is trained in full, within the budget, whatever was killed before."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from making import CONTEXT, launch
from safetensors.torch import load_file

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, ConfigError
from memdec.models import flops
from memdec.settings import LoraSettings, TrainSettings
from memdec.training import fitting, stages

SLOW, GOOD = 1e-7, 3e-3

# The loss of process 1 is not finite in the second update of the larger rate.
SPOILED = """
import os
from memdec.cli import main
from memdec.training import fitting

loss, step = fitting.fused_loss, fitting.LossTrainer.training_step
spoiled = False

def training_step(self, *rest):
    global spoiled
    spoiled = os.environ["RANK"] == "1" and self.args.learning_rate > 5e-3 and self.state.global_step == 1
    return step(self, *rest)

def fused_loss(*rest):
    sums = loss(*rest)
    return sums._replace(loss=sums.loss * float("nan")) if spoiled else sums

fitting.fused_loss, fitting.LossTrainer.training_step = fused_loss, training_step
main()
"""


def train(small: Path, stream: Path, out: Path, budget: tuple[Path, float] | None = None, **changes: Any) -> Any:
    settings = TrainSettings(**{"epochs": 0.5, **changes})
    stages.run_finetune(small, stream, out, settings, context=CONTEXT, seed=3, budget=budget)
    return artefact.read(out, "model").facts


def equal(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_rate_is_trained_as_if_it_alone_had_been_given(
    small_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    facts = train(small_folder, short_tokens, tmp_path / "tuned", learning_rates=[SLOW, GOOD], trial=0.5)
    alone = train(small_folder, short_tokens, tmp_path / "alone", learning_rate=GOOD)
    assert facts["learning_rate"] == GOOD
    assert equal(tmp_path / "tuned", tmp_path / "alone")
    slow, good = facts["trials"]
    assert (slow["learning_rate"], good["learning_rate"]) == (SLOW, GOOD)
    assert good["score"] < slow["score"]
    assert slow["updates"] == good["updates"] == pytest.approx(alone["updates"] / 2, abs=1)
    assert facts["flops"] == pytest.approx(alone["flops"] + slow["flops"] + good["flops"])
    assert facts["valid_perplexity"] == alone["valid_perplexity"]
    assert not (tmp_path / "tuned" / "work").exists()


def test_trials_count_against_the_budget(small_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    budget = (small_folder, 1.0)
    n_tokens = artefact.read(short_tokens, "tokens").facts["tokens"]["train"]
    ceiling = flops.ceiling(small_folder, 1.0, n_tokens, CONTEXT)
    facts = train(small_folder, short_tokens, tmp_path / "t", budget, learning_rates=[1e-3, GOOD], trial=0.5, epochs=9)
    assert facts["flops_ceiling"] == ceiling
    assert 0.8 * ceiling < facts["flops"] <= ceiling
    assert facts["updates"] == pytest.approx(2 * facts["trials"][0]["updates"], abs=2)


def test_the_search_ends_at_the_first_rate_that_is_worse(
    small_folder: Path, short_tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        facts = train(small_folder, short_tokens, tmp_path / "t", learning_rates=[0.9, GOOD, 0.5, SLOW], trial=0.5)
    assert [trial["learning_rate"] for trial in facts["trials"]] == [SLOW, GOOD, 0.5]
    assert facts["learning_rate"] == GOOD
    assert "the end of the grid" not in caplog.text
    with caplog.at_level(logging.WARNING):
        train(small_folder, short_tokens, tmp_path / "end", learning_rates=[SLOW, GOOD], trial=0.5)
    assert "the best of 1e-07 to 0.003 is 0.003, the end of the grid; try larger ones" in caplog.text


def test_a_finished_trial_is_not_repeated(
    small_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = fitting.fit, []

    def killed(model: Any, settings: Any, *rest: Any) -> Any:
        calls.append(settings.learning_rate)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(model, settings, *rest)

    monkeypatch.setattr(fitting, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        train(small_folder, short_tokens, tmp_path / "killed", learning_rates=[SLOW, GOOD])
    train(small_folder, short_tokens, tmp_path / "killed", learning_rates=[SLOW, GOOD])
    assert calls == [SLOW, GOOD, GOOD, GOOD]
    train(small_folder, short_tokens, tmp_path / "at once", learning_rates=[SLOW, GOOD])
    assert equal(tmp_path / "killed", tmp_path / "at once")


def test_other_seeds_take_the_rate_of_the_first(small_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    tuned = {"learning_rates": [SLOW, GOOD], "trial": 0.5, "epochs": 9}
    first, budget = tmp_path / "first", (small_folder, 1.0)
    known = train(small_folder, short_tokens, first, budget, **tuned)
    settings = TrainSettings(**tuned)
    stages.run_finetune(
        small_folder, short_tokens, tmp_path / "next", settings, context=CONTEXT, seed=4, budget=budget, tuned_by=first
    )
    facts = artefact.read(tmp_path / "next", "model").facts
    assert (facts["learning_rate"], facts["trials"], facts["flops_ceiling"]) == (GOOD, [], known["flops_ceiling"])
    assert facts["updates"] == known["updates"]
    for seed, other, message in (
        (3, {}, "expected the same training with another seed than 3, found another with this seed"),
        (4, {"warmup": 0.1}, "expected the same training with another seed than 4, found another warmup"),
    ):
        with pytest.raises(ArtifactError, match=message):
            stages.run_finetune(
                small_folder, short_tokens, tmp_path / "x", TrainSettings(**tuned | other), context=CONTEXT, seed=seed,
                budget=budget, tuned_by=first,
            )  # fmt: skip
    with pytest.raises(ArtifactError, match="expected a training that tried learning_rates, found none"):
        stages.run_finetune(
            small_folder, short_tokens, tmp_path / "x", settings, context=CONTEXT, seed=5, budget=budget,
            tuned_by=tmp_path / "next",
        )  # fmt: skip


def test_a_rate_that_diverges_is_left_out(
    small_folder: Path, short_tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        facts = train(small_folder, short_tokens, tmp_path / "t", learning_rates=[1e30, GOOD])
    assert facts["learning_rate"] == GOOD
    assert facts["trials"][1]["score"] is None
    assert "learning rate 1e+30 is left out: step" in caplog.text
    # What it took counts, with the update at which the loss was not finite.
    good, bad = facts["trials"]
    step = int(caplog.text.split("left out: step ")[1].split(":")[0])
    assert (bad["updates"], bad["flops"]) == (step, pytest.approx(step * good["flops"] / good["updates"]))
    assert facts["flops"] == pytest.approx(facts["updates"] * bad["flops"] / step + good["flops"] + bad["flops"])
    with pytest.raises(ConfigError, match=r"expected one at which the loss stays finite, found none of 1e\+30; lower"):
        train(small_folder, short_tokens, tmp_path / "none", learning_rates=[1e30])


@pytest.mark.slow
def test_a_rate_that_diverges_on_one_process_is_left_out_by_all(
    small_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(SPOILED)
    arguments = ["finetune", "--model", small_folder, "--tokens", short_tokens, "--out", tmp_path / "t"]
    arguments += ["--context", CONTEXT, "--seed", 3, "--batch-size", 2, "--trial", 0.5]
    arguments += ["--learning-rates", GOOD, "--learning-rates", 2 * GOOD]
    said = launch(2, tmp_path / "worker.py", *arguments)
    assert said.count("learning rate 0.006 is left out: step 2: the loss is nan on token positions") == 1
    facts = artefact.read(tmp_path / "t", "model").facts
    assert [trial["score"] is None for trial in facts["trials"]] == [False, True]
    assert facts["trials"][1]["updates"] == 2
    assert facts["learning_rate"] == GOOD


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_an_adapter_is_tuned_too(small_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, epochs=0.5, learning_rates=[SLOW, 1e-2], trial=0.5, keep_best=True)
    stages.run_lora(small_folder, short_tokens, tmp_path / "lora", settings, context=CONTEXT, seed=3)
    facts = artefact.read(tmp_path / "lora", "lora").facts
    assert facts["learning_rate"] == 1e-2
    assert facts["trials"][1]["score"] < facts["trials"][0]["score"]

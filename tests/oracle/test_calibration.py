"""The choice of the targets' settings: formulas against plain loops, the stage against the whole model."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from making import CONTEXT
from typer.testing import CliRunner

from memdec.artefacts import artefact
from memdec.cli import app
from memdec.config import load
from memdec.datastore import accuracy, calibrate, index, keys, targets
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError
from memdec.maths import calibration
from memdec.maths.sparse_rows import probability_of
from memdec.maths.windows import windows
from memdec.models import loading
from memdec.results import table6
from memdec.settings import CalibrateSettings, Case, DatastoreSettings, IndexSettings, TargetSettings, TeacherSettings
from memdec.text import tokens

ROOT = Path(__file__).resolve().parents[2]
WINDOW = {"context": CONTEXT, "stride": CONTEXT // 2}
SETTINGS = CalibrateSettings(neighbours=[5, 20], temperatures=[0.5, 4], lambdas=[0.2, 0.5, 0.8], tops=[3, 9], most=400)


def test_p_knn_of_the_true_token_for_every_k_and_tau() -> None:
    rng = np.random.default_rng(0)
    sq_dist = np.sort(rng.gamma(2.0, 3.0, (30, 12)).astype(np.float32), axis=1)
    sq_dist[4, 7:] = np.inf  # a short row
    same = rng.random((30, 12)) < 0.3
    found = calibration.label_probabilities(sq_dist, same, [1, 5, 12], [0.5, 16.0])
    assert list(found) == [(1, 0.5), (5, 0.5), (12, 0.5), (1, 16.0), (5, 16.0), (12, 16.0)]
    for (k, tau), p in found.items():
        for row in range(30):
            weights = [math.exp(-float(d) / tau) for d in sq_dist[row, :k]]
            hits = sum(w for w, hit in zip(weights, same[row], strict=False) if hit)
            assert p[row] == pytest.approx(hits / sum(weights), rel=1e-6, abs=1e-12)


def test_the_best_of_the_grid_has_the_lowest_perplexity_with_its_own_lambda() -> None:
    rng = np.random.default_rng(1)
    p_key = rng.random(50)
    by = {(k, tau): rng.random(50) ** (1 + tau) * (rng.random(50) > 0.1) for k in (4, 8) for tau in (1.0, 2.0)}
    found = calibration.choose(np.log(p_key), by, [0.1, 0.5, 0.9])
    plain = {
        (k, tau, weight): math.exp(-np.mean(np.log(weight * p + (1 - weight) * p_key)))
        for (k, tau), p in by.items()
        for weight in (0.1, 0.5, 0.9)
    }
    best = min(plain, key=lambda at: plain[at])
    assert found[0][:3] == best
    assert found[0].perplexity == pytest.approx(plain[best], rel=1e-12)
    assert [choice.perplexity for choice in found] == sorted(choice.perplexity for choice in found)


def test_crossing_lies_on_the_line_between_two_points() -> None:
    rising = np.array([1.0, 2.0, 4.0])
    assert calibration.crossing([1.0, 2.0, 3.0], rising, 3.0) == 2.5
    assert calibration.crossing([1.0, 2.0, 3.0], rising, 9.0) == 3.0


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(base_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("calibration")
    keys.run(base_folder, token_folder, root / "d", DatastoreSettings(), **WINDOW)
    index.run([root / "d"], root / "i", IndexSettings())
    calibrate.run(base_folder, [root / "d"], root / "i", token_folder, root / "c", SETTINGS, **WINDOW)
    return root


def p_key(folder: Path, stream: Path, split: tokens.Split, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Distributions at the positions of whole windows from the start, at most `most`, and their true tokens."""
    values, model = tokens.load_stream(stream, split), loading.load(folder)
    parts = windows(len(values), **WINDOW)
    n_vocab = len(tokens.load_tokenizer(str(folder)))
    found, true = [], []
    with torch.no_grad():
        for part in parts:
            logits = model(torch.from_numpy(part.inputs(values, 0))[None]).logits[
                0, part.first - part.begin :, :n_vocab
            ]
            found.append(logits.double().softmax(-1).numpy())
            true.append(values[part.first : part.end])
    return np.concatenate(found)[:most], np.concatenate(true)[:most].astype(np.int64)


def test_the_perplexity_of_the_key_model_is_its_own(home: Path, base_folder: Path, token_folder: Path) -> None:
    everything = SETTINGS.model_copy(update={"most": 10**6})
    calibrate.run(base_folder, [home / "d"], home / "i", token_folder, home / "all", everything, **WINDOW)
    p, true = p_key(base_folder, token_folder, "valid", 10**6)
    facts = artefact.read(home / "all", "calibration").facts
    assert facts["positions"] == len(true)
    expected = math.exp(-np.mean(np.log(p[np.arange(len(true)), true])))
    assert facts["perplexity"]["key"] == pytest.approx(expected, rel=1e-5)
    assert facts["perplexity"]["mixture"] < expected


def test_confidence_of_p_key_and_of_p_knn_on_what_was_trained_on_and_on_valid(
    home: Path, base_folder: Path, token_folder: Path
) -> None:
    everything = SETTINGS.model_copy(update={"most": 10**6})
    calibrate.run(base_folder, [home / "d"], home / "i", token_folder, home / "all", everything, **WINDOW)
    found = json.loads((home / "all" / "calibration.json").read_text())["confidence"]
    for split in ("train", "valid"):
        p, true = p_key(base_folder, token_folder, split, 10**6)
        assert found["key"][split]["p_true"] == pytest.approx(p[np.arange(len(true)), true].mean(), rel=1e-5)
        assert found["key"][split]["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-5)
    chosen = calibrate.read(home / "all")
    settings = TargetSettings(neighbours=chosen["neighbours"], temperature=chosen["temperature"], dtype="float32")
    targets.run([home / "d"], home / "i", token_folder, home / "whole", settings)
    true = tokens.load_stream(token_folder, "train").astype(np.int64)
    sha256 = artefact.read(token_folder, "tokens").facts["sha256"]["train"]
    rows = TargetReader([home / "whole"], sha256).rows([(0, len(true))])
    assert found["knn"]["train"]["p_true"] == pytest.approx(probability_of(rows, true).mean(), rel=1e-5)


def test_the_choice_is_the_best_of_the_grid_that_is_written(home: Path) -> None:
    said = json.loads((home / "c" / "calibration.json").read_text())
    assert len(said["grid"]) == 4
    best = min(said["grid"], key=lambda each: each["perplexity"])
    chosen = calibrate.read(home / "c")
    assert said["chosen"] == chosen
    assert (chosen["neighbours"], chosen["temperature"], chosen["knn_weight"]) == (
        best["neighbours"], best["temperature"], best["weight"],
    )  # fmt: skip
    assert chosen["top"] in (3, 9, None)
    assert said["perplexity"]["mixture"] == best["perplexity"]
    assert artefact.read(home / "c", "calibration").facts["positions"] <= 400


def test_the_targets_of_a_choice_are_those_of_its_settings(home: Path, token_folder: Path) -> None:
    chosen = calibrate.read(home / "c")
    names = ("neighbours", "temperature", "top")
    settings = TargetSettings(**{name: chosen[name] for name in names})
    targets.run([home / "d"], home / "i", token_folder, home / "t", settings)
    run = CliRunner().invoke(app, [
        "targets", "--datastore", str(home / "d"), "--index", str(home / "i"), "--tokens", str(token_folder),
        "--out", str(home / "by"), "--neighbours", "7", "--calibration", str(home / "c"),
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    assert artefact.read(home / "by", "targets").recipe == artefact.read(home / "t", "targets").recipe


def test_marked_words_are_measured_with_the_choice(home: Path, base_folder: Path, small_folder: Path) -> None:
    text = Case(text="reads the [[index]]")
    config = load(ROOT / "config" / "mini.yaml").study_for("table6").model_copy(update={"cases": [text]})
    table6.run(config, base_folder, small_folder, [home / "d"], home / "i", home / "words", home / "c")
    chosen, settings = calibrate.read(home / "c"), artefact.read(home / "words", "cases").settings
    assert (settings["neighbours"], settings["temperature"]) == (chosen["neighbours"], chosen["temperature"])


def test_a_teacher_takes_lambda_only_where_it_is_mixed(home: Path) -> None:
    chosen, plain = calibrate.read(home / "c"), TeacherSettings(top=5)
    alone, mixed = (calibrate.teacher(plain, home / "c", each) for each in (False, True))
    assert alone == TeacherSettings(top=5, temperature=chosen["key_temperature"])
    assert mixed == TeacherSettings(top=5, temperature=chosen["key_temperature"], knn_weight=chosen["knn_weight"])
    assert calibrate.teacher(plain, None, True) == plain
    assert calibrate.targets(TargetSettings(), None) == TargetSettings()


def test_a_model_that_learned_its_text_by_heart_is_tempered(
    home: Path, base_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    from memdec.settings import TrainSettings
    from memdec.training import stages

    settings = TrainSettings(epochs=3, learning_rate=1e-2)
    stages.run_finetune(base_folder, token_folder, tmp_path / "m", settings, context=CONTEXT, seed=0)
    keys.run(tmp_path / "m", token_folder, tmp_path / "d", DatastoreSettings(), **WINDOW)
    index.run([tmp_path / "d"], tmp_path / "i", IndexSettings())
    every = SETTINGS.model_copy(update={"most": 10**6})
    calibrate.run(tmp_path / "m", [tmp_path / "d"], tmp_path / "i", token_folder, tmp_path / "c", every, **WINDOW)
    tau = calibrate.read(tmp_path / "c")["key_temperature"]
    entropies = {}
    for split in ("train", "valid"):
        p, _ = p_key(tmp_path / "m", token_folder, split, 10**6)
        tempered = p ** (1 / tau if split == "train" else 1)
        tempered /= tempered.sum(1, keepdims=True)
        entropies[split] = -(tempered * np.log(tempered)).sum(1).mean()
    assert entropies["train"] == pytest.approx(entropies["valid"], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": [10**6]}, "neighbours: expected at most"),
        ({}, "expected keys of .*, found those of another model"),
    ],
)
def test_bad_input(
    changes: dict[str, list[int]], message: str, home: Path, base_folder: Path, small_folder: Path, token_folder: Path
) -> None:
    model = base_folder if changes else small_folder
    settings = SETTINGS.model_copy(update=changes)
    with pytest.raises((ArtifactError, ConfigError), match=message):
        calibrate.run(model, [home / "d"], home / "i", token_folder, home / "bad", settings, **WINDOW)
    assert not (home / "bad").exists()


def test_a_bound_of_total_variation_chooses_the_cells(home: Path, base_folder: Path, token_folder: Path) -> None:
    """The same calibration as with the chosen nprobe; k is the largest candidate, and the worst tau counts."""
    cells = IndexSettings(
        kind="ivfflat", centroids=8, check_neighbours=max(SETTINGS.neighbours), check_nprobe=[1, 4, 8]
    )
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        index.run([home / "d"], home / "cells", cells)
    settings = SETTINGS.model_copy(update={"temperatures": [1.0, 16.0]})
    check = artefact.read(home / "cells", "index").facts["check"]["nprobe"]
    bound = max(check["4"]["rescored"]["total_variation"]["20"][tau] for tau in ("1", "16"))
    nprobe = accuracy.within(bound, home / "cells", max(SETTINGS.neighbours), [1.0, 16.0]).nprobe
    assert nprobe == 4
    for name, chosen in (("by-bound", {"max_tv": bound}), ("stated", {"nprobe": nprobe})):
        calibrate.run(
            base_folder, [home / "d"], home / "cells", token_folder, home / name, settings, **WINDOW, **chosen
        )
    assert (
        artefact.read(home / "by-bound", "calibration").recipe == artefact.read(home / "stated", "calibration").recipe
    )
    with pytest.raises(ConfigError, match=r"max_tv: expected it in place of nprobe, found both \(0.1, nprobe 4\)"):
        calibrate.run(
            base_folder,
            [home / "d"],
            home / "cells",
            token_folder,
            home / "x",
            settings,
            **WINDOW,
            nprobe=4,
            max_tv=0.1,
        )

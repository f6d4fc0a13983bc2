"""The stages fidelity and shapes on tiny models, against loops over the positions of the train split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from making import CONTEXT, made_text, run_memdec

from memdec.artefacts import artefact
from memdec.datastore import index, targets, teacher
from memdec.datastore import keys as datastore
from memdec.errors import ArtifactError
from memdec.maths.windows import windows
from memdec.models import loading
from memdec.results import fidelity, positions, shapes
from memdec.settings import (
    DatastoreSettings,
    FileCorpus,
    IndexSettings,
    SampleSettings,
    ShapesSettings,
    TargetSettings,
    TeacherSettings,
)
from memdec.text import corpora, tokens

WINDOW = {"context": CONTEXT, "stride": CONTEXT // 2}
KNN = TargetSettings(neighbours=12, temperature=2.0, top=8, shards=2)


@pytest.fixture(scope="module")
def shards(base_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("knn")
    datastore.run(base_folder, token_folder, home / "store", DatastoreSettings(), **WINDOW)
    index.run(home / "store", home / "index", IndexSettings())
    for shard in range(2):
        targets.run(home / "store", home / "index", token_folder, home / str(shard), KNN, shard=shard)
    return [home / "0", home / "1"]


def dense_rows(shards: list[Path], n_vocab: int) -> np.ndarray:
    found = []
    for folder in shards:
        indptr, ids, probs = (np.load(folder / f"{name}.npy") for name in ("indptr", "tokens", "probs"))
        p = np.zeros((len(indptr) - 1, n_vocab))
        for row in range(len(p)):
            p[row, ids[indptr[row] : indptr[row + 1]]] = probs[indptr[row] : indptr[row + 1]]
        found.append(p / p.sum(1, keepdims=True))
    return np.concatenate(found)


def dense_model(folder: Path, token_folder: Path, n_vocab: int) -> np.ndarray:
    """The model's probabilities at every position, one window at a time through its ordinary forward."""
    model, stream = loading.load(folder), tokens.load_stream(token_folder, "train")
    prefix = tokens.prefix_id(tokens.load_tokenizer(str(folder)))
    found = []
    for part in windows(len(stream), **WINDOW):
        with torch.no_grad():
            logits = model(torch.from_numpy(part.inputs(stream, prefix))[None]).logits[0, part.first - part.begin :]
        found.append(logits[:, :n_vocab].double().softmax(1).numpy())
    return np.concatenate(found)


def cells(folder: Path, *names: str) -> dict[Any, dict[str, Any]]:
    records = json.loads((folder / "records.json").read_text())
    found = {tuple(record[name] for name in names): record for record in records}
    assert len(found) == len(records)
    return found


def test_fidelity_equals_a_loop_over_all_positions(
    shards: list[Path], base_folder: Path, small_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    settings = SampleSettings(resamples=50, batch_size=3)
    fidelity.run(small_folder, shards, token_folder, tmp_path / "f", settings, **WINDOW, name="mine")
    n_vocab = len(tokens.load_tokenizer(str(base_folder)))
    p, q = dense_rows(shards, n_vocab), dense_model(small_folder, token_folder, n_vocab)
    assert len(p) == len(q)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {
            "match": (p == p.max(1, keepdims=True))[np.arange(len(p)), q.argmax(1)],
            "kl": np.where(p > 0, p * np.log(p / q), 0).sum(1),
            "total_variation": np.abs(p - q).sum(1) / 2,
            "pearson": np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]),
        }
    several = (p >= settings.floor).sum(1) != 1
    assert 0 < several.mean() < 1
    found = cells(tmp_path / "f", "metric", "rows")
    assert len(found) == 12
    for metric, each in values.items():
        for rows, use in (("all", several | True), ("one token", ~several), ("several tokens", several)):
            record = found[metric, rows]
            assert record["value"] == pytest.approx(each[use].mean(), abs=2e-5), (metric, rows)
            assert record["low"] <= record["value"] <= record["high"]
            assert (record["n"], record["memory"], record["imitates"]) == (use.sum(), "mine", "p_kNN")
    sums = pd.read_csv(tmp_path / "f" / "windows.csv").groupby("rows")[["match", "n"]].sum()
    for rows in fidelity.ROWS:
        assert sums.loc[rows, "match"] / sums.loc[rows, "n"] == pytest.approx(found["match", rows]["value"])
    facts = artefact.read(tmp_path / "f", "fidelity").facts
    assert facts["one_token"] == pytest.approx(1 - several.mean())
    assert facts["rows_cut"] == pytest.approx(((p > 0).sum(1) == KNN.top).mean())
    assert 0 < facts["missing_at_most"] < 1


def test_a_sample_is_spread_over_the_text_and_the_same_for_every_memory(
    shards: list[Path], base_folder: Path, small_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    parts = windows(1000, **WINDOW)
    chosen = positions.sample(parts, WINDOW["stride"], 160, seed=0)
    assert len(chosen) == (160 - CONTEXT) // WINDOW["stride"] + 1
    assert (
        max(sum(part.n_scored for part in positions.sample(parts, WINDOW["stride"], 160, s)) for s in range(40)) <= 160
    )
    gaps = np.diff([part.begin for part in chosen])
    assert gaps.max() - gaps.min() <= WINDOW["stride"]
    assert chosen != positions.sample(parts, WINDOW["stride"], 160, seed=1)
    assert positions.sample(parts, WINDOW["stride"], 1000, seed=0) == parts
    assert len(positions.sample(parts, WINDOW["stride"], 1, seed=0)) == 1
    settings = SampleSettings(most=200, resamples=50)
    for name, memory in (("a", small_folder), ("b", base_folder)):
        fidelity.run(memory, shards, token_folder, tmp_path / name, settings, **WINDOW)
    a, b = (pd.read_csv(tmp_path / name / "windows.csv") for name in "ab")
    pd.testing.assert_frame_equal(a[["rows", "window", "n"]], b[["rows", "window", "n"]])
    assert (a["kl"] != b["kl"]).any()
    manifest = artefact.read(tmp_path / "a", "fidelity")
    assert manifest.settings["most"] == 200
    assert manifest.facts["positions"] == a[a["rows"] == "all"]["n"].sum() < manifest.facts["of_positions"]


def test_a_group_without_positions_has_no_value() -> None:
    values, window = np.array([1.0, 3.0, 8.0]), np.array([0, 0, 1])
    some = positions.window_means(values, window, np.array([True, True, False]), 20, 0)
    assert some == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 2, "windows": 1}
    none = positions.window_means(values, window, np.zeros(3, bool), 20, 0)
    assert none == {"value": None, "low": None, "high": None, "n": 0, "windows": 0}


@pytest.mark.slow
def test_shapes_equal_a_loop_over_all_positions(
    shards: list[Path], base_folder: Path, small_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    settings = ShapesSettings(resamples=50, floor=0.02, examples=4, shown=5)
    shapes.run(base_folder, small_folder, shards, token_folder, tmp_path / "s", settings, **WINDOW)
    n_vocab = len(tokens.load_tokenizer(str(base_folder)))
    dense = {"p_kNN": dense_rows(shards, n_vocab)}
    dense |= {"p_LM": dense_model(base_folder, token_folder, n_vocab)}
    dense |= {"p_mem": dense_model(small_folder, token_folder, n_vocab)}
    found, bars = cells(tmp_path / "s", "distribution", "metric"), pd.read_csv(tmp_path / "s" / "histogram.csv")
    for name, p in dense.items():
        log = np.log(p, where=p > 0, out=np.zeros_like(p))
        values = {"top1": p.max(1), "entries": (p >= 0.02).sum(1), "entropy": -(p * log).sum(1)}
        for metric, each in values.items():
            assert found[name, metric]["value"] == pytest.approx(each.mean(), rel=1e-3), (name, metric)
            bar = bars[(bars["distribution"] == name) & (bars["metric"] == metric)]
            assert bar["share"].sum() == pytest.approx(1)
        near = bars[(bars["distribution"] == name) & (bars["metric"] == "entries")]
        two = near[near["low"] == 2]["share"].item()
        assert two == pytest.approx(((values["entries"] >= 2) & (values["entries"] < 4)).mean(), abs=5e-3)
    assert found["p_kNN", "stored"]["value"] == pytest.approx((dense["p_kNN"] > 0).sum(1).mean())
    sizes = {name: found[name, "top1"]["parameters"] for name in dense}
    assert sizes["p_kNN"] is None
    assert sizes["p_LM"] > sizes["p_mem"] > 0
    words = tokens.load_tokenizer(str(base_folder))
    stream = tokens.load_stream(token_folder, "train")
    examples = json.loads((tmp_path / "s" / "examples.json").read_text())
    assert len(examples) == 4
    assert len({example["next"] for example in examples}) == 4
    for example in examples:
        place = example["position"]
        assert example["next"] == words.decode([int(stream[place])])
        assert 2 <= (dense["p_kNN"][place] >= 0.02).sum() <= 3
        best = words.decode([int(dense["p_kNN"][place].argmax())])
        assert example["next"] in [line["token"] for line in example["tokens"]]
        line = next(line for line in example["tokens"] if line["token"] == best)
        assert line["p_kNN"] == pytest.approx(dense["p_kNN"][place].max(), rel=1e-5)
        assert len(example["tokens"]) == 5


def test_what_does_not_belong_together_is_refused(
    shards: list[Path],
    base_folder: Path,
    small_folder: Path,
    token_folder: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    (tmp_path / "text.txt").write_text(made_text(250, 5))
    corpora.run(FileCorpus(source="files", path=str(tmp_path / "text.txt"), min_bytes=200), tmp_path / "other")
    tokens.run_tokens(tokenizer_folder, tmp_path / "other", tmp_path / "tokens")
    how, out = SampleSettings(most=100, resamples=20), tmp_path / "out"
    with pytest.raises(ArtifactError, match="expected targets for this token stream, found some for another"):
        fidelity.run(small_folder, shards, tmp_path / "tokens", out, how, **WINDOW)
    with pytest.raises(ArtifactError, match="found one of this text; leave out --control"):
        fidelity.run(small_folder, shards, token_folder, out, how, control=True, **WINDOW)
    with pytest.raises(ArtifactError, match="shard"):
        fidelity.run(small_folder, shards[:1], token_folder, out, how, **WINDOW)
    teacher.run(base_folder, token_folder, tmp_path / "teacher", TeacherSettings(top=4), **WINDOW)
    with pytest.raises(ArtifactError, match="expected kNN targets, found those of a teacher"):
        shapes.run(base_folder, small_folder, [tmp_path / "teacher"], token_folder, out, ShapesSettings(), **WINDOW)
    fidelity.run(small_folder, [tmp_path / "teacher"], token_folder, tmp_path / "t", how, **WINDOW)
    assert cells(tmp_path / "t", "metric", "rows")["kl", "all"]["imitates"] == "teacher"
    datastore.run(base_folder, tmp_path / "tokens", tmp_path / "store", DatastoreSettings(), **WINDOW)
    index.run(tmp_path / "store", tmp_path / "index", IndexSettings())
    targets.run(
        tmp_path / "store", tmp_path / "index", tmp_path / "tokens", tmp_path / "0", TargetSettings(neighbours=4)
    )
    words = ["fidelity", "--memory", small_folder, "--targets", tmp_path / "0", "--tokens", tmp_path / "tokens"]
    words += ["--context", CONTEXT, "--stride", CONTEXT, "--most", 100, "--resamples", 20, "--out", out]
    code, _, err = run_memdec(capsys, *words)
    assert code == 2
    assert "expected a memory made from the text of" in err
    code, _, _ = run_memdec(capsys, *words, "--control")
    assert code == 0
    assert artefact.read(out, "fidelity").settings["control"] is True

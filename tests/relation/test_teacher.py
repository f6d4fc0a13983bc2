"""The teacher's rows: an oracle by the whole model, independent of shards and kills, read by the memory's training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT, write_tokens

from memdec.artefacts import artefact
from memdec.datastore import index, keys, target_rows, targets, teacher
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, ModelError, NumericsError
from memdec.maths.windows import windows
from memdec.models import loading
from memdec.settings import DatastoreSettings, IndexSettings, TargetSettings, TeacherSettings
from memdec.text import tokens

WINDOW = {"context": CONTEXT, "stride": CONTEXT // 2}
N_VOCAB = 300


@pytest.fixture(scope="module")
def make(base_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    def build(**changes: Any) -> list[Path]:
        settings = TeacherSettings(**changes)
        root = tmp_path_factory.mktemp("teacher")
        for shard in range(settings.shards):
            teacher.run(base_folder, short_tokens, root / str(shard), settings, **WINDOW, shard=shard)
        return [root / str(shard) for shard in range(settings.shards)]

    return build


@pytest.fixture(scope="module")
def whole(make: Callable[..., list[Path]]) -> Path:
    return make(batch_size=4)[0]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy") for name in ("indptr", "tokens", "probs")}


def dense(folder: Path) -> np.ndarray:
    row = arrays(folder)
    found = np.zeros((len(row["indptr"]) - 1, N_VOCAB))
    found[np.repeat(np.arange(len(found)), np.diff(row["indptr"])), row["tokens"]] = row["probs"]
    return found


def by_whole_model(folder: Path, stream: Path, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) at every position, window by window, by the model's own forward."""
    values, model = tokens.load_stream(stream, "train"), loading.load(folder)
    parts = windows(len(values), **WINDOW)
    with torch.no_grad():
        logits = model(torch.from_numpy(np.stack([part.inputs(values, 0) for part in parts]))).logits
    p = (logits[..., :N_VOCAB].double() / temperature).softmax(-1).numpy()
    return np.concatenate([each[part.first - part.begin :] for each, part in zip(p, parts, strict=True)])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_are_the_models_own_distribution(
    make: Callable[..., list[Path]], base_folder: Path, short_tokens: Path, temperature: float
) -> None:
    expected = by_whole_model(base_folder, short_tokens, temperature)
    everything = dense(make(top=N_VOCAB + 1, temperature=temperature)[0])
    np.testing.assert_allclose(everything, expected, atol=1e-6)
    few = dense(make(top=5, temperature=temperature)[0])
    assert (np.count_nonzero(few, axis=1) == 5).all()
    kept = np.where(few > 0, expected, 0)
    np.testing.assert_allclose(kept.sum(1), np.sort(expected, axis=1)[:, -5:].sum(1), rtol=1e-5)
    np.testing.assert_allclose(few, kept / kept.sum(1, keepdims=True), atol=1e-6)


@pytest.fixture(scope="module")
def near(base_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """p_kNN of the same model in two shards."""
    root = tmp_path_factory.mktemp("near")
    keys.run(base_folder, short_tokens, root / "d", DatastoreSettings(), **WINDOW)
    index.run([root / "d"], root / "i", IndexSettings())
    settings = TargetSettings(neighbours=20, temperature=4.0, shards=2)
    for shard in range(2):
        targets.run([root / "d"], root / "i", short_tokens, root / str(shard), settings, shard=shard)
    return [root / "0", root / "1"]


def test_with_targets_rows_are_those_of_the_key_models_knn_lm(
    base_folder: Path, short_tokens: Path, near: list[Path], tmp_path: Path
) -> None:
    p_key = by_whole_model(base_folder, short_tokens, 2.0)
    p_knn = np.concatenate([dense(folder) for folder in near])
    expected = 0.3 * p_knn + 0.7 * p_key
    for top in (N_VOCAB, 7):
        for shard in range(3):
            settings = TeacherSettings(top=top, temperature=2.0, knn_weight=0.3, shards=3, batch_size=4)
            out = tmp_path / f"{top}-{shard}"
            teacher.run(base_folder, short_tokens, out, settings, **WINDOW, shard=shard, targets=near)
        found = np.concatenate([dense(tmp_path / f"{top}-{shard}") for shard in range(3)])
        least = -np.partition(-expected, top - 1, axis=1)[:, top - 1 : top]
        kept = np.where(expected >= least, expected, 0)
        np.testing.assert_allclose(found, kept / kept.sum(1, keepdims=True), atol=1e-6)


def test_a_weight_of_one_is_p_knn_itself(
    base_folder: Path, short_tokens: Path, near: list[Path], tmp_path: Path
) -> None:
    settings = TeacherSettings(top=N_VOCAB, knn_weight=1.0)
    teacher.run(base_folder, short_tokens, tmp_path / "t", settings, **WINDOW, targets=near)
    np.testing.assert_allclose(dense(tmp_path / "t"), np.concatenate([dense(folder) for folder in near]), atol=1e-7)


@pytest.mark.parametrize(("weight", "n_targets"), [(0.0, 2), (0.5, 0), (0.5, 1)])
def test_a_mixture_needs_both_a_weight_and_all_targets(
    weight: float, n_targets: int, base_folder: Path, short_tokens: Path, near: list[Path], tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ArtifactError), match=r"expected --targets where knn_weight|shard"):
        teacher.run(
            base_folder, short_tokens, tmp_path / "t", TeacherSettings(knn_weight=weight), **WINDOW, targets=near[:n_targets]
        )  # fmt: skip
    assert not (tmp_path / "t").exists()


def test_shards_and_disk_type(make: Callable[..., list[Path]], whole: Path, short_tokens: Path) -> None:
    folders, one = make(batch_size=4, shards=3), arrays(whole)
    pieces = [arrays(folder) for folder in folders]
    for name in ("tokens", "probs"):
        np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), one[name])
    half = dense(make(batch_size=4, dtype="float16")[0])
    np.testing.assert_allclose(half, dense(whole), rtol=1e-3, atol=1e-6)
    sha256 = artefact.read(short_tokens, "tokens").facts["sha256"]["train"]
    found = TargetReader(folders[::-1], sha256)
    rows = found.rows([(0, len(tokens.load_stream(short_tokens, "train")))])
    np.testing.assert_array_equal(rows.indptr, one["indptr"])
    facts = artefact.read(whole, "targets").facts
    assert facts == {
        "begin": 0,
        "end": len(one["indptr"]) - 1,
        "entries": 64 * (len(one["indptr"]) - 1),
        "short_rows": 0,
        "positions": len(tokens.load_stream(short_tokens, "train")),
        "tokens_sha256": sha256,
        "device": "cpu",
    }


def test_a_killed_run_goes_on_where_it_was(
    base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_rows, "_CHECKPOINT", -1.0)
    calls: list[int] = []
    plain = teacher._rows

    def counting(forward: Any, number: int, *rest: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(number)
        return plain(forward, number, *rest)

    monkeypatch.setattr(teacher, "_rows", counting)
    settings = TeacherSettings(batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        teacher.run(base_folder, short_tokens, tmp_path / "t", settings, **WINDOW)
    assert calls == [0, 1, 2]
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(tmp_path / "t", "targets")
    monkeypatch.setattr(target_rows, "_CHECKPOINT", 30.0)
    again: list[int] = []
    monkeypatch.setattr(
        teacher, "_rows", lambda forward, number, *rest: (again.append(number), plain(forward, number, *rest))[1]
    )
    teacher.run(base_folder, short_tokens, tmp_path / "t", settings, **WINDOW)
    assert again[0] == 3
    for name, values in arrays(whole).items():
        np.testing.assert_array_equal(arrays(tmp_path / "t")[name], values)


def test_padded_heads_are_masked(base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path) -> None:
    model, out = loading.load(base_folder), tmp_path / "padded"
    words, facts = tokens.load_tokenizer(str(base_folder)), artefact.read(base_folder, "model").facts
    model.resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[N_VOCAB:] = 10 * model.get_output_embeddings().weight[:20]
    with artefact.building(out, "model", {}, {}) as build:
        assert build is not None
        model.save_pretrained(out)
        words.save_pretrained(out)
        build.facts.update(tokenizer_sha256=facts["tokenizer_sha256"])
    teacher.run(out, short_tokens, tmp_path / "t", TeacherSettings(batch_size=4), **WINDOW)
    assert arrays(tmp_path / "t")["tokens"].max() < N_VOCAB
    np.testing.assert_allclose(dense(tmp_path / "t"), dense(whole), atol=1e-6)


def test_a_vocabulary_with_gaps_has_rows_up_to_its_largest_id(
    base_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    values, new, folder = np.load(short_tokens / "train.npy").astype(np.int64), N_VOCAB + 5, tmp_path / "model"
    often = int(np.bincount(values).argmax())
    model = loading.load(base_folder)
    model.resize_token_embeddings(new + 1, mean_resizing=False)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        said = json.loads((base_folder / name).read_text())
        for token, number in said.get("model", {}).get("vocab", {}).items():
            said["model"]["vocab"][token] = new if number == often else number
        (folder / name).write_text(json.dumps(said))
    words = tokens.load_tokenizer(str(folder))
    assert len(words) <= new < tokens.n_ids(words)
    moved = np.where(values == often, new, values).astype(np.uint16)
    stream = write_tokens(tmp_path / "tokens", moved, tokens.fingerprint(words))
    teacher.run(folder, stream, tmp_path / "out", TeacherSettings(top=new + 1), **WINDOW)
    assert (np.bincount(arrays(tmp_path / "out")["tokens"]) == len(values)).sum() == new + 1


def test_what_cannot_work_is_refused_before_the_model_loads(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    other = write_tokens(tmp_path / "other", np.arange(100, dtype=np.uint16))
    passes = -(-len(windows(len(tokens.load_stream(short_tokens, "train")), **WINDOW)) // 16)
    for stream, settings, changes, error, message in (
        (short_tokens, {"shards": 2}, {"shard": 2}, ConfigError, "expected a shard from 0 to 1, found 2"),
        (
            short_tokens,
            {"shards": passes + 1},
            {},
            ConfigError,
            f"expected at most {passes} shards for {passes} forward",
        ),
        (short_tokens, {}, {"context": 33}, ConfigError, "context: expected at most 32 tokens"),
        (other, {}, {}, ArtifactError, "expected one tokenizer, found two"),
    ):
        with pytest.raises(error, match=message):
            teacher.run(base_folder, stream, tmp_path / "t", TeacherSettings(**settings), **{**WINDOW, **changes})
    assert not (tmp_path / "t").exists()


def test_nan_names_the_position(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load(base_folder)
    monkeypatch.setattr(loading, "load", lambda *_, **__: model)

    def spoil(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        at = torch.arange(out.shape[1])[:, None] == 20
        return out.masked_fill(at, float("nan"))

    model.transformer.ln_f.register_forward_hook(spoil)
    with pytest.raises(NumericsError, match="found NaN or inf at position 20;"):
        teacher.run(base_folder, short_tokens, tmp_path / "t", TeacherSettings(), **WINDOW)
    logits = torch.zeros(4, 6)
    logits[2, 1] = float("inf")
    with pytest.raises(NumericsError, match="at position 12;"):
        teacher.check_finite(logits, 10)


def test_logits_that_are_capped_are_refused(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load(base_folder)
    monkeypatch.setattr(loading, "load", lambda *_, **__: model)
    plain = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(ModelError, match="scales, caps or shifts them"):
        teacher.run(base_folder, short_tokens, tmp_path / "t", TeacherSettings(), **WINDOW)

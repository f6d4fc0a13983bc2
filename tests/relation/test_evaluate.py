"""What is evaluated beside a memory: kNN-LM, DAPT and a DAPT model mixed in, against loops over tokens."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT, made_text, plain_scores
from transformers import AutoModelForCausalLM

from memdec.artefacts import artefact
from memdec.datastore import index, passages, targets
from memdec.datastore import keys as datastore
from memdec.errors import ArtifactError, ConfigError
from memdec.inference.systems import SYSTEMS, Parts
from memdec.maths import statistics, weighing
from memdec.maths.windows import windows
from memdec.results import evaluate, mix, score
from memdec.results.scores import alone as stored_alone
from memdec.results.scores import token_scores
from memdec.settings import (
    FORGETTING,
    SPLITS,
    DatastoreSettings,
    EvaluateSettings,
    FileCorpus,
    IndexSettings,
    MemorySettings,
    PassageSettings,
    RetrievalSettings,
    TargetSettings,
)
from memdec.text import corpora, tokens
from memdec.training import stages

WINDOW = {"context": CONTEXT, "stride": CONTEXT // 2}
TAUS = [50.0, 0.5]  # 0.5 is the better one, but not at the first lambda, which is 0
SETTINGS = EvaluateSettings(
    resamples=20, alphas=[0.5, 0.95], lambdas=[0.0, 0.3, 0.6, 0.9, 0.99], temperatures=TAUS, neighbours=9, query=8
)


@pytest.fixture(scope="module")
def home(base_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of the base, p_kNN of the valid and the test text for two tau, and passages."""
    home = tmp_path_factory.mktemp("home")
    datastore.run(base_folder, token_folder, home / "store", DatastoreSettings(), **WINDOW)
    index.run(home / "store", home / "index", IndexSettings())
    for split in ("valid", "test"):
        queries = home / "queries" / split
        datastore.run(base_folder, token_folder, queries, DatastoreSettings(split=split), **WINDOW)
        for tau in TAUS:
            settings, out = TargetSettings(neighbours=9, temperature=tau), home / f"knn-{tau}" / split
            targets.run(home / "store", home / "index", token_folder, out, settings, queries=[queries])
    passages.run(token_folder, home / "passages", PassageSettings(passage=12))
    return home


def records_of(folder: Path, base: Path, corpus: Path, **what: Any) -> list[dict[str, Any]]:
    evaluate.run(base, corpus, folder, SETTINGS, seed=0, **WINDOW, **what)
    records: list[dict[str, Any]] = json.loads((folder / "records.json").read_text())
    return records


def mixed_records(folder: Path, base: Path, corpus: Path, *, name: str = "memdec", **what: Any) -> list[dict[str, Any]]:
    """Records from the base's own evaluation, and from the scores of a memory or of p_kNN alone."""
    score.run(corpus, folder / "scored", SETTINGS, **WINDOW, **what)
    mix.run(base, folder / "scored", folder / "mixed", SETTINGS, name=name, seed=0)
    records: list[dict[str, Any]] = json.loads((folder / "mixed" / "records.json").read_text())
    return records


def stream_of(token_folder: Path, split: str) -> list[int]:
    return [int(token) for token in np.load(token_folder / f"{split}.npy")]


def plain(folder: Path, token_folder: Path, split: str) -> np.ndarray:
    prefix = tokens.prefix_id(tokens.load_tokenizer(str(folder)))
    return plain_scores(folder, stream_of(token_folder, split), prefix, CONTEXT // 2)


def plain_knn_lm(home: Path, base: Path, token_folder: Path, split: str, tau: float, weight: float) -> float:
    """Perplexity of weight * p_kNN + (1 - weight) * p_base, one token at a time, from p_kNN in files."""
    folder, total = home / f"knn-{tau}" / split, 0.0
    indptr, ids, probs = (np.load(folder / f"{name}.npy").tolist() for name in ("indptr", "tokens", "probs"))
    stream, log_p = stream_of(token_folder, split), plain(base, token_folder, split)
    for position, token in enumerate(stream):
        row = slice(indptr[position], indptr[position + 1])
        p_knn = dict(zip(ids[row], probs[row], strict=True)).get(token, 0.0)
        total += math.log(weight * p_knn + (1 - weight) * math.exp(log_p[position]))
    return math.exp(-total / len(stream))


@pytest.mark.slow
def test_knn_lm_and_dapt_equal_plain_loops(
    home: Path, base_folder: Path, dapt_folder: Path, corpus_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    keys = {"datastore": [home / "store"], "index": home / "index"}
    (base,) = records_of(tmp_path / "base", base_folder, corpus_folder)
    (dapt,) = records_of(tmp_path / "dapt", base_folder, corpus_folder, dapt=dapt_folder)
    (knn_lm,) = records_of(tmp_path / "knn", base_folder, corpus_folder, **keys)
    found = [base, knn_lm, dapt]
    assert [record["method"] for record in found] == ["base", "kNN-LM", "DAPT"]
    assert [record["memory"] for record in found] == [None, None, None]
    for record, folder in ((base, base_folder), (dapt, dapt_folder)):
        log_p = plain(folder, token_folder, "test")
        assert record["value"] == pytest.approx(math.exp(-log_p.mean()), rel=1e-5)
        assert (record["n"], record["alpha"]) == (len(log_p), None)
    assert base["value"] != pytest.approx(dapt["value"], rel=1e-3)
    sweeps = {
        tau: {w: plain_knn_lm(home, base_folder, token_folder, "valid", tau, w) for w in SETTINGS.lambdas}
        for tau in TAUS
    }
    tau, best = min(((t, w) for t in TAUS for w in SETTINGS.lambdas), key=lambda pair: sweeps[pair[0]][pair[1]])
    assert best not in (SETTINGS.lambdas[0], SETTINGS.lambdas[-1])
    assert tau != min(TAUS, key=lambda each: sweeps[each][SETTINGS.lambdas[0]])
    assert knn_lm["temperature"] == tau
    found_sweep = {float(weight): value for weight, value in knn_lm["valid_sweep"].items()}
    assert found_sweep == pytest.approx(sweeps[tau], rel=1e-4)
    assert (knn_lm["alpha"], knn_lm["lambda"], knn_lm["valid"]) == (None, best, found_sweep[best])
    test = plain_knn_lm(home, base_folder, token_folder, "test", tau, best)
    assert knn_lm["value"] == pytest.approx(test, rel=1e-4)
    assert knn_lm["low"] < knn_lm["value"] < knn_lm["high"]
    assert knn_lm["n"] == base["n"]
    stored, _ = token_scores(tmp_path / "knn")
    assert statistics.perplexity(stored.log_p(best)) == knn_lm["value"]
    assert np.array_equal(stored.base, token_scores(tmp_path / "base")[0].base)
    results = json.loads((tmp_path / "knn" / "results_kNN-LM_test.json").read_text())
    assert results["results"]["memdec_ppl"]["token_perplexity,none"] == pytest.approx(knn_lm["value"], rel=1e-12)
    assert (results["config"]["temperature"], results["config"]["lambda"]) == (tau, best)


def test_intervals_resample_stretches_of_the_text(
    base_folder: Path, corpus_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    (base,) = records_of(tmp_path / "e", base_folder, corpus_folder)
    log_p = plain(base_folder, token_folder, "test")
    stretches, single = (
        statistics.bootstrap_perplexity(log_p, size, SETTINGS.resamples, seed=0)
        for size in (statistics.item_tokens(len(log_p), CONTEXT // 2), 1)
    )
    assert (base["low"], base["high"]) == pytest.approx(stretches, rel=1e-4)
    assert (base["low"], base["high"]) != pytest.approx(single, rel=1e-3)


def test_in_context_rag_is_the_model_of_that_name(
    home: Path, base_folder: Path, corpus_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    (rag,) = records_of(tmp_path / "e", base_folder, corpus_folder, passages=home / "passages")
    settings = RetrievalSettings(query=SETTINGS.query, every=SETTINGS.every)
    parts = Parts(base=base_folder, passages=home / "passages", retrieval=settings)
    model = SYSTEMS["In-Context RAG"].build(parts)
    stream, prefix, total = (
        stream_of(token_folder, "test"),
        tokens.prefix_id(tokens.load_tokenizer(str(base_folder))),
        0.0,
    )
    for part in windows(len(stream), **WINDOW):
        ids = torch.tensor([prefix, *stream])[part.begin : part.end]
        rows = model(input_ids=ids[None], logits_to_keep=part.n_scored).logits[0]
        total += float(rows.gather(-1, torch.tensor(stream[part.first : part.end])[:, None]).sum())
    assert rag["value"] == pytest.approx(math.exp(-total / len(stream)), rel=1e-4)
    assert (rag["method"], rag["alpha"], rag["n"]) == ("In-Context RAG", None, len(stream))
    assert rag["value"] != pytest.approx(math.exp(-plain(base_folder, token_folder, "test").mean()), rel=1e-3)
    scores, stride = token_scores(tmp_path / "e")
    assert (scores.memory, stride) == (None, CONTEXT // 2)
    with pytest.raises(ArtifactError, match="expected scores of valid, found test; run memdec evaluate again"):
        token_scores(tmp_path / "e", "valid")


@pytest.mark.slow
def test_a_dapt_model_is_mixed_in_as_a_memory_is(
    dapt_folder: Path, small_folder: Path, corpus_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    base, mixed = records_of(tmp_path / "e", small_folder, corpus_folder, memory=dapt_folder, name="dapt")
    assert (base["memory"], mixed["memory"], mixed["method"]) == (None, "dapt", "MemDec")
    ours, theirs = (plain(folder, token_folder, "test") for folder in (small_folder, dapt_folder))
    log_p = np.log((1 - mixed["alpha"]) * np.exp(ours) + mixed["alpha"] * np.exp(theirs))
    assert mixed["value"] == pytest.approx(math.exp(-log_p.mean()), rel=1e-5)
    assert mixed["valid"] == mixed["valid_sweep"][str(mixed["alpha"])]
    best = {}
    for split in ("valid", "test"):
        ours, theirs = (plain(folder, token_folder, split) for folder in (small_folder, dapt_folder))
        sweep = {w: statistics.perplexity(weighing.mix_scores(ours, theirs, w)) for w in SETTINGS.alphas}
        best[split] = min(sweep, key=sweep.__getitem__)
        if split == "valid":
            assert {float(w): p for w, p in mixed["valid_sweep"].items()} == pytest.approx(sweep, rel=1e-5)
    assert mixed["alpha"] == best["valid"] != best["test"]
    assert artefact.read(tmp_path / "e", "evaluation").settings["memory"] == "dapt"


@pytest.mark.slow
def test_general_text_is_measured_at_the_weights_of_the_domain(
    base_folder: Path, dapt_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(made_text(80, 6).upper())
    general = tmp_path / "novels"
    corpora.run(FileCorpus(source="files", path=str(tmp_path / "text.txt"), min_bytes=200), general)
    what: dict[str, Any] = {"memory": dapt_folder, "name": "dapt"}
    found = records_of(tmp_path / "e", base_folder, corpus_folder, also=[general], **what)
    records_of(tmp_path / "d", base_folder, corpus_folder, also=[general], dapt=dapt_folder)
    assert {record["on"] for record in found} == {corpus_folder.name}
    forgotten = [each for at in "ed" for each in json.loads((tmp_path / at / FORGETTING).read_text())]
    assert [(record["method"], record["on"]) for record in forgotten] == [
        (method, "novels") for method in ("base", "MemDec", "DAPT")
    ]
    tokenizer = tokens.load_tokenizer(str(base_folder))
    text = corpora.joined(corpora.load(general, "test"), "eos", tokenizer.eos_token)
    stream = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    prefix = tokens.prefix_id(tokenizer)
    base, dapt = (plain_scores(folder, stream, prefix, CONTEXT // 2) for folder in (base_folder, dapt_folder))
    alpha = next(record["alpha"] for record in found if record["method"] == "MemDec")
    mixed = np.log((1 - alpha) * np.exp(base) + alpha * np.exp(dapt))
    for record, log_p in zip(forgotten, (base, mixed, dapt), strict=True):
        assert record["value"] == pytest.approx(math.exp(-log_p.mean()), rel=1e-5)
        assert record["n"] == len(stream)
    assert forgotten[1]["alpha"] == alpha
    alone = records_of(tmp_path / "alone", base_folder, corpus_folder, **what)
    assert alone == found
    assert not (tmp_path / "alone" / FORGETTING).exists()
    records_of(tmp_path / "base", base_folder, corpus_folder, also=[general])
    given = mixed_records(tmp_path / "given", tmp_path / "base", corpus_folder, also=[general], **what)
    assert given == found
    assert json.loads((tmp_path / "given" / "mixed" / FORGETTING).read_text()) == forgotten[:2]
    assert np.array_equal(
        token_scores(tmp_path / "given" / "mixed", on="novels")[0].log_p(alpha),
        token_scores(tmp_path / "e", on="novels")[0].log_p(alpha),
    )
    records_of(tmp_path / "short", base_folder, corpus_folder)
    with pytest.raises(ArtifactError, match="found another also novels; run memdec evaluate without a system"):
        mix.run(tmp_path / "short", tmp_path / "given" / "scored", tmp_path / "x", SETTINGS)


@pytest.mark.parametrize("named", [["general", "a/general"], ["domain", "b/general", "a/general"]])
def test_corpora_of_one_name_are_refused(named: list[str], tmp_path: Path) -> None:
    corpus, *also = (tmp_path / name for name in named)
    with pytest.raises(
        ConfigError, match="memdec evaluate: expected --corpus and --also in folders of different names"
    ):
        evaluate.run(tmp_path / "base", corpus, tmp_path / "e", SETTINGS, seed=0, also=also, **WINDOW)
    with pytest.raises(ArtifactError, match="domain: expected a folder with a corpus artefact"):  # the same one twice
        score.run(tmp_path / "domain", tmp_path / "s", SETTINGS, also=[tmp_path / "domain"], **WINDOW)
    with pytest.raises(ConfigError, match=r"memdec score: .* found .*/a/general"):
        score.run(corpus, tmp_path / "s", SETTINGS, memory=tmp_path / "m", also=also, **WINDOW)


def test_scores_of_base_and_memory_serve_each_other(
    base_folder: Path, small_folder: Path, dapt_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    """One pass of the memory is enough for two bases, and gives what the whole systems do, which lm-eval runs."""
    what: dict[str, Any] = {"memory": dapt_folder, "name": "dapt"}
    for number, base in enumerate((small_folder, base_folder)):
        alone, both, given = (tmp_path / f"{name}-{number}" for name in ("alone", "both", "given"))
        whole = records_of(both, base, corpus_folder, **what)
        results = json.loads((both / "results_MemDec_test.json").read_text())
        assert results["results"]["memdec_ppl"]["token_perplexity,none"] == pytest.approx(whole[1]["value"], rel=1e-12)
        assert results["config"]["alpha"] == whole[1]["alpha"]
        theirs = records_of(alone, base, corpus_folder)
        score.run(corpus_folder, tmp_path / "scored", SETTINGS, memory=dapt_folder, **WINDOW)
        mix.run(alone, tmp_path / "scored", given, SETTINGS, name="dapt", seed=0)
        records = json.loads((given / "records.json").read_text())
        assert records == whole
        assert records[:1] == theirs
        for split in SPLITS[1:]:
            (scores, stride), (expected, _) = token_scores(given, split), token_scores(both, split)
            assert np.array_equal(scores.base, expected.base)
            assert scores.memory is not None
            assert expected.memory is not None
            assert np.array_equal(scores.memory, expected.memory)
        assert statistics.perplexity(scores.log_p(records[1]["alpha"])) == records[1]["value"]
        item = statistics.item_tokens(len(scores.base), stride)
        assert statistics.bootstrap_perplexity(scores.base, item, SETTINGS.resamples, 0) == (
            theirs[0]["low"],
            theirs[0]["high"],
        )


def test_scores_that_do_not_fit_are_not_mixed(
    base_folder: Path, corpus_folder: Path, dapt_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    records_of(tmp_path / "base", base_folder, corpus_folder)
    records_of(tmp_path / "dapt", base_folder, corpus_folder, dapt=dapt_folder)
    score.run(corpus_folder, tmp_path / "scored", SETTINGS, memory=dapt_folder, **WINDOW)
    with pytest.raises(ArtifactError, match=r"dapt: expected the evaluation of a base alone .* another system;"):
        mix.run(tmp_path / "dapt", tmp_path / "scored", tmp_path / "x", SETTINGS)
    short = {"context": CONTEXT // 2, "stride": CONTEXT // 2}
    score.run(corpus_folder, tmp_path / "short", SETTINGS, memory=dapt_folder, **short)
    with pytest.raises(ArtifactError, match=r"base: expected the evaluation of a base alone .* another context;"):
        mix.run(tmp_path / "base", tmp_path / "short", tmp_path / "x", SETTINGS)
    other = tmp_path / "other ids"
    shutil.copytree(dapt_folder, other)
    (other / "manifest.json").unlink()
    (other / artefact.MARK).unlink(missing_ok=True)
    words = json.loads((other / "tokenizer.json").read_text())
    ids, text = words["model"]["vocab"], set(stream_of(token_folder, "test"))
    one, two = [word for word, token in ids.items() if token in text][:2]
    ids[one], ids[two] = ids[two], ids[one]
    (other / "tokenizer.json").write_text(json.dumps(words))
    score.run(corpus_folder, tmp_path / "swapped", SETTINGS, memory=other, **WINDOW)
    with pytest.raises(
        ArtifactError, match=r"swapped: expected scores of the tokens that .*base has read, found other"
    ):
        mix.run(tmp_path / "base", tmp_path / "swapped", tmp_path / "x", SETTINGS)
    assert not (tmp_path / "x").exists()


def test_a_memory_with_more_rows_than_the_base_is_normalised_over_those_of_the_base(
    base_folder: Path, small_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    """Families pad their heads; rows that the base lacks have probability, which the mixture gives to the others."""
    padded = tmp_path / "padded"
    model = AutoModelForCausalLM.from_pretrained(small_folder)
    model.resize_token_embeddings(330, mean_resizing=False)
    model.save_pretrained(padded)
    tokens.load_tokenizer(str(small_folder)).save_pretrained(padded)
    records_of(tmp_path / "e", base_folder, corpus_folder, memory=padded)
    found, _ = token_scores(tmp_path / "e")
    records_of(tmp_path / "small", base_folder, corpus_folder, memory=small_folder)
    expected, _ = token_scores(tmp_path / "small")
    assert found.memory is not None
    np.testing.assert_allclose(found.memory, expected.memory, atol=1e-6)
    score.run(corpus_folder, tmp_path / "scored", SETTINGS, memory=padded, **WINDOW)
    alone = stored_alone(tmp_path / "scored", "test")["memory"]
    assert np.abs(alone - found.memory).max() > 0.01
    records_of(tmp_path / "base", base_folder, corpus_folder)
    with pytest.raises(
        ArtifactError, match=r"expected at most 300 entries, those of the head of .*base, found 330; run"
    ):
        mix.run(tmp_path / "base", tmp_path / "scored", tmp_path / "x", SETTINGS)


def test_one_system_is_evaluated_at_a_time(
    home: Path, base_folder: Path, dapt_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    what: dict[str, Any] = {"dapt": dapt_folder, "passages": home / "passages"}
    with pytest.raises(ConfigError, match="expected the parts of one system, found those of In-Context RAG, DAPT; "):
        records_of(tmp_path / "e", base_folder, corpus_folder, **what)


def test_a_memory_of_another_domain_is_a_control_that_must_be_asked_for(
    small_folder: Path, dapt_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(made_text(250, 5))
    other = tmp_path / "other"
    corpora.run(FileCorpus(source="files", path=str(tmp_path / "text.txt"), min_bytes=200), other)
    with pytest.raises(ArtifactError, match=r"dapt: expected model made from .*other, found one from other text"):
        records_of(tmp_path / "a", small_folder, other, memory=dapt_folder)
    with pytest.raises(
        ArtifactError, match=r"expected with --control a model of another corpus than .*, found one of this"
    ):
        records_of(tmp_path / "b", small_folder, corpus_folder, memory=dapt_folder, control=True)
    with pytest.raises(ConfigError, match="--control: expected a memory that `memdec train` made, found None"):
        records_of(tmp_path / "c", small_folder, corpus_folder, control=True)
    base, mixed = records_of(tmp_path / "d", small_folder, other, memory=dapt_folder, name="other", control=True)
    assert (mixed["memory"], mixed["control"]) == ("other", "other domain")
    assert "control" not in base
    assert artefact.read(tmp_path / "d", "evaluation").settings["control"] == "other domain"


def test_other_text_is_refused(
    home: Path, base_folder: Path, dapt_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="expected --datastore and --index together"):
        records_of(tmp_path / "a", base_folder, corpus_folder, datastore=[home / "store"])
    (tmp_path / "text.txt").write_text(made_text(250, 5))
    corpora.run(FileCorpus(source="files", path=str(tmp_path / "text.txt"), min_bytes=200), tmp_path / "other")
    for what, message in (
        ({"dapt": dapt_folder}, "dapt: expected model made from .*other, found one from other text"),
        ({"passages": home / "passages"}, "passages: expected passages made from .*other, found one from other text"),
        ({"datastore": [home / "store"], "index": home / "index"}, "store: expected datastore made from .*other"),
    ):
        with pytest.raises(ArtifactError, match=message):
            records_of(tmp_path / "b", base_folder, tmp_path / "other", **what)


# --- p_kNN of another model's keys ------------------------------------------------------------------------------------


def test_p_knn_of_the_key_model_stands_in_the_place_of_a_memory(
    home: Path, base_folder: Path, small_folder: Path, corpus_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    given = {"datastore": [home / "store"], "index": home / "index", "key_model": base_folder, "name": "keys"}
    records_of(tmp_path / "base", small_folder, corpus_folder)
    base, mixed = mixed_records(tmp_path, tmp_path / "base", corpus_folder, **given)
    assert (base["method"], base["memory"]) == ("base", None)
    assert (mixed["method"], mixed["memory"], mixed["alpha"]) == ("MemDec", "keys", None)

    def perplexity(split: str, tau: float, weight: float) -> float:
        folder = home / f"knn-{tau}" / split
        indptr, ids, probs = (np.load(folder / f"{name}.npy") for name in ("indptr", "tokens", "probs"))
        stream, log_p = np.array(stream_of(token_folder, split)), plain(small_folder, token_folder, split)
        hit = ids == np.repeat(stream, np.diff(indptr))
        p_knn = np.bincount(np.repeat(np.arange(len(stream)), np.diff(indptr))[hit], probs[hit], len(stream))
        return math.exp(-np.log(weight * p_knn + (1 - weight) * np.exp(log_p)).mean())

    sweeps = {(tau, weight): perplexity("valid", tau, weight) for tau in TAUS for weight in SETTINGS.lambdas}
    best = min(sweeps, key=lambda at: sweeps[at])
    assert (mixed["temperature"], mixed["lambda"]) == best
    assert mixed["value"] == pytest.approx(perplexity("test", *best), rel=1e-5)


def test_with_the_base_as_key_model_it_is_the_knn_lm(
    home: Path, base_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    keys = {"datastore": [home / "store"], "index": home / "index"}
    records_of(tmp_path / "base", base_folder, corpus_folder)
    (knn_lm,) = records_of(tmp_path / "knn", base_folder, corpus_folder, **keys)
    _, mixed = mixed_records(tmp_path, tmp_path / "base", corpus_folder, key_model=base_folder, **keys)
    for field in ("value", "low", "high", "lambda", "temperature", "n"):
        assert mixed[field] == pytest.approx(knn_lm[field], rel=1e-9)


def test_a_record_names_the_learning_rate_that_was_tuned(
    base_folder: Path, small_folder: Path, corpus_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    for name, changes in (("plain", {}), ("tuned", {"learning_rates": [1e-7, 1e-3], "trial": 0.5})):
        settings = MemorySettings(objective="ce", epochs=0.3, **changes)
        stages.run_train(small_folder, token_folder, [], tmp_path / name, settings, context=CONTEXT, seed=0)
        *_, record = records_of(tmp_path / f"of {name}", base_folder, corpus_folder, memory=tmp_path / name)
        assert record["learning_rate"] == (1e-3 if name == "tuned" else None)


def test_what_is_scored_is_a_memory_or_the_neighbours_of_a_model(
    home: Path, base_folder: Path, small_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"datastore": [home / "store"], "index": home / "index"}
    for given, named in (
        ({}, "none of them"),
        (keys, "--datastore, --index"),
        ({"key_model": base_folder}, "--key-model"),
        ({"memory": small_folder, "key_model": base_folder, **keys}, "--memory, --key-model, --datastore, --index"),
    ):
        with pytest.raises(ConfigError, match=f"--key-model with --datastore and --index, found {named}; give"):
            score.run(corpus_folder, tmp_path / "a", SETTINGS, **WINDOW, **given)
    with pytest.raises(ArtifactError, match=r"expected keys of .*, found those of another model"):
        score.run(corpus_folder, tmp_path / "a", SETTINGS, key_model=small_folder, **WINDOW, **keys)
    assert not (tmp_path / "a").exists()

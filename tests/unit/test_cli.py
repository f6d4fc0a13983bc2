"""The command line: options from the typed settings, and bad input in one line with exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from making import CONTEXT, run_memdec

from memdec import cli
from memdec.artefacts import artefact
from memdec.datastore import keys as datastore
from memdec.datastore import targets
from memdec.errors import ArtifactError

WORDS = json.dumps({"source": "files", "path": "ten.txt"})


@pytest.mark.parametrize(
    ("words", "released", "stored"),
    [
        ([], False, True),
        (["--released"], True, True),
        (["--no-released"], False, True),
        (["--no-stored"], False, False),
    ],
)
def test_fault_2_flags_are_what_they_say(
    words: list[str], released: bool, stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`type=bool` took any word, "False" too, for true; here a flag takes no word."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(targets, "run", lambda *_, **__: seen.update(settings=_[4]))
    monkeypatch.setattr(datastore, "run", lambda *_, **__: seen.update(settings=_[3]))
    folders = ["--tokens", "t", "--out", "o"]
    if words == ["--no-stored"]:
        words = ["datastore", "--model", "m", "--context", "8", "--stride", "4", *folders, *words]
        assert run_memdec(capsys, *words)[0] == 0
        assert seen["settings"].stored is stored
        return
    words = ["targets", "--datastore", "d1", "--datastore", "d2", "--index", "i", *folders, *words]
    assert run_memdec(capsys, *words)[0] == 0
    assert seen["settings"].released is released
    if "--released" in words:
        code, _, text = run_memdec(capsys, *words, "False")
        assert code == 2
        assert "unexpected" in text.lower()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validate", "bad.yaml"], "bad.yaml: strid: unknown key"),
        (["corpus", "--spec", WORDS, "--out", "out"], "expected at least 1000 bytes in the train split, found"),
        (["corpus", "--spec", "{", "--out", "out"], "--spec: expected JSON"),
        (["finetune", "--model", "none", "--tokens", "TOKENS", "--out", "out", "--context", "8", "--seed", "0"], "none: expected a folder, or a Hub id"),
        (["evaluate", "--base", "BASE", "--corpus", "CORPUS", "--out", "out", "--context", "8", "--stride", "4", "--alphas", "1.5"], "alphas.0: Input should be less than or equal to 1, found 1.5"),
        (["datastore", "--model", "CUT", "--tokens", "TOKENS", "--out", "out", "--context", "8", "--stride", "4"], "expected a whole manifest, found one that is cut"),
        (["train", "--model", "BASE", "--tokens", "TOKENS", "--targets", "none", "--out", "out", "--context", "8", "--seed", "0", "--kl-weight", "2"], "kl_weight: Input should be less than or equal to 1, found 2.0"),
        (["passages", "--tokens", "none", "--out", "out"], "none: expected a folder with a tokens artefact"),
        (["passages", "--tokens", "TOKENS", "--out", "out", "--passage", "0"], "passage: Input should be greater than 0, found 0"),
        (["index", "--no-such-option"], "No such option"),
        (["check", "none.csv", "--baseline", "none.json"], "none.json: expected a baseline"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    words: list[str], message: str, base_folder: Path, token_folder: Path, corpus_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("ten.txt").write_text("one two three four five six seven eight nine ten")
    Path("bad.yaml").write_text((Path(__file__).parents[2] / "config/mini.yaml").read_text() + "\nstrid: 3\n")
    shutil.copytree(base_folder, "cut")
    Path("cut/manifest.json").write_text(Path("cut/manifest.json").read_text()[:99])
    names = {"BASE": str(base_folder), "TOKENS": str(token_folder), "CORPUS": str(corpus_folder), "CUT": "cut"}
    code, _, text = run_memdec(capsys, *(names.get(word, word) for word in words))
    lines = [line for line in text.splitlines() if "it/s]" not in line]
    assert code == 2, text
    assert message in lines[-1]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for kind in ("corpus", "model", "datastore", "memory", "evaluation"):
        with pytest.raises(ArtifactError):
            artefact.read(tmp_path / "out", kind)


def test_a_stage_by_hand(
    corpus_folder: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "tokens"
    words = ["tokens", "--tokenizer", str(tokenizer_folder), "--corpus", str(corpus_folder), "--out", str(out)]
    assert run_memdec(capsys, *words)[0] == 0
    before = (out / "manifest.json").stat().st_mtime_ns
    assert run_memdec(capsys, *words)[0] == 0  # the same again does nothing
    assert (out / "manifest.json").stat().st_mtime_ns == before
    words = ["passages", "--tokens", str(out), "--out", str(tmp_path / "passages"), "--passage", "9"]
    assert run_memdec(capsys, *words)[0] == 0
    assert artefact.read(tmp_path / "passages", "passages").settings == {"passage": 9}


@pytest.mark.slow
def test_the_whole_evaluation_by_hand(
    base_folder: Path, small_folder: Path, corpus_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    """evaluate -> table on a memory made of a tiny model, as the rules call them."""
    from memdec.datastore import index, targets
    from memdec.datastore import keys as datastore
    from memdec.results import evaluate
    from memdec.settings import DatastoreSettings, EvaluateSettings, IndexSettings, MemorySettings, TargetSettings
    from memdec.training import stages

    window = {"context": CONTEXT, "stride": CONTEXT // 2}
    datastore.run(base_folder, token_folder, tmp_path / "d", DatastoreSettings(), **window)
    index.run(tmp_path / "d", tmp_path / "i", IndexSettings())
    targets.run(tmp_path / "d", tmp_path / "i", token_folder, tmp_path / "t", TargetSettings(neighbours=9), shard=0)
    settings = MemorySettings(epochs=0.5, learning_rate=1e-2)
    stages.run_train(small_folder, token_folder, [tmp_path / "t"], tmp_path / "m", settings, context=CONTEXT, seed=0)
    evaluate.run(
        base_folder,
        corpus_folder,
        tmp_path / "e",
        EvaluateSettings(resamples=50),
        memory=tmp_path / "m",
        lora=None,
        seed=0,
        **window,
    )
    base, memory = json.loads((tmp_path / "e" / "records.json").read_text())
    assert (base["method"], base["alpha"], memory["method"]) == ("base", None, "MemDec")
    assert memory["alpha"] in (0.4, 0.6, 0.8, 0.9)
    assert memory["alpha"] == min((value, float(alpha)) for alpha, value in memory["valid_sweep"].items())[1]
    assert base["low"] < base["value"] < base["high"]
    results = json.loads((tmp_path / "e" / "results_MemDec_test.json").read_text())
    assert results["results"]["memdec_ppl"]["token_perplexity,none"] == pytest.approx(memory["value"], rel=1e-12)
    assert results["config"]["alpha"] == memory["alpha"]


def test_a_sweep_of_the_test_text_is_not_said_to_choose_alpha() -> None:
    assert cli.NEXT["sweep"].startswith("memdec tune ")


@pytest.mark.slow
def test_stock_lm_eval_offline_fails_in_one_line() -> None:
    program = Path(sys.executable).parent / "lm_eval"
    run = subprocess.run(
        [str(program), "--model", "memdec-interp", "--tasks", "memdec_ppl"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: Qwen/Qwen2.5-7B: expected")

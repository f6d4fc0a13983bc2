"""The workflow: schema, dry run, a real tiny run."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from making import made_text

from memdec import config as cfg
from memdec.tasks import needed

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "config" / "mini.yaml"


def snakemake(folder: Path, *words: str, snakefile: Path = ROOT / "Snakefile") -> str:
    return ran("snakemake", "--snakefile", str(snakefile), "--directory", str(folder), *words)


def repair(folder: Path, *words: str) -> str:
    return ran("bash", str(ROOT / "workflow" / "repair.sh"), str(folder), *words)


def started(*command: str) -> subprocess.CompletedProcess[str]:
    """A command as a user's shell runs it."""
    # Any folder does for what is not read.
    environment = {"MEMDEC_TEST_DATA": "/", "MEMDEC_SMOL": "/nowhere", **os.environ}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


def ran(*command: str) -> str:
    """What a command says that succeeds."""
    run = started(*command)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_the_schema_is_fresh() -> None:
    path = ROOT / "workflow" / "schemas" / "config.schema.json"
    assert json.loads(path.read_text()) == cfg.json_schema(), f"stale; run `memdec schema {path}`"


def planned(text: str) -> dict[str, int]:
    """Jobs of each rule in a dry run, without those of every run; what is fetched counts as what is made."""
    counts = {rule.removeprefix("fetch_"): int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE)}
    return {rule: n for rule, n in counts.items() if rule not in ("all", "default", "total", "resolved_config")}


# Jobs of Table 3 at the default scale: 4 bases of one tokenizer; in each of 3 domains a memory, the DAPT of its start as a
# control, and the memory of the next domain as another.
TABLE3 = {"corpus": 4, "tokenizer": 1, "tokens": 4, "model": 4, "finetune": 3, "datastore": 3, "index": 3, "targets": 6}
TABLE3 |= {
    "calibrate": 3,
    "mixture": 3,
    "train": 3,
    "dapt": 3,
    "lora": 12,
    "score": 9,
    "evaluate": 36,
    "evaluate_systems": 24,
    "table": 1,
}
# Of what has one domain: its text and a general one.
ONE = {"corpus": 4, "tokenizer": 1, "tokens": 2, "table": 1}


@pytest.mark.parametrize(
    ("files", "targets", "expected"),
    [
        (["mini"], [], TABLE3),
        # Figure 2 is drawn from Table 3, and Table 7 is made of the same scores
        pytest.param(["mini"], ["figure2", "table7"], TABLE3 | {"table": 2, "figure": 1}, marks=pytest.mark.slow),
        # 1 domain, 3 bases, every system; both controls, for which the next domain has a memory, too
        (
            ["mini"],
            ["table1"],
            ONE
            | {
                "tokens": 3,
                "model": 3,
                "finetune": 2,
                "datastore": 5,
                "index": 5,
                "targets": 4,
                "calibrate": 2,
                "mixture": 2,
                "train": 2,
            }
            | {"passages": 1, "dapt": 3, "lora": 3, "score": 3, "evaluate": 9, "evaluate_systems": 15},
        ),
        # the two parts of the objective beside both, over 3 seeds: no other objective, no other table
        (
            ["mini"],
            ["table9"],
            ONE
            | {
                "model": 3,
                "finetune": 3,
                "datastore": 3,
                "index": 3,
                "targets": 6,
                "train": 9,
                "score": 9,
                "evaluate": 27,
            }
            | {"evaluate_systems": 3, "calibrate": 3, "mixture": 3},
        ),
        # 7 more memories that are trained and one that is not, with one base in 3 domains. The kNN-LM has keys of the base
        # itself.
        (
            ["mini"],
            ["objectives"],
            TABLE3
            | {"model": 2, "train": 24, "evaluate": 27, "teacher": 3, "dapt": 6, "lora": 3, "evaluate_systems": 12}
            | {"datastore": 6, "index": 6, "score": 27},
        ),
        # the fidelity of the same memories to their targets in one domain
        pytest.param(
            ["mini"],
            ["fidelity"],
            ONE
            | {
                "model": 2,
                "finetune": 1,
                "datastore": 1,
                "index": 1,
                "targets": 2,
                "calibrate": 1,
                "teacher": 1,
                "mixture": 1,
                "train": 8,
                "dapt": 1,
            }
            | {"fidelity": 9, "figure": 1, "table": 0},
            marks=pytest.mark.slow,
        ),
        # 2 sizes of the memory beside the default one, and DAPT
        pytest.param(
            ["mini"],
            ["table8"],
            ONE
            | {
                "model": 3,
                "finetune": 1,
                "datastore": 1,
                "index": 1,
                "targets": 2,
                "train": 3,
                "dapt": 3,
                "score": 3,
                "evaluate": 9,
            }
            | {"evaluate_systems": 6, "calibrate": 1},
            marks=pytest.mark.slow,
        ),
        # 2 other key models, which are fine-tuned
        pytest.param(
            ["mini"],
            ["table19"],
            ONE
            | {
                "model": 3,
                "finetune": 3,
                "datastore": 3,
                "index": 3,
                "targets": 6,
                "train": 3,
                "score": 3,
                "evaluate": 9,
            }
            | {"evaluate_systems": 3, "calibrate": 3},
            marks=pytest.mark.slow,
        ),
        # 2 models of another tokenizer with one memory that is moved to it, keys of their own
        (
            ["mini"],
            ["table4"],
            TABLE3
            | {
                "tokenizer": 2,
                "tokens": 8,
                "finetune": 6,
                "datastore": 12,
                "index": 12,
                "targets": 12,
                "calibrate": 6,
                "mixture": 6,
                "adapt": 3,
            }
            | {"train": 6, "dapt": 6, "lora": 6, "score": 3, "evaluate": 6, "evaluate_systems": 24},
        ),
        # one memory of one domain
        pytest.param(
            ["mini"],
            ["table6"],
            ONE
            | {
                "model": 2,
                "finetune": 1,
                "datastore": 1,
                "index": 1,
                "targets": 2,
                "calibrate": 1,
                "mixture": 1,
                "train": 1,
                "cases": 1,
            },
            marks=pytest.mark.slow,
        ),
        # a corpus, a key model and a memory that only the questions have
        (
            ["mini"],
            ["table5", "table13"],
            {"corpus": 5, "tokenizer": 1, "tokens": 2, "model": 2, "finetune": 1, "datastore": 2, "index": 2}
            | {"targets": 2, "train": 1, "harness_base": 1, "harness": 1, "harness_system": 1, "evaluate_systems": 1}
            | {"table": 2, "calibrate": 1, "mixture": 1},
        ),
        # 6 domains, 3 seeds, 2 of 3 models, 4 trained memories and 2 controls
        (
            ["pretrained", "recipe"],
            ["rivals"],
            {"corpus": 6, "tokenizer": 1, "tokens": 6, "model": 2, "finetune": 36, "lora": 36, "datastore": 30}
            | {"index": 30, "calibrate": 18, "targets": 18, "teacher": 18, "mixture": 18, "train": 72}
            | {"score": 108, "evaluate": 216, "evaluate_systems": 96, "table": 1},
        ),
        # 13 studies of one seed, 16 corpora in all: memory and CE twin of each, with 2 bases
        pytest.param(
            ["pretrained", "recipe"],
            ["gains"],
            {"corpus": 5, "tokenizer": 1, "tokens": 5, "model": 3, "finetune": 8, "datastore": 8, "index": 8}
            | {"calibrate": 8, "targets": 12, "teacher": 1, "mixture": 8, "train": 32, "score": 32, "evaluate": 64}
            | {"evaluate_systems": 10, "figure": 1},
            marks=pytest.mark.slow,
        ),
        # Table 1 of one model and one domain, without retrieval, so with one control
        (
            ["mini", "gpu-tiny"],
            ["table1"],
            {"corpus": 2, "tokenizer": 1, "tokens": 2, "model": 1, "finetune": 1, "datastore": 1, "index": 1}
            | {
                "calibrate": 1,
                "targets": 1,
                "mixture": 1,
                "train": 1,
                "dapt": 1,
                "lora": 1,
                "score": 2,
                "evaluate": 2,
                "evaluate_systems": 3,
                "table": 1,
            },
        ),
        # of a pretrained model: no pretraining
        (
            ["smol", "smol-domains", "gpu-run"],
            ["table1"],
            {"corpus": 1, "tokenizer": 1, "tokens": 1, "model": 1, "finetune": 1, "datastore": 2, "index": 2}
            | {"targets": 1, "train": 1, "lora": 1, "score": 1, "evaluate": 1, "evaluate_systems": 4, "table": 1},
        ),
        # a pretrained model that is base, key model and memory, tuned with all rivals; 3 domains
        (
            ["smol", "recipe"],
            ["memories", "rivals"],
            {"corpus": 3, "tokenizer": 1, "tokens": 3, "model": 1, "finetune": 3, "datastore": 6, "index": 6}
            | {"calibrate": 3, "targets": 3, "teacher": 3, "mixture": 3, "train": 12, "lora": 3, "passages": 3}
            | {"score": 18, "evaluate": 18, "evaluate_systems": 15, "table": 2},
        ),
        # the same on one domain with little text
        (
            ["smol", "smol-little", "recipe"],
            ["rivals"],
            {"corpus": 1, "tokenizer": 1, "tokens": 1, "model": 1, "finetune": 1, "datastore": 2, "index": 2}
            | {"calibrate": 1, "targets": 1, "teacher": 1, "mixture": 1, "train": 4, "lora": 1, "passages": 1}
            | {"score": 6, "evaluate": 6, "evaluate_systems": 5, "table": 1},
        ),
        # 1 domain; the memories start from the first layers
        pytest.param(
            ["smol", "smol-cpu"],
            ["memories", "table1"],
            {"corpus": 1, "tokenizer": 1, "tokens": 1, "model": 2, "finetune": 1, "datastore": 2, "index": 2}
            | {"targets": 1, "teacher": 1, "train": 4, "passages": 1, "lora": 1, "score": 4, "evaluate": 4}
            | {"evaluate_systems": 5, "table": 2},
            marks=pytest.mark.slow,
        ),
        # its tasks: one suite of DCPMI tasks, three of domain tasks; base, DAPT, LoRA, MemDec
        (
            ["smol", "smol-cpu"],
            ["table2", "table14", "table15", "table16"],
            {"corpus": 1, "tokenizer": 1, "tokens": 1, "model": 2, "finetune": 1, "datastore": 1, "index": 1}
            | {"targets": 1, "train": 1, "lora": 1, "harness_base": 4, "harness_system": 8, "harness": 4, "table": 4},
        ),
        # other domains, and a general corpus to see what is forgotten
        pytest.param(
            ["smol", "smol-domains", "recipe"],
            ["memories", "forgetting"],
            {"corpus": 4, "tokenizer": 1, "tokens": 3, "model": 1, "finetune": 3, "datastore": 6, "index": 6}
            | {"calibrate": 3, "targets": 3, "teacher": 3, "mixture": 3, "train": 12, "lora": 3, "passages": 3}
            | {"score": 18, "evaluate": 18, "evaluate_systems": 15, "table": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_dry_run_of_every_config(
    files: list[str],
    targets: list[str],
    expected: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(list((ROOT / "config").glob("*.yaml"))) == 13  # config.yaml is mini.yaml
    for name in needed.files(["memdec_all", "memdec_dcpmi_kl", "memdec_casehold_4shot"]):  # a plan reads no rows
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).touch()
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path / "rows"))
    configs = ["--configfile", *(str(ROOT / "config" / f"{name}.yaml") for name in files)]
    text = snakemake(tmp_path, *(f"results/{name}.csv" for name in targets), "-n", "--cores", "8", *configs)
    assert planned(text) == {rule: n for rule, n in expected.items() if n}
    fetched = {"fetch_tokenizer", "fetch_model"} if files[0] in ("smol", "pretrained") else set()
    assert set(re.findall(r"^fetch_\w+", text, re.MULTILINE)) == fetched


def test_the_control_of_another_domain_takes_the_memory_of_the_next(tmp_path: Path) -> None:
    target = "results/mini/sklearn/seed0/evaluation/other/gpt2-L/manifest.json"
    text = snakemake(tmp_path, target, "-n", "-p", "--cores", "1")
    assert planned(text)["train"] == 1
    (command,) = re.findall(r"^.*memdec score .*--memory .*$", text, re.MULTILINE)
    assert "--memory results/mini/torch/seed0/memory/memdec " in command  # sklearn is the last domain, torch the first
    assert "--control" in command


def test_a_memory_may_be_moved_that_only_one_study_has(tmp_path: Path) -> None:
    more = {"large": {"memory_model": "gpt2-M"}, "moved": {"adapt": "large", "key_model": "qwen3k-L"}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"studies": {"vocabulary": {"memories": more}}}))
    target = "results/mini/torch/seed0/adapted/moved/manifest.json"
    text = snakemake(
        tmp_path, "-n", "-p", "--cores", "1", "--configfile", str(MINI), str(tmp_path / "more.yaml"), "--", target
    )
    (command,) = re.findall(r"^.*memdec adapt-vocab .*$", text, re.MULTILINE)
    assert "--memory results/mini/torch/seed0/memory/large " in command


def test_a_bound_of_total_variation_reaches_targets_and_calibration(tmp_path: Path) -> None:
    config = yaml.safe_load(MINI.read_text())
    config |= {"index": {"kind": "cells", "centroids": 64}, "targets": config["targets"] | {"max_tv": 0.01}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    home = "results/mini/torch/seed0/keys"
    key = next(iter(config["models"]))
    targets = [f"{home}/{key}/{place}/manifest.json" for place in ("calibration", "targets/1-of-2")]
    text = snakemake(tmp_path, *targets, "-n", "-p", "--cores", "1", "--configfile", str(tmp_path / "c.yaml"))
    for command in ("calibrate", "targets"):
        (line,) = re.findall(rf"^.*memdec {command} .*$", text, re.MULTILINE)
        assert "--max-tv 0.01" in line
        assert "--nprobe" not in line
    plain = snakemake(tmp_path, *targets, "-n", "-p", "--cores", "1")
    assert "--nprobe 32" in "".join(re.findall(r"^.*memdec calibrate .*$", plain, re.MULTILINE))


def outputs(text: str) -> set[str]:
    """Files that the jobs of a dry run make."""
    return {file for line in re.findall(r"^ +output: (.*)$", text, re.MULTILINE) for file in line.split(", ")}


def with_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every task of the default config a file of rows, which a dry run does not read."""
    suites = cfg.load(MINI).suites.values()
    for name in (file for suite in suites for file in needed.files(suite.tasks, tune=suite.alpha == "tune")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    monkeypatch.setenv("MEMDEC_DATA", str(folder))


def test_all_lists_every_table_and_figure_and_makes_what_they_share_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_rows(tmp_path / "rows", monkeypatch)
    text = snakemake(tmp_path, "-n", "--cores", "8", "--", "results/all")
    made = outputs(text)
    tables = {f"results/table{number}.csv" for number in range(1, 20)}
    figures = {f"results/figure{number}.svg" for number in (2, 4, 5, 6)}
    assert (
        tables
        | figures
        | {f"results/{name}" for name in ("objectives.csv", "rivals.csv", "claims.csv", "report.html", "all")}
        <= made
    )
    folders = [file.removeprefix("results/mini/") for file in made if file.endswith("manifest.json")]
    homes = {folder.split("/seed")[0] for folder in folders if "/seed" in folder}
    # Only questions and sizes have settings of their own, and the marked words are a part of one study.
    assert homes == {"torch", "pandas", "sklearn", "scipy", "questions/scipy", "sizes/torch", "words/torch"}
    assert sorted(folder for folder in folders if folder.startswith("questions")) == [
        f"questions/scipy/seed0/{name}/manifest.json" for name in ("harness/questions/memdec/gpt2-L", "memory/memdec")
    ]
    assert planned(text)["model"] == 6


def test_a_study_with_its_own_settings_makes_only_what_depends_on_them(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("studies: {parts: {seeds: [0], targets: {temperature: 4}}}")
    files = [str(MINI), str(tmp_path / "my.yaml")]
    made = outputs(snakemake(tmp_path, "results/table9.csv", "-n", "--cores", "8", "--configfile", *files))
    homes = {file.split("/seed0/")[1].split("/manifest")[0]: file.split("/")[2] for file in made if "/seed0/" in file}
    assert homes["keys/gpt2-L/datastore/1-of-1"] == homes["keys/gpt2-L/index"] == homes["finetuned/gpt2-L"] == "torch"
    assert homes["evaluation/systems/base/gpt2-L"] == "torch"
    assert homes["keys/gpt2-L/targets/1-of-2"] == homes["memory/kl"] == homes["evaluation/kl/gpt2-L"] == "parts"


def test_what_is_the_same_at_every_seed_is_made_once(tmp_path: Path) -> None:
    """Keys of a model as it is, and the systems without a trained part, base and kNN-LM."""
    (tmp_path / "my.yaml").write_text("studies: {systems: {seeds: [0, 5]}}")
    files = [str(MINI), str(tmp_path / "my.yaml")]
    made = outputs(snakemake(tmp_path, "results/table1.csv", "-n", "--cores", "8", "--configfile", *files))

    def seeds(name: str) -> set[str]:
        return {file.split("/seed")[1].split("/")[0] for file in made if f"/{name}/" in file}

    for shared in (
        "keys/gpt2-S-untuned/datastore/1-of-1",
        "evaluation/systems/base/gpt2-S",
        "evaluation/systems/knn-lm/gpt2-S",
    ):
        assert seeds(shared) == {"0"}
    for each in ("keys/gpt2-L/datastore/1-of-1", "evaluation/systems/lora/gpt2-S", "evaluation/memdec/gpt2-S"):
        assert seeds(each) == {"0", "5"}


def test_a_control_is_found_where_its_parts_are(tmp_path: Path) -> None:
    """The memories of the study are its own, but the keys are shared, and so is p_kNN in the place of a memory."""
    study = "sizes: {memory: {epochs: 3}, memories: {near: {neighbours: true}}}"
    (tmp_path / "my.yaml").write_text(f"studies: {{{study}}}")
    files = [str(MINI), str(tmp_path / "my.yaml")]
    made = outputs(snakemake(tmp_path, "results/memories.csv", "-n", "--cores", "8", "--configfile", *files))
    assert "results/mini/torch/seed0/scores/near/manifest.json" in made
    assert "results/mini/sizes/torch/seed0/scores/keys-S/manifest.json" in made


def test_figures_are_made_of_their_parts(tmp_path: Path) -> None:
    names = [f"results/{name}.svg" for name in ("figure2", "figure4", "figure5", "figure6", "fidelity")]
    seed = "results/mini/torch/seed0"
    text = snakemake(tmp_path, *names, f"{seed}/fidelity/other/manifest.json", "-n", "-p", "--cores", "2")
    counts = planned(text)
    assert {rule: counts[rule] for rule in ("figure", "table", "fidelity", "shapes", "latency")} == {
        "figure": 5, "table": 1, "fidelity": 10, "shapes": 3, "latency": 1
    }  # fmt: skip
    (command,) = re.findall(r"^.*memdec figure .*--name figure2 .*$", text, re.MULTILINE)
    assert "--table results/table3.cells.csv" in command
    found = re.findall(r"^(.*memdec (\w+) .*--name (\S+) .*)$", text, re.MULTILINE)
    of = {(stage, name): command for command, stage, name in found}
    assert f"--memory {seed}/memory/ce --targets {seed}/keys/gpt2-L/targets/1-of-2" in of["fidelity", "ce"]
    assert f"--targets {seed}/keys/gpt2-L/targets/2-of-2" in of["fidelity", "teacher"]
    assert "--memory results/mini/pandas/seed0/memory/memdec" in of["fidelity", "other"]
    assert "--control" in of["fidelity", "other"]
    assert f"--model {seed}/finetuned/gpt2-S" in of["shapes", "keys-S"]
    assert f"--targets {seed}/keys/gpt2-S/targets/1-of-2" in of["shapes", "keys-S"]
    (command,) = re.findall(r"^.*memdec latency .*$", text, re.MULTILINE)
    keys = f"{seed}/keys/gpt2-L-untuned"
    assert f"--knn {keys}/datastore/1-of-1:{keys}/index" in command
    assert "--datastore" not in command


def with_stub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `memdec` of the jobs make empty files in place of every artefact, table and figure."""
    stub = folder / "bin" / "memdec"
    stub.parent.mkdir()
    lines = ['while [ "$1" != --out ]; do shift; done', 'case "$2" in *.html) touch "$2";; *.csv) b="${2%.csv}"']
    lines += ['mkdir -p "${2%/*}"']
    endings = "csv cells.csv items.npz md tex provenance.json svg png html"
    lines += [f'for e in {endings}; do touch "$b.$e"; done;;', '*) mkdir -p "$2"; touch "$2/manifest.json";; esac']
    stub.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")


def test_other_settings_of_latency_measure_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_stub(tmp_path, monkeypatch)
    (tmp_path / "more.yaml").write_text("latency: {repeats: 5}")
    target = "results/mini/torch/seed0/latency/memdec/gpt2-L/manifest.json"
    snakemake(tmp_path, "--cores", "2", "--configfile", str(MINI), "--", target)
    assert "Nothing to be done" in snakemake(tmp_path, "-n", "--configfile", str(MINI), "--", target)
    more = snakemake(tmp_path, "-n", "--configfile", str(MINI), str(tmp_path / "more.yaml"), "--", target)
    assert planned(more) == {"latency": 1}


def test_other_weights_measure_again_only_the_systems_that_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stub(tmp_path, monkeypatch)
    systems = "results/mini/torch/seed0/evaluation/systems"
    goals = [f"{systems}/{name}/gpt2-S/manifest.json" for name in ("base", "lora", "knn-lm")]
    goals.append("results/mini/torch/seed0/evaluation/memdec/gpt2-S/manifest.json")
    snakemake(tmp_path, "--cores", "2", "--configfile", str(MINI), "--", *goals)
    for said, remade in (
        ("lambdas: [0.3]", {"evaluate_systems": 1}),
        ("alphas: [0.3]", {"evaluate": 1}),
        ("temperatures: [3]", {"evaluate_systems": 1}),
        ("resamples: 99", {"evaluate_systems": 3, "evaluate": 1}),
    ):
        (tmp_path / "more.yaml").write_text(f"evaluate: {{{said}}}")
        files = ["--configfile", str(MINI), str(tmp_path / "more.yaml")]
        assert planned(snakemake(tmp_path, "-n", *files, "--", *goals)) == remade, said


def test_a_copy_of_the_sources_changes_nothing_and_other_content_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stub(tmp_path, monkeypatch)
    with_rows(tmp_path / "rows", monkeypatch)
    text, weights = tmp_path / "text.txt", tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    rows = tmp_path / "rows" / "nq" / "validation.jsonl"
    for file in (text, weights):
        file.write_text("as it is")
    config = yaml.safe_load(MINI.read_text())
    config["corpora"]["torch"] = {"source": "files", "path": str(text)}
    config["models"]["gpt2-S"] = {"family": "GPT2", "pretrained": str(weights.parent), "tokenizer": "bpe2k"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    goals = ["corpora/torch", "models/gpt2-S", "questions/scipy/seed0/harness/questions/memdec/gpt2-L"]
    words = ["--configfile", str(tmp_path / "c.yaml"), "--"]
    words += [f"results/mini/{goal}/manifest.json" for goal in goals]
    snakemake(tmp_path, "--cores", "2", *words)
    for file in (text, weights, rows):
        os.utime(file, ns=(5, 7))
    assert "Nothing to be done" in snakemake(tmp_path, "-n", *words)
    shutil.copytree(tmp_path / "rows", tmp_path / "elsewhere")
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path / "elsewhere"))
    assert "Nothing to be done" in snakemake(tmp_path, "-n", *words)
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path / "rows"))
    for file, rule in ((text, "corpus"), (weights, "model"), (rows, "harness")):
        before = file.read_text()
        file.write_text("otherwise")
        assert rule in "".join(planned(snakemake(tmp_path, "-n", *words)))
        file.write_text(before)
    (weights.parent / "README.md").write_text("decides nothing")
    assert "Nothing to be done" in snakemake(tmp_path, "-n", *words)
    text.rename(tmp_path / "away.txt")  # Snakemake would remove what was made from it
    run = started(
        "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path), "--cores", "2", *words
    )
    assert run.returncode == 1
    assert f"expected text in {text}, found no such file; put it there, or change the config" in run.stderr
    assert (tmp_path / "results/mini/corpora/torch/manifest.json").exists()


def test_models_that_change_their_parts_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snakemake compares inputs without their names, so two models in each other's place look the same."""
    with_stub(tmp_path, monkeypatch)
    (tmp_path / "text.txt").touch()
    model = {"family": "GPT-2", "tokenizer": "bpe", "architecture": "gpt2", "layers": 1, "heads": 2}
    model |= {"corpus": "law", "train": {"epochs": 1}}
    corpus = {"source": "files", "path": str(tmp_path / "text.txt")}
    common = {
        "scale": "tiny", "context": 32, "stride": 16, "tokenizers": {"bpe": {"train_on": ["law"], "vocab_size": 258}},
        "corpora": {"law": corpus}, "models": {"s": model | {"width": 16}, "l": model | {"width": 24}}, "domains": ["law"],
        "memories": {"ce": {"train": {"objective": "ce"}}}, "memory": {"keep_best": True},
    }  # fmt: skip
    words = []
    for key, memory in (("l", "s"), ("s", "l")):
        config = common | {"key_model": key, "memory_model": memory, "evaluated": [key]}
        config["budget"] = {"model": key}
        (tmp_path / f"{key}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        goals = [f"results/tiny/law/seed0/{goal}/manifest.json" for goal in ("memory/ce", "lora/s")]
        words.append(["--configfile", str(tmp_path / f"{key}.yaml"), "--", *goals])
    snakemake(tmp_path, "--cores", "2", *words[0])
    assert "Nothing to be done" in snakemake(tmp_path, "-n", *words[0])
    assert planned(snakemake(tmp_path, "-n", *words[1])) == {"train": 1, "lora": 1}


def test_an_edited_claim_or_printed_number_remakes_what_is_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout of its own, of a config whose only table has no evaluations."""
    for name in ("workflow", "memdec", "harness_tasks", "config", "results/reference/paper"):
        shutil.copytree(ROOT / name, tmp_path / "repo" / name)
    shutil.copy(ROOT / "environment.yml", tmp_path / "repo")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "repo"))
    with_stub(tmp_path, monkeypatch)
    config = yaml.safe_load(MINI.read_text()) | {"studies": {"sizes": {"tables": ["table13"]}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = [
        "--cores",
        "2",
        "--configfile",
        str(tmp_path / "c.yaml"),
        "--",
        "results/claims.csv",
        "results/report.html",
    ]
    snakefile = tmp_path / "repo" / "workflow" / "Snakefile"
    snakemake(tmp_path, *words, snakefile=snakefile)
    assert "Nothing to be done" in snakemake(tmp_path, "-n", *words, snakefile=snakefile)
    for name, remade in (
        ("memdec/results/claims.yaml", {"claims": 1, "report_page": 1}),
        ("results/reference/paper/table13.csv", {"table": 1, "claims": 1, "report_page": 1}),
        ("memdec/results/report.css", {"report_page": 1}),
    ):
        file = tmp_path / "repo" / name
        file.write_text(file.read_text() + "\n")
        assert planned(snakemake(tmp_path, "-n", *words, snakefile=snakefile)) == remade
        snakemake(tmp_path, *words, snakefile=snakefile)


def test_rows_that_are_missing_stop_the_run_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        AssertionError, match=r"suites.nine: rows: expected sst2/test.jsonl, .* in .*, found none"
    ) as caught:
        snakemake(tmp_path, "results/table2.csv", "--cores", "1")
    assert not list(tmp_path.rglob("manifest.json"))
    assert f"memdec data fetch --out {tmp_path} --task sst2 --task verbalizers --task mr" in str(caught.value)
    assert "Traceback (most recent" not in str(caught.value)
    text = snakemake(tmp_path, "results/table2.csv", "-n", "--cores", "1")  # a plan is made, and says what it lacks
    assert "suites.nine: rows: expected sst2/test.jsonl" in text
    assert planned(text)["harness"] == 2


@pytest.mark.parametrize(("name", "least"), [("paper", 450), ("gpu", 100)])
def test_the_papers_grid_is_planned_without_network(
    name: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job of every table, with the resources that a cluster asks for; a name server that nobody has is not asked."""
    monkeypatch.setenv("HF_ENDPOINT", "https://nowhere.invalid")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("MEMDEC_DATA", raising=False)
    text = snakemake(tmp_path, "results/all", "-n", "--cores", "8", "--configfile", str(ROOT / f"config/{name}.yaml"))
    jobs = planned(text)
    assert sum(jobs.values()) > least
    config = cfg.load(ROOT / "config" / f"{name}.yaml")
    wanted = {table for study in config.studies.values() for table in study.tables}
    assert {f"results/{table}.csv" for table in wanted} <= outputs(text)
    assert len(re.findall(r"^(?:local)?rule .*:\n(?: .*\n)*? +resources: .*runtime=", text, re.MULTILINE)) >= least


def test_the_plan_lists_every_job_and_says_what_does_not_fit(tmp_path: Path) -> None:
    """The same jobs as a dry run; what one requests is what the plan says, with a margin; the sizes are no part of recipes."""
    config = str(ROOT / "config" / "gpu.yaml")
    target = "results/table10.csv"
    command = ["memdec", "plan", config, target, "--folder", str(tmp_path), "--memory", "1000", "--json"]
    found = json.loads(ran(*command, "--disk", "5000").splitlines()[0])
    room = ("--resources", "mem_mb=1000000")  # Snakemake cuts requests to those of the machine that it runs on
    text = snakemake(tmp_path, target, "-n", "-p", "--cores", "8", *room, "--configfile", config)
    total = int(re.findall(r"^total +(\d+)$", text, re.MULTILINE)[-1])
    assert found["total"]["jobs"] == total
    assert not found["unknown"]
    assert "expected_bytes" not in text.split("Job stats")[-1]
    assert "vocabulary" not in text.split("Job stats")[-1]
    asked = [int(each) for each in re.findall(r"^    resources: .*[ ,]mem_mb=(\d+)", text, re.MULTILINE)]
    assert max(asked) == math.ceil(1.25 * found["largest"]["memory"]["bytes"] / 1e6)
    run = started(*command, "--disk", "1")
    assert run.returncode == 2
    assert re.match(r"error: plan: disk: expected \d+ GB, found 1 GB; ", run.stderr.splitlines()[-1])


def test_a_job_takes_the_gpus_and_the_launcher_of_its_model(tmp_path: Path) -> None:
    domain = "results/paper/Bio/seed42"
    config = [
        "--resources",
        "gpu=8",
        "--configfile",
        str(ROOT / "config" / "paper.yaml"),
        "--config",
        "compute={device: cuda}",
    ]
    targets = [
        f"{domain}/memory/memdec/manifest.json",
        f"{domain}/lora/Qwen2.5-7B/manifest.json",
        f"{domain}/evaluation/memdec/Qwen2.5-72B/manifest.json",
    ]
    text = snakemake(tmp_path, *targets, "-n", "-p", "--cores", "8", *config)
    jobs = re.findall(r"^rule (\w+):\n((?: .*\n)+)\n*(.*memdec.*)?", text, re.MULTILINE)

    def said(rule: str, word: str) -> tuple[int, str]:
        return next(
            (int(re.findall(r"gpu=(\d+)", about)[0]), line)
            for name, about, line in jobs
            if name == rule and word in about
        )

    gpus, line = said("train", "memory/memdec")
    assert gpus == 8
    assert "torchrun --standalone --nproc-per-node 8 -m memdec.cli train " in line
    gpus, line = said("lora", "Qwen2.5-7B")
    assert gpus == 8
    assert re.search(r"accelerate launch --num_processes 8 --config_file /.*/fsdp.yaml -m memdec.cli lora ", line)
    gpus, line = said("evaluate_systems", "Qwen2.5-72B")
    assert gpus == 4
    assert " memdec evaluate " in line
    assert "--device all --precision bfloat16" in line
    gpus, line = said("score", "memdec")
    assert gpus == 1


def test_a_wrong_key_stops_the_workflow_at_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="strid"):
        snakemake(tmp_path, "-n", "--cores", "1", "--config", "strid=3")


@pytest.mark.slow
def test_a_table_that_cannot_be_says_why(tmp_path: Path) -> None:
    for table, reason in (("forgetting", "general corpora in 'forgetting'"), ("table20", "one of table1, table2")):
        with pytest.raises(AssertionError, match=f"expected {reason}"):
            snakemake(tmp_path, f"results/{table}.csv", "-n", "--cores", "1")
    (tmp_path / "results").mkdir(exist_ok=True)
    with pytest.raises(AssertionError, match="expected one of table1, table2"):
        repair(tmp_path, "-n", "--", "results/table20.csv")


def test_the_catalogue_of_workflows_can_deploy_it(tmp_path: Path) -> None:
    """What snakedeploy writes: the folder config, and a Snakefile that takes this workflow as a module."""
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["software-stack-deployment"]["conda"]
    assert (ROOT / "config" / "README.md").is_file()
    shutil.copytree(ROOT / "config", tmp_path / "config")
    text = f'''
configfile: "config/config.yaml"
module memory_decoder_bench:
    snakefile: "{ROOT / "workflow" / "Snakefile"}"
    config: config
use rule * from memory_decoder_bench
'''
    (tmp_path / "Snakefile").write_text(text)
    found = snakemake(tmp_path, "-n", "--cores", "8", snakefile=tmp_path / "Snakefile")
    assert planned(found) == TABLE3


def test_the_rules_use_nothing_of_snakemake_that_it_keeps_for_itself() -> None:
    files = [ROOT / "Snakefile", *(path for path in (ROOT / "workflow").rglob("*") if path.is_file())]
    assert len(files) >= 10
    for path in files:
        for word in ("register_resource", "workflow.dag", "forcefiles", "local_exec", "global_resources"):
            assert word not in path.read_text(), (path, word)


@pytest.mark.slow
def test_rules_that_compute_take_the_gpu_that_the_config_may_use(tmp_path: Path) -> None:
    computing = {
        "model",
        "finetune",
        "dapt",
        "lora",
        "datastore",
        "index",
        "calibrate",
        "targets",
        "mixture",
        "train",
        "score",
        "evaluate_systems",
    }
    for device, taken in (("cpu", "gpu=0"), ("cuda", "gpu=1")):
        text = snakemake(tmp_path, "-n", "--cores", "16", "--config", f"compute={{device: {device}}}")
        jobs = re.findall(r"^(?:local)?rule (\w+):\n((?: .*\n)+)", text, re.MULTILINE)
        rules = {name for name, said in jobs if taken in said}
        assert rules == computing
        assert all("gpu=" not in said for name, said in jobs if name not in computing)


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_a_tiny_run_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule once on made text; a second call does nothing; a lost shard rebuilds only what hangs on it."""
    for name in ("general", "domain"):
        (tmp_path / f"{name}.txt").write_text(made_text(300, len(name)))
    model = {"family": "GPT-2", "architecture": "gpt2", "width": 16, "layers": 2, "heads": 2}
    model |= {"corpus": "general", "train": {"epochs": 0.2}}
    config = {
        "scale": "tiny",
        "context": 32,
        "stride": 16,
        "tokenizers": {n: {"train_on": ["general"], "vocab_size": v} for n, v in (("bpe", 300), ("other", 320))},
        "corpora": {
            n: {"source": "files", "path": str(tmp_path / f"{n}.txt"), "min_bytes": 100} for n in ("general", "domain")
        },
        "models": {n: {**model, "tokenizer": t} for n, t in (("tiny", "bpe"), ("foreign", "other"))},
        "domains": ["domain"],
        "forgetting": ["general"],
        "systems": ["base", "In-Context RAG", "kNN-LM", "DAPT", "LoRA", "MemDec"],
        "key_model": "tiny",
        "memory_model": "tiny",
        "targets": {"neighbours": 8, "shards": 2},
        "memory": {"epochs": 0.5},
        "memories": {
            "teacher": {"targets": "teacher", "tuned": False, "tuned_start": True},
            "ce": {"train": {"objective": "ce", "evaluate_every": 0.25}},
            "mixed": {"dapt": True},
            "moved": {"adapt": "memdec", "key_model": "foreign", "share": 0.5},
        },
        "budget": {"model": "tiny"},
        "passages": {"passage": 12},
        "evaluate": {"resamples": 20, "neighbours": 8},
        "cases": [{"group": "one", "text": "The matrix returns the [[token]] of"}],
        "suites": {"few": {"tasks": ["dcpmi_cb_kl"], "limit": 2}},
        "studies": {
            "tasks": {"tables": ["table2"], "evaluated": ["tiny"], "tasks": {"domain": ["few"]}, "systems": ["base", "LoRA", "MemDec"]},
            "parts": {
                "tables": ["table9"], "evaluated": ["tiny"], "systems": ["base", "MemDec"], "memory": {"epochs": 0.3},
                "memories": {f"only-{part}": {"train": {"objective": part}} for part in ("kl", "ce")},
            },
        },
    }  # fmt: skip
    task = tmp_path / "rows" / "cb" / "test.jsonl"
    task.parent.mkdir(parents=True)
    row = {"premise": "The matrix is square.", "hypothesis": "It is a matrix."}
    task.write_text(
        "".join(json.dumps(row | {"label": label}) + "\n" for label in ("entailment", "neutral", "contradiction"))
    )
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path / "rows"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = ["--cores", "8", "--configfile", str(tmp_path / "tiny.yaml"), "--", "results/table3.csv"]
    more = ("table1", "table2", "table4", "table6", "table9", "memories", "forgetting")
    everything = [*words, *(f"results/{name}.csv" for name in more)]
    first = snakemake(tmp_path, *everything)
    table = (tmp_path / "results" / "table3.csv").read_text()
    rows = pd.read_csv(tmp_path / "results" / "memories.csv")
    assert list(zip(rows["model"], rows["system"].str.removeprefix("MemDec: "), strict=True)) == [
        *[("tiny", system) for system in [*config["systems"][:5], "memdec", "teacher", "ce", "mixed"]],
        *[("foreign", system) for system in [*config["systems"][:5], "moved"]],
    ]
    assert rows["domain"].notna().all()
    for number, name in (("3", "tiny"), ("4", "foreign")):
        part = pd.read_csv(tmp_path / "results" / f"table{number}.csv")
        assert [name for name in part["method"] if not name.startswith("control: ")] == config["systems"]
        assert set(part["model"]) == {name}
    for name, kind in itertools.product(
        ("table1", "table3", "table4", "table6", "memories", "forgetting"), ("md", "tex", "provenance.json")
    ):
        assert (tmp_path / "results" / f"{name}.{kind}").is_file()
    assert "Nothing to be done" in snakemake(tmp_path, *everything)
    accuracies = pd.read_csv(tmp_path / "results" / "table2.csv")
    assert list(accuracies["method"]) == ["base", "LoRA", "MemDec"]
    assert list(accuracies["CB_n"]) == [2, 2, 2]
    task.write_text(task.read_text() * 2)  # other rows: their tasks run again, and nothing else
    assert planned(snakemake(tmp_path, "-n", *everything)) == {
        "harness": 1, "harness_base": 1, "harness_system": 1, "table": 1
    }  # fmt: skip
    assert f'cpu=Resource("cpu", {len(os.sched_getaffinity(0))})' in first  # not 8

    targets = tmp_path / "results" / "tiny" / "domain" / "seed0" / "keys" / "tiny" / "targets"
    hang_on_it = {"targets": 1, "train": 1, "score": 1, "evaluate": 1, "table": 1}
    whole = (targets / "2-of-2" / "manifest.json").read_bytes()
    (targets / "2-of-2" / "manifest.json").unlink()
    assert "Nothing to be done" in snakemake(tmp_path, *words)  # Snakemake alone does not look
    assert planned(repair(tmp_path, "-n", *words)) == hang_on_it
    (targets / "2-of-2" / "manifest.json").write_bytes(whole)
    assert "Nothing to be done" in repair(tmp_path, *words)

    (targets / "1-of-2" / "tokens.npy").write_bytes(b"cut")
    again = repair(tmp_path, *words)
    assert re.search(
        r"targets/1-of-2: damaged; .*tokens\.npy: expected \d+ bytes, found 3 bytes; .*/memory/memdec", again
    )
    assert planned(again) == hang_on_it
    assert (tmp_path / "results" / "table3.csv").read_text() == table
    shutil.rmtree(targets / "1-of-2")
    assert planned(repair(tmp_path, "-n", *words)) == hang_on_it


# --- keep_keys: false ---------------------------------------------------------------------------------------------------


BEFORE = {"index", "calibrate", "targets", "free_keys"}  # rules that may read keys which will go


def jobs(text: str) -> list[tuple[str, set[str], str]]:
    """Rule, inputs and output of each job of a dry run."""
    found = re.findall(r"^(?:local)?rule (\w+):\n((?:    .*\n)+)", text, re.MULTILINE)

    def files(said: str, name: str) -> set[str]:
        return {file for line in re.findall(rf"^    {name}: (.*)$", said, re.MULTILINE) for file in line.split(", ")}

    return [(rule, files(said, "input"), min(files(said, "output"), default="")) for rule, said in found]


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_keys_go_after_all_who_read_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(tmp_path / "rows", monkeypatch)
    (tmp_path / "free.yaml").write_text("keep_keys: false\n")
    config = str(MINI.with_stem(name))
    words = ["-n", "--cores", "8", "--configfile", config]
    kept = planned(snakemake(tmp_path, *words, "--", "results/all"))
    text = snakemake(tmp_path, *words, str(tmp_path / "free.yaml"), "--", "results/all")
    assert planned(text) == kept | {"free_keys": planned(text)["free_keys"]}  # no other job because of it

    found = jobs(text)
    freeing = [(inputs, output) for rule, inputs, output in found if rule == "free_keys"]
    assert freeing
    for inputs, output in freeing:
        taken = {file for file in inputs if "/datastore/" in file or file.endswith("/index/manifest.json")}
        readers = [(rule, made) for rule, read, made in found if read & taken]
        assert {rule for rule, _ in readers} <= BEFORE
        assert {made for rule, made in readers} <= inputs | {output}


def test_no_keys_are_made_to_be_removed(tmp_path: Path) -> None:
    """A memory that is ready needs none."""
    config = yaml.safe_load(MINI.read_text()) | {"systems": ["base", "MemDec"], "keep_keys": False}
    config |= {"memories": {"memdec": {"ready": dict.fromkeys(config["domains"], "gpt2-S")}}}
    config["studies"] = {"main": {"tables": ["table3"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = ["-n", "--cores", "8", "--configfile", str(tmp_path / "c.yaml"), "--", "results/all"]
    assert not set(planned(snakemake(tmp_path, *words))) & {"finetune", "datastore", "index", "targets", "free_keys"}


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_a_run_without_its_keys_gives_the_same_table_and_makes_nothing_twice(tmp_path: Path) -> None:
    for name in ("general", "domain"):
        (tmp_path / f"{name}.txt").write_text(made_text(300, len(name)))
    model = {"family": "GPT-2", "architecture": "gpt2", "width": 16, "layers": 2, "heads": 2, "tokenizer": "bpe"}
    texts = {
        n: {"source": "files", "path": str(tmp_path / f"{n}.txt"), "min_bytes": 100} for n in ("general", "domain")
    }
    config = {
        "scale": "tiny",
        "context": 32,
        "stride": 16,
        "tokenizers": {"bpe": {"train_on": ["general"], "vocab_size": 300}},
        "corpora": texts,
        "models": {"tiny": {**model, "corpus": "general", "train": {"epochs": 0.2}}},
        "domains": ["domain"],
        "systems": ["base", "MemDec"],
        "key_model": "tiny",
        "memory_model": "tiny",
        "targets": {"neighbours": 8, "shards": 2},
        "memory": {"epochs": 0.5},
        "evaluate": {"resamples": 20, "neighbours": 8},
        "studies": {"main": {"tables": ["table3"]}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (tmp_path / "free.yaml").write_text("keep_keys: false\n")
    words = ["--cores", "2", "--configfile", str(tmp_path / "tiny.yaml")]
    freeing = [*words, str(tmp_path / "free.yaml"), "--", "results/all"]
    snakemake(tmp_path, *words, "--", "results/all")
    table, folder = tmp_path / "results" / "table3.csv", tmp_path / "results" / "tiny" / "domain" / "seed0"
    numbers = table.read_text()
    keys = folder / "keys" / "tiny" / "datastore" / "1-of-1" / "keys.npy"
    assert keys.is_file()

    # Told later to free them, the run removes the keys and makes again only what is written from the config.
    assert set(planned(snakemake(tmp_path, *freeing))) <= {"free_keys", "table", "claims", "report_page", "everything"}
    assert not keys.exists()
    assert (table.read_text(), (folder / "memory" / "memdec" / "manifest.json").is_file()) == (numbers, True)
    assert "Nothing to be done" in snakemake(tmp_path, *freeing)
    assert "Nothing to be done" in repair(tmp_path, *freeing)
    assert "Nothing to be done" in repair(tmp_path, *freeing[:-1], "results/table3.csv")

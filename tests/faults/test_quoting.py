"""Config values reach the shell as words: what a value means to a shell has no effect there."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from memdec import config as cfg

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# What shells, Snakemake's formatting and option parsers give a meaning to; `MARK` would be made by running it.
NASTY = "-x 'a' \"b\" $(touch MARK) `touch MARK`; touch MARK\n& | > MARK {wildcards} {{x}} {0} * ? [a] ~ ${HOME:-/} !h \\ #\té"
RULES = ("corpus", "tokenizer", "model", "finetune", "lora", "datastore", "index", "targets", "evaluate_systems")


def nasty_config(home: Path) -> dict[str, Any]:
    """A whole config with `NASTY` in every field that takes any text."""
    corpus: dict[str, Any] = {"source": "files", "path": f"{home}/{NASTY}/a.txt", "field": NASTY}
    hub: dict[str, Any] = {"source": "hub", "path": NASTY, "config": NASTY, "revision": NASTY, "field": NASTY}
    hub["splits"] = {"train": NASTY, "valid": NASTY, "test": NASTY}
    scratch = {
        "architecture": "gpt2",
        "width": 8,
        "layers": 1,
        "heads": 1,
        "corpus": "a",
        "train": {"report_to": [NASTY]},
    }
    return {
        "scale": "nasty",
        "context": 8,
        "stride": 4,
        "compute": {"device": "cpu"},
        "tokenizers": {
            "t": {"train_on": ["a"], "vocab_size": 300},
            "p": {"pretrained": NASTY.replace("${HOME:-/}", ""), "revision": NASTY},
        },
        "corpora": {
            "a": {**corpus, "path": corpus["path"].replace("${HOME:-/}", "")},
            "b": {"source": "files", "paths": {"train": "x $(touch MARK)", "valid": "y;y", "test": "{z}"}},
            "c": {"source": "docstrings", "packages": [NASTY]},
            "d": hub,
        },
        "models": {
            "m": {"family": NASTY, "tokenizer": "t", **scratch},
            "q": {"family": NASTY, "tokenizer": "p", "pretrained": "x y'z", "revision": NASTY},
        },
        "evaluated": ["m"],
        "domains": ["a", "b", "c", "d"],
        "systems": ["base", "kNN-LM", "LoRA", "MemDec"],
        "key_model": "m",
        "memory_model": "m",
        "finetune": {"report_to": [NASTY, "-"]},
        "memory": {"report_to": [NASTY]},
        "lora": {"report_to": [NASTY]},
        "memories": {"other": {"train": {"report_to": [NASTY]}}},
        "datastore": {"key_point": NASTY},
        "per_model": {"m": {"launch": NASTY}},
        "cases": [{"group": NASTY, "text": f"{NASTY} [[word]]"}],
    }


def snakemake(folder: Path, config: dict[str, Any], *words: str) -> str:
    (folder / "nasty.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--cores", "1", "--configfile", str(folder / "nasty.yaml"), *words]
    path = os.pathsep.join([str(folder), str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def commands(printed: str) -> list[str]:
    """The shell commands of a dry run with -p, without the lines that Snakemake puts around them."""
    found = re.findall(r"^Shell command: (.*?)\n(?=\[|\n?(?:local)?rule |Job stats|Reasons|$)", printed, re.S | re.M)
    return found or re.findall(r"^ *(OMP_NUM_THREADS=.*?2>&1)$", printed, re.S | re.M)


def values_of(words: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name == option]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[str]]]:
    """The config, and the words of every command that the rules would run."""
    folder = tmp_path_factory.mktemp("nasty")
    config = nasty_config(folder)
    targets = [
        "results/table3.csv",
        "results/table6.csv",
        "results/memories.csv",
        "results/nasty/models/q/manifest.json",
    ]
    text = snakemake(folder, config, "-n", "-p", "--", *targets)
    found = [shlex.split(command) for command in commands(text)]
    assert len(found) > 40, text[:3000]
    return config, found


def test_every_field_comes_out_as_it_went_in(rendered: tuple[dict[str, Any], list[list[str]]]) -> None:
    config, found = rendered
    given: dict[str, set[str]] = {}
    specs: list[Any] = []
    for words in found:
        name = next((after for word, after in itertools.pairwise(words) if word in ("memdec", "memdec.cli")), "")
        for option in ("--key-point", "--report-to"):
            given.setdefault(f"{name} {option}", set()).update(values_of(words, option))
        specs += map(json.loads, values_of(words, "--spec"))
    assert given["datastore --key-point"] == {NASTY}
    files = {os.path.basename(file) for words in found for file in values_of(words, "--config_file")}
    assert files == {os.path.basename(NASTY)}
    assert given["finetune --report-to"] == {NASTY, "-"}
    assert given["train --report-to"] == given["lora --report-to"] == {NASTY}
    for kind in ("corpora", "tokenizers", "models"):
        for name, entry in config[kind].items():
            assert entry in specs, (kind, name)


def free_text(part: Any) -> bool:
    """Whether a part of the JSON schema takes any text: no pattern, no list of values."""
    if isinstance(part, list):
        return any(map(free_text, part))
    if not isinstance(part, dict):
        return False
    if part.get("type") == "string":
        return not {"pattern", "enum", "const"} & set(part)
    return any(free_text(part.get(key)) for key in ("anyOf", "oneOf", "items", "additionalProperties"))


def test_no_field_of_free_text_is_forgotten() -> None:
    schema = cfg.json_schema()
    found = {
        f"{kind}.{name}"
        for kind, entry in {**schema["$defs"], "Config": schema}.items()
        for name, part in entry.get("properties", {}).items()
        if free_text(part)
    }
    training = {f"{kind}.report_to" for kind in ("TrainSettings", "LoraSettings", "MemorySettings")}
    assert found == training | {
        "DocstringCorpus.packages", "FileCorpus.path", "FileCorpus.paths", "FileCorpus.field",
        "HubCorpus.path", "HubCorpus.config", "HubCorpus.revision", "HubCorpus.splits", "HubCorpus.field",
        "TokenizerSpec.pretrained", "TokenizerSpec.revision", "ModelSpec.family", "ModelSpec.pretrained",
        "ModelSpec.revision", "DatastoreSettings.key_point", "Case.group", "Case.text",
        "ForModel.launch",
    }  # fmt: skip


def test_nothing_else_is_a_word(rendered: tuple[dict[str, Any], list[list[str]]]) -> None:
    """Outside of values there are only options, names of folders, and the rule's own redirection."""
    plain = re.compile(r"[\w./:=-]+|\$\(dirname [\w./-]+\)|2?>|2>&1|printf|%s")
    for words in rendered[1]:
        values = {word for name, word in itertools.pairwise(words) if name.startswith("--")}
        assert [
            word for word in words if word not in values and not plain.fullmatch(word) and "{" not in word[:2]
        ] == []


def test_a_run_starts_nothing_that_a_value_names(tmp_path: Path) -> None:
    """Two rules run for real; a stand-in for `memdec` writes down the words it gets."""
    config = nasty_config(tmp_path)
    text = Path(config["corpora"]["a"]["path"])
    text.parent.mkdir()
    text.touch()
    stand_in = tmp_path / "memdec"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\nwords = sys.argv[1:]\n"
        "out = pathlib.Path(words[words.index('--out') + 1])\nout.mkdir(parents=True, exist_ok=True)\n"
        "for name in ('train.parquet', 'valid.parquet', 'test.parquet', 'tokenizer.json', 'config.json', 'manifest.json'):\n"
        "    (out / name).write_text('{}')\n"
        "(out / 'words.json').write_text(json.dumps(words))\n"
    )
    stand_in.chmod(0o755)
    snakemake(
        tmp_path, config, "--quiet", "--", "results/nasty/config.json", "results/nasty/tokenizers/t/manifest.json"
    )
    words = json.loads((tmp_path / "results/nasty/corpora/a/words.json").read_text())
    assert json.loads(words[words.index("--spec") + 1]) == config["corpora"]["a"]
    resolved = json.loads((tmp_path / "results/nasty/config.json").read_text())
    assert resolved["datastore"]["key_point"] == NASTY
    assert resolved["cases"] == config["cases"]
    assert list(tmp_path.rglob("MARK")) == []
    assert not (ROOT / "MARK").exists()


def test_make_repair_takes_folders_with_spaces() -> None:
    """The Makefile hands its variables to the shell as variables, not as text of the command."""
    text = (ROOT / "Makefile").read_text()
    recipe = text[text.index("\nrepair:") :].split("\n\n")[0]
    assert '"$$FOLDER"' in recipe
    assert "$(FOLDER)" not in recipe

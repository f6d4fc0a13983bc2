"""A config says all of its faults at once, and nothing but plain data gets through."""

import copy
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from making import run_memdec

from memdec import config as cfg
from memdec import plain
from memdec.errors import ConfigError
from memdec.settings import FileCorpus, ModelSpec, TokenizerSpec, TrainSettings, parse

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "config" / "mini.yaml"


def validate(capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[int, str]:
    """Exit code and standard error of `memdec validate`."""
    code, _, err = run_memdec(capsys, "validate", *paths)
    return code, err


def mini(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(MINI.read_text())
    return data | changes


# --- plain data only ------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}, z: *a{n - 1}}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"line \d+: expected at most 100,000 values, found \d+ with all aliases written out"),
        (MERGES, r"expected at most 100,000 values, found \d+"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: expected at most 32 levels"),
        ("a: " + "{b: " * 5000 + "1" + "}" * 5000, "line 1: expected at most 32 levels"),
        ("".join("  " * n + f"k{n}:\n" for n in range(900)), "expected at most 32 levels"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 300)), "expected at most 32 levels"),
        ("a: &a [*a]", "line 1: expected an alias of something else, found one inside of its own anchor"),
        ("seeds: [" + "9" * 6000 + "]", r"expected plain text and numbers, found: Exceeds the limit"),
        ("seeds: [0x" + "f" * 6000 + "]", r"found (a number of about 7\d+ digits|: Exceeds)"),
        ("seeds: [9223372036854775808]", r"seeds.0: expected a number of at most 64 bits"),
        ("context: 1:30", "line 1: expected a number, found '1:30', which YAML reads in base 60"),
        ("scale: 2024-01-01", r"line 1: expected text or a number, found '2024-01-01' \(timestamp\)"),
        ("scale: 2024-99-99", "line 1: expected text or a number|found: month must be in"),
        ("scale: !!binary aGVsbG8=", r"\(binary\); put text between quotes"),
        ("scale: !!set {a, b}", r"found 'set' \(set\)"),
        ("scale: !!python/object/apply:os.system ['touch x']", "not valid YAML: could not determine|found 'tag:|python/object"),
        ("a: 1\nb: 2\na: 3", "line 3: expected each key once, found 'a' twice"),
        ("models: {m: {width: 8, width: 16}}", "expected each key once, found 'width' twice"),
        ("1: x", "line 1: expected text as a key, found '1'; put it between quotes"),
        ("on: x", "line 1: expected text as a key, found 'on'"),
        ("? [a, b]\n: x", "line 1: expected text as a key, found a list or mapping"),
        ("null: x", "expected text as a key, found 'null'"),
        ("a:\n\t- b", "not valid YAML: .*; indent with spaces, not with tabs"),
        ("a: \"\\0\"", "a: expected text without NUL characters"),
        ('a: "\\ud800"', "half a surrogate pair|not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML: expected a single document"),
        ("", "valid dictionary"),
        ("[]", "valid dictionary"),
        ("just text", "valid dictionary"),
    ],
)  # fmt: skip
def test_what_is_no_plain_data_is_one_line_at_once(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    begin = time.monotonic()
    code, err = validate(capsys, path) if text.strip("[]") and ":" in text else (2, "")
    assert time.monotonic() - begin < 2
    if not err:
        with pytest.raises(ConfigError) as caught:
            cfg.load(path)
        err = f"error: {caught.value}\n"
    assert code == 2
    assert err.startswith(f"error: {path}: ") or re.match(rf"error: .*{re.escape(str(path))}", err), err[:300]
    assert err.count("\n") == 1
    assert len(err) < 1000
    assert re.search(message, err), err


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "large.yaml").write_text("# long\n" * 200_000)
    (tmp_path / "bytes.yaml").write_bytes(b"scale: \xff\xfe")
    (tmp_path / "fifo.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in (
        ("large.yaml", "expected a config of at most 1,000,000 bytes, found 1,400,000"),
        ("bytes.yaml", "expected a file with UTF-8 text"),
        ("fifo.yaml", "expected a YAML config file, found a folder"),
        ("pipe.yaml", "expected a YAML config file, found something else"),
        ("none.yaml", "expected a YAML config file, found nothing"),
    ):
        code, err = validate(capsys, tmp_path / name)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_what_ours_use_is_still_read(tmp_path: Path) -> None:
    """Anchors, merge keys with changed values, and a byte order mark."""
    path = tmp_path / "c.yaml"
    path.write_text("\ufeffa: &a {x: 1, y: [2, 2.5]}\nb: {<<: *a, x: 3}\nc: *a\n")
    assert plain.read(path) == {
        "a": {"x": 1, "y": [2, 2.5]},
        "b": {"x": 3, "y": [2, 2.5]},
        "c": {"x": 1, "y": [2, 2.5]},
    }
    assert all(isinstance(plain.read(file), dict) for file in (ROOT / "config").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINI.read_text() + "\nseeds: [1]\n", "expected each key once, found 'seeds' twice"),
        (MINI.read_text().replace("scale: mini", "scale: 2024-01-01"), "timestamp"),
        (MINI.read_text() + f"\ncases: [{{group: a, text: [{'[' * 40}{']' * 40}]}}]\n", "32 levels"),
    ],
)
def test_snakemake_refuses_the_same(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    run = subprocess.run([*command, "-n", "--configfile", str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert message in run.stdout + run.stderr


# --- all problems at once -------------------------------------------------------------------------------------------


def many_faults() -> dict[str, Any]:
    data = copy.deepcopy(mini(strid=3, seeds=[-1], stride=500, key_model="gpt2-l", domains=["torhc", "torch", "torch"]))
    data["corpora"]["general"]["disjoint_from"] = ["torch"]
    data["corpora"]["text"] = {"source": "files", "path": "/none/text.txt"}
    data["corpora"]["docs"] = {"source": "docstrings", "packages": ["no_such_package"]}
    data["corpora"]["web"] = {"source": "fils", "path": "x"}
    data["tokenizers"]["bpe2k"]["vocab_size"] = 100
    data["models"]["gpt2-S"]["heads"] = 3
    data["models"]["gpt2-M"]["widht"] = 3
    data["models"]["far"] = {"family": "f", "tokenizer": "bpe2k", "pretrained": "/no/folder"}
    data["finetune"]["learning_rate"] = float("inf")
    data["memory"]["objective"] = "hybird"
    data["targets"]["neighbours"] = 10**7
    data["memories"] = {"a": {"train": {"epoch": 3}}, "b": {"adapt": "c"}, "c": {"adapt": "b"}, "d": {"key_model": "x"}}
    return data


def test_all_kinds_of_problems_in_one_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(many_faults()))
    code, err = validate(capsys, path)
    assert code == 2
    assert err.count("\n") == 1
    for part in (
        "strid: unknown key; did you mean stride?",
        "models.gpt2-M.widht: unknown key; did you mean width?",
        "seeds.0: Input should be greater than or equal to 0, found -1",
        "finetune.learning_rate: Input should be a finite number, found inf",
        "tokenizers.bpe2k.vocab_size: Input should be greater than or equal to 257, found 100",
        "models.gpt2-S.width: expected a multiple of heads (3), found 64",
        "memory.objective: Input should be 'hybrid'",
        "did you mean hybrid?",
        "corpora.web: expected a source of docstrings, files, hub, found fils; did you mean files?",
        "domains: expected each entry once, found torch twice",
        "found torhc; did you mean torch?",
        "key_model: expected one of far, gpt2-L, gpt2-M, gpt2-S, qwen2-M, qwen3k-L, qwen3k-M, found gpt2-l; did you mean gpt2-L?",
        "disjoint_from: expected corpora that do not need this one, found general > torch > general",
        "memories.b.adapt: expected a memory that does not start from this one, found b > c > b",
        "memories.d.key_model: expected one of",
        "memories.a.train: epoch: unknown key; did you mean epochs?",
        "stride: expected at most context (128), found 500",
        "corpora.text.path: expected text files at /none/text.txt, found none",
        "corpora.docs.packages: expected an installed package, found none called no_such_package",
        "models.far.pretrained: expected a folder or a Hub id, found nothing at /no/folder",
    ):  # fmt: skip
        assert part in err, part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 1, 0]}, "seeds: expected each entry once, found 0 twice"),
        ({"seeds": [2**32]}, "seeds.0: Input should be less than 4294967296"),
        ({"evaluated": ["gpt2-S", "gpt2-S"]}, "evaluated: expected each entry once"),
        ({"systems": ["base", "base"]}, "systems: expected each entry once"),
        ({"forgetting": ["generl"]}, "forgetting: .* found generl; did you mean general\\?"),
        ({"budget": {"model": "gpt2-XL"}}, "budget.model: .* found gpt2-XL; did you mean gpt2-"),
        ({"budget": {"model": "gpt2-L", "epochs": float("inf")}}, "budget.epochs: .* finite number"),
        ({"memory": {"learning_rate": float("nan")}}, "memory.learning_rate: Input should be"),
        ({"memory": {"weight_decay": float("inf")}}, "memory.weight_decay: Input should be a finite number"),
        ({"corpora": {"a": {"source": "files", "path": "a", "disjoint_from": ["a"]}}}, "found a > a"),
        (
            {"index": {"kind": "ivfpq", "centroids": 64, "code_size": 48}},
            r"index.code_size: .* width \(128\), found 48",
        ),
        ({"targets": {"neighbours": 190_001}}, r"targets.neighbours: .*torch's train text \(140000\), found 190001"),
        ({"system": ["base"]}, "system: unknown key; did you mean systems\\?"),
        ({"compute": {"device": "gpu"}}, "compute.device: Input should be 'auto', 'cpu', 'cuda' or 'all'"),
    ],
)
def test_faults_that_used_to_pass(change: dict[str, Any], message: str) -> None:
    found, _ = cfg.faults(mini(**change))
    assert any(re.search(message, line) for line in found), found


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (TokenizerSpec, {"train_on": ["a"], "vocab_size": 256}, "vocab_size: .* 257, found 256"),
        (TokenizerSpec, {"train_on": ["a", "a"], "vocab_size": 300}, "train_on: expected each entry once"),
        (
            FileCorpus,
            {"source": "files", "path": "a", "max_bytes": {"train": 9}},
            "max_bytes: expected at least min_bytes",
        ),
        (TrainSettings, {"learning_rate": 1e999}, "learning_rate: .* finite"),
        (TrainSettings, {"batch_size": 2**70}, "batch_size: expected a number of at most 64 bits"),
    ],
)
def test_faults_of_one_entry(kind: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(kind, data, "here")


@pytest.mark.parametrize(
    ("architecture", "width", "heads", "message"),
    [
        ("gpt2", 64, 3, r"width: expected a multiple of heads \(3\), found 64"),
        ("qwen2", 9, 3, "even width of each head"),
        ("qwen2", 20, 5, "heads: expected an even number or at most 3 in qwen2, found 5"),
        ("qwen2", 96, 3, None),
        ("gpt2", 9, 3, None),
    ],
)
def test_heads_share_the_width(architecture: str, width: int, heads: int, message: str | None) -> None:
    """What the check lets through is what transformers can build and run."""
    import torch

    from memdec.models import loading

    data = {"family": "f", "tokenizer": "t", "architecture": architecture, "width": width, "heads": heads, "layers": 1}
    data |= {"corpus": "c", "train": {}}
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            parse(ModelSpec, data, "here")
        return
    model = loading.from_scratch(parse(ModelSpec, data, "here"), 300, 8, 0)
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 300)


def test_overlays_are_laid_over_each_other_as_snakemake_does_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from snakemake.utils import update_config

    names = ("mini", "gpu-tiny", "smol", "smol-cpu")
    files = [ROOT / "config" / f"{name}.yaml" for name in names]
    ours, theirs = cfg.read(*files), {}
    for file in files:
        update_config(theirs, yaml.safe_load(file.read_text()))
    assert ours == theirs
    assert validate(capsys, MINI, ROOT / "config" / "gpu-tiny.yaml")[0] == 0
    (tmp_path / "plain.yaml").write_text("domains: [torch]\n")
    code, err = validate(capsys, tmp_path / "plain.yaml")  # without models: over the default, as the Snakefile
    assert (code, "Next: snakemake" in err) == (0, True)
    (tmp_path / "over.yaml").write_text("models: {gpt2-S: {heads: 5}}\ndomains: [torch]\nevaluatd: [gpt2-S]\n")
    code, err = validate(capsys, MINI, tmp_path / "over.yaml")
    assert code == 2
    assert "models.gpt2-S.width: expected a multiple of heads (5), found 64" in err
    assert "evaluatd: unknown key; did you mean evaluated?" in err
    (tmp_path / "over.yaml").write_text("suites: {law: {tasks: [memdec_lw]}}\ndomains: [torch]\n")
    code, err = validate(capsys, MINI, tmp_path / "over.yaml")
    assert (code, "suites.law.tasks: expected tasks or groups of harness_tasks, found memdec_lw; did you" in err) == (
        2,
        True,
    )


def test_folders_and_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "good").mkdir(parents=True)
    (tmp_path / "models" / "good" / "config.json").write_text("{}")
    (tmp_path / "models" / "good" / "tokenizer.json").write_text("{}")
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    data = mini()
    data["tokenizers"]["t"] = {"pretrained": "models/good"}
    for name, place in (
        ("good", "models/good"),
        ("hub", "Qwen/Qwen2.5-7B"),
        ("gone", "models/gone"),
        ("empty", "models/empty"),
        ("file", "text.txt"),
        ("dots", "../gone"),
        ("gguf", "gone.gguf"),
    ):
        data["models"][name] = {"family": "f", "tokenizer": "t", "pretrained": place}
    data["corpora"]["here"] = {"source": "files", "paths": {"train": "text.txt", "valid": "*.txt", "test": "*.md"}}
    data["evaluated"] = ["gpt2-S"]
    found, config = cfg.faults(data)
    assert found == []
    assert config is not None
    wrong = {line.partition(": ")[0] for line in cfg.missing(config)}
    assert wrong == {
        "models.gone.pretrained", "models.empty.pretrained", "models.file.pretrained", "models.dots.pretrained",
        "models.gguf.pretrained", "corpora.here.paths.test",
    }  # fmt: skip

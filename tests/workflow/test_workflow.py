"""The workflow and the shape of the code: schema, dry run, a real tiny run, direction of imports, safe loading."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from making import made_text

from memdec import config as cfg

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODULES = sorted((ROOT / "memdec").glob("*.py"))


def snakemake(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), *words]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_the_schema_is_fresh() -> None:
    path = ROOT / "workflow" / "schemas" / "config.schema.json"
    assert json.loads(path.read_text()) == cfg.json_schema(), f"stale; run `memdec schema {path}`"


def test_dry_run_of_the_default_config(tmp_path: Path) -> None:
    text = snakemake(tmp_path, "-n", "--cores", "8")
    counts = dict(re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE))
    expected = {"corpus": 4, "tokenizer": 1, "tokens": 4, "model": 4, "finetune": 3, "datastore": 3, "index": 3}
    expected |= {"targets": 6, "train": 3, "lora": 12, "evaluate": 12, "table3": 1}
    assert {rule: int(counts[rule]) for rule in expected} == expected


def test_a_wrong_key_stops_the_workflow_at_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="strid"):
        snakemake(tmp_path, "-n", "--cores", "1", "--config", "strid=3")


@pytest.mark.slow
def test_a_tiny_run_from_nothing(tmp_path: Path) -> None:
    """Everything once on made text; a second call does nothing; a lost shard rebuilds only what hangs on it."""
    for name in ("general", "domain"):
        (tmp_path / f"{name}.txt").write_text(made_text(300, len(name)))
    model = {"family": "GPT-2", "tokenizer": "bpe", "architecture": "gpt2", "width": 16, "layers": 2, "heads": 2}
    config = {
        "scale": "tiny",
        "context": 32,
        "stride": 16,
        "tokenizers": {"bpe": {"train_on": ["general"], "vocab_size": 300}},
        "corpora": {
            n: {"source": "files", "path": str(tmp_path / f"{n}.txt"), "min_bytes": 100} for n in ("general", "domain")
        },
        "models": {"tiny": {**model, "corpus": "general", "train": {"epochs": 0.2}}},
        "domains": ["domain"],
        "key_model": "tiny",
        "memory_model": "tiny",
        "targets": {"neighbours": 8, "shards": 2},
        "memory": {"epochs": 0.5},
        "evaluate": {"resamples": 20},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    words = ["--cores", "8", "--configfile", str(tmp_path / "tiny.yaml"), "--", "results/table3.csv"]
    first = snakemake(tmp_path, *words)
    table = (tmp_path / "results" / "table3.csv").read_text()
    assert [line.split(",")[2] for line in table.splitlines()[1:]] == ["base", "LoRA", "MemDec"]
    for name in ("table3.md", "table3.tex", "table3.provenance.json"):
        assert (tmp_path / "results" / name).is_file()
    assert "Nothing to be done" in snakemake(tmp_path, *words)
    shutil.rmtree(tmp_path / "results" / "tiny" / "domain" / "seed0" / "targets" / "1-of-2")
    again = snakemake(tmp_path, *words)
    ran = set(re.findall(r"^(?:local)?rule (\w+):", again, re.MULTILINE))
    assert ran == {"targets", "train", "evaluate", "table3"}
    assert len(re.findall(r"^localrule targets:|^rule targets:", again, re.MULTILINE)) == 1
    assert (tmp_path / "results" / "table3.csv").read_text() == table
    assert set(re.findall(r"^(?:local)?rule (\w+):", first, re.MULTILINE)) > ran


# --- the code -----------------------------------------------------------------------------------------------------

# Layer of each module; a module imports, at its top level, only from its own layer or below.
LAYERS = [
    {"errors", "resources"},
    {"windows", "mixing", "losses", "kernels", "search", "knn", "metrics"},
    {"config", "provenance", "artifacts", "corpora", "tokens", "models", "keypoints", "scores", "modeling"},
    {"datastore", "index", "targets", "train", "evaluate"},
    {"harness", "tasks", "tables", "regression", "cli"},
]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_imports_point_one_way() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert {path.stem for path in MODULES} - {"__init__"} == set(layer)
    for path in MODULES:
        if path.stem == "__init__":
            continue
        tree = ast.parse(path.read_text())
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        ours = {
            name.split(".")[1] for name in imported(top) if name.startswith("memdec.") and name.split(".")[1] in layer
        }
        assert all(layer[name] <= layer[path.stem] for name in ours), (path.name, ours)
        assert not any(name.split(".")[0] == "snakemake" for name in imported(tree)), path.name
        if layer[path.stem] == 1:
            outside = {name.split(".")[0] for name in imported(top)} - {"memdec"} - set(sys.stdlib_module_names)
            assert outside <= {"numpy", "torch", "jaxtyping", "numba", "llvmlite"}, path.name


def test_nothing_unsafe_is_loaded() -> None:
    assert len(MODULES) > 20
    for path in MODULES:
        text = path.read_text()
        for word in (
            "torch.load",
            "pickle.load",
            "import pickle",
            "yaml.load(",
            "trust_remote_code=True",
            "allow_pickle=True",
            "eval(",
        ):
            assert not re.search(r"(?<![\w.])" + re.escape(word), text), (path.name, word)

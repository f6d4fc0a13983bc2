"""The profiles of clusters, without one."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yte

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ROOT / "profiles"


def profile(name: str) -> dict[str, Any]:
    """A profile as Snakemake reads it."""
    found: dict[str, Any] = yte.process_yaml((PROFILES / name / "config.yaml").read_text(encoding="utf-8"))
    return found


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Only these plugins of Snakemake are there, and all that really is there of other packages."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> object | None:
        if name.startswith("snakemake_"):
            return object() if name in names else None
        return find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def test_a_profile_without_its_plugin_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, there, lacks in (
        ("slurm", [], "snakemake-executor-plugin-slurm"),
        ("kubernetes", [], "snakemake-executor-plugin-kubernetes"),
        ("kubernetes", ["snakemake_executor_plugin_kubernetes"], "snakemake-storage-plugin-s3"),
    ):
        installed(monkeypatch, *there)
        with pytest.raises(SystemExit) as stopped:
            profile(name)
        said = str(stopped.value)
        assert said.startswith(f"profiles/{name}: expected the package {lacks}, found none; ")
        assert said.endswith("-e '.[cluster]'")
        assert "\n" not in said


def test_a_cluster_is_not_cut_to_the_machine_that_snakemake_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, limits in (
        (["--cores", "2"], {"cores", "resources"}),
        (["--profile", "profiles/slurm"], set()),
        ([f"--profile={PROFILES}/kubernetes"], set()),
    ):
        monkeypatch.setattr(sys, "argv", ["snakemake", *words])
        assert {"cores", "resources"} & profile("default").keys() == limits


def test_the_rules_in_the_profiles_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(
        monkeypatch,
        "snakemake_executor_plugin_slurm",
        "snakemake_executor_plugin_kubernetes",
        "snakemake_storage_plugin_s3",
    )
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    for name in ("slurm", "kubernetes"):
        made = profile(name)
        for rule in [*made["groups"], *made["set-threads"]]:
            assert f" as {rule} with:" in rules
        assert set(made["groups"].values()) == set(made["group-components"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("snakemake_storage_plugin_fs") is None, reason="no plugin for storage")
def test_without_a_shared_folder_every_artefact_is_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--dry-run", "--printshellcmds", "--cores", "2", "--configfile", str(ROOT / "tests/cluster/tiny.yaml")]
    command += ["--default-storage-provider", "fs", "--default-storage-prefix", str(tmp_path / "bucket")]
    run = subprocess.run([*command, "--", "results/table3.csv"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "manifest.json" not in run.stdout + run.stderr
    assert run.stdout.count(" --out ") + run.stderr.count(" --out ") >= 14
    assert "dirname" not in run.stdout + run.stderr

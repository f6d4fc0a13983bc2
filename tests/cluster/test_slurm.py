"""The workflow on a real Slurm of one machine: `profiles/slurm`. Needs root and the packages slurm-wlm and munge."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
CONF = Path("/etc/slurm")  # Snakemake's plugin drops SLURM_CONF, so the file must be where Slurm looks by itself
PATIENCE = 1200  # seconds for a step of Snakemake that takes a few on an idle machine

pytestmark = pytest.mark.slow


def lacking() -> str | None:
    """Why there can be no Slurm here."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "squeue") if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}; apt-get install slurm-wlm munge"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "no snakemake-executor-plugin-slurm; install the extra 'cluster'"
    if os.geteuid() != 0:
        return "only root can start Slurm"
    conf = CONF / "slurm.conf"
    ours = not conf.exists() or "for test_slurm.py" in conf.read_text()  # of a run that was killed
    return None if ours else f"{conf}: this machine has a Slurm of its own"


class Slurm:
    """Daemons of a cluster of one node, as children of this process.

    Attributes:
        calls: Lines of `bin/memdec`, which stands before the command: job, stage, `start` or `end`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.runs: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir(parents=True)
        self.calls.touch()
        wrapper = folder / "bin" / "memdec"
        say = f'echo "$SLURM_JOB_ID $1 %s" >> {self.calls}'
        wrapper.write_text(
            f'#!/bin/sh\n{say % "start"}\nsleep "${{SLOWED:-0}}"\n{BIN}/memdec "$@" || exit\n{say % "end"}\n'
        )
        wrapper.chmod(0o755)

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen([name, *words], stdout=out, stderr=out)

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        daemon = self.daemons.pop(name)
        daemon.send_signal(how)
        daemon.wait()

    def snakemake(
        self, folder: Path, config: Path, target: str, *words: str, slowed: int = 0
    ) -> subprocess.Popen[bytes]:
        """Start `snakemake --profile profiles/slurm`; every stage waits for `slowed` seconds first."""
        folder.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--snakefile",
            str(ROOT / "Snakefile"),
            "--directory",
            str(folder),
        ]
        command += ["--profile", str(ROOT / "profiles" / "slurm"), "--default-resources", "slurm_partition=main"]
        # Without accounting, sacct waits for ever.
        command += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3"]
        command += ["--latency-wait", "5", "--configfile", str(config), *words, "--", target]
        path = os.pathsep.join([str(self.folder / "bin"), str(BIN), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "SLOWED": str(slowed)}
        with (self.folder / "snakemake.out").open("w") as out:
            self.runs.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
        return self.runs[-1]

    def finished(self, run: subprocess.Popen[bytes]) -> None:
        assert run.wait() == 0, (self.folder / "snakemake.out").read_text()

    def until(self, happened: Callable[[], bool], what: str, run: subprocess.Popen[bytes] | None = None) -> None:
        """Wait; a run of Snakemake must not end meanwhile."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert run is None or run.poll() is None, (self.folder / "snakemake.out").read_text()
            assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
            time.sleep(0.2)

    def called(self, stage: str, what: str) -> list[str]:
        """Job of each start or end of a stage."""
        lines = [line.split() for line in self.calls.read_text().splitlines()]
        return [job for job, name, said in lines if (name, said) == (stage, what)]


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """One Slurm at a time on a machine, as its files and ports are the same for all workers of pytest."""
    with FileLock(Path(tempfile.gettempdir()) / "memdec-slurm.lock"):
        yield


@pytest.fixture(scope="module")
def cluster(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := lacking():
        pytest.skip(reason)
    slurm = Slurm(tmp_path_factory.mktemp("slurm") / "run")
    socket = Path("/run/munge/munge.socket.2")
    try:
        CONF.mkdir(exist_ok=True)
        (CONF / "slurm.conf").write_text((HERE / "slurm.conf").read_text().replace("RUN", str(slurm.folder)))
        (CONF / "gres.conf").write_text("NodeName=localhost Name=gpu File=/dev/zero\n")
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:  # none runs
            socket.parent.mkdir(exist_ok=True)
            shutil.chown(socket.parent, "munge")
            slurm.start("munged", "--foreground", "--force")
            slurm.until(socket.exists, "munged")
        slurm.start("slurmctld", "-D", "-c")
        slurm.start("slurmd", "-D", "-N", "localhost")
        slurm.until(lambda: said("sinfo", "--noheader", "--format=%T") == "idle\n", "the node")
        yield slurm
    finally:
        for run in slurm.runs:
            if run.poll() is None:  # of a test that failed
                run.kill()
                run.wait()
        for name in reversed([*slurm.daemons]):
            slurm.stop(name)
        for name in ("slurm.conf", "gres.conf"):
            (CONF / name).unlink(missing_ok=True)


def test_a_cancelled_job_is_queued_again_and_a_killed_slurmd_is_outlived(cluster: Slurm, tmp_path: Path) -> None:
    target = "results/tiny/tokenizers/bpe/manifest.json"
    run = cluster.snakemake(tmp_path, HERE / "tiny.yaml", target, slowed=8)
    cluster.until(lambda: bool(cluster.called("corpus", "start")), "the first job", run)
    (cancelled,) = cluster.called("corpus", "start")
    subprocess.run(["scancel", cancelled], check=True)
    cluster.until(lambda: len(cluster.called("corpus", "start")) == 2, "the same job once more", run)
    cluster.until(lambda: bool(cluster.called("tokenizer", "start")), "the second job", run)
    cluster.stop("slurmd", signal.SIGKILL)
    time.sleep(5)
    cluster.start("slurmd", "-D", "-N", "localhost")
    cluster.finished(run)
    (ended,) = cluster.called("corpus", "end")
    assert ended != cancelled
    assert (tmp_path / target).is_file()


@pytest.mark.parametrize(("gpu", "at_once"), [(0, 2), (1, 1)])
def test_jobs_that_take_the_gpu_run_one_after_the_other(cluster: Slurm, tmp_path: Path, gpu: int, at_once: int) -> None:
    target = "results/tiny/tokens/bpe/domain/manifest.json"  # of two corpora, which wait for nothing
    words = ["--set-resources", f"corpus:gpu={gpu}"]
    run = cluster.snakemake(tmp_path, HERE / "tiny.yaml", target, *words, slowed=10)
    seen = {0}
    while run.poll() is None:
        running = said("squeue", "--noheader", "--states=RUNNING", "--format=%k").splitlines()
        seen.add(sum(comment.startswith("rule_corpus") for comment in running))
        time.sleep(0.2)
    cluster.finished(run)
    assert max(seen) == at_once


@pytest.fixture(scope="module")
def tiny_table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Table 3 of `tiny.yaml`, made on this machine without Slurm."""
    folder = tmp_path_factory.mktemp("local")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--cores", "2", "--configfile", str(HERE / "tiny.yaml"), "--", "results/table3.csv"]
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return (folder / "results" / "table3.csv").read_text()


def test_without_a_shared_folder_the_table_is_the_same(cluster: Slurm, tiny_table: str, tmp_path: Path) -> None:
    """Every job has a folder of its own, into which only its inputs are copied."""
    if shutil.which("rsync") is None or importlib.util.find_spec("snakemake_storage_plugin_fs") is None:
        pytest.skip("no rsync or no snakemake-storage-plugin-fs")
    bucket, nodes = tmp_path / "bucket", tmp_path / "nodes"
    words = ["--default-storage-provider", "fs", "--default-storage-prefix", str(bucket)]
    words += ["--shared-fs-usage", "persistence", "sources", "source-cache", "software-deployment"]
    words += ["--remote-job-local-storage-prefix", f"{nodes}/$SLURM_JOB_ID"]
    cluster.finished(cluster.snakemake(tmp_path / "run", HERE / "tiny.yaml", "results/table3.csv", *words))
    assert (bucket / "results" / "table3.csv").read_text() == tiny_table
    assert len([*nodes.iterdir()]) >= 12


def test_the_reduced_run_agrees_with_the_committed_one(cluster: Slurm, tmp_path: Path) -> None:
    """Table 3 of the regression run. Its baseline has tables of tasks as well, whose rows need not be here."""
    regression, table = ROOT / "tests" / "regression", "results/table3.csv"
    cluster.finished(cluster.snakemake(tmp_path, regression / "reduced.yaml", table))
    known = json.loads((regression / "reduced.json").read_text())
    known |= {"rows": {}, "cells": {name: cell for name, cell in known["cells"].items() if name.startswith("table3:")}}
    assert len(known["cells"]) >= 6
    (tmp_path / "baseline.json").write_text(json.dumps(known))
    command = [str(BIN / "memdec"), "check", "--baseline", str(tmp_path / "baseline.json"), str(tmp_path / table)]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr

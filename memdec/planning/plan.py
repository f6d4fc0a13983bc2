"""`memdec plan`: what a run will cost before it starts, and whether it fits.

Snakemake lists the jobs in a dry run, so what is there already costs nothing. `costs` gives each of them a cost.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact, markdown, resources
from memdec.config import Config
from memdec.errors import ConfigError, ResourceError
from memdec.planning.costs import FORMULAS, Cost, Costs, Job
from memdec.planning.rates import Machine
from memdec.planning.sizes import UnknownSizeError

_SNAKEFILE = HARNESS_TASKS.parent / "workflow" / "Snakefile"
_START = re.compile(r"(?:local)?rule (\w+):$")
_GROUPS = ("study", "rule")


def uses_gpu(config: Config) -> bool:
    """Whether jobs that run a model use a GPU: the config says so, or leaves it to this machine, which has one."""
    device = config.compute.device
    return device in ("cuda", "all") or (device == "auto" and resources.has_gpu())


@dataclass
class Sum:
    """Jobs and their cost together: seconds, and bytes. Memory is that of the largest job."""

    jobs: int = 0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    memory: float = 0.0
    gpu_memory: float = 0.0
    disk: float = 0.0
    download: float = 0.0

    def add(self, cost: Cost) -> None:
        """Add a job."""
        self.jobs += 1
        self.cpu_seconds += cost.seconds * max(1, cost.gpus)  # each GPU has a process that drives it
        self.gpu_seconds += cost.seconds * cost.gpus
        self.memory = max(self.memory, cost.memory)
        self.gpu_memory = max(self.gpu_memory, cost.gpu_memory)
        self.disk += cost.disk
        self.download += cost.download


@dataclass
class Plan:
    """The sums of a plan."""

    title: str
    machine: Machine
    gpu: bool
    total: Sum = field(default_factory=Sum)
    by: dict[str, dict[str, Sum]] = field(default_factory=lambda: {kind: {} for kind in _GROUPS})
    largest: dict[str, tuple[Job, Cost]] = field(default_factory=dict)  # by what it is the largest in
    unknown: dict[str, int] = field(default_factory=dict)  # jobs whose size nothing says, by what is missing

    def add(self, job: Job, cost: Cost) -> None:
        """Add a job to every sum that it is part of."""
        self.total.add(cost)
        for kind, name in zip(_GROUPS, (_study(job), job.rule), strict=True):
            self.by[kind].setdefault(name, Sum()).add(cost)
        for what in ("memory", "gpu_memory"):
            if what not in self.largest or getattr(cost, what) > getattr(self.largest[what][1], what):
                self.largest[what] = job, cost

    def faults(self, memory: float, disk: float) -> list[str]:
        """What does not fit a machine with so many bytes of memory and disk, and what to change, one line each."""
        lines = []
        needed = self.total.disk + self.total.download
        if needed > disk:
            lines.append(
                f"disk: expected {resources.size(needed)}, found {resources.size(disk)}; leave out studies, set "
                "datastore.stored: false, or give --disk of the machine that will run it"
            )
        gpu = self.machine.on(True)
        for what, room in (("memory", memory), ("gpu_memory", gpu.memory)):
            job, cost = self.largest.get(what, (None, None))
            if job is None or cost is None or getattr(cost, what) <= room:
                continue
            instead = "give --memory of the machine that will run it"
            if what == "gpu_memory":
                model = job.wildcards.get("model", job.wildcards.get("memory", ""))
                instead = (
                    f"lower its batch_size, set gradient_checkpointing, or give it more GPUs: per_model: {{{model}: {{gpus: N, "
                    "launch: config/accelerate/fsdp.yaml}}, or compute: {device: all} where it is only evaluated"
                )
            lines.append(
                f"{what.replace('_', ' ')} of {shown(job)}: expected {resources.size(getattr(cost, what))}, found "
                f"{resources.size(room)}; {instead}"
            )
        return lines

    def data(self) -> dict[str, Any]:
        """The plan as plain data; seconds and bytes."""
        return {
            "plan": self.title,
            "total": vars(self.total),
            "by": {kind: {name: vars(found) for name, found in sums.items()} for kind, sums in self.by.items()},
            "largest": {
                what: {"job": shown(job), "bytes": getattr(cost, what)} for what, (job, cost) in self.largest.items()
            },
            "unknown": self.unknown,
            "rates": self.machine.model_dump(mode="json"),
        }

    def text(self) -> str:
        """The plan as Markdown."""
        parts = [f"# Plan: {self.title}", self._summary()]
        for kind in _GROUPS:
            rows = [[name, *_row(found)] for name, found in self.by[kind].items()]
            rows.append(["all", *_row(self.total)])
            parts += [f"## By {kind}", markdown.table([kind, *_COLUMNS], rows, 1)]
        parts += ["## Formulas", _LETTERS, *self._formulas()]
        if self.unknown:
            parts += ["## Not counted", *(f"- {n} jobs: {why}" for why, n in self.unknown.items())]
        return "\n\n".join(parts)

    def _summary(self) -> str:
        rates = self.machine.on(self.gpu)
        n_cores = len(os.sched_getaffinity(0))
        lines = [
            f"{self.total.jobs} jobs: {_hours(self.total.cpu_seconds)} of processor cores"
            + (f", {_hours(self.total.gpu_seconds)} of GPUs" if self.total.gpu_seconds else "")
            + f"; {resources.size(self.total.disk)} of disk, {resources.size(self.total.download)} to download.",
            f"With the {n_cores} processors of this machine at least {_hours(self.total.cpu_seconds / n_cores)}."
            if not self.gpu
            else f"With one GPU at least {_hours(self.total.gpu_seconds)}.",
            f"Rates: {rates.device} ({rates.source}).",
        ]
        for what, (job, cost) in self.largest.items():
            if size := getattr(cost, what):
                lines.append(f"Largest {what.replace('_', ' ')} of a job: {resources.size(size)}, {shown(job)}.")
        return "\n".join(lines)

    def _formulas(self) -> Iterator[str]:
        lines = []
        for name in self.by["rule"]:
            if name in FORMULAS:
                said = (FORMULAS[name].__doc__ or "").strip().splitlines()[0]
                lines.append(f"- {name}: {said}")
        yield "\n".join(lines)


_COLUMNS = ["jobs", "CPU", "GPU", "memory", "GPU memory", "disk", "download"]
_LETTERS = (
    "P parameters, D width, L layers, V vocabulary, T context, S stride, n tokens, N keys, k neighbours; rates are those "
    "of the work. `start` and rates are measured; `memdec plan --measure` measures this machine."
)


def _row(found: Sum) -> list[str]:
    sizes = (found.memory, found.gpu_memory, found.disk, found.download)
    gpu = _hours(found.gpu_seconds) if found.gpu_seconds else ""
    return [str(found.jobs), _hours(found.cpu_seconds), gpu, *(resources.size(size) if size else "" for size in sizes)]


def _hours(seconds: float) -> str:
    """A time in readable form."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def shown(job: Job) -> str:
    """A job in words: its rule and what it is about."""
    return " ".join([job.rule, *job.wildcards.values()])


def _study(job: Job) -> str:
    home = job.wildcards.get("home", "")
    return home.rpartition("/")[0] or "shared by studies"


def make(config: Config, files: Sequence[Path], targets: Sequence[str], folder: Path, machine: Machine) -> Plan:
    """Plan the jobs that are left to do.

    Args:
        config: The config of the run.
        files: Its files, for Snakemake.
        targets: Files to make, such as results/table3.csv.
        folder: Folder of the run, with `results`.
        machine: Rates.

    Raises:
        ConfigError: The folder is not there, or Snakemake cannot list the jobs; the message begins as its own.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected the folder of the run, found none; make it, or leave --folder out")
    gpu = uses_gpu(config)
    found = Plan(f"{' '.join(targets)} of {' + '.join(map(str, files))}", machine, gpu)
    costs = Costs(config, machine, folder / "results" / config.scale, gpu=gpu)
    for job in listed(files, targets, folder):
        try:
            found.add(job, costs.of(job))
        except UnknownSizeError as error:
            found.unknown[str(error)] = found.unknown.get(str(error), 0) + 1
    return found


def listed(files: Sequence[Path], targets: Sequence[str], folder: Path) -> list[Job]:
    """The jobs that Snakemake would run for these targets."""
    if not _SNAKEFILE.is_file():
        raise ConfigError(f"{_SNAKEFILE}: expected the workflow, found none; run memdec plan from a checkout")
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--nolock", "--cores", "1", "--workflow-profile", "none"]
    command += [
        "--snakefile",
        str(_SNAKEFILE),
        "--directory",
        str(folder),
        "--configfile",
        *(str(f.resolve()) for f in files),
    ]
    run = subprocess.run([*command, "--", *targets], capture_output=True, text=True)
    if run.returncode:
        said = run.stderr + run.stdout
        begins = re.search(r"^.*(?:Error|Exception)\b", said, re.MULTILINE)
        raise ConfigError(f"snakemake: expected a list of jobs, found: {said[begins.start() if begins else 0 :][:500]}")
    return list(_jobs((run.stdout + run.stderr).splitlines()))


def _jobs(lines: Sequence[str]) -> Iterator[Job]:
    """Read the jobs from what a dry run prints: a line with the rule, and below it one with the wildcards."""
    rule = ""
    wildcards: dict[str, str] = {}
    for line in [*lines, "rule end:"]:
        if begins := _START.match(line):
            if rule:
                yield Job(rule, wildcards)
            rule, wildcards = begins[1], {}
        elif line.startswith("    wildcards: "):
            wildcards = dict(pair.split("=", 1) for pair in line.removeprefix("    wildcards: ").split(", "))


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


def write(found: Plan, out: Path) -> None:
    """Write a plan as JSON, with its Markdown beside it."""
    artefact.write_json(out, found.data())
    artefact.write_text(out.with_suffix(".md"), found.text() + "\n")


def refuse(found: Plan, memory: float, disk: float) -> None:
    """Raise one error with all that does not fit.

    Raises:
        ResourceError: Something does not fit.
    """
    if faults := found.faults(memory, disk):
        raise ResourceError(f"plan: {'; '.join(faults)}")

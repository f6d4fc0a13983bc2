"""The charts of the report: every system on every model, curves of the weights, and losses of the trainings."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from markupsafe import Markup

from memdec.artefacts import artefact
from memdec.config import Config
from memdec.errors import ArtifactError, outside
from memdec.inference.systems import SYSTEMS
from memdec.results import curves
from memdec.results.cells import Cell
from memdec.results.curves import PER_CHART, Dot, Line
from memdec.results.report_grids import metric, titled

_FOLDERS = {  # of trained models, by the name of the folder that they are in; the order of the page
    "memory": "Memories",
    "lora": "LoRA adapters",
    "dapt": "DAPT baselines",
    "finetuned": "Key models, fine-tuned on the domain",
    "models": "Base models, from scratch",
}


@dataclass(frozen=True, slots=True)
class Plain:
    """A simple table: its header, and rows of text; columns after the first `n_words` are numbers."""

    header: list[str]
    rows: list[list[str]]
    n_words: int = 1
    total: list[str] = field(default_factory=list)
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its legend, and its numbers as a table."""

    title: str
    svg: Markup
    says: str  # what it shows, for those who do not see it
    legend: list[tuple[str, int]] = field(default_factory=list)
    numbers: Plain | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Charts below one heading; `open` ones are shown at once."""

    title: str
    charts: list[Chart]
    open: bool = True


def manifests(scale: Path, *kinds: str) -> Iterable[tuple[Path, artefact.Manifest]]:
    """Artefacts of these kinds below a folder; one that is unfinished or damaged is an error."""
    for file in sorted(scale.rglob(artefact.MANIFEST)):
        kind = artefact.kind_of(file.parent)
        if kind in kinds:
            yield file.parent, artefact.read(file.parent, kind)


def headline(cells: dict[str, list[Cell]]) -> Chart | None:
    """Every system on every model: the mean over the domains in Table 3, else what Table 1 or another table has."""
    for name in dict.fromkeys(["table3", "table1", *cells]):
        run_ = [
            each for each in cells.get(name, []) if each.value is not None and each.model and each.method in SYSTEMS
        ]
        if not run_:
            continue
        by_model = all(each.column == each.model for each in run_)
        columns = [each.column for each in run_]
        column = "Avg" if "Avg" in columns else columns[0]
        at_column = [each for each in run_ if by_model or each.column == column]
        alike = [each for each in at_column if each.metric == at_column[0].metric]
        shown = list({(each.model, each.method): each for each in reversed(alike)}.values())[::-1]  # the first memory
        methods = [each for each in SYSTEMS if any(each == cell.method for cell in shown)]
        dots = [
            Dot(cell.model or "", method, cell.value or 0, cell.low, cell.high, number)
            for number, method in enumerate(methods)
            for cell in shown
            if cell.method == method
        ]
        order = list(dict.fromkeys(cell.model for cell in shown))
        dots.sort(key=lambda dot: order.index(dot.row))
        where = "" if by_model else ", mean of its columns" if column == "Avg" else f", {column}"
        svg = curves.dots(dots, metric(shown[0]).capitalize(), "headline")
        says = f"Values of {titled(name)}{where}; the numbers are in the table."
        legend: list[tuple[str, int]] = [(method, number) for number, method in enumerate(methods)]
        return Chart(f"{titled(name)}: every system on every model{where}", Markup(svg), says, legend)
    return None


def weight_curves(config: Config, scale: Path) -> list[Group]:
    """Perplexity on the valid text against the weight of the memory or of p_kNN, a line per base model."""
    found: dict[tuple[str, str, str, str], list[Line]] = {}
    bases, memories = _names(config, "bases"), _names(config, "memory_names")
    for folder, _ in manifests(scale, "evaluation"):
        home, model = _home(scale, folder), folder.name
        for key, points, chosen in _sweeps(folder / "records.json"):
            x, y = zip(*points, strict=True)
            line = Line(model, x, y, _place(bases, model), chosen=chosen, seed=_seed(folder))
            found.setdefault((home, *key), []).append(line)
    groups: dict[str, list[Chart]] = {}
    order = sorted(found, key=lambda key: (_place(memories, key[2]), _place(config.domains, key[1]), key))
    for number, (home, on, which, name) in enumerate(order):
        lines = sorted(found[home, on, which, name], key=lambda line: line.look)
        axis = {"alpha": "Alpha (weight of the memory, no unit)", "lambda": "Lambda (weight of p_kNN, no unit)"}[name]
        place = on if home == on else f"{on} ({home})"
        for part, few in enumerate(_few(lines)):
            svg = curves.lines(few, axis, "Perplexity per token, valid text", f"weight{number}-{part}")
            chart = _chart(f"{which}, {place}", svg, few, [name.capitalize(), "Perplexity on valid text"])
            groups.setdefault(which, []).append(chart)
    return [Group(which, charts, number == 0) for number, (which, charts) in enumerate(groups.items())]


def loss_curves(config: Config, scale: Path) -> list[Group]:
    """Loss against updates for every training: on the valid text, and dashed the mean of what was minimised."""
    names = [*_names(config, "memory_names"), *_names(config, "models")]
    found: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for folder, manifest in manifests(scale, "model", "memory", "lora"):
        facts, stage = manifest.facts, folder.parent.name
        if not facts.get("evaluations") or stage not in _FOLDERS:
            continue
        with outside(ArtifactError, folder, "losses in its manifest", "make it again"):
            valid = sorted({float(each["step"]): float(each["loss"]) for each in facts["evaluations"]}.items())
            losses = [(float(each["step"]), float(each["loss"])) for each in facts.get("losses", [])]
        lines = found.setdefault((stage, _home(scale, folder)), {}).setdefault(folder.name, [])
        for points, dashed in ((losses, True), (valid, False)):
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Line(folder.name, x, y, 0, dashed, seed=_seed(folder)))
    groups: dict[str, list[Chart]] = {stage: [] for stage in _FOLDERS}
    order = sorted(found, key=lambda key: (_place(config.domains, key[1].split("/")[-1]), key))
    for number, (stage, home) in enumerate(order):
        by_name = found[stage, home]
        lines = [
            replace(line, look=look)
            for look, name in enumerate(sorted(by_name, key=lambda name: _place(names, name)))
            for line in by_name[name]
        ]
        for part, few in enumerate(_few(lines)):
            svg = curves.lines(few, "Updates (number)", "Loss (nats per token)", f"loss{number}-{part}")
            title = _FOLDERS[stage] if home == "." else f"{_FOLDERS[stage]}: {home}"
            solid = [line for line in few if not line.dashed]
            groups[stage].append(_chart(title, svg, solid, ["Updates", "Loss on valid text"]))
    return [Group(_FOLDERS[stage], charts, stage == next(iter(_FOLDERS))) for stage, charts in groups.items() if charts]


def _names(config: Config, field_: str) -> list[str]:
    """Names in the config and all its studies, in their order."""
    return list(dict.fromkeys(name for study in config.every_study().values() for name in getattr(study, field_)))


def _place(names: Sequence[str], name: str) -> int:
    """Place of a name in a list; names that are not in it come last."""
    return names.index(name) if name in names else len(names)


def _few(lines: Sequence[Line]) -> Iterable[list[Line]]:
    """Lines in lists of at most as many names as there are colours."""
    names = list(dict.fromkeys(line.label for line in lines))
    for begin in range(0, len(names), PER_CHART):
        yield [line for line in lines if line.label in names[begin : begin + PER_CHART]]


def _chart(title: str, svg: str, lines: Sequence[Line], header: list[str]) -> Chart:
    legend = list(dict.fromkeys((line.label, line.look % PER_CHART) for line in lines))
    several = len({line.seed for line in lines}) > 1
    rows = [
        [f"{line.label}, {line.seed}" if several else line.label, f"{x:g}", f"{y:.4g}"]
        for line in lines
        for x, y in zip(line.x, line.y, strict=True)
    ]
    says = f"{header[1]} against {header[0].lower()}; the numbers are below."
    return Chart(title, Markup(svg), says, legend, Plain(["Name", *header], rows, caption=title))


def _seed(folder: Path) -> str:
    """The seed in a path, or ""."""
    return next((part for part in reversed(folder.parts) if re.fullmatch(r"seed\d+", part)), "")


def _home(scale: Path, folder: Path) -> str:
    """The part of a path between the scale and the seed, e.g. the domain; `.` if there is no seed."""
    parts = folder.relative_to(scale).parts
    seeds = [number for number, part in enumerate(parts) if re.fullmatch(r"seed\d+", part)]
    return "/".join(parts[: seeds[0]]) if seeds else "."


def _sweeps(file: Path) -> Iterable[tuple[tuple[str, str, str], list[tuple[float, float]], float]]:
    """For each system with a tuned weight: (text, memory or system, weight), its curve, and the chosen weight."""
    with outside(ArtifactError, file, "records with numbers", "run the evaluation again"):
        for record in json.loads(file.read_text(encoding="utf-8")):
            if not (sweep := record.get("valid_sweep")):
                continue
            points = sorted((float(weight), float(value)) for weight, value in sweep.items())
            if not all(math.isfinite(value) for _, value in points):
                raise ArtifactError(
                    f"{file}: expected finite perplexities in valid_sweep, found {sweep}; run the evaluation again"
                )
            name = "lambda" if record.get("lambda") is not None else "alpha"
            yield (str(record["on"]), str(record.get("memory") or record["method"]), name), points, float(record[name])

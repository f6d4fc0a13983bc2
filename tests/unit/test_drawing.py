"""Figures: which parts they are made from, the numbers that are drawn, and no text that is cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from making import run_memdec
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memdec import config as cfg
from memdec.artefacts import artefact
from memdec.config import Config
from memdec.errors import ArtifactError, ConfigError
from memdec.harness.scores import TokenScores
from memdec.results import cells, drawing, figure_catalogue, figures, scores
from memdec.results.cells import Cell
from memdec.results.layout import Part

MINI = Path(__file__).resolve().parents[2] / "config" / "mini.yaml"
MEMORIES = {
    "keys-S": {"key_model": "gpt2-S"},
    "keys-S-plain": {"key_model": "gpt2-S", "tuned": False},
    "ce": {"train": {"objective": "ce"}},
    "other": {"other_domain": True},
}


def config(**changes: object) -> Config:
    """The common part of mini with the memories above, and no studies."""
    plain = {name: value for name, value in yaml.safe_load(MINI.read_text()).items() if name != "studies"}
    return cfg.checked(plain | {"memories": MEMORIES, "imitates": "knn"} | changes, "test")


def cell(model: str, method: str, value: float | None, domain: str = "torch", **more: Any) -> Cell:
    what = {"low": value and value - 2, "high": value and value + 2, "n": 900, "seeds": 1, "lower_is_better": True}
    place = {"row": f"{model} / {method}", "column": domain, "domain": domain}
    return Cell(table="table3", model=model, method=method, value=value, **(what | place | more))


TABLE3 = [
    cell("gpt2-S", "base", 90.0),
    cell("gpt2-S", "LoRA", 80.0),
    cell("gpt2-S", "MemDec", 70.0, memory="memdec"),
    cell("gpt2-S", "MemDec", 75.0, memory="ce", row="gpt2-S / control"),
    cell("gpt2-S", "kNN-LM", 60.0),
    cell("gpt2-S", "base", 33.0, "pandas"),
    cell("gpt2-L", "base", 50.0),
    cell("gpt2-L", "LoRA", None, note="not run"),
    cell("gpt2-L", "MemDec", 30.0, memory="memdec"),
]


def test_parts_of_every_figure() -> None:
    made = {name: figure_catalogue.figure(config(seeds=[0, 1]), name) for name in figure_catalogue.FIGURES}
    assert made.keys() == drawing.DRAWN.keys()
    assert made["figure2"].tables == ("table3",)
    for name, kind in (("figure4", "latency"), ("figure5", "shapes")):
        assert made[name].parts == [Part(kind, "torch", "gpt2-L", 0, "MemDec", "memdec")]
    assert [(part.model, part.memory, part.seed) for part in made["figure6"].parts] == [
        ("gpt2-L", "memdec", 0), ("gpt2-L", "memdec", 1), ("gpt2-S", "keys-S", 0), ("gpt2-S", "keys-S", 1)
    ]  # fmt: skip
    assert {part.memory for part in made["fidelity"].parts} == {"memdec", *MEMORIES}
    assert {part.domain for part in made["fidelity"].parts} == {"torch"}
    with pytest.raises(ConfigError, match=r"expected one of figure2, .*, found 'figure3'; choose one of them"):
        figure_catalogue.figure(config(), "figure3")
    with pytest.raises(ConfigError, match="figure6: expected MemDec in 'systems' of the config, found base"):
        figure_catalogue.figure(config(systems=["base"]), "figure6")


def test_figure_2_is_the_first_domain_of_table_3(tmp_path: Path, capsys: Any) -> None:
    cells.write(tmp_path / "table3.cells.csv", TABLE3)
    (tmp_path / "config.json").write_text(json.dumps(yaml.safe_load(MINI.read_text())))
    words = ["figure", "--name", "figure2", "--config", tmp_path / "config.json", "--out", tmp_path / "figure2.csv"]
    assert run_memdec(capsys, *words, "--table", tmp_path / "table3.cells.csv")[0] == 0
    drawn = pd.read_csv(tmp_path / "figure2.csv")
    assert list(zip(drawn["model"], drawn["method"], drawn["value"], strict=True)) == [
        ("gpt2-S", "base", 90), ("gpt2-S", "LoRA", 80), ("gpt2-S", "MemDec", 70), ("gpt2-L", "base", 50),
        ("gpt2-L", "MemDec", 30),
    ]  # fmt: skip
    assert (drawn["low"] == drawn["value"] - 2).all()
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "figure2.svg").read_text()
    made = figure_catalogue.figure(config(evaluated=["gpt2-S"], watch=None), "figure2")
    drawing.run(made, [], [tmp_path / "table3.cells.csv"], tmp_path / "few.csv")
    assert set(pd.read_csv(tmp_path / "few.csv")["model"]) == {"gpt2-S"}  # of a study with fewer models than Table 3
    said = json.loads((tmp_path / "figure2.provenance.json").read_text())
    assert said["inputs"] == {"table3.cells.csv": artefact.file_digest(tmp_path / "table3.cells.csv")}
    code, _, err = run_memdec(capsys, *words)
    assert code == 2
    assert "figure2: expected --table with the cells of table3, found 0 tables and 0 cells" in err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [*TABLE3, cell("gpt2-L", "base", 51.0, row="again")],
            "expected one cell for a model and method, found two for",
        ),
        (TABLE3[5:6], "expected perplexities of base, LoRA, MemDec on torch, found none"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(lines: list[Cell], message: str, tmp_path: Path) -> None:
    cells.write(tmp_path / "table3.cells.csv", lines)
    made = figure_catalogue.figure(config(), "figure2")
    with pytest.raises(ArtifactError, match=message):
        drawing.run(made, [], [tmp_path / "table3.cells.csv"], tmp_path / "figure2.csv")


def shapes(folder: Path, memory: str, seed: int, size: int, shift: float, floor: float = 0.001) -> Path:
    records = [
        {"memory": memory, "distribution": name, "metric": metric, "seed": seed, "value": value + shift}
        | {"low": value, "high": value + 2 * shift, "n": 640, "windows": 10}
        | {"parameters": None if name == "p_kNN" else size}
        for name in figures.DISTRIBUTIONS
        for metric, value in (("top1", 0.4), ("entries", 20.0), ("entropy", 2.0))
    ]
    with artefact.building(folder, "shapes", {"floor": floor, "memory": memory}, {"at": str(folder)}) as build:
        assert build is not None
        artefact.write_json(folder / "records.json", records)
        build.facts.update(parameters={"p_LM": size, "p_mem": 5})
    return folder


def test_figure_6_has_the_models_by_size_and_the_mean_over_seeds(tmp_path: Path) -> None:
    given = [
        ("torch", "gpt2-L", 0, shapes(tmp_path / "a", "memdec", 0, 900, 0.1)),
        ("torch", "gpt2-L", 1, shapes(tmp_path / "b", "memdec", 1, 900, 0.3)),
        ("torch", "gpt2-S", 0, shapes(tmp_path / "c", "keys-S", 0, 200, 0.2)),
    ]
    made = figure_catalogue.figure(config(seeds=[0, 1]), "figure6")
    drawing.run(made, given, [], tmp_path / "figure6.csv")
    drawn = pd.read_csv(tmp_path / "figure6.csv")
    assert list(drawn["parameters"].drop_duplicates()) == [200, 900]
    top = drawn[(drawn["metric"] == "top1") & (drawn["distribution"] == "p_mem")].set_index("model")
    assert top["value"].to_dict() == pytest.approx({"gpt2-S": 0.6, "gpt2-L": 0.6})
    assert top["high"].to_dict() == pytest.approx({"gpt2-S": 0.8, "gpt2-L": 0.8})
    assert top["seeds"].to_dict() == {"gpt2-S": 1, "gpt2-L": 2}
    assert top.loc["gpt2-L", "sd"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    named = [("torch", "GPT2-large", 0, tmp_path / "a")]  # as the paper calls it
    drawn = drawing.DRAWN["figure6"][0](made, named, []).set_index(["distribution", "metric"])["paper"]
    assert drawn.dropna().to_dict() == {("p_kNN", "top1"): pytest.approx(0.9348)}
    with pytest.raises(ArtifactError, match="expected records of seed 1, found seed 0"):
        drawing.run(made, [("torch", "gpt2-L", 1, tmp_path / "a")], [], tmp_path / "x.csv")
    with pytest.raises(ArtifactError, match=r"expected one number for each of .*, found two for memdec, top1, seed 0"):
        drawing.run(made, [given[0], given[0]], [], tmp_path / "x.csv")
    other = ("torch", "gpt2-S", 0, shapes(tmp_path / "d", "keys-S", 0, 200, 0.2, floor=0.1))
    with pytest.raises(ArtifactError, match=r"expected shapes of one floor, found \[0.001, 0.1\]"):
        drawing.run(made, [given[0], other], [], tmp_path / "x.csv")
    broken = shapes(tmp_path / "e", "memdec", 0, 900, float("nan"))
    with pytest.raises(ArtifactError, match="expected finite numbers, found NaN in top1"):
        drawing.run(made, [("torch", "gpt2-L", 0, broken)], [], tmp_path / "x.csv")


def test_figure_4_is_the_whole_time_beside_the_printed_ratio(tmp_path: Path) -> None:
    systems = [("base", None, 1.0), ("MemDec", None, 2.0), ("kNN-LM, 9 keys", "kNN-LM", 4.0)]
    records = [
        {"system": name, "kind": kind, "size": None, "phase": phase, "n_tokens": n, "seconds": n * ratio}
        | {"seconds_low": n * ratio, "seconds_high": n * ratio, "ratio_to_base": ratio, "ratio_low": ratio}
        | {"ratio_high": ratio}
        for name, kind, ratio in systems
        for phase in ("decode", "total")
        for n in (2, 4)
    ]
    with artefact.building(tmp_path / "l", "latency", {}, {}) as build:
        assert build is not None
        artefact.write_json(tmp_path / "l" / "records.json", records)
    made, cells = figure_catalogue.figure(config(), "figure4"), [("torch", "gpt2-L", 0, tmp_path / "l")]
    drawing.run(made, cells, [], tmp_path / "figure4.csv")
    drawn = pd.read_csv(tmp_path / "figure4.csv")
    assert set(drawn["phase"]) == {"total"}
    assert drawn.groupby("system")["paper_ratio"].first().to_dict() == {
        "base": 1.0, "MemDec": 1.28, "kNN-LM, 9 keys": 2.17
    }  # fmt: skip
    with pytest.raises(ConfigError, match="figure4: expected one --cell, found 2"):
        drawing.run(made, cells * 2, [], tmp_path / "figure4.csv")


STUDIES: dict[str, dict[str, Any]] = {
    "reference": {},
    "one epoch": {"finetune": {"epochs": 1}},
    "other text": {"domains": ["pandas"]},
    "small": {"memory_model": "gpt2-M"},
    "all-else": {"domains": ["pandas"], "finetune": {"epochs": 1}},
}


def gains_config(**changes: object) -> Config:
    shared = {"tables": ["gains"], "domains": ["torch"], "memories": {"ce": {"train": {"objective": "ce"}}}}
    studies = {name.replace(" ", "-"): shared | study for name, study in STUDIES.items()}
    return config(memories={}, evaluated=["gpt2-L"], seeds=[0, 1], studies=studies, **changes)


def part_folder(folder: Path, part: Part, log_p: Any) -> Path:
    place = folder / "-".join(map(str, (part.study, part.kind, part.domain, part.model, part.seed, part.memory)))
    kind = {"finetuned": "model"}.get(part.kind, part.kind)
    with artefact.building(place, kind, {"stride": 4}, {"at": str(place)}) as build:
        assert build is not None
        if part.kind == "evaluation":
            record = {
                "method": "MemDec",
                "memory": part.memory,
                "value": np.exp(-log_p.mean()),
                "alpha": 1.0,
                "on": "torch",
            }
            artefact.write_json(place / "records.json", [record | {"seed": part.seed}])
            scores.write(place, TokenScores(log_p - 1, log_p), "test")
        build.facts.update(parameters=1000 * (part.seed + 1), valid_perplexity=12.0, trained_tokens=600, epochs=3.0)
    return place


def test_gains_compare_a_memory_with_its_twin_in_every_study(tmp_path: Path) -> None:
    made, rng = figure_catalogue.figure(gains_config(), "gains"), np.random.default_rng(0)
    assert made.axes == {
        "reference": "reference", "one-epoch": "key model", "other-text": "training text", "small": "size of the memory",
        "all-else": "other",
    }  # fmt: skip
    given, log_p = [], {}
    for part in made.parts:
        tokens = -rng.random(400) - (0.5 if part.memory == "ce" else 0.2)
        log_p[part] = tokens
        given.append((part.domain, part.model, part.seed, part_folder(tmp_path, part, tokens)))
    drawing.run(made, given, [], tmp_path / "gains.csv")
    drawn = pd.read_csv(tmp_path / "gains.csv")
    assert list(drawn["study"]) == [name.replace(" ", "-") for name in STUDIES]
    assert drawn["tokens"].eq(200).all()
    assert drawn["memory_parameters"].eq(1500).all()
    first = drawn.iloc[0]
    values = {
        memory: np.mean([np.exp(-log_p[part].mean()) for part in log_p if part.memory == memory and part.study == "reference"
                         and part.kind == "evaluation"])
        for memory in ("memdec", "ce")
    }  # fmt: skip
    assert first["memory"] == pytest.approx(values["memdec"])
    assert first["value"] == pytest.approx(100 * (1 - values["memdec"] / values["ce"]))
    assert 0 < first["low"] < first["value"] < first["high"]
    assert (first["n"], first["seeds"]) == (20, 2)
    with pytest.raises(ConfigError, match=r"gains: expected a --cell for each of 40 parts .* found 39; let Snakemake"):
        drawing.run(made, given[1:], [], tmp_path / "x.csv")


def test_gains_need_a_twin_on_hard_labels() -> None:
    with pytest.raises(
        ConfigError, match="gains: expected a memory that differs from the default one in its objective, ce"
    ):
        figure_catalogue.figure(config(memories={"kl": {"train": {"objective": "kl"}}}), "gains")


def test_labels_of_near_values_do_not_lie_on_each_other() -> None:
    rows = [
        {"study": f"s{value}", "axis": axis, "domain": "law", "model": "m", "value": 1.0, "low": 0.5, "high": 1.5}
        | {"key_perplexity": value, "tokens": 9, "memory_parameters": 9}
        for axis, value in [("reference", 16.3), ("key model", 17.6), ("key model", 17.7), ("key model", 25.3)]
    ]
    figure = figures.gains(pd.DataFrame(rows))
    FigureCanvasAgg(figure).draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == 3
    centres = [(box.x0 + box.x1) / 2 for box in boxes]
    assert all(
        later - earlier > 0.5 * box.width for earlier, later, box in zip(centres, centres[1:], boxes, strict=False)
    )


def test_several_studies_may_fill_gains_and_no_other_figure() -> None:
    studies = {name: {"tables": ["gains", "memories"]} for name in ("one", "two")}
    with pytest.raises(
        ConfigError, match=r"studies.two.tables: expected tables that no other study fills, found memories of"
    ):
        config(studies=studies)


def cut(figure: Figure) -> list[str]:
    """Sides beyond which something is drawn, and axes without a name."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    beyond = {"left": -box.x0, "bottom": -box.y0, "right": box.x1 - width, "top": box.y1 - height}
    sides = [f"{side} {inches:.2f}" for side, inches in beyond.items() if inches > 0.01]
    return sides + ["an axis" for axes in figure.axes if not axes.get_ylabel() and not axes.get_xlabel()]


NAMES = ["gpt2-S", "Qwen2.5-0.5B", "a-name-that-is-long_$x$_and", "gpt2-L", "qwen2-M", "Llama-3.2-3B", "llama-8B"]


def frame(*columns: tuple[str, list[Any]], high: float = 1.0) -> pd.DataFrame:
    """Every combination of the columns, with values between 0 and `high`."""
    table = pd.MultiIndex.from_product(
        [values for _, values in columns], names=[name for name, _ in columns]
    ).to_frame()
    value = np.random.default_rng(0).random(len(table)) * high
    return table.assign(value=value, low=0.9 * value, high=1.1 * value).reset_index(drop=True)


DRAWINGS = {
    "bars": lambda: figures.bars(
        frame(("model", NAMES), ("method", ["base", "LoRA", "MemDec"]), high=150).assign(domain="a_$domain$")
    ),
    "one": lambda: figures.bars(frame(("model", NAMES[:1]), ("method", ["base"])).assign(domain="torch")),
    "examples": lambda: figures.examples(
        frame(("example", [1, 2, 3]), ("token", [" the", "$x$", "\n", "A\\very_long_token_of_40_characters_abc"])).assign(
            before="text $ of the " * 20, next="$x$", p_kNN=0.5, p_LM=0.2, p_mem=1.0
        )
    ),
    "shapes": lambda: figures.shapes(
        frame(("model", NAMES[:4]), ("distribution", list(figures.DISTRIBUTIONS)), ("metric", ["top1", "entries", "entropy"]))
        .assign(parameters=lambda rows: rows["model"].map({name: 10**i for i, name in enumerate(NAMES, 5)}), floor=0.001)
    ),
    "fidelity": lambda: figures.fidelity(
        frame(
            ("memory", [*NAMES, *map(str, range(13))]),
            ("metric", ["match", "kl", "total_variation", "pearson"]),
            ("rows", ["all", "one token", "several tokens"]),
        )
    ),
    "gains": lambda: figures.gains(
        frame(
            ("axis", ["reference", "key model", "training text", "size of the memory", "targets", "other"]),
            ("domain", NAMES[1:3]),
            ("model", NAMES[:2]),
            high=30,
        ).assign(
            study=lambda rows: "a_$study$_of_" + rows["axis"],
            key_perplexity=lambda rows: 10 + rows.groupby("axis").ngroup(),
            tokens=lambda rows: 10_000 * (1 + rows.groupby("axis").ngroup()),
            memory_parameters=lambda rows: 1_000_000 * (1 + rows.groupby("axis").ngroup()),
        )
    ),
    "gains alone": lambda: figures.gains(
        frame(("axis", ["reference"]), ("domain", NAMES[:1]), ("model", NAMES[:1])).assign(study="reference")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_is_cut_and_no_axis_without_a_name(name: str) -> None:
    figure = DRAWINGS[name]()
    assert cut(figure) == []
    assert figure.get_size_inches()[0] * 96 <= 390

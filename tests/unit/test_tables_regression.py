"""Tables from records."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memdec import config as cfg
from memdec.artefacts import artefact
from memdec.errors import ArtifactError, ConfigError
from memdec.harness.scores import TokenScores
from memdec.results import catalogue, items, regression, scores, tables
from memdec.results.sheet import Sheet
from memdec.settings import parse

CONFIG = cfg.load(Path(__file__).resolve().parents[2] / "tests" / "regression" / "reduced.yaml")

TABLE3 = catalogue.table3(CONFIG)
TABLES = ("table1", "table3", "table4", "memories")


def record(model: str, method: str, value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    plain = {
        "domain": "sklearn",
        "family": "GPT-2",
        "model": model,
        "method": method,
        "memory": "memdec" if method == "MemDec" else None,
        "metric": "token_perplexity",
        "value": value,
        "on": more.get("domain", "sklearn"),
        "task": None,
    }
    return (
        plain
        | {
            "low": value - 1,
            "high": value + 1,
            "n": 100,
            "alpha": 0.6 if method == "MemDec" else None,
            "lambda": None,
            "seed": seed,
        }
        | more
    )


def rows_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its rule."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return [
        record("gpt2-S", "base", 90.0),
        record("gpt2-S", "MemDec", 60.0),
        record("gpt2-S", "MemDec", 62.0, seed=1, alpha=0.8),
    ]


def test_cells_are_means_over_seeds_and_gaps_state_their_reason(records: list[dict[str, Any]]) -> None:
    table = tables.wide(Sheet(TABLE3, records)).set_index(["model", "method"])
    row = table.loc["gpt2-S", "MemDec"]
    assert (row["sklearn"], row["sklearn_alpha"], row["seeds"], row["sklearn_n"]) == (
        61.0,
        "0.6 0.8",
        "0 1",
        100,
    )
    empty = table.loc["gpt2-M", "LoRA"]
    assert pd.isna(empty["sklearn"])
    assert empty["note"] == "not run: sklearn"
    again = pd.read_csv(io.StringIO(tables.wide(Sheet(TABLE3, records)).to_csv(index=False)))
    assert list(again["method"]) == ["base", "LoRA", "MemDec"] * 2


def test_markdown_and_latex(records: list[dict[str, Any]]) -> None:
    shown = tables.grid(Sheet(TABLE3, records))
    rows, text = rows_of(tables.markdown(shown)), tables.note(Sheet(TABLE3, records))
    assert ["GPT-2", "gpt2-S", "MemDec", "**61.00**"] in rows
    assert ["GPT-2", "gpt2-S", "LoRA", "–"] in rows
    assert "chosen: 0.6, 0.8" in text
    assert r"\textbf{61.00}" in tables.latex(shown)


def test_the_note_holds_for_the_farthest_end_of_a_lopsided_interval() -> None:
    sheet = Sheet(TABLE3, [record("gpt2-S", "base", 100.0, low=99.0, high=109.0)])
    assert "within ±9.0 % of each value" in tables.note(sheet)


def test_an_adapter_that_is_smaller_than_the_memory_is_named() -> None:
    records = [
        record("gpt2-S", "base", 90.0),
        record("gpt2-S", "LoRA", 70.0, size=0.481),
        record("gpt2-M", "LoRA", 70.0, size=0.997),
    ]
    sheet = Sheet(TABLE3, records)
    assert "LoRA has fewer parameters than the memory, as a larger rank adds nothing: gpt2-S 48 %." in tables.note(
        sheet
    )
    small, full = (
        next(c for c in sheet.cells() if c.row == f"GPT-2 / gpt2-{s} / LoRA" and c.task is None) for s in "SM"
    )
    assert small.note == "the adapter has 48 % of the memory's parameters; a larger rank would add nothing"
    assert (small.value, full.value, full.note) == (70.0, 70.0, "")


def variants() -> cfg.Config:
    """Two memories beside the default one, of which one is for another tokenizer."""
    data = CONFIG.model_dump(mode="json", exclude_unset=True)
    data["tokenizers"]["other"] = data["tokenizers"]["bpe2k"]
    data["models"]["n"] = {**data["models"]["gpt2-S"], "tokenizer": "other"}
    data["systems"] = ["base", "kNN-LM", "MemDec"]
    data["memories"] = {"kl": {"train": {"objective": "kl"}, "models": ["gpt2-S"]}}
    data["memories"]["moved"] = {"adapt": "memdec", "key_model": "n"}
    config: cfg.Config = parse(cfg.Config, data, "c")
    return config


def test_all_memories_stand_beside_the_systems_with_their_spread() -> None:
    records = [
        record("gpt2-S", "base", 90.0),
        record("gpt2-S", "base", 90.0, seed=1),
        record("gpt2-S", "MemDec", 60.0),
        record("gpt2-S", "MemDec", 62.0, seed=1),
        record("gpt2-S", "MemDec", 50.0, memory="kl", alpha=0.9),
        record("n", "MemDec", 70.0, memory="moved", n=77),
    ]
    table = catalogue.memories(variants())
    frame = tables.wide(Sheet(table, records))
    named = ["MemDec: memdec", "MemDec: kl", "MemDec: moved"]
    assert list(zip(frame["model"], frame["system"], strict=True)) == [
        *[("gpt2-S", system) for system in ("base", "kNN-LM", *named[:2])],
        *[("gpt2-M", system) for system in ("base", "kNN-LM", named[0])],
        *[("n", system) for system in ("base", "kNN-LM", named[2])],
    ]
    cells = frame.set_index(["model", "system"])
    default = cells.loc["gpt2-S", "MemDec: memdec"]
    assert (default["sklearn"], default["sklearn_sd"], default["sklearn_alpha"]) == (61.0, pytest.approx(2**0.5), "0.6")
    one = cells.loc["gpt2-S", "MemDec: kl"]
    assert (one["sklearn"], one["sklearn_alpha"], one["note"]) == (50.0, "0.9", "")
    assert pd.isna(one["sklearn_sd"])
    assert cells.loc["gpt2-S", "kNN-LM"]["note"] == "not run: sklearn"
    rows, text = rows_of(tables.markdown(tables.grid(Sheet(table, records)))), tables.note(Sheet(table, records))
    assert ["GPT-2", "gpt2-S", "MemDec: kl", "**50.00**"] in rows
    assert ["GPT-2", "gpt2-S", "MemDec: memdec", "61.00"] in rows
    assert text.startswith(
        "Test perplexity per token (lower is better), scale `reduced`, seed 0. Test tokens: sklearn 77 or 100."
    )


def test_table_1_has_a_row_per_method_and_a_column_per_model_of_one_domain() -> None:
    table = catalogue.table1(variants())
    records = [
        record("gpt2-S", "base", 90.0),
        record("gpt2-M", "base", 80.0),
        record("gpt2-S", "kNN-LM", 60.0),
        record("gpt2-S", "MemDec", 50.0, memory="memdec"),
        record("gpt2-S", "MemDec", 10.0, memory="kl"),
        record("gpt2-M", "MemDec", 40.0, memory="memdec"),
    ]
    frame = tables.wide(Sheet(table, records)).set_index("method")
    assert list(frame.index) == ["base", "kNN-LM", "MemDec"]
    assert frame.loc["MemDec", ["gpt2-S", "gpt2-M", "Avg"]].tolist() == [50.0, 40.0, 45.0]
    assert frame.loc["kNN-LM", "note"] == "not run: gpt2-M"
    rows = rows_of(tables.markdown(tables.grid(Sheet(table, records))))
    assert rows == [
        ["Method", "gpt2-S", "gpt2-M", "Avg"],
        ["base", "90.00", "80.00", "85.00"],
        ["kNN-LM", "60.00", "–", "–"],
        ["MemDec", "**50.00**", "**40.00**", "**45.00**"],
    ]


def test_what_is_forgotten_is_a_table_of_general_text(tmp_path: Path) -> None:
    data = variants().model_dump(mode="json", exclude_unset=True)
    config = parse(cfg.Config, data | {"forgetting": ["general"]}, "c")
    table = catalogue.forgetting(config)
    assert list(table.columns) == ["sklearn on general"]
    records = [record("gpt2-S", method, value, on="general") for method, value in (("base", 20.0), ("MemDec", 25.0))]
    head, first, *rows = rows_of(tables.markdown(tables.grid(Sheet(table, records))))
    assert head == ["Family", "Model", "System", "sklearn on general"]
    assert first == ["GPT-2", "gpt2-S", "base", "**20.00**"]
    assert ["GPT-2", "gpt2-S", "MemDec: memdec", "25.00"] in rows
    assert tables.note(Sheet(table, records)).startswith("Test perplexity on general per token")
    with pytest.raises(ConfigError, match=r"forgetting: expected one of .*, found nowhere"):
        parse(cfg.Config, data | {"forgetting": ["nowhere"]}, "c")


def test_other_tokenizers_have_a_table_of_their_own() -> None:
    config = variants()
    first, second = catalogue.table3(config), catalogue.table4(config)
    assert {row.labels["model"] for row in first.rows} == {"gpt2-S", "gpt2-M"}
    assert [row.where for row in second.rows] == [
        {"model": "n", "method": "base"},
        {"model": "n", "method": "kNN-LM"},
        {"model": "n", "method": "MemDec", "memory": "moved"},
    ]
    records = [record("n", "MemDec", 70.0, memory="moved"), record("n", "MemDec", 7.0, memory="kl")]
    assert tables.wide(Sheet(second, records)).set_index("method").loc["MemDec", "sklearn"] == 70.0
    assert (catalogue.main_tables(config), catalogue.main_tables(CONFIG)) == (["table3", "table4"], ["table3"])


def test_a_table_without_anything_to_show_says_what_it_lacks() -> None:
    for name, lack in (
        ("table20", r"expected one of table1, table2, .*, forgetting, found 'table20'; did you mean table2"),
        ("table4", "expected a base model with another tokenizer than the key model gpt2-M, found only gpt2-S, gpt2-M"),
        ("table6", "expected marked words in 'cases'"),
        ("forgetting", "expected general corpora in 'forgetting'"),
    ):
        with pytest.raises(ConfigError, match=lack):
            catalogue.table(CONFIG, name)
    config = CONFIG.model_copy(update={"evaluated": []})
    for name in ("table1", "table3"):
        with pytest.raises(ConfigError, match=f"{name}: expected a base model with the tokenizer of the key model"):
            catalogue.table(variants().model_copy(update={"evaluated": ["n"]}), name)
    assert catalogue.main_tables(config) == []


def test_a_table_is_made_from_the_evaluations_that_its_rows_name() -> None:
    config = variants()
    assert config.systems == ["base", "kNN-LM", "MemDec"]
    parts = {name: [(part.model, part.name) for part in catalogue.table(config, name).parts] for name in TABLES}
    two = [(model, f"systems/{slug}") for slug in ("base", "knn-lm") for model in ("gpt2-S", "gpt2-M")]
    assert parts["table3"] == parts["table1"] == [*two, ("gpt2-S", "memdec"), ("gpt2-M", "memdec")]
    assert parts["table4"] == [("n", "systems/base"), ("n", "systems/knn-lm"), ("n", "moved")]
    systems = [(model, f"systems/{slug}") for slug in ("base", "knn-lm") for model in ("gpt2-S", "gpt2-M", "n")]
    memories = [("gpt2-S", "memdec"), ("gpt2-M", "memdec"), ("gpt2-S", "kl"), ("n", "moved")]
    assert parts["memories"] == [*systems, *memories]
    alone = config.model_copy(update={"systems": ["base"], "domains": ["sklearn", "general"], "seeds": [0, 1]})
    assert [tuple(part)[:6] for part in catalogue.table3(alone).parts if part.model == "gpt2-S"] == [
        ("evaluation", domain, "gpt2-S", 0, "base", None) for domain in ("sklearn", "general")
    ]
    assert {part.domain for part in catalogue.table1(alone).parts} == {"sklearn"}


def test_marked_words_are_a_table_of_what_was_measured_on_them(tmp_path: Path) -> None:
    words = [{"group": "one", "text": "Returns the [[token]] of it.", "target": "token", "tokens": 2}]
    words = [word | {"MemDec": 12.5, "kNN": 0.004, "BaseLM": 7.25} for word in words]
    settings = {"cases": [], "neighbours": 8, "temperature": 0.5, "nprobe": 1, "precision": "float32"}
    with artefact.building(tmp_path / "cases", "cases", settings, {"base": "b", "memory": "m", "index": "i"}) as build:
        assert build is not None
        artefact.write_json(tmp_path / "cases" / "records.json", words)
        build.facts["keys"] = 1234
    data = CONFIG.model_dump(mode="json", exclude_unset=True) | {"cases": [{"text": words[0]["text"]}]}
    config = parse(cfg.Config, data, "c")
    table = catalogue.table6(config)
    assert [tuple(part) for part in table.parts] == [("cases", "sklearn", "gpt2-M", 0, "MemDec", "memdec", None, None)]
    cell = ("sklearn", "gpt2-M", 0, tmp_path / "cases")
    tables.run(table, [cell], tmp_path / "table6.csv")
    assert pd.read_csv(tmp_path / "table6.csv").to_dict("records") == words
    assert items.read(tmp_path / "table6.items.npz") == {}
    text = (tmp_path / "table6.md").read_text()
    assert ["one", "Returns the [token] of it.", "**12.50**", "<0.01", "7.25"] in rows_of(text)
    assert "(1,234 keys, k 8, temperature 0.5) and base model gpt2-M." in text
    found = json.loads((tmp_path / "table6.provenance.json").read_text())
    assert (found["table"], found["base"], found["memory"], found["index"]) == ("6", "b", "m", "i")
    baseline, lines = tmp_path / "base.json", tmp_path / "table6.cells.csv"
    regression.update([lines], baseline, "first")
    lines.write_text(lines.read_text().replace(",12.5,", ",12.6,"))
    found_words = [line.word for line in regression.compare([lines], baseline)[0]]
    assert found_words == ["MOVED", "ok", "ok"]  # one word is no row that may turn
    with pytest.raises(ConfigError, match="expected one --cell with a folder of kind cases, found 2"):
        tables.run(table, [cell, cell], tmp_path / "table6.csv")


def write_evaluation(folder: Path, memory: str | None, records: list[dict[str, Any]], **inputs: str) -> Path:
    """An evaluation whose tokens all have the probability that gives the records' perplexities."""
    settings = {"memory": memory, "system": "base" if memory is None else "MemDec", "stride": 4}
    base, own = 1 / records[0]["value"], None
    if memory is not None:
        alpha = records[1]["alpha"]
        own = np.full(8, math.log((1 / records[1]["value"] - (1 - alpha) * base) / alpha))
    with artefact.building(folder, "evaluation", settings, inputs) as build:
        assert build is not None
        artefact.write_json(folder / "records.json", records)
        scores.write(folder, TokenScores(np.full(8, math.log(base)), own), "test")
        build.facts.update(corpora_sha256={"sklearn": "ab"})
    return folder


def test_the_base_counts_once_though_every_evaluation_has_it(tmp_path: Path) -> None:
    base, memory = record("gpt2-S", "base", 90.0), record("gpt2-S", "MemDec", 60.0)
    other = record("gpt2-S", "MemDec", 50.0, memory="kl")
    cells = [
        ("sklearn", "gpt2-S", 0, write_evaluation(tmp_path / "a", None, [base])),
        ("sklearn", "gpt2-S", 0, write_evaluation(tmp_path / "b", "memdec", [base, memory])),
        ("sklearn", "gpt2-S", 0, write_evaluation(tmp_path / "c", "kl", [base, other])),
    ]
    assert [each["value"] for each in tables.load_records(CONFIG, cells)] == [90.0, 60.0, 50.0]
    tables.run(catalogue.memories(variants()), cells, tmp_path / "memories.csv")
    found = json.loads((tmp_path / "memories.provenance.json").read_text())
    assert list(found["evaluations"]) == [f"sklearn/gpt2-S/0/{name}" for name in ("base", "memdec", "kl")]
    assert list(pd.read_csv(tmp_path / "memories.csv")["sklearn"].dropna()) == [90.0, 60.0, 50.0]
    with pytest.raises(ArtifactError, match="expected records of seed 1, found seed 0"):
        tables.load_records(CONFIG, [("sklearn", "gpt2-S", 1, tmp_path / "a")])
    with pytest.raises(ArtifactError, match="a: expected records on torch, found sklearn; give the folder of torch"):
        tables.load_records(CONFIG, [("torch", "gpt2-S", 0, tmp_path / "a")])
    of = [
        write_evaluation(tmp_path / name, name, [base, memory | {"memory": name}], base=name[0])
        for name in ("s1", "m1")
    ]
    with pytest.raises(
        ArtifactError, match=r"m1: expected the base model gpt2-S as in .*/s1, found another one; give each"
    ):
        tables.load_records(CONFIG, [("sklearn", "gpt2-S", 0, folder) for folder in of])

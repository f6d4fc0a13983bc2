"""Tables of tasks, alphas, memories and corpora: their rows, columns, parts, numbers and what they refuse."""

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
from memdec.maths import statistics
from memdec.results import catalogue, cells, items, scores, tables, task_tables
from memdec.results.cells import Cell
from memdec.results.layout import Measured
from memdec.results.sheet import Sheet
from memdec.settings import parse

REDUCED = cfg.load(Path(__file__).resolve().parents[2] / "tests" / "regression" / "reduced.yaml")
NINE = [f"dcpmi_{name.lower()}_kp" for name in task_tables.NINE]


def config(**more: Any) -> cfg.Config:
    """Two base models and two domains, with a suite of tasks for the first, and these changes."""
    data = REDUCED.model_dump(mode="json", exclude_unset=True, exclude={"studies"})
    data |= {"domains": ["sklearn", "general"], "systems": ["base", "DAPT", "MemDec"]}
    data |= {"suites": {"nine": {"tasks": ["memdec_dcpmi"]}}, "tasks": {"sklearn": ["nine"]}}
    made: cfg.Config = parse(cfg.Config, data | more, "c")
    return made


def measured(made: cfg.Config, name: str) -> Measured:
    table = catalogue.table(made, name)
    assert isinstance(table, Measured)
    return table


# --- definitions ------------------------------------------------------------------------------------------------------


def test_every_table_of_the_paper_is_there() -> None:
    assert {f"table{n}" for n in range(1, 20)} | {"objectives", "rivals", "memories", "forgetting"} == set(
        catalogue.TABLES
    )
    every = [*NINE, *task_tables.BIOMED.values(), *task_tables.FINANCE.values(), *task_tables.QUESTIONS.values()]
    every += [task for task, _ in task_tables.LAW.values()] + list(task_tables.SHOTS.values())
    assert len(set(every)) == 9 + 13 + 2 + 3
    groups = ("memdec_dcpmi", "memdec_domain", "memdec_qa")
    shots = {f"memdec_casehold_{n}shot" for n in (4, 8, 16)}
    assert {leaf for group in groups for leaf in task_tables.leaves(group)} | shots == set(every)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        (
            "table5",
            r"table5: expected a domain with a suite that has memdec_nq, memdec_hotpotqa, found sklearn with nine",
        ),
        (
            "table8",
            r"table8: expected a memory that starts from another model .*, found none; add one under 'memories'",
        ),
        ("table9", r"table9: expected a memory with the objectives kl and ce beside hybrid, .* \(train.objective\)"),
        ("table11", r"table11: expected a suite of sklearn with alpha tune, found nine with other ones"),
        ("table14", r"table14: expected a domain with a suite that has memdec_chemprot, memdec_mqp, pubmedqa \.\.\."),
        ("table17", r"table17: expected a memory that is a DAPT model of the default one's size, .* \(dapt: true\)"),
        ("table19", r"table19: expected a memory with the keys of another model than the default one"),
        ("objectives", r"objectives: expected a memory with another objective than the default one"),
        ("rivals", r"rivals: expected a memory on hard labels beside the default one, .* \(train.objective ce\)"),
    ],
)
def test_a_table_that_a_config_cannot_fill_says_what_is_missing(name: str, lacks: str) -> None:
    with pytest.raises(ConfigError, match=lacks):
        catalogue.table(config(), name)


MEMORIES: dict[str, Any] = {
    "kl": {"train": {"objective": "kl"}},
    "ce": {"train": {"objective": "ce"}, "models": ["gpt2-M"]},
    "kl-long": {"train": {"objective": "kl", "epochs": 3}},
    "big": {"memory_model": "gpt2-M", "train": {"learning_rate": 1e-3}},
    "small-keys": {"key_model": "gpt2-S"},
    "dapt": {"dapt": True},
    "far": {"other_domain": True},
}


def test_each_table_takes_the_memories_that_it_is_about_and_asks_for_no_others() -> None:
    made = config(memories=MEMORIES)
    memories = {
        name: {(part.model, part.memory) for part in catalogue.table(made, name).parts if part.memory is not None}
        for name in ("table9", "table8", "table19", "table17", "objectives", "rivals")
    }
    both = ("gpt2-S", "gpt2-M")
    assert memories["table9"] == {("gpt2-M", name) for name in ("memdec", "kl", "ce")}
    assert memories["table8"] == {(model, name) for model in both for name in ("memdec", "big")}
    assert memories["table19"] == {(model, name) for model in both for name in ("memdec", "small-keys")}
    assert memories["table17"] == {(model, name) for model in both for name in ("memdec", "dapt")}
    assert {name for _, name in memories["rivals"]} == {"memdec", "kl", "ce", "dapt", "far"}
    assert {name for _, name in memories["objectives"]} == {"memdec", "kl", "ce", "kl-long", "dapt", "far"}
    assert {part.domain for part in catalogue.table(made, "table9").parts} == {"sklearn"}
    assert all(part.system == "MemDec" for part in catalogue.table(made, "table9").parts)
    rows = [row.labels for row in measured(made, "table3").rows]
    assert [row["method"] for row in rows if row["model"] == "gpt2-S"] == [
        "base", "DAPT", "MemDec", "control: DAPT", "control: other domain",
    ]  # fmt: skip
    assert [row.labels["method"] for row in measured(made, "table1").rows][-2:] == [
        "control: DAPT",
        "control: other domain",
    ]


def test_a_study_fills_its_tables_with_its_own_settings() -> None:
    three = {name: MEMORIES[name] for name in ("kl", "ce")}
    studies = {"parts": {"tables": ["table9"], "domains": ["general"], "memories": three}}
    made = config(studies=studies)
    assert {part.domain for part in catalogue.table(made, "table9").parts} == {"general"}
    assert {part.domain for part in catalogue.table(made, "table3").parts} == {"sklearn", "general"}
    with pytest.raises(ConfigError, match="table8: expected a memory"):  # the study does not fill it
        catalogue.table(made, "table8")


def test_the_base_alone_is_one_harness_folder_for_all_seeds() -> None:
    parts = catalogue.table(config(seeds=[0, 1]), "table2").parts
    assert [(p.model, p.seed, p.system, p.memory) for p in parts if p.model == "gpt2-S"] == [
        ("gpt2-S", 0, "base", None),
        ("gpt2-S", 0, "DAPT", None),
        ("gpt2-S", 1, "DAPT", None),
        ("gpt2-S", 0, "MemDec", "memdec"),
        ("gpt2-S", 1, "MemDec", "memdec"),
    ]
    assert {(part.kind, part.domain, part.suite) for part in parts} == {("harness", "sklearn", "nine")}


# --- tasks ------------------------------------------------------------------------------------------------------------


def write_harness(
    folder: Path, method: str, outcomes_: dict[str, list[dict[str, Any]]], seed: int = 0, **more: Any
) -> Path:
    """A harness folder; of each task the rows with their metrics, of which accuracies are means and others F1."""
    with artefact.building(
        folder, "harness", {"system": method, "memory": more.get("memory"), "rows": repr(outcomes_)}, {}
    ) as b:
        assert b is not None
        records, results = [], {"results": {}, "versions": {}, "configs": {}}
        for task, each in outcomes_.items():
            lines, listed = [], []
            for number, row in enumerate(each):
                line = {"doc_id": number, "doc": {"n": number}, "filter": "none", "metrics": list(row), **row}
                lines.append(json.dumps(line) + "\n")
            for metric in each[0]:
                values = [row[metric] for row in each]
                is_mean = not isinstance(values[0], list)
                value = float(np.mean(values)) if is_mean else float(np.mean([g == p for g, p in values]))
                how = "mean" if is_mean else "def micro_f1(items):\n"
                listed.append({"metric": metric, "aggregation": how})
                results["results"].setdefault(task, {})[f"{metric},none"] = value
                predicted = more.get("labels", {}).get(task)
                record = {"task": task, "metric": metric, "value": value, "low": value - 0.1, "high": value + 0.1}
                record |= {"n": len(each), "method": method, "memory": more.get("memory"), "seed": seed, "lambda": None}
                record |= {"alpha": more.get("alpha"), "model": "folder", "higher_is_better": True, "labels": predicted}
                record |= {"constant": predicted is not None and max(predicted.values()) == len(each), "limit": 4}
                records.append(record | {"rows": more.get("rows", "r1")})
            results["configs"][task] = {"metric_list": listed}
            (folder / f"samples_{task}_2026.jsonl").write_text("".join(lines))
        artefact.write_json(folder / "results_2026.json", results)
        artefact.write_json(folder / "records.json", records)
    return folder


def outcomes(*right: int) -> list[dict[str, Any]]:
    return [{"acc": float(each), "acc_lm": 1.0 - each} for each in right]


SST2, HYP = "dcpmi_sst2_kp", "dcpmi_hyp_kp"


@pytest.fixture
def given(tmp_path: Path) -> list[tables.Given]:
    """Base, DAPT (which predicts one label only) and MemDec at two seeds, on two of the nine tasks."""
    base = {SST2: outcomes(1, 0, 0, 1, 0, 0, 0, 0), HYP: outcomes(1, 1, 0, 0)}
    dapt = {SST2: outcomes(1, 1, 0, 1, 0, 0, 0, 0), HYP: outcomes(0, 0, 0, 1)}
    first = {SST2: outcomes(1, 1, 1, 1, 1, 1, 1, 0), HYP: outcomes(1, 1, 1, 0)}
    second = {SST2: outcomes(1, 1, 1, 1, 1, 1, 1, 1), HYP: outcomes(1, 1, 1, 1)}
    only = {SST2: {"positive": 5, "negative": 3}, HYP: {"yes": 4, "no": 0}}
    memdec = {"memory": "memdec", "alpha": 0.3}
    return [
        ("sklearn", "gpt2-S", 0, write_harness(tmp_path / "b", "base", base, labels=only | {HYP: {"yes": 2, "no": 2}})),
        ("sklearn", "gpt2-S", 0, write_harness(tmp_path / "d", "DAPT", dapt, labels=only)),
        ("sklearn", "gpt2-S", 0, write_harness(tmp_path / "m0", "MemDec", first, **memdec)),
        ("sklearn", "gpt2-S", 1, write_harness(tmp_path / "m1", "MemDec", second, 1, **memdec)),
    ]


def of(found: list[Cell], row: str, column: str) -> Cell:
    (cell,) = [each for each in found if (each.row, each.column) == (row, column)]
    return cell


def test_table_2_has_numbers_tests_labels_and_reasons(given: list[tables.Given], tmp_path: Path) -> None:
    made = config(seeds=[0, 1], evaluated=["gpt2-S"], suites={"nine": {"tasks": [SST2, HYP], "limit": 4}})
    tables.run(measured(made, "table2"), given, tmp_path / "table2.csv")
    found = cells.read(tmp_path / "table2.cells.csv")
    cell = of(found, "gpt2-S / MemDec", "SST2")
    assert (cell.value, cell.seeds, cell.n, cell.alpha, cell.unit) == (93.75, 2, 8, "0.3", "percent")
    assert cell.sd == pytest.approx(12.5 / 2**0.5)
    assert (cell.low, cell.high) == (pytest.approx(83.75), pytest.approx(103.75))
    assert (cell.method, cell.memory, cell.task, cell.metric) == ("MemDec", "memdec", SST2, "acc")
    assert (cell.lower_is_better, cell.best_other, cell.paper) == (False, "gpt2-S / DAPT", 82.43)
    # The means over seeds differ from the base on six rows, from DAPT on five, always upwards: 2 of 2^6 and 2^5 flips.
    assert (cell.p_base, cell.p_best) == (pytest.approx(2 / 64), pytest.approx(2 / 32))
    base = of(found, "gpt2-S / base", "SST2")
    assert (base.p_base, base.best_other, base.seeds) == (None, "gpt2-S / MemDec", 1)
    dapt = of(found, "gpt2-S / DAPT", "HYP")
    assert (dapt.constant, dapt.labels, dapt.value) == (True, {"yes": 4, "no": 0}, 25.0)
    assert of(found, "gpt2-S / DAPT", "SST2").constant is False
    gap = of(found, "gpt2-S / DAPT", "CB")
    assert (gap.value, gap.note) == (None, "not run: no suite of sklearn has dcpmi_cb_kp")
    text = (tmp_path / "table2.md").read_text()
    head, _, *lines = [
        [each.strip() for each in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    assert head == ["Model", "Method", *task_tables.NINE, "Avg"]
    shown = {line[1]: dict(zip(head, line, strict=True)) for line in lines}
    assert (shown["MemDec"]["SST2"], shown["base"]["SST2"], shown["DAPT"]["HYP"]) == ("**93.75**", "25.00", "25.00†")
    assert shown["MemDec"]["Avg"] == "–"
    for said in (
        "Rows: SST2 8, HYP 4.", "At most 4 rows of a task were run, from all over its file (`limit`).", "† One label was predicted",
        "Alpha as the paper prints it for a task, else 0.6: 0.3.", "– Not run: no suite of sklearn has dcpmi_mr_kp, dcpmi_cr_kp, ",
    ):  # fmt: skip
        assert said in text
    assert r"25.00\textdagger{}" in (tmp_path / "table2.tex").read_text()
    wide = pd.read_csv(tmp_path / "table2.csv").set_index("method")
    assert (wide.loc["MemDec", "SST2"], wide.loc["MemDec", "SST2_p_base"]) == (93.75, pytest.approx(2 / 64))
    stored = items.read(tmp_path / "table2.items.npz")["gpt2-S / MemDec", "SST2"]
    assert [(each.seed, each.value, len(each)) for each in stored] == [(0, 0.875, 8), (1, 1.0, 8)]


def test_a_derived_row_and_column_have_intervals_of_the_same_resamples(given: list[tables.Given]) -> None:
    yahoo = [[{**row} for row in outcomes(1, 0, 1, 1)] for _ in range(2)]
    more = [
        ("sklearn", "gpt2-S", 0, write_harness(given[0][3].with_name(f"y{n}"), name, {"dcpmi_yahoo_kp": rows}))
        for n, (name, rows) in enumerate(zip(("base", "DAPT"), yahoo, strict=True))
    ]
    made = config(seeds=[0, 1], evaluated=["gpt2-S"])
    found = Sheet(measured(made, "table12"), tables.load_records(made, [*given, *more])).cells()
    delta = of(found, "gpt2-S / difference", "Yahoo_DCPMI")
    assert (delta.value, delta.low, delta.high) == (0.0, 0.0, 0.0)  # the same rows are right, in every resample
    delta = of(found, "gpt2-S / difference", "HYP_DCPMI")
    assert delta.value == -0.25
    assert delta.low is not None
    assert delta.low < delta.value < 0.5
    mean = of(found, "gpt2-S / base", "Avg")
    assert mean.value == pytest.approx((0.75 + 0.25 + 0.5 + 0.5) / 4)
    assert of(found, "gpt2-S / difference", "Avg").value == pytest.approx(-0.25 / 4 + 0.25 / 4)


def test_f1_is_tested_by_exchanging_predictions(tmp_path: Path) -> None:
    gold = [0, 1] * 10
    micro = {"base": [0] * 20, "MemDec": gold}
    folders = [
        ("sklearn", "gpt2-S", 0, write_harness(
            tmp_path / name, name, {"memdec_scotus": [{"micro_f1": [g, p]} for g, p in zip(gold, predicted, strict=True)]},
            memory="memdec" if name == "MemDec" else None,
        ))
        for name, predicted in micro.items()
    ]  # fmt: skip
    made = config(suites={"nine": {"tasks": ["memdec_law"]}}, evaluated=["gpt2-S"])
    sheet = Sheet(measured(made, "table16"), tables.load_records(made, folders))
    sheet.test()
    found = of(sheet.cells(), "gpt2-S / MemDec", "SCOTUS_micro")
    assert found.value == 100.0
    assert found.p_base is not None
    assert found.p_base == found.p_best < 0.01


def test_three_equal_seeds_are_no_more_rows_of_f1(tmp_path: Path) -> None:
    gold = [0, 1] * 10
    base = [1 - g if i < 9 else g for i, g in enumerate(gold)]
    memdec = [g if i < 8 else 1 - g if i == 9 else base[i] for i, g in enumerate(gold)]

    def p(*seeds: int) -> float | None:
        folders = [
            ("sklearn", "gpt2-S", seed, write_harness(
                tmp_path / f"{len(seeds)}-{name}-{seed}", name,
                {"memdec_scotus": [{"micro_f1": [g, p]} for g, p in zip(gold, predicted, strict=True)]},
                seed, memory="memdec" if name == "MemDec" else None,
            ))
            for name, predicted in (("base", base), ("MemDec", memdec))
            for seed in (seeds if name == "MemDec" else [0])
        ]  # fmt: skip
        made = config(seeds=list(seeds), suites={"nine": {"tasks": ["memdec_law"]}}, evaluated=["gpt2-S"])
        sheet = Sheet(measured(made, "table16"), tables.load_records(made, folders))
        sheet.test()
        return of(sheet.cells(), "gpt2-S / MemDec", "SCOTUS_micro").p_base

    assert p(0) == p(0, 1, 2) == pytest.approx(2 * (1 + 9) / 2**9, abs=0.01)  # 8 of 9 changes are for the better


def test_an_average_over_tasks_draws_the_rows_of_each_for_itself(tmp_path: Path) -> None:
    """Rows of two files that happen to have one place have nothing in common."""
    up, down = ([{"acc": float(i % 2 == odd), "acc_lm": float(i % 2 == odd)} for i in range(40)] for odd in (0, 1))
    folders = [
        ("sklearn", "gpt2-S", 0, write_harness(tmp_path / name, name, {HYP: up, "dcpmi_yahoo_kp": down}))
        for name in ("base", "DAPT")
    ]
    made = config(evaluated=["gpt2-S"])
    found = Sheet(measured(made, "table12"), tables.load_records(made, folders)).cells()
    mean = of(found, "gpt2-S / base", "Avg")
    assert mean.value == 0.5
    assert mean.low is not None
    assert mean.high is not None
    assert mean.high - mean.low > 0.1
    assert of(found, "gpt2-S / difference", "HYP_DCPMI").low == 0.0  # the same rows of one task


def test_what_must_not_be_put_into_one_table_is_refused(given: list[tables.Given], tmp_path: Path) -> None:
    made = config(seeds=[0, 1])
    rows = {SST2: outcomes(1, 0, 0, 1, 0, 0, 0, 0)}
    changed = write_harness(tmp_path / "changed", "LoRA", rows, rows="r2")
    with pytest.raises(
        ArtifactError, match=rf"changed: expected the rows of {SST2} as in .*/b, found other ones; the rows"
    ):
        tables.load_records(made, [*given, ("sklearn", "gpt2-S", 0, changed)])
    twice = write_harness(tmp_path / "twice", "DAPT", rows)
    with pytest.raises(
        ArtifactError, match=r"twice: expected one record of DAPT with gpt2-S on sklearn, seed 0, found"
    ):
        tables.load_records(made, [*given, ("sklearn", "gpt2-S", 0, twice)])
    with pytest.raises(ArtifactError, match=r"expected records of seed 3, found seed 0; run it again"):
        tables.load_records(made, [("sklearn", "gpt2-S", 3, twice)])
    nan = write_harness(tmp_path / "nan", "DAPT", {SST2: [{"acc": math.nan}]})
    with pytest.raises(ArtifactError, match=r"nan: expected a finite value of acc for DAPT, found nan; run it again"):
        tables.load_records(made, [("sklearn", "gpt2-S", 0, nan)])


def test_alphas_that_were_tuned_stand_beside_the_printed_ones(given: list[tables.Given]) -> None:
    suites = {"nine": {"tasks": [SST2, HYP], "alpha": "tune"}}
    made = config(seeds=[0, 1], evaluated=["gpt2-S"], suites=suites)
    table = measured(made, "table11")
    assert {part.system for part in table.parts} == {"MemDec"}
    grid = tables.grid(Sheet(table, tables.load_records(made, given)))
    assert grid.header == ["Task", "gpt2-S", "gpt2-S, paper"]
    assert grid.rows[0] == ["SST2", "0.30", "0.30"]
    assert grid.rows[-1] == ["Yahoo", "–", "0.20"]
    note = tables.note(Sheet(table, tables.load_records(made, given)))
    assert "– Not run: no record of MemDec with gpt2-S on dcpmi_mr_kp among the given folders;" in note
    assert "1 more, see the cells." in note


# --- perplexities and corpora -----------------------------------------------------------------------------------------


def write_evaluation(folder: Path, model: str, seed: int, other_base: float = 0.0) -> tables.Given:
    """An evaluation of MemDec with stored scores of 40 tokens, whose memory is sure where the base is not."""
    base = np.log(np.random.default_rng(len(model)).uniform(0.05, 0.3, 40)) - other_base
    memory = np.log(np.random.default_rng(seed).choice([0.01, 0.9], 40))
    records = []
    for method, alpha in (("base", 0.0), ("MemDec", 0.6)):
        value = math.exp(-np.log((1 - alpha) * np.exp(base) + alpha * np.exp(memory)).mean())
        about = {"method": method, "memory": "memdec" if alpha else None, "alpha": alpha or None, "lambda": None}
        about |= {"metric": "token_perplexity", "value": value, "low": value - 1, "high": value + 1, "n": 40}
        records.append(about | {"seed": seed, "on": "sklearn"})
    settings = {"memory": "memdec", "system": "MemDec", "stride": 4, "model": model, "seed": seed}
    with artefact.building(folder, "evaluation", settings, {}) as build:
        assert build is not None
        artefact.write_json(folder / "records.json", records)
        scores.write(folder, TokenScores(base, memory), "test", None)
        build.facts.update(corpora_sha256={"sklearn": "ab"})
    return "sklearn", model, seed, folder


def test_the_alpha_curve_is_the_mean_of_all_models_from_their_stored_scores(tmp_path: Path) -> None:
    given = [write_evaluation(tmp_path / f"{m}{s}", m, s) for m in ("gpt2-S", "gpt2-M") for s in (0, 1)]
    made = config(domains=["sklearn"], tasks={}, seeds=[0, 1])
    tables.run(measured(made, "table7"), given, tmp_path / "table7.csv")
    found = cells.read(tmp_path / "table7.cells.csv")
    by_hand = []
    for *_, seed, folder in given:
        stored, stride = scores.token_scores(folder)
        assert (stride, seed in (0, 1), stored.memory is not None) == (4, True, True)
        assert stored.memory is not None
        mixed = np.log(0.45 * np.exp(stored.memory) + 0.55 * np.exp(stored.base))
        by_hand.append(math.exp(-mixed.mean()))
    cell = of(found, "0.45", "sklearn")
    assert cell.value == pytest.approx(np.mean(by_hand))
    assert (cell.seeds, cell.sd) == (2, pytest.approx(np.std([np.mean(by_hand[::2]), np.mean(by_hand[1::2])], ddof=1)))
    assert cell.low is not None
    assert cell.high is not None
    assert cell.low < cell.value < cell.high
    curve = {each.row: each.value for each in found if each.column == "sklearn"}
    relative = {each.row: each.value for each in found if each.column == "sklearn relative"}
    best = min(curve, key=lambda alpha: curve[alpha] or math.inf)
    assert len(curve) == 21
    assert relative[best] == 1.0
    assert relative["0"] == pytest.approx((curve["0"] or 0) / (curve[best] or 1))
    assert f"| {best} " in (tmp_path / "table7.md").read_text()


def test_perplexities_are_tested_window_by_window_from_the_stored_scores(tmp_path: Path) -> None:
    given = [write_evaluation(tmp_path / str(seed), "gpt2-S", seed) for seed in (0, 1)]
    made = config(domains=["sklearn"], tasks={}, seeds=[0, 1], evaluated=["gpt2-S"], systems=["base", "MemDec"])
    tables.run(measured(made, "table1"), given, tmp_path / "table1.csv")
    base, memdec = cells.read(tmp_path / "table1.cells.csv")
    sums = []
    for *_, folder in given:
        stored, _ = scores.token_scores(folder)
        assert stored.memory is not None
        mixed = np.log(0.6 * np.exp(stored.memory) + 0.4 * np.exp(stored.base))
        sums.append([-part.reshape(10, 4).sum(1) for part in (stored.base, mixed)])
    one, other = np.mean(sums, axis=0)  # of each window, the mean over seeds
    assert memdec.p_base == memdec.p_best == base.p_best == pytest.approx(statistics.sign_flips(one, other))
    assert (base.p_base, base.best_other, memdec.best_other) == (None, "MemDec", "base")
    assert (base.seeds, base.sd, memdec.seeds) == (1, None, 2)  # the base is the same at every seed
    stored_items = items.read(tmp_path / "table1.items.npz")["MemDec", "gpt2-S"]
    assert [each.sums.tolist() for each in stored_items] == [pytest.approx(mixed) for _, mixed in sums]


def test_another_base_at_another_seed_stops_the_table(tmp_path: Path) -> None:
    given = [write_evaluation(tmp_path / str(seed), "gpt2-S", seed, other_base=seed * 0.01) for seed in (0, 1)]
    with pytest.raises(
        ArtifactError, match="expected one record of base with gpt2-S on sklearn, seed 1, found another"
    ):
        tables.load_records(config(domains=["sklearn"], tasks={}, seeds=[0, 1]), given)


def test_at_the_scale_of_the_paper_a_cell_has_a_verdict() -> None:
    data = config(systems=["base", "LoRA", "MemDec"], domains=["sklearn"], tasks={}).model_dump(
        mode="json", exclude_unset=True
    )
    data["models"] = {"GPT2-small": data["models"]["gpt2-S"], "GPT2-xl": data["models"]["gpt2-M"]}
    data |= {"scale": "paper", "evaluated": None, "key_model": "GPT2-xl", "memory_model": "GPT2-small", "budget": None}
    made: cfg.Config = parse(cfg.Config, data, "c")
    plain = {"domain": "sklearn", "on": "sklearn", "metric": "token_perplexity", "seed": 0, "n": 9, "memory": None}
    plain |= {"model": "GPT2-small", "alpha": None, "lambda": None}
    records = [
        plain | {"method": "base", "value": 25.0, "low": 24.0, "high": 26.0},
        plain | {"method": "MemDec", "memory": "memdec", "value": 10.0, "low": 9.9, "high": 10.1},
    ]
    found = Sheet(measured(made, "table1"), records).cells()
    assert [
        (of(found, row, "GPT2-small").paper, of(found, row, "GPT2-small").verdict) for row in ("base", "MemDec")
    ] == [
        (24.89, "match"),
        (13.36, "better"),
    ]
    empty = of(found, "LoRA", "GPT2-xl")
    assert (empty.paper, empty.verdict) == (10.67, "not run")
    assert empty.note == "not run: no record of LoRA with GPT2-xl on sklearn among the given folders"
    assert of(found, "base", "Avg").paper is None  # the paper's Table 1 has no mean


def test_a_mean_has_a_printed_value_only_if_it_is_the_papers_mean() -> None:
    paper = cfg.load(cfg.DEFAULT.with_name("paper.yaml"))
    few = paper.study_for("table8").model_copy(update={"evaluated": ["GPT2-small", "GPT2-xl"]})
    for whole, name, row, column, printed in (
        (paper, "table8", 0, "Avg", 18.34),
        (few, "table8", 0, "Avg", None),
        (paper, "table17", -1, "base", 18.34),
        (few.model_copy(update={"memories": paper.study_for("table17").memories}), "table17", -1, "base", None),
        (paper, "table7", 8, "Law", 4.21),
        (paper.study_for("table7").model_copy(update={"evaluated": ["Qwen2.5-7B"]}), "table7", 8, "Law", None),
    ):
        sheet = Sheet(measured(whole, name), [])
        assert sheet.paper(range(len(sheet.numbers))[row], column) == printed
    assert Sheet(measured(few, "table8"), []).paper(0, "GPT2-small") == 24.89


def test_the_nine_tasks_may_be_those_for_small_tokenizers() -> None:
    made = config(suites={"nine": {"tasks": ["memdec_dcpmi_kl"]}})
    tasks = [column.where["task"] for column in measured(made, "table2").measured.values()]
    assert tasks == [name.replace("_kp", "_kl") for name in NINE]


def test_the_gap_of_table_17_and_its_average(tmp_path: Path) -> None:
    made = config(memories={"dapt": {"dapt": True}})
    plain = {"domain": "sklearn", "on": "sklearn", "metric": "token_perplexity", "seed": 0, "task": None, "n": 9}
    values = {"gpt2-S": (20.0, 15.0, 13.0), "gpt2-M": (18.0, 14.0, 12.5)}
    records = [
        plain | {"model": model, "method": method, "memory": memory, "value": value, "alpha": None, "lambda": None}
        for model, three in values.items()
        for (method, memory), value in zip(
            (("base", None), ("MemDec", "dapt"), ("MemDec", "memdec")), three, strict=True
        )
    ]
    grid = tables.grid(Sheet(measured(made, "table17"), records))
    assert grid.rows == [
        ["gpt2-S", "20.00", "15.00", "**13.00**", "2.00"],
        ["gpt2-M", "18.00", "14.00", "**12.50**", "1.50"],
        ["Average", "19.00", "14.50", "**12.75**", "1.75"],
    ]


def test_table_13_reads_the_sizes_of_the_corpora(tmp_path: Path) -> None:
    folders = []
    for number, name in enumerate(("sklearn", "general"), 1):
        with artefact.building(tmp_path / name, "corpus", {"name": name}, {}) as build:
            assert build is not None
            splits = {split: {"bytes": number * 1000, "documents": 7} for split in ("train", "valid", "test")}
            build.facts.update(splits=splits, sha256=name)
        folders.append((name, "", 0, tmp_path / name))
    table = measured(config(), "table13")
    assert [(part.kind, part.domain) for part in table.parts] == [("corpus", "sklearn"), ("corpus", "general")]
    tables.run(table, folders, tmp_path / "table13.csv")
    wide = pd.read_csv(tmp_path / "table13.csv")
    assert list(wide["train"]) == [0.001, 0.002, 0.003]
    assert list(wide["documents"]) == [21, 21, 42]
    assert json.loads((tmp_path / "table13.provenance.json").read_text())["corpora_sha256"]["general"] == "general"

"""What was wrong in comparisons, tables, latency, pages and model cards."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from making import CONTEXT

from memdec import HARNESS_TASKS
from memdec import config as cfg
from memdec.artefacts import markdown
from memdec.errors import IncomparableError
from memdec.harness import alphas
from memdec.harness.models import MemDecInterp
from memdec.inference.token_reports import Guess, Prediction, TokenReport
from memdec.maths import statistics, weighing
from memdec.maths.windows import windows
from memdec.models import cards
from memdec.results import catalogue, compare, evaluate, explain, latency, sweep, tables
from memdec.results.latency import Entry, Timings
from memdec.results.sheet import Sheet
from memdec.settings import EvaluateSettings, LatencySettings
from memdec.tasks.task import Declared
from memdec.text import corpora

REDUCED = cfg.load(Path(__file__).resolve().parents[1] / "regression" / "reduced.yaml")


# --- perplexity of one long document ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(base_folder: Path, small_folder: Path) -> MemDecInterp:
    return MemDecInterp(pretrained=str(base_folder), memory=str(small_folder), alpha=0.0, device="cpu", batch_size=8)


@pytest.fixture(scope="module")
def runs(
    model: MemDecInterp, base_folder: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """`memdec_ppl` by the base, by the memory, and by the memory with another stride, as `--log_samples` writes it."""
    folder = tmp_path_factory.mktemp("runs")
    metadata = {"pretrained": str(base_folder), "corpus": str(corpus_folder)}
    found = {}
    for name, alpha, stride in (("a", 0.0, 16), ("b", 1.0, 16), ("other windows", 1.0, 32)):
        model.set_weight(alpha)
        model.stride = stride
        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
        results = simple_evaluate(
            model=model, tasks=["memdec_ppl"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        assert results is not None
        tracker = EvaluationTracker(output_path=str(folder / name))
        tracker.general_config_tracker.model_name_sanitized = "model"
        samples = results.pop("samples")
        tracker.save_results_aggregated(results, samples)
        tracker.save_results_samples("memdec_ppl", samples["memdec_ppl"])
        found[name] = folder / name
        (folder / name / "table.txt").write_text(make_table(results))
    model.stride = 16
    return found


def test_windows_of_one_document_are_the_items_of_a_comparison(
    runs: dict[str, Path], model: MemDecInterp, corpus_folder: Path
) -> None:
    text = corpora.joined_split(corpus_folder, "test", model.tokenizer.eos_token)
    model.set_weight(0.5)  # so that both models run
    scores = model.token_scores(text, disable_tqdm=True)
    assert scores.memory is not None
    parts = windows(len(scores.base), CONTEXT, 16)
    size = len(parts) // 20  # windows in an item of a short text
    items = [(parts[i].first, parts[i : i + size][-1].end) for i in range(0, len(parts), size)]
    counts = np.array([end - first for first, end in items])
    a, b = (
        np.array([log_p[first:end].sum(dtype=np.float64) for first, end in items])
        for log_p in (scores.base, scores.memory)
    )
    rows = compare.compare(runs["a"], runs["b"]).set_index(["task", "metric"])
    row = rows.loc["memdec_ppl", "token_perplexity"]
    assert (row["n"], row["test"]) == (len(items), "sign flips")
    assert row["a"] == pytest.approx(np.exp(-a.sum() / counts.sum()))
    assert row["p"] == pytest.approx(statistics.sign_flips(a, b))
    # The paired interval, drawn by hand.
    drawn = np.random.default_rng(1).integers(0, len(items), (4000, len(items)))
    value = [np.exp(-each[drawn].sum(1) / counts[drawn].sum(1)) for each in (a, b)]
    ends = np.quantile(value[1] - value[0], [0.025, 0.975])
    assert [row["low"], row["high"]] == pytest.approx(ends, rel=0.1)
    assert [row["a_low"], row["a_high"]] == pytest.approx(np.quantile(value[0], [0.025, 0.975]), rel=0.05)
    for metric in ("word_perplexity", "bits_per_byte"):
        other = rows.loc["memdec_ppl", metric]
        assert (other["n"], other["test"], other["p"]) == (len(items), "sign flips", row["p"])
        assert other["low"] < other["difference"] < other["high"]
    (line,) = [json.loads(line) for line in next(runs["a"].rglob("samples_*.jsonl")).read_text().splitlines()]
    told = line["windows"]
    assert (sum(told["words"]), sum(told["bytes"])) == (len(text.split()), len(text.encode()))
    assert compare.compare(runs["a"], runs["a"])["p"].dropna().eq(1.0).all()


def test_runs_with_other_windows_or_tokens_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    wrong = r"expected one kind of windows for both runs, found context 32 with stride 16 in \S+ and context 32 with stride 32 in"
    with pytest.raises(IncomparableError, match=wrong):
        compare.compare(runs["a"], runs["other windows"])

    def changed(name: str, **new: Any) -> Path:
        (tmp_path / name).mkdir()
        for file in runs["b"].rglob("*_*.json*"):
            (tmp_path / name / file.name).write_text(file.read_text())
        (file,) = (tmp_path / name).glob("samples_*.jsonl")
        line = json.loads(file.read_text())
        line["windows"] |= {key: value for key, value in new.items() if key == "ids"}
        line |= {key: value for key, value in new.items() if key != "ids"}
        file.write_text(json.dumps(line) + "\n")
        return tmp_path / name

    with pytest.raises(
        IncomparableError, match=r"one tokenizer for both runs, found token ids with hash \w{8} in \S+ and"
    ):
        compare.compare(runs["a"], changed("ids", ids="beef"))
    with pytest.raises(
        IncomparableError, match=r"one tokenizer for both runs, found \d+ tokens in \S+ and 9 tokens in"
    ):
        compare.compare(runs["a"], changed("count", token_perplexity=[-5.0, 9]))


def test_a_number_of_tokens_is_neither_good_nor_bad(runs: dict[str, Path]) -> None:
    lines = (runs["a"] / "table.txt").read_text().splitlines()
    cells = {parts[5].strip(): parts[6].strip() for parts in (line.split("|") for line in lines) if len(parts) > 6}
    assert (cells["token_perplexity"], cells["loglikelihood"]) == ("↓", "↑")
    assert cells["tokens"] == ""


def test_no_count_of_any_task_has_an_arrow() -> None:
    listed = [
        each
        for file in sorted(HARNESS_TASKS.rglob("_*.yaml"))
        for each in yaml.load(re.sub(r"!function", "", file.read_text()), yaml.SafeLoader).get("metric_list", [])
    ]
    counts = [each for each in listed if each["metric"] in ("tokens", "windows")]
    assert [each["higher_is_better"] for each in counts] == [None, None]


# --- weights at the end of their grid -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "candidates", "limits", "said"),
    [
        (0.9, [0.4, 0.6, 0.9], (0.0, 1.0), "w: the best of 0.4 to 0.9 is 0.9, the end of the grid; try larger ones"),
        (0.4, [0.9, 0.4, 0.6], (0.0, 1.0), "w: the best of 0.4 to 0.9 is 0.4, the end of the grid; try smaller ones"),
        (0.0, [0.0, 0.5, 1.0], (0.0, 1.0), "w: the best of 0 to 1 is 0, the end of the grid; no mixture is better than the base alone"),
        (64.0, [1, 64], (0.0, np.inf), "w: the best of 1 to 64 is 64, the end of the grid; try larger ones"),
        (0.6, [0.4, 0.6, 0.9], (0.0, 1.0), None),
        (0.6, [0.6], (0.0, 1.0), None),
    ],
)  # fmt: skip
def test_a_weight_at_the_end_of_its_grid(
    chosen: float, candidates: list[float], limits: tuple[float, float], said: str | None
) -> None:
    assert weighing.at_end("w", chosen, candidates, limits) == said


def ends(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "the end of the grid" in record.getMessage()]


def test_tune_and_evaluate_warn_of_it(
    base_folder: Path, small_folder: Path, corpus_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = sweep.tune(str(base_folder), str(small_folder), corpus_folder, alphas=[0.01, 0.99], device="cpu")
    best = next(iter(found))
    assert ends(caplog) == [
        f"warning: made, valid: alpha: the best of 0.01 to 0.99 is {best:g}, the end of the grid; try "
        f"{'smaller' if best < 0.5 else 'larger'} ones"
    ]
    caplog.clear()
    settings = EvaluateSettings(alphas=[0.01, 0.02], resamples=10)
    evaluate.run(
        base_folder, corpus_folder, tmp_path / "e", settings, context=CONTEXT, stride=16, seed=0, memory=small_folder
    )
    (said,) = ends(caplog)
    assert "base on made: alpha: the best of 0.01 to 0.02 is 0.0" in said


def test_alpha_tuned_by_task_warns_of_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(alphas, "TaskSplit", lambda *_: SimpleNamespace(requests=[], value=lambda a: ("ppl", a, False)))
    found = alphas.tuned("some_task", Declared(tune_split="valid"), lambda _, alpha: 5.0 + alpha)  # type: ignore[arg-type,return-value]
    assert found["alpha"] == 0.0
    assert ends(caplog) == [
        "some_task: alpha: the best of 0 to 1 is 0, the end of the grid; no mixture is better than the base alone"
    ]


def test_the_note_of_a_table_names_weights_at_the_end() -> None:
    rows = [record("gpt2-S", "base", 90.0), record("gpt2-S", "MemDec", 60.0, alpha=0.9)]
    note = tables.note(Sheet(catalogue.table3(REDUCED), rows))
    assert "Alpha tuned on valid (chosen: 0.9). Alpha 0.9 is at the end of the grid." in note


# --- latency ------------------------------------------------------------------------------------------------------


def test_the_ratio_is_that_of_the_medians_and_so_is_its_interval() -> None:
    base = np.array([[1.0, 1.0, 1.0, 1.0, 1.0], [3.0, 4.0, 9.0, 5.0, 7.0]])
    own = np.array([[1.0, 1.0, 1.0, 1.0, 1.0], [12.0, 5.0, 9.5, 15.0, 7.5]])
    settings = LatencySettings(prompt_tokens=6, new_tokens=[9], repeats=5, warmup=1, resamples=4000)
    given = {name: Entry(lambda: None) for name in ("base", "own")}
    timings = Timings(["base", "own"], [1, 9], np.stack([base, own]), {}, {"load_average": 1.5, "others_cpu": 0.25})
    rows = {(row["system"], row["phase"]): row for row in latency.records(given, timings, settings)}
    total = rows["own", "total"]
    assert total["ratio_to_base"] == total["seconds"] / rows["base", "total"]["seconds"] == 9.5 / 5
    assert np.median(own[1] / base[1]) == 1.25  # what it was
    drawn = np.random.default_rng(1).integers(0, 5, (4000, 5))
    ratios = np.median(own[1][drawn], 1) / np.median(base[1][drawn], 1)
    assert [total["ratio_low"], total["ratio_high"]] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), rel=0.05)
    where = {"machine": "m", "device": "cpu", "threads": "1"}
    table = pd.DataFrame([row | timings.load | where for row in rows.values()])
    text = latency.markdown(table.astype(dict.fromkeys(("tokens_per_s", "low", "high"), float)))
    head, _, _, line = (
        [cell.strip() for cell in row[1:-1].split("|")] for row in text.splitlines() if row.startswith("|")
    )
    shown = dict(zip(head, line, strict=True))
    assert float(shown["Time, ms"].replace(",", "")) == 9500
    assert shown["Time, ratio to base"] == "1.90"
    assert "Other programs used 25 % of the processors; load average before: 1.5. Measure again" in text


def test_a_measurement_says_how_busy_the_machine_was() -> None:
    load = latency._Load()
    sum(i * i for i in range(300_000))
    found = load.until_now()
    assert set(found) == {"load_average", "others_cpu"}
    assert 0 <= found["others_cpu"] <= 1
    assert found["load_average"] >= 0


# --- tables -------------------------------------------------------------------------------------------------------


def record(model: str, method: str, value: float, **more: Any) -> dict[str, Any]:
    plain = {"domain": "sklearn", "family": "GPT-2", "model": model, "method": method, "on": "sklearn", "seed": 0}
    plain |= {"memory": "memdec" if method == "MemDec" else None, "value": value, "low": value - 1, "high": value + 1}
    return plain | {"n": 100, "alpha": 0.6 if method == "MemDec" else None, "lambda": None} | more


def points(lines: list[str]) -> list[list[int]]:
    """Places of the decimal points of each line."""
    return [[match.start() for match in re.finditer(r"(?<=\d)\.(?=\d)", line)] for line in lines]


def test_decimal_points_stand_below_each_other() -> None:
    rows = [["GPT-2", "s", "**83.63**", "7.77"], ["Qwen2", "longer", "153.94", "131.66"], ["x", "y", "–", "–"]]
    head, rule, *lines = markdown.table(["Family", "Model", "torch", "ratio"], rows, 2).splitlines()
    first, second, nothing = points(lines)
    assert first == second
    assert nothing == []
    assert len({len(line) for line in (head, rule, *lines)}) == 1
    assert rule.split("|")[3].strip().endswith("-:")
    assert markdown.table(["a", "b"], [["x", "1.5"]], 2).splitlines()[1] == "| --- | --- |"  # no numbers


def test_decimal_points_of_a_comparison_stand_below_each_other() -> None:
    row = dict.fromkeys(compare.COLUMNS, np.nan) | {"task": "t", "test": "none", "n": 9}
    values = [("ppl", 46.8123, 36.54, -1.5), ("acc", 0.466666, 0.5, 0.0333), ("tokens", 24931.0, 24931.0, 0.0)]
    frame = pd.DataFrame(
        [
            row | {"metric": name, "a": a, "b": b, "difference": gap, "low": gap, "high": gap}
            for name, a, b, gap in values
        ]
    )
    head, first, second, third = compare.shown(frame).splitlines()
    del head
    assert points([first])[0][:2] == points([second])[0][:1] + points([first])[0][1:2]
    assert "24,931" in third
    assert "e+04" not in third
    assert third.index("24,931") + 6 == points([first])[0][0]


def test_one_column_has_no_average() -> None:
    records = [record("gpt2-S", "base", 90.0), record("gpt2-S", "MemDec", 60.0)]
    for table in (catalogue.table3(REDUCED), catalogue.memories(REDUCED)):
        assert "Avg" not in tables.grid(Sheet(table, records)).header
        assert "Avg" not in tables.wide(Sheet(table, records)).columns
    both = catalogue.table1(REDUCED)  # a column per model, and there are two
    assert tables.grid(Sheet(both, records)).header[-1] == "Avg"


NAMES = [
    'a"b: [x](y)',
    "two\nlines\n---\nx: 1",
    "<script>alert(1)</script>",
    "a|b",
    "__x__ *y* `z`",
    "a\u202eb",
    "&lt;",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are_in_markdown(name: str) -> None:
    text = markdown.table(["a", "b"], [[markdown.escaped(name), "1.00"]], 1)
    assert len(text.splitlines()) == 3
    line = text.splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert not re.search(r"<script|(?<!\\)\]\(|(?<!\\)[*`]|\u202e|(?<!\\)_\w", line)


def test_names_are_shown_as_they_are_in_latex() -> None:
    grid = tables.Grid(["Family", "a_b & 50 %"], 1, [["[x] #1 {y} <z>", "**1.00**"], ["**bold**\n\nname", "–"]])
    lines = tables.latex(grid).splitlines()
    assert r"Family & a\_b \& 50 \% \\" in lines
    assert r"{}[x] \#1 \{y\} \textless{}z\textgreater{} & \textbf{1.00} \\" in lines
    assert r"{}**bold** name & -- \\" in lines


# --- model cards and pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if "/" not in name])
def test_a_card_escapes_names(name: str, tmp_path: Path) -> None:
    facts = {"corpus": f"../../corpora/{name}", "corpus_sha256": "c0ffee"}
    cards.write(tmp_path, kind="memory", facts=facts, settings={"place": name, name: "x"}, inputs={name: "feed"})
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "tags"}
    clean = re.sub(r"\[arXiv 2508.09874\]\(\S+\)|```.*?```|`[^`\n]+`", "", body.replace("\\`", ""), flags=re.DOTALL)
    assert not re.search(r"<script|(?<!\\)\]\(|\u202e|^x: 1", clean, re.MULTILINE)
    rows = [line for line in body.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert len(rows) == 8  # the corpus and its hash, two settings, one input, and three heads
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def report(text: str) -> TokenReport:
    one = Prediction(-1.0, [Guess(7, text, 0.25)])
    return TokenReport(3, 7, text, one, one, one)


def test_a_page_isolates_text_of_both_directions() -> None:
    texts = ["The ", "שלום", " עולם", " reads\u202e", "\u2066<b>x</b>\u2069", "\u200f", "👨\u200d👩"]
    page = explain.page([report(text) for text in texts], {"Base": "a\u202eb<i>"})
    body = page[page.index("<body") :]
    spans = re.findall(r'<span dir="auto" class="(?:more|less)"[^>]*data-i="\d+">(.*?)</span>', body, re.DOTALL)
    assert len(spans) == len(texts)
    assert spans[1:3] == ["שלום", " עולם"]
    assert spans[3:] == [" reads\\u202e", "\\u2066&lt;b&gt;x&lt;/b&gt;\\u2069", "\\u200f", "👨\u200d👩"]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f]", page)
    assert "a\\u202eb&lt;i&gt;" in body
    assert '<div id="text" dir="ltr"' in body
    assert "unicode-bidi: isolate" in page
    assert 'make("bdi"' in page  # what the script writes
    assert '<div id="text" dir="rtl"' in explain.page([report(text) for text in texts[1:]], {})

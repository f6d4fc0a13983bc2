"""`memdec report`: one page that shows what is there, says why the rest is not, and runs and loads nothing of others."""

import base64
import hashlib
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from report_making import (
    cell,
    claim,
    write_benchmark,
    write_csv,
    write_evaluation,
    write_figure,
    write_latency,
    write_table,
    write_training,
)

from memdec import config as cfg
from memdec.errors import ArtifactError, ConfigError
from memdec.results import curves, report

MINI = cfg.load(cfg.DEFAULT).model_copy(update={"studies": {}, "cases": []})
EVIL = "</style><script>alert(1)</script>&\u202e$x$"  # ends the style, runs, turns the text, and is a formula
VOID = {"meta", "input", "br"}


class Parsed(HTMLParser):
    """The elements of a page, checked to be closed in order, with all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute is given twice: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["script"], ["style"]):
            self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """Attributes of the elements with this name and these attributes."""
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def fill(results: Path, name: str = "gpt2-S") -> None:
    """Results of a small run; `name` stands wherever a name of the user does."""
    base = cell(row=f"{name} / base", model=name, method="base", column="torch", unit="perplexity", value=153.936)
    base |= {"domain": "torch"}
    memory = base | {"row": f"{name} / MemDec", "method": "MemDec", "value": 83.628, "low": 79.27, "high": 88.02}
    memory |= {"n": 24931, "seeds": 1, "alpha": "0.6", "p_base": 0.0002, "best_other": "kNN-LM", "p_best": 0.04}
    missing = memory | {"column": name, "value": "", "low": "", "high": "", "note": f"the study has no domain {name}"}
    write_table(
        results, "table3", [base, memory | {"paper": 13.36, "verdict": "off"}, base | {"column": name}, missing]
    )
    labels = {"method": "base", "metric": "acc", "unit": "%", "lower_is_better": "false", "column": "SST2"}
    labels |= {"labels": '{"positive": 100, "negative": 0}', "constant": "true"}
    write_table(results, "table2", [cell(row="base", value=-50.5, **labels)])
    claims = [
        claim(claim="larger", text="Larger is better", verdict="not run", reason=f"no memory of size {name}"),
        claim(claim="lower", text=f"{name} is better", effect=-0.5, low=-0.6, high=-0.4, n=9, verdict="holds"),
    ]
    write_csv(results / "claims.csv", claims)
    scale, plain = results / "mini", re.sub(r"[/\x00]", "_", name)
    write_evaluation(scale / "torch" / "seed0" / "evaluation" / "memdec" / plain, "torch", name, 0.6, 80)
    write_training(scale / "torch" / "seed0" / "memory" / plain, 100)
    write_benchmark(scale, f"train/{plain}", 16.1, 12.5, 300.5)
    write_benchmark(scale, "table3", 0.5, 0.4, 100)


def made(results: Path) -> str:
    report.run(MINI, [Path("config/mini.yaml")], results, results / "report.html")
    return (results / "report.html").read_text(encoding="utf-8")


def test_a_table_that_no_study_lists_is_of_an_earlier_config(tmp_path: Path) -> None:
    fill(tmp_path / "results")
    page = report.page(cfg.load(cfg.DEFAULT).model_copy(update={"cases": []}), [], tmp_path / "results")
    assert "83.63" in page
    study = cfg.load(cfg.DEFAULT).studies["parts"]
    other = MINI.model_copy(update={"studies": {"parts": study}})
    page = report.page(other, [], tmp_path / "results")
    assert "table3" not in study.tables
    assert "83.63" not in page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = tmp_path_factory.mktemp("run") / "results"
    fill(results)
    write_latency(results / "mini" / "latency" / "gpt2-S")
    write_figure(results, "figure4")
    return made(results)


def test_claims_and_values_with_all_that_is_known_about_them(page: str) -> None:
    text = " ".join(Parsed(page).text.split())
    assert "1 holds" in text
    assert "1 not run" in text
    assert "0 fails" in text
    assert text.index("gpt2-S is better") < text.index("Larger is better")  # what was not run comes last
    assert "−0.5 [−0.6, −0.4]" in text
    assert "no memory of size gpt2-S" in text
    for known in ("83.63", "79.27 to 88.02", "24,931", "p < 0.001", "Against kNN-LMp = 0.040", "paper 13.36 off"):
        assert known in text
    assert "the study has no domain gpt2-S" in text
    assert "−50.50" in text
    assert "constant" in text
    assert "positive: 100, negative: 0" in text
    assert "3 of 4 cells were run" in text
    assert "Acc (%), higher is better." in text
    assert "Perplexity, lower is better." in text
    best = re.findall(r'class="v best"[^>]*>([\d.]+)<', page)
    assert best == ["83.63"]  # a value alone is not the best of several


def test_claims_are_sorted_by_their_verdict(tmp_path: Path) -> None:
    verdicts = ["holds", "not run", "undecided", "fails", "holds"]
    write_csv(tmp_path / "claims.csv", [claim(claim=f"c{i}", verdict=word) for i, word in enumerate(verdicts)])
    ranks = re.findall(r'<td data-v="([^"]*)"><span class="badge ([a-z-]+)"', made(tmp_path))
    assert ranks == [("2", "holds"), ("1", "undecided"), ("0", "fails"), ("2", "holds"), ("", "not-run")]


def test_curves_latency_cost_and_origin(page: str) -> None:
    parsed = Parsed(page)
    text = " ".join(parsed.text.split())
    for title in ("gpt2-S, torch", "Memories: torch", "latency/gpt2-S: 60 new tokens after 64"):
        assert title in text
    assert "train116.112.516.1300" in text.replace(" ", "")  # 1 job, 16.1 s, 12.5 s, longest 16.1 s, 300 MB
    assert "Allrules216.612.916.1300" in text.replace(" ", "")
    assert "53e71fcbbe5c" in text
    assert "2.13.0+cpu" in text
    assert "e9608c0f998d5499fb5adca6a9e714cb" in text
    assert "snakemake --cores 8 --configfile config/mini.yaml --" in text


def test_every_axis_has_a_name_and_a_unit(page: str) -> None:
    titles = [
        re.findall(r"<text[^>]*>([^<]*[a-z][^<]*)</text>", svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)
    ]
    drawn = [title for title in titles if title]  # the figure of latency has its text as shapes
    assert [each[-2:] for each in drawn[1:]] == [
        ["Alpha (weight of the memory, no unit)", "Perplexity per token, valid text"],
        ["Updates (number)", "Loss (nats per token)"],
    ]
    assert "Perplexity, lower is better" in drawn[0]


def test_the_page_is_one_file_that_loads_nothing(page: str) -> None:
    parsed = Parsed(page)
    assert not re.search(r"(?:src|href|action|data)=[\"'](?!#)", page)
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    assert not {tag for tag, _ in parsed.elements} & {"link", "img", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, found in parsed.elements for name in found if name.startswith("on")]
    (policy,) = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["content"] == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert len(page.encode()) < 3_000_000


def test_links_labels_and_ids_fit(page: str) -> None:
    parsed = Parsed(page)
    ids = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for _, found in parsed.elements:
        for name in ("href", "popovertarget"):
            assert name not in found or str(found[name]).removeprefix("#") in ids
    assert {f"#{each}" for each in re.findall(r"url\(#([^)]*)\)", page)} <= {f"#{each}" for each in ids}
    assert all(region["aria-label"] for region in parsed.all("div", tabindex="0"))
    assert parsed.elements[[tag for tag, _ in parsed.elements].index("body") + 1][1]["class"] == "skip"


def test_the_script_only_sorts_and_filters() -> None:
    script = resources.files("memdec.results").joinpath("report.js").read_text(encoding="utf-8")
    assert len(script.splitlines()) < 120
    assert not re.search(r"fetch|XMLHttp|innerHTML|eval|import|localStorage|cookie|http", script)


def test_names_are_text(tmp_path: Path) -> None:
    fill(tmp_path, EVIL)
    page = made(tmp_path)
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert "\u202e" not in page
    assert "\\u202e" in parsed.text
    shown = EVIL.replace("\u202e", "\\u202e")
    assert f"{shown} is better" in parsed.text
    assert f"the study has no domain {shown}" in parsed.text
    assert parsed.text.count("<script>alert(1)<") >= 10  # in tables, charts, legends, hashes and commands


def test_what_is_not_there_says_why(tmp_path: Path) -> None:
    text = " ".join(Parsed(made(tmp_path)).text.split())
    for what in (
        "Claims not run",
        "Table 3make it with",
        "Figure 2 not run",
        "Curves of alpha not run",
        "Latency not run",
    ):
        assert what in text
    assert "Cost not run: this run has no benchmark files" in text
    assert "Table 6expected marked words in 'cases' of the config, found none" in text
    assert f"snakemake --cores 8 --configfile config/mini.yaml -- {tmp_path}/table3.csv" in text


def test_a_table_without_a_value_names_each_reason_once(tmp_path: Path) -> None:
    notes = ["no study has NQ", "no study has HotpotQA", "no study has NQ"]
    write_table(tmp_path, "table5", [cell(row=f"r{i}", column="NQ", note=note) for i, note in enumerate(notes)])
    assert "Table 5no study has NQ; no study has HotpotQA" in " ".join(Parsed(made(tmp_path)).text.split())


def section(page: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}">(.*?)</section>', page, re.S)
    return str(found)


def test_each_column_is_there_once_and_says_what_all_its_rows_measure(tmp_path: Path) -> None:
    for_17 = {"unit": "perplexity", "column": "base", "value": 3}
    gap = {"metric": "", "unit": "perplexity", "lower_is_better": "", "column": "gap", "value": 1}
    rows = [{"row": "a", "model": "a"}, {"row": "Average"}]
    lines = [for_17 | rows[0], gap | rows[0], for_17 | rows[1] | {"metric": ""}, gap | rows[1]]
    write_table(tmp_path, "table17", [cell(**line) for line in lines])
    of_18 = {"unit": "percent", "lower_is_better": "false", "column": "shot_0", "value": 3}
    write_table(tmp_path, "table18", [cell(row=name, metric=f"{name}_f1", **of_18) for name in ("micro", "macro")])
    page = made(tmp_path)
    heads = re.findall(r'<th scope="col">(.*?)</th>', section(page, "table17"))
    assert heads == ["base <small>perplexity, lower is better</small>", "gap <small>perplexity</small>"]
    assert re.findall(r'<th scope="col">(.*?)</th>', section(page, "table18")) == ["shot_0"]
    assert "Percent, higher is better." in section(page, "table18")
    assert '<td data-v=""></td>' not in page


def test_the_best_value_is_that_of_its_group_in_rows_and_columns(tmp_path: Path) -> None:
    systems = [
        cell(row=model, model=model, domain="torch", unit="perplexity", column=column, value=value)
        for model, values in {"a": (9, 5), "b": (4, 3)}.items()
        for column, value in zip(("base", "+ MemDec"), values, strict=True)
    ]
    write_table(tmp_path, "table17", systems)
    word = {"unit": "percent", "lower_is_better": "", "metric": "probability", "model": "a", "domain": "torch"}
    words = [("one", "kNN", 7), ("one", "BaseLM", 8), ("two", "kNN", 2), ("two", "BaseLM", 1)]
    write_table(tmp_path, "table6", [cell(row=row, column=column, value=n, **word) for row, column, n in words])
    texts = [("base", "x", 4), ("MemDec", "x", 3), ("base", "y", 40), ("MemDec", "y", 50)]
    text = {"model": "a", "domain": "torch", "unit": "perplexity"}
    write_table(tmp_path, "forgetting", [cell(row=r, column=f"torch on {on}", value=n, **text) for r, on, n in texts])
    page = made(tmp_path)
    best = [re.findall(r'class="v best"[^>]*>([\d.]+)<', section(page, name)) for name in ("table17", "table6")]
    assert best == [["5.00", "3.00"], ["8.00", "2.00"]]
    assert re.findall(r'class="v best"[^>]*>([\d.]+)<', section(page, "forgetting")) == ["40.00", "3.00"]


# --- bad input ------------------------------------------------------------------------------------------------------


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(results: Path) -> None:
        text = (results / name).read_text()
        assert old in text
        (results / name).write_text(text.replace(old, new, 1))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            replaced("claims.csv", "-0.5,", "nan,"),
            r"claims.csv: line 3: effect: expected a finite number, found 'nan'; delete",
        ),
        (replaced("claims.csv", "holds", "true"), r"claims.csv: line 3: expected a verdict of holds, .*, found 'true'"),
        (replaced("claims.csv", ",effect,", ",size,"), r"claims.csv: expected the column effect, found claim, text"),
        (
            replaced("table3.cells.csv", "83.628", "inf"),
            r"table3.cells.csv, line 3: expected a cell, found value: .*finite",
        ),
        (
            replaced("table3.provenance.json", '"mini"', '"paper"'),
            r"expected a table of scale mini, found scale paper; give",
        ),
        (
            lambda results: (results / "table3.provenance.json").unlink(),
            r"table3.provenance.json: expected JSON beside its",
        ),
        (
            lambda results: (results / "figure2.svg").write_text("<svg"),
            r"figure2.svg: expected SVG, found: .*; delete it",
        ),
        (
            lambda results: (results / "figure2.svg").write_text("<a/>"),
            r"figure2.svg: expected SVG, found <a>; delete it",
        ),
        (
            replaced("mini/benchmarks/train/gpt2-S.tsv", "max_rss", "rss"),
            r"gpt2-S.tsv: expected a benchmark file of Snake",
        ),
        (
            replaced("mini/torch/seed0/evaluation/memdec/gpt2-S/records.json", "0.6", "0.7"),
            r"expected the content that was",
        ),
    ],
)
def test_bad_input_is_one_line_with_the_file_and_the_next_step(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    fill(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message) as error:
        made(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder with results, found none; make one with snakemake"):
        made(tmp_path / "nothing")


# --- SVG ------------------------------------------------------------------------------------------------------------

FOREIGN = """<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://example.org/x.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" viewBox="0 0 72 36" onload="a()">
<style>*{display:none}</style><script>alert(1)</script><foreignObject><p xmlns="http://www.w3.org/1999/xhtml">x</p></foreignObject>
<defs><pattern id="h1"><path d="M 1 1"/></pattern><clipPath id="p1"><rect width="1.23456" height="9"/></clipPath></defs>
<g id="unused" transform="scale(0.015625)" onclick="a()"><path d="M 0 0" style="fill: #0072b2; stroke: #000000" clip-path="url(#p1)"/></g>
<use xlink:href="#p1"/><use xlink:href="http://example.org/#p1"/><a href="http://example.org"><text>linked</text></a>
<rect style="fill: url(http://example.org/x)"/><rect style="fill: url(#h1)"/><text style="font: 9px 'DejaVu Sans', sans-serif; fill: #e4e4e4">a &lt; b</text></svg>"""


def test_an_svg_becomes_part_of_the_page() -> None:
    svg = curves.adaptive(FOREIGN, "f", "f.svg")
    assert not re.search(r"script|foreign|onload|onclick|http|<style|xmlns|linked|unused", svg)
    assert 'clip-path="url(#f-p1)"' in svg
    assert 'id="f-p1"' in svg
    assert 'href="#f-p1"' in svg
    assert "fill: var(--c1); stroke: currentColor" in svg
    assert "font-size: 9px; fill: var(--grid)" in svg
    assert "a &lt; b" in svg
    assert 'pattern id="f-h1"' in svg
    assert "fill: url(#f-h1)" in svg
    assert "scale(0.015625)" in svg
    assert 'width="1.23"' in svg
    assert 'viewBox="0 0 72 36"' in svg
    assert "width:96px" in svg


def test_more_lines_than_colours_go_to_a_second_chart(tmp_path: Path) -> None:
    for number in range(9):
        write_training(tmp_path / "mini" / "torch" / "seed0" / "memory" / f"m{number}", 10)
    charts = re.findall(r"Memories: torch</b></figcaption>.*?</ul>", made(tmp_path), re.S)
    assert [chart.count("<li>") for chart in charts] == [7, 2]


def test_a_record_with_nan(tmp_path: Path) -> None:
    write_evaluation(
        tmp_path / "mini" / "torch" / "seed0" / "evaluation" / "memdec" / "gpt2-S", "torch", "m", 0.6, math.nan
    )
    with pytest.raises(ArtifactError, match=r"records.json: expected finite perplexities in valid_sweep, found .*nan"):
        made(tmp_path)


def test_seeds_share_a_chart_and_a_legend(tmp_path: Path) -> None:
    for seed in (0, 1):
        home = tmp_path / "mini" / "parts" / "torch" / f"seed{seed}"
        write_evaluation(home / "evaluation" / "memdec" / "gpt2-S", "torch", "memdec", 0.6, 80 + seed)
    page = made(tmp_path)
    (chart,) = re.findall(r"memdec, torch \(parts/torch\)</b></figcaption>.*?</details>", page, re.S)
    assert chart.count("<li>") == 1
    assert chart.count("gpt2-S, seed0") == chart.count("gpt2-S, seed1") == 5

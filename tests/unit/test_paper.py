"""The printed numbers: all of them are there, and the verdict on a number beside them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.results import paper
from memdec.results.paper import Printed, verdict

TABLES = [f"table{n}" for n in range(1, 20)]
FIGURES = ["figure2", "figure4", "figure5", "figure6"]
REFERENCE = Path(os.environ.get("MEMDEC_TEST_DATA", "/none")).parent / "reference" / "paper.yaml"
# Lines of a file and its values that are not printed; counted by hand from the paper's tables.
COUNTS = {
    "table1": (26, 0), "table2": (60, 10), "table3": (132, 16), "table4": (72, 8), "table6": (12, 0), "table7": (19, 0),
    "table8": (28, 0), "table10": (4, 0), "table11": (9, 0), "table13": (5, 0), "table19": (12, 0), "figure4": (5, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_every_table_has_its_numbers(name: str) -> None:
    lines = paper.table(name)
    assert (len(lines), int((lines["value"] == "").sum())) == COUNTS[name]


@pytest.mark.parametrize("name", [*TABLES, *FIGURES, "abstract"])
def test_every_line_is_complete(name: str) -> None:
    lines = paper.table(name)
    assert len(lines)
    assert set(lines["table"]) == {name}
    assert not lines.duplicated(["version", *paper.labels(name), "column", "value", "source"]).any()
    for line in lines.to_dict("records"):
        assert set(line["version"].split()) <= set(paper.VERSIONS), line
        assert line["unit"], line
        assert line["source"], line
        assert line["lower_is_better"] in ("true", "false", ""), line
        assert float(line["value"]) >= -100 if line["value"] else line["note"], line


def test_versions_that_disagree_all_count() -> None:
    found = paper.printed("table1", {"method": "DAPT"}, "GPT2-small")
    assert {(each.value, each.versions, each.source) for each in found} == {
        (15.74, ("v1",), "v1 Table 1"),
        (15.47, ("v1",), "v1 Table 8"),
        (14.76, ("v2", "camera-ready"), "v2 and camera-ready Table 1"),
    }
    assert {each.value for each in paper.printed("table8", {"method": "DAPT"}, "Avg")} == {12.38, 12.2}
    one = paper.printed("table3", {"model": "Qwen2.5-7B", "method": "MemDec"}, "Bio")
    assert [(each.value, each.versions) for each in one] == [(3.57, ("v1", "v2", "camera-ready"))]
    assert one[0].step == pytest.approx(0.01)


def test_a_cell_without_a_number_says_why() -> None:
    (found,) = paper.printed("table3", {"model": "Qwen2-72B", "method": "LoRA"}, "Bio")
    assert found.value is None
    assert "above 7B" in found.note
    assert paper.printed("table3", {"model": "Qwen2-72B", "method": "DAPT"}, "Bio") == []
    assert paper.printed("memories", {"model": "gpt2-S"}, "torch") == []


def test_labels_must_be_those_of_one_row() -> None:
    with pytest.raises(ConfigError, match=r"table1: expected row labels among method, found model; leave it out"):
        paper.printed("table1", {"model": "GPT2-small"}, "GPT2-small")
    with pytest.raises(ConfigError, match=r"table3: expected the labels of one row, found \{'method': 'MemDec'\}"):
        paper.printed("table3", {"method": "MemDec"}, "Bio")


def test_numbers_of_the_versions() -> None:
    assert [paper.number("table8", version) for version in paper.VERSIONS] == [8, 6, 6]
    assert [paper.number("table17", version) for version in paper.VERSIONS] == [17, 7, 7]
    assert [paper.number("table9", version) for version in paper.VERSIONS] == [9, None, None]
    of_v2 = sorted(n for table in TABLES if (n := paper.number(table, "v2")) is not None)
    assert of_v2 == list(range(1, 12))  # v2 has eleven tables
    with pytest.raises(ConfigError, match="found table20 and v2"):
        paper.number("table20", "v2")


def test_without_a_checkout_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paper, "FOLDER", tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"gone: expected the printed numbers of the paper.*use a checkout"):
        paper.table.__wrapped__("table1")


# --- against the collected facts ----------------------------------------------------------------------------------


def numbers(table: dict[str, Any]) -> Iterator[tuple[set[str], str, float | None]]:
    """Every number of a table of paper.yaml: the texts of its row, its column, the value."""
    for row in table["rows"]:
        texts = {str(value) for value in row.values() if isinstance(value, str)}
        yield from ((texts, key, value) for key, value in row.items() if not isinstance(value, str))
    for each in table.get("variants", []):
        for version in ("arxiv_v1", "arxiv_v2", "neurips_camera_ready"):
            if "column" in each and version in each:
                yield {each["method"]}, each["column"], each[version]


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"no {REFERENCE}: set MEMDEC_TEST_DATA to the shared data folder")
def test_every_number_of_the_collected_facts_is_there() -> None:
    facts, seen = yaml.safe_load(REFERENCE.read_text(encoding="utf-8")), 0
    for name in TABLES:
        table, lines = facts[name.replace("table", "table_")], paper.table(name)
        for version, number in zip(("arxiv_v1", "arxiv_v2", "neurips_camera_ready"), paper.VERSIONS, strict=True):
            assert paper.number(name, number) == table["numbering"][version]
        is_label = set(paper.labels(name))
        there = [
            ({line[label] for label in is_label}, line["column"], float(line["value"]) if line["value"] else None)
            for line in lines.to_dict("records")
        ]
        for texts, column, value in numbers(table):
            seen += 1
            if column in is_label:  # Table 7: the alpha of a row
                assert any(f"{value:g}" in row for row, *_ in there), (name, column, value)
                continue
            assert any(
                texts - row <= {"none", "parametric", "non-parametric"} and (column, value) == (other, number)
                for row, other, number in there
            ), (name, texts, column, value)
    for name in ("figure_2", "figure_4", "figure_5", "figure_6"):
        known = {float(text) for text in paper.table(name.replace("_", ""))["value"] if text}
        for value in figures(facts["figures"][name]):
            seen += 1
            assert value in known, (name, value)
    assert seen >= 500


def figures(fact: Any) -> Iterator[float]:
    """Every number in the facts of a figure."""
    if isinstance(fact, dict):
        for key, value in fact.items():
            yield from () if key in ("source", "note", "what") else figures(value)
    elif isinstance(fact, list):
        for value in fact:
            yield from figures(value)
    elif isinstance(fact, int | float) and not isinstance(fact, bool):
        yield float(fact)


# --- verdicts -----------------------------------------------------------------------------------------------------


def of(value: float | None, version: str = "v1") -> Printed:
    return Printed(value, (version,), 0.01, "perplexity", f"{version} Table 1", "" if value else "not printed")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (15.0, "match"),
        (15.16, "match"),  # the rounding 0.01 and 1 %
        (14.84, "match"),
        (15.17, "near"),  # its interval begins 0.5 lower
        (15.66, "near"),
        (15.67, "off"),
        (14.34, "near"),
        (14.33, "better"),
        (30.0, "off"),
        (None, "not run"),
    ],
)
def test_the_verdict_is_rounding_and_one_percent_and_the_interval(value: float | None, word: str) -> None:
    interval = (None, None) if value is None else (value - 0.5, value + 0.5)
    found = verdict(value, *interval, [of(15.0)], lower_is_better=True)
    assert found.word == word
    assert value is None or "v1 Table 1 prints 15" in found.why


def test_better_follows_the_direction_of_the_metric() -> None:
    words = [verdict(20.0, 19.9, 20.1, [of(15.0)], lower_is_better=each).word for each in (True, False, None)]
    assert words == ["off", "better", "off"]


def test_any_version_can_match_and_is_named() -> None:
    several = [of(15.74), of(15.47), of(14.76, "v2")]
    for value, version in ((15.8, "v1"), (14.7, "v2")):
        found = verdict(value, None, None, several, lower_is_better=True)
        assert found.word == "match"
        assert f"{version} Table 1" in found.why
    between = verdict(15.1, None, None, several, lower_is_better=True)  # nearest to 14.76, which is better
    assert between.word == "off"
    assert "14.76" in between.why


def test_nothing_is_said_where_nothing_is_printed() -> None:
    assert verdict(3.0, 2.9, 3.1, [of(None)], lower_is_better=True) == ("", "not printed")
    assert verdict(3.0, 2.9, 3.1, [], lower_is_better=True) == ("", "the paper has no such cell")
    assert verdict(None, None, None, [], lower_is_better=True).word == "not run"


def test_nan_has_no_verdict() -> None:
    with pytest.raises(NumericsError, match="expected finite numbers, found nan"):
        verdict(float("nan"), None, None, [of(15.0)], lower_is_better=True)


def test_a_printed_number_matches_itself_in_every_table() -> None:
    frame = pd.concat([paper.table(name) for name in TABLES])
    for line in frame[frame["value"] != ""].to_dict("records"):
        direction = {"true": True, "false": False, "": None}[line["lower_is_better"]]
        one = Printed(float(line["value"]), (), 0.01, line["unit"], line["source"], "")
        assert verdict(one.value, None, None, [one], direction).word == "match"

"""Files of rows: what is read as it is, and what is named as wrong."""

from pathlib import Path

import pytest

from memdec.errors import CorpusError
from memdec.tasks import rows
from memdec.tasks.rows import HubRows


def test_blank_lines_at_the_end_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "x\\u2028y"}\r\n{"a": "z\xe2\x80\xa8"}\n\n  \n')
    assert rows.read_lines(file) == [{"a": "x\u2028y"}, {"a": "z\u2028"}]
    file.write_text("\n")
    assert rows.read_lines(file) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": 2}\n', "row 1: expected a JSON object on one line, found an empty line; check the file"),
        ('{"a": 1}\n{"a": ', r"row 1: expected a JSON object on one line, found '\{\"a\": ' \(Expecting value"),
        ('[{"a": 1}]\n', r"row 0: expected a JSON object on one line, found \[\{'a': 1\}\]; check"),
    ],
)
def test_lines_that_are_no_rows_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(CorpusError, match=rf"a\.jsonl, {message}"):
        rows.read_lines(tmp_path / "a.jsonl")


def test_where_nothing_is_found_the_file_that_would_do_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(
        CorpusError,
        match=r"t: expected rows in MEMDEC_DATA/t/test\.jsonl or on the Hub, found neither; no/set test at 0+: .*memdec data fetch",
    ):
        rows.load("t", "t/test.jsonl", HubRows("no/set", None, "test", "0" * 40))


def test_a_field_has_one_type_and_missing_values_are_left_to_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"a": null, "b": [1]}\n{"a": 1, "b": []}\n{"b": null}\n')
    assert rows.load("t", "a.jsonl").rows["a"] == [None, 1, None]
    (tmp_path / "a.jsonl").write_text('{"a": null}\n{"a": 1}\n{"a": true}\n')
    with pytest.raises(
        CorpusError, match=r"a\.jsonl, row 2: expected 'a' of one type in all rows, found True here and 1 in row 1"
    ):
        rows.load("t", "a.jsonl")


@pytest.mark.parametrize(("n_rows", "limit"), [(10, 3), (1066, 200), (7, 6), (5, 1)])
def test_a_limit_takes_one_row_of_each_stretch(n_rows: int, limit: int) -> None:
    found = rows.spread(n_rows, limit)
    assert len(found) == limit
    assert all(place * n_rows // limit <= number < (place + 1) * n_rows // limit for place, number in enumerate(found))
    assert found == rows.spread(n_rows, limit)


def test_a_limit_is_in_no_step_with_the_rows() -> None:
    """Every n-th row of a file in which labels take turns would have one label."""
    assert 35 < sum(number % 2 for number in rows.spread(800, 100)) < 65


@pytest.mark.parametrize("limit", [None, 4, 5])
def test_without_a_limit_or_within_it_all_rows_are_read(limit: int | None) -> None:
    assert rows.spread(4, limit) == [0, 1, 2, 3]

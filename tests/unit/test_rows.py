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

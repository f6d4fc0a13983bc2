"""Files of GitHub from a server of our own in their true forms: what is read, fetched, resumed and refused."""

import csv
import io
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memdec.errors import CorpusError
from memdec.tasks import dcpmi_rows, fetch, github, qa, rows, verbalizers
from memdec.tasks.files import FILES, DataFile
from memdec.tasks.github import GitHubFile

COMMIT = "a" * 40
SST = "__label__4\tGood\u2028fun .\n__label__3\tIt is .\r\n__label__1\tBad Næs .\n"
MR = 'label,text\n0,"dull , and "" flat ""."\n1, . . . so good\n1,"two\nlines"\n'
CR = '{"label": "1", "text": "a\\u2028b"}\n{"label": "0", "text": "no"}\n'
HYP = '{"": "0", "text": "x", "id": "0", "label": "1"}\n'
NQ = '{"question": "who", "answer": ["yes"]}\n{"question": "why", "answer": ["9"]}\n'
WORDS = "bad,poor\ngood, fine,nice\n"


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (github.sst_lines, SST, [{"row": 0, "label": 4, "text": "Good\u2028fun ."}, {"row": 2, "label": 1, "text": "Bad Næs ."}]),
        (github.csv_records, MR, [
            {"row": 0, "label": 0, "text": 'dull , and " flat ".'},
            {"row": 1, "label": 1, "text": " . . . so good"},
            {"row": 2, "label": 1, "text": "two\nlines"},
        ]),
        (github.csv_records, "Class Index,Title,Description\n3,A,12\n", [{"row": 0, "Class Index": 3, "Title": "A", "Description": "12"}]),
        (github.json_lines, CR, [{"row": 0, "label": 1, "text": "a\u2028b"}, {"row": 1, "label": 0, "text": "no"}]),
        (github.json_lines, HYP, [{"row": 0, "text": "x", "id": "0", "label": 1}]),
        (github.json_lines, '{"label": "neutral"}', [{"row": 0, "label": "neutral"}]),
        (github.json_lines, NQ, [
            {"row": 0, "question": "who", "answer": ["yes"]},
            {"row": 1, "question": "why", "answer": ["9"]},
        ]),
        (github.word_lines("no", "yes"), WORDS, [{"name": "no", "words": ["bad", "poor"]}, {"name": "yes", "words": ["good", "fine"]}]),
        (github.word_object, '{"A & B": ["x"], "C": ["y", "z"]}', [{"name": "A & B", "words": ["x"]}, {"name": "C", "words": ["y", "z"]}]),
    ],
)  # fmt: skip
def test_parsers(parse: github.Parser, text: str, expected: list[dict[str, Any]]) -> None:
    assert parse(text) == expected


@dataclass
class Served:
    """What the server has by path, and what was asked of it. A number is a status; a list is served in turn."""

    files: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def put(self, file: DataFile, content: Any) -> None:
        assert isinstance(file.origin, GitHubFile)
        self.files[f"/{file.origin.repository}/{file.origin.revision}/{file.origin.path}"] = content


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    state = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            found = state.files.get(self.path, 404)
            found = found.pop(0) if isinstance(found, list) else found
            body, announced = (
                (b"", 0) if isinstance(found, int) else found if isinstance(found, tuple) else (found, None)
            )
            self.send_response(found if isinstance(found, int) else 200)
            self.send_header("Content-Length", str(len(body) if announced is None else announced))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(github, "RAW", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(github, "PAUSE_S", 0.0)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield state
        server.shutdown()
        thread.join()


def made(file: str, text: str, parse: github.Parser, columns: tuple[str, ...]) -> DataFile:
    """Registry entry of a small file, with the hash of its rows."""
    found = parse(text)
    plain = DataFile(file, len(found), columns, GitHubFile("some/repo", COMMIT, f"data/{file} x", parse))
    return replace(plain, sha256=fetch.content(plain, found))


@pytest.fixture
def small(served: Served, monkeypatch: pytest.MonkeyPatch) -> dict[str, DataFile]:
    """Three files on the server, in the registry."""
    labelled = ("text", "label")
    texts = {"sst2/test.jsonl": SST, "mr/test.jsonl": MR, "nq/validation.jsonl": NQ}
    registry = {
        "sst2": made("sst2/test.jsonl", SST, github.sst_lines, labelled),
        "mr": made("mr/test.jsonl", MR, github.csv_records, labelled),
        "nq": made("nq/validation.jsonl", NQ, github.json_lines, ("question", "answer")),
    }
    for each in registry.values():
        served.files[f"/some/repo/{COMMIT}/data/{each.file}%20x"] = texts[each.file].encode()
    monkeypatch.setattr(fetch, "FILES", (*registry.values(), DataFile("mr/validation.jsonl", None, labelled)))
    return registry


def test_fetched_once_with_origin_commit_and_path(
    small: dict[str, DataFile], served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fetch.fetch(tmp_path)
    assert [(each.rows, each.status, each.commit) for each in found] == [(2, "ok", COMMIT), (3, "ok", COMMIT), (2, "ok", COMMIT)]  # fmt: skip
    assert len(served.asked) == 3
    entries = json.loads((tmp_path / fetch.SOURCES).read_text())
    entry = entries["mr/test.jsonl"]
    assert (entry["origin"], entry["path"], entry["revision"], entry["rows"]) == (
        "github.com/some/repo", "data/mr/test.jsonl x", COMMIT, 3,
    )  # fmt: skip
    fetch.fetch(tmp_path)
    assert len(served.asked) == 3
    file = tmp_path / "mr/test.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    fetch.fetch(tmp_path, ["mr"])
    assert (file.read_bytes(), len(served.asked)) == (whole, 4)
    assert fetch.shown(fetch.verify(tmp_path, ["mr"])).splitlines()[1].split()[-3:] == ["GitHub", "aaaaaaa", "ok"]
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    assert dcpmi_rows.load_rows(set="sst2", paper_rows=2)["test"].rows["gold"] == [1, 0]
    assert qa.load_nq()["validation"].rows["answers"] == [["yes"], ["9"]]


@pytest.mark.parametrize(
    ("content", "message", "asked"),
    [
        (404, r"github\.com/some/repo data/mr/test\.jsonl x at a{40}: expected the file from GitHub, found: HTTP Error 404", 1),
        (500, "expected the file from GitHub, found: HTTP Error 500", 3),
        ((MR.encode()[:30], len(MR)), "found: IncompleteRead", 3),
        (MR.encode()[:-4], "expected the known format of this file, found: unexpected end of data", 1),
        (b"label,text\n0,\xff\n", "expected the known format of this file, found: 'utf-8'", 1),
        (MR.encode().replace(b"label", b"lable"), "rows of mr/test.jsonl, found: row 0: no 'label'", 1),
        (b"label,text\n0,x\n", "rows of mr/test.jsonl, found: other number of rows", 1),
        (MR.encode().replace(b"dull", b"Dull"), "rows of mr/test.jsonl, found: other rows; put the file there by hand", 1),
        (MR.encode().replace(b"\n1, .", b"\n0, ."), "found: other rows;", 1),
        (MR.encode().replace(b"\n1, .", b"\n7, ."), "found: other rows: row 1: 'label' 7", 1),
        (b"<html>", "found: row|found: other", 1),
    ],
)  # fmt: skip
def test_what_is_not_right_is_not_written(
    content: Any, message: str, asked: int, small: dict[str, DataFile], served: Served, tmp_path: Path
) -> None:
    served.files[f"/some/repo/{COMMIT}/data/mr/test.jsonl%20x"] = content
    with pytest.raises(CorpusError, match=message):
        fetch.fetch(tmp_path, ["sst2", "mr"])
    assert len(served.asked) == 1 + asked
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sources.json", "test.jsonl"]
    assert list(json.loads((tmp_path / fetch.SOURCES).read_text())) == ["sst2/test.jsonl"]


def test_a_second_try_and_no_server(
    small: dict[str, DataFile], served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.files[f"/some/repo/{COMMIT}/data/mr/test.jsonl%20x"] = [503, (b"label", 99), MR.encode()]
    assert fetch.fetch(tmp_path, ["mr"])[0].status == "ok"
    assert len(served.asked) == 3
    monkeypatch.setattr(github, "RAW", "http://127.0.0.1:9")
    with pytest.raises(CorpusError, match=r"expected the file from GitHub, found: .*refused.*check the network"):
        fetch.fetch(tmp_path, ["sst2"])


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (github.sst_lines, "__label__6\tx\n"),
        (github.sst_lines, "4\tx\n"),
        (github.json_lines, '{"a": 1}\n[2]\n'),
        (github.word_lines("a", "b"), "x,y\n"),
        (github.word_object, '["x"]'),
    ],
)
def test_another_form_names_the_file(parse: github.Parser, text: str, served: Served) -> None:
    file = GitHubFile("some/repo", COMMIT, "f", parse)
    served.files[f"/some/repo/{COMMIT}/f"] = text.encode()
    with pytest.raises(CorpusError, match=r"github\.com/some/repo f at a{40}: expected the known format of this file"):
        github.github_rows(file)


def test_own_files_are_checked_for_the_same_rows(small: dict[str, DataFile], tmp_path: Path) -> None:
    file = tmp_path / "mr/test.jsonl"
    file.parent.mkdir()
    plain = [{"text": row["text"], "label": row["label"], "gold": None} for row in github.csv_records(MR)]

    def status(changed: list[dict[str, Any]]) -> str:
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
        return fetch.verify(tmp_path, ["mr"])[0].status

    assert status(plain) == "ok"
    assert status([*plain[1:], plain[0]]) == "other rows"
    assert status([plain[0] | {"gold": 1}, *plain[1:]]) == "other rows: row 0: 'label' 0, gold 1"
    assert status([plain[0] | {"label": [0]}, *plain[1:]]).startswith("other rows: ")
    with pytest.raises(CorpusError, match=r"expected a correct file .*found another \(other rows"):
        fetch.fetch(tmp_path, ["mr"])


def test_labels_may_be_spelt_in_any_way_that_the_task_knows() -> None:
    (file,) = [each for each in FILES if each.file == "cb/test.jsonl"]
    row = {"premise": "p", "hypothesis": "h", "label": "neutral"}
    assert fetch.content(file, [row]) == fetch.content(file, [row | {"label": 2, "idx": 4, "gold": 2}])
    assert fetch.content(file, [row]) != fetch.content(file, [row | {"label": 1}])


def test_a_drawn_part_decides_where_only_that_is_known(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    text = "".join(f'{{"question": "q{i}", "answer": ["{i}"]}}\n' for i in range(40))
    file = made("nq/validation.jsonl", text, github.json_lines, ("question", "answer"))
    drawn = sorted(random.Random(0).sample(range(40), 10))
    part = [github.json_lines(text)[i] for i in drawn]
    file = replace(file, sha256=fetch.content(file, part), drawn=10)
    monkeypatch.setattr(fetch, "FILES", (file,))
    url = f"/some/repo/{COMMIT}/data/nq/validation.jsonl%20x"
    served.files[url] = text.replace(f'"q{drawn[3]}"', '"other"').encode()
    with pytest.raises(CorpusError, match="found: other rows"):
        fetch.fetch(tmp_path)
    served.files[url] = text.encode()
    assert fetch.fetch(tmp_path)[0].status == "ok"


def test_word_lists_are_those_that_the_tasks_expect(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (real,) = [each for each in FILES if each.file == "verbalizers/sentiment.json"]
    words = verbalizers.parse_text(WORDS, ["negative", "positive"])
    monkeypatch.setitem(verbalizers.SHA256, "sentiment", verbalizers.fingerprint(words))
    monkeypatch.setattr(fetch, "FILES", (replace(real, sha256=verbalizers.SHA256["sentiment"]),))
    served.put(real, WORDS.replace("poor", "weak").encode())
    with pytest.raises(CorpusError, match=r"expected the rows of verbalizers/sentiment\.json, found: other rows"):
        fetch.fetch(tmp_path)
    served.put(real, WORDS.encode())
    assert fetch.fetch(tmp_path, ["verbalizers"])[0].status == "ok"
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    assert verbalizers.read_verbalizer({"verbalizer": "sentiment"}) == [["bad", "poor"], ["good", "fine"]]
    (tmp_path / "verbalizers/sentiment.json").write_text('{"labels": [{"name": "a"}]}')
    assert fetch.verify(tmp_path)[0].status.startswith('not whole: expected {"labels"')


def test_the_hashes_are_those_of_the_real_rows(shared_data: Path) -> None:
    complete, parts = [], []
    for file in FILES:
        if file.sha256 is None:
            continue
        path = shared_data / "tasks" / file.file
        if path.suffix == ".json":
            found = [{"name": name, "words": each} for name, each in verbalizers.read_words(path).items()]
        else:
            found = rows.read_lines(path)
        if file.drawn is not None:
            assert [row["row"] for row in found] == sorted(random.Random(0).sample(range(file.rows or 0), file.drawn))
            parts.append(file.task)
        else:
            assert len(found) == file.rows
            complete.append(file.file)
        assert fetch.content(file, found) == file.sha256, file.file
    assert len(complete) == 13
    assert parts == ["nq", "hotpotqa", "agn"]


def test_the_real_rows_in_their_true_forms_pass_and_stay_the_same(
    shared_data: Path, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are rebuilt from the rows: what the parsers give of them must be these rows again."""
    tasks = shared_data / "tasks"
    real = {
        each.file: rows.read_lines(tasks / each.file)
        for each in FILES
        if isinstance(each.origin, GitHubFile) and each.sha256 and not each.drawn and each.file.endswith(".jsonl")
    }
    assert len(real) == 8
    for file in FILES:
        if file.file not in real:
            continue
        found = real[file.file]
        if file.task == "sst2":
            lines = ["__label__3\tneutral"] * (1 + found[-1]["row"])
            for row in found:
                lines[row["row"]] = f"__label__{row['label']}\t{row['text']}"
            text = "\n".join(lines)
        elif file.task == "mr":
            buffer = io.StringIO()
            writer = csv.writer(buffer, lineterminator="\n")
            writer.writerows([["label", "text"], *([row["label"], row["text"]] for row in found)])
            text = buffer.getvalue()
        else:
            listed = [{name: row[name] for name in row if name not in ("row", "gold")} for row in found]
            for row in listed:
                if isinstance(row.get("label"), int):
                    row["label"] = str(row["label"])
            text = "".join(json.dumps(row) + "\n" for row in listed)
        served.put(file, text.encode())
    fetched = [
        each for task in ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte") for each in fetch.fetch(tmp_path, [task])
    ]
    assert {each.status for each in fetched} == {"ok"}
    for name, found in real.items():
        written = rows.read_lines(tmp_path / name)
        assert written == [{key: row[key] for key in row if key != "gold"} for row in found]
    sizes = {}
    for folder in (tasks, tmp_path):
        monkeypatch.setenv("MEMDEC_DATA", str(folder))
        loaded = {
            task: dcpmi_rows.load_rows(set=task, paper_rows=0)["test"].rows for task in ("sst2", "rt", "hyp", "rte")
        }
        sizes[folder] = {task: (len(each), sum(each["gold"])) for task, each in loaded.items()}
    assert sizes[tasks] == sizes[tmp_path]
    assert sizes[tmp_path]["rte"] == (277, 131)

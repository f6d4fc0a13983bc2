"""`memdec data` on small repositories in the Hub's format: what is fetched, resumed, refused and found wrong."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from memdec import HARNESS_TASKS, cli
from memdec.artefacts import artefact
from memdec.errors import CorpusError
from memdec.tasks import fetch, rows
from memdec.tasks.fetch import DataFile
from memdec.tasks.github import GitHubFile
from memdec.tasks.rows import HubRows

COMMIT = "0" * 39 + "1"
CHOICES = [
    {"id": i, "input": f"Is {i}\u2028even?\nAnswer:", "options": ["No", "Yes"], "gold_index": i % 2} for i in range(4)
]
ENTITIES = [{"id": i, "input": f"Sentence {i}:", "label": f"Ann{i} (person)"} for i in range(3)]
# As on the Hub: two configs, none of them the default, and sizes of splits that are not read.
CARD = """---
dataset_info:
- config_name: raw
  features: [{name: text, dtype: string}]
  splits: [{name: test, num_bytes: 9, num_examples: 3}, {name: train, num_bytes: 99, num_examples: 33}]
- config_name: other
  features: [{name: text, dtype: string}]
  splits: [{name: test, num_bytes: 9, num_examples: 3}]
configs:
- config_name: raw
  data_files: [{split: test, path: raw/test-*}, {split: train, path: raw/train-*}]
- config_name: other
  data_files: [{split: test, path: other/test-*}]
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of JSON files with two configs, and one of parquet files, as the Hub has them; the registry points there."""
    folder = tmp_path / "hub"
    (folder / "json").mkdir(parents=True)
    (folder / "json" / "pubmed.json").write_text(json.dumps(CHOICES))
    (folder / "json" / "ner.json").write_text("\n".join(json.dumps(row) for row in ENTITIES))
    configs = [("PubMedQA", "pubmed.json"), ("NER", "ner.json")]
    lines = [f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {file}\n" for name, file in configs]
    (folder / "json" / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    (folder / "text" / "raw").mkdir(parents=True)
    pd.DataFrame({"text": ["", " = T = \n", " Words . \n"]}).to_parquet(folder / "text/raw/test-00000-of-00001.parquet")
    (folder / "text/raw/train-00000-of-00001.parquet").write_text("never read")
    (folder / "text" / "README.md").write_text(CARD)
    (folder / "text" / "other").mkdir()
    pd.DataFrame({"text": ["other"]}).to_parquet(folder / "text/other/test-00000-of-00001.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    choice, label = ("input", "options", "gold_index"), ("input", "label")
    text = HubRows(str(folder / "text"), None, "test", COMMIT, "raw/test-*.parquet")
    registry = (
        DataFile(
            "pubmedqa/adaptllm_schema.jsonl", 4, choice, HubRows(str(folder / "json"), "PubMedQA", "test", COMMIT)
        ),
        DataFile("ner/adaptllm_schema.jsonl", 3, label, HubRows(str(folder / "json"), "NER", "test", COMMIT)),
        DataFile("wikitext/raw/test.parquet", 3, ("text",), text),
        DataFile("nq/validation.jsonl", 2, ("question", "answer")),
        DataFile("mr/validation.jsonl", None, ("text", "label")),
    )
    monkeypatch.setattr(fetch, "FILES", registry)
    return folder


def memdec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["memdec", "data", *words])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_fetched_files_are_the_rows_with_their_sources(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert [(each.rows, each.status) for each in fetch.fetch(out)] == [(4, "ok"), (3, "ok"), (3, "ok")]
    entries = json.loads((out / fetch.SOURCES).read_text())
    assert {file: entry["rows"] for file, entry in entries.items()} == {
        "ner/adaptllm_schema.jsonl": 3, "pubmedqa/adaptllm_schema.jsonl": 4, "wikitext/raw/test.parquet": 3,
    }  # fmt: skip
    for file, entry in entries.items():
        assert entry["sha256"] == hashlib.sha256((out / file).read_bytes()).hexdigest()
        assert entry["revision"] == COMMIT
    assert entries["ner/adaptllm_schema.jsonl"]["origin"] == f"{hub / 'json'} NER test"
    assert list(pd.read_parquet(out / "wikitext/raw/test.parquet")["text"]) == ["", " = T = \n", " Words . \n"]
    monkeypatch.setenv("MEMDEC_DATA", str(out))
    assert list(rows.load("t", "pubmedqa/adaptllm_schema.jsonl").rows) == CHOICES
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "adaptllm_schema.jsonl", "adaptllm_schema.jsonl", "sources.json", "test.parquet",
    ]  # fmt: skip
    checked = fetch.verify(out)
    assert [each.status for each in checked] == ["ok", "ok", "ok", "missing", "missing"]
    assert not fetch.wrong(checked, all_needed=False)


def test_a_killed_fetch_goes_on_and_what_is_right_stays(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    written, write = [], artefact.write_bytes

    def die(path: Path, content: bytes) -> None:
        if path.name != fetch.SOURCES:
            if len(written) == 1:
                raise KeyboardInterrupt
            written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(artefact, "write_bytes", die)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch(out)
    # The entry of the second file is there, the file is not.
    assert len(json.loads((out / fetch.SOURCES).read_text())) == 2
    assert [each.status for each in fetch.verify(out)][:3] == ["ok", "missing", "missing"]
    stamp = (out / "pubmedqa/adaptllm_schema.jsonl").stat().st_mtime_ns
    asked, load = [], rows.hub_rows
    monkeypatch.setattr(rows, "hub_rows", lambda hub: (asked.append(hub.config), load(hub))[1])
    assert {each.status for each in fetch.fetch(out)} == {"ok"}
    assert asked == ["NER", None]
    assert (out / "pubmedqa/adaptllm_schema.jsonl").stat().st_mtime_ns == stamp
    assert fetch.fetch(out, ["ner"])[0].status == "ok"
    assert len(asked) == 2


def test_a_changed_file_of_ours_is_fetched_again_and_a_strange_one_is_not_touched(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch.fetch(out, ["ner"])
    file = out / "ner/adaptllm_schema.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace("Ann1", "Bob1"))
    assert fetch.verify(out, ["ner"])[0].status == "not what sources.json says"
    fetch.fetch(out, ["ner"])
    assert file.read_text() == whole
    own = out / "pubmedqa/adaptllm_schema.jsonl"
    own.parent.mkdir()
    own.write_text(json.dumps(CHOICES[0]) + "\n")
    with pytest.raises(CorpusError, match=r"pubmedqa/adaptllm_schema\.jsonl: expected a correct file .* move it"):
        fetch.fetch(out)
    assert own.read_text() == json.dumps(CHOICES[0]) + "\n"
    own.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))  # right, if not from here: stays
    assert [each.status for each in fetch.fetch(out)] == ["ok"] * 3
    assert fetch.shown(fetch.verify(out, ["pubmedqa"])).split()[-5:] == ["own", "file", "ok,", "by", "number"]
    assert "pubmedqa/adaptllm_schema.jsonl" not in json.loads((out / fetch.SOURCES).read_text())


def test_another_commit_in_the_registry_is_fetched(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch.fetch(tmp_path / "out", ["ner"])
    ner = fetch.FILES[1]
    assert isinstance(ner.origin, HubRows)
    monkeypatch.setattr(fetch, "FILES", (replace(ner, origin=replace(ner.origin, revision="f" * 40)),))
    assert fetch.verify(tmp_path / "out")[0].status == f"of another commit than {'f' * 40}"
    assert fetch.fetch(tmp_path / "out")[0].status == "ok"
    assert (
        json.loads((tmp_path / "out" / fetch.SOURCES).read_text())["ner/adaptllm_schema.jsonl"]["revision"] == "f" * 40
    )


@pytest.mark.parametrize(
    ("file", "content", "status"),
    [
        ("nq/validation.jsonl", '{"question": "who", "answer": ["x"]}\n', "other number of rows"),
        ("nq/validation.jsonl", '{"question": "who", "answer": ["x"]}\n{"question": "w', "not whole: row 1: expected a JSON object"),
        ("nq/validation.jsonl", '{"question": "who", "answer": ["x"]}\n{"question": "why"}\n', "row 1: no 'answer'"),
        ("nq/validation.jsonl", '{"question": "\udcff"}\n', "not whole"),
        ("mr/validation.jsonl", "", "other number of rows"),
        ("wikitext/raw/test.parquet", "PAR1 cut", "not whole"),
    ],
)  # fmt: skip
def test_verify_finds_what_is_wrong(
    file: str, content: str, status: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "folder" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode(errors="surrogateescape"))
    code, _, _ = memdec(monkeypatch, capsys, "verify", str(tmp_path / "folder"))
    assert code == 1
    (found,) = [each for each in fetch.verify(tmp_path / "folder") if each.status != "missing"]
    assert (found.file.file, found.status[: len(status)]) == (file, status)


def test_the_commands_say_what_is_there(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    code, text, err = memdec(monkeypatch, capsys, "fetch", "--out", out, "--task", "ner", "--task", "wikitext")
    assert code == 0
    assert (
        f"under the licences of their origins (harness_tasks/README.md). {hub / 'json'}: ner; {hub / 'text'}: wiki"
        in err
    )
    assert [line.split() for line in text.splitlines()] == [
        ["task", "file", "rows", "expected", "origin", "status"],
        ["ner", "ner/adaptllm_schema.jsonl", "3", "3", "Hub", "0000000", "ok,", "by", "number"],
        ["wikitext", "wikitext/raw/test.parquet", "3", "3", "Hub", "0000000", "ok,", "by", "number"],
    ]
    monkeypatch.setenv("MEMDEC_DATA", out)
    code, text, _ = memdec(monkeypatch, capsys, "verify")
    assert (code, text.count(" ok"), text.count(" missing")) == (0, 2, 3)
    code, text, _ = memdec(monkeypatch, capsys, "verify", "--task", "nq")
    assert (code, text.count(" ok"), text.count(" missing")) == (1, 0, 1)
    for words, message in (
        (("fetch", "--task", "nq"), "nq: expected a task whose rows the Hub or GitHub has"),
        (("fetch", "--task", "nqq"), "--task: expected one of mr, ner, nq, pubmedqa, wikitext, found 'nqq'"),
        (("verify", str(tmp_path / "none")), "expected a folder in the layout of MEMDEC_DATA, found none"),
    ):
        code, _, err = memdec(monkeypatch, capsys, *words)
        assert code == 2
        assert message in err
    (tmp_path / "out" / fetch.SOURCES).write_text('{"ner')
    code, _, err = memdec(monkeypatch, capsys, "verify")
    assert (code, "sources.json: expected a JSON object" in err) == (2, True)
    monkeypatch.delenv("MEMDEC_DATA")
    code, _, err = memdec(monkeypatch, capsys, "fetch")
    assert (code, "expected --out or MEMDEC_DATA, found neither" in err) == (2, True)


def test_no_network_is_one_error_and_keeps_what_came(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pubmedqa, ner, *_ = fetch.FILES
    assert isinstance(ner.origin, HubRows)
    away = replace(ner, origin=replace(ner.origin, path="AdaptLLM/no-such-set"))
    monkeypatch.setattr(fetch, "FILES", (pubmedqa, away))
    with pytest.raises(CorpusError, match=r"AdaptLLM/no-such-set NER test at 0+1: expected rows from the Hub, found"):
        fetch.fetch(tmp_path / "out")
    assert [each.status for each in fetch.verify(tmp_path / "out")] == ["ok", "missing"]


def test_a_short_commit_becomes_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HubRows("AdaptLLM/some-set", "NER", "test", "48d43d2")
    commits = ["48d43d2" + "a" * 33, "9" * 40]
    api = SimpleNamespace(list_repo_commits=lambda *_, **__: [SimpleNamespace(commit_id=each) for each in commits])
    monkeypatch.setattr(rows, "HfApi", lambda: api)
    assert rows.pinned(hub).revision == commits[0]
    assert rows.pinned(replace(hub, revision=COMMIT)).revision == COMMIT
    with pytest.raises(CorpusError, match="expected one commit that begins with this revision, found 0 of 2"):
        rows.pinned(replace(hub, revision="48d43d3"))


def test_the_newest_commit_where_none_is_known(monkeypatch: pytest.MonkeyPatch, hub: Path, tmp_path: Path) -> None:
    text = fetch.FILES[2]
    assert isinstance(text.origin, HubRows)
    newest = replace(text, origin=replace(text.origin, revision=rows.NEWEST))
    away = HubRows("community/set", None, "test", rows.NEWEST)
    api = SimpleNamespace(
        list_repo_commits=lambda *_, **__: [SimpleNamespace(commit_id=each) for each in ("b" * 40, "c" * 40)]
    )
    monkeypatch.setattr(rows, "HfApi", lambda: api)
    assert rows.pinned(away).revision == "b" * 40
    monkeypatch.setattr(rows, "pinned", lambda hub: replace(hub, revision="b" * 40))
    monkeypatch.setattr(fetch, "FILES", (newest,))
    assert [(each.status, each.commit) for each in fetch.fetch(tmp_path / "out")] == [("ok", "b" * 40)]
    assert fetch.verify(tmp_path / "out")[0].status == "ok"


def test_rows_of_the_hub_that_are_not_those_of_the_task_are_not_written(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices, _, text, *_ = fetch.FILES
    for file, fault in (
        (replace(choices, rows=5), "other number of rows"),
        (replace(choices, columns=("input", "label")), "row 0: no 'label'"),
        (replace(text, sha256="0" * 64), "other rows"),
    ):
        monkeypatch.setattr(fetch, "FILES", (file,))
        with pytest.raises(CorpusError, match=f"at 0+1: expected the rows of {file.file}, found: {fault}"):
            fetch.fetch(tmp_path / "out")
        assert not list(tmp_path.glob("out/*"))


def test_only_the_columns_that_are_asked_for_are_read(hub: Path, tmp_path: Path) -> None:
    frame = pd.DataFrame({"question": ["who"], "answer": ["x"], "context": [{"sentences": [["long"]]}]})
    frame.to_parquet(hub / "text/raw/test-00000-of-00001.parquet")
    found = rows.hub_rows(
        HubRows(str(hub / "text"), None, "test", COMMIT, "raw/test-*.parquet", ("question", "answer"))
    )
    assert list(found) == [{"question": "who", "answer": "x"}]


def test_the_registry_has_every_task_once_and_the_pins_of_the_yaml_files() -> None:
    names = [each.file for each in fetch.FILES]
    assert len(set(names)) == len(names)
    pins: dict[str, Any] = {each.file: each.origin for each in fetch.FILES}
    assert [sum(isinstance(each, kind) for each in pins.values()) for kind in (HubRows, GitHubFile)] == [18, 12]
    assert all(re.fullmatch("[0-9a-f]{40}", each.revision) for each in pins.values() if isinstance(each, GitHubFile))
    assert [file for file, each in pins.items() if each and each.revision == rows.NEWEST] == ["yahoo/test.jsonl"]
    seen = 0
    for path in HARNESS_TASKS.rglob("*.yaml"):
        found = dict(re.findall(r'^ *(adaptllm_\w+): *"?([^\s"]+)', path.read_text(), re.MULTILINE))
        if "adaptllm_config" in found and "adaptllm_revision" in found:
            hub = pins[f"{found['adaptllm_config'].lower()}/adaptllm_schema.jsonl"]
            assert (hub.path, hub.config, hub.revision) == tuple(
                found[f"adaptllm_{k}"] for k in ("path", "config", "revision")
            )
            seen += 1
    assert seen == 16


def test_an_ok_says_what_it_rests_on() -> None:
    file = fetch.DataFile("t/test.jsonl", 3, ("text",))
    files = [replace(file, sha256="0" * 64), file, replace(file, rows=None)]
    lines = fetch.shown([fetch.Checked(each, 3, "ok") for each in files]).splitlines()[1:]
    assert [line.split("own file")[-1].split("-")[-1].strip() for line in lines] == [
        "ok",
        "ok, by number",
        "ok, by fields",
    ]


def test_the_real_rows_that_are_complete(shared_data: Path) -> None:
    found = {each.file.file: each for each in fetch.verify(shared_data / "tasks")}
    for task in ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte"):
        assert found[f"{task}/test.jsonl"].status == "ok"
    for name in ("sentiment", "agn", "yahoo"):
        assert found[f"verbalizers/{name}.json"].status == "ok"
    assert found["ner/adaptllm_schema.jsonl"].status == "ok"
    assert found["nq/validation.jsonl"].status == "other number of rows"
    assert found["yahoo/test.jsonl"].status == "missing"
    assert not [each for each in found.values() if each.status.startswith(("row", "not", "other rows"))]

"""Files that the tasks of a suite read, known without lm-eval."""

import shutil
from pathlib import Path

import pytest

from memdec import HARNESS_TASKS
from memdec.errors import ConfigError
from memdec.tasks import dcpmi_rows, files, needed


def test_groups_are_opened_at_any_depth() -> None:
    assert needed.leaves(["memdec_qa", "memdec_nq"]) == ["memdec_nq", "memdec_hotpotqa"]
    assert len(needed.leaves(["memdec_all"])) == 25
    with pytest.raises(ConfigError, match=r"found memdec_lw; did you mean memdec_law\?"):
        needed.leaves(["memdec_lw"])


def test_the_files_are_those_that_data_fetch_knows() -> None:
    found = needed.files(["memdec_all", "memdec_dcpmi_kl", "memdec_casehold_4shot"])
    assert set(found) <= {each.file for each in files.FILES}
    assert needed.files(["dcpmi_sst2_kp"]) == ["sst2/test.jsonl", "verbalizers/sentiment.json"]
    assert needed.files(["pubmedqa"]) == ["pubmedqa/adaptllm_schema.jsonl"]
    tuned = needed.files(["memdec_all", "memdec_dcpmi_kl"], tune=True)
    assert set(tuned) <= {each.file for each in files.FILES}


def test_what_alpha_is_tuned_on_and_demonstrations_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["cr/test.jsonl", "mr/test.jsonl", "mr/validation.jsonl"]
    assert [name for name in needed.files(["dcpmi_cr_kl", "dcpmi_mr_kl"], tune=True) if "verbal" not in name] == rows
    wikitext = needed.files(["memdec_wikitext"], tune=True)
    assert [Path(name).name for name in wikitext] == ["test.parquet", "validation.parquet"]
    for name in ["mr/test.jsonl", "verbalizers/sentiment.json", "casehold/train.jsonl"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    needed.check(["dcpmi_mr_kl"])
    with pytest.raises(
        ConfigError, match=r"^rows: expected mr/validation.jsonl in .*; put mr/validation.jsonl there by hand \(har"
    ):
        needed.check(["dcpmi_mr_kl"], tune=True)
    local = {each.file for each in files.FILES if each.origin is None and each.file.split("/")[0] in needed.LOCAL_ONLY}
    assert local == {*needed.BY_HAND}
    assert needed.found(["memdec_casehold"]) == []
    assert needed.found(["memdec_casehold_4shot"]) == [tmp_path / "casehold/train.jsonl"]


def test_what_is_not_on_the_hub_is_known() -> None:
    assert {name for name, each in dcpmi_rows.SETS.items() if not each.hub} | {"verbalizers"} == {*needed.LOCAL_ONLY}


def test_files_that_are_missing_are_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    monkeypatch.setattr(needed, "_hub_answers", lambda: True)
    with pytest.raises(
        ConfigError,
        match=r"expected sst2/test.jsonl, verb.*, found none; run `memdec data fetch .*--task sst2 --task verb",
    ):
        needed.check(["dcpmi_sst2_kl", "dcpmi_cb_kl"])  # cb may be on the Hub
    monkeypatch.setattr(needed, "_hub_answers", lambda: False)
    with pytest.raises(ConfigError, match=r"expected cb/test.jsonl in"):
        needed.check(["dcpmi_cb_kl"])
    (tmp_path / "cb").mkdir()
    (tmp_path / "cb" / "test.jsonl").write_text("{}\n")
    needed.check(["dcpmi_cb_kl"])
    assert needed.found(["dcpmi_cb_kl"]) == [tmp_path / "cb" / "test.jsonl"]
    monkeypatch.delenv("MEMDEC_DATA")
    with pytest.raises(
        ConfigError, match=r"MEMDEC_DATA, which is not set, found none; run `memdec data fetch --out DATA "
    ):
        needed.check(["dcpmi_cb_kl"])


def test_a_definition_is_known_with_what_it_includes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(HARNESS_TASKS, tmp_path / "tasks")
    monkeypatch.setattr(needed, "HARNESS_TASKS", tmp_path / "tasks")
    names = ["dcpmi_cb_kl", "dcpmi_mr_kl", "pubmedqa"]

    def definitions() -> list[str]:
        needed._definitions.cache_clear()
        return [needed.definition(name) for name in names]

    before = definitions()
    included = yaml_of("dcpmi_cb_kl", tmp_path / "tasks")
    included.write_text(included.read_text() + "description: another prompt\n")
    assert [a != b for a, b in zip(before, definitions(), strict=True)] == [True, False, False]
    needed._definitions.cache_clear()


def yaml_of(name: str, folder: Path) -> Path:
    return next(folder.glob(f"**/{name}.yaml"))

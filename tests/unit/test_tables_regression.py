"""Tables from records, and the regression check on them."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memdec import config as cfg
from memdec import regression, tables
from memdec.errors import ArtifactError, IncomparableError

CONFIG = cfg.load(Path(__file__).resolve().parents[2] / "tests" / "regression" / "reduced.yaml")


def record(model: str, method: str, value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    plain = {
        "domain": "sklearn",
        "family": "GPT-2",
        "model": model,
        "method": method,
        "metric": "token_perplexity",
        "value": value,
    }
    return (
        plain
        | {"low": value - 1, "high": value + 1, "n": 100, "alpha": 0.6 if method == "MemDec" else None, "seed": seed}
        | more
    )


@pytest.fixture
def records() -> pd.DataFrame:
    values = [
        record("gpt2-S", "base", 90.0),
        record("gpt2-S", "MemDec", 60.0),
        record("gpt2-S", "MemDec", 62.0, seed=1, alpha=0.8),
    ]
    return pd.DataFrame(values)


def test_cells_are_means_over_seeds_and_gaps_state_their_reason(records: pd.DataFrame) -> None:
    table = tables.table3(CONFIG, records).set_index(["model", "method"])
    row = table.loc["gpt2-S", "MemDec"]
    assert (row["sklearn"], row["Avg"], row["sklearn_alpha"], row["seeds"], row["sklearn_n"]) == (
        61.0,
        61.0,
        "0.6 0.8",
        "0 1",
        100,
    )
    empty = table.loc["gpt2-M", "LoRA"]
    assert pd.isna(empty["sklearn"])
    assert empty["note"] == "not run: sklearn"
    again = pd.read_csv(io.StringIO(tables.table3(CONFIG, records).to_csv(index=False)))
    assert list(again["method"]) == ["base", "LoRA", "MemDec"] * 2


def test_markdown_and_latex(records: pd.DataFrame) -> None:
    text = tables.markdown(CONFIG, records)
    assert "| GPT-2 | gpt2-S | MemDec | **61.00** | **61.00** |" in text
    assert "| GPT-2 | gpt2-S | LoRA | – | – |" in text
    assert "chosen: 0.6, 0.8" in text
    assert r"\textbf{61.00}" in tables.latex(CONFIG, records)


def write_table(path: Path, records: pd.DataFrame, **provenance: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.table3(CONFIG, records).to_csv(path, index=False)
    facts = {
        "scale": "reduced",
        "corpora_sha256": {"sklearn": "ab"},
        "versions": {"torch": "2.13.0+cpu", "python": "3.11.7"},
    }
    path.with_suffix(".provenance.json").write_text(json.dumps(facts | provenance))
    return path


def test_the_check_sees_what_moved_and_nothing_else(records: pd.DataFrame, tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.csv", records)
    noisy = write_table(tmp_path / "b.csv", records.assign(value=records["value"] * 1.01))
    baseline = tmp_path / "base.json"
    regression.write(table, [noisy], baseline)
    tolerance = json.loads(baseline.read_text())["cells"]["gpt2-S/base/sklearn"]["tolerance"]
    assert tolerance == pytest.approx(3 * 0.01 / 2**0.5, abs=1e-4)
    lines, moved = regression.compare(noisy, baseline)
    assert not moved
    assert all(line.startswith("ok") for line in lines)
    far = write_table(tmp_path / "c.csv", records.assign(value=[90.0, 66.0, 66.0]))
    lines, moved = regression.compare(far, baseline)
    assert moved
    assert [line[:5] for line in lines] == ["ok   ", "MOVED"]
    gone = write_table(tmp_path / "d.csv", records[records["method"] == "base"])
    lines, moved = regression.compare(gone, baseline)
    assert moved
    assert lines[1].startswith("MISSING gpt2-S/MemDec/sklearn")


@pytest.mark.parametrize(
    "change", [{"corpora_sha256": {"sklearn": "cd"}}, {"versions": {"torch": "2.12.0", "python": "3.11.7"}}]
)
def test_other_text_or_versions_are_not_compared(records: pd.DataFrame, tmp_path: Path, change: dict[str, Any]) -> None:
    regression.write(write_table(tmp_path / "a.csv", records), [], tmp_path / "base.json")
    with pytest.raises(IncomparableError, match="would mean nothing") as caught:
        regression.compare(write_table(tmp_path / "b.csv", records, **change), tmp_path / "base.json")
    assert caught.value.exit_code == 3
    with pytest.raises(ArtifactError, match=r"expected the provenance of c\.csv"):
        regression.compare(write_table(tmp_path / "c.csv", records).with_name("c.csv"), _without_provenance(tmp_path))


def _without_provenance(folder: Path) -> Path:
    (folder / "c.provenance.json").unlink()
    return folder / "base.json"

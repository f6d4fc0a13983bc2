"""The pages: whole links, commands and options that exist, a reason for each block that is not run."""

from pathlib import Path

import pytest

from docs import build, check, publish
from memdec.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_in_the_pages_is_stale() -> None:
    names = check.pages()
    assert {"README.md", "docs/evaluate.md", "docs/train.md", "config/README.md", "harness_tasks/README.md"} < set(
        names
    )
    assert check.problems(names) == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\nmemdec tune --base B --beta 1\n```", "memdec tune --beta: no such option"),
        ("```bash\nmemdec data fetch --out D --all\n```", "memdec data fetch --all: no such option"),
        ("```bash\nMEMDEC_DATA=D memdec distil\n```", "memdec distil: no such command"),
        ("```bash\ntorchrun -m memdec.cli train --rate 1\n```", "memdec train --rate: no such option"),
        ("```bash\nsnakemake --configfile config/mini.yaml config/maxi.yaml\n```", "config/maxi.yaml: no such config"),
        (
            "```bash\nlm_eval --model memdec-interp \\\n  --tasks memdec_pp\n```",
            "lm_eval --tasks memdec_pp: no such task",
        ),
        (
            "```bash\nlm_eval --model memdec-interp --model_args pretrained=B,beta=1\n```",
            "lm_eval --model memdec-interp: no argument beta",
        ),
        ("```bash\nmake table3 && make table33\n```", "make table33: the Makefile has no such target"),
        ("`memdec tune --beta 1` is", "memdec tune --beta: no such option"),
        ("    memdec tune\n", "a command outside of a ```bash block is never checked"),
        ("<!-- run by: tests/nowhere.py::test_it -->\n```bash\nls\n```", "tests/nowhere.py::test_it runs it"),
        ("```python\nfrom memdec.modeling import Nothing\n```", "memdec.modeling has no Nothing"),
        ("```yaml\na: [\n```", "no YAML"),
        ("```\nls\n```", "a block of no language"),
        ("[a](b.md)", "link to b.md, which is not there"),
        ("# A head\n[a](#a-tail)", "link to #a-tail, a heading that is not there"),
    ],
)
def test_each_fault_is_found(text: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("Makefile", "config", "harness_tasks", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    (found,) = check.problems(["README.md"])
    assert problem in found


def test_a_failing_command_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables hold for later blocks; a block with a reason is not run."""
    monkeypatch.setattr(check, "ROOT", tmp_path)
    text = "```bash\nA=one\n```\n\n<!-- not run: why -->\n```bash\nexit 3\n```\n\n```bash\necho $A >&2 && false\n```\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert check.run_page("README.md", tmp_path) == ["README.md:11: one\n"]


def test_rows_of_a_generated_table() -> None:
    table = "| a |\n| --- |\n| x 1 |\n| y 1 |\n\nNote."
    assert build.chosen(table, "y") == "| a |\n| --- |\n| y 1 |\n\nNote."
    assert build.chosen(table, None) == table
    with pytest.raises(ValueError, match="found none"):
        build.chosen(table, "z")


def test_a_block_shows_columns_of_a_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "a.csv").write_text("what,left_out,n_tokens,value\ntext,1,7,-0.5\nkeys,2,50000,1.23456\n")
    made = build.filled("<!-- generated: a.csv, columns: what n_tokens value, rows: keys -->\nold\n<!-- end -->\n")
    _, head, _, row, end = made.splitlines()
    assert [cell.strip() for cell in head.split("|")] == ["", "what", "n tokens", "value", ""]
    assert [cell.strip() for cell in row.split("|")] == ["", "keys", "50,000", "1.235", ""]
    assert end == "<!-- end -->"
    assert build.filled(made) == made


def finished(folder: Path, name: str, scale: str) -> None:
    is_figure = name.startswith("figure")
    for ending in (".csv", ".svg", ".png") if is_figure else (".csv", ".cells.csv", ".md", ".tex", ".items.npz"):
        (folder / f"{name}{ending}").write_text(name)
    (folder / f"{name}.provenance.json").write_text(f'{{"scale": "{scale}"}}')


def test_publishing_copies_what_people_read(tmp_path: Path) -> None:
    for name in ("table3", "objectives", "figure2"):
        finished(tmp_path, name, "mini")
    for name in ("claims.csv", "claims.md", "figure4.svg", "unfinished.csv", "report.html"):
        (tmp_path / name).write_text(name)
    found = publish.publish(tmp_path, tmp_path / "reference")
    copied = {path.name for path in (tmp_path / "reference" / "mini").iterdir()}
    assert sorted(path.name for path in found) == sorted(copied)  # each once
    tables = {
        f"{name}{ending}"
        for name in ("table3", "objectives")
        for ending in (".csv", ".cells.csv", ".md", ".provenance.json")
    }
    figure = {f"figure2{ending}" for ending in (".csv", ".svg", ".provenance.json")}
    assert copied == tables | figure | {"claims.csv", "claims.md"}


def test_publishing_takes_whole_tables(tmp_path: Path) -> None:
    """Files of an earlier run would stay beside the provenance of this one."""
    finished(tmp_path, "table3", "mini")
    (tmp_path / "table3.csv").unlink()
    with pytest.raises(ConfigError, match=r"expected table3.csv, and table3.md or table3.svg, beside its provenance"):
        publish.publish(tmp_path, tmp_path / "reference")
    (tmp_path / "table3.provenance.json").write_text("{")
    with pytest.raises(ConfigError, match=r"table3.provenance.json: expected provenance with a scale"):
        publish.publish(tmp_path, tmp_path / "reference")


@pytest.mark.parametrize(("scales", "found"), [((), "no table"), (("mini", "smol"), "mini, smol")])
def test_publishing_takes_one_run(scales: tuple[str, ...], found: str, tmp_path: Path) -> None:
    for number, scale in enumerate(scales):
        finished(tmp_path, f"table{number}", scale)
    with pytest.raises(ConfigError, match=f"expected tables of one scale, found {found}; give"):
        publish.publish(tmp_path, tmp_path / "reference")
    assert not (tmp_path / "reference").exists()

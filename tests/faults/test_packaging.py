"""The package's metadata, and the list of faults itself."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PYTHONS = ["3.11", "3.12", "3.13"]


def test_the_metadata_is_what_an_index_shows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(project[key] for key in ("authors", "urls", "classifiers", "keywords", "license", "readme"))
    prefix = "Programming Language :: Python :: "
    assert [
        each.removeprefix(prefix) for each in project["classifiers"] if re.match(rf"{prefix}3\.\d", each)
    ] == PYTHONS
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert any(job.get("strategy", {}).get("matrix", {}).get("python") == PYTHONS for job in jobs.values())
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == project["version"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_the_list_of_faults_names_tests_that_exist() -> None:
    defined = {
        (file.name, name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    rows = [line.split(" | ") for line in (ROOT / "tests/faults/README.md").read_text().splitlines() if "::" in line]
    assert len(rows) > 100
    for _, tests, *values in rows:
        file = ""
        for found, name in re.findall(r"(test_\w+\.py)?::(test_\w+)", tests):
            file = found or file
            assert (file, name) in defined, f"{file}::{name}"
        assert len(values) == 2, tests

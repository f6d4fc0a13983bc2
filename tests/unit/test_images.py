"""Dockerfile, apptainer.def and the lowest versions: they install what pyproject.toml and constraints.txt say."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests import lowest

ROOT = Path(__file__).resolve().parents[2]
DOCKER, APPTAINER = ((ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", "apptainer.def"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES = {"Dockerfile": DOCKER, "apptainer.def": APPTAINER}


def commands(text: str) -> list[list[str]]:
    """The words of every `pip install`, with the name of the argument EXTRAS in one form."""
    plain = text.replace("{{ EXTRAS }}", "${EXTRAS}")
    return [shlex.split(line) for line in re.findall(r"^ +(pip install .*)$", plain, re.MULTILINE)]


def copied(text: str) -> set[str]:
    """What a recipe takes from this folder."""
    if "%files" in text:
        section = text.split("%files\n")[1].split("\n\n")[0]
        pairs = [line.split() for line in section.splitlines()]
        assert all(target == f"/opt/memdec/{source}" for source, target in pairs)
        return {source for source, _ in pairs}
    return {word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]}


def default_extras(text: str) -> list[str]:
    (found,) = re.findall(r"^(?:ARG| {4})\s*EXTRAS=(\S+)$", text, re.MULTILINE)
    return found.split(",")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_both_install_the_same_with_the_pins() -> None:
    torch, whole = commands(DOCKER)
    assert commands(APPTAINER) == [torch, whole]
    assert torch[2:] == ["--no-cache-dir", "-c", "constraints.txt", "torch"]
    assert whole[2:] == ["--no-cache-dir", "-c", "constraints.txt", "-e", ".[${EXTRAS}]"]
    assert copied(DOCKER) == copied(APPTAINER)
    assert default_extras(DOCKER) == default_extras(APPTAINER)


@pytest.mark.parametrize("name", RECIPES)
def test_the_extras_that_are_named_exist_and_everything_in_them_is_pinned(name: str) -> None:
    extras = PROJECT["optional-dependencies"]
    named = [default_extras(RECIPES[name]), *(found.split(",") for found in re.findall(r"EXTRAS=(\S+)", RECIPES[name]))]
    assert ["gpu", "cluster"] in named
    wanted = [*PROJECT["dependencies"], *(line for names in named for extra in names for line in extras[extra])]
    assert {re.split("[<>=]", line)[0] for line in wanted} <= set(pins())


@pytest.mark.parametrize("name", RECIPES)
def test_the_python_of_an_image_is_that_of_the_environment(name: str) -> None:
    (version,) = re.findall(r"^(?:FROM|From:) python:(\S+)-slim$", RECIPES[name], re.MULTILINE)
    assert f"- python={version}\n" in (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_copied_is_there_and_has_all_that_the_package_and_the_rules_need(name: str) -> None:
    there = copied(RECIPES[name])
    assert all((ROOT / source).exists() for source in there)
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    needed = {
        *hatch["wheel"]["packages"],
        *hatch["wheel"]["force-include"],
        PROJECT["readme"],
        *PROJECT["license-files"],
    }
    assert needed | {"constraints.txt", "pyproject.toml", "Snakefile", "workflow", "config", "profiles"} <= there
    rules = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "workflow").rglob("*.smk"))
    assert set(re.findall(r'"(?:\.\./)+(\w[\w.]*)"', rules)) <= there


def test_only_what_is_copied_is_sent_to_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {line[1:] for line in rules if line.startswith("!")} == copied(DOCKER)


def test_an_image_runs_as_a_plain_user_and_holds_no_secret() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKER, re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")
    for text in RECIPES.values():
        assert not re.search(r"(?i)^(ARG|ENV|export)?.*(token|password|secret_key|api_key)\s*=", text, re.MULTILINE)
        assert "://" not in text


def test_lowest_versions_are_those_of_the_project() -> None:
    found = dict(pin.split("==") for pin in lowest.lowest(lowest.requirements(ROOT / "pyproject.toml", ["cpu", "dev"])))
    assert f"transformers>={found['transformers']}" in PROJECT["dependencies"]
    assert len(found) == len(PROJECT["dependencies"]) + sum(
        len(PROJECT["optional-dependencies"][extra]) for extra in ("cpu", "dev")
    )
    assert [*lowest.lowest(["lm-eval>=0.4.13,<0.5"])] == ["lm-eval==0.4.13"]
    with pytest.raises(SystemExit, match="expected a requirement `name>=version`, found 'numpy'"):
        list(lowest.lowest(["numpy"]))


def test_lm_eval_is_bounded() -> None:
    """Its development version breaks tasks of ours."""
    (line,) = [line for line in PROJECT["dependencies"] if line.startswith("lm-eval")]
    assert line.endswith(",<0.5")

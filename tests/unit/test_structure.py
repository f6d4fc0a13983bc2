"""The shape of the code: packages in the order of the data, no circles, light imports, nothing unsafe."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "memdec"
FILES = sorted(PACKAGE.rglob("*.py"))
# What stands in one line knows nothing of its neighbours, and only of the lines before; `modeling` is a public name.
ORDER = [
    ["errors"],
    ["plain"],
    ["settings"],
    ["maths"],
    ["artefacts"],
    ["references"],
    ["config"],
    ["text"],
    ["models", "tasks"],
    ["datastore"],
    ["training", "inference"],
    ["modeling", "harness"],
    ["results"],
    ["planning"],
    ["options"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: number for number, names in enumerate(ORDER) for name in names}


def name_of(path: Path) -> str:
    """Dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else node.module


def ours(path: Path) -> set[str]:
    """Modules of this package that a file imports, without the package itself."""
    return {name for name in imported(path) if name.startswith("memdec.")}


def top(name: str) -> str:
    """Package or module directly under memdec."""
    return name.split(".")[1]


def test_every_folder_has_its_place() -> None:
    there = {top(name) for name in NAMES if name != "memdec"}
    assert there == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert not ours(path)
        return
    here = top(name_of(path))
    wrong = [name for name in ours(path) if top(name) != here and LEVEL[top(name)] >= LEVEL[here]]
    assert not wrong, f"{name_of(path)} imports {', '.join(wrong)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name_of(path): ours(path) for path in FILES}
    # A package's face names what is inside; whoever imports a module inside does not mean the face.
    faces = {name_of(path) for path in FILES if path.name == "__init__.py"}
    list(TopologicalSorter({name: needs - faces for name, needs in graph.items()}).static_order())


@pytest.mark.parametrize("path", sorted((PACKAGE / "maths").glob("*.py")), ids=name_of)
def test_the_formulas_know_no_files_and_no_models(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - {"memdec"} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "torch", "jaxtyping", "numba", "llvmlite", "scipy", "triton"}
    assert not {"pathlib", "os", "shutil"} & set(imported(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_snakemake(path: Path) -> None:
    assert not any(name.split(".")[0] == "snakemake" for name in imported(path))


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=name_of)
def test_every_package_says_what_is_in_it(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc, "no docstring"
    assert path.parent == PACKAGE or "May import: " in doc


# `pip install memdec` without an extra has no faiss, and compiling with numba costs seconds.
LIGHT = """
import sys
sys.modules.update(dict.fromkeys(["faiss", "numba", "llvmlite", "bm25s"]))
import memdec.harness
from memdec.harness import MemDecInterp
from memdec.modeling import MemDecConfig, MemDecForCausalLM
"""


def test_the_harness_and_the_names_of_users_need_nothing_that_searches() -> None:
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_the_command_line_and_the_rules_load_no_model_library() -> None:
    """`memdec --help` and every call of Snakemake would pay seconds for it."""
    code = "import sys, memdec.cli, memdec.results.catalogue; print({'torch', 'transformers', 'lm_eval'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "set()"


HEAVY = {
    "torch",
    "transformers",
    "lm_eval",
    "datasets",
    "peft",
    "accelerate",
    "scipy",
    "sklearn",
    "pandas",
    "faiss",
    "numba",
}


@pytest.mark.parametrize(
    ("modules", "needed"),
    [
        ("results.scores", set()),
        ("results.tables", {"pandas"}),
        ("text.corpora", set()),
        ("text.tokens", set()),
        ("datastore.passages", {"scipy", "numba"}),  # of bm25s
        # lm-eval and what it brings are loaded for a whole system, not for a memory beside stored scores of its base
        ("results.evaluate", {"torch", "transformers", "accelerate", "scipy", "pandas"}),
    ],
)
def test_what_needs_no_model_starts_without_the_libraries_of_models(modules: str, needed: set[str]) -> None:
    """Each start of a stage would pay seconds for them, and a table has dozens."""
    code = f"import sys, memdec.cli, memdec.{modules}; print(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(ast.literal_eval(run.stdout)) <= needed


def test_nothing_unsafe_is_loaded() -> None:
    words = ["torch.load", "pickle.load", "import pickle", "yaml.load(", "trust_remote_code=True"]
    words += ["allow_pickle=True", "eval("]
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in words:
            assert not re.search(r"(?<![\w.])" + re.escape(word), text), (path.name, word)


def test_published_files_that_the_code_names_are_there() -> None:
    named = {name for path in FILES for name in re.findall(r"results/reference/[\w/.-]+\.\w+", path.read_text())}
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]

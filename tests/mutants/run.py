"""Plant each bug of this folder in a copy of the package and run the tests that must see it.

    python tests/mutants/run.py              all of them, two at a time
    python tests/mutants/run.py NAME ...     some, by the beginning of their file names

The exit status is 0 only if every patch applies and every bug is seen.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = ("memdec", "memdec_hook.py", "harness_tasks", "tests", "config", "workflow", "results", "pyproject.toml")
KILLER = "Killed-by: "
AT_ONCE = 2
_OUTCOMES = {
    0: "SURVIVED",
    1: "killed",
}  # by pytest's exit status; any other is a fault of the test's name or of the patch


@dataclass(frozen=True)
class Mutant:
    """A planted bug and the tests that see it."""

    file: Path
    title: str
    tests: list[str]


def read(file: Path) -> Mutant:
    """The patch's first line says what is wrong; `Killed-by:` lines name tests."""
    lines = file.read_text().splitlines()
    tests = [line.removeprefix(KILLER) for line in lines if line.startswith(KILLER)]
    if not tests:
        sys.exit(f"{file}: expected a line '{KILLER}tests/...::test_...' before the patch, found none; add it")
    return Mutant(file, lines[0], tests)


def copied(folder: Path) -> None:
    """The package and its tests; compiled loops come along, so that they are not compiled again."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copy2(source, folder / name)


def applied(patch: Path, folder: Path) -> str | None:
    """Apply a patch; what git says where it does not fit."""
    command = ["git", "apply", "--recount", "-C1", str(patch)]
    plain = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


def tested(folder: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status, and what it prints."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", *tests]
    data = os.environ.get("MEMDEC_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    plain = {**os.environ, "PYTHONPATH": str(folder), "MEMDEC_TEST_DATA": data, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def verdict(mutant: Mutant) -> tuple[str, str]:
    """In a word, and what there is to read where the word is not `killed`."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copied(folder)
        problem = applied(mutant.file, folder)
        if problem is not None:
            return "DOES NOT APPLY", problem
        status, text = tested(folder, mutant.tests)
        word = _OUTCOMES.get(status, f"ERROR (pytest exit status {status})")
        return word, "" if word == "killed" else text[-2000:]


def check_tests(mutants: list[Mutant]) -> None:
    """A test that fails anyway kills nothing."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copied(Path(name))
        status, text = tested(Path(name), tests)
    if status:
        sys.exit(f"{text[-5000:]}\nexpected the {len(tests)} tests to pass without a planted bug; mend them first")
    print(f"{len(tests)} tests pass without a planted bug", flush=True)


def main(names: list[str]) -> int:
    """Say of every mutant whether it was killed."""
    files = sorted(HERE.glob("*.patch"))
    mutants = [read(file) for file in files if not names or file.name.startswith(tuple(names))]
    if not mutants:
        sys.exit(f"{HERE}: expected patches, found none of these names; leave out the names")
    check_tests(mutants)
    words = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutant, (word, text) in zip(mutants, pool.map(verdict, mutants), strict=True):
            words.append(word)
            print(f"{word:<16} {mutant.file.stem}: {mutant.title}", flush=True)
            print(*(f"    {line}" for line in text.splitlines()), sep="\n", end="\n" if text else "")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    n_killed = words.count("killed")
    print(f"{n_killed} of {len(words)} killed, {spent.ru_utime + spent.ru_stime:.0f} s of CPU time")
    return 0 if n_killed == len(words) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

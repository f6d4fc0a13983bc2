"""Print a constraints file with the lowest version of every dependency that pyproject.toml allows.

    python -m tests.lowest [NAME==VERSION ...] > build/lowest.txt

`make test-lowest` installs these and runs the tests, so that a bound is a version that was tried. A pin that is given takes
the place of that of pyproject.toml.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("cpu", "dev")
_BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)(,<[0-9.]+)?")


def requirements(pyproject: Path, extras: Sequence[str]) -> list[str]:
    """What the project and these extras require."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def lowest(lines: Sequence[str]) -> Iterator[str]:
    """Pin each requirement to its lower bound.

    Raises:
        SystemExit: One has no lower bound of the form `name>=version`.
    """
    for line in lines:
        found = _BOUND.fullmatch(line)
        if found is None:
            sys.exit(f"pyproject.toml: expected a requirement `name>=version`, found {line!r}; give its lowest version")
        yield f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    given = {pin.partition("==")[0]: pin for pin in sys.argv[1:]}
    pins = lowest(requirements(ROOT / "pyproject.toml", EXTRAS))
    print("\n".join(given.get(pin.partition("==")[0], pin) for pin in pins))

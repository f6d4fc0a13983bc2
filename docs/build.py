"""Fill the generated blocks of README.md from files that rules wrote: `python -m docs.build [--check]`.

A block stands between `<!-- generated: FILE -->` and `<!-- end -->`.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with every block replaced by the file it names."""
    return BLOCK.sub(lambda m: m[1] + (ROOT / m[2]).read_text(encoding="utf-8").strip() + "\n" + m[3], text)


def main() -> int:
    """Write README.md, or with --check exit 1 when it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if check:
        if old != new:
            print("README.md: generated blocks are stale; run `python -m docs.build`", file=sys.stderr)
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write `summary.json` of `benchmarks/gpu.sh`: machine, versions, and the result of each part.

python -m benchmarks.summary OUT start [--tiny]                     # exit 2 if a GPU is needed and missing
python -m benchmarks.summary OUT PART STATUS SECONDS LIMIT LOG      # after a part
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from memdec.artefacts import artefact, provenance

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "a": ("tests/gpu", ["tests.txt"]),
    "b": ("hot paths against plain twins", ["gpu.csv"]),
    "c": ("latency at the paper's shapes", ["latency.csv"]),
    "d": ("Table 1 of one domain", ["table1.csv", "table1.md"]),
    "e": ("DCPMI and domain tasks", ["tasks.csv"]),
}
TIMED_OUT = (124, 137)  # exit code of `timeout`
_LINES = 30  # characters kept from the log of a failed part


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on; FAISS for CUDA is a package with another name."""
    found = provenance.versions()
    for dist in metadata.distributions():
        name = dist.metadata["Name"] or ""
        if name.startswith("faiss"):
            found[name] = dist.version
    return found


def start(out: Path, tiny: bool) -> int:
    """Start a summary; keep the parts of an earlier run if machine, versions and code are unchanged."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not tiny:
        print("benchmarks/gpu.sh: expected a CUDA device, found none; --tiny runs anywhere", file=sys.stderr)
        return 2
    found: dict[str, Any] = {
        "tiny": tiny,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "machine": provenance.machine(),
        "commit": provenance.git_commit(ROOT),
        "versions": versions(),
    }
    path = out / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = before.pop("parts", {})
    artefact.write_json(path, found | {"parts": parts if before == found else {}})
    return 0


def add(out: Path, part: str, status: int, seconds: float, limit: int, log: Path) -> None:
    """Add the result of a part; if it failed, with the end of its log; for the tests, with their last line."""
    path = out / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    about, files = PARTS[part]
    entry: dict[str, Any] = {
        "what": about,
        "status": "ok" if status == 0 else "timeout" if status in TIMED_OUT else "failed",
        "exit": status,
        "wall_s": round(seconds, 1),
        "limit_s": limit,
        "files": [name for name in files if (out / name).is_file()],
    }
    if part == "a" and (out / "tests.txt").is_file():
        entry["says"] = (out / "tests.txt").read_text(encoding="utf-8").strip().split("\n")[-1].strip("= ")
    if status:
        entry["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
    found["parts"] = dict(sorted({**found["parts"], part: entry}.items()))
    artefact.write_json(path, found)


def main() -> int:
    """Start the summary or add a part, as described above."""
    out, command, *rest = sys.argv[1:]
    if command == "start":
        return start(Path(out), "--tiny" in rest)
    status, seconds, limit, log = rest
    add(Path(out), command, int(status), float(seconds), int(limit), Path(log))
    return 0


if __name__ == "__main__":
    sys.exit(main())

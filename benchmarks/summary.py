"""Write `summary.json` of `benchmarks/gpu.sh`: machine, versions, and the result of each part.

python -m benchmarks.summary OUT start [--tiny] PART ...            # exit 2 if a GPU is needed and missing
python -m benchmarks.summary OUT PART STATUS SECONDS LIMIT LOG      # after a part
"""

import json
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from memdec.artefacts import artefact, provenance

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "a": ("tests/gpu", ["tests.txt"]),
    "b": ("hot paths against plain twins", ["gpu.csv"]),
    "c": ("latency at the paper's shapes", ["latency.csv"]),
    "d": ("Tables 1, 2 and 14 to 16 of one domain", ["tables.tgz"]),
}
ENDED = {124: "timeout", 137: "timeout", 129: "stopped", 130: "stopped", 143: "stopped"}  # by its limit, by a signal
_LINES = 30  # lines kept from the log of a failed part
_BAR = re.compile(r"\d+%\|")  # a state of a progress bar


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on; FAISS for CUDA is a package with another name."""
    found = provenance.versions()
    for dist in metadata.distributions():
        name = dist.metadata["Name"] or ""
        if name.startswith("faiss"):
            found[name] = dist.version
    return found


def start(out: Path, tiny: bool, parts: Sequence[str]) -> int:
    """Start a summary, or go on with that of earlier visits: a part says where and by which code it ran.

    The files of `parts` are removed, and until a part ends its status is "unfinished".
    """
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not tiny:
        print("benchmarks/gpu.sh: expected a CUDA device, found none; --tiny runs anywhere", file=sys.stderr)
        return 2
    where: dict[str, Any] = {
        "tiny": tiny,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "machine": provenance.machine(),
        "commit": provenance.git_commit(ROOT),
        "versions": versions(),
    }
    path = out / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in parts:
        about, files = PARTS[part]
        for name in files:
            (out / name).unlink(missing_ok=True)
        found[part] = {"what": about, "status": "unfinished", "files": [], "where": where}
    artefact.write_json(path, dict(sorted(found.items())))
    return 0


def add(out: Path, part: str, status: int, seconds: float, limit: int, log: Path) -> None:
    """Add the result of a part; if it failed, with the end of its log; for the tests, with how many passed."""
    path = out / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    about, files = PARTS[part]
    entry: dict[str, Any] = {
        "what": about,
        "status": "ok" if status == 0 else ENDED.get(status, "failed"),
        "exit": status,
        "wall_s": round(seconds, 1),
        "limit_s": limit,
        "files": [name for name in files if (out / name).is_file()],
        "where": found[part]["where"],
    }
    if part == "a" and (out / "tests.txt").is_file():
        entry["says"] = _says((out / "tests.txt").read_text(encoding="utf-8"), entry["status"])
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        entry["log"] = [line for line in lines if line.strip() and not _BAR.search(line)][-_LINES:]
    artefact.write_json(path, found | {part: entry})


def _says(tests: str, status: str) -> str:
    """The last line of a whole run of pytest; of one that was ended, what it had seen."""
    last = tests.strip().split("\n")[-1].strip("= ")
    if status in ("ok", "failed"):
        return last
    seen = {word: re.findall(rf"::(\S+) {word}", tests) for word in ("PASSED", "FAILED")}
    found = re.search(r"collected (\d+)", tests)
    failed = ", ".join(seen["FAILED"]) or "none"
    return f"of {found[1] if found else '?'} tests {len(seen['PASSED'])} passed, failed: {failed}; ended in {last.split('::')[-1]}"


def main() -> int:
    """Start the summary or add a part, as described above."""
    out, command, *rest = sys.argv[1:]
    if command == "start":
        return start(Path(out), "--tiny" in rest, [part for part in rest if part != "--tiny"])
    status, seconds, limit, log = rest
    add(Path(out), command, int(status), float(seconds), int(limit), Path(log))
    return 0


if __name__ == "__main__":
    sys.exit(main())

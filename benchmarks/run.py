"""Run the benchmarks: `python -m benchmarks.run [--quick] [--only NAME] [--out results/benchmarks.csv]`.

Each repeat of each side runs in a new process with one thread; ours and the twin take turns, so background load affects
both. Memory is the growth of the peak memory during the first call. Times are CPU seconds of the second call, the
median of the repeats. ratio = how many times better ours is.
"""

import argparse
import csv
import resource
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.cases import CASES, Case, Files
from memdec.artefacts.provenance import machine

COLUMNS = [
    "benchmark", "unit", "ours", "twin", "ratio", "peak_mb_ours", "peak_mb_twin", "bytes_ours", "bytes_twin", "n",
    "machine",
]  # fmt: skip
CLEAR = Path("/proc/self/clear_refs")


def peak_mb(reset: bool = False) -> float:
    """Peak resident memory in MB since the last reset, or since the process began if the system has no reset."""
    if reset and CLEAR.exists():
        CLEAR.write_text("5")  # else the memory used while making the inputs would hide growth
    if CLEAR.exists():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, side: int, n: int) -> tuple[float, float, float]:
    """Measure one side in this process: CPU seconds of the second call, peak memory growth in MB of the first, and
    bytes on disk per token."""
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == name)
    work = case.make(n)[side]
    before = peak_mb(reset=True)
    result = work()
    grown = peak_mb() - before
    n_bytes = result.n_bytes / n if isinstance(result, Files) else 0.0
    del result
    start = time.process_time()
    work()
    return time.process_time() - start, grown, n_bytes


def check(name: str, n: int) -> float:
    """Relative L2 distance between ours and the twin."""
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == name)
    ours, twin = (torch.cat([t.flatten().double() for t in case.plain(work())]) for work in case.make(n))
    return float((ours - twin).norm() / twin.norm()) if ours.shape == twin.shape else float("inf")


def row(case: Case, n: int, repeats: int) -> dict[str, object]:
    """Make one row of the CSV."""
    runs: list[list[tuple[float, float, float]]] = [[], []]
    # A new process per call: the memory of one side never counts for the other.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        if case.tolerance < float("inf"):
            distance = pool.apply(check, (case.name, min(n, case.n_quick)))
            if not distance <= case.tolerance:
                sys.exit(f"{case.name}: ours and the twin differ by {distance:.2e}, allowed {case.tolerance:.0e}")
        for _ in range(repeats):
            for side in (0, 1):
                runs[side].append(pool.apply(measure, (case.name, side, n)))
    (ours, ours_mb, ours_bytes), (twin, twin_mb, twin_bytes) = (
        [statistics.median(column) for column in zip(*r, strict=True)] for r in runs
    )
    shown = (ours, twin) if case.better == "lower" else (n / ours, n / twin)
    return {
        "benchmark": case.name,
        "unit": case.unit,
        "ours": f"{shown[0]:.4g}",
        "twin": f"{shown[1]:.4g}",
        "ratio": f"{twin / ours:.2f}",
        "peak_mb_ours": f"{ours_mb:.0f}",
        "peak_mb_twin": f"{twin_mb:.0f}",
        "bytes_ours": f"{ours_bytes:.0f}" if ours_bytes else "",
        "bytes_twin": f"{twin_bytes:.0f}" if twin_bytes else "",
        "n": n,
        "machine": machine(),
    }


def write(out: Path, columns: list[str], rows: list[dict[str, object]]) -> None:
    """Write the rows as a CSV file and print them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(out.read_text(encoding="utf-8"))


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[case.name for case in CASES])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a first look")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks.csv"))
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in (None, case.name)]
    rows = [row(case, case.n_quick if args.quick else case.n, args.repeats) for case in tqdm(cases, desc="benchmarks")]
    write(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()

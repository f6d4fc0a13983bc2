"""What the hashes of files cost: `python -m benchmarks.hashing FOLDER [SNAKEMAKE OPTIONS]`.

Runs the reduced run of `tests/regression` in FOLDER, with a `memdec` in front of the real one that times what artefacts
cost beside the work: hashing files, checking arrays to resume from, and writing files through to the disk. Prints a row
per stage, and what share of the time of all stages it is.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def timed() -> None:
    """Run `memdec` with the arguments of this process, and append its times to $HASHING_LOG."""
    begun, spent = time.perf_counter(), {"hash": 0.0, "sync": 0.0}
    from memdec import cli
    from memdec.artefacts import arrays, artefact

    def count(module: Any, name: str, kind: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def counted(*words: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return real(*words, **named)
            finally:
                spent[kind] += time.perf_counter() - start

        setattr(module, name, counted)

    count(artefact, "content_hash", "hash")
    count(arrays, "content_hash", "hash")
    count(artefact, "signature", "hash")
    count(artefact, "_sync", "sync")
    try:
        cli.main()
    finally:
        row = {"stage": sys.argv[1], "seconds": time.perf_counter() - begun, **spent}
        with Path(os.environ["HASHING_LOG"]).open("a") as log:
            log.write(json.dumps(row) + "\n")


def main() -> None:
    folder, *options = sys.argv[1:] or sys.exit(__doc__)
    home = Path(folder).resolve()
    (home / "bin").mkdir(parents=True, exist_ok=True)
    shim = home / "bin" / "memdec"
    shim.write_text(f"#!{sys.executable}\nfrom benchmarks.hashing import timed\ntimed()\n")
    shim.chmod(0o755)
    log = home / "hashing.jsonl"
    path = {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "HASHING_LOG": str(log)}
    path["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [ROOT / "workflow" / "run.sh", home, "--quiet", *(options or ["--cores", "1"])]
    command += ["--configfile", ROOT / "tests" / "regression" / "reduced.yaml", "--workflow-profile"]
    command += [ROOT / "profiles" / "default", "--", "results/table3.csv"]
    subprocess.run(command, check=True, env={**os.environ, **path})
    sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in log.read_text().splitlines():
        row = json.loads(line)
        for name in (row["stage"], "all"):
            for key in ("seconds", "hash", "sync"):
                sums[name][key] += row[key]
    print(f"{'stage':14}{'seconds':>9}{'hashing':>9}{'syncing':>9}{'share':>8}")
    for name, each in sorted(sums.items(), key=lambda item: item[1]["seconds"]):
        share = (each["hash"] + each["sync"]) / each["seconds"]
        print(f"{name:14}{each['seconds']:9.2f}{each['hash']:9.3f}{each['sync']:9.3f}{share:8.2%}")


if __name__ == "__main__":
    main()

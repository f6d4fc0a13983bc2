"""`benchmarks/gpu.sh --tiny` on whatever device there is: each part's file; parts by name, failures, the page that shows it."""

import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import gpu, report, summary
from docs import publish

ROOT = Path(__file__).resolve().parents[2]


def script(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WORK": str(folder / "work"), "PYTHON": sys.executable, **more}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(folder / "out"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def write_rows(folder: Path) -> None:
    """Rows of one task of each kind."""
    cb = [{"premise": f"It is {i}.", "hypothesis": "It is so.", "label": i % 3} for i in range(3)]
    scotus = [{"input": f"Opinion {i}. Area?", "options": ["Privacy", "Unions"], "gold_index": i % 2} for i in range(3)]
    for name, rows in (("cb/test", cb), ("scotus/adaptllm_schema", scotus)):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_every_part_at_toy_sizes(tmp_path: Path) -> None:
    write_rows(tmp_path / "data")
    run = script(tmp_path, "--tiny", MEMDEC_DATA=str(tmp_path / "data"))
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    out = tmp_path / "out"
    files = [name for _, names in summary.PARTS.values() for name in names]
    assert {path.name for path in out.iterdir()} == {"summary.json", *files}

    found = json.loads((out / "summary.json").read_text())
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys("abcd", "ok")
    assert all(0 < part["wall_s"] < part["limit_s"] for part in found.values())
    where = found["a"]["where"]
    assert where["tiny"]
    assert where["device"]
    assert {"torch", "transformers"} < set(where["versions"])
    tests = (out / "tests.txt").read_text()
    assert "test_cuda.py::test_exact_search" in tests
    assert ("skipped" if where["device"] == "cpu" else "passed") in found["a"]["says"]

    hot = pd.read_csv(out / "gpu.csv")
    assert list(hot.columns) == gpu.COLUMNS
    assert (
        list(hot["benchmark"])
        == ["loss"] * 2 + ["step"] * 2 + ["search"] * 2 + ["cells", "aggregation", "keys"] + ["sweep"] * 2
    )
    assert hot["note"][hot["benchmark"] != "cells"].isna().all()
    assert hot["note"][6].startswith("TV 0.")
    assert hot["ratio"].map(math.isfinite).all()
    assert set(report.GOALS) <= set(zip(hot["benchmark"], hot["against"], strict=True))

    latency = pd.read_csv(out / "latency.csv")
    assert set(latency["system"]) == {"base", "MemDec", "MemDec, speculative"}
    assert set(latency["phase"]) == {"prefill", "decode", "total"}
    assert latency["prompt_tokens"].nunique() == 2
    assert latency["ratio_to_base"].map(math.isfinite).all()
    assert set(latency["paper_ratio"][latency["system"] == "MemDec"]) == {report.OVERHEAD}

    with tarfile.open(out / "tables.tgz") as packed:
        packed.extractall(tmp_path / "tables", filter="data")
    table = pd.read_csv(tmp_path / "tables" / "table1.csv")
    assert list(table["method"]) == ["base", "DAPT", "LoRA", "MemDec", "control: DAPT"]
    for name, column in (("table2", "CB"), ("table16", "SCOTUS_micro")):
        found = pd.read_csv(tmp_path / "tables" / f"{name}.csv")
        assert {"base", "DAPT", "MemDec"} <= set(found["method"])
        assert found[column].between(0, 100).all()
    assert publish.publish(tmp_path / "tables", tmp_path / "reference")

    # A part that ran elsewhere keeps its place; this one finds what it made before.
    again = script(tmp_path, "--tiny", "d", MEMDEC_DATA=str(tmp_path / "data"))
    assert again.returncode == 0, again.stdout
    assert set(json.loads((out / "summary.json").read_text())) == set("abcd")


@pytest.mark.slow
def test_a_failed_part_stops_nothing(tmp_path: Path) -> None:
    """d finds no rows of its tasks and says so before it starts; a runs after it all the same."""
    run = script(tmp_path, "--tiny", "d", "a", MEMDEC_DATA=str(tmp_path))
    assert run.returncode == 1
    parts = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: part["status"] for name, part in parts.items()} == {"a": "ok", "d": "failed"}
    assert parts["d"]["exit"] == 1
    assert "MEMDEC_DATA" in "\n".join(parts["d"]["log"])


def test_a_signal_leaves_a_summary(tmp_path: Path) -> None:
    """What ends the script ends its part, and the summary says so of this part and of the next."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f'#!/bin/sh\ncase "$*" in "-m pytest "*) echo begun; exec sleep 60;; esac\nexec {sys.executable} "$@"\n'
    )
    stand_in.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "WORK": str(tmp_path / "work"), "PYTHON": str(stand_in)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out), "--tiny", "a", "b"]
    (out / "gpu.csv").parent.mkdir()
    (out / "gpu.csv").write_text("of an earlier visit")
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        tests = out / "tests.txt"
        until = time.monotonic() + 60
        while not (tests.is_file() and tests.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        run.terminate()
        assert run.wait(timeout=30) == 1
    parts = json.loads((out / "summary.json").read_text())
    assert {name: part["status"] for name, part in parts.items()} == {"a": "stopped", "b": "unfinished"}
    assert parts["a"]["wall_s"] < 30
    assert not (out / "gpu.csv").exists()


def test_what_a_part_that_was_ended_had_seen() -> None:
    tests = (
        "collecting ... collected 22 items\n\nt.py::test_a[1] PASSED [ 4%]\nt.py::test_b FAILED [ 9%]\nt.py::test_c "
    )
    assert summary._says(tests, "timeout") == "of 22 tests 1 passed, failed: test_b; ended in test_c"
    assert summary._says("...\n=== 22 passed in 3 s ===\n", "ok") == "22 passed in 3 s"


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    assert "No GPU has been measured yet" in "\n".join(report._gpu(tmp_path))
    row = dict.fromkeys(gpu.COLUMNS, "") | {
        "benchmark": "search",
        "against": "the same search on the CPU",
        "ratio": "61",
    }
    other = row | {
        "benchmark": "loss",
        "against": "dense targets, full logits, autograd",
        "twin": gpu.NO_ROOM,
        "ratio": "",
    }
    pd.DataFrame([row, other]).to_csv(tmp_path / "gpu.csv", index=False)
    lines = [re.sub(" +", " ", line) for line in report._gpu(tmp_path)]
    assert any("| 61 | ≥ 50 |" in line for line in lines)
    assert any("| out of memory | | ≥ 5 |" in line for line in lines)
    pd.DataFrame([row | {"ratio": "0.5"}]).to_csv(tmp_path / "gpu.csv", index=False)
    lines = report._gpu(tmp_path)
    assert "- Slower than its twin: search: 0.5." in lines
    assert "- Below its goal: search: 0.5." in lines


def test_the_page_compares_search_in_cells_with_its_goal(tmp_path: Path) -> None:
    """The estimate for the paper's size needs the rate of aggregation, too."""
    row = dict.fromkeys(gpu.COLUMNS, "") | {"benchmark": "cells", "ours": "274000", "width": "768", "ratio": "2.5"}
    sums = dict.fromkeys(gpu.COLUMNS, "") | {"benchmark": "aggregation", "ours": "410000", "ratio": "0.2"}
    for cells, rows, met, estimates in (
        (row, [], "274,000 queries/s; goal 200,000: met", 0),
        (row | {"ours": "199000"}, [sums], "199,000 queries/s; goal 200,000: not met", 1),
        (row, [sums | {"ours": "", "ratio": "", "note": "error"}], "goal 200,000: met", 0),
    ):
        pd.DataFrame([cells, *rows]).to_csv(tmp_path / "gpu.csv", index=False)
        lines = "\n".join(report._gpu(tmp_path))
        assert met in lines
        assert lines.count("Estimate") == estimates
    pd.DataFrame([row | {"ours": gpu.NO_ROOM, "ratio": ""}]).to_csv(tmp_path / "gpu.csv", index=False)
    assert "Search in cells" not in "\n".join(report._gpu(tmp_path))


def test_the_page_says_what_did_not_run(tmp_path: Path) -> None:
    part = {"what": "latency", "status": "timeout", "wall_s": 9.0, "limit_s": 9}
    about = {
        "device": "D",
        "cuda": "13",
        "machine": "M",
        "commit": "c",
        "versions": dict.fromkeys(summary.versions(), "1"),
    }
    (tmp_path / "summary.json").write_text(
        json.dumps({"c": part | {"where": about}, "d": part | {"where": about | {"device": "E"}}})
    )
    row = {
        "system": "MemDec", "phase": "total", "prompt_tokens": "128", "n_tokens": "48", "tokens_per_s": "9",
        "ratio_to_base": "1.5", "ratio_low": "1.4", "ratio_high": "1.6", "paper_ratio": "1.28", "device": "D", "turns": "3",
        "machine": "M",
    }  # fmt: skip
    pd.DataFrame([row]).to_csv(tmp_path / "latency.csv", index=False)
    lines = report._gpu(tmp_path)
    assert any(re.search(r"\| c +\| latency +\| timeout", line) for line in lines)
    assert any(line.startswith("- Part d: E, ") for line in lines)
    assert "- Not measured: prompts of 1,024 tokens." in lines
    assert "- MemDec misses its goal: 1.50 (total, prompt of 128)." in lines


def test_what_is_published_names_no_folder() -> None:
    files = [path for name in ("gpu", "gpu-run") for path in (ROOT / "results" / "reference" / name).iterdir()]
    assert {"summary.json", "tests.txt", "gpu.csv", "latency.csv", "table2.csv", "table16.csv"} <= {
        path.name for path in files
    }
    assert not re.search("/(root|opt|home|tmp|work)/", "".join(path.read_text() for path in files))


def test_a_twin_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a quarter of the work is one more."""

    def make(n: int) -> gpu.Sides:
        def twin() -> list[gpu.Tensor]:
            if n > 100:
                raise gpu.torch.OutOfMemoryError
            return [gpu.torch.ones(1)]

        return lambda: [gpu.torch.ones(1)], twin

    def broken(n: int) -> gpu.Sides:
        raise RuntimeError(f"no\n{n}")

    sizes = gpu.Sizes(length=25)
    given = [gpu.Bench(name, "twin", each, 200, "ms", 0.0, shrinks=True) for name, each in (("a", make), ("b", broken))]
    monkeypatch.setattr(gpu, "benches", lambda *_: iter(given))
    first, second, third = gpu.rows(sizes, "cpu", [])
    assert (first["n"], first["twin"], first["note"]) == (200, gpu.NO_ROOM, "twin does not fit into the memory")
    assert float(first["ours"]) >= 0
    assert "ratio" not in first
    assert (second["n"], second["difference"]) == (50, "0.0e+00")
    assert float(second["ratio"]) > 0
    assert third["note"] == "error: RuntimeError: no 200"


def test_other_results_have_no_ratio() -> None:
    bench = gpu.Bench(
        "a", "twin", lambda n: (lambda: [gpu.torch.ones(n)], lambda: [gpu.torch.zeros(n) + 2]), 3, "ms", 0.1
    )
    found = gpu.measure(bench, gpu.TINY, "cpu")
    assert found["note"] == "results differ by 5.0e-01, allowed 1e-01"
    assert "ratio" not in found

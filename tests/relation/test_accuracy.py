"""A bound of total variation in the place of nprobe: what is measured is that of the targets, and the fewest cells are taken."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import run_memdec, write_store, write_tokens

from memdec.artefacts import artefact
from memdec.datastore import accuracy, index, targets
from memdec.datastore.keys import Datastore
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ConfigError
from memdec.maths.sparse_rows import SparseRows, total_variation
from memdec.settings import IndexSettings, TargetSettings

N, D, V, K = 1200, 6, 500, 64
CELLS = [1, 2, 4, 16]
SETTINGS: dict[str, Any] = {"centroids": 16, "check_neighbours": 80, "check_queries": 50, "check_nprobe": CELLS}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cloud of keys, cut into 16 cells: few cells miss much."""
    folder, rng = tmp_path_factory.mktemp("accuracy"), np.random.default_rng(0)
    stream = write_tokens(folder / "tokens", rng.integers(0, V, N).astype(np.uint16))
    write_store(folder / "store", rng.normal(size=(N, D)).astype(np.float16), stream, edges=[0, N])
    kinds = {"cells": {"kind": "cells"}, "exact": {}, "ivfpq": {"kind": "ivfpq", "code_size": 3}}
    with warnings.catch_warnings(action="ignore"):
        for name, changes in kinds.items():
            index.run(stores(folder), folder / name, IndexSettings.model_validate({**SETTINGS, **changes}))
    return folder


def stores(home: Path) -> list[Path]:
    return sorted((home / "store").iterdir())


def made(home: Path, out: Path, kind: str = "cells", **changes: Any) -> artefact.Manifest:
    settings = TargetSettings.model_validate({"neighbours": K, "temperature": 1.0} | changes)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # rows that are short
        targets.run(stores(home), home / kind, home / "tokens", out, settings)
    return artefact.read(out, "targets")


def rows(home: Path, out: Path) -> SparseRows:
    return TargetReader([out], artefact.read(home / "tokens", "tokens").facts["sha256"]["train"]).rows([(0, N)])


def said(home: Path, kind: str = "cells", distances: str = "rescored", k: int = K, tau: str = "1") -> dict[int, float]:
    check = artefact.read(home / kind, "index").facts["check"]["nprobe"]
    return {int(nprobe): each[distances]["total_variation"][str(k)][tau] for nprobe, each in check.items()}


@pytest.mark.parametrize(("k", "tau"), [(K, 1.0), (K, 16.0), (80, 0.25)])
@pytest.mark.parametrize("kind", ["cells", "ivfpq"])
def test_what_an_index_measures_is_the_total_variation_of_the_targets(
    home: Path, tmp_path: Path, kind: str, k: int, tau: float
) -> None:
    """The same k and tau, and a position is not its own neighbour: otherwise these means would differ."""
    of_exact = made(home, tmp_path / "exact", "exact", neighbours=k, temperature=tau)
    assert of_exact.facts["total_variation"] is None
    own, _ = Datastore(stores(home)).sample(SETTINGS["check_queries"], 1)
    for nprobe in CELLS:
        made(home, tmp_path / str(nprobe), kind, neighbours=k, temperature=tau, nprobe=nprobe)
        found = total_variation(rows(home, tmp_path / str(nprobe)), rows(home, tmp_path / "exact"))[own].mean()
        assert said(home, kind, k=k, tau=f"{tau:g}")[nprobe] == pytest.approx(found, abs=1e-4)


def test_the_fewest_cells_within_the_bound_are_searched(home: Path, tmp_path: Path) -> None:
    measured = said(home)
    assert list(measured) == CELLS
    assert measured[2] > 1.5 * measured[4] > 0
    for bound, nprobe in ((measured[2], 2), (measured[2] * 0.999, 4), (0.9999, 1)):
        chosen = made(home, tmp_path / f"{bound}", max_tv=bound)
        assert chosen.settings["nprobe"] == nprobe
        assert chosen.facts["total_variation"] == measured[nprobe]
        stated = made(home, tmp_path / f"stated-{nprobe}", nprobe=nprobe)
        assert stated.recipe == chosen.recipe  # both are the same targets
        assert stated.facts == chosen.facts | {"total_variation": None}
        ours, theirs = rows(home, tmp_path / f"{bound}"), rows(home, tmp_path / f"stated-{nprobe}")
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.probs, theirs.probs)


def test_distances_of_the_index_have_a_bound_of_their_own(home: Path, tmp_path: Path) -> None:
    exact, released = said(home, "ivfpq"), said(home, "ivfpq", "released")
    assert released[16] > exact[16]
    bound = (exact[16] + released[16]) / 2
    assert made(home, tmp_path / "t", "ivfpq", max_tv=bound).settings["nprobe"] == 16
    with pytest.raises(ConfigError, match=r"expected total variation of at most .*, found .* with nprobe"):
        made(home, tmp_path / "r", "ivfpq", max_tv=bound, released=True)


def test_exact_search_meets_any_bound(home: Path, tmp_path: Path) -> None:
    made(home, tmp_path / "t", "exact", max_tv=1e-9, neighbours=33, temperature=0.7)
    made(home, tmp_path / "stated", "exact", neighbours=33, temperature=0.7)
    np.testing.assert_array_equal(rows(home, tmp_path / "t").probs, rows(home, tmp_path / "stated").probs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"max_tv": 1e-12, "temperature": 16.0},
            r"^max_tv: expected total variation of at most 1e-12 with k 64 and tau 16, found 0\.\d{4} at best, with nprobe "
            r"\d+ of .*cells; raise max_tv, or run `memdec index` again with larger --check-nprobe$",
        ),
        (
            {"max_tv": 0.5, "neighbours": 65},
            r"k 65, tau 1 and exact distances in .*cells, found k 64, 80 and tau none;",
        ),
        ({"max_tv": 0.5, "temperature": 3.0}, r"k 64, tau 3 and .* found k 64, 80 and tau 0.25, .*, 256; state nprobe"),
    ],
)
def test_a_bound_that_cannot_be_met_is_refused_before_any_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    if changes["max_tv"] < 0.1:  # so that even all cells differ from exact search
        edited(home, monkeypatch, lambda by_k: {k: {tau: v + 0.01 for tau, v in by.items()} for k, by in by_k.items()})
    with pytest.raises(ConfigError, match=says):
        made(home, tmp_path / "t", **changes)
    assert not (tmp_path / "t").exists()


def test_an_index_of_an_older_version_measured_nothing_by_k(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(home, monkeypatch, lambda by_k: {"1.0": 0.0, "16.0": 0.0})
    with pytest.raises(ConfigError, match=r"found k 1\.0, 16\.0 and tau none; state nprobe, or make the index again"):
        made(home, tmp_path / "t", max_tv=0.5)


def edited(home: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change what the manifest of the index says, for readers in this test."""
    real = artefact.read

    def read(path: Path, kind: str, whole: bool = False) -> artefact.Manifest:
        manifest = real(path, kind, whole)
        if kind == "index":
            facts = json.loads(json.dumps(manifest.facts))
            for by in facts["check"]["nprobe"].values():
                by["rescored"]["total_variation"] = change(by["rescored"]["total_variation"])
            manifest = manifest.model_copy(update={"facts": facts})
        return manifest

    monkeypatch.setattr(artefact, "read", read)


def test_the_worst_of_several_temperatures_counts(home: Path) -> None:
    cold, warm = said(home), said(home, tau="256")
    assert {cold[n] > warm[n] for n in (1, 2)} == {True} or {cold[n] < warm[n] for n in (1, 2)} == {True}
    bound = (cold[2] + warm[2]) / 2  # one of both is within it
    nprobe = accuracy.within(bound, home / "cells", K, [1.0, 256.0]).nprobe
    assert nprobe == min(n for n in CELLS if max(cold[n], warm[n]) <= bound) > 2


def test_advice_names_the_fewest_cells_for_the_tau_of_the_paper(home: Path) -> None:
    check = {tau: said(home, k=80, tau=tau) for tau in ("1", "16")}
    bound = check["16"][2]
    lines = accuracy.advice(bound, home / "cells")
    best = {tau: min(n for n in CELLS if by[n] <= bound) for tau, by in check.items()}
    assert [line.split(": ")[1] for line in lines] == [
        f"nprobe {best[tau]} (total variation {check[tau][best[tau]]:.4f})" for tau in ("1", "16")
    ]
    rough = said(home, "ivfpq", k=80, tau="16")[16]
    assert accuracy.advice(rough / 2, home / "ivfpq")[1] == (
        f"max_tv {rough / 2:g}, k 80, tau 16: no nprobe of 1, 2, 4, 16 (total variation {rough:.4f} at best)"
    )
    assert accuracy.advice(0.01, home / "exact")[0].endswith("any nprobe, as search is exact")


def test_the_commands_take_a_bound_and_name_its_faults(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index_words = [word for name, value in SETTINGS.items() if name != "check_nprobe" for word in (_flag(name), value)]
    index_words += [word for value in CELLS for word in ("--check-nprobe", value)]
    store = stores(home)[0]
    made_already = (home / "cells" / "manifest.json").read_bytes()
    words = ["index", "--datastore", store, "--out", home / "cells", "--kind", "cells", *index_words, "--max-tv", 0.3]
    code, said_there, _ = run_memdec(capsys, *map(str, words))
    assert (code, said_there.splitlines()) == (0, accuracy.advice(0.3, home / "cells"))
    assert (home / "cells" / "manifest.json").read_bytes() == made_already
    folders = ["--datastore", store, "--index", home / "cells", "--tokens", home / "tokens", "--out", tmp_path / "t"]
    common = ["targets", *folders, "--neighbours", K]
    for more, says in (
        (["--max-tv", 0.3, "--nprobe", 32], "found both (0.3, nprobe 32); leave out one"),
        (["--max-tv", 0.3, "--temperature", 7], "expected total variation measured with k 64, tau 7"),
    ):
        code, _, text = run_memdec(capsys, *map(str, [*common, *more]))
        assert (code, text.count("\n")) == (2, 1)
        assert says in text
    assert not (tmp_path / "t").exists()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

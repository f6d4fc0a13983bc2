"""How true the search of an index is: measured when the index is made, looked up where a bound is stated.

Measured are recall, and the total variation (TV) of p_kNN against exact search in float64, over a random sample of keys
as queries (`check_queries`). As in the targets, a query is removed from its own neighbours by its position, and k and
tau are the same. `top` and `threshold`, which cut the rows of targets, are left out. Queries that are no keys (text of
another split) may be farther from the keys, so their TV may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import softmax

from memdec.artefacts import artefact
from memdec.datastore.keys import Datastore
from memdec.datastore.search import Pair, Searcher
from memdec.errors import ConfigError
from memdec.maths import knn
from memdec.maths.sparse_rows import SparseRows, total_variation
from memdec.settings import NPROBE, IndexSettings, TargetSettings, parse


@dataclass(frozen=True, slots=True)
class Choice:
    """The cells to search, and the total variation measured with them (None: no bound was stated, or all are searched)."""

    nprobe: int
    total_variation: float | None = None


def measure(
    searcher: Searcher, queries: Float[np.ndarray, "B D"], own: Int[np.ndarray, " B"], true: Pair
) -> dict[str, Any]:
    """Recall and total variation for each nprobe of the settings, with exact distances and with those of the index.

    Args:
        searcher: The search of the index.
        queries: Keys of the datastore.
        own: Their positions.
        true: Their exact neighbours, nearest first, as many as the largest k.

    Returns:
        nprobe (or `all`) -> `rescored` or `released` -> `recall` at the largest k, and `total_variation` -> k -> tau.
    """
    settings, most = searcher.settings, true[1].shape[1]
    results: dict[str, Any] = {}
    cells = sorted({min(nprobe, settings.centroids) for nprobe in settings.check_nprobe})
    for nprobe in cells if settings.has_cells else ["all"]:
        if isinstance(nprobe, int):
            searcher.set_nprobe(nprobe)
        results[str(nprobe)] = {}
        for name, released in (("rescored", False), ("released", True)):
            if not released and not searcher.store.parts:
                continue
            variations: dict[str, dict[str, float]] = {}
            for k in sorted({min(k, most) for k in settings.measured_neighbours}):
                near = searcher.search(queries, k, own, released=released)
                exact = true[0][:, :k], true[1][:, :k]
                variations[str(k)] = {
                    _name(tau): _variation(searcher, near, exact, tau) for tau in settings.measured_temperatures
                }
            recall = knn.recall(near[1], true[1])
            results[str(nprobe)][name] = {"recall": recall, "total_variation": variations}
    return results


def same_place(store: Datastore, own: Int[np.ndarray, " B"], true: Pair) -> float:
    """The share of p_kNN (tau 1) that is on keys of the query's own place in its window, mean over queries.

    Args:
        store: The keys.
        own: Positions of the queries.
        true: As in `measure`.
    """
    sq_dist, ids = true
    if not ids.shape[1]:
        return 0.0
    weights = softmax(-sq_dist.astype(np.float64), axis=1)
    there = store.places(ids) == store.places(own)[:, None]
    return float((weights * there).sum(1).mean())


def _name(temperature: float) -> str:
    return f"{temperature:g}"


def _variation(searcher: Searcher, near: Pair, true: Pair, temperature: float) -> float:
    """Mean total variation between the p_kNN of two sets of neighbours; a row without neighbours counts as 1."""
    there = np.asarray(np.isfinite(near[0]).any(1))

    def rows(pair: Pair) -> SparseRows:
        sq_dist, ids = (torch.from_numpy(np.ascontiguousarray(each[there])) for each in pair)
        return SparseRows.of(*searcher.rows(sq_dist, ids, temperature))

    return float((total_variation(rows(near), rows(true)).sum() + (~there).sum()) / len(there))


def of_targets(settings: TargetSettings, folder: Path) -> Choice:
    """The cells that targets search in the index of a folder: `nprobe`, or the fewest measured within `max_tv`.

    Raises:
        ConfigError: As `within`.
    """
    if settings.max_tv is None:
        return Choice(settings.nprobe or NPROBE)
    return within(settings.max_tv, folder, settings.neighbours, [settings.temperature], released=settings.released)


def within(
    max_tv: float, folder: Path, neighbours: int, temperatures: Sequence[float], *, released: bool = False
) -> Choice:
    """The smallest nprobe for which the index in a folder measured at most this total variation.

    An index without cells compares with all keys, so it meets any bound.

    Args:
        max_tv: The bound.
        folder: The index.
        neighbours: k.
        temperatures: tau; with several the largest total variation counts.
        released: Whether distances are those of the index.

    Raises:
        ConfigError: It did not measure this k or tau, or no nprobe that it measured is good enough.
    """
    found = _measured(folder, neighbours, temperatures, released)
    if not found:
        return Choice(NPROBE)
    for nprobe, variation in found.items():
        if variation <= max_tv:
            return Choice(nprobe, variation)
    best = min(found, key=lambda nprobe: found[nprobe])
    raise ConfigError(
        f"max_tv: expected total variation of at most {max_tv:g} with k {neighbours} and tau "
        f"{', '.join(map(_name, temperatures))}, found {found[best]:.4f} at best, with nprobe {best} of {folder}; raise "
        "max_tv, or run `memdec index` again with larger --check-nprobe"
    )


def advice(max_tv: float, folder: Path) -> list[str]:
    """The nprobe that meets a bound of total variation, as a line for each tau of the paper; distances are exact.

    Distances are those of the index where the keys are streamed.

    Raises:
        ConfigError: The index did not measure it.
    """
    check = artefact.read(folder, "index").facts["check"]
    released = not all("rescored" in each for each in check["nprobe"].values())
    lines = []
    for tau in (1.0, 16.0):
        found = _measured(folder, check["neighbours"], [tau], released)
        good = [nprobe for nprobe, variation in found.items() if variation <= max_tv]
        said = f"nprobe {good[0]} (total variation {found[good[0]]:.4f})" if good else "any nprobe, as search is exact"
        if found and not good:
            said = f"no nprobe of {', '.join(map(str, found))} (total variation {min(found.values()):.4f} at best)"
        lines.append(f"max_tv {max_tv:g}, k {check['neighbours']}, tau {_name(tau)}: {said}")
    return lines


def _measured(folder: Path, neighbours: int, temperatures: Sequence[float], released: bool) -> dict[int, float]:
    """The largest total variation among these tau for each nprobe, ascending; empty for an index without cells."""
    manifest = artefact.read(folder, "index")
    if not parse(IndexSettings, manifest.settings, str(folder)).has_cells:
        return {}
    kind, found = "released" if released else "rescored", {}
    for nprobe, measured in sorted(manifest.facts["check"]["nprobe"].items(), key=lambda item: int(item[0])):
        by_k = measured.get(kind, {}).get("total_variation", {})
        by_tau = by_k.get(str(neighbours), {})  # an older manifest has one k, and does not say which
        if missing := [tau for tau in map(_name, temperatures) if tau not in by_tau]:
            taus = ", ".join(by_tau) or "none"
            raise ConfigError(
                f"max_tv: expected total variation measured with k {neighbours}, tau {missing[0]} and "
                f"{'distances of the index' if released else 'exact distances'} in {folder}, found k {', '.join(by_k)} "
                f"and tau {taus}; state nprobe, or make the index again with check_neighbours {neighbours}"
            )
        found[int(nprobe)] = max(by_tau[_name(tau)] for tau in temperatures)
    return found

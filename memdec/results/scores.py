"""The per-token scores in a folder, which later stages read without a model: weights, paired tests, alpha curves.

    scores, stride = token_scores(folder)           # of an evaluation's test text
    log_p = scores.log_p(record["alpha"])           # (N,), the tokens of the text in order
    sums, counts = statistics.window_sums(log_p, statistics.item_tokens(len(log_p), stride))

`scores/<split>.safetensors` holds float64 arrays (N,) of log-probabilities (nats) of the true tokens in text order. For a
general text it is `scores/<split>-<corpus>.safetensors`. An evaluation has the arrays `base`, the first distribution of
the evaluated system (the base, or what DAPT, LoRA and In-Context RAG make of it), and `memory`, the second one of systems
that mix two: p_mem over the base's vocabulary, or p_kNN at the chosen temperature. What `memdec score` makes has the
second distribution alone: `memory`, or p_kNN at every temperature.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, outside
from memdec.harness.scores import TokenScores
from memdec.settings import Split

MEMORY = "memory"


def token_scores(folder: Path, split: Split = "test", on: str | None = None) -> tuple[TokenScores, int]:
    """Scores of a text, and the stride: tokens scored per window.

    Args:
        folder: Evaluation folder. Base and MemDec have the splits valid and test, as has the kNN-LM; others have test.
        split: Split of the text.
        on: Name of the general corpus; None is the corpus that was evaluated.

    Raises:
        ArtifactError: The folder is no whole evaluation, or has no scores of this text.
    """
    manifest = artefact.read(folder, "evaluation")
    arrays = _arrays(folder, split, on, "evaluate")
    return TokenScores(arrays["base"], arrays.get(MEMORY)), int(manifest.settings["stride"])


def alone(folder: Path, split: Split, on: str | None = None) -> dict[str, NDArray[np.float64]]:
    """Scores of a text in what `memdec score` made, by name: `MEMORY`, or that of `tau`.

    Raises:
        ArtifactError: The folder is not whole, or has no scores of this text.
    """
    artefact.read(folder, "scores")
    return _arrays(folder, split, on, "score")


def _arrays(folder: Path, split: Split, on: str | None, command: str) -> dict[str, NDArray[np.float64]]:
    file = _file(folder, split, on)
    if not file.is_file():
        found = ", ".join(sorted(path.stem for path in file.parent.glob("*.safetensors"))) or "none"
        raise ArtifactError(f"{folder}: expected scores of {file.stem}, found {found}; run memdec {command} again")
    from safetensors.numpy import load_file

    with outside(ArtifactError, file, "stored scores", f"run memdec {command} again"):
        arrays: dict[str, NDArray[np.float64]] = load_file(file)
        return arrays


def write(folder: Path, scores: TokenScores, split: Split, on: str | None = None) -> None:
    """Write the scores of a text into an evaluation folder."""
    arrays = {"base": scores.base} | ({} if scores.memory is None else {MEMORY: scores.memory})
    write_alone(folder, arrays, split, on)


def write_alone(folder: Path, arrays: Mapping[str, NDArray[np.float64]], split: Split, on: str | None = None) -> None:
    """Write scores of a text, by the names that `alone` returns."""
    from safetensors.numpy import save

    artefact.write_bytes(_file(folder, split, on), save(dict(arrays)))


def tau(temperature: float) -> str:
    """Name of p_kNN at a temperature."""
    return f"p_kNN at {temperature!r}"


def name(split: Split, on: str | None) -> str:
    """Name of a text in files and manifests."""
    return split if on is None else f"{split}-{on}"


def _file(folder: Path, split: Split, on: str | None) -> Path:
    return folder / "scores" / f"{name(split, on)}.safetensors"

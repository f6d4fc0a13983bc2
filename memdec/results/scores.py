"""The per-token scores in an evaluation folder, which later stages read without a model: paired tests, alpha curves.

    scores, stride = token_scores(folder)           # of the test text
    log_p = scores.log_p(record["alpha"])           # (N,), the tokens of the text in order
    sums, counts = statistics.window_sums(log_p, stride)

`scores/<split>.safetensors` holds float64 arrays (N,) of log-probabilities (nats) of the true tokens in text order. An
evaluation on general text too has `scores/<split>-<corpus>.safetensors`. `base` is the first distribution of the
evaluated system: the base, or what DAPT, LoRA and In-Context RAG make of it. `memory` is the second one of systems that
mix two: p_mem over the base's vocabulary, or p_kNN at the chosen temperature.
"""

from pathlib import Path

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, outside
from memdec.harness.scores import TokenScores
from memdec.settings import Split


def token_scores(folder: Path, split: Split = "test", on: str | None = None) -> tuple[TokenScores, int]:
    """Scores of a text, and the stride: tokens scored per window, which are the items of intervals and tests.

    Args:
        folder: Evaluation folder. Base and MemDec have the splits valid and test, as has the kNN-LM; others have test.
        split: Split of the text.
        on: Name of the general corpus; None is the corpus that was evaluated.

    Raises:
        ArtifactError: The folder is no whole evaluation, or has no scores of this text.
    """
    manifest, file = artefact.read(folder, "evaluation"), _file(folder, split, on)
    if not file.is_file():
        found = ", ".join(sorted(path.stem for path in file.parent.glob("*.safetensors"))) or "none"
        raise ArtifactError(f"{folder}: expected scores of {file.stem}, found {found}; run memdec evaluate again")
    from safetensors.numpy import load_file

    with outside(ArtifactError, file, "stored scores", "run memdec evaluate again"):
        arrays = load_file(file)
        return TokenScores(arrays["base"], arrays.get("memory")), int(manifest.settings["stride"])


def write(folder: Path, scores: TokenScores, split: Split, on: str | None = None) -> None:
    """Write the scores of a text into an evaluation folder."""
    from safetensors.numpy import save

    arrays = {"base": scores.base} | ({} if scores.memory is None else {"memory": scores.memory})
    artefact.write_bytes(_file(folder, split, on), save(arrays))


def _file(folder: Path, split: Split, on: str | None) -> Path:
    return folder / "scores" / f"{split if on is None else f'{split}-{on}'}.safetensors"

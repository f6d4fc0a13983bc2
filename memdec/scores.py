"""Per-token scores of base and memory, stored once, so that every alpha afterwards is arithmetic.

A score file holds log p_base and log p_mem (float32, shape (N,)) of one text under one pair of models and one window
setting; its name is the hash of all of these. Files are written whole or not at all.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from memdec import artifacts


@dataclass(frozen=True, slots=True)
class TokenScores:
    """log-probabilities (nats) of the true tokens; `memory` is None where no memory was given."""

    base: NDArray[np.float32]
    memory: NDArray[np.float32] | None


def model_identity(name: str, revision: str | None = None) -> str:
    """What decides a model's outputs: a hash of the folder's weights and configuration, or Hub id and revision.

    Not the recipe of an artefact: the same recipe under changed code may give other weights.
    """
    path = Path(name)
    if not path.is_dir():
        return f"{name}@{revision or 'main'}"
    files = sorted(
        file for file in path.iterdir() if file.suffix in (".safetensors", ".json") and file.name != artifacts.MANIFEST
    )
    return artifacts.digest([(file.name, artifacts.file_digest(file)) for file in files])


@dataclass(frozen=True, slots=True)
class ScoreStore:
    """A folder of score files for one setting (models, windows, dtype)."""

    folder: Path
    setting: str

    def path(self, text: str) -> Path:
        """Where the scores of a text are, or would be."""
        name = artifacts.digest([self.setting, hashlib.sha256(text.encode()).hexdigest()])
        return self.folder / f"{name}.safetensors"

    def get(self, text: str) -> TokenScores | None:
        """Stored scores, or None; a damaged file counts as none."""
        path = self.path(text)
        try:
            data = load_file(path)
        except (FileNotFoundError, SafetensorError):
            return None
        return TokenScores(data["log_p_base"], data.get("log_p_mem"))

    def put(self, text: str, scores: TokenScores) -> None:
        """Store scores whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(text)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        data = {"log_p_base": scores.base}
        if scores.memory is not None:
            data["log_p_mem"] = scores.memory
        save_file(data, part)
        part.replace(path)

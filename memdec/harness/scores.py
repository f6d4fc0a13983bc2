"""Store per-token scores of base and memory, so that other alphas need no model, only arithmetic.

A store is a folder for one setting (models by the content of their weights, tokenizer, number types). A request is a
text of a corpus, or a context with a continuation. For each scored request the store holds log p_base and log p_mem of
every scored token, and the interval of alphas for which all of them are the greedy choice. Scores are written in parts
while a run goes on, each part atomically. So a killed run resumes, and several processes may write to one store.

The name of a part is the hash of its setting and content. A part that does not fit its name is damaged or of another
store: its scores are made again.
"""

import hashlib
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load, save

from memdec.artefacts import artefact
from memdec.maths import weighing

FORMAT = 3
_FLUSH = 1_000_000  # tokens in memory before a part is written
_MOST_LOST = 60.0  # seconds of work that a killed run may lose


@dataclass(frozen=True, slots=True)
class TokenScores:
    """log-probabilities (nats) of the true tokens, float64 (N,); `memory` is None if the memory did not run.

    `greedy` is (from, to): every token is the most probable one exactly for these alphas. It is None if not computed.
    """

    base: NDArray[np.float64]
    memory: NDArray[np.float64] | None
    greedy: tuple[float, float] | None = None

    def log_p(self, alpha: float) -> NDArray[np.float64]:
        """log-probability of each token under the mixture."""
        return weighing.mix_scores(self.base, self.base if self.memory is None else self.memory, alpha)

    def is_greedy(self, alpha: float) -> bool:
        """Whether greedy decoding of the mixture gives these tokens."""
        assert self.greedy is not None
        return self.greedy[0] <= alpha <= self.greedy[1]


def request_key(kind: str, *parts: Any) -> bytes:
    """16-byte hash of a request: of its kind, its token ids and everything else that its scores depend on."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(b"|")
        digest.update(np.asarray(part, np.int64).tobytes())
    return digest.digest()[:16]


class ScoreStore:
    """The scores of one setting.

    Args:
        folder: Parent folder of the stores of all settings; None keeps scores in memory only.
        setting: Everything that scores depend on besides the request; written to `manifest.json` as text.
    """

    def __init__(self, folder: Path | None, setting: Mapping[str, Any]) -> None:
        self.setting = dict(setting)
        self._known: dict[bytes, TokenScores] = {}
        self._new: dict[bytes, TokenScores] = {}
        self._n_new, self._flushed = 0, time.monotonic()
        self.folder = None if folder is None else folder / artefact.digest([FORMAT, self.setting])
        if self.folder is None:
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            self._known.update(self._read(path))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: bytes) -> TokenScores | None:
        """Stored scores, or None."""
        return self._known.get(key)

    def put(self, key: bytes, scores: TokenScores) -> None:
        """Keep scores; `flush` writes them to disk and is called automatically from time to time."""
        self._known[key] = scores
        if self.folder is None:
            return
        self._new[key] = scores
        self._n_new += len(scores.base)
        if self._n_new >= _FLUSH or time.monotonic() - self._flushed >= _MOST_LOST:
            self.flush()

    def flush(self) -> None:
        """Write the new scores as one part."""
        if not self._new or self.folder is None:
            return
        data = save(_pack(self._new))
        # The manifest is first, as a store with all of its parts never writes again.
        artefact.write_json(self.folder / "manifest.json", {"format": FORMAT, "setting": self.setting})
        artefact.write_bytes(self.folder / self._name(data), data)
        self._new, self._n_new, self._flushed = {}, 0, time.monotonic()

    def _name(self, data: bytes) -> str:
        assert self.folder is not None
        return f"{xxhash.xxh3_128_hexdigest(self.folder.name.encode() + data)}.safetensors"

    def _read(self, path: Path) -> dict[bytes, TokenScores]:
        """The scores of one part. A damaged part is removed; a file that is no part is left."""
        try:
            data = path.read_bytes()
        except OSError as error:
            warnings.warn(f"{path}: cannot be read ({error}), its scores are made again", stacklevel=4)
            return {}
        if path.name == self._name(data):
            return _unpack(load(data))
        is_part = re.fullmatch("[0-9a-f]{32}", path.stem) is not None
        what = "not whole" if is_part else "not of this store"
        warnings.warn(f"{path}: {what}, its scores are made again", stacklevel=4)
        if is_part:
            with suppress(OSError):
                path.unlink()
        return {}


def _pack(scores: Mapping[bytes, TokenScores]) -> dict[str, NDArray[Any]]:
    rows = list(scores.values())
    missing = [row.memory is None for row in rows]
    nothing = (np.nan, np.nan)
    return {
        "keys": np.frombuffer(b"".join(scores), np.uint8).reshape(len(rows), 16),
        "lengths": np.array([len(row.base) for row in rows]),
        "log_p_base": np.concatenate([row.base for row in rows]),
        "log_p_mem": np.concatenate([row.base if row.memory is None else row.memory for row in rows]),
        "no_memory": np.array(missing),
        "greedy": np.array([row.greedy or nothing for row in rows], np.float64),
    }


def _unpack(data: Mapping[str, NDArray[Any]]) -> dict[bytes, TokenScores]:
    ends = np.cumsum(data["lengths"])
    found = {}
    for i, key in enumerate(data["keys"]):
        span = slice(ends[i] - data["lengths"][i], ends[i])
        memory = None if data["no_memory"][i] else data["log_p_mem"][span]
        greedy = (
            None if np.isnan(data["greedy"][i]).any() else (float(data["greedy"][i, 0]), float(data["greedy"][i, 1]))
        )
        found[key.tobytes()] = TokenScores(data["log_p_base"][span], memory, greedy)
    return found

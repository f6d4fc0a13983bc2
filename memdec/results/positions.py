"""The positions on which memories and models are compared with their targets: the same sample for every model.

A position's distributions depend on its context and its neighbours', so positions of one window are dependent and whole
windows are drawn: an evenly spread sample of the evaluation's windows over the train split, with a start that the seed
chooses. Intervals resample these windows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from memdec.artefacts import artefact, devices
from memdec.datastore.keys import Forward
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, NumericsError
from memdec.maths import losses, mixing, statistics
from memdec.maths.sparse_rows import SparseRows
from memdec.maths.windows import Window, sample, windows
from memdec.models import loading
from memdec.settings import Compute, DatastoreSettings, SampleSettings
from memdec.text import tokens


class Block(NamedTuple):
    """Consecutive positions of one window, with the distributions of each.

    Attributes:
        window: Number of the window in the sample.
        first: First position.
        rows: Targets of the positions.
        log_p: log-probabilities of each model over the tokenizer's vocabulary, (N, V) float32.
    """

    window: int
    first: int
    rows: SparseRows
    log_p: list[Float[Tensor, "N V"]]


class Positions:
    """A sample of the train split's windows and the targets of their positions; no model is loaded.

    Args:
        targets: All shards of the targets.
        stream: Token stream that they belong to.
        context: Most tokens that a model sees at once.
        stride: Tokens scored per window.
        settings: Size and seed of the sample.

    Raises:
        ArtifactError: The targets are of another stream, or do not cover it.
    """

    def __init__(
        self, targets: Sequence[Path], stream: Path, context: int, stride: int, settings: SampleSettings
    ) -> None:
        self.source = artefact.read(stream, "tokens")
        self.reader = TargetReader(targets, expected_tokens=self.source.facts["sha256"]["train"])
        manifest = artefact.read(targets[0], "targets")
        self.made = manifest.settings
        self.imitates = "p_kNN" if "datastore" in manifest.inputs else "teacher"
        self.data = tokens.load_stream(stream, "train")
        if len(self.data) != manifest.facts["positions"]:
            raise ArtifactError(
                f"{targets[0]}: expected targets of {len(self.data)} positions, found some of "
                f"{manifest.facts['positions']}; make them again"
            )
        self.stream, self.context, self.stride, self.settings = stream, context, stride, settings
        self.windows = sample(windows(len(self.data), context, stride), stride, settings.most, settings.seed)

    @property
    def facts(self) -> dict[str, Any]:
        """What was sampled, for the manifest."""
        return {
            "imitates": self.imitates,
            "positions": sum(part.n_scored for part in self.windows),
            "of_positions": len(self.data),
            "windows": len(self.windows),
            "of_windows": len(windows(len(self.data), self.context, self.stride)),
            "corpora_sha256": {Path(self.source.facts["corpus"]).name: self.source.facts["corpus_sha256"]},
        }

    @property
    def inputs(self) -> dict[str, str]:
        """Recipes, for the manifest."""
        return {"tokens": self.source.recipe} | {f"targets {i}": made for i, made in enumerate(self.reader.recipes)}

    def check(self, folder: Path, *kinds: str) -> loading.Known:
        """Check that a model has the tokenizer of the stream, before it is loaded."""
        known = loading.known(folder, *kinds)
        tokens.check_same(
            self.source.facts["tokenizer_sha256"], known.facts["tokenizer_sha256"], f"{folder} with {self.stream}"
        )
        return known

    def check_memory(self, folder: Path, control: bool = False) -> loading.Known:
        """Check that a memory, or a model in its place, was made from the text of the stream; a control from another.

        A plain folder says nothing about its text.
        """
        known = self.check(folder, "memory", "model")
        origin, ours = known.facts.get("corpus_sha256"), self.source.facts["corpus_sha256"]
        if not control and origin not in (None, ours):
            raise ArtifactError(
                f"{folder}: expected a memory made from the text of {self.stream}, found one from other text; check the "
                "paths, or give --control for a negative control"
            )
        if control and origin in (None, ours):
            raise ArtifactError(
                f"{folder}: expected with --control a memory of another text than {self.stream}, found one of this text; "
                "leave out --control"
            )
        return known

    def blocks(self, models: Sequence[Path], compute: Compute) -> Iterator[Block]:
        """All positions of the sample in order, with the distributions of the models."""
        batch_size = self.settings.batch_size
        final = DatastoreSettings(split="train", key_point="final", batch_size=batch_size)
        forwards = [Forward(model, self.stream, final, self.context, self.stride, compute) for model in models]
        batches = [self.windows[i : i + batch_size] for i in range(0, len(self.windows), batch_size)]
        n_vocab = tokens.n_ids(tokens.load_tokenizer(str(models[0])))
        for forward in forwards:
            forward.batches = batches  # instead of all windows of the split
            loading.check_head(forward.point.model, bias=True)
        for number, batch in enumerate(batches):
            hidden = [forward.vectors(number) for forward in forwards]
            for i, part in enumerate(batch):
                yield from self._window(number * batch_size + i, part, forwards, [each[i] for each in hidden], n_vocab)

    @torch.no_grad()
    def _window(
        self, number: int, part: Window, forwards: Sequence[Forward], hidden: Sequence[Tensor], n_vocab: int
    ) -> Iterator[Block]:
        """The positions of one window in blocks that bound memory."""
        size = losses.block_rows(part.n_scored, n_vocab, hidden[0].device.type)
        for begin in range(0, part.n_scored, size):
            first, end = part.first + begin, min(part.first + begin + size, part.end)
            log_p = []
            for forward, states in zip(forwards, hidden, strict=True):
                head = forward.point.model.get_output_embeddings()
                logits = head(states[begin : begin + size]).float()
                if not torch.isfinite(logits).all():
                    raise NumericsError(
                        f"{forward.model_folder}: expected finite logits, found NaN or inf at a position from {first} to "
                        f"{end - 1}; train the model again"
                    )
                log_p.append(mixing.log_softmax(logits, n_vocab))
            yield Block(number, first, self.reader.rows([(first, end)]), log_p)


def window_means(
    values: NDArray[np.float64], window: NDArray[np.int64], use: NDArray[np.bool_], resamples: int, seed: int
) -> dict[str, Any]:
    """Mean over the positions in use, its 95 % bootstrap interval over windows, and how many of both there are.

    Windows are resampled instead of positions because positions of a window are dependent. The resampled value is the
    ratio of sums, so a window counts by its positions. Without any position, value and interval are None.
    """
    n_windows = int(window.max()) + 1
    sums = np.bincount(window[use], values[use], minlength=n_windows)
    counts = np.bincount(window[use], minlength=n_windows)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        return {"value": None, "low": None, "high": None, "n": 0, "windows": 0}

    def ratio(sums: NDArray[np.float64], counts: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        return np.asarray(sums.sum(axis) / counts.sum(axis))

    low, high = statistics.bootstrap(ratio, sums, counts, n_resamples=resamples, seed=seed)
    value = float(sums.sum() / counts.sum())
    return {"value": value, "low": float(low), "high": float(high), "n": int(counts.sum()), "windows": len(counts)}


def plain_settings(settings: SampleSettings, context: int, stride: int, compute: Compute) -> dict[str, Any]:
    """The settings that decide the result, for the manifest."""
    decides = {"context": context, "stride": stride, "precision": devices.precision(compute)}
    return {**settings.model_dump(mode="json", exclude={"batch_size"}), **decides}

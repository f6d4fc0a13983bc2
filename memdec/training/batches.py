"""Training batches: windows of a token stream in a fixed order, with the target rows of their positions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from memdec.datastore.target_rows import TargetReader
from memdec.maths.losses import IGNORED
from memdec.maths.windows import Window, windows

_FILLER = -1  # index of an empty window


class WindowData(Dataset[dict[str, Any]]):
    """Windows of a token stream as input ids and labels; positions that are not scored have label -100.

    Index -1 is an empty window, which fills up the last batch.
    """

    def __init__(self, stream: NDArray[np.integer], context: int, prefix: int) -> None:
        self.stream, self.prefix = stream, prefix
        self.parts = windows(len(stream), context, context)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == _FILLER:
            none = np.empty(0, dtype=np.int64)
            return {"first": 0, "end": 0, "inputs": none, "labels": none}
        part: Window = self.parts[index]
        labels = np.asarray(self.stream[part.begin : part.end], dtype=np.int64)
        labels[: part.first - part.begin] = IGNORED
        return {"first": part.first, "end": part.end, "inputs": part.inputs(self.stream, self.prefix), "labels": labels}


class Order(Sampler[int]):
    """Window indices of an epoch: a permutation from (seed, epoch), or 0, 1, ... without a seed, then empty windows.

    The empty windows make the number of indices a multiple of `multiple`, the windows per step of all processes.
    Otherwise accelerate would repeat the first windows and count them twice.
    """

    def __init__(self, n: int, multiple: int, seed: int | None) -> None:
        self.n, self.multiple, self.seed, self.epoch = n, multiple, seed, 0

    def __len__(self) -> int:
        return -(-self.n // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.n)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        yield from order.tolist()
        yield from [_FILLER] * (len(self) - self.n)


class Collate:
    """Pad windows on the right and join their target rows, if any, in CSR form over all positions of the batch.

    Positions that are not scored have empty rows.
    """

    def __init__(self, targets: TargetReader | None) -> None:
        self.targets = targets

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(1, *(len(item["inputs"]) for item in items))
        ids = np.zeros((len(items), width), dtype=np.int64)
        labels = np.full((len(items), width), IGNORED, dtype=np.int64)
        for row, item in enumerate(items):
            ids[row, : len(item["inputs"])] = item["inputs"]
            labels[row, : len(item["labels"])] = item["labels"]
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        batch["spans"] = torch.tensor([[item["first"], item["end"]] for item in items])
        if self.targets is not None:
            rows = self.targets.rows([(item["first"], item["end"]) for item in items])
            counts = np.zeros(labels.size, dtype=np.int64)
            counts[labels.ravel() != IGNORED] = np.diff(rows.indptr)
            batch["target_indptr"] = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
            batch["target_tokens"] = torch.from_numpy(rows.tokens.astype(np.int64))
            batch["target_probs"] = torch.from_numpy(np.asarray(rows.probs, dtype=np.float32))
        return batch

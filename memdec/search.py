"""Exact nearest neighbours in blocks: the queries stay, the keys stream past, memory does not depend on their number.

Distances are |k|^2 - 2 q k (one matrix product), so they carry its rounding; where exact ones matter they are taken
again from the keys (`memdec.knn.exact_distances`).
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memdec import kernels

_ROWS = 64  # queries per task of a thread


class Nearest:
    """The nearest neighbours of fixed queries among the keys seen so far.

    Args:
        queries: Shape (B, D); its device and dtype are those of the search.
        neighbours: How many to keep.
    """

    def __init__(self, queries: Float[Tensor, "B D"], neighbours: int) -> None:
        self.queries, self.neighbours = queries, neighbours
        self._norms = (queries * queries).sum(1, keepdim=True)
        room = 4 * neighbours + 1 if queries.device.type == "cpu" else 0
        self._near = queries.new_full((len(queries), room), np.inf)
        self._ids = torch.full((len(queries), room), -1, device=queries.device)
        self._counts = np.zeros(len(queries), np.int64)
        self._limits = np.full(len(queries), np.inf, queries.cpu().numpy().dtype)

    def update(self, keys: Float[Tensor, "n D"], first: int) -> None:
        """Add the keys of positions first, first + 1, ...; blocks must come in order."""
        keys = keys.to(self.queries)
        sq_dist = torch.addmm((keys * keys).sum(1)[None], self.queries, keys.T, alpha=-2)
        if sq_dist.device.type == "cpu":
            near, ids, found = self._near.numpy(), self._ids.numpy(), sq_dist.numpy()

            def work(a: int, b: int) -> None:
                kernels.keep_nearest(
                    found[a:b], first, near[a:b], ids[a:b], self._counts[a:b], self._limits[a:b], self.neighbours
                )

            kernels.in_threads(work, len(found), _ROWS)
            return
        self._near = torch.cat([self._near, sq_dist], 1)
        here = torch.arange(first, first + len(keys), device=sq_dist.device).expand_as(sq_dist)
        self._ids = torch.cat([self._ids, here], 1)
        self._cut()

    def _cut(self) -> None:
        keep = min(self.neighbours, self._near.shape[1])
        self._near, order = self._near.topk(keep, largest=False, sorted=False)
        self._ids = self._ids.gather(1, order)

    def result(self) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Squared distances, nearest first (ties: smaller position first on CPU), and positions.

        +inf and -1 where there were fewer keys than neighbours.
        """
        near, ids = self._near, self._ids
        if self.queries.device.type == "cpu":
            for row in range(len(near)):
                end, _ = kernels.cut(near[row].numpy(), ids[row].numpy(), self._counts[row], self.neighbours)
                self._counts[row] = end
            empty = torch.arange(self.neighbours) >= torch.from_numpy(self._counts)[:, None]
            near = near[:, : self.neighbours].masked_fill(empty, np.inf)
            ids = ids[:, : self.neighbours].masked_fill(empty, -1)
        near, order = near.add(self._norms).clamp_(min=0).sort(stable=True)
        ids = ids.gather(1, order)
        missing = self.neighbours - near.shape[1]
        return (
            torch.nn.functional.pad(near, (0, missing), value=np.inf),
            torch.nn.functional.pad(ids, (0, missing), value=-1),
        )

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs to go on after a kill."""
        return {
            "near": self._near.cpu().numpy(),
            "ids": self._ids.cpu().numpy(),
            "counts": self._counts,
            "limits": self._limits,
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from `state()`."""
        self._near = torch.from_numpy(state["near"]).to(self.queries)
        self._ids = torch.from_numpy(state["ids"]).to(self.queries.device)
        self._counts, self._limits = state["counts"].copy(), state["limits"].copy()

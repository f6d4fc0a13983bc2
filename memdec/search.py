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
        # Distances do not change when all move; near the origin |k|^2 - 2 q k loses the fewest digits. A median, as one
        # query far away (the first token of a window may be) must not move the others.
        self._centre = queries.median(0).values
        self.queries, self.neighbours = queries - self._centre, neighbours
        self._norms = (self.queries * self.queries).sum(1, keepdim=True)
        self._keys = self._sq_dist = queries.new_empty(0)
        room = 4 * neighbours if queries.device.type == "cpu" else 0
        self._near = queries.new_full((len(queries), room), np.inf)
        self._ids = torch.full((len(queries), room), -1, device=queries.device)
        self._counts = np.zeros(len(queries), np.int64)
        self._limits = np.full(len(queries), np.inf, queries.cpu().numpy().dtype)

    def update(self, keys: Float[Tensor, "n D"], first: int) -> None:
        """Add the keys of positions first, first + 1, ...; blocks must come in order."""
        # Into memory that is there: fresh memory takes a tenth of the time of the product.
        if len(self._keys) < len(keys):
            self._keys = self.queries.new_empty(keys.shape)
            self._sq_dist = self.queries.new_empty(len(self.queries) * len(keys))
        moved = torch.sub(keys.to(self.queries), self._centre, out=self._keys[: len(keys)])
        norms = torch.einsum("nd,nd->n", moved, moved)
        sq_dist = self._sq_dist[: len(self.queries) * len(keys)].view(len(self.queries), len(keys))
        torch.addmm(norms[None], self.queries, moved.T, alpha=-2, out=sq_dist)
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
        """Squared distances and positions, in no order; +inf and -1 where there were fewer keys than neighbours.

        On CPU the smaller positions are kept in a tie.
        """
        near, ids = self._near, self._ids
        if self.queries.device.type == "cpu":
            n, d, i = len(near), near.numpy(), ids.numpy()

            def work(a: int, b: int) -> None:
                kernels.cut_all(d[a:b], i[a:b], self._counts[a:b], self.neighbours)

            kernels.in_threads(work, n, _ROWS)
            near, ids = near[:, : self.neighbours], ids[:, : self.neighbours]
        near = (near + self._norms).clamp_(min=0)
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

"""Exact squared distances to scattered keys on CUDA, in one pass over them (Triton).

torch would write the gathered keys, read them for the differences, write those, and read them for the sum. Triton comes
with every build of torch for CUDA; only `exact_search.row_distances` imports this module, and only there.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_KEYS = 16  # keys per program
_DIMENSIONS = 128  # per step; the sums of one program are 16 x 128 float64 numbers in registers


def row_distances(queries: Float[Tensor, "B D"], keys: Tensor, places: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """As `exact_search.row_distances`, with the same differences in float32 and sums in float64.

    The order of a sum depends on D only, so a distance has the same bits in any call.
    """
    queries, keys, places = queries.contiguous(), keys.contiguous(), places.contiguous()
    out = torch.empty(places.shape, dtype=torch.float32, device=queries.device)
    blocks = triton.cdiv(places.shape[1], _KEYS)
    if out.numel():
        with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
            _row_distances[(len(places) * blocks,)](
                queries, keys, places, out, places.shape[1], blocks, queries.shape[1], _KEYS, _DIMENSIONS
            )
    return out


# Triton compiles the function with its annotations, of which it knows its own alone.
@triton.jit  # type: ignore[untyped-decorator]
def _row_distances(  # type: ignore[no-untyped-def]
    queries,
    keys,
    places,
    out,
    n_places,
    blocks,
    width: tl.constexpr,
    n_keys: tl.constexpr,
    n_dimensions: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * n_keys + tl.arange(0, n_keys)
    there = column < n_places
    place = tl.load(places + row * n_places + column, mask=there, other=0).to(tl.int64)
    total = tl.zeros((n_keys, n_dimensions), tl.float64)
    for begin in range(0, width, n_dimensions):
        dimension = begin + tl.arange(0, n_dimensions)
        inside = dimension < width
        query = tl.load(queries + row * width + dimension, mask=inside, other=0.0)
        key = tl.load(
            keys + place[:, None] * width + dimension[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        apart = (key.to(tl.float32) - query[None, :]).to(tl.float64)
        total += apart * apart
    tl.store(out + row * n_places + column, tl.sum(total, 1).to(tl.float32), mask=there)

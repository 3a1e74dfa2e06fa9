"""The nearest of many vectors, found exactly: each block of a matrix that may be mapped from a file is read once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.errors import DivergedError

_BYTES_PER_BLOCK = 2**22


def nearest(queries: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The vectors with the highest cosines to each query.

    Args:
        queries: float32 [Q, D].
        vectors: float [N, D] of any length and precision; may be mapped.
        count: K, how many for each query; at most N are found.

    Returns:
        Cosines float32 [Q, K], highest first, and row numbers int64 [Q, K]. Of equal cosines, the lower row comes
        first.

    Raises:
        ValueError: the dimensions differ.
        DivergedError: a vector is not finite.
    """
    if queries.shape[1] != vectors.shape[1]:
        raise ValueError(f"nearest: queries {list(queries.shape)}, vectors {list(vectors.shape)}")
    queries, count = F.normalize(queries.float(), dim=1), min(count, len(vectors))
    best, places = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    size = max(1, _BYTES_PER_BLOCK // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), size):
        block = vectors[start : start + size].float()
        lengths = torch.linalg.vector_norm(block, dim=1)
        if not bool(lengths.isfinite().all()):
            row = start + int(lengths.isfinite().int().argmin())
            raise DivergedError(f"row {row} of the embeddings is not finite", remedy="embed the pictures again")
        cosines = (queries @ block.T) / lengths.clamp(min=torch.finfo(torch.float32).tiny)
        # Rows of later blocks lose against equal cosines, so most blocks are passed over.
        if best.shape[1] == count and not bool((cosines.amax(1) > best[:, -1]).any()):
            continue
        rows = torch.arange(start, start + len(block)).expand(len(queries), -1)
        cosines, rows = torch.cat((best, cosines), 1), torch.cat((places, rows), 1)
        best, order = (part[:, :count] for part in cosines.sort(dim=1, descending=True, stable=True))
        places = rows.gather(1, order)
    return best, places

"""Pairs of vectors with a cosine above a threshold, found without comparing all with all.

The vectors are shared out among about √N cells, each around one of them (the inverted file of Jégou, Douze, Schmid
2011, doi:10.1109/TPAMI.2010.57, section IV). A vector is compared with those in the cells nearest to it, so that
time grows as N^1.5 and memory as N. Each comparison is exact. A pair is missed where its cell is not looked into; a
sample of the vectors, compared with all others, tells how often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli import philox
from ldm_cli.errors import DivergedError
from ldm_cli.reporting import Reporter

_FEW = 4096  # vectors that are compared all with all
_NUM_PROBES = 8  # cells that a vector is looked up in
_NUM_CHECKED = 256  # vectors that are compared with all others, to measure the recall
_MOST_PARTNERS = 100  # of a vector in one cell, the first ones: thousands of equal pictures would fill the memory
_ROWS = 65536
_BLOCK = 1 << 24  # comparisons held at a time

View = Callable[[slice], Tensor]
"""The vectors [B, D] by which these rows are looked up."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of near vectors (P of them), each once.

    Attributes:
        first, second: int64 [P], rows, first < second; sorted by second, then first.
        similarity: float32 [P], cosines.
        recall: share of the pairs of a sample of vectors that was found; None if they have none.
    """

    first: Tensor
    second: Tensor
    similarity: Tensor
    recall: float | None


def near_pairs(vectors: Tensor, views: Sequence[View], threshold: float, reporter: Reporter) -> Pairs:
    """The pairs of rows (i, j) for which a view of row i is near to vector j, or one of row j to vector i.

    Args:
        vectors: float [N, D], N at least 1, of any length but 0; may be a memory map.
        views: `[lambda rows: vectors[rows]]` compares the vectors themselves.
        threshold: least cosine.

    Raises:
        DivergedError: a vector is not finite.
    """
    count, cells = len(vectors), _Cells(vectors)
    codes, cosines = torch.empty(0, dtype=torch.int64), torch.empty(0)
    with reporter.progress("looking for near-duplicates", count * len(views), unit="vector") as progress:
        for number, view in enumerate(views):
            found = [(codes, cosines)]
            for rows in _slices(count):
                numbers = torch.arange(rows.start, rows.stop)
                for queries, members, block in cells.near(_unit(view(rows)), threshold):
                    found.append((_codes(numbers[queries], members, count), block))
                progress.update(number * count + rows.stop)
            codes, cosines = _once(found, count)
    return Pairs(codes % count, codes // count, cosines, _recall(vectors, views, threshold, codes, cells))


class _Cells:
    """The rows of the vectors by cell, ascending in each."""

    def __init__(self, vectors: Tensor) -> None:
        self._vectors, count = vectors, len(vectors)
        self.num_cells = 1 if count <= _FEW else math.isqrt(count)
        self._centers = _unit(vectors[_chosen(count, self.num_cells, "near pairs: cells")])
        owners = torch.cat([self._nearest(_finite(vectors, rows), 1).flatten() for rows in _slices(count)])
        self._rows = torch.split(
            torch.argsort(owners, stable=True), torch.bincount(owners, minlength=self.num_cells).tolist()
        )

    def near(self, queries: Tensor, threshold: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Numbers of queries [Q, D], the rows near to them and the cosines of both, in portions of any length."""
        probes = self._nearest(queries, min(_NUM_PROBES, self.num_cells))
        by_cell = torch.argsort(probes.flatten(), stable=True) // probes.shape[1]
        sizes = torch.bincount(probes.flatten(), minlength=self.num_cells).tolist()
        for rows, own in zip(self._rows, torch.split(by_cell, sizes), strict=True):
            if len(rows) and len(own):
                members = _unit(self._vectors[rows])
                for part in torch.split(own, max(1, _BLOCK // len(rows))):
                    query, member, cosines = _near(queries[part] @ members.T, threshold)
                    yield part[query], rows[member], cosines

    def _nearest(self, queries: Tensor, count: int) -> Tensor:
        return torch.cat(
            [(q @ self._centers.T).topk(count).indices for q in torch.split(queries, _BLOCK // self.num_cells)]
        )


def _near(cosines: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the entries that reach the threshold, of each row the first ones."""
    is_near = cosines >= threshold
    if int(is_near.sum(1).max()) > _MOST_PARTNERS:
        is_near &= is_near.cumsum(1) <= _MOST_PARTNERS
    rows, columns = is_near.nonzero(as_tuple=True)
    return rows, columns, cosines[rows, columns]


def _codes(a: Tensor, b: Tensor, count: int) -> Tensor:
    """A number for each pair of rows: second · N + first. It is the same for (a, b) and (b, a)."""
    return torch.maximum(a, b) * count + torch.minimum(a, b)


def _once(found: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Each code once, ascending, with the greatest of its cosines; without the codes of a row and itself."""
    codes, places = torch.unique(torch.cat([code for code, _ in found]), return_inverse=True)
    cosines = torch.cat([cosine for _, cosine in found])
    greatest = torch.full(codes.shape, -1.0).scatter_reduce(0, places, cosines, "amax")
    is_pair = codes % count != codes // count
    return codes[is_pair], greatest[is_pair]


def _recall(vectors: Tensor, views: Sequence[View], threshold: float, found: Tensor, cells: _Cells) -> float | None:
    """The share of the pairs of some rows that is among the found ones."""
    if cells.num_cells == 1:
        return 1.0
    count, chosen = len(vectors), _chosen(len(vectors), _NUM_CHECKED, "near pairs: recall")
    queries = [torch.cat([view(slice(row, row + 1)) for row in chosen.tolist()]) for view in views]
    exact = []
    for rows in _slices(count):
        part = _unit(vectors[rows])
        for query in queries:
            own, member, cosines = _near(_unit(query) @ part.T, threshold)
            exact.append((_codes(chosen[own], member + rows.start, count), cosines))
    codes, _ = _once(exact, count)
    return float(torch.isin(codes, found).double().mean()) if len(codes) else None


def _chosen(count: int, number: int, purpose: str) -> Tensor:
    """Some of the rows below `count`, ascending: the same ones whenever it is called."""
    keys = philox.uniform(philox.key(0, purpose), torch.zeros(count, dtype=torch.int64), torch.arange(count), 1)
    return keys[:, 0].topk(min(number, count)).indices.sort().values


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(count, start + _ROWS)) for start in range(0, count, _ROWS))


def _finite(vectors: Tensor, rows: slice) -> Tensor:
    """These rows with length 1."""
    found = _unit(vectors[rows])
    if not bool((is_finite := found.isfinite().all(1)).all()):
        row = rows.start + int(is_finite.int().argmin())
        raise DivergedError(f"row {row} of the vectors is not finite", remedy="embed the pictures again")
    return found


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)

"""The nearest rows of a large bank, which passes in parts, divided over processes."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize, pad

from lib import processes

QUERIES_IN_TILE, BANK_IN_TILE = 2**9, 2**16  # rows whose cosines are computed together: 128 MB
BATCHES_IN_PART = 128  # of images whose features are in memory together: 64,000 of `data.evaluation_views`


def in_parts(batches: Iterable[Tensor]) -> Iterator[Iterator[Tensor]]:
    """Yield BATCHES_IN_PART batches at a time, as an iterator that is used up before the next one."""
    batches = iter(batches)
    for first in batches:
        yield chain([first], islice(batches, BATCHES_IN_PART - 1))


def nearest(queries: Tensor, bank: Iterable[Tensor], n: int, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (m, k) of each query (m, d) with the k nearest of n rows of a bank, in falling order, and their numbers.

    k is clipped to n. `bank` yields parts (n_i, d), and is never whole. All processes pass the same queries, and each
    its own parts; rows are numbered through the parts of all, one process after the other, and all get the same result.
    Of equal cosines any may come first. ValueError unless all parts together have n rows.
    """
    queries = unit_rows(queries)
    cosines = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    buffer = queries.new_empty(0)  # one for all tiles: new memory costs a fifth
    rows_seen = 0
    for part in bank:
        for vectors in map(unit_rows, part.split(BANK_IN_TILE)):
            if buffer.numel() < QUERIES_IN_TILE * len(vectors):
                buffer = queries.new_empty(QUERIES_IN_TILE * len(vectors))
            best_of_tiles = []
            for some_queries in queries.split(QUERIES_IN_TILE):
                tile = buffer[: len(some_queries) * len(vectors)].view(len(some_queries), len(vectors))
                torch.mm(some_queries, vectors.T, out=tile)
                best_of_tiles.append(tile.topk(min(k, len(vectors))))
            values, places = map(torch.cat, zip(*best_of_tiles))
            cosines, rows = _best(torch.cat([cosines, values], 1), torch.cat([rows, places + rows_seen], 1), k)
            rows_seen += len(vectors)
        del part, vectors  # before the next ones are made
    counts = processes.gather(torch.tensor([rows_seen]).to(rows.device)).tolist()  # of each process
    if sum(counts) != n:
        raise ValueError(f"the bank has {sum(counts)} rows in its parts, not {n}")
    return _of_all_processes(cosines, rows, counts, k) if processes.are_several() else (cosines, rows)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x (n, d), projected to the unit sphere; those below a length of 1e-12 stay shorter, a zero row zero."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    return normalize(x / (largest.clamp_min(1e15) / 1e15))  # by 1, unless squares would overflow


def _best(cosines: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, order = cosines.topk(min(k, cosines.shape[1]))
    return best, rows.gather(1, order)


def _of_all_processes(cosines: Tensor, rows: Tensor, counts: list[int], k: int) -> tuple[Tensor, Tensor]:
    """Return the best of what the processes have found in their parts of the bank, which have `counts` rows."""
    rows = rows + sum(counts[: dist.get_rank()])
    missing = k - cosines.shape[1]  # where a process has fewer rows than k
    cosines, rows = pad(cosines, (0, missing), value=-torch.inf), pad(rows, (0, missing))
    best_of_chunks = []
    for chunk in zip(cosines.split(QUERIES_IN_TILE), rows.split(QUERIES_IN_TILE)):
        candidates = [torch.cat(processes.gather(x).chunk(len(counts)), 1) for x in chunk]
        best_of_chunks.append(_best(*candidates, min(k, sum(counts))))
    return tuple(map(torch.cat, zip(*best_of_chunks)))


def finest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64

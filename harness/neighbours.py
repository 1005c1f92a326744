"""The nearest rows of a large bank: neither the bank nor the matrix of cosines is whole in memory."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize, pad

from harness import processes
from harness.sources import Split

QUERIES_IN_TILE, BANK_IN_TILE = 2**9, 2**16  # rows whose cosines are computed together: 128 MB


def parts_of_bank(bank: Split) -> Iterator[Split]:
    """Yield this process's images of a bank, BANK_IN_TILE at a time; no image is in two processes' parts."""
    n = len(bank.labels)
    share = processes.share_of_rows(n)
    for first in range(share.start, share.stop, BANK_IN_TILE):
        last = min(first + BANK_IN_TILE, share.stop)
        yield bank if last - first == n else bank.rows(torch.arange(first, last, device=bank.labels.device))


def nearest(queries: Tensor, bank: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Cosines (m, k) of each query (m, d) with the k nearest rows of a bank, in falling order, and their row numbers.

    This is normalize(queries) @ normalize(bank).T and its topk, k clipped to the rows there are, but `bank` yields
    parts (n_i, d), of which one is in memory at a time. All processes pass the same queries, and each its own parts;
    rows are numbered through the parts of all, one process after the other, and all processes get the same result.
    """
    queries = normalize(queries)
    cosines = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    buffer = queries.new_empty(0)  # one for all tiles: new memory costs a fifth
    n = 0  # rows of the bank so far
    for part in bank:
        for vectors in part.split(BANK_IN_TILE):
            vectors = normalize(vectors)
            if buffer.numel() < QUERIES_IN_TILE * len(vectors):
                buffer = queries.new_empty(QUERIES_IN_TILE * len(vectors))
            tiles = []
            for asking in queries.split(QUERIES_IN_TILE):
                tile = buffer[: len(asking) * len(vectors)].view(len(asking), len(vectors))
                torch.mm(asking, vectors.T, out=tile)
                tiles.append(tile.topk(min(k, len(vectors))))
            values, places = map(torch.cat, zip(*tiles))
            cosines, rows = _best(torch.cat([cosines, values], 1), torch.cat([rows, places + n], 1), k)
            n += len(vectors)
    if processes.are_several():
        return _of_all_processes(cosines, rows, k, n)
    return cosines, rows


def _best(cosines: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of cosines (m, candidates), in falling order, and their rows."""
    best, order = cosines.topk(min(k, cosines.shape[1]))
    return best, rows.gather(1, order)


def _of_all_processes(cosines: Tensor, rows: Tensor, k: int, n: int) -> tuple[Tensor, Tensor]:
    """Return what `nearest` has found in the parts of all processes; n: rows of the bank in those of this one."""
    counts = processes.gather(torch.tensor([n], device=rows.device)).tolist()
    rows = rows + sum(counts[: dist.get_rank()])
    missing = (0, k - cosines.shape[1])  # where a process has fewer rows than k
    cosines = pad(cosines, missing, value=-torch.inf)
    rows = pad(rows, missing)
    found = []
    for of_queries in zip(cosines.split(QUERIES_IN_TILE), rows.split(QUERIES_IN_TILE)):
        candidates = [torch.cat(processes.gather(x).chunk(len(counts)), 1) for x in of_queries]
        found.append(_best(*candidates, min(k, sum(counts))))
    cosines, rows = map(torch.cat, zip(*found))
    return cosines, rows


def finest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64

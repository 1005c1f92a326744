"""The nearest rows of a large bank, without the whole matrix of cosines in memory."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

QUERIES_IN_TILE, BANK_IN_TILE = 2**9, 2**16  # rows whose cosines are computed together: 128 MB


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (m, k) of each query (m, d) with the k nearest rows of the bank (n, d), in falling order, and these rows.

    This is normalize(queries) @ normalize(bank).T and its topk, tile by tile: beyond one tile of cosines it keeps a
    normalised copy of the queries and of a part of the bank.
    """
    queries = normalize(queries)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=bank.device)
    tile = queries.new_empty(QUERIES_IN_TILE * min(BANK_IN_TILE, len(bank)))  # one for all: new memory costs a fifth
    for start in range(0, len(bank), BANK_IN_TILE):
        part = normalize(bank[start : start + BANK_IN_TILE])
        values, places = [], []
        for asking in queries.split(QUERIES_IN_TILE):
            cosines = tile[: len(asking) * len(part)].view(len(asking), len(part))
            torch.mm(asking, part.T, out=cosines)
            top = cosines.topk(min(k, len(part)))
            values.append(top.values)
            places.append(top.indices + start)
        candidates = torch.cat([best, torch.cat(values)], 1)
        candidate_rows = torch.cat([rows, torch.cat(places)], 1)
        best, order = candidates.topk(min(k, candidates.shape[1]))
        rows = candidate_rows.gather(1, order)
    return best, rows


def finest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64

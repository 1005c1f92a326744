"""What is measured beside loss and accuracy: representations, floors, and numbers that went wrong."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

import data
import models
from lib.errors import InputError
from lib.files import CKPT
from regularizers import alignment, mhe, uniformity

PROBED_IMAGES = 256
PAIRS_AT_ONCE = 64  # images whose two views are made together
FLOORS_UP_TO = 10_000  # images in the largest bank for which the floors of a k-NN are judged unasked
FLOORS_MEMORY = 2**31  # bytes of pixels, likewise
LOW_RANK = 2  # features of a lower effective rank differ in little more than one direction
DEAD = 1e-4  # below this part of a full sphere's spread, all projections are one point: the network is dead
DEAD_G2 = 1 - 1e-5  # above this G2, all features are one point
DEAD_NETWORK = "dead network: its outputs are the same for all images, for good; start another run with a smaller --lr"
ADVICE = "what may help: a smaller --lr, --optimizer sgd, --reg uniform"  # as docs/results.md found it


def representations(encoder: nn.Module, test: data.Split, view: dict) -> dict[str, float]:
    """Measure what Figures 4 and 5 follow, on 256 images spread over a split: energies of the blocks' outputs, and G2.

    The energy is `mhe` of the rows that a residual block's outputs are, averaged over their maps, at s = 0: at s = 2
    two images that look the same would outweigh all others. G2 is the mean of exp(-2 |x - y|^2) over pairs of the
    encoder's normalised features, Appendix A.2: its logarithm is Eq. 2. The rest is that of `sphere_statistics`.
    """
    sample = probed(test)
    features, blocks = embed_blocks(encoder, data.evaluation_views(sample, **view))
    row = {"g2": uniformity(features).exp().item(), **sphere_statistics(features)}
    for name, outputs in blocks.items():
        row[f"block/{name}"] = mhe(outputs, s=0).item()
    if row["g2"] > DEAD_G2:
        row["dead"] = True
    return row


def geometry(encoder: nn.Module, images: data.Dataset, view: dict, device: torch.device) -> dict[str, float]:
    """Measure, without labels, how an encoder's features of 256 images spread over a test set lie on the sphere.

    Returns `sphere_statistics` of their evaluation views, and Eq. A.1 between the features of their two augmented
    views, those of pre-training by default, always the same. The images are those of `representations`.
    """
    sample = probed(images.test).to(device)
    row = sphere_statistics(models.embed(encoder, data.evaluation_views(sample, **view)))
    pairs = []
    steps = range(math.ceil(len(sample.labels) / PAIRS_AT_ONCE))
    for crops, _, u in data.batches(sample, view["size"], PAIRS_AT_ONCE, 0, steps, drop_last=False):
        views = data.two_views(crops, u, view["mean"], view["std"], images.blur_p, images.solarise_p)
        pairs.append(models.embed(encoder, views).chunk(2))
    x, y = map(torch.cat, zip(*pairs))
    return {**row, "alignment": alignment(x, y).item()}


def probed(test: data.Split) -> data.Split:
    """Return 256 images spread over a split, or all of a smaller one."""
    n = len(test.labels)
    rows = torch.linspace(0, n - 1, min(PROBED_IMAGES, n)).long()
    return test.rows(rows.to(test.labels.device))


def sphere_statistics(features: Tensor) -> dict[str, float]:
    """Effective rank of features (n, d), their uniformity, Eq. 2, and this as a share of `uniform_floor`.

    The share is 0 for one point and about 1 for uniform points; few points that repel each other exceed 1.
    """
    value = uniformity(features).item()
    share = max(0.0, value / uniform_floor(features.shape[1]))  # of one point it would be -0.0
    return {"rank": effective_rank(features), "uniformity": value, "uniformity_share": share}


def uniform_floor(d: int) -> float:
    """Eq. 2 for points uniform on the sphere in d dimensions: -0.69 in one dimension, towards -4 in many.

    log E exp(-2 |x - y|^2) = -4 + log E exp(4 c), c the cosine of two points, and E exp(4 c) = 0F1(; d / 2; 4).
    """
    from scipy.special import hyp0f1  # here, because it takes a seventh of a second of every start

    return math.log(hyp0f1(d / 2, 4)) - 4


def embed_blocks(encoder: nn.Module, views: Iterable[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute features, and the outputs of residual blocks, averaged over their maps: (n, c) by the block's name."""
    blocks = {block: name for name, block in encoder.named_modules() if isinstance(block, (BasicBlock, Bottleneck))}
    outputs = {name: [] for name in blocks.values()}

    def keep(block: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs[blocks[block]].append(output.mean((2, 3)).float())

    hooks = [block.register_forward_hook(keep) for block in blocks]
    features = models.embed(encoder, views)
    for hook in hooks:
        hook.remove()
    return features, {name: torch.cat(batches) for name, batches in outputs.items()}


def effective_rank(features: Tensor) -> float:
    """Effective rank of features (n, d), within 1 ... min(n, d): exp of the entropy of their singular values' shares.

    It is RankMe of Garrido et al. (2023), without their 1e-7, which only keeps a logarithm finite.
    """
    values = torch.linalg.svdvals(features.cpu().double())
    shares = values / values.sum().clamp_min(1e-300)  # of zero rows all shares are 0, and the rank is 1
    return torch.special.entr(shares).sum().exp().item()


def floors_are_cheap(images: data.Dataset) -> bool:
    """Whether the k-NN floors of a data set, of which one is on raw pixels, take little time and memory."""
    bank, queries = len(images.train.labels), len(images.test.labels)
    return bank <= FLOORS_UP_TO and 4 * 3 * images.size**2 * (bank + queries) <= FLOORS_MEMORY


def poor_features(top1: float, floors: dict[str, float], rank: float) -> str:
    """Say what is wrong with features that lie along a line, or that a vote judges below a floor, and what to try."""
    if rank < LOW_RANK:
        return f"collapse? the features differ in one direction alone, their effective rank is {rank:.2f}; {ADVICE}"
    higher = [f"{of} {floor:g}" for of, floor in floors.items() if top1 < floor]
    if higher:
        return f"the k-NN accuracy, {top1:g} %, lies below its floors: {', '.join(higher)}; {ADVICE}"
    return ""


def first_fault(stored: dict[str, Tensor], latest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the numbers of the latest micro-batch, or those stored if one of them was not finite; on the device."""
    if not stored:
        return latest
    was_finite = torch.stack(list(stored.values())).isfinite().all()
    kept = {name: torch.where(was_finite, number, stored.get(name, number)) for name, number in latest.items()}
    return stored | kept


def refuse_faults(numbers: dict[str, Tensor], network: nn.Module, folder: Path, accelerator: Accelerator) -> None:
    """Raise InputError, in all processes, for numbers of a step or for weights that are not finite."""
    weights_finite = torch.stack([x.isfinite().all() for x in network.state_dict().values()]).all()
    numbers = {**numbers, "weights": torch.where(weights_finite, 0.0, math.nan)}
    mine = torch.stack(list(numbers.values()))
    for row in accelerator.gather(mine[None]).tolist():  # one for each process
        found = dict(zip(numbers, row))
        faults = [f"{name} {x}" for name, x in found.items() if not math.isfinite(x)]
        if faults:
            step = int(found.get("step", -1)) + 1
            ckpt = folder / CKPT
            kept = f"{ckpt} is unchanged" if ckpt.exists() else "no checkpoint is written"
            raise InputError(f"step {step}: not finite: {', '.join(faults)}; {kept}; try a smaller --lr or --weight")

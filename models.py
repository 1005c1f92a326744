"""Everything that has parameters: encoders, heads, and the methods as networks.

network = BYOL("resnet18", "cifar", norm="bn", hidden_dim=4096, out_dim=256)  # METHODS lists the others
z, p, t = network(v1, v2)  # projections, predictions and the target's projections of both views
loss = network.loss(z, p, t)
network.update_target(tau)
features = embed(network.encoder, [v1])
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from lib import encoders, norms
from lib.errors import InputError
from regularizers import Layers, alignment, info_nce, layers_of, unit

Pair = tuple[Tensor, Tensor]  # a tensor for each view

# ---- Encoders --------------------------------------------------------------------------------------------------------
STEMS = {"cifar": 1, "stride2": 2, "imagenet": None}  # stride of a 3x3 convolution; None = the stem of timm


def build_encoder(name: str, stem: str, norm: str = "bn") -> nn.Module:
    """Build timm's ResNet or ViT, or AlexNet, (b, 3, h, w) to (b, .num_features), no classifier; else InputError."""
    if name == "alexnet":
        encoder = encoders.AlexNet()
    else:
        encoder = encoders.of_timm(name)
        is_resnet = isinstance(encoder, encoders.ResNet)  # the patches of a ViT are its stem
        if stem != "imagenet" and is_resnet:
            width = encoder.bn1.num_features
            encoder.conv1 = nn.Conv2d(3, width, 3, STEMS[stem], padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # as in timm
            encoder.maxpool = nn.Identity()  # Appendix B.1
    return with_norm(encoder, norm).to(memory_format=torch.channels_last)  # in which convolutions are fast


class ViewNorm(_BatchNorm):
    """BatchNorm for (2b, c) or (2b, c, h, w), two views: in training each has its own statistics, of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return norms.normalise_views(x, self)

    def _check_input_dim(self, x: Tensor) -> None: ...  # accept any shape; _BatchNorm's own check raises


NORMS = {"bn": ViewNorm, "none": nn.Identity}  # none: Table 4


def with_norm(network: nn.Module, norm: str) -> nn.Module:
    """Replace each BatchNorm by a fresh layer of NORMS, whose scale is one, as in BYOL; timm makes some zero."""
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            network.set_submodule(name, NORMS[norm](module.num_features, affine=module.affine))
    return network


# ---- Heads and methods -----------------------------------------------------------------------------------------------
def mlp(in_dim: int, hidden_dim: int, out_dim: int, norm: str = "bn", ends_in_norm: bool = False) -> nn.Sequential:
    """Build a projector or predictor, (b, in_dim) to (b, out_dim), Section 3.6; the last layer has no bias."""
    head = nn.Sequential()
    head.hidden = nn.Linear(in_dim, hidden_dim)
    head.norm = NORMS[norm](hidden_dim)
    head.relu = nn.ReLU(inplace=True)
    head.out = nn.Linear(hidden_dim, out_dim, bias=False)
    if ends_in_norm:
        head.end = NORMS[norm](out_dim, affine=False)
    return head


class Method(nn.Module):
    """Encoder f and projector g; a subclass says what else there is, and defines loss(z, p, t, temperature)."""

    has_predictor = False  # q, on top of g
    has_target = False  # moving averages of f and g, Section 3.3
    has_bottleneck = False  # the predictor's hidden layer has out_dim / 4 neurons, and BatchNorm ends the projector

    def __init__(self, name: str, stem: str, norm: str, hidden_dim: int, out_dim: int, predictor="mlp", queue=0):
        super().__init__()
        self.encoder = build_encoder(name, stem, norm)
        self.projector = mlp(self.encoder.num_features, hidden_dim, out_dim, norm, self.has_bottleneck)
        if self.has_predictor and predictor == "mlp":
            self.predictor = mlp(out_dim, self.predictor_width(hidden_dim, out_dim), out_dim, norm)
        if self.has_target:
            online = OrderedDict(encoder=self.encoder, projector=self.projector)
            self.target = copy.deepcopy(nn.Sequential(online)).requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Pair, Pair, Pair]:
        """Compute projections z, predictions p and what these predict, t, (b, out_dim) each, of views (b, 3, h, w)."""
        views = torch.cat([v1, v2])
        z = self.projector(self.encoder(views))
        p = self.predictor(z) if hasattr(self, "predictor") else z
        with torch.no_grad():
            t = self.target(views) if self.has_target else z.detach()
        if self.training:
            norms.count_batches(self)  # of all layers at once
        return z.chunk(2), p.chunk(2), t.chunk(2)

    @classmethod
    def predictor_width(cls, hidden_dim: int, out_dim: int) -> int:
        return max(1, out_dim // 4) if cls.has_bottleneck else hidden_dim

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """target <- tau target + (1 - tau) online, for parameters; buffers stay its own."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), online, 1 - tau)


class BYOL(Method):
    """Predict the target's projection of the other view, Section 3.3; Grill et al. (2020)."""

    has_predictor = has_target = True

    def loss(self, z, p, t, temperature=None):
        return alignment(p[0], t[1]) + alignment(p[1], t[0])


class SimSiam(Method):
    """Predict the projection of the other view, without a target; Chen & He (2021)."""

    has_predictor = has_bottleneck = True

    def loss(self, z, p, t, temperature=None):
        p1, p2, z1, z2 = map(unit, (*p, *t))  # zero rows stay zero: their cosine is 0
        return -((p1 * z2).sum(1) + (p2 * z1).sum(1)).mean() / 2


class SimCLR(Method):
    """Tell the other view of an image from all other views of the batch; Chen et al. (2020)."""

    def loss(self, z, p, t, temperature=0.5):
        return info_nce(*z, temperature)


class MoCo(Method):
    """Tell the target's projection of the other view from those of earlier batches, a queue; Chen et al. (2020), v2."""

    has_target = True

    def __init__(self, name, stem, norm, hidden_dim, out_dim, predictor="mlp", queue=4096):
        super().__init__(name, stem, norm, hidden_dim, out_dim)
        self.register_buffer("queue", unit(torch.randn(queue, out_dim)))
        self.register_buffer("oldest", torch.tensor(0))  # the row of the queue that is replaced next
        self.keys = []  # t of all micro-batches of this step: `loss` adds to them, `update_target` takes them

    def loss(self, z, p, t, temperature=0.2):
        self.keys += t
        both_ways = self.one_way(z[0], t[1], temperature) + self.one_way(z[1], t[0], temperature)
        return both_ways / 2

    def one_way(self, z, t, temperature):
        """InfoNCE of projections z, their keys t, (b, out_dim), and the queue's; He et al. (2020), Eq. 1."""
        z = unit(z)
        cosine = (z * unit(t)).sum(1, keepdim=True)
        similarity = torch.cat([cosine, z @ self.queue.T], 1)
        place = torch.zeros(len(z), dtype=torch.long, device=z.device)  # of the key of the same image
        return cross_entropy(similarity / temperature, place)

    def update_target(self, tau: float) -> None:
        """Update the target, and replace the oldest rows of the queue by the keys of the step."""
        super().update_target(tau)
        keys = torch.cat(self.keys)[-len(self.queue) :]
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = unit(keys)
        self.oldest.copy_((rows[-1] + 1) % len(self.queue))
        self.keys.clear()


OFF_DIAGONAL = 0.0051  # weighs the second sum of Barlow Twins


class BarlowTwins(Method):
    """Make each feature correlate between the views, and different features not; Zbontar et al. (2021)."""

    def loss(self, z, p, t, temperature=None):
        x, y = map(standardised, z)
        squares = (x @ y.T - torch.eye(len(x), device=x.device)).square()
        on_diagonal = squares.diagonal().sum()
        return on_diagonal + OFF_DIAGONAL * (squares.sum() - on_diagonal)


def standardised(view: Tensor) -> Tensor:
    """Features of a view (b, out_dim) as rows of mean 0 and length 1; 0 for one that varies by rounding alone."""
    centred = view - view.mean(0)
    rounding = 8 * torch.finfo(view.dtype).eps * view.abs().amax(0)
    varies = centred.abs().amax(0) > rounding
    return unit((centred * varies).T)


class Facts(NamedTuple):
    """What the command line and tables say of a method."""

    network: type[Method]
    title: str
    flags: tuple[str, ...]  # of pretrain.py that have an effect on it, but not on every method
    numbers: dict[str, float]  # in place of the recipe's
    formula: str  # of the loss, with settings in braces


METHODS = {
    "byol": Facts(BYOL, "BYOL", ("predictor", "tau", "tau_end"), {},
        "byol = E |p1 - t2|^2 + E |p2 - t1|^2 of unit rows, 0 ... 8 (Eq. 3 in both directions)"),
    "simclr": Facts(SimCLR, "SimCLR", ("temperature",), {},
        "simclr = E -log softmax(z_i . z_j / {temperature:g}) of unit rows (Eq. 1)"),
    "simsiam": Facts(SimSiam, "SimSiam", ("predictor",), {},
        "simsiam = -E cos(p1, z2) / 2 - E cos(p2, z1) / 2, no gradient to z, -1 ... 1 (Chen & He, Eq. 2)"),
    "moco": Facts(MoCo, "MoCo", ("temperature", "tau", "tau_end", "queue"), {"temperature": 0.2},
        "moco = E -log softmax(z_i . t_j / {temperature:g}) of unit rows, j: the other view, {queue} earlier ones"),
    "barlow": Facts(BarlowTwins, "Barlow Twins", (), {"out_dim": 2048},
        f"barlow = sum (1 - C_ii)^2 + {OFF_DIAGONAL} sum C_ij^2, i != j, C: correlations (Zbontar et al., Eq. 1)"),
}  # fmt: skip


def neurons(network: nn.Module, parts: Iterable[str]) -> Layers:
    """Return weights by layer: all of a part such as projector, or one, predictor.out. InputError for grouped ones."""
    weights = {}
    for part in parts:
        module = network.get_submodule(part)
        for layer, child in module.named_modules(prefix=part):
            if getattr(child, "groups", 1) > 1:
                raise InputError(f"{layer} is a grouped convolution, which has no energy; leave {part} out of --reg_on")
        for layer, weight in layers_of(module).items():
            weights[f"{part}.{layer}".removesuffix(".")] = weight
    return weights


@torch.no_grad()
def embed(encoder: nn.Module, views: Iterable[Tensor]) -> Tensor:
    """Compute features (n, d), fp32, of batches of views (b, 3, h, w) in evaluation mode; InputError if not finite."""
    was_training = encoder.training
    encoder.eval()
    features = torch.cat([encoder(view).float() for view in views])
    encoder.train(was_training)
    if not features.isfinite().all():
        raise InputError("the encoder's features are not finite: its weights have diverged")
    return features

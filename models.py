"""Everything that has parameters: encoders, heads, and the methods as networks.

network = BYOL("resnet18", "cifar", norm="bn", hidden_dim=4096, out_dim=256)
z, p, t = network(v1, v2)  # projections, predictions and the target's projections of both views
network.update_target(tau)
features = embed(network.encoder, [v1])
"""

import copy
import difflib
from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import InputError
from regularizers import Layers, layers_of

# ---- Encoders --------------------------------------------------------------------------------------------------------
STEMS = {"cifar": 1, "stride2": 2, "imagenet": None}  # stride of a 3x3 convolution; None = the stem of timm


def build_encoder(name: str, stem: str, norm: str = "bn") -> nn.Module:
    """Build timm's ResNet `name`, or AlexNet, without classifier: (b, 3, h, w) to (b, d), d = `.num_features`.

    stem "imagenet" is the ResNet as it is; "cifar" has a 3x3 convolution of stride 1 and padding 1 and no max-pooling,
    Appendix B.1; "stride2" is the same with stride 2, a quarter of the work. With norm "none" there is no BatchNorm,
    Table 4. InputError for a name that is neither a ResNet of timm nor alexnet.
    """
    if name == "alexnet":
        encoder = AlexNet()
    else:
        encoder = _resnet(name)
        if stem != "imagenet":
            width = encoder.bn1.num_features
            encoder.conv1 = nn.Conv2d(3, width, 3, STEMS[stem], padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # as in timm
            encoder.maxpool = nn.Identity()
    encoder = with_norm(encoder, norm)
    return encoder.to(memory_format=torch.channels_last)  # the layout in which convolutions are fast


def _resnet(name: str) -> ResNet:
    """Build a ResNet of timm whose blocks' last BatchNorm scale starts at one, as in BYOL; timm's default is zero."""
    if not timm.is_model(name):
        suggestions = difflib.get_close_matches(name, timm.list_models("*res*"), 1)
        hint = f" (did you mean {suggestions[0]}?)" if suggestions else ""
        raise InputError(f"model {name}: not a name timm knows{hint}")
    if timm.model_entrypoint(name).__module__ != ResNet.__module__:
        raise InputError(f"model {name}: not a ResNet of timm.models.resnet; resnet18 and resnet50 are the paper's")
    try:
        encoder = timm.create_model(name, num_classes=0, zero_init_last=False)
    except RuntimeError as e:  # an unknown tag after the name
        raise InputError(f"model {name}: timm cannot make it ({e})") from e
    if not isinstance(encoder.bn1, nn.BatchNorm2d):
        kind = type(encoder.bn1).__name__
        raise InputError(f"model {name}: is normalised by {kind}; take a ResNet with BatchNorm")
    return encoder


class AlexNet(nn.Sequential):
    """A small AlexNet with BatchNorm, our reading of the encoder of Figures 3 and 7: (b, 3, h, w) to (b, 4096)."""

    num_features = 4096

    def __init__(self):
        widths = (3, 96, 192, 384, 384, 192)
        layers = OrderedDict()
        for i, (width_in, width_out) in enumerate(pairwise(widths), 1):
            layers[f"conv{i}"] = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(width_out)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
            if i in (1, 2):
                layers[f"pool{i}"] = nn.MaxPool2d(3, 2)
        layers["pool5"] = nn.AdaptiveMaxPool2d(3)
        layers["flatten"] = nn.Flatten()
        for i, width_in in ((6, 3 * 3 * widths[-1]), (7, 4096)):
            layers[f"linear{i}"] = nn.Linear(width_in, 4096, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm1d(4096)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
        super().__init__(layers)


# ---- Norms -----------------------------------------------------------------------------------------------------------
class _PerView:
    """BatchNorm for a batch of two views, concatenated; in training each view has its own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (2b, c, ...) to the same shape; in evaluation mode the batch has any size."""
        batch_norm = super().forward
        if not self.training:
            return batch_norm(x)
        return torch.cat([batch_norm(view) for view in x.chunk(2)])


class ViewNorm(_PerView, _BatchNorm):
    """BatchNorm of each view, (b, c) or (b, c, h, w)."""

    def _check_input_dim(self, x: Tensor) -> None: ...  # accept any shape; _BatchNorm's own check raises


class SyncViewNorm(_PerView, nn.SyncBatchNorm):
    """BatchNorm of each view over all processes, as BYOL has it; torch can do this on CUDA alone."""


NORMS = {"bn": ViewNorm, "sync": SyncViewNorm, "none": nn.Identity}


def with_norm(network: nn.Module, norm: str) -> nn.Module:
    """Replace each BatchNorm of the network by a fresh layer of NORMS, which is frozen if the old one was."""
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            replacement = NORMS[norm](module.num_features)
            replacement.requires_grad_(module.weight.requires_grad)
            network.set_submodule(name, replacement)
    return network


# ---- Heads and methods -----------------------------------------------------------------------------------------------
def mlp(in_dim: int, hidden_dim: int, out_dim: int, norm: str = "bn") -> nn.Sequential:
    """Build a projector or predictor, (b, in_dim) to (b, out_dim), Section 3.6; the last layer has no bias."""
    layers = OrderedDict(
        hidden=nn.Linear(in_dim, hidden_dim),
        norm=nn.BatchNorm1d(hidden_dim),
        relu=nn.ReLU(inplace=True),
        out=nn.Linear(hidden_dim, out_dim, bias=False),
    )
    return with_norm(nn.Sequential(layers), norm)


class SimCLR(nn.Module):
    """Encoder f and projector g."""

    def __init__(self, name: str, stem: str, norm: str, hidden_dim: int, out_dim: int):
        super().__init__()
        self.encoder = build_encoder(name, stem, norm)
        self.projector = mlp(self.encoder.num_features, hidden_dim, out_dim, norm)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[tuple[Tensor, Tensor]]:
        """Project both views (b, 3, h, w), in one batch (see ViewNorm); returns (z,), z a pair of (b, out_dim)."""
        views = torch.cat([v1, v2])
        z = self.projector(self.encoder(views))
        return (z.chunk(2),)


class BYOL(nn.Module):
    """Online network (encoder f, projector g, predictor q) and target (f, g), which starts as a copy, Section 3.3."""

    def __init__(self, name: str, stem: str, norm: str, hidden_dim: int, out_dim: int):
        super().__init__()
        self.encoder = build_encoder(name, stem, norm)
        self.projector = mlp(self.encoder.num_features, hidden_dim, out_dim, norm)
        self.predictor = mlp(out_dim, hidden_dim, out_dim, norm)
        copies = OrderedDict(encoder=copy.deepcopy(self.encoder), projector=copy.deepcopy(self.projector))
        self.target = nn.Sequential(copies)
        self.target.requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Compute projections z, their predictions p, and the target's projections t, (b, out_dim) a view.

        The views (b, 3, h, w) pass in one batch, each with BatchNorm statistics of its own: see ViewNorm.
        """
        views = torch.cat([v1, v2])
        z = self.projector(self.encoder(views))
        p = self.predictor(z)
        with torch.no_grad():
            t = self.target(views)
        return z.chunk(2), p.chunk(2), t.chunk(2)

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """target <- tau target + (1 - tau) online, for parameters of encoder and projector; buffers stay its own."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = list(self.target.parameters())
        torch._foreach_lerp_(target, online, 1 - tau)


METHODS = {"byol": BYOL, "simclr": SimCLR}


def neurons(network: BYOL | SimCLR, parts: Iterable[str]) -> Layers:
    """Return {layer: weight} of the layers in `parts`, see `regularizers.layers_of`; each row of a weight is a neuron.

    parts: any of encoder, projector, predictor, or layers of these: predictor.out. InputError for a grouped
    convolution.
    """
    weights = {}
    for part in parts:
        head, _, inner = part.partition(".")
        module = getattr(network, head).get_submodule(inner)
        for layer, child in module.named_modules(prefix=part):
            if getattr(child, "groups", 1) > 1:
                raise InputError(f"{layer} is a grouped convolution, which has no energy; leave {part} out of --reg_on")
        for layer, weight in layers_of(module).items():
            weights[f"{part}.{layer}".removesuffix(".")] = weight
    return weights


# ---- Features --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def embed(encoder: nn.Module, views: Iterable[Tensor]) -> Tensor:
    """Compute features (n, d), in fp32, of batches of views (b, 3, h, w), with the encoder in evaluation mode.

    InputError if a feature is not finite: every evaluation would accept it silently.
    """
    was_training = encoder.training
    encoder.eval()
    features = torch.cat([encoder(view).float() for view in views])
    encoder.train(was_training)
    if not features.isfinite().all():
        raise InputError("the encoder's features are not finite: its weights have diverged")
    return features

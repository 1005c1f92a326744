"""Everything that has parameters, and how it is stored.

    model = BYOL("resnet18", "cifar", hidden_dim=4096, out_dim=256)
    p, z, t = model(v1, v2)
    save("ckpt.safetensors", model.state_dict(), description)
    encoder, description = load_encoder("ckpt.safetensors")

p, z and t are predictions, projections and the target's projections of both views. A file comes back bit for bit.
"""

import copy
import difflib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from timm.models.resnet import ResNet
from torch import Tensor, nn

VIEW = ("size", "crop", "mean", "std")  # what a description tells of the images that its network was trained on


class ModelError(ValueError):
    """A network, or the file of one, that is not what was asked for."""


def build_encoder(name: str, stem: str) -> ResNet:
    """timm's ResNet `name` without its classifier: (b, 3, h, w) to (b, d), d = `.num_features`.

    stem "imagenet" is the network as it is; "cifar" has a 3x3 convolution of stride 1 and padding 1 and no max-pooling,
    Appendix B.1. The last BatchNorm of a block starts at one, as BYOL's does; timm's default is zero. ModelError for a
    name that is not a ResNet of timm.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*res*"), 1)
        raise ModelError(f"model {name}: not a name timm knows{f' (did you mean {near[0]}?)' if near else ''}")
    if timm.model_entrypoint(name).__module__ != ResNet.__module__:
        raise ModelError(f"model {name}: not a ResNet of timm.models.resnet; resnet18 and resnet50 are the paper's")
    try:
        encoder = timm.create_model(name, num_classes=0, zero_init_last=False)
    except RuntimeError as e:  # an unknown tag behind the name
        raise ModelError(f"model {name}: timm cannot make it ({e})") from e
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, encoder.bn1.num_features, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's own
        encoder.maxpool = nn.Identity()
    for layer, module in list(encoder.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            encoder.set_submodule(layer, ViewNorm(module.num_features))
    return encoder.to(memory_format=torch.channels_last)  # the layout that convolutions are fast in


class ViewNorm(nn.SyncBatchNorm):
    """BatchNorm of two views in one batch, one behind the other: in training each has statistics of its own.

    These are of all processes on CUDA, as BYOL's, and of its own process on the CPU, where torch cannot share them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(2b, c, ...) to the same shape; in evaluation mode a batch of any size."""
        norm = super().forward if x.is_cuda else partial(nn.modules.batchnorm._BatchNorm.forward, self)
        return torch.cat([norm(view) for view in x.chunk(2)]) if self.training else norm(x)


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Projector or predictor, (b, in_dim) to (b, out_dim), Section 3.6. The last layer has no bias, as BYOL's."""
    return nn.Sequential(
        OrderedDict(
            hidden=nn.Linear(in_dim, hidden_dim),
            norm=ViewNorm(hidden_dim),
            relu=nn.ReLU(inplace=True),
            out=nn.Linear(hidden_dim, out_dim, bias=False),
        )
    )


class BYOL(nn.Module):
    """Online network (encoder f, projector g, predictor q) and target (f, g), which starts as a copy, Section 3.3."""

    def __init__(self, name: str, stem: str, hidden_dim: int, out_dim: int):
        super().__init__()
        self.encoder = build_encoder(name, stem)
        self.projector = mlp(self.encoder.num_features, hidden_dim, out_dim)
        self.predictor = mlp(out_dim, hidden_dim, out_dim)
        self.target = nn.Sequential(
            OrderedDict(encoder=copy.deepcopy(self.encoder), projector=copy.deepcopy(self.projector))
        )
        self.target.requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Views (b, 3, h, w) to predictions p, online projections z, target projections t, (b, out_dim) a view each.

        Both views pass in one batch, each with BatchNorm statistics of its own: see ViewNorm. The target keeps its own.
        """
        views = torch.cat([v1, v2])
        z = self.projector(self.encoder(views))
        p = self.predictor(z)
        with torch.no_grad():
            t = self.target(views)
        return p.chunk(2), z.chunk(2), t.chunk(2)

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """xi <- tau xi + (1 - tau) theta for the parameters of encoder and projector; buffers stay the target's own."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), online, 1 - tau)


def neurons(model: BYOL, parts: Iterable[str]) -> dict[str, Tensor]:
    """The weights whose rows are neurons, by layer: all of 2 dimensions or more in `parts` of the online network.

    parts: any of encoder, projector, predictor. Biases and norms are no neurons. ModelError for a grouped convolution:
    rows of different groups see different inputs, so no angle is between them.
    """
    found = {}
    for part in parts:
        for layer, module in getattr(model, part).named_modules(prefix=part):
            if getattr(module, "groups", 1) > 1:
                raise ModelError(
                    f"{layer} is a grouped convolution; the energy of {part} is defined for networks without"
                )
            if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim > 1:
                found[layer] = weight
    return found


@torch.no_grad()
def embed(encoder: nn.Module, views: Iterable[Tensor]) -> Tensor:
    """Features (n, d), in fp32, of batches of views (b, 3, h, w) by the encoder in evaluation mode.

    ModelError if one is not finite: every judge would take it for something.
    """
    training = encoder.training
    encoder.eval()
    features = torch.cat([encoder(v).float() for v in views])
    encoder.train(training)
    if not features.isfinite().all():
        raise ModelError("the encoder's features are not finite: its weights have diverged")
    return features


def save(path: str | Path, tensors: dict[str, Tensor], description: dict) -> None:
    """Write tensors and their description, with a digest of the tensors, to a safetensors file: whole or not at all.

    The description is one JSON text under one header key, so that equal content makes equal files.
    """
    path = Path(path)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    text = json.dumps(description | {"digest": digest(tensors)}, sort_keys=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(to_bytes(tensors, {"description": text}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name, too, outlives a power cut
    os.close(folder)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a file that `save` wrote. ModelError, naming the file, if it is another or damaged."""
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file; a checkpoint is the ckpt.safetensors or encoder.safetensors of a run")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError(f"{path}: not a whole safetensors file ({e})") from e
    if "description" not in metadata:
        raise ModelError(
            f"{path}: a safetensors file without a description; pretrain.py writes one into its checkpoints"
        )
    try:
        description = json.loads(metadata["description"])
        intact = description["digest"] == digest(tensors)
    except (ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{path}: its description is not one that pretrain.py writes ({e!r})") from e
    if not intact:
        raise ModelError(f"{path}: damaged, its tensors are not the ones that were written (their digest differs)")
    return tensors, description


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors on the CPU."""
    sha = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        sha.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        sha.update(x.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_encoder(path: str | Path) -> tuple[ResNet, dict]:
    """The online encoder, in evaluation mode, and the description of a ckpt.safetensors or encoder.safetensors.

    Raises ModelError as `load` does, and if a tensor is missing, superfluous or of another shape than described.
    """
    tensors, description = load(path)
    try:
        settings = description["settings"]
        _ = [settings[key] for key in ("dataset", "data_dir", "seed")], [description["view"][key] for key in VIEW]
        name, stem = settings["model"], settings["stem"]
        if description["holds"] == "encoder":
            network = encoder = build_encoder(name, stem)
        else:
            network = BYOL(name, stem, settings["hidden_dim"], settings["out_dim"])
            encoder = network.encoder
    except (KeyError, TypeError) as e:
        raise ModelError(f"{path}: its description is not one that pretrain.py writes ({e!r})") from e
    expected = network.state_dict()
    for kind, names in (("missing", expected.keys() - tensors), ("superfluous", tensors.keys() - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"{path}: {kind}, for a {name} as described: {', '.join(sorted(names)[:3])}{more}")
    for key, x in expected.items():
        if x.shape != tensors[key].shape:
            shapes = f"{tuple(tensors[key].shape)}, where a {name} as described has {tuple(x.shape)}"
            raise ModelError(f"{path}: {key} is {shapes}")
    network.load_state_dict(tensors)
    return encoder.eval(), description

"""Everything that has parameters, and how it is stored.

    network = BYOL("resnet18", "cifar", norm="bn", hidden_dim=4096, out_dim=256)
    z, p, t = network(v1, v2)
    save("ckpt.safetensors", network.state_dict(), description)
    encoder, description = load_encoder("ckpt.safetensors")

z, p and t are projections, predictions and the target's projections of both views. A file comes back bit for bit.
"""

import contextlib
import copy
import difflib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness import processes

PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".tar")  # how files of other projects end
# what other projects put before an encoder's names: DataParallel, then SimSiam, MoCo, Barlow Twins, lightly
PREFIXES = [wrapper + part for wrapper in ("", "module.") for part in ("", "backbone.", "encoder.", "encoder_q.")]
VIEW = ("size", "crop", "mean", "std")  # what a description tells of the images that its network was trained on


class ModelError(ValueError):
    """A network, or the file of one, that is not what was asked for."""


def build_encoder(name: str, stem: str, norm: str = "bn") -> nn.Module:
    """timm's ResNet `name`, or AlexNet, without classifier: (b, 3, h, w) to (b, d), d = `.num_features`.

    stem "imagenet" is the ResNet as it is; "cifar" has a 3x3 convolution of stride 1 and padding 1 and no max-pooling,
    Appendix B.1. The last BatchNorm of a block starts at one, as BYOL's does; timm's default is zero. With norm "none"
    there is no BatchNorm, Table 4. ModelError for a name that is neither a ResNet of timm nor alexnet.
    """
    if name == "alexnet":
        encoder = AlexNet()
    else:
        encoder = _resnet(name)
        if stem == "cifar":
            encoder.conv1 = nn.Conv2d(3, encoder.bn1.num_features, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's own
            encoder.maxpool = nn.Identity()
    return with_norm(encoder, norm).to(memory_format=torch.channels_last)  # the layout that convolutions are fast in


def _resnet(name: str) -> ResNet:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*res*"), 1)
        raise ModelError(f"model {name}: not a name timm knows{f' (did you mean {near[0]}?)' if near else ''}")
    if timm.model_entrypoint(name).__module__ != ResNet.__module__:
        raise ModelError(f"model {name}: not a ResNet of timm.models.resnet; resnet18 and resnet50 are the paper's")
    try:
        encoder = timm.create_model(name, num_classes=0, zero_init_last=False)
    except RuntimeError as e:  # an unknown tag behind the name
        raise ModelError(f"model {name}: timm cannot make it ({e})") from e
    if not isinstance(encoder.bn1, nn.BatchNorm2d):
        raise ModelError(f"model {name}: is normalised by {type(encoder.bn1).__name__}; take a ResNet with BatchNorm")
    return encoder


class AlexNet(nn.Sequential):
    """A small AlexNet for images of any size, our reading of the encoder of Figures 3 and 7: (b, 3, h, w) to (b, 4096).

    Five convolutions, all 3x3 for small images, and two linear layers, as AlexNet has; BatchNorm behind each.
    """

    num_features = 4096

    def __init__(self):
        widths = (3, 96, 192, 384, 384, 192)
        layers = OrderedDict()
        for i, (before, width) in enumerate(pairwise(widths), 1):
            layers[f"conv{i}"] = nn.Conv2d(before, width, 3, padding=1, bias=False)
            layers |= {f"norm{i}": nn.BatchNorm2d(width), f"relu{i}": nn.ReLU(inplace=True)}
            if i in (1, 2):
                layers[f"pool{i}"] = nn.MaxPool2d(3, 2)
        layers |= {"pool5": nn.AdaptiveMaxPool2d(3), "flatten": nn.Flatten()}
        for i, before in ((6, 9 * widths[-1]), (7, 4096)):
            layers[f"linear{i}"] = nn.Linear(before, 4096, bias=False)
            layers |= {f"norm{i}": nn.BatchNorm1d(4096), f"relu{i}": nn.ReLU(inplace=True)}
        super().__init__(layers)


class _PerView:
    """A norm of two views in one batch, one behind the other: in training each has statistics of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(2b, c, ...) to the same shape; in evaluation mode a batch of any size."""
        norm = super().forward
        return torch.cat([norm(view) for view in x.chunk(2)]) if self.training else norm(x)


class ViewNorm(_PerView, _BatchNorm):
    """BatchNorm of each view, (b, c) or (b, c, h, w)."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass


class SyncViewNorm(_PerView, nn.SyncBatchNorm):
    """BatchNorm of each view over all processes, as BYOL's; torch has it on CUDA alone."""


NORMS = {"bn": ViewNorm, "sync": SyncViewNorm, "none": nn.Identity}


def with_norm(network: nn.Module, norm: str) -> nn.Module:
    """The network with a new layer of NORMS in place of each BatchNorm, frozen where that is."""
    for layer, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            new = NORMS[norm](module.num_features).requires_grad_(module.weight.requires_grad)
            network.set_submodule(layer, new)
    return network


def mlp(in_dim: int, hidden_dim: int, out_dim: int, norm: str = "bn") -> nn.Sequential:
    """Projector or predictor, (b, in_dim) to (b, out_dim), Section 3.6. The last layer has no bias, as BYOL's."""
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
        """Views (b, 3, h, w) to their projections z, (b, out_dim) each, alone in a tuple.

        Both views pass in one batch, each with BatchNorm statistics of its own: see ViewNorm.
        """
        return (self.projector(self.encoder(torch.cat([v1, v2]))).chunk(2),)


class BYOL(nn.Module):
    """Online network (encoder f, projector g, predictor q) and target (f, g), which starts as a copy, Section 3.3."""

    def __init__(self, name: str, stem: str, norm: str, hidden_dim: int, out_dim: int):
        super().__init__()
        self.encoder = build_encoder(name, stem, norm)
        self.projector = mlp(self.encoder.num_features, hidden_dim, out_dim, norm)
        self.predictor = mlp(out_dim, hidden_dim, out_dim, norm)
        self.target = nn.Sequential(
            OrderedDict(encoder=copy.deepcopy(self.encoder), projector=copy.deepcopy(self.projector))
        )
        self.target.requires_grad_(False)

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Views (b, 3, h, w) to projections z, their predictions p, and the target's projections t, (b, out_dim) each.

        Both views pass in one batch, each with BatchNorm statistics of its own: see ViewNorm. The target keeps its own.
        """
        views = torch.cat([v1, v2])
        z = self.projector(self.encoder(views))
        p = self.predictor(z)
        with torch.no_grad():
            t = self.target(views)
        return z.chunk(2), p.chunk(2), t.chunk(2)

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """xi <- tau xi + (1 - tau) theta for the parameters of encoder and projector; buffers stay the target's own."""
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), online, 1 - tau)


METHODS = {"byol": BYOL, "simclr": SimCLR}


def build(method: str, model: str, stem: str, norm: str, hidden_dim: int, out_dim: int, **_) -> BYOL | SimCLR:
    """The network of a run, from its settings."""
    return METHODS[method](model, stem, norm, hidden_dim, out_dim)


def neurons(network: BYOL | SimCLR, parts: Iterable[str]) -> dict[str, Tensor]:
    """The weights whose rows are neurons, by layer: all of 2 dimensions or more in `parts` of the online network.

    parts: any of encoder, projector, predictor. Biases and norms are no neurons. ModelError for a grouped convolution:
    rows of different groups see different inputs, so no angle is between them.
    """
    found = {}
    for part in parts:
        for layer, module in getattr(network, part).named_modules(prefix=part):
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


def embed_blocks(encoder: nn.Module, views: Iterable[Tensor]) -> dict[str, Tensor]:
    """Outputs of the encoder's residual blocks, averaged over their maps: (n, c) by the name of the block."""
    found = {}

    def keep(name: str, output: Tensor) -> None:
        found.setdefault(name, []).append(output.mean((2, 3)).float())

    blocks = {name: block for name, block in encoder.named_modules() if isinstance(block, (BasicBlock, Bottleneck))}
    hooks = [b.register_forward_hook(lambda _, __, out, name=name: keep(name, out)) for name, b in blocks.items()]
    try:
        embed(encoder, views)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(outputs) for name, outputs in found.items()}


def save(path: str | Path, tensors: dict[str, Tensor], description: dict) -> None:
    """Write tensors and their description, with a digest of both, to a safetensors file: whole or not at all.

    The description is one JSON text under one header key, so that equal content makes equal files. ModelError if the
    file cannot be written.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    text = json.dumps(description | {"digest": digest(tensors, description)}, sort_keys=True)
    with whole(Path(path)) as file:
        file.write(to_bytes(tensors, {"description": text}))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to, which appears under its name when it is whole, or not at all. ModelError: it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise ModelError(f"{path}: cannot be written ({e.strerror}); what it held before is as it was") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system can; the new name, too, is to outlive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a file that `save` wrote. ModelError, naming the file, if it is another or damaged."""
    tensors, metadata = _read(path)
    if "description" not in metadata:
        raise ModelError(f"{path}: without a description, so not pretrain.py's; --model and --dataset say what it is")
    try:
        description = json.loads(metadata["description"])
        told = description.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{path}: its description is not one that pretrain.py writes ({e!r})") from e
    if told != digest(tensors, description):
        raise ModelError(f"{path}: damaged, it does not hold what was written (the digest differs)")
    return tensors, description


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a safetensors file; of a pickle by its suffix, of which nothing is run, tensors alone."""
    if os.path.isdir(path):
        raise ModelError(f"{path}: a folder; name the ckpt.safetensors or encoder.safetensors in it")
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file; a checkpoint is the ckpt.safetensors or encoder.safetensors of a run")
    if str(path).endswith(PICKLES):
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch raises errors of many types on what is no file of tensors
            raise ModelError(
                f"{path}: not a file of tensors alone, and nothing of it was run; save the network's state_dict() in it"
            ) from e
        while isinstance(held, dict) and (inner := next((k for k in ("state_dict", "model") if k in held), None)):
            held = held[inner]
        if not isinstance(held, dict):
            raise ModelError(f"{path}: holds a {type(held).__name__}, where tensors with names are wanted")
        return {str(name): x for name, x in held.items() if isinstance(x, Tensor)}, {}
    try:
        with safe_open(path, "pt") as file:
            # copies: what maps the file would keep its space on the disk when a newer one takes its name
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise ModelError(f"{path}: not a whole safetensors file ({e})") from e


def digest(tensors: dict[str, Tensor], description: dict) -> str:
    """SHA-256 over a description and over names, types, shapes and bytes of tensors on the CPU."""
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        sha.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        sha.update(x.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_encoder(
    path: str | Path, net: str = "online", model: str | None = None, stem: str | None = None, dataset: str | None = None
) -> tuple[nn.Module, dict]:
    """The online or the target encoder, in evaluation mode, and the description of a ckpt or encoder.safetensors.

    With `model`, the path is a file of another project, .pth or .safetensors, to be judged on `dataset`, and the
    description has no view. Raises ModelError as `load_network` and `adopt` do, if the file holds no target, and for
    flags of the stages, which these arguments are, that do not go together.
    """
    if model and not dataset:
        raise ModelError(f"--model {model}: takes --dataset, too; the file of another project does not say")
    if not model and stem:
        raise ModelError(f"--stem {stem}: has no effect without --model")
    if model and net == "target":
        raise ModelError(f"--net target: has no effect with --model {model}")
    if model:
        settings = {"dataset": dataset, "data_dir": "data", "seed": 0, "skip_broken": False, "norm": "bn"}
        settings |= {"model": model, "stem": stem or "imagenet"}
        return adopt(path, model, settings["stem"]), {"settings": settings}
    network, description = load_network(path)
    if net == "target":
        if not hasattr(network, "target"):
            raise ModelError(f"{path}: holds no target network; a ckpt.safetensors of --method byol does")
        network = network.target
    return network.encoder if description["holds"] == "checkpoint" else network, description


def adopt(path: str | Path, model: str, stem: str) -> nn.Module:
    """The encoder in a file of another project, by the prefix that fits; what matched is told on standard error.

    ModelError if the file is one of ours, or if no prefix of PREFIXES makes its names those of the encoder.
    """
    tensors, metadata = _read(path)
    if "description" in metadata:
        raise ModelError(f"{path}: --model {model} has no effect, the file says what it is")
    with torch.device("meta"):
        encoder = build_encoder(model, stem)
    wanted = encoder.state_dict()
    prefix = max(PREFIXES, key=lambda prefix: sum(prefix + name in tensors for name in wanted))
    found = {name: tensors[prefix + name].to(x.dtype) for name, x in wanted.items() if prefix + name in tensors}
    if not found:
        some = ", ".join(list(tensors)[:3]) or "no tensor"
        raise ModelError(f"{path}: none of its names is one of {model}, with no prefix of ours; it holds {some}")
    counts = {name: torch.tensor(0) for name in wanted if name.endswith("num_batches_tracked")}  # old files have none
    fill(encoder, counts | found, path)
    left = [name for name in tensors if name.removeprefix(prefix) not in found or not name.startswith(prefix)]
    rest = f"; left out: {', '.join(left[:4])}{f' and {len(left) - 4} more' if len(left) > 4 else ''}" if left else ""
    under = f" under {prefix}" if prefix else ""
    processes.say(f"{path}: {len(found)} tensors of {model}{under}{rest}; no digest, so unchecked")
    return encoder.to(memory_format=torch.channels_last).eval()


def load_network(path: str | Path) -> tuple[nn.Module, dict]:
    """The network of a ckpt.safetensors, or the encoder of an encoder.safetensors, in evaluation mode; its description.

    Raises ModelError as `load` and `fill` do.
    """
    tensors, description = load(path)
    try:
        settings = description["settings"]
        _ = [settings[key] for key in ("dataset", "data_dir", "seed")], [description["view"][key] for key in VIEW]
        with torch.device("meta"):  # a description may ask for more than there is memory
            if description["holds"] == "encoder":
                network = build_encoder(settings["model"], settings["stem"], settings["norm"])
            else:
                network = build(**settings)
    except ModelError:
        raise
    except Exception as e:  # whatever a description that lies makes of the constructors
        raise ModelError(f"{path}: its description is not one that pretrain.py writes ({e!r})") from e
    fill(network, {name: x for name, x in tensors.items() if "/" not in name}, path)
    return network.to(memory_format=torch.channels_last).eval(), description


def fill(network: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put the tensors of a file into a network. ModelError if one is missing, superfluous or of another shape or type.

    A network on the meta device takes the tensors as its own.
    """
    expected = network.state_dict()
    for kind, names in (("missing", expected.keys() - tensors), ("superfluous", tensors.keys() - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"{path}: {kind}, for what is described: {', '.join(sorted(names)[:3])}{more}")
    for key, x in expected.items():
        held, wanted = (f"{tuple(y.shape)} {y.dtype}".replace("torch.", "") for y in (tensors[key], x))
        if held != wanted:
            raise ModelError(f"{path}: {key} is {held}, where what is described has {wanted}")
    network.load_state_dict(tensors, assign=any(x.is_meta for x in expected.values()))

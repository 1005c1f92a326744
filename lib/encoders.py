"""Encoders by name: timm's ResNets and ViTs, and the AlexNet of the paper's Figures 3 and 7."""

import difflib
from collections import OrderedDict
from itertools import pairwise

import timm
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lib.errors import InputError


def of_timm(name: str) -> ResNet | VisionTransformer:
    """Build a ViT, or a ResNet with BatchNorm, without a classifier."""
    if not timm.is_model(name):
        suggestions = difflib.get_close_matches(name, timm.list_models(["*res*", "*vit*"]), 1)
        hint = f" (did you mean {suggestions[0]}?)" if suggestions else ""
        raise InputError(f"model {name}: not a name timm knows{hint}")
    if not is_vit(name) and timm.model_entrypoint(name).__module__ != ResNet.__module__:
        raise InputError(f"model {name}: not of timm.models.resnet or vision_transformer; resnet18 is the paper's")
    options = {"dynamic_img_size": True} if is_vit(name) else {}
    try:
        encoder = timm.create_model(name, num_classes=0, **options)
    except RuntimeError as e:  # an unknown tag after the name
        raise InputError(f"model {name}: timm cannot make it ({e})") from e
    if isinstance(encoder, ResNet) and not isinstance(encoder.bn1, nn.BatchNorm2d):
        raise InputError(f"model {name}: is normalised by {type(encoder.bn1).__name__}; take a ResNet with BatchNorm")
    return encoder


def is_vit(name: str) -> bool:
    """Whether a name is that of a ViT of timm, whose stem is its own."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ == VisionTransformer.__module__


def refuse_unfit_views(encoder: nn.Module, size: int) -> None:
    """Raise InputError for views of (size, size) pixels that the patches of a ViT do not divide."""
    patch = encoder.patch_embed.patch_size[0] if isinstance(encoder, VisionTransformer) else 1
    if size % patch:
        raise InputError(f"--model: its patches of {patch} pixels do not divide views of {size}; take another")


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

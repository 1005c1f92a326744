"""Features of a data set's images by an encoder, with labels and paths, in one file for other programs.

    python -m tools.embed runs/photos-amhe/ckpt.safetensors --out features.safetensors
    python -m tools.embed runs/mine/ckpt.safetensors --dataset path/to/pictures --split train --out mine.safetensors

The encoder, the data set and the evaluation view are those that knn_eval.py would judge, chosen by the same flags. A
folder of pictures may be without classes. The file holds `train.features` (n, d) in fp32, `train.labels` (n,) where
there are classes, and the same of test; its description holds the names of the classes and the paths of the pictures.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import data
from harness import checkpoint, judging
from harness.judging import Judged
from harness.settings import refuse_unwritable
from lib import cli, processes
from lib.errors import InputError
from lib.log import emit, is_main, provenance


def embed(
    ckpt: judging.Ckpt,
    *,
    out: Annotated[str, "the file to write; it must not exist"] = "features.safetensors",
    split: Annotated[Literal["both", "train", "test"], "the images that are embedded"] = "both",
    **shared: judging.shared_flags,
):
    """Write the features of a data set's images by a checkpoint's encoder, their labels and paths, to a file."""
    place = Path(out)
    if os.path.lexists(place):
        raise InputError(f"--out {out}: is already there; name a new file")
    refuse_unwritable(place)
    judged = judging.open_judged(processes.start(), ckpt, shared, without_classes=True)
    splits = {"train": judged.images.train, "test": judged.images.test}
    splits = {name: part for name, part in splits.items() if split in ("both", name) and len(part.labels)}
    if not splits:
        raise InputError(f"--split {split}: dataset {judged.dataset} has no such images; take --split train")
    description = describe(judged, ckpt, splits)
    counts = {name: len(part.labels) for name, part in splits.items()}
    row = {"stage": "embed", "ckpt": ckpt, **description["protocol"], "view": judged.view, "images": counts}
    emit(row, text=f"{judged.dataset}: {listed(counts)}")

    tensors = {}
    for name, part in splits.items():
        on_device = part.to(judged.accelerator.device)
        tensors[f"{name}.features"] = judging.embedded(judged.encoder, on_device, judged.view, name)
        if judged.images.classes:
            tensors[f"{name}.labels"] = part.labels
    if is_main():
        checkpoint.save(out, tensors, description)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    emit({"stage": "embed", "of": "file", "out": out, "tensors": shapes}, text=f"{out}: {listed(shapes)}")


def describe(judged: Judged, ckpt: str, splits: dict[str, data.Split]) -> dict:
    """Return the description that the file carries: what was embedded, by what, and the paths of the pictures."""
    protocol = {name: value for name, value in judged.columns.items() if name != "split"}
    description = {"holds": "features", "protocol": protocol, "view": judged.view}
    description |= {"classes": list(judged.images.classes), **provenance()}
    description["encoder"] = {"file": ckpt, "settings": judged.settings}
    paths = {name: part.paths.tolist() for name, part in splits.items() if part.paths is not None}
    if paths:
        folders = {os.path.dirname(path) for part in paths.values() for path in part}
        folder = os.path.commonpath(folders)
        description["folder"] = folder
        description["paths"] = {name: [os.path.relpath(path, folder) for path in part] for name, part in paths.items()}
    return description


def listed(facts: dict) -> str:
    """Say for people what stands in a row as a dict."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


if __name__ == "__main__":
    cli.run(embed)

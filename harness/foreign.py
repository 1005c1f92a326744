"""Encoders in the files of other projects: timm's or torchvision's ResNet, wherever its tensors lie in the file.

    encoder, prefix = adopt("moco_v2_800ep_pretrain.pth.tar", "resnet50", "imagenet", "encoder_q")

A copy of the encoder is a set of tensors that completes it. What stands before their names is its prefix, as
`state_dict.module.encoder_q.`. Where the encoder is a torch.nn.Sequential of a ResNet's children, numbers stand for
their names: 0 for conv1, 1 for bn1, 4 for layer1.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.checkpoint import described
from lib import processes
from lib.errors import InputError
from lib.tensors import read_tensors
from models import build_encoder

Names = dict[str, str]  # where a file holds the tensors of an encoder: its name there, by the encoder's name

STEMS = ("imagenet", "cifar")
OTHER_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101")  # suggested if they fit
COUNTER = "num_batches_tracked"  # of BatchNorm in training; files of old versions of torch have none
SHARD = re.compile(r"\d+-of-\d+")


def adopt(path: str | Path, model: str, stem: str, prefix: str | None = None) -> tuple[nn.Module, str]:
    """Load the encoder in a file of another project, in evaluation mode, and return it with its prefix.

    Prints what matched on standard error. InputError if the file is one of ours, if it holds no such encoder, or if it
    holds several, unless `prefix`, or a part of it between dots, picks one.
    """
    tensors, header = read_tensors(path)
    if described(header):
        raise InputError(f"{path}: --model {model} has no effect, the file says what it is")
    with torch.device("meta"):
        encoder = build_encoder(model, stem)
    wanted = encoder.state_dict()
    copies = complete_copies(tensors, wanted)
    if not copies:
        raise InputError(f"{path}: {why_none(path, tensors, wanted, model, stem)}")
    chosen = choose(copies, prefix, tensors, f"{path}: holds {model}")
    names = copies[chosen]
    counters = {name: torch.tensor(0) for name in wanted if name.endswith(COUNTER)}
    found = {name: tensors[stored].to(wanted[name].dtype) for name, stored in names.items() if stored in tensors}
    encoder.load_state_dict(counters | found, assign=True)
    under = f" under {chosen}" if chosen else ""
    if names != named(wanted, chosen):
        under += " with numbers for children"
    rest = left_out(tensors, set(names.values()))
    processes.say(f"{path}: {len(found)} tensors of {model}{under}{rest}; it has no digest, so it is unchecked")
    return encoder.to(memory_format=torch.channels_last).eval(), chosen


# ---- Where an encoder lies in a file ---------------------------------------------------------------------------------


def complete_copies(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Names]:
    """Return each copy of an encoder that a file holds, by its prefix."""
    copies = {}
    for prefix, names in candidates(tensors, wanted).items():
        if not faults(tensors, wanted, names):
            copies[prefix] = names
    return copies


def candidates(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Names]:
    """Return where copies may lie: wherever the file holds the encoder's first tensor, or numbered children enough."""
    first = next(iter(wanted))
    found = {}
    for stored in tensors:
        prefix = stored.removesuffix(first)
        if prefix != stored and prefix[-1:] in ("", "."):
            found[prefix] = named(wanted, prefix)
    children = children_of(wanted)
    for prefix, numbers in numbered_children(tensors).items():
        if len(numbers) >= len(children) and prefix not in found:
            number_of = dict(zip(children, sorted(numbers)))
            found[prefix] = numbered(wanted, prefix, number_of)
    return found


def named(wanted: dict[str, Tensor], prefix: str) -> Names:
    """Return the names of an encoder's tensors under a prefix."""
    return {name: prefix + name for name in wanted}


def numbered(wanted: dict[str, Tensor], prefix: str, number_of: dict[str, int]) -> Names:
    """Return the same names with numbers in place of the encoder's children."""
    names = {}
    for name in wanted:
        child, _, rest = name.partition(".")
        names[name] = f"{prefix}{number_of[child]}.{rest}"
    return names


def children_of(names: dict[str, Tensor]) -> list[str]:
    """Return the children that names begin with, in order: conv1, bn1, layer1."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def numbered_children(tensors: dict[str, Tensor]) -> dict[str, set[int]]:
    """Return the numbers that follow each prefix of a file's names, as children of a torch.nn.Sequential have them."""
    numbers = {}
    for name in tensors:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if part.isdecimal():
                prefix = "".join(f"{before}." for before in parts[:i])
                numbers.setdefault(prefix, set()).add(int(part))
    return numbers


def faults(tensors: dict[str, Tensor], wanted: dict[str, Tensor], names: Names) -> list[str]:
    """Return what keeps a candidate from being a copy: tensors that are missing, of another shape or superfluous.

    Superfluous are those that belong to the encoder's children, as the third block of ResNet-34's layer1 does in
    ResNet-18: the rest of the file does not count.
    """
    found = []
    for name, stored in names.items():
        if stored not in tensors:
            if not name.endswith(COUNTER):
                found.append(f"{stored} is missing")
        elif tensors[stored].shape != wanted[name].shape:
            shape, right = tuple(tensors[stored].shape), tuple(wanted[name].shape)
            found.append(f"{stored} is {shape} in place of {right}")
        elif wanted[name].is_floating_point() and not tensors[stored].is_floating_point():
            found.append(f"{stored} is of {tensors[stored].dtype}")
    children = {stored.removesuffix(name.partition(".")[2]) for name, stored in names.items()}
    known = set(names.values())
    for stored in tensors:
        if stored not in known and stored.startswith(tuple(children)):
            found.append(f"{stored} is superfluous")
    return found


# ---- Which copy ------------------------------------------------------------------------------------------------------


def choose(copies: dict[str, Names], prefix: str | None, tensors: dict[str, Tensor], holds: str) -> str:
    """Return the prefix of the copy that is meant, or of the first of equal ones. InputError, which names all, else."""
    listed = ", ".join(shown(found) for found in copies)
    for whole in (prefix, f"{prefix}."):
        if whole in copies:
            return whole
    fitting = [found for found in copies if prefix is None or is_part(prefix, found)]
    if not fitting:
        raise InputError(f"--prefix {prefix}: {holds} under {listed}; take one of these")
    first, *others = fitting
    if all(equal(tensors, copies[first], copies[other]) for other in others):
        return first
    example = shown(first)
    raise InputError(f"{holds} {len(copies)} times, under {listed}; choose one by --prefix, as --prefix {example}")


def equal(tensors: dict[str, Tensor], names: Names, others: Names) -> bool:
    """Whether two copies hold the same numbers."""
    for name, stored in names.items():
        if stored not in tensors or others[name] not in tensors:  # a counter that the file does not have
            continue
        x, other = tensors[stored], tensors[others[name]]
        if x.dtype != other.dtype or not torch.equal(x, other):
            return False
    return True


def is_part(prefix: str, found: str) -> bool:
    """Whether a prefix has this part between dots; "." stands for no prefix."""
    if prefix == ".":
        return found == ""
    return f".{prefix.strip('.')}." in f".{found}"


def shown(prefix: str) -> str:
    """Return a prefix as messages and the flag have it: no prefix is a dot."""
    return prefix or "."


def left_out(tensors: dict[str, Tensor], used: set[str]) -> str:
    """Name the tensors of a file that are not used."""
    unused = [name for name in tensors if name not in used]
    if not unused:
        return ""
    more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
    return f"; left out: {', '.join(unused[:4])}{more}"


# ---- Why there is none -----------------------------------------------------------------------------------------------


def why_none(path: str | Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor], model: str, stem: str) -> str:
    """Say why a file holds no copy of an encoder, and what to do."""
    shard = SHARD.search(Path(path).name)
    if shard:
        return (
            f"does not hold all of {model}: it is a shard ({shard[0]}) of a checkpoint; join the tensors of all its "
            "shards in one dict and save that by torch.save"
        )
    found = candidates(tensors, wanted)
    suggestion = flags_that_fit(tensors, model, stem)
    if suggestion:
        return f"its tensors are not those of --model {model} --stem {stem}; take {suggestion}"
    faults_of = {prefix: faults(tensors, wanted, names) for prefix, names in found.items()}
    nearest = min(faults_of, key=lambda prefix: len(faults_of[prefix]), default=None)
    if nearest is None or len(faults_of[nearest]) >= len(wanted) / 2:
        sample = ", ".join(list(tensors)[:3]) or "no tensor"
        fault = f"none of its names belongs to {model}" if nearest is None else f"few of its names belong to {model}"
        return f"{fault}, under any prefix; it holds {sample}"
    listed = ", ".join(faults_of[nearest][:3])
    more = f" and {len(faults_of[nearest]) - 3} more" if len(faults_of[nearest]) > 3 else ""
    return f"is not {model} with the {stem} stem: {listed}{more}; name the --model and --stem that it was trained with"


def flags_that_fit(tensors: dict[str, Tensor], model: str, stem: str) -> str:
    """Return flags for an encoder that the file does hold, or nothing. The same model with another stem comes first."""
    for other_stem in STEMS:
        with torch.device("meta"):
            wanted = build_encoder(model, other_stem).state_dict()
        if other_stem != stem and complete_copies(tensors, wanted):
            return f"--model {model} --stem {other_stem}"
    if not any(name.endswith(("conv1.weight", "0.weight")) for name in tensors):
        return ""
    for other_model in OTHER_MODELS:
        with torch.device("meta"):
            wanted = build_encoder(other_model, "imagenet").state_dict()
        for other_stem in STEMS:
            if other_stem == "cifar":  # built from the other, which takes a third of a second
                wanted["conv1.weight"] = wanted["conv1.weight"][:, :, :3, :3]
            if complete_copies(tensors, wanted):
                return f"--model {other_model} --stem {other_stem}"
    return ""

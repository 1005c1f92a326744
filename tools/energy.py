"""Hyperspherical energy of every layer in a file of weights, of any project; with two files, before and after.

    python -m tools.energy runs/photos-amhe --prefix projector
    python -m tools.energy before.safetensors after.pth --s 1 --angular false

Neurons are the rows of weight.flatten(1). The energy of a layer is the mean over their pairs, as in regularizers.py.
Beside it stand the expected energy of neurons that are uniform and independent on the sphere, and the angle of the
closest pair. Numbers are computed in float64. One file at a time is in memory, and copies of one layer.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from harness.checkpoint import is_ours
from lib import cli, processes
from lib.errors import InputError
from lib.files import weights_file
from lib.log import emit
from lib.nearest import finest
from lib.tensors import read_tensors
from regularizers import ZERO, energy_of, unit

Shapes = dict[str, tuple[int, ...]]  # of weights (N, ...), by the names of their layers
LeftOut = dict[str, list[str]]  # names, by the reason

COLUMNS = {  # of the table, by the number of files
    1: ("neurons", "dims", "energy", "uniform", "closest"),
    2: ("neurons", "dims", "before", "after", "difference", "uniform", "closest before", "closest after"),
}
SUMMED = ("energy", "before", "after", "difference", "uniform")
BLOCK = 1024  # rows whose cosines are computed together: 8 MB

# Names of what has two dimensions or more and is no layer of neurons. The first two are looked for in the whole name,
# the others in its last part before .weight, because the layers of an embedding's network have neurons.
OPTIMIZER = re.compile(r"(^|\.)(optim\w*|exp_avg\w*|momentum_buffer)(\.|$)")
ADAPTER = re.compile(r"(^|[._])(lora|oft|boft|hada|lokr)_", re.I)
EMBEDDING = re.compile(r"embed|token|(^|_)emb(_|$)|^w[tp]e$|rel_pos|relative_position")
NO_WEIGHT = re.compile(r"bias|norm|mask|^ln|^bn")


class Measured(NamedTuple):
    """What is measured of the neurons of a layer."""

    energy: float
    closest: float  # the smallest angle between two neurons, in degrees


def energy(
    *files: Annotated[str, "one file of safetensors or torch.save, or a run's folder; or two: before and after"],
    s: Annotated[float, ">= 0", "<= 10", "power of the energy; 0 is logarithmic"] = 2.0,
    angular: Annotated[bool, "by the angle in radians; False = by the chord"] = True,
    prefix: Annotated[str, "measures the layers whose names begin so; None = all"] | None = None,
    json: Annotated[bool, "a JSON object a line, in place of a table"] = False,
):
    """Print the hyperspherical energy of every layer in a file of weights; of two files, the difference, too."""
    if len(files) not in COLUMNS:
        raise InputError(f"takes one file, or two to compare, before and after; not {len(files)}")
    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes would do the same; launch one")
    layers = layers_of(files, prefix)
    has_float64 = finest(accelerator.device) == torch.float64
    device = accelerator.device if has_float64 else torch.device("cpu")
    measured = partial(measured_layers, layers=layers, prefix=prefix, device=device, s=s, angular=angular)
    write = begin_rows(files, layers, s, angular, json)
    rows = []
    with tqdm(total=len(files) * len(layers), unit="layer", disable=None) as bar:
        before = dict(measured(files[0], bar=bar)) if len(files) == 2 else {}
        for name, after in measured(files[-1], bar=bar):
            row = row_of(name, layers[name], after, before.get(name))
            row["uniform"] = uniform_energy(row["dims"], s, angular)
            write(row)
            rows.append(row)
    write(sum_of(rows))


def measured_layers(
    path: str, layers: Shapes, prefix: str | None, device: torch.device, s: float, angular: bool, bar: tqdm
) -> Iterator[tuple[str, Measured]]:
    """Yield the names of layers and what is measured of each in a file."""
    weights, _ = sort_out(path, prefix)
    for name in layers:
        weight = weights.pop(name)
        yield name, measure(weight.to(device), s, angular)
        bar.update()


# ---- Which layers there are ------------------------------------------------------------------------------------------


def layers_of(files: tuple[str, ...], prefix: str | None) -> Shapes:
    """Return the shapes of the layers that all files have, and say what is left out.

    InputError for a file without a layer, and for two that have none in common.
    """
    (first, left_out_first), (last, left_out_last) = (shapes_in(path, prefix) for path in (files[0], files[-1]))
    common = {name: shape for name, shape in first.items() if last.get(name) == shape}
    if not common:
        examples = f"{next(iter(first))} in the first, {next(iter(last))} in the second"
        fault = f"{' and '.join(files)}: no layer has one name and one shape in both ({examples})"
        raise InputError(fault + advice_on_names(first, last))
    if len(files) == 2:
        left_out_first["a layer of this file alone"] = [name for name in first if name not in last]
        left_out_last["a layer of this file alone"] = [name for name in last if name not in first]
        reshaped = [name for name in first if name in last and name not in common]
        left_out_last["a layer of another shape than before"] = reshaped
        say_left_out(files[0], left_out_first)
    say_left_out(files[-1], left_out_last)
    return common


def advice_on_names(first: Shapes, last: Shapes) -> str:
    """Say what to compare where one file has names of the other behind a prefix; nothing where it has not."""
    for shapes, other in ((first, last), (last, first)):
        endings = tuple(f".{name}" for name in other)
        if any(name.endswith(endings) for name in shapes):
            return (
                "; one has a prefix before the names of the other: a run's encoder/model.safetensors has timm's names, "
                "without prefix; compare it with such a file, or the ckpt.safetensors of two runs"
            )
    return ""


def shapes_in(path: str, prefix: str | None) -> tuple[Shapes, LeftOut]:
    """Return the shapes of the layers in a file, and what is left out. InputError for a file without a layer."""
    weights, left_out = sort_out(path, prefix)
    if not weights:
        where = f"under {prefix}" if prefix else "in it"
        kinds = f"; left out: {', '.join(left_out)}" if left_out else ""
        raise InputError(f"{path}: no weight {where} of two neurons or more in 3 dimensions or more{kinds}")
    return {name: tuple(weight.shape) for name, weight in weights.items()}, left_out


def say_left_out(path: str, left_out: LeftOut) -> None:
    """Name what is left out of a file, a line a reason."""
    for reason, names in left_out.items():
        if names:
            processes.say(f"{path}: left out, {reason}: {', '.join(names)}")


def sort_out(path: str, prefix: str | None) -> tuple[dict[str, Tensor], LeftOut]:
    """Return the weights (N, ...) of a file, and the names of what else has two dimensions or more, by the reason.

    Neither holds the state of a run, such as momentum, whose names have a slash in our files alone. A folder will do
    for the file in it: see `files.weights_file`.
    """
    tensors, header = read_tensors(weights_file(path))
    is_of_a_run = is_ours(header)
    weights = {}
    left_out = {}
    for name, tensor in tensors.items():
        is_state = is_of_a_run and "/" in name
        if tensor.ndim < 2 or is_state or not name.startswith(prefix or ""):
            continue
        reason = why_no_layer(name, tensor)
        if reason:
            left_out.setdefault(reason, []).append(name)
        else:
            weights[name] = tensor
    return weights, left_out


def why_no_layer(name: str, tensor: Tensor) -> str:
    """Say why a tensor of two dimensions or more is no layer of neurons; nothing if it is one."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    is_convolution = tensor.ndim > 3
    if OPTIMIZER.search(name):
        return "state of an optimizer"
    if ADAPTER.search(name):
        return "an adapter that is not merged into its weight"
    if EMBEDDING.search(module) and not is_convolution:  # patch_embed may be one
        return "an embedding"
    if NO_WEIGHT.search(module):
        return "a bias, norm or mask"
    if not tensor.is_floating_point():
        return "not of real numbers"
    if tensor.shape[1:].numel() < 3:
        return "fewer than 3 dimensions"
    if len(tensor) < 2:
        return "a single neuron"
    if tensor.ndim > 2 and tensor.shape[1] == 1:
        return "a depthwise convolution, or one of a single channel"
    lengths = tensor.flatten(1).double().norm(dim=1)
    if not lengths.isfinite().all():
        return "numbers that are not finite"
    if (lengths > ZERO).sum() < 2:
        return "fewer than two rows that are not zero"
    return ""


# ---- What is measured ------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(weight: Tensor, s: float, angular: bool) -> Measured:
    """Return energy and closest pair of the neurons of a weight (N, ...). Rows of zeros have no direction: no part."""
    rows = weight.flatten(1).double()
    neurons = unit(rows)
    neurons = neurons[neurons.any(1)]
    energies = energy_of({"neurons": neurons}, s, angular)
    return Measured(energies["neurons"].item(), closest_angle(neurons))


def closest_angle(neurons: Tensor) -> float:
    """Return the smallest angle, in degrees, between two of the unit rows (N, d), N >= 2."""
    largest = -math.inf
    for a in range(0, len(neurons), BLOCK):
        for b in range(a, len(neurons), BLOCK):
            cosines = neurons[a : a + BLOCK] @ neurons[b : b + BLOCK].T
            if a == b:
                cosines.fill_diagonal_(-math.inf)
            cosine, place = cosines.flatten().max(0)
            if cosine > largest:
                largest = cosine
                row, column = divmod(place.item(), cosines.shape[1])
                pair = [a + row, b + column]
    x, y = neurons[pair]
    angle = 2 * torch.atan2((x - y).norm(), (x + y).norm())  # arccos would lose the digits of a small angle
    return math.degrees(angle)


# ---- Neurons that are uniform on the sphere --------------------------------------------------------------------------


def uniform_energy(d: int, s: float, angular: bool) -> float:
    """Return the expected energy of two independent, uniform points of the sphere in d >= 2 dimensions.

    It is infinite for s >= d - 1. Its relative error is below 1e-13 up to d = 100, and below 1e-9 up to d = 100,000.
    """
    if s >= d - 1:
        return math.inf
    chord = uniform_chord(d, s)
    return chord + angle_beyond_chord(d, s) if angular else chord


def uniform_chord(d: int, s: float) -> float:
    """Return E ||x - y||^-s or, for s = 0, E log(1 / ||x - y||): ||x - y||^2 / 4 is Beta(a, a), a = (d - 1) / 2."""
    a = (d - 1) / 2
    if s == 0:
        digamma, digamma_of_sum = torch.tensor([a, 2 * a], dtype=torch.float64).digamma().tolist()
        return (digamma_of_sum - digamma) / 2 - math.log(2)
    # both without the term log Gamma(a), which cancels
    log_beta_of_moment = math.lgamma(a - s / 2) - math.lgamma(2 * a - s / 2)
    log_beta = math.lgamma(a) - math.lgamma(2 * a)
    return math.exp(log_beta_of_moment - log_beta - s * math.log(2))


def angle_beyond_chord(d: int, s: float) -> float:
    """Return E f_s(angle) - E f_s(chord), f_s as in regularizers.riesz, by quadrature over the angle.

    The density of the angle is sin(angle)^(d - 2), up to a factor; its standard deviation is about 1 / sqrt(d). Both
    functions have a pole at 0, but their difference has none that counts. The nodes are those of tanh-sinh quadrature.
    """
    step = min(1 / 64, 1 / (8 * math.sqrt(d)))
    t = torch.arange(-4, 4 + step, step, dtype=torch.float64)
    x = math.pi * t.sinh()
    angle = math.pi * x.sigmoid()  # 0 ... pi, dense at both ends
    sine = (math.pi * (-x.abs()).sigmoid()).sin()  # of the angle, or of pi minus the angle, which is the smaller one
    slope = x.sigmoid() * (-x).sigmoid() * t.cosh()
    log_weight = (d - 2) * sine.log() + slope.log()
    log_weight = log_weight.log_softmax(0)
    chord = 2 * (angle / 2).sin()
    log_ratio = (angle / chord).log()
    if s == 0:
        return -(log_weight.exp() * log_ratio).sum().item()
    # weight (angle^-s - chord^-s); angle^-s alone would overflow
    weighted_power = (log_weight - s * angle.log()).exp()
    return -(weighted_power * (s * log_ratio).expm1()).sum().item()


# ---- Rows ------------------------------------------------------------------------------------------------------------


def row_of(name: str, shape: tuple[int, ...], after: Measured, before: Measured | None) -> dict:
    """Return the row of a layer, without the expected energy."""
    row = {"layer": name, "neurons": shape[0], "dims": math.prod(shape[1:])}
    if before is None:
        return row | {"energy": after.energy, "closest": after.closest}
    row |= {"before": before.energy, "after": after.energy, "difference": after.energy - before.energy}
    return row | {"closest before": before.closest, "closest after": after.closest}


def sum_of(rows: list[dict]) -> dict:
    """Return the last row, with the sum over layers of each column that has one."""
    total = {"layer": "sum"}
    for column in SUMMED:
        if column in rows[0]:
            total[column] = math.fsum(row[column] for row in rows)
    return total


def begin_rows(files: tuple[str, ...], layers: Shapes, s: float, angular: bool, json: bool) -> Callable[[dict], None]:
    """Print what the numbers are, and return the function that prints a row."""
    if json:
        emit({"stage": "energy", "files": list(files), "s": s, "angular": angular})
        return emit_row
    distance = "angle" if angular else "chord"
    print(f"energy by the {distance}, s = {s:g}, mean over pairs of neurons: {', then '.join(files)}")
    print("uniform: expected of independent, uniform neurons. closest: angle of the closest pair, in degrees")
    name_width = max(map(len, layers))
    heads = {column: column for column in COLUMNS[len(files)]}
    write = partial(print_row, columns=COLUMNS[len(files)], name_width=name_width)
    write({"layer": "layer"} | heads)
    return write


def emit_row(row: dict) -> None:
    """Print a row as JSON, where an infinite number is null."""
    finite = {name: None if value == math.inf else value for name, value in row.items()}
    emit({"stage": "energy", "of": "sum" if row["layer"] == "sum" else "layer", **finite})


def print_row(row: dict, columns: tuple[str, ...], name_width: int) -> None:
    """Print a row of the table."""
    cells = [row["layer"].ljust(name_width)]
    for column in columns:
        width = max(len(column), 11)
        cells.append(as_text(column, row.get(column, "")).rjust(width))
    tqdm.write("  ".join(cells).rstrip(), file=sys.stdout)
    sys.stdout.flush()


def as_text(column: str, value: str | float) -> str:
    """Write the value of a column."""
    if not isinstance(value, float):
        return str(value)
    if column == "difference":
        return f"{value:+.3g}"
    return f"{value:#.4g}" if column.startswith("closest") else f"{value:#.7g}"


if __name__ == "__main__":
    cli.run(energy)

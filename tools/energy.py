"""Hyperspherical energy of every layer in a file of weights, of any project; with two files, before and after.

    python -m tools.energy runs/photos-amhe --prefix projector
    python -m tools.energy before.safetensors after.pth --s 1 --angular false

Neurons are the rows of weight.flatten(1), or those of its transpose in a Conv1D or a transposed convolution. The energy
of a layer is the mean over their pairs, as in regularizers.py. Beside it stand the expected energy of neurons that are
uniform and independent on the sphere, and the angle of the closest pair. Numbers are computed in float64.
"""

import math
import re
from typing import Annotated, Literal

import torch
from scipy.integrate import quad
from scipy.special import digamma, poch
from torch import Tensor
from tqdm import tqdm

from harness.checkpoint import description_of
from lib import cli, processes
from lib.errors import InputError
from lib.files import weights_file
from lib.log import emit
from lib.nearest import finest, nearest
from lib.tensors import read_tensors
from regularizers import ZERO, energy_of, unit

Weights = dict[str, Tensor]  # (N, ...), by the names of their layers
LeftOut = dict[str, list[str]]  # names, by the reason

SUMMED = ("uniform", "energy", "before energy", "after energy", "difference")  # columns that the last row has

# Names of what has two dimensions or more and is no layer of neurons. The first two are looked for in the whole name,
# the others in its last part before .weight, because the layers of an embedding's network have neurons.
OPTIMIZER = re.compile(r"(^|\.)(optim\w*|exp_avg\w*|momentum_buffer)(\.|$)")
ADAPTER = re.compile(r"(^|[._])(?i:[a-z]*lora[._]|(oft|boft|hada|lokr|vera|hra|c3a|ia3|miss)_)")  # the names of peft
PART = re.compile(r"(^|[._])parametrizations\.|weight_([gv]|orig)$")
EMBEDDING = re.compile(r"embed|token|(^|_)emb(_|$)|^w[tp]e$|rel_pos|relative_position")
NO_WEIGHT = re.compile(r"bias|norm|mask|^queue|^ln|^bn")
CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")  # names of GPT-2; its Conv1D has weights (in, N)

WEIGHT_NORM = {  # what stands for .weight: the lengths g of the neurons and, of any length, their directions v
    "parametrizations.weight.original0": "parametrizations.weight.original1",
    "weight_g": "weight_v",  # before torch 2.0
}


def energy(
    *files: Annotated[str, "one file of safetensors or torch.save, or a run's folder; or two: before and after"],
    s: Annotated[float, ">= 0", "<= 8", "power of the energy; 0 is logarithmic"] = 2.0,
    angular: Annotated[bool, "by the angle in radians; False = by the chord"] = True,
    prefix: Annotated[str, "measures the layers whose names begin so; None = all"] | None = None,
    transposed: Annotated[tuple[str, ...], "names, or parts of them, of weights (in, N, ...)"] | None = None,
    device: Annotated[Literal["cpu", "cuda"], "None = a GPU where there is one"] | None = None,
    json: Annotated[bool, "a JSON object a line, in place of a table"] = False,
):
    """Print the hyperspherical energy of every layer in a file of weights; of two files, the difference, too."""
    if len(files) not in (1, 2):
        raise InputError(f"takes one file, or two to compare, before and after; not {len(files)}")
    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes would do the same; launch one")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU on this machine; leave the flag out")
    place = torch.device(device or accelerator.device)
    if finest(place) != torch.float64:
        place = torch.device("cpu")
    contents = [read_weights(path, prefix, transposed or ()) for path in files]
    rows = []
    for name in tqdm(common_layers(files, contents), unit="layer", disable=None):
        first = contents[0][0][name]
        row = {"layer": name, "neurons": len(first), "dims": first[0].numel()}
        row["uniform"] = uniform_energy(row["dims"], s, angular)
        for when, (weights, _) in zip(("before ", "after ") if len(files) == 2 else ("",), contents):
            row[f"{when}energy"], row[f"{when}closest"] = measure(weights[name].to(place), s, angular)
        if len(files) == 2:
            row["difference"] = row["after energy"] - row["before energy"]
        rows.append(row)
    sums = {column: math.fsum(row[column] for row in rows) for column in SUMMED if column in rows[0]}
    rows.append({"layer": "sum", **sums})
    if json:
        emit({"stage": "energy", "files": list(files), "s": s, "angular": angular})
        for row in rows:
            finite = {column: None if value == math.inf else value for column, value in row.items()}
            emit({"stage": "energy", **finite})
        return
    distance = "angle" if angular else "chord"
    print(f"energy by the {distance}, s = {s:g}, mean over pairs of neurons: {', then '.join(files)}")
    print("uniform: expected of independent, uniform neurons. closest: angle of the closest pair, in degrees")
    print(*table_lines(rows), sep="\n")


def read_weights(path: str, prefix: str | None, transposed: tuple[str, ...]) -> tuple[Weights, LeftOut]:
    """Return the weights of a file, and the names of what else has two dimensions or more. InputError for no weight."""
    file = weights_file(path)
    tensors = with_weight_norm(read_tensors(file, mapped=True))
    is_of_a_run = description_of(file) is not None  # where a slash in a name says that it is state, such as momentum
    has_columns = column_layers(path, tensors, transposed)
    weights, left_out = {}, {}
    for name, tensor in tqdm(tensors.items(), desc="read", unit="tensor", leave=False, disable=None):
        is_state = is_of_a_run and "/" in name
        if tensor.ndim < 2 or is_state or not name.startswith(prefix or ""):
            continue
        weight = tensor.transpose(0, 1) if name in has_columns else tensor
        reason = why_no_layer(name, weight)
        if reason:
            left_out.setdefault(reason, []).append(name)
        else:
            weights[name] = weight
    columns = sorted(has_columns & weights.keys())
    if columns:
        processes.say(f"{path}: neurons are columns, as in Conv1D or a transposed convolution: {', '.join(columns)}")
    if not weights:
        where = f"under {prefix}" if prefix else "in it"
        kinds = f"; left out: {', '.join(left_out)}" if left_out else ""
        raise InputError(f"{path}: no weight {where} of two neurons or more in 3 dimensions or more{kinds}")
    return weights, left_out


def with_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a weight of torch's weight_norm over neurons, g v / ||v||, in place of its two parts."""
    found = dict(tensors)
    for name, g in tensors.items():
        for g_name, v_name in WEIGHT_NORM.items():
            module = name.removesuffix(g_name)
            v = tensors.get(module + v_name)
            if module == name or v is None or g.shape != v.shape[:1] + (1,) * (v.ndim - 1):
                continue
            lengths = v.flatten(1).norm(dim=1).view_as(g)
            found[f"{module}weight"] = v * (g / lengths)
            del found[name], found[module + v_name]
    return found


def column_layers(path: str, tensors: dict[str, Tensor], transposed: tuple[str, ...]) -> set[str]:
    """Name the weights (in, N, ...): those with a bias (N,), GPT-2's, and those under names that the user gives.

    InputError for a name that no weight has.
    """
    found = set()
    for name, tensor in tensors.items():
        bias = tensors.get(f"{name.removesuffix('weight')}bias")
        if tensor.ndim > 1 and bias is not None and bias.shape == tensor.shape[1:2] != tensor.shape[:1]:
            found.add(name)
    if any(map(CONV1D.search, found)):  # then the square ones, whose bias tells nothing, are Conv1D as well
        found |= {*filter(CONV1D.search, tensors)}
    for typed in transposed:
        named = {name for name, tensor in tensors.items() if tensor.ndim > 1 and f".{typed}." in f".{name}."}
        if not named:
            raise InputError(f"--transposed {typed}: no weight in {path} has this name, whole or between dots")
        found |= named
    return found


def why_no_layer(name: str, tensor: Tensor) -> str:
    """Say why a tensor of two dimensions or more is no layer of neurons; nothing if it is one."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if OPTIMIZER.search(name):
        return "state of an optimizer"
    if ADAPTER.search(name):
        return "a part of an adapter, which counts once it is merged into its layer's weight"
    if PART.search(name):
        return "a part of a parametrized weight"
    if EMBEDDING.search(module) and tensor.ndim < 4:  # patch_embed may be a convolution
        return "an embedding"
    if NO_WEIGHT.search(module):
        return "a bias, norm, mask or queue"
    if tensor.ndim > 2 and tensor.shape[1] == 1:
        return "a depthwise convolution, or one of a single channel"
    lengths = tensor.flatten(1).double().norm(dim=1) if tensor.is_floating_point() else torch.tensor(torch.nan)
    if not lengths.isfinite().all():
        return "not of finite real numbers"
    if tensor.shape[1:].numel() < 3 or (lengths > ZERO).sum() < 2:
        return "fewer than 3 dimensions, or than two neurons that are not zero"
    return ""


def common_layers(files: tuple[str, ...], contents: list[tuple[Weights, LeftOut]]) -> list[str]:
    """Name the layers that all files have in one shape, and say what is left out. InputError if there are none."""
    first, last = contents[0][0], contents[-1][0]
    common = [name for name in first if name in last and first[name].shape == last[name].shape]
    if not common:
        examples = f"{next(iter(first))} in the first, {next(iter(last))} in the second"
        raise InputError(f"{' and '.join(files)}: no layer has one name and one shape in both ({examples})")
    for path, (weights, left_out) in zip(files, contents):
        left_out["a layer that the other file has not, or in another shape"] = [*weights.keys() - common]
        for reason, names in left_out.items():
            if names:
                processes.say(f"{path}: left out, {reason}: {', '.join(sorted(names))}")
    return common


@torch.no_grad()
def measure(weight: Tensor, s: float, angular: bool) -> tuple[float, float]:
    """Return energy and closest angle of the neurons of a weight (N, ...). Rows of zeros have no direction: no part."""
    neurons = unit(weight.flatten(1).double())
    neurons = neurons[neurons.any(1)]
    energies = energy_of({"neurons": neurons}, s, angular)
    return energies["neurons"].item(), closest_angle(neurons)


def closest_angle(neurons: Tensor) -> float:
    """Return the smallest angle, in degrees, between two of the unit rows (N, d), N >= 2."""
    n = len(neurons)
    cosines, rows = nearest(neurons, [neurons], n, 2)
    is_itself = rows == torch.arange(n, device=rows.device)[:, None]
    row, column = divmod(cosines.masked_fill(is_itself, -math.inf).argmax().item(), 2)
    x, y = neurons[row], neurons[rows[row, column]]
    angle = 2 * torch.atan2((x - y).norm(), (x + y).norm())  # arccos would lose the digits of a small angle
    return math.degrees(angle)


def uniform_energy(d: int, s: float, angular: bool) -> float:
    """Return the expected energy of two independent, uniform points of the sphere in d >= 2 dimensions.

    It is infinite for s >= d - 1. Its relative error is below 1e-9 up to d = 100,000 and s = 50.
    """
    if s >= d - 1:
        return math.inf
    a = (d - 1) / 2  # a quarter of the chord's square, ||x - y||^2 / 4, has the distribution Beta(a, a)
    if s > 0:
        chord = poch(2 * a - s / 2, s / 2) / poch(a - s / 2, s / 2) / 2**s
    else:
        chord = (digamma(2 * a) - digamma(a)) / 2 - math.log(2)
    return float(chord + angle_beyond_chord(d, s)) if angular else float(chord)


def angle_beyond_chord(d: int, s: float) -> float:
    """Return E f_s(angle) - E f_s(chord) of uniform points, f_s as in regularizers.riesz: both have a pole at 0.

    The density of the angle is sin(angle)^(d - 2), up to a factor; its standard deviation is about 1 / sqrt(d).
    """

    def weighted_difference(t: float) -> float:
        angle = math.pi / 2 + t
        log_ratio = math.log(angle / (2 * math.sin(angle / 2)))
        log_density = (d - 2) * math.log(math.cos(t))
        if s == 0:
            return -math.exp(log_density) * log_ratio
        # density (angle^-s - chord^-s); angle^-s alone would overflow
        return -math.exp(log_density - s * math.log(angle)) * math.expm1(s * log_ratio)

    end = min(math.pi / 2, 20 / math.sqrt(d))
    integral, _ = quad(weighted_difference, -end, end, epsabs=0, epsrel=1e-11, limit=200)
    density_integral = math.sqrt(math.pi) / poch((d - 1) / 2, 1 / 2)
    return integral / density_integral


def table_lines(rows: list[dict]) -> list[str]:
    """Write rows as the lines of a table. Their columns are those of the first."""
    texts = [list(rows[0])]
    for row in rows:
        values = [row.get(column, "") for column in rows[0]]
        texts.append([f"{value:.7g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*texts)]
    lines = []
    for name, *numbers in texts:
        cells = [name.ljust(widths[0]), *(number.rjust(width) for number, width in zip(numbers, widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return lines


if __name__ == "__main__":
    cli.run(energy)

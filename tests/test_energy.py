"""The energy of the layers of any file: known minima, the uniform sphere, what keeps and what changes it."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from conftest import random
from safetensors.torch import save_file
from scipy.special import sici
from torch import nn

from regularizers import amhe, mhe
from tools.energy import closest_angle, energy, read_weights, uniform_energy

POWER_SERIES = [(-1) ** k * math.pi ** (2 * k + 0.1) / math.factorial(2 * k + 1) / (2 * k + 0.1) for k in range(20)]
TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


@pytest.fixture
def rows(command, tmp_path):
    """Save the tensors of each file and run the tool on all: rows by the name of the layer, and standard error."""

    def run(*contents, flags=()):
        paths = [tmp_path / f"{i}.safetensors" for i in range(len(contents))]
        for path, tensors in zip(paths, contents):
            save_file({name: x.contiguous() for name, x in tensors.items()}, path)
        code, (_, *found), err = command(energy, *paths, "--json", *flags)
        assert code == 0, err
        return {row.pop("layer"): row for row in found}, err

    return run


def test_minimum_of_thomsons_problem(rows):
    """The sum over pairs as Wikipedia's table of the problem has it; rows of any length, and two rows of zeros."""
    four = torch.cat([TETRAHEDRON * 5, torch.zeros(2, 3)])
    found, _ = rows({"four": four, "again": TETRAHEDRON}, flags=["--s", 1, "--angular", "false"])
    assert found["four"]["energy"] * 6 == pytest.approx(3.674234614, rel=1e-9)
    assert found["four"]["closest"] == pytest.approx(math.degrees(math.acos(-1 / 3)), rel=1e-9)
    assert found["sum"]["energy"] == found["four"]["energy"] + found["again"]["energy"]


def test_numbers_are_those_of_the_regularizers(rows):
    weight = random(40, 5, 3, 3)
    for s, angular, function in ((2.0, "true", amhe), (0.0, "true", amhe), (1.5, "false", mhe), (0.0, "false", mhe)):
        found, _ = rows({"conv.weight": weight}, flags=["--s", s, "--angular", angular])
        row = found["conv.weight"]
        assert row["energy"] == pytest.approx(function(weight.double(), s).item(), rel=1e-12)
        assert (row["neurons"], row["dims"]) == (40, 45)


def test_the_closest_pair_is_found_in_any_tile(monkeypatch):
    """Also where its angle is too small for the cosine of fp32, beside a pair that is nearly as close."""
    monkeypatch.setattr("lib.nearest.QUERIES_IN_TILE", 7)
    monkeypatch.setattr("lib.nearest.BANK_IN_TILE", 9)
    for i, j in ((0, 1), (2, 39), (6, 7), (20, 8)):
        neurons = nn.functional.normalize(random(40, 20).double())
        neurons[j] = nn.functional.normalize(neurons[i] + 1e-5 * neurons[5], dim=0)
        neurons[4] = nn.functional.normalize(neurons[30] + 3e-5 * neurons[3], dim=0)
        true = (neurons[i] - neurons[j]).norm().item()  # of so small an angle, the chord is as long
        assert closest_angle(neurons) == pytest.approx(math.degrees(true), rel=1e-6)


@pytest.mark.parametrize(
    "d, s, angular, value",
    [
        (4, 1, False, 8 / (3 * math.pi)),
        (3, 0, True, (math.log(math.pi) + 0.5772156649015329 - sici(math.pi)[1]) / 2 - math.log(math.pi)),
        (4, 2, True, 2 / math.pi * sici(2 * math.pi)[0]),
        (3, 1.9, True, math.fsum(POWER_SERIES) / 2),  # 19 / 20 of it lies in its pole at 0
        (3, 2, True, math.inf),
    ],
)
def test_the_uniform_sphere_has_its_closed_forms(d, s, angular, value):
    assert uniform_energy(d, s, angular) == pytest.approx(value, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("d, s", [(9, 0.0), (512, 20), (100_000, 20)])
def test_the_uniform_sphere_is_the_integral_over_the_angle(d, s):
    """By the trapezoidal rule, which has no error where so many derivatives vanish at both ends."""
    angle = np.linspace(0, math.pi, 100_001)[1:-1]
    density = np.sin(angle) ** (d - 2)
    for angular, distance in ((True, angle), (False, 2 * np.sin(angle / 2))):
        potential = distance**-s if s else -np.log(distance)
        expected = (potential * density).sum() / density.sum()
        assert uniform_energy(d, s, angular) == pytest.approx(expected, rel=1e-9)


def test_one_rotation_of_all_neurons_keeps_energies_and_a_low_rank_update_does_not(rows):
    """What orthogonal fine-tuning promises, and what LoRA, merged into its weights, does not."""
    layer = "model.layers.0.self_attn.q_proj.weight"  # of a Llama
    before = {"conv.weight": random(64, 8, 3, 3), layer: random(80, 72, seed=1), "fc.bias": random(80)}
    turn, _ = torch.linalg.qr(random(72, 72).double())
    rotated, updated = dict(before), dict(before)
    for name in ("conv.weight", layer):
        weight = before[name].flatten(1)
        rotated[name] = (weight.double() @ turn).float().view_as(before[name])
        low_rank = random(len(weight), 2, seed=2) @ random(2, 72, seed=3)
        updated[name] = (weight + low_rank).view_as(before[name])
    kept, _ = rows(before, rotated, flags=["--angular", "false"])
    assert list(kept) == ["conv.weight", layer, "sum"]
    for row in kept.values():
        assert abs(row["difference"]) <= 1e-6 * row["before energy"]
        assert row["difference"] == pytest.approx(row["after energy"] - row["before energy"], abs=1e-15)
    assert kept[layer]["after closest"] == pytest.approx(kept[layer]["before closest"], rel=1e-6)
    changed, _ = rows(before, updated)
    for row in changed.values():
        assert row["difference"] > 0.01 * row["before energy"]


def test_layers_of_one_file_alone_are_named(rows):
    before = {"conv.weight": random(64, 8, 3, 3), "fc.weight": random(80, 72), "old.weight": random(5, 5)}
    after = {"conv.weight": random(64, 8, 3, 3), "fc.weight": random(80, 70), "new.weight": random(5, 5)}
    found, err = rows(before, after)
    assert list(found) == ["conv.weight", "sum"]
    reason = "a layer that the other file has not, or in another shape"
    assert f"0.safetensors: left out, {reason}: fc.weight, old.weight\n" in err
    assert f"1.safetensors: left out, {reason}: fc.weight, new.weight\n" in err


def test_what_is_no_layer_is_named(rows):
    left_out = {
        "an embedding": ["wte.weight", "model.embed_tokens.weight", "pos_embed", "cls_token", "x.token_emb.weight"],
        "a bias, norm, mask or queue": ["attn.bias", "norm.weight", "queue"],
        "state of an optimizer": ["optimizer.state.0.exp_avg"],
        "a part of an adapter, which counts once it is merged into its layer's weight": [
            *("q_proj.lora_A.default.weight", "fc.oft_R", "to_q_lora.down.weight", "fc.vblora_logits_A.x"),
        ],
        "a part of a parametrized weight": [
            *("fc.parametrizations.weight.original0", "old.weight_g", "old.weight_v", "pruned.weight_orig"),
        ],
    }
    tensors = {name: random(9, 8) for names in left_out.values() for name in names}
    few, unreal = "fewer than 3 dimensions, or than two neurons that are not zero", "not of finite real numbers"
    for name, reason, tensor in (
        ("two.weight", few, random(9, 2)),
        ("one.weight", few, random(1, 9)),
        ("zero.weight", few, torch.zeros(9, 8)),
        ("quantised.weight", unreal, torch.ones(9, 8, dtype=torch.int8)),
        ("burst.weight", unreal, random(9, 8).log()),
        ("dw.weight", "a depthwise convolution, or one of a single channel", random(9, 1, 3, 3)),
    ):
        tensors[name] = tensor
        left_out.setdefault(reason, []).append(name)
    kept = {"patch_embed.proj.weight": random(9, 3, 4, 4), "patch_embed.weight": random(9, 3, 4, 4)}
    kept |= {"time_embed.0.weight": random(9, 8), "in_proj_weight": random(9, 8), "half.weight": random(9, 8).half()}
    found, err = rows(tensors | kept | {"bn.running_mean": random(9), "n": torch.tensor(1)})
    assert set(found) == {*kept, "sum"}
    for reason, names in left_out.items():
        assert f"left out, {reason}: {', '.join(sorted(names))}\n" in err
    assert err.count("\n") == len(left_out)
    assert found["half.weight"]["energy"] == pytest.approx(amhe(random(9, 8).half().double()).item(), rel=1e-12)


def test_a_run_is_its_checkpoint_without_its_state_and_encoder_its_weights(command, trained):
    """As the judges take them."""
    for place, file in ((trained, "ckpt.safetensors"), (trained / "encoder", "model.safetensors")):
        code, (settings, *rows), err = command(energy, place, "--json")
        assert (code, err) == (0, "") and settings["s"] == 2 and settings["angular"] is True
        assert rows == command(energy, place / file, "--json")[1][1:]
        assert not any("/" in row["layer"] for row in rows)


def test_a_folder_of_shards_is_one_file(rows, shell, tmp_path):
    layers = {"a.weight": random(9, 8), "b.weight": random(9, 8, seed=1)}
    whole, _ = rows(layers)
    places = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(layers, 1)}
    for name, file in places.items():
        save_file({name: layers[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    code, lines, _ = shell(energy, tmp_path, "--json")
    assert code == 0 and {row.pop("layer"): row for row in map(json.loads, lines[1:])} == whole
    index = tmp_path / "model.safetensors.index.json"
    for false_place, fault in (
        ("model-00001-of-00002.safetensors", "lists b.weight, which its"),
        (3, "3: not a whole"),
    ):
        index.write_text(json.dumps({"weight_map": places | {"b.weight": false_place}}))
        code, lines, err = shell(energy, tmp_path)
        assert (code, lines) == (2, []) and fault in err and err.count("\n") == 1
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / file).unlink()
    code, lines, err = shell(energy, tmp_path)
    assert (code, lines) == (2, []) and f"{file}: not a whole safetensors file" in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is counted in other units")
def test_a_file_larger_than_memory_is_read_one_tensor_at_a_time(tmp_path):
    """4 GB of an embedding, which the file system keeps as a hole, before a layer."""
    import resource

    hole = 2**32
    header = {"embed.weight": {"dtype": "F32", "shape": [2**20, 2**10], "data_offsets": [0, hole]}}
    header |= {"a.weight": {"dtype": "F32", "shape": [9, 8], "data_offsets": [hole, hole + 288]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "x", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(hole, os.SEEK_CUR)
        file.write(random(9, 8).numpy().tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights, _ = read_weights(tmp_path / "x", None, ())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes
    assert [*weights] == ["a.weight"] and weights["a.weight"].equal(random(9, 8))


def test_neurons_that_are_columns_are_told_by_their_bias(rows):
    """GPT-2's, a square one by the others, and a transposed convolution's; nanoGPT's are rows under the same names."""
    shapes = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_proj": (32, 8)}
    weights = {f"h.0.{name}.weight": random(*shape) for name, shape in shapes.items()}
    biases = {name.replace("weight", "bias"): random(weight.shape[1]) for name, weight in weights.items()}
    up = nn.ConvTranspose2d(5, 6, 3)
    upper = {f"up.{name}": tensor for name, tensor in up.state_dict().items()}
    expected = {name: amhe(weight.T.double()).item() for name, weight in weights.items()}
    expected["up.weight"] = amhe(up.weight.transpose(0, 1).double()).item()
    found, err = rows(weights | biases | upper)
    assert {name: found[name]["energy"] for name in expected} == pytest.approx(expected, rel=1e-10)
    assert err.count("\n") == 1 and f"transposed convolution: {', '.join(sorted(expected))}\n" in err
    found, err = rows({name: weight.T for name, weight in weights.items()} | biases)
    assert err == ""
    del expected["up.weight"]
    assert {name: found[name]["energy"] for name in expected} == pytest.approx(expected, rel=1e-10)


def test_neurons_that_are_columns_are_named(rows):
    tensors = {"up.0.weight": random(9, 8), "up.10.weight": random(9, 8), "out.weight": random(9, 8)}
    found, _ = rows(tensors, flags=["--transposed", "up.0,out.weight", "--device", "cpu"])
    assert [found[name]["neurons"] for name in tensors] == [8, 9, 8]
    assert found["out.weight"]["energy"] == pytest.approx(amhe(random(9, 8).T.double()).item(), rel=1e-10)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_of_weight_norm_is_computed(rows):
    for normed in (nn.utils.parametrizations.weight_norm(nn.Linear(8, 9)), nn.utils.weight_norm(nn.Linear(8, 9))):
        found, err = rows({f"fc.{name}": x for name, x in normed.state_dict().items()})
        assert err == "" and list(found) == ["fc.weight", "sum"]
        assert found["sum"]["energy"] == pytest.approx(amhe(normed.weight.double()).item(), rel=1e-6)


def test_prefix_chooses_layers(rows):
    found, _ = rows({"a.weight": random(9, 8), "b/kernel": random(9, 8)}, flags=["--prefix", "b"])
    assert list(found) == ["b/kernel", "sum"]


def test_the_table_is_aligned_and_an_infinite_expectation_is_said(shell, tmp_path):
    layers = {"sphere.weight": TETRAHEDRON, "a.rather.long.name.weight": random(20, 9)}
    torch.save({"model": layers}, tmp_path / "w.pth")
    code, lines, err = shell(energy, "w.pth")
    assert (code, err) == (0, "")
    heads, *table = lines[2:]
    assert heads.split() == ["layer", "neurons", "dims", "uniform", "energy", "closest"]
    cells = {line.split()[0]: line.split()[1:] for line in table}
    assert cells["model.sphere.weight"] == ["4", "3", "inf", f"{math.acos(-1 / 3) ** -2:.7g}", "109.4712"]
    assert cells["sum"][0] == "inf" and len(cells) == 3
    assert len({len(line) for line in (heads, *table[:-1])}) == 1
    assert '"uniform": null' in shell(energy, "w.pth", "--json")[1][1]


@pytest.mark.parametrize(
    "words, line",
    [
        ("a a a", "energy.py: takes one file, or two to compare, before and after; not 3"),
        ("a --s -1", "--s -1: expected a number >= 0 and <= 8"),
        ("a nowhere", "nowhere: no such file"),
        ("a embeddings", "embeddings: no weight in it of two neurons or more in 3 dimensions or more; left out: an em"),
        ("a --transposed a,w", "--transposed w: no weight in a has this name, whole or between dots"),
        pytest.param(
            *("a --device cuda", "--device cuda: torch finds no GPU on this machine; leave the flag out"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("a --prefix x", "a: no weight under x of two neurons"),
        ("a b", "a and b: no layer has one name and one shape in both (a.weight in the first, b.weight in the second)"),
    ],
)
def test_wrong_input_to_energy(shell, tmp_path, words, line):
    for file, name in (("a", "a.weight"), ("b", "b.weight"), ("embeddings", "wte.weight")):
        save_file({name: random(9, 8)}, tmp_path / file)
    code, lines, err = shell(energy, *words.split())
    assert code == 2 and lines == [] and line in err and err.count("\n") == 1

"""The energy of the layers of any file: known minima, the uniform sphere, what keeps and what changes it."""

import math
import statistics

import mpmath
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import sici
from torch import nn

from regularizers import amhe, mhe
from tools.energy import closest_angle, energy, uniform_energy

TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
GOLDEN = (1 + 5**0.5) / 2
ICOSAHEDRON = torch.tensor(
    [x for a in (-1, 1) for b in (-GOLDEN, GOLDEN) for x in ([0, a, b], [a, b, 0], [b, 0, a])], dtype=torch.float64
)


@pytest.fixture
def rows(command, tmp_path):
    """Save the tensors of each file and run the tool on all: rows by the name of the layer, and standard error."""

    def run(*contents, flags=()):
        paths = []
        for i, tensors in enumerate(contents):
            paths.append(tmp_path / f"{i}.safetensors")
            save_file({name: x.contiguous() for name, x in tensors.items()}, paths[-1])
        code, (_, *found), err = command(energy, *paths, "--json", *flags)
        assert code == 0, err
        return {row.pop("layer"): row for row in found}, err

    return run


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(d, seed=0):
    q, _ = torch.linalg.qr(random(d, d, seed=seed).double())
    return q


# ---- Values ----------------------------------------------------------------------------------------------------------


def test_minima_of_thomsons_problem(rows):
    """Sums over pairs as Wikipedia's table of the problem has them; rows of any length, and two rows of zeros."""
    four = torch.cat([TETRAHEDRON * 5, torch.zeros(2, 3)])
    found, _ = rows({"four": four, "twelve": ICOSAHEDRON.float()}, flags=["--s", 1, "--angular", "false"])
    assert found["four"]["energy"] * 6 == pytest.approx(3.674234614, rel=1e-9)
    assert found["twelve"]["energy"] * 66 == pytest.approx(49.165253058, rel=1e-7)
    assert found["four"]["closest"] == pytest.approx(math.degrees(math.acos(-1 / 3)), rel=1e-9)
    assert found["twelve"]["closest"] == pytest.approx(math.degrees(math.atan(2)), rel=1e-6)
    assert found["sum"]["energy"] == found["four"]["energy"] + found["twelve"]["energy"]


def test_numbers_are_those_of_the_regularizers(rows):
    weight = random(40, 5, 3, 3)
    for s, angular, function in ((2.0, "true", amhe), (0.0, "true", amhe), (1.5, "false", mhe), (0.0, "false", mhe)):
        found, _ = rows({"conv.weight": weight}, flags=["--s", s, "--angular", angular])
        row = found["conv.weight"]
        assert row["energy"] == pytest.approx(function(weight.double(), s).item(), rel=1e-12)
        assert (row["neurons"], row["dims"]) == (40, 45)


def test_the_closest_pair_is_found_in_any_block(monkeypatch):
    """Also where its angle is too small for the cosine of fp32, beside a pair that is nearly as close."""
    monkeypatch.setattr("tools.energy.BLOCK", 7)
    for i, j in ((0, 1), (2, 39), (38, 39), (6, 7), (20, 8)):
        neurons = nn.functional.normalize(random(40, 20).double())
        across = nn.functional.normalize(neurons[i] - (neurons[i] @ neurons[3]) * neurons[3], dim=0)
        neurons[j] = nn.functional.normalize(neurons[i] + 1e-5 * neurons[5], dim=0)
        neurons[4] = nn.functional.normalize(neurons[30] + 3e-5 * across, dim=0)
        true = (neurons[i] - neurons[j]).norm().item()  # of so small an angle, the chord is as long
        assert closest_angle(neurons) == pytest.approx(math.degrees(true), rel=1e-6)


@pytest.mark.parametrize(
    "d, s, angular, value",
    [
        (3, 1, False, 1),
        (3, 0, False, 0.5 - math.log(2)),
        (2, 0, False, 0),
        (4, 1, False, 8 / (3 * math.pi)),
        (5, 2, False, 0.75),
        (3, 1, True, sici(math.pi)[0] / 2),
        (3, 0, True, (math.log(math.pi) + 0.5772156649015329 - sici(math.pi)[1]) / 2 - math.log(math.pi)),
        (4, 2, True, 2 / math.pi * sici(2 * math.pi)[0]),
        (2, 0.5, True, 2 / math.sqrt(math.pi)),
        (2, 0, True, 1 - math.log(math.pi)),
    ],
)
def test_the_uniform_sphere_has_its_closed_forms(d, s, angular, value):
    assert uniform_energy(d, s, angular) == pytest.approx(value, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("d, s", [(9, 0.0), (9, 2), (9, 7.5), (64, 2), (512, 20), (4608, 0.0), (100_000, 2)])
def test_the_uniform_sphere_is_mpmaths(d, s):
    """The density of the angle, integrated with 30 digits."""
    mpmath.mp.dps = 30
    middle = mpmath.pi / 2
    width = min(middle, 14 / mpmath.sqrt(d))
    places = [middle + i * width / 4 for i in range(-4, 5)]
    density = [mpmath.quad(lambda z: mpmath.sin(z) ** (d - 2), places)]
    for angular in (False, True):

        def potential(z, angular=angular):
            distance = z if angular else 2 * mpmath.sin(z / 2)
            return distance**-s if s else -mpmath.log(distance)

        expected = mpmath.quad(lambda z: potential(z) * mpmath.sin(z) ** (d - 2), places) / density[0]
        assert uniform_energy(d, s, angular) == pytest.approx(float(expected), rel=1e-9)


def test_close_to_its_pole_the_quadrature_holds():
    """d = 3, s = 1.9: the angle's energy as a power series, 19 / 20 of which lies in its pole at 0."""
    terms = [(-1) ** k * math.pi ** (2 * k + 0.1) / math.factorial(2 * k + 1) / (2 * k + 0.1) for k in range(20)]
    assert uniform_energy(3, 1.9, True) == pytest.approx(math.fsum(terms) / 2, rel=1e-12)
    assert uniform_energy(3, 2, True) == uniform_energy(3, 2, False) == uniform_energy(4, 5, True) == math.inf


@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("d, s", [(8, 0), (8, 2), (27, 1), (256, 2)])
def test_random_neurons_have_the_energy_of_the_uniform_sphere(d, s, angular):
    """On average: within 3 standard errors of 200 seeds, which are far below the energy itself."""
    function = amhe if angular else mhe
    energies = [function(random(100, d, seed=seed).double(), s).item() for seed in range(200)]
    error = statistics.stdev(energies) / math.sqrt(len(energies))
    assert abs(statistics.fmean(energies) - uniform_energy(d, s, angular)) < 3 * error < 0.003


# ---- Two files -------------------------------------------------------------------------------------------------------


def network():
    return {"conv.weight": random(64, 8, 3, 3), "fc.weight": random(80, 72, seed=1), "fc.bias": random(80)}


@pytest.mark.parametrize("angular", ["true", "false"])
def test_one_rotation_of_all_neurons_keeps_energies_and_a_low_rank_update_does_not(rows, angular):
    """What orthogonal fine-tuning promises, and what LoRA, merged into its weights, does not."""
    before = network()
    turn = rotation(72)
    rotated, updated = dict(before), dict(before)
    for name in ("conv.weight", "fc.weight"):
        weight = before[name].flatten(1).double()
        rotated[name] = (weight @ turn).float().view_as(before[name])
        low_rank = random(len(weight), 2, seed=2).double() @ random(2, 72, seed=3).double()
        updated[name] = (weight + low_rank).float().view_as(before[name])
    kept, _ = rows(before, rotated, flags=["--angular", angular])
    assert list(kept) == ["conv.weight", "fc.weight", "sum"]
    for row in kept.values():
        assert abs(row["difference"]) <= 1e-6 * row["before"]
        assert row["difference"] == pytest.approx(row["after"] - row["before"], abs=1e-15)
    assert kept["fc.weight"]["closest after"] == pytest.approx(kept["fc.weight"]["closest before"], rel=1e-6)
    changed, _ = rows(before, updated, flags=["--angular", angular])
    for row in changed.values():
        assert row["difference"] > 0.01 * row["before"]
    assert changed["sum"]["before"] == kept["sum"]["before"]


def test_layers_of_one_file_alone_are_named(rows):
    before, after = network(), network()
    before["old.weight"] = random(5, 5)
    after |= {"new.weight": random(5, 5), "fc.weight": random(80, 70)}
    found, err = rows(before, after)
    assert list(found) == ["conv.weight", "sum"]
    assert "0.safetensors: left out, a layer of this file alone: old.weight\n" in err
    assert "1.safetensors: left out, a layer of this file alone: new.weight\n" in err
    assert "1.safetensors: left out, a layer of another shape than before: fc.weight\n" in err


# ---- What has no neurons ---------------------------------------------------------------------------------------------


def test_what_is_no_layer_is_named(rows):
    left_out = {
        "an embedding": ["wte.weight", "model.embed_tokens.weight", "pos_embed", "cls_token", "x.token_emb.weight"],
        "a bias, norm or mask": ["attn.bias", "norm.weight"],
        "state of an optimizer": ["optimizer.state.0.exp_avg"],
        "an adapter that is not merged into its weight": ["fc.lora_A.weight", "fc.oft_R"],
    }
    tensors = {
        name: random(1, 9, 8) if name == "cls_token" else random(9, 8) for names in left_out.values() for name in names
    }
    shapes = {
        "fewer than 3 dimensions": {"two.weight": random(9, 2)},
        "a single neuron": {"one.weight": random(1, 9)},
        "a depthwise convolution, or one of a single channel": {
            "dw.weight": random(9, 1, 3, 3),
            "dw1.weight": random(9, 1, 4),
        },
        "not of real numbers": {"quantised.weight": torch.ones(9, 8, dtype=torch.int8)},
        "numbers that are not finite": {"burst.weight": random(9, 8).log()},
        "fewer than two rows that are not zero": {"zero.weight": torch.zeros(9, 8)},
    }
    for reason, found in shapes.items():
        tensors |= found
        left_out[reason] = list(found)
    kept = {"patch_embed.proj.weight": random(9, 3, 4, 4), "patch_embed.weight": random(9, 3, 4, 4)}
    kept |= {"time_embed.0.weight": random(9, 8), "in_proj_weight": random(9, 8), "half.weight": random(9, 8).half()}
    found, err = rows(tensors | kept | {"bn.running_mean": random(9), "n": torch.tensor(1)})
    assert set(found) == {*kept, "sum"}
    named = {}
    for line in err.splitlines():
        reason, _, names = line.partition("left out, ")[2].rpartition(": ")
        named[reason] = set(names.split(", "))
    assert named == {reason: set(names) for reason, names in left_out.items()}
    assert found["half.weight"]["energy"] == pytest.approx(amhe(random(9, 8).half().double()).item(), rel=1e-12)


def test_the_state_of_a_run_is_not_its_network(command, trained):
    code, (settings, *rows), err = command(energy, trained / "ckpt.safetensors", "--json")
    assert (code, err) == (0, "") and settings["s"] == 2 and settings["angular"] is True
    names = [row["layer"] for row in rows]
    assert "projector.out.weight" in names and not any("/" in name for name in names)


def test_a_slash_in_the_names_of_another_project_is_no_state(rows):
    assert "block/kernel" in rows({"block/kernel": random(9, 8)})[0]


def test_the_table_is_aligned_and_an_infinite_expectation_is_said(shell, tmp_path):
    torch.save(
        {"model": {"sphere.weight": TETRAHEDRON, "a.rather.long.name.weight": random(20, 9)}}, tmp_path / "w.pth"
    )
    code, lines, err = shell(energy, "w.pth")
    assert (code, err) == (0, "")
    assert lines[0] == "energy by the angle, s = 2, mean over pairs of neurons: w.pth"
    heads, *table = lines[2:]
    assert heads.split() == ["layer", "neurons", "dims", "energy", "uniform", "closest"]
    cells = {line.split()[0]: line.split()[1:] for line in table}
    assert cells["model.sphere.weight"] == ["4", "3", f"{math.acos(-1 / 3) ** -2:.7f}", "inf", "109.5"]
    assert cells["sum"][1] == "inf" and len(cells) == 3
    assert len({len(line) for line in (heads, *table[:-1])}) == 1
    _, (_, row, *_), _ = [*shell(energy, "w.pth", "--json")]
    assert '"uniform": null' in row


def test_prefix_chooses_layers(rows):
    found, _ = rows({"a.weight": random(9, 8), "b.weight": random(9, 8)}, flags=["--prefix", "b"])
    assert list(found) == ["b.weight", "sum"]


def test_a_folder_of_a_run_is_its_checkpoint_and_encoder_its_weights(command, shell, trained):
    """As the judges take them; their names differ, and the message says so."""
    for place, file in ((trained, "ckpt.safetensors"), (trained / "encoder", "model.safetensors")):
        code, rows, err = command(energy, place, "--json")
        assert code == 0 and rows[1:] == command(energy, place / file, "--json")[1][1:], err
    for pair in ([trained, trained / "encoder"], [trained / "encoder", trained]):
        code, lines, err = shell(energy, *pair)
        assert code == 2 and lines == [] and err.count("\n") == 1
        assert "no layer has one name and one shape in both" in err
        assert "encoder/model.safetensors has timm's names, without prefix; compare it with such a file" in err


@pytest.mark.parametrize(
    "words, line",
    [
        ("", "energy.py: takes one file, or two to compare, before and after; not 0"),
        ("a a a", "energy.py: takes one file, or two to compare, before and after; not 3"),
        ("a --s -1", "--s -1: expected a number >= 0 and <= 10"),
        ("nowhere", "nowhere: no such file"),
        ("a nowhere", "nowhere: no such file"),
        ("embedded vectors", "vectors: no weight in it"),
        ("vectors", "vectors: no weight in it of two neurons or more in 3 dimensions or more\n"),
        ("embeddings", "in 3 dimensions or more; left out: an embedding\n"),
        ("a --prefix x", "a: no weight under x of two neurons"),
        (
            "a b",
            "a and b: no layer has one name and one shape in both (a.weight in the first, b.weight in the second)\n",
        ),
        ("a --angulr", "--angulr: no such flag; did you mean --angular?"),
    ],
)
def test_wrong_input_to_energy(shell, tmp_path, words, line):
    contents = {"a": {"a.weight": random(9, 8)}, "b": {"b.weight": random(9, 8)}}
    contents |= {"vectors": {"bias": random(9)}, "embeddings": {"wte.weight": random(9, 8)}}
    contents["embedded"] = contents["a"] | contents["embeddings"]
    for name, tensors in contents.items():
        save_file(tensors, tmp_path / name)
    code, lines, err = shell(energy, *words.split())
    assert code == 2 and lines == [] and line in err and err.count("\n") == 1

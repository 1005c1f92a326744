"""No command of README and docs rots: each row that reproduces the paper takes one step, judges take its checkpoint."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import data
from harness import checkpoint
from knn_eval import knn_eval
from lib import cli, encoders
from linear_eval import linear_eval
from pretrain import RECIPES, pretrain
from tools.bench import bench
from tools.embed import embed
from tools.energy import energy
from tools.export import export
from tools.figures import figures
from tools.fingerprint import fingerprint
from tools.reproduce import reproduce
from tools.trial import trial

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPRODUCE = (ROOT / "docs" / "reproduce.md").read_text()
ROWS = re.findall(r"^\| (\S+, [^|]+) \| `(--dataset [^`]+)` \| ([\d.]+)", REPRODUCE, re.M)
SIDES = {"cifar10": 32, "cifar100": 32, "stl10": 96, "imagenet": 256}
CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "imagenet": 1000}


@pytest.fixture
def substitutes(monkeypatch):
    """One batch in place of each data set, of its shape and with its facts; micro-batches of 2, narrow heads."""
    generator = torch.Generator().manual_seed(0)

    def load(name, data_dir="data", pretraining=False, skip_broken=False):
        n, side = RECIPES["cifar10-300"].batch_size, SIDES[name]
        images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
        split = data.Split(images, torch.arange(n) % CLASSES[name])
        facts = data.FACTS[name] | dict(mean=(0.5,) * 3, std=(0.2,) * 3)
        return data.Dataset(tuple(map(str, range(CLASSES[name]))), split, split, split, **facts)

    monkeypatch.setattr(data, "load", load)

    def shrink(micro_batches):
        for name, recipe in RECIPES.items():
            small = dataclasses.replace(recipe, epochs=1, warmup=0, batch_size=2 * micro_batches, hidden_dim=64)
            monkeypatch.setitem(RECIPES, name, small)

    return shrink


def test_every_row_of_the_papers_tables_is_there():
    """Tables 1 and 2: 2 each, 3: 12, 4: 4, 5: 6 that its text makes certain, C.6: 5, C.7: 7, C.8: 12."""
    counts = {}
    for row, _, _ in ROWS:
        counts[row.split(",")[0]] = counts.get(row.split(",")[0], 0) + 1
    assert counts == {"1": 2, "2": 2, "3": 12, "4": 4, "5": 6, "C.6": 5, "C.7": 7, "C.8": 12}


@pytest.mark.parametrize("flags", sorted({flags for _, flags, _ in ROWS}))
def test_a_row_takes_a_step(flags, command, substitutes, monkeypatch):
    words = shlex.split(flags)
    substitutes(int(words[words.index("--accumulate") + 1]) if "--accumulate" in words else 1)
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    if "--reg" in words or "--accumulate" in words:  # of the others each runs in its real width
        resnet = encoders.resnet
        monkeypatch.setattr(encoders, "resnet", lambda _: resnet("test_resnet"))
    code, rows, err = command(pretrain, *words, "--eval_every", 0)
    assert code == 0, err
    settings, row = rows[0]["settings"], rows[1]
    weighed = {"none": 0, "uniform": row["uniformity"]}.get(settings["reg"], row["energy"])
    assert row["epoch"] == 1 and row["loss"] == pytest.approx(row[settings["method"]] + settings["weight"] * weighed)


def test_numbers_of_the_recipes_are_those_of_appendix_b2():
    b2 = {
        "imagenet-300": (300, 512, 0.3, 1e-6, 0.99, 1),
        "imagenet-1000": (1000, 4096, 0.2, 1.5e-6, 0.996, 1),
        "cifar10-300": (300, 1024, 1.5, 1e-6, 0.99, 10),
        "cifar100-300": (300, 1024, 1.5, 1e-6, 0.99, 10),
        "cifar10-1000": (1000, 1024, 1.0, 1e-6, 0.996, 10),
        "cifar100-1000": (1000, 1024, 1.0, 1e-6, 0.996, 10),
        "stl10-1000": (1000, 1024, 0.45, 1e-6, 0.996, 10),
    }
    for name, numbers in b2.items():
        r = RECIPES[name]
        assert (r.epochs, r.batch_size, r.lr, r.weight_decay, r.tau, r.energy_weight) == numbers, name
        assert (r.warmup, r.hidden_dim, r.out_dim) == (10, 4096, 256)
        assert (r.optimizer, r.tau_end) == ("lars", 1)
    assert set(RECIPES) == {"photos", "folder", *b2}


def test_the_judges_take_such_a_checkpoint(command, substitutes):
    substitutes(1)
    code, _, err = command(pretrain, *shlex.split(ROWS[-1][1].replace("--accumulate 8", "")), "--out", "run")
    assert code == 0, err
    for judge, flags in ((knn_eval, ["--k", 2]), (linear_eval, ["--epochs", 1, "--batch_size", 2])):
        code, rows, err = command(judge, "run/ckpt.safetensors", *flags)
        assert code == 0 and "top1" in rows[-1], err


def commands():
    """Every command in a block or between backticks of README and docs, with the page it stands on."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        inline = re.findall(r"`(?:\S+=\S+ )*((?:python|accelerate launch) [^`\n]+)`", text)
        for line in [line for block in blocks for line in block.splitlines()] + inline:
            for part in line.partition("#")[0].split(" && "):
                if re.search(r"\b(python|accelerate launch) .*(\.py\b|-m tools\.)", part):
                    found.append(pytest.param(part.strip(), id=f"{page.name}: {part.strip()}"))
    return found


STAGES = {f"{stage.__name__}.py": stage for stage in (pretrain, knn_eval, linear_eval)}
STAGES |= {
    f"tools.{stage.__name__}": stage for stage in (export, figures, bench, reproduce, trial, fingerprint, energy, embed)
}


@pytest.mark.parametrize("line", commands())
def test_flags_of_every_command_exist(line):
    words = [word for part in shlex.split(line) for word in part.split()]  # a part may be a command of its own
    names = [word for word in words if word in STAGES]
    assert names, f"no stage of this project in: {line}"
    flags = words[words.index(names[0]) + 1 :]
    cli.read(flags, inspect.signature(STAGES[names[0]]).parameters)


def test_commands_are_found():
    """On every page that explains commands, and one of each stage."""
    lines = [parameter.values[0] for parameter in commands()]
    assert len(lines) > 60 and all(any(name in line for line in lines) for name in STAGES)


def test_constraints_name_a_version_of_each_requirement():
    def versions(name, comparison):
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        return {package: version for package, _, version in (line.partition(comparison) for line in lines if line)}

    lowest, pinned = versions("requirements.txt", ">="), versions("constraints.txt", "==")
    assert lowest.keys() <= pinned.keys()
    for package, version in pinned.items():
        assert Version(version) >= Version(lowest.get(package) or "0"), package

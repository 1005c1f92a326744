"""No command of README and docs rots: its flags exist, and the settings of each training go together."""

import dataclasses
import re
import shlex

import pytest
import torch
from conftest import ROOT, rows_of
from packaging.version import Version

import data
from harness import settings
from knn_eval import knn_eval
from lib import cli
from lib.log import as_json
from linear_eval import linear_eval
from pretrain import RECIPES, pretrain
from tools.bench import bench
from tools.embed import embed
from tools.energy import energy
from tools.export import export
from tools.figures import figures
from tools.fingerprint import fingerprint
from tools.leaderboard import leaderboard
from tools.notebook import notebook
from tools.paper import is_row, paper_rows
from tools.reproduce import reproduce

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = {f"{stage.__name__}.py": stage for stage in (pretrain, knn_eval, linear_eval)}
TOOLS = (export, figures, bench, reproduce, fingerprint, energy, embed, leaderboard, notebook)
STAGES |= {f"tools.{tool.__name__}": tool for tool in TOOLS}


def commands_of(page):
    """Every command in a block or between backticks of a page."""
    text = page.read_text()
    lines = re.findall(r"`(?:\S+=\S+ )*((?:python|accelerate launch) [^`\n]+)`", text)
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        lines += block.splitlines()
    parts = [part.strip() for line in lines for part in line.partition("#")[0].split(" && ")]
    return [part for part in parts if re.search(r"\b(python|accelerate launch) .*(\.py\b|-m tools\.)", part)]


def resolved(words):
    """Flags of a command of pretrain.py as typed, all of them, and the settings in force; no file is looked for."""
    typed = cli.values_of(words, pretrain)
    elsewhere = {"out": "run", "init": None, "prefix": None, "tracker": "none"}
    flags = {**pretrain.__kwdefaults__, **typed, **elsewhere}
    settings.check(flags, pretrain.__kwdefaults__, RECIPES)
    return typed, flags, settings.resolve_recipe(flags, RECIPES, 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_every_command_exist(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line in commands_of(page):
        words = [word for part in shlex.split(line) for word in part.split()]  # a part may be a command of its own
        names = [word for word in words if word in STAGES]
        assert names, f"no stage of this project in: {line}"
        flags = words[words.index(names[0]) + 1 :]
        cli.values_of(flags, STAGES[names[0]])
        if names[0] == "pretrain.py":
            resolved(flags)


def test_commands_are_found():
    """On the pages that explain commands, and one of each stage."""
    lines = [line for page in PAGES for line in commands_of(page)]
    assert len(lines) > 60 and all(any(name in line for line in lines) for name in STAGES)


def test_every_row_of_the_papers_tables_is_there():
    """Tables 1 and 2: 2 each, 3: 12, 4: 4, 5: 6 that its text makes certain, C.6: 5, C.7: 7, C.8: 12."""
    counts = {}
    for row in paper_rows():
        table, *_ = row.name.split(",")
        counts[table] = counts.get(table, 0) + 1
    assert counts == {"1": 2, "2": 2, "3": 12, "4": 4, "5": 6, "C.6": 5, "C.7": 7, "C.8": 12}


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10", "imagenet"])
def test_settings_of_a_row_are_in_force(dataset, monkeypatch, tmp_path):
    """Those typed, and else those of its recipe, of 50,000 images of the data set."""
    monkeypatch.chdir(tmp_path)
    split = data.Split(torch.empty(50_000, 0), torch.arange(50_000) % 10)
    facts = data.FACTS[dataset] | {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    images = data.Dataset(tuple("0123456789"), split, split, None, **facts)
    rows = [row for row in paper_rows() if f"--dataset {dataset} " in f"{row.flags} "]
    assert len(rows) > 1
    for row in rows:
        typed, flags, values = resolved(shlex.split(row.flags))
        cfg = settings.resolve_images(values, flags, images)
        written = as_json(vars(cfg))
        assert is_row(written, row.settings()) and not is_row({**written, "epochs": 1}, row.settings()), row
        recipe = dataclasses.asdict(RECIPES[cfg.recipe])
        weight = {"none": 0, "uniform": recipe["uniformity_weight"]}.get(cfg.reg, recipe["energy_weight"])
        recipe = {name: value for name, value in recipe.items() if not name.endswith("_weight")}
        assert cfg.recipe.startswith(dataset) and cfg.stem == facts["stem"], row
        for name, value in {**recipe, "weight": weight, **typed}.items():
            in_force = getattr(cfg, name)
            assert (tuple(in_force) if name == "reg_on" else in_force) == value, (row, name)


def test_numbers_of_the_recipes_are_those_of_appendix_b2():
    """And SimCLR's temperatures, the lambda of Section 4; of photos, what the runs in results/ were trained with."""
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
        assert (r.temperature, r.uniformity_weight) == (0.1 if name.startswith("imagenet") else 0.5, 0.125)
    assert set(RECIPES) == {"photos", "folder", *b2}
    trained = rows_of(ROOT / "results" / "photos" / "photos-amhe")[0]["settings"]
    photos = dataclasses.asdict(RECIPES["photos"])
    assert photos["energy_weight"] == trained["weight"]
    for name in photos.keys() - {"optimizer", "tau_end"}:  # they are of a later version
        assert name.endswith("_weight") or photos[name] == trained[name], name


def test_constraints_name_a_version_of_each_requirement():
    def versions(name, comparison):
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        return {package: version for package, _, version in (line.partition(comparison) for line in lines if line)}

    lowest, pinned = versions("requirements.txt", ">="), versions("constraints.txt", "==")
    assert lowest.keys() <= pinned.keys()
    for package, version in pinned.items():
        assert Version(version) >= Version(lowest.get(package) or "0"), package

"""Small real data: patches of the embedded photographs, written as a folder of PNG files."""

import json
import sys

import pytest
from torchvision.transforms.v2.functional import to_pil_image

import data
import models
from harness import cli, processes
from harness import run as runs


@pytest.fixture(scope="session")
def photos():
    return data.load("photos")


@pytest.fixture(scope="session")
def folder(photos, tmp_path_factory):
    """Three classes, 16 + 6 pictures of 32x32 each."""
    root = tmp_path_factory.mktemp("pictures")
    for part, split, n in (("train", photos.train, 16), ("test", photos.test, 6)):
        for label in range(3):
            place = root / part / photos.classes[label]
            place.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:n]):
                to_pil_image(image).save(place / f"{i:02}.png")
    return root


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path):
    """Run a stage as its command line does, in an empty folder: exit code, lines of standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(stage, *words):
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, words)])
        code = 0
        try:
            cli.run(stage, data.DataError, models.ModelError, processes.LaunchError, runs.RunError)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.fixture
def command(shell):
    """The same, with the JSON rows of standard output."""

    def run(stage, *words):
        code, lines, err = shell(stage, *words)
        return code, [json.loads(line) for line in lines if line.startswith("{")], err

    return run

"""The notebook: made of the README's commands, run on tiny settings."""

import json
import re

from conftest import ROOT
from PIL import Image

from tools import notebook

TRAIN = "python pretrain.py --reg amhe --s 2 --model test_resnet --stem stride2 --out runs/demo"
SLOW = "knn_eval.py linear_eval.py tools.figures".split()  # their own tests run them


def test_cells_hold_the_readmes_commands_and_what_they_say(shell, tmp_path, monkeypatch):
    sources = notebook.sources()
    commands = [source for kind, source in sources if kind == "shell"]
    assert commands[0] == TRAIN and all(any(name in command for command in commands) for name in SLOW)
    tiny = f"{TRAIN} --hidden_dim 16 --epochs 1 --eval_every 0"
    changed = [(kind, source.replace(TRAIN, tiny).replace("range(101)", "range(1)")) for kind, source in sources]
    kept = [(kind, source) for kind, source in changed if not any(name in source for name in SLOW)]
    monkeypatch.setattr(notebook, "sources", lambda: kept)
    for name in ("pretrain.py", "tools", "lib", "harness", "data.py", "regularizers.py", "models.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / notebook.SHEET).parent.mkdir()
    (tmp_path / "docs").mkdir()
    Image.new("RGBA", (1800, 60)).save(tmp_path / notebook.SHEET)

    code, lines, err = shell(notebook.notebook, "--out", "docs/demo.ipynb")
    assert code == 0 and lines == ["docs/demo.ipynb"], err
    content = json.loads((tmp_path / "docs" / "demo.ipynb").read_text())
    enter, *cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert enter["source"] == "%cd -q .." and enter["outputs"] == []
    assert content["nbformat"] == 4 and cells[0]["source"] == f"!{tiny}"
    trained, picture, energy, loop = (cell["outputs"][0] for cell in cells)
    assert re.search(r"^epoch 1/1  loss \d", trained["text"], re.M) and "layer4" in energy["text"]
    assert picture["data"]["image/jpeg"].startswith("/9j/")
    assert re.fullmatch(r"step   0  loss \d\.\d+  mean energy 0\.4\d+\n", loop["text"])


def test_what_fails_ends_in_one_line(shell, tmp_path, monkeypatch):
    assert "top of the clone" in shell(notebook.notebook)[2]
    (tmp_path / "pretrain.py").touch()
    monkeypatch.setattr(notebook, "sources", lambda: [("python", "raise SystemExit('no such thing')")])
    code, _, err = shell(notebook.notebook)
    assert code == 2 and "exit code 1: no such thing" in err and not (tmp_path / "demo.ipynb").exists()
    places = {"missing/demo.ipynb": "cannot be written", "pretrain.py/demo.ipynb": "cannot be written"}
    for wrong, fault in {"demo.txt": "ends in .ipynb", **places}.items():
        code, _, err = shell(notebook.notebook, "--out", wrong)
        assert code == 2 and f"--out {wrong}: " in err and fault in err

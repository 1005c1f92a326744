"""A notebook of the README's own commands, with their outputs.

    python -m tools.notebook --out demo.ipynb

trains a small network, judges it, shows pictures with their nearest neighbours and the energies of the encoder, and
runs the README's loop on a ResNet-18: minutes, or half an hour of two slow, busy cores. Start it at the top of the
clone; what the commands write lies in runs/ and figures/.
"""

import base64
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated

from PIL import Image

from lib import cli
from lib.errors import InputError
from lib.files import write_whole

README = (Path(__file__).parent.parent / "README.md").read_text()
RUN = "runs/demo"
SMALL = "--model test_resnet --stem stride2"  # its own network takes long on slow cores
SHEET = "figures/neighbours-demo.png"
WIDTH = 900  # of a picture in the notebook, pixels
LOOP = """
import timm
import torch

import data
import regularizers

torch.manual_seed(0)
images = data.load("photos")
model = timm.create_model("resnet18", num_classes=len(images.classes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
criterion = torch.nn.CrossEntropyLoss()
for step in range(101):
    rows = torch.randint(len(images.train.labels), (64,))
    x, y = images.train.images[rows] / 255, images.train.labels[rows]
{readme}
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        mean = sum(energies.values()).item() / len(energies)
        print(f"step {{step:3}}  loss {{loss.item():.3f}}  mean energy {{mean:.4f}}")
"""


def notebook(*, out: Annotated[str, "the file to write"] = "demo.ipynb"):
    """Run the README's commands and write them to a notebook, with their outputs."""
    if Path(out).suffix != ".ipynb":
        raise InputError(f"--out {out}: expected a name that ends in .ipynb")
    if not os.access(f"{Path(out).parent}/", os.W_OK):  # by its slash a file in its place is none
        raise InputError(f"--out {out}: cannot be written; name a file in a folder that can be")
    if os.path.exists(RUN):
        raise InputError(f"{RUN}: is there already, and its cell would say so; move it away")
    if not Path("pretrain.py").exists():
        raise InputError("no pretrain.py here; start this at the top of the clone")
    cells = [cell(kind, source) for kind, source in sources()]
    top = os.path.relpath(".", Path(out).parent)
    if top != ".":  # a notebook begins in its own folder
        cells.insert(1, code(f"%cd -q {top}", []))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    with write_whole(Path(out)) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
    print(out)


def sources() -> list[tuple[str, str]]:
    """Return the kind and the text of each cell, from the README where it has the words."""
    title, purpose = re.match(r"# (.+)\n\n((?:.+\n)+)", README).groups()
    block = re.search(r"^```\n(pip install.*?)^```", README, re.M | re.S)[1]
    install, *commands = block.replace(" && ", "\n").splitlines()
    train, *judges = [re.sub("^accelerate launch", "python", command) for command in commands]
    judges = [judge.replace("runs/photos-amhe", RUN) for judge in judges]
    lines = re.search(r"# in the loop:\n(.*?)^~~~", README, re.M | re.S)[1]
    return [
        ("markdown", f"# {title}\n\n{purpose}\nOpen this notebook in a clone of the repository, after `{install}`."),
        ("shell", f"{train} {SMALL} --out {RUN}"),
        *[("shell", judge) for judge in judges],
        ("markdown", "Pictures of the test set, each with its nearest training pictures:"),
        ("shell", f"python -m tools.figures neighbours {RUN}"),
        ("picture", SHEET),
        ("markdown", "The energy of each layer of the encoder, which `--reg amhe` leaves alone by default:"),
        ("shell", f"python -m tools.energy {RUN}/encoder/model.safetensors"),
        ("markdown", "An energy in a loop of your own, here on all layers of a ResNet-18 that learns the classes:"),
        ("python", LOOP.format(readme=textwrap.indent(lines.rstrip(), "    ")).strip()),
    ]


def cell(kind: str, source: str) -> dict:
    """Run what a cell holds, and return it with its outputs. InputError if it fails."""
    if kind == "markdown":
        return {"cell_type": kind, "metadata": {}, "source": source}
    outputs = []
    if kind == "picture":
        outputs.append({"output_type": "display_data", "metadata": {}, "data": {"image/jpeg": jpeg(source)}})
        source = f'from IPython.display import Image\n\nImage("{source}", width={WIDTH})'
    else:
        print(f"$ {source}" if kind == "shell" else "the loop", file=sys.stderr)
        words = shlex.split(source)[1:] if kind == "shell" else ["-c", source]
        outputs.append({"output_type": "stream", "name": "stdout", "text": output_of(words, source)})
        source = f"!{source}" if kind == "shell" else source
    return code(source, outputs)


def code(source: str, outputs: list[dict]) -> dict:
    """Return a cell of code."""
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": outputs, "source": source}


def output_of(words: list[str], source: str) -> str:
    """Return what Python says at a terminal, which is what a notebook gives a command. InputError if it fails."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, *words], stdout=theirs, stderr=theirs)  # no width: bars are not shown
    os.close(theirs)
    text = b""
    while part := read(ours):
        text += part
    os.close(ours)
    lines = text.decode().replace("\r", "")
    if process.wait():
        raise InputError(f"{source}: ended with exit code {process.returncode}: {lines[-200:]}")
    return lines


def read(terminal: int) -> bytes:
    """Read from a terminal; nothing at its end, where Linux raises an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def jpeg(path: str) -> str:
    """Return a picture as a notebook holds it, not wider than WIDTH."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=80)
    return base64.b64encode(encoded.getvalue()).decode()


if __name__ == "__main__":
    cli.run(notebook)

"""The command line against a stage's signature, what --help prints, streams, and the log that rows go to."""

import ast
import importlib
import os
import shlex
import subprocess
import sys
from typing import Annotated, Literal

import pytest
from conftest import ROOT

import lib
from knn_eval import knn_eval
from lib import cli
from lib.errors import InputError
from lib.log import emit, log_of, read_rows
from linear_eval import linear_eval
from pretrain import pretrain
from tools.energy import energy
from tools.export import export
from tools.figures import figures
from tools.reproduce import reproduce


def stage(
    file: Annotated[str, "a file: of any kind"],
    *,
    reg: Annotated[Literal["none", "mhe", "amhe"], "energy of the weights, by chord or angle"] = "none",
    s: Annotated[float, ">= 0", "< 9", "power of the energy; 0 is logarithmic"] = 2.0,
    norm: Annotated[tuple[Literal["encoder", "projector"], ...], "networks"] = ("projector",),
    epochs: Annotated[int, "length of the training"] | None = None,
    data_dir: str = "data",
    floors: Annotated[bool, "judge raw pixels, too"] | None = None,
):
    """Print what it was called with,
    as a row.

    No part of --help.
    """
    emit(locals())


@pytest.mark.parametrize(
    "text, values",
    [
        ("x", {"file": "x", "reg": "none", "s": 2.0, "epochs": None}),
        ("--file x --reg amhe --s 1", {"file": "x", "reg": "amhe", "s": 1.0}),
        ("-3 -s 1e-3 --norm encoder,projector", {"file": "-3", "s": 1e-3, "norm": ["encoder", "projector"]}),
        ("x --epochs -3 --data-dir=1e3 --floors True", {"epochs": -3, "data_dir": "1e3", "floors": True}),
        ("x --epochs None --floors none --s 1", {"epochs": None, "floors": None, "s": 1.0}),
        ("--floors x", {"floors": True, "file": "x"}),
        ("--floors=false x --norm (encoder,)", {"floors": False, "norm": ["encoder"]}),
        ("--no-floors x", {"floors": False, "file": "x"}),
    ],
)
def test_values_arrive_as_the_signature_types_them(command, text, values):
    _, (row,), _ = command(stage, *text.split())
    assert row.items() >= values.items()


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "FILE is missing; flags are given as --name value, see --help"),
        ("x y", "y: a stray word; flags are given as --name value, see --help"),
        ("x --regs amhe", "--regs: no such flag; did you mean --reg?"),
        ("x -- --trace", "--: no such flag; known: --file, --reg, --s, --norm, --epochs, --data_dir, --floors"),
        ("x - --separator", "-: no such flag; known: --file, --reg, --s, --norm, --epochs, --data_dir, --floors"),
        ("x --reg amh", "--reg amh: expected none, mhe, amhe (did you mean amhe?)"),
        ("x --s nan", "--s nan: expected a number >= 0 and < 9"),
        ("x --epochs 1.5", "--epochs 1.5: expected a whole number"),
        ("x --data_dir --s 1", "--data_dir: expected a text"),
        ("x --floors=maybe", "--floors maybe: expected True or False"),
        ("x --s 1 --s 2", "--s 2: given twice"),
        ("x --no-floors --floors", "--floors True: given twice"),
        ("x --nofloors=true", "--nofloors: no such flag; did you mean --floors?"),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_runs(shell, text, line):
    assert shell(stage, *text.split()) == (2, [], f"stage.py: {line}\n")


def test_what_other_projects_call_a_flag_leads_to_ours():
    for words, meaning in {
        "--output_dir --outdir --outputDir": "--out",
        "--learning_rate --lerning-rate --LR": "--lr",
        "--arch --modle": "--model",
        "--num_workers": "--workers",
        "--bf16 --amp": "--mixed_precision bf16 of accelerate launch, before the name of the script",
    }.items():
        for word in words.split():
            with pytest.raises(InputError) as e:
                cli.values_of([word, "1"], pretrain)
            assert str(e.value) == f"{word}: no such flag; did you mean {meaning}?"
    for word in "--step --sched --outputs --drop --patch --pretrained".split():  # nothing far-fetched
        with pytest.raises(InputError, match="known: --ckpt, --k, "):
            cli.values_of([word, "1"], knn_eval)


def test_help_is_80_columns_wide_and_grouped(shell):
    _, lines, _ = shell(stage, "x", "--help", groups={"file": "input", "reg": "energies"})
    text = "\n".join([*lines, ""])
    purpose, first = "stage.py: Print what it was called with, as a row.", "  FILE        a text: a file: of"
    assert text.startswith(f"{purpose}\n\ninput\n{first}")
    for part in (
        "\n\nenergies\n  --reg       none, mhe, amhe: energy of the weights, by chord or angle [none]\n",
        "\n  --s         a number >= 0 and < 9: power of the energy; 0 is logarithmic [2.0]\n",
        "values separated by commas, each once: encoder, projector:\n              networks [projector]\n",
        "\n  --data_dir  a text [data]\n",
    ):
        assert part in text
    assert "No part of --help" not in text
    for each in (pretrain, knn_eval, linear_eval, energy, export, figures, reproduce):
        text = cli.help_text(each, {})
        assert max(map(len, text.splitlines())) <= 80, each
        assert "\n\nflags\n  " in text and f"{each.__name__}" in text.partition("\n\nexample\n  ")[2]
    assert "\n  --skip_broken  " in cli.help_text(knn_eval, {})  # a flag of both judges


# ---- Streams ---------------------------------------------------------------------------------------------------------
ROWS = "    for i in range(9999): log.emit({'stage': 's', 'i': i}, pathlib.Path('log'))"
TABLE = "    print('a \u00b1 b' + os.fsdecode(b'\\xff'))"
FAULT = "    raise errors.InputError('--s 1: \u6771')"
NUMBER = "    print(open('file', 'w').fileno(), file=open('log', 'w'))"
FULL = "-c: standard output: cannot be written (No space left on device)\n"


@pytest.mark.parametrize(
    "script, redirection, code, out, err, log",
    [
        (ROWS, "| head -1", 0, '{"stage": "s", "i": 0}\n', "", '{"stage": "s", "i": 0}\n'),
        (ROWS, ">/dev/full", 2, "", FULL, '{"stage": "s", "i": 0}\n'),
        ("    print('x' * 2**20)", ">/dev/full", 2, "", FULL, None),
        (TABLE, "", 0, "a \\xb1 b\\udcff\n", "", None),
        (FAULT, "", 2, "", "-c: --s 1: \\u6771\n", None),
        (FAULT, ">&- 2>&-", 2, "", "", None),
        (NUMBER, "<&- >&- 2>&-", 0, "", "", "3\n"),
    ],
)
def test_streams_that_are_full_closed_or_ascii(tmp_path, script, redirection, code, out, err, log):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    script = f"import os, pathlib\nfrom lib import cli, errors, log\ndef stage():\n{script}\ncli.run(stage)"
    command = f"{sys.executable} -c {shlex.quote(script)} {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
    file = tmp_path / "log"
    assert (file.read_text() if file.exists() else "").startswith(log or "") and file.exists() == bool(log)


# ---- The log ---------------------------------------------------------------------------------------------------------
FIRST = '{"stage": "pretrain", "settings": {"seed": 1}}'


@pytest.mark.parametrize(
    "before, kept",
    [
        (FIRST + '\n{"stage": "pretr', FIRST + "\n"),  # cut short: its process was killed
        (FIRST, FIRST + "\n"),  # a whole row that lacks its end
        ("\n\ufeff" + FIRST + "\n", "\n\ufeff" + FIRST + "\n"),  # as an editor may leave it
    ],
)
def test_a_judge_adds_its_row_to_the_log_of_a_run(tmp_path, capsys, monkeypatch, before, kept):
    log = tmp_path / "metrics.jsonl"
    log.write_text(before)
    assert log_of(tmp_path / "ckpt.safetensors", {"settings": {"seed": 1}}) == log
    assert log_of(tmp_path / "ckpt.safetensors", {"settings": {"seed": 2}}) is None  # a checkpoint of another run
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)  # its lock cannot be made beside it
    assert log_of(tmp_path / "ckpt.safetensors", {"settings": {"seed": 1}}) is None
    capsys.readouterr()
    emit({"stage": "knn_eval", "b": [0.5, None]}, log)
    with pytest.raises(ValueError):
        emit({"stage": "knn_eval", "top1": float("nan")}, log)
    row = '{"stage": "knn_eval", "b": [0.5, null]}\n'
    assert capsys.readouterr().out == row and log.read_text() == kept + row
    assert [row["stage"] for row in read_rows(tmp_path)] == ["pretrain", "knn_eval"]


def test_an_older_python_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"^Python 3\.11 or later is needed, and this is \d"):
        importlib.reload(lib)
    for page in ROOT.glob("*.py"):  # 3.10 has no word for x[*y], and its SyntaxError comes before the line
        subscripts = [node.slice for node in ast.walk(ast.parse(page.read_text())) if isinstance(node, ast.Subscript)]
        assert not any(isinstance(x, ast.Tuple) and isinstance(x.elts[0], ast.Starred) for x in subscripts), page.name

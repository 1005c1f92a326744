"""The command line against a stage's signature."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest

from knn_eval import knn_eval
from lib import cli
from lib.errors import InputError
from lib.log import emit, log_of
from linear_eval import linear_eval
from pretrain import pretrain
from tools.figures import figures

ROOT = Path(__file__).parent.parent


def stage(
    file: Annotated[str, "a file: of any kind"],
    *,
    reg: Annotated[Literal["none", "mhe", "amhe"], "energy of the weights, by chord or angle"] = "none",
    s: Annotated[float, ">= 0", "< 9", "power of the energy; 0 is logarithmic"] = 2.0,
    reg_on: Annotated[tuple[Literal["encoder", "projector"], ...], "networks"] = ("projector",),
    epochs: Annotated[int, "length of the training"] | None = None,
    data_dir: str = "data",
    floors: Annotated[bool, "judge raw pixels, too"] | None = None,
    seed: Annotated[int, ">= 0"] = 0,
):
    """Print what it was called with,
    as a row.

    No part of --help.
    """
    emit(locals())


def call(monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["stage.py", *text.split()])
    cli.run(stage)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "text, values",
    [
        ("x", {"file": "x", "reg": "none", "s": 2.0, "epochs": None}),
        ("--file x --reg amhe --s 1", {"reg": "amhe", "s": 1.0}),
        ("x -s 0.5 --reg=mhe", {"reg": "mhe", "s": 0.5}),
        ("x --reg_on encoder,projector", {"reg_on": ["encoder", "projector"]}),
        ("x --reg-on (projector,)", {"reg_on": ["projector"]}),
        ("x --epochs 3 --data_dir 123", {"epochs": 3, "data_dir": "123"}),
        ("x --epochs None --data_dir 1e3", {"epochs": None, "data_dir": "1e3"}),
        ("x --floors", {"floors": True}),
        ("x --nofloors", {"floors": False}),
        ("--floors=false x", {"floors": False}),
        ("--floors x", {"floors": True, "file": "x"}),
        ("--no-floors x", {"floors": False, "file": "x"}),
        ("x --floors None --s 1", {"floors": None, "s": 1.0}),
        ("a,b.safetensors --s 1e-3", {"file": "a,b.safetensors", "s": 1e-3}),
    ],
)
def test_values_arrive_as_the_signature_types_them(monkeypatch, capsys, text, values):
    assert call(monkeypatch, capsys, text).items() >= values.items()


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "FILE is missing, see --help"),
        ("x y", "y: a stray word; flags are given as --name value, see --help"),
        ("x --regs amhe", "--regs: no such flag; did you mean --reg?"),
        (
            "x --zzz 1",
            "--zzz: no such flag; known: --file, --reg, --s, --reg_on, --epochs, --data_dir, --floors, --seed",
        ),
        ("x --reg amh", "--reg amh: expected none, mhe, amhe (did you mean amhe?)"),
        ("x --s two", "--s two: expected a number >= 0 and < 9"),
        ("x --s -1", "--s -1: expected a number >= 0 and < 9"),
        ("x --s 9", "--s 9: expected a number >= 0 and < 9"),
        ("x --s nan", "--s nan: expected a number >= 0 and < 9"),
        ("x --s inf", "--s inf: expected a number >= 0 and < 9"),
        ("x --epochs 1.5", "--epochs 1.5: expected a whole number"),
        ("x --epochs", "--epochs: expected a whole number"),
        ("x --data_dir --s 1", "--data_dir: expected a text"),
        ("x --floors=maybe", "--floors maybe: expected True or False"),
        ("x --reg_on head", "--reg_on head: expected values separated by commas, each once: encoder, projector"),
        (
            "x --reg_on encoder,encoder",
            "--reg_on encoder,encoder: expected values separated by commas, each once: encoder, projector",
        ),
        ("x --s 1 --s 2", "--s 2: given twice"),
        ("x --nofloors=true", "--nofloors=true: --nofloors takes no value"),
        ("x --nofloors true", "--nofloors true: --nofloors takes no value"),
        ("--no-floors False x", "--no-floors False: --nofloors takes no value"),
        ("x --nofloors none --s 1", "--nofloors none: --nofloors takes no value"),
        ("x --noreg", "--noreg: no such flag; did you mean --reg?"),
        (
            "x -e 3 -- --trace",
            "--: no such flag; known: --file, --reg, --s, --reg_on, --epochs, --data_dir, --floors, --seed",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_runs(monkeypatch, capsys, text, line):
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, capsys, text)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err == f"stage.py: {line}\n"


def hint(stage, word):
    """What a stage says of a flag that it does not have."""
    with pytest.raises(InputError) as e:
        cli.read([word, "1"], inspect.signature(stage).parameters)
    return str(e.value).removeprefix(f"{word}: no such flag; ")


@pytest.mark.parametrize(
    "flag, words",
    [
        ("out", "--output_dir --outdir --out-dir --save_dir --log-dir --outputDir"),
        ("lr", "--learning_rate --learning-rate --base_lr --blr --LR"),
        ("batch_size", "--bs --batch --per_device_train_batch_size -b"),
        ("weight_decay", "--wd --weight_decayy"),
        ("epochs", "--max_epochs --num-epochs --epoch --num_train_epochs --max_steps"),
        ("model", "--arch --backbone --modle --model_name"),
        ("seed", "--random_seed --manual_seed"),
        ("weight", "--lambda --weights"),
        ("tau", "--ema --ema_decay --moco-m"),
        ("temperature", "--temp --temperatur"),
        ("accumulate", "--gradient_accumulation_steps --accum_iter"),
        ("tracker", "--wandb --report_to"),
        ("dataset or --data_dir", "--data --data-path --root"),
        ("out, whose run goes on", "--resume_from --checkpoint"),
    ],
)
def test_what_other_projects_call_a_flag_leads_to_ours(flag, words):
    for word in words.split():
        assert hint(pretrain, word) == f"did you mean --{flag}?", word


@pytest.mark.parametrize(
    "launch, words",
    [
        ("--mixed_precision fp16", "--fp16 --half"),
        ("--mixed_precision bf16", "--bf16 --amp --mixed_precision --precision"),
        ("--gpu_ids 0", "--device --gpu --cuda --gpu_ids"),
        ("--num_processes 2", "--gpus --num_processes --nproc_per_node --world-size --multi_gpu"),
        ("--cpu", "--cpu --no-cuda"),
        ("--dynamo_backend inductor", "--compile --dynamo_backend"),
    ],
)
def test_flags_of_the_launcher_are_led_before_the_script(monkeypatch, launch, words):
    monkeypatch.setattr(sys, "argv", ["knn_eval.py"])
    for word in words.split():
        told = f"the launcher decides, before the name of the script: accelerate launch {launch} knn_eval.py"
        assert hint(knn_eval, word) == told, word
        assert hint(figures, word).startswith("known: --name, "), word  # which is not launched


def test_what_has_no_flag_is_said():
    assert hint(pretrain, "--momentum") == "momentum is 0.9, of each --optimizer"
    assert hint(pretrain, "--image_size") == "the --dataset decides the size of the views"
    assert hint(pretrain, "--config").startswith("flags alone are settings")
    assert hint(pretrain, "--deepspeed").startswith("each process needs whole weights")
    for word in ("--num_workers", "-j"):
        assert hint(pretrain, word) == "did you mean --workers?"


@pytest.mark.parametrize(
    "word", "--step --lars --node --tag --aug --sched --amp --outputs --fp8 --drop --num_layers --patch".split()
)
def test_nothing_far_fetched_is_suggested(word):
    for stage in (pretrain, knn_eval, linear_eval):
        for far in (
            *("stem", "tau", "tracker", "warmup", "cached", "out_dim", "recipe", "s"),
            *("eval_crop", "reg_on", "batch_size"),
        ):
            assert hint(stage, word) != f"did you mean --{far}?"


def test_the_table_of_meanings_names_flags_that_are_there():
    flags = {*cli.defaults(pretrain), *cli.defaults(knn_eval), *cli.defaults(linear_eval), "ckpt", "workers"}
    for meaning, words in cli.MEANT.items():
        assert re.fullmatch("[a-z0-9 ]+", words), words
        if not meaning.startswith(cli.LAUNCHER):
            assert set(re.findall(r"--(\w+)", meaning)) <= flags, meaning


def test_help_explains_each_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, capsys, "--help")
    text = "".join(capsys.readouterr())
    assert e.value.code == 0
    for part in (
        "stage.py - Print what it was called with, as a row.\n",
        "[a text] a file: of any kind\n",
        "--reg=REG\n        Default: 'none'\n        [none, mhe, amhe] energy of the weights, by chord or angle\n",
        "[a number >= 0 and < 9] power of the energy; 0 is logarithmic\n",
        "Default: ('projector',)\n        [values separated by commas, each once: encoder, projector] networks\n",
        "Default: None \n        [a whole number] length of the training\n",
        "[a text]\n",
    ):
        assert part in text, part
    assert "Type:" not in text and "No part of --help" not in text


def test_defaults_are_those_of_the_signature():
    assert list(cli.defaults(stage)) == ["reg", "s", "reg_on", "epochs", "data_dir", "floors", "seed"]
    assert cli.defaults(stage)["reg_on"] == ("projector",) and cli.defaults(stage)["epochs"] is None


def test_rows_go_to_standard_output_and_the_log(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    for row in ({"a": 1}, {"b": [0.5, None]}):
        emit(row, log)
    assert capsys.readouterr().out == log.read_text() == '{"a": 1}\n{"b": [0.5, null]}\n'
    assert log_of(tmp_path / "ckpt.safetensors", {"settings": {}}) is None  # not the log of a run of ours
    first = '{"stage": "pretrain", "settings": {"seed": 1}}\n'
    log.write_text(first + '{"stage": "pretr')
    assert log_of(tmp_path / "ckpt.safetensors", {"settings": {"seed": 1}}) == log
    assert log_of(tmp_path / "ckpt.safetensors", {"settings": {"seed": 2}}) is None  # a checkpoint of another run
    emit({"a": 1}, log)
    assert log.read_text() == first + '{"a": 1}\n'  # the line that was cut short is no part of the next
    with pytest.raises(ValueError):
        emit({"loss": float("nan")}, log)
    assert log.read_text() == first + '{"a": 1}\n'
    assert log_of(tmp_path / "elsewhere" / "ckpt.safetensors", {"settings": {}}) is None
    log.write_bytes(b"\xff\xfe")
    assert log_of(tmp_path / "ckpt.safetensors", {"settings": {}}) is None


def test_a_reader_that_leaves_ends_the_stage_quietly():
    script = "from lib import cli, log\n"
    script += "def stage():\n    for i in range(9999): log.emit({'i': i})\n"
    script += "cli.run(stage)"
    done = subprocess.run(
        f"{sys.executable} -c {shlex.quote(script)} | head -1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == '{"i": 0}\n' and done.stderr == ""


ROWS = "from lib import cli, log\nimport sys, pathlib\ndef stage():\n    print('a message', file=sys.stderr)\n"
ROWS += "    for i in range(3): log.emit({'i': i}, pathlib.Path('log'))\n"
TABLE = "from lib import cli\ndef stage(): print('a \u00b1 b \u6771' + os.fsdecode(b'\\xff'))\nimport os\n"
FAULT = "from lib import cli, errors\ndef stage(): raise errors.InputError('--s 1: \u6771')\n"
LONG = "from lib import cli\ndef stage(): print('x' * 2**20)\n"


@pytest.mark.parametrize(
    "script, redirection, code, out, err, rows",
    [
        (ROWS, ">/dev/full", 2, "", "a message\n-c: standard output: cannot be written (No space left on device)\n", 1),
        (LONG, ">/dev/full", 2, "", "-c: standard output: cannot be written (No space left on device)\n", 0),
        (TABLE, ">/dev/full", 2, "", "-c: standard output: cannot be written (No space left on device)\n", 0),
        (ROWS, ">&-", 0, "", "a message\n", 3),
        (ROWS, "2>&-", 0, '{"i": 0}\n{"i": 1}\n{"i": 2}\n', "", 3),
        (ROWS, "2>/dev/full", 0, '{"i": 0}\n{"i": 1}\n{"i": 2}\n', "", 3),
        (ROWS, "<&- >&- 2>&-", 0, "", "", 3),
        (FAULT, "2>/dev/full", 2, "", "", 0),
        (FAULT, ">&- 2>&-", 2, "", "", 0),
        (TABLE, "", 0, "a +- b \\u6771\\udcff\n", "", 0),
        (FAULT, "", 2, "", "-c: --s 1: \\u6771\n", 0),
    ],
)
def test_streams_that_are_full_closed_or_ascii(tmp_path, script, redirection, code, out, err, rows):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = f"{sys.executable} -c {shlex.quote(script + 'cli.run(stage)')} {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
    log = tmp_path / "log"
    assert (len(log.read_text().splitlines()) if log.exists() else 0) == rows


def test_no_file_takes_the_number_of_a_stream_that_is_closed(tmp_path):
    script = "from lib import cli\ndef stage(): print(open('file', 'w').fileno(), file=open('number', 'w'))\n"
    script += "cli.run(stage)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -c {shlex.quote(script)} <&- >&- 2>&-"
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)
    assert int((tmp_path / "number").read_text()) > 2

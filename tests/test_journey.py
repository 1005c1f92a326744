"""The user's journey, as a newcomer types it: pre-train, then both judges."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, rows_of


def test_from_the_command_line_to_both_scores(tmp_path):
    """accelerate launch as a newcomer types it, one epoch of photos, and the two commands that the end names."""

    def launch(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    flags = "--reg amhe --s 2 --epochs 1 --batch_size 250 --model test_resnet --stem imagenet".split()
    rows, prose = launch("accelerate", "launch", str(ROOT / "pretrain.py"), *flags)
    run = tmp_path / "runs" / "photos-amhe-modeltest_resnet-stemimagenet-epochs1-batch_size250"
    assert rows == rows_of(run) and "loss = byol + 10 energy" in prose
    settings, untrained, pixels, trained, online, inner = rows
    assert [(row["of"], row["step"]) for row in (untrained, pixels)] == [("untrained", 0), ("pixels", 0)]
    assert settings["settings"]["weight"] == 10
    assert trained["step"] == 8 and trained["loss"] == pytest.approx(trained["byol"] + 10 * trained["energy"], rel=1e-5)
    assert 1.5 < trained["energy"] < 1.8 and 0 < trained["byol"] < 8
    blocks = {f"block/layer{stage}.0" for stage in (1, 2, 3, 4)}
    assert blocks < inner.keys() and 0 < inner["block/layer4.0"] < inner["block/layer1.0"] < 9
    assert inner["g2"] == pytest.approx(math.exp(inner["uniformity"]), rel=1e-4)
    ckpt = Path("runs") / run.name / "ckpt.safetensors"
    for stage in ("knn_eval.py", "linear_eval.py"):
        assert f"python {stage} {ckpt}" in prose

    scores, _ = launch(sys.executable, str(ROOT / "knn_eval.py"), str(ckpt))
    by = {(row["of"], row["k"]): row["top1"] for row in scores}
    assert by.keys() == {(of, k) for of in ("trained", "untrained", "pixels") for k in (10, 20, 100, 200)}
    assert by["trained", 20] == online["top1"]
    assert (by["untrained", 20], by["pixels", 20]) == (untrained["top1"], pixels["top1"])
    assert 40 < by["pixels", 20] < 50 < by["untrained", 20] < 70
    probe, _ = launch(sys.executable, str(ROOT / "linear_eval.py"), str(ckpt), "--epochs", "3", "--cached")
    assert probe[-1]["top1"] > 50 and probe[-1]["top5"] > 80
    assert rows_of(run) == rows + scores + probe


def test_nothing_optional_is_imported_for_a_folder(folder, tmp_path):
    """Training on a folder or CIFAR-10 needs no scikit-image, photos says that it does."""
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").write_text("raise ImportError('not installed')")
    script = f"import data; print(len(data.load({str(folder)!r}).classes)); data.load('photos')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "3\n" and done.stderr.endswith("pip install scikit-image\n")

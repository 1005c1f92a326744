"""What people read at a terminal, where others get the rows of the log."""

import json
import sys

import pytest
from conftest import SMALL, rows_of

from knn_eval import knn_eval
from linear_eval import linear_eval
from pretrain import pretrain
from tools.embed import embed


@pytest.fixture
def terminal(monkeypatch, shell):
    """`shell`, with a standard output that says it is a terminal."""

    def run(stage, *words):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return shell(stage, *words)

    return run


def test_a_run_says_a_line_an_epoch_and_a_vote_with_its_floors(terminal, folder, tmp_path):
    flags = (pretrain, "--dataset", folder, "--reg", "amhe", *SMALL)
    code, lines, err = terminal(*flags, "--out", "a")
    rows = rows_of(tmp_path / "a")
    _, untrained, pixels, first, online, inner, *_ = rows
    beside = f"untrained {untrained['top1']:.1f}, pixels {pixels['top1']:.1f}"
    expected = [
        "run folder a",
        f"untrained: k-NN {untrained['top1']:.1f} %",
        f"pixels: k-NN {pixels['top1']:.1f} %",
        f"epoch 1/2  loss {first['loss']:.4g}  byol {first['byol']:.4g}  energy {first['energy']:.4g}  "
        f"uniformity {first['uniformity']:.4g}  lr {first['lr']:.4g}  {first['images_per_s']:.0f} images/s",
        f"k-NN {online['top1']:.1f} %  ({beside})",
        f"representations: rank {inner['rank']:.1f}  uniformity {inner['uniformity']:.2f}",
    ]
    assert code == 0 and lines[:6] == expected and len(lines) == 9
    assert "| 6/6 [" in err and "| 1/6 [" not in err  # into a file, where each update of the bar is kept
    last = [line.strip() for line in err.splitlines()[-4:]]
    assert last == ["a/ckpt.safetensors is complete", lines[-2]] + [
        f"python {judge}.py a/ckpt.safetensors" for judge in ("knn_eval", "linear_eval")
    ]
    code, lines, _ = terminal(*flags, "--out", "b", "--json")
    assert code == 0 and [json.loads(line) for line in lines] == rows_of(tmp_path / "b")


def test_the_judges_say_a_table_and_a_sentence(terminal, trained):
    code, (head, *lines, sentence), _ = terminal(knn_eval, trained, "--k", "5,20")
    rows = rows_of(trained)[-6:]
    assert code == 0 and head.split() == "encoder k top-1 top-5 balanced rank alignment uniformity".split()
    for line, row in zip(lines, rows, strict=True):
        scores = [f"{row[name]:.1f}" for name in ("top1", "top5", "balanced", "rank")]
        assert line.split() == [
            row["of"],
            str(row["k"]),
            *scores,
            f"{row['alignment']:.2f}",
            f"{row['uniformity']:.2f}",
        ]
        assert len(line) == len(head)
    of_20 = {row["of"]: row["top1"] for row in rows if row["k"] == 20}
    assert sentence.startswith(f"top-1 {of_20['trained']:.1f} % where k is 20: ")
    for of in ("untrained", "pixels"):
        difference = of_20["trained"] - of_20[of]
        side = "above" if difference >= 0 else "BELOW"
        assert f"{abs(difference):.1f} points {side} {of} ({of_20[of]:.1f})" in sentence

    code, lines, _ = terminal(linear_eval, trained, "--epochs", 2, "--cached", "--sweep")
    assert code == 0 and [line.partition(": top-1 ")[0] for line in lines[:5]] == [
        f"lr {rate} on the hold-out" for rate in (0.4, 0.3, 0.2, 0.1, 0.05)
    ]
    *_, row = rows_of(trained)
    assert [line.split()[:2] for line in lines[5:7]] == [["epoch", "1"], ["epoch", "2"]]
    assert (
        lines[7].startswith(f"linear classifier, lr {row['lr']}: top-1 {row['top1']:.1f} %  top-5 ") and not lines[8:]
    )


def test_embed_says_what_it_embeds_and_what_the_file_holds(terminal, folder, trained):
    code, (read, written), _ = terminal(embed, trained)
    assert code == 0 and read == f"{folder}: train 48, test 18"
    assert written.startswith("features.safetensors: train.features [48, ") and written.endswith("test.labels [18]")
    code, lines, _ = terminal(embed, trained, "--out", "again.safetensors", "--json")
    assert code == 0 and [json.loads(line)["stage"] for line in lines] == ["embed", "embed"]

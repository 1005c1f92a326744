"""Pictures as they come: every mode, turned, broken, of several sizes, behind links, with and without classes."""

import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import data
from harness import pictures
from harness.errors import InputError
from harness.pictures import Files
from harness.sources import pixel_statistics
from knn_eval import knn_eval
from pretrain import pretrain

TINY = "--stem imagenet --hidden_dim 8 --out_dim 4 --batch_size 4 --epochs 1 --out run".split()


@pytest.fixture(scope="module")
def picture(photos):
    """One photograph's patch, 24 pixels high and 32 wide."""
    return to_pil_image(photos.train.images[0][:, :24])


def test_each_mode_is_read_as_rgb(picture, tmp_path):
    """Against the picture itself, or its grey values, as Pillow makes them from 8 bits."""
    grey = np.asarray(picture.convert("L"))
    transparent = PIL.Image.merge("RGBA", (*picture.split(), PIL.Image.fromarray(255 - grey)))
    palette = picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    files = {
        "rgb.png": (picture, picture),
        "grey.png": (picture.convert("L"), picture.convert("L")),
        "alpha.png": (transparent, picture),
        "grey and alpha.png": (picture.convert("LA"), picture.convert("L")),
        "palette.png": (palette, palette),
        "palette.gif": (palette, palette),
        "two.png": (picture.convert("1"), picture.convert("1")),
        "deep.png": (PIL.Image.fromarray(grey.astype(np.uint16) * 257), picture.convert("L")),
        "deep.tiff": (PIL.Image.fromarray(grey.astype(np.uint16) * 257), picture.convert("L")),
        "Zürich 東京.png": (picture, picture),
        "dot.webp": (picture.resize((1, 1)), None),
    }
    for name, (stored, meant) in files.items():
        stored.save(tmp_path / name)
        ours = pictures.read(str(tmp_path / name))
        assert ours.dtype == torch.uint8 and ours.shape == (3, *stored.size[::-1]), name
        if meant:
            assert np.array_equal(ours.permute(1, 2, 0), np.asarray(meant.convert("RGB"))), name
    palette.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    assert np.array_equal(
        pictures.read(str(tmp_path / "clear.png")).permute(1, 2, 0), np.asarray(palette.convert("RGB"))
    )
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    off = pictures.read(str(tmp_path / "cmyk.jpg")).permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)
    assert abs(off).mean() < 6
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = picture.transpose(PIL.Image.Transpose.ROTATE_270)
    assert np.array_equal(pictures.read(str(tmp_path / "turned.png")).permute(1, 2, 0), np.asarray(upright))
    assert pictures.shape(str(tmp_path / "turned.png")) == (32, 24) == tuple(np.asarray(upright).shape[:2])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_have_pillows_pixels(photos, mode, tmp_path):
    """Turned in each way that EXIF knows, baseline and progressive; a cut one is refused."""
    path, picture = tmp_path / "some.jpg", to_pil_image(photos.train.images[0][:, :24]).resize((53, 40))
    for orientation in range(1, 9):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        picture.convert(mode).save(path, exif=exif, progressive=orientation % 2 == 0)
        with PIL.Image.open(path) as stored:
            meant = np.asarray(PIL.ImageOps.exif_transpose(stored).convert("RGB"))
        assert np.array_equal(pictures.read(str(path)).permute(1, 2, 0), meant), orientation
        assert pictures.shape(str(path)) == meant.shape[:2]
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match=r"some\.jpg: not a picture that can be read"):
        pictures.read(str(path))


@pytest.fixture
def crowd(folder, picture, tmp_path):
    """The small folder's layout with pictures of several sizes, a loop of links and a note in it."""
    for part, n in (("train", 8), ("test", 4)):
        for label in ("a b", "ü"):
            place = tmp_path / "crowd" / part / label
            place.mkdir(parents=True)
            for i in range(n):
                picture.resize((20 + 8 * i, 40)).save(place / f"{i}.png")
    (tmp_path / "crowd" / "train" / "ü" / "loop").symlink_to(tmp_path / "crowd" / "train")
    (tmp_path / "crowd" / "train" / "ü" / "notes.txt").write_text("no picture")
    return tmp_path / "crowd"


def test_several_sizes_stay_in_files(crowd):
    read = data.load(str(crowd))
    assert read.classes == ("a b", "ü") and isinstance(read.train.images, Files)
    assert len(read.test.labels) == 8 and read.size == 40 and read.stem == "imagenet"
    every = torch.cat([pictures.read(path).flatten(1) for path in read.train.images.paths], 1)
    expected = pixel_statistics(every[None, ..., None])
    assert (read.mean, read.std) == expected
    crops, _, _ = next(data.batches(read.train, 4, read.size, 0, [1]))
    assert crops.shape == (2, 4, 3, 40, 40)


def test_a_loop_of_links_ends(crowd):
    """Through the link the other class is a part of this one, and this one no part of itself."""
    assert len(pictures.find(crowd / "train" / "ü")) == 8 + 8
    assert len(pictures.find(crowd)) == 2 * 8 + 2 * 4


def test_broken_pictures_stop_the_start_or_are_skipped(command, crowd, picture, tmp_path):
    whole = (crowd / "train" / "a b" / "0.png").read_bytes()
    (crowd / "train" / "a b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (crowd / "train" / "a b" / "text.jpg").write_text("no picture")
    (crowd / "test" / "ü" / "empty.png").write_bytes(b"")
    PIL.Image.fromarray(np.zeros((4, 4), np.float32)).save(crowd / "train" / "ü" / "float.tiff")
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY)
    assert code == 2 and rows == [] and "a b/cut.png: not a picture" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY, "--skip_broken")
    assert code == 0 and rows[-1]["of"] == "representations"
    for name in ("a b/cut.png", "a b/text.jpg", "ü/float.tiff"):
        assert f"train/{name}: not a picture that can be read" in err, err
    assert "test/ü/empty.png: not a picture" in err and "skipped 5 of 29 pictures" in err
    for path in (crowd / "test" / "a b").iterdir():
        path.write_bytes(b"")
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY[:-1], "other", "--skip_broken")
    assert code == 2 and rows == [] and err.endswith("no picture that can be read in class a b\n")
    for i in range(4):
        picture.save(crowd / "test" / "a b" / f"{i}.png")
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 0 and rows[0]["bank"] == 8 + 16 and rows[0]["queries"] == 8


def test_pictures_without_classes_train_and_are_not_judged(command, picture, tmp_path):
    (tmp_path / "heap" / "below").mkdir(parents=True)
    for i in range(8):
        picture.save(tmp_path / "heap" / ("below" if i % 2 else ".") / f"{i}.png")
    code, rows, err = command(pretrain, "--dataset", "heap", *TINY)
    assert code == 0 and [row.get("of") for row in rows] == [None, None], err
    assert "dataset heap: 8 pictures to train on, none to judge by (no folder heap/train; train/ and test/" in err
    code, rows, err = command(knn_eval, "run/ckpt.safetensors")
    assert code == 2 and rows == [] and err.startswith("knn_eval.py: dataset heap: no folder heap/train; train/")
    for flags, why in (
        (["--eval_every", 1], "--eval_every 1: heap has no classes to judge by"),
        (["--holdout"], "holdout: the pictures have no classes, so nothing can be judged"),
    ):
        code, rows, err = command(pretrain, "--dataset", "heap", *TINY[:-1], "other", *flags)
        assert code == 2 and why in err and not (tmp_path / "other").exists()


def test_folders_that_are_no_two_halves_of_the_same_classes(picture, tmp_path):
    """A hidden folder, as notebooks leave, is no class; pictures to judge by are not trained on."""
    for place in ("train/a", "train/b", "train/.hidden", "test/a", "test/b"):
        (tmp_path / place).mkdir(parents=True)
        picture.save(tmp_path / place / "0.png")
    assert data.load(str(tmp_path)).classes == ("a", "b")
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(InputError, match="not hold the same classes: b in train alone, c in test alone"):
        data.load(str(tmp_path), pretraining=True)
    (tmp_path / "train").rename(tmp_path / "trian")
    with pytest.raises(InputError, match=r"no folder .*train; train/ and test/ or val/ must hold"):
        data.load(str(tmp_path), pretraining=True)


def test_a_set_that_is_not_the_trainings_is_told(command, crowd, picture, tmp_path):
    assert command(pretrain, "--dataset", crowd, *TINY)[0] == 0
    assert "not the images of the training" not in command(knn_eval, "run/ckpt.safetensors", "--k", 3)[2]
    picture.rotate(90).point(lambda x: 255 - x).save(next((crowd / "train").glob("*/0.png")))
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 0 and rows and err.count(f"dataset {crowd}: not the images of the training") == 1
    crowd.rename(tmp_path / "moved")
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 2 and rows == [] and err.count("\n") == 1
    assert "the checkpoint was trained on it; --dataset or --data_dir say where it is now" in err
    assert command(knn_eval, "run/ckpt.safetensors", "--k", 3, "--dataset", "moved")[0] == 0


def test_of_several_processes_one_names_what_is_skipped(monkeypatch, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    messages = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert pictures.sound([str(tmp_path / "broken.png")], pictures.read, skip_broken=True) == ([], [])
        messages.append(capsys.readouterr().err)
    assert "skipped 1 of 1 pictures" in messages[0] and messages[1] == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_named(crowd):
    (crowd / "train" / "a b").chmod(0)
    with pytest.raises(InputError, match="a b: cannot be read"):
        data.load(str(crowd))

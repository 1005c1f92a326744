"""Pictures as they come: every mode, turned, broken, of several sizes, behind links, with and without classes."""

import os
import signal
import struct
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import data
from knn_eval import knn_eval
from lib import pictures, processes, sources
from lib.errors import InputError
from lib.pictures import Files
from pretrain import pretrain

TINY = "--stem imagenet --hidden_dim 8 --out_dim 4 --batch_size 4 --epochs 1 --out run".split()


@pytest.fixture(scope="module")
def picture(photos):
    """One photograph's patch, 24 pixels high and 32 wide."""
    return to_pil_image(photos.train.images[0][:, :24])


@pytest.fixture
def pair(picture, tmp_path):
    """Two classes of one picture each, in train and in test."""
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "pair" / place).mkdir(parents=True)
        picture.save(tmp_path / "pair" / place / "0.png")
    return tmp_path / "pair"


@pytest.fixture
def crowd(picture, tmp_path):
    """Pictures of several sizes, and a note, in two classes."""
    for part, n in (("train", 8), ("test", 4)):
        for label in ("a b", "ü"):
            place = tmp_path / "crowd" / part / label
            place.mkdir(parents=True)
            for i in range(n):
                picture.resize((20 + 8 * i, 40)).save(place / f"{i}.png")
    (tmp_path / "crowd" / "train" / "ü" / "notes.txt").write_text("no picture")
    return tmp_path / "crowd"


@pytest.fixture
def by_two(monkeypatch):
    """Two workers, whatever the machine has."""
    pictures.choose_workers(2)
    yield
    pictures.choose_workers(None)


def read_array(path):
    return pictures.read(str(path)).permute(1, 2, 0).numpy().astype(int)


# ---- One picture -----------------------------------------------------------------------------------------------------


def test_each_mode_is_read_as_rgb(picture, tmp_path):
    """Against the picture itself, or its grey values, as Pillow makes them from 8 bits."""
    grey = picture.convert("L")
    deep = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    files = {
        "rgb.png": (picture, picture),
        "opaque.png": (picture.convert("RGBA"), picture),
        "grey and opaque.png": (picture.convert("LA"), grey),
        "palette.gif": (palette, palette),
        "two.png": (picture.convert("1"), picture.convert("1")),
        "deep.png": (deep, grey),
        "deep.tiff": (deep, grey),
        "Zürich 東京.png": (picture, picture),
    }
    for name, (stored, meant) in files.items():
        stored.save(tmp_path / name)
        assert pictures.read(str(tmp_path / name)).dtype == torch.uint8
        assert np.array_equal(read_array(tmp_path / name), np.asarray(meant.convert("RGB"))), name
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert abs(read_array(tmp_path / "cmyk.jpg") - np.asarray(picture)).mean() < 6


def test_what_is_transparent_is_white(picture, tmp_path):
    """In each way in which files say it, against the arithmetic in float64."""
    colours = np.asarray(picture)
    grey = np.stack([np.asarray(picture.convert("L"))] * 3, 2)
    alpha = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1))
    mask = PIL.Image.fromarray(alpha)
    palette = picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    seen = np.asarray(palette.convert("RGB"))
    key = tuple(int(x) for x in colours[5, 5])
    cases = {
        "rgba.png": (PIL.Image.merge("RGBA", (*picture.split(), mask)), {}, colours, alpha),
        "la.png": (PIL.Image.merge("LA", (picture.convert("L"), mask)), {}, grey, alpha),
        "bytes.png": (palette, {"transparency": bytes(range(256))}, seen, np.asarray(palette)),
        "index.gif": (palette, {"transparency": 3}, seen, 255 * (np.asarray(palette) != 3)),
        "key.png": (picture, {"transparency": key}, colours, 255 * (colours != key).any(2)),
    }
    for name, (stored, arguments, pixels, opacity) in cases.items():
        stored.save(tmp_path / name, **arguments)
        part = opacity[..., None] / 255
        assert np.array_equal(read_array(tmp_path / name), np.rint(part * pixels + (1 - part) * 255)), name


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_turned_pictures_are_upright(picture, mode, tmp_path):
    """In each way that EXIF knows; Pillow turns TIFFs itself, and those that it maps into memory wrongly."""
    grey = np.asarray(picture.convert("L"))
    stored = PIL.Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
    pixels = np.asarray(picture) if mode == "RGB" else np.stack([grey] * 3, 2)
    upright = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]]
    upright += [x.swapaxes(0, 1) for x in (upright[0], upright[3], upright[2], upright[1])]
    for orientation, meant in enumerate(upright, 1):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "packed.tiff", exif=exif, compression="tiff_lzw")
        stored.save(tmp_path / "plain.tiff", exif=exif)
        stored.save(tmp_path / "some.png", exif=exif)
        for name in ("packed.tiff", "plain.tiff", "some.png"):
            assert np.array_equal(read_array(tmp_path / name), meant), (orientation, name)
        if mode != "I;16":
            stored.save(tmp_path / "some.jpg", exif=exif, progressive=orientation % 2 == 0)
            with PIL.Image.open(tmp_path / "some.jpg") as jpeg:
                meant = np.asarray(PIL.ImageOps.exif_transpose(jpeg).convert("RGB"))
            assert np.array_equal(read_array(tmp_path / "some.jpg"), meant), orientation


def test_an_odd_tag_does_not_keep_a_picture_from_being_turned(picture, tmp_path):
    """A resolution that is a text, a position out of range: scanners and phones write such; Pillow rewrites them."""
    for odd in ((0x011A, 2, 3, b"72\0"), (0x0213, 4, 1, struct.pack("<I", 65537))):
        entries = ((0x0112, 3, 1, struct.pack("<HH", 6, 0)), odd)
        packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
        picture.save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + packed + bytes(4))
        assert read_array(tmp_path / "odd.jpg").shape == (32, 24, 3)


@pytest.mark.parametrize("bits", [12, 16])
def test_16_bits_become_8(pair, picture, bits):
    """One white for all pictures of a folder: by its own highest value a dark one would become bright."""
    grey = np.asarray(picture.convert("L").resize((32, 32)))
    white = 2**bits - 1
    bright = np.rint(grey / grey.max() * white).astype(np.uint16)
    dark = bright // 64
    for label, values in (("a", bright), ("b", dark)):
        for part in ("train", "test"):
            PIL.Image.fromarray(values).save(pair / part / label / "0.png")
    for width in (32, 30):  # in memory, and with another size in files
        PIL.Image.fromarray(bright[:, :width]).save(pair / "train" / "a" / "1.tiff")
        read = data.load(str(pair))
        assert isinstance(read.train.images, torch.Tensor) == (width == 32)
        (view,) = data.evaluation_views(read.train, 32, 1, (0, 0, 0), (1, 1, 1))
        for image, values in zip(view[[0, 2]], (bright, dark)):
            assert abs(image * 255 - torch.from_numpy(values * (255 / white))).max() <= 0.5 + 1e-4
        values = np.concatenate([x.ravel() for x in (bright, bright[:, :width], dark)]) / white
        assert read.mean == pytest.approx([values.mean()] * 3, abs=3e-4)
        assert read.std == pytest.approx([values.std()] * 3, abs=3e-4)


def test_what_is_refused(tmp_path):
    """Numbers of an unknown range, a cut file, and an EPS called jpg, for which Pillow would run Ghostscript."""
    for dtype in (np.float32, np.int32):
        PIL.Image.fromarray(np.zeros((4, 4), dtype)).save(tmp_path / "some.tiff")
        with pytest.raises(InputError, match=r"some\.tiff: not a picture that can be read \(fractions or 32 bits"):
            pictures.read(str(tmp_path / "some.tiff"))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(InputError, match=r"a.jpg: not a picture that can be read .cannot identify image file"):
        pictures.read(str(tmp_path / "a.jpg"))
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-60])
    with pytest.raises(InputError, match=r"cut\.jpg: not a picture that can be read"):
        pictures.read(str(tmp_path / "cut.jpg"))


def test_a_narrow_picture_is_not_resized_whole(monkeypatch, tmp_path):
    """1 x 20,000 pixels, of which the square is the middle, would be 256 x 5,120,000."""
    pixels = np.zeros((20_000, 1, 3), np.uint8)
    pixels[9_990:10_010] = 200
    PIL.Image.fromarray(pixels).save(tmp_path / "narrow.png")
    resized = []
    resize = pictures.F.resize
    monkeypatch.setattr(pictures.F, "resize", lambda x, *a, **b: resized.append(x.shape) or resize(x[:, :99], *a, **b))
    split = data.Split(Files([str(tmp_path / "narrow.png")]), torch.zeros(1))
    (view,) = data.evaluation_views(split, 224, 0.875, (0, 0, 0), (1, 1, 1))
    assert resized == [(3, 8, 1)] and view.shape == (1, 3, 224, 224)
    assert (view * 255).round().unique().tolist() == [200]


# ---- Many pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_several_sizes_stay_in_files(crowd, workers, monkeypatch):
    """Mean, std and size are those of SAMPLE pictures, or of all where there are fewer."""
    monkeypatch.setattr(pictures, "workers", lambda: workers)
    monkeypatch.setattr(pictures.os.path, "ismount", lambda _: False)
    read = data.load(str(crowd))
    assert read.classes == ("a b", "ü") and isinstance(read.train.images, Files)
    assert len(read.test.labels) == 8 and read.size == 40 and read.stem == "imagenet"
    pixels = torch.cat([pictures.read(path).flatten(1) for path in read.train.images.paths], 1) / 255
    assert read.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert read.std == pytest.approx(pixels.std(1).tolist(), abs=1e-4)
    crops, _, _ = next(data.batches(read.train, read.size, 4, 0, [0]))
    assert crops.shape == (2, 4, 3, 40, 40)
    monkeypatch.setattr(sources, "SAMPLE", 3)
    first, again = data.load(str(crowd)), data.load(str(crowd))
    assert first.mean == again.mean != read.mean and len(first.train.labels) == 16


def test_workers_read_a_set_into_memory_as_one_process_does(folder, picture, by_two, monkeypatch):
    several = data.load(str(folder))
    pictures.choose_workers(0)
    alone = data.load(str(folder))
    assert torch.equal(several.train.images, alone.train.images) and several.mean == alone.mean
    monkeypatch.setattr(sources, "MEMORY", 66 * 32 * 32 * 3 - 1)
    in_files = data.load(str(folder))
    assert isinstance(in_files.train.images, Files) and (in_files.mean, in_files.std) == (alone.mean, alone.std)


def test_fewer_workers_where_shared_memory_is_small(monkeypatch, capsys):
    """One for each 512 MB, none in Docker's 64 MB; a number that was chosen holds."""
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.setattr(pictures.os.path, "ismount", lambda _: True)
    for free, n in ((64e6, 0), (2**31, 4), (2**40, 8)):
        monkeypatch.setattr(pictures.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        pictures.choose_workers(None)
        assert pictures.workers() == pictures.workers() == n
        assert capsys.readouterr().err.count("/dev/shm is small: ") == (n < 8)
    pictures.choose_workers(3)
    assert pictures.workers() == 3
    pictures.choose_workers(None)


def test_no_worker_and_two_read_the_same(command, crowd):
    flags = "--model test_resnet --hidden_dim 32 --out_dim 16 --batch_size 4 --epochs 1".split()
    losses = []
    for n in (0, 2):
        code, rows, err = command(pretrain, "--dataset", crowd, *flags, "--out", f"by{n}", "--workers", n)
        assert code == 0 and pictures.workers() == n, err
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1] != []
    pictures.choose_workers(None)


def test_a_worker_that_dies_ends_a_run_with_one_line(command, crowd, by_two, monkeypatch):
    """As one does that shared memory is too small for: by SIGBUS, in the middle of a run."""
    monkeypatch.setattr(pictures, "_crops", lambda *_: os.kill(os.getpid(), signal.SIGBUS))
    monkeypatch.setattr("lib.cli.time.sleep", lambda _: None)
    code, _, err = command(pretrain, "--dataset", crowd, *TINY, "--model", "test_resnet", "--workers", 1)
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("pretrain.py: a process that reads pictures has died")
    assert "--workers" in err.splitlines()[-1]


def test_broken_pictures_stop_the_run_or_are_skipped(command, crowd, picture, tmp_path, monkeypatch):
    whole = (crowd / "train" / "a b" / "0.png").read_bytes()
    (crowd / "train" / "a b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY)
    assert code == 2 and rows == [] and not (tmp_path / "run").exists()
    assert "a b/cut.png: not a picture" in err.splitlines()[-1]
    assert err.endswith("; --skip_broken leaves such pictures out\n")
    for i in range(10):
        (crowd / "test" / "ü" / f"empty{i}.png").write_bytes(b"")
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY, "--skip_broken")
    assert code == 0 and "representations" in [row.get("of") for row in rows]
    assert "skipped 11 of 35 pictures" in err and err.count(": not a picture that can be read") == 10
    assert f"dataset {crowd}: 2 classes, 16 pictures to train on, 8 to judge by; left out: 1 named *.txt\n" in err
    monkeypatch.setenv("RANK", "1")
    assert "skipped" not in command(knn_eval, "run/ckpt.safetensors", "--k", 3)[2]  # the first process has said it
    for path in (crowd / "test" / "a b").iterdir():
        path.write_bytes(b"")
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY[:-1], "other", "--skip_broken")
    assert code == 2 and rows == [] and "no picture that can be read in class a b; 2 classes" in err


# ---- Folders ---------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted(pair, picture, capsys):
    """One line: what others leave in a folder is no picture, and what the suffix leaves out is named."""
    for place in ("train/__MACOSX", "train/a/.ipynb_checkpoints", "train/a/deep/@eaDir", "val", "masks"):
        (pair / place).mkdir(parents=True)
    for name in ("train/stray.png", "train/a/deep/1.jfif", "train/a/deep/2.avif", "train/a/deep/@eaDir/0.jpg"):
        picture.save(pair / name)
    for name in ("raw.heic", "raw2.HEIC", "README", ".DS_Store", "._0.png"):
        (pair / "train" / "a" / name).write_bytes(b"not for us")
    (pair / "train" / "gone").symlink_to(pair / "nowhere")  # a class, on another disk
    read = data.load(str(pair))
    assert read.classes == ("a", "b") and len(read.train.labels) == 4
    line = "2 classes, 4 pictures to train on, 2 to judge by; left out: 5 hidden, 2 named *.heic, "
    line += f"1 beside the folders of the classes, 1 link to nothing ({pair}/train/gone), 1 without a suffix, "
    line += "1 folder, masks/, 1 folder, val/"
    assert capsys.readouterr().err == f"dataset {pair}: {line}\n"
    for part in ("train", "test"):
        (pair / part / "c").mkdir()
        (pair / part / "c" / "raw.heic").write_bytes(b"not for us")
    with pytest.raises(InputError, match=r"no picture that can be read in class c; .*left out: .*4 named \*\.heic"):
        data.load(str(pair))


def test_links_lead_to_no_other_class_and_to_no_picture_twice(pair, capsys):
    """A link to train/ would put b among a; two names for one folder are allowed, and told."""
    (pair / "train" / "a" / "loop").symlink_to("..")
    (pair / "train" / "a" / "more").mkdir()
    (pair / "train" / "a" / "0.png").rename(pair / "train" / "a" / "more" / "0.png")
    (pair / "train" / "a" / "same").symlink_to("more")
    (pair / "train" / "a" / ".0").symlink_to("more")  # hides it not
    assert data.load(str(pair)).train.labels.tolist() == [0, 1]
    told = capsys.readouterr().err
    assert "left out: 1 links to a folder above, 1 hidden\n" in told and "twice" not in told
    (pair / "test").rename(pair.parent / "old")
    (pair / "test").symlink_to("train")
    (pair / "train" / "c").symlink_to("b")
    assert data.load(str(pair)).train.labels.tolist() == [0, 1, 2]
    assert f"folders come twice: {pair}/train/c is {pair}/train/b, {pair}/test/a is" in capsys.readouterr().err


def test_train_and_test_hold_the_same_classes(pair):
    """Names that look alike are told apart: letters composed in two ways, a space at the end."""
    (pair / "test" / "b").rename(pair / "test" / "c")
    with pytest.raises(InputError, match="not hold the same classes: 'b' in train alone, 'c' in test alone"):
        data.load(str(pair), pretraining=True)
    for name, other in (("\u00fc", "u\u0308"), ("cat", "cat ")):
        (next((pair / "train").glob("[!a]*"))).rename(pair / "train" / name)
        (next((pair / "test").glob("[!a]*"))).rename(pair / "test" / other)
        with pytest.raises(InputError) as e:
            data.load(str(pair))
        assert f"{name!a} in train alone" in str(e.value) and f"{other!a} in test alone" in str(e.value)


def test_pictures_without_classes_train_and_are_not_judged(command, picture, tmp_path):
    (tmp_path / "heap" / "below").mkdir(parents=True)
    for i in range(8):
        picture.save(tmp_path / "heap" / ("below" if i % 2 else ".") / f"{i}.png")
    code, rows, err = command(pretrain, "--dataset", "heap", *TINY)
    assert code == 0 and [row.get("of") for row in rows] == [None, None], err
    assert (
        "dataset heap: 0 classes, 8 pictures to train on, 0 to judge by; left out: nothing (nothing is judged: " in err
    )
    code, rows, err = command(knn_eval, "run/ckpt.safetensors")
    assert code == 2 and rows == [] and "dataset heap: heap/train is no folder of two or more classes; train/" in err
    for flags, why in (
        (["--eval_every", 1], "--eval_every 1: heap has fewer than two classes"),
        (["--holdout"], "holdout: the pictures have no classes, so nothing can be judged"),
    ):
        code, rows, err = command(pretrain, "--dataset", "heap", *TINY[:-1], "other", *flags)
        assert code == 2 and why in err and not (tmp_path / "other").exists()


def test_a_part_without_classes_is_named(pair, capsys):
    """The pictures of a contest's test/ have no classes; ImageNet's val/ has none as it is downloaded."""
    (pair / "test").rename(pair / "val")
    (pair / "test" / "unknown").mkdir(parents=True)
    assert len(data.load(str(pair)).test.labels) == 2  # of val/
    assert "1 folder, test/" in capsys.readouterr().err
    for label in ("a", "b"):
        (pair / "val" / label / "0.png").rename(pair / "val" / f"{label}.png")
        (pair / "val" / label).rmdir()
    with pytest.raises(
        InputError, match=r"imagenet: --data_dir .*/val is no folder of two or more classes; train/ and"
    ):
        data.load("imagenet", str(pair))
    (pair / "test" / "unknown").rmdir()
    assert len(data.load(str(pair), pretraining=True).train.labels) == 2
    assert "nothing is judged" in capsys.readouterr().err


def test_a_set_that_is_not_the_trainings_is_told(command, crowd, picture, tmp_path):
    """The floors of pictures of several sizes are the same in the run and in the judge."""
    code, rows, _ = command(pretrain, "--dataset", crowd, *TINY)
    floors = {row["of"]: row["top1"] for row in rows if row.get("of") in ("untrained", "pixels")}
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 20)
    assert code == 0 and "not the images of the training" not in err
    assert {row["of"]: row["top1"] for row in rows if row["of"] != "trained"} == floors != {}
    picture.rotate(90).point(lambda x: 255 - x).save(crowd / "train" / "ü" / "0.png")
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 0 and rows and err.count(f"dataset {crowd}: not the images of the training") == 1
    crowd.rename(tmp_path / "moved")
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 2 and rows == [] and err.count("\n") == 1
    assert "the checkpoint was trained on it; --dataset says where it is now" in err
    assert command(knn_eval, "run/ckpt.safetensors", "--k", 3, "--dataset", "moved")[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_named(pair):
    (pair / "train" / "a").chmod(0)
    with pytest.raises(InputError, match="a: cannot be read"):
        data.load(str(pair))

"""Pictures as they come: every mode, turned, broken, of several sizes, behind links, with and without classes."""

import struct
from types import SimpleNamespace

import numpy as np
import PIL.Image
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


def read_array(path):
    return np.asarray(pictures.rgb(str(path))).astype(int)


def test_each_mode_is_read_as_rgb_on_white(picture, tmp_path):
    """Against Pillow's own conversion and, where it is transparent, against the arithmetic in float64."""
    colours, grey = np.asarray(picture), picture.convert("L")
    palette = picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    alpha = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1))
    mask = PIL.Image.fromarray(alpha)
    key = tuple(int(x) for x in colours[5, 5])
    rgba, la = PIL.Image.merge("RGBA", (*picture.split(), mask)), PIL.Image.merge("LA", (grey, mask))
    files = {
        "Zürich 東京.png": (picture, {}, picture, 255),
        "palette.gif": (palette, {}, palette, 255),
        "two.png": (picture.convert("1"), {}, picture.convert("1"), 255),
        "deep.png": (PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}, grey, 255),
        "rgba.png": (rgba, {}, picture, alpha),
        "la.png": (la, {}, grey, alpha),
        "bytes.png": (palette, {"transparency": bytes(range(256))}, palette, np.asarray(palette)),
        "index.gif": (palette, {"transparency": 3}, palette, 255 * (np.asarray(palette) != 3)),
        "key.png": (picture, {"transparency": key}, picture, 255 * (colours != key).any(2)),
    }
    for name, (stored, arguments, seen, opacity) in files.items():
        stored.save(tmp_path / name, **arguments)
        part = np.broadcast_to(opacity, (24, 32))[..., None] / 255
        meant = np.rint(part * np.asarray(seen.convert("RGB")) + (1 - part) * 255)
        assert np.array_equal(read_array(tmp_path / name), meant), name
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert abs(read_array(tmp_path / "cmyk.jpg") - colours).mean() < 6


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
        for name in ("packed.tiff", "plain.tiff", "some.png"):
            packing = {"compression": "tiff_lzw"} if name == "packed.tiff" else {}
            stored.save(tmp_path / name, exif=exif, **packing)
            assert np.array_equal(read_array(tmp_path / name), meant), (orientation, name)


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
        assert read.mean == pytest.approx([values.mean()] * 3, abs=1e-3)


def test_what_is_refused(tmp_path):
    """Numbers of an unknown range, a cut file, a huge one, and an EPS called jpg, for which Pillow runs Ghostscript."""
    huge = struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 99999, 99999, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "huge.bmp").write_bytes(b"BM" + huge)
    PIL.Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "fractions.tiff")
    PIL.Image.fromarray(np.zeros((4, 4), np.int32)).save(tmp_path / "int32.tiff")
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-60])
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    reasons = {"fractions.tiff": "fractions or 32 bits", "int32.tiff": "fractions or 32 bits", "cut.jpg": "truncated"}
    reasons |= {"huge.bmp": "exceeds limit", "eps.jpg": r"cannot identify image file\)"}
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=rf"{name}: not a picture that can be read \(.*{reason}"):
            pictures.rgb(str(tmp_path / name))


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


def test_several_sizes_stay_in_files(crowd, monkeypatch):
    """Whoever reads them. Mean, std and size are those of SAMPLE pictures, or of all where there are fewer."""
    read, by_two = data.load(str(crowd), workers=0), data.load(str(crowd), workers=2)
    assert read.classes == ("a b", "ü") and isinstance(read.train.images, Files)
    assert len(read.test.labels) == 8 and read.size == 40 and read.stem == "imagenet"
    pixels = np.concatenate([read_array(path).reshape(-1, 3) for path in read.train.images.paths]) / 255
    assert read.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-4)
    assert read.std == by_two.std == pytest.approx(pixels.std(0).tolist(), abs=1e-4)
    first, same = (next(data.batches(each.train, 40, 4, 0, [1]))[0] for each in (read, by_two))
    assert torch.equal(first, same)
    monkeypatch.setattr(sources, "SAMPLE", 3)
    some, again = data.load(str(crowd), workers=0), data.load(str(crowd), workers=0)
    assert some.std == again.std != read.std and len(some.train.labels) == 16


def test_workers_read_a_set_into_memory_as_one_process_does(folder, monkeypatch):
    several, alone = data.load(str(folder), workers=2), data.load(str(folder), workers=0)
    assert torch.equal(several.train.images, alone.train.images) and several.mean == alone.mean
    monkeypatch.setattr(sources, "MEMORY", 66 * 32 * 32 * 3 - 1)
    in_files = data.load(str(folder), workers=0)
    assert isinstance(in_files.train.images, Files) and (in_files.mean, in_files.std) == (alone.mean, alone.std)


def test_fewer_workers_where_shared_memory_is_small(crowd, monkeypatch, capsys):
    """One for each 512 MB, none in Docker's 64 MB; a number that was chosen holds."""
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.setattr(pictures.os.path, "ismount", lambda _: True)
    for free, n in ((2**40, 8), (2**31, 4), (64e6, 0)):
        monkeypatch.setattr(pictures.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert pictures.fitting_workers() == n
        assert capsys.readouterr().err.count("/dev/shm is small: ") == (n < 8)
    for chosen, n in ((None, 0), (3, 3)):
        read = data.load(str(crowd), workers=chosen)
        assert read.train.rows(torch.arange(2)).images.workers == n
        assert capsys.readouterr().err.count("/dev/shm is small: ") == (chosen is None)


def test_broken_pictures_stop_the_run_or_are_skipped(command, crowd, picture, tmp_path):
    whole = (crowd / "train" / "a b" / "0.png").read_bytes()
    (crowd / "train" / "a b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY)
    assert code == 2 and rows == [] and not (tmp_path / "run").exists()
    assert "a b/cut.png: not a picture" in err.splitlines()[-1]
    assert err.endswith("; mend or remove it, or leave it out by --skip_broken of pretrain.py or a judge\n")
    for i in range(10):
        (crowd / "test" / "ü" / f"empty{i}.png").write_bytes(b"")
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY, "--skip_broken")
    assert code == 0 and "representations" in [row.get("of") for row in rows]
    assert "skipped 11 of 35 pictures" in err and err.count(": not a picture that can be read") == 10
    assert f"dataset {crowd}: 2 classes, 16 pictures to train on, 8 to judge by; left out: 1 named *.txt\n" in err
    assert "not the images of the training" not in command(knn_eval, "run/ckpt.safetensors", "--k", 3)[2]
    picture.rotate(90).point(lambda x: 255 - x).save(crowd / "train" / "ü" / "0.png")
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 0 and rows and err.count(f"dataset {crowd}: not the images of the training") == 1
    for path in (crowd / "test" / "a b").iterdir():
        path.write_bytes(b"")
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY[:-1], "other", "--skip_broken")
    assert code == 2 and rows == [] and "no picture that can be read in class a b; 2 classes" in err
    crowd.rename(tmp_path / "moved")
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 2 and "the checkpoint was trained on it; --dataset says where it is now" in err


def test_what_is_left_out_is_counted(pair, picture, capsys):
    """One line: what others leave in a folder is no picture, and what the suffix leaves out is named."""
    for place in ("train/__MACOSX", "train/a/.ipynb_checkpoints", "train/a/deep/@eaDir", "val", "masks"):
        (pair / place).mkdir(parents=True)
    for name in ("train/stray.png", "train/a/deep/1.jfif", "train/a/deep/2.avif", "train/a/deep/@eaDir/0.jpg"):
        picture.save(pair / name)
    for name in ("raw.heic", "raw2.HEIC", "README", ".DS_Store", "._0.png"):
        (pair / "train" / "a" / name).write_bytes(b"not for us")
    (pair / "train" / "gone").symlink_to(pair / "nowhere")  # a class, on another disk
    assert len(data.load(str(pair)).train.labels) == 4
    line = "2 classes, 4 pictures to train on, 2 to judge by; left out: 5 hidden, 2 named *.heic, "
    line += f"1 linked to nothing ({pair}/train/gone), 1 beside the folders of the classes, 1 without a suffix, "
    line += "1 folder masks/, 1 folder val/"
    assert capsys.readouterr().err == f"dataset {pair}: {line}\n"
    (pair / "train" / "a" / "gone.png").symlink_to(pair / "nowhere.png")
    with pytest.raises(
        InputError, match=r"gone.png: not a picture that can be read \(No such file or directory\); mend"
    ):
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
    assert "left out: 1 hidden, 1 linked to a folder above\n" in told and "twice" not in told
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
    for name, other in (("u\u0308", "\u00fc"), ("cat", "cat ")):
        (next((pair / "train").glob("[!a]*"))).rename(pair / "train" / name)
        (next((pair / "test").glob("[!a]*"))).rename(pair / "test" / other)
        with pytest.raises(InputError) as e:
            data.load(str(pair))
        assert f"{name!a} in train alone, {other!a} in test alone" in str(e.value)


def test_pictures_without_classes_train_and_are_not_judged(command, picture, tmp_path):
    (tmp_path / "heap" / "below").mkdir(parents=True)
    for i in range(8):
        picture.save(tmp_path / "heap" / ("below" if i % 2 else ".") / f"{i}.png")
    code, rows, err = command(pretrain, "--dataset", "heap", *TINY)
    assert code == 0 and [row.get("of") for row in rows] == [None, None], err
    assert "heap: 0 classes, 8 pictures to train on, 0 to judge by; left out: nothing (nothing is judged: " in err
    code, rows, err = command(knn_eval, "run/ckpt.safetensors")
    assert code == 2 and rows == [] and "dataset heap: heap/train is no folder of two or more classes; train/" in err


def test_a_part_without_classes_is_named(pair, capsys):
    """The pictures of a contest's test/ have no classes; ImageNet's val/ has none as it is downloaded."""
    (pair / "test").rename(pair / "val")
    (pair / "test" / "unknown").mkdir(parents=True)
    assert len(data.load(str(pair)).test.labels) == 2  # of val/
    assert "1 folder test/" in capsys.readouterr().err
    for label in ("a", "b"):
        (pair / "val" / label / "0.png").rename(pair / "val" / f"{label}.png")
        (pair / "val" / label).rmdir()
    with pytest.raises(InputError, match=r"imagenet: --data_dir .*/val is no folder of two or more classes; train/"):
        data.load("imagenet", str(pair))
    (pair / "test" / "unknown").rmdir()
    assert len(data.load(str(pair), pretraining=True).train.labels) == 2
    assert "nothing is judged" in capsys.readouterr().err

"""Pictures as they come: every mode, turned, broken, of several sizes, behind links, with and without classes."""

import os
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import data
from knn_eval import knn_eval
from lib import pictures, surveys
from lib.errors import InputError
from lib.files import write_whole
from lib.pictures import Files
from lib.sources import pixel_statistics
from pretrain import pretrain

TINY = "--stem imagenet --hidden_dim 8 --out_dim 4 --batch_size 4 --epochs 1 --out run".split()


@pytest.fixture(scope="module")
def picture(photos):
    """One photograph's patch, 24 pixels high and 32 wide."""
    return to_pil_image(photos.train.images[0][:, :24])


def test_each_mode_is_read_as_rgb(picture, tmp_path):
    """Against the picture itself, or its grey values, as Pillow makes them from 8 bits."""
    grey = np.asarray(picture.convert("L"))
    palette = picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    files = {
        "rgb.png": (picture, picture),
        "grey.png": (picture.convert("L"), picture.convert("L")),
        "opaque.png": (picture.convert("RGBA"), picture),
        "grey and opaque.png": (picture.convert("LA"), picture.convert("L")),
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
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    off = pictures.read(str(tmp_path / "cmyk.jpg")).permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)
    assert abs(off).mean() < 6
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = picture.transpose(PIL.Image.Transpose.ROTATE_270)
    assert np.array_equal(pictures.read(str(tmp_path / "turned.png")).permute(1, 2, 0), np.asarray(upright))


def on_white(colours, alpha):
    """Return what is seen of colours (h, w, 3) with alpha (h, w) on a white ground."""
    opacity = alpha[..., None] / 255
    return np.rint(opacity * colours + (1 - opacity) * 255)


def read_array(path):
    return pictures.read(str(path)).permute(1, 2, 0).numpy().astype(int)


def test_what_is_transparent_is_white(picture, tmp_path):
    """In every mode that has transparency, against the arithmetic in float64."""
    grey, colours = np.asarray(picture.convert("L")), np.asarray(picture)
    alpha = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1))
    alpha[0], alpha[1] = 0, 255
    mask = PIL.Image.fromarray(alpha)
    palette = picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    index, seen = np.asarray(palette), np.asarray(palette.convert("RGB"))
    grey_colours = np.stack([grey] * 3, 2)
    rgba = PIL.Image.merge("RGBA", (*picture.split(), mask))
    key = tuple(int(x) for x in colours[5, 5])
    cases = {
        "rgba.png": (rgba, {}, on_white(colours, alpha)),
        "rgba.webp": (rgba, {"lossless": True, "exact": True}, on_white(colours, alpha)),
        "rgba.tiff": (rgba, {}, on_white(colours, alpha)),
        "la.png": (PIL.Image.merge("LA", (picture.convert("L"), mask)), {}, on_white(grey_colours, alpha)),
        "bytes.png": (palette, {"transparency": bytes(range(256))}, on_white(seen, index)),
        "index.png": (palette, {"transparency": 3}, on_white(seen, 255 * (index != 3))),
        "index.gif": (palette, {"transparency": 3}, on_white(seen, 255 * (index != 3))),
        "rgb key.png": (picture, {"transparency": key}, on_white(colours, 255 * (colours != key).any(2))),
        "grey key.png": (
            picture.convert("L"),
            {"transparency": int(grey[5, 5])},
            on_white(grey_colours, 255 * (grey != grey[5, 5])),
        ),
        "deep key.png": (
            PIL.Image.fromarray(grey.astype(np.uint16) * 257),
            {"transparency": int(grey[5, 5]) * 257},
            on_white(grey_colours, 255 * (grey != grey[5, 5])),
        ),
        "two key.png": (picture.convert("1"), {"transparency": 0}, np.full_like(colours, 255)),
    }
    for name, (stored, arguments, meant) in cases.items():
        stored.save(tmp_path / name, **arguments)
        assert np.array_equal(read_array(tmp_path / name), meant), name


def test_premultiplied_grey_is_on_white(picture, tmp_path):
    alpha = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1))
    grey = picture.convert("L")
    premultiplied = PIL.Image.merge("LA", (grey, PIL.Image.fromarray(alpha))).convert("La")
    path = tmp_path / "la.tiff"
    PIL.Image.frombytes("LA", picture.size, premultiplied.tobytes()).save(path)
    content, entry = path.read_bytes(), struct.pack("<HHIH", 338, 3, 1, 2)  # ExtraSamples 2: as it is
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHIH", 338, 3, 1, 1)))  # 1: premultiplied
    try:
        mode = PIL.Image.open(path).mode
    except PIL.UnidentifiedImageError:
        pytest.skip("this version of Pillow does not open premultiplied grey")
    assert mode == "La"
    expected = on_white(np.stack([np.asarray(grey)] * 3, 2), alpha)
    assert abs(read_array(path) - expected).max() <= 1


def png(width, depth, colour_type, row, key):
    """Make a PNG of one row, with a transparent key, as Pillow writes none."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", key) + pixels + chunk(b"IEND", b"")


def test_a_key_counts_in_the_bits_of_its_file(tmp_path):
    cases = [
        (png(4, 2, 0, bytes([0b00011011]), struct.pack(">H", 1)), [0, 255, 170, 255]),
        (png(4, 4, 0, bytes([0x01, 0x2F]), struct.pack(">H", 2)), [0, 17, 255, 255]),
        (png(2, 16, 2, struct.pack(">6H", *[1000] * 3, *[2000] * 3), struct.pack(">3H", *[1000] * 3)), [255, 7]),
    ]
    for content, meant in cases:
        (tmp_path / "key.png").write_bytes(content)
        assert pictures.read(str(tmp_path / "key.png"))[0, 0].tolist() == meant


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
@pytest.mark.parametrize("name", ["some.tiff", "some.png", "some.webp", "packed.tiff"])
def test_turned_pictures_are_upright_and_so_is_their_size(picture, name, mode, tmp_path):
    """Turned in each way that EXIF knows; Pillow turns TIFFs itself, and those that it maps into memory wrongly."""
    grey = np.asarray(picture.convert("L"))
    deep = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    stored = deep if mode == "I;16" else picture.convert(mode)
    pixels = np.asarray(picture) if mode.startswith("RGB") else np.stack([grey] * 3, 2)
    if mode == "I;16" and name == "some.webp":
        pytest.skip("WebP has 8 bits")
    upright = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]]
    upright += [x.swapaxes(0, 1) for x in (upright[0], upright[3], upright[2], upright[1])]
    arguments = {"lossless": True} if name.endswith("webp") else {}
    arguments |= {"compression": "tiff_lzw"} if name == "packed.tiff" else {}
    for orientation, meant in enumerate(upright, 1):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / name, exif=exif, **arguments)
        assert np.array_equal(read_array(tmp_path / name), meant), orientation
        assert pictures.survey(str(tmp_path / name))[:2] == meant.shape[:2]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_bits_of_a_camera_in_16_become_8(picture, bits, tmp_path):
    """One white for all pictures of a folder: by its own highest value a dark one would become bright."""
    grey = np.asarray(picture.convert("L").resize((32, 32)))
    white = 2**bits - 1
    bright = np.rint(grey / grey.max() * white).astype(np.uint16)
    dark = bright // 64
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            PIL.Image.fromarray(bright).save(tmp_path / part / label / "bright.png")
            PIL.Image.fromarray(dark).save(tmp_path / part / label / "dark.tiff")
    for width in (32, 30):  # in memory, and with another size in files
        PIL.Image.fromarray(dark[:, :width]).save(tmp_path / "train" / "a" / "dark.tiff")
        read = data.load(str(tmp_path))
        (view,) = data.evaluation_views(read.train, 32, 1, (0, 0, 0), (1, 1, 1))
        for image, values in zip(view, (bright, dark[:, :width], bright, dark)):
            if values.shape == (32, 32):
                assert abs(image * 255 - torch.from_numpy(values * (255 / white))).max() <= 0.5 + 1e-4
    values = np.concatenate([x.ravel() for x in (bright, dark[:, :30], bright, dark)]) / white
    assert read.mean == pytest.approx([values.mean()] * 3, abs=1e-4)
    assert read.std == pytest.approx([values.std()] * 3, abs=1e-4)


@pytest.mark.parametrize("highest", [255, 4095, 65535])
def test_pgm_of_any_depth(picture, highest, tmp_path):
    """A PGM says itself what its white is: a dark one stays dark."""
    grey = np.asarray(picture.convert("L")) // 20
    values = np.rint(grey / 255 * highest).astype(">u2" if highest > 255 else "u1")
    (tmp_path / "some.pgm").write_bytes(b"P5 32 24 %d\n" % highest + values.tobytes())
    assert np.array_equal(read_array(tmp_path / "some.pgm"), np.stack([grey] * 3, 2))


def test_numbers_of_an_unknown_range_are_refused_for_it(tmp_path):
    for values, reason in (
        (np.zeros((4, 4), np.float32), "fractions"),
        (np.zeros((4, 4), np.int32), "32 bits a pixel, or negative ones"),
    ):
        PIL.Image.fromarray(values).save(tmp_path / "some.tiff")
        with pytest.raises(InputError, match=rf"some\.tiff: not a picture that can be read \({reason}"):
            pictures.read(str(tmp_path / "some.tiff"))


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
        assert pictures.survey(str(path))[:2] == meant.shape[:2]
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


def test_workers_are_as_many_as_shared_memory_holds(monkeypatch, capsys):
    """64 MB, half of it: two batches for each worker and two in use; the bytes are those of a batch as it comes."""
    monkeypatch.setattr(pictures.processes, "cores", lambda: 8)
    monkeypatch.setattr(pictures, "free_shared_memory", lambda: 64e6)
    pictures._tell_of_small_memory.cache_clear()
    sizes = (1e5, 1.7e6, 3.2e6, 5e6, 8.1e6, 77e6)
    assert [pictures.workers_for(size) for size in (*sizes, 77e6)] == [8, 8, 4, 2, 0, 0, 0]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and "/dev/shm is small: 0 processes" in told[2] and "--workers" in told[2]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert pictures.workers_for(1e6) == 3
    monkeypatch.setattr(pictures, "free_shared_memory", lambda: float("inf"))
    assert pictures.workers_for(77e6) == 8


def test_bytes_of_a_batch(crowd):
    images = data.load(str(crowd)).train.images
    u = np.full((2, data.DRAWS_PER_IMAGE), 0.5, np.float32)
    for kind, keys in (
        (pictures.Crops(images, 24), [(0, u), (1, u), (2, u)]),
        (pictures.Centres(images, 24, 0.875), range(3)),
    ):
        assert kind.bytes_of(keys) == sum(kind[key].nbytes for key in keys)


def test_no_worker_and_two_read_the_same(command, crowd, monkeypatch):
    """A number that was chosen holds where memory is small, too; each run reads by as many as it says."""
    monkeypatch.setattr(pictures, "free_shared_memory", lambda: 0)
    used = []

    class Loader(pictures.DataLoader):
        def __init__(self, *args, num_workers, **rest):
            if "batch_sampler" in rest:  # not to look at pictures before the first step
                used.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **rest)

    monkeypatch.setattr(pictures, "DataLoader", Loader)
    flags = "--model test_resnet --hidden_dim 32 --out_dim 16 --batch_size 4 --epochs 1".split()
    losses = []
    for n in (None, 0, 2):
        used.clear()
        chosen = [] if n is None else ["--workers", n]
        code, rows, err = command(pretrain, "--dataset", crowd, *flags, "--out", f"by{n}", *chosen)
        assert code == 0 and {*used} == {n or 0} and ("is small" in err) == (n is None), err
        losses.append([row["loss"] for row in rows if "loss" in row])
        pictures._tell_of_small_memory.cache_clear()
    assert losses[0] == losses[1] == losses[2] != []
    used.clear()
    code, _, err = command(knn_eval, "by0/ckpt.safetensors", "--workers", 1, "--k", 2)
    assert code == 0 and {*used} == {1}, err
    pictures.choose_workers(None)


def test_a_worker_that_dies_ends_a_run_with_one_line(command, crowd, monkeypatch):
    """As one does that shared memory is too small for: by SIGBUS, in the middle of a run."""

    def die(self, key):
        os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr(pictures.Crops, "__getitem__", die)
    monkeypatch.setattr("lib.cli.time.sleep", lambda _: None)
    code, _, err = command(
        pretrain, "--dataset", crowd, "--model", "test_resnet", "--batch_size", 4, "--epochs", 1, "--workers", 1
    )
    pictures.choose_workers(None)
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("pretrain.py: a process that reads pictures has died")
    assert "--workers" in err.splitlines()[-1]


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
    assert code == 0 and "representations" in [row.get("of") for row in rows]
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
        (["--eval_every", 1], "--eval_every 1: heap has fewer than two classes"),
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


def test_what_is_left_out_is_counted(picture, tmp_path, capsys):
    """One line: what others leave in a folder is no picture, and what the suffix leaves out is named."""
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label / ".ipynb_checkpoints").mkdir(parents=True)
            picture.save(tmp_path / part / label / "0.png")
            picture.save(tmp_path / part / label / "1.jfif", "JPEG")
            picture.save(tmp_path / part / label / "2.AVIF", "AVIF")
            picture.save(tmp_path / part / label / ".ipynb_checkpoints" / "0-checkpoint.png")
            (tmp_path / part / label / "._0.png").write_bytes(b"Mac OS X")
    places = ("train/__MACOSX", "train/.Trash-1000", "train/a/deep/@eaDir", "val", "masks")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
    picture.save(tmp_path / "train" / ".Trash-1000" / "0.png")
    picture.save(tmp_path / "train" / "a" / "deep" / "@eaDir" / "0.jpg")
    picture.save(tmp_path / "train" / "stray.png")
    (tmp_path / "train" / "__MACOSX" / "._0.png").write_bytes(b"Mac OS X")
    for name in ("raw.heic", "raw2.HEIC", "README", ".DS_Store"):
        (tmp_path / "train" / "a" / name).write_bytes(b"not for us")
    read = data.load(str(tmp_path))
    assert read.classes == ("a", "b") and len(read.train.labels) == len(read.test.labels) == 6
    line = "2 classes, 6 pictures to train on, 6 to judge by; left out: 7 in hidden folders, 4 hidden, 2 named *.heic, "
    line += "1 beside the folders of the classes, 1 without a suffix; folders that are not used: masks, val"
    assert capsys.readouterr().err == f"dataset {tmp_path}: {line}\n"
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "c" / "raw.heic").write_bytes(b"not for us")
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(InputError, match=r"train/c: holds no picture \(left out: 1 named \*\.heic\)"):
        data.load(str(tmp_path))


def test_a_hidden_link_to_a_class_hides_it_not(crowd):
    (crowd / "train" / "ü" / ".0").symlink_to(crowd / "train" / "ü" / "more")
    (crowd / "train" / "ü" / "more").mkdir()
    (crowd / "train" / "ü" / "0.png").rename(crowd / "train" / "ü" / "more" / "0.png")
    assert len(pictures.find(crowd / "train" / "ü")) == 8 + 8


def shapes_on_nothing(root, n, draw):
    """Make a folder of two classes with n pictures of 16x16 that `draw` changes, transparent at first."""
    for part in ("train", "test"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = np.zeros((16, 16, 4), np.uint8)
                draw(pixels, i)
                PIL.Image.fromarray(pixels).save(root / part / label / f"{i}.png")
    return str(root)


def test_odd_pictures_are_told_once(tmp_path, capsys):
    """Black shapes on a transparent ground were all black; at other places they are not alike."""

    def bar(pixels, i):
        pixels[:, i, 3] = 255

    shapes = shapes_on_nothing(tmp_path / "shapes", 4, bar)
    for _ in range(2):  # by the files, and by what is kept of them
        read = data.load(shapes)
        assert read.train.images.amin((1, 2, 3)).tolist() == [0] * 8
        assert read.mean == (0.9375, 0.9375, 0.9375)  # 15 of 16 columns are white
        _, line = capsys.readouterr().err.splitlines()
        assert line == f"dataset {shapes}: 16 of 16 pictures are transparent in places, which become white"
    same = shapes_on_nothing(tmp_path / "same", 3, lambda pixels, i: bar(pixels, 0))
    data.load(same)
    assert capsys.readouterr().err.endswith(f"dataset {same}: the 6 pictures to train on are all alike\n")

    def fill(pixels, i):
        pixels[..., :3], pixels[..., 3] = 50 * i, 255
        pixels[0, 0, :3] += i == 1  # nearly one colour

    flat = shapes_on_nothing(tmp_path / "flat", 2, fill)
    data.load(flat)
    _, line = capsys.readouterr().err.splitlines()
    assert line == f"dataset {flat}: 8 of 8 pictures are of one colour, or nearly so, as {flat}/train/a/0.png"


def test_a_part_without_classes_is_named(picture, tmp_path, capsys):
    """The pictures of a contest's test/ have no classes; ImageNet's val/ has none as it is downloaded."""
    for place in ("train/a", "train/b", "val/a", "val/b", "test"):
        (tmp_path / place).mkdir(parents=True)
        picture.save(tmp_path / place / "0.png")
    read = data.load(str(tmp_path))
    assert read.classes == ("a", "b") and len(read.test.labels) == 2
    assert "folders that are not used: test" in capsys.readouterr().err
    (tmp_path / "test" / "unknown").mkdir()
    picture.save(tmp_path / "test" / "unknown" / "0.png")
    assert len(data.load(str(tmp_path)).test.labels) == 2
    shutil.rmtree(tmp_path / "test")
    for label in ("a", "b"):
        (tmp_path / "val" / label / "0.png").rename(tmp_path / "val" / f"{label}.png")
        (tmp_path / "val" / label).rmdir()
    reason = f"{tmp_path}/val holds 2 pictures and no sub-folders; sort them by their classes; train/ and"
    for arguments in ((str(tmp_path),), ("imagenet", str(tmp_path))):
        with pytest.raises(InputError) as e:
            data.load(*arguments)
        assert f"{reason} {'test/ or ' * (len(arguments) == 1)}val/ must hold a sub-folder" in str(e.value)
    assert len(data.load(str(tmp_path), pretraining=True).train.labels) == 2
    assert f"2 pictures to train on, none to judge by ({reason}" in capsys.readouterr().err


def counted(monkeypatch):
    """Count the pictures that are surveyed from here on."""
    paths = []

    def survey(path, true_survey=pictures.survey):
        paths.append(path)
        return true_survey(path)

    monkeypatch.setattr(surveys, "survey", survey)
    monkeypatch.setattr(surveys, "workers", lambda: 0)
    return paths


def test_a_survey_is_done_once(crowd, picture, monkeypatch, tmp_path):
    """By path, size and time of change: of the picture that changed, and of one that is new, it is done again."""
    looked_at = counted(monkeypatch)
    (crowd / "train" / "ü" / "loop").unlink()
    first = data.load(str(crowd))
    assert len(looked_at) == len(first.train.labels) + len(first.test.labels) == 24
    again = data.load(str(crowd), pretraining=True)
    assert len(looked_at) == 24
    assert (again.mean, again.std, again.size) == (first.mean, first.std, first.size)
    changed = crowd / "train" / "a b" / "0.png"
    picture.rotate(90).point(lambda x: 255 - x).save(changed)
    picture.save(crowd / "test" / "a b" / "new.png")
    changed_set = data.load(str(crowd))
    assert looked_at[24:] == [str(changed), str(crowd / "test" / "a b" / "new.png")]
    assert changed_set.mean != first.mean
    crowd.rename(tmp_path / "moved")  # what is kept goes with it
    monkeypatch.chdir(tmp_path / "moved")
    for place in (".", tmp_path / "moved"):
        assert data.load(str(place)).mean == changed_set.mean
    assert len(looked_at) == 26


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", b"no picture" * 100])
def test_a_damaged_file_of_surveys_is_made_again(crowd, content, monkeypatch):
    looked_at = counted(monkeypatch)
    data.load(str(crowd))
    whole = (crowd / surveys.FILE).read_bytes()
    (crowd / surveys.FILE).write_bytes(content)
    data.load(str(crowd))
    assert len(looked_at) == 64 and (crowd / surveys.FILE).read_bytes() == whole


def test_surveys_of_a_folder_that_is_read_only_are_kept_elsewhere(crowd, monkeypatch, tmp_path):
    """In the user's cache; without one each start looks again."""

    def refuse(path):
        if path.is_relative_to(crowd) or not (tmp_path / "cache").exists():
            raise InputError(f"{path}: cannot be written (Read-only file system)")
        return write_whole(path)

    looked_at = counted(monkeypatch)
    monkeypatch.setattr(surveys, "write_whole", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place, n in ((tmp_path / "away", 32), (tmp_path / "cache", 64), (tmp_path / "cache", 64)):
        place.mkdir(exist_ok=True)
        data.load(str(crowd))
        assert len(looked_at) == n, place
        shutil.rmtree(tmp_path / "cache") if place.name == "away" else None
    assert not (crowd / surveys.FILE).exists()


def test_a_survey_that_a_broken_picture_ends_is_kept(crowd, monkeypatch):
    looked_at = counted(monkeypatch)
    (crowd / "test" / "ü" / "9.png").write_bytes(b"")
    for n in (33, 34):
        with pytest.raises(InputError, match=r"9\.png: not a picture"):
            data.load(str(crowd))
        assert len(looked_at) == n


def test_a_survey_that_ends_early_keeps_what_is_known_of_the_rest(crowd, monkeypatch):
    """A picture of the first part breaks, after all were surveyed."""
    looked_at = counted(monkeypatch)
    data.load(str(crowd))
    broken = crowd / "train" / "ü" / "9.png"
    shutil.copy(crowd / "train" / "ü" / "0.png", crowd / "train" / "ü" / "8.png")  # something new, before it
    broken.write_bytes(b"")
    with pytest.raises(InputError, match=r"9\.png: not a picture"):
        data.load(str(crowd))
    broken.unlink()
    before = len(looked_at)
    data.load(str(crowd))
    assert len(looked_at) == before  # none of test, though it had not been reached


def test_workers_survey_as_the_process_itself_does(crowd, monkeypatch):
    alone = data.load(str(crowd))
    (crowd / surveys.FILE).unlink()
    monkeypatch.setattr(surveys, "PICTURES_A_WORKER", 4)
    monkeypatch.setattr(surveys, "workers", lambda: 2)
    several = data.load(str(crowd))
    assert (several.mean, several.std, several.size) == (alone.mean, alone.std, alone.size)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
@pytest.mark.parametrize("kind", ["RGB", "I;16"])
def test_a_large_picture_is_surveyed_in_little_memory(kind, tmp_path):
    """24 megapixels: Pillow holds 96 MB of colours. Float64 of all pixels and their squares took 1.2 GB."""
    PIL.Image.new(kind, (6000, 4000), 99).save(tmp_path / "large.png", compress_level=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = peak_mb()
    answer = pictures.survey(str(tmp_path / "large.png"))
    assert peak_mb() - before < 250
    assert answer[:2] == (4000, 6000) and answer[2].max() == 99 * 6000 * 4000


def peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def exif(*entries):
    """The bytes of an EXIF block with these tags (tag, type, count, value of four bytes)."""
    packed = b"".join(struct.pack("<HHI4s", tag, kind, count, value) for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


@pytest.mark.parametrize("tag", [(0x011A, 2, 3, b"72\0"), (0x0213, 4, 1, struct.pack("<I", 65537))])
def test_an_odd_tag_does_not_keep_a_picture_from_being_turned(picture, tmp_path, tag):
    """A resolution that is a text, a position out of range: scanners and phones write such; Pillow rewrites them."""
    turned = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
    picture.save(tmp_path / "odd.jpg", exif=exif(turned, tag))
    picture.save(tmp_path / "plain.jpg", exif=exif(turned))
    assert torch.equal(pictures.read(str(tmp_path / "odd.jpg")), pictures.read(str(tmp_path / "plain.jpg")))
    assert str(pictures.survey(str(tmp_path / "odd.jpg"))) == str(pictures.survey(str(tmp_path / "plain.jpg")))


def test_no_other_program_reads_a_picture(tmp_path):
    """An EPS called jpg would make Pillow run Ghostscript."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(InputError, match=r"a.jpg: not a picture that can be read .cannot identify image file"):
        pictures.read(str(tmp_path / "a.jpg"))


def test_the_white_of_a_tiff_may_be_its_0(tmp_path):
    """As scanners and X-ray software write it; Pillow inverts such files of 8 bits alone."""
    values = np.array([[0, 30_000], [60_000, 65_535]], np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "black.tif")
    content = (tmp_path / "black.tif").read_bytes()
    black_is_0 = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert content.count(black_is_0) == 1
    (tmp_path / "white.tif").write_bytes(content.replace(black_is_0, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    black, white = (pictures.read(str(tmp_path / f"{name}.tif"))[0].int() for name in ("black", "white"))
    assert black.flatten().tolist() == [0, 117, 233, 255] and white.flatten().tolist() == [255, 138, 22, 0]


def test_a_set_that_is_not_the_trainings_is_told(command, crowd, picture, tmp_path):
    assert command(pretrain, "--dataset", crowd, *TINY)[0] == 0
    assert "not the images of the training" not in command(knn_eval, "run/ckpt.safetensors", "--k", 3)[2]
    picture.rotate(90).point(lambda x: 255 - x).save(next((crowd / "train").glob("*/0.png")))
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 0 and rows and err.count(f"dataset {crowd}: not the images of the training") == 1
    crowd.rename(tmp_path / "moved")
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 3)
    assert code == 2 and rows == [] and err.count("\n") == 1
    assert "the checkpoint was trained on it; --dataset says where it is now" in err
    assert command(knn_eval, "run/ckpt.safetensors", "--k", 3, "--dataset", "moved")[0] == 0
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--dataset", "moved", "--data_dir", "moved")
    assert code == 2 and rows == [] and "--data_dir moved: has no effect with --dataset moved" in err


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


def test_pictures_of_several_sizes_have_floors(command, crowd):
    """Their views have one size. The floors of the run are those of the judge."""
    code, rows, err = command(pretrain, "--dataset", crowd, *TINY)
    floors = {row["of"]: row["top1"] for row in rows if row.get("of") in ("untrained", "pixels")}
    assert code == 0 and floors.keys() == {"untrained", "pixels"}, err
    code, rows, err = command(knn_eval, "run/ckpt.safetensors", "--k", 20)
    assert code == 0 and {row["of"]: row["top1"] for row in rows if row["of"] != "trained"} == floors, err

"""Data sets, their batches, and the views against torchvision's operations image by image."""

import math
import pickle
import shutil
import struct

import pytest
import skimage.data
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

import data

BICUBIC = InterpolationMode.BICUBIC
BOMB = b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 99999, 99999, 1, 24, 0, 0, 0, 0, 0, 0)  # a huge picture


def draws(n, seed=0):
    return torch.rand(n, sum(data.DRAWS), generator=torch.Generator().manual_seed(seed))


def test_photos(photos):
    again = data.load("photos")
    assert torch.equal(photos.train.images, again.train.images) and torch.equal(photos.test.images, again.test.images)
    assert photos.train.images.shape == (2000, 3, 32, 32) and photos.test.images.shape == (500, 3, 32, 32)
    assert photos.train.labels.bincount().tolist() == [200] * 10 and photos.test.labels.bincount().tolist() == [50] * 10
    pixels = photos.train.images.double() / 255
    assert photos.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert photos.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-4)


def test_no_pixel_is_in_both_splits_of_photos(monkeypatch):
    """Photographs of 0 in their left 70 % and 255 in the rest give training patches of 0 and test patches of 255."""
    for name in data.load("photos").classes:
        image = getattr(skimage.data, name)().copy()
        image[:, : int(0.7 * image.shape[1])], image[:, int(0.7 * image.shape[1]) :] = 0, 255
        monkeypatch.setattr(skimage.data, name, lambda image=image: image)
    marked = data.load("photos")
    assert marked.train.images.max() == 0 and marked.test.images.min() == 255


def test_a_folder_is_read_as_it_is(photos, folder):
    read = data.load(str(folder))
    expected = torch.cat([photos.train.images[photos.train.labels == c][:16] for c in range(3)])
    assert torch.equal(read.train.images, expected)
    assert (
        read.train.labels.tolist() == [0] * 16 + [1] * 16 + [2] * 16
        and read.test.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    )
    assert read.classes == photos.classes[:3] and read.stem == "cifar" and read.size == 32


@pytest.mark.parametrize(
    "break_it, culprit",
    [
        (lambda root: shutil.rmtree(root / "test"), "test"),
        (lambda root: shutil.rmtree(root / "train"), "train"),
        (lambda root: [shutil.rmtree(c) for c in (root / "train").iterdir()], "train"),
        (lambda root: [p.unlink() for p in (root / "train" / "brick").iterdir()], "brick"),
        (lambda root: shutil.rmtree(root / "test" / "brick"), "brick"),
        (
            lambda root: [shutil.rmtree(root / s / c) for s in ("train", "test") for c in ("brick", "chelsea")],
            "one class",
        ),
        (lambda root: (root / "train" / "brick" / "03.png").write_bytes(b"no picture"), "03.png"),
        (
            lambda root: (root / "test" / "brick" / "03.png").write_bytes(
                (root / "test/brick/02.png").read_bytes()[:300]
            ),
            "03.png",
        ),
        (lambda root: (root / "train" / "brick" / "03.bmp").write_bytes(BOMB), "03.bmp"),
        (
            lambda root: F.to_pil_image(torch.zeros(3, 9, 7, dtype=torch.uint8)).save(
                root / "test" / "brick" / "x.png"
            ),
            "7x9",
        ),
    ],
)
def test_a_broken_folder_is_refused(folder, tmp_path, break_it, culprit):
    root = tmp_path / "pictures"
    shutil.copytree(folder, root)
    break_it(root)
    with pytest.raises(data.DataError, match=culprit):
        data.load(str(root))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(data.DataError, match="did you mean photos"):
        data.load("photo")
    with pytest.raises(data.DataError, match="neither photos, cifar10 nor a folder"):
        data.load(str(tmp_path / "nowhere"))
    with pytest.raises(data.DataError, match="neither photos, cifar10 nor a folder"):
        data.load("x" * 5000)


def test_cifar10_without_network(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(data.DataError, match=r"cifar-10-batches-py.*--dataset photos"):
        data.load("cifar10", str(tmp_path / "some" / "data"))
    assert not (tmp_path / "some").exists()


def test_cifar10_in_its_format_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # md5 of the true files
    rows = torch.randint(256, (6, 4, 3 * 32 * 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "cifar-10-batches-py").mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {name: {"data": x.numpy(), "labels": [0, 3, 9, i]} for i, (name, x) in enumerate(zip(names, rows))}
    for name, content in {**files, "batches.meta": {"label_names": list("abcdefghij")}}.items():
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    read = data.load("cifar10", str(tmp_path))
    assert torch.equal(read.train.images, rows[:5].reshape(20, 3, 32, 32)) and read.train.images.is_contiguous()
    assert read.train.labels.tolist()[:8] == [0, 3, 9, 0, 0, 3, 9, 1] and read.test.labels.tolist() == [0, 3, 9, 5]
    assert (read.stem, read.size, read.mean) == ("cifar", 32, (0.4914, 0.4822, 0.4465))


def test_batches_are_functions_of_seed_and_epoch():
    split = data.Split(torch.arange(103, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2), torch.arange(103))

    def epoch(*args, **kwargs):
        return list(data.batches(split, 10, *args, **kwargs))

    labels = torch.cat([b[1] for b in epoch(0, 1)])
    assert len(epoch(0, 1)) == 10 and labels.unique().numel() == 100
    assert all(torch.equal(images[:, 0, 0, 0].long(), labels) for images, labels, _ in epoch(0, 1))
    assert sum(len(b[1]) for b in epoch(0, 1, drop_last=False)) == 103
    assert all(torch.equal(x, y) for a, b in zip(epoch(0, 1), epoch(0, 1)) for x, y in zip(a, b))
    for other in (epoch(0, 2), epoch(1, 1)):
        assert not torch.equal(torch.cat([b[1] for b in other]), labels)
        assert not torch.equal(other[0][2], epoch(0, 1)[0][2])
    for whole, left, right in zip(epoch(0, 1), epoch(0, 1, 0, 2), epoch(0, 1, 1, 2)):
        assert torch.equal(torch.cat([left[0], right[0]]), whole[0])
        assert torch.equal(torch.cat([left[2], right[2]], 1), whole[2])


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (48, 40, 32), (24, 64, 32), (20, 20, 32)])
def test_crop_flip_is_torchvisions_resized_crop(photos, height, width, size):
    images = F.resize(photos.train.images[::40], [height, width], antialias=True)
    u = draws(len(images))
    area, aspect, corner, flip = u.split(data.DRAWS, 1)[:4]
    boxes = torch.stack(data.crop_boxes(area, aspect, corner, height, width), 1).int().tolist()
    ours = data.crop_flip(images, u, size)
    for image, box, turned, mine in zip(images, boxes, flip < 0.5, ours):
        theirs = F.resized_crop(image / 255, *box, [size, size], BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(mine, F.horizontal_flip(theirs) if turned else theirs, rtol=0, atol=2e-6)


def test_crop_boxes_have_the_papers_distribution():
    u = draws(20_000)
    top, left, h, w = data.crop_boxes(*u.split(data.DRAWS, 1)[:3], 224, 224)
    area, ratio = h * w / 224**2, w / h
    assert area.min() > 0.078 and area.max() <= 1 and ratio.min() > 0.74 and ratio.max() < 1.35
    assert ratio.log().mean().abs() < 0.01  # logarithmic, so symmetric
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 224).all() and (left + w <= 224).all()
    small = area < 0.5  # there, nearly every try fits
    assert area[small].mean().item() == pytest.approx((0.08 + 0.5) / 2, abs=0.01)


def test_crop_of_a_picture_that_no_try_fits_is_its_centre():
    u = draws(50)
    area, aspect, corner = (x.clone() for x in u.split(data.DRAWS, 1)[:3])
    area[:] = 0.99
    top, left, h, w = data.crop_boxes(area, aspect, corner, 10, 100)
    assert (top == 0).all() and (h == 10).all() and (w == 13).all() and (left == 43).all()


@pytest.mark.parametrize(
    "name, low, high", [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)]
)
def test_colour_operations_are_torchvisions(photos, name, low, high):
    x = photos.train.images[::40] / 255
    x[0], x[1] = 0, x[1, :1]  # black, grey
    factor = torch.linspace(low, high, len(x))
    ours = getattr(data, name)(x, factor[:, None, None, None])
    theirs = torch.stack([getattr(F, f"adjust_{name}")(image, f.item()) for image, f in zip(x, factor)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


def test_recolour_composes_them_in_each_images_order(photos):
    x = photos.train.images[::20] / 255
    u = draws(len(x))
    ours = data.recolour(x.clone(), u)
    jitter, factors, order, grey = u.split(data.DRAWS, 1)[4:]
    assert 0.7 < (jitter < 0.8).float().mean() < 0.9 and 0.05 < (grey < 0.2).float().mean() < 0.35
    for image, f, turn, jittered, greyed, mine in zip(x, factors, order.argsort(1), jitter < 0.8, grey < 0.2, ours):
        values = (0.6 + 0.8 * f[0], 0.6 + 0.8 * f[1], 0.8 + 0.4 * f[2], -0.1 + 0.2 * f[3])
        for i in turn.tolist() if jittered else []:
            name = ("brightness", "contrast", "saturation", "hue")[i]
            image = getattr(F, f"adjust_{name}")(image, values[i].item())
        theirs = F.rgb_to_grayscale(image, 3) if greyed else image
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_two_views(photos):
    images = photos.train.images[:64]
    u = torch.stack([draws(64), draws(64, seed=1)])
    v1, v2 = data.two_views(images, u, 32, photos.mean, photos.std)
    again, _ = data.two_views(images, u, 32, photos.mean, photos.std)
    assert v1.shape == v2.shape == (64, 3, 32, 32) and torch.equal(v1, again) and not torch.equal(v1, v2)
    alone, _ = data.two_views(images[5:6], u[:, 5:6], 32, photos.mean, photos.std)
    torch.testing.assert_close(alone[0], v1[5], rtol=0, atol=1e-5)  # a view depends on its own image and draws alone
    lowest, highest = ((x - torch.tensor(photos.mean)) / torch.tensor(photos.std) for x in (0, 1))
    assert (v1.amin((0, 2, 3)) >= lowest - 1e-5).all() and (v1.amax((0, 2, 3)) <= highest + 1e-5).all()


def test_evaluation_view_is_that_of_the_appendix(photos):
    """28x28 from the centre, resized to 32x32, normalised; images of other shapes in proportion."""
    (ours,) = data.evaluation_views(photos.test.images[:7], 32, 28 / 32, photos.mean, photos.std)
    for image, mine in zip(photos.test.images, ours):
        x = F.resize(image[:, 2:30, 2:30] / 255, [32, 32], BICUBIC, antialias=True).clamp(0, 1)
        x = (x - torch.tensor(photos.mean)[:, None, None]) / torch.tensor(photos.std)[:, None, None]
        torch.testing.assert_close(mine, x, rtol=0, atol=1e-5)
    wide = torch.zeros(3, 3, 64, 96, dtype=torch.uint8)
    chunks = list(data.evaluation_views(wide, 32, 28 / 32, photos.mean, photos.std, batch_size=2))
    assert [c.shape for c in chunks] == [(2, 3, 32, 32), (1, 3, 32, 32)]


def test_pixel_statistics_of_one_colour_do_not_divide_by_zero():
    mean, std = data.pixel_statistics(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8))
    assert mean == (0.2, 0.2, 0.2) and all(math.isclose(s, 1 / 255, abs_tol=1e-4) for s in std)

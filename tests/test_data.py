"""Data sets, their splits, their batches and the evaluation view."""

import dataclasses
import math
import pickle
import shutil
from pathlib import Path

import PIL.Image
import pytest
import skimage.data
import torch
import torchvision
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

import data
from lib import augment, sources
from lib.errors import InputError

BICUBIC = InterpolationMode.BICUBIC


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
    assert read.train.labels.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert read.test.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert read.classes == photos.classes[:3] and read.stem == "cifar" and read.size == 32


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="did you mean photos"):
        data.load("photo")
    with pytest.raises(InputError, match="neither photos, cifar10, cifar100, stl10, imagenet nor a folder"):
        data.load("x" * 5000)


def test_cifar100_in_its_format_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # md5 of the true files
    rows = torch.randint(256, (6, 4, 3 * 32 * 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = {"data": rows[:5].flatten(0, 1).numpy(), "fine_labels": [0, 3, 9, 0, 0, 3, 9, 1] + [2] * 12}
    test = {"data": rows[5].numpy(), "fine_labels": [0, 3, 9, 5]}
    (tmp_path / "cifar-100-python").mkdir()
    for file, content in {"train": train, "test": test, "meta": {"fine_label_names": list("abcdefghij")}}.items():
        (tmp_path / "cifar-100-python" / file).write_bytes(pickle.dumps(content))
    read = data.load("cifar100", str(tmp_path), pretraining=True)
    assert torch.equal(read.train.images, rows[:5].reshape(20, 3, 32, 32)) and read.train.images.is_contiguous()
    assert read.train.labels.tolist()[:8] == [0, 3, 9, 0, 0, 3, 9, 1] and read.test.labels.tolist() == [0, 3, 9, 5]
    assert (read.stem, read.size, len(read.classes)) == ("cifar", 32, 10) and read.pretraining is read.train
    assert read.blur_p == read.solarise_p == (0, 0)


def test_cifar10_without_network(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(InputError, match=r"cifar-10-batches-py.*--dataset photos"):
        data.load("cifar10", str(tmp_path / "some" / "data"))


def test_downloads_take_turns(monkeypatch, tmp_path, capsys):
    """Two commands that torchvision's maker would let write the same file."""
    done = []

    def maker(root, train, download=False):
        print("Downloading")  # as torchvision does; standard output is for rows
        done.append((train, download))

    monkeypatch.setitem(sources.MAKERS, "cifar10", maker)
    monkeypatch.setattr(sources.files, "lock", lambda file, wait: done.append((Path(file.name).name, wait)))
    sources._downloaded("cifar10", tmp_path / "data", [{"train": True}, {"train": False}])
    assert done == [(".download.lock", True), (True, True), (False, True)]
    out, err = capsys.readouterr()
    assert out == "" and f"dataset cifar10: is downloaded to {tmp_path / 'data'}, once no other command" in err


def test_stl10_in_its_format_on_disk(monkeypatch, tmp_path):
    """Pixels lie column by column; labels count from 1."""
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    images = torch.randint(256, (9, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "class_names.txt").write_text("\n".join("abcdefghij"))
    parts = {"train": (images[:4], [1, 10, 2, 3]), "test": (images[4:6], [5, 1]), "unlabeled": (images[6:], [])}
    for part, (x, labels) in parts.items():
        (tmp_path / "stl10_binary" / f"{part}_X.bin").write_bytes(x.mT.contiguous().numpy().tobytes())
        if labels:
            (tmp_path / "stl10_binary" / f"{part}_y.bin").write_bytes(bytes(labels))
    read = data.load("stl10", str(tmp_path), pretraining=True)
    for split, x, labels in ((read.train, images[:4], [0, 9, 1, 2]), (read.test, images[4:6], [4, 0])):
        assert torch.equal(split.images, x) and split.labels.tolist() == labels
    assert torch.equal(read.pretraining.images, images[6:]) and read.pretraining.labels.tolist() == [-1] * 3
    assert (read.stem, read.size, len(read.classes)) == ("imagenet", 64, 10)
    judged = data.load("stl10", str(tmp_path))
    assert judged.pretraining is judged.train
    ((crops, _, _),) = data.batches(read.pretraining, 64, 3, 0, [0])
    assert crops.shape == (2, 3, 3, 64, 64)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Two classes of pictures of many sizes, in ImageNet's layout."""
    root = tmp_path_factory.mktemp("imagenet")
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    for part, n in (("train", 4), ("val", 2)):
        for c, name in enumerate(("n01440764", "n01443537")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                picture = photo[:, 20 * i : 300 + 40 * i, 100 * c : 400 + 30 * i]
                F.to_pil_image(picture).save(root / part / name / f"{i}.png")
    return root


def test_imagenet_is_cropped_from_its_files(imagenet):
    """Against torchvision's resized_crop of the picture, up to the rounding of uint8 in between."""
    read = data.load("imagenet", str(imagenet), pretraining=True)
    assert (read.size, read.stem, read.blur_p, read.solarise_p) == (224, "imagenet", (1, 0.1), (0, 0.2))
    assert read.train.labels.tolist() == [0] * 4 + [1] * 4 and read.pretraining is read.train
    order = torch.cat([labels for _, labels, _ in data.batches(read.train, 224, 4, 0, range(2))])
    assert order.bincount().tolist() == [4, 4]
    one = read.train.rows(torch.tensor([2]))
    ((crops, _, u),) = data.batches(one, 224, 1, 0, [0])
    image = F.pil_to_tensor(PIL.Image.open(one.images.paths[0]))
    for mine, v in zip(crops[:, 0], u):
        ((*box, is_flipped),) = augment.crop_boxes(v, *image.shape[1:]).tolist()
        theirs = F.resized_crop(image / 255, *box, [224, 224], BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(mine / 255, theirs.flip(2) if is_flipped else theirs, rtol=0, atol=4 / 255)


def test_evaluation_view_of_imagenet(imagenet):
    """Resized to 256 pixels along the shorter side, then the central 224, Appendix B.5.1."""
    read = data.load("imagenet", str(imagenet))
    (ours,) = data.evaluation_views(read.test, 224, data.EVAL_CROP, read.mean, read.std)
    for path, mine in zip(read.test.images.paths, ours):
        image = F.pil_to_tensor(PIL.Image.open(path)) / 255
        x = F.center_crop(F.resize(image, [256], BICUBIC, antialias=True).clamp(0, 1), [224, 224])
        torch.testing.assert_close(mine, F.normalize(x, read.mean, read.std), rtol=0, atol=4 / 255 / 0.224)


def test_a_file_that_a_worker_cannot_read_is_named(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path / "broken")
    (tmp_path / "broken" / "train" / "n01440764" / "1.png").write_bytes(b"no picture")
    read = data.load("imagenet", str(tmp_path / "broken"))
    with pytest.raises(InputError, match=r"^[^\n]*n01440764/1.png: not a picture that can be read[^\n]*$"):
        list(data.batches(read.train, 224, 8, 0, [0]))


def test_hold_out_is_of_the_training_set(photos):
    held = data.hold_out(photos)
    assert held.test.labels.bincount().tolist() == [20] * 10 and held.train.labels.bincount().tolist() == [180] * 10
    assert held.pretraining is held.train
    everything = torch.cat([held.train.images, held.test.images]).flatten(1).unique(dim=0)
    assert torch.equal(everything, photos.train.images.flatten(1).unique(dim=0))
    assert torch.equal(data.hold_out(photos).test.images, held.test.images)
    apart = dataclasses.replace(photos, unlabeled=photos.test)
    assert data.hold_out(apart).pretraining is photos.test
    with pytest.raises(InputError, match="class astronaut would keep none of its 200 training images"):
        data.hold_out(dataclasses.replace(photos, holdout=200))


def test_a_place_is_read_as_typed(folder, imagenet, monkeypatch, capsys):
    """~ is the home folder, and a folder may have the name of a set."""
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(data.load(f"~/{folder.name}").train.labels) == 48
    monkeypatch.setenv("HOME", str(imagenet.parent))
    assert len(data.load("imagenet", f"~/{imagenet.name}").train.labels) == 8
    shutil.copytree(folder, folder.parent / "places" / "photos")
    monkeypatch.chdir(folder.parent / "places")
    assert len(data.load("./photos").classes) == 3 and "not the folder" not in capsys.readouterr().err
    assert len(data.load("photos").classes) == 10
    assert "dataset photos: the set of that name, not the folder; --dataset ./photos is" in capsys.readouterr().err


def test_the_hold_out_of_other_sets(folder):
    """A tenth of each class of a folder; of ImageNet 10,009 images, Appendix B.4; of the others what FACTS says."""
    assert [facts["holdout"] for facts in data.FACTS.values()] == [20, 500, 50, 50, None]
    assert data.load(str(folder)).holdout == 16 / 10
    unequal = torch.tensor([0] * 3000 + [1] * 100 + [2] * 4)
    for labels, holdout, counts in ((unequal, 3104 / 3 / 10, [300, 10, 1]), (torch.arange(20_000) % 10, None, 10_009)):
        split = data.Split(torch.arange(len(labels)), labels)
        whole = data.Dataset((*"abcdefghij",)[: max(labels) + 1], split, split, split, 32, "cifar", (0,), (1,), holdout)
        held = data.hold_out(whole)
        assert (held.test.labels.bincount().tolist() if holdout else len(held.test.labels)) == counts
        rows = torch.cat([held.test.images, held.train.images])
        assert torch.equal(rows.sort().values, split.images)


def test_mean_and_std_are_those_published():
    """CIFAR's as everyone computes them over all pixels (not 0.2023, the mean of each image's std), STL-10's of the
    code of Wang and Isola (2020), ImageNet's of torchvision's own weights; those of photos are checked above."""
    imagenet = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    published = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "stl10": ((0.4409, 0.4279, 0.3868), (0.2683, 0.2610, 0.2687)),
        "imagenet": (tuple(imagenet.mean), tuple(imagenet.std)),
    }
    for name, numbers in published.items():
        assert (data.FACTS[name]["mean"], data.FACTS[name]["std"]) == numbers, name


def test_every_batch_and_view_has_draws_of_its_own(monkeypatch):
    """Of 60 epochs of two images, each a batch: no draws come twice, as a few seeds or one for all views would do."""
    split = data.Split(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.arange(2))
    monkeypatch.setattr(augment, "crop_flip", lambda images, u, size: images)
    u = torch.cat([u for _, _, u in data.batches(split, 1, 1, 0, range(120))])
    assert u.shape == (240, 1, augment.DRAWS_PER_IMAGE) and len(u.unique(dim=0)) == 240


def test_batches_are_functions_of_seed_and_epoch():
    colours = torch.arange(103, dtype=torch.uint8)
    split = data.Split(colours[:, None, None, None].expand(-1, 3, 2, 2), torch.arange(103))

    def some(seed, steps, **options):
        return list(data.batches(split, 4, 10, seed, steps, **options))

    first, second = some(0, range(10)), some(0, range(10, 20))
    labels = torch.cat([b[1] for b in first])
    assert len(first) == 10 and labels.unique().numel() == 100
    for crops, labels_, u in first:
        assert crops.shape == (2, 10, 3, 4, 4) and u.shape == (2, 10, augment.DRAWS_PER_IMAGE)
        torch.testing.assert_close(crops, (labels_ / 255)[:, None, None, None].expand(2, -1, 3, 4, 4))
    assert sum(len(b[1]) for b in some(0, range(11), drop_last=False)) == 103
    assert some(0, [0], views=1)[0][0].shape == (1, 10, 3, 4, 4)
    for other in (second, some(1, range(10))):
        assert not torch.equal(torch.cat([b[1] for b in other]), labels)
        assert not torch.equal(other[0][2], first[0][2])
    stream = some(0, range(7, 20))
    assert len(stream) == 13
    assert all(torch.equal(x, y) for a, b in zip(stream, first[7:] + second) for x, y in zip(a, b))


def test_parts_and_shares_make_up_the_batch():
    split = data.Split(torch.zeros(24, 3, 2, 2, dtype=torch.uint8), torch.arange(24))
    whole = list(data.batches(split, 4, 12, 0, range(2)))
    shares = [list(data.batches(split, 4, 12, 0, range(2), micro_batches=3, share=(rank, 2))) for rank in range(2)]
    for step, (_, labels, u) in enumerate(whole):
        micro = [share[3 * step + part] for part in range(3) for share in shares]
        assert [len(x[1]) for x in micro] == [2] * 6 and torch.equal(torch.cat([x[1] for x in micro]), labels)
        assert torch.equal(torch.cat([x[2] for x in micro], 1), u)


def test_evaluation_view_is_that_of_the_appendix(photos):
    """28x28 from the centre, resized to 32x32, normalised; images of other shapes in proportion."""
    (ours,) = data.evaluation_views(photos.test.rows(torch.arange(7)), 32, 28 / 32, photos.mean, photos.std)
    for image, mine in zip(photos.test.images, ours):
        x = F.resize(image[:, 2:30, 2:30] / 255, [32, 32], BICUBIC, antialias=True).clamp(0, 1)
        x = (x - torch.tensor(photos.mean)[:, None, None]) / torch.tensor(photos.std)[:, None, None]
        torch.testing.assert_close(mine, x, rtol=0, atol=1e-5)
    wide = data.Split(torch.zeros(3, 3, 64, 96, dtype=torch.uint8), torch.zeros(3))
    chunks = list(data.evaluation_views(wide, 32, 28 / 32, photos.mean, photos.std, batch_size=2))
    assert [c.shape for c in chunks] == [(2, 3, 32, 32), (1, 3, 32, 32)]


def test_pixel_statistics_of_one_colour_do_not_divide_by_zero():
    histograms = 32 * torch.eye(256)[[51, 51, 51]]
    mean, std = sources.pixel_statistics(histograms)
    assert mean == (0.2, 0.2, 0.2) and all(math.isclose(s, 1 / 255, abs_tol=1e-4) for s in std)

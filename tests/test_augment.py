"""The operations on batches, and the two views that data.py makes of them, against torchvision's, image by image."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from data import colour_changes, two_views
from lib import augment
from lib.augment import DRAWS_PER_IMAGE, crop_boxes, crop_flip, gaussian_blur, named_draws

BICUBIC = InterpolationMode.BICUBIC


def draws(n, seed=0):
    return torch.rand(n, DRAWS_PER_IMAGE, generator=torch.Generator().manual_seed(seed))


def recolour(x, u, jitter=1.0, grey_p=0.2):
    """Images x after colour jitter and grey by draws u."""
    x = x.clone()
    augment.change(x, colour_changes(named_draws(u), jitter, grey_p))
    return x


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (48, 40, 32), (24, 64, 32)])
def test_crop_flip_is_torchvisions_resized_crop(photos, height, width, size):
    images = F.resize(photos.train.images[::40], [height, width], antialias=True)
    u = draws(len(images))
    boxes = crop_boxes(u, height, width)[:, :4].tolist()
    flipped = named_draws(u)["flip"] < 0.5
    (ours,) = crop_flip(images, u[None], size)
    for image, box, turned, mine in zip(images, boxes, flipped, ours):
        theirs = F.resized_crop(image / 255, *box, [size, size], BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(mine, F.horizontal_flip(theirs) if turned else theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("height, width", [(224, 224), (9, 12), (10, 28)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    """Each number of a box, and how they go together, by Kolmogorov's distance: one time in 10,000 chance exceeds it.

    9 x 12 pixels show how sides are rounded and that corners reach the last pixel; in 10 x 28 pixels no try fits one
    crop in 70, which is then the centre, and with five tries in place of ten it would be one in 8.
    """
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    boxes = [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)]
    theirs = numbers_of(torch.tensor(boxes), height, width)
    ours = numbers_of(crop_boxes(draws(30_000), height, width)[:, :4], height, width)
    bound = 2.2 * (1 / 3000 + 1 / 30_000) ** 0.5
    for name, numbers in theirs.items():
        assert kolmogorov(ours[name], numbers) < bound, name


def numbers_of(boxes, height, width):
    """What crops (n, 4) differ in: corner, sides, area, aspect, and where in its room the corner is."""
    top, left, h, w = boxes.double().unbind(1)
    down, across = top / (height - h).clamp_min(1), left / (width - w).clamp_min(1)
    sides = {"top": top, "left": left, "height": h, "width": w, "area": h * w, "aspect": w / h}
    return sides | {"down": down, "across": across, "diagonal": down + across}


def kolmogorov(x, y):
    """The largest difference of the cumulative distributions of two samples."""
    values = torch.cat([x, y])
    shares = [torch.searchsorted(sample.sort().values, values, right=True) / len(sample) for sample in (x, y)]
    return (shares[0] - shares[1]).abs().max()


def test_crop_of_a_picture_that_no_try_fits_is_its_centre():
    u = draws(50)
    named_draws(u)["area"][:] = 0.99
    top, left, h, w = crop_boxes(u, 10, 100)[:, :4].unbind(1)
    assert (top == 0).all() and (h == 10).all() and (w == 13).all() and (left == 43).all()


@pytest.mark.parametrize(
    "name, low, high", [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)]
)
def test_colour_operations_are_torchvisions(photos, name, low, high):
    x = photos.train.images[::40] / 255
    x[0], x[1] = 0, x[1, :1]  # black, grey
    factor = torch.linspace(low, high, len(x))
    ours = getattr(augment, name)(x, factor[:, None, None, None])
    theirs = torch.stack([getattr(F, f"adjust_{name}")(image, f.item()) for image, f in zip(x, factor)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


def test_recolour_composes_them_in_each_images_order(photos):
    x = photos.train.images[::20] / 255
    u = draws(len(x))
    ours = recolour(x, u)
    draws_of = named_draws(u)
    jitter, grey = draws_of["jitter"] < 0.8, draws_of["grey"] < 0.2
    assert 0.7 < jitter.float().mean() < 0.9 and 0.05 < grey.float().mean() < 0.35
    orders = draws_of["order"].argsort(1)
    for image, f, turn, jittered, greyed, mine in zip(x, draws_of["factors"], orders, jitter, grey, ours):
        values = (0.6 + 0.8 * f[0], 0.6 + 0.8 * f[1], 0.8 + 0.4 * f[2], -0.1 + 0.2 * f[3])
        for i in turn.tolist() if jittered else []:
            name = ("brightness", "contrast", "saturation", "hue")[i]
            image = getattr(F, f"adjust_{name}")(image, values[i].item())
        theirs = F.rgb_to_grayscale(image, 3) if greyed else image
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_jitter_scales_the_factors_and_grey_is_a_probability(photos):
    x = photos.train.images[::20] / 255
    u = draws(len(x))
    factors = named_draws(u.clone())["factors"]
    halved = u.clone()
    named_draws(halved)["factors"].copy_(0.5 + (factors - 0.5) / 2)
    torch.testing.assert_close(recolour(x, u, jitter=0.5), recolour(x, halved), rtol=0, atol=1e-6)
    assert torch.equal(recolour(x, u, jitter=0, grey_p=0), x)
    grey = F.rgb_to_grayscale(x, 3)
    torch.testing.assert_close(recolour(x, u, jitter=0, grey_p=1), grey, rtol=0, atol=1e-6)
    plain, _ = two_views(torch.stack([x, x]), torch.stack([u, u]), (0, 0, 0), (1, 1, 1), jitter=0, grey_p=0)
    assert torch.equal(plain, x)


@pytest.mark.parametrize("size, side", [(224, 23), (64, 7), (20, 3)])
def test_gaussian_blur_is_torchvisions(photos, size, side):
    x = F.resize(photos.train.images[::250] / 255, [size, size], antialias=True)
    sigma = torch.linspace(0.1, 2, len(x))
    for image, s, mine in zip(x, sigma.tolist(), gaussian_blur(x, sigma[:, None, None, None])):
        torch.testing.assert_close(mine, F.gaussian_blur(image, [side, side], [s, s]), rtol=0, atol=2e-6)


def test_a_view_too_small_for_the_blur_is_as_it_was():
    x, sigma = torch.rand(2, 3, 20, 20), torch.tensor([1.0, 2.0])[:, None, None, None]
    assert not torch.allclose(gaussian_blur(x, sigma), x, atol=1e-2)
    small = x[:, :, :19, :19]
    assert torch.equal(gaussian_blur(small, sigma), small)


def test_blur_and_solarisation_come_last_and_as_often_as_they_should(photos):
    """Crops through both views of ImageNet, BYOL's, against torchvision image by image."""
    u = torch.stack([draws(100), draws(100, seed=1)])
    crops = crop_flip(photos.train.images[:100], u, 32)
    blur, solarise, count = (1.0, 0.1), (0.0, 0.2), torch.zeros(2, 2)
    ours = two_views(crops.clone(), u, (0, 0, 0), (1, 1, 1), blur, solarise)
    for i, (crop, v, view) in enumerate(zip(crops, u, ours)):
        draws_of = named_draws(v)
        coloured = recolour(crop, v)
        choices = zip(coloured, draws_of["blur"], draws_of["sigma"], draws_of["solarise"], view)
        for x, blurred, width, solarised, mine in choices:
            if blurred < blur[i]:
                sigma = 0.1 + 1.9 * width.item()
                x = F.gaussian_blur(x, [3, 3], [sigma, sigma])
                count[i, 0] += 1
            if solarised < solarise[i]:
                x = F.solarize(x, 0.5)
                count[i, 1] += 1
            torch.testing.assert_close(mine, x, rtol=0, atol=2e-6)
    assert count[0].tolist() == [100, 0] and 3 <= count[1, 0] <= 20 and 10 <= count[1, 1] <= 30


def test_two_views(photos):
    """400 images, which pass in two chunks on a CPU. A view depends on its own image and draws alone."""
    u = torch.stack([draws(400), draws(400, seed=1)])
    crops = crop_flip(photos.train.images[:400], u, 32)
    views = two_views(crops.clone(), u, photos.mean, photos.std)
    alone = two_views(crops[:, 399:].clone(), u[:, 399:], photos.mean, photos.std)
    lowest, highest = ((x - torch.tensor(photos.mean)) / torch.tensor(photos.std) for x in (0, 1))
    for view, last in zip(views, alone):
        assert view.shape == (400, 3, 32, 32)
        torch.testing.assert_close(view[399:], last, rtol=0, atol=1e-5)
        assert (view.amin((0, 2, 3)) >= lowest - 1e-5).all() and (view.amax((0, 2, 3)) <= highest + 1e-5).all()
    assert not torch.equal(*views)
    pixels = (255 * crops).round().byte()  # as crops of files come
    for mine, same in zip(*[two_views(x, u, photos.mean, photos.std) for x in (pixels, pixels / 255)]):
        torch.testing.assert_close(mine, same, rtol=0, atol=1e-5)

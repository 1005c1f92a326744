"""Speed of the parts, each beside what a user would otherwise use, measured in one run.

    python -m tools.bench                          # all rows; about 20 minutes on two CPU cores
    python -m tools.bench --only energy,knn
    python -m tools.bench --scaling                # how cost grows with neurons, batch and bank
    accelerate launch --mixed_precision bf16 -m tools.bench

A row calls the project's own functions. The calls of a comparison take turns, so that a machine that slows down slows
all of them. The first turn warms up, the second measures memory, and times are medians of the others. A ratio is the
median of the ratios of all turns, and it is the number that carries over to other machines: with >= it says how many
times as fast ours is, with <= how many times as long ours takes. Memory is the peak of a call beyond what lay there
before it.
"""

import contextlib
import copy
import ctypes
import functools
import io
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import resize, to_pil_image
from tqdm import tqdm

import data
import linear_eval
import models
from data import two_views
from harness import judging
from harness.measure import first_fault
from harness.settings import resolve_images, resolve_recipe
from knn_eval import vote
from lib import cli, processes
from lib.augment import DRAWS_PER_IMAGE, crop_flip, normalise
from lib.errors import InputError
from lib.log import emit
from lib.pictures import Files
from pretrain import RECIPES, Training, build, pretrain, train_step
from regularizers import alignment, amhe, energy_by_definition, mhe

ROOT = Path(__file__).parent.parent
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PROJECTOR = ((4096, 512), (256, 4096))  # Section 3.6
PREDICTOR = ((4096, 256), (256, 4096))  # Section 3.6
HEADS = PROJECTOR + PREDICTOR
COLUMNS = ("row", "what", "ours", "against", "theirs", "ratio", "to reach", "MB ours", "MB theirs")
SCALING_COLUMNS = ("row", "what", "ours", "MB ours")
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "lightly", "kornia", "faiss-cpu", "scikit-learn")
MODULES = {"faiss-cpu": "faiss", "scikit-learn": "sklearn"}  # of packages that are imported by another name
VIEWS = (  # pixels before and after, images on a CPU, probability of blur
    (32, 32, 1000, 0.0),
    (96, 64, 200, 0.0),
    (256, 224, 20, 1.0),
)
IMAGES_ON_GPU = 1024
STEPS_ON_GPU = 8  # timed together: a step is launched while the GPU computes the one before
MOST_STEPS = 400  # of L-BFGS, at most
PHOTOGRAPHS = ("astronaut", "coffee", "retina", "hubble_deep_field")  # large ones that ship inside scikit-image


class Rival(NamedTuple):
    """What ours is held against."""

    name: str
    call: Callable
    goal: str = ""  # ">= 3": ours is to be 3 times as fast; "<= 2": to take twice as long at most
    needs: str = ""  # a package that is not among the requirements


class Contest(NamedTuple):
    """What is timed side by side."""

    what: str
    ours: Callable
    rivals: list[Rival]
    allowed: int | None = None  # MB that ours may take beyond its inputs
    alone: bool = True  # this process does the work; the memory of others is not seen


def bench(
    *,
    only: Annotated[tuple[str, ...], "rows of the table, or of --scaling; None = all"] | None = None,
    scaling: Annotated[bool, "how cost grows with neurons, batch and bank, in place of the table"] = False,
    json: Annotated[bool, "a JSON object a line, in place of a table"] = False,
    seconds: Annotated[float, "> 0", "for the timed turns of a comparison, of which there are at least 3"] = 20.0,
):
    """Print a table of ratios, ours against what a user would otherwise use, each measured side by side in one run."""
    rows = SCALES if scaling else ROWS
    for name in only or ():
        if name not in rows:
            raise InputError(f"--only {name}: no such row; there are {', '.join(rows)}")
    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes would slow each other; launch one")
    columns = SCALING_COLUMNS if scaling else COLUMNS
    if not json:
        print(about(accelerator), "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", sep="\n", flush=True)
    for name in tqdm(only or rows, unit="row", disable=None):
        for contest in rows[name](accelerator):
            for row in compare(contest, accelerator.device, seconds):
                row = {"row": name, **row}
                if json:
                    emit({"stage": "bench", **row, "about": about(accelerator)})
                else:
                    cells = [shown(row, column) for column in columns]
                    tqdm.write(f"| {' | '.join(cells)} |", file=sys.stdout)
                    sys.stdout.flush()
        accelerator.free_memory()


def about(accelerator: Accelerator) -> str:
    """Name versions and hardware."""
    parts = [f"Python {platform.python_version()}"]
    parts += [f"{package} {version(package)}" for package in PACKAGES if is_installed(package)]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                parts.append(f"{processes.cores()} cores of {cpu}")
                break
    parts.append(torch.cuda.get_device_name(accelerator.device) if on_gpu(accelerator) else "no GPU")
    precision = accelerator.mixed_precision
    parts.append("fp32" if precision == "no" else precision)
    return ", ".join(parts)


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(MODULES.get(package, package)) is not None


def on_gpu(accelerator: Accelerator) -> bool:
    """Whether the work is done by a GPU."""
    return accelerator.device.type == "cuda"


def shown(row: dict, column: str) -> str:
    """Write a cell of the table."""
    x = row.get(column)
    if x is None:
        return ""
    if column in ("ours", "theirs"):
        return f"{x:.3g} s" if x >= 1 else f"{1000 * x:.3g} ms"
    if column == "MB ours" and row["MB allowed"]:
        return f"{x:.0f} (<= {row['MB allowed']})"
    if column == "ratio":
        return f"{x:.2f}"
    return f"{x:.0f}" if isinstance(x, float) else str(x)


def compare(contest: Contest, device: torch.device, seconds: float) -> Iterator[dict]:
    """Yield a row for each rival: medians in seconds, the median ratio, MB. The calls take turns."""
    rivals = [rival for rival in contest.rivals if not rival.needs or is_installed(rival.needs)]
    calls = [contest.ours, *(rival.call for rival in rivals)]
    begun = time.perf_counter()
    for call in calls:
        call()  # to warm up
    memory = []
    for call in calls:
        if contest.alone:
            memory.append(peak(call, device))
        else:
            call()
            memory.append(None)
    seconds_a_turn = (time.perf_counter() - begun) / 2
    turns = min(31, max(3, round(seconds / seconds_a_turn)))
    times = []
    for _ in range(turns):
        times.append([timed(call, device) for call in calls])
    ours, *theirs = zip(*times)
    head = {"what": contest.what, "ours": statistics.median(ours)}
    head |= {"MB ours": memory[0], "MB allowed": contest.allowed}
    for rival, its_times, its_memory in zip(rivals, theirs, memory[1:]):
        ratios = [b / a for a, b in zip(ours, its_times)]
        if rival.goal.startswith("<"):
            ratios = [a / b for a, b in zip(ours, its_times)]
        row = {"against": rival.name, "theirs": statistics.median(its_times)}
        row |= {"ratio": statistics.median(ratios), "to reach": rival.goal, "MB theirs": its_memory}
        yield head | row
    for rival in contest.rivals:
        if rival not in rivals:
            yield head | {"against": f"{rival.name}: skipped, pip install {rival.needs}", "to reach": rival.goal}
    if not contest.rivals:
        yield head


def timed(call: Callable, device: torch.device) -> float:
    """Seconds that a call takes, until the device has done its part."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begun


def peak(call: Callable, device: torch.device) -> float | None:
    """MB that a call takes at its peak, beyond what lay there before: of the GPU, else of this process, on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except (OSError, AttributeError):
        call()
        return None
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1e6


def resident(key: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak."""
    status = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        status[name] = value
    kilobytes = status[key].split()[0]
    return 1024 * int(kilobytes)


# ---- Energies --------------------------------------------------------------------------------------------------------


def energy(accelerator: Accelerator) -> Iterator[Contest]:
    """Forward and backward pass over the paper's heads."""
    weights = [torch.randn(shape, device=accelerator.device).requires_grad_() for shape in HEADS]

    @torch.no_grad()
    def products() -> None:
        for w in weights:
            (w @ w.T) @ w

    for f, angular in ((amhe, True), (mhe, False)):
        for s in (2, 1, 0):
            definition = through(energy_by_definition, weights, s, angular)
            rivals = [
                Rival("its three lines under autograd", definition, ">= 3.5"),
                Rival("two N x N x d products a layer", products, "<= 1.5"),
            ]
            what = f"{f.__name__}, s = {s}, of the heads' four layers"
            yield Contest(what, through(f, weights, s), rivals, allowed=64)


def through(f: Callable, weights: list[Tensor], *arguments) -> Callable:
    """Return a call that sums f over layers and computes the gradient of the sum."""

    def call() -> None:
        for w in weights:
            w.grad = None
        total = sum(f(w, *arguments) for w in weights)
        total.backward()

    return call


def energy_large(accelerator: Accelerator) -> Iterator[Contest]:
    """A layer whose N x N matrix would take 4.3 GB."""
    weight = torch.randn(32768, 512, device=accelerator.device).requires_grad_()
    yield Contest("amhe, s = 2, N = 32,768, d = 512", through(amhe, [weight], 2), [], allowed=1000)


def energy_scaling(accelerator: Accelerator) -> Iterator[Contest]:
    """Energy and gradient over the number of neurons."""
    for n in (256, 1024, 4096, 8192, 16384, 32768):
        weight = torch.randn(n, 512, device=accelerator.device).requires_grad_()
        yield Contest(f"amhe, s = 2, of {n:,} neurons in 512 dimensions", through(amhe, [weight], 2), [])


# ---- Training steps --------------------------------------------------------------------------------------------------


def trainer(accelerator: Accelerator, batch_size: int, **flags) -> tuple[Training, Callable]:
    """Make a training of `pretrain` on photos, and its next step: crops, views, networks, LARS, target, faults."""
    images = data.load("photos", pretraining=True)
    flags = {**pretrain.__kwdefaults__, "batch_size": batch_size, **flags}
    values = resolve_recipe(flags, RECIPES, accelerator.num_processes)
    cfg = resolve_images(values, flags, images)
    training = build(cfg, images, accelerator)
    split = images.pretraining.to(accelerator.device)
    batches = data.batches(split, images.size, batch_size, 0, itertools.count())
    numbers = {}

    def call() -> None:
        crops, _, u = next(batches)
        terms = train_step(training, crops, u, 0.1, 0.99)
        numbers.update(first_fault(numbers, terms))

    return training, call


def paper_flags(accelerator: Accelerator) -> dict:
    """Flags of the paper's ResNet-18 for small images, and the batch that is timed."""
    batch_size = 1024 if on_gpu(accelerator) else 256
    return {"stem": "cifar", "hidden_dim": 4096, "batch_size": batch_size}


def as_in_a_run(accelerator: Accelerator, call: Callable) -> tuple[str, Callable]:
    """Return what is timed, in words, and its call: on a GPU several steps, as in a run."""
    if not on_gpu(accelerator):
        return "step", call

    def several() -> None:
        for _ in range(STEPS_ON_GPU):
            call()

    return f"{STEPS_ON_GPU} steps", several


def energy_step(accelerator: Accelerator) -> Iterator[Contest]:
    """What the regularizer adds to a step."""
    goals = {1024: "<= 1.02", 128: "<= 1.10"} if on_gpu(accelerator) else {256: "<= 1.06"}
    for batch_size, goal in goals.items():
        flags = paper_flags(accelerator) | {"batch_size": batch_size}
        what, without = as_in_a_run(accelerator, trainer(accelerator, **flags)[1])
        _, with_energy = as_in_a_run(accelerator, trainer(accelerator, **flags, reg="amhe")[1])
        yield Contest(f"{what} of {batch_size} with --reg amhe", with_energy, [Rival("--reg none", without, goal)])


def step(accelerator: Accelerator) -> Iterator[Contest]:
    """What a step takes beside its networks."""
    flags = paper_flags(accelerator)
    batch_size = flags["batch_size"]
    training, whole_step = trainer(accelerator, **flags)
    v1, v2 = torch.randn(2, batch_size, 3, 32, 32, device=accelerator.device)

    def passes() -> None:
        _, (p1, p2), (t1, t2) = training.parallel(v1, v2)
        accelerator.backward(alignment(p1, t2) + alignment(p2, t1))
        training.optimizer.zero_grad()

    what, ours = as_in_a_run(accelerator, whole_step)
    _, theirs = as_in_a_run(accelerator, passes)
    rivals = [Rival("its networks' passes alone", theirs, "<= 1.10")]
    yield Contest(f"{what} of {batch_size}, from uint8 to the updated target", ours, rivals)


def step_scaling(accelerator: Accelerator) -> Iterator[Contest]:
    """A training step over the batch."""
    for batch_size in (128, 256, 512, 1024):
        flags = paper_flags(accelerator) | {"batch_size": batch_size, "reg": "amhe"}
        what, ours = as_in_a_run(accelerator, trainer(accelerator, **flags)[1])
        yield Contest(f"{what} of {batch_size:,} images", ours, [])


def step_peer(accelerator: Accelerator) -> Iterator[Contest]:
    """lightly's example of BYOL: ResNet-18 as it is, heads of 1024, its own transform and loader."""
    batch_size = 256
    _, next_step = trainer(accelerator, batch_size, stem="imagenet", hidden_dim=1024)
    steps = len(data.load("photos").train.labels) // batch_size

    def ours() -> None:
        for _ in range(steps):
            next_step()

    theirs = lightly_epoch(accelerator, batch_size) if is_installed("lightly") else None
    goal = ">= 3" if on_gpu(accelerator) else ">= 1"
    rivals = [Rival("lightly's BYOL", theirs, goal, "lightly")]
    yield Contest(f"{steps} steps of {batch_size}, 32 pixels", ours, rivals)


def lightly_epoch(accelerator: Accelerator, batch_size: int) -> Callable:
    """Return an epoch of lightly's BYOL on photos, in the precision that Accelerate was launched with."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    layers = list(resnet18().children())
    encoder = nn.Sequential(*layers[:-1], nn.Flatten())
    online = nn.Sequential(encoder, BYOLProjectionHead(512, 1024, 256))
    online = online.to(accelerator.device)
    predictor = BYOLPredictionHead(256, 1024, 256).to(accelerator.device)
    target = copy.deepcopy(online)
    deactivate_requires_grad(target)
    parameters = [*online.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.06)
    criterion = NegativeCosineSimilarity()
    pair = functools.partial(_two_of, lightly_view(32, 0))
    images = pil(data.load("photos").train.images)
    pairs = _Made((pair, image) for image in images)
    in_workers = {"num_workers": processes.cores(), "persistent_workers": True}
    loader = DataLoader(pairs, batch_size, shuffle=True, drop_last=True, **in_workers)

    def call() -> None:
        for x0, x1 in loader:
            x0, x1 = x0.to(accelerator.device), x1.to(accelerator.device)
            update_momentum(online, target, 0.99)
            with accelerator.autocast():
                p0, p1 = predictor(online(x0)), predictor(online(x1))
                z0, z1 = target(x0).detach(), target(x1).detach()
                loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return call


class _Made(list):
    """A data set of pairs (make, x), of which each item is make(x)."""

    def __getitem__(self, row: int):
        make, x = super().__getitem__(row)
        return make(x)


# What loaders call stands at module level: where they do not fork, as on macOS, they pickle it.
def _two_of(transform: Callable, image: Image.Image) -> tuple[Tensor, Tensor]:
    return transform(image), transform(image)


def _read_twice(transform: Callable, path: str) -> Tensor:
    picture = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
    return torch.stack([transform(picture) for _ in range(2)])


def start(accelerator: Accelerator) -> Iterator[Contest]:
    """From the launch of pretrain.py to its first step."""
    first_step = "import os, pretrain; pretrain.train_step = lambda *_: os._exit(0); pretrain.pretrain(reg='amhe')"
    imports = python("import os, torch, timm, accelerate; os._exit(0)")
    rivals = [Rival("importing torch, timm and accelerate", imports, "<= 1.5")]
    yield Contest("from launch to the first step on photos", python(first_step), rivals, alone=False)


def python(code: str) -> Callable:
    """Return a call that runs code in a Python of its own, in an empty folder."""
    command = [sys.executable, "-c", code]
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths}

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)

    return call


# ---- Views and pictures ----------------------------------------------------------------------------------------------


def views(accelerator: Accelerator) -> Iterator[Contest]:
    """Two views of images in memory, on one core, or on the GPU."""
    gpu = on_gpu(accelerator)
    patches = data.load("photos").train.images
    for side, size, n_on_cpu, blur_p in VIEWS:
        n = IMAGES_ON_GPU if gpu else n_on_cpu
        every_few = len(patches) // n
        images = patches[::every_few][:n]
        images = resize(images, [side, side], antialias=True)
        on_device = images.to(accelerator.device)

        rivals = [] if gpu else views_one_by_one(images, size, blur_p)
        kornia = kornia_views(on_device, size, blur_p) if is_installed("kornia") else None
        rivals.append(Rival("kornia", kornia, ">= 1.3", "kornia"))
        if gpu and size == 32:
            _, next_step = trainer(accelerator, **paper_flags(accelerator))
            rivals.append(Rival("a training step on them", next_step, ">= 20"))
        what = f"{side} to {size} pixels"
        what += ", blurred" if blur_p else ""
        what += f", {n} images"
        what += "" if gpu else ", on one core"
        with one_thread():
            yield Contest(what, our_views(on_device, size, blur_p), rivals)


def our_views(images: Tensor, size: int, blur_p: float) -> Callable:
    """Return a call that makes two views of a batch."""

    def call() -> None:
        u = torch.rand(2, len(images), DRAWS_PER_IMAGE)
        crops = [crop_flip(images, u_of_view, size) for u_of_view in u]
        two_views(torch.stack(crops), u, MEAN, STD, (blur_p, blur_p))

    return call


def views_one_by_one(images: Tensor, size: int, blur_p: float) -> list[Rival]:
    """Pipelines that make two views of one image at a time."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    first = [torchvision_crop(size), v2.RandomHorizontalFlip()]
    first += [v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2)]
    if blur_p:
        first.append(v2.GaussianBlur(blur_kernel(size), (0.1, 2)))
    to_float = v2.ToDtype(torch.float32, scale=True)
    last = [to_float, v2.Normalize(MEAN, STD)]
    on_pillow = v2.Compose([*first, v2.ToImage(), *last])
    on_tensors = v2.Compose([*first, *last])
    pictures = pil(images)
    lightly = twice(lightly_view(size, blur_p), pictures) if is_installed("lightly") else None
    return [
        Rival("torchvision on Pillow", twice(on_pillow, pictures), ">= 3"),
        Rival("torchvision on tensors", twice(on_tensors, images), ">= 3"),
        Rival("lightly", lightly, ">= 3", "lightly"),
    ]


def torchvision_crop(size: int) -> Callable:
    """torchvision's random crop, Appendix B.5."""
    return v2.RandomResizedCrop(size, (0.08, 1), interpolation=InterpolationMode.BICUBIC, antialias=True)


def blur_kernel(size: int) -> int:
    """Side of the blur's kernel, in pixels: 23 at 224, Appendix B.5."""
    return size // 20 * 2 + 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one core of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def twice(transform: Callable, images: list | Tensor) -> Callable:
    """Return a call that makes two views of each image, in batches as a loader stacks them."""

    def batch() -> Tensor:
        return torch.stack([transform(image) for image in images])

    return lambda: [batch(), batch()]


def pil(images: Tensor) -> list[Image.Image]:
    """Return images, uint8 (n, 3, h, w), as pictures of Pillow."""
    return [to_pil_image(image) for image in images]


def lightly_view(size: int, blur_p: float) -> Callable:
    """lightly's view of BYOL of a picture, without solarisation."""
    from lightly.transforms.byol_transform import BYOLView1Transform

    return BYOLView1Transform(input_size=size, gaussian_blur=blur_p)


def kornia_views(images: Tensor, size: int, blur_p: float) -> Callable:
    """Return a call that makes two views of a batch by kornia."""
    import kornia.augmentation as K

    layers = [
        K.RandomResizedCrop((size, size), (0.08, 1), resample="bicubic", cropping_mode="resample"),
        K.RandomHorizontalFlip(),
        K.ColorJiggle(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
    ]
    if blur_p:
        layers.append(K.RandomGaussianBlur(blur_kernel(size), (0.1, 2.0), p=blur_p))
    layers.append(K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    transform = nn.Sequential(*layers)
    return lambda: [transform(images.float() / 255) for _ in range(2)]


def stream(accelerator: Accelerator) -> Iterator[Contest]:
    """Crops of pictures in files, by as many worker processes as there are cores."""
    n, size, batch_size = 3000, 224, 100
    crop = torchvision_crop(size)
    flip = v2.RandomHorizontalFlip()
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(Path(folder), n)
        labels = torch.zeros(n, dtype=torch.long, device=accelerator.device)
        split = data.Split(Files(paths), labels)

        def ours() -> None:
            for crops, _, _ in data.batches(split, size, batch_size, seed=0, steps=range(n // batch_size)):
                assert crops.shape == (2, batch_size, 3, size, size)

        def theirs() -> None:
            pairs = _Made((functools.partial(_read_twice, v2.Compose([crop, flip])), path) for path in paths)
            loader = DataLoader(pairs, batch_size, shuffle=True, num_workers=processes.cores())
            for crops in loader:
                assert crops.shape == (batch_size, 2, 3, size, size)

        what = f"{n:,} JPEGs of about 500 x 375 pixels, two crops to {size}"
        rivals = [Rival("torchvision: decode, crop and flip twice", theirs, ">= 0.9")]
        yield Contest(what, ours, rivals, alone=False)


def jpegs(folder: Path, n: int) -> list[str]:
    """Write n files of windows of photographs, about 500 x 375 pixels each, and return their paths."""
    from skimage import data as photographs

    images = []
    for name in PHOTOGRAPHS:
        pixels = getattr(photographs, name)()
        images.append(Image.fromarray(pixels))
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(n):
        image = images[i % len(images)]
        width, height = 500 - i % 50, 375 - i % 30
        left = int(torch.randint(image.width - width + 1, (), generator=generator))
        top = int(torch.randint(image.height - height + 1, (), generator=generator))
        window = image.crop((left, top, left + width, top + height))
        path = str(folder / f"{i:05}.jpg")
        window.save(path, quality=90)
        paths.append(path)
    return paths


# ---- Judges ----------------------------------------------------------------------------------------------------------


@functools.cache
def features(accelerator: Accelerator) -> tuple[data.Split, data.Split]:
    """50,000 rows to learn from and 10,000 to judge by: an untrained ResNet-18's features of crops of photos."""
    images = data.load("photos")
    torch.manual_seed(0)
    encoder = models.build_encoder("resnet18", images.stem).to(accelerator.device)

    def embedded(split: data.Split, epochs: int) -> data.Split:
        split = split.to(accelerator.device)
        rows, labels = [], []
        steps = range(epochs * (len(split.labels) // 500))
        for crops, y, _ in data.batches(split, images.size, 500, seed=0, steps=steps, views=1):
            x = normalise(crops[0], images.mean, images.std)
            rows.append(models.embed(encoder, [x]))
            labels.append(y)
        return data.Split(torch.cat(rows), torch.cat(labels))

    return embedded(images.train, 25), embedded(images.test, 20)


def knn(accelerator: Accelerator) -> Iterator[Contest]:
    """The weighted vote of the nearest neighbours."""
    k = 200
    bank, queries = features(accelerator)

    def ours() -> None:
        vote([bank.images], bank.labels, queries.images, queries.labels, (k,), 0.07)

    def products() -> None:
        for chunk in queries.images.split(500):
            (chunk @ bank.images.T).topk(k)

    def faiss() -> None:
        from faiss import IndexFlatIP

        index = IndexFlatIP(bank.images.shape[1])
        index.add(as_numpy(bank.images))
        index.search(as_numpy(queries.images), k)

    def sklearn() -> None:
        from sklearn.neighbors import NearestNeighbors

        search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine")
        search.fit(as_numpy(bank.images))
        search.kneighbors(as_numpy(queries.images))

    rivals = [
        Rival("product and top-k alone", products, "<= 1.5"),
        Rival("faiss-cpu, IndexFlatIP", faiss, ">= 1", "faiss-cpu"),
        Rival("scikit-learn, brute force", sklearn, ">= 1", "scikit-learn"),
    ]
    yield Contest("bank 50,000 x 512, 10,000 queries, k = 200", ours, rivals, allowed=512)


def as_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor of any device as an array."""
    return x.cpu().numpy()


def knn_scaling(accelerator: Accelerator) -> Iterator[Contest]:
    """The vote over the bank, up to ImageNet's training set."""
    queries = random_rows(1000, accelerator.device)
    for n in (10_000, 100_000, 1_281_167):
        bank, labels = random_rows(n, accelerator.device)
        ours = functools.partial(vote, [bank], labels, *queries, (200,), 0.07)
        yield Contest(f"1,000 queries of a bank of {n:,} x 512", ours, [])


def random_rows(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """n random features of 512 numbers, and their classes, of 1,000."""
    rows = torch.randn(n, 512, device=device)
    return rows, torch.randint(1000, (n,), device=device)


def linear(accelerator: Accelerator) -> Iterator[Contest]:
    """The linear probe on cached features; L-BFGS gets the steps that it needs to be as good, to the next doubling.

    It gets at most MOST_STEPS, even if it is not as good then; the row shows its accuracy.
    """
    train, test = features(accelerator)
    encoder = SimpleNamespace(num_features=train.images.shape[1])
    images = SimpleNamespace(classes=train.labels.unique())
    judged = SimpleNamespace(encoder=encoder, images=images, accelerator=accelerator, log=None)
    hyper = {"batch_size": 100, "epochs": 80, "seed": 0, "weight_decay": 0.0}

    def ours() -> nn.Linear:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            classifiers = linear_eval.fit(judged, linear_eval.Features(*train[:2]), {0.2: {}}, **hyper)
        return classifiers[0.2]

    train_rows, train_labels = as_numpy(train.images), as_numpy(train.labels)
    test_rows, test_labels = as_numpy(test.images), as_numpy(test.labels)

    def theirs(steps: int):
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings(action="ignore"):  # that it could go on
            return LogisticRegression(max_iter=steps).fit(train_rows, train_labels)

    logits = ours()(test.images)
    top1 = judging.accuracy(judging.rank_of(test.labels, logits), test.labels)["top1"]
    name, steps, score = "scikit-learn, LogisticRegression", 50, 0.0
    while is_installed("scikit-learn") and score < top1 and steps < MOST_STEPS:
        steps *= 2
        score = 100 * theirs(steps).score(test_rows, test_labels)
    if score:
        name += f", {steps} steps of L-BFGS, top-1 {score:.1f}"
    rivals = [Rival(name, lambda: theirs(steps), ">= 1", "scikit-learn")]
    yield Contest(f"80 epochs, 50,000 x 512, top-1 {top1:.1f}", ours, rivals)


ROWS = {
    "energy": energy,
    "energy-large": energy_large,
    "energy-step": energy_step,
    "views": views,
    "step": step,
    "step-peer": step_peer,
    "stream": stream,
    "knn": knn,
    "linear": linear,
    "start": start,
}
SCALES = {"energy": energy_scaling, "step": step_scaling, "knn": knn_scaling}


if __name__ == "__main__":
    cli.run(bench)

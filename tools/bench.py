"""Speed of the parts, each beside what a user would otherwise use, measured in one run.

    python -m tools.bench                          # all rows; about 15 minutes on two CPU cores
    python -m tools.bench --only energy,knn
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
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from skimage import data as photographs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import resize, to_pil_image

import data
import linear_eval
import models
from harness import judging
from harness.measure import first_fault
from harness.settings import resolve_images, resolve_recipe
from knn_eval import vote
from lib import cli, processes
from lib.augment import DRAWS_PER_IMAGE, crop_flip, normalise
from lib.errors import InputError
from lib.pictures import Files, fitting_workers
from pretrain import RECIPES, Training, build, pretrain, train_micro_batch
from regularizers import alignment, amhe, energy_by_definition, mhe

ROOT = Path(__file__).parent.parent
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
HEADS = ((4096, 512), (256, 4096), (4096, 256), (256, 4096))  # weights of projector and predictor, Section 3.6
COLUMNS = ("row", "what", "ours", "against", "theirs", "ratio", "to reach", "MB ours", "MB theirs")
PEERS = {"lightly": "lightly", "faiss": "faiss-cpu", "sklearn": "scikit-learn"}  # what is imported, and its package
VIEWS = (  # pixels before and after, images on a CPU, probability of blur
    (32, 32, 1000, 0.0),
    (96, 64, 200, 0.0),
    (256, 224, 20, 1.0),
)
LBFGS_STEPS = 400


class Contest(NamedTuple):
    """What is timed side by side."""

    what: str
    ours: Callable
    against: str
    theirs: Callable
    goal: str  # ">= 3": ours is to be 3 times as fast; "<= 2": to take twice as long at most
    allowed: int | None = None  # MB that ours may take beyond its inputs
    alone: bool = True  # this process does the work; the memory of others is not seen
    together: int = 1  # calls that are timed as one


def bench(
    *,
    only: Annotated[tuple[str, ...], "rows of the table; None = all"] | None = None,
    seconds: Annotated[float, "> 0", "for the timed turns of a comparison, of which there are at least 3"] = 20.0,
):
    """Print a table of ratios, ours against what a user would otherwise use, each measured side by side in one run."""
    for name in only or ():
        if name not in ROWS:
            raise InputError(f"--only {name}: no such row; there are {', '.join(ROWS)}")
    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes would slow each other; launch one")
    print(about(accelerator), "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), sep="\n", flush=True)
    for name in only or ROWS:
        try:
            for contest in ROWS[name](accelerator):
                cells = compare(contest, accelerator.device, seconds)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
        except ModuleNotFoundError as e:
            if e.name not in PEERS:
                raise
            processes.say(f"{name}: not compared with {e.name}: pip install {PEERS[e.name]}")
        accelerator.free_memory()


def about(accelerator: Accelerator) -> str:
    """Name versions and hardware."""
    parts = [f"Python {platform.python_version()}"]
    for package in ("torch", "torchvision", "timm", "accelerate", *PEERS.values()):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    with contextlib.suppress(OSError):
        cpus = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        parts += [f"{processes.cores()} cores of {cpu}" for cpu in cpus[:1]]
    parts.append(torch.cuda.get_device_name(accelerator.device) if on_gpu(accelerator) else "no GPU")
    precision = accelerator.mixed_precision
    parts.append("fp32" if precision == "no" else precision)
    return ", ".join(parts)


def on_gpu(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda"


def compare(contest: Contest, device: torch.device, seconds: float) -> list[str]:
    """Return the cells of a row: median times, the median ratio, MB. The calls take turns."""
    calls = (contest.ours, contest.theirs)
    begun = time.perf_counter()
    for call in calls:
        call()  # to warm up
    memory = [peak(call, device) for call in calls]
    seconds_a_turn = (time.perf_counter() - begun) / 2 * contest.together
    turns = min(31, max(3, round(seconds / seconds_a_turn)))
    times = [[timed(call, device, contest.together) for call in calls] for _ in range(turns)]
    ratios = [theirs / ours for ours, theirs in times]
    if contest.goal.startswith("<"):
        ratios = [1 / ratio for ratio in ratios]
    medians = [statistics.median(of_one) for of_one in zip(*times)]
    ours, theirs = (f"{x:.3g} s" if x >= 1 else f"{1000 * x:.3g} ms" for x in medians)
    megabytes = [f"{x:.0f}" if contest.alone and x is not None else "" for x in memory]
    if contest.allowed:
        megabytes[0] += f" (<= {contest.allowed})"
    ratio = f"{statistics.median(ratios):.2f}"
    return [contest.what, ours, contest.against, theirs, ratio, contest.goal, *megabytes]


def timed(call: Callable, device: torch.device, times: int) -> float:
    """Seconds that some calls take, one after the other, until the device has done its part."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    for _ in range(times):
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
    kilobytes = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
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
            ours = through(f, weights, s)
            definition = through(energy_by_definition, weights, s, angular)
            what = f"{f.__name__}, s = {s}, of the heads' four layers"
            yield Contest(what, ours, "its three lines under autograd", definition, ">= 3.5", allowed=64)
            yield Contest(what, ours, "two N x N x d products a layer", products, "<= 1.5", allowed=64)


def through(f: Callable, weights: list[Tensor], *arguments) -> Callable:
    """Return a call that sums f over layers and computes the gradient of the sum."""

    def call() -> None:
        for w in weights:
            w.grad = None
        total = sum(f(w, *arguments) for w in weights)
        total.backward()

    return call


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
        terms = train_micro_batch(training, crops, u, 0.1, 0.99)
        numbers.update(first_fault(numbers, terms))

    return training, call


def paper_flags(accelerator: Accelerator) -> dict:
    """Flags of the paper's ResNet-18 for small images, and the batch that is timed."""
    return {"stem": "cifar", "hidden_dim": 4096, "batch_size": 1024 if on_gpu(accelerator) else 256}


def steps_together(accelerator: Accelerator) -> int:
    """As in a run, a GPU still computes one step while the next one is launched."""
    return 8 if on_gpu(accelerator) else 1


def energy_step(accelerator: Accelerator) -> Iterator[Contest]:
    """What the regularizer adds to a step."""
    goals = {1024: "<= 1.02", 128: "<= 1.10"} if on_gpu(accelerator) else {256: "<= 1.06"}
    n = steps_together(accelerator)
    for batch_size, goal in goals.items():
        flags = paper_flags(accelerator) | {"batch_size": batch_size}
        _, without = trainer(accelerator, **flags)
        _, with_energy = trainer(accelerator, **flags, reg="amhe")
        what = f"{n} x a step of {batch_size} with --reg amhe"
        yield Contest(what, with_energy, "--reg none", without, goal, together=n)


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

    n = steps_together(accelerator)
    what = f"{n} x a step of {batch_size}, from uint8 to the updated target"
    yield Contest(what, whole_step, "its networks' passes alone", passes, "<= 1.10", together=n)


def step_peer(accelerator: Accelerator) -> Iterator[Contest]:
    """lightly's example of BYOL: ResNet-18 as it is, heads of 1024, its own transform and loader."""
    batch_size = 256
    _, next_step = trainer(accelerator, batch_size, stem="imagenet", hidden_dim=1024)
    steps = len(data.load("photos").train.labels) // batch_size

    def ours() -> None:
        for _ in range(steps):
            next_step()

    goal = ">= 3" if on_gpu(accelerator) else ">= 1"
    theirs = lightly_epoch(accelerator, batch_size)
    yield Contest(f"{steps} steps of {batch_size}, 32 pixels", ours, "lightly's BYOL", theirs, goal)


def lightly_epoch(accelerator: Accelerator, batch_size: int) -> Callable:
    """Return an epoch of lightly's BYOL on photos, in the precision that Accelerate was launched with."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import BYOLView1Transform

    layers = list(resnet18().children())
    encoder = nn.Sequential(*layers[:-1], nn.Flatten())
    online = nn.Sequential(encoder, BYOLProjectionHead(512, 1024, 256)).to(accelerator.device)
    predictor = BYOLPredictionHead(256, 1024, 256).to(accelerator.device)
    target = copy.deepcopy(online)
    deactivate_requires_grad(target)
    optimizer = torch.optim.SGD([*online.parameters(), *predictor.parameters()], lr=0.06)
    criterion = NegativeCosineSimilarity()
    pictures = [to_pil_image(image) for image in data.load("photos").train.images]
    pairs = Pairs(pictures, BYOLView1Transform(input_size=32, gaussian_blur=0))
    in_workers = {"num_workers": processes.cores(), "persistent_workers": True}
    loader = DataLoader(pairs, batch_size, shuffle=True, drop_last=True, **in_workers)

    def call() -> None:
        for views in loader:
            x0, x1 = views.to(accelerator.device).unbind(1)
            update_momentum(online, target, 0.99)
            with accelerator.autocast():
                p0, p1 = predictor(online(x0)), predictor(online(x1))
                z0, z1 = target(x0).detach(), target(x1).detach()
                loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return call


class Pairs(Dataset):
    """Two views of each picture, one picture at a time: what a loader reads in other projects."""

    def __init__(self, pictures: list[Image.Image] | list[str], transform: Callable):
        self.pictures = pictures  # or the paths of their files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> Tensor:
        picture = self.pictures[row]
        if isinstance(picture, str):
            picture = v2.functional.pil_to_tensor(Image.open(picture).convert("RGB"))
        return torch.stack([self.transform(picture), self.transform(picture)])


def first_step(accelerator: Accelerator) -> Iterator[Contest]:
    """From the launch of pretrain.py to its first step."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def run(code: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True)

    ours = "import os, pretrain; pretrain.train_micro_batch = lambda *_: os._exit(0); pretrain.pretrain(reg='amhe')"
    theirs = "import os, torch, timm, accelerate; os._exit(0)"
    what, against = "from launch to the first step on photos", "importing torch, timm and accelerate"
    yield Contest(what, lambda: run(ours), against, lambda: run(theirs), "<= 1.5", alone=False)


# ---- Views and pictures ----------------------------------------------------------------------------------------------


def views(accelerator: Accelerator) -> Iterator[Contest]:
    """Two views of images in memory: on one core of the CPU beside torchvision's, on a GPU beside a step on them."""
    patches = data.load("photos").train.images
    if on_gpu(accelerator):
        _, next_step = trainer(accelerator, **paper_flags(accelerator))
        ours = our_views(patches[:1024].to(accelerator.device), 32, 0.0)
        yield Contest("32 to 32 pixels, 1024 images", ours, "a training step on them", next_step, ">= 20")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for side, size, n, blur_p in VIEWS:
        images = resize(patches[:: len(patches) // n][:n], [side, side], antialias=True)
        what = f"{side} to {size} pixels, blurred by {blur_p:g}, {n} images, on one core"
        theirs = torchvision_views(images, size, blur_p)
        yield Contest(what, our_views(images, size, blur_p), "torchvision on Pillow", theirs, ">= 3")
    torch.set_num_threads(threads)


def our_views(images: Tensor, size: int, blur_p: float) -> Callable:
    """Return a call that makes two views of a batch."""

    def call() -> None:
        u = torch.rand(2, len(images), DRAWS_PER_IMAGE)
        data.two_views(crop_flip(images, u, size), u, MEAN, STD, (blur_p, blur_p))

    return call


def torchvision_views(images: Tensor, size: int, blur_p: float) -> Callable:
    """Return a call that makes two views of each image by torchvision on Pillow."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    layers = [*crop_and_flip(size), v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2)]
    if blur_p:
        kernel = size // 20 * 2 + 1  # 23 pixels at 224, Appendix B.5
        layers.append(v2.GaussianBlur(kernel, (0.1, 2)))
    layers += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    pairs = Pairs([to_pil_image(image) for image in images], v2.Compose(layers))
    return lambda: torch.stack([pairs[row] for row in range(len(pairs))])


def crop_and_flip(size: int) -> list[nn.Module]:
    """torchvision's random crop and flip, Appendix B.5."""
    crop = v2.RandomResizedCrop(size, (0.08, 1), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return [crop, v2.RandomHorizontalFlip()]


def stream(accelerator: Accelerator, n: int = 3000) -> Iterator[Contest]:
    """Crops of pictures in files, by as many worker processes as there are cores."""
    size, batch_size = 224, 100
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(Path(folder), n)
        labels = torch.zeros(n, dtype=torch.long, device=accelerator.device)
        split = data.Split(Files(paths, workers=fitting_workers()), labels)

        def ours() -> None:
            for crops, _, _ in data.batches(split, size, batch_size, seed=0, steps=range(n // batch_size)):
                assert crops.shape == (2, batch_size, 3, size, size)

        def theirs() -> None:
            pairs = Pairs(paths, v2.Compose(crop_and_flip(size)))
            loader = DataLoader(pairs, batch_size, shuffle=True, num_workers=processes.cores())
            for crops in loader:
                assert crops.shape == (batch_size, 2, 3, size, size)

        what = f"{n:,} JPEGs of 500 x 375 pixels, two crops to {size}"
        yield Contest(what, ours, "torchvision: decode, crop and flip twice", theirs, ">= 0.9", alone=False)


def jpegs(folder: Path, n: int) -> list[str]:
    """Write n files of photographs that ship inside scikit-image, 500 x 375 pixels each, and return their paths."""
    names = ("astronaut", "coffee", "retina", "hubble_deep_field")
    images = [Image.fromarray(getattr(photographs, name)()).resize((500, 375)) for name in names]
    paths = [f"{folder}/{i:05}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        images[i % len(images)].save(path, quality=90)
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

    what = "bank 50,000 x 512, 10,000 queries, k = 200"
    yield Contest(what, ours, "product and top-k alone", products, "<= 1.5", allowed=512)
    from faiss import IndexFlatIP

    def faiss() -> None:
        index = IndexFlatIP(bank.images.shape[1])
        index.add(bank.images.numpy(force=True))
        index.search(queries.images.numpy(force=True), k)

    yield Contest(what, ours, "faiss-cpu, IndexFlatIP", faiss, ">= 1", allowed=512)


def linear(accelerator: Accelerator) -> Iterator[Contest]:
    """The linear probe on cached features; its accuracy stands in the row, beside that of L-BFGS."""
    train, test = features(accelerator)
    encoder = SimpleNamespace(num_features=train.images.shape[1])
    images = SimpleNamespace(classes=train.labels.unique())
    judged = SimpleNamespace(encoder=encoder, images=images, accelerator=accelerator, log=None)
    hyper = {"batch_size": 100, "epochs": 80, "seed": 0, "weight_decay": 0.0}

    def ours() -> nn.Linear:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            classifiers = linear_eval.fit(judged, linear_eval.Features(*train[:2]), {0.2: {}}, **hyper)
        return classifiers[0.2]

    from sklearn.linear_model import LogisticRegression

    def theirs() -> LogisticRegression:
        classifier = LogisticRegression(max_iter=LBFGS_STEPS)
        return classifier.fit(train.images.numpy(force=True), train.labels.numpy(force=True))

    ranks = judging.rank_of(test.labels, ours()(test.images))
    top1 = judging.accuracy(ranks, test.labels)["top1"]
    score = 100 * theirs().score(test.images.numpy(force=True), test.labels.numpy(force=True))
    against = f"scikit-learn, {LBFGS_STEPS} steps of L-BFGS, top-1 {score:.1f}"
    yield Contest(f"80 epochs, 50,000 x 512, top-1 {top1:.1f}", ours, against, theirs, ">= 1")


ROWS = {
    "energy": energy,
    "energy-step": energy_step,
    "views": views,
    "step": step,
    "step-peer": step_peer,
    "stream": stream,
    "knn": knn,
    "linear": linear,
    "start": first_step,
}


if __name__ == "__main__":
    cli.run(bench)

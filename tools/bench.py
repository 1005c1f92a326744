"""How fast the parts are, each beside what a user would otherwise use, in one run.

    python -m tools.bench                          # all rows; about 20 minutes on two CPU cores
    python -m tools.bench --only energy,knn
    python -m tools.bench --scaling                # how cost grows with neurons, batch and bank
    accelerate launch --mixed_precision bf16 -m tools.bench

A row calls the project's own functions. Those that are compared take turns, so that a machine that slows down slows all
of them; the first turn warms up, the second is for memory, times are medians of the others. Ratios, medians of those of
each turn, are what carries over to other machines: with >=, how many times as fast ours is; with <=, how many times as
long ours takes. Memory is what a call takes, at its peak, beyond what lay there before.
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

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import resize, to_pil_image
from tqdm import tqdm

import data
import linear_eval
import models
from data import two_views
from harness import cli, processes
from harness.augment import DRAWS_PER_IMAGE, crop_flip, normalise
from harness.errors import InputError
from harness.log import emit
from harness.pictures import Files
from harness.probes import first_fault
from harness.settings import resolve_images, resolve_recipe
from knn_eval import vote
from pretrain import RECIPES, Training, build, pretrain, train_step
from regularizers import alignment, amhe, energy_by_definition, mhe

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
HEADS = ((4096, 512), (256, 4096), (4096, 256), (256, 4096))  # projector and predictor of Section 3.6
COLUMNS = ("row", "what", "ours", "against", "theirs", "ratio", "to reach", "MB ours", "MB theirs")


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
    columns = COLUMNS[:3] + COLUMNS[7:8] if scaling else COLUMNS
    if not json:
        print(f"{about(accelerator)}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
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
    packages = ("torch", "torchvision", "timm", "accelerate", "lightly", "kornia", "faiss-cpu", "scikit-learn")
    found = [f"{name} {version(name)}" for name in packages if find_spec(MODULES.get(name, name))]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                found.append(f"{processes.cores()} cores of {cpu}")
                break
    gpu = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "no GPU"
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return ", ".join([f"Python {platform.python_version()}", *found, gpu, precision])


MODULES = {"faiss-cpu": "faiss", "scikit-learn": "sklearn"}


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
    rivals = [rival for rival in contest.rivals if is_installed(rival)]
    calls = [contest.ours, *(rival.call for rival in rivals)]
    begun = time.perf_counter()
    for call in calls:
        call()  # to warm up
    memory = [peak(call, device) if contest.alone else call() and None for call in calls]
    seconds_a_turn = (time.perf_counter() - begun) / 2
    turns = min(31, max(3, round(seconds / seconds_a_turn)))
    times = [[timed(call, device) for call in calls] for _ in range(turns)]
    ours, *theirs = zip(*times)
    head = {"what": contest.what, "ours": statistics.median(ours)}
    head |= {"MB ours": memory[0], "MB allowed": contest.allowed}
    for rival, its_times, its_memory in zip(rivals, theirs, memory[1:]):
        ratios = [b / a for a, b in zip(ours, its_times)]
        if rival.goal.startswith("<"):
            ratios = [a / b for a, b in zip(ours, its_times)]
        row = {"against": rival.name, "theirs": statistics.median(its_times), "ratio": statistics.median(ratios)}
        yield head | row | {"to reach": rival.goal, "MB theirs": its_memory}
    for rival in contest.rivals:
        if rival not in rivals:
            yield head | {"against": f"{rival.name}: skipped, pip install {rival.needs}", "to reach": rival.goal}
    if not contest.rivals:
        yield head


def is_installed(rival: Rival) -> bool:
    """Whether the package that a rival needs is there."""
    module = MODULES.get(rival.needs, rival.needs)
    return not module or find_spec(module) is not None


def timed(call: Callable, device: torch.device) -> float:
    """Seconds that a call takes, until the device has done its part."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begun


def peak(call: Callable, device: torch.device) -> float | None:
    """MB beyond what lies there already that a call takes at its peak: of the GPU, else of this process, on Linux."""
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


def resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith(which))


def energy(accelerator: Accelerator) -> Iterator[Contest]:
    """Forward and backward pass over the paper's heads."""
    weights = [torch.randn(*shape, device=accelerator.device).requires_grad_() for shape in HEADS]

    @torch.no_grad()
    def products() -> None:
        for w in weights:
            (w @ w.T) @ w

    for f, angular in ((amhe, True), (mhe, False)):
        for s in (2, 1, 0):
            rivals = [
                Rival("its three lines under autograd", through(energy_by_definition, weights, s, angular), ">= 3.5")
            ]
            rivals += [Rival("two N x N x d products a layer", products, "<= 1.5")]
            yield Contest(f"{f.__name__}, s = {s}, of the heads' four layers", through(f, weights, s), rivals, 64)


def through(f: Callable, weights: list[Tensor], *how) -> Callable:
    """The sum of f over layers and its gradient."""

    def call() -> None:
        for w in weights:
            w.grad = None
        sum(f(w, *how) for w in weights).backward()

    return call


def energy_large(accelerator: Accelerator) -> Iterator[Contest]:
    """A layer whose N x N matrix would take 4.3 GB."""
    weight = torch.randn(32768, 512, device=accelerator.device).requires_grad_()
    yield Contest("amhe, s = 2, N = 32,768, d = 512", through(amhe, [weight], 2), [], 1000)


def trainer(accelerator: Accelerator, batch_size: int, **flags) -> tuple[Training, Callable]:
    """Make a training of `pretrain` on photos, and its next step: crops, views, networks, LARS, target, faults."""
    images = data.load("photos", pretraining=True)
    flags = {**cli.defaults(pretrain), "batch_size": batch_size, **flags}
    values = resolve_recipe(flags, RECIPES, accelerator.num_processes)
    cfg = resolve_images(values, flags, images)
    training = build(cfg, images, accelerator)
    split = images.pretraining.to(accelerator.device)
    batches = data.batches(split, batch_size, images.size, 0, itertools.count(1))
    numbers = {}

    def call() -> None:
        crops, _, u = next(batches)
        terms, norms = train_step(training, crops, u, 0.1, 0.99)
        numbers.update(first_fault(numbers, terms | norms))

    return training, call


def paper(accelerator: Accelerator) -> dict:
    """Flags of the paper's ResNet-18 for small images, and the batch that is timed."""
    return {"stem": "cifar", "hidden_dim": 4096, "batch_size": 1024 if accelerator.device.type == "cuda" else 256}


def energy_step(accelerator: Accelerator) -> Iterator[Contest]:
    """What the regularizer adds to a step."""
    goals = {1024: "<= 1.02", 128: "<= 1.10"} if accelerator.device.type == "cuda" else {256: "<= 1.06"}
    for batch_size, goal in goals.items():
        how = {**paper(accelerator), "batch_size": batch_size}
        rivals = [Rival("--reg none", trainer(accelerator, **how)[1], goal)]
        yield Contest(f"step of {batch_size} with --reg amhe", trainer(accelerator, **how, reg="amhe")[1], rivals)


def step(accelerator: Accelerator) -> Iterator[Contest]:
    """What a step takes beside its networks."""
    how = paper(accelerator)
    training, whole = trainer(accelerator, **how)
    v1, v2 = torch.randn(2, how["batch_size"], 3, 32, 32, device=accelerator.device)

    def bare() -> None:
        _, p, t = training.parallel(v1, v2)
        accelerator.backward(alignment(p[0], t[1]) + alignment(p[1], t[0]))
        training.optimizer.zero_grad()

    rivals = [Rival("its networks' passes alone", bare, "<= 1.10")]
    yield Contest(f"step of {how['batch_size']}, from uint8 to the updated target", whole, rivals)


def step_peer(accelerator: Accelerator) -> Iterator[Contest]:
    """lightly's example of BYOL: ResNet-18 as it is, heads of 1024, its own transform and loader."""
    batch_size = 256
    _, step = trainer(accelerator, batch_size, stem="imagenet", hidden_dim=1024)
    steps = len(data.load("photos").train.labels) // batch_size
    theirs = lightly_epoch(accelerator, batch_size) if find_spec("lightly") else None
    rivals = [Rival("lightly's BYOL", theirs, ">= 3" if accelerator.device.type == "cuda" else ">= 1", "lightly")]
    yield Contest(f"{steps} steps of {batch_size}, 32 pixels", lambda: [step() for _ in range(steps)], rivals)


def lightly_epoch(accelerator: Accelerator, batch_size: int) -> Callable:
    """An epoch of lightly's BYOL on photos, in the precision that Accelerate was launched with."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    encoder = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
    online = nn.Sequential(encoder, BYOLProjectionHead(512, 1024, 256)).to(accelerator.device)
    predictor = BYOLPredictionHead(256, 1024, 256).to(accelerator.device)
    target = copy.deepcopy(online)
    deactivate_requires_grad(target)
    optimizer = torch.optim.SGD([*online.parameters(), *predictor.parameters()], lr=0.06)
    criterion, transform = NegativeCosineSimilarity(), lightly_view(32, 0)
    pairs = [
        (lambda image: (transform(image), transform(image)), image) for image in pil(data.load("photos").train.images)
    ]
    how = {"num_workers": processes.cores(), "persistent_workers": True, "drop_last": True, "shuffle": True}
    loader = torch.utils.data.DataLoader(_Made(pairs), batch_size, **how)

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


def pil(images: Tensor) -> list[Image.Image]:
    """uint8 (n, 3, h, w) as pictures of Pillow."""
    return [to_pil_image(image) for image in images]


def lightly_view(size: int, blur: float) -> Callable:
    """lightly's view of BYOL of a picture, without solarisation."""
    from lightly.transforms.byol_transform import BYOLView1Transform

    return BYOLView1Transform(input_size=size, gaussian_blur=blur)


def views(accelerator: Accelerator) -> Iterator[Contest]:
    """Two views of images in memory, on one core, or on the GPU."""
    gpu, patches = accelerator.device.type == "cuda", data.load("photos").train.images
    for side, size, n, blur in ((32, 32, 1000, 0.0), (96, 64, 200, 0.0), (256, 224, 20, 1.0)):
        n = 1024 if gpu else n
        images = resize(patches[:: len(patches) // n][:n], [side, side], antialias=True)
        here = images.to(accelerator.device)

        def ours(here=here, size=size, blur=blur) -> None:
            u = torch.rand(2, len(here), DRAWS_PER_IMAGE)
            two_views(torch.stack([crop_flip(here, v, size) for v in u]), u, MEAN, STD, (blur, blur))

        rivals = [] if gpu else views_one_by_one(images, size, blur)
        rivals += [Rival("kornia", kornia_views(here, size, blur) if find_spec("kornia") else None, ">= 1.3", "kornia")]
        if gpu and size == 32:
            rivals += [Rival("a training step on them", trainer(accelerator, **paper(accelerator))[1], ">= 20")]
        with one_thread():
            what = f"{side} to {size} pixels{', blurred' * bool(blur)}, {n} images{', on one core' * (not gpu)}"
            yield Contest(what, ours, rivals)


def views_one_by_one(images: Tensor, size: int, blur: float) -> list[Rival]:
    """Two views of each image by pipelines that take one at a time."""
    pictures, flip, grey = pil(images), v2.RandomHorizontalFlip(), v2.RandomGrayscale(0.2)
    crop = v2.RandomResizedCrop(size, (0.08, 1), interpolation=InterpolationMode.BICUBIC, antialias=True)
    first = [crop, flip, v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), grey]
    first += [v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2))] * bool(blur)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    lightly = twice(lightly_view(size, blur), pictures) if find_spec("lightly") else None
    return [
        Rival("torchvision on Pillow", twice(v2.Compose([*first, v2.ToImage(), *last]), pictures), ">= 3"),
        Rival("torchvision on tensors", twice(v2.Compose([*first, *last]), images), ">= 3"),
        Rival("lightly", lightly, ">= 3", "lightly"),
    ]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch keeps to one core of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def twice(transform: Callable, images: list | Tensor) -> Callable:
    """Two views of each image, in batches as a loader stacks them."""
    return lambda: [torch.stack([transform(image) for image in images]) for _ in range(2)]


def kornia_views(images: Tensor, size: int, blur: float) -> Callable:
    """Two views of a batch."""
    import kornia.augmentation as K

    transform = nn.Sequential(
        K.RandomResizedCrop((size, size), (0.08, 1), resample="bicubic", cropping_mode="resample"),
        *[K.RandomHorizontalFlip(), K.ColorJiggle(0.4, 0.4, 0.2, 0.1, p=0.8), K.RandomGrayscale(p=0.2)],
        *[K.RandomGaussianBlur(size // 20 * 2 + 1, (0.1, 2.0), p=blur)] * bool(blur),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    return lambda: [transform(images.float() / 255) for _ in range(2)]


def stream(accelerator: Accelerator) -> Iterator[Contest]:
    """Crops of pictures in files, by as many worker processes as there are cores."""
    n, size, batch_size = 3000, 224, 100
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(Path(folder), n)
        split = data.Split(Files(paths), torch.zeros(n, dtype=torch.long, device=accelerator.device))

        def ours() -> None:
            for crops, _, _ in data.batches(split, batch_size, size, 0, [1]):
                assert crops.shape == (2, batch_size, 3, size, size)

        crop = v2.RandomResizedCrop(size, (0.08, 1), interpolation=InterpolationMode.BICUBIC, antialias=True)

        flip = v2.RandomHorizontalFlip()

        def pair(path: str) -> Tensor:
            picture = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
            return torch.stack([flip(crop(picture)), flip(crop(picture))])

        def bare() -> None:
            pairs = _Made((pair, path) for path in paths)
            for crops in torch.utils.data.DataLoader(pairs, batch_size, shuffle=True, num_workers=processes.cores()):
                assert crops.shape == (batch_size, 2, 3, size, size)

        what = f"{n:,} JPEGs of about 500 x 375 pixels, two crops to {size}"
        rivals = [Rival("torchvision: decode, crop and flip twice", bare, ">= 0.9")]
        yield Contest(what, ours, rivals, alone=False)


def jpegs(folder: Path, n: int) -> list[str]:
    """n files of windows of about 500 x 375 pixels of photographs that ship inside scikit-image."""
    from skimage import data as photographs

    found = [
        Image.fromarray(getattr(photographs, name)()) for name in ("astronaut", "coffee", "retina", "hubble_deep_field")
    ]
    generator, paths = torch.Generator().manual_seed(0), []
    for i in range(n):
        image = found[i % len(found)]
        w, h = 500 - i % 50, 375 - i % 30
        left, top = (int(torch.randint(a - b + 1, (), generator=generator)) for a, b in zip(image.size, (w, h)))
        paths.append(str(folder / f"{i:05}.jpg"))
        image.crop((left, top, left + w, top + h)).save(paths[-1], quality=90)
    return paths


@functools.cache
def features(accelerator: Accelerator) -> tuple[data.Split, data.Split]:
    """50,000 rows to learn from and 10,000 to judge by: an untrained ResNet-18's features of crops of photos."""
    images = data.load("photos")
    torch.manual_seed(0)
    encoder = models.build_encoder("resnet18", images.stem).to(accelerator.device)

    def of(split: data.Split, epochs: int) -> data.Split:
        split = split.to(accelerator.device)
        batches = data.batches(split, 500, images.size, 0, range(epochs), views=1)
        rows = [(models.embed(encoder, [normalise(x[0], images.mean, images.std)]), y) for x, y, _ in batches]
        return data.Split(*map(torch.cat, zip(*rows)))

    return of(images.train, 25), of(images.test, 20)


def knn(accelerator: Accelerator) -> Iterator[Contest]:
    """The weighted vote of the nearest neighbours."""
    k, (bank, queries) = 200, features(accelerator)

    def bare() -> None:
        for some in queries.images.split(500):
            (some @ bank.images.T).topk(k)

    def faiss() -> None:
        from faiss import IndexFlatIP

        index = IndexFlatIP(bank.images.shape[1])
        index.add(bank.images.cpu().numpy())
        index.search(queries.images.cpu().numpy(), k)

    def sklearn() -> None:
        from sklearn.neighbors import NearestNeighbors

        search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine")
        search.fit(bank.images.cpu().numpy()).kneighbors(queries.images.cpu().numpy())

    rivals = [
        Rival("product and top-k alone", bare, "<= 1.5"),
        Rival("faiss-cpu, IndexFlatIP", faiss, ">= 1", "faiss-cpu"),
        Rival("scikit-learn, brute force", sklearn, ">= 1", "scikit-learn"),
    ]
    what = "bank 50,000 x 512, 10,000 queries, k = 200"
    yield Contest(what, lambda: vote(*bank, *queries, (k,), 0.07), rivals, 512)


def linear(accelerator: Accelerator) -> Iterator[Contest]:
    """The linear probe on cached features; L-BFGS gets the steps that it needs to be as good, to the next doubling."""
    train, test = features(accelerator)
    hyper = {"batch_size": 100, "epochs": 80, "seed": 0, "weight_decay": 0.0}
    x, y, *held = (x.cpu().numpy() for x in (*train, *test))

    def ours() -> nn.Linear:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            encoder = SimpleNamespace(num_features=train.images.shape[1])
            images = SimpleNamespace(classes=train.labels.unique())
            judged = SimpleNamespace(encoder=encoder, images=images, accelerator=accelerator, log=None)
            return linear_eval.fit(judged, train, {0.2: {}}, **hyper)[0.2]

    def theirs(steps: int):
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings(action="ignore"):  # that it could go on
            return LogisticRegression(max_iter=steps).fit(x, y)

    top1 = linear_eval.accuracy(ours()(test.images), test.labels)["top1"]
    name, steps, score = "scikit-learn, LogisticRegression", 50, 0.0
    while find_spec("sklearn") and score < top1 and steps < 6400:
        steps *= 2
        score = 100 * theirs(steps).score(*held)
    name += f", {steps} steps of L-BFGS, top-1 {score:.1f}" if score else ""
    rivals = [Rival(name, lambda: theirs(steps), ">= 1", "scikit-learn")]
    yield Contest(f"80 epochs, 50,000 x 512, top-1 {top1:.1f}", ours, rivals)


def start(accelerator: Accelerator) -> Iterator[Contest]:
    """From the launch of pretrain.py to its first step."""
    here = Path(__file__).parent.parent

    def python(code: str) -> Callable:
        def call() -> None:
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
                subprocess.run(
                    [sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True
                )

        return call

    first = "import os, pretrain; pretrain.train_step = lambda *_: os._exit(0); pretrain.pretrain(reg='amhe')"
    rivals = [
        Rival(
            "importing torch, timm and accelerate", python("import os, torch, timm, accelerate; os._exit(0)"), "<= 1.5"
        )
    ]
    yield Contest("from launch to the first step on photos", python(first), rivals, alone=False)


def energy_scaling(accelerator: Accelerator) -> Iterator[Contest]:
    """Energy and gradient over the number of neurons."""
    for n in (256, 1024, 4096, 8192, 16384, 32768):
        weight = torch.randn(n, 512, device=accelerator.device).requires_grad_()
        yield Contest(f"amhe, s = 2, of {n:,} neurons in 512 dimensions", through(amhe, [weight], 2), [])


def step_scaling(accelerator: Accelerator) -> Iterator[Contest]:
    """A training step over the batch."""
    for batch_size in (128, 256, 512, 1024):
        how = {**paper(accelerator), "batch_size": batch_size, "reg": "amhe"}
        yield Contest(f"step of {batch_size:,} images", trainer(accelerator, **how)[1], [])


def knn_scaling(accelerator: Accelerator) -> Iterator[Contest]:
    """The vote over the bank, up to ImageNet's training set."""

    def rows(n: int) -> tuple[Tensor, Tensor]:
        where = {"device": accelerator.device}
        return torch.randn(n, 512, **where), torch.randint(1000, (n,), **where)

    queries = rows(1000)
    for n in (10_000, 100_000, 1_281_167):
        bank = rows(n)
        yield Contest(
            f"1,000 queries of a bank of {n:,} x 512", lambda bank=bank: vote(*bank, *queries, (200,), 0.07), []
        )


ROWS = {
    **{"energy": energy, "energy-large": energy_large, "energy-step": energy_step, "views": views, "step": step},
    **{"step-peer": step_peer, "stream": stream, "knn": knn, "linear": linear, "start": start},
}
SCALES = {"energy": energy_scaling, "step": step_scaling, "knn": knn_scaling}


if __name__ == "__main__":
    cli.run(bench)

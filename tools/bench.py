"""Speed of the parts, each beside what a user would otherwise use, measured in one run.

    python -m tools.bench                          # all rows; about 15 minutes on two CPU cores
    python -m tools.bench --only energy,knn
    accelerate launch --mixed_precision bf16 -m tools.bench

A row calls the project's own functions. The calls of a comparison take turns, so that a machine that slows down slows
all of them, after one to warm up. A ratio is the median of the ratios of all turns, and it is the number that carries
over to other machines: with >= it says how many times as fast ours is, with <= how many times as long ours takes. MB is
the memory of this process at the peak of our call, on a GPU that of the GPU, beyond what lay there before the call.
"""

import contextlib
import copy
import ctypes
import functools
import io
import itertools
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from skimage.data import astronaut, coffee, hubble_deep_field
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image

import data
import linear_eval
import models
from harness.measure import first_fault
from harness.settings import resolve_images, resolve_recipe
from knn_eval import vote
from lib import cli, processes
from lib.augment import DRAWS_PER_IMAGE, crop_flip, normalise
from lib.errors import InputError
from lib.files import write_whole
from lib.pictures import Files, fitting_workers
from pretrain import RECIPES, Training, build, pretrain, train_micro_batch
from regularizers import alignment, amhe, energy_by_definition, mhe

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
HEADS = ((4096, 512), (256, 4096), (4096, 256), (256, 4096))  # weights of projector and predictor, Section 3.6
COLUMNS = ("row", "what", "ours", "against", "theirs", "ratio", "to reach", "MB ours")


class Contest(NamedTuple):
    """What is timed side by side."""

    what: str
    ours: Callable
    against: str
    theirs: Callable
    goal: str  # ">= 3": ours is to be 3 times as fast; "<= 2": to take twice as long at most
    allowed: int | None = None  # MB that ours may take beyond its inputs
    together: int = 1  # calls that are timed as one


def bench(
    *,
    only: Annotated[tuple[str, ...], "rows of the table; None = all"] | None = None,
    seconds: Annotated[float, "> 0", "for the timed turns of a comparison, of which there are at least 3"] = 20.0,
    out: Annotated[str, "file that keeps the table, too"] | None = None,
):
    """Print a table of ratios, ours against what a user would otherwise use, each measured side by side in one run."""
    for name in only or ():
        if name not in ROWS:
            raise InputError(f"--only {name}: no such row; there are {', '.join(ROWS)}")
    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes would slow each other; launch one")
    about = {"Python": platform.python_version(), "torch": torch.__version__, **processes.hardware(accelerator)}
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    print(*lines, sep="\n", flush=True)
    for name in only or ROWS:
        try:
            for contest in ROWS[name](accelerator):
                cells = compare(contest, accelerator.device, seconds)
                lines.append(f"| {name} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
        except ModuleNotFoundError as e:
            processes.say(f"{name}: a comparison is left out, {e}: pip install lightly faiss-cpu scikit-learn")
        accelerator.free_memory()
    if out:
        with write_whole(Path(out)) as file:
            file.writelines(f"{line}\n".encode() for line in lines)


def compare(contest: Contest, device: torch.device, seconds: float) -> list[str]:
    """Return the cells of a row: median times, the median ratio, MB. The calls take turns."""
    calls = (contest.ours, contest.theirs)
    warm_up = [timed(call, device, contest.together) for call in calls]
    megabytes = peak(contest.ours, device)
    turns = min(31, max(3, round(seconds / sum(warm_up))))
    times = [[timed(call, device, contest.together) for call in calls] for _ in range(turns)]
    ratios = [theirs / ours for ours, theirs in times]
    if contest.goal.startswith("<"):
        ratios = [1 / ratio for ratio in ratios]
    ours, theirs = (statistics.median(of_one) for of_one in zip(*times))
    memory = "" if megabytes is None else f"{megabytes:.0f}"
    if contest.allowed:
        memory += f" (<= {contest.allowed})"
    ratio = f"{statistics.median(ratios):.2f}"
    return [contest.what, f"{ours:.3g} s", contest.against, f"{theirs:.3g} s", ratio, contest.goal, memory]


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
        return None
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1e6


def resident(key: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak."""
    kilobytes = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return 1024 * int(kilobytes)


def energy(accelerator: Accelerator) -> Iterator[Contest]:
    """Forward and backward pass over the paper's heads."""
    weights = [torch.randn(shape, device=accelerator.device).requires_grad_() for shape in HEADS]

    def through(f: Callable, *arguments) -> Callable:
        return lambda: torch.autograd.grad(sum(f(w, *arguments) for w in weights), weights)

    for f, angular in ((amhe, True), (mhe, False)):
        for s in (2, 1, 0):
            ours = through(f, s)
            definition = through(energy_by_definition, s, angular)
            what = f"{f.__name__}, s = {s}, of the heads' four layers"
            yield Contest(what, ours, "its three lines under autograd", definition, ">= 3.5", allowed=64)


def trainer(accelerator: Accelerator, batch_size: int, **flags) -> tuple[Training, Callable]:
    """Make a training of `pretrain` on photos, and its next step, which returns the loss.

    A step has all of a run's: crops, views, networks, LARS, target, a look for faults.
    """
    images = data.load("photos", pretraining=True)
    flags = {**pretrain.__kwdefaults__, "batch_size": batch_size, **flags}
    values = resolve_recipe(flags, RECIPES, accelerator.num_processes)
    cfg = resolve_images(values, flags, images)
    torch.manual_seed(0)
    training = build(cfg, images, accelerator)
    split = images.pretraining.to(accelerator.device)
    batches = data.batches(split, images.size, batch_size, 0, itertools.count())
    numbers = {}

    def call() -> Tensor:
        crops, _, u = next(batches)
        terms = train_micro_batch(training, crops, u, 0.1, 0.99, step=0)
        numbers.update(first_fault(numbers, terms))
        return terms["loss"]

    return training, call


def step(accelerator: Accelerator) -> Iterator[Contest]:
    """What a step takes beside its networks, and what the regularizer adds to it: the paper's ResNet-18 and heads.

    The row has the first loss, which --dynamo_backend inductor may change by rounding alone.
    """
    # as in a run, a GPU still computes one step while the next one is launched
    sizes, n = ({1024: "<= 1.02", 128: "<= 1.10"}, 8) if accelerator.device.type == "cuda" else ({256: "<= 1.06"}, 1)
    flags = {"stem": "cifar", "hidden_dim": 4096}
    for batch_size, added in sizes.items():
        training, whole_step = trainer(accelerator, batch_size, **flags)
        random_views = torch.randn(2, batch_size, 3, 32, 32, device=accelerator.device)
        passes = functools.partial(passes_alone, training, *random_views)
        what = f"{n} x a step of {batch_size}, loss {whole_step():.4f} at first"
        yield Contest(what, whole_step, "its networks' passes alone", passes, "<= 1.10", together=n)
        _, with_energy = trainer(accelerator, batch_size, **flags, reg="amhe")
        what = f"{n} x a step of {batch_size} with --reg amhe"
        yield Contest(what, with_energy, "--reg none", whole_step, added, together=n)


def passes_alone(training: Training, v1: Tensor, v2: Tensor) -> None:
    """Forward and backward passes of BYOL's networks for two views (b, 3, size, size)."""
    _, (p1, p2), (t1, t2) = training.parallel(v1, v2)
    training.accelerator.backward(alignment(p1, t2) + alignment(p2, t1))
    training.optimizer.zero_grad()


def step_peer(accelerator: Accelerator) -> Iterator[Contest]:
    """lightly's example of BYOL: ResNet-18 as it is, heads of 1024, its own transform and loader."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms.byol_transform import BYOLView1Transform

    pictures = [to_pil_image(image) for image in data.load("photos").train.images]
    batch_size = 256
    steps = len(pictures) // batch_size
    _, next_step = trainer(accelerator, batch_size, stem="imagenet", hidden_dim=1024)

    def ours() -> None:
        for _ in range(steps):
            next_step()

    online = resnet18()
    online.fc = BYOLProjectionHead(512, 1024, 256)
    online.to(accelerator.device)
    target = copy.deepcopy(online).requires_grad_(False)
    predictor = BYOLPredictionHead(256, 1024, 256).to(accelerator.device)
    optimizer = torch.optim.SGD([*online.parameters(), *predictor.parameters()], lr=0.06)
    criterion = NegativeCosineSimilarity()
    collate = functools.partial(pairs_of_views, BYOLView1Transform(input_size=32, gaussian_blur=0))
    workers = {"num_workers": processes.cores(), "persistent_workers": True, "collate_fn": collate}
    loader = DataLoader(pictures, batch_size, shuffle=True, drop_last=True, **workers)

    def theirs() -> None:
        for views in loader:
            x0, x1 = views.to(accelerator.device).unbind(1)
            update_momentum(online, target, 0.99)
            with accelerator.autocast():
                loss = criterion(predictor(online(x0)), target(x1)) + criterion(predictor(online(x1)), target(x0))
            (0.5 * loss).backward()
            optimizer.step()
            optimizer.zero_grad()

    goal = ">= 3" if accelerator.device.type == "cuda" else ">= 1"
    yield Contest(f"{steps} steps of {batch_size}, 32 pixels", ours, "lightly's BYOL", theirs, goal)


def pairs_of_views(transform: Callable, pictures: list[Image.Image | Tensor]) -> Tensor:
    """Two views of each picture, (n, 2, 3, size, size), one picture at a time: what loaders make in other projects."""
    return torch.stack([torch.stack([transform(picture), transform(picture)]) for picture in pictures])


def pairs_of_crops(transform: Callable, paths: list[str]) -> Tensor:
    """The same of pictures in files, each read once."""
    return pairs_of_views(transform, [pil_to_tensor(Image.open(path).convert("RGB")) for path in paths])


def crop_and_flip(size: int) -> list[nn.Module]:
    """torchvision's random crop and flip, Appendix B.5."""
    crop = v2.RandomResizedCrop(size, (0.08, 1), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return [crop, v2.RandomHorizontalFlip()]


def views(_: Accelerator) -> Iterator[Contest]:
    """Two views of images in memory, on one core of the CPU."""
    patches = data.load("photos").train.images
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for side, size, n, blur_p in ((32, 32, 1000, 0.0), (256, 224, 20, 1.0)):
        images = resize(patches[:: len(patches) // n][:n], [side, side], antialias=True)
        ours = functools.partial(our_views, images, size, blur_p)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        blur = [v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2))] if blur_p else []  # 23 pixels at 224, Appendix B.5
        to_numbers = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        transform = v2.Compose([*crop_and_flip(size), jitter, v2.RandomGrayscale(0.2), *blur, *to_numbers])
        theirs = functools.partial(pairs_of_views, transform, [to_pil_image(image) for image in images])
        what = f"{side} to {size} pixels, blurred by {blur_p:g}, {n} images, on one core"
        yield Contest(what, ours, "torchvision on Pillow", theirs, ">= 3")
    torch.set_num_threads(threads)


def our_views(images: Tensor, size: int, blur_p: float) -> None:
    """Make two views of a batch."""
    u = torch.rand(2, len(images), DRAWS_PER_IMAGE)
    data.two_views(crop_flip(images, u, size), u, MEAN, STD, (blur_p, blur_p))


def stream(accelerator: Accelerator, n: int = 3000) -> Iterator[Contest]:
    """Crops of pictures in files, by as many worker processes as there are cores."""
    size, batch_size = 224, 100
    photographs = [Image.fromarray(photo()).resize((500, 375)) for photo in (astronaut, coffee, hubble_deep_field)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i:05}.jpg" for i in range(n)]
        for i, path in enumerate(paths):
            photographs[i % len(photographs)].save(path, quality=90)
        labels = torch.zeros(n, dtype=torch.long, device=accelerator.device)
        split = data.Split(Files(paths, workers=fitting_workers()), labels)

        def ours() -> None:
            for crops, _, _ in data.batches(split, size, batch_size, seed=0, steps=range(n // batch_size)):
                assert crops.shape == (2, batch_size, 3, size, size)

        def theirs() -> None:
            collate = functools.partial(pairs_of_crops, v2.Compose(crop_and_flip(size)))
            loader = DataLoader(paths, batch_size, shuffle=True, num_workers=processes.cores(), collate_fn=collate)
            for crops in loader:
                assert crops.shape == (batch_size, 2, 3, size, size)

        what = f"{n:,} JPEGs of 500 x 375 pixels, two crops to {size}"
        yield Contest(what, ours, "torchvision: decode, crop and flip twice", theirs, ">= 0.9")


@functools.cache
def features(accelerator: Accelerator) -> tuple[linear_eval.Features, linear_eval.Features]:
    """50,000 rows to learn from and 10,000 to judge by: an untrained ResNet-18's features of crops of photos."""
    images = data.load("photos")
    torch.manual_seed(0)
    encoder = models.build_encoder("resnet18", images.stem).to(accelerator.device)

    def of_crops(split: data.Split, steps: int) -> linear_eval.Features:
        rows, labels = [], []
        for crops, y, _ in data.batches(split.to(accelerator.device), images.size, 500, 0, range(steps), views=1):
            rows.append(models.embed(encoder, [normalise(crops[0], images.mean, images.std)]))
            labels.append(y)
        return linear_eval.Features(torch.cat(rows), torch.cat(labels))

    return of_crops(images.train, 100), of_crops(images.test, 20)


def knn(accelerator: Accelerator) -> Iterator[Contest]:
    """The weighted vote of the nearest neighbours."""
    k = 200
    bank, queries = features(accelerator)

    def ours() -> None:
        vote([bank.x], bank.labels, queries.x, queries.labels, (k,), 0.07)

    def products() -> None:
        for chunk in queries.x.split(500):
            (chunk @ bank.x.T).topk(k)

    what = "bank 50,000 x 512, 10,000 queries, k = 200"
    yield Contest(what, ours, "product and top-k alone", products, "<= 1.5", allowed=512)
    from faiss import IndexFlatIP

    def faiss() -> None:
        index = IndexFlatIP(bank.x.shape[1])
        index.add(bank.x.numpy(force=True))
        index.search(queries.x.numpy(force=True), k)

    yield Contest(what, ours, "faiss-cpu, IndexFlatIP", faiss, ">= 1", allowed=512)


def linear(accelerator: Accelerator) -> Iterator[Contest]:
    """The linear probe on cached features. Of both sides the accuracy stands in the row."""
    from sklearn.linear_model import LogisticRegression

    steps = 400
    train, test = features(accelerator)
    encoder = SimpleNamespace(num_features=train.x.shape[1])
    images = SimpleNamespace(classes=train.labels.unique())
    judged = SimpleNamespace(encoder=encoder, images=images, accelerator=accelerator, log=None)

    def ours() -> nn.Linear:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return linear_eval.fit(judged, train, {0.2: {}}, epochs=80, batch_size=100, weight_decay=0.0, seed=0)[0.2]

    def theirs() -> LogisticRegression:
        return LogisticRegression(max_iter=steps).fit(*(part.numpy(force=True) for part in train))

    top1 = 100 * (ours()(test.x).argmax(1) == test.labels).float().mean()
    score = 100 * theirs().score(*(part.numpy(force=True) for part in test))
    against = f"scikit-learn, {steps} steps of L-BFGS, top-1 {score:.1f}"
    yield Contest(f"80 epochs, 50,000 x 512, top-1 {top1:.1f}", ours, against, theirs, ">= 1")


ROWS = {"energy": energy, "views": views, "step": step, "step-peer": step_peer, "stream": stream}
ROWS |= {"knn": knn, "linear": linear}


if __name__ == "__main__":
    cli.run(bench)

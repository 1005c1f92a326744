"""One step by hand, every method and regularizer, schedules, and losses that go wrong."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, TINY, assert_same_run, random, rows_of, tiny, words_of

import data
import models
from harness import checkpoint, settings
from harness.measure import representations
from knn_eval import knn_eval
from lib.rivals import directions, koleo, orthogonality, sigreg
from pretrain import RECIPES, lr_at, objective, pretrain, tau_at
from regularizers import alignment, energy_by_definition, mhe, uniformity


def test_the_same_seed_makes_the_same_run(command, folder, trained, tmp_path):
    code, rows, _ = command(pretrain, "--dataset", folder, "--reg", "mhe", "--out", "again", *SMALL)
    assert code == 0 and rows == rows_of(tmp_path / "again")
    assert_same_run(tmp_path / "again", trained)


def test_what_a_run_leaves(folder, trained):
    files = [".lock", ".log.lock", "ckpt.safetensors", "encoder", "metrics.jsonl"]
    assert sorted(p.name for p in trained.iterdir()) == files
    assert sorted(p.name for p in (trained / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    tensors, description = checkpoint.load_file(trained / "ckpt.safetensors")
    state = {"momentum/encoder", "momentum/projector", "momentum/predictor"}
    assert {name.split(".")[0] for name in tensors} == {"encoder", "projector", "predictor", "target"} | state
    assert description["epoch"] == 2 and description["settings"]["dataset"] == str(folder)
    assert description["settings"]["warmup"] == pytest.approx(10 * 2 / 300)
    assert description["view"]["size"] == 32 and len(description["view"]["mean"]) == 3
    counts = {x.item() for name, x in tensors.items() if name.endswith("num_batches_tracked")}
    assert counts == {2 * 2 * 3}  # of each view, in three steps of two epochs


def lars_direction(w, grad, weight_decay):
    """You et al. (2017): the decayed gradient at 1e-3 of the weight's norm; biases and norms take the bare gradient."""
    if w.ndim == 1:
        return grad
    return (grad + weight_decay * w) * 1e-3 * w.norm() / (grad.norm() + weight_decay * w.norm())


def sgd_direction(w, grad, weight_decay):
    """The decayed gradient; biases and norms take the bare one."""
    return grad if w.ndim == 1 else grad + weight_decay * w


def test_four_steps_are_those_written_by_hand(command, folder, tmp_path):
    """Two epochs of two steps: momentum, warm-up, cosine, and the target after each step by the tau of that step."""
    flags = tiny(batch_size=24, epochs=2, lr=2, warmup=1, weight_decay=0.1, tau=0.7, seed=5, eval_every=0, out="run")
    code, rows, _ = command(pretrain, "--dataset", folder, *flags)
    rates = (0.09375, 0.1875, 0.1875, 0.09375)  # 2 * 24 / 256 at the top; two steps up, two of a cosine down
    taus = [1 - 0.3 * (1 + cosine) / 2 for cosine in (1, 0.5**0.5, 0, -(0.5**0.5))]
    assert code == 0 and [row["lr"] for row in rows[1:]] == pytest.approx([rates[1], rates[3]])
    assert [row["tau"] for row in rows[1:]] == pytest.approx([taus[1], taus[3]])
    tensors, _ = checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")

    torch.manual_seed(5)
    network = models.BYOL("test_resnet", "imagenet", "bn", 32, 16)
    pictures = data.load(str(folder))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    online = [(name, w) for name, w in network.named_parameters() if w.requires_grad]
    velocity = dict.fromkeys(dict(online), 0)
    batches = data.batches(pictures.train, 32, 24, 5, range(4))
    for (crops, _, u), rate, tau in zip(batches, rates, taus):
        _, p, t = network(*data.two_views(crops, u, pictures.mean, pictures.std))
        network.zero_grad()
        (alignment(p[0], t[1]) + alignment(p[1], t[0])).backward()
        for name, w in online:
            velocity[name] = 0.9 * velocity[name] + lars_direction(w.detach(), w.grad, 0.1)
            w.data -= rate * velocity[name]
            if not name.startswith("predictor."):
                target = network.get_parameter(f"target.{name}")
                target.data = tau * target + (1 - tau) * w.detach()
    for name, x in network.state_dict().items():  # statistics of BatchNorm, too: the target keeps its own
        moved = (x - before[name]).double().norm()
        assert (tensors[name] - x).double().norm() < 5e-3 * moved + 1e-6, name


@pytest.mark.parametrize("reg", ["mhe", "uniform"])
def test_accumulation_averages_gradients_over_micro_batches(command, folder, tmp_path, reg):
    """One step on 48 images in 8 parts: the large batch's for BYOL and energies, an average of parts for uniformity."""
    flags = tiny(norm="none", batch_size=48, epochs=1, lr=8, weight=3, eval_every=0, reg=reg)
    one = command(pretrain, "--dataset", folder, *flags, "--out", "one")[1][1]
    eight = command(pretrain, "--dataset", folder, *flags, "--accumulate", 8, "--out", "eight")[1][1]
    assert eight["step"] == one["step"] == 1 and eight["byol"] == pytest.approx(one["byol"], rel=1e-5)
    assert eight["lr"] == one["lr"] == 8 * 48 / 256

    torch.manual_seed(0)
    network = models.BYOL("test_resnet", "imagenet", "none", 32, 16)
    before = {name: x.clone() for name, x in network.named_parameters()}
    pictures, loss = data.load(str(folder)), 0
    for crops, _, u in data.batches(pictures.train, 32, 48, 0, range(1), micro_batches=8):
        z, p, t = network(*data.two_views(crops, u, pictures.mean, pictures.std))
        loss += (alignment(p[0], t[1]) + alignment(p[1], t[0])) / 8
        loss += 3 * (uniformity(z[0]) + uniformity(z[1])) / 2 / 8 if reg == "uniform" else 0
    loss += 3 * sum(mhe(w) for w in models.neurons(network, ("projector", "predictor")).values()) if reg == "mhe" else 0
    loss.backward()
    assert eight["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for run, is_same in (("eight", True), ("one", reg == "mhe")):
        tensors, _ = checkpoint.load_file(tmp_path / run / "ckpt.safetensors")
        off = size = 0
        for name, w in network.named_parameters():
            if w.requires_grad:
                step = -1.5 * lars_direction(before[name], w.grad, 1e-6)
                off += (tensors[name] - before[name] - step).square().sum()
                size += step.square().sum()
        assert (off < 1e-6 * size) == is_same, (run, off / size)


def info_nce_with_queue(z, t, queue, temperature):
    """He et al. (2020), Eq. 1, image by image."""
    losses = []
    for query, key in zip(z, t):
        similarity = (torch.cat([key[None], queue]) @ query / temperature).exp()
        losses.append(-(similarity[0] / similarity.sum()).log())
    return sum(losses) / len(losses)


def barlow_twins_of(z):
    """Zbontar et al. (2021), Eq. 1, entry by entry of the cross-correlation matrix."""
    x, y = ((view - view.mean(0)) / view.std(0, correction=0) for view in z)
    loss = 0
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            correlation = (x[:, i] * y[:, j]).mean()
            loss += (1 - correlation) ** 2 if i == j else 0.0051 * correlation**2
    return loss


def loss_by_hand(method, z, p, t, temperature, queue):
    """A method's loss of projections, predictions and targets (2, n, d), by its definition."""
    if method == "barlow":
        return barlow_twins_of(z)
    z, p, t = (x / x.norm(dim=2, keepdim=True) for x in (z, p, t))
    if method == "byol":
        return ((p[0] - t[1]) ** 2 + (p[1] - t[0]) ** 2).sum(1).mean()
    if method == "simsiam":
        return -((p[0] * t[1]).sum(1) + (p[1] * t[0]).sum(1)).mean() / 2
    if method == "moco":
        return sum(info_nce_with_queue(z[i], t[1 - i], queue, temperature) for i in (0, 1)) / 2
    assert method == "simclr"
    similarity = (z.flatten(0, 1) @ z.flatten(0, 1).T / temperature).exp()
    positive = similarity.roll(z.shape[1], 0).diagonal()
    return -(positive / (similarity.sum(0) - similarity.diagonal())).log().mean()


FIRST_STEPS = (  # method, further flags, how the optimizer goes down
    ("byol", {"tau": 0.7, "reg": "mhe", "weight": 3, "jitter": 0.5, "grey": 0.6, "optimizer": "sgd"}, sgd_direction),
    ("simsiam", {"out_dim": 64}, lars_direction),  # four hidden neurons would give some images the prediction 0
    ("simclr", {"temperature": 0.1}, lars_direction),
    ("moco", {"tau": 0.7, "temperature": 0.2, "queue": 40}, lars_direction),
    ("barlow", {}, lars_direction),
)


@pytest.mark.parametrize("method, flags, direction", FIRST_STEPS, ids=models.METHODS)
def test_the_first_step_of_a_method_is_the_one_written_by_hand(command, folder, tmp_path, method, flags, direction):
    """One batch of all images: seed, views, networks, loss, optimizer, target, and MoCo's queue of the last keys."""
    flags = {"out_dim": 16, "method": method, **flags}
    words = tiny(batch_size=48, epochs=1, lr=2, warmup=0, weight_decay=0.1, eval_every=0, seed=5, out="run", **flags)
    code, rows, prose = command(pretrain, "--dataset", folder, *words)
    assert code == 0 and "peak rate 0.375 (lr * batch_size / 256)" in prose
    tensors, _ = checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")

    torch.manual_seed(5)
    network = models.METHODS[method].network("test_resnet", "imagenet", "bn", 32, flags["out_dim"], queue=40)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    pictures = data.load(str(folder))
    ((crops, _, u),) = data.batches(pictures.train, 32, 48, 5, range(1))
    colours = {"jitter": flags.get("jitter", 1), "grey_p": flags.get("grey", 0.2)}
    both = torch.cat(data.two_views(crops, u, pictures.mean, pictures.std, **colours))
    z = network.projector(network.encoder(both))
    p = network.predictor(z) if method in ("byol", "simsiam") else z
    with torch.no_grad():
        t = network.target(both) if method in ("byol", "moco") else z.detach()
    z, p, t = (torch.stack(x.chunk(2)) for x in (z, p, t))
    loss = loss_by_hand(method, z, p, t, flags.get("temperature"), before.get("queue"))
    assert rows[1][method] == pytest.approx(loss.item(), rel=1e-4)
    if "reg" in flags:
        heads = [network.projector.hidden, network.projector.out, network.predictor.hidden, network.predictor.out]
        loss = loss + 3 * sum(energy_by_definition(head.weight, 2, angular=False) for head in heads)
    loss.backward()
    assert rows[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, w in network.named_parameters():
        if w.requires_grad:
            after = before[name] - 0.375 * direction(before[name], w.grad, 0.1)
            torch.testing.assert_close(tensors[name], after, rtol=1e-3, atol=1e-5)
            if f"target.{name}" in before:
                target = 0.7 * before[f"target.{name}"] + 0.3 * after
                torch.testing.assert_close(tensors[f"target.{name}"], target, rtol=1e-3, atol=1e-5)
    if method == "moco":
        keys = torch.nn.functional.normalize(t.flatten(0, 1))[-40:]  # from row 0 on
        torch.testing.assert_close(tensors["queue"], keys, rtol=1e-4, atol=1e-5)
        assert tensors["oldest"] == 0


OBJECTIVES = [("none", 2), ("uniform", 2), ("mhe", 0), ("mhe", 1.5), ("amhe", 0), ("amhe", 3)]  # --reg, --s
OBJECTIVES += [("ortho", 2), ("koleo", 2), ("sigreg", 2)]


@pytest.mark.parametrize("method", models.METHODS)
@pytest.mark.parametrize("reg, s", OBJECTIVES)
def test_objective_is_the_one_written_by_hand(method, reg, s):
    """In float64: the method's loss, Eq. 2 or Eq. 7 with its lambda, and what is for the log alone."""
    values = {"method": method, "temperature": 0.2, "reg": reg, "s": s, "weight": 3.0, "accumulate": 1, "seed": 4}
    cfg = SimpleNamespace(**values, term=settings.TERMS[reg])
    network = models.METHODS[method].network("test_resnet", "imagenet", "bn", 8, 5, queue=9).double()
    z, p, t = random(3, 2, 12, 5, dtype=torch.float64)
    layers = {name: random(7, 4, dtype=torch.float64, seed=seed) for seed, name in enumerate(("first", "second"))}
    terms = objective(cfg, network, layers, 6, z, p, t)

    loss = loss_by_hand(method, z, p, t, 0.2, getattr(network, "queue", None))
    rivals = {"ortho": sum(orthogonality(w) for w in layers.values()), "koleo": sum(map(koleo, z)) / 2}
    rivals["sigreg"] = sum(sigreg(view, directions(view, seed=4, step=6)) for view in z) / 2
    z = z / z.norm(dim=2, keepdim=True)
    uniform = sum(torch.pdist(view).square().mul(-2).exp().mean().log() for view in z) / 2
    energies = [energy_by_definition(w, s, angular=reg == "amhe") for w in layers.values()]
    term = {None: 0, "uniformity": uniform, "energy": sum(energies), **rivals}[cfg.term]
    spread = (z.square().mean(1) - z.mean(1).square()).mul(12 / 11).sqrt().mean()
    expected = {method: loss, "loss": loss + 3 * term, "uniformity": uniform, "std": spread}
    expected |= {"alignment": (z[0] - z[1]).square().sum(1).mean()}
    if cfg.term == "energy":
        expected |= {"energy": sum(energies), "energy/first": energies[0], "energy/second": energies[1]}
    expected |= {name: value for name, value in rivals.items() if name == reg}
    assert {name: x.item() for name, x in terms.items()} == pytest.approx({n: float(x) for n, x in expected.items()})


PARTS_OF = {  # beside encoder and projector
    "byol": ["predictor", "target"],
    "simsiam": ["predictor"],
    "simclr": [],
    "moco": ["target", "queue", "oldest"],
    "barlow": [],
}


def test_every_list_and_page_has_every_method():
    assert set(PARTS_OF) == {method for method, _, _ in FIRST_STEPS} == set(models.METHODS)
    in_two_processes = (ROOT / "tests" / "test_processes.py").read_text()
    trained = " ".join(flags for flags, _ in TRAINED)
    for method in set(models.METHODS) - {"byol"}:
        assert f"--method {method}" in in_two_processes and f"--method {method}" in trained
        assert f"| `--method {method}` |" in (ROOT / "docs" / "running.md").read_text()
        for page in (ROOT / "README.md", ROOT / "docs" / "files.md"):
            assert f"`{method}`" in page.read_text().replace("--method ", ""), (page, method)


TRAINED = [
    ("--reg uniform --weight 0.5 --blur_p 0.5 --holdout --eval_crop 1.0", "byol + 0.5 uniformity"),
    ("--reg mhe --s 1.5 --reg_on predictor,encoder,projector --weight 1 --norm none", "|w_i - w_j|^-1.5"),
    ("--predictor none --reg amhe --s 0 --reg_on encoder,projector", "log(1 / arccos(w_i . w_j))"),
    ("--method simclr --reg amhe --temperature 0.1", "loss = simclr + 10 energy"),
    ("--method simsiam --reg mhe", "simsiam = -E cos(p1, z2) / 2 - E cos(p2, z1) / 2"),
    ("--method moco --reg uniform", "j: the other view, 24 earlier ones"),
    ("--method barlow --reg amhe", "barlow = sum (1 - C_ii)^2 + 0.0051 sum C_ij^2"),
    ("--reg ortho --reg_on predictor --accumulate 2", "loss = byol + 1 ortho"),
    ("--method simsiam --reg koleo", "koleo = E -log |z_i - z_j|"),
    ("--method barlow --reg sigreg --accumulate 2", "sigreg = Epps-Pulley statistic of z"),
    ("--model alexnet --out_dim 2 --reg mhe --accumulate 2", "projector.out (2 x 32)"),
]


@pytest.mark.parametrize("flags, term", TRAINED)
def test_every_method_and_regularizer_trains(command, folder, tmp_path, flags, term):
    others = TINY | {"epochs": 1, "lr": 8, "out": "run"}
    if "alexnet" in flags:
        others.pop("stem")
    kept = words_of({name: x for name, x in others.items() if f"--{name}" not in flags.split()})
    code, rows, prose = command(pretrain, "--dataset", folder, *flags.split(), *kept)
    assert code == 0 and term in prose, prose
    settings, row, online = rows[0]["settings"], rows[3], rows[4]
    assert [floor["of"] for floor in rows[1:3]] == ["untrained", "pixels"]
    method, reg, weight = (settings[name] for name in ("method", "reg", "weight"))
    weighed = {"none": 0, "uniform": row["uniformity"]}.get(reg, row.get(reg, row["energy"]))
    assert row["loss"] == pytest.approx(row[method] + weight * weighed, rel=1e-5)
    layers = [name for name in row if name.startswith("energy/")]
    regularized = {part.split(".")[0] for part in settings["reg_on"]}
    assert {name.split("/")[1].split(".")[0] for name in layers} == regularized
    assert row["energy"] == pytest.approx(sum(row[name] for name in layers), rel=1e-5)
    assert ("tau" in row) == ("target" in PARTS_OF[method])
    assert ("predictor" in settings["reg_on"]) <= ("predictor" in PARTS_OF[method])
    assert online["split"] == ("holdout" if settings["holdout"] else "test")
    tensors, description = checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")
    parts = {"encoder", "projector", *PARTS_OF[method]}
    if settings["predictor"] == "none":
        parts.remove("predictor")
    assert {name.split(".")[0] for name in tensors if "/" not in name} == parts
    assert any("running_mean" in name for name in tensors) == (settings["norm"] == "bn")
    assert description["view"]["crop"] == settings["eval_crop"]
    code, rows, _ = command(knn_eval, tmp_path / "run" / "encoder", "--k", online["k"], "--nofloors")
    assert code == 0 and (rows[0]["top1"] == online["top1"] or settings["holdout"])


PROJECTOR = {"projector.hidden", "projector.out"}
PREDICTOR = {"predictor.hidden", "predictor.out"}


@pytest.mark.parametrize(
    "flags, regularized",
    [
        ({"out_dim": 2}, PROJECTOR | {"predictor.out"}),
        ({"out_dim": 2, "reg_on": ("predictor",)}, PREDICTOR),
        ({"out_dim": 3}, PROJECTOR | PREDICTOR),
        ({"out_dim": 8, "method": "simsiam"}, PROJECTOR | {"predictor.hidden"}),
        ({"out_dim": 1, "hidden_dim": 2}, {"projector.hidden"}),
        ({"hidden_dim": 2, "method": "simclr"}, {"projector.hidden"}),
    ],
)
def test_neurons_of_fewer_than_3_dimensions_are_regularized_by_name_alone(flags, regularized):
    """4,096 neurons on the circle of Figure 3 have the energy 10,566, which outweighs every loss."""
    by_name = "reg_on" in flags
    flags = pretrain.__kwdefaults__ | {"dataset": "photos", "reg": "mhe", "hidden_dim": 32} | flags
    values = settings.resolve_recipe(flags, RECIPES, world=1)
    cfg = settings.Settings(**(values | {"stem": "cifar", "blur_p": (0, 0)}))
    with torch.device("meta"):
        network = models.METHODS[cfg.method].network("resnet18", "cifar", "bn", cfg.hidden_dim, cfg.out_dim)
    layers = models.neurons(network, cfg.reg_on)
    assert set(layers) == regularized
    said = settings.announcement(cfg, flags, layers)
    is_whole = by_name or regularized == PROJECTOR | PREDICTOR
    heads = "projector" if cfg.method == "simclr" else "projector,predictor"
    reason = f"layers whose neurons have fewer than 3 dimensions; --reg_on {heads} takes them in"
    assert [line for line in said if line.startswith("left out")] == ([] if is_whole else [f"left out: {reason}"])


def test_a_tracker_gets_the_numbers_of_the_log(command, folder, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda _, values, step: sent.append((step, values)))
    code, rows, _ = command(pretrain, "--dataset", folder, *SMALL, "--out", "run")
    assert code == 0 and len(sent) == len(rows) - 1 > 0
    for row, (step, values) in zip(rows[1:], sent):
        of = f"{row['of']}/" if "of" in row else ""
        assert step == row["step"] and values == {of + k: x for k, x in row.items() if isinstance(x, float)}
    (tmp_path / "trackio").mkdir()  # a folder of that name is not the package
    code, rows, err = command(pretrain, "--dataset", folder, *SMALL, "--tracker", "trackio", "--out", "other")
    assert code == 2 and err == "pretrain.py: --tracker trackio: is not installed; pip install trackio\n"
    assert not (tmp_path / "other").exists()


def test_an_encoder_with_equal_features_is_called_dead(photos):
    """In the row of its representations; that of its projections: tests/test_measure.py."""
    encoder = models.build_encoder("test_resnet", "imagenet", "none")
    view = photos.view(0.875)
    assert "dead" not in representations(encoder, photos.test, view)
    for w in encoder.parameters():
        w.data.zero_()
    row = representations(encoder, photos.test, view)
    assert row["dead"] is True and row["g2"] == 1


def test_schedules_are_those_of_appendix_b2():
    steps, warmup, peak = 100, 10, 6.0
    rates = [lr_at(k, steps, warmup, peak) for k in range(steps)]
    assert rates[0] == pytest.approx(peak / 10) and rates[9] == peak and rates[10] == peak
    assert rates[55] == pytest.approx(peak / 2) and 0 < rates[99] < 0.01 * peak
    assert lr_at(0, 5, 0, peak) == peak
    assert [tau_at(k, steps, 0.99) for k in (0, 50, 100)] == pytest.approx([0.99, 0.995, 1.0])
    assert [tau_at(k, steps, 0.9, 0.96) for k in (0, 50, 100)] == pytest.approx([0.9, 0.93, 0.96])
    assert [tau_at(k, steps, 0.97, 0.97) for k in (0, 50, 100)] == [0.97] * 3

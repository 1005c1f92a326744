"""The user's journey: pre-train, judge, and every wrong turn on the way."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

import data
import models
from harness import processes
from harness.augment import two_views
from knn_eval import knn_eval, vote
from linear_eval import linear_eval
from pretrain import Lars, lr_at, parameter_groups, pretrain, tau_at
from regularizers import alignment, energy_by_definition, mhe, uniformity

ROOT = Path(__file__).parent.parent
SMALL = "--model test_resnet --stem imagenet --hidden_dim 32 --out_dim 16".split()
SMALL += "--batch_size 16 --epochs 2 --eval_every 1 --lr 8".split()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_from_the_command_line_to_both_scores(tmp_path):
    """accelerate launch as a newcomer types it, one epoch of photos, and the two commands that the end names."""

    def launch(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    flags = "--reg amhe --s 2 --epochs 1 --batch_size 250 --model test_resnet".split()
    rows, prose = launch("accelerate", "launch", str(ROOT / "pretrain.py"), *flags)
    run = tmp_path / "runs" / "photos-amhe-modeltest_resnet-epochs1-batch_size250"
    assert rows == rows_of(run) and "loss = byol + 10 energy" in prose
    settings, trained, online, inner = rows
    assert settings["settings"]["weight"] == 10 and settings["settings"]["hidden_dim"] == 512
    assert trained["step"] == 8 and trained["loss"] == pytest.approx(trained["byol"] + 10 * trained["energy"], rel=1e-5)
    assert 1.5 < trained["energy"] < 1.8 and 0 < trained["byol"] < 8
    blocks = {f"block/layer{stage}.0" for stage in (1, 2, 3, 4)}
    assert blocks < inner.keys() and 0 < inner["block/layer4.0"] < inner["block/layer1.0"] < 9 and 0 < inner["g2"] < 1
    ckpt = Path("runs") / run.name / "ckpt.safetensors"
    for stage in ("knn_eval.py", "linear_eval.py"):
        assert f"python {stage} {ckpt}" in prose

    scores, _ = launch(sys.executable, str(ROOT / "knn_eval.py"), str(ckpt))
    by = {(row["of"], row["k"]): row["top1"] for row in scores}
    assert by.keys() == {(of, k) for of in ("trained", "untrained", "pixels") for k in (10, 20, 100, 200)}
    assert by["trained", 20] == online["top1"]
    assert 40 < by["pixels", 20] < 50 < by["untrained", 20] < 70
    probe, _ = launch(sys.executable, str(ROOT / "linear_eval.py"), str(ckpt), "--epochs", "3", "--cached")
    assert probe[-1]["top1"] > 50 and probe[-1]["top5"] > 80
    assert rows_of(run) == rows + scores + probe


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A finished run on the small folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    argv = ["pretrain.py", "--dataset", str(folder), "--reg", "mhe", "--out", str(out), *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        pretrain(
            dataset=str(folder), model="test_resnet", reg="mhe", out=str(out), stem="imagenet", hidden_dim=32,
            out_dim=16, batch_size=16, epochs=2, eval_every=1, lr=8.0,
        )  # fmt: skip
    return out


def test_the_same_seed_makes_the_same_run(command, folder, trained, tmp_path):
    code, rows, _ = command(pretrain, "--dataset", folder, "--reg", "mhe", "--out", tmp_path / "again", *SMALL)
    assert code == 0
    for name in ("ckpt", "encoder"):
        first, again = (models.load(run / f"{name}.safetensors") for run in (trained, tmp_path / "again"))
        assert all(torch.equal(x, again[0][key]) for key, x in first[0].items())
        assert {**first[1], "command": None} == {**again[1], "command": None}
    timeless = [{k: v for k, v in row.items() if k not in ("images_per_s", "command")} for row in rows]
    assert timeless == [
        {k: v for k, v in row.items() if k not in ("images_per_s", "command")} for row in rows_of(trained)
    ]


def test_what_a_run_leaves(folder, trained):
    files = [".lock", "ckpt.safetensors", "encoder.safetensors", "metrics.jsonl"]
    assert sorted(p.name for p in trained.iterdir()) == files
    tensors, description = models.load(trained / "ckpt.safetensors")
    state = {"rng/cpu", "momentum/encoder", "momentum/projector", "momentum/predictor"}
    assert {name.split(".")[0] for name in tensors} == {"encoder", "projector", "predictor", "target"} | state
    assert description["epoch"] == 2 and description["settings"]["dataset"] == str(folder)
    assert description["settings"]["warmup"] == pytest.approx(10 * 2 / 300)
    assert description["view"]["size"] == 32 and len(description["view"]["mean"]) == 3


def test_one_step_is_the_one_written_by_hand(command, folder, tmp_path):
    """Seed, order, views, Eq. 3 in both directions, Eq. 7, LARS and the target, from one batch of all images."""
    flags = "--stem imagenet --hidden_dim 32 --out_dim 16 --batch_size 48 --epochs 1 --lr 8 --weight_decay 0.1".split()
    flags += "--reg mhe --weight 3 --tau 0.7 --seed 5 --out run".split()
    code, rows, _ = command(pretrain, "--dataset", folder, *flags)
    assert code == 0 and rows[1]["lr"] == 8 * 48 / 256 and rows[1]["tau"] == pytest.approx(0.7)
    tensors, _ = models.load(tmp_path / "run" / "ckpt.safetensors")

    torch.manual_seed(5)
    network = models.BYOL("resnet18", "imagenet", "bn", 32, 16)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    pictures = data.load(str(folder))
    ((crops, _, u),) = data.batches(pictures.train, 48, 32, 5, [1])
    both = torch.cat(two_views(crops, u, pictures.mean, pictures.std))
    z1, z2 = (z := network.projector(network.encoder(both))).chunk(2)
    p1, p2 = network.predictor(z).chunk(2)
    with torch.no_grad():
        t1, t2 = network.target.projector(network.target.encoder(both)).chunk(2)

    def distance(a, b):
        return (2 - 2 * torch.nn.functional.cosine_similarity(a, b)).mean()

    byol = distance(p1, t2) + distance(p2, t1)
    heads = [network.projector.hidden, network.projector.out, network.predictor.hidden, network.predictor.out]
    energy = sum(energy_by_definition(head.weight, 2, angular=False) for head in heads)
    loss = byol + 3 * energy
    loss.backward()
    expected = {"byol": byol, "energy": energy, "loss": loss, "alignment": distance(z1, z2)}
    assert {name: rows[1][name] for name in expected} == {n: pytest.approx(e.item(), 1e-4) for n, e in expected.items()}
    for name, w in network.named_parameters():
        if w.requires_grad:
            after = before[name] - 1.5 * lars_direction(before[name], w.grad, 0.1)
            torch.testing.assert_close(tensors[name], after, rtol=1e-3, atol=1e-5)
            if not name.startswith("predictor."):
                target = 0.7 * before[f"target.{name}"] + 0.3 * after
                torch.testing.assert_close(tensors[f"target.{name}"], target, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reg", ["mhe", "uniform"])
def test_accumulation_averages_gradients_over_micro_batches(command, folder, tmp_path, reg):
    """One step on 48 images in 8 parts: the large batch's for BYOL and energies, an average of parts for uniformity."""
    flags = "--stem imagenet --norm none --hidden_dim 32 --out_dim 16 --batch_size 48 --epochs 1 --lr 8".split()
    flags += ["--reg", reg, "--weight", 3]
    one = command(pretrain, "--dataset", folder, *flags, "--out", "one")[1][1]
    eight = command(pretrain, "--dataset", folder, *flags, "--accumulate", 8, "--out", "eight")[1][1]
    assert eight["step"] == one["step"] == 1 and eight["byol"] == pytest.approx(one["byol"], rel=1e-5)
    assert eight["lr"] == one["lr"] == 8 * 48 / 256

    torch.manual_seed(0)
    network = models.BYOL("resnet18", "imagenet", "none", 32, 16)
    before = {name: x.clone() for name, x in network.named_parameters()}
    pictures, loss = data.load(str(folder)), 0
    for crops, _, u in data.batches(pictures.train, 48, 32, 0, [1], parts=8):
        z, p, t = network(*two_views(crops, u, pictures.mean, pictures.std))
        loss += (alignment(p[0], t[1]) + alignment(p[1], t[0])) / 8
        loss += 3 * (uniformity(z[0]) + uniformity(z[1])) / 2 / 8 if reg == "uniform" else 0
    loss += 3 * sum(mhe(w) for w in models.neurons(network, ("projector", "predictor")).values()) if reg == "mhe" else 0
    loss.backward()
    assert eight["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for run, same in (("eight", True), ("one", reg == "mhe")):
        tensors = models.load(tmp_path / run / "ckpt.safetensors")[0]
        steps = {name: tensors[name] - x for name, x in before.items() if x.requires_grad}
        expected = {
            name: -1.5 * lars_direction(before[name], dict(network.named_parameters())[name].grad, 1e-6)
            for name in steps
        }
        off = sum((steps[n] - x).norm() ** 2 for n, x in expected.items()) / sum(
            x.norm() ** 2 for x in expected.values()
        )
        assert (off < 1e-6) == same, (run, off)


def lars_direction(w, grad, weight_decay):
    """You et al. (2017): the decayed gradient at 1e-3 of the weight's norm; biases and norms take the bare gradient."""
    if w.ndim == 1:
        return grad
    return (grad + weight_decay * w) * 1e-3 * w.norm() / (grad.norm() + weight_decay * w.norm())


@pytest.mark.parametrize("file", ["ckpt.safetensors", "encoder.safetensors"])
def test_both_files_are_judged_alike(command, trained, file):
    code, rows, _ = command(knn_eval, trained / file, "--k", "5,20,100", "--floors")
    assert code == 0 and [row["k"] for row in rows if row["of"] == "trained"] == [5, 20, 48]  # clipped to the bank
    assert [r["of"] for r in rows] == ["trained"] * 3 + ["untrained"] * 3 + ["pixels"] * 3
    code, probe, _ = command(linear_eval, trained / file, "--epochs", 4, "--batch_size", 20)
    assert code == 0 and [row["epoch"] for row in probe] == [1, 2, 3, 4, 4] and probe[-1]["features"] == "augmented"
    assert probe[-1]["top1"] > 40 and probe[-1]["top5"] == 100
    assert rows_of(trained)[-14:] == rows + probe


def test_the_target_and_another_crop_are_judged(command, trained):
    of = ["--k", 5, "--nofloors"]
    _, (online,), _ = command(knn_eval, trained / "ckpt.safetensors", *of)
    _, (target,), _ = command(knn_eval, trained / "ckpt.safetensors", *of, "--net", "target", "--eval_crop", "1")
    assert (online["net"], online["eval_crop"]) == ("online", 0.875) and (target["net"], target["eval_crop"]) == (
        "target",
        1,
    )
    online, _ = models.load_encoder(trained / "ckpt.safetensors")
    target, _ = models.load_encoder(trained / "ckpt.safetensors", "target")
    tensors, _ = models.load(trained / "ckpt.safetensors")
    assert torch.equal(target.bn1.weight, tensors["target.encoder.bn1.weight"])
    assert not torch.equal(target.bn1.weight, online.bn1.weight)
    code, _, err = command(linear_eval, trained / "encoder.safetensors", "--net", "target")
    assert code == 2 and "encoder.safetensors: holds no target network" in err


@pytest.mark.parametrize("cached", [[], ["--cached"]])
def test_a_sweep_takes_the_best_rate_on_the_hold_out(command, trained, cached):
    """Of each class, the folder's 16 training images give 2; the test set is judged once, at the end."""
    flags = ["--sweep", "--epochs", 2, "--batch_size", 20, *cached]
    code, rows, _ = command(linear_eval, trained / "encoder.safetensors", *flags)
    assert code == 0
    tops = {row["sweep"]: row["top1"] for row in rows if row.get("split") == "holdout"}
    assert list(tops) == [0.4, 0.3, 0.2, 0.1, 0.05]
    last = rows[-1]
    assert last["swept"] and tops[last["lr"]] == max(tops.values()) and (last["split"], last["train"]) == ("test", 48)
    assert [row.get("split") for row in rows].count("test") == 1
    code, _, err = command(linear_eval, trained / "encoder.safetensors", "--sweep", "--lr", "0.1")
    assert code == 2 and "--lr 0.1: has no effect with --sweep" in err


def test_a_checkpoint_judges_another_set(command, trained):
    code, rows, _ = command(knn_eval, trained / "ckpt.safetensors", "--dataset", "photos", "--k", 20, "--nofloors")
    assert code == 0 and (rows[0]["dataset"], rows[0]["bank"], rows[0]["queries"]) == ("photos", 2000, 500)


def test_a_checkpoint_elsewhere_is_judged_without_a_log(command, trained, tmp_path):
    (tmp_path / "moved.safetensors").write_bytes((trained / "encoder.safetensors").read_bytes())
    assert command(knn_eval, tmp_path / "moved.safetensors", "--k", 1, "--nofloors")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["moved.safetensors"]


@pytest.mark.parametrize(
    "flags, term",
    [
        ("--reg none", "byol"),
        ("--reg uniform --weight 0.5", "byol + 0.5 uniformity"),
        ("--reg amhe --s 0 --reg_on encoder", "log(1 / arccos(w_i . w_j))"),
        ("--reg mhe --s 1.5 --reg_on predictor,encoder,projector --weight 1", "|w_i - w_j|^-1.5"),
        ("--method simclr", "E -log softmax(z_i . z_j / 0.5)"),
        ("--method simclr --reg amhe --temperature 0.1", "loss = simclr + 10 energy"),
        ("--method simclr --reg uniform", "loss = simclr + 0.125 uniformity"),
        ("--norm none --reg amhe --reg_on projector", "projector.out (16 x 32)"),
        ("--blur_p 0.5 --holdout --eval_crop 1.0", "flag: epochs 2, batch_size 16, lr 8, hidden_dim 32, out_dim 16"),
        ("--model alexnet --out_dim 2 --reg mhe --accumulate 2 --epochs 1", "projector.out (2 x 32)"),
    ],
)
def test_every_method_and_regularizer_trains(command, folder, tmp_path, flags, term):
    small = [x for pair in zip(SMALL[::2], SMALL[1::2]) if pair[0] not in flags for x in pair]
    small = [x for x in small if x not in ("--stem", "imagenet")] if "alexnet" in flags else small
    code, rows, prose = command(pretrain, "--dataset", folder, *flags.split(), *small, "--out", "run")
    assert code == 0 and term in prose, prose
    settings, row, online = rows[0]["settings"], rows[1], rows[2]
    method, reg, weight = (settings[name] for name in ("method", "reg", "weight"))
    weighed = {"none": 0, "uniform": row["uniformity"]}.get(reg, row["energy"])
    assert row["loss"] == pytest.approx(row[method] + weight * weighed, rel=1e-5)
    layers = [name for name in row if name.startswith("energy/")]
    assert {name.split("/")[1].split(".")[0] for name in layers} == set(settings["reg_on"])
    assert row["energy"] == pytest.approx(sum(row[name] for name in layers), rel=1e-5)
    assert ("tau" in row) == (method == "byol") and ("predictor" in settings["reg_on"]) <= (method == "byol")
    assert online["split"] == ("holdout" if settings["holdout"] else "test")
    tensors, description = models.load(tmp_path / "run" / "ckpt.safetensors")
    parts = {"encoder", "projector"} | ({"predictor", "target"} if method == "byol" else set())
    assert {name.split(".")[0] for name in tensors if "/" not in name} == parts
    assert any("running_mean" in name for name in tensors) == (settings["norm"] == "bn")
    assert description["view"]["crop"] == settings["eval_crop"]
    code, rows, _ = command(knn_eval, tmp_path / "run" / "encoder.safetensors", "--k", 5)
    assert code == 0 and {row["of"] for row in rows} == {"trained", "untrained", "pixels"}


def test_a_tracker_gets_the_numbers_of_the_log(command, folder, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda _, values, step: sent.append((step, values)))
    code, rows, _ = command(pretrain, "--dataset", folder, *SMALL, "--out", "run")
    assert code == 0 and len(sent) == len(rows) - 1
    for row, (step, values) in zip(rows[1:], sent):
        of = f"{row['of']}/" if "of" in row else ""
        assert step == row["step"] and values == {of + k: x for k, x in row.items() if isinstance(x, float)}
    monkeypatch.setattr("pretrain.find_spec", lambda name: None)
    code, rows, err = command(pretrain, "--dataset", folder, *SMALL, "--tracker", "trackio", "--out", "other")
    assert code == 2 and err == "pretrain.py: --tracker trackio: is not installed; pip install trackio\n"
    assert not (tmp_path / "other").exists()


def test_energy_falls_when_it_is_all_that_counts(command, folder, tmp_path):
    """A large lambda on one projector: its energy ends below that of the plain run, from the same start."""
    for reg, flags in (("none", []), ("mhe", ["--weight", "1000"])):
        command(pretrain, "--dataset", folder, "--reg", reg, *flags, *SMALL, "--out", reg)
    plain, regularized = (models.load(tmp_path / reg / "ckpt.safetensors")[0] for reg in ("none", "mhe"))
    for layer in ("projector.out", "predictor.hidden"):
        assert mhe(regularized[f"{layer}.weight"]) < mhe(plain[f"{layer}.weight"])


def test_a_batch_larger_than_the_set(command, trained):
    """It is refused; without the flag all 48 images are one batch, and the rate is that batch's."""
    code, rows, err = command(linear_eval, trained / "ckpt.safetensors", "--batch_size", 49)
    assert code == 2 and rows == [] and "has 48 images to train on; take fewer" in err
    given, own = (
        command(linear_eval, trained / "ckpt.safetensors", "--epochs", 2, *flag)[1]
        for flag in (["--batch_size", 48], [])
    )
    assert given == own and own[-1]["batch_size"] == 48 and own[0]["lr"] == pytest.approx(0.2 * 48 / 256)


def test_a_loss_that_is_no_number_stops_the_run(command, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.alignment", lambda x, y: (x - y).sum() * math.nan)
    code, _, err = command(pretrain, "--dataset", folder, *SMALL, "--out", "run")
    assert code == 2 and err.splitlines()[-1].startswith("pretrain.py: step 1: not finite: loss nan, byol nan, ")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "metrics.jsonl"]


def test_weights_that_are_no_numbers_are_not_saved(command, folder, tmp_path, monkeypatch):
    """A last step makes them, after the last loss that is seen."""

    def spoil(optimizer, closure=None):
        optimizer.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr("pretrain.Lars.step", spoil)
    flags = "--stem imagenet --hidden_dim 32 --out_dim 16 --batch_size 48 --epochs 1 --out run".split()
    code, _, err = command(pretrain, "--dataset", folder, *flags)
    assert code == 2 and "weights nan; no checkpoint is written" in err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "metrics.jsonl"]


def test_a_linear_probe_that_diverges_says_so(command, trained, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda scores, labels: scores.sum() * math.nan)
    code, rows, err = command(linear_eval, trained / "encoder.safetensors", "--batch_size", 24)
    assert code == 2 and rows == [] and "--lr 0.2: the loss is not finite after epoch 1" in err.splitlines()[-1]


def test_schedules_are_those_of_appendix_b2():
    steps, warmup, peak = 100, 10, 6.0
    rates = [lr_at(k, steps, warmup, peak) for k in range(steps)]
    assert rates[0] == pytest.approx(peak / 10) and rates[9] == peak and rates[10] == peak
    assert rates[55] == pytest.approx(peak / 2) and 0 < rates[99] < 0.01 * peak
    assert lr_at(0, 5, 0, peak) == peak
    assert [tau_at(k, steps, 0.99) for k in (0, 50, 100)] == pytest.approx([0.99, 0.995, 1.0])


def test_lars_leaves_biases_and_norms_alone():
    network = models.BYOL("resnet18", "imagenet", "bn", 32, 16)
    adapted, plain = parameter_groups(network, 1e-6)
    assert all(p.ndim > 1 for p in adapted["params"]) and all(p.ndim == 1 for p in plain["params"])
    assert adapted["weight_decay"] == 1e-6 and adapted["always_adapt"] and plain["weight_decay"] == 0
    online = [p for name, p in network.named_parameters() if not name.startswith("target.")]
    assert len(adapted["params"]) + len(plain["params"]) == len(online)


def test_the_loss_scale_of_fp16_leaves_lars_alone():
    """The scaler of Accelerate's fp16 divides gradients before the trust ratio is taken."""
    x, weights = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), []
    processes.start()
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        torch.manual_seed(0)
        network = models.mlp(6, 5, 3)
        optimizer = Lars(parameter_groups(network, 1e-2), lr=10.0, momentum=0.9, trust_coeff=1e-3)
        optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
        for _ in range(3):
            loss = network(x).square().mean()
            (scaler.scale(loss) if scaler else loss).backward()
            optimizer.step()
            assert not optimizer.step_was_skipped
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        torch.manual_seed(0)
        fresh = torch.cat([p.detach().flatten() for p in models.mlp(6, 5, 3).parameters()])
        assert (weights[-1] - fresh).norm() > 1e-2 * fresh.norm()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)


def test_vote_is_the_one_written_by_hand():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(300, 8, generator=generator), torch.randn(40, 8, generator=generator)
    bank_labels, labels = (torch.randint(7, (n,), generator=generator) for n in (300, 40))
    for temperature in (0.07, 1.0, 1e-4, 1e-50):
        scores = vote(bank, bank_labels, queries, labels, (1, 20, 500), temperature)
        assert list(scores) == [1, 20, 300]
        for k, score in scores.items():
            right = {1: 0, 5: 0}
            for query, label in zip(queries.double(), labels.tolist()):
                similarity = torch.nn.functional.cosine_similarity(query[None], bank.double())
                nearest = similarity.argsort(descending=True)[:k].tolist()
                votes = dict.fromkeys(bank_labels[nearest].tolist(), 0.0)
                for i in nearest:
                    votes[bank_labels[i].item()] += math.exp((similarity[i] - similarity[nearest[0]]) / temperature)
                order = sorted((c for c in votes if votes[c] > 0), key=lambda c: (-votes[c], c))
                for n in right:
                    right[n] += label in order[:n]
            assert score == {f"top{n}": pytest.approx(100 * right[n] / 40, abs=1e-3) for n in right}, (k, temperature)


@pytest.mark.parametrize("tile", [(7, 9), (512, 30), (1, 1)])
def test_vote_by_tiles_is_the_vote(monkeypatch, tile):
    """Tiles that divide neither the bank nor the queries, smaller and larger than k."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (40, 25))
    there = bank, torch.arange(40) % 4, queries, torch.arange(25) % 4
    whole = vote(*there, (1, 15, 40), 0.07)
    monkeypatch.setattr("knn_eval.TILE", tile)
    assert vote(*there, (1, 15, 40), 0.07) == whole


def test_vote_on_few_classes_and_images():
    bank = torch.eye(2)
    assert vote(bank, torch.tensor([0, 1]), bank, torch.tensor([0, 1]), (20,), 0.07) == {
        2: {"top1": 100.0, "top5": 100.0}
    }
    assert vote(bank, torch.tensor([0, 1]), bank, torch.tensor([1, 0]), (1,), 0.07) == {1: {"top1": 0.0, "top5": 0.0}}


def test_linear_eval_leaves_the_encoder_as_it_was(command, trained, monkeypatch):
    """An encoder that is touched in training, here by BatchNorm in training mode, is found out."""
    monkeypatch.setattr(models, "embed", lambda encoder, views: torch.cat([encoder.train()(v) for v in views]))
    with pytest.raises(RuntimeError, match="frozen encoder has changed"):
        command(linear_eval, trained / "ckpt.safetensors", "--epochs", 1, "--batch_size", 24)


def test_nothing_optional_is_imported_for_a_folder(folder, tmp_path):
    """Training on a folder or CIFAR-10 needs no scikit-image, photos says that it does."""
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").write_text("raise ImportError('not installed')")
    script = f"import data; print(len(data.load({str(folder)!r}).classes)); data.load('photos')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "3\n" and done.stderr.endswith("pip install scikit-image\n")

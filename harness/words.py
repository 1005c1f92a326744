"""What people at a terminal read in place of rows."""

from types import SimpleNamespace

KNN_HEAD = f"{'encoder':10} {'k':>4}   top-1   top-5  balanced    rank  alignment  uniformity"


def pretrain_line(row: dict, cfg: SimpleNamespace) -> str:
    """Say what an epoch's row, or one of the representations, holds that a person wants to know; cfg: Settings."""
    if "of" in row:
        return f"{row['of']}: rank {row['rank']:.1f}  uniformity {row['uniformity']:.2f}"
    names = dict.fromkeys(["loss", cfg.method, cfg.term, "energy", "uniformity", "lr"])
    numbers = [f"{name} {row[name]:.4g}" for name in names if name in row]
    return "  ".join([f"epoch {row['epoch']}/{cfg.epochs}", *numbers, f"{row['images_per_s']:.0f} images/s"])


def vote_line(of: str, top1: float, floors: dict[str, float]) -> str:
    """Say the accuracy (%) of a k-NN vote, with its floors, if any, in brackets."""
    if of != "online":
        return f"{of}: k-NN {top1:.1f} %"
    beside = ", ".join(f"{name} {floor:.1f}" for name, floor in floors.items())
    return f"k-NN {top1:.1f} %" + (f"  ({beside})" if beside else "")


def knn_line(row: dict) -> str:
    """Write a row of knn_eval.py under KNN_HEAD."""
    scores = f"{row['top1']:7.1f} {row['top5']:7.1f} {row['balanced']:9.1f}"
    return f"{row['of']:10} {row['k']:4} {scores} {row['rank']:7.1f} {row['alignment']:10.2f} {row['uniformity']:11.2f}"


def verdict(scores_of: dict[str, dict[int, dict[str, float]]]) -> str:
    """Compare the accuracy of an encoder's k-NN vote with its floors in a sentence; scores: by encoder, then by k."""
    by_k = scores_of["trained"]
    k = 20 if 20 in by_k else min(by_k)
    top1 = by_k[k]["top1"]
    compared = []
    for of, scores in scores_of.items():
        if of != "trained":
            floor = scores[k]["top1"]
            side = "above" if top1 >= floor else "BELOW"
            compared.append(f"{abs(top1 - floor):.1f} points {side} {of} ({floor:.1f})")
    return f"top-1 {top1:.1f} % where k is {k}" + (f": {', '.join(compared)}" if compared else "")


def linear_line(row: dict) -> str:
    """Say what a row of linear_eval.py holds; nothing of an epoch in which several rates are tried."""
    if "loss" in row:
        return (
            "" if "sweep" in row else f"epoch {row['epoch']}  loss {row['loss']:.3f}  train {row['train_top1']:.1f} %"
        )
    scores = f"top-1 {row['top1']:.1f} %  top-5 {row['top5']:.1f} %  balanced {row['balanced']:.1f} %"
    if "sweep" in row:
        return f"lr {row['sweep']} on the hold-out: {scores}"
    return f"linear classifier, lr {row['lr']}: {scores}"

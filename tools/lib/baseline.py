"""The frozen baseline that is hard to beat: a linear probe on cls + mean patch, as a classifier like any other.

Fitted on train, its C (and the k of the neighbours beside it) chosen on val_select. OUT gets best.pth, which all
programs read that read a trained classifier, predictions/ of val_select and val_calib, and results.json.
Of several views the mean of their features is fitted, which for a linear probe is the mean of their logits.
"""

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint
import data
from model import Classifier, Head, load_backbone, read_facts
from tools.lib import broken, classifiers, fits, judge, metrics, protocols, provenance
from tools.lib.cli import pick_device
from tools.lib.files import write_json
from tools.lib.loop import git_commit
from tools.lib.samples import open_samples


def worth(labels, log_p):
    """Numbers on val_select."""
    p = np.exp(log_p)
    two = p[:, 1] if p.shape[1] == 2 else p
    values = {"accuracy": metrics.accuracy(labels, p.argmax(1)), "mcc": metrics.mcc(labels, p.argmax(1))}
    values |= {"auc": metrics.auc(labels, two), "nll": -log_p[np.arange(len(labels)), labels].mean()}
    return {name: float(value) for name, value in values.items()}


def nearest(X, labels, fit, select, classes):
    """-> (log-probabilities on val_select, k): cosine votes of as many neighbours as give the least log loss there."""
    truth = F.one_hot(torch.as_tensor(labels[fit]), classes).double()
    Z = torch.as_tensor((X - X[fit].mean(0)) / X[fit].std(0).clip(1e-9))
    ks = [min(k, int(fit.sum())) for k in fits.KS.tolist()]
    votes = fits.neighbours(Z[select], Z[fit], truth, ks)
    log_p = ((votes + truth.mean(0)) / (torch.tensor(ks)[:, None, None] + 1)).log().numpy()
    losses = [-one[np.arange(len(one)), labels[select]].mean() for one in log_p]
    return log_p[np.argmin(losses)], ks[int(np.argmin(losses))]


def save(path, net, about, classes, source, ckpt, fitted):
    """best.pth of a run that took no step; what it was fitted on counts as trained on."""
    used = np.isin(source.splits, fitted)
    seen = provenance.trained_on((ckpt,), source.take(np.flatnonzero(used)), source.take(np.flatnonzero(~used)))
    weights = checkpoint.pack_weights(net)
    state = {"step": 0, "images": 0, "args": {"fitted_on": list(fitted)}, "arch": net.backbone.arch, **about, **seen}
    state |= {"student": weights, "teacher": weights, "gram": None, "optimizer": {}, "pool": net.pool, "layers": 1}
    state |= {"classes": classes, "index_sha256": source.index_sha256, "split_sha256": source.split_sha256}
    checkpoint.save(path, state)


def fit_frozen(vit, ckpt, source, table, about, out, device, batch, workers, refit=False):
    """-> results, written too. source: opened for fit, select and, if there is one, calibrate; table: labelled samples.

    about: encoding, eval_view, layout, labels_sha256. refit: with the chosen C once more on train + val_select.
    """
    splits, classes, fitted = source.splits[table.rows], len(table.classes), ["train", "val_select"][: 1 + refit]
    fit, select = splits == "train", splits == "val_select"
    net = Classifier(vit, Head(2 * vit.dim, classes), "both").to(device).eval()
    look = about["layout"], about["eval_view"], device, batch, workers, "features"
    views = classifiers.each_view(net.features, source, table.rows, *look)
    X, y = views.mean(1, dtype=np.float64), table.labels
    found = fits.linear_probe(X, y, fit, select, classes)
    log_p = F.log_softmax(torch.as_tensor(X[select] @ found.weight.T + found.bias), 1).numpy()
    near, k = nearest(X, y, fit, select, classes)
    counts = {name: int((splits == name).sum()) for name in ("train", "val_select", "val_calib")}
    result = {"version": 1, "C": found.C, "k": k, "fitted_on": fitted, "samples": counts, **about}
    result["val_select"] = {"linear probe": worth(y[select], log_p), "k-NN": worth(y[select], near)}
    weight, bias = next(fits.linear_path(X, y, fit | select, classes, [found.C])) if refit else found[:2]
    with torch.no_grad():
        net.head.last_layer.weight.copy_(torch.as_tensor(weight))
        net.head.last_layer.bias.copy_(torch.as_tensor(bias))
        logits = net.head(torch.as_tensor(views).to(device)).cpu().numpy()
    out.mkdir(parents=True, exist_ok=True)
    save(out / "best.pth", net, about, table.classes, source, ckpt, fitted)
    facts = {**about, "classes": table.classes, "sha256": data.file_sha256(out / "best.pth")}
    for name in sorted({"val_select", "val_calib"} - {*fitted} & {*splits.tolist()}):
        at = np.flatnonzero(splits == name)
        written = classifiers.facts_of(facts, source, name, about["labels_sha256"])
        ids = [table.ids[i] for i in at]
        classifiers.export(out / "predictions", ids, table.groups[at], y[at], logits[at], written)
    result |= {"weights": {"file": "best.pth", "step": 0, "sha256": facts["sha256"]}, "git_commit": git_commit()}
    write_json(out / "results.json", result)
    return result


def choose(args, source, path, table, splits):
    """train_probe.py --protocol select of a frozen backbone; val_test is not opened -> exit code."""
    before, held_out = provenance.stamp(args.ckpt), np.isin(splits, ("val_select", "val_calib"))
    if table.centres is not None:
        raise ValueError(f"{path} names nodules: --protocol select judges whole images; use test, cv or all")
    for name in ("train", "val_select"):
        protocols.refuse_absent(table, splits, name)
    vit, facts, kept = load_backbone(args.ckpt), read_facts(args.ckpt), held_out | (splits == "train")
    provenance.refuse_leak(facts, source.take(table.rows[held_out]), "the held-out splits", args.allow_seen)
    provenance.refuse_change(args.ckpt, before)
    view = judge.choose_view(facts, source.encoding, args.size, vit.patch_size)
    about = {"encoding": source.encoding, "eval_view": view, "layout": args.views or "whole",
             "labels_sha256": data.file_sha256(path)}  # fmt: skip
    chosen, part = open_samples(source, table.take(kept), splits[kept], None, args.allow_duplicates)
    with broken.named(chosen.take(part.rows)):
        found = fit_frozen(vit, args.ckpt, chosen, part, about, args.out, pick_device(args.device),
                           args.batch_size or 96, max(args.workers, 1))  # fmt: skip
    for name, worth_of in found["val_select"].items():
        print(f"{name} on val_select: " + ", ".join(f"{key} {value:.3f}" for key, value in worth_of.items()))
    print("\n".join(str(args.out / name) for name in ("best.pth", "predictions", "results.json")))
    return 0

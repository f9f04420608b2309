"""The frozen baseline that is hard to beat: a linear probe on cls + mean patch, as a classifier like any other.

Fitted on train, its C (and the k of the neighbours beside it) chosen on val_select. OUT gets best.pth, which all
programs read that read a trained classifier, predictions/ of val_select and val_calib, and results.json.
Of several views the mean of their features is fitted, which for a linear probe is the mean of their logits.
Nodules of CT are cropped as by the other protocols: probe.npz in the place of best.pth, and predictions of val_test
too, which no program could make later.
"""

from collections import Counter

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint
import data
from model import Classifier, Head, load_backbone, read_facts
from tools.lib import broken, classifiers, features, fits, judge, metrics, protocols, provenance
from tools.lib.cli import pick_device
from tools.lib.files import write_json
from tools.lib.loop import git_commit
from tools.lib.samples import open_samples


def nearest(X, labels, fit, select, classes):
    """-> (log-probabilities on val_select, k): cosine votes of as many neighbours as give the least log loss there."""
    truth = F.one_hot(torch.as_tensor(labels[fit]), classes).double()
    Z = torch.as_tensor((X - X[fit].mean(0)) / X[fit].std(0).clip(1e-9))
    ks = [min(k, int(fit.sum())) for k in fits.KS.tolist()]
    votes = fits.neighbours(Z[select], Z[fit], truth, ks)
    log_p = ((votes + truth.mean(0)) / (torch.tensor(ks)[:, None, None] + 1)).log().numpy()
    losses = [-one[np.arange(len(one)), labels[select]].mean() for one in log_p]
    return log_p[np.argmin(losses)], ks[int(np.argmin(losses))]


def save(path, net, facts):
    """best.pth of a run that took no step."""
    weights = checkpoint.pack_weights(net)
    state = {"step": 0, "images": 0, "args": {}, "arch": net.backbone.arch, "pool": net.pool, "layers": 1, **facts}
    checkpoint.save(path, {**state, "student": weights, "teacher": weights, "gram": None, "optimizer": {}})


def of_nodules(vit, source, table, args, view, look):
    """Features [n, 1, d] of crops around nodules."""
    device, *how = look
    extracted, _ = features.extract(vit, source, table, features.Framing(view, args.crop_mm, *how), device, "features")
    parts = features.PARTS.get(args.features, list(range(extracted.shape[2])))
    return fits.flatten(extracted, args.scales, parts)[:, None]


def fit_frozen(net, views, source, table, facts, fitted, out):
    """-> results, written too. source: of all splits to predict, and train; views [n, V, d]: features of the samples.

    net: a Classifier, whose head is replaced, or None; fitted: train, or with val_select too, with the C that was
    chosen before.
    """
    splits, y, classes = source.splits[table.rows], table.labels, len(table.classes)
    fit, select, X = splits == "train", splits == "val_select", views.mean(1, dtype=np.float64)
    if not np.isfinite(X).all():
        raise ValueError(f"features of {(~np.isfinite(X)).any(1).sum()} samples are NaN or infinite; broken weights?")
    found = fits.linear_probe(X, y, fit, select, classes)
    p = F.softmax(torch.as_tensor(X[select] @ found.weight.T + found.bias), 1).numpy()
    near, k = nearest(X, y, fit, select, classes)
    again = len(fitted) > 1
    weight, bias = next(fits.linear_path(X, y, fit | select, classes, [found.C])) if again else found[:2]
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("best.pth" if net else "probe.npz")
    if net:
        with torch.no_grad():
            net.head.last_layer.weight.copy_(torch.as_tensor(weight))
            net.head.last_layer.bias.copy_(torch.as_tensor(bias))
            logits = net.cpu().head(torch.as_tensor(views)).numpy()
        save(path, net, facts)
    else:
        logits = (views @ weight.T + bias).astype(np.float32)
        checkpoint.atomic_write(path, lambda f: np.savez(f, weight=weight, bias=bias))
    facts = facts | {"sha256": data.file_sha256(path)}
    for name in sorted({*splits.tolist()} - {"train", *fitted}):
        part = table.take(splits == name)
        written = classifiers.facts_of(facts, source, name, facts["labels_sha256"])
        own = part.ids, part.groups, part.labels, logits[splits == name]
        print(classifiers.export(out / "predictions", *own, written))
    result = {"version": 1, "C": found.C, "k": k, "fitted_on": fitted, "select": metrics.worth(y[select], p)}
    result |= {"k-NN": metrics.worth(y[select], np.exp(near)), "samples": dict(Counter(splits.tolist()))}
    result |= {"weights": {"file": path.name, "step": 0, "sha256": facts["sha256"]}, "git_commit": git_commit()}
    result |= {key: facts[key] for key in ("layout", "eval_view", "labels_sha256", "split_sha256", "classes")}
    write_json(out / "results.json", result)
    return result


def choose(args, source, path, table, splits):
    """train_probe.py --protocol select and refit of a frozen backbone; no score of val_test -> exit code."""
    before, known, vit = provenance.stamp(args.ckpt), read_facts(args.ckpt), load_backbone(args.ckpt)
    nodules = table.centres is not None
    if nodules and args.views:
        raise ValueError(f"--views {args.views}: {path} names nodules, which are cropped (--crop-mm); leave it out")
    for name in ("train", "val_select"):
        protocols.refuse_absent(table, splits, name)
    kept = np.isin(splits, ["train", "val_select", "val_calib"] + ["val_test"] * nodules)
    source, table = open_samples(source, table.take(kept), splits[kept], data.NO_SCORE, args.allow_duplicates)
    fitted = ["train", "val_select"][: 1 + (args.protocol == "refit")]
    used = np.isin(source.splits, fitted)
    held = source.take(np.flatnonzero(~used))
    provenance.refuse_leak(known, held, "the held-out splits", args.allow_seen)
    pool = {"all": "both"}.get(args.features, args.features)
    view = judge.choose_view(known, source.encoding, args.size, vit.patch_size)
    source.at_distance(view.get("neighbour_mm"))
    layout = args.views or (None if nodules else "whole")
    facts = {"encoding": source.encoding, "eval_view": view, "layout": layout, "classes": table.classes}
    facts |= provenance.trained_on((args.ckpt,), source.take(np.flatnonzero(used)), None)
    facts |= {"index_sha256": source.index_sha256, "split_sha256": source.split_sha256}
    facts["labels_sha256"] = data.file_sha256(path)
    look = pick_device(args.device), args.batch_size or 96, max(args.workers, 1)
    provenance.refuse_change(args.ckpt, before)
    with broken.named(source.take(table.rows)):
        if nodules:
            net, views = None, of_nodules(vit, source, table, args, view, look)
        else:
            net = Classifier(vit, Head(vit.dim * (1 + (pool == "both")), len(table.classes)), pool).eval()
            framing = facts["layout"], view, *look, "features"
            views = classifiers.each_view(net.to(look[0]).features, source, table.rows, *framing)
        result = fit_frozen(net, views, source, table, facts, fitted, args.out)
    for name, values in (("linear probe", result["select"]), ("k-NN", result["k-NN"])):
        numbers = ", ".join(f"{key} {values[key]:.3f}" for key in ("mcc", "auc", "accuracy", "nll"))
        print(f"{name}, chosen on {result['samples']['val_select']} samples of val_select: {numbers}")
    weights = args.out / result["weights"]["file"]
    print(f"C {result['C']:.3g}, k {result['k']}; {weights}, {args.out / 'results.json'}")
    return 0

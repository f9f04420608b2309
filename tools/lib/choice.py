"""Which calibrator: each is fitted and judged on different groups of val_calib; the best is fitted on all of it.
Which pool, of how many views: each is judged on val_select.

name, table = choose(logits, labels, groups)
run, pool, options, table = choose_pool([table_of_val_select, ...])
"""

import hashlib

import numpy as np

import data
from tools.lib import calibrate, thresholds
from tools.lib.fusion import POOLS
from tools.lib.metrics import calibration_errors, decisions, mcc, nll, score_of
from tools.lib.progress import progress

MCC_DROP = 0.02  # a calibrator may not cost more
KS = (1, 2, 3, 5, 7)  # how many views a pool may keep


def folds_of(labels, groups, folds):
    """Fold of each sample: groups stay whole, and those of each class are dealt evenly, in an order of hashes."""
    groups = np.asarray(groups).astype(str)
    label_of = dict(zip(groups.tolist(), labels.tolist()))
    order = sorted(label_of, key=lambda g: (label_of[g], hashlib.sha256(g.encode()).digest()))
    fold_of = {group: k % folds for k, group in enumerate(order)}
    return np.array([fold_of[group] for group in groups.tolist()])


def cross_fit(name, logits, labels, fold, slices=None):
    """Probabilities [N, C] of samples that the calibrator was not fitted on."""
    (fit, apply), out = calibrate.METHODS[name], np.empty(logits.shape)
    for k in np.unique(fold):
        test = fold == k
        there, rest = (None, None) if slices is None else (slices[test], slices[~test])
        out[test] = apply(fit(logits[~test], labels[~test], rest), logits[test], there)
    return out


def scores(labels, p):
    values = {"nll": nll(labels, p), "ece": calibration_errors(labels, score_of(p))["ece"]}
    return {name: float(value) for name, value in (values | {"mcc": mcc(labels, decisions(score_of(p)))}).items()}


def choose(logits, labels, groups, slices=None, names=tuple(calibrate.METHODS), folds=5):
    """-> the method with the lowest cross-fitted NLL whose MCC drops by at most 0.02, and what each is worth."""
    logits, labels = calibrate.check(logits, labels)
    fold, slices = folds_of(labels, groups, folds), None if slices is None else np.asarray(slices)
    table = {"none": scores(labels, calibrate.softmax(logits))}
    bar = progress(names, "calibrators", unit="method")
    table |= {name: scores(labels, cross_fit(name, logits, labels, fold, slices)) for name in bar}
    fair = [name for name in names if table["none"]["mcc"] - table[name]["mcc"] <= MCC_DROP]
    return min(fair or ["temperature"], key=lambda name: table[name]["nll"]), table


# ----- pools


def areas_of(layout, count):
    """Shares of a picture of 3 to 4 that the views of a layout cover, for `count` views of one or several runs."""
    boxes = data.view_boxes([(3000, 4000)], layout or "centre")[0][:, 0]
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], 1) / (3000 * 4000)
    if count % len(areas):
        raise ValueError(f"area: {count} views, and the layout {layout} has {len(areas)}; use another pool")
    return np.tile(areas, count // len(areas)).round(6).tolist()


def pool_rows(layout, count, classes):
    """(pool, options) of all that there is to choose from."""
    for name in POOLS:
        if name == "area":
            yield name, {"areas": areas_of(layout, count)}
        elif name.endswith("topk"):
            yield from ((name, {"k": k}) for k in KS if k < count - (name == "whole_topk"))
        elif name == "topk_positive":
            yield from ((name, {"k": k}) for k in KS if k < count and classes == 2)
        else:
            yield name, {}


def best_mcc(labels, p):
    """At the best threshold where there are two classes: policies fit one later. Else of the largest probability."""
    if p.shape[1] > 2:
        return mcc(labels, decisions(score_of(p)))
    s = thresholds.sweep(labels, p[:, 1])
    return thresholds.mcc_of(s["tp"], s["fp"], s["fn"], s["tn"]).max()


def choose_pool(tables):
    """Tables of val_select, alternatives of each other (such as other overlaps) -> number of the one, pool, options,
    {candidate: {mcc, nll}}: the highest MCC; of equal ones the lowest NLL."""
    worth, rows = {}, {}
    for run, table in enumerate(tables):
        known = np.flatnonzero(table.labels >= 0)
        labels, logits = table.labels[known], table.logits[known].astype(np.float64)
        if len(np.unique(labels)) < 2:
            raise ValueError(f"val_select has {len(known)} labelled samples of one class: no pool can be chosen on it")
        for name, options in pool_rows(table.facts.get("layout"), logits.shape[1], logits.shape[2]):
            p = calibrate.softmax(POOLS[name](logits, **options))
            key = f"{name}{options.get('k', '')}" + (f" of run {run + 1}" if len(tables) > 1 else "")
            worth[key] = {"mcc": float(best_mcc(labels, p)), "nll": float(nll(labels, p))}
            rows[key] = run, name, options
    best = max(worth, key=lambda key: (worth[key]["mcc"], -worth[key]["nll"]))
    return *rows[best], worth

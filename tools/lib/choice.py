"""Which calibrator: each is fitted and judged on different groups of val_calib; the best is fitted on all of it.

name, table = choose(logits, labels, groups)
"""

import hashlib

import numpy as np
from tqdm import tqdm

from tools.lib import calibrate
from tools.lib.metrics import calibration_errors, decisions, mcc, nll, score_of

MCC_DROP = 0.02  # a calibrator may not cost more


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
    table = {"none": scores(labels, np.exp(calibrate.log_softmax(logits)))}
    bar = tqdm(names, "calibrators", unit="method", disable=None)
    table |= {name: scores(labels, cross_fit(name, logits, labels, fold, slices)) for name in bar}
    fair = [name for name in names if table["none"]["mcc"] - table[name]["mcc"] <= MCC_DROP]
    return min(fair or ["temperature"], key=lambda name: table[name]["nll"]), table

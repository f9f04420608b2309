"""Which decisions will be wrong? What the views of a sample say of it, weighed by a logistic regression.

found = fit(logits, labels)              # logits [N, V, C] of val_calib -> plain dict, ready for JSON
chance = apply(found, logits)            # [N] that the likeliest class is wrong
print(compare(logits, labels, groups))   # is that better than the largest probability? on groups it has not seen
"""

import numpy as np

from tools.lib.calibrate import logistic, sigmoid, softmax
from tools.lib.choice import folds_of
from tools.lib.metrics import auc

NAMES = ["largest probability", "its variance over views", "entropy", "most certain view above the mean",
         "deviation over views", "mean entropy of views"]  # fmt: skip


def entropy(p):
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def features(logits):
    """[N, V, C] -> [N, 6], in the order of NAMES; with one view three of them are 0."""
    z = np.asarray(logits, np.float64)
    views = softmax(z)
    mean = softmax(z.mean(1))
    own = np.take_along_axis(views, mean.argmax(1)[:, None, None], 2)[..., 0]  # [N, V] of the class that is said
    return np.stack([mean.max(1), views.max(2).var(1), entropy(mean), own.max(1) - own.mean(1), own.std(1),
                     entropy(views).mean(1)], 1)  # fmt: skip


def wrong(logits, labels):
    return np.asarray(logits, np.float64).mean(1).argmax(1) != labels


def fit(logits, labels):
    x, y = features(logits), wrong(logits, labels)
    if y.all() or not y.any():
        raise ValueError(f"{y.sum()} of {len(y)} decisions are wrong: there is nothing to tell apart")
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-9)
    weights = logistic(np.column_stack([(x - mean) / scale, np.ones(len(x))]), y.astype(np.float64))
    return {"names": NAMES, "mean": mean.tolist(), "scale": scale.tolist(), "weights": weights.tolist()}


def apply(found, logits):
    x = (features(logits) - np.array(found["mean"])) / np.array(found["scale"])
    return sigmoid((x * np.array(found["weights"])[:-1]).sum(1) + found["weights"][-1])


def compare(logits, labels, groups, folds=5):
    """AUROC of being wrong: {predictor (cross-fitted), largest_probability}, pairs of one fold alone."""
    y, fold = wrong(logits, labels), folds_of(np.asarray(wrong(logits, labels), int), groups, folds)
    chance = np.empty(len(y))
    for k in np.unique(fold):
        chance[fold == k] = apply(fit(logits[fold != k], labels[fold != k]), logits[fold == k])
    largest = features(logits)[:, 0]
    return {"predictor": float(auc(y, chance, folds=fold)), "largest_probability": float(auc(y, -largest, folds=fold))}

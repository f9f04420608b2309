"""What a prediction is worth: numpy alone, float64, ties and weights exact, patients resampled whole.

Labels are 0..K-1. Binary scores are [n] (of class 1), those of several classes [n, K]; then AUC and average precision
are means over one class against the rest. `weights` are counts of each sample, [n], or [repeats, n] for many resamples
at once (5 times as fast as one call each), which puts `repeats` in front of the result. One class alone has no AUC: an
error for the data as given, NaN for a resample.

    low, high = bootstrap(lambda i: auc(labels[i], scores[i]), groups)                  # any statistic
    values = resample(lambda w: auc(labels, scores, w), groups)                         # the same, fast: [repeats]
"""

import numpy as np


def check(labels, values, weights=None, classes=2):
    """-> labels as int [n], values as float [n] or [n, K], weights [.., n]; refuses NaN, and fewer classes."""
    labels, values = np.asarray(labels), np.asarray(values, np.float64)
    if len(labels) != len(values) or not len(labels):
        raise ValueError(f"{len(labels)} labels and {len(values)} predictions: give one of each per sample")
    if not np.isfinite(values).all():
        raise ValueError(f"{np.sum(~np.isfinite(values))} predictions are NaN or infinite; look at the features")
    if len(np.unique(labels)) < classes:
        raise ValueError(f"all {len(labels)} labels are {labels[0]}: with one class there is nothing to tell apart")
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    return labels.astype(int), values, weights


def ratio(above, below):
    """above / below, NaN where nothing is below."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(below) > 0, np.divide(above, below), np.nan)[()]


def mean(values, weights):
    """Weighted mean over the last axis."""
    return ratio(weights @ values, weights.sum(-1))


def each_class(metric, labels, scores, weights, **more):
    """Mean over classes of a binary metric, each class against the rest."""
    absent = sorted(set(range(scores.shape[1])) - set(np.unique(labels).tolist()))
    if absent:
        raise ValueError(f"no sample of class {absent[0]}: its AUC does not exist; score without this class")
    return np.mean([metric(labels == k, scores[:, k], weights, **more) for k in range(scores.shape[1])], 0)[()]


def counts_above(labels, scores, weights=None):
    """Weights of class 1 and class 0 at or above each distinct score, from none to all: two [.., thresholds + 1]."""
    labels, scores, weights = check(labels, scores, weights)
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # ties are passed together
    counts = []
    for positive in (1, 0):
        above = np.cumsum(weights[..., order] * (labels[order] == positive), -1)[..., ends]
        counts.append(np.concatenate([np.zeros_like(above[..., :1]), above], -1))
    return counts


def auc(labels, scores, weights=None, folds=None):
    """Chance that a sample of class 1 scores above one of class 0; ties count half.

    folds [n]: only pairs of one fold count. Scores of different fits are not comparable: pooled over five folds a
    useless feature of 200 samples has AUC 0.44 to 0.48, since a fit leans away from the fold that it has not seen.
    """
    if np.ndim(scores) == 2:
        return each_class(auc, *check(labels, scores, weights), folds=folds)
    labels, scores, weights = check(labels, scores, weights)
    area = pairs = np.zeros(weights.shape[:-1])
    for fold in [slice(None)] if folds is None else [folds == k for k in np.unique(folds)]:
        if folds is None or len(np.unique(labels[fold])) == 2:
            tp, fp = counts_above(labels[fold], scores[fold], weights[..., fold])
            area = area + (np.diff(fp) * (tp[..., 1:] + tp[..., :-1]) / 2).sum(-1)
            pairs = pairs + tp[..., -1] * fp[..., -1]
    return ratio(area, pairs)


def average_precision(labels, scores, weights=None):
    """Sum over thresholds of precision times the recall gained there."""
    if np.ndim(scores) == 2:
        return each_class(average_precision, *check(labels, scores, weights))
    tp, fp = counts_above(labels, scores, weights)
    precision = tp[..., 1:] / np.maximum(tp[..., 1:] + fp[..., 1:], 1e-300)  # nothing gained where both are 0
    area = ratio((np.diff(tp) * precision).sum(-1), tp[..., -1])
    return np.where(fp[..., -1] > 0, area, np.nan)[()]


def sensitivity_at(labels, scores, specificity=0.9, weights=None):
    """Largest sensitivity of a threshold whose specificity is at least this."""
    tp, fp = counts_above(labels, scores, weights)
    allowed = fp <= (1 - specificity + 1e-12) * fp[..., -1:]
    sensitivity = ratio(np.where(allowed, tp, 0).max(-1), tp[..., -1])
    return np.where(fp[..., -1] > 0, sensitivity, np.nan)[()]


def roc_curve(labels, scores):
    """False and true positive rates from (0, 0) to (1, 1)."""
    tp, fp = counts_above(labels, scores)
    return fp / fp[-1], tp / tp[-1]


def precision_recall_curve(labels, scores):
    """Recall and precision at every threshold."""
    tp, fp = counts_above(labels, scores)
    return tp[1:] / tp[-1], tp[1:] / (tp[1:] + fp[1:])


def decisions(probabilities):
    """The class of each sample: the likeliest, at 0.5 for two."""
    probabilities = np.asarray(probabilities)
    return (probabilities >= 0.5).astype(int) if probabilities.ndim == 1 else probabilities.argmax(1)


def accuracy(labels, predictions, weights=None):
    labels, predictions, weights = check(labels, predictions, weights)
    return mean((labels == predictions).astype(float), weights)


def mcc(labels, predictions, weights=None):
    """Matthews correlation of labels and predicted classes (several classes: Gorodkin's R_K); 0 if one is constant."""
    labels, predictions, weights = check(labels, predictions, weights)
    classes = np.union1d(labels, predictions)
    truth, guess = ((values[:, None] == classes).astype(float) for values in (labels, predictions))  # [n, K]
    total, hits = weights.sum(-1), weights @ (labels == predictions)
    in_truth, in_guess = weights @ truth, weights @ guess
    above = hits * total - (in_truth * in_guess).sum(-1)
    below = (total**2 - (in_truth**2).sum(-1)) * (total**2 - (in_guess**2).sum(-1))
    return np.where(below > 0, above / np.sqrt(np.maximum(below, 1e-300)), 0.0)[()]


def brier(labels, probabilities, weights=None):
    """Mean squared error of the probability of class 1; of several classes summed over all."""
    labels, p, weights = check(labels, probabilities, weights)
    errors = (p - labels) ** 2 if p.ndim == 1 else ((p - np.eye(p.shape[1])[labels]) ** 2).sum(1)
    return mean(errors, weights)


def reliability(labels, probabilities, bins=10, weights=None):
    """Per bin of equal width: weight, summed probability, summed truth, three [.., bins].

    Probability and truth of class 1; of several classes those of the likeliest one.
    """
    labels, p, weights = check(labels, probabilities, weights, classes=1)  # of a draw by chance all may be of one
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"probabilities from {p.min():.3g} to {p.max():.3g}: calibration needs 0 to 1")
    truth = labels.astype(float) if p.ndim == 1 else (labels == p.argmax(1)).astype(float)
    p = p if p.ndim == 1 else p.max(1)
    member = np.minimum((p * bins).astype(int), bins - 1)[:, None] == np.arange(bins)  # [n, bins]
    return [weights @ (member * values[:, None]) for values in (np.ones_like(p), p, truth)]


def calibration_error(labels, probabilities, bins=10, weights=None):
    """Expected calibration error: mean over samples of |mean probability - mean truth| of their bin."""
    weight, probability, truth = reliability(labels, probabilities, bins, weights)
    return ratio(np.abs(probability - truth).sum(-1), weight.sum(-1))


def matched_pairs(labels, sizes, tolerance=0.1):
    """Pairs (of class 1, of class 0) whose sizes differ by at most this share: bool [positives, negatives]."""
    labels, sizes, _ = check(labels, sizes)
    if sizes.min() <= 0:
        raise ValueError(f"size {sizes.min():g}: sizes must be above 0")
    logs = np.log(sizes)
    return np.abs(logs[labels == 1][:, None] - logs[labels == 0]) <= np.log(1 + tolerance)


def matched_auc(labels, scores, sizes, tolerance=0.1, weights=None, folds=None):
    """AUC over size-matched pairs alone: what is left of a score when the ruler is blind. NaN without a pair."""
    labels, scores, weights = check(labels, scores, weights)
    pairs = matched_pairs(labels, sizes, tolerance).astype(float)
    if folds is not None:
        pairs *= folds[labels == 1][:, None] == folds[labels == 0]
    wins = (np.sign(scores[labels == 1][:, None] - scores[labels == 0]) + 1) / 2
    positive, negative = weights[..., labels == 1], weights[..., labels == 0]
    return ratio(((positive @ (pairs * wins)) * negative).sum(-1), ((positive @ pairs) * negative).sum(-1))


# The bootstrap draws whole groups (patients) with replacement: nodules of one patient are no independent facts.


def draws(groups, repeats, seed):
    """How often each sample is in each resample, in pieces [some, n] of at most 4 million counts."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count, random = member.max() + 1, np.random.default_rng(seed)
    step = max(1, 4_000_000 // len(member))
    for start in range(0, repeats, step):
        rows = min(step, repeats - start)
        drawn = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)[:, member]


def resample(statistic, groups, repeats=2000, seed=0):
    """statistic(weights [r, n]) -> [r, ...], over `repeats` resamples in all; same groups and seed, same draws."""
    return np.concatenate([statistic(weights.astype(np.float64)) for weights in draws(groups, repeats, seed)])


def interval(values, level=0.95):
    """Percentiles of resampled values [repeats, ...] -> (low, high); NaN where half of the resamples had one class."""
    values = np.asarray(values, np.float64)
    usable = np.isfinite(values).mean(0) > 0.5
    filled = np.where(usable, values, 0.0)
    low, high = np.nanquantile(filled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.where(usable, low, np.nan)[()], np.where(usable, high, np.nan)[()]


def p_value(differences):
    """Two-sided: twice the smaller share of resampled differences on either side of 0, at least 2 / (repeats + 1)."""
    differences = np.asarray(differences)[np.isfinite(differences)]
    if not len(differences):
        return float("nan")
    one_sided = min(np.sum(differences <= 0), np.sum(differences >= 0))
    return float(min(1.0, 2 * (one_sided + 1) / (len(differences) + 1)))


def bootstrap(statistic, groups, repeats=2000, seed=0):
    """95% interval of statistic(indices) -> float over resampled groups; a resample of one class is left out."""
    statistic(np.arange(len(groups)))  # what is wrong with the data as given is an error
    values = []
    for weights in draws(groups, repeats, seed):
        for row in weights:
            index = np.repeat(np.arange(len(row)), row)
            try:
                values.append(statistic(index))
            except ValueError:  # check() above: one class
                values.append(np.nan)
    return interval(values)


# All of them at once. In probabilities [n, K] of K = 2 classes the second column is the score.


def score_of(probabilities):
    return probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities


def all_metrics(labels, probabilities, weights=None, folds=None):
    """{name: value or [repeats]} of probabilities [n, K]; sensitivity at a specificity is for two classes alone."""
    p = score_of(np.asarray(probabilities))
    classes = decisions(p)
    values = {"auc": auc(labels, p, weights, folds), "average_precision": average_precision(labels, p, weights)}
    if p.ndim == 1:
        values["sensitivity_at_90"] = sensitivity_at(labels, p, 0.9, weights)
    values |= {"accuracy": accuracy(labels, classes, weights), "mcc": mcc(labels, classes, weights)}
    return values | {"brier": brier(labels, p, weights), "ece": calibration_error(labels, p, 10, weights)}

"""What a prediction is worth: numpy alone, float64, ties and weights exact, patients resampled whole.

Labels are 0..K-1. Binary scores are [n] (of class 1), those of several classes [n, K]; then AUC and average precision
are means over one class against the rest. `weights` are counts of each sample, [n], or [repeats, n] for many resamples
at once (5 times as fast as one call each), which puts `repeats` in front of the result. One class alone has no AUC: an
error for the data as given, NaN for a resample.

    values = resample(lambda w: auc(labels, scores, w), groups)         # [repeats], over resampled patients
    low, high = interval(values)

What a table of numbers needs (`rates`, `worth`, `slices`) says None where a class is absent: never 0, never NaN.
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


def recall_at(labels, scores, precision=0.9, weights=None):
    """Largest recall of a threshold whose precision is at least this; 0 where none has it."""
    tp, fp = counts_above(labels, scores, weights)
    allowed = tp >= (precision - 1e-12) * (tp + fp)
    return ratio(np.where(allowed, tp, 0).max(-1), tp[..., -1])


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


def reliability(labels, probabilities, bins=10, weights=None, mass=False):
    """Per bin: weight, summed probability, summed truth, three [.., bins]. Bins of equal width, or of equal mass.

    Probability and truth of class 1; of several classes those of the likeliest one. Equal probabilities share a bin.
    """
    labels, p, weights = check(labels, probabilities, weights, classes=1)  # of a draw by chance all may be of one
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"probabilities from {p.min():.3g} to {p.max():.3g}: calibration needs 0 to 1")
    p, truth = claims(labels, p)
    place = np.minimum((p * bins).astype(int), bins - 1)
    if mass:
        _, value, count = np.unique(p, return_inverse=True, return_counts=True)
        place = ((np.cumsum(count) - count) * bins // len(p))[value]  # by the first of equal ones
    member = place[:, None] == np.arange(bins)  # [n, bins]
    return [weights @ (member * values[:, None]) for values in (np.ones_like(p), p, truth)]


def claims(labels, p):
    """The probability that is judged and whether it came true: that of class 1; of several classes the likeliest."""
    return (p, labels.astype(float)) if p.ndim == 1 else (p.max(1), (labels == p.argmax(1)).astype(float))


def calibration_error(labels, probabilities, bins=10, weights=None):
    """Expected calibration error: mean over samples of |mean probability - mean truth| of their bin."""
    weight, probability, truth = reliability(labels, probabilities, bins, weights)
    return ratio(np.abs(probability - truth).sum(-1), weight.sum(-1))


def calibration_errors(labels, probabilities, bins=15):
    """{ece, ece_mass (bins of equal mass), ece_classes (mean over classes, Nixon 2019), ece_debiased, mce (largest)}.

    ece_debiased: root of the mean squared gap less what chance adds to it (Kumar 2019, arXiv:1909.10155).
    """
    labels, p, _ = check(labels, probabilities)
    columns = np.stack([1 - p, p], 1) if p.ndim == 1 else p
    each = [reliability(labels == k, columns[:, k], bins) for k in range(columns.shape[1])]
    sums = {"ece": reliability(labels, p, bins), "ece_mass": reliability(labels, p, bins, mass=True)}
    values = {name: np.abs(said - true).sum() / weight.sum() for name, (weight, said, true) in sums.items()}
    values["ece_classes"] = np.mean([np.abs(said - true).sum() / weight.sum() for weight, said, true in each])
    weight, said, true = np.compress(sums["ece_mass"][0] > 0, sums["ece_mass"], 1)
    chance = true / weight * (1 - true / weight) / np.maximum(weight - 1, 1)
    squared = (weight * (((said - true) / weight) ** 2 - chance)).sum() / weight.sum()
    weight, said, true = np.compress(sums["ece"][0] > 0, sums["ece"], 1)
    values |= {"ece_debiased": np.sqrt(max(0.0, squared)), "mce": np.max(np.abs(said - true) / weight)}
    return {name: float(value) for name, value in values.items()}


def nll(labels, probabilities, weights=None):
    """Mean of -log of the probability of the truth; probabilities below 1e-15 count as 1e-15."""
    labels, p, weights = check(labels, probabilities, weights)
    truth = np.where(labels == 1, p, 1 - p) if p.ndim == 1 else p[np.arange(len(p)), labels]
    return mean(-np.log(np.maximum(truth, 1e-15)), weights)


def confusion(labels, predictions, classes=2):
    """Counts [truth, said] of 0..classes-1."""
    labels, predictions = np.asarray(labels, int), np.asarray(predictions, int)
    if not len(labels) or len(labels) != len(predictions):
        raise ValueError(f"{len(labels)} labels and {len(predictions)} predictions: give one of each per sample")
    if min(labels.min(), predictions.min()) < 0 or max(labels.max(), predictions.max()) >= classes:
        raise ValueError(f"classes are 0 to {classes - 1}, not {sorted(set(labels.tolist() + predictions.tolist()))}")
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def rates(labels, predictions, classes=2):
    """{n, accuracy, balanced_accuracy, precision, recall, f1, mcc, fnr, fpr, confusion}, None where undefined.

    Of two classes those of class 1; of several the means over one class against the rest.
    """
    table = confusion(labels, predictions, classes).astype(np.float64)
    hit, truth, said, n = np.diag(table), table.sum(1), table.sum(0), table.sum()
    recall = ratio(hit, truth)
    each = {"precision": ratio(hit, said), "recall": recall, "fnr": 1 - recall, "fpr": ratio(said - hit, n - truth)}
    each["f1"] = ratio(2 * hit, truth + said) + 0 * recall  # NaN where the class is absent
    values = {name: value[1] if classes == 2 else value.mean() for name, value in each.items()}
    values |= {"accuracy": hit.sum() / n, "balanced_accuracy": recall.mean()}
    values["mcc"] = np.nan if (truth == 0).any() else mcc(labels, predictions)
    values = {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
    return {"n": int(n), **values, "confusion": table.astype(int).tolist()}


def errors_kept(errors, confidence):
    """Expected errors [n] among the i most confident, i = 0..n (ties in random order); where a threshold can cut."""
    errors, confidence = np.asarray(errors, np.float64), np.asarray(confidence, np.float64)
    if not len(errors) or len(errors) != len(confidence) or not np.isfinite(confidence).all():
        raise ValueError(f"{len(errors)} errors, {len(confidence)} confidences: one finite number of each per sample")
    order = np.argsort(-confidence, kind="stable")
    cuts = np.append(0, np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True)) + 1)
    at_cuts = np.append(0, np.cumsum(errors[order]))[cuts]
    return np.interp(np.arange(len(errors) + 1), cuts, at_cuts), cuts


def aurc(errors, confidence):
    """Area under risk against coverage: mean over i of the error rate of the i most confident (Geifman 2019)."""
    kept, _ = errors_kept(errors, confidence)
    return float(np.mean(kept[1:] / np.arange(1, len(kept))))


def augrc(errors, confidence):
    """Area under (errors that are accepted) / n against coverage, 0 to 0.5 (Traub 2024, arXiv:2407.01032)."""
    kept, _ = errors_kept(errors, confidence)
    n = len(kept) - 1
    return float((kept[1:] + kept[:-1]).sum() / 2 / n**2)


def risk_coverage(errors, confidence):
    """Coverage and risk (error rate of what is accepted) at every threshold, from the strictest to all."""
    kept, cuts = errors_kept(errors, confidence)
    return cuts[1:] / (len(kept) - 1), kept[cuts[1:]] / cuts[1:]


def selective(errors, confidence):
    """{aurc, augrc, each with the best that an ordering could reach, risk_at {coverage}, coverage_at {risk}}.

    risk_at: of the strictest threshold that accepts at least this share. coverage_at: the largest share that a
    threshold accepts with at most this risk, also beyond a breach; 0 where none has it.
    """
    share, risk = risk_coverage(errors, confidence)
    best = -np.asarray(errors, np.float64)
    values = {"aurc": aurc(errors, confidence), "aurc_best": aurc(errors, best)}
    values |= {"augrc": augrc(errors, confidence), "augrc_best": augrc(errors, best)}
    values["risk_at"] = {f"{c:g}": float(risk[np.argmax(share >= c - 1e-12)]) for c in (0.5, 0.7, 0.8, 0.9, 0.95)}
    under = {r: share[risk <= r + 1e-12].max(initial=0.0) for r in (0.01, 0.02, 0.05, 0.1)}
    return values | {"coverage_at": {f"{r:g}": float(most) for r, most in under.items()}}


def matched_pairs(labels, sizes, tolerance=0.1):
    """Pairs (of class 1, of class 0) whose sizes differ by at most this share: bool [positives, negatives]."""
    labels, sizes, _ = check(labels, sizes)
    if sizes.min() <= 0:
        raise ValueError(f"size {sizes.min():g}: sizes must be above 0")
    logs = np.log(sizes)
    return np.abs(logs[labels == 1][:, None] - logs[labels == 0]) <= np.log(1 + tolerance)


def matched_auc(labels, scores, sizes, tolerance=0.1, weights=None, folds=None):
    """AUC over pairs of nearly equal size, where size cannot help; NaN without a pair."""
    labels, scores, weights = check(labels, scores, weights)
    pairs = matched_pairs(labels, sizes, tolerance).astype(float)
    if folds is not None:
        pairs *= folds[labels == 1][:, None] == folds[labels == 0]
    wins = (np.sign(scores[labels == 1][:, None] - scores[labels == 0]) + 1) / 2
    positive, negative = weights[..., labels == 1], weights[..., labels == 0]
    return ratio(((positive @ (pairs * wins)) * negative).sum(-1), ((positive @ pairs) * negative).sum(-1))


# The bootstrap draws whole groups (patients) with replacement: nodules of one patient are no independent facts.


def draws(groups, repeats, seed, strata=None):
    """How often each sample is in each resample, in pieces [some, n] of at most 4 million counts.

    strata [n] (say labels): groups are drawn within their stratum, the highest of their samples.
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count, random = member.max() + 1, np.random.default_rng(seed)
    stratum = np.zeros(count, int)
    if strata is not None:
        np.maximum.at(stratum, member, np.unique(np.asarray(strata), return_inverse=True)[1])
    order, size = np.argsort(stratum, kind="stable"), np.bincount(stratum)
    first, size = (np.cumsum(size) - size)[stratum[order]], size[stratum[order]]
    step = max(1, 4_000_000 // len(member))
    for start in range(0, repeats, step):
        rows = min(step, repeats - start)
        drawn = order[first + random.integers(0, size, (rows, count))] + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)[:, member]


def resample(statistic, groups, repeats=2000, seed=0, strata=None):
    """statistic(weights [r, n]) -> [r, ...], over `repeats` resamples in all; same groups and seed, same draws."""
    return np.concatenate([statistic(weights.astype(np.float64)) for weights in draws(groups, repeats, seed, strata)])


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


def holm(p_values):
    """p-values of several questions, each raised so that all of them together err as rarely as one (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(raised, 1.0)[np.argsort(order, kind="stable")]


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


def worth(labels, probabilities):
    """Point values of all that probabilities [n, K] are worth, ready for JSON; None where one class is absent."""
    labels, p = np.asarray(labels, int), np.asarray(probabilities, np.float64)
    said = decisions(score_of(p))
    values = {**rates(labels, said, p.shape[1]), **selective(said != labels, p.max(1))}
    ranks = {"auc": auc, "average_precision": average_precision}
    ranks |= {"recall_at_90": recall_at} if p.shape[1] == 2 else {}
    classes = len(np.unique(labels))
    values |= {name: float(of(labels, score_of(p))) if classes == p.shape[1] else None for name, of in ranks.items()}
    if classes < 2:
        return values | dict.fromkeys("nll brier ece ece_mass ece_classes ece_debiased mce".split())
    values |= {"nll": float(nll(labels, p)), "brier": float(brier(labels, score_of(p)))}
    return values | calibration_errors(labels, score_of(p))


def slices(labels, predictions, column, classes=2, minimum=20, gap=0.05, of="accuracy"):
    """`rates` of each value of a fact column [n] -> rows {slice, n, ..., gap, flagged}, smallest n last.

    gap: how far `of` lies below that of all samples. Slices below `minimum` are listed, never flagged.
    """
    labels, predictions, column = np.asarray(labels), np.asarray(predictions), np.asarray(column).astype(str)
    everything, rows = rates(labels, predictions, classes)[of], []
    for name in np.unique(column):
        row = {"slice": str(name), **rates(labels[column == name], predictions[column == name], classes)}
        row["gap"] = None if row[of] is None or everything is None else everything - row[of]
        rows.append({**row, "flagged": row["n"] >= minimum and row["gap"] is not None and row["gap"] > gap})
    return sorted(rows, key=lambda row: -row["n"])

"""From probabilities to sets that hold the truth as often as promised. Copyable: imports numpy only.

    fit, apply = METHODS["raps"]
    found = fit(probabilities, labels, alpha=0.1, ids=ids)      # [N, C], [N] of val_calib -> plain dict, ready for JSON
    sets = apply(found, probabilities, ids)                     # -> bool [N, C]

A promise holds for samples that are exchangeable with those of the fit: same source, no group in both. What n samples
cannot promise is said: {feasible: False, guarantee: "none"}, and the sets hold all classes (or the positive one).
Random numbers come from (seed, id), without ids from the row itself: the same sample always gets the same set.
"""

import functools
import hashlib
import inspect

import numpy as np


def check(probabilities, labels, alpha):
    """-> float64 [N, C], int [N]; refuses what no promise can rest on."""
    p, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.ndim != 2 or p.shape[1] < 2 or labels.shape != p.shape[:1] or not len(labels):
        raise ValueError(f"probabilities {p.shape}, labels {labels.shape}: give [N, C] and [N], C above 1")
    if not (np.isfinite(p).all() and p.min() >= 0 and np.abs(p.sum(1) - 1).max() < 1e-3):
        raise ValueError("probabilities must be 0 or more with rows of sum 1: calibrate the logits first")
    if labels.min() < 0 or labels.max() >= p.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: classes are 0 to {p.shape[1] - 1}")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"all {len(labels)} labels are {labels[0]}: sets need samples of two classes")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: it is the share of misses, above 0 and below 1")
    return p, labels.astype(int)


def uniform(probabilities, ids, seed):
    """One number [N] in (0, 1) for each sample: of its id, or of its row."""
    names = [row.tobytes() for row in probabilities] if ids is None else [str(i).encode() for i in ids]
    if len(names) != len(probabilities):
        raise ValueError(f"{len(names)} ids for {len(probabilities)} samples: give one each")
    key = str(seed).encode()
    digests = [hashlib.blake2b(name, digest_size=7, key=key).digest() for name in names]
    return (np.array([int.from_bytes(digest, "big") for digest in digests], np.float64) + 0.5) / 256**7


def most(alpha):
    """Samples that a promise of alpha needs at least."""
    return int(np.ceil(1 / alpha - 1 - 1e-9))


# scores [N, C]: how strange each class would be; u [N, 1] is uniform, 1 without randomisation


def above(p):
    """Of each class: the summed probability of likelier ones, and its rank from 1 (equal ones share the better)."""
    order = np.argsort(-p, 1, kind="stable")
    falling = np.take_along_axis(p, order, 1)
    new = np.concatenate([np.ones_like(falling[:, :1], bool), np.diff(falling, axis=1) != 0], 1)
    first = np.maximum.accumulate(np.where(new, np.arange(p.shape[1]), 0), 1)
    mass = np.take_along_axis(falling.cumsum(1) - falling, first, 1)
    back = np.argsort(order, 1)
    return np.take_along_axis(mass, back, 1), np.take_along_axis(first, back, 1) + 1


def lac(p, u):
    """1 - p: the smallest sets on average (Sadinle 2019)."""
    return 1 - p


def aps(p, u):
    """Probability of likelier classes and a part of the own (Romano 2020)."""
    return above(p)[0] + u * p


def raps(p, u, lam=0.01, k_reg=1):
    """aps and lam for each rank beyond k_reg (Angelopoulos 2021); with k_reg of C or more it is aps."""
    return above(p)[0] + u * p + lam * np.maximum(above(p)[1] - k_reg, 0)


def saps(p, u, lam=0.2):
    """Only the largest probability counts, then the rank (Huang 2024, arXiv:2310.06430)."""
    rank, top = above(p)[1], p.max(1, keepdims=True)
    return np.where(rank == 1, u * top, top + (rank - 2 + u) * lam)


def margin(p, u):
    """How far the likeliest other class is ahead."""
    others = np.stack([np.delete(p, k, 1).max(1) for k in range(p.shape[1])], 1)
    return others - p


def rank(p, u):
    """By rank, within a rank by probability (Luo 2024, arXiv:2407.04407)."""
    return above(p)[1] - p


SCORES = {function.__name__: function for function in (lac, aps, raps, saps, margin, rank)}


def quantile(scores, alpha, weights=None, own=1.0):
    """Smallest score whose share of all weight, that of one new sample (own) added, reaches 1 - alpha; None beyond all.

    Unweighted it is the ceil((n + 1)(1 - alpha))-th smallest.
    """
    weights, order = np.ones(len(scores)) if weights is None else weights, np.argsort(scores)
    reached = np.cumsum(weights[order]) >= (1 - alpha) * (weights.sum() + own) - 1e-9 * own
    return float(scores[order][reached.argmax()]) if reached.any() else None


def score_all(found, p, ids):
    u = uniform(p, ids, found["seed"])[:, None] if found["randomized"] else 1.0
    return SCORES[found["score"]](p, u, **found["options"])


def promise(found, short, said):
    """found with feasible and guarantee; short: what is missing for it, as words."""
    return found | {"feasible": not short, "guarantee": "none" if short else said} | ({"short": short} if short else {})


def covers(found, words):
    """Sets whose quantiles are known -> with what they promise."""
    none = [name for name, q in found["quantiles"].items() if q is None]
    short = f"too few samples of {', '.join(none)}: {most(found['alpha'])} or more are needed" if none else ""
    return promise(found, short, f"the truth is in the set with probability {1 - found['alpha']:g} {words}")


def fit_sets(score, probabilities, labels, alpha, slices=None, by="all", ids=None, seed=0, randomized=True,
             allow_empty=True, shares=None, **options):  # fmt: skip
    """Quantiles of the score of the truth: of all samples, by "class", by "slice", or for known shares of slices.

    shares {slice: its share where the sets will be used}: samples weigh as much as their slice will (Tibshirani 2019).
    """
    p, labels = check(probabilities, labels, alpha)
    if unknown := sorted(set(options) - set(inspect.signature(SCORES[score]).parameters)):
        raise ValueError(f"{score} has no option {unknown[0]}; it is {score}{inspect.signature(SCORES[score])}")
    by = "slice" if shares else by
    if by == "slice" and (slices is None or len(slices) != len(labels)):
        raise ValueError("sets by slice need the slice of each sample: slices [N]")
    found = {"score": score, "options": options, "alpha": alpha, "seed": seed, "randomized": randomized}
    found |= {"allow_empty": allow_empty, "n": len(labels), "by": by}
    own = score_all(found, p, ids)[np.arange(len(p)), labels]
    key = np.asarray({"all": ["all"] * len(p), "class": labels, "slice": slices}[by]).astype(str)
    names = list(map(str, range(p.shape[1]))) if by == "class" else sorted({*key.tolist(), *(shares or ())})
    if not shares:
        found["quantiles"] = {name: quantile(own[key == name], alpha) for name in names}
        return covers(found, "over all samples" if by == "all" else f"within each {by}")
    if absent := [name for name in names if name not in shares or name not in key]:
        raise ValueError(f"slice {absent[0]} has no share or no sample: give the share of each slice that is there")
    each = {name: shares[name] / np.sum(key == name) for name in names}
    weights = np.array([each[name] for name in key])
    quantiles = {name: quantile(own, alpha, weights, each[name]) for name in names}
    return covers(found | {"quantiles": quantiles}, "where slices have the given shares")


def apply_sets(found, probabilities, ids=None, slices=None):
    """A slice that the fit has not seen has no promise: all classes."""
    p = np.asarray(probabilities, np.float64)
    limit = {name: np.inf if q is None else q for name, q in found["quantiles"].items()}
    if found["by"] == "slice":
        if slices is None or len(slices) != len(p):
            raise ValueError("these sets were fitted by slice: give the slice of each sample")
        q = np.array([limit.get(name, np.inf) for name in np.asarray(slices).astype(str)])[:, None]
    else:
        q = limit["all"] if found["by"] == "all" else [limit[str(k)] for k in range(p.shape[1])]
    sets = score_all(found, p, ids) <= q
    empty = ~sets.any(1, keepdims=True) & (not found["allow_empty"])
    return sets | empty & (p == p.max(1, keepdims=True))


def fit_mondrian(probabilities, labels, alpha, slices=None, score="lac", **options):
    """A quantile for each slice where slices are given, else for each class (Vovk 2003)."""
    return fit_sets(score, probabilities, labels, alpha, slices, "class" if slices is None else "slice", **options)


def fit_crcp(probabilities, labels, alpha, slices=None, rate=0.05, score="lac", slack=0.0, ids=None, seed=0):
    """Labels of which a share `rate` was replaced by a uniformly drawn one (Clarkson 2024, arXiv:2407.07700).

    Clean scores are distributed as (noisy - rate * those of all labels) / (1 - rate), from where on it stays above.
    """
    p, labels = check(probabilities, labels, alpha)
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}: the share of replaced labels, 0 or more and below 1")
    found = {"score": score, "options": {}, "alpha": alpha, "seed": seed, "randomized": True, "allow_empty": True}
    scores, n = score_all(found, p, ids), len(labels)
    observed, everything = np.sort(scores[np.arange(n), labels]), np.sort(scores.ravel())
    noisy = np.searchsorted(observed, everything, side="right") / n
    clean = (noisy - rate * np.arange(1, len(everything) + 1) / len(everything)) / (1 - rate)
    lasting = np.minimum.accumulate(clean[::-1])[::-1]
    reached = np.flatnonzero(lasting >= np.ceil((n + 1) * (1 - alpha) - 1e-9) / n + slack - 1e-12)
    q = float(everything[reached[0]]) if len(reached) else None
    found |= {"n": n, "by": "all", "rate": rate, "quantiles": {"all": q}}
    return covers(found, f"if {rate:g} of the labels are random; approximate, better for large n")


# risk control: class 1 is the positive, and the share of positives whose set lacks it is bounded


def miss_threshold(scores, alpha):
    """Largest t that at most alpha of new positives are below, in the mean, by those of [n]; None: too few."""
    index = int(np.floor(alpha * (len(scores) + 1) - 1 + 1e-9))
    return float(np.sort(scores)[index]) if index >= 0 else None


def fit_crc(probabilities, labels, alpha, slices=None):
    """Conformal risk control of the false negative rate (Angelopoulos 2024, arXiv:2208.02814)."""
    p, labels = check(probabilities, labels, alpha)
    t, n = miss_threshold(p[labels == 1, 1], alpha), int((labels == 1).sum())
    found = {"alpha": alpha, "threshold": t or 0.0, "cut": 0.0, "n": len(labels), "positives": n}
    short = f"{n} positives; {most(alpha)} are needed" if t is None else ""
    return promise(found, short, f"sets miss at most {alpha:g} of the positives in the mean")


def fit_scrc(probabilities, labels, alpha, slices=None, coverage=0.8, delta=0.1, variant="I"):
    """Sets for the surest share `coverage`, the rest is deferred (all classes): 2512.12844, variant I.

    Of the selected positives at most alpha are missed, with probability 1 - delta; delta=0: no promise, no slack.
    """
    if variant != "I":
        raise ValueError(f"variant {variant}: T fits on the test set at prediction, which a saved policy cannot; use I")
    if not (0 < coverage <= 1 and 0 <= delta < 1):
        raise ValueError(f"coverage {coverage}, delta {delta}: shares above 0 and up to 1, from 0 and below 1")
    (p, labels), sure = check(probabilities, labels, alpha), np.max(probabilities, 1)
    cut = float(np.sort(sure)[::-1][int(np.ceil(coverage * len(p) - 1e-9)) - 1])
    scores = p[(labels == 1) & (sure >= cut), 1]
    slack = np.sqrt(np.log(1 / delta) / (2 * max(1, len(scores)))) if delta else 0.0
    t = miss_threshold(scores, alpha - slack)
    found = {"alpha": alpha, "threshold": t or 0.0, "cut": cut, "coverage": coverage, "delta": delta, "n": len(p)}
    found |= {"positives": len(scores), "slack": float(slack)}
    short = f"{len(scores)} selected positives: alpha less the slack is {alpha - slack:.3g}" if t is None else ""
    said = f"with probability {1 - delta:g} at most {alpha:g} of the selected positives are missed"
    return promise(found, short, said if delta else "none")


def apply_risk(found, probabilities, ids=None, slices=None):
    """1 is in where p1 reaches the threshold, another class where it is the likeliest that is left; never empty."""
    p = np.asarray(probabilities, np.float64)
    positive = p[:, 1] >= found["threshold"]
    left = np.where(positive[:, None] | (np.arange(p.shape[1]) != 1), p, -1.0)
    sets = np.arange(p.shape[1]) == left.argmax(1)[:, None]
    sets[:, 1] = positive
    return sets | (p.max(1) < found["cut"])[:, None]


METHODS = {
    **{name: (functools.partial(fit_sets, name), apply_sets) for name in SCORES},
    "mondrian": (fit_mondrian, apply_sets),
    "crc": (fit_crc, apply_risk),
    "scrc": (fit_scrc, apply_risk),
    "crcp": (fit_crcp, apply_sets),
}

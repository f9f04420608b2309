"""From probabilities to one decision, or to leaving it to others: thresholds, exits, gates.

    fit, apply = METHODS["mcc"]
    found = fit(probabilities, labels)           # [N, C], [N] of val_calib -> plain dict, ready for JSON
    decision = apply(found, probabilities)       # [N] class, or -1: left to others

Thresholds are the middle of the scores between which nothing changes. Rows of METHODS belong to the kinds of KIND_OF.
What is measured on the samples of the fit promises nothing; with delta above 0 exit and gate test a fixed row of
thresholds from the strictest on, each by an exact binomial test, until one fails: that is a promise.
"""

import functools

import numpy as np

from tools.lib.calibrate import ONE
from tools.lib.metrics import augrc, counts_above, errors_kept, ratio

GRID = np.concatenate([1 - np.geomspace(0.001, 0.05, 20), np.arange(0.94, 0.5, -0.01)])  # strictest first


def check(probabilities, labels, classes=None):
    p, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if classes and p.shape[1] != classes:
        raise ValueError(f"{p.shape[1]} classes: a threshold or an exit is for two; use gate or a conformal method")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"all {len(labels)} labels are {labels[0]}: a policy needs samples of two classes")
    if labels.min() < 0:
        raise ValueError(f"{np.sum(labels < 0)} samples have no label: fit on labelled ones")
    return p, labels.astype(int)


def sweep(labels, scores):
    """Every threshold that says something else, "none" first: {threshold, low, high, tp, fp, fn, tn}, each [T].

    Any t with low < t <= high decides alike; `threshold` is the middle.
    """
    tp, fp = counts_above(labels, scores)
    distinct = np.unique(np.asarray(scores, np.float64))[::-1]
    high = np.append(max(1.0, np.nextafter(distinct[0], np.inf)), distinct)
    low = np.append(distinct, min(0.0, distinct[-1]))
    counts = {"tp": tp, "fp": fp, "fn": tp[-1] - tp, "tn": fp[-1] - fp}
    return {"threshold": middle(low, high), "low": low, "high": high, **counts}


def middle(low, high):
    half = (low + high) / 2
    return np.where(half > low, half, high)  # between neighbouring floats there is none


def mcc_of(tp, fp, fn, tn):
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.where(below > 0, (tp * tn - fp * fn) / np.maximum(below, 1e-300), 0.0)


CRITERIA = {  # name: (counts and option -> what is largest at the best threshold, the option's value)
    "mcc": (lambda tp, fp, fn, tn, x: mcc_of(tp, fp, fn, tn), None),
    "f1": (lambda tp, fp, fn, tn, x: 2 * tp / (2 * tp + fp + fn), None),
    "youden": (lambda tp, fp, fn, tn, x: tp / (tp + fn) - fp / (fp + tn), None),
    "cost": (lambda tp, fp, fn, tn, x: -(x * fn + fp), 10.0),  # x: false alarms that one miss is worth
    "fnr": (lambda tp, fp, fn, tn, x: np.where(fn <= x * (tp + fn) + 1e-9, tn, -fn), 0.02),  # x: largest miss rate
}


def plateau(values, low, high):
    """The middle of the widest run of thresholds with the largest value."""
    best = values >= values.max() - 1e-12
    starts = np.flatnonzero(best & ~np.append(False, best[:-1]))
    ends = np.flatnonzero(best & ~np.append(best[1:], False))
    widest = np.argmax(high[starts] - low[ends])
    return float(middle(low[ends[widest]], high[starts[widest]])), float(values[starts[widest]])


def fit_threshold(name, probabilities, labels, **option):
    function, default = CRITERIA[name]
    if set(option) - ({"x"} if default is not None else set()):
        raise ValueError(f"{name} has no option {sorted(option)[0]}" + (f"; it has x={default:g}" if default else ""))
    p, labels = check(probabilities, labels, 2)
    s, x = sweep(labels, p[:, 1]), option.get("x", default)
    t, value = plateau(function(*(s[k] for k in ("tp", "fp", "fn", "tn")), x), s["low"], s["high"])
    found = {"threshold": t, "criterion": name, "value": value, "n_thresholds": len(s["tp"])}
    return found | ({"x": x} if default else {}) | {"feasible": True, "guarantee": "none"}


def apply_threshold(found, probabilities):
    return (np.asarray(probabilities)[:, 1] >= found["threshold"]).astype(int)


# exits: the sure share is decided, the rest left to others. confidence [N], wrong [N], counted [N]: whose errors count


def binomial_cdf(k, n, p):
    """Chance of at most k hits in n trials of probability p, 0 < p < 1: exact, in logs."""
    i = np.arange(1, int(k) + 1)
    logs = np.append(0.0, np.cumsum(np.log((n - i + 1) / i) + np.log(p / (1 - p)))) + n * np.log1p(-p)
    return 1.0 if k >= n else float(min(1.0, np.exp(logs - logs.max()).sum() * np.exp(logs.max())))


def proven(confidence, wrong, counted, risk, delta):
    """The laxest threshold of GRID that the tests reach; None where not even the first one passes.

    Thresholds with so few samples that no outcome could pass are left out.
    """
    found = None
    for t in GRID:
        out = (confidence >= t) & counted
        if (1 - risk) ** out.sum() <= delta:
            if binomial_cdf(wrong[out].sum(), out.sum(), risk) > delta:
                break
            found = float(t)
    return found


def widest(confidence, wrong, counted, risk, floor):
    """The threshold with the largest coverage whose error rate is at most `risk`, from `floor`; None: there is none."""
    _, cuts = errors_kept(wrong & counted, confidence)
    order = np.argsort(-confidence, kind="stable")
    errors, of = (np.append(0, np.cumsum(values[order]))[cuts[1:]] for values in (wrong & counted, counted))
    good = np.flatnonzero(ratio(errors, of) <= risk + 1e-12)  # NaN, of nothing: not good
    if not len(good):
        return None
    falling, last = np.append(confidence[order], floor), cuts[1:][good[-1]]
    return float(middle(falling[last], falling[last - 1]))


def leave(confidence, wrong, counted, risk, delta, coverage, words, floor=0.0):
    """{threshold, coverage, error, feasible, guarantee}; without a threshold nothing is decided."""
    args = confidence, wrong, counted, risk
    test = proven(*args, delta) if delta else widest(*args, floor)
    out = np.zeros(len(wrong), bool) if test is None else confidence >= test
    share, error = float(out.mean()), ratio((wrong & counted & out).sum(), (counted & out).sum())
    feasible = test is not None and share >= coverage
    said = f"{words} at most {risk:g} with probability {1 - delta:g}" if delta and feasible else "none"
    error = None if np.isnan(error) else float(error)
    return {"threshold": test, "coverage": share, "error": error, "feasible": feasible, "guarantee": said}


def fit_exit(probabilities, labels, fnr=0.02, coverage=0.0, delta=0.0):
    """p1 >= t: positive; p1 <= 1 - t: negative; else left. Of positives that exit at most `fnr` are called negative."""
    p, labels = check(probabilities, labels, 2)
    wrong = (p[:, 1] >= 0.5) != (labels == 1)
    return leave(p.max(1), wrong, labels == 1, fnr, delta, coverage, "misses among exits are", 0.5)


def apply_exit(found, probabilities):
    p = np.asarray(probabilities)
    decision = (p[:, 1] >= 0.5).astype(int)
    t = found["threshold"]
    return np.full(len(p), -1) if t is None else np.where(p.max(1) >= t, decision, -1)


CONFIDENCES = {
    "max": lambda p: p.max(1),
    "margin": lambda p: np.diff(np.sort(p, 1)[:, -2:], axis=1)[:, 0],
    "entropy": lambda p: 1 + (p * np.log(np.maximum(p, 1e-300))).sum(1) / np.log(p.shape[1]),
}


def log_odds(p):
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return np.log(p) - np.log1p(-p)


def gate_of(found, p):
    """Chance that the likeliest class is right: the confidence, calibrated."""
    return ONE["platt"][1](found["calibrator"], log_odds(CONFIDENCES[found["confidence"]](p)))


def fit_gate(probabilities, labels, error=0.01, coverage=0.7, delta=0.0):
    """The likeliest class where the gate is sure enough: the confidence with the lowest AUGRC, calibrated by Platt."""
    p, labels = check(probabilities, labels)
    wrong = p.argmax(1) != labels
    name = min(CONFIDENCES, key=lambda name: augrc(wrong, CONFIDENCES[name](p)))
    found = {"confidence": name, "calibrator": ONE["platt"][0](log_odds(CONFIDENCES[name](p)), ~wrong)}
    if delta:  # what is tested must not depend on the samples of the test
        found = {"confidence": "max", "calibrator": {"a": 1.0, "b": 0.0}}
    everyone = np.ones(len(wrong), bool)
    return found | leave(gate_of(found, p), wrong, everyone, error, delta, coverage, "errors among exits are")


def apply_gate(found, probabilities):
    p, t = np.asarray(probabilities, np.float64), found["threshold"]
    return np.full(len(p), -1) if t is None else np.where(gate_of(found, p) >= t, p.argmax(1), -1)


METHODS = {name: (functools.partial(fit_threshold, name), apply_threshold) for name in CRITERIA}
METHODS |= {"exit": (fit_exit, apply_exit), "gate": (fit_gate, apply_gate)}
KIND_OF = {name: name if name in ("exit", "gate") else "threshold" for name in METHODS}

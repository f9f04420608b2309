"""What the decisions of a policy were worth: numbers, targets, a verdict in words, plots."""

import functools
import re

import numpy as np

from checkpoint import write_text
from tools.lib import judge, metrics, page, rules, sheet, thresholds, view_sheet
from tools.lib.calibrate import softmax
from tools.lib.cli import shown
from tools.lib.files import csv_text
from tools.lib.progress import progress

TARGETS = {  # what is asked of the system: (where it stands in the results, bound, must it be at least this?)
    "accuracy": (("decided", "accuracy"), 0.88, True),
    "MCC": (("decided", "mcc"), 0.90, True),
    "expected calibration error": (("probabilities", "ece"), 0.05, False),
    "coverage of the sets": (("decisions", "coverage"), 0.90, True),
    "false negatives among decided": (("decided", "fnr"), 0.02, False),
}
COSTS = {"decision": 1.0, "left": 10.0}  # in units of one decision: what it costs, and what others cost who decide it


def intervals(statistics, labels, groups, repeats):
    """{name: {value, low, high}} of statistics {name: function of weights}; of one class nothing is said."""
    if len(np.unique(labels)) < 2:
        return dict.fromkeys(statistics)
    values = {name: float(statistic(None)) for name, statistic in statistics.items()}
    if len(np.unique(groups)) < judge.FEWEST:
        return {name: {"value": value, "low": None, "high": None} for name, value in values.items()}
    with progress(total=repeats, desc=f"intervals of {' and '.join(statistics)}", unit="resample") as bar:

        def drawn(weights):
            bar.update(len(weights))
            return np.stack([statistic(weights) for statistic in statistics.values()], 1)

        low, high = metrics.interval(metrics.resample(drawn, groups, repeats, strata=labels))
    ends = [[float(end) if np.isfinite(end) else None for end in pair] for pair in zip(low, high)]
    return {name: {"value": values[name], "low": low, "high": high} for name, (low, high) in zip(values, ends)}


def uncalibrated(policy, logits):
    """Probabilities [N, C] without the policy's calibrator."""
    return softmax(rules.apply_step(policy["steps"][0], np.asarray(logits, np.float64), None, None))


def evaluate(table, out, before, sets, repeats):
    """All numbers of labelled samples; before: probabilities without the calibrator; sets: is this a policy of sets?"""
    y, p, groups = table.labels, out.probabilities, table.groups
    kept, decisions = out.decision >= 0, rules.measured(y, out)
    decisions["coverage"] = decisions["in_set"] if sets else None
    result = {"decided": decisions.pop("decided") or {}, "decisions": decisions, "probabilities": metrics.worth(y, p)}
    result["uncalibrated"] = metrics.worth(y, before)
    result["positive"] = table.facts["classes"][1] if p.shape[1] == 2 else None
    given = y[kept], out.decision[kept]
    both = {name: functools.partial(getattr(metrics, name), *given) for name in ("accuracy", "mcc")}
    result["intervals"] = intervals(both, y[kept], groups[kept], repeats)
    if p.shape[1] == 2:
        result["intervals"] |= intervals({"auc": functools.partial(metrics.auc, y, p[:, 1])}, y, groups, repeats)
    left = {"n": int((~kept).sum()), "cost_per_sample": COSTS["decision"] + float((~kept).mean()) * COSTS["left"]}
    left["accuracy_if_decided"] = float((p.argmax(1) == y)[~kept].mean()) if left["n"] else None
    return result | {"left": left | {"accuracy_if_others_are_right": float(((out.decision == y) | ~kept).mean())}}


def met(result):
    """Rows: target, bound, value, met or not."""
    for name, ((part, key), bound, least) in TARGETS.items():
        value = result[part].get(key)
        good = value is not None and (value >= bound if least else value <= bound)
        word = "not defined" if value is None else "met" if good else "not met"
        name += f" (of {shown(result['positive'])})" if key == "fnr" and result["positive"] else ""
        yield [name, f"{'at least' if least else 'at most'} {bound:g}", value, word]


def verdict(result, policy, split, looks):
    d, missed = result["decisions"], [row[0] for row in met(result) if row[3] == "not met"]
    known = result["intervals"]["accuracy"]
    words = f"Of {d['n']} samples of {split} {d['decided_share']:.1%} are decided"
    if known:
        words += f", with accuracy {judge.in_words(known)} and MCC {judge.in_words(result['intervals']['mcc'])}"
    if d["coverage"] is not None:
        words += f". Sets hold the truth in {d['coverage']:.1%}, with {d['set_size']:.2f} classes each"
    words += ". " if policy["feasible"] else ". What was asked of the policy could not be reached. "
    words += "Nothing is promised. " if policy["guarantee"] == "none" else f"Promised: {policy['guarantee']}. "
    words += f"Targets that are not met: {', '.join(missed)}." if missed else "All targets that are defined are met."
    words += f" The positive class is {shown(result['positive'])}, the last by name." if result["positive"] else ""
    before = f" Looks by other weights or policies that came before, which makes this optimistic: {looks}."
    return words + (before if looks else "")


def bins(labels, probabilities):
    """Points of a reliability plot."""
    weight, said, true = metrics.reliability(labels, metrics.score_of(probabilities), 15)
    return said[weight > 0] / weight[weight > 0], true[weight > 0] / weight[weight > 0]


def thinned(curve):
    """At most 400 points of a curve."""
    return tuple(zip(*page.thin(list(zip(*(np.asarray(values).tolist() for values in curve))))))


def draw(y, out, before, policy):
    p, wrong, last = out.probabilities, out.probabilities.argmax(1) != y, policy["steps"][-1]
    classes, two = np.unique(y), p.shape[1] == 2
    if len(classes) > 1:
        lines = {"before": bins(y, before), "after": bins(y, p), "perfect": ([0, 1], [0, 1])}
        yield page.line_plot("Reliability", lines, "said", "came true")
    best = thinned(metrics.risk_coverage(np.sort(wrong), -np.arange(len(y))))
    curves = {"confidence": thinned(metrics.risk_coverage(wrong, p.max(1))), "best": best}
    yield page.line_plot("Risk and coverage", curves, "share accepted", "errors among accepted")
    share = np.bincount(out.sets.sum(1), minlength=p.shape[1] + 1) / len(y)
    if share.max() < 1:  # else every sample has a set of the same size: nothing to see
        yield page.line_plot("Set sizes", {"": (range(len(share)), share)}, "classes in the set", "share", points=True)
    if two and len(classes) == 2:
        curves = {"policy": thinned(metrics.roc_curve(y, p[:, 1])), "chance": ([0, 1], [0, 1])}
        yield page.line_plot("ROC", curves, "false alarms", "hits")
        curves = {"policy": thinned(metrics.precision_recall_curve(y, p[:, 1]))}
        yield page.line_plot("Precision and recall", curves, "recall", "precision")
        s = thresholds.sweep(y, p[:, 1])
        chosen = [("x", last["parameters"]["threshold"], "chosen")] if last["kind"] == "threshold" else []
        curves = {"MCC": thinned((s["threshold"], thresholds.mcc_of(s["tp"], s["fp"], s["fn"], s["tn"])))}
        yield page.line_plot("MCC by threshold", curves, "threshold", "MCC", chosen)


def worst_rows(table, out, most):
    """errors.csv: of each kind the `most` worst: wrong ones by how sure they are, right ones by how little sure."""
    y, p, classes = table.labels, out.probabilities, np.array(table.facts["classes"])
    sure, here = p.max(1), out.decision >= 0
    wrong = here & (out.decision != y)
    kinds = {f"{classes[k]}, said {classes[j]}": (wrong & (y == k) & (out.decision == j), -p[:, j])
             for k in range(len(classes)) for j in range(len(classes)) if j != k}  # fmt: skip
    kinds["right, below 0.7"] = (here & ~wrong & (sure < 0.7), sure)
    yield ["kind", "id", "group", "label", "decision", "probability"]
    for kind, (members, order) in kinds.items():
        members = np.flatnonzero(members)
        for i in members[np.argsort(order[members], kind="stable")][:most]:
            said = out.decision[i]
            yield [kind, str(table.ids[i]), str(table.groups[i]), classes[y[i]], classes[said], f"{p[i, said]:.4f}"]


DRAWN = 12  # of each kind


def error_sheets(folder, rows, hand):
    """Writes errors_KIND.png of the first rows of each kind: views, what each says, attention; and errors_views.csv.

    rows: of worst_rows; hand: (Classifier, facts, Source, asking.Samples, device).
    """
    classifier, facts, source, asked, device = hand
    at, kinds = dict(zip(asked.ids, asked.rows.tolist())), {}
    for kind, name, _, label, _, probability in rows[1:]:
        kinds.setdefault(kind, []).append((f"{kind}: {name}, probability {probability}", name, label))
    told = []
    for kind, lines in kinds.items():
        parts = [view_sheet.drawn(classifier, facts, source, at[name], title, label, device)
                 for title, name, label in progress(lines[:DRAWN], desc=f"draw {kind}", unit="picture")]  # fmt: skip
        told += [[name, *view[1:]] for (_, name, _), (_, views) in zip(lines, parts) for view in views]
        path = folder / f"errors_{re.sub(r'[^A-Za-z0-9]+', '_', kind)[:80]}.png"
        yield sheet.save(path, sheet.stack([image for image, _ in parts], gap=18))
    yield write_text(folder / "errors_views.csv", csv_text([view_sheet.HEADER, *told]))


def sweep_rows(y, p):
    """threshold_sweep.csv: what at most 5,000 thresholds on the probability of class 1 would have given here."""
    s = thresholds.sweep(y, p[:, 1])
    s["mcc"] = thresholds.mcc_of(s["tp"], s["fp"], s["fn"], s["tn"])
    names = ("threshold", "mcc", "tp", "fp", "fn", "tn")
    rows = page.thin(list(zip(*(s[name].tolist() for name in names))), 5000)
    return [names, *([f"{value:.8g}" for value in row] for row in rows)]

"""Protocols of a probe: who is fitted on whom, and what its predictions are worth.

test: fitted on train, scored on val_test. cv: folds over groups that the backbone has not seen.
"""

import numpy as np

from tools.lib import fits, judge, provenance
from tools.lib.cli import shown
from tools.lib.progress import progress

REPEATS = 5  # of cross-validation
TITLES = {"test": "Fit on train, scored once on val_test",
          "cv": "Cross-validation, 5 x 5 folds of {}",
          "tuned": "Trained on train, chosen on val_select, scored once on val_test"}  # fmt: skip


def refuse_absent(table, splits, name, otherwise=""):
    """Refuse a split without a sample of some class."""
    if absent := set(range(len(table.classes))) - set(table.labels[splits == name].tolist()):
        raise ValueError(f"one-class labels: {name} has no sample of class {shown(table.classes[min(absent)])}; make a "
                         f"split that has (tools/make_splits.py --labels, --ratios){otherwise}")  # fmt: skip


def plan_test(table, splits, seeds):
    """Fit on train, test on val_test -> rows to keep [n], and per seed one (fit masks [1, n], test masks [1, n])."""
    for name in ("train", "val_test"):
        refuse_absent(table, splits, name, ", or use --protocol cv")
    keep = np.isin(splits, ("train", "val_test"))
    test = splits[keep][None] == "val_test"
    return keep, [(~test, test)] * seeds


def plan_all(source, table, splits, facts, protocol, seeds, allow_seen):
    """{protocol: (rows kept, plans)}, {protocol: provenance.Exposure of its patients}, notes; refuses a leak."""
    plans, exposures, notes = {}, {}, []
    if protocol != "cv":
        tested = source.take(table.rows[splits == "val_test"])
        exposures["test"] = provenance.refuse_leak(facts, tested, "val_test", allow_seen)
        plans["test"] = plan_test(table, splits, seeds)
    if protocol != "test":
        trained, known = provenance.refuse_leak(facts, source.take(table.rows), "the labels", allow=True)
        keep = ~np.isin(table.patients, trained) | allow_seen
        exposures["cv"] = provenance.Exposure(sorted(set(trained) & set(table.patients[keep].tolist())), known)
        if folds := fits.plan_cv(table.labels[keep], table.groups[keep], len(table.classes), REPEATS):
            plans["cv"] = keep, folds
        else:
            few = f"{len(set(table.groups[keep]))} {table.unit}"
            notes = [f"no cross-validation: too few of the {few} that may be judged"]
    if not plans:
        raise ValueError(f"{notes[0]}; --allow-seen judges those of the pretraining too")
    return plans, exposures, notes


def judged(name, table, predictions, number, exposure, source, bootstrap, **more):
    """Judges and draws predictions {name: [R, n, K]} of a table -> (for results.json, its part of the page).

    number [R, n]: of the fit that a prediction is by.
    """
    judge.refuse_constant(predictions["probe"])
    mm = table.sizes[:, 0] if table.sizes is not None and len(table.classes) == 2 else None
    result = judge.judge(table.labels, table.groups, predictions, number, mm, bootstrap)
    looks = source.earlier_looks if name != "cv" else 0
    caveats = judge.caveats(exposure.groups, result["patients"], exposure.known, source.crossing, looks, table.unit)
    title = judge.titled(TITLES[name].format(table.unit), caveats)
    result |= {"unit": table.unit, "title": title, "caveats": caveats, "balance": judge.balance(table)}
    result |= {"seen_in_pretraining": exposure.groups, **more}
    result["verdict"] = judge.verdict(result)
    judge.show(result)
    return result, judge.section(result, table.labels, table.classes, predictions, mm)


def judge_one(name, plan, table, predictors, exposure, source, bootstrap, seeds):
    """Fits and judges one protocol -> (for results.json, its part of the page, the predictions of the probe)."""
    keep, folds = plan
    part, tested = table.take(keep), folds[0][1].any(0)
    predictors = {n: (classifier, [X[keep] for X in Xs]) for n, (classifier, Xs) in predictors.items()}
    bar = progress(folds, f"fit {name}", unit="repeat")
    predictions, settings = fits.held_out(predictors, part.labels, part.groups, bar)
    probe, more = predictions["probe"], {"settings": settings}
    predictions = {n: p[:, tested] for n, p in predictions.items()}
    number = np.stack([test.argmax(0) for _, test in folds])[:, tested]  # [R, n] fold of each sample
    if name == "test":
        some = {n: predictors[n] for n in ("probe", "random weights", "raw pixels", "size") if n in predictors}
        more["label_efficiency"] = judge.label_efficiency(some, part.labels, part.groups, ~tested, seeds)
    return *judged(name, part.take(tested), predictions, number, exposure, source, bootstrap, **more), probe

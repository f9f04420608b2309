"""Protocols of a probe: who is fitted on whom, and what its predictions are worth.

test: fitted on train, scored on val_test. cv: folds over groups that the backbone has not seen.
"""

import re
from pathlib import Path

import numpy as np

from data import read_csv
from tools.lib import fits, judge, provenance
from tools.lib.cli import shown
from tools.lib.progress import progress

REPEATS = 5  # of cross-validation
TITLES = {"test": "Fit on train, scored once on val_test",
          "cv": "Cross-validation, 5 x 5 folds of {}",
          "folds": "Cross-validation, published folds of whole {}",
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


def read_folds(path):
    """{series: fold} of a CSV file series,fold; of LUNA16's folder, whose folders subset0 .. subset9 are its folds."""
    if Path(path).is_dir():
        found = [(p.stem, int(re.sub(r"\D", "", p.parent.name))) for p in Path(path).glob("subset[0-9]*/*.mhd")]
        if not found:
            raise ValueError(f"--folds {path}: no subset0 to subset9 with .mhd files in it; give LUNA16's folder")
        return dict(found)
    header, *pieces = read_csv(path)
    names = [name.strip().lower().removesuffix("uid") for name in header]
    if not {"series", "fold"} <= {*names}:
        raise ValueError(f"--folds {path}: columns {shown(','.join(header))}, expected series,fold")
    at, of = [names.index(name) for name in ("series", "fold")], {}
    for row in (row for piece in pieces for row in piece if row):
        if len(row) != len(header):
            raise ValueError(f"--folds {path}: row {shown(','.join(row))} has {len(row)} cells of {len(header)}")
        if of.setdefault(row[at[0]], row[at[1]]) != row[at[1]]:
            raise ValueError(f"--folds {path}: series {shown(row[0])} has no fold, or two; correct the row")
    return of


def shared_scans(series, folds):
    """Of the scans in a test fold the share that has samples in the others too, mean over folds."""
    shares = []
    for fold in np.unique(folds):
        test = set(series[folds == fold].tolist())
        shares.append(len(test & set(series[folds != fold].tolist())) / len(test))
    return float(np.mean(shares))


def plan_folds(path, source, table):
    """The folds of a file, whole patients each -> [(fit masks [B, n], test masks [B, n])]; says what was shared."""
    if "z" not in source.rows.columns:
        raise ValueError(f"--folds {path} are of CT series; {source.root} holds photographs")
    of, series = read_folds(path), np.array(source.rows.column("series"))[table.rows]
    if lacking := sorted({*series.tolist()} - of.keys()):
        raise ValueError(f"--folds {path} has no fold of {len(lacking)} series, first {shown(lacking[0])}")
    published = np.array([of[name] for name in series.tolist()])
    names, folds, moved = np.unique(published), published.copy(), 0
    for group in np.unique(table.groups):
        mine = table.groups == group
        moved += len(set(published[mine].tolist())) > 1
        folds[mine] = min(published[mine].tolist())
    print(f"--folds: {len(names)} folds; {moved} {table.unit} lay in several and are kept whole in their first")
    dealt = np.random.default_rng(0).permutation(len(series)) % max(len(names), 2)
    usual, ours = (f"{shared_scans(series, some):.0%}" for some in (dealt, folds))
    print(f"  a random split of samples, the usual one, shares {usual} of its test scans with train, this one {ours}")
    tests = np.stack([folds == name for name in np.unique(folds)])
    for name, test in zip(np.unique(folds), tests):
        if len(tests) < 2 or fits.fold_count(table.labels[~test], table.groups[~test]) < 2:
            raise ValueError(f"--folds {path}: outside fold {name} a class has fewer than 2 {table.unit}; use others")
    return [(~tests, tests)]


def plan_all(source, table, splits, facts, protocol, seeds, allow_seen, folds=None):
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
        if folds:
            plans["cv"] = keep, plan_folds(folds, source, table.take(keep))
        elif drawn := fits.plan_cv(table.labels[keep], table.groups[keep], len(table.classes), REPEATS):
            plans["cv"] = keep, drawn
        else:
            few = f"{len(set(table.groups[keep]))} {table.unit}"
            notes = [f"no cross-validation: too few of the {few} that may be judged"]
    if not plans:
        raise ValueError(f"{notes[0]}; --allow-seen judges those of the pretraining too")
    return plans, exposures, notes


def judged(name, table, predictions, number, exposure, source, bootstrap, title=None, **more):
    """Judges and draws predictions {name: [R, n, K]} of a table -> (for results.json, its part of the page).

    number [R, n]: of the fit that a prediction is by.
    """
    title = title or name
    judge.refuse_constant(predictions["probe"])
    mm = table.sizes[:, 0] if table.sizes is not None and len(table.classes) == 2 else None
    result = judge.judge(table.labels, table.groups, predictions, number, mm, bootstrap)
    looks = source.earlier_looks if name != "cv" else 0
    caveats = judge.caveats(exposure.groups, result["patients"], exposure.known, source.crossing, looks, table.unit)
    title = judge.titled(TITLES[title].format(table.unit), caveats)
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
    if name == "cv" and len(folds) == 1:  # 5 are drawn, those of a file are one
        more["title"] = "folds"
    if name == "test":
        some = {n: predictors[n] for n in ("probe", "random weights", "raw pixels", "size") if n in predictors}
        more["label_efficiency"] = judge.label_efficiency(some, part.labels, part.groups, ~tested, seeds)
    return *judged(name, part.take(tested), predictions, number, exposure, source, bootstrap, **more), probe

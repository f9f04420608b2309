"""A frozen backbone and labels -> predictions and honest numbers: does it know more than a ruler?

    python train_probe.py --ckpt runs/lidc/last.pth --data data/processed --labels _labels/malignancy.csv \
        --out runs/lidc/probe

Nodule tables (tools/lidc_nodules.py) are cropped in millimetres around each nodule; any other table path,label[,group]
is judged on whole images. Fit on train, scored once on val_test; then 5 x 5 cross-validation over patients that the
backbone has not seen. Always beside the probe: nodule size, raw pixels, random weights, size + features.
Letters: n samples, S crop scales, P parts (cls, mean patch, patches in the nodule's box), D features, K classes,
B fits at once (folds), R repeats (seeds).
"""

import argparse
import functools
import json
import time
from pathlib import Path

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np

import data
from checkpoint import write_text
from model import load_backbone, read_facts
from tools.lib import broken, fits, judge, page, provenance
from tools.lib.cli import Parser, above_zero, natural, pick_device, positive, run, shown
from tools.lib.features import Framing, cached, extract, images_sha256
from tools.lib.files import csv_text, json_text, write_json
from tools.lib.loop import git_commit, other_encoding
from tools.lib.progress import progress
from tools.lib.samples import leave_out, read_table
from tools.lib.slices import find_slice

REPEATS = 5  # of cross-validation
TITLES = {"test": "Fit on train, scored once on val_test",
          "cv": "Cross-validation, 5 x 5 folds of {}"}  # fmt: skip


# ----- splits


def split_of(source, table, protocol):
    """Split of each sample by splits.json (checked against the index); cross-validation alone can do without: ""."""
    if protocol == "cv" and not data.split_path(source.root).exists():
        return np.full(len(table.ids), "")
    splits = data.split_names(source)[table.rows]
    for group in np.unique(table.groups):
        if len(set(splits[table.groups == group])) > 1:
            raise ValueError(f"group {shown(group)} lies in several splits; run tools/make_splits.py --labels")
    return splits


def open_samples(source, table, splits, used_by, allow_duplicates):
    """The images of these samples through the door -> (Source, the table with its rows); splits: those of the samples.

    A look is recorded where one of them is in val_test. Without splits.json there is no contract.
    """
    if not splits[0]:
        return source, table
    purposes = [purpose for purpose, split in data.PURPOSES.items() if split in splits]
    chosen = data.open_for(source, purposes, used_by, allow_duplicates=allow_duplicates)
    rows = [source.rows[i] for i in table.rows]
    moved = [find_slice(chosen, row["path"], row.get("z")) for row in rows]
    return chosen, table._replace(rows=np.array(moved))


# ----- protocols: who is fitted on whom


def plan_test(table, splits, seeds):
    """Fit on train, test on val_test -> rows to keep [n], and per seed one (fit masks [1, n], test masks [1, n])."""
    for name in ("train", "val_test"):
        if absent := set(range(len(table.classes))) - set(table.labels[splits == name].tolist()):
            raise ValueError(
                f"one-class labels: {name} has no sample of class {shown(table.classes[min(absent)])}; make a split "
                "that has (tools/make_splits.py --labels, --ratios), or use --protocol cv"
            )
    keep = np.isin(splits, ("train", "val_test"))
    test = splits[keep][None] == "val_test"
    return keep, [(~test, test)] * seeds


def plan_all(source, table, splits, facts, args):
    """{protocol: (rows kept, plans)}, {protocol: provenance.Exposure of its patients}, notes; refuses a leak."""
    plans, exposures, notes = {}, {}, []
    if args.protocol != "cv":
        tested = source.take(table.rows[splits == "val_test"])
        exposures["test"] = provenance.refuse_leak(facts, tested, "val_test", args.allow_seen)
        plans["test"] = plan_test(table, splits, args.seeds)
    if args.protocol != "test":
        trained, known = provenance.refuse_leak(facts, source.take(table.rows), "the labels", allow=True)
        keep = ~np.isin(table.patients, trained) | args.allow_seen
        exposures["cv"] = provenance.Exposure(sorted(set(trained) & set(table.patients[keep].tolist())), known)
        if folds := fits.plan_cv(table.labels[keep], table.groups[keep], len(table.classes), REPEATS):
            plans["cv"] = keep, folds
        else:
            few = f"{len(set(table.groups[keep]))} {table.unit}"
            notes = [f"no cross-validation: too few of the {few} that may be judged"]
    if not plans:
        raise ValueError(f"{notes[0]}; --allow-seen judges those of the pretraining too")
    return plans, exposures, notes


# ----- the program


def millimetres(text):
    """argparse type: 32,48,64"""
    try:
        return tuple(above_zero(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: sides of the crops in mm, above 0, like 32,48,64") from None


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, type=Path, help="weights that model.load_backbone reads")
    parser.add_argument("--data", required=True, type=Path, help="processed CT folder, or folder of photographs")
    parser.add_argument("--labels", required=True, type=Path, help="label table; also looked for inside --data")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json, predictions.csv, report.html")
    parser.add_argument("--protocol", choices=("all", "test", "cv"), default="all", help="test: fit on train, score "
                        "once on val_test; cv: 5 x 5 folds over unseen patients")  # fmt: skip
    parser.add_argument("--allow-seen", action="store_true", help="also judge patients of the pretraining, titled so")
    parser.add_argument("--allow-duplicates", action="store_true", help="also if some cross the splits, titled so")
    parser.add_argument("--crop-mm", type=millimetres, default="32,48,64", help="sides of the crops around a nodule")
    parser.add_argument("--scales", choices=("average", "concat"), default="average", help="of the crops' features")
    parser.add_argument("--features", choices=("cls", "mean", "box", "all"), default="all", help="cls token, mean of "
                        "patches, patches inside the nodule's box, or all side by side")  # fmt: skip
    parser.add_argument("--size", type=natural, default=0, help="pixels per side of a view; 0: that of the checkpoint")
    parser.add_argument("--seeds", type=positive, default=3, help="repeats of the test protocol; random backbones")
    parser.add_argument("--bootstrap", type=positive, default=2000, help="resamples of patients for each interval")
    parser.add_argument("--batch-size", type=positive, default=96, help="views per forward; on a CPU at most 32")
    parser.add_argument("--workers", type=positive, default=2, help="threads that read and cut ahead")
    broken.add_flag(parser)
    parser.add_argument("--cache", type=Path, help="folder of extracted features; default: features beside --out")
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    return parser


def gather(args, vit, weights_sha256, source, table, framing, device):
    """{predictor: (classifier, [X per repeat])}; extracts what the cache lacks."""
    cache, images = args.cache or args.out.parent / "features", images_sha256(source, table, framing)

    def features_of(net, name, weights):
        todo = functools.partial(extract, net, source, table, framing, device, name)
        features, pixels = cached(cache, weights, images, todo)
        if bad := np.flatnonzero(~np.isfinite(features).all((1, 2, 3))).tolist():
            first = shown(table.ids[bad[0]])
            raise ValueError(f"{name}: features of {len(bad)} samples are NaN, first {first}; broken weights?")
        return features, pixels

    features, pixels = features_of(vit, "probe", weights_sha256)
    parts = {"cls": [0], "mean": [1], "box": [2], "all": list(range(features.shape[2]))}[args.features]
    untrained = []
    for seed in range(args.seeds):
        name = f"random {json.dumps(vit.arch)} {seed}"
        untrained.append(features_of(*judge.random_backbones(vit.arch, seed), f"random {seed}", name)[0])
    X, *others = (fits.flatten(f, args.scales, parts) for f in (features, *untrained))
    return fits.predictors(X, others, pixels.reshape(len(pixels), -1).astype(np.float64), table.sizes)


def judge_one(name, plan, table, predictors, exposure, source, args):
    """Fits, judges and draws one protocol -> (for results.json, its part of the page, the predictions of the probe)."""
    keep, folds = plan
    part, tested = table.take(keep), folds[0][1].any(0)
    predictors = {n: (classifier, [X[keep] for X in Xs]) for n, (classifier, Xs) in predictors.items()}
    bar = progress(folds, f"fit {name}", unit="repeat")
    predictions, settings = fits.held_out(predictors, part.labels, part.groups, bar)
    judged, probe = part.take(tested), predictions["probe"]
    predictions = {n: p[:, tested] for n, p in predictions.items()}
    judge.refuse_constant(predictions["probe"])
    mm = judged.sizes[:, 0] if judged.sizes is not None and len(table.classes) == 2 else None
    number = np.stack([test.argmax(0) for _, test in folds])[:, tested]  # [R, n] fold of each sample
    result = judge.judge(judged.labels, judged.groups, predictions, number, mm, args.bootstrap)
    looks = source.earlier_looks if name == "test" else 0
    caveats = judge.caveats(exposure.groups, result["patients"], exposure.known, source.crossing, looks, table.unit)
    title = judge.titled(TITLES[name].format(table.unit), caveats)
    result |= {"unit": table.unit, "title": title, "caveats": caveats, "balance": judge.balance(judged)}
    result |= {"settings": settings, "seen_in_pretraining": exposure.groups}
    result["verdict"] = judge.verdict(result)
    if name == "test":
        some = {n: predictors[n] for n in ("probe", "random weights", "raw pixels", "size") if n in predictors}
        result["label_efficiency"] = judge.label_efficiency(some, part.labels, part.groups, ~tested, args.seeds)
    judge.show(result)
    return result, judge.section(result, judged.labels, table.classes, predictions, mm), probe


def main(argv=None):
    args = build_parser().parse_args(argv)
    start = time.perf_counter()
    if args.out.exists() and not args.out.is_dir():  # now, not after all is computed
        raise ValueError(f"--out {args.out} is a file; name a folder")

    # ----------------------------------------------------------------- labels, splits, leaks
    before = provenance.stamp(args.ckpt)
    source, facts = data.open_source(args.data), read_facts(args.ckpt)
    if foreign := other_encoding(facts, source.encoding):
        print(foreign)
    path = data.find_table(args.data, args.labels)
    table = leave_out(read_table(path, source), source, args.skip_bad)
    samples = f"{len(table.ids)} samples of {len(set(table.groups))} {table.unit}"
    print(f"{path}: {samples}, by class {shown(judge.balance(table), 400)}")
    splits = split_of(source, table, args.protocol)
    plans, exposures, notes = plan_all(source, table, splits, facts, args)
    split_sha = data.file_sha256(data.split_path(source.root)) if splits[0] else None
    notes += [foreign] if foreign else []
    if "split_sha256" in facts and facts["split_sha256"] != split_sha:
        notes.append(f"the weights were trained under another split, or none: {table.unit} are compared one by one")

    # ----------------------------------------------------------------- features, fits, judgement
    vit = load_backbone(args.ckpt)
    view = judge.choose_view(facts, source.encoding, args.size, vit.patch_size)
    if args.features == "box" and table.centres is None:
        raise ValueError("--features box needs a nodule table, which names boxes")
    framing = Framing(view, args.crop_mm if table.centres is not None else (), args.batch_size, args.workers)
    device = pick_device(args.device)
    used = np.any([keep for keep, _ in plans.values()], 0)
    look = judge.used_by("train_probe.py", args.ckpt, path, f"frozen probe, --protocol {args.protocol}")
    provenance.refuse_change(args.ckpt, before)
    chosen, part = open_samples(source, table.take(used), splits[used], look, args.allow_duplicates)
    with broken.named(chosen.take(part.rows)):
        predictors = gather(args, vit, look["weights_sha256"], chosen, part, framing, device)
    outcomes = {
        name: judge_one(name, (keep[used], folds), part, predictors, exposures[name], chosen, args)
        for name, (keep, folds) in plans.items()
    }

    # ----------------------------------------------------------------- results.json, predictions.csv, report.html
    results = {name: result for name, (result, _, _) in outcomes.items()}
    summary = {
        "version": 1,
        "verdict": " ".join(f"{result['title']}. {result['verdict']}" for result in results.values()),
        **results,
        "notes": notes,
        "weights": {"file": args.ckpt.name, "sha256": look["weights_sha256"], "arch": vit.arch}
        | {key: facts.get(key) for key in ("step", "images", "encoding", "split_sha256")},
        "split_sha256": split_sha,
        "labels": {"file": path.name, "sha256": look["labels_sha256"], "classes": table.classes},
        "index_sha256": source.index_sha256,
        "recipe": framing._asdict() | {k: getattr(args, k) for k in ("scales", "features", "seeds", "bootstrap")},
        "git_commit": git_commit(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(args.out / "results.json", summary)
    scores = {name: (plans[name][0], probe, plans[name][1]) for name, (_, _, probe) in outcomes.items()}
    write_text(args.out / "predictions.csv", csv_text(judge.prediction_rows(table, splits, scores)))
    keys = ("weights", "labels", "split_sha256", "recipe", "notes")
    facts = [[key, json_text(summary[key])] for key in keys if summary[key]]
    parts = [*(part for _, part, _ in outcomes.values()), page.section("Facts", page.table(["what", "value"], facts))]
    write_text(args.out / "report.html", page.page(f"Probe of {args.ckpt.name} on {path.name}", *parts))
    print("\n".join([*notes, *(str(args.out / n) for n in ("results.json", "predictions.csv", "report.html"))]))
    return 0


if __name__ == "__main__":
    run(main)

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
import hashlib
import json
import math
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
from torch.nn import functional as F

import data
from checkpoint import atomic_write, write_text
from model import load_backbone, read_facts
from tools.lib import broken, fits, judge, page, provenance
from tools.lib.cli import Parser, above_zero, natural, pick_device, positive, run, shown
from tools.lib.files import csv_text, json_text, write_json
from tools.lib.loop import git_commit, other_encoding
from tools.lib.progress import progress
from tools.lib.slices import find_slice, slice_name

REPEATS = 5  # of cross-validation
PIXELS = 16  # side of the raw-pixel baseline
VALUES = 1 << 22  # pixel values that are padded and made float at once: 16 MB, however large the batch
CPU_VIEWS = 32  # per forward on a CPU: 96 of ViT-S take 0.37 GB more and the same 11.3 s of two cores (2026-11)
TITLES = {"test": "Fit on train, scored once on val_test",
          "cv": "Cross-validation, 5 x 5 folds of {}"}  # fmt: skip


class Table(NamedTuple):
    """Labelled samples; patients are the groups of the index (what the backbone saw), groups those of the table."""

    ids: list
    rows: np.ndarray  # [n] of the source
    labels: np.ndarray  # [n] 0..K-1
    classes: list
    groups: np.ndarray
    patients: np.ndarray
    centres: np.ndarray | None  # [n, 2] y, x in pixels
    sizes: np.ndarray | None  # [n, 2] diameter_mm, box_mm
    unit: str = "patients"  # what groups are called; of photographs groups

    def take(self, keep):
        arrays = {name: value[keep] for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        return self._replace(ids=[self.ids[i] for i in np.flatnonzero(keep)], **arrays)


# ----- labels


def in_row(path, k, text):
    """What is wrong with sample k, where a person finds it: the header is row 1."""
    return ValueError(f"{path}, row {k + 2}: {text}")


def find_rows(path, rows, source, nodules):
    """Row of the source for each row of the table; of a whole volume its middle slice. What is missing is listed."""
    indices, missing = [], {}
    for k, row in enumerate(rows):
        z = row["z"].strip() if nodules else "0"
        if not (z.isascii() and z.isdigit() and len(z) < 10):
            raise in_row(path, k, f"z is {shown(z)!r}, expected the number of a slice")
        indices.append(find_slice(source, row["path"], z if nodules else None))
        if indices[-1] is None:
            missing.setdefault(f"{row['path']} z {z}" if nodules else row["path"], k)
    if missing:
        names = ", ".join(shown(name) for name in sorted(missing)[:20])
        raise in_row(path, min(missing.values()), f"{len(missing)} images are not in {source.root}, from this row on; "
                     f"make the labels for it: {names}")  # fmt: skip
    return np.array(indices)


def refuse_doubled(path, names):
    """names: of the samples, equal for what is one sample."""
    first = {}
    for k, name in enumerate(names):
        if name in first:
            raise in_row(path, k, f"{shown(name)} stands in row {first[name] + 2} already; keep one row for each")
        first[name] = k


def to_number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_places(path, rows, source, index):
    """Of nodules: centres [n, 2] in pixels, (diameter_mm, box_mm) [n, 2]."""
    if source.encoding == "photo":
        raise ValueError(f"{path} names nodules in CT, {source.root} holds photographs; give path,label[,group]")
    names = ("y", "x", "diameter_mm", "box_mm")
    places = np.array([[to_number(row[name]) for name in names] for row in rows])
    size = np.stack([source.rows.columns[name][index] for name in ("rows", "cols")], 1)  # pixels
    side_mm = (size * np.stack([source.rows.columns[f"spacing_{a}"][index] for a in "yx"], 1)).max(1, keepdims=True)
    right = {
        "must be numbers": np.isfinite(places),
        "must lie inside its image": (places[:, :2] >= 0) & (places[:, :2] < size),
        "must be above 0 mm and no larger than its image": (places[:, 2:] > 0) & (places[:, 2:] <= side_mm),
    }
    for (words, good), some in zip(right.items(), (names, names[:2], names[2:])):
        if not good.all():
            k = int((~good).any(1).argmax())
            values = ", ".join(f"{name} {shown(rows[k][name])}" for name in some)
            raise in_row(path, k, f"{values} of {shown(rows[k]['id'])} {words}; correct the row, or leave it out")
    refuse_doubled(path, [f"a nodule at slice {i}, y {y}, x {x}" for i, (y, x) in zip(index, places[:, :2].tolist())])
    return places[:, :2], places[:, 2:]


def order_classes(labels):
    numbers = all(name.replace(".", "", 1).isdecimal() for name in labels)
    return sorted(set(labels), key=float if numbers else str)


def read_table(path, source):
    """-> Table; refuses unknown columns, unknown images, one class, doubled rows, a group other than the index's."""
    if not path.exists():
        how = (
            "write path,label" if source.encoding == "photo" else "tools/lidc_nodules.py writes _labels/malignancy.csv"
        )
        raise FileNotFoundError(f"--labels {path} does not exist; {how}")
    rows, nodules = data.read_labels(path, source.root)
    labels = [row["label"].strip() for row in rows]
    classes = order_classes(labels)
    if len(classes) < 2:
        raise ValueError(f"{path}: all {len(rows)} labels are {shown(classes)}; a probe needs two classes")
    ids = [row["id" if nodules else "path"] for row in rows]
    refuse_doubled(path, ids)
    index = find_rows(path, rows, source, nodules)
    patients = source.rows.column("group")[index]
    groups = np.array([row.get("group") or patient for row, patient in zip(rows, patients)])
    pairs = {}
    for k, (patient, group) in enumerate(zip(patients.tolist(), groups.tolist())):
        if pairs.setdefault(patient, group) != group or nodules and patient != group:
            raise in_row(path, k, f"the group of {patient} is {shown(group)}, another than in the index or in the rows "
                         f"above; each of the {'patients' if nodules else 'images'} has one group")  # fmt: skip
    centres, sizes = read_places(path, rows, source, index) if nodules else (None, None)
    codes = {name: k for k, name in enumerate(classes)}
    unit, codes_of = "groups" if source.encoding == "photo" else "patients", np.array([codes[name] for name in labels])
    return Table(ids, index, codes_of, classes, groups, patients, centres, sizes, unit)


def leave_out(table, source, skip_bad):
    """The table without samples whose file cannot be read."""
    if not skip_bad:
        return table
    good = broken.leave_out(source.take(table.rows), skip_bad)
    return table.take(np.isin(source.rows.columns["path"][table.rows], good.rows.columns["path"]))


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


# ----- features: extracted once, cached under the hash of (weights, images, framing)


class Framing(NamedTuple):
    """How samples become views."""

    view: dict  # data.eval_view
    crop_mm: tuple  # () for whole images
    batch: int
    workers: int


def read_sample(source, table, k, framing, grid):
    """-> pixels around the crops [3, h, w], crops in them [S, 4], share of each patch in the nodule's box [S, N]."""
    i, size = int(table.rows[k]), framing.view["size"]
    if table.centres is None:
        return *data.read_view(source, i, None, size), np.zeros((1, grid**2), np.float32)
    spacing = np.array([source.rows.columns[f"spacing_{axis}"][i] for axis in "yx"])
    half = np.array(framing.crop_mm)[:, None] / 2 / spacing
    centre = table.centres[k]
    corners = np.concatenate([centre - half, centre + half], 1)
    boxes = data.eval_boxes([source.size(i)] * len(half), corners)  # [S, 4]
    cell = (boxes[:, 2:] - boxes[:, :2]) / grid
    at = boxes[:, None, :2] + (np.arange(grid) + 0.5)[:, None] * cell[:, None]  # [S, grid, 2]
    reach = np.maximum(table.sizes[k, 1] / 2 / spacing, cell / 2 + 1e-6)  # at least the patch that holds the centre
    near = np.abs(at - centre) <= reach[:, None]
    inside = (near[:, :, None, 0] & near[:, None, :, 1]).reshape(len(half), -1).astype(np.float32)
    return *data.read_view(source, i, boxes, size), inside / inside.sum(1, keepdims=True)


def render(images, boxes, view, device):
    """Pixels of b samples and their boxes [S, 4] -> views [b, S, 3, side, side]."""
    images, boxes = data.pad_to_one_size(images).to(device), np.stack(boxes, 1)  # [S, b, 4]
    return torch.stack([data.render_eval(images, view, at) for at in boxes], 1)


def make_views(source, table, members, framing, grid, device):
    """Views [b * S, 3, side, side] and patch weights [b * S, N] of some samples.

    Few enough at once are padded and rendered that memory depends on VALUES, not on the size of the pictures.
    """
    views, weights, images, boxes = [], [], [], []
    for k in members:
        pixels, crops, inside = read_sample(source, table, k, framing, grid)
        if images and (len(images) + 1) * max(p.numel() for p in (pixels, *images)) > VALUES:
            views.append(render(images, boxes, framing.view, device))
            images, boxes = [], []
        images.append(pixels)
        boxes.append(crops)
        weights.append(inside)
    views.append(render(images, boxes, framing.view, device))
    return torch.cat(views).flatten(0, 1), torch.from_numpy(np.concatenate(weights)).to(device)


def ahead(function, items, workers):
    """function(item) in order, computed by threads while the caller works."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.inference_mode()
def extract(vit, source, table, framing, device, name):
    """-> features [n, S, P, D] float32 and raw pixels [n, S, 3 * 16 * 16], with a bar of samples."""
    vit, grid = vit.to(device), framing.view["size"] // vit.patch_size
    scales = max(len(framing.crop_mm), 1) if table.centres is not None else 1
    batch = framing.batch if torch.device(device).type == "cuda" else min(framing.batch, CPU_VIEWS)
    step = max(1, batch // scales)
    batches = [range(k, min(k + step, len(table.rows))) for k in range(0, len(table.rows), step)]
    features, pixels = [], []
    with progress(total=len(table.rows), desc=name, unit="sample") as bar:
        todo = functools.partial(make_views, source, table, framing=framing, grid=grid, device=device)
        for views, inside in ahead(todo, batches, framing.workers):
            tokens = vit(views)
            pooled = [tokens.cls, tokens.patches.mean(1)]
            pooled += [torch.einsum("bn,bnd->bd", inside, tokens.patches)] if table.centres is not None else []
            features.append(torch.stack(pooled, 1).unflatten(0, (-1, scales)).cpu().numpy())
            pixels.append(F.adaptive_avg_pool2d(views, PIXELS).flatten(1).unflatten(0, (-1, scales)).cpu().numpy())
            bar.update(len(views) // scales)
    return np.concatenate(features), np.concatenate(pixels)


def images_sha256(source, table, framing):
    """Of all that decides the views: index, slices, files by size and time of change, places, framing."""
    files = [source.path(int(i)) for i in table.rows]
    stats = {path: path.stat() for path in set(files)}
    facts = [source.index_sha256, framing.view, framing.crop_mm, source.encoding]
    facts += [[slice_name(source, int(i)), stats[f].st_size, stats[f].st_mtime_ns]
              for i, f in zip(table.rows, files)]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts).encode())
    for array in (table.centres, table.sizes):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cached(folder, weights, images, make):
    """(features, pixels) from folder/<hash>.npz, or made and kept there."""
    path = folder / f"{hashlib.sha256(f'{weights} {images} 2'.encode()).hexdigest()[:32]}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                return file["features"], file["pixels"]
        except (*data.BROKEN, zipfile.BadZipFile):
            print(f"{path} is damaged: extracted again")
    features, pixels = make()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda f: np.savez(f, features=features, pixels=pixels))
    return features, pixels


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

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

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from checkpoint import atomic_write, write_text
from model import build_vit, load_backbone, read_facts
from tools.lib import metrics, page
from tools.lib.cli import Parser, pick_device, positive, run
from tools.lib.files import csv_text
from tools.lib.loop import git_commit

FOLDS, REPEATS, INNER = 5, 5, 3  # INNER: folds of training patients that choose C or k
FRACTIONS = (0.1, 0.2, 0.5, 1.0)  # of the label-efficiency curve
CS = 10.0 ** np.arange(-5, 1)  # of |w|^2 / 2 + C * sum of losses, features standardised; 10 would double the time
KS = np.array([1, 3, 5, 10, 20, 50])
PIXELS = 16  # side of the raw-pixel baseline
SEEN = "backbone has seen these patients"
TITLES = {"test": "Fit on train, scored once on val_test",
          "cv": "Cross-validation, 5 x 5 folds of patients"}  # fmt: skip


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

    def take(self, keep):
        arrays = {name: value[keep] for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        return self._replace(ids=[self.ids[i] for i in np.flatnonzero(keep)], **arrays)


# ----- labels


def find_rows(path, rows, source, nodules):
    """Row of the source for each row of the table; of a whole volume its middle slice. What is missing is listed."""
    paths, index = source.rows.column("path"), {}
    zs = source.rows.column("z").tolist() if source.encoding == "hu16-v1" else [0] * len(paths)
    for i, (name, z) in enumerate(zip(paths.tolist(), zs)):
        index.setdefault(name.decode(), {})[str(z)] = i
    found, missing = [], []
    for row in rows:
        at = index.get(row["path"])
        z = row["z"] if nodules and source.encoding == "hu16-v1" else None
        if at is None or z is not None and z not in at:
            missing.append(row["path"] if z is None else f"{row['path']} z {z}")
        else:
            found.append(at[z] if z is not None else list(at.values())[len(at) // 2])
    if missing:
        names, count = ", ".join(sorted(set(missing))[:20]), len(set(missing))
        raise ValueError(f"{path}: {count} images are not in {source.root}, make the labels for it: {names}")
    return np.array(found)


def read_places(path, rows, source, index):
    """Of nodules: centres [n, 2] in pixels, (diameter_mm, box_mm) [n, 2]."""
    if source.encoding == "photo":
        raise ValueError(
            f"{path} is a table of nodules in CT, {source.root} holds photographs; give path,label[,group]"
        )
    try:
        found = np.array([[float(row[k]) for k in ("y", "x", "diameter_mm", "box_mm")] for row in rows])
    except ValueError as error:
        raise ValueError(f"{path}: y, x, diameter_mm and box_mm must be numbers ({error}); write it anew") from None
    shape = np.stack([source.rows.columns[k][index] for k in ("rows", "cols")], 1)
    inside = ((found[:, :2] >= 0) & (found[:, :2] < shape)).all(1)
    bad = ~(np.isfinite(found).all(1) & (found[:, 2:] > 0).all(1) & inside)
    if bad.any():
        raise ValueError(f"{path}: {rows[bad.argmax()]['id']} lies outside its image or has no size above 0 mm")
    return found[:, :2], found[:, 2:]


def order_classes(labels):
    numbers = all(name.replace(".", "", 1).isdecimal() for name in labels)
    return sorted(set(labels), key=float if numbers else str)


def read_table(path, source):
    """-> Table; refuses unknown columns, unknown images, one class, doubled ids and a group that is not the index's."""
    if not path.exists():
        raise FileNotFoundError(f"--labels {path} does not exist; tools/lidc_nodules.py writes _labels/malignancy.csv")
    rows, nodules = data.read_labels(path)
    labels = [row["label"].strip() for row in rows]
    classes = order_classes(labels)
    if len(classes) < 2:
        raise ValueError(f"{path}: all {len(rows)} labels are {classes}; a probe needs two classes")
    ids = [row["id" if nodules else "path"] for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: {len(ids) - len(set(ids))} ids appear twice; keep one row for each")
    index = find_rows(path, rows, source, nodules)
    patients = source.rows.column("group")[index]
    groups = np.array([row.get("group") or patient for row, patient in zip(rows, patients)])
    pairs = dict(zip(patients.tolist(), groups.tolist()))
    if straying := [p for p, g in zip(patients.tolist(), groups.tolist()) if pairs[p] != g or nodules and p != g]:
        raise ValueError(f"{path}: the group of {straying[0]} is another than in the index; a patient has one group")
    centres, sizes = read_places(path, rows, source, index) if nodules else (None, None)
    codes = {name: k for k, name in enumerate(classes)}
    return Table(ids, index, np.array([codes[name] for name in labels]), classes, groups, patients, centres, sizes)


def split_file(source):
    return source.root / "_splits" / "splits.json"


def split_of(source, table, protocol):
    """Split of each sample by splits.json (checked against the index); cross-validation alone can do without."""
    if protocol == "cv" and not split_file(source).exists():
        return np.full(len(table.ids), "none")
    data.take_split(source, "train")
    contract = json.loads(split_file(source).read_text())["groups"]
    splits = np.array([contract[patient] for patient in table.patients])
    for group in np.unique(table.groups):
        if len(set(splits[table.groups == group])) > 1:
            raise ValueError(f"group {group} of the labels lies in several splits; run tools/make_splits.py --labels")
    return splits


# ----- features: extracted once, cached under the hash of (weights, images, recipe)


class Recipe(NamedTuple):
    """How samples become views."""

    view: dict  # data.eval_view
    crop_mm: tuple  # () for whole images
    batch: int
    workers: int


def read_sample(source, table, k, crop_mm, grid):
    """-> pixels around the crops [3, h, w], crops in them [S, 4], share of each patch in the nodule's box [S, N]."""
    i = int(table.rows[k])
    image = source.read(i)
    shape = image.shape[1:]
    if table.centres is None:
        body = source.body(i)
        return image, data.eval_boxes([shape], body and [body]), np.zeros((1, grid**2), np.float32)
    spacing = np.array([source.rows.columns[f"spacing_{axis}"][i] for axis in "yx"])
    half = np.array(crop_mm)[:, None] / 2 / spacing
    centre = table.centres[k]
    boxes = data.eval_boxes([shape] * len(half), np.concatenate([centre - half, centre + half], 1))  # [S, 4]
    cell = (boxes[:, 2:] - boxes[:, :2]) / grid
    at = boxes[:, None, :2] + (np.arange(grid) + 0.5)[:, None] * cell[:, None]  # [S, grid, 2]
    reach = np.maximum(table.sizes[k, 1] / 2 / spacing, cell / 2 + 1e-6)  # at least the patch that holds the centre
    near = np.abs(at - centre) <= reach[:, None]
    inside = (near[:, :, None, 0] & near[:, None, :, 1]).reshape(len(half), -1).astype(np.float32)
    low, high = np.floor(boxes[:, :2].min(0)).astype(int), np.ceil(boxes[:, 2:].max(0)).astype(int)
    return image[:, low[0] : high[0], low[1] : high[1]], boxes - np.tile(low, 2), inside / inside.sum(1, keepdims=True)


def make_views(source, table, members, recipe, grid, device):
    """Views [b * S, 3, side, side] and patch weights [b * S, N] of some samples."""
    images, boxes, inside = zip(*(read_sample(source, table, k, recipe.crop_mm, grid) for k in members))
    images, boxes = data.pad_to_one_size(images).to(device), np.stack(boxes, 1)  # [S, b, 4]
    views = torch.stack([data.render_eval(images, recipe.view, at) for at in boxes], 1)
    return views.flatten(0, 1), torch.from_numpy(np.concatenate(inside)).to(device)


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
def extract(vit, source, table, recipe, device, name):
    """-> features [n, S, P, D] float32 and raw pixels [n, S, 3 * 16 * 16], with a bar of samples."""
    vit, grid = vit.to(device), recipe.view["size"] // vit.patch_size
    scales = max(len(recipe.crop_mm), 1) if table.centres is not None else 1
    step = max(1, recipe.batch // scales)
    batches = [range(k, min(k + step, len(table.rows))) for k in range(0, len(table.rows), step)]
    features, pixels = [], []
    with tqdm(total=len(table.rows), desc=name, unit="sample", disable=None) as bar:
        todo = functools.partial(make_views, source, table, recipe=recipe, grid=grid, device=device)
        for views, inside in ahead(todo, batches, recipe.workers):
            tokens = vit(views)
            parts = [tokens.cls, tokens.patches.mean(1)]
            parts += [torch.einsum("bn,bnd->bd", inside, tokens.patches)] if table.centres is not None else []
            features.append(torch.stack(parts, 1).unflatten(0, (-1, scales)).cpu().numpy())
            pixels.append(F.adaptive_avg_pool2d(views, PIXELS).flatten(1).unflatten(0, (-1, scales)).cpu().numpy())
            bar.update(len(views) // scales)
    return np.concatenate(features), np.concatenate(pixels)


def images_sha256(source, table, recipe):
    """Of all that decides the views: index, files by size and time of change, places, recipe."""
    files = [source.path(int(i)) for i in table.rows]
    stats = {path: path.stat() for path in set(files)}
    facts = [source.index_sha256, recipe.view, recipe.crop_mm, source.encoding]
    facts += [[str(f.relative_to(source.root)), stats[f].st_size, stats[f].st_mtime_ns] for f in files]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for array in (table.rows, table.centres, table.sizes):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cached(folder, weights, images, make):
    """(features, pixels) from folder/<hash>.npz, or made and kept there."""
    path = folder / f"{hashlib.sha256(f'{weights} {images} 1'.encode()).hexdigest()[:32]}.npz"
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


def random_backbone(arch, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_vit(arch["name"], **arch["overrides"]).eval()


def flatten(features, scales, parts):
    """[n, S, P, D] -> [n, d] float64: scales averaged or side by side, chosen parts side by side."""
    chosen = features[:, :, parts].astype(np.float64)
    return (chosen.mean(1) if scales == "average" else chosen).reshape(len(features), -1)


# ----- folds


def group_folds(labels, groups, folds, seed):
    """Fold of each sample [n]: whole groups, classes spread evenly, large groups first."""
    names, member = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), labels.max() + 1))
    np.add.at(counts, (member, labels), 1)
    carriers = (counts > 0).sum(0)
    if (fewest := carriers[np.unique(labels)].min()) < 2 or folds < 2:
        raise ValueError(f"a class has {fewest:.0f} patient: cross-validation needs at least 2 of each class")
    order = np.random.default_rng((seed, len(labels))).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    load, fold = np.zeros((folds, counts.shape[1])), np.zeros(len(names), int)
    share = counts / np.maximum(counts.sum(0), 1)
    for g in order:
        fold[g] = np.lexsort((load.sum(1), load @ share[g]))[0]
        load[fold[g]] += share[g]
    return fold[member]


def fold_count(labels, groups, most=FOLDS):
    """As many as the rarest class has patients, at most `most`."""
    return min(most, *(len(np.unique(groups[labels == k])) for k in np.unique(labels)))


# ----- classifiers: many fits at once  <- change the head here


def decompose(Xs, masks):
    """Standardise by each mask's rows and rotate to the axes of their span: Z [B, n, r], variances s2 [B, r].

    Xs: one [n, d] per mask. Exact for ridge-penalised fits, whose solution lies in the span of the training rows.
    """
    pieces = []
    for X, mask in zip(Xs, masks):
        deviation, mean = torch.std_mean(X[mask], 0, correction=0)
        scaled = (X - mean) / torch.where(deviation > 1e-9 * (1 + mean.abs()), deviation, torch.inf)
        train = scaled[mask]
        if X.shape[1] <= len(train):
            s2, axes = torch.linalg.eigh(train.T @ train)
            Z = scaled @ axes
        else:
            s2, axes = torch.linalg.eigh(train @ train.T)
            Z = scaled @ (train.T @ (axes / s2.clamp(min=1e-300).sqrt()))
        keep = s2 > 1e-9 * s2.max().clamp(min=1e-9)
        pieces.append((Z[:, keep], s2[keep]))
    width = max(len(s2) for _, s2 in pieces)
    padded = [[F.pad(part, (0, width - len(s2))) for part in (Z, s2)] for Z, s2 in pieces]
    return tuple(torch.stack(parts) for parts in zip(*padded))


@torch.no_grad()
def logistic(Z, s2, masks, labels, classes, iterations=300):
    """Log-probabilities [C, B, n, K] for every C, by one L-BFGS over all fits, scaled so that Hessians are near 1.

    Minimises mean log loss over the mask's rows + |w|^2 / (2 C rows); the bias is free.
    """
    count, outputs = masks.sum(1), 1 if classes == 2 else classes
    weight = (masks / count[:, None])[:, :, None, None]
    ridge = 1 / (torch.as_tensor(CS) * count[:, None])[:, None, :, None]  # [B, 1, C, 1]
    scale = ((s2 / count[:, None] / 4)[:, :, None, None] + ridge).rsqrt()  # [B, r, C, 1]
    v, bias = Z.new_zeros(*scale.shape[:3], outputs), Z.new_zeros(len(Z), 1, len(CS), outputs)
    truth = F.one_hot(labels, classes).to(Z)[:, None]  # [n, 1, K]

    def log_probabilities():
        logits = (Z @ (v * scale).flatten(2)).unflatten(2, v.shape[2:]) + 2 * bias  # [B, n, C, outputs]
        return (F.pad(logits, (1, 0)) if outputs == 1 else logits).log_softmax(-1)

    def closure():
        log_p, w = log_probabilities(), v * scale
        residual = ((log_p.exp() - truth) * weight)[..., -outputs:]
        v.grad = ((Z.mT @ residual.flatten(2)).view_as(w) + ridge * w) * scale  # by hand: half the time of autograd
        bias.grad = 2 * residual.sum(1, keepdim=True)
        return (ridge * w.square()).sum() / 2 - (log_p * truth * weight).sum()

    # gradients of 1e-6 leave probabilities within 1e-5 of the exact ones (C = 1: 1e-4), after 70 iterations, not 190
    optimizer = torch.optim.LBFGS([v, bias], 1, iterations, None, 1e-6, 1e-14, 20, "strong_wolfe")
    optimizer.step(closure)
    return log_probabilities().permute(2, 0, 1, 3)


def nearest(Z, s2, masks, labels, classes):
    """Log-probabilities [k, B, n, K] per k: cosine neighbours among the mask's rows vote, and so does their prior."""
    unit = F.normalize(Z, dim=2)
    most, truth = int(min(KS[-1], masks.sum(1).min())), F.one_hot(labels, classes).to(Z)
    near = [(u @ u[mask].T).topk(most, 1).indices for u, mask in zip(unit, masks)]  # among the mask's rows
    votes = torch.stack([truth[mask][index].cumsum(1) for index, mask in zip(near, masks)])  # [B, n, most, K]
    prior = (masks.to(Z) @ truth / masks.sum(1, keepdim=True))[:, None]
    return torch.stack([((votes[:, :, min(k, most) - 1] + prior) / (min(k, most) + 1)).log() for k in KS.tolist()])


def choose(classifier, X, labels, groups, masks, seed):
    """Fit on each mask's rows with the C or k of the least log loss in patient-grouped inner folds of these rows alone.

    X [n, d], or [B, n, d] for one per mask -> log-probabilities [B, n, K] of all rows, those of the mask's own rows
    from the inner fold that held them out (what a second stage may be fitted on), and the chosen C or k [B].
    """
    owner, held = [], []
    for b, mask in enumerate(masks):
        inner = group_folds(labels[mask], groups[mask], fold_count(labels[mask], groups[mask], INNER), seed)
        for fold in range(inner.max() + 1):
            owner.append(b)
            held.append(np.flatnonzero(mask)[inner == fold])
    fits = np.concatenate([masks, masks[owner]])
    for fit, out in zip(fits[len(masks) :], held):
        fit[out] = False
    X = torch.as_tensor(X).expand(len(masks), -1, -1) if np.ndim(X) == 2 else torch.as_tensor(X)
    fits, order = torch.as_tensor(fits), [*range(len(masks)), *owner]
    rotated = decompose([X[b] for b in order], fits)
    log_p = classifier(*rotated, fits, torch.as_tensor(labels), int(labels.max()) + 1).numpy()
    loss = np.zeros((len(log_p), len(masks)))
    for j, (b, out) in enumerate(zip(owner, held), len(masks)):
        loss[:, b] -= log_p[:, j, out, labels[out]].sum(1)
    best = loss.argmin(0)
    result = log_p[best, np.arange(len(masks))]
    for j, (b, out) in enumerate(zip(owner, held), len(masks)):
        result[b, out] = log_p[best[b], j, out]
    return result, (KS if classifier is nearest else CS)[best].tolist()


# ----- protocols: who is fitted on whom


def leak(name, patients, trained, allow_seen):
    """Sorted patients that the backbone was trained on; an error unless allowed."""
    found = sorted(trained & set(patients.tolist()))
    if found and not allow_seen:
        raise ValueError(
            f"leak: {len(found)} patients of {name} were in the pretraining of --ckpt ({', '.join(found[:5])}); "
            "pretrain on another split, or --allow-seen to measure all the same, every number titled so"
        )
    return found


def plan_test(table, splits, seeds):
    """Fit on train, test on val_test -> rows to keep [n], and per seed one (fit masks [1, n], test masks [1, n])."""
    for name in ("train", "val_test"):
        if absent := set(range(len(table.classes))) - set(table.labels[splits == name].tolist()):
            raise ValueError(
                f"one-class labels: {name} has no sample of class {table.classes[min(absent)]}; make a split that has "
                "(tools/make_splits.py --labels, --ratios), or use --protocol cv"
            )
    keep = np.isin(splits, ("train", "val_test"))
    test = splits[keep][None] == "val_test"
    return keep, [(~test, test)] * seeds


def plan_cv(table, keep):
    """Five draws of up to five stratified folds of whole patients, as plan_test; None where a class has too few."""
    labels, groups, plans = table.labels[keep], table.groups[keep], []
    count = fold_count(labels, groups) if set(labels.tolist()) == set(range(len(table.classes))) else 0
    for r in range(REPEATS if count > 1 else 0):
        folds = group_folds(labels, groups, count, 100 + r)
        tests = np.stack([folds == k for k in range(count)])
        if min(fold_count(labels[~test], groups[~test]) for test in tests) > 1:
            plans.append((~tests, tests))
    return (keep, plans) if len(plans) == REPEATS else None


def ruler(X, labels, fit):
    """Log-probabilities [B, n, K] of one number, at the weakest penalty: there is nothing to choose.

    With several folds it is fitted on all rows, to its advantage: on four of five folds a useless number leans away
    from the fifth (AUC 0.40, 0.33 to 0.46, on 163 nodules whose label had nothing to do with size).
    """
    mask = torch.as_tensor(fit if len(fit) == 1 else np.ones_like(fit[:1]))
    args = mask, torch.as_tensor(labels), int(labels.max()) + 1
    return logistic(*decompose(torch.as_tensor(X)[None], mask), *args)[-1].numpy().repeat(len(fit), 0)


def add_features(found, size, labels, groups, fit, seed):
    """Log-probabilities [B, n, K] of size and features: a second logistic regression on size and the probe's log-odds.

    Those of training rows come from inner folds. Where there the gain over size alone is not above one standard error
    over patients, it is size alone: of 60 labels of size and noise the interval of the gain then misses 0 in 2.
    """
    odds = found["probe"][0][..., 1:] - found["probe"][0][..., :1]
    size = size[None].repeat(len(fit), 0)
    alone, both = (choose(logistic, X, labels, groups, fit, seed)[0] for X in (size, np.concatenate([size, odds], 2)))
    for b, rows in enumerate(map(np.flatnonzero, fit)):
        _, patient = np.unique(groups[rows], return_inverse=True)
        gain = np.bincount(patient, both[b, rows, labels[rows]] - alone[b, rows, labels[rows]])
        if gain.sum() <= gain.std() * len(gain) ** 0.5:
            both[b] = found["size"][0][b]
    return both


def held_out(predictors, labels, groups, plans, bar=""):
    """{name: probabilities [R, n, K]}, NaN where never tested, and {name: every C or k that was chosen}.

    plans: per repeat (fit masks [B, n], test masks [B, n]). predictors: {name: (classifier, [X, ...])}, X of repeat r
    is Xs[r % len]. With "size" there is "size + features" too.
    """
    out, settings = {}, {}
    for r, (fit, test) in enumerate(tqdm(plans, bar, unit="repeat", disable=None if bar else True)):
        found = {}
        for name, (classifier, Xs) in predictors.items():
            X = Xs[r % len(Xs)]
            if classifier is ruler:
                found[name] = ruler(X, labels, fit), []
            else:
                found[name] = choose(classifier, X, labels, groups, fit, r)
        if "size" in found:
            both = add_features(found, predictors["size"][1][0], labels, groups, fit, r)
            found["size + features"] = both, []
        for name, (log_p, best) in found.items():
            p = np.full(log_p.shape[1:], np.nan)
            for one, rows in zip(log_p, test):
                p[rows] = np.exp(one[rows])
            out.setdefault(name, []).append(p)
            settings.setdefault(name, []).extend(best)
    return {name: np.stack(parts) for name, parts in out.items()}, settings


def label_efficiency(predictors, table, train, test, seeds):
    """AUC on the test rows after fitting on a share of the training patients: {name: [[mean, low, high] or None]}.

    Low and high are the extremes over seeds; None where the share has not two patients of each class.
    """
    tenths = [group_folds(table.labels[train], table.groups[train], 10, seed) for seed in range(seeds)]
    curves = {name: [] for name in predictors}
    for share in FRACTIONS:
        plans = []
        for tenth in tenths:
            fit = train.copy()
            fit[train] = tenth < 10 * share
            enough = set(table.labels[fit]) == set(table.labels)
            enough = enough and fold_count(table.labels[fit], table.groups[fit]) > 1
            plans += [(fit[None], test[None])] if enough else []
        found = held_out(predictors, table.labels, table.groups, plans)[0] if len(plans) == seeds else {}
        for name, points in curves.items():
            aucs = [metrics.auc(table.labels[test], metrics.score_of(p[test])) for p in found.get(name, ())]
            points.append([float(np.mean(aucs)), min(aucs), max(aucs)] if aucs else None)
    return {"shares": FRACTIONS, "auc": curves}


# ----- what is written


def show(result):
    """One protocol on the terminal."""
    print(f"\n{result['title']}")
    for name, found in result["predictors"].items():
        print(f"  {name:16} AUC {metrics.in_words(found['auc'])}, spread over repeats {found['auc']['spread']:.4f}")
    print(result["verdict"], flush=True)


def balance(table):
    return {name: int((table.labels == k).sum()) for k, name in enumerate(table.classes)}


def refuse_constant(predictions):
    """A probe that says the same of everybody has learned nothing."""
    for k, p in enumerate(predictions):
        if np.ptp(p, 0).max() < 1e-9:
            raise ValueError(f"the probe's predictions are constant (repeat {k}): features carry nothing; check --ckpt")


SHOWN = {"auc": "AUC", "average_precision": "average precision", "accuracy": "accuracy",
         "sensitivity_at_90": "sensitivity at 90% specificity", "mcc": "MCC", "brier": "Brier",
         "ece": "calibration error"}  # fmt: skip


def draw(result, table, predictions):
    """ROC, precision-recall, reliability, score against diameter; scores are means over the repeats."""
    two = len(table.classes) == 2
    if two:
        names = [name for name in ("probe", "size", "random weights", "size + features") if name in predictions]
        scores = {name: (table.labels, predictions[name].mean(0)[:, 1]) for name in names}
    else:
        mean = predictions["probe"].mean(0)
        scores = {name: (table.labels == k, mean[:, k]) for k, name in enumerate(table.classes)}
    chance = {"chance": ([0, 1], [0, 1])}
    roc = {name: metrics.roc_curve(*pair) for name, pair in scores.items()}
    recall = {name: metrics.precision_recall_curve(*pair) for name, pair in scores.items()}
    weight, said, true = metrics.reliability(table.labels, metrics.score_of(predictions["probe"].mean(0)))
    held = weight > 0
    bins = {"probe, 10 bins": (said[held] / weight[held], true[held] / weight[held]), "perfect": ([0, 1], [0, 1])}
    plots = [
        page.line_plot("ROC", roc | chance, "1 - specificity", "sensitivity"),
        page.line_plot("Precision and recall", recall, "recall", "precision"),
        page.line_plot("Reliability", bins, "said probability", "true share"),
    ]
    if table.sizes is not None and two:
        probe = scores["probe"][1]
        members = {f"class {name}": table.labels == k for k, name in enumerate(table.classes)}
        dots = {name: (table.sizes[mine, 0], probe[mine]) for name, mine in members.items()}
        plots.append(page.line_plot("Score and size", dots, "diameter in mm", "score of the probe", points=True))
    return plots


def report_section(result, table, predictions):
    """One protocol on the page."""
    words = metrics.in_words
    rows = [
        [name, *(words(item[key]) if key in item else "" for key in SHOWN), f"{item['auc']['spread']:.4f}"]
        for name, item in result["predictors"].items()
    ]
    differences = [[name, words(d), d["p"]] for name, d in result["differences"].items()]
    parts = [page.paragraph(result["verdict"], metrics.tone(result))]
    parts.append(
        "Each value with the 95% interval of resampled patients. Of Brier and calibration error less is better; "
        "the latter grows with noise, so that it may lie below the interval of its resamples."
    )
    parts.append(page.table(["predictor", *SHOWN.values(), "spread of AUC over repeats"], rows))
    parts.append(page.table(["difference of AUC", "value", "p"], differences))
    if "matched" in result:
        thirds = [(f"{a['mm'][0]:.1f} to {a['mm'][1]:.1f} mm, {a['samples']} samples", a) for a in result["terciles"]]
        lines = [(f"size-matched pairs ({result['matched']['pairs']})", result["matched"]), *thirds]
        shown = ("probe", "size", "random weights")
        cells = [[name, *(words(a[n]) if n in a else "one class" for n in shown)] for name, a in lines]
        parts.append(page.table(["AUC within", *shown], cells))
    plots = draw(result, table, predictions)
    if curve := result.get("label_efficiency"):
        points = {name: [(share, point[0]) for share, point in zip(curve["shares"], found) if point]
                  for name, found in curve["auc"].items()}  # fmt: skip
        lines = {name: tuple(zip(*found)) for name, found in points.items() if found}
        plots.append(page.line_plot("Label efficiency", lines, "share of training patients", "AUC"))
    return page.section(result["title"], *parts, page.row(*plots))


def to_json(value):
    """Text with null where a number is NaN, which JSON does not know."""
    text = json.dumps(value, default=lambda number: number.item())
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)


def prediction_rows(table, splits, outcomes):
    """Header and rows: one per sample; the probe's score by each repeat of each protocol, and the fold it was in."""
    labels = [table.classes[k] for k in table.labels]
    columns = {"id": table.ids, "patient": table.groups, "split": splits, "label": labels}
    names = {"score": 1} if len(table.classes) == 2 else {f"score_{c}": k for k, c in enumerate(table.classes)}
    for protocol, (keep, predictions, plans) in outcomes.items():
        for r, (p, (_, tests)) in enumerate(zip(predictions, plans)):
            tested, place = tests.any(0), np.flatnonzero(keep)
            for name, values in [*((n, p[:, k]) for n, k in names.items()), ("fold", tests.argmax(0))]:
                column = np.full(len(keep), "", object)
                column[place[tested]] = [f"{v:.6g}" for v in values[tested]]
                columns[f"{name}_{protocol}{r}"] = column
    return [list(columns), *zip(*columns.values())]


# ----- the program


def weights_sha256(path):
    """Of a file, or of all safetensors files of a folder."""
    if path.is_file():
        return data.file_sha256(path)
    return hashlib.sha256("".join(map(data.file_sha256, sorted(path.glob("*.safetensors")))).encode()).hexdigest()


def millimetres(text):
    """argparse type: 32,48,64"""
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: sides of the crops in mm, above 0, like 32,48,64")
    return values


def choose_view(facts, encoding, size, patch):
    """The view of the checkpoint where it was trained on this encoding."""
    trained = facts.get("encoding", encoding)
    if trained != encoding and "photo" not in (trained, encoding):
        raise ValueError(f"--ckpt was trained on {trained}, --data is {encoding}: preprocess with the same --format")
    view = facts.get("eval_view") if trained == encoding else None
    view = dict(view or data.eval_view(encoding))
    view["size"] = size or view["size"]
    if view["size"] % patch:
        raise ValueError(f"--size {view['size']} is not a multiple of the patch size {patch}")
    return view


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, type=Path, help="weights that model.load_backbone reads")
    parser.add_argument("--data", required=True, type=Path, help="processed CT folder, or folder of photographs")
    parser.add_argument("--labels", required=True, type=Path, help="label table; also looked for inside --data")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json, predictions.csv, report.html")
    parser.add_argument("--protocol", choices=("all", "test", "cv"), default="all", help="test: fit on train, score "
                        "once on val_test; cv: 5 x 5 folds over unseen patients")  # fmt: skip
    parser.add_argument("--allow-seen", action="store_true", help="also judge patients of the pretraining, titled so")
    parser.add_argument("--crop-mm", type=millimetres, default="32,48,64", help="sides of the crops around a nodule")
    parser.add_argument("--scales", choices=("average", "concat"), default="average", help="of the crops' features")
    parser.add_argument("--features", choices=("cls", "mean", "box", "all"), default="all", help="cls token, mean of "
                        "patches, patches inside the nodule's box, or all side by side")  # fmt: skip
    parser.add_argument("--size", type=int, default=0, help="pixels per side of a view; 0: that of the checkpoint")
    parser.add_argument("--seeds", type=positive, default=3, help="repeats of the test protocol; random backbones")
    parser.add_argument("--bootstrap", type=positive, default=2000, help="resamples of patients for each interval")
    parser.add_argument("--batch-size", type=positive, default=96, help="views per forward")
    parser.add_argument("--workers", type=positive, default=2, help="threads that read and cut ahead")
    parser.add_argument("--cache", type=Path, help="folder of extracted features; default: features beside --out")
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    return parser


def gather(args, vit, source, table, recipe):
    """{predictor: (classifier, [X per repeat])}; extracts what the cache lacks."""
    cache, images = args.cache or args.out.parent / "features", images_sha256(source, table, recipe)
    device = pick_device(args.device)

    def features_of(net, name, weights):
        todo = functools.partial(extract, net, source, table, recipe, device, name)
        found = cached(cache, weights, images, todo)
        if bad := np.flatnonzero(~np.isfinite(found[0]).all((1, 2, 3))).tolist():
            raise ValueError(
                f"{name}: features of {len(bad)} samples are NaN, first {table.ids[bad[0]]}; broken weights?"
            )
        return found

    if args.features == "box" and table.centres is None:
        raise ValueError("--features box needs a nodule table, which names boxes")
    features, pixels = features_of(vit, "probe", weights_sha256(args.ckpt))
    parts = {"cls": [0], "mean": [1], "box": [2], "all": list(range(features.shape[2]))}[args.features]
    X = flatten(features, args.scales, parts)
    untrained = [
        features_of(random_backbone(vit.arch, seed), f"random {seed}", f"random {json.dumps(vit.arch)} {seed}")[0]
        for seed in range(args.seeds)
    ]
    predictors = {
        "probe": (logistic, [X]),
        "k-NN": (nearest, [X]),
        "random weights": (logistic, [flatten(u, args.scales, parts) for u in untrained]),
        "raw pixels": (logistic, [pixels.reshape(len(pixels), -1).astype(np.float64)]),
    }
    if table.sizes is not None:
        diameter, box = np.log(table.sizes).T[:, :, None]
        rulers = {"size": (diameter + box) / 2, "diameter": diameter, "box": box}
        predictors |= {name: (ruler, [X]) for name, X in rulers.items()}
    return predictors


def plan_all(table, splits, trained, args):
    """{protocol: (rows kept, plans)}, {protocol: its patients that the backbone was trained on}, notes."""
    plans, seen, notes = {}, {}, []
    if args.protocol != "cv":
        seen["test"] = leak("val_test", table.patients[splits == "val_test"], trained, args.allow_seen)
        plans["test"] = plan_test(table, splits, args.seeds)
    if args.protocol != "test":
        keep = ~np.isin(table.patients, sorted(trained)) | args.allow_seen
        seen["cv"] = sorted(trained & set(table.patients[keep].tolist()))
        if found := plan_cv(table, keep):
            plans["cv"] = found
        else:
            notes = [f"no cross-validation: too few of the {len(set(table.groups[keep]))} patients that may be judged"]
    if not plans:
        raise ValueError(f"{notes[0]}; --allow-seen judges those of the pretraining too")
    return plans, seen, notes


def judge_one(name, plan, table, predictors, seen, args):
    """Fits, judges and draws one protocol -> (for results.json, its part of the page, the predictions of the probe)."""
    keep, folds = plan
    part, tested = table.take(keep), folds[0][1].any(0)
    predictors = {n: (classifier, [X[keep] for X in Xs]) for n, (classifier, Xs) in predictors.items()}
    predictions, settings = held_out(predictors, part.labels, part.groups, folds, f"fit {name}")
    shown, probe = part.take(tested), predictions["probe"]
    predictions = {n: p[:, tested] for n, p in predictions.items()}
    refuse_constant(predictions["probe"])
    mm = shown.sizes[:, 0] if shown.sizes is not None and len(table.classes) == 2 else None
    number = np.stack([test.argmax(0) for _, test in folds])[:, tested]  # [R, n] fold of each sample
    judged = metrics.judge(shown.labels, shown.groups, predictions, number, mm, args.bootstrap)
    title = TITLES[name] + (f": {SEEN} ({len(seen)} of {judged['patients']})" if seen else "")
    judged |= {"title": title, "balance": balance(shown), "settings": settings, "seen_in_pretraining": seen}
    judged["verdict"] = metrics.verdict(judged)
    if name == "test":
        some = {n: predictors[n] for n in ("probe", "random weights", "raw pixels", "size") if n in predictors}
        judged["label_efficiency"] = label_efficiency(some, part, ~tested, tested, args.seeds)
    show(judged)
    return judged, report_section(judged, shown, predictions), probe


def main(argv=None):
    args = build_parser().parse_args(argv)
    start = time.perf_counter()

    # ----------------------------------------------------------------- labels, splits, leaks
    source, facts = data.open_source(args.data), read_facts(args.ckpt)
    path = data.find_table(args.data, args.labels)
    table = read_table(path, source)
    print(f"{path}: {len(table.ids)} samples of {len(set(table.groups))} patients, by class {balance(table)}")
    splits = split_of(source, table, args.protocol)
    split_sha = data.file_sha256(split_file(source)) if split_file(source).exists() else None
    plans, seen, notes = plan_all(table, splits, set(facts.get("trained_groups") or ()), args)
    if not facts:
        notes.append("these weights do not say which patients they were trained on: none counts as seen")
    elif facts.get("split_sha256") != split_sha:
        notes.append("the weights were trained under another split, or none: patients are compared one by one")

    # ----------------------------------------------------------------- features, fits, judgement
    vit = load_backbone(args.ckpt)
    view = choose_view(facts, source.encoding, args.size, vit.patch_size)
    recipe = Recipe(view, args.crop_mm if table.centres is not None else (), args.batch_size, args.workers)
    predictors = gather(args, vit, source, table, recipe)
    found = {name: judge_one(name, plan, table, predictors, seen[name], args) for name, plan in plans.items()}

    # ----------------------------------------------------------------- results.json, predictions.csv, report.html
    results = {name: judged for name, (judged, _, _) in found.items()}
    summary = {
        "version": 1,
        "verdict": " ".join(f"{judged['title']}. {judged['verdict']}" for judged in results.values()),
        **results,
        "notes": notes,
        "weights": {"file": args.ckpt.name, "sha256": weights_sha256(args.ckpt), "arch": vit.arch}
        | {key: facts.get(key) for key in ("step", "images", "encoding", "split_sha256")},
        "split_sha256": split_sha,
        "labels": {"file": path.name, "sha256": data.file_sha256(path), "classes": table.classes},
        "index_sha256": source.index_sha256,
        "recipe": recipe._asdict() | {k: getattr(args, k) for k in ("scales", "features", "seeds", "bootstrap")},
        "git_commit": git_commit(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "results.json", to_json(summary) + "\n")
    outcomes = {name: (plans[name][0], probe, plans[name][1]) for name, (_, _, probe) in found.items()}
    write_text(args.out / "predictions.csv", csv_text(prediction_rows(table, splits, outcomes)))
    said = [[key, to_json(summary[key])] for key in ("weights", "labels", "split_sha256", "recipe", "notes")]
    parts = [*(part for _, part, _ in found.values()), page.section("Facts", page.table(["what", "value"], said))]
    write_text(args.out / "report.html", page.page(f"Probe of {args.ckpt.name} on {path.name}", *parts))
    print("\n".join([*notes, *(str(args.out / n) for n in ("results.json", "predictions.csv", "report.html"))]))
    return 0


if __name__ == "__main__":
    run(main)

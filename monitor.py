"""One look at a run: is it alive, is it learning, has it collapsed, what does it look at? Made for cron.

    0 7 * * * cd /path && python monitor.py --ckpt runs/lidc > look.log 2>&1 || mail -s lidc me < look.log

Exit code 0 healthy or warming up, 1 warning, 2 failing, 3 could not look. Reads the checkpoint, metrics.jsonl and
val_select slices; writes to runs/lidc/monitor/ alone. A second look at the same step takes the place of the first.
Letters: B images, N patches, D features, H heads, K prototypes.
"""

import collections
import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
from torch.nn import functional as F

import checkpoint
import data
import losses
from model import ProjectionHead, SSLModel, Tokens, build_arch
from tools.lib import broken, machine, page, provenance, runs, sheet
from tools.lib.cli import Parser, finite, is_ours, named, natural, pick_device, positive, run, shown, unforeseen
from tools.lib.files import NUMBER, plain, read_json_file, write_json
from tools.lib.fits import neighbours
from tools.lib.limits import AGREES, ONE_HOT, UNIFORM
from tools.lib.loop import lock
from tools.lib.slices import find_slice, slice_name

# worst first among equals; constant features also make targets uniform, so the lost rank is named first
DECAY = "dense features decaying"
WORDS = ("diverging", "rank collapse", "one-hot", "uniform", "disk full", "not saving", "stalled", DECAY, "hot",
         "starved", "warming up", "healthy", "could not look")  # fmt: skip
CHUNK = 8  # images per forward
FINE, MOST = 4, 64  # dense features are drawn at FINE times the resolution of training, on at most MOST x MOST patches


# fmt: off
def build_parser():
    p = Parser(__doc__)
    g = p.add_argument_group("look")
    g.add_argument("--ckpt", required=True, type=Path, help="folder of a run (its last.pth), or any of its checkpoints")
    g.add_argument("--data", help="processed folder; default: the one that the run was given")
    g.add_argument("--out", type=Path, help="folder to write to; default: monitor/ beside the checkpoint")
    g.add_argument("--image", action="append", help="test image: a path of the index, with #z in a volume; repeatable")
    g.add_argument("--images", type=positive, default=4, help="test images drawn by --seed where --image is not given")
    g.add_argument("--seed", type=natural, default=0, help="of the test images; the first look decides for all")
    g.add_argument("--slices", type=positive, help="behind the numbers; default: 192 for ViT-S, 96 for -B, 40 for -L")
    g.add_argument("--labels", type=Path, help="table for k-NN; default: labels.csv or _labels/malignancy.csv if there")
    broken.add_flag(g)
    g.add_argument("--device", default="cpu", help="cpu leaves the card to training; or cuda")
    g.add_argument("--threads", type=positive, default=2, help="CPU threads")
    g.add_argument("--sysfs", type=Path, default=Path("/sys"), help="where the kernel shows its sensors")
    g.add_argument("--prom", type=Path, help="Prometheus text file; default: metrics.prom in the folder")
    g = p.add_argument_group("thresholds of the verdict")
    g.add_argument("--min-std", type=finite, default=0.005, help="embeddings, 1: spread evenly; below: rank collapse")
    g.add_argument("--min-rank", type=finite, default=3, help="centred effective rank of cls; below: rank collapse")
    g.add_argument("--min-entropy", type=finite, default=ONE_HOT, help="of the teacher, share of ln K; below: one-hot")
    g.add_argument("--max-entropy", type=finite, default=UNIFORM, help="above, and the student agrees: uniform")
    g.add_argument("--min-patch-rank", type=finite, default=0.5, help="share of the best look so far; below: decaying")
    g.add_argument("--max-cls-patch", type=finite, default=0.9, help="mean cosine of cls and patches; above: decaying")
    g.add_argument("--max-outliers", type=finite, default=0.05, help="patches of 4x the usual norm; above: decaying")
    g.add_argument("--max-rise", type=finite, default=0.25, help="of DINO + iBOT over their best; above: diverging")
    g.add_argument("--max-skips", type=natural, default=2, help="skipped updates in 20 log intervals; above: diverging")
    g.add_argument("--max-spikes", type=natural, default=3, help="in 20 log lines, of half the loss; above: diverging")
    g.add_argument("--min-saves", type=finite, default=2, help="checkpoints that fit on the disk; below: disk full")
    g.add_argument("--stall-factor", type=finite, default=10, help="stalled: log intervals without a line, and ...")
    g.add_argument("--stall-minutes", type=finite, default=15, help="... at least so many minutes")
    g.add_argument("--max-wait", type=finite, default=0.3, help="share of time that waits for data; above: starved")
    g.add_argument("--max-temp", type=finite, default=95, help="degrees C of the hottest sensor; above: hot")
    g.add_argument("--temp-rise", type=finite, default=5, help="hot: so many degrees C above earlier looks, and ...")
    g.add_argument("--rate-drop", type=finite, default=0.1, help="... images/s lower than theirs by this share")
    return p
# fmt: on


# ------------------------------------------------------------------ reading


def build(state, who, device):
    """The student or the EMA teacher of a checkpoint."""
    args, arch = state["args"], state["arch"]
    with torch.device("meta"):  # no time or memory for weights that are replaced at once
        vit = build_arch(arch)
        shape = (vit.dim, args["head_hidden"], args["head_bottleneck"], args["prototypes"])
        model = SSLModel(vit, ProjectionHead(*shape), ProjectionHead(*shape))
    own, found = model.state_dict(), state[who]
    if odd := own.keys() ^ found.keys() or {name for name, value in own.items() if value.shape != found[name].shape}:
        names = ", ".join(map(shown, sorted(odd)[:3]))
        raise ValueError(f"the {who} of the checkpoint is not of the arch that it names: {names}")
    model.load_state_dict(found, assign=True)
    return model.float().to(device).eval().requires_grad_(False)


def open_slices(state, root, notes):
    """val_select, which the run did not train on; of a run without a split, anything."""
    run_args, given = state["args"], root
    root = Path(given or run_args["data"])
    if not given and not root.is_dir():
        raise FileNotFoundError(f"{shown(root, 400)} is no folder here; the run's flags name it: give --data")
    source = data.open_source(root) if run_args["no_split"] else data.open_for(root, "select", allow_duplicates=True)
    if source.encoding != state["encoding"]:
        raise ValueError(f"--data {root} holds {source.encoding}, the run was trained on {state['encoding']}")
    source.at_distance(state["eval_view"].get("neighbour_mm"))
    if run_args["no_split"]:
        return source
    exposure = provenance.refuse_leak(state, source, "val_select", allow=True)
    if exposure.groups:
        count = f"{exposure.groups[0]} ({len(exposure.groups)} groups in all)"
        raise ValueError(f"leak: {root}: the run trained on {count} of val_select; give --data with the run's split")
    if not exposure.known:
        notes.append("what the weights that the run began with were trained on is unknown: val_select may be among it")
    if source.crossing:
        notes.append(f"{source.crossing} sets of duplicates lie in several splits: numbers on val_select are too good")
    return source


def views(source, ids, view, patch, regions=None):
    """Chunks of (normalised [b, 3, S, S], share of body and lung in each patch [b, 2, rows, columns] or None)."""
    from tqdm import tqdm  # for people: silent where nobody watches

    for start in tqdm(range(0, len(ids), CHUNK), "slices", unit=f" x {CHUNK}", leave=False, disable=None):
        here = slice(start, start + CHUNK)
        images = [source.read(i) for i in ids[here]]
        boxes = data.eval_boxes([i.shape[1:] for i in images], None if regions is None else regions[here])
        images = data.pad_to_one_size(images)
        yield data.render_eval(images, view, boxes), tissue(images, source.encoding, boxes, view["size"] // patch)


def tissue(images, encoding, boxes, grid):
    """Body and lung by thresholds at -950 and -500 HU: [b, 2, grid, grid]; of photographs None."""
    if encoding == "photo":
        return None
    hu = images[:, 1].float() if encoding == "hu16-v1" else images[:, 0] / 255 * 1500 - 1350  # red: lung window, z-1
    masks, nothing = torch.stack([hu > -950, (hu > -950) & (hu < -500)], 1), np.zeros((1, len(images)))
    return data.cut(masks, boxes[None], nothing > 0, nothing, grid)[0].clamp(0, 1)


# ------------------------------------------------------------------ numbers


class Seen(NamedTuple):
    """One pass of a backbone, by the model's own code."""

    tokens: Tokens  # after the final norm
    norms: torch.Tensor  # [B, N] of patches before it
    attention: torch.Tensor  # [B, H, rows, columns] of cls to patches in the last block


@torch.no_grad()
def look_through(vit, images):
    (before, shape, rope), (after, *_) = collections.deque(vit.walk(images), 2)  # around the last block
    block, grid = vit.blocks[-1], [side // vit.patch_size for side in images.shape[2:]]
    attention = block.attn.cls_probabilities(block.norm1(before), shape, rope)[:, :, 1 + vit.registers :]
    raw = vit.to_tokens(after, [shape], norm=False)[0].patches
    return Seen(vit.to_tokens(after, [shape])[0], raw.norm(dim=-1), attention.unflatten(-1, grid))


def of_slices(vit, chunks):
    """What the backbone makes of whole slices: chunks of views() -> {name: one row per slice (patches: 8)}."""
    rows = collections.defaultdict(list)
    for images, inside in chunks:
        seen = look_through(vit, images.to(vit.cls_token.device))
        cls, patches = seen.tokens.cls, seen.tokens.patches
        rows["cls"].append(cls)
        rows["patches"].append(patches[:, :: max(1, patches.shape[1] // 8)].flatten(0, 1))
        rows["cls_patch_cosine"].append(F.cosine_similarity(patches, cls[:, None], -1).mean(1))
        rows["norm_outliers"].append((seen.norms > 4 * seen.norms.median(1, keepdim=True).values).float().mean(1))
        if inside is not None:
            mean, inside = seen.attention.mean(1, keepdim=True), inside.to(cls.device)  # [b, 1 or 2, h, w]
            rows["tissue"].append(torch.cat([(mean * inside).sum((2, 3)) / mean.sum((2, 3)), inside.mean((2, 3))], 1))
    return {key: torch.cat(parts).float().cpu() for key, parts in rows.items()}


@torch.no_grad()
def of_views(student, teacher, crops):
    """What both make of training views, [2b, 3, S, S] each with the series of its b slices; the student of every 4th.

    -> pairs [n, 2, D], series [n], logits [2n, K] of the teacher, and of the student some rows [m, K] with their index.
    """
    rows, count = collections.defaultdict(list), 0
    for k, (images, series) in enumerate(crops):
        images = images.to(teacher.backbone.cls_token.device)
        cls = teacher.backbone(images).cls
        rows["pairs"].append(F.normalize(cls, dim=-1).unflatten(0, (2, -1)).transpose(0, 1))
        rows["series"].append(series)
        rows["logits"].append(teacher.dino_head(cls))
        if k % 4 == 0:
            rows["student"].append(student([images]).cls_logits)
            rows["index"].append(torch.arange(count, count + len(cls)))
        count += len(cls)
    return {key: torch.cat(parts).cpu() for key, parts in rows.items()}


def training_views(source, recipe, patch_size):
    """Always the same two global views of each slice, b slices at a time -> ([2b, 3, S, S], series [b])."""
    recipe, b = dataclasses.replace(recipe, gram_size=0), min(CHUNK, len(source))
    for batch in data.make_loader(source, recipe, 0, range(len(source) // b), b, patch_size=patch_size):
        yield data.render(batch.images, batch.plan).globals, torch.from_numpy(source.series[batch.ids])


def entropy(probs):
    return losses.entropy(probs).mean() / math.log(max(2, probs.shape[1]))  # in ln K


def snapshot(student, teacher, chunks, crops, centering="sinkhorn", temperature=0.07, student_temp=0.1, center=0.0):
    """Numbers that tell collapse from progress -> dict; of features that are not finite only their share.

    chunks: whole slices, for the features. crops: training views, for the targets: slices are so alike that a teacher
    which tells views apart can give them all the same target.
    """
    slices, views_ = of_slices(teacher.backbone, chunks), of_views(student, teacher, crops)
    x, patches, logits = slices["cls"], slices["patches"], views_["logits"].float()
    if wrong := max((~t.isfinite()).float().mean().item() for t in (x, patches, logits)):
        return {"nonfinite": wrong}
    # Sinkhorn on few rows spreads even one-hot logits; centred alone they show what they are
    sharp = F.softmax((logits - logits.mean(0)) / temperature, -1)
    if centering == "sinkhorn":
        targets = losses.sinkhorn(logits, temperature)
    else:
        targets = F.softmax((logits - center) / temperature, -1)
    found = losses.health(targets[views_["index"]], views_["student"], x, student_temp)
    found |= {"teacher_entropy": entropy(targets), "sharp_entropy": entropy(sharp)}
    pairs = losses.retrieval(*views_["pairs"].float().unbind(1), views_["series"])
    found |= {f"retrieval_top{k}": pairs[f"top{k}"] for k in (1, 5)}
    apart = torch.pdist(F.normalize(x, dim=-1)).square()
    found["uniformity"] = apart.mul(-2).exp().mean().log()  # arXiv:2005.10242; 0 when all points are one
    floor = 100 * torch.finfo(x.dtype).eps * patches.norm()  # below is rounding, as in losses.health
    found["patch_rank"] = losses.effective_rank(patches - patches.mean(0), floor)
    found |= {key: slices[key].mean() for key in ("cls_patch_cosine", "norm_outliers")}
    if "tissue" in slices:
        names = "attention_body", "attention_lung", "area_body", "area_lung"
        found |= dict(zip(names, slices["tissue"].mean(0)))
    counts = {"nonfinite": 0.0, "slices": len(x), "view_slices": len(logits) // 2}
    return {key: value.item() for key, value in found.items()} | counts


def knn(cls, labels, groups, k=10):
    """Balanced accuracy of the k nearest of other patients, weighted by exp(cosine / 0.07); chance: 1 / classes."""
    names = sorted(set(labels))  # not np.unique of texts, where each takes the room of the longest
    y = np.array([names.index(label) for label in labels])
    truth = F.one_hot(torch.from_numpy(y), len(names)).to(cls)
    votes = neighbours(cls, cls, truth, [min(k, len(y) - 1)], groups[:, None] == groups, temperature=0.07)[0]
    right = (votes.argmax(1).numpy() == y).astype(float)
    return float(np.mean([right[y == c].mean() for c in range(len(names))]))


def label_numbers(vit, source, path, view, most):
    """k-NN on at most so many slices of a label table; {} where it names fewer than two classes or three patients.

    Tables of nodules give a square of 50 mm around each mark, others the whole image.
    """
    rows, nodules = data.read_labels(path, source.root, unlabelled=True)
    if nodules and source.encoding == "photo":
        raise ValueError(f"{path} is a table of CT nodules, {source.root} holds photographs; give path,label[,group]")
    rows = [row for row in rows if row["label"].strip()]
    volumes = nodules and source.encoding == "hu16-v1"
    texts = [row[key] for row in rows for key in ("y", "x", *("z" * volumes))] if nodules else []
    if odd := [text for text in texts if not NUMBER.fullmatch(text) or abs(float(text)) > 1e6]:
        raise ValueError(f"{path}: z, y or x is {shown(repr(odd[0]))}, expected pixels; write it anew")
    rows = [row | {"slice": find_slice(source, row["path"], float(row["z"]) if volumes else None)} for row in rows]
    rows = [row for row in rows if row["slice"] is not None]
    rows = [rows[k] for k in data.rng(0, "limit").permutation(len(rows))[:most]]  # of tables for other splits: none
    ids, labels = [row["slice"] for row in rows], [row["label"].strip() for row in rows]
    groups, regions = source.rows.columns["group"][ids], None
    if len(set(labels)) < 2 or len(set(groups)) < 3:
        return {}
    if nodules:
        half = 25 / np.stack([source.rows.columns[f"spacing_{axis}"][ids] for axis in "yx"], 1)  # mm -> pixels
        centres = np.array([[float(row["y"]), float(row["x"])] for row in rows])
        regions = np.concatenate([centres - half, centres + half], 1)
    with torch.no_grad():
        chunks = views(source, ids, view, vit.patch_size, regions)
        cls = torch.cat([vit(images.to(vit.cls_token.device)).cls for images, _ in chunks]).cpu()
    return {"knn": knn(cls, labels, groups), "knn_chance": 1 / len(set(labels)), "knn_slices": len(ids)}


# ------------------------------------------------------------------ pictures


def choose_images(source, wanted, count, seed, out):
    """{name: id} of the test images: those of the first look, else --image, else one each of different series."""
    path, of_name = out / "images.json", {slice_name(source, i): i for i in range(len(source))}
    names = wanted or [slice_name(source, i) for i in source.order(seed, 0, min(count, len(source)))]
    names = [re.sub(r":(\d+)$", r"#\1", name) for name in names]
    if path.exists():
        remedy = "remove it, and the test images are chosen anew"
        kept = read_json_file(path, {"images": list}, remedy, version=1)["images"]
        if not kept or not all(isinstance(name, str) for name in kept):
            raise ValueError(f"{path}: images is no list of names; {remedy}")
        kept = [re.sub(r":(\d+)$", r"#\1", name) for name in kept]  # as they were written once
        if wanted and names != kept:
            said = shown(", ".join(kept), 400)
            raise ValueError(f"{path} remembers {said}; leave --image away, or give --out another folder")
        names = kept
    if missing := [name for name in names if name not in of_name]:
        raise ValueError(f"test image {shown(missing[0])} is none of the {len(source)} slices that may be looked at, "
                         f"such as {shown(next(iter(of_name)))}; correct --image, or remove {path}")  # fmt: skip
    return {name: of_name[name] for name in names}


def look_closely(vit, source, i, view):
    """One image -> codes [3, S, S], shares of body and lung [2, S, S], attention [H, h, w], patches [h, w, D]."""
    ((image, inside),) = views(source, [i], view, 1)
    seen = look_through(vit, image.to(vit.cls_token.device))
    attention, patches = (t[0].cpu().numpy() for t in (seen.attention, seen.tokens.patches))
    whole = np.ones((2, *image.shape[2:]))  # of photographs
    if inside is not None:
        whole = sheet.foreground(inside[0].numpy(), source.body(i), data.eval_boxes([source.size(i)])[0])
    return data.denormalise(image[0]).numpy(), whole, attention, patches.reshape(*attention.shape[1:], -1)


def pictures(vit, source, images, view, step, old):
    """Every map of every test image -> (numbers, contents of first.npz, {name: (block, column, codes)} of sheet.maps).

    old: first.npz of the first look, {} at that look; colours are turned towards its own.
    """
    times, looks = max(1, min(FINE, MOST * vit.patch_size // view["size"])), {}
    for t in (times, 1):  # the resolution of training last
        looks[t] = [look_closely(vit, source, i, view | {"size": t * view["size"]}) for i in images.values()]
    patches = {t: np.stack([p for *_, p in some]) for t, some in looks.items()}  # [n, h, w, D]
    unit, grid = F.normalize(torch.from_numpy(patches[1]).flatten(1, 2), dim=-1), patches[times].shape[1:3]
    grams = (unit @ unit.mT).numpy()  # [n, N, N]
    body = np.stack([sheet.pooled(shares[0], grid) > 0.5 for _, shares, *_ in looks[times]])  # [n, h, w]
    body |= not body.any()
    if old and (old["grams"].shape, old["colours"].shape, old["dim"]) != (grams.shape, (*body.shape, 3), vit.dim):
        raise ValueError("first.npz is of another model or image size; give --out another folder")
    basis = sheet.principal(patches[times][body], old["colours"][body] if old else None)
    colours, share = basis.along(patches[times]) * body[..., None], basis.shares.sum()  # [n, h, w, 3]
    first = old or {"colours": np.half(colours), "grams": np.half(grams), "dim": vit.dim, "step": step}
    numbers = {"gram_drift": float(np.sqrt(np.square(grams - first["grams"]).mean()))}
    numbers["colours_kept"] = float((colours * first["colours"]).sum() / (3 * body.sum()))  # a mean correlation
    drawn = {}
    for k, (name, i) in enumerate(images.items()):
        codes, shares, *_ = looks[times][k]
        at = np.array(sheet.marked_patch(codes.mean(0), shares, grid))
        dense = [sheet.dense(looks[t][k][2], patches[t][k], basis, tuple(at * t // times)) for t in looks]
        raw, photo = source.read(i).numpy(), source.encoding == "photo"
        y0, x0, y1, x1 = data.eval_boxes([raw.shape[1:]])[0].astype(int)
        windows = sheet.inputs(raw[:, y0:y1, x0:x1], source.encoding)
        mm, base = (None, codes) if photo else ((x1 - x0) * source.rows[i]["spacing_x"], codes[1])
        drawn[name] = *sheet.maps(f"step {step}: {shown(name)}", windows, base, shares[0], dense, share, mm), base
    return numbers, first, drawn


# ------------------------------------------------------------------ verdict


class Finding(NamedTuple):
    word: str  # of WORDS
    level: int  # 1 warning, 2 failing
    text: str  # the number and the threshold behind it


def throttling(beat, heat, history, rise, drop):
    """One sentence if it has become hotter while images/s fell, against the medians of earlier looks."""
    before = [(machine.hottest(h["sensors"]), h["pulse"].get("images_s")) for h in history]
    before = [pair for pair in before if None not in pair]
    if len(before) < 3 or heat is None or not beat.get("images_s"):
        return None
    usual, rate = np.median(before, 0)
    if heat < usual + rise or beat["images_s"] > (1 - drop) * rate:
        return None
    return (f"throttling? {heat:.0f} C, the median was {usual:.0f} (--temp-rise {rise:g}), while images/s fell from "
            f"{rate:.4g} to {beat['images_s']:.4g} (--rate-drop {drop:g})")  # fmt: skip


def told_apart(value, limit, digits=5):
    """A number with as many digits as show that it is not the limit."""
    texts = [f"{value:.{n}g}" for n in range(digits, 18)]
    return next((text for text in texts if float(text) != limit), texts[0])


def judge(n, beat, heat, history, alike, warming, args):
    """Numbers, pulse, hottest sensor and earlier looks -> findings, worst first. alike: looks with this one's setting.

    Warm-up excuses what must first be learned, not what is broken: NaN, a dead process, a full disk, heat.
    """
    best = max([h["numbers"].get("patch_rank") or 0 for h in alike if not h["warming"]], default=0)
    kept = n["patch_rank"] / best if best and "patch_rank" in n else None
    targets, logged = n.get("teacher_entropy"), beat.get("teacher_entropy")
    agree = n.get("kl", 1) < AGREES or (targets or 0) > 0.99999  # so uniform a teacher counts whatever the student says
    calm = targets if agree else None, logged if (beat.get("kl") or 0) < AGREES else None
    rules = [  # <- change the verdict here: word, level, judged in warm-up too, what, value, its limit, flag
        ("diverging", 2, True, "share of what is not finite", n["nonfinite"], ">", 0, "always"),
        ("diverging", 2, True, "last loss not finite", beat.get("nonfinite_loss"), ">", 0, "always"),
        ("diverging", 2, True, "updates skipped lately", beat.get("skipped"), ">", args.max_skips, "--max-skips"),
        ("diverging", 2, False, "rise of DINO + iBOT", beat.get("rise"), ">", args.max_rise, "--max-rise"),
        ("diverging", 1, False, "loss spikes lately", beat.get("spikes"), ">", args.max_spikes, "--max-spikes"),
        ("rank collapse", 2, False, "deviation of embeddings", n.get("feature_std"), "<", args.min_std, "--min-std"),
        ("rank collapse", 2, False, "rank of embeddings", n.get("effective_rank"), "<", args.min_rank, "--min-rank"),
        ("one-hot", 2, False, "teacher entropy / ln K", n.get("sharp_entropy"), "<", args.min_entropy, "--min-entropy"),
        ("one-hot", 2, False, "logged teacher entropy / ln K", logged, "<", args.min_entropy, "--min-entropy"),
        ("uniform", 2, False, "teacher entropy / ln K", calm[0], ">", args.max_entropy, "--max-entropy"),
        ("uniform", 2, False, "logged teacher entropy / ln K", calm[1], ">", args.max_entropy, "--max-entropy"),
        (DECAY, 1, False, "patch rank / best look", kept, "<", args.min_patch_rank, "--min-patch-rank"),
        (DECAY, 1, False, "cosine of cls and patches", n.get("cls_patch_cosine"), ">", args.max_cls_patch,
         "--max-cls-patch"),
        (DECAY, 1, False, "share of patches with 4x the usual norm", n.get("norm_outliers"), ">", args.max_outliers,
         "--max-outliers"),
        ("disk full", 2, True, "checkpoints that fit", beat["saves_that_fit"], "<", args.min_saves, "--min-saves"),
        ("starved", 1, False, "share of time waiting for data", beat.get("data_wait"), ">", args.max_wait,
         "--max-wait"),
        ("hot", 1, True, "degrees C of the hottest sensor", heat, ">", args.max_temp, "--max-temp"),
    ]  # fmt: skip
    found = []
    for word, level, always, what, value, sign, limit, flag in rules:
        if value is not None and (always or not warming) and (value > limit if sign == ">" else value < limit):
            found.append(Finding(word, level, f"{what}: {told_apart(value, limit)} {sign} {limit:g} ({flag})"))
    patience = max(60 * args.stall_minutes, args.stall_factor * beat.get("log_interval_s", 0))
    if beat.get("age_s", 0) > patience and not beat["finished"]:
        minutes = told_apart(beat["age_s"] / 60, patience / 60, 2 + (patience > 6000))
        age = f"minutes since metrics.jsonl grew: {minutes} > {patience / 60:.4g}"
        flags = "(--stall-minutes, --stall-factor)"
        found.append(Finding("stalled", 2, f"{age} {flags}; last event: {beat['last_event']}"))
    if failed := beat.get("failed_save"):
        word = "disk full" if "No space left" in failed else "not saving"
        reason = failed.removeprefix("SAVE FAILED: ")
        found.append(Finding(word, 2, f"the last save to {args.ckpt.parent} failed: {reason}"))
    if text := throttling(beat, heat, history, args.temp_rise, args.rate_drop):
        found.append(Finding("hot", 1, text))
    return sorted(found, key=lambda f: (-f.level, WORDS.index(f.word)))


# ------------------------------------------------------------------ outputs


@contextlib.contextmanager
def writing(path):
    """Errors of what is written in here name a path, which "No space left on device" alone does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_status(status, out, prom):
    with writing(out):
        write_json(out / "status.json", status)
    prom = prom or out / "metrics.prom"
    with writing(prom):
        checkpoint.write_text(prom, page.prometheus(status, WORDS))


# ------------------------------------------------------------------ main


def measure(state, source, images, out, args, notes):
    """All that takes time -> (numbers, contents of first.npz, drawn pictures)."""
    run_args, view, device = state["args"], state["eval_view"], args.device
    teacher, student = (build(state, who, device) for who in ("teacher", "student"))
    finite = [bool(p.isfinite().all()) for p in teacher.parameters()]
    if not all(finite):
        return {"nonfinite": 1 - sum(finite) / len(finite)}, None, []
    vit = teacher.backbone
    slices = args.slices or (192 if vit.dim <= 384 else 96 if vit.dim <= 768 else 40)
    held = source.take(np.sort(data.rng(0, "limit").permutation(len(source))[:slices]))
    fewer = held.take(np.arange(len(held))[:: 4 if len(held) >= 96 else 2 if len(held) >= 40 else 1])
    start, end = run_args["teacher_temp"]
    temperature = start + (end - start) * min(1, state["step"] / max(run_args["teacher_temp_warmup"], 1))
    numbers = snapshot(
        student, teacher, views(held, range(len(held)), view, vit.patch_size),
        training_views(fewer, runs.recipe_of(args.ckpt.parent, state), vit.patch_size),
        run_args["centering"], temperature, run_args["student_temp"], state["centers"].get("cls", torch.zeros(1)),
    )  # fmt: skip
    if len(numbers) == 1:
        return numbers, None, []
    usual = [path for name in ("labels.csv", "_labels/malignancy.csv") if (path := source.root / name).exists()]
    for path in [data.find_table(source.root, args.labels)] if args.labels else usual[:1]:
        numbers |= label_numbers(vit, source, path, view, len(fewer))
    path, old = out / "first.npz", {}
    if path.exists():
        try:
            old = sheet.read_first(path)
        except ValueError as error:
            notes.append(f"{path} is damaged ({shown(error, 200)}): this look counts as the first, and its colours")
    more, first, drawn = pictures(vit, source, images, view, state["step"], old)
    return numbers | more, first, drawn


def take_pulse(folder, state, size, notes):
    """What the run's folder says beside its checkpoint -> (rows of metrics.jsonl, pulse)."""
    log, total = folder / "metrics.jsonl", state["args"]["steps"] + state["args"]["extend"]
    lines, skipped = runs.read_log(log)
    age_s, free = time.time() - log.stat().st_mtime if lines else 0.0, shutil.disk_usage(folder).free
    beat = runs.pulse(lines, max(age_s, 0.0), state["args"])
    beat |= {"disk_free_gb": free / 1e9, "checkpoint_gb": size / 1e9, "saves_that_fit": free / size}
    if skipped:
        notes.append(f"{skipped} damaged lines of {log} were skipped")
    if age_s < -60:
        notes.append(f"{log} is dated {-age_s / 60:.0f} minutes ahead of this machine's clock: no stall can be seen")
    if odd := beat.get("odd_step"):
        command = f"python tools/inspect_step.py --run {shown(folder, 400)} --why {odd}"
        notes.append(f"update {odd} spiked or was skipped; {command} says why")
    if beat.get("finished"):
        notes.append(f"the run is finished: {beat['last_step']} of {total:,.0f} updates are done")
    return lines, beat


def recall(state, source, images, numbers, out, args, notes):
    """(setting of this look, all other looks, those of them with this setting).

    A look with the same step and setting is left out: this one takes its place. Rows without a setting are old.
    """
    setting = {"slices": numbers.get("slices", args.slices), "images": list(images), "index": source.index_sha256[:16],
               "labels": args.labels and str(args.labels)}  # fmt: skip
    path = out / "history.jsonl"
    history, skipped = runs.read_history(path)
    history = [h for h in history if h["step"] != state["step"] or h.get("setting") not in (None, setting)]
    alike = [h for h in history if h.get("setting") in (None, setting)]
    if skipped:
        notes.append(f"{skipped} damaged lines of {path} were skipped, and are gone from it now")
    if len(alike) < len(history):
        notes.append(f"{len(history) - len(alike)} looks with other --slices, --labels or images are not compared")
    return setting, history, alike


def look(args, out):
    """The whole look -> exit code. Everything is known and printed before anything is written."""
    began, folder, notes = time.time(), args.ckpt.parent, []
    state, size = runs.read_checkpoint(args.ckpt)
    source = broken.leave_out(open_slices(state, args.data, notes), args.skip_bad)
    images = choose_images(source, args.image, args.images, args.seed, out)
    numbers, first, drawn = measure(state, source, images, out, args, notes)
    lines, beat = take_pulse(folder, state, size, notes)
    setting, history, alike = recall(state, source, images, numbers, out, args, notes)
    heat, warming = machine.sensors(args.sysfs) | machine.card_sensors(), state["step"] <= state["args"]["grace"]
    findings = judge(numbers, beat, machine.hottest(heat), history, alike, warming, args)
    verdict = findings[0].word if findings else "warming up" if warming else "healthy"
    when = datetime.datetime.fromtimestamp(began, datetime.timezone.utc).isoformat(timespec="seconds")
    status = {"version": 1, "run": folder.resolve().name, "step": state["step"], "when": when, "time": began,
              "verdict": verdict, "code": max((f.level for f in findings), default=0), "warming": warming,
              "seconds": time.time() - began, "findings": [f._asdict() for f in findings], "notes": notes,
              "setting": setting, "numbers": plain(numbers), "pulse": plain(beat), "sensors": plain(heat)}  # fmt: skip
    print(f"{shown(status['run'])} step {state['step']}: {verdict}")
    print(*(f"  {f.word}: {shown(f.text, 600)}\n" for f in findings), *(f"note: {n}\n" for n in notes), sep="", end="")
    write_status(status, out, args.prom)
    own = {key: value for key, value in status.items() if key not in ("findings", "notes")}
    with writing(out):
        checkpoint.write_text(out / "history.jsonl", "".join(json.dumps(h) + "\n" for h in [*history, own]))
        sections = draw(out, args.seed, state["step"], images, first, drawn, notes) if drawn else {}
        looks = sorted([*alike, own], key=lambda h: h["step"])
        looks = [{"step": h["step"], **h["numbers"], "temperature": machine.hottest(h["sensors"])} for h in looks]
        limits = {key: value for key, value in vars(args).items() if key.startswith(("min_", "max_"))}
        report = checkpoint.write_text(out / "report.html", page.run_page(status, looks, lines, limits, sections))
    print(shown(report, 400))
    return status["code"]


def draw(out, seed, step, images, first, drawn, notes):
    """Write the pictures of a look, and what later looks need of it -> {title: pictures of the page}."""
    chosen = {"version": 1, "seed": seed, "images": list(images)}
    write_json(out / "images.json", chosen)
    checkpoint.atomic_write(out / "first.npz", lambda f: np.savez(f, **first))
    now, then = (out / f"step_{n:08d}" for n in (step, int(first["step"])))
    strips, unread = sheet.save_look(now, drawn)
    if unread:
        notes.append(f"{unread} pictures of earlier looks cannot be read and are missing in the strips")
        print(f"note: {notes[-1]}")
    earlier = [then / "sheet.png"] if then != now and (then / "sheet.png").exists() else []
    sections = {"First look to now": strips, "Now": [now / "sheet.png"], "First look": earlier}
    return {title: paths for title, paths in sections.items() if paths}


def blind(error, out, args):
    """Say why there is no verdict -> 3; where the run's own disk is full, no checkpoint will fit there either -> 2."""
    if isinstance(error, ValueError) and not is_ours(error):
        traceback.print_exception(error)  # not a sentence of ours: where it came from helps
    verdict, reason = "could not look", shown(named(" ".join(str(error).split())), 1000)
    folder = args.ckpt.parent
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = Path(error.filename or out or folder)
        where = next(path for path in (where, *where.absolute().parents) if path.exists())
        if where.stat().st_dev == folder.stat().st_dev:
            verdict = "disk full"
        else:
            free = shutil.disk_usage(folder).free / 1e9
            reason += f"; the disk of the run is another one, with {free:.1f} GB free: make room, or change --out"
    print(f"{verdict}: {reason}", file=sys.stderr)
    status = {"version": 1, "run": folder.resolve().name, "step": -1, "time": time.time(), "verdict": verdict,
              "code": 2 if verdict == "disk full" else 3, "findings": [{"word": verdict, "text": reason}], "notes": [],
              "numbers": {}, "pulse": {}, "sensors": {}}  # fmt: skip
    with contextlib.suppress(OSError):
        if out:
            write_status(status, out, args.prom)
    return status["code"]


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.ckpt = args.ckpt / "last.pth" if args.ckpt.is_dir() else args.ckpt
    out, held = args.out or args.ckpt.parent / "monitor", None
    torch.set_num_threads(args.threads)
    try:
        args.device = pick_device(args.device)
        if not args.ckpt.parent.is_dir() or (args.ckpt.suffix != ".pth" and not args.ckpt.exists()):
            raise FileNotFoundError(f"--ckpt {args.ckpt} does not exist; name the folder of a run, or its last.pth")
        if args.ckpt.suffix != ".pth" or not (args.ckpt.exists() or (args.ckpt.parent / "config.json").exists()):
            raise FileNotFoundError(f"--ckpt {args.ckpt} is no checkpoint of a run; name its folder, or its last.pth")
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out, patience_s=1)
        return look(args, out)
    except (ValueError, OSError) as error:
        return blind(error, out if held else None, args)
    except Exception as error:  # a bug of ours: yesterday's status.json must not go on saying healthy
        blind(error, out if held else None, args)
        raise
    finally:
        if held:
            held.close()


def be_harmless():
    """Lowest priority for the processor; ended first when memory runs out."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.excepthook = unforeseen
    be_harmless()
    run(main)

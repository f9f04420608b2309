"""One look at a run: is it alive, is it learning, has it collapsed, what does it look at? Made for cron.

    0 7 * * * cd /path && python monitor.py --ckpt runs/lidc/last.pth > look.log 2>&1 || mail -s lidc me < look.log

Exit code 0 healthy or warming up, 1 warning, 2 failing, 3 could not look. Reads the checkpoint, metrics.jsonl and
val_select slices; writes to runs/lidc/monitor/ alone. Letters: B images, N patches, D features, H heads, K prototypes.
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
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint
import data
import losses
from model import ProjectionHead, SSLModel, Tokens, build_vit
from tools.lib import page, sheet
from tools.lib.cli import Parser, is_ours, pick_device, positive, run
from tools.lib.loop import lock, read_recipes

# worst first among equals: of constant features a lost rank is the cause, uniform targets are the effect
DECAY = "dense features decaying"
WORDS = ("diverging", "rank collapse", "one-hot", "uniform", "disk full", "not saving", "stalled", DECAY, "hot",
         "starved", "warming up", "healthy", "could not look")  # fmt: skip
CHUNK = 8  # images per forward
AGREES = 0.05  # nats of student from teacher, as in tools/lib/loop.py: below, both say the same


# fmt: off
def build_parser():
    p = Parser(__doc__)
    g = p.add_argument_group("look")
    g.add_argument("--ckpt", required=True, type=Path, help="runs/NAME/last.pth, or any checkpoint of a run")
    g.add_argument("--data", help="processed folder; default: the one that the run was given")
    g.add_argument("--out", type=Path, help="folder to write to; default: monitor/ beside the checkpoint")
    g.add_argument("--image", action="append", help="test image: a path of the index, with :z in a volume; repeatable")
    g.add_argument("--images", type=positive, default=4, help="test images drawn by --seed where --image is not given")
    g.add_argument("--seed", type=int, default=0, help="of the test images; the first look decides for all")
    g.add_argument("--slices", type=positive, help="behind the numbers; default: 256 for ViT-S, 128 for -B, 64 for -L")
    g.add_argument("--labels", type=Path, help="table for k-NN; default: labels.csv or _labels/malignancy.csv if there")
    g.add_argument("--device", default="cpu", help="cpu leaves the card to training; or cuda")
    g.add_argument("--threads", type=positive, default=2, help="CPU threads")
    g.add_argument("--sysfs", type=Path, default=Path("/sys"), help="where the kernel shows its sensors")
    g.add_argument("--prom", type=Path, help="Prometheus text file; default: metrics.prom in the folder")
    g = p.add_argument_group("thresholds of the verdict")
    g.add_argument("--min-std", type=float, default=0.005, help="of embeddings, 1: spread evenly; below: rank collapse")
    g.add_argument("--min-rank", type=float, default=3, help="centred effective rank of cls; below: rank collapse")
    g.add_argument("--min-entropy", type=float, default=0.02, help="of the teacher's targets, in ln K; below: one-hot")
    g.add_argument("--max-entropy", type=float, default=0.995, help="in ln K; above, and the student agrees: uniform")
    g.add_argument("--min-patch-rank", type=float, default=0.5, help="share of the best look so far; below: decaying")
    g.add_argument("--max-cls-patch", type=float, default=0.9, help="mean cosine of cls and patches; above: decaying")
    g.add_argument("--max-outliers", type=float, default=0.05, help="patches of 4x the usual norm; above: decaying")
    g.add_argument("--max-rise", type=float, default=0.25, help="of DINO + iBOT over their best; above: diverging")
    g.add_argument("--max-skips", type=int, default=2, help="skipped updates in 20 log intervals; above: diverging")
    g.add_argument("--max-spikes", type=int, default=3, help="in 20 log lines, of half the loss; above: diverging")
    g.add_argument("--min-saves", type=float, default=2, help="checkpoints that fit on the disk; below: disk full")
    g.add_argument("--stall-factor", type=float, default=10, help="log intervals without a line: stalled, but not ...")
    g.add_argument("--stall-minutes", type=float, default=15, help="... before so many minutes")
    g.add_argument("--max-wait", type=float, default=0.3, help="share of time that waits for data; above: starved")
    g.add_argument("--max-temp", type=float, default=95, help="degrees C of the hottest sensor; above: hot")
    g.add_argument("--temp-rise", type=float, default=5, help="degrees C over the median of earlier looks while ...")
    g.add_argument("--rate-drop", type=float, default=0.1, help="... images/s are below theirs by this share: hot")
    return p
# fmt: on


# ------------------------------------------------------------------ reading


def read_checkpoint(path):
    """(state, bytes) of the file as it is when opened: its name may go to a newer save, or go away, meanwhile."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; has the run saved one yet (--save-every)?")
    with open(path, "rb") as f:
        same = Path(f"/proc/self/fd/{f.fileno()}")  # Linux: this very file, whatever happens to its name
        before = os.fstat(f.fileno())
        try:
            state = checkpoint.load(same if same.exists() else path)
        except checkpoint.BROKEN as error:
            why = str(error).replace(str(same), str(path))
            changed = f"{path} changed while it was read ({type(error).__name__}: {why})"
            raise ValueError(why if str(path) in why else changed) from None
        after = os.fstat(f.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path} was overwritten in place while it was read; copy to another name, then rename")
    return state, after.st_size


def build(state, who, device):
    """The student or the EMA teacher of a checkpoint."""
    args, arch = state["args"], state["arch"]
    with torch.device("meta"):  # no time or memory for weights that are replaced at once
        vit = build_vit(arch["name"], **arch["overrides"])
        shape = (vit.dim, args["head_hidden"], args["head_bottleneck"], args["prototypes"])
        model = SSLModel(vit, ProjectionHead(*shape), ProjectionHead(*shape))
    model.load_state_dict(state[who], assign=True)
    return model.float().to(device).eval().requires_grad_(False)


def open_slices(state, root):
    """val_select, which the run did not train on; of a run without a split, anything."""
    split = None if state["args"]["no_split"] else "val_select"
    source = data.open_source(root or state["args"]["data"], split)
    if source.encoding != state["encoding"]:
        raise ValueError(f"--data {source.root} holds {source.encoding}, the run was trained on {state['encoding']}")
    if split and (leak := sorted(set(source.groups) & set(state["trained_groups"]))):
        raise ValueError(f"{source.root}: the run trained on {leak[0]} of val_select; give --data with the run's split")
    return source


def recipe_of(folder, state):
    """How the run cuts its views; a checkpoint that was copied away has no config.json: as by default."""
    if (folder / "config.json").exists():
        return read_recipes(json.loads((folder / "config.json").read_text()))[0]
    base = data.RECIPES["photo" if state["encoding"] == "photo" else "ct"]
    return dataclasses.replace(base, global_size=state["eval_view"]["size"], local_size=state["args"]["local_size"])


def read_lines(path):
    """Whole lines of a .jsonl file; one that is still being written, or was cut by a full disk, is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return [row for row in found if isinstance(row, dict)]


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
    names, y = np.unique(labels, return_inverse=True)
    unit = F.normalize(cls, dim=-1)
    similarity = unit @ unit.T
    similarity[torch.from_numpy(groups[:, None] == groups)] = -torch.inf
    near = similarity.topk(min(k, len(y) - 1), 1)
    votes = F.one_hot(torch.from_numpy(y)[near.indices], len(names)) * near.values.div(0.07).exp()[..., None]
    right = (votes.sum(1).argmax(1).numpy() == y).astype(float)
    return float(np.mean([right[y == c].mean() for c in range(len(names))]))


def label_numbers(vit, source, path, view, most):
    """k-NN on at most so many slices of a label table; {} where it names fewer than two classes or three patients.

    Tables of nodules give a square of 50 mm around each mark, others the whole image.
    """
    rows, nodules = data.read_labels(path, unlabelled=True)
    rows = [row for row in rows if row["label"].strip()]
    known = {slice_name(source, i): i for i in range(len(source))}
    rows = [row | {"slice": known.get(f"{row['path']}:{row.get('z')}", known.get(row["path"]))} for row in rows]
    rows = [row for row in rows if row["slice"] is not None]
    rows = [rows[k] for k in data.rng(0, "limit").permutation(len(rows))[:most]]  # of tables for other splits: none
    ids, labels = [row["slice"] for row in rows], [row["label"] for row in rows]
    groups, regions = source.rows.columns["group"][ids], None
    if len(set(labels)) < 2 or len(set(groups)) < 3:
        return {}
    if nodules:
        half = 25 / source.rows.columns["spacing_y"][ids][:, None]  # mm
        centres = np.array([[float(row["y"]), float(row["x"])] for row in rows])
        regions = np.concatenate([centres - half, centres + half], 1)
    with torch.no_grad():
        chunks = views(source, ids, view, vit.patch_size, regions)
        cls = torch.cat([vit(images.to(vit.cls_token.device)).cls for images, _ in chunks]).cpu()
    return {"knn": knn(cls, labels, groups), "knn_chance": 1 / len(set(labels)), "knn_slices": len(ids)}


# ------------------------------------------------------------------ pictures


def slice_name(source, i):
    row = source.rows[i]
    return f"{row['path']}:{row['z']}" if source.encoding == "hu16-v1" else row["path"]


def choose_images(source, wanted, count, seed, out):
    """{name: id} of the test images: those of the first look, else --image, else one each of different series."""
    path, of_name = out / "images.json", {slice_name(source, i): i for i in range(len(source))}
    names = wanted or [slice_name(source, i) for i in source.order(seed, 0, min(count, len(source)))]
    if path.exists():
        names = json.loads(path.read_text())["images"]
        if wanted and wanted != names:
            raise ValueError(f"{path} remembers {', '.join(names)}; leave --image away, or give --out another folder")
    if missing := [name for name in names if name not in of_name]:
        raise ValueError(f"test image {missing[0]} is none of the {len(source)} slices that may be looked at, such as "
                         f"{next(iter(of_name))}; correct --image, or remove {path}")  # fmt: skip
    return {name: of_name[name] for name in names}


def pictures(vit, source, images, view, step, old):
    """Every map of every test image -> (numbers, contents of first.npz, {name: (block, column, codes)} of sheet.look).

    old: first.npz of the first look, {} at that look; its colours are kept.
    """
    seen, device = {}, vit.cls_token.device
    for name, i in images.items():
        ((image, inside),) = views(source, [i], view, vit.patch_size)
        ((twice, _),) = views(source, [i], dict(view, size=2 * view["size"]), vit.patch_size)
        one, two = look_through(vit, image.to(device)), look_through(vit, twice.to(device))
        maps = {"1x": one.attention[0].cpu().numpy(), "2x": two.attention[0].cpu().numpy()}
        seen[name] = image[0], None if inside is None else inside[0].numpy(), maps, one.tokens.patches[0].cpu().numpy()
    patches = np.stack([p for *_, p in seen.values()])  # [n, N, D]
    unit = patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)
    together = np.concatenate(patches)  # [n * N, D]
    grams, now = unit @ unit.transpose(0, 2, 1), sheet.principal(together)  # [n, N, N]
    first = old or {**now._asdict(), "grams": grams.astype(np.float16), "step": step}
    if first["grams"].shape != grams.shape or first["axes"].shape != now.axes.shape:
        raise ValueError("first.npz is of another model or image size; give --out another folder")
    kept = sheet.Basis(*(first[key] for key in sheet.Basis._fields))
    numbers = {"gram_drift": float(np.sqrt(np.square(grams - first["grams"]).mean()))}
    numbers["colours_kept"] = kept.share(together) / max(now.share(together), 1e-12)  # variance, against the best
    drawn = {}
    for (name, (image, inside, maps, own)), gram in zip(seen.items(), grams):
        i, photo, grid = images[name], source.encoding == "photo", maps["1x"].shape[1:]
        image = data.denormalise(image).numpy()
        raw = source.read(i).numpy()
        y0, x0, y1, x1 = data.eval_boxes([raw.shape[1:]])[0].astype(int)
        windows = {k: codes[..., y0:y1, x0:x1] for k, codes in sheet.inputs(raw, source.encoding).items()}
        point = sheet.marked_patch(image.mean(0), inside, grid[0])
        similarity = gram[point[0] * grid[1] + point[1]].reshape(grid)
        colours = {(f"3 directions of step {int(first['step'])}", "colours stay comparable"): kept.colours(own),
                   (f"3 directions of step {step}", "chosen anew"): now.colours(own)}  # fmt: skip
        colours = {lines: codes.reshape(*grid, 3) for lines, codes in colours.items()}
        mm = None if photo else (x1 - x0) * source.rows[i]["spacing_x"]
        base = image if photo else image[1]
        drawn[name] = *sheet.maps(f"step {step}: {name}", windows, base, maps, colours, similarity, point, mm), base
    return numbers, first, drawn


# ------------------------------------------------------------------ the run's pulse, and the machine's


def middle(rows, key):
    """Median of what is a finite number, else None."""
    values = [v for r in rows if isinstance(v := r.get(key), (int, float)) and math.isfinite(v)]
    return float(np.median(values)) if values else None


def course(rows):
    """Where DINO + iBOT goes after the warm-up: KoLeo may be negative, and Gram joins late."""
    points = [(r["step"], r.get("dino", math.nan) + r.get("ibot", 0)) for r in rows]
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 5:
        return {}
    steps, values = np.array(points).T
    smooth = np.array([np.median(values[k : k + 5]) for k in range(len(values) - 4)])
    late = slice(-max(5, len(values) // 4), None)
    slope = np.polyfit(steps[late], values[late], 1)[0]
    return {"rise": float(smooth[-1] / max(smooth.min(), 1e-9) - 1), "slope_per_1000": float(1000 * slope)}


def pulse(lines, age_s, args):
    """What metrics.jsonl says of a run with these flags; its last line is age_s old -> dict, empty without a line."""
    rows, events = page.counted(lines, "loss"), [r for r in lines if "event" in r]
    if not rows:
        return {}
    last, recent = rows[-1], rows[-20:]
    found = {key: last.get(key) for key in ("loss", "dino", "ibot", "excess", "lr")}
    found |= {key: middle(rows[-5:], key) for key in "teacher_entropy kl rankme images_s data_wait memory_gb".split()}
    found |= course([r for r in rows if r["step"] > args["grace"]])
    found |= {"last_step": last["step"], "finished": last["step"] >= args["steps"] + args["extend"], "age_s": age_s}
    found["log_interval_s"] = args["log_every"] * args["batch_size"] / (found["images_s"] or math.inf)
    found["eta_h"] = max(last.get("seconds_to_go", 0) - age_s, 0) / 3600
    found["nonfinite_loss"] = int(not math.isfinite(last["loss"]))
    usual = [middle(rows[max(0, k - 10) : k], "loss") or math.inf for k in range(1, len(rows))]
    found["spikes"] = sum(r["loss"] > u + 0.5 * abs(u) for r, u in list(zip(rows[1:], usual))[-20:])
    since = last["step"] - 20 * args["log_every"]
    found["skipped"] = sum(e["event"].startswith("skipped: loss") and e["step"] > since for e in events)
    for name, key in (("images_s_change", "images_s"), ("memory_change", "memory_gb")):  # shares, since the start
        was, now = middle(rows[1:21], key), middle(recent, key)
        found[name] = now / was - 1 if was and now else None
    saves = [e["event"] for e in events if e["event"].startswith(("saved", "SAVE FAILED"))]
    found["failed_save"] = saves[-1] if saves and saves[-1] != "saved" else None
    found["last_event"] = events[-1]["event"] if events else None
    return found


def read_text(path):
    with contextlib.suppress(OSError, UnicodeDecodeError):  # sensors of sleeping devices cannot be read
        return path.read_text().strip()
    return ""


def sensors(root):
    """Readable temperatures, powers and fans of hwmon (amdgpu is one) and thermal zones -> {"name (C)": value}."""
    found = {}
    for path in sorted(root.glob("class/hwmon/hwmon*/*_*")) + sorted(root.glob("class/thermal/thermal_zone*/temp")):
        kind = re.fullmatch(r"(temp|power|fan)(\d*)(_input|_average|)", path.name)
        if kind and re.fullmatch(r"-?\d+", text := read_text(path)):
            label = read_text(path.parent / f"{kind[1]}{kind[2]}_label") or kind[1] + kind[2]
            owner = read_text(path.parent / ("name" if kind[3] else "type"))
            unit, scale = {"temp": ("C", 1e3), "power": ("W", 1e6), "fan": ("rpm", 1)}[kind[1]]
            found[f"{path.parent.name} {owner} {label} ({unit})"] = int(text) / scale
    return found


def ask(*command):
    """What a program prints; nothing where it is not installed, fails or hangs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    return ""


def card_sensors():
    """The same from nvidia-smi and rocm-smi."""
    found, answers = {}, {}
    query = "--query-gpu=temperature.gpu,power.draw,fan.speed"
    for k, line in enumerate(ask("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()):
        answers[f"nvidia {k}"] = dict(zip(("temperature (C)", "power (W)", "fan (%)"), line.split(",")))
    with contextlib.suppress(ValueError):
        answers |= json.loads(ask("rocm-smi", "--showtemp", "--showpower", "--showfan", "--json"))
    for card, values in answers.items():
        for key, value in values.items():
            with contextlib.suppress(ValueError):  # "N/A", "[Not Supported]"
                found |= {f"{card} {key}": float(value)} if key.endswith(("(C)", "(W)", "(%)")) else {}
    return found


def hottest(values):
    return max((value for name, value in values.items() if name.endswith("(C)")), default=None)


# ------------------------------------------------------------------ verdict


class Finding(NamedTuple):
    word: str  # of WORDS
    level: int  # 1 warning, 2 failing
    text: str  # the number and the threshold behind it


def throttling(beat, heat, history, rise, drop):
    """One sentence if it has become hotter while images/s fell, against the medians of earlier looks."""
    before = [(hottest(h["sensors"]), h["pulse"].get("images_s")) for h in history]
    before = [pair for pair in before if None not in pair]
    if len(before) < 3 or heat is None or not beat.get("images_s"):
        return None
    usual, rate = np.median(before, 0)
    if heat < usual + rise or beat["images_s"] > (1 - drop) * rate:
        return None
    return (f"throttling? {heat:.0f} C, the median was {usual:.0f} (--temp-rise {rise:g}), while images/s fell from "
            f"{rate:.4g} to {beat['images_s']:.4g} (--rate-drop {drop:g})")  # fmt: skip


def judge(n, beat, heat, history, warming, args):
    """Numbers, pulse, hottest sensor and earlier looks -> findings, worst first.

    Warm-up excuses what must first be learned, not what is broken: NaN, a dead process, a full disk, heat.
    """
    best = max([h["numbers"].get("patch_rank") or 0 for h in history if not h["warming"]], default=0)
    kept = n["patch_rank"] / best if best and "patch_rank" in n else None
    targets, logged = n.get("teacher_entropy"), beat.get("teacher_entropy")
    agree = n.get("kl", 1) < AGREES or (targets or 0) > 0.99999  # a dead teacher has no student that agrees
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
            found.append(Finding(word, level, f"{what}: {value:.5g} {sign} {limit:g} ({flag})"))
    patience = max(60 * args.stall_minutes, args.stall_factor * beat.get("log_interval_s", 0))
    if beat.get("age_s", 0) > patience and not beat["finished"]:
        age = f"minutes since metrics.jsonl grew: {beat['age_s'] / 60:.0f} > {patience / 60:.0f}"
        flags = "(--stall-minutes, --stall-factor)"
        found.append(Finding("stalled", 2, f"{age} {flags}; last event: {beat['last_event']}"))
    if failed := beat.get("failed_save"):
        word = "disk full" if "No space left" in failed else "not saving"
        found.append(Finding(word, 2, f"the last save failed: {failed}"))
    if text := throttling(beat, heat, history, args.temp_rise, args.rate_drop):
        found.append(Finding("hot", 1, text))
    return sorted(found, key=lambda f: (-f.level, WORDS.index(f.word)))


# ------------------------------------------------------------------ outputs


def plain(values):
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_status(status, out, prom):
    checkpoint.write_text(out / "status.json", json.dumps(status, indent=1, allow_nan=False))
    checkpoint.write_text(prom or out / "metrics.prom", page.prometheus(status, WORDS))


# ------------------------------------------------------------------ main


def measure(state, source, images, out, args):
    """All that takes time -> (numbers, contents of first.npz, drawn pictures)."""
    run_args, view, device = state["args"], state["eval_view"], args.device
    teacher, student = (build(state, who, device) for who in ("teacher", "student"))
    finite = [bool(p.isfinite().all()) for p in teacher.parameters()]
    if not all(finite):
        return {"nonfinite": 1 - sum(finite) / len(finite)}, None, []
    vit = teacher.backbone
    slices = args.slices or (256 if vit.dim <= 384 else 128 if vit.dim <= 768 else 64)
    held = source.take(np.sort(data.rng(0, "limit").permutation(len(source))[:slices]))
    fewer = held.take(np.arange(len(held))[:: 4 if len(held) >= 128 else 2 if len(held) >= 64 else 1])
    start, end = run_args["teacher_temp"]
    temperature = start + (end - start) * min(1, state["step"] / max(run_args["teacher_temp_warmup"], 1))
    numbers = snapshot(
        student, teacher, views(held, range(len(held)), view, vit.patch_size),
        training_views(fewer, recipe_of(args.ckpt.parent, state), vit.patch_size),
        run_args["centering"], temperature, run_args["student_temp"], state["centers"].get("cls", torch.zeros(1)),
    )  # fmt: skip
    if len(numbers) == 1:
        return numbers, None, []
    usual = [path for name in ("labels.csv", "_labels/malignancy.csv") if (path := source.root / name).exists()]
    for path in [data.find_table(source.root, args.labels)] if args.labels else usual[:1]:
        numbers |= label_numbers(vit, source, path, view, len(fewer))
    path, old = out / "first.npz", {}
    if path.exists():
        with np.load(path) as file:
            old = dict(file)
    more, first, drawn = pictures(vit, source, images, view, state["step"], old)
    return numbers | more, first, drawn


def look(args, out):
    """The whole look -> exit code. Everything is known and printed before anything is written."""
    began, folder = time.time(), args.ckpt.parent
    state, size = read_checkpoint(args.ckpt)
    del state["optimizer"], state["gram"]  # half of the memory
    source, log = open_slices(state, args.data), folder / "metrics.jsonl"
    images = choose_images(source, args.image, args.images, args.seed, out)
    numbers, first, drawn = measure(state, source, images, out, args)
    history, lines, free = read_lines(out / "history.jsonl"), read_lines(log), shutil.disk_usage(folder).free
    beat = pulse(lines, time.time() - log.stat().st_mtime if lines else 0.0, state["args"])
    beat |= {"disk_free_gb": free / 1e9, "checkpoint_gb": size / 1e9, "saves_that_fit": free / size}
    heat, warming = sensors(args.sysfs) | card_sensors(), state["step"] <= state["args"]["grace"]
    findings = judge(numbers, beat, hottest(heat), history, warming, args)
    verdict = findings[0].word if findings else "warming up" if warming else "healthy"
    when = datetime.datetime.fromtimestamp(began, datetime.timezone.utc).isoformat(timespec="seconds")
    status = {"version": 1, "run": folder.resolve().name, "step": state["step"], "when": when, "time": began,
              "verdict": verdict, "code": max((f.level for f in findings), default=0), "warming": warming,
              "seconds": time.time() - began, "findings": [f._asdict() for f in findings],
              "numbers": plain(numbers), "pulse": plain(beat), "sensors": heat}  # fmt: skip
    print(f"{status['run']} step {state['step']}: {verdict}", *(f"  {f.word}: {f.text}" for f in findings), sep="\n")
    write_status(status, out, args.prom)
    history.append({k: v for k, v in status.items() if k != "findings"})
    checkpoint.write_text(out / "history.jsonl", "".join(json.dumps(h) + "\n" for h in history))
    shown = {}
    if drawn:
        chosen = {"version": 1, "seed": args.seed, "images": list(images)}
        checkpoint.write_text(out / "images.json", json.dumps(chosen, indent=1))
        checkpoint.atomic_write(out / "first.npz", lambda f: np.savez(f, **first))
        now, then = (out / f"step_{n:08d}" for n in (state["step"], int(first["step"])))
        sheet.save_look(now, drawn)
        shown = {"First look to now": sorted(now.glob("strip_*.png")), "Now": [now / "sheet.png"]}
        shown |= {"First look": [then / "sheet.png"]} if then != now and (then / "sheet.png").exists() else {}
    looks = [{"step": h["step"], **h["numbers"], "temperature": hottest(h["sensors"])} for h in history]
    limits = {key: value for key, value in vars(args).items() if key.startswith(("min_", "max_"))}
    print(checkpoint.write_text(out / "report.html", page.run_page(status, looks, lines, limits, shown)))
    return status["code"]


def blind(error, out, args):
    """Say why there is no verdict -> 3; a disk that cannot take this look cannot take a checkpoint either -> 2."""
    if isinstance(error, ValueError) and not is_ours(error):
        traceback.print_exception(error)  # not a sentence of ours: where it came from helps
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    verdict, reason = "could not look", " ".join(str(error).split())
    if full:
        verdict, reason = "disk full", f"{reason}, when writing to {out or args.ckpt.parent}"
    print(f"{verdict}: {reason}", file=sys.stderr)
    now = time.time()
    status = {"version": 1, "run": args.ckpt.resolve().parent.name, "step": -1, "time": now, "verdict": verdict,
              "code": 2 if full else 3, "findings": [{"word": verdict, "text": reason}], "numbers": {}, "pulse": {},
              "sensors": {}}  # fmt: skip
    with contextlib.suppress(OSError):
        if out:
            write_status(status, out, args.prom)
    return status["code"]


def main(argv=None):
    args = build_parser().parse_args(argv)
    out, held = args.out or args.ckpt.parent / "monitor", None
    torch.set_num_threads(args.threads)
    try:
        args.device = pick_device(args.device)
        if not args.ckpt.parent.is_dir():
            raise FileNotFoundError(f"--ckpt {args.ckpt}: {args.ckpt.parent} is not a folder")
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
    """Last in line for the processor, first to go when memory runs out."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


def unforeseen(kind, error, trace):
    """A bug of ours is no verdict: exit code 3, where Python's own 1 would read as a warning."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(3)


if __name__ == "__main__":
    sys.excepthook = unforeseen
    be_harmless()
    run(main)

"""Do nodules light up? Attention and patch similarity of a backbone on held-out nodules, in pictures and in numbers.

In: weights that load_backbone reads, a processed CT folder with _labels/nodules.csv and masks (tools/lidc_nodules.py).
Out: OUT/heatmaps.png and .json, and each nodule as OUT/nodule_01.png .... It is seen once, in a crop of --crop-mm whose
place around it is drawn by seed, so that a map that always marks the middle scores no better than chance. Inside:
patches at least half covered by the majority mask (or the most covered one, if the nodule is smaller); outside: patches
it does not touch.

    hit      pointing game: the strongest patch is inside (of tied ones, their part that is)
    auroc    chance that a patch inside is above one outside
    inside   part of the attention to patches that falls on the mask
    ring     the same for a ring of equal area around it, a patch's diagonal away
    share    inside / (inside + ring); 0.5 when the nodule gets no more than its surroundings
    chance   the same number with the maps dealt to other nodules: what any habit of place reaches

Intervals are 95%, from resampling patients. The same for random weights of the same architecture.

    python tools/nodule_heatmaps.py --ckpt runs/lidc/last.pth --data data/processed --n 50    # ViT-S, 1 core: 4 min
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
from PIL import Image, ImageColor
from torch.nn import functional as F

import data
from model import load_backbone, read_facts
from tools.lib import judge, provenance, sheet
from tools.lib.cli import Parser, above_zero, natural, pick_device, positive, run, shown
from tools.lib.files import write_json
from tools.lib.metrics import auc, interval, ratio, resample
from tools.lib.progress import progress
from tools.lib.slices import find_slice

STATS = ("hit", "auroc", "inside", "ring", "share")
KEPT = "id path z group diameter_mm".split()
SAMPLES = 8  # per patch and axis: masks are measured on this grid, 0.4 mm at 96 mm and 448 pixels
DEALS = 10  # other nodules that each map is dealt to, for chance
RANDOM_DRAWS = 3  # nets with random weights; their numbers are averaged nodule by nodule
TILE = 212  # pixels of a picture; two nodules of four fill the sheet
NODULE, RING = "#50f0ff", "#6a8a9a"


class Target(NamedTuple):
    """One nodule on one slice in one crop; masks on a grid of SAMPLES x SAMPLES per patch."""

    row: dict  # of the label table
    image: int  # sample id in the source
    box: np.ndarray  # y0, x0, y1, x1 of the crop in pixels of the slice
    mask: np.ndarray  # bool [S, S]
    ring: np.ndarray  # bool [S, S], as many samples as the mask
    inside: np.ndarray  # bool [P, P]
    outside: np.ndarray  # bool [P, P]
    centre: int  # patch with the nodule's middle, row by row


# Where to look.


def read_nodules(path, root, groups):
    """Rows of a label table that belong to these groups."""
    if not path.exists():
        raise FileNotFoundError(f"--labels {path} does not exist; make it with tools/lidc_nodules.py")
    rows, nodules = data.read_labels(path, root)
    if not nodules:
        raise ValueError(f"{path} is no table of nodules; make it with tools/lidc_nodules.py")
    for number, row in enumerate(rows, 2):
        for key, pattern in (("z", r"\d{1,9}"), ("diameter_mm", r"\d{1,9}(\.\d*)?")):
            if not re.fullmatch(pattern, row[key], re.ASCII):
                raise ValueError(f"{path}, row {number}: {key} is {shown(row[key])!r}, expected a number from 0 on")
    kept = [row for row in rows if row["group"] in groups]
    if not kept:
        raise ValueError(f"{path}: none of its {len(rows)} nodules is in the chosen split; see --split")
    return kept


def read_mask(folder, row):
    """Majority mask on the nodule's centre slice and its first pixel (y, x); an empty one is None."""
    path = folder / f"{row['id']}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it with tools/lidc_nodules.py")
    with np.load(path) as file:
        mask, origin = file["majority"], file["origin"]
    z = int(row["z"]) - int(origin[0])
    return (mask[z] if 0 <= z < len(mask) and mask[z].any() else None), origin[1:]


def sample_mask(mask, origin, box, side):
    """The mask [h, w], whose first pixel is `origin`, at side x side points spread over the box: bool [side, side]."""
    low, high = np.reshape(box, (2, 2))
    points = np.floor(low + (np.arange(side)[:, None] + 0.5) * (high - low) / side).astype(int) - origin  # [side, 2]
    within = (points >= 0) & (points < mask.shape)
    return mask[np.ix_(*np.where(within, points, 0).T)] & np.outer(*within.T)


def border(mask):
    """Pixels of the mask with a neighbour outside it."""
    padded = np.pad(mask, 1)
    return mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def ring_around(mask, gap):
    """As many samples as the mask has, those nearest to it beyond `gap` samples; None where the grid ends first."""
    y, x = np.indices(mask.shape)
    squared = np.full(mask.shape, np.inf)
    for edge_y, edge_x in np.argwhere(border(mask)):
        np.minimum(squared, (y - edge_y) ** 2 + (x - edge_x) ** 2, out=squared)
    squared[mask | (squared <= gap**2)] = np.inf
    nearest = np.argsort(squared, axis=None, kind="stable")[: mask.sum()]
    if not np.isfinite(squared.flat[nearest[-1]]):
        return None
    ring = np.zeros_like(mask)
    ring.flat[nearest] = True
    return ring


def place_crop(low, high, sides, margin, size, place):
    """Box (y0, x0, y1, x1) of `sides` in a slice of `size` that holds low .. high with `margin` around it; or None.

    place (two numbers of 0..1) chooses among all such boxes; the slice's edge may cut the margin.
    """
    if (sides > size).any() or (high - low + 2 * margin > sides).any():
        return None
    first, last = (np.clip(start, 0, size - sides) for start in (high + margin - sides, low - margin))
    start = first + place * (last - first)
    return np.concatenate([start, start + sides])


def per_patch(samples):
    """Share of each patch that is True: [S, S] -> [P, P]."""
    patches = len(samples) // SAMPLES
    return samples.reshape(patches, SAMPLES, patches, SAMPLES).mean((1, 3))


def aim(source, image, row, masks, crop_mm, patches, seed):
    """The Target of a nodule, or the reason why there is none."""
    mask, origin = read_mask(masks, row)
    if mask is None:
        return "the majority of its readers marks nothing on its centre slice"
    spacing = np.array([source.rows.columns[f"spacing_{axis}"][image] for axis in "yx"])
    radius = np.sqrt(mask.sum() * spacing.prod() / np.pi)  # mm, of a disc of this area
    gap = np.sqrt(2)  # patches: no patch that the nodule touches reaches into the ring
    margin = np.hypot(radius + gap * crop_mm / patches, radius) - radius  # mm: outer edge of that disc's ring
    filled = np.argwhere(mask)
    low, high = filled.min(0) + origin, filled.max(0) + 1 + origin
    place = np.random.default_rng([seed, *row["id"].encode()]).random(2)
    box = place_crop(low, high, crop_mm / spacing, margin / spacing, np.array(source.size(image)), place)
    if box is None:
        return f"no crop of {crop_mm:g} mm holds it, its ring and nothing beyond the slice"
    samples = sample_mask(mask, origin, box, SAMPLES * patches)
    ring = ring_around(samples, gap * SAMPLES) if samples.any() else None
    if ring is None:
        return "smaller than a sample of the grid, or no room for its ring"
    return make_target(row, image, box, samples, ring)


def make_target(row, image, box, mask, ring):
    covered = per_patch(mask)
    inside = covered >= min(0.5, covered.max())
    filled = np.argwhere(mask)
    middle = filled[((filled - filled.mean(0)) ** 2).sum(1).argmin()] // SAMPLES  # of a hollow nodule: on its wall
    return Target(row, image, box, mask, ring, inside, covered == 0, int(middle @ [len(covered), 1]))


def choose(source, rows, n, masks, crop_mm, patches, seed):
    """-> (n random Targets, or fewer, [{id, reason}] of nodules passed over)."""
    targets, skipped = [], []
    for k in np.random.default_rng(seed).permutation(len(rows)):
        row, target = rows[k], "its slice is not in the index"
        image = find_slice(source, row["path"], row["z"])
        if image is not None:
            target = aim(source, image, row, masks, crop_mm, patches, seed)
        if isinstance(target, str):
            skipped.append({"id": row["id"], "reason": target})
        else:
            targets.append(target)
        if len(targets) == n:
            break
    return targets, skipped


# What the nets see there.


def crops_of(source, targets, view):
    """Normalised crops [B, 3, size, size]."""
    return torch.cat([data.render_eval(source.read(t.image)[None], view, t.box[None]) for t in targets])


def look(vit, images, centres, layer):
    """Maps [B, heads + 2, P, P]: mean attention of cls to the patches, each head's, similarity to the centre patch."""
    attention = vit.attention(images, layer)
    patches = F.normalize(vit(images).patches.float(), dim=-1)  # [B, N, D]
    centre = patches[torch.arange(len(patches)), centres]
    similar = (patches @ centre[:, :, None])[..., 0].unflatten(1, attention.shape[2:])
    return torch.cat([attention.mean(1, keepdim=True), attention, similar[:, None]], 1).cpu().double().numpy()


def look_at_all(nets, source, targets, view, layer, device, batch=8):
    """Maps [nets, n, heads + 2, P, P]."""
    maps = [[] for _ in nets]
    starts = range(0, len(targets), batch)
    with torch.no_grad(), progress(total=len(targets) * len(nets), unit="crop", desc="look") as bar:
        for some in (targets[start : start + batch] for start in starts):
            images = crops_of(source, some, view).to(device)
            for own, vit in zip(maps, nets):
                own.append(look(vit, images, torch.tensor([t.centre for t in some]), layer))
                bar.update(len(some))
    return np.stack([np.concatenate(own) for own in maps])


# Numbers.


def score(heat, target, anchored=False):
    """STATS of one map [P, P] on one nodule; anchored: a similarity, whose own patch does not count and has no mass."""
    inside, outside = target.inside.copy(), target.outside
    if anchored:
        inside.flat[target.centre] = False
        heat = heat.copy()
        heat.flat[target.centre] = -np.inf
        if not inside.any():
            return [np.nan] * len(STATS)
    hit = inside[heat == heat.max()].mean()
    known = inside | outside
    auroc = auc(inside[known], heat[known])
    if anchored:
        return [hit, auroc, np.nan, np.nan, np.nan]
    on, around = ((heat * per_patch(samples)).sum() / heat.sum() for samples in (target.mask, target.ring))
    return [hit, auroc, on, around, on / (on + around) if on + around > 0 else 0.5]


def score_all(maps, targets):
    """Maps [n, M, P, P] -> own numbers and those of maps dealt to other nodules, two [n, M, STATS].

    The last map is the similarity: it starts from the nodule, so it cannot be dealt; its chance is that of any order.
    """
    n, count = maps.shape[:2]
    own, dealt = np.full((2, n, count, len(STATS)), np.nan)
    for i, target in enumerate(progress(targets, "score", unit="nodule", leave=False)):
        own[i, :-1] = [score(heat, target) for heat in maps[i, :-1]]
        own[i, -1] = score(maps[i, -1], target, anchored=True)
        others = [(i + k) % n for k in range(1, min(DEALS, n - 1) + 1)]
        dealt[i, :-1] = np.mean([[score(heat, target) for heat in maps[j, :-1]] for j in others], 0)
        if np.isfinite(own[i, -1, 0]):
            dealt[i, -1, :2] = (target.inside.sum() - 1) / (target.inside.size - 1), 0.5
    return own, dealt


def intervals(values, groups, seed):
    """Values [n, ...] with NaN where there is none -> mean, low and high [...] over nodules, resampling groups."""
    flat = values.reshape(len(values), -1)
    there = np.isfinite(flat)
    filled = np.where(there, flat, 0.0)
    low, high = interval(resample(lambda w: ratio(w @ filled, w @ there), groups, seed=seed))
    mean = ratio(filled.sum(0), there.sum(0))
    return [part.reshape(values.shape[1:]) for part in (mean, low, high)]


def as_numbers(values, groups, names, seed):
    """Values [n, M, STATS] -> {map: {stat: {value, low, high, nodules}}}; numbers that do not exist are left out."""
    mean, low, high = intervals(values, groups, seed)
    counts = np.isfinite(values).sum(0)
    numbers = {}
    for m, name in enumerate(names):
        numbers[name] = {
            stat: dict(value=float(mean[m, s]), low=float(low[m, s]), high=float(high[m, s]), nodules=int(counts[m, s]))
            for s, stat in enumerate(STATS)
            if counts[m, s]
        }
    return numbers


def measure(maps, targets, seed):
    """Maps [nets, n, M, P, P], the trained net first -> (numbers, own values of the trained net [n, M, STATS])."""
    groups = np.array([t.row["group"] for t in targets])
    names = ["mean", *(f"head {h}" for h in range(maps.shape[2] - 2)), "similarity"]
    own, dealt = zip(*(score_all(net, targets) for net in maps))
    trained = dict(own=own[0], chance=dealt[0], above_chance=own[0] - dealt[0])
    random = dict(own=np.mean(own[1:], 0), chance=np.mean(dealt[1:], 0))
    random["above_chance"] = random["own"] - random["chance"]
    numbers = {
        "trained": {key: as_numbers(values, groups, names, seed) for key, values in trained.items()},
        "random": {key: as_numbers(values, groups, names, seed) for key, values in random.items()},
        "trained_minus_random": as_numbers(own[0] - random["own"], groups, names, seed),
    }
    return numbers, own[0]


def brief(number):
    return f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]" if number else "-"


def bare(number):
    return f"{number['value']:.3f}" if number else "-"


FEW = 5  # nodules, below which no verdict is given
TELLING = ("share", "auroc", "hit")  # what a verdict rests on; a similarity has no share


def verdict(numbers, name):
    """Does this map light up, in one sentence: by all of TELLING, or by which and by which not."""
    own, chance, above = (numbers["trained"][key][name] for key in ("own", "chance", "above_chance"))
    random, gain = numbers["random"]["own"][name], numbers["trained_minus_random"][name]
    words = {"mean": "Attention (mean of heads)", "similarity": "Similarity to the nodule's centre"}
    who = words.get(name, f"Attention of {name}")
    if not gain:
        return f"{who}: no nodule is larger than one patch, so there is nothing to compare."
    stats = [stat for stat in TELLING if stat in own]
    even = {stat: own[stat]["low"] - 0.5 if stat != "hit" else 1 for stat in stats}  # above the surroundings
    lit = [stat for stat in stats if min(above[stat]["low"], even[stat]) > 0]  # and above any habit of place
    more = [stat for stat in lit if gain[stat]["low"] > 0]
    text = "does not light up"
    if lit:
        text = "lights up" + f" by {' and '.join(lit)}" * (lit != stats)
        text += f", {'more' if more else 'but not surely more'} than with random weights"
        text += f" by {' and '.join(more)} alone" * (0 < len(more) < len(lit))
        text += f"; not by {' and '.join(stat for stat in stats if stat not in lit)}" * (lit != stats)
    elif all(own[stat]["high"] < 0.5 for stat in stats if stat != "hit"):
        text = "goes dark: nodules get less than what is around them"
    few = min(own[stat].get("nodules", FEW) for stat in stats)
    if few < FEW:  # resampling one nodule gives it an interval of 0
        text = f"is not judged: {few} nodules are too few to tell"
    compared = (
        f"{stat} {brief(own[stat])} (chance {bare(chance[stat])}, random weights {bare(random[stat])}, difference "
        f"{brief(gain[stat])})"
        for stat in stats
    )
    return f"{who} {text}: {', '.join(compared)}."


# The sheet.


def paint(image, samples, colour):
    """The border of a mask [S, S] drawn on the image, at the image's resolution."""
    pixels = np.array(image)
    at = (np.arange(len(pixels)) + 0.5) * len(samples) // len(pixels)
    grown = samples[np.ix_(at.astype(int), at.astype(int))]
    pixels[border(grown)] = ImageColor.getrgb(colour)
    return Image.fromarray(pixels)


def heat_tile(grey, heat, target, title, mm, anchored=False):
    """One map over the crop, the nodule's outline, a box at the strongest patch; a similarity's own gets a cross."""
    side, rivals = grey.width / len(heat), heat.copy()
    top = 1 if anchored else max(heat.max(), 4 * heat.mean())  # of attention; an even one stays dark
    picture = paint(sheet.over(grey, sheet.heat(sheet.enlarge(heat, grey.width), 0, top)), target.mask, NODULE)
    if anchored:
        y, x = (side * (k + 0.5) for k in np.unravel_index(target.centre, heat.shape))
        picture, rivals.flat[target.centre] = sheet.cross(picture, y, x), -np.inf
    at = np.array(np.unravel_index(rivals.argmax(), heat.shape))
    colour = sheet.GOOD if target.inside[tuple(at)] else sheet.BAD
    picture = sheet.outline(picture, [([*(at * side), *((at + 1) * side)], colour, "", 1)])
    return sheet.titled(sheet.scale_bar(picture, mm), title, size=14)


def grey_crop(source, target):
    """What a reader looks at, [TILE, TILE]: lung window of slice z where HU are known, else its soft tissue."""
    image, none = source.read(target.image)[None], np.zeros((1, 1))
    codes = data.cut(image, target.box[None, None], none > 0, none, TILE)[0, 0, 1].numpy()
    if source.encoding == "hu16-v1":
        level, width = data.WINDOWS_HU["lung"]
        return sheet.picture((codes - level) / width + 0.5)
    return sheet.picture(codes / 255)


def draw(source, target, maps, values, crop_mm):
    """One nodule: CT with its outline and ring, attention, attention of random weights, similarity to its centre.

    maps [nets, M, P, P]; values [M, STATS] of the trained net.
    """
    grey, mm = grey_crop(source, target), crop_mm / TILE
    plain = sheet.scale_bar(paint(paint(grey, target.ring, RING), target.mask, NODULE), mm)
    share, alike = values[0, STATS.index("share")], values[-1, STATS.index("auroc")]
    auroc = f"auroc {alike:.2f}" if np.isfinite(alike) else "no larger than one patch"
    own, untrained = (f"peak {heat.max() / heat.mean():.1f} x mean" for heat in maps[:2, 0])
    picture, row = sheet.row([
        sheet.titled(plain, ["CT with the nodule", "and a ring of equal area"], size=14),
        heat_tile(grey, maps[0, 0], target, ["attention, mean of heads", f"share {share:.2f}, {own}"], mm),
        heat_tile(grey, maps[1, 0], target, ["the same, random weights", untrained], mm),
        heat_tile(grey, maps[0, -1], target, ["similarity to the cross", auroc], mm, anchored=True),
    ]), target.row  # fmt: skip
    title = f"{row['id']}, {float(row['diameter_mm']):.1f} mm, slice {row['z']}"
    return sheet.stack([sheet.heading(title, picture.width, size=15), picture], 4)


def draw_table(numbers):
    """The numbers as columns: every map, trained against chance and random weights."""
    trained, random, gain = numbers["trained"], numbers["random"], numbers["trained_minus_random"]
    columns = [(84, "map", list(trained["own"]))]
    for stat in ("share", "auroc", "hit", "inside", "ring"):
        columns.append((158, f"{stat} [95%]", [brief(one.get(stat)) for one in trained["own"].values()]))
        if stat in TELLING:
            columns.append((54, "chance", [bare(one.get(stat)) for one in trained["chance"].values()]))
            columns.append((60, "random", [bare(one.get(stat)) for one in random["own"].values()]))
    for stat in ("share", "auroc"):
        columns.append((176, f"{stat} minus random [95%]", [brief(one.get(stat)) for one in gain.values()]))
    return sheet.row([sheet.paragraphs([(top, sheet.DIM), *rest], width, 14) for width, top, rest in columns])


def draw_sheet(title, warning, sentences, numbers, pictures):
    """sentences: verdicts, whose numbers are left out, since they stand in the table."""
    pairs = [sheet.row(pictures[i : i + 2], 24) for i in range(0, len(pictures), 2)]
    top = [sheet.heading(title, sheet.WIDTH, size=20)]
    top += [sheet.heading(warning, sheet.WIDTH, sheet.BAD)] * bool(warning)
    legend = [f"{stat}: {text}" for stat, text in re.findall(r"^    (?!python)(\w+) +(.+)", __doc__, re.M)]
    legend = "; ".join([*legend, "random: random weights; box: the strongest patch, green inside"])
    words = [re.split(r": (?=share|auroc|hit)", sentence)[0].rstrip(".") + "." for sentence in sentences]
    top += [sheet.paragraphs(words, sheet.WIDTH, 17), sheet.paragraphs([(legend, sheet.DIM)], sheet.WIDTH, 14)]
    return sheet.stack([*top, draw_table(numbers), *pairs])


# The program.


def open_split(source, split, used_by, allow_duplicates):
    """The slices of a split through the door; all: of every split, or of everything where there is no contract."""
    if split == "all" and not data.split_path(source.root).exists():
        return source
    purposes = [purpose for purpose, name in data.PURPOSES.items() if split in (name, "all")]
    return data.open_for(source, purposes, used_by, allow_duplicates=allow_duplicates)


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, type=Path, help="weights: a checkpoint, a release, any DINOv3 ViT")
    parser.add_argument("--data", type=Path, default=Path("data/processed"), help="processed CT folder")
    parser.add_argument("--labels", type=Path, help="table of nodules; default: DATA/_labels/nodules.csv")
    parser.add_argument("--n", type=positive, default=50, help="nodules to look at, drawn by --seed")
    parser.add_argument("--split", default="val_test", choices=(*data.PURPOSES.values(), "all"), help="whose nodules; "
                        "all: every patient, whatever the split")  # fmt: skip
    parser.add_argument("--allow-seen", action="store_true", help="look at training patients too; said in the titles")
    parser.add_argument("--allow-duplicates", action="store_true", help="also if some cross the splits; titled so")
    parser.add_argument("--crop-mm", type=above_zero, default=96, help="side of a crop")
    parser.add_argument("--size", type=positive, default=448, help="pixels of a crop; 448 of 96 mm: patches of 3.4 mm")
    parser.add_argument("--layer", type=int, default=-1, help="block whose attention is drawn; -1: the last")
    parser.add_argument("--seed", type=natural, default=0, help="of nodules, crops, random weights and resamples")
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    parser.add_argument("--out", type=Path, help="folder to write to; default: heatmaps beside --ckpt")
    return parser


def list_nodules(targets, own):
    """What each nodule gave, for whoever wants to look closer; own [n, M, STATS], the mean of heads first."""
    rows = []
    for target, values in zip(targets, own):
        kept = {key: target.row[key] for key in KEPT}
        kept |= {stat: float(value) for stat, value in zip(STATS, values[0])}
        kept |= {"box": target.box.round(2).tolist(), "patches_inside": int(target.inside.sum())}
        rows.append(kept)
    return rows


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.crop_mm > 0:
        parser.error(f"--crop-mm {args.crop_mm:g} must be positive")
    if args.n < 2:
        parser.error("--n 1: chance is measured on other nodules, so at least 2 are needed")
    before = provenance.stamp(args.ckpt)
    source, facts = data.open_source(args.data), read_facts(args.ckpt)
    if source.encoding == "photo":
        raise ValueError(f"--data {args.data} holds photographs; nodules need a processed CT folder")
    labels = data.find_table(args.data, args.labels) if args.labels else args.data / "_labels" / "nodules.csv"
    groups = source.rows.column("group")
    inside = args.split == "all" or data.split_names(source) == args.split
    rows = read_nodules(labels, args.data, set(groups[inside].ravel().tolist()))
    judged = np.flatnonzero(np.isin(groups, [row["group"] for row in rows]))
    exposure = provenance.refuse_leak(facts, source.take(judged), f"split {args.split}", args.allow_seen)
    vit = load_backbone(args.ckpt)
    view, patches = judge.choose_view(facts, source.encoding, args.size, vit.patch_size), args.size // vit.patch_size
    source.at_distance(view.get("neighbour_mm"))
    device, masks = pick_device(args.device), args.data / "_labels" / "masks"
    why = f"heatmaps of {args.n} nodules, --split {args.split}"
    used_by = judge.used_by("tools/nodule_heatmaps.py", args.ckpt, labels, why)
    provenance.refuse_change(args.ckpt, before)
    source = open_split(source, args.split, used_by, args.allow_duplicates)
    targets, skipped = choose(source, rows, args.n, masks, args.crop_mm, patches, args.seed)
    for item in skipped:
        print(f"passed over {shown(item['id'])}: {item['reason']}")
    if len(targets) < 2:
        raise ValueError(f"{labels}: {len(targets)} usable nodules in split {args.split}, at least 2 are needed")

    nets = [net.to(device) for net in (vit, *judge.random_backbones(vit.arch, args.seed, RANDOM_DRAWS))]
    maps = look_at_all(nets, source, targets, view, args.layer, device)
    numbers, own = measure(maps, targets, args.seed)
    heads = [name for name in numbers["trained"]["own"] if name.startswith("head")]
    best = max(heads, key=lambda name: numbers["trained"]["own"][name]["share"]["value"])
    sentences = [verdict(numbers, "mean"), verdict(numbers, "similarity")]
    sentences.append(f"Best of {len(heads)} heads, chosen on these very nodules: {verdict(numbers, best)}")
    patients = {t.row["group"] for t in targets}
    seen = patients & set(exposure.groups)
    caveats = judge.caveats(seen, len(patients), exposure.known, source.crossing, source.earlier_looks)
    sentences += [f"{text[0].upper()}{text[1:]}." for text in caveats]
    title = (
        f"{args.ckpt.name}, {vit.arch['name']}: {len(targets)} nodules of {len(patients)} patients, split "
        f"{args.split}, crops of {args.crop_mm:g} mm, patches of {args.crop_mm / patches:.1f} mm, attention of block "
        f"{args.layer}"
    )
    title, warning = judge.titled(title, caveats), "; ".join(caveats)
    report = dict(version=1, title=title, warning=warning, verdict=sentences,
                  weights_sha256=used_by["weights_sha256"], labels_sha256=used_by["labels_sha256"],
                  index_sha256=source.index_sha256, split_sha256=source.split_sha256,
                  arch=vit.arch, seed=args.seed, layer=args.layer, crop_mm=args.crop_mm, size=args.size,
                  patients=len(patients), numbers=numbers, skipped=skipped,
                  nodules=list_nodules(targets, own))  # fmt: skip
    out = args.out or args.ckpt.parent / "heatmaps"
    write_json(out / "heatmaps.json", report)
    drawn = progress(zip(targets, maps.swapaxes(0, 1), own), "draw", len(targets), unit="nodule")
    pictures = [draw(source, target, some, values, args.crop_mm) for target, some, values in drawn]
    for old in out.glob("nodule_*.png"):
        old.unlink()
    for k, picture in enumerate(pictures, 1):
        sheet.save(out / f"nodule_{k:02}.png", picture)
    sheet.save(out / "heatmaps.png", draw_sheet(title, warning, sentences, numbers, pictures))
    print("\n".join([title, *[warning] * bool(warning), *sentences]))
    print(out / "heatmaps.json", out / "heatmaps.png", out / "nodule_*.png", sep="\n")
    return 0


if __name__ == "__main__":
    run(main)

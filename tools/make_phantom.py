"""Write an LIDC-shaped folder of phantom chest CT: DICOM slices, the XML of four readers, and the truth behind them.

In: a seed, nothing else. Out: OUT/PHANTOM-0001/<study>/<series>/ with DICOM files and one XML per CT series, and
OUT/truth.csv, one row per nodule and series (TRUTH_COLUMNS; `reader_masks` decodes its masks). A patient depends on
--seed, --slices, --size and its own number alone: the same bytes for any --workers and --patients. Malignant and
benign nodules have one size distribution; margin, texture and the pull on nearby vessels tell them apart.

    python tools/make_phantom.py --out data/raw --patients 40     # 75 slices/s on one core
"""

import base64
import csv
import hashlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.lib.cli import Parser, natural, positive, run, within
from tools.lib.progress import progress
from tools.lib.workers import parallel

# z y x: centre as a fractional index in the volume ordered by position; z_mm y_mm x_mm: the same in patient
# coordinates. kind: nodule, or small (< 3 mm: one point in the XML, no masks). malignancy: ratings of `readers`.
# box: "z0:z1 y0:y1 x0:x1"; masks: each reader's, packed (reader_masks).
TRUTH_COLUMNS = (
    "patient study series nodule kind z y x z_mm y_mm x_mm diameter_mm malignant ambiguous margin texture pulled "
    "readers malignancy box masks"
).split()
AIR, LUNG, FAT, MUSCLE, BLOOD = -1000, -868, -100, 55, 42  # HU; the median over a lung with its vessels is near -850

# Four "scanners". blur_mm and boost: Gaussian and edge gain of the kernel; noise: HU at 2.5 mm. They store pixels as
# real ones do; pad is the stored value of PixelPaddingValue outside the field of view (None: no padding).
SCANNERS = (
    dict(kernel="STANDARD", blur_mm=0.75, boost=0.0, noise=14, signed=1, bits=16, intercept=-1024, pad=-2000),
    dict(kernel="LUNG", blur_mm=0.55, boost=0.9, noise=20, signed=0, bits=12, intercept=-1024, pad=None),
    dict(kernel="SOFT", blur_mm=0.95, boost=0.0, noise=10, signed=1, bits=16, intercept=0, pad=-2048),
    dict(kernel="SHARP", blur_mm=0.65, boost=0.5, noise=17, signed=0, bits=16, intercept=-8192, pad=0),
)


def stream(*key):
    """A random generator that is a function of its key (seed, patient, purpose) alone."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "big"))


def make_uid(*key):
    """A DICOM UID (root 2.25, at most 44 characters) that is a function of its key alone."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], 'big')}"


# Anatomy as signed distances in mm, negative inside: x to the patient's left, y to the back, z to the head, z = 0 at
# the hila. Arrays of any shapes that broadcast: slices and single points use one definition.


def ellipse(x, y, cx, cy, rx, ry):
    return (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) - 1) * min(rx, ry)


def ellipsoid(x, y, z, centre, radii):
    (cx, cy, cz), (rx, ry, rz) = centre, radii
    return (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2) - 1) * min(radii)


def bar(x, y, x0, y0, x1, y1, radius):
    """A rounded bar in the slice plane."""
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - x0 - t * dx, y - y0 - t * dy) - radius


def blend(a, b, k):
    """Smooth minimum (union) with a fillet of k mm; a negative k gives the smooth maximum (intersection)."""
    h = np.clip(0.5 + 0.5 * (b - a) / k, 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def round_box(x, y, rx, ry, round_share):
    """Between an ellipse (round_share 1) and a squarer curve of fourth order (0)."""
    u, v = (x / rx) ** 2, (y / ry) ** 2
    return (round_share * np.sqrt(u + v) + (1 - round_share) * np.sqrt(np.sqrt(u * u + v * v)) - 1) * ry


def warp(p, x, y):
    """Tilt and bend the plane, so that no patient is symmetric. The distances below take warped x and y."""
    a, b, c, d, tilt = p.warp
    return (
        x + tilt * y + 5 * np.sin(y / 47 + a) + 3 * np.sin(x / 31 + b),
        y - tilt * x + 4 * np.sin(x / 61 + c) + 2 * np.sin(y / 29 + d),
    )


def body_distance(p, x, y, z):
    d = round_box(x, y, p.half_width + 10 * np.clip((z - 10) / 80, 0, 1.5), p.half_depth, 0.35)  # wider shoulders
    if p.breast:
        d = blend(d, ellipsoid(np.abs(x), y, z, (68, 30 - p.half_depth, -20), (50, 30 + p.breast, 70)), 18)
    return d


def narrowing(z):
    """0 below the level of the hila, towards 1 at the top of the lungs."""
    return np.clip((z - 20) / 110, 0, 1.2) ** 2


def cage_distance(p, x, y, z):
    """Inner face of the rib cage."""
    return round_box(x, y + 9, p.cage_width * (1 - 0.35 * narrowing(z)), p.cage_depth * (1 - 0.3 * narrowing(z)), 0.55)


def heart_axes(x, y):
    """Coordinates along and across the heart, whose axis points left and to the front."""
    return 0.85 * x + 0.53 * y, 0.85 * y - 0.53 * x


def heart_distance(p, x, y, z):
    return ellipsoid(*heart_axes(x, y), z, (2, -30, -52), p.heart)


def lung_distance(p, x, y, z):
    """The cage without the middle of the chest and without what the diaphragm pushes up."""
    middle = blend(ellipse(x, y, 0, p.spine_y + 8, 25, 34), ellipse(x, y, 1, -10, 31, 44), 14)
    middle = blend(middle, ellipse(x, y, 23, 32, 16, 16), 10)  # descending aorta
    middle = blend(middle, bar(x, y, 0, -100, 0, 0, 5), 20)  # where the lungs meet in front
    middle = blend(middle, heart_distance(p, x, y, z) - 4, 12)
    for dome in p.domes:
        middle = blend(middle, ellipsoid(x, y, z, *dome) - 3, 8)
    return blend(cage_distance(p, x, y, z) + 1.5, -middle, -9)


# Vessels, airways and spicules are capsules [n, 8]: both ends (x, y, z) and both radii of a tapered tube, in mm.


def capsules(start, end, r_start, r_end):
    columns = np.broadcast_to(r_start, (len(start), 1)), np.broadcast_to(r_end, (len(start), 1))
    return np.concatenate([start, end, *columns], 1).astype(np.float32)


def tube(*points):
    """A polyline of (x, y, z, radius)."""
    q = np.array(points)
    return capsules(q[:-1, :3], q[1:, :3], q[:-1, 3:], q[1:, 3:])


def widen(tubes, factor, extra_mm):
    out = tubes.copy()
    out[:, 6:] = factor * out[:, 6:] + extra_mm
    return out


def grow_tree(rng, root, targets, tip_mm):
    """Vessels from root through all targets.

    Each target joins the node with the least length + 0.5 * path to the root, a balanced spanning tree (Cuntz et al.
    2010, doi 10.1371/journal.pcbi.1000877). Radii follow Murray's law: the flows, ~ radius^2.7, add up.
    """
    nodes = np.concatenate([root[None], targets[np.argsort(np.linalg.norm(targets - root, axis=1))]])
    parent, path, flow = np.zeros(len(nodes), int), np.zeros(len(nodes)), np.ones(len(nodes))
    for i in range(1, len(nodes)):
        length = np.sqrt(((nodes[:i] - nodes[i]) ** 2).sum(1))
        parent[i] = np.argmin(length + 0.5 * path[:i])
        path[i] = path[parent[i]] + length[parent[i]]
    for i in range(len(nodes) - 1, 0, -1):
        flow[parent[i]] += flow[i]
    radius = tip_mm * flow[:, None] ** (1 / 2.7)
    start, end, r_end = nodes[parent[1:]], nodes[1:], radius[1:]
    r_start = np.minimum(radius[parent[1:]], 1.25 * r_end)  # a twig is thin from its fork on
    bend = 0.09 * np.linalg.norm(end - start, axis=1, keepdims=True) * rng.standard_normal(start.shape)
    middle, r_middle = (start + end) / 2 + bend, (r_start + r_end) / 2
    return np.concatenate([capsules(start, middle, r_start, r_middle), capsules(middle, end, r_middle, r_end)])


def scatter(rng, p, count, margin_mm):
    """Random points in the box around the scanned part of the lungs [count, 3] and their depth in the lung (mm)."""
    low, high = (-140, -100, p.z[0] - margin_mm), (140, 90, p.z[-1] + margin_mm)
    points = rng.uniform(low, high, (count, 3))
    return points, -lung_distance(p, *warp(p, points[:, 0], points[:, 1]), points[:, 2])


def draw_trees(rng, p):
    """Arteries and veins of both lungs, and the bronchi beside the larger arteries."""
    twigs, tip_mm = int(rng.integers(300, 650)), rng.uniform(0.42, 0.54)
    points, depth = scatter(rng, p, 40 * twigs, 12)
    points = points[depth > 2]
    trees = []
    for root in ((44, 4, 6), (40, -4, -14)):  # artery, vein
        for side in (1, -1):
            mine = points[points[:, 0] * side > 0]
            targets = mine[rng.permutation(len(mine))[:twigs]]
            trees.append(grow_tree(rng, np.array(root) * (side, 1, 1), targets, tip_mm))
    arteries = np.concatenate(trees[:2])
    wide = arteries[arteries[:, 6] > 2]
    beside = wide + np.float32([2, -1, 0, 2, -1, 0, 0, 0]) * wide[:, 6:7]
    return np.concatenate(trees), widen(beside, 0.75, 0)


GULLET = tube((4, 24, 140, 6), (5, 25, 10, 6.5), (9, 24, -140, 7))
AIRWAY = np.concatenate(
    [
        tube((1, 2, 140, 8.5), (2, 8, 22, 8)),
        tube((2, 8, 22, 7.5), (-24, 10, 4, 6.5), (-46, 8, -8, 4.5), (-58, 10, -26, 3.2)),
        tube((2, 8, 22, 7), (30, 13, -2, 5.5), (50, 12, -12, 4.2), (62, 14, -30, 3)),
    ]
)
GREAT_VESSELS = np.concatenate(
    [
        tube((-14, -22, -30, 17), (-17, -24, 5, 17), (-12, -22, 32, 15.5), (2, -4, 42, 14.5), (18, 18, 40, 13)),
        tube((18, 18, 40, 13), (24, 31, 26, 12.5), (24, 33, -20, 12), (19, 36, -140, 11)),  # descending aorta
        tube((12, -38, -22, 14), (16, -24, 2, 14), (20, -10, 14, 12), (46, 6, 8, 9)),  # pulmonary trunk, left branch
        tube((18, -16, 8, 12), (-12, -6, 6, 11), (-44, 0, 2, 9)),  # right branch
        tube((-27, -22, 140, 6), (-27, -22, 60, 8), (-29, -14, -20, 9)),  # upper caval vein
        tube((-12, -18, 40, 6.5), (-18, -12, 130, 6)),  # arteries from the arch
        tube((2, -10, 44, 4.5), (10, -8, 130, 4)),
        tube((14, 8, 42, 5), (22, 10, 130, 5)),
    ]
)
CHAMBERS = (
    ((-28, -30, -50), (26, 30, 40)),
    ((26, -40, -58), (27, 17, 40)),
    ((14, -6, -40), (30, 15, 32)),
)  # of the heart


def draw_patient(seed, number, slices):
    """One patient, as numbers in mm and HU."""
    rng = stream(seed, number, "anatomy")
    p = SimpleNamespace(seed=seed, number=number, name=f"PHANTOM-{number:04d}")
    p.half_width, p.half_depth = rng.uniform(142, 164), rng.uniform(101, 116)
    p.fat, p.breast = rng.uniform(6, 16), rng.uniform(8, 18) * (rng.random() < 0.5)
    p.cage_width, p.cage_depth = p.half_width - p.fat - rng.uniform(17, 23), p.half_depth - p.fat - rng.uniform(16, 21)
    p.spine_y = p.cage_depth - 33
    p.warp = (*rng.uniform(0, 6.28, 4).tolist(), rng.normal(0, 0.03))
    p.heart = (rng.uniform(56, 65), rng.uniform(39, 45), rng.uniform(46, 56))
    lift = rng.uniform(-15, 15)
    p.domes = (((-68, -5, -172 + lift), (76, 80, 96)), ((76, 0, -182 + lift), (66, 74, 92)))  # liver, left dome
    p.ribs = (rng.uniform(0, 25), rng.uniform(23, 27), rng.uniform(110, 135))  # phase, spacing, drop towards the front
    p.blood = BLOOD if rng.random() < 0.6 else rng.uniform(120, 220)  # contrast agent
    steps = [s for s in (0.5, 0.7, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0) if min(48, 2 * slices) <= s * slices <= 250]
    p.step = float(rng.choice(steps or [round(250 / slices, 2)]))  # the lungs are about 250 mm high
    spare = min(55, (250 - slices * p.step) / 2)
    p.z = (np.arange(slices) - (slices - 1) / 2) * p.step + round(10 + rng.uniform(-spare, spare), 1)
    p.table, p.fov = p.half_depth + rng.uniform(12, 20), 2 * p.half_width * rng.uniform(0.97, 1.12)
    p.origin = np.round([rng.normal(0, 5), rng.uniform(-190, -120), rng.uniform(-400, 100)], 1)  # table position
    p.dose = np.exp(rng.uniform(-0.6, 0.6))  # factor on the noise
    p.study, p.position = make_uid(seed, number, "study"), "FFS" if rng.random() < 0.25 else "HFS"
    noise = rng.standard_normal((40, 112, 112), dtype=np.float32)  # periodic; smoothed, so that planes interpolate
    for axis in range(3):
        noise = noise / 2 + (np.roll(noise, 1, axis) + np.roll(noise, -1, axis)) / 4
    p.texture = noise / noise.std()
    p.vessels, p.bronchi = draw_trees(rng, p)
    p.nodules = draw_nodules(p)
    p.vessels = np.concatenate([p.vessels, *(n.vessels for n in p.nodules)])
    p.spicules = np.concatenate([n.spicules for n in p.nodules])
    return p


# Nodules: a lobed ellipsoid, spicules on it, vessels pulled to it.


H, TURN = 1 - (2 * np.arange(500) + 1) / 500, 2.39996 * np.arange(500)  # golden angle
SPHERE = np.stack([np.sqrt(1 - H * H) * np.cos(TURN), np.sqrt(1 - H * H) * np.sin(TURN), H])  # even directions [3, 500]


def unit(rng, count, flat=1.0):
    """Random directions [count, 3]; flat < 1 keeps them near the slice plane, where they show."""
    v = rng.standard_normal((count, 3)) * (1, 1, flat)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def bumps(n, ux, uy, uz, rho):
    """Sum of the nodule's lobes in the direction (ux, uy, uz) / rho."""
    return sum(np.exp(9 * ((ux * lx + uy * ly + uz * lz) / rho - 1)) for lx, ly, lz in n.lobes)


def nodule_distance(n, dx, dy, dz):
    """Distance (mm) to the nodule's body, without spicules, at offsets from its centre."""
    ux, uy, uz = ((d + shift) / stretch for d, shift, stretch in zip((dx, dy, dz), n.shift, n.stretch))
    rho = np.sqrt(ux * ux + uy * uy + uz * uz) + 1e-3
    return rho - n.radius * n.scale * (1 + n.lobe * bumps(n, ux, uy, uz, rho))


def draw_nodule(rng, p, kind, centre, radius):
    """Malignancy is drawn apart from place and size; it decides margin, texture and pull.  <- change the task here"""
    n = SimpleNamespace(kind=kind, centre=centre, radius=radius, margin="smooth", texture="solid", pulled=0)
    chance = rng.random(5)
    n.malignant, n.ambiguous = kind == "nodule" and chance[0] < 0.45, kind == "nodule" and chance[1] < 0.12
    if n.malignant:
        n.margin = "spiculated" if chance[2] < 0.6 else "lobulated"
        n.texture = "part-solid" if chance[3] < 0.4 and not n.ambiguous else "solid"
        n.pulled = 1 if n.ambiguous else 3 + int(2 * chance[4])
    elif kind == "nodule":
        n.margin = "smooth" if chance[2] < 0.92 else "lobulated"
        n.texture = "solid" if chance[3] < 0.7 or n.ambiguous else "calcified" if chance[3] < 0.94 else "part-solid"
        n.pulled = int(chance[4] < 0.2)
    strength = rng.uniform(0.3, 0.5) if n.ambiguous else rng.uniform(0.8, 1.2)
    n.spicularity = strength * (n.margin == "spiculated")
    n.lobe = strength * {"smooth": 0.05, "spiculated": 0.12, "lobulated": 0.55}[n.margin]
    n.lobes = unit(rng, int(rng.integers(5, 8)), 0.6).tolist()
    # Lobes keep the volume but widen the bounding box by 3%: benign bodies are more oblong, which does the same.
    stretch = np.exp(rng.normal(0, 0.05 if n.malignant else 0.17, 3))
    n.stretch = (stretch / np.prod(stretch) ** (1 / 3)).tolist()
    form = 1 + n.lobe * bumps(n, *SPHERE, 1.0)
    n.scale = float(np.mean(form**3) ** (-1 / 3))
    centroid = 0.75 * np.mean(form**4 * SPHERE, 1) / np.mean(form**3)
    n.shift = (radius * n.scale * centroid * n.stretch).tolist()  # so that `centre` is the centre of mass
    n.density, n.chalk = rng.uniform(-50, 60), rng.uniform(250, 900)  # HU of the body; more where calcified
    n.core = rng.uniform(0.4, 0.6) * radius, (0.2 * radius * unit(rng, 1)[0]).tolist()  # radius and place in the body
    n.hole = 0.4 * radius if radius > 6 and n.texture == "solid" and rng.random() < 0.2 else 0  # cavity
    u = unit(rng, int(n.spicularity * rng.uniform(13, 19)), 0.45)
    length = (3 + radius * rng.uniform(0.4, 1.0, (len(u), 1))) * strength
    thick = 0.7 + 0.08 * radius
    n.spicules = capsules(centre + 0.8 * radius * u, centre + (radius + length) * u, thick, 0.5 * thick)
    n.vessels = pull_vessels(rng, p.vessels, n)
    return n


def pull_vessels(rng, vessels, n):
    """n.pulled twigs from vessels nearby to the nodule's surface."""
    away = np.linalg.norm(vessels[:, 3:6] - n.centre, axis=1) - n.radius
    near = np.flatnonzero((away > 5) & (away < 22) & (vessels[:, 7] > 0.5))
    start = vessels[rng.permutation(near)[: n.pulled], 3:6]
    u = (start - n.centre) / np.linalg.norm(start - n.centre, axis=1, keepdims=True)
    return capsules(start, n.centre + 0.7 * n.radius * u, 1.0, 1.6)


def draw_nodules(p):
    """1 to 4 nodules of 4 to 24 mm and 0 to 2 below 3 mm: inside the lung and the scan, apart from each other."""
    rng = stream(p.seed, p.number, "nodules")
    spots, depth = scatter(rng, p, 6000, 0)
    hila = np.linalg.norm(np.abs(spots - (0, 4, 0)) - (44, 0, 0), axis=1)
    scanned = p.z[-1] - p.z[0]
    nodules = []
    for kind in ["nodule"] * rng.integers(1, 5) + ["small"] * rng.integers(0, 3):
        size = np.clip(np.exp(rng.normal(np.log(11.5), 0.4)), 4, 24) if kind == "nodule" else rng.uniform(2.2, 2.9)
        radius = float(min(size, 0.6 * scanned)) / 2
        miss = np.maximum(0, radius + 1.5 - depth) + np.maximum(0, radius + 24 - hila)
        miss += np.maximum(0, np.abs(spots[:, 2] - p.z.mean()) + radius + 1.5 * p.step - scanned / 2)
        for other in nodules:
            miss += np.maximum(0, 10 + radius + other.radius - np.linalg.norm(spots - other.centre, axis=1))
        centre = spots[np.argmin(miss)].copy()  # the first spot that misses nothing, if there is one
        nearest = p.z[np.argmin(np.abs(p.z - centre[2]))]
        centre[2] = nearest + rng.uniform(-0.15, 0.15) * p.step  # near a slice, so that sampling keeps its centre
        nodules.append(draw_nodule(rng, p, kind, centre, radius))
    return nodules


# Rendering in HU, by the painter's rule: what comes later covers. g is the pixel grid of one series.


def make_grid(p, name, size, fov_mm):
    """A series: its UIDs, pixel positions x [1, W] and y [H, 1] (float32), and warped ones wx, wy [H, W]."""
    g = SimpleNamespace(size=size, px=round(fov_mm / size, 4), series=make_uid(p.seed, p.number, name))
    g.sops = [make_uid(p.seed, p.number, name, index) for index in range(len(p.z))]
    half = (size - 1) / 2 * g.px
    g.corner = np.array([-half, 6 - half])  # centre of the first pixel; the table below takes some room
    g.x = (g.corner[0] + g.px * np.arange(size)).astype(np.float32)[None]
    g.y = (g.corner[1] + g.px * np.arange(size)).astype(np.float32)[:, None]
    g.wx, g.wy = warp(p, g.x, g.y)
    g.outside = g.x**2 + (g.y - 6) ** 2 > (size / 2 * g.px) ** 2  # of the circular field of view
    return g


def box_pixels(g, x0, x1, y0, y1):
    """(rows, columns) that a box in mm covers, cut at the border of the image."""
    low = np.floor((np.array([y0, x0]) - g.corner[::-1]) / g.px).astype(int)
    high = np.ceil((np.array([y1, x1]) - g.corner[::-1]) / g.px).astype(int) + 1
    return tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(low.tolist(), high.tolist()))


def paint(image, hu, cover):
    image += (hu - image) * cover


def fill(image, hu, distance, px):
    """Paint the inside of a distance, its edge one pixel wide; returns the share of each pixel that was covered."""
    cover = np.clip(0.5 - distance / px, 0, 1)
    paint(image, hu, cover)
    return cover


def cover_capsules(tubes, g, z):
    """Share of each pixel of slice z that the capsules fill, [H, W]."""
    out = np.zeros(g.size * g.size, np.float32)
    reach = tubes[:, 6:].max(1) + g.px
    near = (tubes[:, [2, 5]].min(1) - reach < z) & (tubes[:, [2, 5]].max(1) + reach > z)
    c, reach = tubes[near], reach[near, None]
    axis = c[:, 3:6] - c[:, :3]
    rise = np.where(np.abs(axis[:, 2:]) < 1e-3, 1e-3, axis[:, 2:])
    cut = np.clip(np.sort((z - c[:, 2:3] + np.concatenate([-reach, reach], 1)) / rise, 1), 0, 1)  # near this slice
    ends = c[:, None, :2] + cut[:, :, None] * axis[:, None, :2]
    first = np.floor((ends.min(1) - reach - g.corner) / g.px).astype(int)
    last = np.ceil((ends.max(1) + reach - g.corner) / g.px).astype(int)
    patches = 2 ** np.ceil(np.log2(np.maximum((last - first).max(1, initial=0) + 1, 8))).astype(int)
    for patch in np.unique(patches):  # one batch per patch size: 10 times as fast as one capsule at a time
        q, a, corner = c[patches == patch], axis[patches == patch], first[patches == patch]
        col, row = corner[:, 0, None, None] + np.arange(patch), corner[:, 1, None, None] + np.arange(patch)[:, None]
        dx = (g.corner[0] + col * g.px - q[:, 0, None, None]).astype(np.float32)
        dy = (g.corner[1] + row * g.px - q[:, 1, None, None]).astype(np.float32)
        dz = np.float32(z) - q[:, 2, None, None]
        ax, ay, az = (a[:, i, None, None] for i in range(3))
        t = np.clip((dx * ax + dy * ay + dz * az) / (ax * ax + ay * ay + az * az + 1e-6), 0, 1)
        distance = np.sqrt((dx - t * ax) ** 2 + (dy - t * ay) ** 2 + (dz - t * az) ** 2)
        radius = q[:, 6, None, None] + t * (q[:, 7] - q[:, 6])[:, None, None]
        cover = np.clip((radius - distance) / g.px + 0.5, 0, 1) * np.minimum(1, 2 * radius / g.px)  # thin ones fade
        seen = (cover > 0) & (col >= 0) & (col < g.size) & (row >= 0) & (row < g.size)
        np.maximum.at(out, (row * g.size + col)[seen], cover[seen])
    return out.reshape(g.size, g.size)


def sample_texture(p, g, z, pitch_mm):
    """A plane of the patient's periodic noise, stretched to pitch_mm per node, about unit variance, [H, W]."""

    def nodes(at, count):
        low = np.floor(at / pitch_mm).astype(int)
        return low % count, (low + 1) % count, np.float32(at / pitch_mm - low)

    (k0, k1, fz), (r0, r1, fy), (c0, c1, fx) = map(nodes, (z, g.y[:, 0], g.x[0]), p.texture.shape)
    plane = p.texture[k0] * (1 - fz) + p.texture[k1] * fz
    plane = plane[r0] * (1 - fy[:, None]) + plane[r1] * fy[:, None]
    return plane[:, c0] * (1 - fx) + plane[:, c1] * fx


def paint_chest_wall(image, p, g, body, cage, fine, coarse):
    """Skin, fat, muscle with fat between the muscles; what lies inside the cage starts as fat."""
    fill(image, 10, body, g.px)
    fill(image, FAT + 6 * coarse, body + 2.2, g.px)
    under_skin = p.fat * (1 + 0.25 * coarse) + 8 * np.clip(-g.wy / 60 - 0.4, 0, 1) * (p.breast > 0)
    fill(image, MUSCLE + 4 * fine, np.maximum(body + under_skin, 3 - cage), g.px)
    gaps = np.minimum(np.abs(cage - 14 - 4 * coarse) / 0.8, np.abs(coarse + 0.3 * fine + 0.02 * g.wy) / 0.07) < 1
    paint(image, -60, 0.8 * gaps * ((body + under_skin < -2) & (cage > 10)))
    fill(image, FAT, cage, g.px)


def paint_bones(image, p, g, z, cage):
    """Ribs, breastbone and shoulder blades: dense outside, spongy inside."""
    x, y, side = g.wx, g.wy, np.abs(g.wx)
    phase, spacing, drop = p.ribs
    turn = np.arctan2(side, y + 9) / np.float32(np.pi)  # 0 at the spine, 1 at the breastbone
    height = (z + drop * turn + phase + 6 * np.sign(x)) % spacing - spacing / 2  # above the nearest rib
    rib = (np.sqrt(((cage - 4.5) / 3.6) ** 2 + (height / 5.5) ** 2) - 1) * 3.6
    fill(image, np.where(turn > 0.8, 110, 1150 - 900 * np.clip(-rib - 1, 0, 1)), rib, g.px)  # cartilage in front
    sternum = ellipse(x, y, 0, -16 - p.cage_depth * (1 - 0.3 * narrowing(z)), 19 + 0.06 * z, 5.5)
    fill(image, 950 - 700 * np.clip((-sternum - 1) / 1.5, 0, 1), sternum, g.px)
    if z > -35:
        tip, y0 = np.clip((z + 35) / 60, 0.1, 1), p.cage_depth - 4
        blade = bar(side, y, p.cage_width + 4 - 45 * tip, y0, p.cage_width + 9, y0 - 62 * tip, 2.6)
        fill(image, 850 - 450 * np.clip(-blade - 1.2, 0, 1), blade, g.px)


def paint_spine(image, p, g, z, fine):
    """One vertebra and one disc every 27 mm, with arch, processes and canal."""
    sy, window = p.spine_y, box_pixels(g, -56, 56, p.spine_y - 33, p.spine_y + 70)
    image, x, y, side = image[window], g.wx[window], g.wy[window], np.abs(g.wx[window])
    level = float(z + p.ribs[0]) % 27  # 0 to 6: disc
    body = blend(ellipse(x, y, 0, sy, 17.5, 14.5), ellipse(x, y, 0, sy - 2, 15, 13), 2)
    arch = np.minimum(bar(side, y, 10, sy + 14, 13, sy + 20, 4), bar(side, y, 13, sy + 21, 2, sy + 33, 3.2))
    arch = np.minimum(arch, bar(x, y, 0, sy + 33, 0, sy + 47 - 0.5 * level, 3.2))
    if level > 14:
        arch = np.minimum(arch, bar(side, y, 14, sy + 20, 36, sy + 27, 3.6))
    if level < 6:
        fill(image, 85, body, g.px)
    bone = arch if level < 6 else np.minimum(body, arch)
    spongy = 250 if level < 7.5 or level > 25.5 else 790  # end plates are dense all over
    fill(image, 1000 - spongy * np.clip((-bone - 1.2) / 1.5, 0, 1) + 25 * fine[window], bone, g.px)
    fill(image, 25, ellipse(x, y, 0, sy + 21, 9, 8), g.px)


def paint_middle(image, p, g, z):
    """Heart with its fat, great vessels, gullet, liver and left dome; returns what they leave free of each pixel."""
    x, y, px = g.wx, g.wy, g.px
    heart, (along, across) = heart_distance(p, x, y, z), heart_axes(x, y)
    free = 1 - fill(image, FAT, heart - 4, px)
    fill(image, MUSCLE - 8, heart, px)
    groove = np.maximum(np.abs(along + 4 - 0.3 * across) - 3, np.abs(heart + 4) - 9)  # fat around the coronaries
    fill(image, FAT + 15, groove, 3 * px)
    for chamber in CHAMBERS:
        fill(image, p.blood, ellipsoid(along, across, z, *chamber), 3 * px)
    for dome, hu in zip(p.domes, (60 + 0.25 * (p.blood - BLOOD), 50)):
        free *= 1 - fill(image, hu, ellipsoid(x, y, z, *dome), px)
    for tubes, hu in ((GULLET, 38), (GREAT_VESSELS, p.blood)):
        cover = cover_capsules(tubes, g, z)
        paint(image, hu, cover)
        free *= 1 - cover
    return free


def paint_nodule(image, n, p, g, z):
    """The body, averaged over three planes within the slice thickness."""
    half = 1.7 * n.radius + 2
    if abs(z - n.centre[2]) > half + p.step:
        return
    cx, cy, cz = n.centre.tolist()
    window = box_pixels(g, cx - half, cx + half, cy - half, cy + half)
    dx, dy = g.x[:, window[1]] - cx, g.y[window[0]] - cy
    cover, hu = 0, 0
    for dz in (float(z) - cz + p.step * third for third in (-1 / 3, 0, 1 / 3)):
        inside = np.clip(0.5 - nodule_distance(n, dx, dy, dz) / g.px, 0, 1) / 3
        size, (ox, oy, oz) = n.core
        core = np.clip(0.5 - (np.sqrt((dx - ox) ** 2 + (dy - oy) ** 2 + (dz - oz) ** 2) - size) / (1.5 * g.px), 0, 1)
        value = n.density + {"solid": 0, "part-solid": 600 * (core - 1), "calcified": n.chalk * core}[n.texture]
        if n.hole:
            value = value - 950 * np.clip(0.5 - (np.sqrt(dx * dx + dy * dy + dz * dz) - n.hole) / g.px, 0, 1)
        cover, hu = cover + inside, hu + inside * value
    image[window] += hu - image[window] * cover


def render_slice(p, g, z):
    """(HU without blur and noise, distance to the skin) of one slice, both [H, W] float32."""
    z = np.float32(z)  # a float64 would turn every plane into float64
    fine, patchy, coarse = (sample_texture(p, g, z, pitch_mm) for pitch_mm in (2.5, 7, 17))
    body, cage = body_distance(p, g.wx, g.wy, z), cage_distance(p, g.wx, g.wy, z)
    image = np.full((g.size, g.size), AIR, np.float32)
    paint_chest_wall(image, p, g, body, cage, fine, coarse)
    paint_bones(image, p, g, z, cage)
    paint_spine(image, p, g, z, fine)
    heavy = 28 * np.clip(g.wy / 80, -1, 1)  # the lower, dorsal lung holds more blood
    lung = fill(image, LUNG + heavy + 22 * fine + 14 * patchy + 14 * coarse, lung_distance(p, g.wx, g.wy, z), g.px)
    lung *= paint_middle(image, p, g, z)
    fissure = np.abs(g.wy + 0.75 * z - 6 + 6 * np.sin(g.wx / 23) + np.where(g.wx > 0, 6, -4)) * 0.8
    paint(image, -640, lung * np.clip(0.9 - fissure / g.px, 0, 0.7))
    layers = ((p.vessels, p.blood), (widen(p.bronchi, 1, 0.9), 0), (p.bronchi, -960), (p.spicules, 10))
    for tubes, hu in layers:
        paint(image, hu, lung * cover_capsules(tubes, g, z))
    for tubes, hu in ((widen(AIRWAY, 1, 1.5), 40), (AIRWAY, -985)):
        paint(image, hu, cover_capsules(tubes, g, z))
    for n in p.nodules:
        paint_nodule(image, n, p, g, z)
    below = g.y - p.table + g.x**2 / 1500  # the table's top, its edges curved up
    for sheet in (below, below - 26):
        paint(image, -150, np.clip(0.5 - (np.abs(sheet) - 1.3) / g.px, 0, 1) * (np.abs(g.x) < 215))
    return image, body


# The scanner: kernel, noise, storage.


def make_filters(g, scanner):
    """Transfer function of the kernel, and what gives white noise the look of CT noise, [H, W/2+1]."""
    f = np.hypot(np.fft.fftfreq(g.size)[:, None], np.fft.rfftfreq(g.size)) / g.px  # cycles per mm
    kernel = np.exp(-2 * (np.pi * scanner["blur_mm"] * f) ** 2)
    kernel *= 1 + scanner["boost"] * (f / 0.25) ** 2 * np.exp(1 - (f / 0.25) ** 2)
    colour = np.sqrt(f + 0.01) * kernel  # filtered back projection: noise power rises with frequency
    return kernel.astype(np.float32), (colour / np.sqrt((colour**2).mean())).astype(np.float32)


def scan(rng, hu, body, filters, noise_hu):
    """Blurred HU with noise, more of it inside the body, as int32."""
    white = rng.standard_normal(hu.shape, dtype=np.float32) * noise_hu * (0.5 + 0.7 * np.clip(-body / 80, 0, 1))
    both = np.fft.rfft2(hu) * filters[0] + np.fft.rfft2(white) * filters[1]
    return np.rint(np.clip(np.fft.irfft2(both, hu.shape), -1024, 3071)).astype(np.int32)


def make_header(p, g, scanner, name):
    """What all slices of a series share."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if p.number % 3 == 0 else ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    facts = dict(
        SpecificCharacterSet="ISO_IR 100", SOPClassUID=CTImageStorage, Modality="CT", BodyPartExamined="CHEST",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], ImageOrientationPatient=["1", "0", "0", "0", "1", "0"],
        PatientName=p.name, PatientID=p.name, PatientBirthDate="", PatientSex="", ReferringPhysicianName="",
        PatientIdentityRemoved="YES", DeidentificationMethod="synthetic", PatientPosition=p.position,
        StudyInstanceUID=p.study, StudyDate="20000101", StudyTime="", StudyID="", AccessionNumber="",
        SeriesInstanceUID=g.series, SeriesNumber="2", SeriesDescription=name,
        FrameOfReferenceUID=make_uid(p.seed, p.number, "frame"), PositionReferenceIndicator="",
        Manufacturer="DINO-X phantom", ManufacturerModelName=f"scanner {p.number % len(SCANNERS)}",
        SliceThickness=f"{p.step:g}", KVP="120", ConvolutionKernel=scanner["kernel"],
        SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", PixelRepresentation=scanner["signed"],
        BitsAllocated=16, BitsStored=scanner["bits"], HighBit=scanner["bits"] - 1,
        RescaleIntercept=str(scanner["intercept"]), RescaleSlope="1", RescaleType="HU",
    )  # fmt: skip
    for keyword, value in facts.items():
        setattr(ds, keyword, value)
    if scanner["pad"] is not None:
        ds.PixelPaddingValue = scanner["pad"]
    return ds


def write_image(folder, ds, stored, signed, position, spacing, uid, number):
    """One DICOM file whose name tells nothing."""
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    ds.InstanceNumber, ds.ImagePositionPatient = str(number), [f"{v:.4f}" for v in position]
    ds.PixelSpacing, (ds.Rows, ds.Columns) = [f"{v:.4f}" for v in spacing], stored.shape
    ds.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    ds.save_as(folder / f"{hashlib.sha256(uid.encode()).hexdigest()[:8]}.dcm", enforce_file_format=True)


def write_scout(p, g, ds, views, scanner, folder):
    """A frontal localizer of the scanned range: a series of its own in the same folder."""
    rows = np.rint(np.linspace(len(views) - 1, 0, g.size)).astype(int)  # the head comes first
    ds.SeriesInstanceUID, ds.SeriesNumber, ds.SeriesDescription = make_uid(p.seed, p.number, "scout"), "1", "scout"
    ds.ImageType, ds.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "LOCALIZER"], ["1", "0", "0", "0", "0", "-1"]
    position = np.array([g.corner[0], 0, p.z[-1]]) + p.origin
    stored = np.rint(np.array(views)[rows]).astype(np.int32) - scanner["intercept"]
    spacing = (p.step * len(views) / g.size, g.px)
    write_image(folder, ds, stored, scanner["signed"], position, spacing, make_uid(p.seed, p.number, "scout", 0), 1)


def write_series(p, scanner, size, fov_mm, name, out):
    """Render, scan, read and write one series; returns its rows of truth."""
    g = make_grid(p, name, size, fov_mm)
    folder = out / p.name / p.study / g.series
    folder.mkdir(parents=True)
    ds, filters, rng = make_header(p, g, scanner, name), make_filters(g, scanner), stream(p.seed, p.number, name)
    count = len(p.z)
    numbers = (np.arange(count), np.arange(count)[::-1], rng.permutation(count))[p.number % 3] + 1
    views, noise_hu = [], scanner["noise"] * p.dose * np.sqrt(2.5 / p.step)
    for index, z in enumerate(p.z):
        hu = scan(rng, *render_slice(p, g, z), filters, noise_hu)
        views.append(hu.mean(0))
        stored = hu - scanner["intercept"]
        if scanner["pad"] is not None:
            stored[g.outside] = scanner["pad"]
        position = np.array([*g.corner, z]) + p.origin
        write_image(folder, ds, stored, scanner["signed"], position, (g.px, g.px), g.sops[index], numbers[index])
    if p.number % 5 == 2:
        write_scout(p, g, ds, views, scanner, folder)
    return write_readings(p, g, folder)


def write_patient(job):
    """Everything of one patient; returns (slices written, rows of truth)."""
    seed, number, out, slices, size = job
    p, scanner = draw_patient(seed, number, slices), SCANNERS[number % len(SCANNERS)]
    rows = write_series(p, scanner, size, p.fov, "chest", out)
    if number % 10 == 3:  # a second reconstruction of the same scan
        sharp = dict(kernel="EDGE", blur_mm=0.7 * scanner["blur_mm"], noise=1.3 * scanner["noise"])
        rows += write_series(p, scanner | sharp, size, 0.92 * p.fov, "chest edge", out)
    return slices * series_of(number), rows


def series_of(number):
    return 2 if number % 10 == 3 else 1


# The readers. As in LIDC, contour pixels lie just outside the nodule; those of an excluded region (inclusion FALSE)
# are its own border pixels. So a contour pixel never belongs to the nodule.

STEPS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))  # (row, column), clockwise


def grow(mask):
    """Dilation by the four neighbours within the last two axes, whose outermost pixels must be empty."""
    out = mask.copy()
    out[..., 1:, :] |= mask[..., :-1, :]
    out[..., :-1, :] |= mask[..., 1:, :]
    out[..., :, 1:] |= mask[..., :, :-1]
    out[..., :, :-1] |= mask[..., :, 1:]
    return out


def pieces(mask):
    """8-connected components of a plane, each a set of (row, column)."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    while left:
        todo = [min(left)]
        piece = set(todo)
        while todo:
            row, col = todo.pop()
            found = {(row + i, col + j) for i, j in STEPS} & left - piece
            piece |= found
            todo.extend(found)
        left -= piece
        yield piece


def trace(pixels):
    """Border of an 8-connected set as a closed path [(row, column), ...], clockwise, its first point repeated last."""
    path, heading = [min(pixels)], 1
    while True:
        row, col = path[-1]
        first = heading + (6 if heading % 2 else 7)  # clockwise on from the background pixel seen last
        ways = [(k % 8, (row + STEPS[k % 8][0], col + STEPS[k % 8][1])) for k in range(first, first + 8)]
        heading, step = next((way for way in ways if way[1] in pixels), (None, None))
        if step is None:
            return path * 2  # a single pixel
        if len(path) > 2 and path[-1] == path[0] and step == path[1]:
            return path
        path.append(step)


def outline(rng, n, p, g, box, bias):
    """One reader's view of a nodule: masks of its body and of the hole to exclude, both [Z, h, w] within box."""
    dx, dy = g.x[:, box[2]] - n.centre[0], g.y[box[1]] - n.centre[1]
    dz = (p.z[box[0]] - n.centre[2])[:, None, None]
    turn = np.arctan2(dy, dx)
    wobble = sum(rng.normal(0, 0.025) * np.cos(k * turn + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    mask = nodule_distance(n, dx, dy, dz) < n.radius * (bias + rng.normal(0, 0.02) + wobble)
    if not mask.any():  # thinner than a pixel: the one nearest to its centre
        mask[np.abs(dz).argmin(), np.abs(dy).argmin(), np.abs(dx).argmin()] = True
    mask = ~grow(~grow(mask))  # closed: no gap so narrow that the contour cannot enter it
    return mask, mask & (np.sqrt(dx * dx + dy * dy + dz * dz) < n.hole) & (rng.random() < 0.8)


def rate_nodule(rng, n, latent):
    """The nine ratings of LIDC in the order of its XML: the visible facts with a reader's noise."""

    def rate(value, spread=0.5):
        return int(np.clip(np.rint(value + rng.normal(0, spread)), 1, 5))

    rough = (n.margin != "smooth") * (0.4 if n.ambiguous else 1)
    return dict(
        subtlety=rate(3 + n.radius / 4 - (n.texture == "part-solid")),
        internalStructure=4 if n.hole else 1,  # 4 air, 1 soft tissue
        calcification=int(rng.choice([3, 4, 5])) if n.texture == "calcified" else 6,  # 6 absent
        sphericity=rate(4.8 - 5 * (max(n.stretch) - min(n.stretch)) - 2 * n.lobe),
        margin=rate(4.7 - 2.2 * rough),
        lobulation=rate(1.2 + 7 * n.lobe),
        spiculation=rate(1.2 + 3 * n.spicularity),
        texture=rate(3, 0.4) if n.texture == "part-solid" else 5,
        malignancy=rate(latent, 0.55),
    )


def place_xml(p, g, index):
    """Which slice, in the words of both kinds of mark."""
    z_mm = p.z[index] + p.origin[2]
    return f"<imageZposition>{z_mm:.4f} </imageZposition><imageSOP_UID>{g.sops[index]}</imageSOP_UID>"


def roi_xml(p, g, index, path, inclusion=True):
    points = "".join(f"<edgeMap><xCoord>{col}</xCoord><yCoord>{row}</yCoord></edgeMap>" for row, col in path)
    return f"<roi>{place_xml(p, g, index)}<inclusion>{str(inclusion).upper()}</inclusion>{points}</roi>\n"


def contours_xml(p, g, box, body, hole):
    """All rois of one reader's nodule."""
    text = ""
    for index, *planes in zip(range(box[0].start, box[0].stop), body, hole):
        for inclusion, plane in zip((True, False), planes):
            for piece in pieces(plane):
                if inclusion:
                    piece = piece | {(row + i, col + j) for row, col in piece for i, j in STEPS[::2]}
                path = [(row + box[1].start, col + box[2].start) for row, col in trace(piece)]
                text += roi_xml(p, g, index, path, inclusion)
    return text


def pick_readers(rng, chances):
    """Some of the four readers; chances of 1, 2, ... of them."""
    count = rng.choice(len(chances), p=chances) + 1
    return sorted(rng.permutation(4)[:count].tolist())


def voxel(p, g, point):
    """(x, y, z) in mm -> (z, y, x) as fractional indices."""
    x, y = (point[:2] - g.corner) / g.px
    return (point[2] - p.z[0]) / p.step, y, x


def read_nodule(rng, p, g, n, number, biases, sessions):
    """Add what the readers say about a nodule to their sessions; returns its row of truth."""
    at, half = voxel(p, g, n.centre), 1.7 * n.radius + 4 * g.px
    cx, cy, cz = n.centre
    near = np.flatnonzero(np.abs(p.z - cz) < 1.7 * n.radius + p.step).tolist()
    box = (slice(near[0], near[-1] + 1), *box_pixels(g, cx - half, cx + half, cy - half, cy + half))
    latent = 3 if n.ambiguous else (4.4 if n.malignant else 1.6) + rng.normal(0, 0.3)
    readers, masks, ratings = pick_readers(rng, (0.08, 0.12, 0.25, 0.55)), [], []
    for reader in readers:
        if n.kind == "small":
            spot = np.rint(at[1:]).astype(int) + rng.integers(-1, 2, 2)
            body = roi_xml(p, g, round(at[0]), [spot])
        else:
            rated = rate_nodule(rng, n, latent)
            mask, hole = outline(rng, n, p, g, box, biases[reader])
            body = "".join(f"<{key}>{value}</{key}>" for key, value in rated.items())
            body = f"<characteristics>{body}</characteristics>\n{contours_xml(p, g, box, mask, hole)}"
            masks.append(mask & ~hole)
            ratings.append(rated["malignancy"])
        tag = f"<noduleID>{1000 * reader + number}</noduleID>\n"
        sessions[reader] += f"<unblindedReadNodule>{tag}{body}</unblindedReadNodule>\n"
    facts = dict(patient=p.name, study=p.study, series=g.series, nodule=number, diameter_mm=f"{2 * n.radius:.3f}")
    facts |= {key: getattr(n, key) for key in ("kind", "margin", "texture", "pulled")}
    facts |= {key: f"{value:.3f}" for key, value in zip("zyx", at)}
    facts |= {key: f"{value:.3f}" for key, value in zip(("x_mm", "y_mm", "z_mm"), n.centre + p.origin)}
    facts |= dict(malignant=int(n.malignant), ambiguous=int(n.ambiguous), malignancy=" ".join(map(str, ratings)))
    facts |= dict(readers=" ".join(str(reader + 1) for reader in readers), box="", masks="")
    if masks:
        facts["box"] = " ".join(f"{s.start}:{s.stop}" for s in box)
        facts["masks"] = base64.b64encode(np.packbits(masks)).decode()
    return facts


def reader_masks(row):
    """A row of truth.csv -> (masks [readers, z, y, x] bool, slices of their box in the ordered volume)."""
    box = tuple(slice(*map(int, edge.split(":"))) for edge in row["box"].split())
    shape = len(row["readers"].split()), *(s.stop - s.start for s in box)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(row["masks"]), np.uint8), count=np.prod(shape))
    return bits.reshape(shape).astype(bool), box


XML = """<?xml version="1.0" encoding="UTF-8"?>
<LidcReadMessage xmlns="http://www.nih.gov" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" \
xsi:schemaLocation="http://www.nih.gov http://troll.rad.med.umich.edu/lidc/LidcReadMessage.xsd">
<ResponseHeader><Version>1.7</Version><RequestingSite>removed</RequestingSite><ServicingSite>removed</ServicingSite>
<TaskDescription>Second unblinded read</TaskDescription><CtImageFile>removed</CtImageFile>
<SeriesInstanceUid>{series}</SeriesInstanceUid><DateService>2000-01-01</DateService>
<ResponseDescription>1 - Reading complete</ResponseDescription>
<StudyInstanceUID>{study}</StudyInstanceUID></ResponseHeader>
{sessions}</LidcReadMessage>
"""
SESSION = """<readingSession><annotationVersion>3.12</annotationVersion>
<servicingRadiologistID>anonymous</servicingRadiologistID>
{}</readingSession>
"""


def write_readings(p, g, folder):
    """The XML of one series; returns its rows of truth."""
    rng = stream(p.seed, p.number, g.series, "readers")
    biases, sessions = rng.normal(0, 0.04, 4), [""] * 4  # a reader draws all outlines a little wide or tight
    rows = [read_nodule(rng, p, g, n, k, biases, sessions) for k, n in enumerate(p.nodules, start=1)]
    forks = p.vessels[(p.vessels[:, 5] > p.z[0]) & (p.vessels[:, 5] < p.z[-1]), 3:6]
    for k, point in enumerate(forks[rng.integers(0, len(forks), rng.integers(0, 4))]):  # marked, but no nodule
        z, y, x = map(round, voxel(p, g, point))
        locus = f"<locus><xCoord>{x}</xCoord><yCoord>{y}</yCoord></locus>"
        for reader in pick_readers(rng, (0.6, 0.3, 0.1)):
            tag = f"<nonNoduleID>{1000 * reader + 500 + k}</nonNoduleID>"
            sessions[reader] += f"<nonNodule>{tag}{place_xml(p, g, z)}{locus}</nonNodule>\n"
    text = XML.format(series=g.series, study=p.study, sessions="".join(map(SESSION.format, sessions)))
    (folder / f"{p.number % 1000:03d}.xml").write_text(text, newline="\n")
    return rows


# The program.


def prepare(out, force):
    """Make room; --force removes an earlier phantom and nothing else."""
    if out.is_file():
        raise NotADirectoryError(f"--out {out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(f"--out {out} is not empty: name a new folder, or --force to replace an earlier phantom")
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("PHANTOM-*"):
        shutil.rmtree(old)
    (out / "truth.csv").unlink(missing_ok=True)


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/raw"), help="folder to write to; must be new or empty")
    parser.add_argument("--patients", type=positive, default=40, help="number of patients")
    parser.add_argument("--slices", type=within("[8, 1e18]", int), default=32, help="slices per series, at least 8")
    parser.add_argument("--size", type=within("[64, 1e18]", int), default=256, help="pixels per side of a slice")
    parser.add_argument("--seed", type=natural, default=0, help="one seed, one phantom, to the byte")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes; the files stay the same")
    parser.add_argument("--force", action="store_true", help="first remove PHANTOM-* and truth.csv from --out")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    prepare(args.out, args.force)
    numbers = range(1, args.patients + 1)
    jobs = ((args.seed, number, args.out, args.slices, args.size) for number in numbers)
    total = args.slices * sum(map(series_of, numbers))
    nodules = malignant = 0
    unfinished = args.out / ".truth.csv.tmp"  # renamed last: a truth.csv is always whole
    with open(unfinished, "w", newline="") as f, progress(total=total, unit="slice", desc="phantom") as bar_of_slices:
        table = csv.DictWriter(f, TRUTH_COLUMNS)
        table.writeheader()
        for slices, rows in parallel(write_patient, jobs, args.workers):
            table.writerows(rows)
            bar_of_slices.update(slices)
            nodules += sum(row["kind"] == "nodule" for row in rows)
            malignant += sum(row["malignant"] for row in rows)
    os.replace(unfinished, args.out / "truth.csv")
    print(f"{args.out}: {args.patients} patients, {total} slices, {nodules} nodules, {malignant} of them malignant")
    return 0


if __name__ == "__main__":
    run(main)

"""Draw street photographs whose label is decided by small orange cones, barriers and signs: an oracle for photographs.

Streets in perspective, with weather, day and night. Each has two to five orange things; one to three of them are
roadwork if the street is, all others are lookalikes (bins, vests, leaves, parasols, cars, other signs), so orange
alone does not tell the classes apart. A scene is a group of nearly equal frames. labels.csv tells label (after
--flip), truth, place, time and the share of the picture that the objects cover; _labels/masks/ their pixels (1 cone,
2 barrier, 3 sign; no file: none). A picture depends on --seed, --size, --object-share, its scene and its frame alone:
the first pictures stay where more are asked for.

    python tools/make_roadwork.py --out data/street --images 400 --size 378x504
"""

import math
import os
import sys
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from tools.lib.cli import Parser, natural, positive, run, within
from tools.lib.files import csv_text
from tools.lib.progress import progress
from tools.lib.workers import parallel

COLUMNS = "path label group source lat lon time weather daytime street truth objects object_share".split()
LABELS = ("no_roadwork", "roadwork")
TOWNS = ((52.52, 13.40), (48.14, 11.58), (50.94, 6.96), (40.44, -79.99))  # scenes lie within some 20 km of one
GROUND = (72, 100, 48), (96, 96, 98), (148, 144, 138), (226, 226, 220)  # grass, tar, walk, paint on the tar
WET = (72, 100, 48), (58, 60, 64), (112, 110, 108), (226, 226, 220)
SNOW = (214, 218, 224), (150, 152, 156), (206, 208, 212), (172, 174, 178)
# fmt: off
# The first number of each row is its share. A source: gains of red, green, blue; contrast; JPEG quality; camera height.
SOURCES = {"dashcam": (0.5, (1.00, 1.00, 1.00), 1.00, 80, 1.4), "phone": (0.3, (1.05, 1.00, 0.93), 1.15, 85, 1.65),
           "mapper": (0.2, (0.93, 0.99, 1.06), 0.85, 75, 2.3)}
# hours, light, the sky above, the sky at the horizon
DAYTIMES = {"day": (0.65, (9, 16), 1.00, (92, 142, 205), (198, 214, 226)),
            "dusk": (0.15, (19, 20.5), 0.62, (72, 82, 130), (236, 168, 120)),
            "night": (0.20, (22, 27), 0.20, (10, 13, 26), (44, 42, 54))}
# how far one sees in m, how much is cloud, how much light is left, the ground
WEATHERS = {"clear": (0.35, 900, 0.3, 1.0, GROUND), "cloudy": (0.25, 600, 0.9, 0.88, GROUND),
            "rain": (0.2, 260, 1.0, 0.75, WET), "fog": (0.1, 70, 1, 0.92, GROUND), "snow": (0.1, 170, 1, 0.95, SNOW)}
# how often a tree, a lamp, a parked car stands at its place; height of houses and distance from the walk in m
STREETS = {"city": (0.45, (0.3, 0.5, 0.5), (9, 24), (0, 0.5)), "suburb": (0.3, (0.4, 0.4, 0.3), (3.5, 6.5), (4, 7)),
           "country": (0.25, (0.35, 0.1, 0.05), None, None)}
WALLS = ((168, 150, 132), (146, 92, 74), (196, 186, 168), (120, 116, 114), (208, 196, 150), (134, 140, 150))
PAINTS = ((40, 42, 46), (225, 225, 222), (120, 24, 26), (34, 54, 98), (150, 154, 158), (62, 82, 66))
COLOURS = {"orange": (245, 106, 18), "red": (206, 32, 30), "white": (236, 236, 232), "black": (26, 26, 28),
           "grey": (92, 92, 94), "brown": (150, 62, 16), "amber": (255, 168, 30), "yellow": (242, 182, 24),
           "rust": (190, 84, 30), "jeans": (44, 52, 74), "steel": (146, 148, 150), "glass": (56, 66, 76),
           "skin": (196, 152, 124), "lamp": (255, 226, 160), "wood": (74, 58, 44), "shade": (36, 58, 30),
           "leaf": (56, 86, 38), "sunny": (80, 112, 50)}
# kind: code in the mask, height in m, area in heights squared, half width in m; then polygons in hundredths of the
# height: x from the middle, y from the ground. Two points are a box, one with a radius is a disc.
THINGS = {
    "cone": (1, 0.75, 0.23, 0.5, "brown -27,0 27,6; orange -21,6 21,6 3,100 -3,100; white -15,36 15,36 12,50 -12,50; "
             "white -10,64 10,64 7,76 -7,76"),
    "barrier": (2, 1.0, 0.62, 0.9, "grey -72,0 -66,95; grey 66,0 72,95; white -80,50 80,85; amber -69,100,6; "
                "orange -78,50 -58,50 -43,85 -63,85; orange -38,50 -18,50 -3,85 -23,85; orange 2,50 22,50 37,85 17,85; "
                "orange 42,50 62,50 77,85 57,85; orange -80,18 80,24"),
    "sign": (3, 1.7, 0.19, 0.5, "steel -2,0 2,50; steel -17,0 -14,0 0,20 14,0 17,0 0,25; black 0,36 31,67 0,98 -31,67; "
             "orange 0,39 28,67 0,95 -28,67; black 6,79,4; black -2,75 6,75 2,66 10,56 7,55 -3,64 -10,55 -13,56; "
             "black 5,72 14,60 12,59 3,70"),
    "bin": (0, 1.05, 0.5, 0.5, "orange -28,5 28,85; brown -32,85 32,95; black -22,0 -12,8; black 12,0 22,8"),
    "vest": (0, 1.75, 0.16, 0.5, "jeans -10,0 -1,48; jeans 1,0 10,48; jeans -17,42 -10,80; jeans 10,42 17,80; "
             "orange -11,46 11,84; white -11,58 11,62; skin 0,92,7"),
    "leaves": (0, 0.35, 1.1, 0.5, "rust -70,14,16; orange -40,20,16; brown -10,16,16; orange 15,28,16; rust 40,16,16; "
               "orange 70,13,14; amber -25,38,14; rust 25,46,14"),
    "yield": (0, 2.1, 0.1, 0.5, "steel -2,0 2,70; red -24,98 24,98 0,57; white -16,94 16,94 0,66"),
    "curve": (0, 2.1, 0.12, 0.5, "steel -2,0 2,60; black 0,50 24,74 0,98 -24,74; yellow 0,53 21,74 0,95 -21,74; "
              "black -3,62 3,62 3,74 11,84 6,86 -3,77"),
    "parasol": (0, 2.4, 0.24, 1.2, "steel -1,0 1,80; orange -50,72 50,72 0,100; white -17,72 17,72 0,100"),
    "car": (0, 1.45, 0.95, 1.4, "black -57,0 -38,20; black 38,0 57,20; paint -62,18 62,60; glass -56,60 56,60 47,98 "
            "-47,98; paint -48,95 48,101; red -58,42 -40,52; red 40,42 58,52; white -18,28 18,37"),
    "lamp": (0, 5.6, 0, 0.3, "grey -1,0 1,98; lamp 0,98,3"),
    "tree": (0, 5.0, 0, 1.2, "wood -2,0 2,70; shade -15,58,9; shade 12,60,10; shade 0,55,10; leaf -20,68,10; "
             "leaf 20,70,9; leaf -4,66,12; leaf 8,72,12; sunny -10,78,10; leaf 2,84,10; sunny -3,90,8; sunny 12,82,7")}
# fmt: on
OBJECTS = "cone barrier sign".split()
LOOKALIKES = "bin vest leaves yield curve parasol car".split()


@lru_cache
def shapes_of(kind):
    """[(colour name, points in heights)] of a row of THINGS."""
    found = []
    for colour, *points in map(str.split, THINGS[kind][4].split("; ")):
        at = [[int(n) / 100 for n in point.split(",")] for point in points]
        found.append((colour, ring(*at[0]) if len(at) == 1 else box(*at[0], *at[1]) if len(at) == 2 else at))
    return found


def ring(x, y, r, n=9):
    return [(x + r * math.cos(2 * math.pi * k / n), y + r * math.sin(2 * math.pi * k / n)) for k in range(n)]


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


# What there is. A thing is (kind, x, z, height, colour, more): x m to the right of the middle of the road, z m ahead.


def pick(rng, table):
    shares = np.array([row[0] for row in table.values()])
    return list(table)[rng.choice(len(shares), p=shares / shares.sum())]


@lru_cache(maxsize=2)  # frames of one scene follow each other
def make_scene(seed, number, height, width, shares, easy=False):
    """Of two scenes that follow each other the truths are opposite and the source is one: both classes are balanced."""
    pair, rng = np.random.default_rng((seed, 1, number // 2)), np.random.default_rng((seed, 2, number))
    s = SimpleNamespace(source=pick(pair, SOURCES), truth=int(pair.integers(2)) ^ (number % 2))
    s.street, s.weather, s.daytime = pick(rng, STREETS), pick(rng, WEATHERS), pick(rng, DAYTIMES)
    s.focal, s.horizon, s.tall = 0.9 * max(width, 0.75 * height), rng.uniform(0.43, 0.5), SOURCES[s.source][-1]
    s.lane, s.walk = rng.uniform(3.2, 4.6), rng.uniform(1.8, 3.0)  # half the road, width of a walk
    day = datetime(2025, 1 if s.weather == "snow" else int(rng.integers(4, 11)), int(rng.integers(1, 28)))
    s.time = day + timedelta(hours=rng.uniform(*DAYTIMES[s.daytime][1]))
    s.place, s.known = TOWNS[rng.integers(len(TOWNS))] + rng.normal(0, 0.08, 2), rng.random(2) > (0.25, 0.15)
    s.look, s.patches = rng.random(3), rng.uniform((-1, 3, 0.3, 0.4), (1, 40, 1.5, 6), (5, 4))
    orange, others = orange_things(rng, s, height, width, shares), []
    orange = [thing for thing in orange if thing[0] in OBJECTS] if easy else orange
    for kind, often, x in zip(("tree", "lamp", "car"), STREETS[s.street][1], (s.walk * 0.8, 0.4, -1)):
        places = [(side * (s.lane + x), z + rng.uniform(0, 4)) for z in range(4, 130, 9) for side in (-1, 1)]
        others += [(kind, *at) for at in places if rng.random() < often]
    others += [("car", x, rng.uniform(9, 70)) for x in (s.lane / 2, -s.lane / 2)]  # in traffic
    looks = [(rng.uniform(0.6, 1.4) if a[0] == "tree" else 1, PAINTS[rng.integers(6)]) for a in others]
    s.things = [(*a, grow * THINGS[a[0]][1], paint, 0) for a, (grow, paint) in zip(others, looks)]
    s.things = [a for a in s.things if not any(hides(a, b) for b in orange)] + orange
    s.things += houses(rng, s) if s.street != "country" else []
    return s


def orange_things(rng, s, height, width, shares):
    """Two to five things, as far away as gives them their share of the picture."""
    number, real = int(rng.integers(2, 6)), int(rng.integers(1, 4))
    share = math.exp(rng.uniform(*np.log(shares))) / min(real, number)
    least = s.focal * s.tall / (height * (0.97 - s.horizon))  # nearer ground is below the picture
    found = []
    for k in range(number):
        kinds = OBJECTS if s.truth and k < real else LOOKALIKES
        kind = kinds[rng.integers(len(kinds))]
        code, tall, area, *_ = THINGS[kind]
        tall *= rng.uniform(0.85, 1.15)
        z = s.focal * tall * math.sqrt(area / (share * height * width)) + 0.1 * k
        tall, z = tall * max(1, least / z), max(z, least)
        reach = max(min(0.44 * width * z / s.focal - tall * 0.6, s.lane + s.walk * 0.7), 0)
        for x in rng.uniform(-reach, reach, 30):
            thing = kind, x, z, tall, COLOURS["orange"], code
            if not any(hides(thing, other) or hides(other, thing) for other in found):
                found.append(thing)
                break  # without a free place it is left out
    return found


def hides(a, b):
    """Whether a thing stands before another, or almost."""
    near = sum(THINGS[kind][3] * tall / THINGS[kind][1] / z for kind, _, z, tall, *_ in (a, b))  # half their widths
    return a[2] < b[2] + 2 and abs(a[1] / a[2] - b[1] / b[2]) < near


def houses(rng, s):
    """("house", x of the facade, z of its far end, height, colour, (z of its near end, seed of its windows))"""
    found, (low, high), away = [], *STREETS[s.street][2:]
    for side in (-1, 1):
        z = rng.uniform(-8, 2)
        while z < 160:
            deep, paint = rng.uniform(9, 20), [c * rng.uniform(0.85, 1.1) for c in WALLS[rng.integers(6)]]
            x = side * (s.lane + s.walk + rng.uniform(*away))
            found.append(("house", x, z + deep, rng.uniform(low, high), paint, (z, int(rng.integers(1 << 30)))))
            z += deep + away[0]
    return found


# How it looks. v is the view of one frame: where the camera is, how colours come out, what is drawn on.


def shade(v, colour, z=0.0, own=0.0):
    """A colour in the light of the hour, z m away in the haze, as the source records it; own: how much it glows."""
    clear = math.exp(-max(z, 0) / v.sight)
    light = clear * max(v.light, own, 0.75 * math.exp(-z / 22) if v.night else 0)  # headlights
    seen = [(c * light + h * (1 - clear)) * g for c, h, g in zip(colour, v.haze, v.gains)]
    return tuple([min(max(int((c - 110) * v.contrast + 110 * v.exposure), 0), 238) for c in seen])  # room for grain


def face(v, points, colour, code=0):
    """A polygon [(x, y up, z ahead)] in m; what it covers is no longer seen, in the mask too."""
    flat = []
    for x, y, z in points:
        k = v.focal / max(z - v.z, 0.6)
        flat += v.cx + (x - v.x) * k, v.cy - (y - v.y) * k
    v.draw.polygon(flat, fill=colour)
    if v.mask:
        v.mask.polygon(flat, fill=code)


def upright(v, x, z, points, colour, code=0):
    face(v, [(x + a, b, z) for a, b in points], colour, code)


def ground(v, x0, x1, z0, z1, colour):
    face(v, [(x, 0, z) for x, z in box(x0, z0, x1, z1)], colour)


def wall(v, x, z0, z1, y0, y1, colour):
    """A face along the road."""
    face(v, [(x, y, z) for z, y in box(z0, y0, z1, y1)], colour)


def draw_sky(v, s):
    """At a quarter of the size, since it is smooth: a resize of 3 megapixels takes longer than all the rest."""
    top, low, cloud = *DAYTIMES[s.daytime][3:], WEATHERS[s.weather][2]
    w, h = v.image.width // 4 + 1, int(v.cy) // 4 + 1
    at = [int(share * n) for share, n in zip(s.look, (w, h))]
    veil = textures(v.image.height, v.image.width)[1 + (cloud > 0.5)][at[1] : at[1] + h, at[0] : at[0] + w, None]
    slope = np.linspace(0, 1, h)[:, None, None] ** 1.5
    sky = np.array(top) * (1 - slope) + np.array(low) * slope  # [h, 1, 3]
    sky = sky + (sky.mean(2, keepdims=True) - sky) * cloud**3 * 0.8  # an overcast sky has no colour of its own
    sky = sky + (np.array(v.haze) * 0.8 + 45 * v.light - sky) * veil
    sky = ((sky * v.gains - 110) * v.contrast + 110 * v.exposure).clip(0, 238).astype(np.uint8)
    v.image.paste(Image.fromarray(sky).resize((4 * w, 4 * h), Image.Resampling.NEAREST))
    x = np.linspace(0, 1, 30)
    hills = zip(1200 * x - 600, 8 + 6 * np.sin(9 * x + s.look[1] * 7) + 3 * np.sin(47 * x), [600] * 30)
    face(v, [(-600, -9, 600), *hills, (600, -9, 600)], shade(v, (84, 98, 88), 400))


def draw_ground(v, s):
    grass, tar, walk, paint = WEATHERS[s.weather][4]
    depths = [900, *np.geomspace(300, 2.5, 24), 0]
    for far, z in zip(depths, depths[1:]):  # the haze thickens with the distance
        ground(v, -500, 500, z, far, shade(v, grass, z))
        if s.street != "country":
            ground(v, -s.lane - s.walk, s.lane + s.walk, z, far, shade(v, walk, z))
            ground(v, -s.lane - 0.15, s.lane + 0.15, z, far, shade(v, [c * 1.15 for c in walk], z))
        ground(v, -s.lane, s.lane, z, far, shade(v, tar, z))
    for k, (x, z, w, deep) in enumerate(s.patches):  # where the road was mended
        x = x * (s.lane - 1) - w / 2
        ground(v, x, x + w, z, z + deep, shade(v, [c * (0.84 + 0.07 * k) for c in tar], z))
    for z in range(0, 110, 6):
        ground(v, -0.07, 0.07, z + 1, z + 4, shade(v, paint, z))
    for x in np.arange(-s.lane + 0.4, s.lane - 0.5, 1.0) if s.look[2] < 0.25 else ():  # a zebra crossing
        ground(v, x, x + 0.5, 15, 18, shade(v, paint, 15))


def draw_house(v, s, thing):
    _, x, z1, tall, paint, (z0, seed) = thing
    z0, side, rng = max(z0, v.z + 0.8), math.copysign(1, x), np.random.default_rng(seed)
    if z1 < z0 + 1:
        return
    upright(v, x, z0, box(0, 0, side * 12, tall), shade(v, paint, z0))
    if s.street == "suburb":  # a roof
        low, top = (x - side * 0.4, tall), (x + side * 4, tall + 2.6)
        upright(v, 0, z0, [low, top, (x + side * 9, tall)], shade(v, paint, z0))
        face(v, [(*low, z0), (*top, z0), (*top, z1), (*low, z1)], shade(v, [c * 0.6 for c in WALLS[1]], z0))
    wall(v, x, z0, z1, 0, tall, shade(v, [c * 0.86 for c in paint], z0))
    panes = [shade(v, COLOURS["glass"], z0), shade(v, (250, 206, 120), z0, own=0.95)]  # dark, lit
    shop, x = 3.4 if s.street == "city" else 0, x - side * 0.02
    for z in np.arange(z0 + 0.8, z1 - 2.6, 4.2) if shop else ():
        wall(v, x, z, z + 3, 0.5, 2.7, panes[int(v.night and rng.random() < 0.6)])
    for y in np.arange(shop + 0.9, tall - 1.6, 3.0) if z0 < 90 else ():
        for z in np.arange(z0 + 1.0, z1 - 1.3, 2.7):
            wall(v, x, z - 0.12, z + 1.32, y - 0.12, y + 1.72, shade(v, [c * 1.15 for c in paint], z))
            wall(v, x, z, z + 1.2, y, y + 1.6, panes[int(v.night and rng.random() < 0.3)])


def draw_thing(v, s, thing):
    kind, x, z, tall, paint, code = thing
    if kind == "car":  # what we see of it but its back
        ground(v, x - 1.05, x + 1.05, z - 0.3, z + 4.3, shade(v, [c * 0.55 for c in WEATHERS[s.weather][4][1]], z))
        side = math.copysign(tall * 0.6, v.x - x)
        for w in (z + 0.9, z + 3.3):
            face(v, [(x + side, 0.3 + b, w + a) for a, b in ring(0, 0, 0.32)], shade(v, COLOURS["black"], z))
        wall(v, x + side, z, z + 4.2, 0.3, 0.87 * tall / 1.45, shade(v, [c * 0.7 for c in paint], z))
        wall(v, x + side * 0.8, z, z + 3, 0.6 * tall, 0.97 * tall, shade(v, (44, 52, 60), z))
    looks, mirror = {**COLOURS, "paint": paint}, math.copysign(1, x) if kind == "tree" else 1
    if kind == "tree" and s.weather == "snow":
        looks |= {"shade": (150, 154, 160), "leaf": (186, 190, 196), "sunny": (212, 216, 220)}
    for colour, points in shapes_of(kind):
        glow = {("lamp", "lamp"): v.night, ("car", "red"): 0.5}.get((kind, colour), 0)
        at = [(mirror * a * tall, b * tall) for a, b in points]
        upright(v, x, z, at, shade(v, looks[colour], z, glow), code)


@lru_cache(maxsize=2)
def textures(height, width):
    """Equal for all pictures: grain uint8 [h, w, 3]; thin and thick clouds; all larger than a picture needs."""
    rng = np.random.default_rng(7)
    h, w = height + height // 8, width + width // 8
    grain = rng.normal(8, 1.8, (h, w)) + np.kron(rng.normal(0, 1.2, (h // 3 + 1, w // 3 + 1)), np.ones((3, 3)))[:h, :w]
    field = np.zeros((height // 2 + 9, width // 2 + 9))
    for octave in (6, 12, 24, 48):
        noise = Image.fromarray(rng.random((octave, octave)).astype(np.float32))
        field += np.asarray(noise.resize(field.shape[::-1], Image.Resampling.BICUBIC)) / octave
    field = ((field - field.min()) / np.ptp(field)).astype(np.float32)
    thin, thick = (np.clip((field - low) * gain, 0, 0.88) for low, gain in ((0.52, 2.7), (0.3, 1.6)))
    return np.repeat(np.clip(grain, 0, 16).astype(np.uint8)[..., None], 3, 2), thin, thick


def draw_frame(seed, number, frame, s, height, width):
    """-> (picture, mask or None, share of the picture that the objects cover)."""
    rng = np.random.default_rng((seed, 3, number, frame))
    k = max(1, round(1000 / width))  # small pictures are drawn larger and reduced
    H, W = height * k, width * k
    image, mask = Image.new("RGB", (W, H)), Image.new("P", (W, H)) if s.truth else None
    (_, _, light, _, haze), (_, sight, cloud, left, _) = DAYTIMES[s.daytime], WEATHERS[s.weather]
    v = SimpleNamespace(image=image, draw=ImageDraw.Draw(image), mask=mask and ImageDraw.Draw(mask), focal=s.focal * k)
    v.x, v.y, v.z = (0, s.tall, 0.06 * frame) + rng.normal(0, 1, 3) * (0.04, 0.01, 0.02)
    v.cx, v.cy = W * (0.5 + rng.normal(0, 0.003)), H * (s.horizon + rng.normal(0, 0.002))
    v.gains, v.contrast, v.exposure, v.sight = *SOURCES[s.source][1:3], rng.uniform(0.96, 1.04), sight
    v.night, v.light = s.daytime == "night", light * left
    v.haze = [c + (sum(haze) / 3 - c) * cloud for c in haze]
    draw_sky(v, s)
    draw_ground(v, s)
    for thing in sorted(s.things, key=lambda thing: -thing[2]):
        (draw_house if thing[0] == "house" else draw_thing)(v, s, thing)
    for x, y, r in rng.random((300, 3)) * (W, H, W / 600) if s.weather in ("rain", "snow") else ():  # not in the mask
        if s.weather == "rain":
            v.draw.line((x, y, x - 3 * r, y + 14 * r), fill=shade(v, (188, 194, 202), 60), width=max(1, W // 1400))
        else:
            v.draw.ellipse((x - r, y - r, x + r, y + r), fill=shade(v, (240, 240, 244), 20))
    share = 1 - mask.histogram()[0] / (W * H) if mask else 0.0
    if k > 1:
        image, mask = image.reduce(k), mask and mask.resize((width, height), Image.Resampling.NEAREST)
    grain = textures(H, W)[0]
    y, x = (int(rng.integers(a - b + 1)) for a, b in zip(grain.shape, (height, width)))
    pixels = np.array(image)
    pixels += grain[y : y + height, x : x + width]
    return Image.fromarray(pixels), mask, share


# On disk.


def write_picture(job):
    """Draw and write one picture -> its row of labels.csv. EXIF has the time, and the place where it is known."""
    out, index, seed, frames, (height, width), shares, flip, easy = job
    number, frame = divmod(index, frames)
    s = make_scene(seed, number, height, width, shares, easy)
    image, mask, share = draw_frame(seed, number, frame, s, height, width)
    name, place = f"images/{s.source}/scene{number:06d}_{frame}", np.round(s.place + (0, 1e-6 * frame), 6).tolist()
    paths = out / f"{name}.jpg", out / "_labels" / "masks" / f"{name}.png"
    for path in paths[: 2 if mask else 1]:
        path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x8769] = {0x9003: s.time.strftime("%Y:%m:%d %H:%M:%S")}
    if s.known[0]:
        degrees = [(int(a), int(a * 60 % 60), round(a * 3600 % 60, 3)) for a in map(abs, place)]
        exif[0x8825] = {1: "NS"[place[0] < 0], 2: degrees[0], 3: "EW"[place[1] < 0], 4: degrees[1]}
    image.save(paths[0], quality=SOURCES[s.source][3], exif=exif)
    if mask:
        mask.putpalette([0, 0, 0, *COLOURS["orange"], *COLOURS["red"], *COLOURS["white"]])
        mask.save(paths[1], compress_level=1)
    label = s.truth ^ int(np.random.default_rng((seed, 4, number, frame)).random() < flip)
    where = [f"{degrees:.6f}" if s.known[0] else "" for degrees in place]
    row = [f"{name}.jpg", LABELS[label], f"scene{number:06d}", s.source, *where, s.time.isoformat(timespec="seconds")]
    row += [s.weather if s.known[1] else "", s.daytime, s.street, LABELS[s.truth]]
    return [*row, sum(thing[0] in OBJECTS for thing in s.things), f"{share:.6f}"]


def size(text):
    """argparse type: 1512x2016 is (height, width)."""
    height, width = map(int, text.lower().split("x"))
    return height, width


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder to write to; must be new or empty")
    p.add_argument("--images", type=positive, default=400, help="number of pictures")
    p.add_argument("--frames-per-scene", type=positive, default=4, help="nearly equal pictures of one street")
    p.add_argument("--size", type=size, default=(3024, 4032), help="height x width of a picture, at least 64x64")
    p.add_argument("--object-share", type=within("(0, 0.1]"), nargs=2, default=(0.0005, 0.01), metavar=("LOW", "HIGH"),
                   help="share of a picture that its objects cover together, uniform in the logarithm")  # fmt: skip
    p.add_argument("--flip", type=within("[0, 0.5)"), default=0.0, help="share of wrong labels; truth stays right")
    p.add_argument("--easy", action="store_true", help="no lookalikes: what is orange is roadwork; for smoke tests")
    p.add_argument("--seed", type=natural, default=0, help="one seed, the same pictures to the byte")
    p.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes; the files stay the same")
    return p


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    (height, width), (low, high), out = args.size, args.object_share, args.out
    if min(args.size) < 64:
        parser.error(f"argument --size: each side at least 64, got {height}x{width}")
    if not 10 / (height * width) <= low <= high <= 0.1:
        parser.error(f"argument --object-share: from {10 / height / width:.2g} (10 pixels) to 0.1, got {low} {high}")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is there and not empty: name a new folder")
    frames, fixed = args.frames_per_scene, (args.size, (low, high), args.flip, args.easy)
    jobs = ((out, i, args.seed, frames, *fixed) for i in range(args.images))
    drawn = parallel(write_picture, jobs, args.workers, chunk=frames)
    rows = list(progress(drawn, total=args.images, unit="picture", desc="streets"))
    write_text(out / "labels.csv", csv_text([COLUMNS, *rows]))  # last: a labels.csv is always whole
    flipped, positives = sum(row[1] != row[10] for row in rows), sum(row[10] == LABELS[1] for row in rows)
    scenes = len({row[2] for row in rows})
    print(f"{out}: {len(rows)} pictures of {scenes} scenes, {positives} of them roadwork; {flipped} labels are wrong")
    return 0


if __name__ == "__main__":
    run(main)

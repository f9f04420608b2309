"""Supervised augmentation of photographs: rows of a table, drawn from (seed, step, sample), applied on the device.

    row = find_row("light:rotate=10")
    draws = draw(seed, step, ids, row)                      # small arrays; a function of their arguments alone
    boxes, margins = place(draws, sizes)                    # what to cut of each picture, and the view inside that
    cuts = data.cut(images, boxes[None], ..., cut_size(row, 224))[0] / 255
    views = look(cuts, draws, margins, 224)                 # [B, 3, 224, 224] in 0..1
    views, targets = mix(views, targets, draws)             # targets are rows of probabilities

Letters: B pictures, C classes. `u` are uniform numbers in 0..1 of one sample.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import data
from data import grey, rng, send, shift_hue


class Row(NamedTuple):
    """One way to augment; every value has a test that it changes the picture."""

    scale: float = 0.08  # smallest share of the picture that is cut
    ratio: float = 4 / 3  # largest aspect of the cut
    flip: float = 0.5  # probability
    jitter: float = 0.0  # strength of brightness, contrast, saturation, and a quarter of it for hue
    brightness: float = 0.0  # largest further change, up or down
    contrast: float = 0.0
    rotate: float = 0.0  # largest angle, in degrees
    blur: float = 0.0  # probability
    erase: float = 0.0  # probability of a grey rectangle over 2% to 33% of the view
    trivial: int = 0  # 1: one operation of TRIVIAL (TrivialAugment, arXiv:2103.10158)
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); with cutmix: one of the two for each batch
    cutmix: float = 0.0


ROWS = {
    "none": Row(scale=1.0, ratio=1.0, flip=0.0),
    "crop": Row(),
    "light": Row(scale=0.35, jitter=0.2, rotate=5, blur=0.1),
    "strong": Row(jitter=0.4, brightness=0.2, contrast=0.2, rotate=15, blur=0.1, erase=0.1, mixup=0.2, cutmix=1.0),
    "trivial": Row(scale=0.35, trivial=1, erase=0.1),
}
LIMITS = dict(scale=(0.01, 1), ratio=(1, 4), rotate=(0, 45), jitter=(0, 1), brightness=(0, 1), contrast=(0, 1))
LIMITS |= dict.fromkeys(("flip", "blur", "erase", "trivial"), (0, 1)) | dict.fromkeys(("mixup", "cutmix"), (0, 10))
NUMBERS = 22  # uniform numbers per sample


def find_row(text):
    """`light` or `light:rotate=10,erase=0.2` -> Row."""
    name, _, rest = text.partition(":")
    if name not in ROWS:
        raise ValueError(f"--aug {text}: no {name!r}; known are {', '.join(ROWS)}")
    row = ROWS[name]
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            number = type(Row._field_defaults[key])(value)
            if not LIMITS[key][0] <= number <= LIMITS[key][1]:
                raise ValueError
        except (ValueError, KeyError):
            known = ", ".join(f"{k} {a:g} to {b:g}" for k, (a, b) in LIMITS.items())
            raise ValueError(f"--aug {text}: {part!r} is not one of {known}") from None
        row = row._replace(**{key: number})
    return row


class Draws(NamedTuple):
    """What was drawn for B pictures of one update."""

    row: Row
    u: np.ndarray  # [B, NUMBERS] of each picture, by its id
    partner: np.ndarray  # [B] whom it is mixed with
    batch: np.ndarray  # [4] of the whole batch: which of the two, and where CutMix cuts
    share: float  # of itself that a mixed picture keeps, before CutMix clips


def draw(seed, step, ids, row):
    """All choices for these pictures in this update; partners and shares belong to the batch, so all ids are given."""
    u = np.stack([rng(seed, "augment", step, int(i)).random(NUMBERS) for i in ids])
    random = rng(seed, "mix", step)
    partner, batch = random.permutation(len(ids)), random.random(4)
    alpha = (row.cutmix if use_cutmix(row, batch) else row.mixup) or 1.0
    return Draws(row, u, partner, batch, float(random.beta(alpha, alpha)))


def use_cutmix(row, batch):
    return row.cutmix > 0 and (row.mixup == 0 or batch[0] < 0.5)


def reach(row):
    """Side of the square that holds a turned one of side 1, whatever the angle."""
    turn = math.radians(row.rotate)
    return math.cos(turn) + math.sin(turn)


def cut_size(row, size):
    """Pixels of a cut whose inner part, the view, keeps its resolution."""
    return math.ceil(size * reach(row))


def place(draws, sizes):
    """Pictures of (height, width) [B, 2] -> boxes to cut [B, 4], and the view inside each as a share of it [B, 4].

    A turned view needs more than its box: the cut has a margin, as far as the picture reaches.
    """
    row, u, sizes = draws.row, draws.u, np.asarray(sizes, np.float64)
    area = sizes.prod(1) * (row.scale + u[:, 0] * (1 - row.scale))
    aspect = np.exp((2 * u[:, 1] - 1) * np.log(row.ratio))
    whole = row.scale == 1 and row.ratio == 1
    sides = sizes if whole else np.minimum(np.sqrt(np.stack([area / aspect, area * aspect], 1)).round().clip(1), sizes)
    start = np.floor(u[:, 2:4] * (sizes - sides + 1)).clip(0, sizes - sides)
    view = np.concatenate([start, start + sides], 1)
    margin = (reach(row) - 1) / 2 * sides
    low, high = np.floor((start - margin).clip(0)), np.ceil(np.minimum(start + sides + margin, sizes))
    return np.concatenate([low, high], 1), (view - np.tile(low, 2)) / np.tile(high - low, 2)


def signed(u):
    return 2 * u - 1


def column(values, like):
    """[B] or [B, k] -> on the device of `like`, to broadcast against [B, 3, h, w]."""
    t = send(torch.as_tensor(np.asarray(values), dtype=torch.float32), like.device)
    return t.reshape(len(t), -1, 1, 1)


def resample(x, matrices, size):
    """[B, 3, h, w] through maps [B, 2, 3] from places in the result to places in x, both -1 .. 1; mirrored outside."""
    grid = F.affine_grid(matrices, (len(x), x.shape[1], size, size), align_corners=False)
    return F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)


def turned(draws, margins, device):
    """Maps from a view to its cut: turned by the drawn angle, mirrored where drawn, without the margin."""
    row, u = draws.row, draws.u
    angle = np.radians(row.rotate) * signed(u[:, 4])
    cos, sin, flip = np.cos(angle), np.sin(angle), np.where(u[:, 5] < row.flip, -1.0, 1.0)
    height, width = (margins[:, 2:] - margins[:, :2]).T
    y, x = (margins[:, 2:] + margins[:, :2]).T - 1  # its centre in -1 .. 1
    maps = np.stack([width * cos * flip, -width * sin, x, height * sin * flip, height * cos, y], 1)
    return send(torch.as_tensor(maps, dtype=torch.float32), device).reshape(-1, 2, 3)


def look(cuts, draws, margins, size):
    """Cuts [B, 3, h, w] in 0..1 -> augmented views [B, 3, size, size]."""
    row, u = draws.row, draws.u
    x = resample(cuts, turned(draws, margins, cuts.device), size)
    x = x * column(1 + row.brightness * signed(u[:, 6]), x)
    x = 0.5 + (x - 0.5) * column(1 + row.contrast * signed(u[:, 7]), x)
    x = (x * column(1 + row.jitter * signed(u[:, 8]), x)).clamp(0, 1)
    x = blend(x, grey(x).mean((1, 2, 3), keepdim=True), column(1 + row.jitter * signed(u[:, 9]), x))
    x = blend(x, grey(x), column(1 + row.jitter * signed(u[:, 10]), x))
    if row.jitter:
        x = shift_hue(x, column(row.jitter / 4 * signed(u[:, 11]), x).flatten())
    if row.trivial:
        x = trivial(x, u[:, 12:15])
    if row.blur:
        x = blurred(x, np.where(u[:, 15] < row.blur, 0.1 + 1.9 * u[:, 16], 0))
    if row.erase:
        x = erased(x, np.where(u[:, 17] < row.erase, 0.02 + 0.31 * u[:, 18], 0), u[:, 19:22])
    return x.clamp(0, 1)


def blend(x, other, share):
    return (share * x + (1 - share) * other).clamp(0, 1)


def blurred(x, sigmas):
    """Gaussian blur [B, 3, h, w] by sigmas [B] in pixels; 0: none."""
    reach = torch.arange(-6, 7, device=x.device)
    weight = torch.exp(-0.5 * (reach / column(sigmas, x)[:, 0, 0].clamp(min=1e-3)) ** 2)
    weight = weight / weight.sum(1, keepdim=True)  # [B, 13]
    h, w = x.shape[2:]
    for axis, pad in ((2, (0, 0, 6, 6)), (3, (6, 6, 0, 0))):
        padded = F.pad(x, pad, "replicate")
        x = sum(weight[:, k, None, None, None] * padded.narrow(axis, k, (h, w)[axis - 2]) for k in range(13))
    return x


def erased(x, areas, u):
    """A rectangle of mid grey over a share [B] of each view; u: aspect, and where."""
    h, w = x.shape[2:]
    aspect = np.exp(signed(u[:, 0]) * np.log(3.3))
    sides = np.stack([np.sqrt(areas * aspect), np.sqrt(areas / aspect)], 1).clip(0, 1) * (h, w)
    start = u[:, 1:] * ((h, w) - sides)
    y, x_ = torch.arange(h, device=x.device)[None, :, None], torch.arange(w, device=x.device)[None, None]
    y0, x0, y1, x1 = column(np.concatenate([start, start + sides], 1), x).unbind(1)  # each [B, 1, 1]
    inside = (y >= y0.floor()) & (y < y1.floor()) & (x_ >= x0.floor()) & (x_ < x1.floor())
    return torch.where(inside[:, None], 0.5, x)


def moved(x, yx=0.0, xy=0.0, y=0.0, x_=0.0, angle=0.0):
    cos, sin = math.cos(angle), math.sin(angle)
    maps = x.new_tensor([[cos, xy - sin, x_], [yx + sin, cos, y]]).expand(len(x), 2, 3)
    return resample(x, maps, x.shape[-1])


def stretched(x, m):
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def equalized(x, m):
    """Each channel to a flat histogram of 256 codes."""
    codes = (255 * x).round().long().flatten(2)
    counts = torch.zeros(*x.shape[:2], 256, device=x.device).scatter_add_(
        2, codes, torch.ones_like(codes, dtype=x.dtype)
    )
    ranks = counts.cumsum(2) / codes.shape[2]
    return ranks.gather(2, codes).view_as(x)


def sharpened(x, m):
    smooth = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
    return blend(x, smooth, 1 + m)


TRIVIAL = {  # operation of TrivialAugment: (function of pictures and strength, largest strength, both signs?)
    "identity": (lambda x, m: x, 0, False),
    "autocontrast": (stretched, 0, False),
    "equalize": (equalized, 0, False),
    "rotate": (lambda x, m: moved(x, angle=m), math.radians(135), True),
    "shear x": (lambda x, m: moved(x, xy=m), 0.99, True),
    "shear y": (lambda x, m: moved(x, yx=m), 0.99, True),
    "translate x": (lambda x, m: moved(x, x_=m), 2 * 32 / 224, True),
    "translate y": (lambda x, m: moved(x, y=m), 2 * 32 / 224, True),
    "solarize": (lambda x, m: torch.where(x >= 1 - m, 1 - x, x), 1.0, False),
    "posterize": (lambda x, m: torch.floor(x * 255 / 2 ** round(6 * m)) * 2 ** round(6 * m) / 255, 1.0, False),
    "brightness": (lambda x, m: x * (1 + m), 0.99, True),
    "contrast": (lambda x, m: blend(x, grey(x).mean((1, 2, 3), keepdim=True), 1 + m), 0.99, True),
    "colour": (lambda x, m: blend(x, grey(x), 1 + m), 0.99, True),
    "sharpness": (sharpened, 0.99, True),
}


def trivial(x, u):
    """One operation for each picture, its strength one of 31 bins: u [B, 3] are operation, bin and sign."""
    out, table = x.clone(), list(TRIVIAL.values())
    for i, (which, strength, sign) in enumerate(u):
        function, most, both = table[int(which * len(table))]
        m = most * int(strength * 31) / 30
        out[i : i + 1] = function(x[i : i + 1], -m if both and sign < 0.5 else m).clamp(0, 1)
    return out


def mix(views, targets, draws):
    """Mixup or CutMix, one of them for a batch: views [B, 3, h, w] and targets [B, C] -> the same."""
    row, batch = draws.row, draws.batch
    if not (row.mixup or row.cutmix):
        return views, targets
    partner = send(torch.from_numpy(draws.partner), views.device)
    share = draws.share
    if use_cutmix(row, batch):
        h, w = views.shape[2:]
        side, centre = math.sqrt(1 - share), batch[1:3] * (h, w)
        y0, x0, y1, x1 = (int(np.clip(v, 0, most)) for v, most in (
            (centre[0] - side * h / 2, h), (centre[1] - side * w / 2, w),
            (centre[0] + side * h / 2, h), (centre[1] + side * w / 2, w)))  # fmt: skip
        views = views.clone()
        views[:, :, y0:y1, x0:x1] = views[partner, :, y0:y1, x0:x1]
        share = 1 - (y1 - y0) * (x1 - x0) / (h * w)
    else:
        views = share * views + (1 - share) * views[partner]
    return views, share * targets + (1 - share) * targets[partner]


# ----- pictures of an update, as they are read


class Read(NamedTuple):
    """One micro-batch as read: its own b pictures, then those of other micro-batches that they are mixed with."""

    step: int  # updates done before it
    own: int  # b
    ids: np.ndarray  # [m]
    images: torch.Tensor | None  # [m, 3, H, W]; None where one is broken
    boxes: np.ndarray  # [m, 4] what is cut of each
    margins: np.ndarray  # [m, 4] the view inside the cut
    draws: Draws  # of these m
    bad: list  # [(path, why)]


def read_cut(source, i, one, layout, view, size):
    """Picture i -> (pixels, the box in them, the view in the box); one: its draws, view: which box of the layout."""
    found = {}

    def chosen(height, width):
        region = data.view_boxes([(height, width)], layout)[0][view, 0]
        boxes, margins = place(one, [region[2:] - region[:2]])
        found["margin"] = margins[0]
        return boxes + np.tile(region[:2], 2)

    if source.encoding == "photo":
        source.check(i)
        image, boxes = data.read_photo(source.path(i), chosen, cut_size(one.row, size))
    else:
        image = source.read(i)
        boxes = chosen(*image.shape[1:])
    return image, boxes[0], found["margin"]


class Pictures(torch.utils.data.Dataset):
    """Item k is micro-batch k % micros of update steps[k // micros], this rank's contiguous part of the batch.

    every: all views of a picture one after the other, which are augmented alike, instead of one of them that is drawn.
    """

    def __init__(self, source, row, layout, size, seed, steps, batch, micro_batch, rank, world, every=False):
        self.source, self.row, self.layout, self.size, self.seed = source, row, data.find_layout(layout), size, seed
        self.steps, self.batch, self.micro_batch, self.rank = steps, batch, micro_batch, rank
        self.micros, self.every = batch // (world * micro_batch), every
        self.views = len(data.view_boxes(np.ones((1, 2)), self.layout)[1])

    def __len__(self):
        return len(self.steps) * self.micros

    def __getitem__(self, k):
        step, b = self.steps[k // self.micros], self.micro_batch
        start = (self.rank * self.micros + k % self.micros) * b
        here = np.arange(start, start + b)
        ids = self.source.order(self.seed, step, self.batch)
        draws = draw(self.seed, step, ids, self.row)
        partner = draws.partner[here]
        if (self.row.mixup or self.row.cutmix) and b < self.batch:  # partners may be another micro-batch's: read anew
            here, partner = np.concatenate([here, partner]), np.roll(np.arange(2 * b), b)
        elif b < self.batch:
            partner = np.arange(b)
        draws = draws._replace(u=draws.u[here], partner=partner)
        return self.read(step, b, ids[here], draws)

    def read(self, step, own, ids, draws):
        parts, bad, times = [], [], self.views if self.every else 1
        ids, draws = np.repeat(ids, times), draws._replace(u=np.repeat(draws.u, times, 0))
        for j, i in enumerate(ids):
            view = j % times if self.every else int(rng(self.seed, "view", step, int(i)).integers(self.views))
            one = draws._replace(u=draws.u[j : j + 1])
            try:
                parts.append(read_cut(self.source, i, one, self.layout, view, self.size))
            except data.Unreadable as error:
                bad.append((str(self.source.path(i)), str(error)))
        if bad:
            return Read(step, own * times, ids, None, None, None, draws, bad)
        images, boxes, margins = zip(*parts)
        images = data.pad_to_one_size(images)
        return Read(step, own * times, ids, images, np.stack(boxes), np.stack(margins), draws, bad)


def render(read, labels, classes, view, device):
    """A micro-batch as read -> normalised views [b, 3, size, size] and targets [b, C] on the device; labels [N]."""
    images = read.images.to(device, non_blocking=True)
    size, none = cut_size(read.draws.row, view["size"]), np.zeros(1, bool)
    cuts = data.denormalise(data.render_views(images, {**view, "size": size}, read.boxes[None], none)[0])
    with torch.no_grad():
        views = look(cuts, read.draws, read.margins, view["size"])
        targets = F.one_hot(torch.from_numpy(labels[read.ids]), classes).float().to(device)
        views, targets = mix(views, targets, read.draws)
        return data.normalise(views[: read.own]), targets[: read.own]

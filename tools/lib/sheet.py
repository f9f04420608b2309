"""Pictures for people, with Pillow alone: titled tiles, scale bars, boxes, masks, curves, contact sheets.

Every function takes and gives RGB images of Pillow, so that sheets are put together by calling:

    tile = titled(scale_bar(fit(picture(codes), 300), 0.7 * 512 / 300), ["lung window, slice z"])
    save("sheet.png", stack([row([tile, other]), row([third])]))
"""

import contextlib
import functools
import io
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoint import atomic_write
from data import BROKEN, RGB_WINDOWS, WINDOWS_HU, regular, window_codes
from tools.lib import page

BACK, INK, DIM, GOOD, BAD = "#14171a", "#f0f0f0", "#a0a8b0", "#58d080", "#ff6a5a"
COLOURS = "#ffa030 #40c8ff #f4e04d #ff70b0 #70e070 #b090ff #ff7050 #50e0c8 #c8a070 #9ab0ff #d0d0d0 #c0e040".split()
GAP = 8  # pixels between tiles
WIDTH = 1768  # of a sheet, which its margins make 1,784: a screen
LEAST = 13  # pixels of the smallest type
HEAT = ((0, 0, 0), (70, 10, 100), (170, 40, 90), (240, 110, 30), (250, 210, 60), (255, 255, 220))  # dark to bright


@functools.lru_cache
def font(size):
    return ImageFont.load_default(max(size, LEAST))


def picture(values, zoom=1):
    """[h, w] or [3, h, w], uint8 codes or floats of 0..1 -> image; zoom repeats pixels, so that each stays exact."""
    values = np.asarray(values)
    if values.dtype != np.uint8:
        values = np.floor(255 * np.clip(values, 0, 1) + 0.5).astype(np.uint8)
    values = np.stack([values] * 3, -1) if values.ndim == 2 else values.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values.repeat(zoom, 0).repeat(zoom, 1)))


def fit(image, side):
    """Resized, antialiased, so that the longer edge is `side`."""
    factor = side / max(image.size)
    return image.resize([max(1, round(edge * factor)) for edge in image.size], Image.Resampling.BICUBIC)


def shorten(text, width, size):
    """One line that fits: the middle of a long text is left out, since ids differ at their ends."""
    text = " ".join(str(text).split())
    if font(size).getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2 and font(size).getlength(f"{text[: keep // 2]}...{text[-(keep - keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}...{text[-(keep - keep // 2) :]}"


def wrap(text, width, size):
    """Text as lines that fit, broken at spaces."""
    lines = [""]
    for word in str(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shorten(line, width, size) for line in lines]


def titled(image, lines, colour=INK, size=13):
    """The image below one line of text per item of `lines`, all in one tile."""
    step = round(size * 1.35)
    tile = Image.new("RGB", (image.width, image.height + step * len(lines) + 2), BACK)
    tile.paste(image, (0, tile.height - image.height))
    draw = ImageDraw.Draw(tile)
    for k, line in enumerate(lines):
        draw.text((1, k * step), shorten(line, image.width, size), fill=colour if k == 0 else DIM, font=font(size))
    return tile


def heading(text, width, colour=INK, size=17):
    """A line of text on a band across the sheet."""
    band = Image.new("RGB", (width, size + 10), "#262c33")
    draw = ImageDraw.Draw(band)
    draw.rectangle([0, 0, 5, band.height], fill=colour)
    draw.text((14, 3), shorten(text, width - 20, size), fill=colour, font=font(size))
    return band


def paragraphs(lines, width, size=13):
    """A tile of text; a line is text or (text, colour), wrapped where it is too long."""
    pairs = [line if isinstance(line, tuple) else (line, INK) for line in lines]
    parts = [(part, colour) for text, colour in pairs for part in wrap(text, width, size)]
    step = round(size * 1.35)
    tile = Image.new("RGB", (width, step * max(len(parts), 1)), BACK)
    for k, (part, colour) in enumerate(parts):
        ImageDraw.Draw(tile).text((0, k * step), part, fill=colour, font=font(size))
    return tile


def scale_bar(image, mm_per_pixel):
    """A bar of 100, 50, 20, 10, 5, 2 or 1 mm, the longest that is at most a third of the width."""
    fitting = [mm for mm in (100, 50, 20, 10, 5, 2, 1) if mm <= mm_per_pixel * image.width / 3]
    if not fitting:
        return image
    image, length, size = image.copy(), fitting[0] / mm_per_pixel, max(LEAST, min(16, image.width // 20))
    draw, x, y = ImageDraw.Draw(image), 8, image.height - 9
    draw.rectangle([x - 1, y - 1, x + length + 1, y + 3], fill="black")
    draw.rectangle([x, y, x + length, y + 2], fill="white")
    style = dict(fill="white", font=font(size), stroke_width=1, stroke_fill="black", anchor="ls")
    draw.text((x, y - 3), f"{fitting[0]} mm", **style)
    return image


def outline(image, boxes):
    """Boxes ((y0, x0, y1, x1) in pixels of the image, colour, label, width), dark-rimmed to show on any ground."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    corners = [[round(float(edge)) for edge in (x0, y0, x1, y1)] for (y0, x0, y1, x1), *_ in boxes]
    for (x0, y0, x1, y1), (_, _, _, width) in zip(corners, boxes):  # all rims first: none may cover a line
        draw.rectangle([x0 - 1, y0 - 1, max(x0, x1 - 1) + 1, max(y0, y1 - 1) + 1], outline="black", width=width + 2)
    for (x0, y0, x1, y1), (_, colour, _, width) in zip(corners, boxes):
        draw.rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=colour, width=width)
    for (x0, y0, _, _), (_, colour, label, width) in zip(corners, boxes):
        place = max(x0 + width + 2, 1), max(y0 + width - 1, 1)
        draw.text(place, label, fill=colour, font=font(14), stroke_width=2, stroke_fill="black")
    return image


def hatch(image, mask, cell):
    """Masked patches (bool [rows, columns], each `cell` pixels wide) dimmed and hatched, the others untouched."""
    pixels = np.array(image)
    hidden = np.asarray(mask).repeat(cell, 0).repeat(cell, 1)
    y, x = np.indices(hidden.shape)
    area = pixels[: hidden.shape[0], : hidden.shape[1]]  # a crop that is no multiple of the patch has a rim
    area[hidden] = area[hidden] // 4
    area[hidden & ((x + y) % 8 < 2)] = (150, 110, 40)
    return Image.fromarray(pixels)


def curves(lines, low, high, ticks, size, marks=()):
    """Curves on one x axis from low to high: lines of (x, y, colour), each scaled to its own peak.

    Heights are square roots, so that a small hump beside a tall one shows. marks: (x, text) drawn behind them.
    """
    width, height = size
    image = Image.new("RGB", size, "#1c2126")
    draw, top, bottom = ImageDraw.Draw(image), 64 if marks else 8, height - 20

    def across(x):
        return (x - low) / (high - low) * (width - 1)

    for k, (x, text) in enumerate(marks):
        draw.line([across(x), 0, across(x), bottom], fill="#48525c")
        draw.text((across(x) + 2, 1 + 15 * (k % 4)), text, fill=DIM, font=font(LEAST))
    for x, y, colour in lines:
        heights = np.sqrt(np.asarray(y, float) / max(np.max(y), 1e-12))
        points = [(across(a), bottom - b * (bottom - top)) for a, b in zip(x, heights)]
        draw.line(points, fill=colour, width=2)
    draw.line([0, bottom, width, bottom], fill=DIM)
    for x in ticks:
        anchor = "l" if across(x) < 20 else "r" if across(x) > width - 20 else "m"
        draw.text((across(x), height - 4), str(x), fill=DIM, font=font(LEAST), anchor=f"{anchor}s")
    return image


def dashed(draw, x0, y0, x1, y1, ink):
    """A level or an upright line."""
    for k in range(0, max(x1 - x0, y1 - y0), 8):
        draw.line([min(x0 + k, x1), min(y0 + k, y1), min(x0 + k + 4, x1), min(y0 + k + 4, y1)], fill=ink, width=1)


def plot(title, lines, size, label, marks=()):
    """Lines {name: (xs, ys)} on axes with ticks; label: of x. marks: ("x" or "y", value, text), dashed."""
    image, (width, height) = Image.new("RGB", size, "#1c2126"), size
    draw, left, top, right, bottom = ImageDraw.Draw(image), 58, 60, width - 16, height - 46
    xs, ys = (np.concatenate([line[k] for line in lines.values()] + [[v for a, v, _ in marks if a == "xy"[k]]])
              for k in (0, 1))  # fmt: skip
    ranges = page.limits(xs.tolist(), 0.02), page.limits(ys.tolist())
    across = functools.partial(np.interp, xp=ranges[0], fp=(left, right))
    up = functools.partial(np.interp, xp=ranges[1], fp=(bottom, top))
    small, x = font(14), 14
    for (name, line), ink in zip({title: None, **lines}.items(), (INK, *COLOURS)):
        draw.text((x, 10), name, fill=ink, font=font(16))
        x += round(font(16).getlength(name)) + 24
        if line:
            draw.line([(across(a), up(b)) for a, b in zip(*line)], fill=ink, width=2)
    for values, place in zip(map(page.ticks, *zip(*ranges)), (across, up)):
        for value, text in zip(values, page.tick_texts(values)):
            at = (place(value), bottom + 5) if place is across else (left - 8, place(value))
            draw.text(at, text, fill=DIM, font=small, anchor="mt" if place is across else "rm")
            end = (at[0], bottom, at[0], bottom + 4) if place is across else (left - 4, at[1], left, at[1])
            draw.line(end, fill=DIM)
    draw.line([left, top, left, bottom, right, bottom], fill=DIM)
    draw.text(((left + right) / 2, height - 6), label, fill=DIM, font=small, anchor="ms")
    for axis, value, text in marks:
        if axis == "x":
            dashed(draw, round(across(value)), top, round(across(value)), bottom, BAD)
            draw.text((across(value) + 6, (top + bottom) / 2), text, fill=BAD, font=small, anchor="lm")
        else:
            dashed(draw, left, round(up(value)), right, round(up(value)), DIM)
            draw.text((right - 4, up(value) - 4), text, fill=DIM, font=small, anchor="rs")
    return image


def intervals(title, rows, size, even=0.5):
    """Rows (name, value, low, high), of shares, as dots on their intervals, the first in colour; even: of chance."""
    image, (width, height) = Image.new("RGB", size, "#1c2126"), size
    draw, left, top, right, bottom = ImageDraw.Draw(image), 170, 46, width - 210, height - 46
    draw.text((14, 10), title, fill=INK, font=font(16))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * (right - left)
        draw.text((x, bottom + 5), f"{tick:g}", fill=DIM, font=font(14), anchor="mt")
        draw.line([x, bottom, x, bottom + 4], fill=DIM)
    draw.line([left, bottom, right, bottom], fill=DIM)
    dashed(draw, round(left + even * (right - left)), top, round(left + even * (right - left)), bottom, BAD)
    draw.text((left + even * (right - left), height - 6), "chance", fill=BAD, font=font(14), anchor="ms")
    for k, (name, *numbers) in enumerate(rows):
        y, ink = top + (k + 0.5) * (bottom - top) / len(rows), INK if k else COLOURS[0]
        there = [n for n in numbers if n is not None and np.isfinite(n)]  # without an interval the dot stands alone
        value, *ends = (left + number * (right - left) for number in there)
        draw.text((14, y), name, fill=ink, font=font(16), anchor="lm")
        draw.line([min([value, *ends]), y, max([value, *ends]), y], fill=ink, width=3)
        draw.ellipse([value - 6, y - 6, value + 6, y + 6], fill=ink)
        text = ("{:.2f} ({:.2f} to {:.2f})" if ends else "{:.2f}").format(*there)
        draw.text((right + 20, y), text, fill=ink, font=font(16), anchor="lm")
    return image


def heat(values, low=None, high=None):
    """[h, w] -> uint8 [h, w, 3], dark to bright between low and high (default: those of the values)."""
    values = np.asarray(values, np.float64)
    low, high = (values.min() if low is None else low), (values.max() if high is None else high)
    shares = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    ends = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(shares, ends, channel) for channel in zip(*HEAT)], -1).round().astype(np.uint8)


def enlarge(values, side, smooth=True):
    """[h, w] or [h, w, 3] -> float32 [side, side] or [side, side, 3]; smoothly, or each cell as it is."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    channels = np.moveaxis(np.atleast_3d(np.asarray(values, np.float32)), -1, 0)
    large = [np.asarray(Image.fromarray(np.ascontiguousarray(c)).resize((side, side), how)) for c in channels]
    return np.stack(large, -1).reshape(side, side, *np.shape(values)[2:])


def over(image, colours, strength=0.6):
    """A map (uint8 [side, side, 3]) laid over the square image in grey."""
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(colours), strength)


def cross(image, y, x, colour="#40ff70", arm=7):
    """A marked point, dark-rimmed, open in the middle."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for width, ink in ((5, "black"), (2, colour)):
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            draw.line([x + 2 * dx, y + 2 * dy, x + arm * dx, y + arm * dy], fill=ink, width=width)
    return image


def row(images, gap=GAP):
    """Side by side, aligned at the top."""
    sheet = Image.new("RGB", (sum(i.width + gap for i in images) - gap, max(i.height for i in images)), BACK)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet


def stack(images, gap=GAP):
    """Below each other, aligned at the left."""
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height + gap for i in images) - gap), BACK)
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def justified(pairs, least=150, size=LEAST):
    """(image, lines) of any number as rows of WIDTH without an empty place; tiles are `least` wide or wider."""
    count = -(-len(pairs) // ((WIDTH + GAP) // (least + GAP)))
    rows = []
    for part in np.array_split(np.arange(len(pairs)), count):
        ends = np.linspace(0, WIDTH + GAP, len(part) + 1).round().astype(int)  # of tiles with the gap behind them
        tiles = [pairs[k][0].resize((w, w), Image.Resampling.BICUBIC) for k, w in zip(part, np.diff(ends) - GAP)]
        rows.append(row([titled(tile, pairs[k][1], size=size) for k, tile in zip(part, tiles)]))
    return stack(rows)


# What a backbone sees in one image.

TILE, SMALL = 436, 120  # pixels; four tiles fill a row, and so do a tile and eleven small ones


class Dense(NamedTuple):
    """All that is drawn of one image at one resolution, patch by patch."""

    attention: np.ndarray  # [H, h, w] of cls
    along: np.ndarray  # [h, w, 3] of Basis
    similarity: np.ndarray  # [h, w], cosine to one patch ...
    point: tuple  # ... which is here (row, column)


class Basis(NamedTuple):
    """Turns features of patches into three numbers that become red, green and blue."""

    mean: np.ndarray  # [D]
    axes: np.ndarray  # [D, 3], or as many as were asked for; along each, features have deviation 1
    shares: np.ndarray  # [3] of the variance of the features, falling

    def along(self, patches):
        """[..., D] -> [..., 3]"""
        return (patches - self.mean) @ self.axes


def dense(attention, patches, basis, point):
    """Dense of patches [h, w, D]."""
    unit = patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)
    return Dense(attention, basis.along(patches), unit @ unit[point], point)


def principal(patches, like=None, count=3):
    """Basis of the main directions of [M, D]; the largest entry of each is positive.

    like [M, 3]: earlier numbers of the same patches, to which these come as near as turns and mirrors bring them: a
    network turns its features while it learns, and colours are to change only where it tells other things apart.
    """
    mean = patches.mean(0)
    values, vectors = np.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    floor = 1e-8 * np.square(patches).sum(1).mean() + 1e-12  # below is rounding: constant features are grey
    largest, axes = values[::-1][:count], vectors[:, ::-1][:, :count]
    axes = axes / np.sqrt(np.maximum(largest, floor))
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0, keepdims=True), 0))
    if like is not None:
        left, _, right = np.linalg.svd(((patches - mean) @ axes).T @ like)  # Procrustes
        axes = axes @ (left @ right)
    return Basis(mean, axes, largest / max(values.sum(), 1e-12))


def inputs(image, encoding):
    """What a person sees of an image as read [3, H, W]: {name: codes [H, W] or [3, H, W]}."""
    if encoding == "photo":
        return {"photograph": image}
    if encoding == "rgb-v1":
        return {f"{name} window, slice {z}": i for name, z, i in zip(RGB_WINDOWS, ("z-1", "z", "z+1"), image)}
    return {f"{name} window": window_codes(image[1], *WINDOWS_HU[name]) for name in RGB_WINDOWS}


def attention_over(base, attention, side, smooth=True):
    """A map over the image: black is none, bright 3 times an even share or, where more is seen, the top 1%."""
    high = max(np.quantile(attention, 0.99), 3 * attention.mean(), 1e-12)
    return over(fit(base, side), heat(enlarge(attention, side, smooth), 0, high))


def similarity_over(base, similarity, point, side, smooth=True):
    """Cosine to one patch, black 0 to bright 1, with that patch (row, column) marked."""
    y, x = ((k + 0.5) * side / n for k, n in zip(point, similarity.shape))
    return cross(over(fit(base, side), heat(enlarge(similarity, side, smooth), 0, 1)), y, x)


def coloured(along, body, side, smooth=True):
    """Numbers of Basis [h, w, 3] as colours, bright as in the pictures of DINOv3; black outside the body [S, S]."""
    colours = 1 / (1 + np.exp(-2 * np.clip(enlarge(along, side, smooth), -20, 20)))
    return picture((colours * enlarge(body, side)[..., None]).transpose(2, 0, 1))


def foreground(inside, body, view):
    """Shares of body and of lung [2, S, S], the body's without holes, both without what lies outside its box: a table.

    Body is what lies between tissue on all four sides. body, view: boxes (y0, x0, y1, x1) in pixels of the slice.
    """
    low, high = np.reshape(view, (2, 2, 1))
    at = low + (np.arange(inside.shape[1]) + 0.5) * (high - low) / inside.shape[1]  # y and x of the pixels, [2, S]
    top, bottom = np.reshape(body, (2, 2, 1))
    tissue = (inside[0] - inside[1] > 0.5) & np.logical_and.outer(*((at >= top) & (at < bottom)))

    def between(axis):
        before, behind = (np.logical_or.accumulate(way, axis) for way in (tissue, np.flip(tissue, axis)))
        return before & np.flip(behind, axis)

    filled = between(0) & between(1)
    return np.stack([filled, inside[1] * filled])


def pooled(values, grid, how=np.mean):
    """Means of [S, S] over a grid (rows, columns)."""
    return how(values.reshape(grid[0], len(values) // grid[0], grid[1], -1), (1, 3))


def marked_patch(grey, inside, grid):
    """The most structured patch (row, column) of a view [S, S]: well inside the lung, else in the lung, else the body.

    inside: shares of body and of lung [2, S, S].
    """
    body, lung = (np.pad(pooled(share, grid) > 0.5, 1) for share in inside)
    deep = np.lib.stride_tricks.sliding_window_view(lung, (3, 3)).all((2, 3))
    spread = pooled(grey, grid, np.std)
    chosen = next((m for m in (deep, lung[1:-1, 1:-1], body[1:-1, 1:-1]) if m.any()), np.ones_like(deep))
    return tuple(int(k) for k in np.unravel_index(np.where(chosen, spread, -1).argmax(), grid))


def maps(title, windows, base, body, dense, share, mm):
    """All maps of one image -> (a block of WIDTH, a column of three small ones for the strip).

    windows: what inputs() gives; base: codes under overlays; body: share of it in each pixel [S, S]; dense: Dense, of
    the finest resolution first, of training's last; share: of the variance that colours show; mm: width of the view.
    """
    base, fine = picture(base), dense[0]

    def drawn(one, side, smooth=True):
        yield attention_over(base, one.attention.mean(0), side, smooth)
        yield coloured(one.along, body, side, smooth)
        yield similarity_over(base, one.similarity, one.point, side, smooth)

    inputs_ = [(fit(picture(codes), TILE), [name, "what goes in"]) for name, codes in windows.items()]
    mean, sizes = fine.attention.mean(0), [" x ".join(map(str, one.similarity.shape)) for one in dense]
    peak = mean.max() / max(mean.mean(), 1e-12)
    texts = [
        ["attention: where the cls token looks", f"{sizes[0]} patches, peak {peak:.1f} times the mean"],
        ["PCA: alike features, alike colours", f"{sizes[0]} patches, {share:.0%} of the variance"],
        ["similarity to the patch at the cross", f"{sizes[0]} patches, mean cosine {fine.similarity.mean():.2f}"],
    ]
    first = inputs_[0][0] if mm is None else scale_bar(inputs_[0][0], mm / TILE)
    large, small = [(first, inputs_[0][1]), *zip(drawn(fine, TILE), texts)], inputs_[1:]
    for one, size in zip(dense[1:], sizes[1:]):
        names = [[name, f"{size}, as in training"] for name in ("attention", "PCA", "similarity")]
        small += zip(drawn(one, TILE, False), names)
    if len(fine.attention) > 1:  # one head is its own mean, drawn above
        small += [(attention_over(base, m, TILE), [f"head {k}", sizes[0]]) for k, m in enumerate(fine.attention, 1)]
    block = [heading(title, WIDTH), justified(large, size=17), *([justified(small)] if small else [])]
    column = [titled(i, [name], DIM) for i, name in zip(drawn(fine, SMALL), ("attention", "PCA", "similarity"))]
    return stack(block), stack(column, gap=2)


def time_strip(title, base, columns):
    """One image over time: itself, then {text: column of maps} from the first look to now."""
    columns = [titled(column, [text]) for text, column in columns.items()]
    strip = row([titled(fit(picture(base), TILE), ["what goes in"]), *columns])
    return stack([heading(title, strip.width, size=15), strip])


def save(path, image):
    """Write a PNG with a margin, atomically; the folder is made when it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    framed = Image.new("RGB", (image.width + 2 * GAP, image.height + 2 * GAP), BACK)
    framed.paste(image, (GAP, GAP))
    return write_png(path, framed)


def write_png(path, image):
    """At level 2: 3.3 times as fast as Pillow's usual 6, files are 7 to 23% larger (sheets of runs, 2026-11)."""
    return atomic_write(path, lambda f: image.save(f, format="PNG", compress_level=2))


def earlier_columns(folder, k, like):
    """Columns of image k in the folders step_XXXXXXXX of all looks, the first, the last and eight between them.

    -> ({text: picture}, how many files were left out, because they cannot be read or are of another size).
    """
    files = [f for f in folder.parent.glob(f"step_*/image_{k}.png") if f.parent.name[5:].isdecimal()]
    files.sort(key=lambda f: int(f.parent.name[5:]))
    files = [files[j] for j in np.unique(np.linspace(0, len(files) - 1, 10).round().astype(int))]
    columns = {}
    for file in files:
        with contextlib.suppress(*BROKEN), Image.open(regular(file)) as column:
            if column.size == like.size:  # known before a pixel is read
                columns[f"step {int(file.parent.name[5:])}"] = column.convert("RGB")
    return columns, len(files) - len(columns)


def save_look(folder, drawn):
    """{image: (block, column, codes)} -> sheet.png, image_1.png ..., strip_1.png ... in a folder step_XXXXXXXX.

    -> (strips that show more than one look, how many pictures of earlier looks could not be read).
    """
    save(folder / "sheet.png", stack([block for block, _, _ in drawn.values()], gap=18))
    strips, unread = [], 0
    for k, (title, (_, column, base)) in enumerate(drawn.items(), 1):
        write_png(folder / f"image_{k}.png", column)
        columns, left_out = earlier_columns(folder, k, column)
        save(folder / f"strip_{k}.png", time_strip(f"first look to now: {title}", base, columns))
        strips += [folder / f"strip_{k}.png"] if len(columns) > 1 else []
        unread += left_out
    return strips, unread


# What the first look leaves for later ones: numbers behind its colours, and the similarities of its patches.

FIRST = {"colours": "nhw3", "grams": "nNN", "dim": "", "step": ""}  # n images of N patches, h x w in the finer view


def read_first(path):
    """first.npz -> {name: array}; ValueError with the reason where it is not a file that a look wrote.

    Read member by member, each only after its size is known to be that of its numbers: numpy would reserve whatever a
    header claims, and unpickle what it is told to.
    """
    found, sides = {}, {"3": 3}
    try:
        with zipfile.ZipFile(regular(path)) as archive:
            items = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
            if items.keys() != FIRST.keys():
                raise ValueError("it holds other arrays")
            for name, letters in FIRST.items():
                with archive.open(items[name]) as f:
                    head = io.BytesIO(f.read(4096))
                if np.lib.format.read_magic(head) != (1, 0):
                    raise ValueError(f"{name} is of another version")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
                known = all(sides.setdefault(letter, side) == side for letter, side in zip(letters, shape))
                if dtype.kind not in "fi" or len(shape) != len(letters) or not known:
                    raise ValueError(f"{name} is {dtype} {shape}")
                size = head.tell() + dtype.itemsize * math.prod(shape)
                if items[name].compress_type or items[name].file_size != size:
                    raise ValueError(f"{name} is not as long as its numbers")
                values = np.frombuffer(archive.read(items[name]), dtype, offset=head.tell())
                found[name] = values.reshape(shape, order="F" if fortran else "C")
    except (*BROKEN, zipfile.BadZipFile, NotImplementedError, MemoryError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    if not all(np.isfinite(values).all() for values in found.values()) or not 0 <= found["step"] < 1e12:
        raise ValueError("its numbers are not finite, or its step is none")
    return found

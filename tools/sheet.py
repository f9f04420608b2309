"""Pictures for people, with Pillow alone: titled tiles, scale bars, boxes, masks, curves, contact sheets.

Every function takes and gives RGB images of Pillow, so that sheets are put together by calling:

    tile = titled(scale_bar(fit(picture(codes), 300), 0.7 * 512 / 300), ["lung window, slice z"])
    save("sheet.png", stack([row([tile, other]), row([third])]))
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoint import atomic_write

BACK, INK, DIM, GOOD, BAD = "#14171a", "#f0f0f0", "#a0a8b0", "#58d080", "#ff6a5a"
COLOURS = "#ffa030 #40c8ff #f4e04d #ff70b0 #70e070 #b090ff #ff7050 #50e0c8 #c8a070 #9ab0ff #d0d0d0 #c0e040".split()
GAP = 8  # pixels between tiles


@functools.lru_cache
def font(size):
    return ImageFont.load_default(size)


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
    image, length, size = image.copy(), fitting[0] / mm_per_pixel, max(10, min(13, image.width // 20))
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
    draw, bottom = ImageDraw.Draw(image), height - 18

    def across(x):
        return (x - low) / (high - low) * (width - 1)

    for k, (x, text) in enumerate(marks):
        draw.line([across(x), 0, across(x), bottom], fill="#48525c")
        draw.text((across(x) + 2, 1 + 13 * (k % 4)), text, fill=DIM, font=font(11))
    for x, y, colour in lines:
        heights = np.sqrt(np.asarray(y, float) / max(np.max(y), 1e-12))
        points = [(across(a), bottom - b * (bottom - 56)) for a, b in zip(x, heights)]
        draw.line(points, fill=colour, width=2)
    draw.line([0, bottom, width, bottom], fill=DIM)
    for x in ticks:
        anchor = "l" if across(x) < 12 else "r" if across(x) > width - 12 else "m"
        draw.text((across(x), height - 2), str(x), fill=DIM, font=font(11), anchor=f"{anchor}s")
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


def save(path, image):
    """Write a PNG with a margin, atomically; the folder is made when it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    framed = Image.new("RGB", (image.width + 2 * GAP, image.height + 2 * GAP), BACK)
    framed.paste(image, (GAP, GAP))
    return atomic_write(path, lambda f: framed.save(f, format="PNG"))

"""Dense features of a whole volume: every slice in overlapping tiles of square patches, blended, without seams.

    grid = grid_of(volume, patch_mm=8)
    maps = slice_features(vit, view, volume, z, grid, tile=28)      # [rows, columns, D] of one slice
    for z, channels in channels_of(len(volume.hu), of_slice, stride=2): ...      # [C, h, w] for each slice

A patch covers patch_mm x patch_mm whatever the spacing; rows and columns of patches cover the slice exactly.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import data
from tools.lib import space

OVERLAP = 0.25  # of a tile, at least, with its neighbour
AIR = -950  # HU, mean of a patch; below it nothing is learned for the colours


class Grid(NamedTuple):
    rows: int
    cols: int
    height: int  # of the slice, in pixels
    width: int


def grid_of(volume, patch_mm):
    """Patches of patch_mm, made a little smaller so that a whole number of them fits."""
    (height, width), (x, y, _) = volume.hu.shape[1:], space.spacing(volume.affine)
    rows, cols = (max(1, math.ceil(n * mm / patch_mm - 1e-6)) for n, mm in ((height, y), (width, x)))
    return Grid(rows, cols, height, width)


def neighbours(volume, z, mm=None):
    """int16 [3, H, W]: slices z-1, z, z+1, or those nearest to `mm` away; at the ends of the volume the last one."""
    step = max(1, round((mm or 0) / space.spacing(volume.affine)[2]))
    at = (z - step, z, z + step)
    return torch.from_numpy(np.stack([volume.hu[min(max(k, 0), len(volume.hu) - 1)] for k in at]))


def as_trained(image, encoding):
    """HU as the backbone was trained on it: itself, or three windows as codes."""
    if encoding != "rgb-v1":
        return image
    codes = [data.window_codes(hu, *data.WINDOWS_HU[name]) for name, hu in zip(data.RGB_WINDOWS, image.numpy())]
    return torch.from_numpy(np.stack(codes))


def starts(n, side):
    """First patches of tiles of `side` along an axis of n patches; neighbours share OVERLAP of a tile or more."""
    count = 1 + math.ceil((n - side) / max(1, int(side * (1 - OVERLAP)))) if n > side else 1
    return np.linspace(0, n - side, count).round().astype(int).tolist()


@functools.cache
def weight(side):
    """[side, side]: of a tile's patches, less towards its border."""
    along = 1 - (2 * (torch.arange(side) + 0.5) / side - 1).abs()
    return along[:, None] * along


@torch.no_grad()
def slice_features(vit, view, volume, z, grid, tile, encoding="hu16-v1", look=None, batch=8):
    """One slice -> [rows, columns, C] on the CPU. look(images) -> [b, t, t, C]; by default the unit patch features."""
    side, p = min(tile, grid.rows, grid.cols), vit.patch_size
    step = np.array([grid.height / grid.rows, grid.width / grid.cols])  # pixels of a patch
    places = [(y, x) for y in starts(grid.rows, side) for x in starts(grid.cols, side)]
    boxes = np.array([[*(step * (y, x)), *(step * (y + side, x + side))] for y, x in places])
    image = as_trained(neighbours(volume, z, view.get("neighbour_mm")), encoding)[None]
    device = vit.cls_token.device
    look = look or functools.partial(unit_patches, vit)
    total, weights = None, torch.zeros(grid.rows, grid.cols, 1)
    for first in range(0, len(places), batch):
        some = slice(first, first + batch)
        at, size = boxes[some][:, None], view | {"size": side * p}
        views = data.render_views(image, size, at, np.zeros(len(at), bool))
        for (y, x), found in zip(places[some], look(views[:, 0].to(device)).float().cpu()):
            total = torch.zeros(grid.rows, grid.cols, found.shape[-1]) if total is None else total
            total[y : y + side, x : x + side] += found * weight(side)[..., None]
            weights[y : y + side, x : x + side] += weight(side)[..., None]
    return total / weights


def unit_patches(vit, images):
    """Features of length 1, [b, t, t, D]."""
    patches = F.normalize(vit(images).patches, dim=-1)
    return patches.unflatten(1, (math.isqrt(patches.shape[1]), -1))


def attention(vit, images):
    """Of cls to each patch, mean of the heads of the last block, 1: an even share; [b, t, t, 1]."""
    found = vit.attention(images).mean(1)
    return (found / found.mean((1, 2), keepdim=True))[..., None]


def is_inside(volume, z, grid):
    """bool [rows, columns]: patches that are not air."""
    hu = torch.tensor(volume.hu[z].astype(np.float32))[None, None]
    return F.interpolate(hu, size=(grid.rows, grid.cols), mode="area")[0, 0] > AIR


def on_pixels(maps, grid, every):
    """[rows, columns, C] -> [C, h, w] on the slice's pixels, or means of every x every of them."""
    size, maps = (grid.height, grid.width), maps.permute(2, 0, 1)[None]
    full = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return (F.avg_pool2d(full, every) if every > 1 else full)[0]


def computed(slices, stride):
    """Slices that are computed: every stride-th and the last; those between are blended from the two around them."""
    return sorted({*range(0, slices, stride), slices - 1})


def channels_of(slices, of_slice, stride=1):
    """(z, [C, h, w]) of all slices in order; of_slice(z) is asked for every stride-th only."""
    before = None
    for z in computed(slices, stride):
        here = of_slice(z)
        for between in range(before[0] + 1 if before else z, z):
            share = (between - before[0]) / (z - before[0])
            yield between, before[1] * (1 - share) + here * share
        yield z, here
        before = z, here


def at_point(maps, volume, grid, point):
    """Feature [C] at a point (x, y, z) in mm, between the four patches around it; maps: of the slice nearest to it."""
    x, y, _ = index_of(volume, point)[:3]
    at = 2 * torch.tensor([(x + 0.5) / grid.width, (y + 0.5) / grid.height]).float() - 1
    maps, at = maps.permute(2, 0, 1)[None], at.view(1, 1, 1, 2)
    return F.grid_sample(maps, at, align_corners=False, padding_mode="border").flatten()


def index_of(volume, point):
    """A point in mm -> index (x, y, z), which must lie in the volume."""
    index = (np.linalg.inv(volume.affine) @ [*point, 1])[:3]
    if not all(-0.5 <= k <= n - 0.5 for k, n in zip(index, volume.hu.shape[::-1])):
        ends = volume.affine @ np.array([[0, 0, 0, 1], [*np.subtract(volume.hu.shape[::-1], 1), 1]], float).T
        place, first, last = (" ".join(f"{v:.4g}" for v in values[:3]) for values in (point, *ends.T))
        raise ValueError(f"--point {place} mm lies outside the volume, whose corners are {first} and {last}")
    return index

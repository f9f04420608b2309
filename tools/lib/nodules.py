"""Nodules as all label tools write them: pieces of masks, their rows of nodules.csv, masks/<id>.npz."""

import io

import numpy as np

from checkpoint import atomic_write
from tools.lib.progress import progress


def spread(seed, allowed):
    """From `seed` through the allowed elements that touch by faces, in any number of dimensions, until it stands."""
    while True:
        grown = seed.copy()
        for axis in range(seed.ndim):
            before, behind = np.moveaxis(seed, axis, 0), np.moveaxis(grown, axis, 0)
            behind[1:] |= before[:-1]
            behind[:-1] |= before[1:]
        grown &= allowed
        if grown.sum() == seed.sum():
            return grown
        seed = grown


def tight(mask, origin=0):
    """-> the mask without empty borders, and its first element; None if all is empty."""
    at = np.argwhere(mask)
    if not len(at):
        return None
    low, high = at.min(0), at.max(0) + 1
    return mask[tuple(map(slice, low, high))], low + origin


def measure(mask, origin, voxel, paths):
    """Columns of nodules.csv that a mask [z, y, x] gives, and its centre. voxel: mm; paths: {z: path}, inner slices."""
    at = np.argwhere(mask)
    centre, low, high = at.mean(0) + origin, at.min(0) + origin, at.max(0) + 1 + origin
    volume = len(at) * voxel.prod()
    z = int(np.clip(round(centre[0]), min(paths), max(paths)))  # outermost slices have no neighbours
    row = {"path": paths[z], "z": z, "y": f"{centre[1]:.3f}", "x": f"{centre[2]:.3f}"}
    row |= {"diameter_mm": f"{(6 * volume / np.pi) ** (1 / 3):.3f}", "volume_mm3": f"{volume:.2f}"}  # of a sphere
    row |= {"box_mm": f"{((high - low) * voxel)[1:].max():.3f}"}
    row |= {f"{axis}{end}": int(side[k]) for k, axis in enumerate("zyx") for end, side in enumerate((low, high))}
    return row, centre


def write_masks(folder, masks):
    """{id: arrays} as one npz per nodule; those of an earlier run that are not among them go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz"):
        if old.stem not in masks:
            old.unlink()
    for name, arrays in progress(masks.items(), "masks", unit="nodule"):
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        atomic_write(folder / f"{name}.npz", lambda f, content=content: f.write(content.getvalue()))

"""From files to a batch that is a pure function of the step. Copyable: imports torch, numpy and pillow only."""

import hashlib

import numpy as np

# index.csv, one row per slice; paths are relative to the processed root (see README, files on disk)
INDEX_COLUMNS = (
    "path encoding dataset patient study series sop z z_mm spacing_y spacing_x spacing_z rows cols "
    "body_y0 body_y1 body_x0 body_x1"
).split()

WINDOWS_HU = {"lung": (-600, 1500), "soft": (40, 400), "bone": (300, 1500)}  # level, width
RGB_WINDOWS = ("lung", "soft", "bone")  # channel order of rgb-v1: slices z-1, z, z+1


def window_codes(hu, level, width):
    """HU -> uint8 codes of one window: floor(255 * clip((HU - (L - W/2)) / W, 0, 1) + 0.5)."""
    x = (np.asarray(hu, np.float64) - (level - width / 2)) / width
    return np.floor(255 * np.clip(x, 0, 1) + 0.5).astype(np.uint8)


def file_sha256(path):
    """Hex digest of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

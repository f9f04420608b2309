"""Volumes in patient space: HU with the affine that says where each voxel lies; a NIfTI-1 writer.

    volume = read(path)              # a processed .npy, a folder of DICOM, or a file that SimpleITK reads
    write_nifti("y.nii.gz", *as_stored(volume, features, every=1))

Inside, arrays are [Z, H, W] with x to the patient's left, y to the back, z to the head (LPS, as DICOM and ITK count,
mm); affines take the index (x, y, z) of a voxel's centre. Only NIfTI files hold RAS: x and y with the other sign.
"""

import contextlib
import gzip
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import atomic_write
from data import open_source
from tools.lib import dicom, itk
from tools.lib.files import walk_files
from tools.lib.progress import progress

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Volume(NamedTuple):
    hu: np.ndarray  # int16 [Z, H, W]
    affine: np.ndarray  # [4, 4]: index (x, y, z) -> mm
    axes: tuple  # of x, y, z: which axis (0 to 2) of the stored index it is
    flips: tuple  # ... and whether it runs backwards there
    note: str = ""  # what a person should know about its place


def spacing(affine):
    return np.linalg.norm(affine[:3, :3], axis=0)


def turned(stored, affine, note=""):
    """Array [k, j, i] and the affine of its index (i, j, k) -> Volume, its axes as near to LPS as turns bring them."""
    cosines = np.abs(affine[:3, :3] / spacing(affine))
    axes, free = [None] * 3, [(p, a) for p in range(3) for a in range(3)]
    while free:  # the largest cosine first
        p, a = max(free, key=lambda pair: cosines[pair])
        axes[p], free = a, [(q, b) for q, b in free if q != p and b != a]
    flips = tuple(bool(affine[p, a] < 0) for p, a in enumerate(axes))
    hu = stored.transpose([2 - a for a in reversed(axes)])
    hu = hu[tuple(slice(None, None, -1 if flip else 1) for flip in reversed(flips))]
    return Volume(hu, affine @ index_change(axes, flips, hu.shape[::-1]), tuple(axes), flips, note)


def index_change(axes, flips, size):
    """[4, 4]: index (x, y, z) of a turned array of this size (x, y, z) -> index of the stored one."""
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for p, (a, flip) in enumerate(zip(axes, flips)):
        change[a, p], change[a, 3] = (-1, size[p] - 1) if flip else (1, 0)
    return change


def coarser(affine, every):
    """Affine of a grid whose pixels are the means of every x every pixels of a slice."""
    change = np.diag([every, every, 1.0, 1.0])
    change[:2, 3] = (every - 1) / 2
    return affine @ change


def as_stored(volume, channels, every=1):
    """Channels [C, Z, h, w] on the volume's grid (see coarser) -> the same turned as its file was, and their affine."""
    affine = coarser(volume.affine, every)
    back = np.linalg.inv(index_change(volume.axes, volume.flips, channels.shape[:0:-1]))
    flipped = channels[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in reversed(volume.flips)))]
    order = np.argsort([2 - a for a in reversed(volume.axes)])
    return flipped.transpose(0, *(1 + order)), affine @ back


# ----- reading


def read(path):
    path = Path(path)
    if path.is_dir():
        return read_dicom(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; --volume names a file or a folder of DICOM")
    return read_processed(path) if path.suffix == ".npy" else read_itk(path)


def read_processed(path):
    """A volume of a processed folder, which keeps spacing and height, not the place in the slice's plane."""
    root = next((p for p in path.resolve().parents if (p / "_index" / "index.csv").exists()), None)
    if root is None:
        raise ValueError(f"{path}: no folder above it has _index/index.csv; name a volume of a processed folder")
    source, name = open_source(root), path.resolve().relative_to(root).as_posix()
    mine = np.flatnonzero(source.rows.columns["path"] == name.encode())
    if not len(mine) or source.encoding != "hu16-v1":
        raise ValueError(f"{path}: {root} holds {source.encoding} and {len(mine)} slices of it; name a hu16 volume")
    try:
        hu = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({str(error)[:80]}); preprocess it again") from None
    row = source.rows[mine[0]]
    if hu.dtype != np.int16 or hu.shape[1:] != (row["rows"], row["cols"]) or hu.shape[0] != len(mine) + 2:
        raise ValueError(f"{path} is {hu.dtype} {hu.shape}, not what the index says; preprocess it again")
    affine = np.diag([row["spacing_x"], row["spacing_y"], row["spacing_z"], 1.0])
    affine[2, 3] = row["z_mm"] - row["z"] * row["spacing_z"]
    return turned(hu, affine, "the index keeps no place in the plane: x and y begin at 0 mm, z is that of the slices")


def read_dicom(folder):
    """One CT series of a folder, the one with most slices."""
    series = {}
    for scan in (dicom.scan_file(file) for file, _ in walk_files(folder)):
        if scan.series and not scan.reason:
            series.setdefault(scan.series, []).append(scan.path)
    if not series:
        raise ValueError(f"{folder} holds no CT series in DICOM")
    files = max(series.values(), key=lambda found: (len(found), found))
    slices = []
    try:
        for file in progress(sorted(files), "read", unit="file"):
            slices += dicom.read_slices(Path(file).read_bytes())
        found = max(dicom.assemble(slices, 3), key=lambda volume: len(volume.hu))
    except dicom.Reject as reject:
        raise in_words(folder, reject) from None
    sops = set(found.sops)
    at = {s.position: s for s in slices if s.sop in sops}
    kept = sorted(at.values(), key=lambda s: s.position @ normal(s))
    affine, first, last = np.eye(4), kept[0], kept[-1]
    row, column = np.array(first.orientation).reshape(2, 3)
    affine[:3, 0], affine[:3, 1] = row * first.spacing[1], column * first.spacing[0]
    affine[:3, 2] = np.subtract(last.position, first.position) / (len(kept) - 1)  # of a tilted gantry it is slanted
    affine[:3, 3] = first.position
    return turned(found.hu, affine, f"{len(series)} series, the largest is read" * (len(series) > 1))


def in_words(path, reject):
    return ValueError(f"{path}: {dicom.REASONS[reject.reason]}{f' ({reject.detail})' * bool(reject.detail)}")


def normal(s):
    return np.cross(s.orientation[:3], s.orientation[3:])


def read_itk(path):
    """NIfTI, MetaImage, NRRD: what SimpleITK reads, with the checks of preprocessing; any orientation."""
    reader = itk.load_itk()
    try:
        itk.check_data(itk.read_header(path))
        image = reader.ReadImage(str(path))
        hu, _ = itk.to_hu(reader.GetArrayFromImage(image))
    except dicom.Reject as reject:
        raise in_words(path, reject) from None
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[-160:]}") from None
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return turned(hu, affine)


# ----- NIfTI-1 (nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h)


def quaternion(turn):
    """b, c, d of a rotation matrix, and -1 where it mirrors."""
    mirror = -1.0 if np.linalg.det(turn) < 0 else 1.0
    turn = turn * (1, 1, mirror)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = turn
    values, vectors = np.linalg.eigh(  # its largest eigenvalue has the quaternion: Bar-Itzhack 2000
        [[xx - yy - zz, xy + yx, xz + zx, zy - yz], [xy + yx, yy - xx - zz, yz + zy, xz - zx],
         [xz + zx, yz + zy, zz - xx - yy, yx - xy], [zy - yz, xz - zx, yx - xy, xx + yy + zz]]
    )  # fmt: skip
    b, c, d, a = vectors[:, values.argmax()] * (1 if vectors[3, values.argmax()] >= 0 else -1)
    return (b, c, d), mirror


def nifti_header(size, channels, affine):
    """352 bytes for float32 of `size` (x, y, z); several channels are a vector in each voxel."""
    world, step = RAS @ affine, spacing(affine)
    square = np.abs((world[:3, :3] / step).T @ (world[:3, :3] / step) - np.eye(3)).max() < 1e-4
    turn, mirror = quaternion(world[:3, :3] / step) if square else ((0, 0, 0), 1.0)
    dim = (3, *size, 1, 1, 1, 1) if channels == 1 else (5, *size, 1, channels, 1, 1)
    header = struct.pack("<i36x8h12xh", 348, *dim, 0 if channels == 1 else 1007)
    header += struct.pack("<3h8f3fh2b4f2i", 16, 32, 0, mirror, *step, 1, 1, 1, 1, 352, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0)
    header += struct.pack("<80s24s2h3f3f", b"", b"", int(square), 1, *turn, *world[:3, 3])
    header += struct.pack("<12f16s4s4x", *world[:3].ravel(), b"", b"n+1\0")
    assert len(header) == 352
    return header


def write_nifti(path, channels, affine):
    """[C, Z, Y, X] -> float32 file, .nii or .nii.gz; the affine (LPS) is of the index (x, y, z)."""

    def write(f):
        with gzip.GzipFile("", "wb", 1, f, 0) if str(path).endswith(".gz") else contextlib.nullcontext(f) as out:
            out.write(nifti_header(channels.shape[:0:-1], len(channels), affine))
            for plane in progress([(c, z) for c in range(len(channels)) for z in range(channels.shape[1])], "write",
                                  unit="slice"):  # fmt: skip
                out.write(np.ascontiguousarray(channels[plane], "<f4").tobytes())

    os.makedirs(Path(path).parent, exist_ok=True)
    return atomic_write(Path(path), write)

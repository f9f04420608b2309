"""Lesions from mask volumes, or from LUNA16's centres and diameters -> _labels/nodules.csv and masks/<id>.npz.

    python tools/lesion_labels.py --masks data/ct_samples/masks --data data/processed
    python tools/lesion_labels.py --annotations annotations.csv --raw data/luna16 --data data/processed

A mask file (.nii.gz, .nrrd, .mhd) is named as its series and lies as it does; each connected piece of each of its
values is a lesion. annotations.csv (seriesuid,coordX,coordY,coordZ,diameter_mm) gives spheres. candidates_V2.csv, which
has a class, gives a table _labels/candidates.csv; all its diameters are --candidate-mm, so that size cannot betray the
class. --raw holds the volumes: the index does not know where left begins. nodule_heatmaps.py reads the result.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import read_csv, read_index
from tools.lib import itk
from tools.lib.cli import Parser, above_zero, run, shown
from tools.lib.dicom import Reject
from tools.lib.files import csv_text, walk_files
from tools.lib.manifest import index_path
from tools.lib.nodules import measure, spread, tight, write_masks
from tools.lib.progress import progress

COLUMNS = "id path z y x label group diameter_mm box_mm patient series z0 z1 y0 y1 x0 x1 volume_mm3".split()
CENTRE = ("seriesuid", "coordX", "coordY", "coordZ")
LARGEST_MM = 300  # of a lesion


class Series(NamedTuple):
    """What the index knows of a series; z of its inner slices."""

    name: str
    paths: dict  # z -> path
    group: str
    patient: str
    z_mm: float  # of slice 0
    voxel: np.ndarray  # mm z, y, x
    shape: tuple  # slices, rows, cols


def read_series(data):
    """{name: Series} of a processed CT folder."""
    rows = read_index(index_path(data))
    members = defaultdict(list)
    for i, code in enumerate(rows.columns["series"].tolist()):
        members[code].append(i)
    found = {}
    for some in members.values():
        row, zs = rows[some[0]], rows.columns["z"][some].tolist()
        voxel = np.array([row[f"spacing_{axis}"] for axis in "zyx"])
        paths = {z: rows.columns["path"][i].decode() for z, i in zip(zs, some)}
        start = row["z_mm"] - row["z"] * voxel[0]
        shape = (max(zs) + 2, row["rows"], row["cols"])
        group = f"{row['dataset']}/{row['patient']}"
        found[row["series"]] = Series(row["series"], paths, group, row["patient"], start, voxel, shape)
    return found


# Masks.


def pieces(mask):
    """[(bool [z, y, x], origin)] of the pieces of a mask that do not touch."""
    rest, corner = tight(mask)
    rest, found = rest.copy(), []
    while rest.any():
        seed = np.zeros_like(rest)
        seed[tuple(np.argwhere(rest)[0])] = True
        piece = spread(seed, rest)
        rest &= ~piece
        found.append(tight(piece, corner))
    return found


def read_masks(path, series):
    """Lesions of one mask file [(mask, origin, label)]; it must lie as its series does."""
    try:
        values, direction, origin, spacing, _ = itk.read_array(itk.read_header(path, mask=True))
    except Reject as reject:
        raise ValueError(f"{path}: {reject.reason} {reject.detail}; write the mask anew, or leave it out") from None
    start = origin @ direction[:, 2]
    if values.shape != series.shape or np.abs(spacing[::-1] / series.voxel - 1).max() > 1e-3:
        raise ValueError(f"{path}: {values.shape} voxels of {spacing[::-1]} mm, its series has {series.shape} of "
                         f"{series.voxel}; a mask must lie on the voxels of its volume")  # fmt: skip
    if abs(start - series.z_mm) > series.voxel[0] / 4:
        raise ValueError(f"{path} begins at {start:.1f} mm, its series at {series.z_mm:.1f} mm; is it of another scan?")
    names = np.unique(values)
    if len(names) > 100 or (names != np.round(names)).any():
        raise ValueError(f"{path}: {len(names)} different values; a mask has 0 and a few whole numbers")
    return [(*piece, "unrated") for name in names[names != 0] for piece in pieces(values == name)]


# LUNA16's tables.


def read_centres(path, more):
    """{series: [(x, y, z in mm, value of column `more`)]}"""
    chunks = read_csv(path)
    header, found = next(chunks), defaultdict(list)
    if lacking := [name for name in (*CENTRE, more) if name not in header]:
        raise ValueError(f"{path}: columns {shown(','.join(header))}, expected {','.join((*CENTRE, more))}; "
                         f"there is no {lacking[0]}")  # fmt: skip
    name_at, *at = (header.index(name) for name in (*CENTRE, more))
    for number, row in enumerate((row for chunk in chunks for row in chunk if row), 2):
        try:
            name, values = row[name_at], [float(row[k]) for k in at]
        except (ValueError, IndexError):
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{path}, row {number}: not three coordinates and {more}; download it again")
        found[name].append((np.array(values[:3]), values[3]))
    return found


def find_places(raw, wanted):
    """{series: (directions, origin, spacing)} of the volumes below `raw` that are named as one that is wanted."""
    found = {}
    for path, _ in progress(walk_files(raw), "places", unit="file"):
        name = Path(path).name[: -len(itk.ending(path)) or None]
        if not itk.ending(path) or name not in wanted:
            continue
        try:
            place = itk.read_place(path)
        except (Reject, OSError):
            continue  # preprocessing says why
        if name in found and not all(np.allclose(a, b) for a, b in zip(found[name], place)):
            raise ValueError(f"--raw {raw}: two files named {shown(name)} lie differently; remove one")
        found[name] = place
    return found


def to_voxel(point, place):
    """A point (x, y, z) in mm -> voxel z, y, x as fractions."""
    direction, origin, spacing = place
    return (direction.T @ (point - origin) / spacing)[::-1]


def sphere(centre, diameter, series):
    """-> bool [z, y, x] (tight), origin; the part inside the volume, at least the voxel of the centre."""
    reach = diameter / 2 / series.voxel
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach).astype(int) + 1, series.shape)
    axes = [(np.arange(a, b) - c) * mm for a, b, c, mm in zip(low, high, centre, series.voxel)]
    mask = sum(np.meshgrid(*(axis**2 for axis in axes), indexing="ij")) <= (diameter / 2) ** 2
    mask[tuple(np.clip(np.rint(centre).astype(int) - low, 0, np.array(mask.shape) - 1))] = True
    return tight(mask, low)


# The table.


def from_masks(folder, known, counts):
    """[(Series, mask, origin, label)] of all mask files that are named as a series."""
    found = []
    for path, _ in progress(walk_files(folder), "masks", unit="file"):
        series = known.get(Path(path).name[: -len(itk.ending(path)) or None]) if itk.ending(path) else None
        counts["mask files" if series else "files that are named as no series"] += 1
        found += [(series, *lesion) for lesion in read_masks(Path(path), series)] if series else []
    return found


def located(table, places, known, counts):
    """Of each centre of a table: (Series, voxel z, y, x, value); what lies outside its volume is counted."""
    for name, centres in table.items():
        if name not in known or name not in places:
            counts["centres of series that are not in the index" if name not in known else
                   "centres of series without a file below --raw"] += len(centres)  # fmt: skip
            continue
        for point, value in centres:
            voxel = to_voxel(point, places[name])
            if (voxel < -0.5).any() or (voxel > np.array(known[name].shape) - 0.5).any():
                counts["centres outside their volume"] += 1
                continue
            yield known[name], voxel, value


def write_candidates(path, table, places, known, counts, diameter):
    """_labels/candidates.csv: id,path,z,y,x,label,group,diameter_mm,box_mm."""
    rows, number = [], Counter()
    for series, voxel, label in located(table, places, known, counts):
        number[series.name] += 1
        z = int(np.clip(round(voxel[0]), min(series.paths), max(series.paths)))
        y, x = (f"{np.clip(v, 0, n - 1):.3f}" for v, n in zip(voxel[1:], series.shape[1:]))
        identity = f"{series.name[-40:]}_{number[series.name]:05d}"
        rows.append([identity, series.paths[z], z, y, x, int(label), series.group, f"{diameter:g}", f"{diameter:g}"])
    write_text(path, csv_text([COLUMNS[:9], *rows]))
    print(f"{path}: {len(rows)} candidates, {sum(row[5] for row in rows)} of class 1")


def write_labels(folder, found):
    """nodules.csv and masks/<id>.npz of [(Series, mask, origin, label)]."""
    number, rows, masks = Counter(), [], {}
    for series, mask, origin, label in sorted(found, key=lambda item: (item[0].name, *item[2].tolist())):
        number[series.name] += 1
        name = f"{re.sub('[^A-Za-z0-9_.-]', '_', series.name[-40:])}_{number[series.name]:02d}"
        row = {"id": name, "label": label, "group": series.group, "patient": series.patient, "series": series.name}
        rows.append(row | measure(mask, origin, series.voxel, series.paths)[0])
        masks[name] = {"union": mask, "majority": mask, "origin": origin}
    if len(masks) < len(rows):
        raise ValueError(f"{folder}: two series whose names end in the same 40 letters; rename one of them")
    write_masks(folder / "masks", masks)
    write_text(folder / "nodules.csv", csv_text([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]))
    print(f"{folder / 'nodules.csv'}: {len(rows)} lesions of {len(number)} series, masks in {folder / 'masks'}")


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="processed CT folder")
    parser.add_argument("--masks", type=Path, help="folder of mask volumes, each named as its series")
    parser.add_argument("--annotations", type=Path, help="LUNA16's annotations.csv")
    parser.add_argument("--candidates", type=Path, help="LUNA16's candidates_V2.csv")
    parser.add_argument("--raw", type=Path, help="folder of the volumes, for the places of centres")
    parser.add_argument("--candidate-mm", type=above_zero, default=10, help="diameter of every candidate")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.masks) == bool(args.annotations or args.candidates):
        parser.error("give --masks, or --annotations and --candidates of LUNA16")
    if not args.masks and not args.raw:
        parser.error("--annotations and --candidates need --raw, the folder of the volumes")
    for folder in filter(None, (args.masks, args.raw)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
    if not index_path(args.data).exists():
        raise FileNotFoundError(f"{index_path(args.data)} does not exist; run tools/preprocess_volumes.py")
    known, counts, labels = read_series(args.data), Counter(), args.data / "_labels"
    if args.masks:
        found = from_masks(args.masks, known, counts)
    else:
        tables = [(path, read_centres(path, more)) for path, more in
                  ((args.annotations, "diameter_mm"), (args.candidates, "class")) if path]  # fmt: skip
        places = find_places(args.raw, {name for _, table in tables for name in table} & {*known})
        found = []
        for path, table in tables:
            if path == args.candidates:
                write_candidates(labels / "candidates.csv", table, places, known, counts, args.candidate_mm)
                continue
            for series, voxel, diameter in located(table, places, known, counts):
                if not 0 < diameter < LARGEST_MM:
                    raise ValueError(f"{path}: diameter {diameter:g} mm of {series.name}; download it again")
                found.append((series, *sphere(voxel, diameter, series), "unrated"))
    for name, n in sorted(counts.items()):
        print(f"{n:7} {name}")
    if found:
        write_labels(labels, found)
    elif not args.candidates:
        raise ValueError(f"no lesion of a series of {args.data}: are the files named as the series of the index?")
    return 0


if __name__ == "__main__":
    run(main)

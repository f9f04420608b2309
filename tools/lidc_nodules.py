"""What LIDC's readers said, as tables and masks: _labels/nodules.csv, malignancy.csv, nodules.json, masks/<id>.npz.

    python tools/lidc_nodules.py --raw data/raw --data data/processed --readers 3 --rule median --indeterminate drop

Reads the XML files below --raw itself; a region belongs to the slice of its SOPInstanceUID, whose position must agree;
where the index has no such ids (LUNA16's volumes) to the slice at its z of the series of its SeriesInstanceUID.
Marks of different reading sessions that overlap are one nodule, with at most one mark per session. A nodule's centre,
box and size are those of its majority mask (at least half of its readers). Marks without an outline (nodules below
3 mm, non-nodules) are counted and left out, as is every file and mark that does not fit, with its reason.
"""

import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from pydicom import dcmread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import file_sha256, read_index, regular
from tools.lib.cli import Parser, positive, run, shown
from tools.lib.dicom import MAX_PIXELS, Reject, default_key_file, load_key, parsing, public_id, scan_file, value_of
from tools.lib.files import csv_text, walk_files, write_json
from tools.lib.manifest import index_path, read_manifest
from tools.lib.nodules import measure, spread, tight, write_masks
from tools.lib.progress import progress

VERSION = 1
RATINGS = "subtlety internalStructure calcification sphericity margin lobulation spiculation texture malignancy".split()
COLUMNS = (
    "id path z y x label group diameter_mm box_mm patient series z_mm y_mm x_mm z0 z1 y0 y1 x0 x1 volume_mm3 readers "
    "sessions"
).split() + [*RATINGS, "mean_malignancy", "median_malignancy"]
BINARY_COLUMNS = [*COLUMNS[:9], "readers", "mean_malignancy", "median_malignancy"]
RULES = {"median": np.median, "mean": np.mean, "rint-mean": lambda values: np.rint(np.mean(values))}  # 3: undecided
UNRATED = "?"  # a rating that a reader left out
MAX_XML, MAX_ELEMENTS = 1 << 23, 1 << 19  # bytes and elements of one file; 180 contours of 80 points: 850 kB, 44,000
NUMBERED = ("roi", "edgeMap")  # elements whose line an error names
MIN_OVERLAP = 0.1  # of the smaller mark: outlines of neighbours that touch are two nodules


class Roi(NamedTuple):
    """One closed contour on one slice."""

    sop: str
    z_mm: float
    inclusion: bool
    path: np.ndarray  # [points, 2] row, column


class Mark(NamedTuple):
    """One reader's outline of one nodule."""

    session: int  # 1, 2, ... in the order of the file
    ratings: dict  # of RATINGS, None where missing
    mask: np.ndarray  # bool [dz, dy, dx], tight
    origin: np.ndarray  # z, y, x of its first voxel


class Series(NamedTuple):
    """What the index knows of a series; of its inner slices only."""

    row: dict  # its first slice
    z_mm: dict  # z -> position along the normal
    paths: dict  # z -> path
    turned: tuple | None = None  # of a volume without SOPInstanceUIDs: were y and x turned round?


# The XML.


class Tree:
    """Builds the elements of one file, piece by piece. Entities are refused: a few lines of them make gigabytes."""

    def __init__(self):
        self.parser, self.root, self.count = expat.ParserCreate(namespace_separator="}"), None, 0
        builder = ET.TreeBuilder()
        self.parser.buffer_text, self.begin = True, builder.start
        self.parser.StartElementHandler, self.parser.EndElementHandler = self.start, builder.end
        self.parser.CharacterDataHandler, self.parser.EntityDeclHandler = builder.data, self.entity

    def start(self, tag, attributes):
        element = self.begin(tag, {"line": self.parser.CurrentLineNumber} if tag.endswith(NUMBERED) else {})
        self.count += 1
        if self.count == 1:
            self.root = element
        elif self.count > MAX_ELEMENTS:
            raise ValueError(f"it has more than {MAX_ELEMENTS} elements")

    def entity(self, *_):
        raise ValueError(f"line {self.parser.CurrentLineNumber} declares an entity, which LIDC's files never do")


def name_of(element):
    return element.tag.rsplit("}", 1)[-1]  # without the namespace


def children(element, name):
    return [child for child in element if name_of(child) == name]


def text_at(element, name):
    found = children(element, name)
    return (found[0].text or "").strip() if found else ""


def number_at(path, element, name, kind=int):
    """The number that a child of the element holds, below a million; int and float themselves take 1_0 and 1e308."""
    text = text_at(element, name)
    if re.fullmatch(r"[+-]?[0-9]{1,6}" if kind is int else r"[+-]?[0-9]{1,6}(\.[0-9]{0,20})?([eE]-[0-9]{1,2})?", text):
        return kind(text)
    line = element.get("line")
    raise ValueError(f"{path}, line {line}: {name} is {shown(text)!r}, expected a number; download the file again")


def read_xml(path):
    """-> (series uid, [session elements]), or (None, reason) for a file of another kind, whose rest is not read."""
    tree = Tree()
    try:
        with open(regular(path), "rb") as f:
            tree.parser.Parse(f.read(1 << 16), False)
            root = tree.root
            if root is not None and name_of(root) == "IdriReadMessage":
                return None, "XML of a chest radiograph"
            if root is not None and name_of(root) != "LidcReadMessage":
                return None, "XML that is no LIDC reading"
            if (size := os.fstat(f.fileno()).st_size) > MAX_XML:
                raise ValueError(f"it has {size} bytes, readings at most {MAX_XML}")
            tree.parser.Parse(f.read(), True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # LookupError, ValueError: of unknown encodings
        raise ValueError(f"{path} is no XML of LIDC ({shown(error, 200)}); download it again") from None
    (header, *_) = children(tree.root, "ResponseHeader") or [tree.root]
    return text_at(header, "SeriesInstanceUid"), children(tree.root, "readingSession")


def read_roi(path, element):
    points = [[number_at(path, e, "yCoord"), number_at(path, e, "xCoord")] for e in children(element, "edgeMap")]
    inclusion = text_at(element, "inclusion").upper()
    if not points or inclusion not in ("TRUE", "FALSE"):
        what = f"a roi without edgeMap, or inclusion {shown(inclusion)!r}"
        raise ValueError(f"{path}, line {element.get('line')}: {what}; download the file again")
    z_mm = number_at(path, element, "imageZposition", float)
    return Roi(text_at(element, "imageSOP_UID"), z_mm, inclusion == "TRUE", np.array(points))


def read_ratings(nodule):
    """{name: 1..6 or None}; a nodule below 3 mm has none, a few others lack some."""
    (element, *_) = children(nodule, "characteristics") or [None]
    ratings = {}
    for name in RATINGS:
        text = "" if element is None else text_at(element, name)
        ratings[name] = int(text) if re.fullmatch("[1-6]" if name == "calcification" else "[1-5]", text) else None
    return ratings


def connect(path):
    """The pixels of a closed path whose steps may be longer than one pixel, [n, 2]."""
    pieces = [path[:1]]
    for a, b in zip(path, np.roll(path, -1, 0)):
        steps = np.abs(b - a).max()
        pieces.append(np.rint(a + (b - a) * np.arange(1, steps + 1)[:, None] / max(steps, 1)).astype(int))
    return np.concatenate(pieces)


def enclosed(path):
    """-> first pixel (row, column), bool [h, w] of the contour, bool [h, w] of what it encloses."""
    path = connect(path)
    low = path.min(0) - 1
    wall = np.zeros(path.max(0) - low + 2, bool)
    wall[tuple((path - low).T)] = True
    rim = np.ones_like(wall)
    rim[1:-1, 1:-1] = False
    return low, wall, ~spread(rim, ~wall) & ~wall


def make_mask(rois, slices):
    """Contours on slices z -> tight (mask, origin), or None if they enclose nothing.

    A contour runs through the first pixels outside the nodule, so it is never part of it: not of the nodule where it
    includes, and part of the hole where it excludes.
    """
    pieces = [(z, roi.inclusion, *enclosed(roi.path)) for roi, z in zip(rois, slices)]
    low = np.array([[z, *corner] for z, _, corner, _, _ in pieces])
    high = low + [[1, *wall.shape] for _, _, _, wall, _ in pieces]
    origin = low.min(0)
    mask = np.zeros(high.max(0) - origin, bool)
    for z, inclusion, corner, wall, inside in sorted(pieces, key=lambda piece: not piece[1]):  # holes come last
        row, col = corner - origin[1:]
        window = mask[z - origin[0], row : row + wall.shape[0], col : col + wall.shape[1]]
        window[inside if inclusion else inside | wall] = inclusion
    return tight(mask, origin)


# Where a contour lies in our volumes.


class Places:
    """SOPInstanceUIDs of the index, as they are or as preprocess_dicom.py hashed them."""

    def __init__(self, data, key):
        self.root, self.path, self.key = data, index_path(data), key
        self.rows = read_index(self.path)
        sops = self.rows.column("sop").tolist()
        self.row_of = {sop.decode(): i for i, sop in enumerate(sops) if sop}
        if len(self.row_of) < len(sops) - sops.count(b""):
            raise ValueError(f"{self.path} has slices twice, in two datasets; keep one of them")
        self.z, self.z_mm = self.rows.column("z"), self.rows.column("z_mm")
        self.code, self.members = self.rows.columns["series"].tolist(), defaultdict(list)
        for i, code in enumerate(self.code):
            self.members[code].append(i)

    def find(self, sop):
        """Row of the index, or None."""
        return self.row_of.get(sop, self.row_of.get(public_id("sop", sop, self.key)))

    def bare(self, uid):
        """A series of this SeriesInstanceUID whose slices have no ids of their own; None if there is none."""
        names = self.rows.names["series"]
        code = names.index(uid) if uid in names else None
        if code not in self.members or self.rows[self.members[code][0]]["sop"]:
            return None
        series = self.series(self.members[code][0])
        handled = read_manifest(self.root, series.row["dataset"])["handled"].get(uid, {})
        if handled.get("exchanged_axes"):
            raise ValueError(f"{self.path}: series {uid} was stored in other planes than it was read in; leave it out")
        return series._replace(turned=tuple(bool(handled.get(f"turned_{axis}")) for axis in "yx"))

    def series(self, i):
        """The series of a row. What its numbers and names could spoil is refused: sizes of nodules, names of files."""
        members = self.members[self.code[i]]
        row, z = self.rows[members[0]], self.z[members].tolist()
        sound = all(0.01 < row[f"spacing_{axis}"] < 100 for axis in "zyx") and min(z) >= 1
        sound &= 0 < row["rows"] * row["cols"] <= MAX_PIXELS and min(row["rows"], row["cols"]) > 0
        if not sound or not all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", row[key]) for key in ("patient", "series")):
            raise ValueError(
                f"{self.path}, line {members[0] + 2}: series {shown(row['series'])} of patient {shown(row['patient'])} "
                "has a spacing, a size, a z or an id that preprocessing never writes; preprocess again"
            )
        paths = [path.decode() for path in self.rows.column("path")[members]]
        return Series(row, dict(zip(z, self.z_mm[members].tolist())), dict(zip(z, paths)))


def direction(rois, rows, places):
    """+1, or -1 where the slice normal points to the feet: z of the XML is ImagePositionPatient's."""
    pairs = [(roi.z_mm, places.z_mm[i]) for roi, i in zip(rois, rows) if i is not None]
    return min((1, -1), key=lambda sign: np.median([abs(sign * z - at) for z, at in pairs]))


def locate(roi, row, series, sign, places):
    """z of a contour's slice, or a reason. The first and the last slice are not in the index: found by position."""
    spacing = series.row["spacing_z"]
    first = min(series.z_mm)
    exact = first + (sign * roi.z_mm - series.z_mm[first]) / spacing
    z = round(exact) if row is None else int(places.z[row])
    if row is None and z not in (min(series.z_mm) - 1, max(series.z_mm) + 1):
        return "contour on a slice that its series does not have"
    expected = series.z_mm.get(z, series.z_mm[first] + (z - first) * spacing)
    if abs(sign * roi.z_mm - expected) > max(spacing / 2, 0.1):
        return "imageZposition contradicts the slice of its SOPInstanceUID"
    if (roi.path < 0).any() or (roi.path >= (series.row["rows"], series.row["cols"])).any():
        return "contour outside the image"
    return z


def locate_bare(roi, series):
    """z of a contour by its position alone, and the contour as the volume lies; or a reason and the contour."""
    first, spacing = min(series.z_mm), series.row["spacing_z"]
    exact = first + (roi.z_mm - series.z_mm[first]) / spacing
    z = round(exact)
    if not 0 <= z <= max(series.z_mm) + 1:
        return "contour on a slice that its series does not have", roi
    if abs(exact - z) * spacing > max(spacing / 5, 0.1):
        return "imageZposition lies between slices", roi
    last = np.array([series.row["rows"], series.row["cols"]]) - 1
    if (roi.path < 0).any() or (roi.path > last).any():
        return "contour outside the image", roi
    return z, roi._replace(path=np.where(series.turned, last - roi.path, roi.path))


def read_marks(path, uid, sessions, places, counts):
    """Marks of one file with an outline -> (its Series or None, [Mark]); everything else is counted."""
    found = []
    for number, session in enumerate(sessions, 1):
        counts["non-nodules"] += len(children(session, "nonNodule"))
        for nodule in children(session, "unblindedReadNodule"):
            found.append((number, nodule, [read_roi(path, e) for e in children(nodule, "roi")]))
    rois = [roi for *_, mine in found for roi in mine]
    rows = {roi.sop: places.find(roi.sop) for roi in rois}
    known = sorted({row for row in rows.values() if row is not None})
    series = places.bare(uid) if rois and not known else None
    if not known and not series:
        counts["files whose slices are not in the index" if rois else "files without a nodule"] += 1
        return None, []
    if len({places.code[i] for i in known}) > 1:
        raise ValueError(f"{path}: its slices belong to several series of the index; preprocess again without copies")
    series = series or places.series(known[0])
    sign = direction(rois, [rows[roi.sop] for roi in rois], places) if known else 1
    marks, drawn = [], set()
    for number, nodule, mine in found:
        if series.turned:
            slices, mine = zip(*(locate_bare(roi, series) for roi in mine)) if mine else ([], [])
        else:
            slices = [locate(roi, rows[roi.sop], series, sign, places) for roi in mine]
        reasons = [z for z in slices if isinstance(z, str)]
        outline = make_mask(mine, slices) if mine and not reasons else None
        if outline is None:
            counts[reasons[0] if reasons else "marks without outline (below 3 mm)"] += 1
            continue
        mask, origin = outline
        if (mark := (number, *origin.tolist(), mask.shape, mask.tobytes())) in drawn:
            counts["marks that a reader drew twice"] += 1
            continue
        drawn.add(mark)
        marks.append(Mark(number, read_ratings(nodule), mask, origin))
        counts["marks with outline"] += 1
        counts["marks without malignancy"] += marks[-1].ratings["malignancy"] is None
    return series, marks


# Readers' marks -> nodules.


def overlap(a, b):
    """Shared voxels as a share of the smaller mark."""
    low = np.maximum(a.origin, b.origin)
    high = np.minimum(a.origin + a.mask.shape, b.origin + b.mask.shape)
    if (high <= low).any():
        return 0.0
    parts = [m.mask[tuple(map(slice, low - m.origin, high - m.origin))] for m in (a, b)]
    return (parts[0] & parts[1]).sum() / min(a.mask.sum(), b.mask.sum())


def cluster(marks):
    """Lists of marks of one nodule: best overlap first, never two of one session."""
    pairs = [(overlap(a, b), i, j) for i, a in enumerate(marks) for j, b in enumerate(marks[:i])]
    groups = {i: [i] for i in range(len(marks))}
    for share, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
        sessions = [marks[k].session for k in groups[i] + groups[j]]
        if share < MIN_OVERLAP or groups[i] is groups[j] or len(set(sessions)) < len(sessions):
            continue
        groups[i] += groups[j]
        for k in groups[j]:
            groups[k] = groups[i]
    unique = {id(group): group for group in groups.values()}.values()
    return [sorted((marks[k] for k in group), key=lambda mark: mark.session) for group in unique]


def combine(marks):
    """-> bool masks union and majority [dz, dy, dx] and their origin."""
    origin = np.min([m.origin for m in marks], 0)
    votes = np.zeros(np.max([m.origin + m.mask.shape for m in marks], 0) - origin, int)
    for m in marks:
        votes[tuple(map(slice, m.origin - origin, m.origin - origin + m.mask.shape))] += m.mask
    return votes > 0, 2 * votes >= len(marks), origin


def describe(marks, series, affine):
    """-> (row of nodules.csv without id, masks). affine(voxel) -> mm of the patient, or None."""
    union, majority, origin = combine(marks)
    voxel = np.array([series.row[f"spacing_{axis}"] for axis in "zyx"])
    row, centre = measure(majority, origin, voxel, series.paths)
    rated = [m.ratings["malignancy"] for m in marks if m.ratings["malignancy"] is not None]
    mm = [f"{value:.3f}" for value in affine(centre)] if affine else [""] * 3
    row |= {"label": f"{np.median(rated):g}" if rated else "unrated"}
    row |= {"group": f"{series.row['dataset']}/{series.row['patient']}"}
    row |= {key: series.row[key] for key in ("patient", "series")}
    row |= dict(zip(("z_mm", "y_mm", "x_mm"), mm))
    row |= {"readers": len(marks), "sessions": " ".join(str(m.session) for m in marks)}
    row |= {name: " ".join(str(m.ratings[name] or UNRATED) for m in marks) for name in RATINGS}
    row |= {"mean_malignancy": f"{np.mean(rated):.4g}", "median_malignancy": f"{np.median(rated):g}"} if rated else {}
    return row, {"union": union, "majority": majority, "origin": origin}


# Patient coordinates: the index keeps only the position along the normal; the rest is read from one slice per series.


def read_affine(path, row):
    """-> function voxel (z, y, x) -> mm (z, y, x) of the patient, from the file that a row of the index names."""
    again = "restore it, or preprocess again"
    try:
        with parsing("header"):
            ds = dcmread(path, stop_before_pixels=True)
            position = np.array(value_of(ds, "ImagePositionPatient", 3))
            cosines = np.array(value_of(ds, "ImageOrientationPatient", 6))
    except Reject as reject:
        raise ValueError(f"{path} is in the index and now damaged: {reject.detail}; {again}") from None
    normal = np.cross(cosines[:3], cosines[3:])
    if not (np.abs(position).max() < 1e4 and abs(position @ normal - row["z_mm"]) < 1 + 1e-3 * np.abs(position).max()):
        raise ValueError(f"{path}: ImagePositionPatient is not where the index has this slice; {again}")
    axes = np.stack([normal, cosines[3:], cosines[:3]])  # of z, y, x
    steps = axes * [[row[f"spacing_{axis}"]] for axis in "zyx"]
    return lambda voxel: (position + (voxel - [row["z"], 0, 0]) @ steps)[::-1]


def find_affines(paths, places, wanted):
    """{series: function voxel -> mm} for the series in `wanted`; first by one file per folder, as LIDC is laid out."""
    folders, found = defaultdict(list), {}
    for path in paths:
        folders[str(Path(path).parent)].append(path)
    for thorough in (False, True):
        for files in progress(folders.values(), "positions", unit="folder"):
            for path in files if len(found) < len(wanted) else ():
                scan = scan_file(path)
                row = None if scan.reason else places.find(scan.sop)
                if row is None or (name := places.rows[row]["series"]) not in wanted or name in found:
                    continue
                found[name] = read_affine(path, places.rows[row])
                if not thorough:
                    break
    return found


# Binary labels.


def verdict(row, readers, rule):
    """1 malignant, 0 benign, None indeterminate, or "few" with too few ratings."""
    rated = [int(text) for text in row["malignancy"].split() if text != UNRATED]
    if len(rated) < readers:
        return "few"
    value = RULES[rule](rated)
    return None if value == 3 else int(value > 3)


def count_rules(rows):
    """{rule: {"readers >= n": {benign, indeterminate, malignant}}} for every choice one could have made."""
    table = {}
    for rule in RULES:
        table[rule] = {}
        for readers in (1, 2, 3, 4):
            said = Counter(verdict(row, readers, rule) for row in rows)
            table[rule][f"readers >= {readers}"] = dict(benign=said[0], indeterminate=said[None], malignant=said[1])
    return table


def binary(rows, readers, rule, indeterminate):
    """Rows of malignancy.csv."""
    out = []
    for row in rows:
        label = verdict(row, readers, rule)
        label = 0 if label is None and indeterminate == "benign" else label
        out += [row | {"label": label}] if label in (0, 1) else []
    return out


# The program.


def write_table(path, columns, rows):
    text = csv_text([columns, *([row.get(name, "") for name in columns] for row in rows)])
    return write_text(path, text)


def read_all(paths, places, counts):
    """XML files -> [(Series, marks of one nodule)]."""
    nodules, readings = [], {}  # readings: {series uid of the XML, and name of the series in the index: (path, sha256)}
    for path in progress(paths, "readings", unit="file"):
        uid, sessions = read_xml(path)
        if uid is None:
            counts[sessions] += 1
            continue
        digest = file_sha256(path)
        if readings.get(uid or digest, ("", ""))[1] == digest:
            counts["copies of a reading"] += 1
            continue
        counts["readings"] += 1
        series, marks = read_marks(path, uid, sessions, places, counts)
        for name in (uid or digest, series and ("index", series.row["series"])):
            if name and (other := readings.setdefault(name, (path, digest))[0]) != path:
                raise ValueError(f"{path} and {other} are readings of one series; remove one of them")
        nodules += [(series, group) for group in cluster(marks)]
    return nodules


def number_nodules(described):
    """[(row, masks)] -> rows with ids, by patient, series and place, and {id: masks}."""
    described = sorted(described, key=lambda item: (item[0]["group"], item[0]["series"], item[0]["z"], item[0]["y0"]))
    number, rows, masks = Counter(), [], {}
    for row, arrays in described:
        name = f"{row['patient']}_{row['series'][-8:]}"
        number[name] += 1
        row["id"] = f"{name}_{number[name]:02d}"
        rows.append(row)
        masks[row["id"]] = arrays
    assert len(masks) == len(rows), "two nodules of one id"
    return rows, masks


def check(described):
    """Refuse what would spoil a table without a word: a nodule twice, a box outside its image, a size of no nodule."""
    seen = set()
    for series, row, masks in described:
        low, high = ([row[f"{axis}{end}"] for axis in "zyx"] for end in "01")
        where = f"series {row['series']}, nodule at z {row['z']}, y {row['y']}, x {row['x']}"
        if (nodule := (row["group"], row["series"], *low, *high, masks["majority"].tobytes())) in seen:
            raise ValueError(f"{where}: it is there twice; look for a doubled reading in the XML file of this series")
        seen.add(nodule)
        inside = min(low) >= 0 and high[1] <= series.row["rows"] and high[2] <= series.row["cols"]
        if not inside or not 0 < float(row["diameter_mm"]) < 500:
            size = f"box {low} to {high} or diameter {shown(row['diameter_mm'])} mm"
            raise ValueError(f"{where}: {size} cannot be; preprocess again")


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--raw", required=True, type=Path, help="folder with LIDC's XML and DICOM files, any nesting")
    parser.add_argument("--data", required=True, type=Path, help="processed root, for the same files")
    parser.add_argument("--readers", type=positive, default=3, help="fewest malignancy ratings for a binary label")
    parser.add_argument("--rule", choices=RULES, default="median", help="of the ratings; above 3 is malignant")
    parser.add_argument("--indeterminate", choices=("drop", "benign"), default="drop", help="what the rule puts at 3")
    parser.add_argument("--key-file", type=Path, help="of hashed ids; default: dinox_id_key beside --data, if there")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if not args.raw.is_dir():
        raise FileNotFoundError(f"--raw {args.raw} is not a folder")
    if not index_path(args.data).exists():
        raise FileNotFoundError(f"{index_path(args.data)} does not exist; run tools/preprocess_dicom.py")
    key_file = args.key_file or default_key_file(args.data)
    if args.key_file and not key_file.exists():
        raise FileNotFoundError(f"--key-file {key_file} does not exist; it is made by tools/preprocess_dicom.py")
    places = Places(args.data, load_key(key_file) if key_file.exists() else None)
    files = [path for path, _ in walk_files(args.raw)]
    xmls = [path for path in files if path.lower().endswith(".xml")]
    if not xmls:
        raise FileNotFoundError(f"--raw {args.raw} holds no .xml file; LIDC-IDRI has them as a download of their own")

    counts = Counter()
    found = read_all(xmls, places, counts)
    if not found:
        raise ValueError(f"no nodule of {len(xmls)} XML files lies in {args.data} ({dict(counts)}); is it another set?")
    others = [path for path in files if not path.lower().endswith(".xml")]
    affines = find_affines(others, places, {series.row["series"] for series, _ in found})
    described = [describe(marks, series, affines.get(series.row["series"])) for series, marks in found]
    check([(series, *item) for (series, _), item in zip(found, described)])
    counts["nodules without position in mm (no DICOM file below --raw)"] = sum(not row["z_mm"] for row, _ in described)
    rows, masks = number_nodules(described)

    labels = args.data / "_labels"
    write_masks(labels / "masks", masks)
    write_table(labels / "nodules.csv", COLUMNS, rows)
    chosen = binary(rows, args.readers, args.rule, args.indeterminate)
    write_table(labels / "malignancy.csv", BINARY_COLUMNS, chosen)
    report = {
        "version": VERSION,
        "counts": {name: n for name, n in sorted(counts.items()) if n},
        "nodules": len(rows),
        "nodules_by_readers": {str(n): c for n, c in sorted(Counter(row["readers"] for row in rows).items())},
        "rules": count_rules(rows),
        "chosen": {"readers": args.readers, "rule": args.rule, "indeterminate": args.indeterminate}
        | {"malignant": sum(row["label"] for row in chosen), "benign": sum(not row["label"] for row in chosen)},
        "index_sha256": file_sha256(index_path(args.data)),
        "nodules_sha256": file_sha256(labels / "nodules.csv"),
        "malignancy_sha256": file_sha256(labels / "malignancy.csv"),
    }
    write_json(labels / "nodules.json", report)
    show(report)
    print("\n".join(str(labels / name) for name in ("nodules.csv", "malignancy.csv", "nodules.json", "masks")))
    return 0


def show(report):
    """Counts in words, then every rule beside the others."""
    for name, n in report["counts"].items():
        print(f"{n:7} {name}")
    print(f"{report['nodules']:7} nodules, by readers {json.dumps(report['nodules_by_readers'])}")
    for rule, by_readers in report["rules"].items():
        for readers, n in by_readers.items():
            print(f"  {rule:9} {readers}:", ", ".join(f"{count} {name}" for name, count in n.items()))
    chosen = report["chosen"]
    print("malignancy.csv: {rule} of at least {readers}, indeterminate {indeterminate}: ".format(**chosen), end="")
    print("{benign} benign, {malignant} malignant".format(**chosen))


if __name__ == "__main__":
    run(main)

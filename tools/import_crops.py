"""Crops of nodules with a rating, three orthogonal 8-bit views each -> pictures and labels.csv for train_probe.py.

    python tools/import_crops.py --from downloads/crops --ratings downloads/ratings.csv --out data/crops
    python train_probe.py --ckpt runs/lidc/last.pth --data data/crops --labels labels.csv --out runs/crops --protocol cv

In: per nodule a .npy of uint8 [3, H, W] or [H, W, 3], or a picture of three channels, or three grey ones whose names
end in the view (axial, coronal, sagittal; ax, cor, sag; xy, xz, yz; 0, 1, 2), beside each other or in a folder each.
The rating (1 to 5, or 0 and 1) stands in --ratings (columns id and rating or malignancy or label), else in the name of
the file or its folder (rating_3, 3, benign, malignant). Above 3 is label 1, 3 is left out. The ruler is the diameter of
the bright region in the middle, in pixels, unless the table has diameter_mm. Nobody says whose nodules they are:
results are titled "crops, no patient grouping".
"""

import hashlib
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import BROKEN, PHOTO_ENDINGS, open_photo, read_csv
from tools.lib.cli import Parser, run, shown
from tools.lib.files import csv_text, walk_files
from tools.lib.progress import progress
from tools.lib.volumes import largest_region

NAMES_OF_VIEWS = ("axial ax xy", "coronal cor xz", "sagittal sag yz")
VIEWS = {name: k for k, names in enumerate(NAMES_OF_VIEWS) for name in names.split()}
WORD = re.compile(rf"(|.*[ _.-])({'|'.join(VIEWS)})", re.IGNORECASE)
DIGIT = re.compile(r"(|.*[ _.-])(?:view|plane)?[ _-]?([0-3])", re.IGNORECASE)
NAMED = re.compile(r"(?:rating|malignancy|label|class|score)[ _=-]*([0-5])(?![0-9])", re.IGNORECASE)
FOLDER = re.compile(r"([0-5])|(benign)|(malignant)", re.IGNORECASE)
IDS, RATINGS = ("id", "nodule", "name", "path", "file"), ("rating", "malignancy", "label")
COLUMNS = "path label rating diameter_{unit} box_{unit} unit".split()
LARGEST = 1 << 22  # pixels of a view


def read_views(path):
    """One file -> uint8 [C, H, W]: all its channels."""
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size > 3 * LARGEST:
            raise ValueError(f"{array.dtype} {array.shape}, expected uint8 [3, H, W] or [H, W, 3]")
        array = np.array(array)
    else:
        with open_photo(path) as file:
            if file.width * file.height > LARGEST or file.mode.startswith(("I", "F")):
                raise ValueError(f"{file.width} x {file.height} pixels of mode {file.mode}, expected a crop of 8 bits")
            grey = file.mode in ("1", "L", "LA")
            array = np.asarray(file.convert("L" if grey else "RGB"))
    if array.ndim == 2:
        return array[None]
    array = array.transpose(2, 0, 1) if array.shape[0] != 3 and array.shape[2] == 3 else array
    if array.shape[0] != 3:
        raise ValueError(f"shape {array.shape}: not three views")
    return array


def is_grey(path):
    """Whether a file is one view; None: it cannot be read, and whoever stacks it says why."""
    try:
        views = read_views(path)
    except BROKEN:
        return None
    return len(views) == 1 or bool((views == views[:1]).all())


def find_nodules(root):
    """{name of the nodule: {view or None: path}}; None: the file holds all of them."""
    found = defaultdict(dict)
    for text, _ in progress(walk_files(root), "files", unit="file"):
        path = Path(text)
        if path.suffix.lower() not in (*PHOTO_ENDINGS, ".npy"):
            continue
        word, digit = WORD.fullmatch(path.stem), DIGIT.fullmatch(path.stem)
        grey = is_grey(path)
        match = word if grey is None else word or digit if grey else None  # nodule_2.npy of three views is nodule 2
        stem, view = path.stem, None
        if match:
            stem, view = match[1].rstrip(" _.-"), VIEWS.get(match[2].lower()) if word else int(match[2])
        folder = path.relative_to(root).parent
        name = (folder / stem).as_posix() if stem else folder.as_posix()
        if view in found[name]:
            raise ValueError(f"{path} and {found[name][view]} are one view of one nodule; remove one")
        found[name][view] = path
    from_one = {name for name, views in found.items() if views.keys() == {1, 2, 3}}  # counted from 1
    return {name: {k - (name in from_one): path for k, path in views.items()} if name in from_one else views
            for name, views in found.items()}  # fmt: skip


def stack_views(paths):
    """Three views of one nodule, brought to the size of the largest by padding -> uint8 [3, H, W], or what is wrong."""
    try:
        if None in paths:
            return read_views(paths[None]) if len(paths) == 1 else "a file of all views and others"
        if set(paths) != {0, 1, 2}:
            return f"{len(paths)} views; three are needed"
        views = [read_views(paths[k]) for k in range(3)]
    except BROKEN as error:
        return f"cannot be read: {str(error)[:120]}"
    views = [view[0] for view in views]
    side = np.max([view.shape for view in views], 0)
    margins = [[(a := (n - m) // 2, n - m - a) for n, m in zip(side, view.shape)] for view in views]
    return np.stack([np.pad(view, margin) for view, margin in zip(views, margins)])


def read_ratings(path):
    """{id: (rating, diameter or "")} of a CSV."""
    header, *pieces = read_csv(path)
    names = [name.strip().lower() for name in header]
    key, value = (next((name for name in some if name in names), None) for some in (IDS, RATINGS))
    if not key or not value:
        raise ValueError(f"--ratings {path}: columns {shown(','.join(header))}, expected id and rating")
    found = {}
    for number, row in enumerate((row for piece in pieces for row in piece if row), 2):
        cells = dict(zip(names, map(str.strip, row)))
        try:
            rating, size = float(cells[value]), float(cells.get("diameter_mm") or 1)
        except (ValueError, KeyError):
            rating, size = -1.0, 1.0
        if len(row) != len(header) or not 0 <= rating <= 5 or not 0 < size < 1000:
            raise ValueError(f"--ratings {path}, row {number}: no rating from 0 to 5, or no diameter; correct it")
        name = re.sub(r"\.(npy|png|jpe?g|bmp|tiff?|webp)$", "", cells[key], flags=re.IGNORECASE)
        if name in found:
            raise ValueError(f"--ratings {path}, row {number}: {shown(name)} stands there twice")
        found[name] = rating, cells.get("diameter_mm", "")
    return found


def rating_of(name, ratings):
    """(rating, diameter) by the table, where there is one, else by the nearest folder that names one; or None."""
    if ratings is not None:
        return ratings.get(name) or ratings.get(name.rsplit("/", 1)[-1])
    if match := NAMED.search(name):
        return float(match[1]), ""
    for part in reversed(name.split("/")[:-1]):
        if match := FOLDER.fullmatch(part):
            return (float(match[1]) if match[1] else 5.0 if match[3] else 1.0), ""
    return None


def threshold(view):
    """Otsu's grey value, which parts dark from bright with the most variance between."""
    counts = np.bincount(view.ravel(), minlength=256).astype(float)
    below, mass = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(all="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return int(np.nan_to_num(between).argmax())


def measure(view):
    """Diameter (of a disc of equal area) and side of the box of what is bright in the middle of a view, in pixels."""
    bright = view > threshold(view)
    middle = np.zeros_like(bright)
    (h, w), reach = view.shape, 2
    middle[h // 2 - reach : h // 2 + reach, w // 2 - reach : w // 2 + reach] = True
    if not (bright & middle).any():
        return 1.0, 1.0
    region, rest = None, bright
    while region is None or not (region & middle).any():  # the largest one that reaches the middle
        region = largest_region(rest)
        rest = rest & ~region
    at = np.argwhere(region)
    return float(2 * np.sqrt(len(at) / np.pi)), float((at.max(0) - at.min(0) + 1).max())


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, type=Path, help="folder of crops, any nesting")
    parser.add_argument("--ratings", type=Path, help="CSV id,rating[,diameter_mm]; default: the folders' names")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to, new or empty")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if not args.source.is_dir():
        raise FileNotFoundError(f"--from {args.source} is not a folder")
    if args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        raise FileExistsError(f"--out {args.out} is there and not empty: name a new folder")
    nodules = find_nodules(args.source)
    ratings = read_ratings(args.ratings) if args.ratings else None
    given, kept, skipped = {name: rating_of(name, ratings) for name in nodules}, [], Counter()
    binary = {rating for rating, _ in filter(None, given.values())} <= {0.0, 1.0}
    for name in progress(sorted(nodules), "crops", unit="nodule"):
        views = stack_views(nodules[name]) if given[name] else "no rating"
        if isinstance(views, str):
            skipped[views] += 1
            continue
        rating, size = given[name]
        if rating == 3 and not binary:
            skipped["rated 3: indeterminate"] += 1
            continue
        kept.append([name, views, int(rating > (0.5 if binary else 3)), rating, size])
    for reason, n in skipped.most_common():
        print(f"{n:7} left out: {reason}")
    if len({label for _, _, label, *_ in kept}) < 2:
        few = f"{len(kept)} rated crops, not of both classes"
        raise ValueError(f"--from {args.source}: {few}; see --help for the forms")
    in_mm = all(size for *_, size in kept)
    rows = []
    (args.out / "crops").mkdir(parents=True)
    for name, views, label, rating, size in kept:
        path = f"crops/{re.sub('[^A-Za-z0-9_-]', '_', name)[-60:]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}.png"
        Image.fromarray(views.transpose(1, 2, 0)).save(args.out / path)
        sizes = [size, size] if in_mm else [f"{value:.3f}" for value in measure(views[0])]
        rows.append([path, label, f"{rating:g}", *sizes, "crops"])
    unit = "mm" if in_mm else "px"
    write_text(args.out / "labels.csv", csv_text([[name.format(unit=unit) for name in COLUMNS], *rows]))
    print(f"{args.out}: {len(rows)} crops, {sum(row[1] for row in rows)} with label 1; size in {unit}")
    return 0


if __name__ == "__main__":
    run(main)

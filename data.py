"""From files to a batch that is a pure function of (seed, step). Copyable: imports torch, numpy and pillow only.

    source = open_for("data/processed", "fit")
    loader = make_loader(source, "ct", seed=0, steps=range(1000), batch=32)
    for batch in loader:
        crops = render(batch.images.to(device), batch.plan)

Letters: B images, V views, C channels (three neighbouring slices, or RGB), N patches. Boxes are (y0, x0, y1, x1).
"""

import atexit
import contextlib
import copy
import csv
import datetime
import functools
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import tokenize
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# index.csv, one row per slice; paths are relative to the processed root
INDEX_COLUMNS = (
    "path encoding dataset patient study series sop z z_mm spacing_y spacing_x spacing_z rows cols "
    "body_y0 body_y1 body_x0 body_x1"
).split()
TEXT = ("path", "sop")  # one value per row
KEPT_ROWS = 100_000  # an index of so many rows gets a copy of its columns: reading its CSV takes over a second
REPEATED = ("encoding", "dataset", "patient", "study", "series")  # few values, many rows: kept as integer codes
NODULE = "id path z y x label group diameter_mm box_mm".split()  # a label table of CT nodules begins so

WINDOWS_HU = {"lung": (-600, 1500), "soft": (40, 400), "bone": (300, 1500)}  # level, width
RGB_WINDOWS = ("lung", "soft", "bone")  # channel order of rgb-v1: slices z-1, z, z+1
WIDE_HU = (-150, 1500)  # halfway between lung and bone: air, tissue and calcium are all inside (-900 .. 600 HU)
AIR_HU = -1024
PHOTO_ENDINGS, HEIC_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"), (".heic", ".heif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # opened by content: pillow would start Ghostscript for an EPS file
SIGNATURES = {b"%!PS": "EPS", b"\xc5\xd0\xd3\xc6": "EPS", b"%PDF": "PDF", b"GIF8": "GIF", b"RIFF": "AVI or broken",
              b"<": "HTML, XML or SVG", b"PK": "zip"}  # fmt: skip
PURPOSES = {"fit": "train", "select": "val_select", "calibrate": "val_calib", "test": "val_test"}
TABLES = ("labels.csv", "weights.csv")  # ours, in a folder of pictures
ODD_PATH = re.compile(r"^[./\s]|\\|//|/\.|\s$", re.MULTILINE)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as released DINOv3 weights expect
# first number in the key of each random stream, so that no two purposes share numbers
STREAMS = dict(
    order=1, crops=2, masks=3, limit=4, sizes=5, rope=6, depth=7, augment=8, mix=9, view=10, dropout=11, label=12
)
# what numpy and pillow say of broken files; tokenize: the header of a .npy is a Python literal
BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, struct.error, tokenize.TokenError)
BROKEN += (Image.DecompressionBombError,)


class Unreadable(OSError):
    """An image that cannot be read; the text names its file and why."""


def rng(seed, stream, *key):
    return np.random.default_rng((seed, STREAMS[stream], *key))


def window_codes(hu, level, width):
    """HU -> uint8 codes of one window: floor(255 * clip((HU - (L - W/2)) / W, 0, 1) + 0.5)."""
    x = (np.asarray(hu, np.float64) - (level - width / 2)) / width
    return np.floor(255 * np.clip(x, 0, 1) + 0.5).astype(np.uint8)


def find_table(root, path):
    """A table that was named: as it stands, else inside the data folder."""
    return path if path.exists() else Path(root) / path


def regular(path):
    """The path, if it is a file: a FIFO or a device would be waited for."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        raise OSError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")
    return path


def file_sha256(path):
    """Hex digest of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(regular(path), "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# Sources: a folder of files as a sequence of images with metadata.


class Taken(dict):
    """Columns of some rows of others, each made when it is asked for: all of ten million rows are 2 GB."""

    def __init__(self, base, at):
        super().__init__(dict.fromkeys(base))
        self.base, self.at = base, at.astype(np.int32)

    def __getitem__(self, key):
        if super().__getitem__(key) is None:
            self[key] = self.base[key][self.at]
        return super().__getitem__(key)


class Rows:
    """Columns of the index: rows[i] is a dict, rows.column(name) an array, rows.cell(name, i) one value.

    250,000 rows take about 60 MB: repeated texts are stored once, the others as bytes."""

    def __init__(self, columns, names):
        self.columns, self.names = columns, names  # names[column]: the texts behind integer codes

    def __len__(self):
        return len(self.columns.at if isinstance(self.columns, Taken) else self.columns["path"])

    def cell(self, key, i):
        columns, i = (self.columns.base, self.columns.at[i]) if isinstance(self.columns, Taken) else (self.columns, i)
        value = self.names[key][columns[key][i]] if key in self.names else columns[key][i].item()
        return value.decode() if isinstance(value, bytes) else value

    def __getitem__(self, i):
        return {key: self.cell(key, i) for key in self.columns}

    def column(self, key):
        values = self.columns[key]
        return np.array(self.names[key])[values] if key in self.names else values

    def texts(self, key):
        return [v.decode() if isinstance(v, bytes) else str(v) for v in self.column(key).tolist()]

    def take(self, index):
        if isinstance(self.columns, Taken):
            return Rows(Taken(self.columns.base, self.columns.at[index]), self.names)
        return Rows(Taken(self.columns, np.arange(len(self))[index]), self.names)


def read_csv(path, delimiter=","):
    """Header, then the rows in pieces (larger ones are 3x slower: garbage collection)."""
    try:
        with open(regular(path), newline="", encoding="utf-8-sig") as f:  # spreadsheets begin with a byte order mark
            reader = csv.reader(f, delimiter=delimiter)
            yield next(reader, [])
            while rows := list(itertools.islice(reader, 1024)):
                yield rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a UTF-8 CSV file ({error}); write it anew") from None


def read_index(path):
    """index.csv -> Rows, in pieces, so that texts never all exist as Python objects."""
    columns, names, keys = {key: [] for key in INDEX_COLUMNS}, {key: {} for key in REPEATED}, []
    pieces = read_csv(path)
    if (header := next(pieces)) != INDEX_COLUMNS:
        raise ValueError(f"{path}: columns {','.join(header)[:200]}; expected {','.join(INDEX_COLUMNS)}")
    for number, rows in enumerate(pieces):
        try:
            texts = dict(zip(INDEX_COLUMNS, zip(*rows, strict=True), strict=True))
            for key in INDEX_COLUMNS:
                columns[key].append(encode_column(key, texts[key], names))
            keys.append(np.fromiter(map(hash, zip(texts["path"], texts["z"])), np.int64, len(rows)))
        except (ValueError, OverflowError) as error:
            lines = f"{1024 * number + 2} to {1024 * number + len(rows) + 1}"
            raise ValueError(f"{path}: in lines {lines} a row is malformed: {str(error)[:200]}") from None
    if not columns["path"]:
        raise ValueError(f"{path} has no rows; preprocess again")
    rows = Rows({k: np.concatenate(v) for k, v in columns.items()}, {k: list(v) for k, v in names.items()})
    check_rows(path, rows, np.concatenate(keys))
    add_groups(rows)
    return rows


def add_groups(rows):
    """The column group: dataset/patient."""
    pair = rows.columns["dataset"].astype(np.int64) * len(rows.names["patient"]) + rows.columns["patient"]
    pairs, codes = np.unique(pair, return_inverse=True)
    split_pair = [divmod(int(p), len(rows.names["patient"])) for p in pairs]
    rows.names["group"] = [f"{rows.names['dataset'][d]}/{rows.names['patient'][p]}" for d, p in split_pair]
    rows.columns["group"] = codes.astype(np.int32)


def open_index(path):
    """index.csv -> (Rows, its sha256). The columns of a long one are kept beside it and mapped into memory: readers of
    ten million rows start at once and share the pages. A copy counts if size and time of the CSV, or size and hash, are
    those it was made of; else it is made anew.
    """
    facts, folder = os.stat(regular(path)), path.parent / "columns"
    key = [facts.st_size, facts.st_mtime_ns]
    try:
        known, n, sha, names = json.loads((folder / "about.json").read_text())
        if known == key or known[0] == key[0] and file_sha256(path) == sha:
            found = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*INDEX_COLUMNS, "group")}
            columns = {name: np.asarray(column) for name, column in found.items()}
            ends = [(columns[name].min(), columns[name].max() + 1, len(names[name])) for name in ("group", "series")]
            if all(len(c) == n for c in columns.values()) and all(0 <= low < high <= most for low, high, most in ends):
                return Rows(columns, names), sha
    except (*BROKEN, TypeError):
        pass  # there is none, or a damaged one
    rows, sha = read_index(path), file_sha256(path)
    if len(rows) >= KEPT_ROWS and key == [os.stat(path).st_size, os.stat(path).st_mtime_ns]:
        keep_columns(folder, rows, [key, len(rows), sha, rows.names])
    return rows, sha


def keep_columns(folder, rows, about):
    """Written aside and renamed; where nothing can be written, readers go on without."""
    spare = folder.with_name(f".columns-{os.getpid()}")
    try:
        spare.mkdir()
        for name in rows.columns:
            np.save(spare / f"{name}.npy", rows.columns[name])
        (spare / "about.json").write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        spare.rename(folder)
    except OSError as error:
        print(f"note: {folder} is not kept ({error}); every start reads the whole index")
    finally:
        shutil.rmtree(spare, ignore_errors=True)


def check_rows(path, rows, keys):
    """Refuse an index whose numbers would move results without a word, naming the first line that does."""
    c, (_, first, count) = rows.columns, np.unique(keys, return_index=True, return_counts=True)
    twice = np.zeros(len(rows), bool)
    twice[first] = count > 1
    spacing = np.stack([c["spacing_y"], c["spacing_x"], c["spacing_z"]])
    names = c["path"].tolist()
    outside = np.fromiter((n.startswith(b"/") or b".." in n.replace(b"\\", b"/").split(b"/") for n in names), bool)
    wrong = {
        "the path and z of a row stand in another row too": twice,
        "a path leads out of the data folder": outside,
        "a spacing is not a number above 0 and below 1000 mm": ~((spacing > 0) & (spacing < 1000)).all(0),
        "z_mm is not a number": ~np.isfinite(c["z_mm"]),
        "the body box is empty or not inside the image": ~(
            (c["body_y0"] >= 0) & (c["body_y0"] < c["body_y1"]) & (c["body_y1"] <= c["rows"])
            & (c["body_x0"] >= 0) & (c["body_x0"] < c["body_x1"]) & (c["body_x1"] <= c["cols"])
        ),
    }  # fmt: skip
    for reason, bad in wrong.items():
        if bad.any():
            line, name = bad.argmax() + 2, names[bad.argmax()].decode()
            raise ValueError(f"{path}, line {line} ({name[:200]}): {reason}; preprocess again")


def encode_column(key, texts, names):
    if key in REPEATED:
        codes = names[key]
        for text in dict.fromkeys(texts):
            codes.setdefault(text, len(codes))
        return np.fromiter(map(codes.get, texts), np.int32, len(texts))
    if key in TEXT:
        return np.array([t.encode() for t in texts])
    if key.endswith("_mm") or key.startswith("spacing"):
        return np.fromiter(map(float, texts), np.float64, len(texts))
    return np.fromiter(map(int, texts), np.int32, len(texts))


@functools.lru_cache
def say_once(text):
    """A line for people, once; of several readers (they are processes) the first one says it."""
    if multiprocessing.parent_process() is None or multiprocessing.current_process().name.endswith("-1"):
        print(text)


@functools.lru_cache
def heic_formats():
    """What pillow-heif, an optional extra, adds to FORMATS."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener()
    return ("HEIF",)


def photo_paths(root):
    """Sorted paths of pictures below root, with forward slashes; says what else is there. Folders _x or .x are ours."""

    def stop(error):
        raise error

    found, seen, others = [], set(), Counter()
    endings = PHOTO_ENDINGS + (HEIC_ENDINGS if heic_formats() else ())
    for folder, folders, files in os.walk(root, onerror=stop, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            raise ValueError(f"{folder}: links lead to {real} twice, so its images would count twice; remove one")
        seen.add(real)
        folders[:] = [name for name in folders if name[0] not in "._"]
        files = [name for name in files if name[0] != "." and (name not in TABLES or Path(folder) != root)]
        names = [name for name in files if name.lower().endswith(endings)]
        others.update(Path(name).suffix.lower() for name in set(files).difference(names))
        for name in names:
            if not name.isascii() and name.encode(errors="ignore").decode() != name:
                raise ValueError(f"{folder}: the file name {ascii(name)} is not UTF-8; rename the file")
        found += [Path(folder, name).relative_to(root).as_posix() for name in names]
    if found and others:
        kinds = ", ".join(f"{n} {ending or 'without an ending'}" for ending, n in others.most_common(8))
        hint = "; pip install pillow-heif reads .heic" if others.keys() & set(HEIC_ENDINGS) else ""
        say_once(f"{root}: {others.total()} files are no pictures and are not read: {kinds}{hint}")
    return sorted(found)


@functools.lru_cache(None)
def edits(a, b):
    """Letters to insert, delete or change between two words (Levenshtein's distance)."""
    if not (a and b):
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def label_columns(path, header):
    """Names of columns as we know them, whatever their case and outer spaces; a misspelt one is an error."""
    names = [name.strip() for name in header]
    nodules = len({*map(str.lower, names)} & {*NODULE}) > 4
    known = NODULE if nodules else ["path", "label", "group"]
    names = [name.lower() if name.lower() in known else name for name in names]
    for name in [name for name in known if name not in names]:
        if near := [other for other in names if other not in known and edits(other.lower()[:99], name) < 3]:
            raise ValueError(f"{path}: column {near[0]!r} looks like {name!r}; rename it to that, or to one less alike")
    if names[: len(NODULE)] != NODULE and (nodules or not {"path", "label"} <= {*names}):
        expected = f"first {','.join(NODULE)}" if nodules else "path,label[,group][,any facts]"
        raise ValueError(f"{path}: unknown columns {','.join(header)[:200]}; expected {expected}")
    if odd := [name for k, name in enumerate(names) if not name or name in names[:k]]:
        raise ValueError(f"{path}: column {odd[0]!r} has no name, or stands there twice; write {','.join(names)} anew")
    if names != header:
        say_once(f"{path}: columns {','.join(header)} are read as {','.join(names)}")
    if not nodules and (facts := [name for name in names if name not in known]):
        say_once(f"{path}: further columns are kept as facts: {', '.join(facts)}")
    return names, nodules


def below(root, name):
    """`./a.jpg`, `b\\a.jpg` or an absolute path below root as the path that it has there."""
    plain, top = os.path.normpath(name.strip().replace("\\", "/")), os.path.abspath(root)
    return os.path.relpath(plain, top) if plain.startswith(top + "/") else plain


def label_pieces(path, root, unlabelled=False):
    """Of a label table first (names of its columns, is it one of nodules?), then pieces: (number of the first row,
    {name: list of cells})."""
    if not Path(path).exists():
        raise FileNotFoundError(f"the label table {path} does not exist")
    pieces = read_csv(path)
    header = next(pieces)
    if len(header) == 1 and (marks := [mark for mark in ";\t" if mark in header[0]]):
        pieces = read_csv(path, marks[0])
        header = next(pieces)
        say_once(f"{path}: columns are separated by {marks[0]!r}")
    names, nodules = label_columns(path, header)
    yield names, nodules
    number, said = 2, False
    for lines in filter(None, ([line for line in piece if line] for piece in pieces)):
        for k, line in enumerate(lines):
            if len(line) != len(names):
                raise ValueError(f"{path}, row {number + k}: {len(line)} cells of {len(names)}; write it anew")
        columns = dict(zip(names, map(list, zip(*lines))))
        if not unlabelled and (empty := [k for k, label in enumerate(columns["label"]) if not label.strip()]):
            raise ValueError(f"{path}, row {number + empty[0]}: no label; give it one, or leave the row out")
        if ODD_PATH.search("\n".join(columns["path"])):
            plain = [below(root, name) if ODD_PATH.search(name) else name for name in columns["path"]]
            changed = [pair for pair in zip(columns["path"], plain) if pair[0] != pair[1]]
            if changed and not said:
                say_once(f"{path}: paths are read as below {root}: {changed[0][0]!r} as {changed[0][1]!r}, and so on")
            said, columns["path"] = said or bool(changed), plain
        yield number, columns
        number += len(lines)


def read_labels(path, root, unlabelled=False):
    """A label table of images below root -> (rows as dicts, are they nodules?)."""
    (names, nodules), *pieces = label_pieces(path, root, unlabelled)
    return [dict(zip(names, cells)) for _, columns in pieces for cells in zip(*columns.values())], nodules


def is_dicom(path):
    with open(path, "rb") as f:
        return f.read(132)[128:] == b"DICM"


def indexed_photos(path):
    """_index/photos.csv of an import -> (sorted paths, their sizes in bytes); no picture is touched."""
    pieces, found = read_csv(path), []
    header = next(pieces)
    try:
        name, size, reason = (header.index(key) for key in ("path", "bytes", "reason"))
        for rows in pieces:
            found += [(row[name], int(row[size])) for row in rows if not row[reason]]
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or import the pictures again") from None
    found.sort()
    return [name for name, _ in found], np.array([size for _, size in found], np.int64)


@contextlib.contextmanager
def without_collection():
    """No garbage collection meanwhile: it would look through a million texts again and again, a quarter of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@without_collection()
def index_photos(root):
    index = root / "_index" / "photos.csv"
    paths, sizes = indexed_photos(index) if index.exists() else (photo_paths(root), None)
    if not paths:
        some = itertools.islice((path for path in root.rglob("*") if path.is_file()), 100)
        raw = "; it holds DICOM files as acquired: preprocess them first" if any(map(is_dicom, some)) else ""
        raise FileNotFoundError(f"{root} has neither _index/index.csv nor a picture ({' '.join(PHOTO_ENDINGS)}){raw}")
    table, at = root / "labels.csv", {path: i for i, path in enumerate(paths)}
    group_of, missing, same = list(paths), [], {}
    pieces = label_pieces(table, root, unlabelled=True) if table.exists() else iter([(("label",), False)])
    names, nodules = next(pieces)
    if nodules:
        raise ValueError(f"{table} is a table of CT nodules; expected path,label[,group]")
    if taken := sorted({*names} & {*INDEX_COLUMNS} - {"path"}):
        raise ValueError(f"{table}: rename column {taken[0]}, a word of ours; what must stay together is called group")
    texts = {name: [""] * len(paths) for name in names if name not in ("path", "group")}
    for number, columns in pieces:
        where = [at.get(name) for name in columns["path"]]
        missing += [name for name, i in zip(columns["path"], where) if i is None]
        for name, cells in columns.items():
            if name != "path":  # one object for equal texts: a million labels are few
                columns[name] = list(map(same.setdefault, cells, cells))
        for k, (i, label) in enumerate(zip(where, columns["label"])):
            if i is not None and label.strip() and texts["label"][i].strip() not in ("", label.strip()):
                both = f"{paths[i]} has label {label}, and {texts['label'][i]} above"
                raise ValueError(f"{table}, row {number + k}: {both}; keep one")
        for name, cells in columns.items():
            column = group_of if name == "group" else texts.get(name)
            for i, cell in zip(where, cells if column is not None else ()):
                if i is not None and (cell or name != "group"):  # a path in two groups keeps the last
                    column[i] = cell
    if missing:
        name = min(missing)
        like = [p for p in paths if p.casefold() == name.casefold()]
        like = like or [p for p in paths if p.casefold().split("/")[-1] == name.casefold().split("/")[-1]]
        hint = f"; write {like[0]} instead" if len(like) == 1 else ""
        raise FileNotFoundError(f"{table} names {len(missing)} missing files, first {name}{hint}")
    groups = {}
    codes = np.array([groups.setdefault(group, len(groups)) for group in group_of], np.int32)
    columns, texts_of = {"path": np.array([p.encode() for p in paths]), "group": codes, "series": codes}, {}
    for name, column in texts.items():
        found = dict.fromkeys(column)
        longest = max(len(text.encode()) for text in found)
        if longest * len(column) <= 4 * sum(map(len, column)) + 64 * len(column):
            columns[name] = np.array([text.encode() for text in column])
        else:  # one long text would make all rows as long
            codes = dict(zip(found, range(len(found))))
            columns[name], texts_of[name] = np.array([codes[text] for text in column], np.int32), list(found)
    if sizes is not None:
        columns["bytes"] = sizes
    named = "\n".join(map(",".join, zip(paths, group_of)))  # they decide who is trained on
    sha = hashlib.sha256(named.encode()).hexdigest()
    return Rows(columns, {"group": list(groups), "series": list(groups), **texts_of}), sha


@contextlib.contextmanager
def open_photo(path):
    """The opened picture, if its content is of FORMATS; another content is named as what it is."""
    try:
        file = Image.open(regular(path), formats=FORMATS + heic_formats())
        several = file.format in ("TIFF", "WEBP") and file.n_frames > 1
    except TypeError:  # pillow, of such a page of a TIFF
        raise ValueError("a page without height or width") from None
    except Image.UnidentifiedImageError:
        with open(path, "rb") as f:
            start = f.read(12)
        kind = next((name for magic, name in SIGNATURES.items() if start.startswith(magic)), "unknown")
        kind = "HEIC or AVIF" if start[4:8] == b"ftyp" else kind
        raise ValueError(f"its content is {kind}, expected {', '.join(FORMATS + heic_formats())}") from None
    with file:
        if several:
            say_once("of pictures with several pages or frames the first is read")
        yield file


def to_rgb(file):
    if file.mode.startswith(("I", "F")):  # pillow would clip 16 bits at 255 without a word
        raise ValueError(f"pixels of mode {file.mode}, expected 8 bits per channel; convert the file")
    if file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info:
        file = file.convert("RGBA")
        if file.getextrema()[3][0] < 255:
            say_once("transparent pictures are put on white")
            file = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file)
    return file.convert("RGB")


# EXIF orientation: (upright rows run against the stored axis, columns do, both axes are exchanged)
TURNS = {1: (0, 0, 0), 2: (0, 1, 0), 3: (1, 1, 0), 4: (1, 0, 0), 5: (0, 0, 1), 6: (0, 1, 1), 7: (1, 1, 1), 8: (1, 0, 1)}


def turn_of(file):
    """How a photograph is turned upright, and its upright (height, width)."""
    turn = TURNS.get(file.getexif().get(0x0112), TURNS[1])
    return turn, (file.height, file.width) if not turn[2] else (file.width, file.height)


def stored_box(box, size, turn):
    """A box of the upright picture of `size` -> the same box of the picture as stored."""
    (y0, x0, y1, x1), (height, width) = box, size
    if turn[0]:
        y0, y1 = height - y1, height - y0
    if turn[1]:
        x0, x1 = width - x1, width - x0
    return (x0, y0, x1, y1) if turn[2] else (y0, x0, y1, x1)


def upright(image, turn):
    """Stored [3, h, w] -> upright."""
    image = image.swapaxes(1, 2) if turn[2] else image
    return image[:, :: -1 if turn[0] else 1, :: -1 if turn[1] else 1]


class Source:
    """Images of one encoding: len(source), source.read(i) -> [C, H, W], source.rows[i] -> metadata, source.groups."""

    def __init__(self, root, encoding, rows, index_sha256):
        self.root, self.encoding, self.index_sha256 = root, encoding, index_sha256
        self.neighbour_mm = None  # see at_distance
        # where it was opened for a purpose: hash of the contract, and (names of splits, code of each row)
        self.split_sha256 = self.split_codes = None
        self.crossing = 0  # sets of duplicates that lie in several splits, where that was allowed
        self.earlier_looks = 0  # at val_test, by other weights or another policy, where it was opened
        self.hold(rows)

    def hold(self, rows):
        self.rows = rows
        self.upto, self.weights_sha256 = None, None  # running sum of weights, and their table: see weighed
        codes, used = rows.columns["group"], np.zeros(len(rows.names["group"]), bool)
        for k in range(0, len(codes), 1 << 20):  # an index of 64 bits is made of each piece
            used[codes[k : k + (1 << 20)]] = True
        self.groups = sorted(rows.names["group"][code] for code in np.flatnonzero(used))
        # neighbours in a volume are near copies, so one batch should hold one slice per series
        self.series = rows.columns["series"]

    def __len__(self):
        return len(self.rows)

    @property
    def splits(self):
        """Split of each row, where it was opened for a purpose; else None."""
        return self.split_codes and np.array(self.split_codes[0])[self.split_codes[1]]

    def path(self, i):
        return self.root / self.rows.cell("path", i)

    def read(self, i, window=None):
        """uint8 [3, H, W] of rgb-v1 and photographs (upright); int16 HU [3, H, W] of hu16-v1: slices z-1, z, z+1.

        window (y0, x0, y1, x1): only that part of a slice.
        """
        path, (y0, x0, y1, x1) = self.path(i), window or [None] * 4
        self.check(i)
        try:
            if self.encoding == "hu16-v1":
                step = round((self.neighbour_mm or 0) / self.rows.cell("spacing_z", i))
                image, size = read_three_slices(path, self.rows.cell("z", i), max(step, 1), slice(y0, y1))
            else:
                with open_photo(path) as file:
                    turn = turn_of(file)[0] if self.encoding == "photo" else TURNS[1]
                    image = upright(np.asarray(to_rgb(file)).transpose(2, 0, 1), turn)
                image, size = image[:, y0:y1], image.shape[1:]
        except BROKEN as error:
            raise Unreadable(f"{path} cannot be read: {error}") from None
        if self.encoding != "photo" and size != self.size(i):
            raise Unreadable(f"{path} has {size} pixels, the index says {self.size(i)}")
        return torch.from_numpy(np.ascontiguousarray(image[:, :, x0:x1]))

    def at_distance(self, mm):
        """This source, whose slices come with the true ones nearest to `mm` away instead of the next ones (0 or None).

        Slices 0.6 mm apart are near copies, those 5 mm apart are not: a distance makes them alike. At the ends of a
        volume it is the last slice; nothing is interpolated, and thicker slices than `mm` keep their next ones.
        """
        if mm and self.encoding != "hu16-v1":
            raise ValueError(f"neighbours {mm:g} mm away need whole volumes, {self.root} holds {self.encoding}; "
                             "preprocess with --format hu16")  # fmt: skip
        self.neighbour_mm = mm or None
        return self

    def check(self, i):
        """Refuse a picture that is no longer the one that was indexed."""
        if "bytes" in self.rows.columns:
            path, known = self.path(i), self.rows.cell("bytes", i)
            found = os.stat(path).st_size if path.exists() else None
            if found != known:
                state = "is gone" if found is None else f"has {found} bytes"
                raise Unreadable(f"{path} {state}, {known} when it was indexed: import it again")

    def size(self, i):
        return self.rows.cell("rows", i), self.rows.cell("cols", i)

    def body(self, i):
        """Box that keeps crops out of empty air; of a photograph, None: all of it."""
        if self.encoding == "photo":
            return None
        return [self.rows.cell(f"body_{k}", i) for k in ("y0", "x0", "y1", "x1")]

    def take(self, index):
        part = copy.copy(self)
        part.hold(self.rows.take(index))
        part.split_codes = self.split_codes and (self.split_codes[0], self.split_codes[1][index])
        return part

    def order(self, seed, step, batch):
        """Sample ids of one update: a new permutation each epoch; one slice per series and batch where possible.

        With weights (see weighed): drawn with replacement, as often as each weighs.
        """
        if self.upto is not None:
            return np.searchsorted(self.upto, self.upto[-1] * rng(seed, "order", step).random(batch), "right")
        updates = max(len(self) // batch, 1)  # per epoch; what does not fill a batch is left out, other ones each epoch
        epoch, position = divmod(step, updates)
        return epoch_order(self, seed, epoch, batch)[position]


@functools.lru_cache(maxsize=2)
def epoch_order(source, seed, epoch, batch):
    """Ids [updates, batch]: slices sorted by shuffled series go to the updates in turn, so a batch holds a series once
    (or more often where the series has more slices than the epoch has updates)."""
    random = rng(seed, "order", epoch)
    ids = np.arange(len(source), dtype=np.int32)  # 32 bits, sorts in place: ten million rows in 2 s and 120 MB
    random.shuffle(ids)
    if len(ids) < batch:  # fewer images than one batch holds: whole permutations after each other
        more = [random.permutation(len(ids)) for _ in range(math.ceil(batch / len(ids)) - 1)]
        return np.concatenate([ids, *more])[None, :batch]
    updates = len(ids) // batch
    ids = ids[: updates * batch]
    place, keys = random.permutation(source.series.max() + 1), np.arange(len(ids))
    parts = [slice(k, k + (1 << 18)) for k in range(0, len(ids), 1 << 18)]
    for part in parts:  # keys: place of the series, then number
        keys[part] |= place[source.series[ids[part]]] << 32
    keys.sort()
    dealt = keys.view(np.int32)[: len(ids)]  # written where keys were read before: 40 MB less of ten million
    for part in parts:
        dealt[part] = ids[keys[part] & ((1 << 32) - 1)]
    order, ids = random.permutation(updates), ids.reshape(updates, batch)
    for k in range(0, updates, 1 << 10):  # number i goes to update i % updates
        ids[k : k + (1 << 10)] = dealt.reshape(batch, updates).T[order[k : k + (1 << 10)]]
    return random.permuted(ids, axis=1, out=ids)


def weighed(source, table):
    """The source, whose images are drawn as often as a table path,weight says."""
    table = find_table(source.root, Path(table))
    header, *pieces = read_csv(table)
    if source.encoding != "photo" or header != ["path", "weight"]:
        raise ValueError(f"--weights {table}: expected path,weight of photographs, found {','.join(header)[:99]}")
    try:
        found = {name: float(weight) for rows in pieces for name, weight in rows}
    except ValueError as error:
        raise ValueError(f"--weights {table}: a row is not a path and a number ({error}); write it anew") from None
    names = source.rows.texts("path")
    if strangers := found.keys() - {*names}:
        some = f"{min(strangers)!r} ({len(strangers)} in all)"
        raise ValueError(f"--weights {table} names {some}, which is not among the images to train on; write it anew")
    if absent := [name for name in names if name not in found]:
        raise ValueError(f"--weights {table} does not name {absent[0]!r} ({len(absent)} in all); write it anew")
    weights = np.array([found[name] for name in names])
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        raise ValueError(f"--weights {table}: weights are numbers from 0 up, not all 0; write it anew")
    source = source.take(np.arange(len(source)))
    source.upto, source.weights_sha256 = np.cumsum(weights), file_sha256(table)
    return source


def read_three_slices(path, z, step=1, rows=slice(None)):
    """int16 [3, rows, W]: slices z-step, z, z+step of a volume, or its last ones, and the (H, W) of a slice.

    Read, since a mapped file that is cut kills the process.
    """
    with open(regular(path), "rb") as f:
        if (version := np.lib.format.read_magic(f)) != (1, 0):
            raise ValueError(f"version {version} of a .npy file, expected 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        if dtype != np.int16 or len(shape) != 3 or fortran:
            raise ValueError(f"{dtype} {shape}, expected int16 [Z, H, W]")
        if not 1 <= z < shape[0] - 1:
            raise ValueError(f"slice {z} of {shape[0]} has no two neighbours")
        one = shape[1] * shape[2]
        if os.fstat(f.fileno()).st_size < f.tell() + 2 * shape[0] * one:
            raise ValueError(f"the file is shorter than its {shape[0]} slices of {shape[1]} x {shape[2]}")
        start, (y0, y1, _), planes = f.tell(), rows.indices(shape[1]), []
        for k in (max(z - step, 0), z, min(z + step, shape[0] - 1)):
            f.seek(start + 2 * (k * one + y0 * shape[2]))
            planes.append(np.fromfile(f, np.int16, (y1 - y0) * shape[2]))
        return np.stack(planes).reshape(3, -1, shape[2]), shape[1:]


def open_source(root):
    """Everything in a processed CT folder (by its index) or in any folder of pictures -> Source; see open_for."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--data {root} is not a folder")
    index = root / "_index" / "index.csv"
    if index.exists():
        rows, sha = open_index(index)
        known, encodings = {"rgb-v1", "hu16-v1"}, set(rows.names["encoding"])
        if not encodings <= known:
            odd = sorted(encodings - known)
            raise ValueError(f"{index}: encoding {odd}; known are {sorted(known)}: preprocess again")
        if len(encodings) > 1:
            raise ValueError(f"{index} mixes encodings {sorted(encodings)}; preprocess all datasets to one of them")
        encoding = encodings.pop()
    elif index.parent.exists() and not (index.parent / "photos.csv").exists():
        # an index.csv was lost: read as photographs, every slice would be its own group
        raise FileNotFoundError(f"{index} is missing beside its folder; preprocess again")
    else:
        (rows, sha), encoding = index_photos(root), "photo"
    return Source(root, encoding, rows, sha)


def thin(source, limit=None, z_stride=1):
    """Every z_stride-th slice of a series (neighbours still come from the full volume), then at most `limit` images,
    the same for any seed."""
    if z_stride > 1 and source.encoding == "photo":
        raise ValueError(f"--z-stride {z_stride}: photographs have no slices; leave it away")
    if z_stride > 1:
        source = source.take(np.flatnonzero((source.rows.columns["z"] - 1) % z_stride == 0))
    if limit is not None and limit < len(source):
        source = source.take(np.sort(rng(0, "limit").permutation(len(source))[:limit]))
    return source


# The door: who may look at what. Splits are contracts, duplicates and earlier training are leaks, looks are recorded.


def open_for(root, purpose, used_by=None, limit=None, z_stride=1, allow_duplicates=False):
    """The images of one purpose (or of several) of PURPOSES -> Source with its split_sha256 and the split of each row.

    root: a folder, or a Source of all of it. `test` is the final number: used_by {program, weights_sha256,
    policy_sha256, labels_sha256, why} is added to _splits/test_uses.jsonl, and earlier looks by others are counted;
    NO_SCORE: predictions are exported, which is no look.
    """
    source = root if isinstance(root, Source) else open_source(root)
    purposes = [purpose] if isinstance(purpose, str) else list(purpose)
    splits, wanted = split_codes(source), [PURPOSES[p] for p in purposes]
    path, inside = split_path(source.root), np.isin(splits[0], wanted)[splits[1]]
    if not inside.any():
        raise ValueError(f"{path} has no image in {' or '.join(wanted)}; it has {sorted(set(splits[0]))}")
    crossing = crossing_duplicates(source, splits, allow_duplicates)
    if crossing and not allow_duplicates:
        sets = f"{len(crossing)} sets of duplicate pictures lie in several splits, first {', '.join(crossing[0][:3])}"
        raise ValueError(f"{sets}; make the split again with --force, or go on with --allow-duplicates")
    everything = copy.copy(source)
    everything.split_sha256, everything.split_codes, everything.crossing = file_sha256(path), splits, len(crossing)
    everything.earlier_looks = record_look(source.root, used_by) if "test" in purposes and used_by != NO_SCORE else 0
    return thin(everything.take(np.flatnonzero(inside)), limit, z_stride)


def split_path(root, name="splits.json"):
    return Path(root) / "_splits" / name


def read_contract(path, remedy):
    """A JSON file of _splits/ -> dict of version 1."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {remedy}")
    try:
        contract = json.loads(regular(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({str(error)[:80]}); {remedy}") from None
    if not isinstance(contract, dict) or contract.get("version") != 1:
        version = contract.get("version") if isinstance(contract, dict) else type(contract).__name__
        raise ValueError(f"{path}: version {str(version)[:80]}, expected 1; {remedy}")
    return contract


def read_splits(path, remedy):
    """splits.json -> the contract, whose groups {group: split} are whole; whether it fits an index is not asked."""
    contract = read_contract(path, remedy)
    of_group, known = contract.get("groups"), set(PURPOSES.values())
    if not isinstance(of_group, dict) or not all(isinstance(split, str) for split in of_group.values()):
        raise ValueError(f"{path}: groups must name one split for each group; {remedy}")
    if unknown := set(of_group.values()) - known:  # nobody would ever look at it
        raise ValueError(f"{path}: {min(unknown)!r} is no split, known are {', '.join(PURPOSES.values())}; {remedy}")
    return contract


def split_names(source):
    """Split of each row of a Source; no image is opened."""
    names, codes = split_codes(source)
    return np.array(names)[codes]


def split_codes(source):
    """Names of splits and the code of each row, by a contract made for this very index."""
    path = split_path(source.root)
    again = f"make the split of {source.root} again, with --force and the ratios and labels you want"
    contract = read_splits(path, again if path.exists() else again.replace(" again, with --force and", ", with"))
    of_group = contract["groups"]
    if contract.get("index_sha256") != source.index_sha256:
        raise ValueError(f"{path} was made for another index; {again}")
    if strangers := [g for g in source.groups if g not in of_group]:
        raise ValueError(f"{path} does not name group {strangers[0]} ({len(strangers)} in all); {again}")
    known = sorted(set(of_group.values()))
    codes = np.array([known.index(of_group.get(name, known[0])) for name in source.rows.names["group"]], np.int8)
    split = codes[source.rows.columns["group"]]
    low = np.full(len(source.rows.names["series"]), len(known), np.int8)
    high = np.full(len(low), -1, np.int8)
    np.minimum.at(low, source.series, split)
    np.maximum.at(high, source.series, split)
    if (torn := np.flatnonzero(high > low)).size:
        series = source.rows.names["series"][torn[0]]
        pair = f"{known[low[torn[0]]]} and in {known[high[torn[0]]]}"
        raise ValueError(f"{path}: series {series} lies in {pair}; {again}")
    return known, split


def read_duplicates(source, path=None, allowed=False):
    """Lists of groups that share pictures, by _splits/duplicates.json or another file, made for this very index;
    allowed: one that was made for another index is said and not used."""
    path = path or split_path(source.root, "duplicates.json")
    again = f"look for duplicates in {source.root} again"
    contract = read_contract(path, again)
    sets, names = contract.get("groups"), set(source.rows.names["group"])
    if contract.get("index_sha256") != source.index_sha256:
        if not allowed:
            without = "go on without it (--allow-duplicates, where a program has it)"
            raise ValueError(f"{path} was made for another index; {again}, or delete the file, or {without}")
        print(f"note: {path} was made for another index and is not used; {again}, or delete the file")
        return []
    whole = isinstance(sets, list) and all(isinstance(members, list) and members for members in sets)
    if not whole or not all(isinstance(name, str) and name in names for members in sets for name in members):
        raise ValueError(f"{path}: groups must be lists of groups of the index; {again}")
    return sets


def crossing_duplicates(source, splits, allowed):
    """Sets of groups that share pictures and lie in several splits."""
    if not split_path(source.root, "duplicates.json").exists():
        return []
    sets = read_duplicates(source, allowed=allowed)
    codes, first = np.unique(source.rows.columns["group"], return_index=True)
    split_of = {source.rows.names["group"][k]: splits[0][splits[1][i]] for k, i in zip(codes, first)}
    return [members for members in sets if len({split_of[g] for g in members if g in split_of}) > 1]


NO_SCORE = "no score"  # as used_by: predictions are exported and nothing is scored, so no look is recorded
USED_BY = "program weights_sha256 policy_sha256 labels_sha256 why".split()


def append_line(path, line, sync=False):
    """One write of one line of JSON, so that readers never see half of it, nor lines of two programs mixed. A line that
    a full disk cut is ended first. sync: returns when it is on the disk."""
    with open(path, "ab+") as f:
        f.seek(max(f.seek(0, os.SEEK_END) - 1, 0))
        cut = f.read(1) not in (b"", b"\n")
        try:
            f.write(b"\n" * cut + json.dumps(line).encode() + b"\n")
            f.flush()
            if sync:
                os.fsync(f.fileno())
        except OSError as error:
            error.filename = error.filename or str(path)
            raise


def record_look(root, used_by, once=False):
    """Add a line to _splits/test_uses.jsonl -> how many looks by other weights or another policy came before.
    once: such a look by the same program is an error, and nothing is added."""
    if not isinstance(used_by, dict) or sorted(used_by) != sorted(USED_BY):
        raise ValueError(f"opening val_test needs used_by with {', '.join(USED_BY)}")
    path, earlier, damaged = split_path(root, "test_uses.jsonl"), {}, 0
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            key = tuple(str(row.get(key)) for key in ("weights_sha256", "policy_sha256"))
            earlier.setdefault(key, set()).add(str(row.get("program")))
        except (ValueError, AttributeError, RecursionError):
            damaged += 1
    earlier.pop((str(used_by["weights_sha256"]), str(used_by["policy_sha256"])), None)
    if once and any(used_by["program"] in programs for programs in earlier.values()):
        before = f"{used_by['program']} has looked at val_test with other weights or another policy before ({path})"
        raise ValueError(f'{before}, and the best of several is optimistic; to look again, say why: --again "..."')
    if earlier:
        before = f"val_test was looked at before by {len(earlier)} other weights or policies ({path})"
        print(f"{before}: the best of several looks is optimistic")
    if damaged:
        print(f"{path} has {damaged} damaged lines, which count as looks by others")
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    append_line(path, {"version": 1, "when": when, **used_by}, sync=True)
    return len(earlier) + damaged


# The plan: every random choice about every view, drawn from (seed, step, sample id) alone.


@dataclass(frozen=True)
class Recipe:
    """How views are cut and how they look. All views of an image lie in one field: a square of the body box, or all
    of a photograph. Views that need not overlap would have to be matched by what every chest shares."""

    kind: str  # ct or photo
    global_size: int = 224
    local_size: int = 96
    local_crops: int = 8
    field: tuple = (1.0, 1.0)  # share of the body box, log-uniform
    global_scale: tuple = (0.32, 1.0)  # shares of the field
    local_scale: tuple = (0.05, 0.32)
    ratio: tuple = (3 / 4, 4 / 3)
    windows: str = "wide"  # HU only; wide: around that of eval_view; any: between two of the named ones
    flip: float = 0.5
    blur: tuple = (0.1, 0.1, 0.1)  # probability for global 1, global 2, local
    sigma: tuple = (0.1, 2.0)  # of the blur, in pixels of the view
    solarize: tuple = (0.0, 0.0, 0.0)
    gram_size: int = 0  # side of the Gram teacher's undistorted crops; 0: none


RECIPES = {  # <- change the views here
    "ct": Recipe("ct", field=(0.04, 1.0)),  # from a 60 mm square, where a nodule is large, to the whole body
    "ct_any_window": Recipe("ct", field=(0.04, 1.0), windows="any"),  # did not learn in 600 updates of a small ViT
    "photo": Recipe("photo", blur=(1.0, 0.1, 0.5), solarize=(0.0, 0.2, 0.0)),
}

TRIES = 10  # boxes that do not fit are drawn again, as in RandomResizedCrop
LOOK = 12  # uniform numbers per view that decide its intensities


class Plan(NamedTuple):
    """Choices for V views (two global, then local) of B images, as small arrays."""

    recipe: Recipe
    fields: np.ndarray  # [1, B, 3] share of the body box, and where in it (y, x in 0..1)
    shapes: np.ndarray  # [V, B, TRIES, 2] area share and log aspect ratio
    centres: np.ndarray  # [V, B, 2] in 0..1, where in the field
    flips: np.ndarray  # [V, B] bool
    sigmas: np.ndarray  # [V, B] of the blur; 0: none
    solarized: np.ndarray  # [V, B] bool
    looks: np.ndarray  # [V, B, LOOK] uniform in 0..1
    noise_seeds: np.ndarray  # [V, B] int64
    boxes: np.ndarray | None = None  # [V, B, 4] in pixels of the image, once sizes are known


def plan(seed, step, sample_ids, recipe):
    """All choices for these samples in this update -> Plan without boxes (see place)."""
    views = 2 + recipe.local_crops
    width = 2 * TRIES + 7 + LOOK
    u = np.stack([rng(seed, "crops", step, int(i)).random((views + 1, width)) for i in sample_ids], 1)
    u, field = u[:views], u[views:, :, :3]  # [V, B, width], [1, B, 3]
    share = np.exp(np.log(recipe.field[0]) + field[..., :1] * np.log(recipe.field[1] / recipe.field[0]))
    kind = np.minimum(np.arange(views), 2)  # 0 global 1, 1 global 2, 2 local

    shapes = u[..., : 2 * TRIES].reshape(*u.shape[:2], TRIES, 2)
    low, high = np.array([recipe.global_scale, recipe.global_scale, recipe.local_scale])[kind].T[:, :, None, None]
    area = low + shapes[..., 0] * (high - low)
    aspect = np.log(recipe.ratio[0]) + shapes[..., 1] * np.log(recipe.ratio[1] / recipe.ratio[0])
    rest = u[..., 2 * TRIES :]
    sigma = recipe.sigma[0] + rest[..., 4] * (recipe.sigma[1] - recipe.sigma[0])
    return Plan(
        recipe=recipe,
        fields=np.concatenate([share, field[..., 1:]], -1),
        shapes=np.stack([area, aspect], -1),
        centres=rest[..., :2],
        flips=rest[..., 2] < recipe.flip,
        sigmas=np.where(rest[..., 3] < np.array(recipe.blur)[kind][:, None], sigma, 0.0),
        solarized=rest[..., 5] < np.array(recipe.solarize)[kind][:, None],
        looks=rest[..., 7:],
        noise_seeds=(rest[..., 6] * 2**53).astype(np.int64),
    )


def place(plan, sizes, regions=None):
    """Resolve the boxes for images of these sizes [B, 2] and regions [B, 4] (None: the whole image) -> Plan."""
    sizes = np.asarray(sizes, np.float64)
    regions = np.concatenate([np.zeros_like(sizes), sizes], 1) if regions is None else np.asarray(regions, np.float64)
    share, corner = plan.fields[0, :, :1], plan.fields[0, :, 1:]
    whole = regions[:, 2:] - regions[:, :2]
    field = np.floor(np.sqrt(share * whole.prod(1, keepdims=True)))
    limit = np.where(share < 1, np.clip(field, 1, whole), whole)  # [B, 2]
    low = np.floor(regions[:, :2] + corner * (whole - limit + 1))
    area, aspect = plan.shapes[..., 0] * limit.prod(1)[:, None], plan.shapes[..., 1]  # [V, B, TRIES]
    sides = np.stack([np.sqrt(area * np.exp(-aspect)), np.sqrt(area * np.exp(aspect))], -1)
    sides = np.maximum(np.floor(sides + 0.5), 1)
    fits = (sides <= limit[:, None]).all(-1)
    first = fits.argmax(-1)[..., None, None]  # 0 when none fits: then what fits of it
    sides = np.minimum(np.take_along_axis(sides, first, 2)[:, :, 0], limit)  # [V, B, 2]
    start = np.clip(np.floor(low + plan.centres * (limit - sides + 1)), 0, sizes - sides)
    return plan._replace(boxes=np.concatenate([start, start + sides], -1))


def sides(recipe):
    """Pixels of each view of an image."""
    return [recipe.global_size] * 2 + [recipe.local_size] * recipe.local_crops


def boxes_in(plan, height, width):
    """Boxes [V, 4] of the plan of one image of this size."""
    return place(plan, [(height, width)]).boxes[:, 0]


def block_masks(seed, step, crops, grid, probability=0.5, ratio=(0.1, 0.5)):
    """iBOT masks of one update, bool [crops, N]: DINOv3's counts and rectangles (section 4 of its recipe).

    int(crops * probability) crops are masked; their shares are evenly spaced over `ratio` and exact.
    """
    random = rng(seed, "masks", step)
    patches, count = grid[0] * grid[1], int(crops * probability)
    masks = np.zeros((crops, *grid), bool)
    shares = np.linspace(*ratio, count + 1)[1:]
    for mask, share in zip(masks, shares):
        fill_blocks(random, mask, int(patches * share))
    return torch.from_numpy(masks.reshape(crops, patches)[random.permutation(crops)])


def fill_blocks(random, mask, target):
    """Hide exactly `target` cells: rectangles of 4 cells to half the grid, aspect 0.3 to 1/0.3, then single cells."""
    hidden = 0
    while hidden < target:
        limit = min(target - hidden, mask.size // 2)
        for _ in range(10):
            area, aspect = 4 + random.random() * (limit - 4), 0.3 ** random.uniform(-1, 1)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= mask.shape[0] or w >= mask.shape[1]:
                continue
            y, x = random.integers(mask.shape[0] - h + 1), random.integers(mask.shape[1] - w + 1)
            block = mask[y : y + h, x : x + w]
            new = block.size - block.sum()
            if 0 < new <= limit:
                block[:] = True
                hidden += new
                break
        else:
            break
    free = np.flatnonzero(~mask)
    mask.reshape(-1)[random.choice(free, target - hidden, replace=False)] = True


# Rendering: crop, antialiased bicubic resize, flip and blur of X are Wy @ X @ Wx.T, one small matrix per axis and view.


def bicubic(t):
    """Keys' cubic with a = -0.5, the kernel of Pillow's BICUBIC."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def send(t, device):
    """A small tensor of the host on a device; from page-locked memory, so that nobody waits for the copy."""
    return t.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else t.to(device)


@functools.cache
def compile_once(function):
    return torch.compile(function, dynamic=False)


def axis_taps(start, end, flip, window, out, device="cpu", step=1, each=lambda function: function):
    """What `out` samples of [start, end) read: the first pixel [n, out, 1], counted from `window`, and weights
    [n, out, taps] of it and the next ones; as many taps as the widest needs, or the next multiple of `step`.

    start, end, window: [n] float32 and flip [n] bool, all on the CPU, so that no shape waits for a device.
    each: compiles what runs on the device, or leaves it as it is.
    Same weights as Pillow's resize of the crop: support stretched by the reduction, cut at the box, normalised.
    """
    taps = math.ceil(4 * max(((end - start) / out).max().item(), 1)) + 2
    table = send(torch.stack([start, end, window, flip.float()]).double(), device)
    return each(weights_of_taps)(table, out, -(-taps // step) * step)


def weights_of_taps(table, out, taps):
    start, end, window, flip = table[:, :, None, None]  # [n, 1, 1]; float32 would move a tap by 1e-5 of the image
    scale = (end - start) / out
    stretch = scale.clamp(min=1)
    row = torch.arange(out, device=table.device)[:, None]
    row = torch.where(flip > 0, out - 1 - row, row)  # [n, out, 1]; the blur is the same from both ends
    centre = start + (row + 0.5) * scale
    first = (centre - 2 * stretch).floor()
    pixel = first + torch.arange(taps, device=table.device)  # [n, out, taps]
    weight = bicubic((pixel + 0.5 - centre) / stretch)
    weight = weight * ((pixel + 1 > start) & (pixel < end))
    return (first - window).int(), (weight / weight.sum(-1, keepdim=True)).float()


def axis_matrices(start, end, flip, sigma, window, out, length, device="cpu"):
    """[n, out, length]: resize [start, end) to `out` samples, blur, flip; columns are pixels window .. window + length.

    sigma: [n] float32 on the CPU, as the others of axis_taps.
    """
    blurred = torch.from_numpy(np.flatnonzero(sigma.numpy()))
    blurs = blur_matrices(send(sigma[blurred], device), out)
    first, weight = axis_taps(start, end, flip, window, out, device)
    # taps outside the window weigh 0: margins on both sides take them, so that no two taps share a cell
    taps = weight.shape[2]
    column = (first.long() + torch.arange(taps, 2 * taps, device=device)).clamp_(0, length + 2 * taps - 1)
    matrices = weight.new_zeros(len(weight), out, length + 2 * taps).scatter_(2, column, weight)
    matrices = matrices[:, :, taps : taps + length]
    if len(blurred):
        blurred = send(blurred, device)
        matrices = matrices.index_copy(0, blurred, blurs @ matrices.index_select(0, blurred))
    return matrices


def blur_matrices(sigma, size, taps=9):
    """Gaussian blur of `size` samples with mirrored borders as [n, size, size]."""
    half = min(taps // 2, size - 1)
    x = torch.arange(-half, half + 1, device=sigma.device)
    g = torch.exp(-0.5 * (x / sigma[:, None]) ** 2)
    g = g / g.sum(1, keepdim=True)
    band = sigma.new_zeros(len(sigma), size, size + 2 * half)
    for k in range(2 * half + 1):
        band.diagonal(k, 1, 2)[:] = g[:, k : k + 1]
    inner = band[:, :, half : half + size].clone()
    if half:
        inner[:, :, 1 : half + 1] += band[:, :, :half].flip(2)
        inner[:, :, size - 1 - half : size - 1] += band[:, :, half + size :].flip(2)
    return inner


def cut(images, boxes, flips, sigmas, out, compiled=False):
    """Images [B, C, H, W] and arrays [V, B, ...] -> float32 views [V, B, C, out, out] in the images' own units."""
    V, B = boxes.shape[:2]
    boxes = torch.as_tensor(boxes, dtype=torch.float32).flatten(0, 1)  # [V * B, 4]
    flips, sigmas = torch.as_tensor(flips).flatten(), torch.as_tensor(sigmas, dtype=torch.float32).flatten()
    how = cut_each if images.device.type == "cpu" else cut_by_taps if compiled else cut_batched
    return how(images, boxes, flips, sigmas, out).unflatten(0, (V, B))


BLOCK = 32  # rows of an axis matrix per product


def reach(start, end, flip, sigma, low, out):
    """Columns [n, blocks][2] of an axis matrix outside which BLOCK of its rows are 0, counted from `low`."""
    first = torch.arange(0, out, BLOCK)
    last = (first + BLOCK).clamp(max=out)
    start, end, flip, sigma, low = (t[:, None].double() for t in (start, end, flip, sigma, low))
    first, last = torch.where(flip > 0, out - last, first), torch.where(flip > 0, out - first, last)
    scale, blur = (end - start) / out, 4 * (sigma > 0)  # samples that blur_matrices takes on each side
    margin = 2 * scale.clamp(min=1) + 2
    ends = torch.stack([(first - blur) * scale - margin, (last + blur) * scale + margin], -1)
    columns = (ends + (start - low)[..., None]).clamp(min=0)
    return torch.minimum(columns, (end.ceil() - low)[..., None]).int().tolist()


def cut_each(images, boxes, flips, sigmas, out):
    """For CPUs: view by view, and of its matrices only the band that is not 0; there are no launches to save.

    4.5 x as fast as cut_batched for views of whole 512 x 512 slices, 8 x for the CT recipe's smaller ones (one thread,
    2026-11).
    """
    low, high = boxes[:, :2].floor(), boxes[:, 2:].ceil()
    height, width = (high - low).amax(0).int().tolist()
    y = (boxes[:, 0], boxes[:, 2], torch.zeros_like(flips), sigmas, low[:, 0], out)
    x = (boxes[:, 1], boxes[:, 3], flips, sigmas, low[:, 1], out)
    Wy, Wx, bands_y, bands_x = axis_matrices(*y, height), axis_matrices(*x, width), reach(*y), reach(*x)
    images, channels = images.float(), images.shape[1]
    views, buffer = torch.empty(len(boxes), channels * out, out), torch.empty(channels * out * width)
    for i, (y0, x0, y1, x1) in enumerate(torch.cat([low, high], 1).int().tolist()):
        part = images[i % len(images), :, y0:y1, x0:x1]
        # rows as wide as this view, not as the widest of the batch: BLAS may add in another order for other strides
        rows = buffer[: channels * out * (x1 - x0)].view(channels * out, -1)
        for k, (a, b) in zip(range(0, out, BLOCK), bands_y[i]):
            block = rows.unflatten(0, (channels, out))[:, k : k + BLOCK]
            torch.matmul(Wy[i, k : k + BLOCK, a:b], part[:, a:b], out=block)
        for k, (a, b) in zip(range(0, out, BLOCK), bands_x[i]):
            torch.mm(rows[:, a:b], Wx[i, k : k + BLOCK, a:b].T, out=views[i, :, k : k + BLOCK])
    return views.unflatten(1, (channels, out))


def cut_batched(images, boxes, flips, sigmas, out):
    """For accelerators: all views in two batched products over whole images, whatever the batch.

    In float32. Tensor cores, with each number as two of bfloat16, saved 4 of 6 ms on an H200, and making the two took
    5 ms. Views in the order of images need no copy between the two products, but then the products took 10 ms.
    """
    B, _, H, W = images.shape
    device, zero = images.device, torch.zeros_like(boxes[:, 0])
    Wy = axis_matrices(boxes[:, 0], boxes[:, 2], torch.zeros_like(flips), sigmas, zero, out, H, device)
    Wx = axis_matrices(boxes[:, 1], boxes[:, 3], flips, sigmas, zero, out, W, device)
    Wy = Wy.unflatten(0, (-1, B)).transpose(0, 1).flatten(1, 2)  # [B, V * out, H]
    rows = Wy @ images.float().transpose(1, 2).flatten(2)  # [B, V * out, C * W]
    rows = rows.unflatten(1, (-1, out)).transpose(0, 1).flatten(0, 1)  # [V * B, out, C * W]
    views = rows.unflatten(2, (-1, W)).flatten(1, 2) @ Wx.mT  # [V * B, out * C, out]
    return views.unflatten(1, (out, -1)).transpose(1, 2).contiguous()


def cut_by_taps(images, boxes, flips, sigmas, out, each=compile_once):
    """For accelerators, compiled: each sample adds up the few pixels that it reads, along rows, then along columns.

    Of 128 CT slices, with views from windows of 448 x 448 pixels, 13 GFLOP and 2 GB of memory moved instead of the 252
    and 14 of cut_batched: counted, not measured on a card (2026-11). Positions have 32 bits: with 64, rows took 1.45 x
    and columns 1.69 x as many instructions (counted in the machine code for an H200).
    """
    H, W = images.shape[2:]  # each shape is compiled, which takes seconds: few occur, in steps of 256 pixels and 8 taps
    images = torch.nn.functional.pad(images, (0, -W % 256, 0, -H % 256))
    left = boxes[:, 1].floor()
    width = -(-int((boxes[:, 3].ceil() - left).max()) // 256) * 256
    tops, heights = axis_taps(boxes[:, 0], boxes[:, 2], flips & False, left * 0, out, images.device, 8, each)
    first, widths = axis_taps(boxes[:, 1], boxes[:, 3], flips, left, out, images.device, 8, each)
    rows = each(sum_of_rows)(images, tops, heights, send(left.int(), images.device), width)
    views = each(sum_of_columns)(rows, first, widths)
    blurred = torch.from_numpy(np.flatnonzero(sigmas.numpy()))
    if len(blurred):
        blurs = blur_matrices(send(sigmas[blurred], images.device), out)[:, None]
        blurred = send(blurred, images.device)
        views.index_copy_(0, blurred, blurs @ views.index_select(0, blurred) @ blurs.mT)
    return views


def sum_of_rows(images, tops, weights, left, width):
    """Images [B, C, H, W], tops [n, out, 1], weights [n, out, taps], left [n] -> [n, out, C, width] from `left` on."""
    B, C, H, W = images.shape
    upto = functools.partial(torch.arange, dtype=torch.int32, device=images.device)
    image, channel = upto(len(tops))[:, None, None, None] % B, upto(C)[:, None]
    column = (left[:, None] + upto(width)).clamp(max=W - 1)[:, None, None]
    total = 0
    for t in range(weights.shape[2]):
        row = (tops[..., None] + t).clamp(0, H - 1)
        total = total + weights[:, :, t, None, None] * images[image, channel, row, column]
    return total


def sum_of_columns(rows, first, weights):
    """[n, out, C, width], first [n, out, 1], weights [n, out, taps] -> views [n, C, out, out]."""
    n, out, C, width = rows.shape
    upto = functools.partial(torch.arange, dtype=torch.int32, device=rows.device)
    view, channel, row = upto(n)[:, None, None, None], upto(C)[:, None, None], upto(out)[:, None]
    total = 0
    for t in range(weights.shape[2]):
        column = (first[:, None, None, :, 0] + t).clamp(0, width - 1)
        total = total + weights[:, None, None, :, t] * rows[view, row, channel, column]
    return total


class Crops(NamedTuple):
    """Normalised views, crop-major: [crop 0 of all images, crop 1 of all images, ...]."""

    globals: Tensor  # [2B, 3, G, G]
    locals: Tensor  # [n * B, 3, l, l]
    gram: Tensor | None  # [2B, 3, g, g]: the boxes, flips and windows of the globals, undistorted


@torch.no_grad()
def render(images, plan, compiled=False):
    """Images [B, 3, H, W] (uint8, or int16 HU) -> Crops on their device. Exact in float32, autocast or not.

    compiled: on an accelerator, views of slices as sums of few pixels, and how they look as one pass over memory.
    """
    recipe = plan.recipe
    if plan.boxes is None:
        plan = place(plan, [images.shape[2:]] * len(images))
    with torch.autocast(images.device.type, enabled=False):
        # photographs come in too many sizes, and each would be compiled anew
        compiled, groups = compiled and images.device.type != "cpu" and recipe.kind == "ct", []
        images, dtype = images if compiled else images.float(), images.dtype
        for views, size in ((slice(0, 2), recipe.global_size), (slice(2, None), recipe.local_size)):
            x = cut(images, plan.boxes[views], plan.flips[views], plan.sigmas[views], size, compiled)
            if compiled:
                look, numbers = (hu_look, hu_numbers) if dtype == torch.int16 else (rgb_look, rgb_numbers)
                groups.append(compile_once(look)(x, *numbers(plan, views, x)).flatten(0, 1))
            else:
                groups.append(normalise(intensities(x, dtype, plan, views).flatten(0, 1)))
        gram = None
        if recipe.gram_size:
            unblurred = np.zeros_like(plan.sigmas[:2])
            x = cut(images, plan.boxes[:2], plan.flips[:2], unblurred, recipe.gram_size, compiled)
            hu, shown = dtype == torch.int16, look_windows(plan.looks[:2], recipe.windows)
            x = window_(x, *shown) if hu else x.div_(255)
            gram = normalise(x.clamp_(0, 1).flatten(0, 1))
        return Crops(*groups, gram)


def normalise(x):
    """Values in 0..1 [n, 3, h, w] -> what the backbone sees."""
    mean, std = (send(torch.tensor(t, dtype=x.dtype), x.device)[:, None, None] for t in (MEAN, STD))
    return (x - mean).div_(std)


def denormalise(x):
    """The inverse of normalise."""
    mean, std = (send(torch.tensor(t, dtype=x.dtype), x.device)[:, None, None] for t in (MEAN, STD))
    return x * std + mean


def intensities(x, dtype, plan, views):
    """How the views [V, B, 3, h, w] look, by what their images hold: HU, rgb-v1 codes or photographs -> 0..1.

    Overwrites x: a pass over memory costs a CPU more than its arithmetic.
    """
    looks = plan.looks[views]
    if dtype == torch.int16:
        add_noise_(x, noise_of(looks), plan.noise_seeds[views])
        return window_and_contrast_(x, *look_windows(looks, plan.recipe.windows), 0.8 + 0.4 * looks[..., 5:6])
    x = x.div_(255).clamp_(0, 1)  # bicubic overshoots
    if plan.recipe.kind == "ct":
        return contrast_(x, *contrasts_of(looks)).clamp_(0, 1)
    colour_(x.view(-1, *x.shape[2:]), looks.reshape(-1, LOOK), plan.solarized[views].reshape(-1))
    return x


def noise_of(looks):
    """Standard deviations in HU, as between a soft and a sharp kernel."""
    return np.where(looks[..., 0] < 0.3, 30 * looks[..., 1], 0.0)


def window_and_contrast_(x, levels, widths, factors):
    x = window_(x, levels, widths).clamp_(0, 1)
    return x.sub_(0.5).mul_(to_device(factors, x)).add_(0.5).clamp_(0, 1)


def hu_numbers(plan, views, x):
    """What hu_look takes beside x, on its device."""
    looks = plan.looks[views]
    seeds = send(torch.from_numpy(plan.noise_seeds[views]), x.device)
    arrays = (noise_of(looks), *look_windows(looks, plan.recipe.windows), 0.8 + 0.4 * looks[..., 5:6])
    return seeds, positions_in(x), *(to_device(a, x) for a in arrays), *ends_like(x)


def ends_like(x):
    """MEAN and STD beside views [V, B, 3, h, w]."""
    return [to_device(torch.tensor(t)[:, None, None], x[0, 0]) for t in (MEAN, STD)]


def positions_in(x):
    """Of the pixels of one view."""
    return torch.arange(x[0, 0].numel(), device=x.device)


def hu_look(x, seeds, positions, sds, levels, widths, factors, mean, std):
    """intensities and normalise of HU [V, B, 3, h, w], with noise of deviation 0 where there is none."""
    noise = hashed(seeds.flatten(), positions).view(x.shape)
    return window_and_contrast_(x + sds * noise, levels, widths, factors).sub_(mean).div_(std)


def contrasts_of(looks):
    """Factors and shifts of the three windows of rgb-v1 [V, B, 3]."""
    return 0.8 + 0.4 * looks[..., 6:9], 0.2 * looks[..., 9:12] - 0.1


def rgb_numbers(plan, views, x):
    """What rgb_look takes beside x, on its device."""
    factors, shifts = (to_device(a, x) for a in contrasts_of(plan.looks[views]))
    return factors, 0.5 + shifts, *ends_like(x)


def rgb_look(x, factors, shifts, mean, std):
    """intensities and normalise of rgb-v1 [V, B, 3, h, w]."""
    x = (x / 255).clamp_(0, 1)
    return x.sub_(0.5).mul_(factors).add_(shifts).clamp_(0, 1).sub_(mean).div_(std)


def to_device(array, like):
    """A small array as float32 on the device of `like`, shaped to broadcast against it."""
    t = torch.as_tensor(array, dtype=torch.float32)
    t = send(t, like.device) if t.device != like.device or t.device.type == "cpu" else t
    return t.reshape(*t.shape, *[1] * (like.ndim - t.ndim))


def contrast_(x, factors, shifts):
    """x [V, B, 3, h, w], factors and shifts [V, B, 1 or 3]: stretch around middle grey, then brighten."""
    return x.sub_(0.5).mul_(to_device(factors, x)).add_(0.5 + to_device(shifts, x))


def window_(hu, levels, widths):
    """HU [V, B, ...] through one window per view, not clamped: 0 and 1 are its ends."""
    levels, widths = to_device(levels, hu), to_device(widths, hu)
    return hu.sub_(levels).div_(widths).add_(0.5)


def look_windows(looks, kind):
    """A window per view, moved by up to 10% of its width and scaled by e^+-0.2: looks [..., LOOK] -> levels, widths.

    wide: around that of eval_view. any: between two of the named ones, so that two views hardly agree on a grey value.
    """
    level, width = np.array([WIDE_HU] if kind == "wide" else list(WINDOWS_HU.values()), np.float64).T
    one = (looks[..., 2] * len(level)).astype(int)
    other = (one + 1 + (looks[..., 3] * 2).astype(int)) % len(level)
    mix = looks[..., 4]
    widths = width[one] ** (1 - mix) * width[other] ** mix * np.exp(0.4 * looks[..., 6] - 0.2)
    levels = level[one] * (1 - mix) + level[other] * mix + widths * (0.2 * looks[..., 7] - 0.1)
    return levels, widths


def add_noise_(x, sds, seeds):
    """Noise of standard deviations [V, B] on x [V, B, 3, h, w]: a hash of (seed, pixel)."""
    noisy = np.flatnonzero(sds.reshape(-1))
    if not len(noisy):
        return
    index = send(torch.from_numpy(noisy), x.device)
    noise = hashed(send(torch.from_numpy(seeds.reshape(-1)[noisy]), x.device), positions_in(x))
    noise.mul_(to_device(sds.reshape(-1)[noisy], noise))
    x.view(-1, *x.shape[2:]).index_add_(0, index, noise.view(-1, *x.shape[2:]))


def hashed(seeds, positions):
    """Numbers of mean 0 and deviation 1, close to normal: int64 [n], [p] -> [n, p], the same on any device."""
    h = positions * -7046029254386353131 + seeds[:, None]  # splitmix64
    h = (h >> 30).bitwise_xor_(h).mul_(-4658895280553007687)
    h = (h >> 27).bitwise_xor_(h).mul_(-7723592293110705685)
    pairs = (h >> 16).bitwise_and_(0xFFFF0000FFFF).add_(h.bitwise_and_(0xFFFF0000FFFF))
    parts = (pairs >> 32).add_(pairs).bitwise_and_(0xFFFFFFFF)  # sum of the four 16-bit numbers: close to a normal
    return parts.float().div_(65536).sub_(2).mul_(3**0.5)


def grey(x):
    return (x * send(torch.tensor((0.299, 0.587, 0.114), dtype=x.dtype), x.device)[:, None, None]).sum(1, keepdim=True)


def solarize(x):
    return torch.where(x >= 128 / 255, 1 - x, x)


def shift_hue(x, turn):
    """RGB [n, 3, h, w] with the hue turned by `turn` [n] of a full circle, through HSV."""
    top, bottom = x.amax(1), x.amin(1)
    chroma = top - bottom
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    r, g, b = x.unbind(1)
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue += 6 * turn[:, None, None]
    k = (send(torch.tensor((5, 3, 1), dtype=x.dtype), x.device)[:, None, None] + hue[:, None]).remainder_(6)
    return top[:, None] - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma[:, None])


def colour_(x, looks, solarized):
    """DINOv3's colour recipe on photographs [n, 3, h, w] in 0..1: jitter p 0.8, grey p 0.2, solarise."""
    jittered = looks[:, 0] < 0.8
    factors = 1 + (2 * looks[:, 1:5] - 1) * (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation; hue around 1
    order = np.argsort(looks[:, 5:9], 1)  # a random order of the four
    for slot in range(4):
        for op in range(4):
            chosen = np.flatnonzero(jittered & (order[:, slot] == op))
            if not len(chosen):
                continue
            index = send(torch.from_numpy(chosen), x.device)
            part, f = x.index_select(0, index), to_device(factors[chosen, op], x)
            if op == 0:
                part.mul_(f)
            elif op == 1:
                middle = (1 - f) * grey(part).mean((1, 2, 3), keepdim=True)
                part.mul_(f).add_(middle)
            elif op == 2:
                middle = (1 - f) * grey(part)
                part.mul_(f).add_(middle)
            else:
                part = shift_hue(part, f.flatten() - 1)
            x.index_copy_(0, index, part.clamp_(0, 1))
    for chosen, look in ((looks[:, 9] < 0.2, grey), (solarized, solarize)):
        if len(chosen := np.flatnonzero(chosen)):
            index = send(torch.from_numpy(chosen), x.device)
            part = x.index_select(0, index)
            x.index_copy_(0, index, look(part).expand_as(part))


def eval_view(encoding, size=224, neighbour_mm=None):
    """How an image is rendered for evaluation, as plain values that a checkpoint stores."""
    view = {"size": size, "window": list(WIDE_HU) if encoding == "hu16-v1" else None}
    return view | ({"neighbour_mm": neighbour_mm} if neighbour_mm else {})


def eval_boxes(sizes, regions=None):
    """Square around each region (the whole image if None), moved and cut to stay inside the image: [B, 4]."""
    sizes = np.asarray(sizes, np.float64)
    regions = np.concatenate([np.zeros_like(sizes), sizes], 1) if regions is None else np.asarray(regions, np.float64)
    side = np.minimum((regions[:, 2:] - regions[:, :2]).max(1), sizes.min(1))[:, None]
    start = np.floor(np.clip((regions[:, :2] + regions[:, 2:] - side) / 2, 0, sizes - side))
    return np.concatenate([start, start + side], 1)


class Layout(NamedTuple):
    """Which boxes of an image are looked at. In text: a name of LAYOUTS, then other values, as tiles:overlap=0.2,flip=1

    grown: a rows x cols grid whose tiles grow by `overlap` of their side. even: equal tiles, neighbours share `overlap`
    of one; they cover every pixel. flip: each view a second time, mirrored.
    """

    whole: int = 1  # the image, squeezed to a square
    tiles: str = ""  # "", grown or even
    squares: tuple = ()  # of centre, right: as large as the image allows
    rows: int = 3
    cols: int = 3
    overlap: float = 0.15
    flip: int = 0


LAYOUTS = {
    "whole": Layout(),
    "centre": Layout(whole=0, squares=("centre",)),
    "tiles": Layout(tiles="grown"),  # 10 views
    "tiles_and_squares": Layout(tiles="even", overlap=0.25, squares=("centre", "right")),  # 12 views
}


def find_layout(text):
    """A layout as text -> Layout."""
    name, _, rest = text.partition(":")
    if name not in LAYOUTS:
        raise ValueError(f"layout {text!r}: no {name!r}; known are {', '.join(LAYOUTS)}")
    layout, limits = LAYOUTS[name], {"rows": (int, 1, 16), "cols": (int, 1, 16), "overlap": (float, 0, 0.49)}
    limits["flip"] = int, 0, 1
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        kind, low, high = limits.get(key, (None, 0, 0))
        try:
            value = kind(value) if kind else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            known = ", ".join(f"{k} {a} to {b}" for k, (_, a, b) in limits.items())
            raise ValueError(f"layout {text!r}: {part!r} is not one of {known}")
        layout = layout._replace(**{key: value})
    return layout


def tile_edges(length, n, layout):
    """Starts and ends [n, B] of the n tiles along sides of `length` [B] pixels."""
    if layout.tiles == "grown":
        edges, grow = np.arange(n)[:, None] * length / n, layout.overlap * length / n
        return np.floor(np.maximum(edges - grow, 0)), np.ceil(np.minimum(edges + length / n + grow, length))
    tile = np.ceil(length / (n - (n - 1) * layout.overlap))
    start = np.round(np.linspace(0, 1, n)[:, None] * (length - tile))
    return start, start + tile


def view_boxes(sizes, layout):
    """Boxes [V, B, 4] of a layout (or its text) in images of these (height, width) [B, 2], and flips [V]."""
    layout = find_layout(layout) if isinstance(layout, str) else layout
    sizes = np.asarray(sizes, np.float64)
    height, width = sizes.T
    boxes = [np.concatenate([np.zeros_like(sizes), sizes], 1)] * layout.whole
    if layout.tiles:
        (y0, y1), (x0, x1) = tile_edges(height, layout.rows, layout), tile_edges(width, layout.cols, layout)
        boxes += [np.stack([y0[r], x0[c], y1[r], x1[c]], 1) for r in range(layout.rows) for c in range(layout.cols)]
    for name in layout.squares:
        square = eval_boxes(sizes)
        moved = (sizes - square[:, 2:]) * (name == "right")  # to the right end, or to the lower one
        boxes.append(square + np.tile(moved, 2))
    flips = np.repeat([False, True], len(boxes))[: len(boxes) * (1 + layout.flip)]
    return np.stack(boxes * (1 + layout.flip)), flips


def render_eval(images, view, boxes=None):
    """Images [B, 3, H, W] through an eval_view, cut at boxes [B, 4] -> normalised [B, 3, size, size]."""
    boxes = eval_boxes([images.shape[2:]] * len(images)) if boxes is None else np.asarray(boxes)
    return render_views(images, view, boxes[None], np.zeros(1, bool))[0]


@torch.no_grad()
def render_views(images, view, boxes, flips):
    """The same for boxes [V, B, 4] and flips [V], as view_boxes makes them -> [V, B, 3, size, size]."""
    boxes = np.asarray(boxes)
    flips = np.repeat(np.asarray(flips)[:, None], boxes.shape[1], 1)
    with torch.autocast(images.device.type, enabled=False):
        x = cut(images, boxes, flips, np.zeros(boxes.shape[:2]), view["size"])
        if images.dtype == torch.int16:
            level, width = view["window"]
            x.sub_(level).div_(width).add_(0.5)
        else:
            x.div_(255)
        return normalise(x.clamp_(0, 1))


# Loading: workers read files and resolve boxes; nothing depends on how many there are.


class Batch(NamedTuple):
    """One micro-batch of one update, as read."""

    step: int  # updates done before it
    ids: np.ndarray  # [b] sample ids
    images: Tensor  # [b, 3, H, W]; of each no more than its views need
    plan: Plan  # its boxes are of these images
    masks: Tensor  # [2b, N] bool, crop-major
    at: Tensor  # [M] positions of masked patches in [2b * N]
    bad: list  # [(path, reason)] of files that were replaced by their neighbour in the batch


def read_photo(path, boxes_of, sizes, keep=2):
    """Only what boxes need of a photograph, upright, reduced while each keeps `keep` times the size of its view
    -> (image, boxes in it).

    boxes_of(height, width) -> boxes [V, 4] of the upright picture; sizes: pixels of their views, one or [V].
    """
    try:
        with open_photo(path) as file:
            turn, size = turn_of(file)
            boxes = boxes_of(*size)
            factor = max(1, int(((boxes[:, 2:] - boxes[:, :2]).min(1) / (keep * np.asarray(sizes))).min()))
            W, H = file.size
            file.draft("RGB", (-(-W // factor), -(-H // factor)))  # JPEG decodes at 1/2, 1/4 or 1/8 for free
            drafted = np.array([file.height / H, file.width / W][:: -1 if turn[2] else 1] * 2)
            factor = max(1, int(factor * drafted.min() + 1e-6))
            size = (file.width, file.height) if turn[2] else (file.height, file.width)
            low, high = np.floor((boxes * drafted)[:, :2].min(0)), np.ceil((boxes * drafted)[:, 2:].max(0))
            high = np.minimum(high, size)
            y0, x0, y1, x1 = stored_box((*low.astype(int).tolist(), *high.astype(int).tolist()), size, turn)
            image = upright(np.asarray(to_rgb(file).reduce(factor, box=(x0, y0, x1, y1))).transpose(2, 0, 1), turn)
            # reduce() ends each stored axis with what is left of a cell; turned upright, it may be the beginning
            low = low + np.where(turn[:2], (high - low) % -factor, 0)
    except BROKEN as error:
        raise Unreadable(f"{path} cannot be read: {error}") from None
    return torch.from_numpy(image.copy()), (boxes * drafted - np.tile(low, 2)) / factor


def read_boxes(source, i, boxes):
    """What boxes [V, 4] of a slice need of it -> (image, boxes in it)."""
    low, high = np.floor(boxes[:, :2].min(0)).astype(int), np.ceil(boxes[:, 2:].max(0)).astype(int)
    return source.read(i, (*low.tolist(), *high.tolist())), boxes - np.tile(low, 2)


def read_view(source, i, boxes=None, size=224, keep=2):
    """For one look at an image: (pixels [3, h, w], boxes [S, 4] in them). boxes: None is that of eval_boxes, a layout
    those of view_boxes.

    Of a photograph only what views of `size` pixels need is decoded; of a slice only the boxes are kept.
    """

    def chosen(height, width, body=None):
        if isinstance(boxes, Layout):
            return view_boxes([(height, width)], boxes)[0][:, 0]
        return eval_boxes([(height, width)], body and [body]) if boxes is None else boxes

    if source.encoding == "photo":
        source.check(i)
        return read_photo(source.path(i), chosen, size, keep)
    at = chosen(*source.size(i), source.body(i))
    return (source.read(i), at) if boxes is None else read_boxes(source, i, at)


def pad_to_one_size(images, step=1):
    """[3, H, W] of different sizes -> [B, 3, H, W], filled with air (HU) or black; boxes never reach the filling.

    step: of which both sides are made multiples, so that few shapes occur.
    """
    H, W = (-(-max(image.shape[axis] for image in images) // step) * step for axis in (1, 2))
    padded = images[0].new_full((len(images), 3, H, W), AIR_HU if images[0].dtype == torch.int16 else 0)
    for into, image in zip(padded, images):
        into[:, : image.shape[1], : image.shape[2]] = image
    return padded


def pick_recipe(recipes, seed, step):
    """Of several recipes (mixed sizes) the one of this update; all ranks agree."""
    return recipes[rng(seed, "sizes", step).integers(len(recipes))]


@dataclass
class Updates(torch.utils.data.Dataset):
    """Item k is micro-batch k % micros of update steps[k // micros], this rank's contiguous part of the plan."""

    source: Source
    recipes: list
    seed: int
    steps: range
    batch: int
    micro_batch: int
    rank: int
    world: int
    patch_size: int
    masking: tuple
    fixed: bool

    def __post_init__(self):
        self.micros, rest = divmod(self.batch, self.world * self.micro_batch)
        if rest:
            ranks = f"{self.world} x {self.micro_batch}"
            raise ValueError(f"batch {self.batch} is not a multiple of ranks x micro-batch = {ranks}")

    def __len__(self):
        return len(self.steps) * self.micros

    def __getitem__(self, k):
        step, micro = self.steps[k // self.micros], k % self.micros
        start = (self.rank * self.micros + micro) * self.micro_batch
        here = slice(start, start + self.micro_batch)
        recipe = pick_recipe(self.recipes, self.seed, step)
        turn, look = (step % max(len(self.source) // self.batch, 1), 0) if self.fixed else (step, step)
        ids = self.source.order(self.seed, turn, self.batch)[here]
        images, choices, bad = self.read(ids, plan(self.seed, look, ids, recipe))
        grid = [recipe.global_size // self.patch_size] * 2
        masks = block_masks(self.seed, look, 2 * self.batch, grid, *self.masking)
        masks = masks.unflatten(0, (2, self.batch))[:, here].flatten(0, 1)
        at = torch.from_numpy(np.flatnonzero(masks.numpy()))
        return Batch(step, ids, images, choices, masks, at, bad)

    def read(self, ids, choices):
        """Images and their placed plan; a broken file is reported and the next good one stands in for it."""
        found, bad = {}, []  # found: {place in the batch: (image, boxes of its views [V, 4])}
        for j, i in enumerate(ids):
            try:
                found[j] = self.read_one(i, select(choices, [j]))
            except Unreadable as error:
                bad.append((str(self.source.path(i)), str(error)))
        if not found:
            return None, choices, bad
        stand_in = [min(found, key=lambda g: (g - j) % len(ids)) for j in range(len(ids))]
        choices = select(choices, stand_in) if bad else choices
        images, boxes = zip(*(found[j] for j in stand_in))
        return pad_to_one_size(images, 64), choices._replace(boxes=np.stack(boxes, 1)), bad

    def read_one(self, i, own):
        source = self.source
        if source.encoding == "photo":
            source.check(i)
            return read_photo(source.path(i), functools.partial(boxes_in, own), sides(own.recipe))
        boxes = place(own, [source.size(i)], [source.body(i)]).boxes[:, 0]
        return read_boxes(source, i, boxes)


def select(plan, index):
    """The part of a plan that belongs to these images."""
    return Plan(plan.recipe, *(None if a is None else a[:, index] for a in plan[1:]))


def as_read(batch):
    return batch  # torch would turn the arrays of the plan into tensors


def follow_run(_):
    """In a reading process: signals are for the run, which still needs its batches. torchrun sends them to all.

    A run that is killed takes its readers with it: one that waits for ever to hand over a batch would hold the lock of
    the run's folder, and the same command could not go on.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_loader(source, recipes, seed, steps, batch, micro_batch=None, rank=0, world=1, workers=0, patch_size=16,
                masking=(0.5, (0.1, 0.5)), skip_bad=0, pin_memory=False, fixed=False):  # fmt: skip
    """An iterator over the micro-batches of `steps` (a range) in order; starts at any step at once.

    recipes: a name in RECIPES, a Recipe, or several of them, of which each update draws one.
    A file that cannot be read is an error; up to `skip_bad` of them are printed and replaced wherever they come up.
    fixed: every epoch is the first one again, its batches, crops and masks (to overfit on purpose; other company in a
    batch would give an image other targets by Sinkhorn: 0.15 nats of 128 images and 1024 prototypes, 2026-11).
    """
    if isinstance(recipes, str) and recipes not in RECIPES:
        raise ValueError(f"there is no recipe {recipes!r}; known are {', '.join(RECIPES)}")
    recipes = RECIPES[recipes] if isinstance(recipes, str) else recipes
    recipes = [recipes] if isinstance(recipes, Recipe) else recipes
    micro_batch = micro_batch or batch // world
    updates = Updates(source, recipes, seed, steps, batch, micro_batch, rank, world, patch_size, masking, fixed)
    return read_ahead(updates, workers, pin_memory, skip_bad)


def read_ahead(updates, workers, pin_memory=False, skip_bad=0):
    """An iterator over a dataset of micro-batches, read by `workers` processes (0: by this one); see checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more readers than cores may be right
        loader = torch.utils.data.DataLoader(
            updates,
            batch_size=None,
            shuffle=False,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=as_read,
            worker_init_fn=follow_run,
            generator=torch.Generator(),  # the global one belongs to whoever builds a model
        )
        return checked(start_readers(loader), skip_bad)


def start_readers(loader):
    """iter(loader), whose processes end with this one, whatever happens."""
    others, items = set(multiprocessing.active_children()), None
    try:
        items = iter(loader)
    except OSError as error:
        error.strerror = f"{error.strerror}, while readers start: use fewer --workers, or a higher ulimit -n"
        raise
    finally:
        readers = set(multiprocessing.active_children()) - others
        if items is None:  # too many open files, or Ctrl+C: some may run already
            kill(readers)
            sys.unraisablehook = lambda _: None  # torch cannot tidy up a half-made loader, and says so at length
        elif readers:
            atexit.register(kill, readers)
    return items


def kill(readers):
    """At exit Python sends its children a SIGTERM, which readers ignore, and waits: after an error, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise a second error
    for process in readers:
        process.kill()


def checked(items, skip_bad):
    """Micro-batches as they come; raises here, not in a reading process, whose errors arrive as a page of traceback."""
    skipped = set()
    for item in items:
        for path, reason in item.bad:
            if path in skipped:
                continue
            skipped.add(path)
            if len(skipped) > skip_bad:
                raise Unreadable(f"{reason} (--skip-bad {skip_bad} allows no more)")
            print(f"skipped {len(skipped)} of at most {skip_bad} broken files: {path}")
        if item.images is None:
            raise Unreadable(f"no file of a whole micro-batch can be read; first: {item.bad[0][1]}")
        yield item

"""The writing half of preprocessing: volumes in HU -> slices, records, index, manifest; in one process or in shards.

    prepare(target, names, shard)
    write_series(target, ids, volume, inputs, rejected)      # in a worker, for each series
    return close(target, args.shard, facts, kept, rejects, args.list_rejects)

preprocess_dicom.py and preprocess_volumes.py read, each its own kind of files; what they write is written here.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from checkpoint import atomic_write, fsync_folder
from data import RGB_WINDOWS, WINDOWS_HU, file_sha256, window_codes
from tools.lib import manifest as manifests
from tools.lib.cli import positive, shown, within
from tools.lib.dicom import REASONS
from tools.lib.files import read_json_file, write_json

ENCODINGS = {"rgb": "rgb-v1", "hu16": "hu16-v1"}
PART = {"facts": dict, "kept": list, "rejected": list}  # fields of the file of a shard
BODY_HU = -500
BODY_GRID = 128  # the body is found on about this many points along the shorter side


class Target(NamedTuple):
    """Where series are written, and how."""

    root: Path  # processed folder, absolute
    dataset: str
    encoding: str


class Ids(NamedTuple):
    """Of one series, as our files show them; "" where there is none."""

    series: str
    patient: str
    study: str
    sops: list  # of each slice


# The body box.


def largest_region(mask):
    """bool [h, w] -> bool [h, w]: its largest 4-connected region. Runs of each row are joined by union-find."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    parent = list(range(len(rows)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = np.searchsorted(rows, np.arange(len(mask) + 1)).tolist()  # first run of each row
    start, end = starts.tolist(), ends.tolist()
    for y in range(1, len(mask)):
        above, here = first[y - 1], first[y]
        while above < first[y] and here < first[y + 1]:
            if start[above] < end[here] and start[here] < end[above]:
                parent[root(here)] = root(above)
            if end[above] < end[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(i) for i in range(len(rows))], np.intp)
    best = np.bincount(roots, ends - starts).argmax()
    region = np.zeros_like(mask)
    for i in np.flatnonzero(roots == best):
        region[rows[i], start[i] : end[i]] = True
    return region


def dilate(mask):
    """3 x 3 square; `~dilate(~mask)` erodes."""
    wide = np.pad(mask, 1)
    tall = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    return tall[:-2] | tall[1:-1] | tall[2:]


def body_box(hu):
    """int16 [H, W] -> y0, y1, x0, x1 (ends excluded) of the largest region above -500 HU; the whole slice if none.

    Found on a coarse grid after an opening that removes what is thinner than 3 grid points, which takes the table off
    the patient's back, then grown back by one grid point and tightened to full-resolution pixels above the threshold.
    """
    height, width = hu.shape
    step = max(1, min(height, width) // BODY_GRID)
    ys, xs = (np.minimum(np.arange(0, n, step) + step // 2, n - 1) for n in hu.shape)
    coarse = hu[np.ix_(ys, xs)] > BODY_HU
    opened = dilate(~dilate(~coarse))
    if not opened.any():
        return 0, height, 0, width
    grown = dilate(largest_region(opened))
    fine = grown.repeat(step, 0)[:height].repeat(step, 1)[:, :width] & (hu > BODY_HU)
    y, x = np.flatnonzero(fine.any(1)), np.flatnonzero(fine.any(0))
    return int(y[0]), int(y[-1]) + 1, int(x[0]), int(x[-1]) + 1


# Writing a series.


@functools.cache
def window_table(name):
    """uint8 [65536]: data.window_codes of every int16, in the order of its bits. 10 times faster than the formula."""
    return window_codes(np.arange(1 << 16, dtype=np.uint16).view(np.int16), *WINDOWS_HU[name])


def png_bytes(neighbours):
    """int16 [3, H, W], slices z-1, z, z+1 -> an rgb-v1 PNG."""
    planes = [window_table(name)[hu.view(np.uint16)] for name, hu in zip(RGB_WINDOWS, neighbours)]
    image, data = Image.merge("RGB", [Image.fromarray(plane) for plane in planes]), io.BytesIO()
    # Run-length strategy (3): noise has no longer matches to find. 13 ms and 361 kB a 512 x 512 slice; Pillow's default
    # strategy at level 1 takes 19 ms for 395 kB, at level 6 48 ms for 332 kB (one core, 2026-11).
    image.save(data, "PNG", compress_level=1, compress_type=3)
    return data.getvalue()


def write_rgb(root, folder, hu):
    """Inner slices as PNGs in a temporary sibling that is renamed when all is on the disk -> {path: [bytes, sha256]}"""
    final = root / folder
    temporary = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        files = {}
        for z in range(1, len(hu) - 1):
            data = png_bytes(hu[z - 1 : z + 2])
            (temporary / f"{z:04d}.png").write_bytes(data)
            files[f"{folder}/{z:04d}.png"] = [len(data), hashlib.sha256(data).hexdigest()]
        for path in sorted(temporary.iterdir()):  # after all writes: by then most of the data are on their way
            with open(path, "r+b") as f:
                os.fsync(f.fileno())
        fsync_folder(temporary)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(final.parent)
    return files


def write_hu16(root, folder, hu):
    """-> {path: [bytes, sha256]}"""
    path = atomic_write(root / f"{folder}.npy", lambda f: np.save(f, hu))
    return {f"{folder}.npy": [path.stat().st_size, file_sha256(path)]}


def number(value):
    """Millimetres as text, to a nanometre, without a negative zero."""
    return repr(round(float(value), 6) + 0.0)


def index_rows(target, ids, volume):
    """One row per inner slice, in the order of data.INDEX_COLUMNS."""
    folder = f"{target.dataset}/{ids.series}"
    spacing_z, *spacing_yx = map(number, volume.spacing)
    rows = []
    for z in range(1, len(volume.hu) - 1):
        path = f"{folder}.npy" if target.encoding == ENCODINGS["hu16"] else f"{folder}/{z:04d}.png"
        names = [path, target.encoding, target.dataset, ids.patient, ids.study, ids.series, ids.sops[z]]
        place = [z, number(volume.z_mm[z]), *spacing_yx, spacing_z, *volume.hu.shape[1:]]
        rows.append([*names, *place, *body_box(volume.hu[z])])
    return rows


def write_series(target, ids, volume, inputs, rejected, **more):
    """The pixels of one series and its record, which comes last. inputs: hash of all that it was made of."""
    write = write_hu16 if target.encoding == ENCODINGS["hu16"] else write_rgb
    record = {
        "version": manifests.VERSION,
        "inputs": inputs,
        "rejected": sorted(rejected),
        "handled": volume.handled,
        "files": write(target.root, f"{target.dataset}/{ids.series}", volume.hu),
        "rows": index_rows(target, ids, volume),
        **more,
    }
    write_json(manifests.record_path(target.root, target.dataset, ids.series), record, indent=None)


def find_record(target, series):
    """The record of a series whose files are all there with their sizes, or None."""
    record = manifests.find(manifests.read_record, target.root, target.dataset, series)
    for path, (size, _) in record["files"].items() if record else ():
        path = target.root / path
        if not path.is_file() or path.stat().st_size != size:
            return None
    return record


def discard(target, series):
    """Remove what an earlier run wrote of a series, its record first: without one a series counts as not done."""
    manifests.record_path(target.root, target.dataset, series).unlink(missing_ok=True)
    shutil.rmtree(target.root / target.dataset / series, ignore_errors=True)
    (target.root / target.dataset / f"{series}.npy").unlink(missing_ok=True)


# The whole dataset.


def dataset_name(text):
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name of letters, digits, dot, dash, underscore")
    return text


def shard(text):
    """3/16 -> (3, 16)"""
    found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is not K/N with K from 1 to N, such as 3/16")
    return number, count


def common_flags(parser, raw):
    parser.add_argument("--raw", required=True, type=Path, help=raw)
    parser.add_argument("--out", required=True, type=Path, help="processed root; may hold other datasets")
    parser.add_argument("--dataset", required=True, type=dataset_name, help="its name; groups are dataset/patient")
    parser.add_argument("--format", choices=ENCODINGS, default="rgb", help="PNGs, or exact HU in one .npy a series")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--min-slices", type=within("[3, 1e18]", int), default=8, help="shorter series are rejected")
    parser.add_argument("--list-rejects", action="store_true", help="print the path of every rejected file")
    parser.add_argument("--shard", type=shard, help="K/N: do only the K-th of N parts of the series, for job arrays; "
                        "the same command with --merge N comes after all of them")  # fmt: skip
    parser.add_argument("--merge", type=positive, help="N: verify what N shards wrote, then write index and manifest")
    return parser


def check_folders(raw, out, dataset):
    root, folder = out.resolve(), raw.resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"--raw {raw} is not a folder")
    if root.is_relative_to(folder) or folder.is_relative_to(root / dataset):
        raise ValueError(f"--out {out} and --raw {raw} lie inside each other: choose another --out")


def belongs(name, shard):
    """Whether a series (or a file without one) is of this shard; of no shard, all are."""
    return not shard or int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % shard[1] == shard[0] - 1


def prepare(target, names, shard):
    """A dataset has one encoding and one source (names: of all its series); clear the leftovers of killed runs."""
    root, dataset = target.root, target.dataset
    manifest = manifests.find(manifests.read_manifest, root, dataset)
    if manifest and manifest["series"] and manifest["encoding"] != target.encoding:
        wanted = f"give another --dataset or --out for {target.encoding}"
        raise ValueError(f"{root / dataset} is {manifest['encoding']}: {wanted}")
    done = {path.stem for path in (root / "_manifests" / dataset).glob("*.json")}
    if done and not any(name in done or f"{name}-1" in done for name in names):
        raise ValueError(
            f"{root / dataset} holds {len(done)} series and none of them is in --raw: give another --dataset, or the"
            " --key-file it was made with, or remove it"
        )
    for folder in (root / dataset, root / "_manifests" / dataset):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp") if not shard else ():  # other shards may be writing theirs
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def finish(target, kept, origin):
    """Remove what this run did not keep, then write index and manifest -> manifest."""
    root, dataset = target.root, target.dataset
    stale = {path.stem for path in (root / "_manifests" / dataset).glob("*.json")} - set(kept)
    for series in stale:
        discard(target, series)
    if stale:
        print(f"{dataset}: removed {len(stale)} series of an earlier run, no longer in --raw or rejected now")
    others = sorted(path.stem for path in (root / "_manifests").glob("*.json") if path.stem != dataset)
    series_of = {other: manifests.read_manifest(root, other)["series"] for other in others}
    manifests.write_index(root, series_of | {dataset: kept})
    files, origin["handled"] = {}, {}
    for series in kept:
        record = manifests.read_record(root, dataset, series)
        files[series] = record["files"]
        if record["handled"]:
            origin["handled"][series] = record["handled"]
    manifest = manifests.write_manifest(root, dataset, origin, files)
    manifests.refresh_index_hash(root)
    return manifest


def summary(entries):
    """Table of rejects by reason, and what to install."""
    files, series = Counter(), Counter()
    for entry in entries:
        files[entry["reason"]] += entry.get("files", 1)
        series[entry["reason"]] += "files" in entry
    lines = [f"{'rejected':20} {'series':>6} {'files':>7}"] if files else []
    lines += [f"{reason:20} {series[reason]:6} {n:7}  {REASONS[reason]}" for reason, n in files.most_common()]
    advice = {f"{entry['reason']}: {entry['detail']}" for entry in entries if "pip install" in entry["detail"]}
    return "\n".join([*lines, *sorted(advice)])


def json_key(entry):
    """Orders entries of the manifest, in which no name of a raw file stands."""
    return json.dumps(entry, sort_keys=True)


def close(target, shard, facts, kept, rejects, list_rejects):
    """After all series: index and manifest, or the file of a shard -> exit code.

    facts: {encoding, options, tool, raw, series: how many there are in all}; rejects [(entry, raw paths)].
    """
    rejects = sorted(rejects, key=lambda item: json_key(item[0]))
    entries = [entry for entry, _ in rejects]
    if list_rejects:
        print("\n".join(f"{entry['reason']:20} {shown(path, 4096)}" for entry, paths in rejects for path in paths))
    if not shard:
        return conclude(target, facts, sorted(kept), entries)
    path = part_path(target, *shard)
    write_json(path, {"version": manifests.VERSION, "facts": facts, "kept": sorted(kept), "rejected": entries})
    print(f"{path}: {len(kept)} series kept; the same command with --merge {shard[1]} comes after all shards")
    print(summary(entries))
    return exit_code(entries)


def exit_code(entries):
    return 1 if any(entry["reason"] not in ("not_dicom", "not_volume") for entry in entries) else 0


def conclude(target, facts, kept, entries):
    origin = {key: value for key, value in facts.items() if key != "series"}
    counts = finish(target, kept, origin | {"rejected": entries})["counts"]
    print(f"{target.dataset}: {len(kept)} of {facts['series']} series, {counts['slices']} slices, "
          f"{counts['patient']} patients")  # fmt: skip
    print(f"{manifests.index_path(target.root)}\n{manifests.manifest_path(target.root, target.dataset)}")
    print(summary(entries))
    if not kept:
        print("nothing usable", file=sys.stderr)
        return 2
    return exit_code(entries)


# Shards: each writes its series and one file about them; the merge reads these files and never the raw folder.


def part_path(target, number, count):
    return target.root / "_shards" / target.dataset / f"{number}_of_{count}.json"


def merge(target, count):
    """What `count` shards wrote, verified, as one dataset: the same bytes as of one process -> exit code."""
    paths = [part_path(target, k, count) for k in range(1, count + 1)]
    again = [f"run it with --shard {k}/{count}, then --merge again" for k in range(1, count + 1)]
    parts = [read_json_file(*one, manifests.VERSION) for one in zip(paths, [PART] * count, again)]
    first, facts = paths[0], parts[0]["facts"]
    for path, part, remedy in zip(paths, parts, again):
        if odd := sorted(key for key in facts.keys() | part["facts"] if facts.get(key) != part["facts"].get(key)):
            raise ValueError(f"{path} and {first} disagree about {', '.join(odd)}: --raw or the flags were others; "
                             f"run all shards again")  # fmt: skip
        if lost := [series for series in part["kept"] if not find_record(target, series)]:
            what = f"{len(lost)} series are not whole, first {shown(lost[0])}"
            raise ValueError(f"{path}: {what}; {remedy}")
    kept = sorted(series for part in parts for series in part["kept"])
    if facts["encoding"] != target.encoding:
        raise ValueError(f"{first} is of {facts['encoding']}: give the --format of the shards")
    prepare(target, kept, None)
    entries = sorted((entry for part in parts for entry in part["rejected"]), key=json_key)
    code = conclude(target, facts, kept, entries)
    shutil.rmtree(first.parent)
    if not any(first.parent.parent.iterdir()):
        first.parent.parent.rmdir()
    return code

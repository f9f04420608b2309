"""DICOM folders -> slices, index and manifest that everything else reads.

    python tools/preprocess_dicom.py --raw data/raw --out data/processed --dataset lidc

In: any tree of files (other files than CT slices are recorded and left out). Out: per series one RGB PNG per inner
slice (--format rgb: slice z-1 lung, z soft tissue, z+1 bone window) or one int16 .npy in HU (--format hu16, for long
runs), `_index/index.csv` over all datasets and `_manifests/<dataset>.json` with every reject and its reason. The same
command again continues a killed run. Exit code 0 all fine, 1 something was rejected, 2 nothing usable.
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
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import pydicom
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import atomic_write, fsync_folder
from data import RGB_WINDOWS, WINDOWS_HU, file_sha256, window_codes
from tools.lib import manifest as manifests
from tools.lib.cli import Parser, positive, run, shown, within
from tools.lib.dicom import (
    REASONS,
    Reject,
    assemble,
    default_key_file,
    load_key,
    most_common,
    public_id,
    read_slices,
    scan_file,
)
from tools.lib.files import walk_files, write_json
from tools.lib.progress import progress
from tools.lib.provenance import plain_name
from tools.lib.workers import parallel

VERSION = 1  # part of every series' input hash: raise it when the same files would give other pixels or rows
ENCODINGS = {"rgb": "rgb-v1", "hu16": "hu16-v1"}
MAX_BYTES = 1 << 32  # of one file: 8,000 slices of 512 x 512
BODY_HU = -500
BODY_GRID = 128  # the body is found on about this many points along the shorter side


class Job(NamedTuple):
    """One series for one worker."""

    root: str
    dataset: str
    encoding: str
    series: str  # as written
    files: tuple  # of (path, sop as written)
    kept_patients: tuple  # PatientIDs of its files that need no hash
    spelling: str  # of its PatientID, where the dataset has several that differ in case only; "" elsewhere
    uids_kept: bool
    key: bytes | None  # of the hashes; None where nothing is hashed
    min_slices: int
    allow_gaps: bool


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


def index_rows(job, folder, volume):
    """One row per inner slice, in the order of data.INDEX_COLUMNS."""
    uid_key = None if job.uids_kept else job.key
    patient_key = None if volume.patient in job.kept_patients else job.key
    patient = public_id("patient", job.spelling or volume.patient, patient_key)
    study = volume.study and public_id("study", volume.study, uid_key)  # a hash of nothing would look like an id
    spacing_z, *spacing_yx = map(number, volume.spacing)
    rows = []
    for z in range(1, len(volume.hu) - 1):
        path = f"{folder}.npy" if job.encoding == ENCODINGS["hu16"] else f"{folder}/{z:04d}.png"
        sop = public_id("sop", volume.sops[z], uid_key)
        place = [z, number(volume.z_mm[z]), *spacing_yx, spacing_z, *volume.hu.shape[1:]]
        rows.append([path, job.encoding, job.dataset, patient, study, job.series, sop, *place, *body_box(volume.hu[z])])
    return rows


def discard(root, dataset, series):
    """Remove what an earlier run wrote of a series, its record first: without one a series counts as not done."""
    manifests.record_path(root, dataset, series).unlink(missing_ok=True)
    shutil.rmtree(root / dataset / series, ignore_errors=True)
    (root / dataset / f"{series}.npy").unlink(missing_ok=True)


# One series, in a worker.


def inputs_hash(job, digests):
    """Of the bytes of the files, in any order and under any name, and of all that shapes the output."""
    ids = [job.kept_patients, job.uids_kept, job.key and public_id("sop", "", job.key)]
    ids += [job.spelling] if job.spelling else []
    recipe = [VERSION, job.encoding, job.min_slices, job.allow_gaps, ids, sorted(digests)]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def is_finished(job, record):
    root = Path(job.root)
    if not {sop for sop, *_ in record["rejected"]} <= {sop for _, sop in job.files}:
        return False
    for path, (size, _) in record["files"].items():
        if not (root / path).is_file() or (root / path).stat().st_size != size:
            return False
    try:
        return record["inputs"] == inputs_hash(job, [file_sha256(path) for path, _ in job.files])
    except OSError:
        return False  # reading it again says why


def read_series(job):
    """-> slices, rejected files [(sop, reason, detail)], digests. Each file is read once."""
    slices, rejected, digests = [], [], []
    for path, sop in job.files:
        try:
            if os.path.getsize(path) > MAX_BYTES:
                raise OSError("larger than any CT file: its beginning may lie")
            data = Path(path).read_bytes()
        except OSError:
            rejected.append((sop, "unreadable", ""))
            continue
        digests.append(hashlib.sha256(data).hexdigest())
        try:
            slices += read_slices(data)
        except Reject as reject:
            rejected.append((sop, reject.reason, reject.detail))
    return slices, rejected, digests


def process_series(job):
    """Write one series and its record -> (job, reason or "" if kept, detail, rejected files)."""
    root, folder = Path(job.root), f"{job.dataset}/{job.series}"
    record_file = manifests.record_path(root, job.dataset, job.series)
    record = manifests.find(manifests.read_record, root, job.dataset, job.series)
    if record and is_finished(job, record):
        return job, "", "", record["rejected"]
    slices, rejected, digests = read_series(job)
    discard(root, job.dataset, job.series)
    try:
        volume = assemble(slices, job.min_slices, job.allow_gaps)
    except Reject as reject:
        why = (reject.reason, reject.detail) if slices else most_common(tuple(why) for _, *why in rejected)
        return job, *why, rejected
    write = write_hu16 if job.encoding == ENCODINGS["hu16"] else write_rgb
    record = {
        "version": manifests.VERSION,
        "inputs": inputs_hash(job, digests),
        "rejected": sorted(rejected),
        "handled": volume.handled,
        "files": write(root, folder, volume.hu),
        "rows": index_rows(job, folder, volume),
    }
    write_json(record_file, record, indent=None)
    return job, "", "", rejected


# All series.


def scan_files(paths):
    return [scan_file(path) for path in paths]


def scan_tree(paths, workers):
    """-> [Scan], in the order of paths."""
    chunks = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    scans = []
    with progress(total=len(paths), desc="headers", unit="file") as bar:
        for found in parallel(scan_files, chunks, workers):
            scans += found
            bar.update(len(found))
    return sorted(scans)


def kept_ids(scans, field, keep_ids):
    """The values of a field whose files say PatientIdentityRemoved YES, none of them NO; all spellings or none."""
    said = defaultdict(set)
    for scan in scans:
        said[getattr(scan, field)].add("YES" if keep_ids else scan.identity.upper())
    hidden = {plain_name(value) for value, words in said.items() if "YES" not in words or "NO" in words}
    return {value for value in said if plain_name(value) not in hidden}


def spellings(scans):
    """{PatientID: the first in order} of those that differ in case or outer spaces only.

    Hashed, they would be patients that nobody could recognise as one.
    """
    found = defaultdict(set)
    for scan in scans:
        found[plain_name(scan.patient)].add(scan.patient)
    return {name: min(names) for names in found.values() if len(names) > 1 for name in names}


def plan_jobs(scans, key_file, keep_ids, **common):
    """-> {series as written: [(path, sop as written, reason or "", detail)]}, and jobs for what has no reason."""
    patients, series = (kept_ids(scans, field, keep_ids) for field in ("patient", "series"))
    by_uid, members, jobs, spelling = defaultdict(list), {}, [], spellings(scans)
    if spelling:
        print(f"{len(spelling)} PatientIDs differ from others in case or outer spaces only: spellings of one patient")
    for scan in scans:
        if scan.series:
            by_uid[scan.series].append(scan)
    for uid, found in by_uid.items():
        kept_patients, uids_kept = {scan.patient for scan in found} & patients, uid in series
        key = None if uids_kept and all(scan.patient in patients for scan in found) else load_key(key_file)
        uid_key = None if uids_kept else key
        name = public_id("series", uid, uid_key)
        members[name] = [(s.path, public_id("sop", s.sop, uid_key), s.reason, s.detail) for s in found]
        files = tuple((path, sop) for path, sop, reason, _ in members[name] if not reason)
        ids = {"series": name, "kept_patients": tuple(sorted(kept_patients)), "uids_kept": uids_kept, "key": key}
        ids["spelling"] = next((spelling[scan.patient] for scan in found if scan.patient in spelling), "")
        if files:
            jobs.append(Job(files=files, **ids, **common))
    return members, sorted(jobs, key=lambda job: (-len(job.files), job.series))


def process_all(jobs, workers):
    """-> {series: (reason or "", detail, rejected files)}"""
    outcome = {}
    with progress(total=sum(len(job.files) for job in jobs), desc="slices", unit="slice") as bar:
        for job, *result in parallel(process_series, jobs, workers):
            outcome[job.series] = result
            bar.update(len(job.files))
    return outcome


def list_rejects(scans, members, outcome):
    """-> [(entry of the manifest, raw paths)] in an order that file names play no part in."""
    found = [({"file": s.content, "reason": s.reason, "detail": s.detail}, [s.path]) for s in scans if not s.series]
    for series, files in members.items():
        reason, detail, rejected = outcome.get(series, (None, "", []))
        rejected = [why for _, *why in files if why[1]] + [tuple(why) for why in rejected]
        paths = {sop: path for path, sop, *_ in files}
        if reason == "":  # kept, without these
            names = ("series", "sop", "reason", "detail")
            found += [(dict(zip(names, (series, *why))), [paths[why[0]]]) for why in rejected]
            continue
        if reason is None:
            reason, detail = most_common(tuple(why[1:]) for why in rejected)
        entry = {"series": series, "reason": reason, "detail": detail, "files": len(files)}
        entry["file_reasons"] = Counter(why[1] for why in rejected)
        found.append((entry, list(paths.values())))
    return sorted(found, key=lambda item: json.dumps(item[0], sort_keys=True))


def summary(rejects):
    """Table of rejects by reason, and what to install."""
    files, series = Counter(), Counter()
    for entry, _ in rejects:
        files[entry["reason"]] += entry.get("files", 1)
        series[entry["reason"]] += "files" in entry
    lines = [f"{'rejected':20} {'series':>6} {'files':>7}"] if files else []
    lines += [f"{reason:20} {series[reason]:6} {n:7}  {REASONS[reason]}" for reason, n in files.most_common()]
    advice = {f"{entry['reason']}: {entry['detail']}" for entry, _ in rejects if "pip install" in entry["detail"]}
    return "\n".join([*lines, *sorted(advice)])


def finish(root, dataset, kept, origin):
    """Remove what this run did not keep, then write index and manifest -> manifest."""
    stale = {path.stem for path in (root / "_manifests" / dataset).glob("*.json")} - set(kept)
    for series in stale:
        discard(root, dataset, series)
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


def check_target(root, dataset, encoding, jobs):
    """A dataset has one encoding and one source; clear the leftovers of killed runs."""
    manifest = manifests.find(manifests.read_manifest, root, dataset)
    if manifest and manifest["series"] and manifest["encoding"] != encoding:
        raise ValueError(f"{root / dataset} is {manifest['encoding']}: give another --dataset or --out for {encoding}")
    done = {path.stem for path in (root / "_manifests" / dataset).glob("*.json")}
    if done and not done & {job.series for job in jobs}:
        raise ValueError(
            f"{root / dataset} holds {len(done)} series and none of them is in --raw: give another --dataset, or the"
            " --key-file it was made with, or remove it"
        )
    for folder in (root / dataset, root / "_manifests" / dataset):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def dataset_name(text):
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name of letters, digits, dot, dash, underscore")
    return text


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--raw", required=True, type=Path, help="folder of DICOM files, any nesting")
    parser.add_argument("--out", required=True, type=Path, help="processed root; may hold other datasets")
    parser.add_argument("--dataset", required=True, type=dataset_name, help="its name; groups are dataset/patient")
    parser.add_argument("--format", choices=ENCODINGS, default="rgb", help="PNGs, or exact HU in one .npy a series")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--min-slices", type=within("[3, 1e18]", int), default=8, help="shorter series are rejected; at least 3"
    )
    parser.add_argument("--allow-gaps", action="store_true", help="of an irregular series keep the longest regular run")
    parser.add_argument("--keep-ids", action="store_true", help="keep ids also without PatientIdentityRemoved YES")
    parser.add_argument("--key-file", type=Path, help="secret for hashed ids; default: dinox_id_key beside --out")
    parser.add_argument("--list-rejects", action="store_true", help="print the path of every rejected file")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    root, raw, encoding = args.out.resolve(), args.raw.resolve(), ENCODINGS[args.format]
    key_file = args.key_file or default_key_file(root)
    if key_file.resolve().is_relative_to(root):
        parser.error(f"--key-file {key_file} lies inside --out, which may be shared: keep it elsewhere")
    if not raw.is_dir():
        raise FileNotFoundError(f"--raw {args.raw} is not a folder")
    if root.is_relative_to(raw) or raw.is_relative_to(root / args.dataset):
        raise ValueError(f"--out {args.out} and --raw {args.raw} lie inside each other: choose another --out")
    files = walk_files(raw)
    if not files:
        raise FileNotFoundError(f"--raw {args.raw} holds no file")

    scans = scan_tree([path for path, _ in files], args.workers)
    options = dict(min_slices=args.min_slices, allow_gaps=args.allow_gaps)
    common = dict(root=str(root), dataset=args.dataset, encoding=encoding, **options)
    members, jobs = plan_jobs(scans, key_file, args.keep_ids, **common)
    check_target(root, args.dataset, encoding, jobs)
    outcome = process_all(jobs, args.workers)
    rejects = list_rejects(scans, members, outcome)
    kept = sorted(series for series, (reason, *_) in outcome.items() if not reason)
    origin = {
        "encoding": encoding,
        "options": options | {"keep_ids": args.keep_ids},
        "tool": {"preprocess_dicom": VERSION}
        | {module.__name__.lower(): module.__version__ for module in (np, PIL, pydicom)},
        "raw": {"files": len(files), "bytes": sum(size for _, size in files)},
        "rejected": [entry for entry, _ in rejects],
    }
    counts = finish(root, args.dataset, kept, origin)["counts"]
    of = f"{len(kept)} of {len(members)} series, {counts['slices']} slices, {counts['patient']} patients"
    print(f"{args.dataset}: {of}")
    print(f"{manifests.index_path(args.out)}\n{manifests.manifest_path(args.out, args.dataset)}")
    print(summary(rejects))
    if args.list_rejects:
        print("\n".join(f"{entry['reason']:20} {shown(path, 4096)}" for entry, paths in rejects for path in paths))
    if not kept:
        print("nothing usable", file=sys.stderr)
        return 2
    return 1 if any(entry["reason"] != "not_dicom" for entry, _ in rejects) else 0


if __name__ == "__main__":
    run(main)

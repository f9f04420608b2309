"""DICOM folders -> slices, index and manifest that everything else reads.

    python tools/preprocess_dicom.py --raw data/raw --out data/processed --dataset lidc

In: any tree of files (other files than CT slices are recorded and left out). Out: per series one RGB PNG per inner
slice (--format rgb: slice z-1 lung, z soft tissue, z+1 bone window) or one int16 .npy in HU (--format hu16, for long
runs), `_index/index.csv` over all datasets and `_manifests/<dataset>.json` with every reject and its reason. The same
command again continues a killed run. Exit code 0 all fine, 1 something was rejected, 2 nothing usable.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import pydicom

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import file_sha256
from tools.lib import volumes
from tools.lib.cli import Parser, run
from tools.lib.dicom import (
    Reject,
    Scan,
    assemble,
    default_key_file,
    load_key,
    most_common,
    public_id,
    read_slices,
    scan_file,
)
from tools.lib.files import walk_files, write_json
from tools.lib.manifest import record_path
from tools.lib.progress import progress
from tools.lib.provenance import plain_name
from tools.lib.workers import parallel

VERSION = 1  # part of every series' input hash: raise it when the same files would give other pixels or rows
MAX_BYTES = 1 << 32  # of one file: 8,000 slices of 512 x 512


class Job(NamedTuple):
    """One series for one worker."""

    target: volumes.Target
    series: str  # as written
    files: tuple  # of (path, sop as written)
    kept_patients: tuple  # PatientIDs of its files that need no hash
    spelling: str  # of its PatientID, where the dataset has several that differ in case only; "" elsewhere
    uids_kept: bool
    key: bytes | None  # of the hashes; None where nothing is hashed
    min_slices: int
    allow_gaps: bool


# One series, in a worker.


def inputs_hash(job, digests):
    """Of the bytes of the files, in any order and under any name, and of all that shapes the output."""
    ids = [job.kept_patients, job.uids_kept, job.key and public_id("sop", "", job.key)]
    ids += [job.spelling] if job.spelling else []
    gaps = "runs" if job.allow_gaps else False
    recipe = [VERSION, job.target.encoding, job.min_slices, gaps, ids, sorted(digests)]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def finished(job):
    """{name: record} of the volumes that an earlier run made of these very files; {} if there is anything to do."""
    first = volumes.find_record(job.target, job.series) or volumes.find_record(job.target, f"{job.series}-1")
    if not first or first.get("runs", 1) not in range(1, 1000):
        return {}
    records = {name: volumes.find_record(job.target, name) for name in run_names(job.series, first.get("runs", 1))}
    if not all(records.values()) or not {sop for sop, *_ in first["rejected"]} <= {sop for _, sop in job.files}:
        return {}
    try:
        inputs = inputs_hash(job, [file_sha256(path) for path, _ in job.files])
    except OSError:
        return {}  # reading it again says why
    return records if all(record["inputs"] == inputs for record in records.values()) else {}


def run_names(series, runs):
    """A series of several regular runs is as many series; no UID has a dash."""
    return [series] if runs == 1 else [f"{series}-{k}" for k in range(1, runs + 1)]


def discard(job):
    """All that an earlier run made of this series."""
    records = record_path(job.target.root, job.target.dataset, job.series).parent.glob(f"{job.series}-*.json")
    for name in [job.series, *(path.stem for path in records)]:
        volumes.discard(job.target, name)


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


def public_ids(job, name, volume):
    uid_key = None if job.uids_kept else job.key
    patient_key = None if volume.patient in job.kept_patients else job.key
    patient = public_id("patient", job.spelling or volume.patient, patient_key)
    study = volume.study and public_id("study", volume.study, uid_key)  # a hash of nothing would look like an id
    return volumes.Ids(name, patient, study, [public_id("sop", sop, uid_key) for sop in volume.sops])


def process_series(job):
    """Write one series and its record -> (job, names it is kept under, reason why not, detail, rejected files)."""
    if records := finished(job):
        return job, list(records), "", "", next(iter(records.values()))["rejected"]
    slices, rejected, digests = read_series(job)
    discard(job)
    try:
        found = assemble(slices, job.min_slices, job.allow_gaps)
    except Reject as reject:
        why = (reject.reason, reject.detail) if slices else most_common(tuple(why) for _, *why in rejected)
        return job, [], *why, rejected
    names, inputs = run_names(job.series, len(found)), inputs_hash(job, digests)
    more = {"runs": len(found)} if len(found) > 1 else {}
    for name, volume in zip(names, found):
        volumes.write_series(job.target, public_ids(job, name, volume), volume, inputs, rejected, **more)
    return job, names, "", "", rejected


# All series.


def scan_files(files, kept=None):
    """[(path, bytes)] -> [Scan]; kept: a file where another shard may have left them, or else will find them."""
    key = hashlib.sha256(json.dumps(files).encode(errors="surrogatepass")).hexdigest()
    try:
        found = json.loads(Path(kept).read_text()) if kept else {}
        if found.get("key") == key:
            return [Scan(*scan) for scan in found["scans"]]
    except (OSError, ValueError, TypeError):
        pass  # nobody was here, or it is damaged: read the headers
    scans = [scan_file(path) for path, _ in files]
    if kept:
        write_json(kept, {"key": key, "scans": scans}, indent=None)
    return scans


def scan_tree(files, workers, shard=None, folder=None):
    """[(path, bytes)] -> [Scan], in the order of paths. Shards share what they read through `folder`: each begins with
    its own part, so that together they read each header about once."""
    size = 4096 if shard else 256
    chunks = [files[i : i + size] for i in range(0, len(files), size)]
    if shard:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        first = (shard[0] - 1) * len(chunks) // shard[1]
        order = [*range(first, len(chunks)), *range(first)]
        jobs = [functools.partial(scan_files, chunks[k], str(folder / f"{k:06}.json")) for k in order]
    else:
        jobs = [functools.partial(scan_files, chunk) for chunk in chunks]
    scans = []
    with progress(total=len(files), desc="headers", unit="file") as bar:
        for found in parallel(call, jobs, workers):
            scans += found
            bar.update(len(found))
    return sorted(scans)


def call(job):
    return job()


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
    """-> {series: (names it is kept under, reason or "", detail, rejected files)}"""
    outcome = {}
    with progress(total=sum(len(job.files) for job in jobs), desc="slices", unit="slice") as bar:
        for job, *result in parallel(process_series, jobs, workers):
            outcome[job.series] = result
            bar.update(len(job.files))
    return outcome


def list_rejects(scans, members, outcome):
    """-> [(entry of the manifest, raw paths)]"""
    found = [({"file": s.content, "reason": s.reason, "detail": s.detail}, [s.path]) for s in scans if not s.series]
    for series, files in members.items():
        _, reason, detail, rejected = outcome.get(series, ([], None, "", []))
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
    return found


def build_parser():
    parser = volumes.common_flags(Parser(__doc__), "folder of DICOM files, any nesting")
    parser.add_argument("--allow-gaps", action="store_true", help="of an irregular series keep the longest regular run "
                        "of each spacing; of several each becomes a series, UID-1, UID-2")  # fmt: skip
    parser.add_argument("--keep-ids", action="store_true", help="keep ids also without PatientIdentityRemoved YES")
    parser.add_argument("--key-file", type=Path, help="secret for hashed ids; default: dinox_id_key beside --out")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    target = volumes.Target(args.out.resolve(), args.dataset, volumes.ENCODINGS[args.format])
    key_file = args.key_file or default_key_file(target.root)
    if key_file.resolve().is_relative_to(target.root):
        parser.error(f"--key-file {key_file} lies inside --out, which may be shared: keep it elsewhere")
    shared = key_file.resolve().parent / f"dinox_scans_{args.dataset}"  # holds PatientIDs, so it lies outside --out
    if args.merge:
        code = volumes.merge(target, args.merge)
        shutil.rmtree(shared, ignore_errors=True)
        return code
    volumes.check_folders(args.raw, args.out, args.dataset)
    files = walk_files(args.raw.resolve())
    if not files:
        raise FileNotFoundError(f"--raw {args.raw} holds no file")

    scans = scan_tree(files, args.workers, args.shard, shared)
    options = dict(min_slices=args.min_slices, allow_gaps=args.allow_gaps)
    members, jobs = plan_jobs(scans, key_file, args.keep_ids, target=target, **options)
    volumes.prepare(target, [job.series for job in jobs], args.shard)
    facts = {
        "encoding": target.encoding,
        "options": options | {"keep_ids": args.keep_ids},
        "tool": {"preprocess_dicom": VERSION}
        | {module.__name__.lower(): module.__version__ for module in (np, PIL, pydicom)},
        "raw": {"files": len(files), "bytes": sum(size for _, size in files)},
        "series": len(members),
    }
    mine = [job for job in jobs if volumes.belongs(job.series, args.shard)]
    outcome = process_all(mine, args.workers)
    members = {series: files for series, files in members.items() if volumes.belongs(series, args.shard)}
    rejects = list_rejects([s for s in scans if volumes.belongs(s.content, args.shard)], members, outcome)
    kept = [name for names, *_ in outcome.values() for name in names]
    return volumes.close(target, args.shard, facts, kept, rejects, args.list_rejects)


if __name__ == "__main__":
    run(main)

"""Volumes that are not DICOM (LUNA16's .mhd, .nii, .nii.gz, .nrrd) -> the same slices, index and manifest.

    python tools/preprocess_volumes.py --raw data/luna16 --out data/processed --dataset luna16 --format hu16

A series is a file and is named as the file is (of LUNA16 that is the SeriesInstanceUID; names that stand several times
get their folders before them). Values must be HU; scaled or windowed ones are rejected with the reason, masks too. Axes
are turned as in DICOM. Whose scan a file is, only --patients can say: without it each file is a patient of its own.
Needs SimpleITK (pip install SimpleITK). The same command again continues. Exit code as of preprocess_dicom.py.
"""

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import file_sha256, read_csv, regular
from tools.lib import itk, volumes
from tools.lib.cli import Parser, run, shown
from tools.lib.dicom import Reject, public_id
from tools.lib.files import walk_files
from tools.lib.progress import progress
from tools.lib.workers import parallel

SERIES, PATIENT = ("series", "seriesuid", "seriesinstanceuid"), ("patient", "patientid", "subjectid")
VERSION = 1  # part of every series' input hash: raise it when the same files would give other pixels or rows


class Job(NamedTuple):
    """One file for one worker."""

    target: volumes.Target
    series: str  # as written
    path: str
    header: itk.Header | None
    patient: str  # as written; "" if nobody says whose scan it is
    min_slices: int
    reason: str  # why its header is refused, or ""
    detail: str


def inputs_hash(job):
    """Of all that the pixels and the rows depend on; refuses what is known to be unusable."""
    if job.reason:
        raise Reject(job.reason, job.detail)
    if not job.patient:
        raise Reject("no_patient_id", "not in --patients")
    digests = [file_sha256(path) for path in dict.fromkeys((job.header.path, job.header.data))]
    recipe = [VERSION, job.target.encoding, job.min_slices, job.patient, digests]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def attempt(read, *inputs):
    """-> (what is read or None, reason why not or "", detail)"""
    try:
        return read(*inputs), "", ""
    except Reject as reject:
        return None, reject.reason, reject.detail
    except OSError:
        return None, "unreadable", ""


def process_series(job):
    """Write one series and its record -> (job, reason or "" if kept, detail)."""
    inputs, reason, detail = attempt(inputs_hash, job)
    record = volumes.find_record(job.target, job.series)
    if inputs and record and record["inputs"] == inputs:
        return job, "", ""
    volumes.discard(job.target, job.series)
    if inputs:
        volume, reason, detail = attempt(itk.read_volume, job.header, job.patient, job.min_slices)
    if not reason:
        ids = volumes.Ids(job.series, job.patient, "", volume.sops)
        volumes.write_series(job.target, ids, volume, inputs, [])
    return job, reason, detail


def series_names(found, raw):
    """{path: name of its series}: the file's; with its folders where several files share it, masks of 8 bits apart."""
    sharing, names = defaultdict(list), {}
    for path in found:
        sharing[Path(path).name[: -len(itk.ending(path))]].append(path)
    for stem, paths in sharing.items():
        usable = [path for path in paths if found[path][0]] or paths
        for path in paths:
            below = Path(path).relative_to(raw).as_posix()[: -len(itk.ending(path))].replace("/", "_")
            names[path] = public_id("patient", stem if [path] == usable else below)
    if twice := [name for name, n in Counter(names.values()).items() if n > 1]:
        raise ValueError(f"--raw {raw}: several files would be series {shown(twice[0])}; rename all but one of them")
    return names


def read_patients(path):
    """{series: patient} of a CSV file with these columns, or The Cancer Imaging Archive's Series UID and Subject ID."""
    pieces = read_csv(path)
    header = next(pieces)
    plain, patients = [re.sub("[^a-z]", "", name.lower()) for name in header], {}
    at = [next((plain.index(name) for name in names if name in plain), None) for names in (SERIES, PATIENT)]
    if None in at:
        raise ValueError(f"--patients {path}: columns {shown(','.join(header))}, expected series,patient")
    for row in (row for piece in pieces for row in piece if row):
        if len(row) != len(header) or not all(row[k].strip() for k in at):
            raise ValueError(f"--patients {path}: a row has not both cells: {shown(','.join(row))}")
        series, patient = (row[k].strip() for k in at)
        if patients.setdefault(series, patient) != patient:
            raise ValueError(f"--patients {path}: series {shown(series)} has two patients; correct the table")
    return patients


def plan_jobs(files, raw, patients, target, min_slices):
    """[paths] -> (jobs, paths of other files)."""
    candidates = [path for path in files if itk.ending(path)]
    found = {path: attempt(itk.read_header, path) for path in progress(candidates, "headers", unit="file")}
    pixels = {str(header.data) for header, *_ in found.values() if header}
    names, jobs = series_names(found, raw), []
    for path, (header, reason, detail) in found.items():
        patient = names[path] if patients is None else patients.get(names[path], "")
        patient = patient and public_id("patient", patient)
        jobs.append(Job(target, names[path], path, header, patient, min_slices, reason, detail))
    return jobs, [path for path in files if path not in found and path not in pixels]


def content(path):
    """Names a file that belongs to no series: hash of its beginning, since its path may hold a name."""
    try:
        with open(regular(path), "rb") as f:
            return hashlib.sha256(f.read(1 << 14)).hexdigest()[:16]
    except OSError:
        return ""


def build_parser():
    parser = volumes.common_flags(Parser(__doc__), "folder of .mhd/.raw, .nii, .nii.gz or .nrrd files, any nesting")
    parser.add_argument("--patients", type=Path, help="CSV series,patient: whose scan each file is; a file that is not "
                        "in it is rejected")  # fmt: skip
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    target = volumes.Target(args.out.resolve(), args.dataset, volumes.ENCODINGS[args.format])
    if args.merge:
        return volumes.merge(target, args.merge)
    volumes.check_folders(args.raw, args.out, args.dataset)
    simple = itk.load_itk()
    raw, patients = args.raw.resolve(), read_patients(args.patients) if args.patients else None
    files = walk_files(raw)
    jobs, others = plan_jobs([path for path, _ in files], raw, patients, target, args.min_slices)
    if not jobs:
        raise FileNotFoundError(f"--raw {args.raw} holds no {' '.join(itk.ENDINGS)}")
    if patients is None:
        print("no --patients: each file counts as a patient of its own; two scans of one patient would cross a split")
    volumes.prepare(target, [job.series for job in jobs], args.shard)
    mine = [job for job in jobs if volumes.belongs(job.series, args.shard)]
    results = list(progress(parallel(process_series, mine, args.workers), "volumes", len(mine), unit="volume"))
    rejects = [({"file": name, "reason": "not_volume", "detail": ""}, [path])
               for path in others if volumes.belongs(name := content(path), args.shard)]  # fmt: skip
    rejects += [({"series": job.series, "reason": reason, "detail": detail, "files": 1, "file_reasons": {}}, [job.path])
                for job, reason, detail in results if reason]  # fmt: skip
    facts = {
        "encoding": target.encoding,
        "options": {"min_slices": args.min_slices, "patients": args.patients and file_sha256(args.patients)},
        "tool": dict(
            preprocess_volumes=VERSION, numpy=np.__version__, pil=PIL.__version__, simpleitk=simple.__version__
        ),
        "raw": {"files": len(files), "bytes": sum(size for _, size in files)},
        "series": len(jobs),
    }
    kept = [job.series for job, reason, _ in results if not reason]
    return volumes.close(target, args.shard, facts, kept, rejects, args.list_rejects)


if __name__ == "__main__":
    run(main)

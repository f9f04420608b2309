"""What a processed CT folder says about itself: records of series, manifests of datasets, the index made of both."""

import csv
import hashlib
import statistics
from pathlib import Path

from checkpoint import atomic_write
from data import INDEX_COLUMNS, file_sha256
from tools.lib.files import VERSION, created_utc, csv_text, read_json, write_json

ORIGIN = ("encoding", "options", "tool", "raw", "handled", "rejected")  # known to preprocessing alone


def manifest_path(root, dataset):
    return Path(root) / "_manifests" / f"{dataset}.json"


def record_path(root, dataset, series):
    """The record of one finished series: {version, inputs, rows of the index, files: {path: [bytes, sha256]}, ...}"""
    return Path(root) / "_manifests" / dataset / f"{series}.json"


def index_path(root):
    return Path(root) / "_index" / "index.csv"


def read_manifest(root, dataset):
    manifest = read_json(manifest_path(root, dataset))
    if manifest is None:
        raise FileNotFoundError(f"{manifest_path(root, dataset)}: no manifest; make it with tools/preprocess_dicom.py")
    return manifest


def read_record(root, dataset, series):
    record = read_json(record_path(root, dataset, series))
    if record is None:
        raise FileNotFoundError(f"{record_path(root, dataset, series)}: record missing; preprocess {dataset} again")
    return record


def write_index(root, series_of):
    """series_of {dataset: series names} -> index.csv out of the records of these series, by dataset, series and z."""

    def write(f):
        f.write(csv_text([INDEX_COLUMNS]).encode())
        for dataset in sorted(series_of):
            for series in sorted(series_of[dataset]):
                f.write(csv_text(read_record(root, dataset, series)["rows"]).encode())

    index_path(root).parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(index_path(root), write)


def read_rows(root, dataset):
    """Rows of one dataset in index.csv, one dict after the other."""
    path = index_path(root)
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != tuple(INDEX_COLUMNS):
            raise ValueError(f"{path}: columns are {reader.fieldnames}, expected {INDEX_COLUMNS}; preprocess again")
        yield from (row for row in reader if row["dataset"] == dataset)


def describe_index(root, dataset):
    """What the index says about a dataset: hashes, counts, spacing statistics (every series counts once)."""
    digest, slices, spacing_of = hashlib.sha256(), 0, {}
    found = {name: set() for name in ("patient", "study", "series")}
    for row in read_rows(root, dataset):
        digest.update((",".join(map(str, row.values())) + "\n").encode())
        slices += 1
        for name, values in found.items():
            values.add(row[name])
        spacing_of[row["series"]] = {axis: row[f"spacing_{axis}"] for axis in "zyx"}
    spacing = {}
    for axis in "zyx" if spacing_of else "":
        values = [float(of[axis]) for of in spacing_of.values()]
        numbers = (min(values), statistics.median(values), statistics.fmean(values), max(values))
        spacing[axis] = dict(zip(("min", "median", "mean", "max"), (round(v, 6) for v in numbers)))
    return {
        "index_sha256": file_sha256(index_path(root)),
        "rows_sha256": digest.hexdigest(),
        "counts": {name: len(values) for name, values in found.items()} | {"slices": slices},
        "spacing_mm": spacing,
    }


def describe_series(files):
    """{path: [bytes, sha256]} of one series -> its line in the manifest."""
    lines = "".join(f"{path} {size} {digest}\n" for path, (size, digest) in sorted(files.items()))
    total = sum(size for size, _ in files.values())
    return {"files": len(files), "bytes": total, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def write_manifest(root, dataset, origin, files):
    """origin: the ORIGIN fields; files {series: {path: [bytes, sha256]}} -> the manifest, also written."""
    series = {name: describe_series(files[name]) for name in sorted(files)}
    manifest = {
        "version": VERSION,
        "created_utc": created_utc(),
        "dataset": dataset,
        **{field: origin[field] for field in ORIGIN},
        **describe_index(root, dataset),
        "processed": {field: sum(s[field] for s in series.values()) for field in ("files", "bytes")},
        "series": series,
    }
    write_json(manifest_path(root, dataset), manifest, indent=1)
    return manifest


def refresh_index_hash(root):
    """After the index changed: every other manifest names its new hash; the rows of its dataset are as they were."""
    digest = file_sha256(index_path(root))
    for path in sorted((Path(root) / "_manifests").glob("*.json")):
        manifest = read_json(path)
        if manifest and manifest["index_sha256"] != digest:
            write_json(path, manifest | {"index_sha256": digest}, indent=1)

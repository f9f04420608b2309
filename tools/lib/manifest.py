"""What a processed CT folder says about itself: records of series, manifests of datasets, the index made of both."""

import hashlib
import math
import statistics
from pathlib import Path

from checkpoint import atomic_write
from data import INDEX_COLUMNS, file_sha256, read_csv
from tools.lib.cli import shown
from tools.lib.files import VERSION, created_utc, csv_text, is_a, read_json_file, to_number, write_json, wrong_field

SERIES = {"files": int, "bytes": int, "sha256": str}  # fields of one series in a manifest
MANIFEST = {"encoding": str, "index_sha256": str, "series": dict, "rejected": list, "handled": dict}
MANIFEST |= {"options": dict, "tool": dict, "raw": dict}
RECORD = {"inputs": str, "rejected": list, "handled": dict, "files": dict, "rows": list}
ENTRY = {"rejected": [str] * 3, "files": [int, str], "rows": [(str, int, float)] * len(INDEX_COLUMNS)}  # in a record
ORIGIN = ("encoding", "options", "tool", "raw", "handled", "rejected")  # known to preprocessing alone


def manifest_path(root, dataset):
    return Path(root) / "_manifests" / f"{dataset}.json"


def record_path(root, dataset, series):
    """The record of one finished series: {version, inputs, rows of the index, files: {path: [bytes, sha256]}, ...}"""
    return Path(root) / "_manifests" / dataset / f"{series}.json"


def index_path(root):
    return Path(root) / "_index" / "index.csv"


def read_manifest(root, dataset):
    path, again = manifest_path(root, dataset), "make it again with tools/preprocess_dicom.py"
    manifest = read_json_file(path, MANIFEST, again, VERSION)
    for name, line in manifest["series"].items():
        if wrong := "is no object" if not isinstance(line, dict) else wrong_field(line, SERIES):
            raise ValueError(f"{path}: series {shown(name)} {wrong}; {again}")
    return manifest


def read_record(root, dataset, series):
    path, again = record_path(root, dataset, series), f"preprocess {dataset} again"
    record = read_json_file(path, RECORD, again, VERSION)
    for field, kinds in ENTRY.items():
        for entry in record[field].values() if field == "files" else record[field]:
            if not (isinstance(entry, list) and len(entry) == len(kinds) and all(map(is_a, entry, kinds))):
                raise ValueError(f"{path} field {field!r} has an entry of the wrong form; {again}")
    return record


def find(reader, *args):
    """What read_manifest or read_record gives; None if there is none, or a damaged one that will be made again."""
    try:
        return reader(*args)
    except (ValueError, OSError):
        return None


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
    pieces = read_csv(path)
    header = next(pieces)
    if header != INDEX_COLUMNS:
        wanted = ",".join(INDEX_COLUMNS)
        raise ValueError(f"{path}: columns are {shown(','.join(header))}, expected {wanted}; preprocess again")
    for number, row in enumerate((row for piece in pieces for row in piece if row), 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} cells of {len(header)}; preprocess again")
        row = dict(zip(header, row))
        if row["dataset"] == dataset:
            yield row


def millimetres(root, row, name):
    value = to_number(row[name])
    if not math.isfinite(value):
        raise ValueError(f"{index_path(root)}: {name} of {shown(row['path'])} is {shown(row[name])}; preprocess again")
    return value


def describe_index(root, dataset):
    """What the index says about a dataset: hashes, counts, spacing statistics (every series counts once)."""
    digest, slices, spacing_of = hashlib.sha256(), 0, {}
    found = {name: set() for name in ("patient", "study", "series")}
    for row in read_rows(root, dataset):
        digest.update((",".join(row.values()) + "\n").encode())
        slices += 1
        for name, values in found.items():
            values.add(row[name])
        spacing_of[row["series"]] = [millimetres(root, row, f"spacing_{axis}") for axis in "zyx"]
    spacing = {}
    for axis, values in zip("zyx", zip(*spacing_of.values())):
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
    write_json(manifest_path(root, dataset), manifest)
    return manifest


def refresh_index_hash(root):
    """After the index changed: every other manifest names its new hash; the rows of its dataset are as they were."""
    digest = file_sha256(index_path(root))
    for path in sorted((Path(root) / "_manifests").glob("*.json")):
        manifest = read_manifest(root, path.stem)
        if manifest["index_sha256"] != digest:
            write_json(path, manifest | {"index_sha256": digest})

"""The manifest of a processed dataset: what came in, what was kept, what was rejected and why, every hash.

    python tools/write_manifest.py --data data/processed --dataset lidc --verify

With --verify changes nothing, names every missing, extra or changed file and exits 1 if there is one. Without it
recomputes `_manifests/lidc.json` from the files on disk and `_index/index.csv`; what only preprocessing knows (raw
counts, rejects) stays. preprocess_dicom.py writes index, records and manifest through the functions here.
"""

import csv
import hashlib
import io
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import atomic_write
from data import INDEX_COLUMNS, file_sha256
from tools.cli import Parser, positive, run

VERSION = 1
ORIGIN = ("encoding", "options", "tool", "raw", "handled", "rejected")  # known to preprocessing alone


def manifest_path(root, dataset):
    return Path(root) / "_manifests" / f"{dataset}.json"


def record_path(root, dataset, series):
    """The record of one finished series: {version, inputs, rows of the index, files: {path: [bytes, sha256]}, ...}"""
    return Path(root) / "_manifests" / dataset / f"{series}.json"


def index_path(root):
    return Path(root) / "_index" / "index.csv"


def write_json(path, value, indent=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, lambda f: f.write(json.dumps(value, indent=indent, sort_keys=True).encode() + b"\n"))


def read_json(path):
    """A manifest or record; None where there is none that we can read."""
    try:
        value = json.loads(Path(path).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) and value.get("version") == VERSION else None


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


def walk_files(root):
    """Everything below `root` that is no folder, in sorted order: [(path, bytes)]. Linked folders are entered once.

    A folder that cannot be listed and a broken link are in it too, with 0 bytes: whoever opens them learns why.
    """
    found, seen, folders = [], set(), [os.fspath(root)]
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            found.append((folder, 0))
            continue
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.path)
            else:
                found.append((entry.path, entry.stat().st_size if entry.is_file() else 0))
    return sorted(found)


def csv_text(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


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


def files_on_disk(root, dataset):
    """-> {series: {path relative to root: bytes}}"""
    found = {}
    for path, size in walk_files(Path(root) / dataset) if (Path(root) / dataset).is_dir() else []:
        relative = Path(path).relative_to(root)
        found.setdefault(relative.parts[1].removesuffix(".npy"), {})[relative.as_posix()] = size
    return found


def describe_series(files):
    """{path: [bytes, sha256]} of one series -> its line in the manifest."""
    lines = "".join(f"{path} {size} {digest}\n" for path, (size, digest) in sorted(files.items()))
    total = sum(size for size, _ in files.values())
    return {"files": len(files), "bytes": total, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def hash_files(root, sizes, workers):
    """{series: {path: bytes}} -> {series: {path: [bytes, sha256]}}, hashing every file, with a progress bar."""
    paths = [(series, path) for series in sorted(sizes) for path in sorted(sizes[series])]
    hashed = {series: {} for series in sizes}
    with ThreadPoolExecutor(workers) as pool:  # hashlib works outside the interpreter lock
        digests = pool.map(lambda item: file_sha256(Path(root) / item[1]), paths)
        for (series, path), digest in tqdm(zip(paths, digests), "hash", len(paths), unit="file", disable=None):
            hashed[series][path] = [sizes[series][path], digest]
    return hashed


def created_utc():
    """Now, or SOURCE_DATE_EPOCH (reproducible-builds.org) if it is set; comparisons leave it out."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(int(seconds), timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


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


def changed_files(root, dataset, manifest, workers):
    """One line per file that is missing, extra or changed."""
    now = hash_files(root, files_on_disk(root, dataset), workers)
    problems = []
    for series in sorted(set(now) | set(manifest["series"])):
        files, line = now.get(series, {}), manifest["series"].get(series)
        if line == describe_series(files):
            continue
        record = read_json(record_path(root, dataset, series)) if line else {"files": {}}
        if record is None or line and describe_series(record["files"]) != line:
            problems.append(f"changed: {dataset}/{series} (its record is missing or changed too, so no file is named)")
            continue
        was = record["files"]
        problems += [f"missing: {path}" for path in sorted(set(was) - set(files))]
        problems += [f"extra: {path}" for path in sorted(set(files) - set(was))]
        problems += [f"changed: {path}" for path in sorted(set(files) & set(was)) if files[path] != was[path]]
    return problems


def verify(root, dataset, workers=4, raw=None):
    """-> one line per difference between the manifest and what is on disk; [] when all is as recorded."""
    manifest = read_manifest(root, dataset)
    problems = changed_files(root, dataset, manifest, workers)
    found = {"processed": {f: sum(s[f] for s in manifest["series"].values()) for f in ("files", "bytes")}}
    try:
        found |= describe_index(root, dataset)
    except FileNotFoundError:
        problems.append("missing: _index/index.csv")
    except ValueError as error:  # other columns, or text where a number was
        problems.append(f"changed: _index/index.csv: {error}")
    if raw is not None:
        found["raw"] = count_files(raw)
    for field, value in found.items():
        if value != manifest.get(field):
            problems.append(f"changed: {field} is {value}, the manifest says {manifest.get(field)}")
    return problems


def count_files(folder):
    sizes = [size for _, size in walk_files(folder)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def recompute(root, dataset, workers, raw=None):
    """The manifest anew from what is on disk. A series that the index has and the disk has not is an error."""
    origin = read_manifest(root, dataset)
    if raw is not None:
        origin["raw"] = count_files(raw)
    indexed, sizes = {row["series"] for row in read_rows(root, dataset)}, files_on_disk(root, dataset)
    if gone := sorted(indexed - set(sizes)):
        raise ValueError(f"{len(gone)} series of {dataset} in the index are gone, first {gone[0]}; preprocess it again")
    files = hash_files(root, {series: sizes[series] for series in indexed}, workers)
    return write_manifest(root, dataset, origin, files)


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="processed root")
    parser.add_argument("--dataset", help="one dataset; without it all that have a manifest")
    parser.add_argument("--raw", type=Path, help="count its files and bytes again too")
    parser.add_argument("--verify", action="store_true", help="change nothing; exit 1 when something changed")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="files hashed at once")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    for folder in filter(None, (args.data, args.raw)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
    datasets = [args.dataset] if args.dataset else sorted(p.stem for p in (args.data / "_manifests").glob("*.json"))
    if not datasets:
        raise FileNotFoundError(f"no manifest in {args.data / '_manifests'}; make one with tools/preprocess_dicom.py")
    changed = 0
    for dataset in datasets:
        if args.verify:
            problems = verify(args.data, dataset, args.workers, args.raw)
            print("\n".join([f"{dataset}: {len(problems)} changes", *problems]))
            changed += len(problems)
        else:
            manifest = recompute(args.data, dataset, args.workers, args.raw)
            print(manifest_path(args.data, dataset), manifest["counts"])
    return 1 if changed else 0


if __name__ == "__main__":
    run(main)

"""The manifest of a processed dataset: what came in, what was kept, what was rejected and why, every hash.

    python tools/write_manifest.py --data data/processed --dataset lidc --verify

With --verify changes nothing, names every missing, extra or changed file and exits 1 if there is one. Without it
recomputes `_manifests/lidc.json` from the files on disk and `_index/index.csv`; what only preprocessing knows (raw
counts, rejects) stays.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import file_sha256
from tools.lib import manifest as manifests
from tools.lib.cli import Parser, positive, run, shown
from tools.lib.files import walk_files
from tools.lib.progress import progress


def files_on_disk(root, dataset):
    """-> {series: {path relative to root: bytes}}"""
    found = {}
    for path, size in walk_files(Path(root) / dataset) if (Path(root) / dataset).is_dir() else []:
        relative = Path(path).relative_to(root)
        found.setdefault(relative.parts[1].removesuffix(".npy"), {})[relative.as_posix()] = size
    return found


def hash_file(path):
    """sha256, or "" of what is no regular file (a pipe would be waited for) or cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return ""


def hash_files(root, sizes, workers):
    """{series: {path: bytes}} -> {series: {path: [bytes, sha256]}}, hashing every file, with a progress bar."""
    paths = [(series, path) for series in sorted(sizes) for path in sorted(sizes[series])]
    hashed = {series: {} for series in sizes}
    with ThreadPoolExecutor(workers) as pool:  # hashlib works outside the interpreter lock
        digests = pool.map(lambda item: hash_file(Path(root) / item[1]), paths)
        for (series, path), digest in progress(zip(paths, digests), "hash", len(paths), unit="file"):
            hashed[series][path] = [sizes[series][path], digest]
    return hashed


def changed_files(root, dataset, manifest, workers):
    """One line per file that is missing, extra or changed."""
    now = hash_files(root, files_on_disk(root, dataset), workers)
    problems = []
    for series in sorted(set(now) | set(manifest["series"])):
        files, line = now.get(series, {}), manifest["series"].get(series)
        if line == manifests.describe_series(files):
            continue
        record = manifests.find(manifests.read_record, root, dataset, series) if line else {"files": {}}
        if record is None or line and manifests.describe_series(record["files"]) != line:
            problems.append(f"changed: {dataset}/{series} (its record is missing or changed too, so no file is named)")
            continue
        was = record["files"]
        problems += [f"missing: {path}" for path in sorted(set(was) - set(files))]
        problems += [f"extra: {path}" for path in sorted(set(files) - set(was))]
        problems += [f"changed: {path}" for path in sorted(set(files) & set(was)) if files[path] != was[path]]
    return problems


def verify(root, dataset, workers=4, raw=None):
    """-> one line per difference between the manifest and what is on disk; [] when all is as recorded."""
    manifest = manifests.read_manifest(root, dataset)
    problems = changed_files(root, dataset, manifest, workers)
    found = {"processed": {f: sum(s[f] for s in manifest["series"].values()) for f in ("files", "bytes")}}
    try:
        found |= manifests.describe_index(root, dataset)
    except FileNotFoundError:
        problems.append("missing: _index/index.csv")
    except ValueError as error:  # other columns, or text where a number was
        problems.append(f"changed: _index/index.csv: {error}")
    if raw is not None:
        found["raw"] = count_files(raw)
    for field, value in found.items():
        if value != manifest.get(field):
            said = shown(manifest.get(field), 200)
            problems.append(f"changed: {field} is {value}, the manifest says {said}")
    return problems


def count_files(folder):
    sizes = [size for _, size in walk_files(folder)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def recompute(root, dataset, workers, raw=None):
    """The manifest anew from what is on disk. A series that the index has and the disk has not is an error."""
    origin = manifests.read_manifest(root, dataset)
    if raw is not None:
        origin["raw"] = count_files(raw)
    indexed, sizes = {row["series"] for row in manifests.read_rows(root, dataset)}, files_on_disk(root, dataset)
    if gone := sorted(indexed - set(sizes)):
        raise ValueError(f"{len(gone)} series of {dataset} in the index are gone, first {gone[0]}; preprocess it again")
    files = hash_files(root, {series: sizes[series] for series in indexed}, workers)
    if bad := [path for of in files.values() for path, (_, digest) in sorted(of.items()) if not digest]:
        raise ValueError(f"{root / shown(bad[0])} is no regular file, or cannot be read; remove it")
    return manifests.write_manifest(root, dataset, origin, files)


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
            print("\n".join([f"{dataset}: {len(problems)} changes", *(shown(line, 1000) for line in problems)]))
            changed += len(problems)
        else:
            manifest = recompute(args.data, dataset, args.workers, args.raw)
            print(manifests.manifest_path(args.data, dataset), manifest["counts"])
    return 1 if changed else 0


if __name__ == "__main__":
    run(main)

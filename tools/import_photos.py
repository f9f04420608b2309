"""Bring labelled photographs into a data folder: OUT/NAME/... (links, or --copy), and OUT/labels.csv beside them.

SOURCE is a labels.json ([{filename, label, ...}]), a CSV (path,label without a header, or with one), a Hugging Face
folder (metadata.csv or .jsonl, or .parquet files), a folder that holds one of these, or one folder per class. Labels
become names by one table; what else a row says is kept as facts. Pictures that are missing, unreadable, too small or
too long are listed with reasons in OUT/_manifests/photos.json. OUT/_index/photos.csv has a row per picture. The same
command again replaces what it wrote; another --name adds a source.

    python tools/import_photos.py --from downloads/roadwork --out data/roadwork --name natix --parts train,test
"""

import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from datetime import datetime
from itertools import chain
from multiprocessing import Pool
from pathlib import Path, PurePosixPath

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import atomic_write, write_text
from data import BROKEN, PHOTO_ENDINGS, open_photo, read_csv, to_rgb, turn_of
from tools.lib.cli import Parser, positive, run, shown
from tools.lib.files import VERSION, created_utc, csv_text, parse, read_json_file, walk_files, write_json

# class -> what sources call it; case, spaces and hyphens do not matter. 19, 20, 55: labels of Mapillary Vistas
ALIASES = {"no_roadwork": "no_roadwork class_0 0", "roadwork": "roadwork class_1 1 19 20 55"}
CLASS_OF = {alias: name for name, aliases in ALIASES.items() for alias in aliases.split()}
PATHS, LABELS = "path filename file_name image file relative_path".split(), "label class target".split()
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test", "dev": "val", "val": "val",
         "valid": "val", "validation": "val"}  # fmt: skip
INDEX = "path bytes height width upright reason".split()  # height, width as seen; upright 0: EXIF turns the pixels
EXIF = ("lat", "lon", "time")


# Rows of a source: (where it stands, {path, label, facts...}, its file), all texts.


def text_of(value):
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def read_table(path):
    """Rows of a .json, .jsonl or .csv file; a CSV whose first line names no column of paths has no header."""
    if path.suffix == ".csv":
        pieces = read_csv(path)
        header, lines = next(pieces), (line for piece in pieces for line in piece if line)
        if header and not {name.strip().casefold() for name in header} & set(PATHS):
            header, lines = ["path", "label"], chain([header], lines)
        for number, line in enumerate(lines, 1):
            if len(line) != len(header):
                raise ValueError(f"{path}, row {number}: {len(line)} cells, expected {','.join(header)}; correct it")
            yield f"{path.name}, row {number}", dict(zip(map(str.strip, header), line))
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = [parse(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else parse(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON ({shown(error)}); write it anew") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected objects with filename and label; write it anew")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}, entry {number}", {key: text_of(value) for key, value in row.items()}


def take(row, names, where):
    """Remove and return the value of the first of these columns that a row has, whatever its case."""
    own = {key.casefold(): key for key in row}
    if not (found := next((own[name] for name in names if name in own), None)):
        raise ValueError(f"{where}: no column {', '.join(names)}, but {', '.join(map(shown, row))}; name one so")
    return row.pop(found)


def read_tables(root, tables):
    for table in tables:
        for where, row in read_table(table):
            path = Path(table.parent.relative_to(root), take(row, PATHS, where)).as_posix()
            yield where, {"path": path, "label": take(row, LABELS, where), **row}, root / path


def read_class_folders(root):
    """The first folder that is no part names the class: train/roadwork/1.jpg, roadwork/1.jpg, 1/a/b.jpg."""
    for file, _ in walk_files(root):
        *folders, name = parts = Path(file).relative_to(root).parts
        classes = [folder for folder in folders if folder.casefold() not in PARTS]
        hidden = any(part[0] in "._" for part in parts)
        if not hidden and (classes or name.lower().endswith(PHOTO_ENDINGS)):
            path = "/".join(parts)
            yield path, {"path": path, "label": classes[0] if classes else ""}, Path(file)


def open_shard(shard):
    """(file, its image column, its label column, names of the classes as Hugging Face stores them or None)"""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{shard} needs pyarrow to be read: pip install pyarrow") from None
    file = pyarrow.parquet.ParquetFile(shard)
    columns = {name.casefold(): name for name in file.schema_arrow.names}
    image, label = (next((columns[n] for n in names if n in columns), None) for names in (["image", "img"], LABELS))
    if image is None or label is None:
        raise ValueError(f"{shard}: no image and label among the columns {', '.join(columns)}")
    hints = parse((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}").decode())
    return file, image, label, hints.get("info", {}).get("features", {}).get(label, {}).get("names")


def read_parquet(root, shards):
    """Without the pictures, which shard_pictures reads when they are written; train-00000-of-00002 is part train."""
    for shard in shards:
        file, image, label, names = open_shard(shard)
        columns = [name for name in file.schema_arrow.names if name != image] + [f"{image}.path"]
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        part = PARTS.get(re.split(r"[-_.]", shard.name)[0].casefold(), "")
        for number, row in enumerate(rows):
            ending = PurePosixPath((row.pop(image) or {}).get("path") or "x.jpg").suffix
            path = f"{shard.relative_to(root).with_suffix('').as_posix()}/{number:06d}{ending}"
            name, facts = row.pop(label), {key: text_of(value) for key, value in row.items()}
            known = names is not None and isinstance(name, int)
            fixed = {"path": path, "label": names[name] if known else text_of(name)}
            yield (
                f"{shard.name}, row {number + 1}",
                {**({"part": part} if part else {}), **facts, **fixed},
                (shard, number),
            )


def shard_pictures(wanted):
    """Bytes of the pictures of (shard, number), which come in the order of the shards."""
    wanted = set(wanted)
    for shard in dict.fromkeys(sorted(shard for shard, _ in wanted)):
        file, image, *_ = open_shard(shard)
        rows = (row for batch in file.iter_batches(64, columns=[f"{image}.bytes"]) for row in batch.to_pylist())
        yield from ((row[image] or {}).get("bytes") or b"" for n, row in enumerate(rows) if (shard, n) in wanted)


def read_source(source):
    """(what it is, its rows)"""
    if not source.exists():
        raise FileNotFoundError(f"--from {source} does not exist")
    root, files = (source, []) if source.is_dir() else (source.parent, [source])
    for pattern in ("labels.json", "metadata.csv", "metadata.jsonl", "*.parquet", "labels.csv"):
        files = files or sorted([*root.glob(pattern), *root.glob(f"*/{pattern}")])
    kind = files[0].suffix if files else None
    if kind not in (".json", ".jsonl", ".csv", ".parquet", None):
        raise ValueError(f"--from {source}: expected a folder, or a .json, .jsonl, .csv or .parquet file")
    if kind == ".parquet":
        return kind, list(read_parquet(root, files))
    return files[0].name if files else "class folders", list(
        read_tables(root, files) if files else read_class_folders(root)
    )


# What is done with them.


def choose_parts(rows, parts):
    """The rows of the wanted parts (a column part or split, else a folder); several are never pooled unasked."""
    for _, row, _ in rows:
        folders = [PARTS[f.casefold()] for f in row["path"].split("/")[:-1] if f.casefold() in PARTS]
        columns = [row.pop(key).strip() for key in list(row) if key.casefold() in ("part", "split")]
        row["part"] = next((PARTS.get(text.casefold(), text) for text in columns + folders if text), "")
    found = Counter(row["part"] for _, row, _ in rows)
    counts = ", ".join(f"{shown(part) or '(none)'} {n}" for part, n in sorted(found.items()))
    if parts is None and len(found) > 1:
        every = ",".join(sorted(filter(None, found)))
        raise ValueError(f"the source has parts ({counts}): say which to take; --parts {every} takes all and notes "
                         "them in the column part")  # fmt: skip
    if unknown := set(parts or ()) - set(found):
        raise ValueError(f"--parts {','.join(sorted(unknown))}: the source has {counts or 'no rows'}")
    return [entry for entry in rows if parts is None or entry[1]["part"] in parts]


def name_classes(rows, as_is):
    unknown = Counter()
    for _, row, _ in rows:
        label = row["label"].strip()
        row["label"] = label if as_is else CLASS_OF.get(re.sub(r"[\s-]+", "_", label.casefold()), "")
        unknown[label] += not row["label"]
    if unknown := +unknown:
        listed = ", ".join(f"{shown(label, 40)!r} ({n})" for label, n in unknown.most_common(6))
        first = next(where for where, row, _ in rows if not row["label"])
        raise ValueError(f"unknown labels {listed}, first in {shown(first)}; known are {', '.join(CLASS_OF)}; correct "
                         "them, or keep labels as they are: --classes as-is")  # fmt: skip


def place_rows(rows, name):
    """Rows with their path below OUT, and [(path, reason)] of those that name a picture for the second time."""
    kept, twice = {}, []
    for where, row, file in rows:
        path = PurePosixPath(row["path"])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: {shown(path)} leads out of the source; correct it")
        path = "/".join([name, *(part.lstrip("._") or "x" for part in path.parts)])  # names like _x are not read
        if path not in kept:
            kept[path] = where, {**row, "path": path}, file
        elif kept[path][1]["label"] == row["label"]:
            twice.append((path, f"named twice: {where}, and {kept[path][0]}"))
        else:
            labels = f"{kept[path][1]['label']} in {kept[path][0]}, {row['label']} in {where}"
            raise ValueError(f"{shown(path)} has two labels: {labels}; correct one")
    return list(kept.values()), twice


def put(file, target, copy):
    """Bytes or a file -> OUT: a hard link, else a symbolic link, else a copy; what is right already stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(file, bytes):
        return atomic_write(target, lambda f: f.write(file))
    known, there = file.stat(), target.stat() if target.exists() else None
    linked = there and os.path.samestat(known, there)
    copied = there and not linked and (there.st_size, there.st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    if copied if copy else linked:
        return target
    new = target.with_name(f".{os.getpid()}.new")
    for way in [shutil.copy2] if copy else [os.link, os.symlink, shutil.copy2]:
        new.unlink(missing_ok=True)
        try:
            way(file.resolve(), new)
            break
        except OSError:
            if way is shutil.copy2:
                raise
    return os.replace(new, target)


def exif_facts(picture):
    """lat, lon and time, as far as they are there and make sense; nothing else of EXIF is kept."""
    found, exif = dict.fromkeys(EXIF, ""), picture.getexif()
    try:
        gps = exif.get_ifd(0x8825)
        lat, lon = (sum(float(n) / 60**k for k, n in enumerate(gps[key])) for key in (2, 4))
        lat, lon = -lat if gps.get(1) == "S" else lat, -lon if gps.get(3) == "W" else lon
        if math.isfinite(lat + lon) and abs(lat) <= 90 and abs(lon) <= 180 and (lat or lon):  # 0, 0: no fix
            found |= {"lat": f"{lat:.6f}", "lon": f"{lon:.6f}"}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        pass
    try:
        taken = str(exif.get_ifd(0x8769).get(0x9003) or exif.get(0x0132)).strip("\0 ")
        found["time"] = datetime.strptime(taken, "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        pass
    return found


def ends_well(file, size):
    """Whether a JPEG or PNG has an end; cameras may write something behind it."""
    with open(file, "rb") as f:
        f.seek(max(size - 4096, 0))
        end = f.read()
    return b"\xff\xd9" in end or b"IEND" in end


def examine(job):
    """Look at a picture and put it into OUT if it is fit -> [bytes, height, width, upright, reason], facts of EXIF."""
    file, target, copy, facts, (least, longest, decode) = job
    seen, found, path = ["", "", "", "", ""], {}, file
    if isinstance(file, bytes):
        put(file, target, copy)
        path = target
    try:
        if str(target).encode(errors="ignore").decode() != str(target):
            raise ValueError("its name is not UTF-8")
        if target.suffix.lower() not in PHOTO_ENDINGS:
            raise ValueError(f"its name ends in none of {', '.join(PHOTO_ENDINGS)}")
        seen[0] = os.stat(path).st_size
        with open_photo(path) as picture:
            turn, size = turn_of(picture)
            seen[1:4] = *size, int(not any(turn))
            if min(size) < least:
                raise ValueError(f"too small: {size[0]} x {size[1]}, expected at least {least}")
            if max(size) > longest * min(size):
                raise ValueError(f"too long: {size[0]} x {size[1]}, one side is more than {longest:g} times the other")
            found = exif_facts(picture) if facts else {}
            if decode or picture.mode.startswith(("I", "F")) or not ends_well(path, seen[0]):
                to_rgb(picture)
    except FileNotFoundError:
        seen[4] = "missing"
    except BROKEN as error:
        seen[4] = shown(str(error).replace(str(path), "file") or type(error).__name__, 200)
    if seen[4] and isinstance(file, bytes):
        target.unlink()
    elif not seen[4] and not isinstance(file, bytes):
        put(file, target, copy)
    return seen, {} if seen[4] else found


def read_rows(path, name):
    """(rows of other sources, rows of this one) of a table that an earlier import wrote."""
    header, *pieces = read_csv(path) if path.exists() else [[]]
    rows = [dict(zip(header, line)) for piece in pieces for line in piece if line]
    own = [row["path"].startswith(f"{name}/") for row in rows]
    return [row for row, mine in zip(rows, own) if not mine], [row for row, mine in zip(rows, own) if mine]


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--from", dest="source", type=Path, required=True, help="file or folder to import")
    p.add_argument("--out", type=Path, required=True, help="data folder to write to")
    p.add_argument("--name", help="of this source: its folder in OUT, and the fact `source`; default: that of SOURCE")
    p.add_argument("--parts", help="published parts to take, like train,test; needed where there are several")
    p.add_argument("--classes", choices=("roadwork", "as-is"), default="roadwork", help="names of labels")
    p.add_argument("--facts", choices=("exif",), help="exif: columns lat, lon, time, where the source has none")
    p.add_argument("--copy", action="store_true", help="copy pictures instead of linking them")
    p.add_argument("--decode", action="store_true", help="decode every picture, not only its header and its end")
    p.add_argument("--min-side", type=positive, default=224, help="pixels; a smaller picture is refused")
    p.add_argument("--max-aspect", type=float, default=3.0, help="long side over short side; above it is refused")
    p.add_argument("--workers", type=positive, default=os.cpu_count(), help="reading processes")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    out, name = args.out, args.name or re.sub(r"[^\w.-]", "_", args.source.resolve().stem).lstrip("._")
    if not re.fullmatch(r"[^\W_][\w.-]*", name):
        raise ValueError(f"--name {shown(name)}: letters, digits, . _ and -, a letter or digit first")
    if out.resolve().is_relative_to(args.source.resolve()):
        raise ValueError(f"--out {out} lies inside --from {args.source}: name a folder elsewhere")
    manifest, labels, index = out / "_manifests" / "photos.json", out / "labels.csv", out / "_index" / "photos.csv"
    if labels.exists() and not manifest.exists():
        raise ValueError(f"{labels} was not written by this program: name another --out, or move it away")
    again = "delete OUT, and import again"
    earlier = read_json_file(manifest, {"sources": dict}, again, VERSION)["sources"] if manifest.exists() else {}

    kind, rows = read_source(args.source)
    rows = choose_parts(rows, args.parts and args.parts.replace(" ", "").split(","))
    if not rows:
        raise ValueError(f"--from {args.source}: no pictures ({kind})")
    name_classes(rows, args.classes == "as-is")
    rows, refused = place_rows(rows, name)
    files = [file for _, _, file in rows]
    files = shard_pictures(files) if kind == ".parquet" else files
    limits = args.min_side, args.max_aspect, args.decode
    jobs = ((file, out / row["path"], args.copy, args.facts, limits) for file, (_, row, _) in zip(files, rows))
    indexed, labelled = [], []
    with Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl+C is for the parent
        found = map(examine, jobs) if kind == ".parquet" else pool.imap(examine, jobs, chunksize=32)
        for (_, row, _), (seen, facts) in zip(rows, tqdm(found, "import", len(rows), unit="picture", disable=None)):
            path = row["path"].encode(errors="backslashreplace").decode()
            indexed.append(dict(zip(INDEX, [path, *seen])))
            if seen[-1]:
                refused.append((path, seen[-1]))
            else:
                known = {key: value for key, value in row.items() if value}
                labelled.append({"source": name, **facts, **known})

    (others, own), kept = read_rows(index, name), {row["path"] for row in labelled}
    for row in own:  # of an earlier import, no longer wanted
        if not row["reason"] and row["path"] not in kept:
            (out / row["path"]).unlink(missing_ok=True)
    indexed = sorted(others + indexed, key=lambda row: row["path"])
    labelled = sorted(read_rows(labels, name)[0] + labelled, key=lambda row: row["path"])
    columns = dict.fromkeys(key for row in labelled for key, value in row.items() if value)
    header = ["path", "label", *(key for key in ("group", "source", "part", *EXIF) if key in columns)]
    header += [key for key in columns if key not in header]
    reasons = Counter(re.split(r"[:(]", reason)[0].strip() for _, reason in refused)
    for folder in (index.parent, manifest.parent):
        folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(row["label"] for row in labelled if row["path"] in kept)
    entry = {"from": str(args.source), "kind": kind, "parts": sorted({row["part"] for _, row, _ in rows}),
             "min_side": args.min_side, "max_aspect": args.max_aspect, "decoded": args.decode, "labels": counts,
             "reasons": reasons, "refused": [{"path": p, "reason": why} for p, why in sorted(refused)]}  # fmt: skip
    write_json(manifest, {"version": VERSION, "created_utc": created_utc(), "sources": {**earlier, name: entry}}, 1)
    for path, columns, table in ((index, INDEX, indexed), (labels, header, labelled)):  # last: what it names is there
        cells = ([row.get(name, "") for name in columns] for row in table)
        write_text(path, csv_text([columns, *cells], exact=1))  # paths begin with NAME, so no spreadsheet runs them
    print(f"{labels}: {', '.join(f'{n} {shown(label)}' for label, n in sorted(counts.items()))} of {name}, "
          f"{len(labelled)} in all; columns {','.join(map(shown, header))}")  # fmt: skip
    for reason, n in reasons.most_common(12):
        print(f"refused {n}: {reason}")
    if refused:
        print(f"{len(refused)} refused, each with its reason in {manifest}; first: {shown(refused[0][0])}")
    return 0


if __name__ == "__main__":
    run(main)

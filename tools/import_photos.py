"""Bring labelled photographs into a data folder: OUT/NAME/... (links, or --copy), and OUT/labels.csv beside them.

SOURCE is a labels.json ([{filename, label, ...}]), a CSV (path,label without a header, or with one), a Hugging Face
folder (metadata.csv or .jsonl, or .parquet files), a folder that holds one of these, or one folder per class. Labels
are renamed by ALIASES, other columns are kept as facts. Pictures that are missing, unreadable, too small or
too long are listed with reasons in OUT/_manifests/photos.json. OUT/_index/photos.csv has a row per picture. The same
command again replaces what it wrote; another --name adds a source.

    python tools/import_photos.py --from downloads/roadwork --out data/roadwork --name natix --parts train,test
"""

import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from datetime import datetime
from itertools import chain
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import BROKEN, INDEX_COLUMNS, PHOTO_ENDINGS, label_columns, open_photo, read_csv, to_rgb, turn_of
from tools.lib.cli import Parser, positive, run, shown, within
from tools.lib.files import VERSION, created_utc, csv_text, parse, read_json_file, walk_files, write_json
from tools.lib.progress import progress
from tools.lib.workers import parallel

# class -> what sources call it; case, spaces and hyphens do not matter. 19, 20, 55: labels of Mapillary Vistas
ALIASES = {"no_roadwork": "no_roadwork class_0 0", "roadwork": "roadwork class_1 1 19 20 55"}
CLASS_OF = {alias: name for name, aliases in ALIASES.items() for alias in aliases.split()}
PARTS = {"train": "train training", "test": "test testing", "val": "val valid validation dev eval"}
PART_OF = {alias: name for name, aliases in PARTS.items() for alias in aliases.split()}
PATHS, LABELS = "path filename file_name image file relative_path".split(), "label class target".split()
INDEX = "path bytes height width upright reason".split()  # height, width as seen; upright 0: EXIF turns the pixels


# Rows of a source: (where it stands, {path, label, facts...} as texts, its file).


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
            yield dict(zip(map(str.strip, header), line))
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = [parse(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else parse(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON ({shown(error)}); write it anew") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected objects with filename and label; write it anew")
    yield from ({key: text_of(value) for key, value in row.items()} for row in rows)


def take(row, names, where):
    """Remove and return the value of the first of these columns that a row has, whatever its case."""
    own = {key.casefold(): key for key in row}
    if not (found := next((own[name] for name in names if name in own), None)):
        raise ValueError(f"{where}: no column {', '.join(names)}, but {', '.join(map(shown, row))}; name one so")
    return row.pop(found)


def read_tables(root, tables, out):
    for table in tables:
        for number, row in enumerate(read_table(table), 1):
            where = f"{table.name}, row {number}"
            path = Path(table.parent.relative_to(root), take(row, PATHS, where)).as_posix()
            yield where, {"path": path, "label": take(row, LABELS, where), **row}, root / path


def read_class_folders(root, files, out):
    """The first folder that is no part names the class: train/roadwork/1.jpg, roadwork/1.jpg, 1/a/b.jpg."""
    for file, _ in walk_files(root):
        *folders, name = parts = Path(file).relative_to(root).parts
        classes = [folder for folder in folders if folder.casefold() not in PART_OF]
        hidden = any(part[0] in "._" for part in parts)
        if not hidden and (classes or name.lower().endswith(PHOTO_ENDINGS)):
            yield file, {"path": "/".join(parts), "label": classes[0] if classes else ""}, Path(file)


def read_shards(root, shards, out):
    """Pictures are unpacked below `out`. train-00000-of-00002 is of part train; Hugging Face's schema names classes."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{shards[0]} needs pyarrow to be read: pip install pyarrow") from None
    for shard in shards:
        file, name = pyarrow.parquet.ParquetFile(shard), shard.relative_to(root).with_suffix("").as_posix()
        hints = parse((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}").decode())
        classes = hints.get("info", {}).get("features", {}).get("label", {}).get("names")
        part = {"part": PART_OF[p]} if (p := re.split(r"[-_.]", shard.name)[0].casefold()) in PART_OF else {}
        rows = (row for batch in file.iter_batches(64) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            where = f"{shard.name}, row {number}"
            picture = take(row, ("image", "img"), where) or {}
            label = take(row, LABELS, where)
            label = classes[label] if classes and isinstance(label, int) else text_of(label)
            path = f"{name}/{number:06d}{PurePosixPath(picture.get('path') or 'x.jpg').suffix}"
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(picture.get("bytes") or b"")
            yield where, part | {k: text_of(v) for k, v in row.items()} | {"path": path, "label": label}, out / path


def read_source(source, out):
    """(what it is, its rows)"""
    if not source.exists():
        raise FileNotFoundError(f"--from {source} does not exist")
    root, files = (source, []) if source.is_dir() else (source.parent, [source])
    for pattern in ("labels.json", "metadata.csv", "metadata.jsonl", "*.parquet", "labels.csv"):
        files = files or sorted([*root.glob(pattern), *root.glob(f"*/{pattern}")])
    readers = {".parquet": read_shards, "": read_class_folders}
    readers |= dict.fromkeys((".json", ".jsonl", ".csv"), read_tables)
    if (kind := files[0].suffix if files else "") not in readers:
        raise ValueError(f"--from {source}: expected a folder, or a .json, .jsonl, .csv or .parquet file")
    return files[0].name if files else "class folders", list(readers[kind](root, files, out))


# What is done with them.


def choose_parts(rows, parts):
    """The rows of the wanted parts (a column part or split, else a folder); several are never pooled unasked."""
    for _, row, _ in rows:
        columns = [row.pop(key).strip() for key in list(row) if key.casefold() in ("part", "split")]
        folders = [folder for folder in row["path"].split("/")[:-1] if folder.casefold() in PART_OF]
        row["part"] = next((PART_OF.get(text.casefold(), text) for text in columns + folders if text), "")
    found = Counter(row["part"] for _, row, _ in rows)
    counts = ", ".join(f"{shown(part) or '(none)'} {n}" for part, n in sorted(found.items()))
    if parts is None and len(found) > 1:
        every = ",".join(sorted(filter(None, found)))
        raise ValueError(f"the source has parts ({counts}): name some; --parts {every} keeps all, as the fact part")
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
    """{path below OUT: (where, row, file)}, and [(path, reason)] of rows that name a picture for the second time."""
    kept, twice = {}, []
    for where, row, file in rows:
        path = PurePosixPath(row.pop("path"))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: {shown(path)} leads out of the source; correct it")
        path = "/".join([name, *(part.lstrip("._") or "x" for part in path.parts)])  # names like _x are not read
        first, other, _ = kept.setdefault(path, (where, row, file))
        if other["label"] != row["label"]:
            labels = f"{other['label']} in {first}, {row['label']} in {where}"
            raise ValueError(f"{shown(path)} has two labels: {labels}; correct one")
        if other is not row:
            twice.append((path, f"named twice: {where}, and {first}"))
    return kept, twice


def put(file, target, copy):
    """A hard link at `target`, else a symbolic link, else a copy; what is right already stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    known, there = file.stat(), target.stat() if target.exists() else None
    linked = there and os.path.samestat(known, there)
    copied = there and not linked and (there.st_size, there.st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    if copied if copy else linked:
        return
    new = target.with_name(f".{os.getpid()}.new")
    real = os.path.realpath(file) if file.is_symlink() else file.absolute()
    for way in [shutil.copy2] if copy else [os.link, os.symlink, shutil.copy2]:
        new.unlink(missing_ok=True)
        try:
            way(real, new)
            break
        except OSError:
            if way is shutil.copy2:
                raise
    os.replace(new, target)


def exif_facts(picture):
    """lat, lon and time, as far as they are there and make sense; nothing else of EXIF is kept."""
    found, exif = {}, picture.getexif()
    try:
        gps = exif.get_ifd(0x8825)
        lat, lon = (sum(float(n) / 60**k for k, n in enumerate(gps[key])) for key in (2, 4))
        lat, lon = -lat if gps.get(1) == "S" else lat, -lon if gps.get(3) == "W" else lon
        if math.isfinite(lat + lon) and abs(lat) <= 90 and abs(lon) <= 180 and (lat or lon):  # 0, 0: no fix
            found = {"lat": f"{lat:.6f}", "lon": f"{lon:.6f}"}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        pass
    try:
        taken = str(exif.get_ifd(0x8769).get(0x9003) or exif.get(0x0132)).strip("\0 ")
        return {**found, "time": datetime.strptime(taken, "%Y:%m:%d %H:%M:%S").isoformat()}
    except ValueError:
        return found


def ends_well(file, size):
    """Whether a JPEG or PNG has an end; cameras may write something behind it."""
    with open(file, "rb") as f:
        f.seek(max(size - 4096, 0))
        end = f.read()
    return b"\xff\xd9" in end or b"IEND" in end


def examine(job):
    """Look at a picture and put it into OUT if it is fit -> [bytes, height, width, upright, reason], facts of EXIF."""
    file, target, copy, facts, (least, longest) = job
    seen, found = ["", "", "", "", ""], {}
    try:
        if str(target).encode(errors="ignore").decode() != str(target):
            raise ValueError("its name is not UTF-8")
        if target.suffix.lower() not in PHOTO_ENDINGS:
            raise ValueError(f"its name ends in none of {', '.join(PHOTO_ENDINGS)}")
        seen[0] = file.stat().st_size
        with open_photo(file) as picture:
            turn, size = turn_of(picture)
            seen[1:4] = *size, int(not any(turn))
            if min(size) < least:
                raise ValueError(f"too small: {size[0]} x {size[1]}, expected at least {least}")
            if max(size) > longest * min(size):
                raise ValueError(f"too long: {size[0]} x {size[1]}, one side is more than {longest:g} times the other")
            found = exif_facts(picture) if facts else {}
            if picture.mode.startswith(("I", "F")) or not ends_well(file, seen[0]):  # decode to know
                to_rgb(picture)
    except FileNotFoundError:
        seen[4] = "missing"
    except BROKEN as error:
        seen[4] = shown(str(error).replace(str(file), "file") or type(error).__name__, 200)
    if not seen[4]:  # an error of our disk is no fault of the picture
        put(file, target, copy)
    return seen, found


def read_rows(path):
    """{path: row} of a table that an earlier import wrote."""
    header, *pieces = read_csv(path) if path.exists() else [[]]
    return {line[0]: dict(zip(header, line)) for piece in pieces for line in piece if line}


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--from", dest="source", type=Path, required=True, help="file or folder to import")
    p.add_argument("--out", type=Path, required=True, help="data folder to write to")
    p.add_argument("--name", help="of this source: its folder in OUT, and the fact `source`; default: that of SOURCE")
    p.add_argument("--parts", help="published parts to take, like train,test; needed where there are several")
    p.add_argument("--classes", choices=("roadwork", "as-is"), default="roadwork", help="names of labels")
    p.add_argument("--facts", choices=("exif",), help="exif: columns lat, lon, time, where the source has none")
    p.add_argument("--copy", action="store_true", help="copy pictures instead of linking them")
    p.add_argument("--min-side", type=positive, default=224, help="pixels; a smaller picture is refused")
    p.add_argument("--max-aspect", type=within("[1, 1000]"), default=3.0, help="largest long side over short side")
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
    sources = read_json_file(manifest, {"sources": dict}, again, VERSION)["sources"] if manifest.exists() else {}

    kind, rows = read_source(args.source, out / "_unpacked" / name)
    rows = choose_parts(rows, args.parts and args.parts.replace(" ", "").split(","))
    if not rows:
        raise ValueError(f"--from {args.source}: no pictures ({kind})")
    name_classes(rows, args.classes == "as-is")
    rows, refused = place_rows(rows, name)
    own = (out / name).resolve()
    if inside := [f for f in {file.parent for _, _, file in rows.values()} if f.resolve().is_relative_to(own)]:
        # a later import would remove there what is no longer fit: the originals
        found = f"holds originals in {inside[0]}"
        raise ValueError(f"{own} would hold the import and {found}: give another --name or --out")
    facts = dict.fromkeys(key for _, row, _ in rows.values() for key in row)
    label_columns(labels, ["path", *facts])  # would open_source take them?
    if taken := sorted({*facts} & {*INDEX_COLUMNS}):
        raise ValueError(f"--from {args.source}: rename column {taken[0]}, a word of ours")
    tables = [read_rows(table) for table in (index, labels)]
    indexed, labelled = ({p: row for p, row in old.items() if not p.startswith(f"{name}/")} for old in tables)
    limits = args.min_side, args.max_aspect
    jobs = ((file, out / path, args.copy, args.facts, limits) for path, (_, _, file) in rows.items())
    counts = Counter()
    looks = progress(parallel(examine, jobs, args.workers, chunk=32), "import", len(rows), unit="picture")
    for (path, (_, row, _)), (seen, facts) in zip(rows.items(), looks):
        path = path.encode(errors="backslashreplace").decode()
        indexed[path] = dict(zip(INDEX, [path, *seen]))
        if seen[-1]:
            refused.append((path, seen[-1]))
        else:
            known = {key: text for key, text in row.items() if text}
            facts = {key: text for key, text in facts.items() if key == "time" or not known.keys() & {"lat", "lon"}}
            labelled[path] = {"path": path, "source": name} | facts | known
            counts[row["label"]] += 1
    if not counts:
        raise ValueError(f"--from {args.source}: none of {len(rows)} pictures is fit, first {': '.join(refused[0])}")
    header = ["path", "label", "group", "source", "part", "lat", "lon", "time"]
    header = [*dict.fromkeys(header + [key for row in labelled.values() for key in row])]
    header = [key for key in header if any(row.get(key) for row in labelled.values()) or key in header[:2]]
    reasons = Counter(re.split(r"[:(]", reason)[0].strip() for _, reason in refused)
    parts = sorted({row["part"] for _, row, _ in rows.values()})
    sources[name] = {"from": str(args.source), "kind": kind, "parts": parts, "labels": counts, "reasons": reasons,
                     "min_side": args.min_side, "max_aspect": args.max_aspect,
                     "refused": [{"path": path, "reason": reason} for path, reason in sorted(refused)]}  # fmt: skip
    write_json(manifest, {"version": VERSION, "created_utc": created_utc(), "sources": sources}, 1)
    index.parent.mkdir(exist_ok=True)
    for file, columns, table in ((index, INDEX, indexed), (labels, header, labelled)):  # last: what it names is there
        cells = ([row.get(key, "") for key in columns] for _, row in sorted(table.items()))
        write_text(file, csv_text([columns, *cells], exact=1))  # paths begin with NAME, so no spreadsheet runs them
    for path, row in tables[0].items():  # of an earlier import, no longer named
        if not row["reason"] and path not in labelled:
            (out / path).unlink(missing_ok=True)
    print(f"{labels}: {', '.join(f'{n} {shown(label)}' for label, n in sorted(counts.items()))} of {name}, "
          f"{len(labelled)} in all; columns {','.join(map(shown, header))}")  # fmt: skip
    for reason, n in reasons.most_common(12):
        print(f"refused {n}: {reason}")
    if refused:
        print(f"{len(refused)} refused, each with its reason in {manifest}; first: {shown(refused[0][0])}")
    return 0


if __name__ == "__main__":
    run(main)

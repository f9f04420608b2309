"""Divide the patients of a data folder, once, for every program that follows: writes DATA/_splits/splits.json.

DATA is a processed CT folder (with _index/index.csv; group = dataset/patient) or any folder tree of PNG/JPEG
photographs (group = the group column of DATA/labels.csv, else the file itself). A group never straddles two splits.

    python tools/make_splits.py --data data/processed --ratios train=0.7,val_select=0.1,val_test=0.2

Groups are kept together that are one patient by another name, study or series, and those that check_duplicates.py
found to share pictures, if it was run.
"""

import hashlib
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import accumulate
from math import floor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import file_sha256, find_table, read_duplicates, read_labels, read_splits, split_path
from tools.lib.cli import Parser, natural, run, shown
from tools.lib.files import json_text, write_json
from tools.lib.groups import join, open_data, same_patients
from tools.lib.provenance import plain_name

VERSION = 1
SPLITS = ("train", "val_select", "val_calib", "val_test")
THREE_WAY = "train=0.85,val_select=0.05,val_test=0.10"
FOUR_WAY = "train=0.60,val_select=0.15,val_calib=0.15,val_test=0.10"


def read_table(table, root, known):
    """[(path, label, group or "", source or "")] of a table; pictures have one label, slices any number."""
    rows, nodules = read_labels(table, root)
    label_of, spelt, seen = {}, {}, set()
    for number, row in enumerate(rows, 2):
        path, label = row["path"], row["label"].strip()
        if (other := spelt.setdefault(label.casefold(), label)) != label:
            here = f"label {shown(label)} differs from {shown(other)} in capitals alone"
            raise ValueError(f"{table}, row {number}: {here}; write one of them")
        whole = tuple(row.values())
        if not nodules and whole in seen:  # a picture may stand in rows of two groups, which joins these
            raise ValueError(f"{table}, row {number}: {shown(path)} stands above already; keep one row for each")
        seen.add(whole)
        if path not in known:
            raise ValueError(f"{table}, row {number}: no image {shown(path)!r} in the data; leave the row out")
        if not nodules and label_of.setdefault(path, label) != label:
            here = f"{shown(path)} has label {shown(label)}, and {shown(label_of[path])} above"
            raise ValueError(f"{table}, row {number}: {here}; keep one")
    return [(row["path"], *(row.get(key, "").strip() for key in ("label", "group", "source"))) for row in rows]


def parse_ratios(text):
    """'train=0.85,val_test=0.15' -> exact fractions, so that 0.29 of 100 groups is 29 and not 28."""
    try:
        pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
        ratios = {name: Fraction(value) for name, value in pairs}
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--ratios {text!r}: write it like {THREE_WAY}") from None
    if len(ratios) < len(pairs) or "train" not in ratios or not set(ratios) <= set(SPLITS):
        raise ValueError(f"--ratios {text!r}: names are {', '.join(SPLITS)}, each once, train among them")
    if min(ratios.values()) <= 0:
        raise ValueError(f"--ratios {text!r}: each must be above 0")
    if sum(ratios.values()) != 1:
        raise ValueError(f"--ratios {text!r}: together they must be 1, not {float(sum(ratios.values())):g}")
    return {name: ratios[name] for name in SPLITS if name in ratios}


def quotas(n, ratios):
    """Largest remainder: whole numbers that sum to n, each within one of n * ratio."""
    take = {split: floor(n * ratio) for split, ratio in ratios.items()}
    by_remainder = sorted(ratios, key=lambda split: take[split] - n * ratios[split])
    for split in by_remainder[: n - sum(take.values())]:
        take[split] += 1
    return take


def allocate(sizes, ratios):
    """{stratum: {split: groups}}: each cell is the floor or the ceiling of size * ratio, so within one of it.

    The totals over strata follow quotas(): equal with one stratum, within one (97% equal) in 3,000 random tables.
    """
    exact = {k: {split: n * ratio for split, ratio in ratios.items()} for k, n in sorted(sizes.items())}
    cells = {k: {split: floor(x) for split, x in row.items()} for k, row in exact.items()}
    want = quotas(sum(sizes.values()), ratios)
    room = {split: want[split] - sum(row[split] for row in cells.values()) for split in ratios}
    for k, row in cells.items():
        rounded = [split for split in sorted(ratios, key=lambda s: -room[s]) if exact[k][split] > row[split]]
        for split in rounded[: sizes[k] - sum(row.values())]:
            row[split] += 1
            room[split] -= 1
    return cells


def chance(seed, name):
    """A number in [0, 1) that depends on seed and name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def assign(units, contents, lacks, seed, placed):
    """Index of unit -> split. Units come in a random order, large ones first, each to the split that still lacks most
    of what it holds; an empty split then gets one unit from the fullest.

    contents: {stratum: groups or pictures} of each unit; lacks: {stratum: {split: number}}, used up here; placed:
    {index: split} of units that have theirs.
    """
    splits = list(next(iter(lacks.values())))
    members = {split: [] for split in splits}
    order = sorted(range(len(units)), key=lambda i: (-sum(contents[i].values()), chance(seed, units[i][0])))
    for i in sorted(order, key=lambda i: i not in placed):
        wanted = {split: sum(n * lacks[stratum][split] for stratum, n in contents[i].items()) for split in splits}
        split = placed.get(i) or max(wanted, key=wanted.get)
        for stratum, n in contents[i].items():
            lacks[stratum][split] -= n
        members[split].append(i)
    for split in splits:
        if not members[split]:
            members[split].append(max(members.values(), key=len).pop())
    return {i: split for split, indices in members.items() for i in indices}


def lacking(contents, ratios, alone=frozenset()):
    """What each split is to hold, {(label, source): {split: pictures}}, within one of the shares of each label.

    alone: sources for training only; shares are those of the others.
    """
    sizes, lacks = sum(contents, Counter()), {}
    for label in sorted({label for label, _ in sizes}):
        lacks |= allocate({k: n for k, n in sizes.items() if k[0] == label and k[1] not in alone}, ratios)
    of_train = {k: {split: n * (split == "train") for split in ratios} for k, n in sizes.items() if k[1] in alone}
    return lacks | of_train


def parse_sources(text):
    """'source=A,B' -> {"A", "B"}."""
    key, _, names = text.partition("=")
    if text and (key != "source" or not all(names.split(","))):
        raise ValueError(f"--train-only {text!r}: write it like source=mapillary,openimages")
    return {*filter(None, names.split(","))}


def pictures_of(units, labels, groups, paths):
    """{(label, source): pictures} of each unit; groups and paths: of each picture."""
    facts = {path: (label, source) for path, label, _, source in labels}
    of_group = defaultdict(Counter)
    for path, group in zip(paths, groups):
        of_group[group][facts.get(path, ("", ""))] += 1
    return [sum((of_group[name] for name in unit), Counter()) for unit in units]


def keep_for_training(units, contents, alone, placed):
    """{index of unit: "train"} of those with a picture of a source that only trains."""
    found = {i: "train" for i, content in enumerate(contents) if any(source in alone for _, source in content)}
    if absent := alone - {source for content in contents for _, source in content}:
        raise ValueError(f"--train-only: labels.csv has no source {shown(min(absent))}")
    if moved := [i for i in found if placed.get(i, "train") != "train"]:
        raise ValueError(
            f"--train-only: {shown(units[moved[0]][0])} stands in {placed[moved[0]]}; make the split anew, "
            "without --extend and with --force"
        )
    if others := sum(n for i in found for (_, source), n in contents[i].items() if source not in alone):
        print(f"--train-only: {others} pictures of other sources are copies of these, or of one scene, and train too")
    return found


def earlier_splits(path, units, ratios):
    """{index of unit: split} of an existing splits.json, whose groups keep theirs."""
    again = "make the split anew, without --extend and with --force"
    stood = read_splits(path, again)["groups"]
    if odd := sorted(set(stood.values()) - set(ratios)):
        raise ValueError(f"{path} has {odd[0]}, which --ratios or --four-way does not name; say the same as before")
    placed = {}
    for i, unit in enumerate(units):
        known = {stood[name]: name for name in unit if name in stood}
        if len(known) > 1:
            pair = " and ".join(f"{shown(name)} ({split})" for split, name in list(known.items())[:2])
            raise ValueError(f"{path}: {pair} belong together now (one scene, or copies); {again}")
        if known:
            placed[i] = next(iter(known))
    print(f"{path}: {sum(name in stood for unit in units for name in unit)} groups keep their split")
    return placed


def assign_stable(units, ratios, seed):
    """Each unit by the hash of its first name against the cumulative ratios: what is added later moves nothing."""
    uppers = list(accumulate(ratios.values()))[:-1]
    placed = {}
    for i, unit in enumerate(units):
        passed = [upper for upper in uppers if chance(seed, unit[0]) >= upper]
        placed[i] = list(ratios)[len(passed)]
    return placed


def rarest_label(units, labels, group_of):
    """Stratum of each unit: of the labels on its slices the one that fewest groups carry (ties by name), or none."""
    carriers = {(group_of[path], label) for path, label, *_ in labels}
    groups_with = Counter(label for _, label in carriers)
    labels_of = defaultdict(set)
    for group, label in carriers:
        labels_of[group].add(label)
    found = [set().union(*(labels_of[group] for group in unit)) for unit in units]
    return [min(names, key=lambda name: (groups_with[name], name), default="") for names in found]


def count(slices, labels, group_of, groups, ratios):
    """{split: {groups, slices, labels: {label: rows of the table}}}; slices is {group: number}."""
    n_groups, n_slices = Counter(groups.values()), Counter()
    for name, n in slices.items():
        n_slices[groups[name]] += n
    n_labels = Counter((groups[group_of[path]], label) for path, label, *_ in labels)
    names = sorted({label for _, label, *_ in labels})
    return {
        s: {"groups": n_groups[s], "slices": n_slices[s], "labels": {name: n_labels[s, name] for name in names}}
        for s in ratios
    }


def check_classes(counts, least):
    """Each label in each split, or nothing can be measured there."""
    for split, c in counts.items():
        for label, n in c["labels"].items():
            if n < least:
                raise ValueError(
                    f"{split} would have {n} pictures of {shown(label)}, fewer than --min-per-class {least}: add "
                    "pictures of it, or allow fewer"
                )


def kept_together(args, source, labels, group_of):
    """Lists of groups that must not be parted: one dataset (if asked), label group, patient or picture."""
    together = defaultdict(set)
    for name in source.groups if args.group_by == "dataset" else ():
        together["dataset", plain_name(name.split("/")[0])].add(name)
    for path, _, group, _ in labels:
        together["label group", plain_name(group or group_of[path])].add(group_of[path])
    sets = [sorted(members) for members in together.values()] + same_patients(source)
    duplicates = args.duplicates or split_path(args.data, "duplicates.json")
    if args.duplicates or duplicates.exists():
        copies = read_duplicates(source, duplicates)
        sets += copies
        print(f"{duplicates}: {len(copies)} sets of groups share pictures and stay together")
    return sets


def remarks(table, labels, units, slices):
    """What a person may have forgotten: labels, groups, scenes. slices: pictures of each group."""
    pictures, bare = sum(slices.values()), [path for path, _, group, _ in labels if not group]
    if labels and len(labels) < pictures:
        yield f"{table}: {len(labels)} of {pictures} pictures have a label"
    if 0 < len(bare) < len(labels):
        yield (f"note: {table}: {len(bare)} of {len(labels)} rows have no group, first {shown(bare[0])}: each is a "
               "group of its own")  # fmt: skip
    single = sum(sum(slices[name] for name in unit) == 1 for unit in units)
    if single > pictures / 2:
        yield (f"note: {single} of {pictures} pictures are groups of their own, so those of one scene may lie in two "
               "splits; name scenes in the column group of labels.csv, find copies with "
               "tools/check_duplicates.py")  # fmt: skip


def verify(groups, counts, slices, sets):
    """Raise on what a bug in this file would break, before anything is written."""
    assert set(groups) == set(slices), "a group is missing or invented"
    assert sum(c["slices"] for c in counts.values()) == sum(slices.values()), "slices do not add up"
    assert all(len({groups[name] for name in members}) == 1 for members in sets), "joined groups straddle two splits"
    if empty := [split for split, c in counts.items() if not c["groups"]]:
        raise ValueError(f"{empty[0]} would be empty (--stable draws at random); add groups, or take another --seed")


def show(counts, images):
    """Print the table of counts; at most six labels, since photographs may have a thousand."""
    labels = list(counts["train"]["labels"])
    names = [shown(label, 40) for label in labels[:6]]
    lines = [["split", "groups", images, *names, *["..."][: len(labels) > 6]]]
    lines += [[split, c["groups"], c["slices"], *list(c["labels"].values())[:6]] for split, c in counts.items()]
    for line in lines:
        print(" ".join(f"{cell!s:>11}" for cell in line))
    for split, c in counts.items():
        if absent := [label for label, n in c["labels"].items() if not n]:
            print(f"note: {split} has no {', '.join(shown(label) for label in absent[:6])}")


def write(path, payload, force):
    """Write once: the same content again is fine, another content needs --force."""
    if path.exists() and path.read_bytes() == json_text(payload).encode() + b"\n":
        print("unchanged", path)
        return
    if path.exists() and not force:
        raise ValueError(f"{path} exists and differs; checkpoints may depend on it, --force replaces it")
    write_json(path, payload)
    print("wrote", path)


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="processed CT folder, or folder tree of photographs")
    shares = p.add_mutually_exclusive_group()
    shares.add_argument("--ratios", help=f"shares of patients, default {THREE_WAY}, or of pictures, default {FOUR_WAY}")
    shares.add_argument("--four-way", action="store_true", help=f"the same as --ratios {FOUR_WAY}")
    p.add_argument("--labels", type=Path, help="table to stratify by, sought in --data too; photographs: labels.csv")
    p.add_argument("--duplicates", type=Path, help="of tools/check_duplicates.py; default: _splits/duplicates.json")
    p.add_argument("--group-by", choices=("patient", "dataset"), default="patient", help="what never straddles")
    p.add_argument("--seed", type=natural, default=0, help="another seed, another division")
    p.add_argument(
        "--stable",
        action="store_true",
        help="by a hash of each name, so that later patients move nobody; not stratified",
    )
    p.add_argument("--min-per-class", type=natural, default=5, help="pictures of each label in each split")
    p.add_argument("--train-only", default="", metavar="source=A,B", help="photographs of these sources only train")
    p.add_argument("--extend", action="store_true", help="keep every group of splits.json where it is, deal new ones")
    p.add_argument("--force", action="store_true", help="replace a splits.json that differs")
    return p


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    source = open_data(args.data)
    photos = source.encoding == "photo"
    ratios = parse_ratios(FOUR_WAY if args.four_way else args.ratios or (FOUR_WAY if photos else THREE_WAY))
    alone = parse_sources(args.train_only)
    if args.extend and (args.stable or args.force):
        parser.error("--extend keeps what stands: without --stable, which moves nobody anyway, and --force")
    if alone and not photos:
        parser.error("--train-only: slices have no source; photographs have, in labels.csv")
    if photos and args.group_by == "dataset":
        parser.error("--group-by dataset: photographs have no dataset; give groups in labels.csv")

    column = source.rows.column("group").tolist()
    group_of = dict(zip((path.decode() for path in source.rows.column("path").tolist()), column))
    slices = Counter(column)
    usual = args.data / "labels.csv"
    table = find_table(args.data, args.labels) if args.labels else usual if photos and usual.exists() else None
    labels = read_table(table, args.data, group_of) if table else []
    sets = kept_together(args, source, labels, group_of)
    units = join(slices, sets)
    if len(units) < len(ratios):
        raise ValueError(f"{len(units)} independent groups cannot fill {len(ratios)} splits; add groups or drop splits")
    images = "images" if photos else "slices"
    print(f"{len(source)} {images} in {len(slices)} groups, {len(units)} of them independent")
    if photos:
        print(*(f"{line}\n" for line in remarks(table, labels, units, slices)), sep="", end="")
    path = split_path(args.data)
    placed = earlier_splits(path, units, ratios) if args.extend else {}
    if photos:
        contents = pictures_of(units, labels, column, [p.decode() for p in source.rows.column("path").tolist()])
        placed |= keep_for_training(units, contents, alone, placed)
        lacks = lacking(contents, ratios, alone)
    else:
        strata = rarest_label(units, labels, group_of)
        contents = [Counter({stratum: len(unit)}) for unit, stratum in zip(units, strata)]
        lacks = allocate(sum(contents, Counter()), ratios)
    if args.stable:
        print("--stable: the shares follow the ratios only approximately")
        placed = assign_stable(units, ratios, args.seed) | placed
    else:
        placed = assign(units, contents, lacks, args.seed, placed)
    groups = dict(sorted((name, placed[i]) for i, unit in enumerate(units) for name in unit))
    counts = count(slices, labels, group_of, groups, ratios)
    verify(groups, counts, slices, sets)
    if photos:
        check_classes(counts, args.min_per_class)
    payload = {
        "version": VERSION,
        "seed": args.seed,
        "group_by": "group" if photos else args.group_by,
        "ratios": {split: float(ratio) for split, ratio in ratios.items()},
        "stratify": {"labels": table.name, "sha256": file_sha256(table)} if table and not args.stable else None,
        "stable": args.stable,
        "counts": counts,
        "index_sha256": source.index_sha256,
        "groups": groups,
    }
    if alone:
        payload["train_only"] = sorted(alone)
    write(path, payload, args.force or args.extend)
    show(counts, images)
    print("sha256", file_sha256(path))
    return 0


if __name__ == "__main__":
    run(main)

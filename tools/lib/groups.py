"""What must not be parted: groups of pictures that share a patient, a scene or their pixels."""

from collections import defaultdict

import numpy as np

from data import open_source
from tools.lib.cli import shown
from tools.lib.provenance import plain_name

MANY = 10  # patients under one id: what more of them share is a placeholder
SHARED = {  # column -> why groups with one value of it are one patient
    "group": "their names differ in case or outer spaces only",
    "study": "one study stands under several patients",
    "series": "one series stands under several patients or datasets",
}


def open_data(root):
    """Everything below a data root as a Source; slices whose patient is unknown cannot be kept apart."""
    source = open_source(root)
    if source.encoding != "photo" and any(not part.strip() for g in source.groups for part in g.split("/", 1)):
        raise ValueError(f"{root}: the index has slices without dataset or patient; preprocess again")
    return source


def first_rows(rows, column):
    """{value, case-folded and stripped: {group: its first row}} for what stands in several groups."""
    groups, texts, found = rows.names["group"], rows.names[column], defaultdict(dict)
    pairs = rows.columns[column].astype(np.int64) * len(groups) + rows.columns["group"]
    pairs, first = np.unique(pairs, return_index=True)
    for i in first.argsort().tolist():  # in the order of rows
        code, group = divmod(int(pairs[i]), len(groups))
        found[plain_name(texts[code])].setdefault(groups[group], int(first[i]))
    return {key: rows_of for key, rows_of in found.items() if len(rows_of) > 1}


def same_patients(source):
    """Lists of groups that are one patient under several names, by name, study or series; prints what it found.

    They are joined, not refused: a join can only make the shares coarser, while a patient in two splits is a leak.
    Refused is an id of more than MANY patients, which would join strangers; an empty id or 0 says nothing.
    """
    photos, sets = source.encoding == "photo", []

    def first_two(rows_of):
        pair = [*rows_of.items()][:2]
        pair = [shown(name) if photos else f"{shown(name)} (row {row + 2} of index.csv)" for name, row in pair]
        return " and ".join(pair)

    for column in ["group"] if photos else SHARED:
        found = first_rows(source.rows, column)
        found = [rows_of for key, rows_of in found.items() if column == "group" or key.strip("0.")]
        if not found:
            continue
        if column != "group" and len(most := max(found, key=len)) > MANY:
            raise ValueError(
                f"{source.root}: one {column} id stands under {len(most)} patients, so it is no id: "
                f"{first_two(most)}; correct or empty it in the DICOM files and preprocess them into a new folder"
            )
        joined = len({name for rows_of in found for name in rows_of})
        earliest = min(found, key=lambda rows_of: list(rows_of.values())[1])
        print(f"joined {joined} groups: {SHARED[column]}, first {first_two(earliest)}")
        sets += map(list, found)
    return sets


def join(names, sets):
    """Union-find: lists of names that any of `sets` links, each sorted, ordered by their first name."""
    parent = {name: name for name in names}

    def find(name):
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for members in sets:
        for other in members[1:]:
            parent[find(other)] = find(members[0])
    units = defaultdict(list)
    for name in sorted(parent):
        units[find(name)].append(name)
    return sorted(units.values())

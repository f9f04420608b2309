"""Labelled samples: the table of labels, joined to the rows of a source.

Nodule tables (tools/lidc_nodules.py) name places in CT in millimetres; any other table is path,label[,group].
"""

from typing import NamedTuple

import numpy as np

import data
from tools.lib import broken
from tools.lib.cli import shown
from tools.lib.files import to_number
from tools.lib.slices import find_slice

CROPS = "crops"  # a unit of tables that tools/import_crops.py writes: whose nodules they are, nobody says


class Table(NamedTuple):
    """Labelled samples; patients are the groups of the index (what the backbone saw), groups those of the table."""

    ids: list
    rows: np.ndarray  # [n] of the source
    labels: np.ndarray  # [n] 0..K-1
    classes: list
    groups: np.ndarray
    patients: np.ndarray
    centres: np.ndarray | None  # [n, 2] y, x in pixels
    sizes: np.ndarray | None  # [n, 2] diameter_mm, box_mm
    unit: str = "patients"  # what groups are called; of photographs groups

    def take(self, keep):
        arrays = {name: value[keep] for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        return self._replace(ids=[self.ids[i] for i in np.flatnonzero(keep)], **arrays)


def in_row(path, k, text):
    """What is wrong with sample k, where a person finds it: the header is row 1."""
    return ValueError(f"{path}, row {k + 2}: {text}")


def find_rows(path, rows, source, nodules):
    """Row of the source for each row of the table; of a whole volume its middle slice. What is missing is listed."""
    indices, missing = [], {}
    for k, row in enumerate(rows):
        z = row["z"].strip() if nodules else "0"
        if not (z.isascii() and z.isdigit() and len(z) < 10):
            raise in_row(path, k, f"z is {shown(z)!r}, expected the number of a slice")
        indices.append(find_slice(source, row["path"], z if nodules else None))
        if indices[-1] is None:
            missing.setdefault(f"{row['path']} z {z}" if nodules else row["path"], k)
    if missing:
        names = ", ".join(shown(name) for name in sorted(missing)[:20])
        raise in_row(path, min(missing.values()), f"{len(missing)} images are not in {source.root}, from this row on; "
                     f"make the labels for it: {names}")  # fmt: skip
    return np.array(indices)


def refuse_doubled(path, names):
    """names: of the samples, equal for what is one sample."""
    first = {}
    for k, name in enumerate(names):
        if name in first:
            raise in_row(path, k, f"{shown(name)} stands in row {first[name] + 2} already; keep one row for each")
        first[name] = k


def read_places(path, rows, source, index):
    """Of nodules: centres [n, 2] in pixels, (diameter_mm, box_mm) [n, 2]."""
    if source.encoding == "photo":
        raise ValueError(f"{path} names nodules in CT, {source.root} holds photographs; give path,label[,group]")
    names = ("y", "x", "diameter_mm", "box_mm")
    places = np.array([[to_number(row[name]) for name in names] for row in rows])
    size = np.stack([source.rows.columns[name][index] for name in ("rows", "cols")], 1)  # pixels
    side_mm = (size * np.stack([source.rows.columns[f"spacing_{a}"][index] for a in "yx"], 1)).max(1, keepdims=True)
    right = {
        "must be numbers": np.isfinite(places),
        "must lie inside its image": (places[:, :2] >= 0) & (places[:, :2] < size),
        "must be above 0 mm and no larger than its image": (places[:, 2:] > 0) & (places[:, 2:] <= side_mm),
    }
    for (words, good), some in zip(right.items(), (names, names[:2], names[2:])):
        if not good.all():
            k = int((~good).any(1).argmax())
            values = ", ".join(f"{name} {shown(rows[k][name])}" for name in some)
            raise in_row(path, k, f"{values} of {shown(rows[k]['id'])} {words}; correct the row, or leave it out")
    refuse_doubled(path, [f"a nodule at slice {i}, y {y}, x {x}" for i, (y, x) in zip(index, places[:, :2].tolist())])
    return places[:, :2], places[:, 2:]


def read_sizes(path, rows):
    """The ruler of pictures that tell one: diameter and box in mm or pixels [n, 2]; None if they do not."""
    unit = next((unit for unit in ("mm", "px") if f"diameter_{unit}" in rows[0] and f"box_{unit}" in rows[0]), None)
    if unit is None:
        return None
    sizes = np.array([[to_number(row[f"{name}_{unit}"]) for name in ("diameter", "box")] for row in rows])
    if (bad := ~(np.isfinite(sizes) & (sizes > 0)).all(1)).any():
        raise in_row(path, int(bad.argmax()), f"diameter_{unit} and box_{unit} must be numbers above 0; correct them")
    return sizes


def order_classes(labels):
    numbers = all(name.replace(".", "", 1).isdecimal() for name in labels)
    return sorted(set(labels), key=float if numbers else str)


def read_table(path, source):
    """-> Table; refuses unknown columns, unknown images, one class, doubled rows, a group other than the index's."""
    if not path.exists():
        how = "write path,label" if source.encoding == "photo" else "tools/lidc_nodules.py writes such a table"
        raise FileNotFoundError(f"--labels {path} does not exist; {how}")
    rows, nodules = data.read_labels(path, source.root)
    labels = [row["label"].strip() for row in rows]
    classes = order_classes(labels)
    if len(classes) < 2:
        raise ValueError(f"{path}: all {len(rows)} labels are {shown(classes)}; a probe needs two classes")
    ids = [row["id" if nodules else "path"] for row in rows]
    refuse_doubled(path, ids)
    index = find_rows(path, rows, source, nodules)
    patients = source.rows.column("group")[index]
    groups = np.array([row.get("group") or patient for row, patient in zip(rows, patients)])
    pairs = {}
    for k, (patient, group) in enumerate(zip(patients.tolist(), groups.tolist())):
        if pairs.setdefault(patient, group) != group or nodules and patient != group:
            raise in_row(path, k, f"the group of {patient} is {shown(group)}, another than in the index or in the rows "
                         f"above; each of the {'patients' if nodules else 'images'} has one group")  # fmt: skip
    centres, sizes = read_places(path, rows, source, index) if nodules else (None, read_sizes(path, rows))
    codes = {name: k for k, name in enumerate(classes)}
    unit, codes_of = "groups" if source.encoding == "photo" else "patients", np.array([codes[name] for name in labels])
    unit = CROPS if {row.get("unit") for row in rows} == {CROPS} else unit
    return Table(ids, index, codes_of, classes, groups, patients, centres, sizes, unit)


def leave_out(table, source, skip_bad):
    """The table without samples whose file cannot be read."""
    if not skip_bad:
        return table
    good = broken.leave_out(source.take(table.rows), skip_bad)
    return table.take(np.isin(source.rows.columns["path"][table.rows], good.rows.columns["path"]))


def open_samples(source, table, splits, used_by, allow_duplicates):
    """The images of these samples through the door -> (Source, the table with its rows); splits: those of the samples.

    A look is recorded where one of them is in val_test. Without splits.json there is no contract.
    """
    if not splits[0]:
        return source, table
    purposes = [purpose for purpose, split in data.PURPOSES.items() if split in splits]
    chosen = data.open_for(source, purposes, used_by, allow_duplicates=allow_duplicates)
    rows = [source.rows[i] for i in table.rows]
    moved = [find_slice(chosen, row["path"], row.get("z")) for row in rows]
    return chosen, table._replace(rows=np.array(moved))

"""Which samples a classifier is asked about, and its answers: splits of a data folder, or any files and folders.

source = of_data("data/photos", ["val_calib"], facts)              # exporting predictions is no look at val_test
source = of_files(["pictures", "one.jpg"])                         # no labels, no split
for split, asked in samples_of(source, facts).items():        # Samples: ids, rows, groups, labels
    table = answers(classifier, facts, source, asked, split, None, device, batch=96, workers=2)  # None: no labels
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from tools.lib import broken, classifiers, policies, provenance, samples, tables
from tools.lib.cli import shown
from tools.lib.slices import find_slice, slice_name

DEFAULT = ("val_select", "val_calib")  # what is exported of a folder with a split, if nothing else is named


class Samples(NamedTuple):
    ids: list
    rows: np.ndarray  # of the source
    groups: np.ndarray
    labels: np.ndarray  # place in classes; -1: none


def of_files(names):
    """Pictures by name, and those below folders -> Source. Ids: the name as given, or the path below its folder."""
    found, missing = {}, [name for name in names if not os.path.exists(name)]
    if missing or not names:
        many = f"{len(missing)} of {len(names)} do not exist"
        words = f"{many}, first {shown(missing[0], 200)}" if missing else "is empty"
        raise FileNotFoundError(f"--images {words}; name files, folders, or - for names on standard input")
    for name in names:
        if name.encode(errors="ignore").decode() != name:
            raise ValueError(f"--images: the file name {ascii(name)} is not UTF-8; rename the file")
        inside = data.photo_paths(Path(name)) if os.path.isdir(name) else None
        if inside == []:
            raise FileNotFoundError(f"--images {shown(name, 200)} holds no picture ({' '.join(data.PHOTO_ENDINGS)})")
        for some in [name] if inside is None else inside:
            path = os.path.relpath(name if inside is None else os.path.join(name, some), os.path.sep)
            if found.setdefault(some, path) != path:
                raise ValueError(f"--images: two pictures are called {shown(some, 200)}; name the folder above both")
    codes = np.arange(len(found), dtype=np.int32)
    columns = {"path": np.array([path.encode() for path in found.values()]), "group": codes, "series": codes}
    rows = data.Rows(columns, {"group": list(found), "series": list(found)})
    return data.Source(Path(os.path.sep), "photo", rows, None)


def of_data(root, splits, facts):
    """A data folder -> Source; with splits.json only those splits, of which the weights may have seen none.

    No score is computed here, so val_test is not recorded.
    """
    full = data.open_source(root).at_distance(facts["eval_view"].get("neighbour_mm"))
    if not data.split_path(root).exists():
        if splits:
            raise FileNotFoundError(f"--split {splits[0]}: {root} has no split; make one with tools/make_splits.py")
        return full
    names = list(splits or DEFAULT)
    source = data.open_for(full, [p for p, name in data.PURPOSES.items() if name in names], used_by=data.NO_SCORE)
    if splits and (absent := set(splits) - set(source.splits.tolist())):
        raise ValueError(f"{data.split_path(root)} has no image in {min(absent)}")
    for name in sorted({*names} - {"train"}):
        provenance.refuse_leak(facts, source.take(np.flatnonzero(source.splits == name)), name)
    return source


def codes_of(names, ids, classes):
    """Texts -> places in classes, "" -> -1."""
    place = {"": -1, **{name: k for k, name in enumerate(classes)}}
    if odd := [k for k, name in enumerate(names) if name not in place]:
        raise ValueError(f"label {shown(names[odd[0]])} of {shown(ids[odd[0]])} is none of the classes of these "
                         f"weights, {shown(classes)}; correct it, or give the folder to --images")  # fmt: skip
    return np.array([place[name] for name in names], int)


def by_table(source, path, classes):
    """Those samples that a label table names and the source holds."""
    full = data.open_source(source.root)
    table = samples.read_table(path, full)
    if table.centres is not None:
        raise ValueError(f"{path} names nodules; a classifier looks at whole images: give path,label[,group]")
    rows = [find_slice(source, full.rows[i]["path"], full.rows[i].get("z")) for i in table.rows]
    keep = np.array([row is not None for row in rows])
    codes = codes_of([table.classes[k] for k in table.labels], table.ids, classes)
    rows = np.array([row for row in rows if row is not None], int)
    return Samples([table.ids[i] for i in np.flatnonzero(keep)], rows, table.groups[keep], codes[keep])


def samples_of(source, facts, labels=None):
    """{split: Samples}; labels: a table, of which then all samples are; else of photographs labels.csv, where it is."""
    if labels is not None:
        found = by_table(source, labels, facts["classes"])
    else:
        names = source.rows.column("group") if source.index_sha256 is None else None  # ids of loose files
        ids = [slice_name(source, i) for i in range(len(source))] if names is None else names.tolist()
        known = source.encoding == "photo" and "label" in source.rows.columns
        texts = [text.strip() for text in source.rows.texts("label")] if known else [""] * len(ids)
        codes = codes_of(texts, ids, facts["classes"])
        found = Samples(ids, np.arange(len(ids)), source.rows.column("group"), codes)
    if not len(found.rows):
        raise ValueError(f"{labels} names no image of these splits")
    if source.splits is None:
        return {"images" if source.index_sha256 is None else "all": found}
    split_of = source.splits[found.rows]
    parts = {name: np.flatnonzero(split_of == name) for name in data.PURPOSES.values()}
    return {name: Samples([found.ids[i] for i in at], *(part[at] for part in found[1:]))
            for name, at in parts.items() if len(at)}  # fmt: skip


def labels_sha256(source, labels=None):
    """Of the table that samples_of reads, or None."""
    table = labels or source.root / "labels.csv"
    return data.file_sha256(table) if source.index_sha256 is not None and table.exists() else None


def column(source, asked, policy, labels=None):
    """Values [N] of the fact that a policy goes by, from labels.csv or the table of --labels; None: it goes by none."""
    name = policy["column"]
    if name is None:
        return None
    if labels is None and name in source.rows.columns:
        values = source.rows.texts(name)
        return np.array([values[i].strip() or "none" for i in asked.rows])
    if labels is None:
        raise ValueError(f"the policy decides by {shown(name)}: give --data with labels.csv that has this column")
    return policies.column_of(labels, source.root, name, np.array(asked.ids))


def answers(classifier, facts, source, asked, split, labels, device, batch, workers):
    """tables.Predictions of the samples; one broken file ends the program, and then all of them are named."""
    if facts["encoding"] != source.encoding:
        raise ValueError(f"these weights were trained on {facts['encoding']}, the images are {source.encoding}")
    look = facts["layout"], facts["eval_view"], device, batch, workers, split
    with broken.named(source.take(asked.rows)):
        logits = classifiers.logits_of(classifier, source, asked.rows, *look)
    about = classifiers.facts_of(facts, source, split, labels_sha256(source, labels))
    return tables.checked(f"the table of {split}", asked.ids, asked.groups, asked.labels, logits, about)

"""The prediction table: what a model says of each sample. Joined by id, never by position.

runs/<name>/predictions/<split>.npz: ids, groups, labels (-1: none), logits float32 [N, V, C]; beside it .json (classes,
split, layout, eval_view, hashes of weights, split and npz) and .csv for people (id,group,label,p_<class>,decision,set).
write(run / "predictions", Predictions(ids, groups, labels, logits, facts))
table = read(run, "val_calib")          # a run, its predictions folder, or the .npz itself
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import atomic_write, write_text
from data import file_sha256, regular
from tools.lib.cli import shown
from tools.lib.files import csv_text, read_json_file, write_json

VERSION = 1
TEXT = (str, type(None))
FACTS = {"classes": list, "split": str, "layout": TEXT, "eval_view": (dict, type(None))}
FACTS |= {"weights_sha256": TEXT, "split_sha256": TEXT}
REMEDY = "export the predictions again"


class Predictions(NamedTuple):
    ids: np.ndarray  # [N] texts, each once
    groups: np.ndarray  # [N] texts
    labels: np.ndarray  # [N] 0..C-1, -1: none
    logits: np.ndarray  # [N, V, C] float32
    facts: dict  # of the .json; also data and labels_sha256 where they are known

    def take(self, index):
        return self._replace(**{name: getattr(self, name)[index] for name in ("ids", "groups", "labels", "logits")})


def checked(name, ids, groups, labels, logits, facts):
    """-> Predictions; what is wrong is a sentence with the name of the table."""
    ids, groups, labels, logits = np.asarray(ids), np.asarray(groups), np.asarray(labels), np.asarray(logits)
    classes, wrong = facts["classes"], None
    if logits.ndim != 3 or logits.shape[1] < 1 or {a.shape for a in (ids, groups, labels)} != {logits.shape[:1]}:
        wrong = f"logits {logits.shape}, ids {ids.shape}, groups {groups.shape}, labels {labels.shape} do not fit"
    elif not len(ids):
        wrong = "has no samples"
    elif not all(isinstance(c, str) for c in classes) or len(set(classes)) != len(classes) or len(classes) < 2:
        wrong = f"classes {shown(classes)} must be two or more different names"
    elif logits.shape[2] != len(classes):
        wrong = f"has logits of {logits.shape[2]} classes and names {len(classes)}"
    elif ids.dtype.kind != "U" or groups.dtype.kind != "U" or labels.dtype.kind != "i" or logits.dtype.kind != "f":
        wrong = f"holds {ids.dtype}, {groups.dtype}, {labels.dtype}, {logits.dtype}: give texts, integers and floats"
    elif len(np.unique(ids)) < len(ids):
        names, counts = np.unique(ids, return_counts=True)
        wrong = f"names {shown(names[counts.argmax()])} {counts.max()} times; an id stands for one sample"
    elif not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).all((1, 2)))
        first = shown(ids[bad[0]])
        wrong = f"has logits of {len(bad)} samples that are NaN or infinite, first {first}; broken weights?"
    elif labels.min() < -1 or labels.max() >= len(classes):
        wrong = f"has labels from {labels.min()} to {labels.max()}, expected -1 to {len(classes) - 1}"
    if wrong:
        raise ValueError(f"{name} {wrong}")
    return Predictions(ids, groups, labels.astype(np.int64), logits.astype(np.float32), facts)


def write(folder, table):
    """Writes <split>.npz and .json into folder -> path of the npz."""
    table = checked("the table", *table)
    path, buffer = Path(folder) / f"{table.facts['split']}.npz", io.BytesIO()
    np.savez(buffer, ids=table.ids, groups=table.groups, labels=table.labels, logits=table.logits)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda f: f.write(buffer.getvalue()))
    facts = {name: table.facts.get(name) for name in (*FACTS, "data", "labels_sha256")}
    write_json(path.with_suffix(".json"), {"version": VERSION, **facts, "npz_sha256": file_sha256(path)}, indent=1)
    return path


def find(path, split):
    """The npz of a split: in a run, in its predictions folder, or the file itself."""
    path = Path(path)
    places = [path] if path.suffix == ".npz" else [path / "predictions" / f"{split}.npz", path / f"{split}.npz"]
    if there := [place for place in places if place.exists()]:
        return there[0]
    raise FileNotFoundError(f"{places[0]} does not exist; {REMEDY}, of {split}")


def read(path, split="val_calib"):
    """-> Predictions; facts hold the hash of the npz too."""
    path = find(path, split)
    facts = read_json_file(path.with_suffix(".json"), {**FACTS, "npz_sha256": str}, REMEDY, VERSION)
    if (found := file_sha256(regular(path))) != facts["npz_sha256"]:
        raise ValueError(f"{path} is not the file that its .json describes ({found[:12]}); {REMEDY}")
    with np.load(path, allow_pickle=False) as file:
        if lacking := [name for name in Predictions._fields[:4] if name not in file]:
            raise ValueError(f"{path} holds no {lacking[0]}; {REMEDY}")
        return checked(path, *(file[name] for name in Predictions._fields[:4]), facts)


def write_csv(path, table, probabilities, decision=None, sets=None):
    """One row per sample, for people; decision -1: left to others."""
    classes, none = table.facts["classes"], np.full(len(table.ids), "")
    names = np.array([*classes, ""])
    said = none if decision is None else np.where(decision < 0, "left", names[decision])
    held = none if sets is None else [" ".join(c for c, there in zip(classes, row) if there) for row in sets.tolist()]
    cells = [[f"{value:.6g}" for value in column] for column in np.asarray(probabilities).T.tolist()]
    columns = [table.ids.tolist(), table.groups.tolist(), names[table.labels].tolist(), *cells, said, held]
    header = ["id", "group", "label", *(f"p_{c}" for c in classes), "decision", "set"]
    write_text(path, csv_text([header, *zip(*columns)]))

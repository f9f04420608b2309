"""What programs that fit or use a policy have in common: tables joined by id, facts by id, the policy's file."""

import hashlib

import numpy as np

import data
from tools.lib import tables
from tools.lib.cli import shown
from tools.lib.files import read_json_file

FIELDS = {"classes": list, "steps": list, "feasible": bool, "guarantee": str, "column": (str, type(None))}


def read_policy(path):
    policy = read_json_file(path, FIELDS, "fit it again with tools/fit_policy.py", 1)
    fields = {"kind", "method", "parameters"}
    for number, step in enumerate(policy["steps"], 1):
        if not isinstance(step, dict) or not fields <= set(step):
            raise ValueError(f"{path}: step {number} lacks kind, method or parameters; fit it again")
    return policy


def hash_of(hashes):
    """One hash of several; of one it is that one."""
    hashes = list(map(str, hashes))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def aligned(other, path, first, first_path):
    """The table `other` in the order of `first`; both must hold the same samples, classes, labels and split."""
    place = {name: k for k, name in enumerate(other.ids.tolist())}
    if strangers := sorted(set(first.ids.tolist()) ^ set(place)):
        raise ValueError(f"{path} and {first_path} do not hold the same samples: {len(strangers)} are in one, "
                         f"first {shown(strangers[0])}; export both from the same split")  # fmt: skip
    other = other.take([place[name] for name in first.ids.tolist()])
    for name in ("classes", "split", "split_sha256"):
        if other.facts[name] != first.facts[name]:
            has = f"{shown(other.facts[name])}, of {first_path} {shown(first.facts[name])}"
            raise ValueError(f"{path}: {name} is {has}")
    if (other.labels != first.labels).any() or (other.groups != first.groups).any():
        raise ValueError(f"{path}: labels or groups are others than in {first_path}; export both again")
    return other


def load(paths, split):
    """The tables of one or several runs as one: the same samples by id, the views of all runs side by side."""
    loaded = [tables.read(path, split) for path in paths]
    first = loaded[0]
    others = [aligned(other, path, first, paths[0]).logits for path, other in zip(paths[1:], loaded[1:])]
    facts = {name: hash_of(t.facts[name] for t in loaded) for name in ("npz_sha256", "weights_sha256")}
    return first._replace(logits=np.concatenate([first.logits, *others], 1), facts={**first.facts, **facts})


def column_of(labels, root, name, ids):
    """Values [N] of a fact column of a label table, by id; of what the table does not name, an error."""
    if not labels:
        raise ValueError(f"--labels FILE is needed: the table that has the column {name}")
    path = data.find_table(root, labels)
    rows, nodules = data.read_labels(path, root)
    if name not in rows[0]:
        raise ValueError(f"{path} has no column {shown(name)}; it has {', '.join(rows[0])}")
    value_of = {row["id" if nodules else "path"]: row[name].strip() or "none" for row in rows}
    if missing := [i for i in ids.tolist() if i not in value_of]:
        raise ValueError(f"{path} does not name {len(missing)} of the {len(ids)} samples, first {shown(missing[0])}")
    return np.array([value_of[i] for i in ids.tolist()])

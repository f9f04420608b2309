"""What weights were trained on, as salted hashes: they show a leak without naming patients.

The salt is public: who has a list of possible names can try them, so this is no secrecy.

trained = trained_on((args.init,), source, held_out)     # for the checkpoint
exposure = refuse_leak(read_facts(path), held_out, "val_test")
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import file_sha256
from model import is_provenance, read_facts

BORROWED = ("init", "gram_teacher")  # flags of a run that name weights which others trained


def plain_name(text):
    """Names that people would take for one: `P1` and `p1 `, with any spaces around the parts of a path."""
    return "/".join(part.strip().casefold() for part in text.split("/"))


def fingerprint(salt, text):
    """16 hex digits that stand for a name where the name itself must not be told."""
    return hashlib.sha256(f"{salt} {text}".encode()).hexdigest()[:16]


def provenance_of(source, files=False):
    """What a Source is made of; `files`: also by the bytes of each file."""
    salt = source.index_sha256
    used = np.unique(source.series) if source.encoding != "photo" else ()
    hashes = {"groups": [fingerprint(salt, plain_name(g)) for g in source.groups]}
    hashes["series"] = [fingerprint(salt, source.rows.names["series"][code]) for code in used]
    paths = sorted({source.path(i) for i in range(len(source))}) if files else ()
    hashes["files"] = [fingerprint(salt, file_sha256(path)) for path in paths]
    return {"salt": salt, **{key: sorted(set(values)) for key, values in hashes.items()}}


def claimed(facts):
    """{known, seen}: what weights say of their training, by their facts (see model.read_facts).

    Older checkpoints name their groups only; what those that began with other weights had seen, nobody noted.
    """
    if (found := facts.get("provenance")) is not None:
        if not (isinstance(found, dict) and is_provenance(found)):
            raise ValueError("field provenance of the weights is damaged; use another checkpoint of the same run")
        return {"known": found["known"], "seen": found["seen"]}
    groups, args, salt = facts.get("trained_groups"), facts.get("args") or {}, facts.get("index_sha256") or ""
    known = bool(groups) and not any(args.get(flag) for flag in BORROWED)
    hashes = sorted({fingerprint(salt, plain_name(name)) for name in groups or ()})
    return {"known": known, "seen": [{"salt": salt, "groups": hashes}] if groups else []}


class Exposure(NamedTuple):
    """What weights have seen of a Source."""

    groups: list  # sorted names of the groups that they were trained on
    known: bool  # False: they, or those they started from, do not say what they were trained on


def stamp(path):
    """Which files a name stands for at this moment: last.pth of a run that is alive goes to another with each save."""
    path = Path(path)
    stats = [file.stat() for file in ([path] if path.is_file() else sorted(path.glob("*")))]
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]


def refuse_change(path, before):
    """Facts, tensors and sha256 of weights are read one after the other; before: the stamp when that began."""
    if stamp(path) != before:
        raise ValueError(f"{path} changed while it was read; of a run that is alive name one of its step_*.pth")


def rows_named(rows, key, test):
    """Which rows [n] have a name in this column that passes the test."""
    return np.isin(rows.columns[key], [c for c in np.unique(rows.columns[key]) if test(rows.names[key][c])])


def refuse_leak(facts, source, what, allow=False):
    """Compare what weights were trained on with a Source -> Exposure.

    By names of groups, and by hashes of groups, series and files, so that a renamed data set is recognised.
    """
    claim, rows = claimed(facts), source.rows
    clear = {plain_name(group) for group in facts.get("trained_groups") or ()}
    seen = rows_named(rows, "group", lambda name: plain_name(name) in clear)
    for entry in claim["seen"]:
        salt, hashes = entry["salt"], {key: set(entry.get(key) or ()) for key in ("groups", "series", "files")}
        seen |= rows_named(rows, "group", lambda n: fingerprint(salt, plain_name(n)) in hashes["groups"])  # noqa: B023
        seen |= rows_named(rows, "series", lambda n: fingerprint(salt, n) in hashes["series"])  # noqa: B023
        if hashes["files"]:
            same = (fingerprint(salt, file_sha256(source.path(i))) in hashes["files"] for i in range(len(source)))
            seen |= np.fromiter(same, bool, len(source))
    groups = sorted({rows.names["group"][code] for code in rows.columns["group"][seen]})
    if groups and not allow:
        raise ValueError(
            f"leak: {len(groups)} groups of {what} were in the training of these weights ({', '.join(groups[:5])}); "
            "take weights trained under this split (--allow-seen, where a program has it, goes on and says so)"
        )
    return Exposure(groups, claim["known"])


def trained_on(weights, source, held_out):
    """What this run's weights will have seen: its own groups and those behind the weights it is given.

    None of the latter may be held out. weights: paths or None; those that do not say what they were trained on make
    the whole unknown.
    """
    groups, known, seen = {*source.groups}, True, [provenance_of(source)]
    for path in dict.fromkeys(filter(None, weights)):
        facts = read_facts(path)
        if held_out:
            refuse_leak(facts, held_out, f"val_select (the weights are {path})")
        claim = claimed(facts)
        groups |= {*(facts.get("trained_groups") or ())}
        known, seen = known and claim["known"], seen + [entry for entry in claim["seen"] if entry not in seen]
    return {"trained_groups": sorted(groups), "provenance": {"known": known, "seen": seen}}

"""Two bundles on the same pictures: how often they agree and, once labels are there, which one is right more often.

    python tools/predict.py --bundle bundles/old --images inbox --out said/old
    python tools/predict.py --bundle bundles/new --images inbox --out said/new
    python tools/shadow.py --a said/old/images.csv --b said/new/images.csv --labels labels.csv --out said/shadow

In: the CSV files of tools/predict.py, joined by id. Without a policy the likeliest class counts as the decision.
Out: shadow.json, and shadow.csv with both decisions of each picture. --assign 0.1: a tenth of the ids, by a hash of
each, always the same, is served by B; the column `served` then holds what the assigned one decides.
"""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import read_csv, read_labels
from tools.lib.cli import Parser, run, share, shown
from tools.lib.files import csv_cell, csv_text, to_number, write_json
from tools.lib.thresholds import binomial_cdf

LEFT = "left"  # the decision of what is left to others


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--a", required=True, type=Path, help="SPLIT.csv of tools/predict.py with what decides now")
    parser.add_argument("--b", required=True, type=Path, help="the same pictures with what may follow")
    parser.add_argument("--labels", type=Path, help="table path,label by id; default: the labels in --a")
    parser.add_argument("--assign", type=share, help="share of the ids that B serves, by a hash of the id")
    parser.add_argument("--out", required=True, type=Path, help="folder for shadow.json and shadow.csv")
    return parser


def read_said(path):
    """CSV of tools/predict.py -> (classes, {id: (label, decision, probability of the decision)})."""
    header, *pieces = read_csv(path)
    classes = [name[2:] for name in header if name.startswith("p_")]
    if header[:3] != ["id", "group", "label"] or len(classes) < 2 or "decision" not in header:
        raise ValueError(f"{path}: columns {shown(','.join(header))}; name a CSV that tools/predict.py wrote")
    said, place = {}, header.index("decision")
    for row in (row for piece in pieces for row in piece if row):
        p = np.array([to_number(cell) for cell in row[3 : 3 + len(classes)]])
        if len(row) != len(header) or np.isnan(p).any():
            raise ValueError(f"{path}: {shown(','.join(row))} is no row of this table; write it anew")
        decision = row[place] or classes[p.argmax()]
        if row[0] in said:
            raise ValueError(f"{path} names {shown(row[0])} twice; an id stands for one picture")
        said[row[0]] = row[2], decision, p[classes.index(decision)] if decision in classes else math.nan
    if not said:
        raise ValueError(f"{path} names no picture")
    return classes, said


def mcnemar(only_a, only_b):
    """Exact two-sided p of counts as unequal or more, if each side were as likely."""
    n = only_a + only_b
    return min(1.0, 2 * float(binomial_cdf(min(only_a, only_b), n, 0.5))) if n else 1.0


def assigned(name, part):
    """Whether B serves an id: a number in [0, 1) from its hash lies below the share."""
    return int.from_bytes(hashlib.sha256(f"assign {name}".encode()).digest()[:7], "big") / 256**7 < part


def compared(truth, a, b):
    """Paired numbers of decisions of pictures with labels."""
    right_a, right_b = (np.array([d == label for d, label in zip(said, truth)], bool) for said in (a, b))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    found = {"n": len(truth), "right_a": float(right_a.mean()), "right_b": float(right_b.mean())}
    found |= {"only_a": only_a, "only_b": only_b, "difference": found["right_b"] - found["right_a"]}
    return found | {"p": mcnemar(only_a, only_b)}


def read_truth(args, first):
    """{id: label} of what has a label."""
    if args.labels is None:
        return {name: label for name, (label, _, _) in first.items() if label}
    rows, nodules = read_labels(args.labels, args.labels.parent)
    return {csv_cell(row["id" if nodules else "path"]): csv_cell(row["label"].strip()) for row in rows}


def in_words(result):
    text = f"A and B agree on {result['agreement']:.1%} of {result['n']} pictures"
    text += f"; A leaves {result['left_a']:.1%} to others, B {result['left_b']:.1%}."
    if not (paired := result.get("paired")):
        return f"{text} No labels yet."
    words = "B is better" if paired["difference"] > 0 else "A is better"
    words = "the difference may be chance" if paired["p"] >= 0.05 else words
    text += f" Of {paired['n']} with a label A decides {paired['right_a']:.1%} rightly, B {paired['right_b']:.1%} (p "
    return f"{text}{paired['p']:.2g}, McNemar; right alone: A {paired['only_a']}, B {paired['only_b']}): {words}."


def main(argv=None):
    args = build_parser().parse_args(argv)
    (classes, first), (others, second) = read_said(args.a), read_said(args.b)
    if classes != others:
        raise ValueError(f"{args.b} is about classes {shown(others)}, {args.a} about {shown(classes)}")
    if strangers := sorted(first.keys() ^ second.keys()):
        many, name = len(strangers), shown(strangers[0])
        raise ValueError(f"{many} pictures are in one file alone, first {name}; ask both about the same pictures")
    truth, names = read_truth(args, first), list(first)
    if odd := [name for name in names if truth.get(name, classes[0]) not in classes]:
        raise ValueError(f"label {shown(truth[odd[0]])} of {shown(odd[0])} is none of the classes {shown(classes)}")
    a, b = ([said[name][1] for name in names] for said in (first, second))
    same, known = np.array(a) == np.array(b), [k for k, name in enumerate(names) if name in truth]
    apart = [abs(first[name][2] - second[name][2]) for name, equal in zip(names, same) if equal]
    result = {"version": 1, "n": len(names), "agreement": float(same.mean())}
    result |= {"left_a": a.count(LEFT) / len(a), "left_b": b.count(LEFT) / len(b)}
    result["probability_apart"] = float(np.nanmean(apart)) if np.isfinite(apart).any() else None
    if known:
        result["paired"] = compared([truth[names[k]] for k in known], [a[k] for k in known], [b[k] for k in known])
    arms = ["b" if args.assign and assigned(name, args.assign) else "a" for name in names]
    served = [x if arm == "a" else y for x, y, arm in zip(a, b, arms)]
    if args.assign:
        result["assigned_to_b"], result["right_as_served"] = arms.count("b") / len(arms), {}
        for arm in "ab":
            right = [served[k] == truth[names[k]] for k in known if arms[k] == arm]
            result["right_as_served"][arm] = {"n": len(right), "right": float(np.mean(right)) if right else None}
    rows = zip(names, [truth.get(name, "") for name in names], a, b, arms, served)
    write_json(args.out / "shadow.json", result)
    write_text(args.out / "shadow.csv", csv_text([["id", "label", "a", "b", "arm", "served"], *rows]))
    print(f"{in_words(result)}\n{args.out / 'shadow.json'}")
    return 0


if __name__ == "__main__":
    run(main)

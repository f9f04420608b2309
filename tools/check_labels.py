"""Labels to look at again, and labels for pictures that have none, by what a model says that has not seen them.

    python tools/check_labels.py --data data/photos --predictions runs/photos/probe          # of train_probe.py
    python tools/check_labels.py --data data/photos --predictions said/val_select.npz             # of tools/predict.py

Written to --out: suspects.csv and suspects.png, labelled pictures of which an out-of-fold prediction (cross-validation
of train_probe.py, or val_select and val_calib) gives another class --sure or more; nothing is changed, a person
decides. pseudo_labels.csv: pictures without a label of which one class has --sure or more, as rows for labels.csv;
their source is `pseudo`, so that tools/make_splits.py --extend --train-only source=pseudo keeps them in train.
Labels of val_test are not reported: whoever corrects them by a model's errors has looked. Exit code 1: suspects.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np

from checkpoint import write_text
from data import open_source, read_csv
from tools.lib import fusion, sheet, tables
from tools.lib.cli import Parser, natural, run, shown, within
from tools.lib.files import csv_cell, csv_text
from tools.lib.samples import order_classes
from tools.lib.slices import find_slice

TILE, BESIDE = 420, 4  # pixels of a picture on the sheet, pictures in a row
SOURCE = "pseudo"


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--data", required=True, type=Path, help="data folder of the photographs")
    p.add_argument("--predictions", required=True, nargs="+", type=Path, help="folder or predictions.csv of "
                   "train_probe.py with cross-validation, or tables (.npz) of tools/predict.py")  # fmt: skip
    p.add_argument("--out", type=Path, help="folder to write; default: DATA/_validation")
    p.add_argument("--sure", type=within("(0.5, 1]"), default=0.9, help="least probability of another class")
    p.add_argument("--most", type=natural, default=40, help="suspects on the sheet; the CSV has all")
    return p


def from_probe(path):
    """predictions.csv of train_probe.py -> (ids, splits, held out?, labels, probabilities [N, C], classes)."""
    header, *pieces = read_csv(path)
    rows = [dict(zip(header, row)) for piece in pieces for row in piece]
    if not rows or not {"id", "split", "label", "fold_cv0"} <= {*header}:
        raise ValueError(f"{path} has no column fold_cv0: run train_probe.py with --protocol cv")
    rows = [row for row in rows if row["fold_cv0"]]
    classes, repeats = order_classes([row["label"] for row in rows]), sum(name.startswith("fold_cv") for name in header)
    names = [f"score_{c}_cv" for c in classes] if len(classes) > 2 else ["score_cv"]
    p = np.array([[np.mean([float(row[f"{n}{r}"]) for r in range(repeats)]) for n in names] for row in rows])
    p = np.concatenate([1 - p, p], 1) if len(classes) == 2 else p
    labels = np.array([classes.index(row["label"]) for row in rows])
    ids, splits = (np.array([row[name] for row in rows]) for name in ("id", "split"))
    return ids, splits, np.full(len(ids), True), labels, p, classes


def from_table(path):
    """The same of a prediction table, whose pictures are all of one split."""
    table = tables.read(path)
    split = np.full(len(table.ids), table.facts["split"])
    held_out = ~np.isin(split, ("train", "all", "images"))
    return table.ids, split, held_out, table.labels, fusion.probabilities(table.logits), table.facts["classes"]


def read(path):
    path = path / "predictions.csv" if path.is_dir() else path
    return from_probe(path) if path.suffix == ".csv" else from_table(path)


def judge(path, sure):
    """-> rows (probability, id, split, label, said) of suspects, rows (id, said, probability) without a label."""
    ids, splits, held_out, labels, p, classes = read(path)
    said, at = p.argmax(1), np.arange(len(p))
    odd = held_out & (splits != "val_test") & (labels >= 0) & (said != labels) & (p[at, said] >= sure)
    new = (labels < 0) & (splits != "val_test") & (p[at, said] >= sure)
    judged = held_out & (labels >= 0) & (splits != "val_test")
    print(f"{path}: {judged.sum()} labels judged, {odd.sum()} suspects; {(labels < 0).sum()} pictures without a label, "
          f"{new.sum()} of them sure")  # fmt: skip
    if not judged.any() and not (labels < 0).any():
        raise ValueError(f"{path} holds pictures that the model may have learned by heart: give cross-validation, "
                         "val_select or val_calib, or pictures without a label")  # fmt: skip
    suspects = [(float(p[i, said[i]]), str(ids[i]), str(splits[i]), classes[labels[i]], classes[said[i]])
                for i in np.flatnonzero(odd)]  # fmt: skip
    return suspects, [(str(ids[i]), classes[said[i]], float(p[i, said[i]])) for i in np.flatnonzero(new)]


def draw(source, suspects, total, sure):
    """A sheet of suspects, the surest first."""
    tiles = []
    cells = {csv_cell(path): path for path in source.rows.texts("path")}  # predictions.csv names them as cells
    for p, name, split, label, said in suspects:
        i = find_slice(source, cells.get(name, name), None)
        if i is None:
            raise ValueError(f"{shown(name)} of the predictions is not in {source.root}; name their data folder")
        picture = sheet.fit(sheet.picture(source.read(i).numpy()), TILE)
        tiles.append(sheet.titled(picture, [f"labelled {label}, said {said} {p:.3f}", f"{name}, {split}"]))
    rows = [sheet.row(tiles[k : k + BESIDE]) for k in range(0, len(tiles), BESIDE)]
    title = f"{total} labels that a model doubts ({sure:g} or more for another class), the {len(tiles)} surest"
    return sheet.stack([sheet.heading(title, sheet.WIDTH), *rows])


def main(argv=None):
    args = build_parser().parse_args(argv)
    source, out = open_source(args.data), args.out or args.data / "_validation"
    suspects, new = {}, {}
    for path in args.predictions:
        odd, sure = judge(path, args.sure)
        suspects |= {row[1]: max(row, suspects.get(row[1], row)) for row in odd}  # by several models: the surest
        new |= {row[0]: row for row in sure}
    out.mkdir(parents=True, exist_ok=True)
    suspects = sorted(suspects.values(), key=lambda row: (-row[0], row[1]))
    if suspects:
        header = ["id", "split", "label", "said", "probability"]
        lines = [[name, split, label, said, f"{p:.4f}"] for p, name, split, label, said in suspects]
        write_text(out / "suspects.csv", csv_text([header, *lines]))
        sheet.save(out / "suspects.png", draw(source, suspects[: args.most], len(suspects), args.sure))
        print(f"{out / 'suspects.csv'}, {out / 'suspects.png'}: {len(suspects)} labels to look at again")
    if new:
        rows = [[name, said, SOURCE, f"{p:.4f}"] for name, said, p in new.values()]
        write_text(out / "pseudo_labels.csv", csv_text([["path", "label", "source", "probability"], *rows], exact=1))
        counts = ", ".join(f"{shown(c)} {n}" for c, n in sorted(Counter(row[1] for row in rows).items()))
        print(f"{out / 'pseudo_labels.csv'}: {len(rows)} pictures: {counts}")
    return 1 if suspects else 0


if __name__ == "__main__":
    run(main)

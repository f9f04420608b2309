"""Planted wrong labels are found, those of val_test stay unread, pictures without a label get one where it is sure."""

import csv

import numpy as np
import pytest
from PIL import Image

from tools import check_labels
from tools.lib import tables


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for k in range(30):
        Image.new("RGB", (40, 30), (8 * k, 90, 200)).save(root / f"p{k:02d}.png")
    lines = ["path,label", *(f"p{k:02d}.png,{('no', 'yes')[k % 2]}" for k in range(30))]
    (root / "labels.csv").write_text("\n".join(lines))
    return root


def rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def table(folder, split, wrong=(), unlabelled=(), classes=("no", "yes")):
    """A model that is right and 95% sure, save for some."""
    labels, n = np.arange(30) % 2, 30
    said = np.where(np.isin(np.arange(n), wrong), 1 - labels, labels)
    logits = np.zeros((n, 2, len(classes)), np.float32)
    logits[np.arange(n), :, said] = 3
    given = np.where(np.isin(np.arange(n), unlabelled), -1, labels)
    ids = np.array([f"p{k:02d}.png" for k in range(n)])
    facts = {"classes": list(classes), "split": split}
    return tables.write(folder / "said", tables.Predictions(ids, ids, given, logits, facts))


def check(folder, *paths):
    words = ["--data", str(folder), "--out", str(folder.parent / "out"), "--predictions", *map(str, paths)]
    return check_labels.main(words), folder.parent / "out"


def test_suspects_of_held_out_pictures(folder, capsys):
    code, out = check(folder, table(folder, "val_select", wrong=(4, 9)))
    assert code == 1 and "30 labels judged, 2 suspects" in capsys.readouterr().out
    found = {row["id"]: (row["label"], row["said"]) for row in rows(out / "suspects.csv")}
    assert found == {"p04.png": ("no", "yes"), "p09.png": ("yes", "no")}
    sheet = Image.open(out / "suspects.png")
    assert sheet.width > 900 and (np.asarray(sheet)[..., 2] == 200).mean() > 0.2  # the two pictures
    assert not (out / "pseudo_labels.csv").exists()


def test_what_the_model_learned_or_may_not_be_looked_at_is_no_suspect(folder, capsys):
    with pytest.raises(ValueError, match="learned by heart"):
        check(folder, table(folder, "train", wrong=(4,)))
    with pytest.raises(ValueError, match="learned by heart"):
        check(folder, table(folder, "val_test", wrong=(4,)))


def test_pictures_without_a_label(folder):
    code, out = check(folder, table(folder, "train", wrong=(3,), unlabelled=(3, 6)))
    assert code == 0
    found = {row["path"]: (row["label"], row["source"]) for row in rows(out / "pseudo_labels.csv")}
    assert found == {"p03.png": ("no", "pseudo"), "p06.png": ("no", "pseudo")}
    code, out = check(folder, table(folder, "images", unlabelled=range(30)))
    assert len(rows(out / "pseudo_labels.csv")) == 30


@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c")])
def test_cross_validation_of_the_probe(folder, classes):
    """Its CSV as train_probe.py writes it; a picture of val_test with a wrong label is not named."""
    C, lines = len(classes), []
    names = ["score"] if C == 2 else [f"score_{c}" for c in classes]
    lines.append(["id", "group", "split", "label", *(f"{n}_cv{r}" for r in range(2) for n in [*names, "fold"])])
    for k in range(30):
        p = np.full(C, 0.03 / (C - 1))
        p[(k + 1) % C if k in (2, 7, 11) else k % C] = 0.97
        cells = [f"{v:.3f}" for v in (p[1:] if C == 2 else p)] + ["0"]
        split = "val_test" if k == 7 else "train"
        lines.append([f"p{k:02d}.png", f"p{k:02d}.png", split, classes[k % C], *cells, *cells])
    path = folder.parent / "probe.npz" / "predictions.csv"  # the name of a folder says nothing
    path.parent.mkdir()
    path.write_text("\n".join(",".join(line) for line in lines))
    code, out = check(folder, path.parent)
    assert code == 1 and [row["id"] for row in rows(out / "suspects.csv")] == ["p02.png", "p11.png"]
    assert [row["said"] for row in rows(out / "suspects.csv")] == [classes[3 % C], classes[12 % C]]
    path.write_text("\n".join(",".join(cell for cell in line[:4]) for line in lines))
    with pytest.raises(ValueError, match="run train_probe.py with --protocol cv"):
        check(folder, path)

"""tools/predict.py: any folder, file or list of names becomes the same table; splits are contracts here too."""

import io
import json
import shutil

import numpy as np
import pytest
from test_classifiers import make_classifier, pictures

from data import split_path
from tools import make_splits, predict
from tools.lib import asking, tables

SPLITS = ("train", "val_select", "val_calib", "val_test")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 labelled pictures and their split."""
    root = pictures(tmp_path_factory.mktemp("photos") / "photos", 60)
    lines = ["path,label,weather", *(f"{k}.jpg,{('no', 'yes')[k % 3 == 0]},{('dry', 'wet')[k % 2]}" for k in range(60))]
    (root / "labels.csv").write_text("\n".join(lines))
    assert make_splits.main(["--data", str(root), "--min-per-class", "1"]) == 0
    return root


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pth"
    make_classifier(path, layout="whole")
    return path


def say(ckpt, out, *words):
    assert predict.main(["--ckpt", str(ckpt), "--out", str(out), *map(str, words)]) == 0


def test_splits_are_exported_with_labels_and_val_test_is_not_looked_at(photos, ckpt, tmp_path, capsys):
    say(ckpt, tmp_path / "default", "--data", photos)
    assert sorted(p.name for p in (tmp_path / "default").iterdir()) == [
        f"{s}.{e}" for s in ("val_calib", "val_select") for e in ("csv", "json", "npz")
    ]
    say(ckpt, tmp_path / "all", "--data", photos, "--split", *SPLITS)
    found = {split: tables.read(tmp_path / "all", split) for split in SPLITS}
    of = json.loads(split_path(photos).read_text())["groups"]
    for split, table in found.items():
        assert sorted(table.ids.tolist()) == sorted(name for name, there in of.items() if there == split)
        assert table.labels.tolist() == [int(int(name[:-4]) % 3 == 0) for name in table.ids]
        assert (table.facts["split"], table.facts["layout"], table.facts["data"]) == (split, "whole", str(photos))
        assert len(table.facts["split_sha256"]) == len(table.facts["labels_sha256"]) == 64
    again = tables.read(tmp_path / "default", "val_calib")
    assert (again.logits == found["val_calib"].logits).all()
    assert not split_path(photos, "test_uses.jsonl").exists()
    assert "val_test.npz (.json, .csv): 6 samples, 6 with a label, 1 views each" in capsys.readouterr().out


def test_files_folders_and_names_on_standard_input_say_the_same(photos, ckpt, tmp_path, monkeypatch):
    say(ckpt, tmp_path / "folder", "--images", photos)
    folder = tables.read(tmp_path / "folder" / "images.npz")
    assert len(folder.ids) == 60 and (folder.labels == -1).all() and folder.facts["split_sha256"] is None
    assert folder.facts["data"] is None
    names = [str(photos / "3.jpg"), str(photos / "1.jpg")]
    say(ckpt, tmp_path / "files", "--images", *names)
    files = tables.read(tmp_path / "files" / "images.npz")
    assert files.ids.tolist() == names
    rows = [folder.ids.tolist().index(name) for name in ("3.jpg", "1.jpg")]
    np.testing.assert_allclose(files.logits, folder.logits[rows], rtol=0, atol=1e-6)
    monkeypatch.chdir(photos)
    monkeypatch.setattr("sys.stdin", io.StringIO("3.jpg\n\n1.jpg\n"))
    say(ckpt, tmp_path / "stdin", "--images", "-", "--batch-size", 1)
    stdin = tables.read(tmp_path / "stdin" / "images.npz")
    assert stdin.ids.tolist() == ["3.jpg", "1.jpg"]
    np.testing.assert_allclose(stdin.logits, files.logits, rtol=0, atol=1e-6)
    lines = (tmp_path / "stdin" / "images.csv").read_text().splitlines()
    assert lines[0] == "id,group,label,p_no,p_yes,decision,set" and lines[1].startswith("3.jpg,3.jpg,,0.")


def test_decisions_are_counted():
    words = predict.counted(np.array([0, 2, -1, 0, -1, 0]), ["no", "un\nsure", "yes"])
    assert words == "decided: 3 no, 0 un\\nsure, 1 yes, 2 left to others"


def test_a_folder_without_a_split_and_one_without_labels(ckpt, tmp_path):
    root = pictures(tmp_path / "photos", 5)
    say(ckpt, tmp_path / "out", "--data", root)
    table = tables.read(tmp_path / "out" / "all.npz")
    assert len(table.ids) == 5 and (table.labels == -1).all() and table.facts["labels_sha256"] is None
    (root / "more.csv").write_text("path,label\n2.jpg,yes\n0.jpg,no\n")
    say(ckpt, tmp_path / "some", "--data", root, "--labels", "more.csv", "--layout", "centre:flip=1")
    some = tables.read(tmp_path / "some" / "all.npz")
    assert some.ids.tolist() == ["2.jpg", "0.jpg"] and some.labels.tolist() == [1, 0]
    assert some.logits.shape == (2, 2, 2) and some.facts["layout"] == "centre:flip=1"


def refused(ckpt, out, words, text):
    with pytest.raises((ValueError, OSError), match=text):
        predict.main(["--ckpt", str(ckpt), "--out", str(out), *map(str, words)])
    assert not out.exists()


def test_what_cannot_be_is_a_sentence(photos, ckpt, tmp_path, monkeypatch):
    out = tmp_path / "out"
    refused(ckpt, out, ["--images", photos / "no.jpg"], "1 of 1 do not exist, first .*no.jpg")
    refused(ckpt, out, ["--images", photos, "--split", "train"], "--split and --labels belong to --data")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    refused(ckpt, out, ["--images", "-"], "--images is empty")
    (tmp_path / "empty").mkdir()
    refused(ckpt, out, ["--images", tmp_path / "empty"], "holds no picture")
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    refused(ckpt, out, ["--images", photos, other], "two pictures are called 0.jpg")
    (other / "7.jpg").write_bytes(b"no picture")
    refused(ckpt, out, ["--images", other], "7.jpg cannot be read")
    assert predict.main(["--ckpt", str(ckpt), "--images", str(other), "--out", str(out), "--skip-bad", "1"]) == 0
    assert len(tables.read(out / "images.npz").ids) == 59
    shutil.rmtree(out)
    (other / "labels.csv").write_text("path,label\n0.jpg,perhaps\n")
    shutil.rmtree(other / "_splits")
    refused(ckpt, out, ["--data", other], "label perhaps of 0.jpg is none of the classes")
    refused(ckpt, out, ["--data", other, "--split", "val_calib"], "has no split")


def test_weights_that_have_seen_a_sample_do_not_speak_of_its_split(photos, ckpt, tmp_path):
    of = json.loads(split_path(photos).read_text())["groups"]
    seen = next(name for name, split in of.items() if split == "val_calib")
    make_classifier(tmp_path / "seen.pth", trained_groups=[seen])
    words = ["--data", photos, "--split", "val_calib"]
    refused(tmp_path / "seen.pth", tmp_path / "out", words, f"leak: 1 groups of val_calib .*{seen}")
    say(tmp_path / "seen.pth", tmp_path / "train", "--data", photos, "--split", "train")


def test_weights_of_ct_are_not_shown_photographs(photos, ckpt, tmp_path):
    view = {"size": 32, "window": [-150, 1500]}
    make_classifier(tmp_path / "ct.pth", encoding="hu16-v1", eval_view=view, layout=None)
    refused(tmp_path / "ct.pth", tmp_path / "out", ["--images", photos], "trained on hu16-v1, the images are photo")


def test_no_other_file_opens_val_test_without_a_record(photos):
    source = asking.of_data(photos, ["val_test"], {"eval_view": {}})
    assert set(source.splits.tolist()) == {"val_test"} and not split_path(photos, "test_uses.jsonl").exists()

"""Classifiers from disk: EMA weights, merged adapters, logits that do not depend on neighbours, honest exports."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_ct, photo

import checkpoint
import data
import model
from tools.lib import classifiers, features, tables

SIZES = [(60, 80), (80, 60), (64, 64), (40, 120), (200, 150), (33, 47), (96, 96)]


def pictures(root, count=7):
    """Photographs of different shapes, and one that EXIF turns."""
    root.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(count):
        image = Image.fromarray(photo(i, SIZES[i % len(SIZES)]).permute(1, 2, 0).numpy())
        image.save(root / f"{i}.jpg", quality=95, **({"exif": exif} if i == 1 else {}))
    return root


def make_classifier(path, classes=("no", "yes"), pool="both", layers=1, adapters=None, layout="tiles", size=32, **more):
    """A supervised checkpoint as train_probe.py writes it, of weights that were never trained; returns the EMA net."""
    torch.manual_seed(0)
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        vit = model.build_vit("vit_test", layerscale=0.5)
        if adapters:
            model.add_adapters(vit, **adapters)
        head = model.Head(vit.dim * layers * (2 if pool == "both" else 1), len(classes))
        net = model.Classifier(vit, head, pool, layers)
        for p in net.parameters():
            torch.nn.init.normal_(p, 0.0, 0.2) if p.ndim == 1 else p.data.add_(torch.randn_like(p) * 0.1)
        nets.append(net)
    state = {"step": 5, "images": 40, "args": {}, "arch": vit.arch, "encoding": "photo", "optimizer": {}, "gram": None}
    state |= {"student": checkpoint.pack_weights(nets[0]), "teacher": checkpoint.pack_weights(nets[1])}
    state |= {"eval_view": data.eval_view("photo", size), "classes": list(classes), "pool": pool, "layers": layers}
    state |= {"layout": layout, "labels_sha256": "l" * 64, "best": {"step": 5, "value": 0.4}, "split_sha256": None}
    state |= {"trained_groups": [], "provenance": {"known": True, "seen": []}, "index_sha256": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {**state, **more})
    return nets[1].eval()


ADAPTERS = dict(rank=2, alpha=4, norm="dora", targets="qv")


@pytest.mark.parametrize("pool, layers, adapters", [("cls", 1, None), ("mean", 1, ADAPTERS), ("both", 2, ADAPTERS)])
def test_the_ema_weights_are_read_and_merged(tmp_path, pool, layers, adapters):
    net = make_classifier(tmp_path / "best.pth", ("a", "b", "c"), pool, layers, adapters)
    found, facts = classifiers.read_classifier(tmp_path / "best.pth")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(images), net(images), rtol=0, atol=1e-5)
    assert not model.adapted_layers(found) and not found.training
    assert not any(p.requires_grad for p in found.parameters())
    assert facts["classes"] == ["a", "b", "c"] and facts["best"] == {"step": 5, "value": 0.4}
    assert facts["sha256"] == data.file_sha256(tmp_path / "best.pth") and "teacher" not in facts


@pytest.mark.parametrize(
    "change, words",
    [
        ({"classes": ["a", "a"]}, "must be two or more different names"),
        ({"classes": ["a", "b", "c"]}, "its head is not one of 3 classes"),
        ({"pool": "max"}, "pool 'max'"),
        ({"pool": "cls"}, "features, not 64"),
        ({"layers": 99}, "layers is 99, its backbone has"),
        ({"layout": "star"}, "no 'star'; known are"),
        ({"eval_view": {"size": 33, "window": None}}, "views of 33 pixels"),
    ],
)
def test_a_damaged_field_is_a_sentence_that_names_the_file(tmp_path, change, words):
    make_classifier(tmp_path / "best.pth")
    checkpoint.save(tmp_path / "best.pth", {**checkpoint.load(tmp_path / "best.pth"), **change})
    with pytest.raises(ValueError, match="best.pth") as error:
        classifiers.read_classifier(tmp_path / "best.pth")
    assert words in str(error.value)


def test_a_pretraining_checkpoint_is_no_classifier(tmp_path):
    make_classifier(tmp_path / "best.pth")
    state = checkpoint.load(tmp_path / "best.pth")
    del state["classes"]
    checkpoint.save(tmp_path / "last.pth", state)
    with pytest.raises(ValueError, match="last.pth is no classifier"):
        classifiers.read_classifier(tmp_path / "last.pth")
    checkpoint.save(
        tmp_path / "last.pth",
        {**state, "classes": ["a", "b"], "teacher": {**state["student"], "head.last_layer.bias": torch.zeros(3)}},
    )
    with pytest.raises(ValueError, match="its head is not one of 2 classes"):
        classifiers.read_classifier(tmp_path / "last.pth")


@pytest.mark.parametrize("layout", [None, "whole", "tiles", "tiles_and_squares:flip=1"])
def test_batched_is_one_by_one(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(features, "VALUES", 20_000)  # some are rendered together, some alone
    source = data.open_source(pictures(tmp_path / "photos"))
    make_classifier(tmp_path / "best.pth", ("a", "b", "c"))
    net, facts = classifiers.read_classifier(tmp_path / "best.pth")
    many = classifiers.logits_of(net, source, range(7), layout, facts["eval_view"], batch=16)
    views = {None: 1, "whole": 1, "tiles": 10, "tiles_and_squares:flip=1": 24}[layout]
    assert many.shape == (7, views, 3) and many.dtype == np.float32 and np.ptp(many, 0).min() > 1e-3
    for i in range(7):
        one = classifiers.logits_of(net, source, [i], layout, facts["eval_view"], batch=1, workers=1)
        np.testing.assert_allclose(one[0], many[i], rtol=0, atol=1e-6)
    again = classifiers.logits_of(net, source, [3, 0], layout, facts["eval_view"], batch=5, workers=3)
    np.testing.assert_allclose(again, many[[3, 0]], rtol=0, atol=1e-6)


def test_views_are_those_of_the_layout_cut_from_the_whole_picture(tmp_path):
    source = data.open_source(pictures(tmp_path / "photos", 3))
    view = data.eval_view("photo", 32)
    views = classifiers.views_of(source, [1], "tiles:flip=1", view, "cpu")[0]
    image = source.read(1)[None]
    boxes, flips = data.view_boxes([image.shape[2:]], "tiles:flip=1")
    torch.testing.assert_close(views, data.render_views(image, view, boxes, flips)[:, 0])
    torch.testing.assert_close(views[10:], views[:10].flip(-1), rtol=0, atol=1e-4)


def test_slices_are_looked_at_as_by_the_probe(tmp_path):
    source = data.open_source(make_ct(tmp_path / "ct"))
    view = data.eval_view(source.encoding, 32)
    views = classifiers.views_of(source, [5], None, view, "cpu")[0, 0]
    boxes = data.eval_boxes([source.size(5)], [source.body(5)])
    torch.testing.assert_close(views, data.render_eval(source.read(5)[None], view, boxes)[0])


FACTS = {"classes": ["no", "yes"], "split": "val_select", "layout": "whole", "eval_view": None, "weights_sha256": "w",
         "split_sha256": None}  # fmt: skip


def test_an_export_is_a_table_and_a_csv(tmp_path):
    logits = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    ids = [f"=p{k}" for k in range(5)]
    path = classifiers.export(tmp_path, ids, ["g"] * 5, [0, 1, -1, 1, 0], logits, FACTS)
    table = tables.read(path)
    assert (table.logits == logits).all() and table.ids.tolist() == ids and table.labels.tolist() == [0, 1, -1, 1, 0]
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "id,group,label,p_no,p_yes,decision,set" and lines[3].startswith("'=p2,g,,0.")
    p = torch.tensor(logits).mean(1).softmax(-1).numpy()
    assert [float(line.split(",")[4]) for line in lines[1:]] == pytest.approx(p[:, 1].tolist(), rel=1e-5)
    assert json.loads(path.with_suffix(".json").read_text())["classes"] == ["no", "yes"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"logits": np.ones((5, 1, 2), np.float32)}, "the logits of all 5 samples are the same"),
        ({"logits": np.full((5, 1, 2), np.nan, np.float32)}, "NaN or infinite"),
        ({"facts": {**FACTS, "classes": ["yes"]}, "logits": np.ones((5, 1, 1), np.float32)}, "two or more different"),
        ({"ids": ["a"] * 5}, "names a 5 times"),
    ],
)
def test_what_says_nothing_is_not_exported(tmp_path, change, words):
    logits = np.random.default_rng(0).normal(size=(5, 1, 2)).astype(np.float32)
    parts = dict(ids=list("abcde"), groups=["g"] * 5, labels=[0] * 5, logits=logits, facts=FACTS)
    with pytest.raises(ValueError, match=words):
        classifiers.export(tmp_path / "out", **{**parts, **change})
    assert not (tmp_path / "out").exists()

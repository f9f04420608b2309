"""The frozen baseline: fitted on train, chosen on val_select, and a classifier that other programs read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_classifiers import make_classifier
from test_data import photo

import data
import model
import train_probe
from tools import make_splits, predict
from tools.lib import baseline, classifiers, fits, tables


def bright_or_dark(root, count=120):
    """Pictures whose label their red channel tells, most of the time."""
    root.mkdir(parents=True)
    random, lines = np.random.default_rng(0), ["path,label"]
    for k in range(count):
        image, label = photo(k, (40, 52)), int(random.random() < 0.5)
        image[0] = (image[0] * (0.4 if label else 0.8) + random.uniform(0, 40)).clamp(0, 255)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"{k}.png")
        lines.append(f"{k}.png,{('bright', 'dark')[label]}")
    (root / "labels.csv").write_text("\n".join(lines))
    assert make_splits.main(["--data", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return bright_or_dark(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    vit = model.build_vit("vit_test", layerscale=0.5).eval()
    state, _ = model.state_to_hf(vit)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(state, path)
    return path, vit


def fitted(photos, vit, out, *words):
    flags = ["--ckpt", vit[0], "--data", photos, "--labels", "labels.csv", "--out", out, "--protocol", "select"]
    assert train_probe.main(list(map(str, [*flags, "--size", 32, "--device", "cpu", "--batch-size", 16, *words]))) == 0
    return json.loads((out / "results.json").read_text())


def test_it_learns_and_predict_says_what_it_exported(photos, vit, tmp_path):
    result = fitted(photos, vit, tmp_path / "run", "--views", "tiles:rows=2,cols=2")
    assert result["select"]["mcc"] > 0.5 and result["k-NN"]["auc"] > 0.5
    assert result["C"] in fits.PATH and result["k"] in fits.KS and result["fitted_on"] == ["train"]
    words = ["--ckpt", str(tmp_path / "run" / "best.pth"), "--data", str(photos), "--out", str(tmp_path / "said")]
    assert predict.main(words) == 0
    for split in ("val_select", "val_calib"):
        own, said = tables.read(tmp_path / "run", split), tables.read(tmp_path / "said", split)
        order = [said.ids.tolist().index(name) for name in own.ids]
        np.testing.assert_allclose(own.logits, said.logits[order], rtol=0, atol=2e-5)
        assert own.logits.shape[1] == 5 and (own.labels == said.labels[order]).all()
        keys = ("classes", "layout", "eval_view", "weights_sha256", "split_sha256", "split")
        assert [own.facts[key] for key in keys] == [said.facts[key] for key in keys]
    table = tables.read(tmp_path / "run", "val_select")
    p = torch.tensor(table.logits).mean(1).log_softmax(1).numpy()
    nll = -p[np.arange(len(p)), table.labels].mean()
    assert nll == pytest.approx(result["select"]["nll"], abs=1e-5)


@pytest.mark.slow
def test_a_refit_has_seen_val_select_and_says_nothing_of_it(photos, vit, tmp_path):
    once = fitted(photos, vit, tmp_path / "once")
    again = fitted(photos, vit, tmp_path / "again", "--protocol", "refit")
    assert once["C"] == again["C"] and once["select"] == again["select"]
    assert sorted(p.name for p in (tmp_path / "again" / "predictions").glob("*.npz")) == ["val_calib.npz"]
    net, facts = classifiers.read_classifier(tmp_path / "again" / "best.pth")
    first = classifiers.read_classifier(tmp_path / "once" / "best.pth")[0].head.last_layer.weight
    moved = (net.head.last_layer.weight - first).norm() / first.norm()
    assert 0.01 < moved < 1  # other samples, the same C: another fit, not far away
    of = json.loads(data.split_path(photos).read_text())["groups"]
    assert facts["trained_groups"] == sorted(name for name, split in of.items() if split in ("train", "val_select"))
    words = ["--data", str(photos), "--split", "val_select", "--out", str(tmp_path / "said")]
    with pytest.raises(ValueError, match="leak: .* groups of val_select"):
        predict.main(["--ckpt", str(tmp_path / "again" / "best.pth"), *words])
    assert predict.main(["--ckpt", str(tmp_path / "once" / "best.pth"), *words]) == 0


def test_tiles_of_nodules_and_weights_that_saw_what_is_held_out_are_refused(photos, vit, tmp_path):
    of = json.loads(data.split_path(photos).read_text())["groups"]
    seen = next(name for name, split in of.items() if split == "val_calib")
    make_classifier(tmp_path / "seen.pth", trained_groups=[seen])
    with pytest.raises(ValueError, match="leak: 1 groups of the held-out splits"):
        fitted(photos, (tmp_path / "seen.pth", None), tmp_path / "run")
    args = SimpleNamespace(ckpt=vit[0], protocol="select", views="tiles")
    with pytest.raises(ValueError, match="--views tiles: nodules.csv names nodules, which are cropped"):
        baseline.choose(args, None, "nodules.csv", SimpleNamespace(centres=1), None)


def test_neighbours_are_chosen_by_the_loss_on_val_select():
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 300)
    X = random.normal(size=(300, 8)) + y[:, None]
    fit = np.arange(300) < 200
    log_p, k = baseline.nearest(X, y, fit, ~fit, 2)
    assert log_p.shape == (100, 2) and k > 1 and np.exp(log_p).sum(1) == pytest.approx(np.ones(100))
    assert (log_p.argmax(1) == y[~fit]).mean() > 0.8


def test_the_program_fits_it_and_leaves_val_test_alone(photos, vit, tmp_path, capsys):
    words = ["--ckpt", str(vit[0]), "--data", str(photos), "--labels", "labels.csv", "--size", "32"]
    flags = ["--out", str(tmp_path / "run"), "--protocol", "select", "--views", "tiles:rows=2,cols=2"]
    assert train_probe.main([*words, *flags]) == 0
    said = capsys.readouterr().out
    assert "linear probe, chosen on 18 samples of val_select: mcc" in said and "k-NN, chosen on 18" in said
    assert not (photos / "_splits" / "test_uses.jsonl").exists()
    table = tables.read(tmp_path / "run", "val_calib")
    assert table.logits.shape[1] == 5 and not (tmp_path / "run" / "predictions" / "val_test.npz").exists()
    with pytest.raises(ValueError, match="--views is for training"):
        train_probe.main([*words, *flags[:2], *flags[4:]])

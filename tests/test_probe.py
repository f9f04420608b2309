"""The probe is honest: exact fits, crops where the nodule is, no leak, no number without its ruler."""

import csv
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_split, write_index

import checkpoint
import data
import train_probe as t
from data import NODULE
from model import build_vit
from tools.lib import metrics

torch.set_num_threads(1)

# classifiers


def newton(X, y, C, classes, steps=15):
    """Brute force: full Newton steps on 1/2 |w|^2 + C * sum of log losses, bias free -> probabilities of every row."""
    outputs = 1 if classes == 2 else classes
    d = X.shape[1]
    A = np.concatenate([X, np.ones((len(X), 1))], 1)

    def objective(theta):
        logits = torch.as_tensor(A) @ theta.view(d + 1, outputs)
        logits = torch.cat([torch.zeros_like(logits), logits], 1) if outputs == 1 else logits
        loss = -logits.log_softmax(1)[torch.arange(len(y)), torch.as_tensor(y)].sum()
        return C * loss + theta.view(d + 1, outputs)[:-1].square().sum() / 2

    theta = torch.zeros((d + 1) * outputs, dtype=torch.float64)
    for _ in range(steps):
        hessian = torch.autograd.functional.hessian(objective, theta)
        gradient = torch.autograd.functional.jacobian(objective, theta)
        theta = theta - torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]  # several biases: one is free
    logits = A @ theta.view(d + 1, outputs).numpy()
    logits = np.concatenate([np.zeros_like(logits), logits], 1) if outputs == 1 else logits
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("classes, d", [(2, 5), (2, 60), (3, 4)])
def test_logistic_regression_is_the_minimum_that_newton_finds(classes, d):
    """Also with more features than rows; scaled and shifted columns, a constant one, rows that are not fitted."""
    random = np.random.default_rng(0)
    X = random.normal(size=(48, d)) * random.uniform(0.1, 10, d) + random.normal(size=d)
    y = (X[:, 0] / X[:, 0].std() + random.normal(size=48) > 0).astype(int) + (random.random(48) < 0.3) * (classes - 2)
    X[:, -1] = 7.0
    masks = np.stack([random.random(48) < 0.7 for _ in range(2)])
    tensors = [torch.as_tensor(a) for a in (np.stack([X] * 2), masks, y)]
    found = t.logistic(*t.decompose(*tensors[:2]), tensors[1], tensors[2], classes).exp().numpy()
    for b, mask in enumerate(masks):
        scaled = (X - X[mask].mean(0)) / np.where(X[mask].std(0) > 1e-9, X[mask].std(0), np.inf)
        for c, C in list(enumerate(t.CS))[b::2]:
            p = newton(scaled[mask], y[mask], C, classes)
            np.testing.assert_allclose(found[c, b][mask], p, atol=5e-4)
    assert np.abs(found[0] - found[-1]).max() > 0.2


def test_neighbours_match_a_loop():
    random = np.random.default_rng(1)
    X, y = random.normal(size=(30, 6)), random.integers(0, 3, 30)
    mask = np.arange(30) < 20
    args = [torch.as_tensor(a) for a in (X[None], mask[None], y)]
    found = t.nearest(*t.decompose(*args[:2]), args[1], args[2], 3).exp()[:, 0]
    scaled = (X - X[mask].mean(0)) / X[mask].std(0)
    for i in range(20, 30):
        cosine = [scaled[i] @ scaled[j] / np.linalg.norm(scaled[i]) / np.linalg.norm(scaled[j]) for j in range(20)]
        order = np.argsort(cosine)[::-1]
        for k, p in zip(t.KS, found[:, i]):
            k = min(k, 20)
            votes = [(sum(y[order[:k]] == c) + np.mean(y[:20] == c)) / (k + 1) for c in range(3)]
            np.testing.assert_allclose(p, votes, atol=1e-9)


def grouped(seed, n=120, per=2, shift=1.5):
    """Features with one informative direction, labels, patients of `per` samples."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n)
    X = random.normal(size=(n, 12))
    X[:, 0] += shift * y
    return X, y, np.array([f"p{i // per}" for i in range(n)])


@pytest.mark.parametrize("seed", range(4))
def test_folds_keep_patients_whole_and_classes_even(seed):
    random = np.random.default_rng(seed)
    y, groups = random.integers(0, 2, 150), random.integers(0, 60, 150).astype(str)
    folds = t.group_folds(y, groups, 5, seed)
    assert all(len(set(folds[groups == g])) == 1 for g in groups) and set(folds) == set(range(5))
    for k in range(5):
        assert abs((y[folds == k] == 1).sum() - y.sum() / 5) <= 3 and abs((folds == k).sum() - 30) <= 5
    assert (folds != t.group_folds(y, groups, 5, seed + 1)).any()


def test_nothing_about_held_out_rows_reaches_a_fit_or_its_choice():
    X, y, groups = grouped(0)
    fold = t.group_folds(y, groups, 4, 0)
    masks = np.stack([fold != 0, fold != 1])
    before, chosen = t.choose(t.logistic, X, y, groups, masks, 3)
    other, moved = y.copy(), X.copy()
    other[fold == 0] = 1 - other[fold == 0]
    moved[fold == 0] += 100 * np.random.default_rng(1).normal(size=(sum(fold == 0), 12))
    after, chosen_after = t.choose(t.logistic, moved, other, groups, masks[:1], 3)
    assert chosen[0] == chosen_after[0]
    np.testing.assert_allclose(before[0][fold != 0], after[0][fold != 0], atol=1e-4)
    flipped, _ = t.choose(t.logistic, X, other, groups, masks[:1], 3)
    np.testing.assert_allclose(before[0], flipped[0], atol=1e-4)  # their own scores too do not know their labels


def test_training_rows_get_scores_of_folds_that_held_them_out():
    """On noise the fit itself ranks its rows far above chance; what a second stage sees must not."""
    X, y, groups = grouped(1, shift=0.0)
    X = np.concatenate([X, np.random.default_rng(0).normal(size=(120, 300))], 1)
    log_p, _ = t.choose(t.logistic, X, y, groups, np.ones((1, 120), bool), 0)
    args = [torch.as_tensor(a) for a in (X[None], np.ones((1, 120), bool), y)]
    fitted = t.logistic(*t.decompose(*args[:2]), args[1], args[2], 2)
    assert metrics.auc(y, fitted[-1, 0, :, 1].numpy()) > 0.95 and metrics.auc(y, log_p[0, :, 1]) < 0.65


def test_a_patient_cannot_be_on_both_sides_and_too_few_are_refused():
    y, groups = np.array([0, 0, 1, 1]), np.array(["a", "a", "a", "b"])
    with pytest.raises(ValueError, match="at least 2 of each class"):
        t.group_folds(y, groups, 2, 0)


# planted labels: what only size knows, what only texture knows


def simulate(seed, kind, folds=1, patients=110, n_train=60):
    """Features that see size and texture through noise, labels planted on one of them -> judgement of held-out ones."""
    random = np.random.default_rng(seed)
    n = 2 * (patients + n_train)
    groups, sizes = np.array([f"p{i // 2}" for i in range(n)]), np.exp(random.normal(2.4, 0.4, n))
    size, texture = (np.log(sizes) - 2.4) / 0.4, random.normal(size=n)
    signal = size if kind == "size" else texture
    y = (signal + 0.7 * random.normal(size=n) > 0).astype(int)
    mix = random.normal(size=(2, 30))
    X = np.stack([size, texture], 1) @ mix + 1.5 * random.normal(size=(n, 30))
    test = (np.arange(n) >= 2 * n_train)[None]
    predictors = {"probe": (t.logistic, [X]), "size": (t.ruler, [np.log(sizes)[:, None]])}
    if folds > 1:
        fold = t.group_folds(y, groups, folds, seed)
        test = np.stack([fold == k for k in range(folds)])
    p, _ = t.held_out(predictors, y, groups, [(~test, test)])
    keep = test.any(0)
    p = {name: q[:, keep] for name, q in p.items()}
    return metrics.judge(y[keep], groups[keep], p, test[:, keep].argmax(0)[None], sizes[keep], repeats=400)


@pytest.mark.slow
@pytest.mark.parametrize("folds", [1, 5])
def test_a_label_of_size_alone_never_makes_the_backbone_better_than_the_ruler(folds):
    """20 seeds: probe minus size never proven above 0; size + features minus size contains 0 in at least 18."""
    results = [simulate(seed, "size", folds) for seed in range(20)]
    assert all(r["differences"]["probe - size"]["low"] <= 0 for r in results)
    both = [r["differences"]["size + features - size"] for r in results]
    assert sum(d["low"] <= 0 <= d["high"] for d in both) >= 18
    assert np.mean([r["predictors"]["size"]["auc"]["value"] for r in results]) > 0.85
    assert abs(np.mean([r["matched"]["size"]["value"] for r in results]) - 0.5) < 0.1


@pytest.mark.parametrize("folds", [1, 5])
def test_a_label_of_texture_alone_leaves_the_ruler_at_chance_and_the_probe_above(folds):
    for seed in range(3):
        r = simulate(seed, "texture", folds)
        auc = {name: item["auc"]["value"] for name, item in r["predictors"].items()}
        assert abs(auc["size"] - 0.5) < 0.12 and auc["probe"] > 0.7
        assert r["differences"]["probe - size"]["low"] > 0 and r["differences"]["size + features - size"]["low"] > 0
        assert r["matched"]["probe"]["value"] > 0.7 and all(line["probe"]["value"] > 0.6 for line in r["terciles"])


# crops and features


def ramp(root, spacing=0.7, size=64, slices=6):
    """A processed folder of one series whose HU tell z, y and x: 100 z + y + x / 100 would not fit, so y + 100 z."""
    (root / "toy").mkdir(parents=True)
    z, y, x = np.mgrid[:slices, :size, :size]
    np.save(root / "toy" / "1.2.0.npy", (100 * z + y - 300).astype(np.int16))
    lines = [
        ["toy/1.2.0.npy", "hu16-v1", "toy", "P0", "s0", "1.2.0", f"1.2.0.{k}", k, k * 2.0, spacing, spacing, 2.0, size,
         size, 0, size, 0, size]
        for k in range(1, slices - 1)
    ]  # fmt: skip
    write_index(root, lines)
    return data.open_source(root)


def table_of(centre, box_mm, row=1):
    ids, rows, text = ["a"], np.array([row]), np.array(["toy/P0"])
    return t.Table(ids, rows, np.array([0]), ["0", "1"], text, text, np.array([centre]), np.array([[box_mm, box_mm]]))


@pytest.mark.parametrize("spacing", [0.5, 0.7, 1.3])
def test_a_crop_has_its_side_in_millimetres_and_three_true_neighbours(tmp_path, spacing):
    source = ramp(tmp_path, spacing)
    table = table_of((30.3, 33.8), 8.0)
    pixels, boxes, inside = t.read_sample(source, table, 0, (10.0, 20.0), 4)
    assert np.allclose((boxes[:, 2:] - boxes[:, :2]) * spacing, [[10, 10], [20, 20]])
    low = np.array([30.3, 33.8]) - 20 / spacing / 2
    corner = np.floor(np.floor(low))  # the first pixel that was kept
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + corner
    assert np.abs(centres - (30.3, 33.8)).max() <= 1  # crops start on a pixel
    assert np.array_equal(pixels[1] - pixels[0], np.full_like(pixels[0], 100)) and (pixels[2] - pixels[1] == 100).all()
    assert pixels[1, 0, 0] == 100 * 2 + corner[0] - 300  # row 1 of the index is z = 2
    whole = source.read(1)
    for k, box in enumerate(boxes):  # the patch weights, patch by patch
        side = (box[2] - box[0]) / 4
        for i in range(16):
            cy, cx = (box[a] + corner[a] + (divmod(i, 4)[a] + 0.5) * side for a in (0, 1))
            reach = max(4.0 / spacing, side / 2)
            hit = abs(cy - 30.3) <= reach + 1e-6 and abs(cx - 33.8) <= reach + 1e-6
            assert (inside[k, i] > 0) == hit
        assert inside[k].sum() == pytest.approx(1)
    assert whole.shape == (3, 64, 64)


def test_a_nodule_at_the_border_keeps_its_patch_and_a_small_image_its_crop(tmp_path):
    source = ramp(tmp_path)
    for centre in ((0.0, 0.0), (63.0, 1.0), (32.0, 63.4)):
        pixels, boxes, inside = t.read_sample(source, table_of(centre, 3.0), 0, (20.0, 500.0), 8)
        assert (inside > 0).any(1).all() and (boxes >= 0).all() and (boxes[:, 2:] <= pixels.shape[1:]).all()


def test_features_are_those_of_the_forward_one_by_one(tmp_path):
    source = ramp(tmp_path)
    table = t.Table(list("abcde"), np.array([0, 1, 2, 3, 1]), np.array([0, 1, 0, 1, 0]), ["0", "1"],
                    *[np.array(["toy/P0"] * 5)] * 2, np.random.default_rng(0).uniform(10, 50, (5, 2)),
                    np.full((5, 2), 9.0))  # fmt: skip
    vit = build_vit("vit_test", layerscale=1.0).eval()
    view = data.eval_view("hu16-v1", 32)
    features, pixels = t.extract(vit, source, table, t.Recipe(view, (12.0, 24.0), 5, 2), "cpu", "x")
    assert features.shape == (5, 2, 3, 64) and pixels.shape == (5, 2, 3 * 16 * 16)
    for k in range(5):
        image, boxes, inside = t.read_sample(source, table, k, (12.0, 24.0), 2)
        for s in range(2):
            x = data.render_eval(image[None], view, boxes[s : s + 1])
            tokens = vit(x)
            box = (tokens.patches[0] * torch.from_numpy(inside[s])[:, None]).sum(0)
            expected = torch.stack([tokens.cls[0], tokens.patches[0].mean(0), box])
            np.testing.assert_allclose(features[k, s], expected.detach().numpy(), atol=1e-5)
            np.testing.assert_allclose(pixels[k, s], torch.nn.functional.avg_pool2d(x, 2).flatten(), atol=1e-5)
    assert t.flatten(features, "average", [0, 2]).shape == (5, 128)
    np.testing.assert_allclose(t.flatten(features, "concat", [0])[0], features[0, :, 0].ravel())


def test_the_cache_holds_until_weights_images_or_recipe_change(tmp_path):
    source = ramp(tmp_path / "data")
    table, recipe = table_of((30, 30), 5.0), t.Recipe(data.eval_view("hu16-v1", 32), (12.0,), 4, 1)
    made = []

    def make():
        made.append(1)
        return np.full((1, 1, 3, 4), len(made), np.float32), np.zeros((1, 1, 768), np.float32)

    def ask(weights="w", recipe=recipe, table=table):
        return t.cached(tmp_path / "cache", weights, t.images_sha256(source, table, recipe), make)[0].max()

    assert ask() == 1 and ask() == 1
    assert ask(weights="other") == 2
    assert ask(recipe=recipe._replace(crop_mm=(13.0,))) == 3 and ask(recipe=recipe._replace(batch=9, workers=3)) == 1
    assert ask(table=table_of((30, 31), 5.0)) == 4
    for path in (tmp_path / "cache").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-30])
    assert ask() == 5  # a damaged file is extracted again
    volume = tmp_path / "data" / "toy" / "1.2.0.npy"
    np.save(volume, np.load(volume) + 1)
    assert ask() == 6


# the program


def make_nodules(root, patients=36, informative="texture", seed=0):
    """A processed folder: one series per patient with two nodules, bright where the label is 1 -> rows of the table."""
    random = np.random.default_rng(seed)
    (root / "toy").mkdir(parents=True)
    lines, rows = [], []
    for p in range(patients):
        hu = random.normal(-800, 40, (5, 48, 48))
        name = f"1.2.{p}"
        for k, (y, x) in enumerate(((14, 14), (32, 33))):
            label, mm = int(random.random() < 0.5), random.uniform(6, 14)
            z, yy, xx = np.mgrid[:5, :48, :48]
            ball = (yy - y) ** 2 + (xx - x) ** 2 < (mm / 2) ** 2
            hu[ball] = (-100 if informative == "texture" and label else -500) + random.normal(0, 60, ball.sum())
            path = f"toy/{name}.npy"
            rows.append([f"{name}_{k}", path, 2, y, x, label, f"toy/P{p}", f"{mm:.2f}", f"{mm:.2f}"])
        np.save(root / "toy" / f"{name}.npy", hu.astype(np.int16))
        ids = [f"toy/{name}.npy", "hu16-v1", "toy", f"P{p}", f"s{p}", name]
        lines += [[*ids, f"{name}.{z}", z, z * 2.0, 1.0, 1.0, 2.0, 48, 48, 0, 48, 0, 48] for z in range(1, 4)]
    write_index(root, lines)
    write_table(root / "_labels" / "malignancy.csv", rows)
    return rows


def write_table(path, rows, header=NODULE):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def make_checkpoint(path, trained, encoding="hu16-v1", **overrides):
    torch.manual_seed(0)
    vit = build_vit("vit_test", layerscale=0.5)
    state = {f"backbone.{k}": v for k, v in vit.state_dict().items()}
    view = data.eval_view(encoding, 32)
    facts = dict(step=7, images=70, arch=vit.arch, encoding=encoding, eval_view=view, trained_groups=trained)
    checkpoint.save(path, facts | dict(student=state, teacher=state, split_sha256=None) | overrides)
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder with data, a split of 14 / 22 patients, and weights that were trained on the 14."""
    root = tmp_path_factory.mktemp("study")
    rows = make_nodules(root / "data")
    splits = {f"toy/P{p}": "train" if p < 14 else "val_test" for p in range(36)}
    make_split(root / "data", splits)
    make_checkpoint(root / "w.pth", [g for g, s in splits.items() if s == "train"])
    return root, rows


QUICK = "--crop-mm 16,24 --seeds 2 --bootstrap 100 --workers 1 --device cpu".split()


def probe(root, out, *flags, ckpt="w.pth", labels="_labels/malignancy.csv"):
    argv = ["--ckpt", str(root / ckpt), "--data", str(root / "data"), "--labels", str(labels), "--out", str(out)]
    assert t.main([*argv, *QUICK, *flags]) == 0
    return json.loads((out / "results.json").read_text())


def test_the_whole_report(study, tmp_path, capsys):
    root, rows = study
    result = probe(root, tmp_path / "probe")
    said = capsys.readouterr().out
    names = {"probe", "k-NN", "random weights", "raw pixels", "size", "diameter", "box", "size + features"}
    for protocol, patients in (("test", 22), ("cv", 22)):
        judged = result[protocol]
        assert judged["patients"] == patients and set(judged["predictors"]) == names
        assert judged["seen_in_pretraining"] == [] and t.SEEN not in judged["title"]
        assert judged["verdict"] in said and sum(judged["balance"].values()) == judged["samples"] == 44
        assert {"probe - size", "size + features - size", "probe - random weights"} <= set(judged["differences"])
        assert judged["matched"]["pairs"] > 0 and len(judged["terciles"]) == 3
        auc = judged["predictors"]["probe"]["auc"]
        assert auc["low"] <= auc["value"] <= auc["high"] and auc["value"] > 0.85  # the bright ones
        assert judged["differences"]["probe - size"]["low"] > 0
    assert "spread over repeats" in said
    assert result["test"]["label_efficiency"]["shares"] == [0.1, 0.2, 0.5, 1.0]
    assert result["labels"]["sha256"] == data.file_sha256(root / "data" / "_labels" / "malignancy.csv")
    assert result["split_sha256"] == data.file_sha256(root / "data" / "_splits" / "splits.json")
    assert result["weights"]["sha256"] == data.file_sha256(root / "w.pth")

    with open(tmp_path / "probe" / "predictions.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert [(r["id"], r["patient"], r["label"]) for r in table] == [(r[0], r[6], str(r[5])) for r in rows]
    tested = [r for r in table if r["split"] == "val_test"]
    labels = np.array([int(r["label"]) for r in tested])
    aucs = [metrics.auc(labels, np.array([float(r[f"score_test{k}"]) for r in tested])) for k in range(2)]
    assert np.mean(aucs) == pytest.approx(result["test"]["predictors"]["probe"]["auc"]["value"], abs=1e-6)
    assert all(r["score_test0"] == "" for r in table if r["split"] == "train")
    for k in range(5):
        scores, folds = (np.array([float(r[f"{name}_cv{k}"]) for r in tested]) for name in ("score", "fold"))
        assert len({(r["patient"], f) for r, f in zip(tested, folds)}) == 22 and set(folds) == set(range(5))
        assert metrics.auc(labels, scores, folds=folds) > 0.8

    page = (tmp_path / "probe" / "report.html").read_text()
    assert page.count("<svg") >= 9 and "<script" not in page and "http" not in page.replace("http-equiv", "")
    for title in ("ROC", "Precision and recall", "Reliability", "Score and size", "Label efficiency"):
        assert title in page
    cache = list((tmp_path / "features").glob("*.npz"))
    assert len(cache) == 3  # the probe's and two random ones
    before = [path.stat().st_mtime_ns for path in cache]
    again = probe(root, tmp_path / "second", "--protocol", "test")
    assert [path.stat().st_mtime_ns for path in cache] == before and "cv" not in again
    assert again["test"]["predictors"] == result["test"]["predictors"]


def test_a_leaked_patient_is_refused_or_named_in_every_title(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(t, "REPEATS", 2)
    root, _ = study
    make_checkpoint(root / "leaky.pth", [f"toy/P{p}" for p in (0, 1, 20, 30)])
    with pytest.raises(ValueError, match="leak: 2 patients of val_test .*toy/P20, toy/P30.*--allow-seen"):
        probe(root, tmp_path / "a", ckpt="leaky.pth")
    assert not (tmp_path / "a").exists()
    result = probe(root, tmp_path / "b", "--allow-seen", "--seeds", "1", ckpt="leaky.pth")
    assert result["test"]["seen_in_pretraining"] == ["toy/P20", "toy/P30"] and result["cv"]["patients"] == 36
    assert len(result["cv"]["seen_in_pretraining"]) == 4
    page = (tmp_path / "b" / "report.html").read_text()
    for name in ("test", "cv"):
        assert t.SEEN in result[name]["title"] and result[name]["title"] in page
    assert t.SEEN in result["verdict"] and t.SEEN in capsys.readouterr().out
    clean = probe(root, tmp_path / "c", "--protocol", "cv", "--seeds", "1", ckpt="leaky.pth")
    assert clean["cv"]["patients"] == 32 and clean["cv"]["seen_in_pretraining"] == []


def change(rows, column, value, at=slice(None)):
    rows = [list(row) for row in rows]
    for row in rows[at]:
        row[column] = value
    return rows


REFUSED = {
    "all 72 labels are .*needs two classes": lambda rows: (change(rows, 5, 1), NODULE),
    "unknown columns id,path,zz": lambda rows: (rows, ["id", "path", "zz", *NODULE[3:]]),
    "unknown columns path,label,colour": lambda rows: ([[r[1], r[5], "x"] for r in rows], ["path", "label", "colour"]),
    "2 images are not in .*toy/nowhere.npy": lambda rows: (
        change(change(rows, 1, "toy/nowhere.npy", slice(3)), 1, "toy/9.npy", slice(3, 5)),
        NODULE,
    ),
    "1 images are not in .*z 40": lambda rows: (change(rows, 2, 40, slice(1)), NODULE),
    "1 ids appear twice": lambda rows: (change(rows, 0, "same", slice(2)), NODULE),
    "the group of toy/P0": lambda rows: (change(rows, 6, "toy/P1", slice(2)), NODULE),
    "no label": lambda rows: (change(rows, 5, " ", slice(1)), NODULE),
    "outside its image": lambda rows: (change(rows, 3, 480, slice(1)), NODULE),
    "no size above 0": lambda rows: (change(rows, 7, -1, slice(1)), NODULE),
    "must be numbers": lambda rows: (change(rows, 8, "wide", slice(1)), NODULE),
    "one-class labels: val_test has no sample of class 1": lambda rows: (change(rows, 5, 0, slice(28, 72)), NODULE),
    "one-class labels: train has no sample of class 0": lambda rows: (change(rows, 5, 1, slice(28)), NODULE),
}


@pytest.mark.parametrize("message", REFUSED)
def test_labels_that_cannot_be_judged_are_refused(study, tmp_path, message):
    root, rows = study
    rows, header = REFUSED[message](rows)
    write_table(tmp_path / "l" / "labels.csv", rows, header)
    with pytest.raises(ValueError, match=message):
        probe(root, tmp_path / "probe", labels=tmp_path / "l" / "labels.csv")
    assert not (tmp_path / "probe").exists()


def test_weights_that_cannot_be_judged_are_refused(study, tmp_path, monkeypatch):
    root, _ = study
    make_checkpoint(root / "rgb.pth", [], encoding="rgb-v1")
    with pytest.raises(ValueError, match="trained on rgb-v1, --data is hu16-v1"):
        probe(root, tmp_path / "a", ckpt="rgb.pth")
    state = checkpoint.load(root / "w.pth")
    teacher = dict(state["teacher"])
    teacher["backbone.norm.bias"] = torch.full((64,), float("nan"))
    checkpoint.save(root / "nan.pth", state | {"teacher": teacher})
    with pytest.raises(ValueError, match="features of 72 samples are NaN"):
        probe(root, tmp_path / "b", ckpt="nan.pth")
    teacher["backbone.norm.bias"], teacher["backbone.norm.weight"] = torch.zeros(64), torch.zeros(64)
    checkpoint.save(root / "dead.pth", state | {"teacher": teacher})
    with pytest.raises(ValueError, match="predictions are constant"):
        probe(root, tmp_path / "c", ckpt="dead.pth")
    with pytest.raises(ValueError, match="patch size"):
        probe(root, tmp_path / "d", "--size", "40")
    with pytest.raises(FileNotFoundError, match="does not exist; tools/lidc_nodules.py"):
        probe(root, tmp_path / "e", labels="nowhere.csv")
    with pytest.raises(SystemExit):
        probe(root, tmp_path / "f", "--crop-mm", "0,3")


def test_no_split_is_an_error_and_cross_validation_does_without(tmp_path, capsys):
    make_nodules(tmp_path / "data", patients=12)
    make_checkpoint(tmp_path / "w.pth", ["toy/P0"])
    with pytest.raises(FileNotFoundError, match="make_splits.py"):
        probe(tmp_path, tmp_path / "a")
    result = probe(tmp_path, tmp_path / "b", "--protocol", "cv", "--seeds", "1")
    assert result["cv"]["patients"] == 11 and result["split_sha256"] is None
    make_checkpoint(tmp_path / "all.pth", [f"toy/P{p}" for p in range(12)])
    with pytest.raises(ValueError, match="no cross-validation.*--allow-seen"):
        probe(tmp_path, tmp_path / "c", "--protocol", "cv", ckpt="all.pth")


def test_several_classes_over_photographs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(t, "REPEATS", 2)
    random, rows = np.random.default_rng(0), []
    (tmp_path / "data").mkdir()
    for i in range(42):
        image = np.full((40 + i % 3, 50, 3), 40, np.uint8) + random.integers(0, 40, (40 + i % 3, 50, 3), np.uint8)
        image[:, :, i % 3] += 120
        Image.fromarray(image).save(tmp_path / "data" / f"{i}.png")
        rows.append([f"{i}.png", ("red", "green", "blue")[i % 3], f"g{i // 2}"])
    write_table(tmp_path / "data" / "labels.csv", rows, ["path", "label", "group"])
    splits = {f"g{g}": "train" if g < 9 else "val_test" for g in range(21)}
    (tmp_path / "data" / "_splits").mkdir()
    source = data.open_source(tmp_path / "data")
    contract = {"version": 1, "groups": splits, "index_sha256": source.index_sha256}
    (tmp_path / "data" / "_splits" / "splits.json").write_text(json.dumps(contract))
    make_checkpoint(tmp_path / "w.pth", ["elsewhere"])  # weights of CT: the photographs' own view is used
    result = probe(tmp_path, tmp_path / "probe", "--seeds", "1", labels="labels.csv")
    assert result["labels"]["classes"] == ["blue", "green", "red"] and result["recipe"]["view"]["window"] is None
    for name in ("test", "cv"):
        found = result[name]["predictors"]
        assert found["probe"]["auc"]["value"] > 0.95 and found["probe"]["accuracy"]["value"] > 0.8
        assert found["probe"]["mcc"]["value"] > 0.7 and "size" not in found and "matched" not in result[name]
    assert result["test"]["balance"] == {"blue": 8, "green": 8, "red": 8}
    assert "by class {'blue': 14, 'green': 14, 'red': 14}" in capsys.readouterr().out
    with open(tmp_path / "probe" / "predictions.csv", newline="") as f:
        assert {"score_red_test0", "score_blue_cv1", "fold_cv0"} <= set(next(csv.reader(f)))


@pytest.mark.slow
def test_extraction_keeps_up_with_the_forward(tmp_path):
    """ViT-S at 224 pixels on one core: reading and cutting may cost 10% of the pure forward."""
    make_nodules(tmp_path / "data", patients=4)
    source = data.open_source(tmp_path / "data")
    table = t.read_table(tmp_path / "data" / "_labels" / "malignancy.csv", source)
    vit, recipe = build_vit("vit_small").eval(), t.Recipe(data.eval_view("hu16-v1", 224), (16.0, 24.0, 32.0), 12, 2)
    views, _ = t.make_views(source, table, range(4), recipe, 14, "cpu")
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(2):
                vit(views)
        middle = time.perf_counter()
        t.extract(vit, source, table, recipe, "cpu", "x")
        ratios.append((time.perf_counter() - middle) / (middle - start))
    assert min(ratios) < 1.1, ratios

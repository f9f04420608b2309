"""Claims about training the fusion of views: what it reads, that it learns in seconds, that what is served is it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import photo
from torch.nn import functional as F

import checkpoint
import data
import losses
import train_probe
from model import build_vit
from tools import fit_policy, make_splits, predict
from tools.lib import arms, classifiers, fuse, fused, fusion, tables, view_sheet
from tools.lib.fusion import Fusion


def ce(logits, targets, progress):
    return losses.soft_cross_entropy(logits, targets)


def street(root, n=8, facts=True):
    """n pictures of different sizes with labels.csv; every fourth lacks its place, every third its weather."""
    rows = []
    for k in range(n):
        Image.fromarray(photo(k, (90 + 6 * k, 120)).permute(1, 2, 0).numpy()).save(root / f"{k:02d}.png")
        place = ["", ""] if k % 4 == 0 else [f"{50 + k / 10}", f"{10 - k}"]
        weather = "" if k % 3 == 0 else ["rain", "clear"][k % 2]
        rows.append([f"{k:02d}.png", ["a", "b"][k % 2], *place, weather, f"word{k % 2} here"])
    header = ["path", "label", "lat", "lon", "weather", "text"] if facts else ["path", "label"]
    with open(root / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows([header, *(row[: len(header)] for row in rows)])
    return data.open_source(root)


def test_facts_come_from_labels_csv_and_what_is_not_there_is_missing(tmp_path):
    source = street(tmp_path)
    fields = fused.read_fields(source, ["gps", "weather", "text"])
    assert fields == {"gps": "gps", "weather": ["clear", "rain"], "text": "text"}
    facts = fused.facts_at(source, np.arange(8), fields)
    assert facts["weather"].tolist() == [-1, 0, 1, -1, 1, 0, -1, 0]
    assert facts["gps"].isnan().any(1).tolist() == [True, False, False, False] * 2
    assert facts["gps"][3].tolist() == pytest.approx([50.3, 7]) and facts["text"][1].any()
    moved = fused.facts_at(source, [5, 2], fields)
    assert all(torch.equal(moved[name], facts[name][[5, 2]]) for name in fields)
    other = tmp_path / "other"
    other.mkdir()
    alone = fused.facts_at(street(other, 3, facts=False), np.arange(3), fields)  # pictures of which nothing is known
    assert alone["gps"].isnan().all() and (alone["weather"] == -1).all() and (alone["text"] == 0).all()
    with pytest.raises(ValueError, match="no column daytime for daytime; its facts are .*lat, lon, weather, text"):
        fused.read_fields(source, ["daytime"])
    assert np.isnan(fused.degrees("91", 90)) and np.isnan(fused.degrees("x", 90)) and fused.degrees("-90", 90) == -90


def test_options_are_those_of_fusion_and_of_training():
    switches, more = fuse.read_options("fusion:keep=8,experts=4,metadata=gps+weather,pyramid=true")
    assert more == {"metadata": "gps+weather", "weather": "", "drop": 0.3, "prescore": 0}
    assert switches["keep"] == 8 and switches["pyramid"] is True
    Fusion(16, 2, **(switches | {"weather": 3}))
    for text, words in (("fusion:keep=-1", "keep is -1"), ("fusion:heads=0", "from 1 to"),
                        ("fusion:depth=1.5", "whole number"), ("fusion:kep=8", "no option kep"),
                        ("fusion:keep=x", "keep is x"), ("fusion:drop=1", "drop")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            fuse.read_options(text)


def test_masks_become_shares_of_patches(tmp_path):
    codes = np.zeros((80, 100), np.uint8)
    codes[8:40, 75:100] = 2
    codes[60, 10] = 1
    Image.fromarray(codes).save(tmp_path / "m.png")
    boxes, flips = np.array([[0, 0, 80, 100], [0, 50, 40, 100], [0, 0, 80, 100]]), [False, False, True]
    shares = fused.mask_shares(tmp_path / "m.png", boxes, flips, 4, 3)
    assert shares.shape == (3, 16, 3)
    grid = shares.reshape(3, 4, 4, 3)
    want = [[(codes[r * 20 : r * 20 + 20, c * 25 : c * 25 + 25] == 2).mean() for c in range(4)] for r in range(4)]
    np.testing.assert_allclose(grid[0, :, :, 1], want, atol=1e-6)
    np.testing.assert_array_equal(grid[2], grid[0][:, ::-1])
    assert grid[0, 3, 0, 0] == pytest.approx(1 / 500) and (grid[..., 2] == 0).all()
    assert grid[1, 3, 3, 1] == 1 and grid[1, 0, 0, 1] == 0  # a tile has a grid of its own
    assert (fused.mask_shares(tmp_path / "none.png", boxes, flips, 4, 3) == 0).all()


def planted(n, seed, V=6, D=8):
    """One view of each positive picture shows it; the others are noise."""
    random = torch.Generator().manual_seed(seed)
    views, labels = torch.randn(n, V, D, generator=random), torch.arange(n) % 2
    at = torch.randint(V, (n,), generator=random)
    views[torch.arange(n), at, 0] += 6.0 * labels
    return fuse.Set(views, labels), at


def test_training_finds_the_view_that_decides_and_is_a_function_of_the_seed():
    (train, _), (select, _), (held, at) = planted(300, 0), planted(120, 1), planted(200, 2)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, story = fuse.fit(Fusion(8, 2), train, select, ce, seed, steps=100, lr=0.02)
        found.append((model, story))
    assert found[0][1] == found[1][1] != found[2][1]
    for a, b in zip(found[0][0].parameters(), found[1][0].parameters()):
        assert torch.equal(a, b)
    model, story = found[0]
    best = min(loss for _, loss, _ in story)
    assert fuse.look(model, select)[0] == pytest.approx(best)  # the weights are those of the lowest loss, not the last
    with torch.no_grad():
        out = model(held.views)
    right = (out.logits.argmax(1) == held.labels).float().mean()
    positive = held.labels == 1
    assert right > 0.9 and (out.weights.argmax(1) == at)[positive].float().mean() > 0.9
    mean, _ = fuse.fit(Fusion(8, 2, pool="mean"), train, select, ce, 0, steps=100, lr=0.02)
    with torch.no_grad():
        assert (mean(held.views).logits.argmax(1) == held.labels).float().mean() < right - 0.05


def test_the_whole_view_chooses_the_views_that_are_worth_the_backbone():
    """Each positive picture shows something in one patch of the whole view, and in the tile that covers it."""
    n, random = 240, torch.Generator().manual_seed(0)
    regions = fuse.cover("tiles:overlap=0", 6)
    assert (regions.sum(1) == torch.tensor([36] + [4] * 9)).all() and (regions[1:].sum(0) == 1).all()
    assert (fuse.cover("tiles", 6).sum(0) >= 2).all()
    patches, views = torch.randn(n, 36, 8, generator=random), torch.randn(n, 10, 8, generator=random)
    labels, spot = torch.arange(n) % 2, torch.randint(36, (n,), generator=random)
    tile = regions[1:, spot].argmax(0) + 1
    patches[torch.arange(n), spot, 0] += 8.0 * labels
    views[torch.arange(n), tile, 0] += 6.0 * labels
    train, test = torch.arange(160), torch.arange(160, 240)
    sets = [fuse.Set(views[rows], labels[rows]) for rows in (train, test)]
    torch.manual_seed(0)
    model, _ = fuse.fit(Fusion(8, 2), *sets, ce, 0, steps=80, lr=0.02)
    scorer = fusion.Prescore(8, 2, 10, 36)
    with torch.no_grad():
        scorer.regions.copy_(regions)
    fuse.fit_prescore(scorer, model, sets[0], patches[train], 0, steps=80, lr=0.01)
    with torch.no_grad():
        chosen = scorer.choose(patches[test])
    assert chosen.shape == (80, 3) and (chosen[:, 0] == 0).all() and (chosen.diff(dim=1) > 0).all()
    there = (chosen == tile[test, None]).any(1)[labels[test] == 1].float().mean()
    assert there > 0.9, there  # by chance 0.22
    some = sets[1]._replace(views=sets[1].views[torch.arange(80)[:, None], chosen])
    assert fuse.look(model, some)[1] > fuse.look(model, sets[1])[1] - 0.1


def test_what_is_served_is_the_backbone_and_the_fusion_of_its_views(tmp_path):
    source = street(tmp_path)
    torch.manual_seed(0)
    vit, fields = build_vit("vit_test").eval(), fused.read_fields(source, ["gps", "weather"])
    head = fused.build(vit.dim, 2, {"keep": 7, "depth": 1}, fields).eval()
    net, view = fused.FusedClassifier(vit, head, "mean", 1, fields), data.eval_view("photo", 32)
    logits = classifiers.logits_of(net, source, np.arange(8), "tiles", view, batch=7, workers=1)
    assert logits.shape == (8, 1, 2)  # one view: pools and policies have nothing left to pool
    head.prescore = fusion.Prescore(vit.dim, 3, 10, 4)
    with torch.no_grad():
        head.prescore.regions.copy_(fuse.cover("tiles", 2))
    few = classifiers.logits_of(net, source, np.arange(8), "tiles", view, batch=20, workers=1)
    for k in range(8):
        views = classifiers.views_of(source, [k], "tiles", view, "cpu")[0]
        with torch.no_grad():
            tokens = vit(views)
            chosen = head.prescore.choose(tokens.patches[:1])[0]
            x = tokens.patches.mean(1)[None, chosen]
            alone = head(x, fused.facts_at(source, [k], fields)).logits
        torch.testing.assert_close(torch.from_numpy(few[k]), alone, atol=1e-5, rtol=1e-5)
    seen = view_sheet.look(net, {"layout": "tiles", "eval_view": view}, source, 7, "cpu")
    assert seen.kept.nonzero()[0].tolist() == chosen.tolist() == seen.weights.nonzero()[0].tolist()
    np.testing.assert_allclose(np.log(seen.together[1] / seen.together[0]), few[7, 0, 1] - few[7, 0, 0], atol=1e-4)
    one = head(vit(views).patches.mean(1)[4:5, None], fused.facts_at(source, [7], fields)).logits[0]
    np.testing.assert_allclose(seen.alone[4], one.softmax(0).detach(), atol=1e-5)
    head.prescore = None
    for k in range(8):
        views = classifiers.views_of(source, [k], "tiles", view, "cpu")[0]
        with torch.no_grad():
            x = vit(views).patches.mean(1)[None]
            alone = head(x, fused.facts_at(source, [k], fields)).logits
        torch.testing.assert_close(torch.from_numpy(logits[k]), alone, atol=1e-5, rtol=1e-5)
    net.requires_grad_(True)
    out = net(classifiers.views_of(source, [1, 2], "tiles", view, "cpu"), fused.facts_at(source, [1, 2], fields))
    F.cross_entropy(out.logits, torch.tensor([0, 1])).backward()  # end to end
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="for 64 features, both of 1 layers has 128"):
        fused.FusedClassifier(vit, head, "both", 1)


# ----- as a user types it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run on noise with a small orange or blue square, and masks of the squares."""
    top = tmp_path_factory.mktemp("fuse")
    root, random, rows = top / "data", np.random.default_rng(0), []
    (root / "_labels" / "masks").mkdir(parents=True)
    for i in range(96):
        pixels, codes = random.normal(128, 30, (48, 64, 3)), np.zeros((48, 64), np.uint8)
        y, x = random.integers(0, 36), random.integers(0, 52)
        pixels[y : y + 12, x : x + 12] += (90 if i % 2 else -90) * np.array([1, 0.3, -1])
        codes[y : y + 12, x : x + 12] = 1 + i % 2
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i:02d}.png")
        Image.fromarray(codes).save(root / "_labels" / "masks" / f"{i:02d}.png")
        rows.append([f"{i:02d}.png", ["no", "yes"][i % 2], ["", "rain", "clear"][i % 3], "day" if i % 4 else ""])
    with open(root / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows([["path", "label", "weather", "daytime"], *rows])
    assert make_splits.main(["--data", str(root)]) == 0
    torch.manual_seed(1)
    torch.save(build_vit("vit_test", layerscale=0.5).state_dict(), top / "w.pth")
    return top


def tune(run, out, options, *more):
    words = f"--size 32 --steps 40 --batch-size 16 --eval-every 10 --workers 0 --device cpu --tune {options}".split()
    where = ["--data", str(run / "data"), "--labels", "labels.csv", "--ckpt", str(run / "w.pth"), "--out", str(out)]
    return train_probe.main([*where, *words, *more])


EVERYTHING = ("fusion:width=16,keep=4,pyramid=true,depth=1,experts=2,consistency=true,metadata=daytime,weather=weather,"
              "masks=2,hidden=8,prescore=3")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options, more", [
    ("fusion", []), (EVERYTHING, ["--features", "mean", "--views", "tiles_and_squares", "--loss", "focal:gamma=2"]),
])  # fmt: skip
def test_a_run_exports_tables_of_one_view_that_predicting_says_again(run, tmp_path, capsys, options, more):
    out = tmp_path / "run"
    assert tune(run, out, options, *more) == 0
    said = capsys.readouterr().out
    assert "on val_select: the lowest loss" in said and ("4 of 12 views, chosen on the whole" in said) == bool(more)
    tested = tables.read(out, "val_calib")
    assert tested.logits.shape[1:] == (1, 2) and tested.facts["layout"] == (more[3] if more else "tiles")
    words = ["--predictions", str(out), "--out", str(out / "p.json"), "--method", "temperature", "mcc"]
    assert fit_policy.main(words) == 0
    state = checkpoint.load(out / "best.pth")
    assert {k.partition(".")[0] for k in state["teacher"]} == {"backbone", "head"}
    assert state["fusion"]["fields"] == ({"daytime": ["day"]} if more else {})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    looks = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert set(looks) == {10, 20, 30, 40} and state["best"]["step"] == state["step"] == min(looks, key=looks.get)
    assert tune(run, out, options, *more) == 0  # again: it is there, and exported again
    assert checkpoint.load(out / "best.pth")["step"] == state["step"]
    words = ["--ckpt", str(out / "best.pth"), "--data", str(run / "data"), "--split", "val_calib", "--device", "cpu"]
    assert predict.main([*words, "--out", str(tmp_path / "said")]) == 0
    again = tables.read(tmp_path / "said", "val_calib")
    assert predict.main([*words, "--out", str(tmp_path / "said"), "--draw", *tested.ids[:2].tolist()]) == 0
    assert min(Image.open(tmp_path / "said" / "val_calib_views.png").size) > 700
    with open(tmp_path / "said" / "val_calib_views.csv") as f:
        views = list(csv.DictReader(f))
    assert len(views) == 2 * (12 if more else 10) and views[0]["id"] == tested.ids[0]
    assert sum(float(v["weight"]) for v in views) == pytest.approx(2, abs=1e-4)
    assert sum(v["kept"] == "1" for v in views) == 2 * (4 if more else 10)
    assert [views[0][k] for k in ("y0", "x0", "y1", "x1")] == ["0", "0", "48", "64"]
    with pytest.raises(ValueError, match="--draw nobody.png is none of these samples"):
        predict.main([*words, "--out", str(tmp_path / "said"), "--draw", "nobody.png"])
    order = np.argsort(again.ids)[np.argsort(np.argsort(tested.ids))]
    np.testing.assert_allclose(again.logits[order], tested.logits, atol=1e-5)


def test_what_does_not_fit_is_a_sentence(run, tmp_path):
    for options, more, words in (
        ("fusion:metadata=dayime", [], "no column dayime"),
        ("fusion:metadata=weather,weather=weather", [], "trivial"),
        ("fusion:masks=2", [], "use --features mean"),
        ("fusion:pool=max", [], "known are mil, mean"),
        ("fusion:kep=2", [], "no option kep"),
        ("fusion", ["--dry-run"], "takes seconds"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(run, tmp_path / "x", options, *more)


def test_a_damaged_fusion_is_refused(run, tmp_path):
    out = tmp_path / "run"
    tune(run, out, "fusion:depth=1")
    state = checkpoint.load(out / "best.pth")
    for change in ({"switches": {}, "fields": {}}, {"switches": {"depth": "x"}, "fields": {}}, {"switches": {}}, [1]):
        checkpoint.save(tmp_path / "bad.pth", {**state, "fusion": change})
        with pytest.raises(ValueError, match=r"bad.pth: its head is not one of 2 classes"):
            classifiers.read_classifier(tmp_path / "bad.pth")


def test_every_arm_of_the_ablation_can_be_run(run):
    """tools/recipes/fusion_arms.txt: flags that train_probe.py knows, switches that Fusion has."""
    found = arms.read_arms([str(Path(__file__).parent.parent / "tools" / "recipes" / "fusion_arms.txt")])
    assert len(found) == 16
    for name, flags in found.items():
        words = ["--ckpt", "w", "--data", "d", "--labels", "l", "--out", "o", *flags]
        args = train_probe.build_parser().parse_args(words)
        switches, more = fuse.read_options(args.tune)
        prescore = (16, more["prescore"], 10, 4) if more["prescore"] else ()
        model = Fusion(16, 2, **switches, weather=3 * bool(more["weather"]), prescore=prescore)
        assert model(torch.randn(2, 10, 16)).logits.isfinite().all(), name
        data.find_layout(args.views or "tiles")

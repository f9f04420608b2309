"""Do nodules light up? Planted maps and a planted backbone give the numbers that they must."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_photos, make_split, write_index

import checkpoint
import data as d
from model import build_vit
from tools import lidc_nodules, make_phantom, preprocess_dicom
from tools import nodule_heatmaps as h
from tools.lib import files, judge, provenance
from tools.lib.sheet import BAD

torch.set_num_threads(1)
SPACING = (0.8, 0.5)  # y, x: a swap of axes moves everything
QUICK = ["--size", "128", "--crop-mm", "48", "--device", "cpu"]


def disc(size, y, x, ry, rx):
    yy, xx = np.mgrid[:size, :size]
    return ((yy - y) / ry) ** 2 + ((xx - x) / rx) ** 2 <= 1


def target_of(mask):
    return h.make_target({"id": "n", "group": "g"}, 0, np.zeros(4), mask, h.ring_around(mask, 2**0.5 * h.SAMPLES))


@pytest.fixture
def target():
    return target_of(disc(128, 50, 71, 17, 11))  # 16 x 16 patches


def by_name(values):
    return dict(zip(h.STATS, values))


# one map on one nodule


def test_a_map_equal_to_the_mask_finds_it_and_its_opposite_does_not(target):
    covered = h.per_patch(target.mask)
    found = by_name(h.score(covered, target))
    assert found["hit"] == found["auroc"] == found["share"] == 1 and found["ring"] == 0 < found["inside"] <= 1
    found = by_name(h.score(1 - covered, target))
    assert found["hit"] == found["auroc"] == 0 and found["share"] < 0.5


def test_an_even_map_scores_chance_exactly(target):
    found = by_name(h.score(np.full((16, 16), 0.7), target))
    area = target.mask.mean()
    assert found["hit"] == target.inside.mean() and found["auroc"] == found["share"] == 0.5
    assert found["inside"] == pytest.approx(area) == found["ring"]


def test_random_maps_score_chance_on_average(target):
    maps = np.random.default_rng(0).random((2000, 16, 16))
    mean = by_name(np.mean([h.score(heat, target) for heat in maps], 0))
    assert mean["hit"] == pytest.approx(target.inside.mean(), abs=0.015)
    assert mean["auroc"] == pytest.approx(0.5, abs=0.01) and mean["share"] == pytest.approx(0.5, abs=0.01)


def test_numbers_match_a_loop_over_patches_and_samples(target):
    heat = np.random.default_rng(1).gamma(0.5, size=(16, 16))
    found = by_name(h.score(heat, target))
    spread = np.kron(heat, np.ones((8, 8))) / 64  # every sample gets its part of the patch
    mask, ring = target.mask, target.ring
    assert found["inside"] == pytest.approx(spread[mask].sum() / spread.sum())
    assert found["share"] == pytest.approx(spread[mask].sum() / (spread[mask].sum() + spread[ring].sum()))
    wins = pairs = 0
    for y, x in np.ndindex(16, 16):
        inside = mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() >= 0.5
        for v, u in np.ndindex(16, 16) if inside else ():
            if not mask[8 * v : 8 * v + 8, 8 * u : 8 * u + 8].any():
                wins, pairs = wins + (heat[y, x] > heat[v, u]) + 0.5 * (heat[y, x] == heat[v, u]), pairs + 1
    assert found["auroc"] == pytest.approx(wins / pairs) and pairs > 1000


def test_a_nodule_smaller_than_half_a_patch_still_has_one_patch_inside():
    small = target_of(disc(128, 35.5, 35.5, 2, 2))
    assert small.inside.sum() == 1 and small.inside[4, 4] and small.centre == 4 * 16 + 4
    assert by_name(h.score(h.per_patch(small.mask), small))["hit"] == 1


def test_the_middle_of_a_hollow_nodule_is_on_its_wall():
    hollow = disc(128, 64, 64, 30, 30) & ~disc(128, 64, 64, 20, 20)
    y, x = np.unravel_index(target_of(hollow).centre, (16, 16))
    assert h.per_patch(hollow)[y, x] > 0


def test_similarity_does_not_count_the_patch_it_starts_from(target):
    heat = np.zeros((16, 16))
    heat.flat[target.centre] = 1
    assert h.score(heat, target, anchored=True)[:2] == [(target.inside.sum() - 1) / 255, 0.5]  # all others tie
    assert by_name(h.score(heat, target))["hit"] == 1
    assert np.isnan(h.score(heat, target_of(disc(128, 35.5, 35.5, 2, 2)), anchored=True)).all()


# ring and crop


@pytest.mark.parametrize("shape", [(60, 40, 6, 6), (30, 90, 20, 4), (64, 64, 11, 13)])
def test_the_ring_is_as_large_as_the_nodule_and_nearest_to_it(shape):
    mask, gap = disc(128, *shape), 9
    ring = h.ring_around(mask, gap)
    filled, free = np.argwhere(mask), np.argwhere(~mask)
    distance = np.sqrt(((free[:, None] - filled) ** 2).sum(-1).min(1))
    chosen = ring[tuple(free.T)]
    assert ring.sum() == mask.sum() == chosen.sum()
    assert distance[chosen].min() > gap and distance[chosen].max() <= distance[~chosen & (distance > gap)].min()


def test_no_room_for_a_ring_is_no_ring():
    assert h.ring_around(disc(64, 32, 32, 30, 30), 9) is None


def test_crops_hold_nodule_and_margin_anywhere_inside_the_slice():
    random, sides, size, places = np.random.default_rng(0), np.array([60.0, 90.0]), np.array([200, 240]), []
    for _ in range(500):
        low = random.uniform(0, size - 15)
        high, margin = low + random.uniform(1, 15, 2), np.array([8.0, 12.0])
        box = h.place_crop(low, high, sides, margin, size, random.random(2))
        assert (box[:2] >= 0).all() and (box[2:] <= size).all() and np.allclose(box[2:] - box[:2], sides)
        assert (box[:2] <= low + 1e-9).all() and (box[2:] >= np.minimum(high, size) - 1e-9).all()
        away = ((low - margin > 0) & (high + margin < size)).all()  # from the edges the margin is whole, too
        assert not away or ((box[:2] <= low - margin + 1e-9).all() and (box[2:] >= high + margin - 1e-9).all())
        places.append(((low + high) / 2 - box[:2]) / sides)
    spread = np.ptp(places, 0)
    assert (spread > 0.5).all() and np.abs(np.mean(places, 0) - 0.5).max() < 0.05  # no favourite place
    assert h.place_crop(low, low + 50, sides, margin, size, np.zeros(2)) is None
    assert h.place_crop(low, high, sides, margin, np.array([59, 240]), np.zeros(2)) is None


def test_masks_are_sampled_where_the_crop_looks():
    mask, origin, box = np.random.default_rng(0).random((9, 7)) < 0.5, np.array([20, 31]), (18.3, 28.9, 33.1, 41.2)
    found = h.sample_mask(mask, origin, box, 24)
    for i, j in np.ndindex(24, 24):
        y = int(np.floor(box[0] + (i + 0.5) * (box[2] - box[0]) / 24)) - 20
        x = int(np.floor(box[1] + (j + 0.5) * (box[3] - box[1]) / 24)) - 31
        assert found[i, j] == (0 <= y < 9 and 0 <= x < 7 and mask[y, x])


# chance and intervals


def scattered(count, per_patient=1):
    """Targets at random places of a 16 x 16 grid of patches."""
    random, targets = np.random.default_rng(3), []
    for k in range(count):
        one = target_of(disc(128, *random.uniform(36, 92, 2), *random.uniform(8, 14, 2)))
        targets.append(one._replace(row={"id": f"n{k}", "group": f"g/{k // per_patient}"}))
    return targets


def all_maps(*columns):
    """Maps [n, M, 16, 16] out of M lists of n maps."""
    return np.stack([np.stack(column) for column in columns], 1)


def test_a_habit_of_place_is_chance_however_often_it_hits():
    targets = scattered(60)
    yy, xx = np.mgrid[:16, :16]
    centre = np.exp(-((yy - 7.5) ** 2 + (xx - 7.5) ** 2) / 20)
    masks = [h.per_patch(t.mask) + 1e-3 for t in targets]
    own, chance = h.score_all(all_maps([centre] * 60, masks, masks), targets)
    habit = own[:, 0].mean(0)
    assert habit[1] > 0.6  # nodules avoid the rim of the crop, so the middle alone looks like knowledge
    np.testing.assert_allclose(chance[:, 0], own[:, 0])  # but the same map on other nodules does as well
    assert own[:, 1, 0].mean() == 1 and chance[:, 1, 0].mean() < 0.1
    above, low, high = (part[:2, :2] for part in h.intervals(own - chance, [t.row["group"] for t in targets], 0))
    assert np.abs([above[0], low[0], high[0]]).max() < 1e-9 and (low[1] > 0.4).all()


def test_random_weights_are_averaged_without_the_trained_ones():
    targets, maps = scattered(12), np.random.default_rng(0).random((4, 12, 3, 16, 16))
    numbers, own = h.measure(maps, targets, 0)
    by_net = np.array([[h.score(heat, t)[1] for heat, t in zip(net[:, 0], targets)] for net in maps]).mean(1)
    assert own[:, 0, 1].mean() == pytest.approx(by_net[0])
    assert numbers["random"]["own"]["mean"]["auroc"]["value"] == pytest.approx(by_net[1:].mean())
    gain = numbers["trained_minus_random"]["mean"]["auroc"]
    assert gain["value"] == pytest.approx(by_net[0] - by_net[1:].mean()) and gain["low"] < gain["value"] < gain["high"]


def test_maps_are_attention_of_the_chosen_block_and_cosines():
    torch.manual_seed(0)
    vit, images = build_vit("vit_test", layerscale=0.5).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for layer in (0, -1):
            maps, attention = h.look(vit, images, torch.tensor([5, 9]), layer), vit.attention(images, layer).numpy()
            np.testing.assert_allclose(maps[:, 1:3], attention, rtol=1e-6)
            np.testing.assert_allclose(maps[:, 0], attention.mean(1), rtol=1e-6)
        patches = vit(images).patches
    for k, centre in enumerate((5, 9)):
        cosine = torch.cosine_similarity(patches[k], patches[k, centre], -1).view(4, 4)
        np.testing.assert_allclose(maps[k, 3], cosine, atol=1e-6)
        assert maps[k, 3].argmax() == centre and maps[k, 3].max() == pytest.approx(1)


@pytest.mark.slow
def test_verdicts_follow_what_was_planted():
    targets = scattered(40)
    noise = np.random.default_rng(0).random((2, 40, 16, 16))
    masks = np.stack([h.per_patch(t.mask) for t in targets])

    def says(trained, random):
        maps = [all_maps(m, m, m) for m in (trained, random, random)]
        return h.verdict(h.measure(np.stack(maps), targets, 0)[0], "mean")

    assert "lights up, more than with random weights:" in says(masks + 0.1 * noise[0], noise[1])
    assert "lights up, but not surely more" in says(masks + 0.1 * noise[0], masks + 0.1 * noise[0])
    assert "does not light up" in says(noise[0], noise[1])
    assert "goes dark" in says(1.1 - masks, noise[1])
    same = [noise[0][0]] * 40
    assert "does not light up" in says(same, noise[1])  # a habit of place


@pytest.mark.parametrize("own, above, gain, said", [
    (0.7, 0.2, 0.1, "lights up, more than"), (0.7, 0.2, 0.0, "lights up, but not surely more than"),
    (0.7, 0.0, 0.1, "does not light up"), (0.5, 0.2, 0.1, "does not light up"), (0.4, 0.2, 0.1, "goes dark"),
])  # fmt: skip
def test_a_nodule_lights_up_above_its_surroundings_and_above_any_habit(own, above, gain, said):
    every = planted_numbers(dict.fromkeys(("share", "auroc"), (own, above, gain)))
    assert h.verdict(every, "mean").startswith(f"Attention (mean of heads) {said}")


def planted_numbers(values):
    """numbers of measure() for one map: {stat: (own, above chance, gain over random weights)}, each +- 0.05."""

    def numbers(pick):
        found = {stat: pick(*three) for stat, three in values.items()}
        return {"mean": {stat: dict(value=v, low=v - 0.05, high=v + 0.05) for stat, v in found.items()}}

    trained = dict(own=numbers(lambda own, above, gain: own), chance=numbers(lambda own, above, gain: own - above))
    trained["above_chance"] = numbers(lambda own, above, gain: above)
    random = dict(own=numbers(lambda own, above, gain: own - gain))
    return dict(trained=trained, random=random, trained_minus_random=numbers(lambda own, above, gain: gain))


YES, EVEN, NO = (0.7, 0.2, 0.1), (0.7, 0.2, 0.0), (0.57, 0.02, 0.04)  # lights up more than random, as much, not at all


@pytest.mark.parametrize("share, auroc, hit, said", [
    (YES, NO, (0.083, 0.03, 0.0), "lights up by share, more than with random weights; not by auroc and hit: share"),
    (YES, YES, NO, "lights up by share and auroc, more than with random weights; not by hit: share"),
    (NO, NO, YES, "lights up by hit, more than with random weights; not by share and auroc: share"),
    (EVEN, NO, NO, "lights up by share, but not surely more than with random weights; not by auroc and hit: share"),
    (YES, EVEN, EVEN, "lights up, more than with random weights by share alone: share"),
    (YES, YES, YES, "lights up, more than with random weights: share"),
    (EVEN, EVEN, EVEN, "lights up, but not surely more than with random weights: share"),
    (YES, YES, (0.2, 0.1, 0.1), "lights up, more than with random weights: share"),  # a hit rate needs no half
    (NO, NO, NO, "does not light up: share"),
    ((0.4, 0.0, 0.0), NO, NO, "does not light up: share"),
    ((0.4, 0.0, 0.0), (0.4, 0.0, 0.0), NO, "goes dark: nodules get less than what is around them: share"),
])  # fmt: skip
def test_a_sentence_needs_all_of_its_statistics_or_names_those_that_agree(share, auroc, hit, said):
    """The first line is what happened: hit 1 of 12, AUROC 0.573, and "lights up" for the sake of share alone."""
    numbers = planted_numbers(dict(share=share, auroc=auroc, hit=hit))
    assert h.verdict(numbers, "mean").startswith(f"Attention (mean of heads) {said}")


def test_intervals_resample_patients_not_nodules():
    values = np.random.default_rng(0).random((30, 1, 5))
    once = h.intervals(values, [f"g/{k}" for k in range(30)], 0)
    tenfold = h.intervals(values.repeat(10, 0), [f"g/{k // 10:02}" for k in range(300)], 0)
    careless = h.intervals(values.repeat(10, 0), [f"g/{k}" for k in range(300)], 0)
    np.testing.assert_allclose(once[0], values.mean(0))
    width = (once[2] - once[1]).mean()
    assert (tenfold[2] - tenfold[1]).mean() == pytest.approx(width, rel=0.1)
    assert (careless[2] - careless[1]).mean() < width / 2
    values[7:, :, 2] = np.nan  # numbers that do not exist are left out, and counted
    numbers = h.as_numbers(values, [f"g/{k}" for k in range(30)], ["map"], 0)["map"]
    assert numbers["inside"]["nodules"] == 7 and numbers["inside"]["value"] == pytest.approx(values[:7, 0, 2].mean())
    values[:, :, 2] = np.nan
    assert "inside" not in h.as_numbers(values, [f"g/{k}" for k in range(30)], ["map"], 0)["map"]


# the program, on bright ellipses and a backbone whose first head looks at what is bright


def bright_vit():
    """One block; cls of head 0 attends to bright patches (channel 0), head 1 to all alike."""
    vit = build_vit("vit_test", depth=1)
    for name, parameter in vit.named_parameters():
        if "norm" not in name:
            parameter.data.zero_()
    vit.patch_embed.proj.weight.data[0] = 1 / 768  # mean of the patch
    vit.patch_embed.proj.bias.data[1] = 1  # so that the norm does not turn brightness into a constant
    vit.cls_token.data[..., 2] = 1
    qkv = vit.blocks[0].attn.qkv.weight.data
    qkv[7, 2], qkv[64 + 7, 0] = 0.6, 0.6  # query and key on the slowest rotation of head 0
    return vit


def save(path, vit, encoding="hu16-v1", trained=(), split=None, **more):
    teacher = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    state = dict(step=3, images=24, args={}, arch=vit.arch, encoding=encoding, eval_view=d.eval_view(encoding, 32))
    state |= dict(trained_groups=list(trained), index_sha256="0" * 64, split_sha256=split)
    state["provenance"] = {"known": True, "seen": []}
    return checkpoint.save(path, {**state, "student": {}, "teacher": teacher, **more})


def make_nodules(root, count=12, encoding="hu16-v1", size=160):
    """A processed folder with one bright ellipse per series, its masks and table; patient k has series 2k, 2k + 1."""
    random, lines, rows = np.random.default_rng(5), [], []
    (root / "_labels" / "masks").mkdir(parents=True)
    (root / "toy").mkdir()
    for s in range(count):
        y, x, ry, rx = *random.uniform(45, 115, 2), random.uniform(4, 8), random.uniform(8, 16)
        body = disc(size, y, x, ry, rx)
        hu = np.where(body, 100, -850) + random.normal(0, 5, (5, size, size))
        hu, name, group = hu.astype(np.int16), f"1.2.{s}", f"toy/P{s // 2}"
        np.save(root / "toy" / f"{name}.npy", hu)
        filled = np.argwhere(body)
        low, high = filled.min(0), filled.max(0) + 1
        mask = np.repeat(body[None, low[0] : high[0], low[1] : high[1]], 3, 0)
        origin = np.array([1, *low])
        np.savez(root / "_labels" / "masks" / f"n{s}.npz", union=mask, majority=mask, origin=origin)
        for z in (1, 2, 3):
            path = f"toy/{name}.npy"
            if encoding == "rgb-v1":
                path = f"toy/{name}/{z:04d}.png"
                (root / path).parent.mkdir(exist_ok=True)
                codes = [d.window_codes(v, *d.WINDOWS_HU[w]) for v, w in zip(hu[z - 1 : z + 2], d.RGB_WINDOWS)]
                Image.fromarray(np.stack(codes, -1)).save(root / path)
            ids = [path, encoding, "toy", f"P{s // 2}", f"s{s}", name, f"{name}.{z}"]
            lines.append([*ids, z, z * 2.5, *SPACING, 2.5, size, size, 0, size, 0, size])
        rows.append([f"n{s}", lines[-2][0], 2, y, x, 3, group, 12.5, 16])
    write_index(root, lines)
    header = "id,path,z,y,x,label,group,diameter_mm,box_mm"
    (root / "_labels" / "nodules.csv").write_text("\n".join([header, *(",".join(map(str, r)) for r in rows), ""]))
    half = count // 4
    make_split(root, {f"toy/P{k}": "train" if k < half else "val_test" for k in range(count // 2)})
    return root


@pytest.fixture
def root(tmp_path):
    return make_nodules(tmp_path / "data")


def look(root, ckpt, *flags):
    out = ckpt.parent / "heatmaps"
    assert h.main(["--ckpt", str(ckpt), "--data", str(root), *QUICK, *flags]) == 0
    return json.loads((out / "heatmaps.json").read_text(), parse_constant=pytest.fail), out / "heatmaps.png"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["hu16-v1", "rgb-v1"])
def test_a_backbone_that_looks_at_bright_patches_is_said_to(tmp_path, capsys, encoding):
    root = make_nodules(tmp_path / "data", encoding=encoding)
    ckpt = save(tmp_path / "run.pth", bright_vit(), encoding, trained=["toy/P0", "toy/P1", "toy/P2"])
    report, sheet = look(root, ckpt, "--n", "50")
    said = capsys.readouterr().out
    own, chance = (report["numbers"]["trained"][key] for key in ("own", "chance"))
    assert report["patients"] == 3 and len(report["nodules"]) == 6 and not report["warning"]
    for name in ("head 0", "mean", "similarity"):
        assert own[name]["hit"]["value"] == own[name]["auroc"]["value"] == 1
    share, inside, ring = (own["head 0"][name]["value"] for name in ("share", "inside", "ring"))
    assert share > 0.9 and inside > 10 * ring
    assert own["head 1"]["auroc"]["value"] == pytest.approx(0.5, abs=1e-6)  # uniform, and so at chance
    assert own["head 1"]["share"]["value"] == pytest.approx(0.5, abs=1e-4)
    assert own["head 1"]["hit"]["value"] == pytest.approx(chance["head 1"]["hit"]["value"])
    assert chance["head 0"]["hit"]["value"] < 0.5 and "share" not in own["similarity"]
    assert "Attention (mean of heads) lights up, more than with random weights:" in said
    assert own["mean"]["auroc"]["nodules"] == 6 and report["numbers"]["random"]["own"]["mean"]["auroc"]["value"] < 0.95
    for nodule in report["nodules"]:  # square in millimetres, and inside the slice
        y0, x0, y1, x1 = nodule["box"]
        assert np.multiply([y1 - y0, x1 - x0], SPACING) == pytest.approx([48, 48], abs=0.02)
        assert min(y0, x0) >= 0 and max(y1, x1) <= 160
    picture = np.asarray(Image.open(sheet).convert("RGB"))
    assert picture.shape[1] == 1784 and len(picture) > 3 * 250
    files = sorted(sheet.parent.glob("nodule_*.png"))
    assert [path.name for path in files] == [f"nodule_{k:02}.png" for k in range(1, 7)]
    for k, path in enumerate(files):  # each is a part of the sheet, two in a row
        alone = np.asarray(Image.open(path).convert("RGB"))[8:-8, 8:-8]
        x = 8 + k % 2 * (alone.shape[1] + 24)
        tops = np.flatnonzero((picture[:, x : x + 5] == 240).all((1, 2)))  # the bar of a heading
        assert any((picture[y : y + len(alone), x : x + alone.shape[1]] == alone).all() for y in tops)
    look(root, ckpt, "--n", "2")
    assert len(list(sheet.parent.glob("nodule_*.png"))) == 2  # none is left of an earlier look


def test_the_patch_that_similarity_starts_from_is_not_its_strongest(target):
    grey, heat = Image.new("RGB", (200, 200)), np.zeros_like(target.inside, float)
    heat.flat[target.centre], heat[-1, -1] = 1, 0.5
    side = 200 // len(heat)
    drawn = [np.asarray(h.heat_tile(grey, heat, target, [], 1, anchored)).astype(int) for anchored in (True, False)]
    red = [(np.abs(d - [255, 106, 90]).sum(2) == 0) for d in drawn]
    assert red[0][-side:, -side:].any() and not red[1].any()  # else it is its own patch, inside


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_and_another_seed_other_crops(root, tmp_path):
    ckpt = save(tmp_path / "run.pth", bright_vit())
    first, sheet = look(root, ckpt)
    pixels = sheet.read_bytes()
    again, _ = look(root, ckpt)
    assert again == first and sheet.read_bytes() == pixels
    other, _ = look(root, ckpt, "--seed", "1")
    boxes = [{n["id"]: n["box"] for n in report["nodules"]} for report in (first, other)]
    assert all(boxes[0][k] != boxes[1][k] for k in boxes[0]) and boxes[0].keys() == boxes[1].keys()
    few, _ = look(root, ckpt, "--n", "2")
    assert all(boxes[0][n["id"]] == n["box"] for n in few["nodules"])  # a nodule's crop does not depend on the others


def looks(root):
    path = root / "_splits" / "test_uses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


SEEN = "backbone has seen these patients"


@pytest.mark.slow
def test_seen_patients_are_refused_or_said_in_red(root, tmp_path, capsys):
    ckpt = save(tmp_path / "run.pth", bright_vit(), trained=["toy/P1", "toy/P4"])
    with pytest.raises(ValueError, match="leak: 1 groups of split val_test .*toy/P4"):
        look(root, ckpt)
    with pytest.raises(ValueError, match="leak: 2 groups of split all .*toy/P1, toy/P4"):
        look(root, ckpt, "--split", "all")
    assert not looks(root)  # no number, and so no look
    report, sheet = look(root, ckpt, "--allow-seen")
    assert report["warning"] == f"{SEEN} (1 of 3)" and report["warning"] in capsys.readouterr().out
    assert report["title"].endswith(report["warning"]) and report["verdict"][-1] == f"{SEEN.capitalize()} (1 of 3)."
    assert (np.asarray(Image.open(sheet))[:80] == [int(BAD[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any()
    report, _ = look(root, ckpt, "--allow-seen", "--split", "all", "--n", "2")  # counted among those looked at
    seen = len({"toy/P1", "toy/P4"} & {n["group"] for n in report["nodules"]})
    assert report["warning"] == (f"{SEEN} ({seen} of {report['patients']})" if seen else "")
    torch.save(build_vit("vit_test").state_dict(), tmp_path / "bare.pth")
    report, _ = look(root, tmp_path / "bare.pth")
    looked = "1 other weights or policies looked at val_test before"  # those above
    assert report["warning"] == f"{judge.UNKNOWN}; {looked}" and report["title"].endswith(report["warning"])
    assert report["verdict"][-2:] == [f"{judge.UNKNOWN.capitalize()}.", f"{looked}."]


def test_an_interval_that_does_not_exist_is_null(monkeypatch):
    monkeypatch.setattr(h, "interval", lambda values: (np.full(values.shape[1:], np.nan),) * 2)
    values = np.ones((4, 1, len(h.STATS)))
    one = files.plain(h.as_numbers(values, np.arange(4), ["mean"], 0))["mean"]["share"]
    assert one["low"] is None and one["high"] is None and one["value"] > 0


def test_a_series_is_recognised_under_another_name_of_its_patient(root, tmp_path):
    source = d.open_source(root)
    renamed = source.take(np.flatnonzero(source.rows.column("group") == "toy/P4"))
    entry = provenance.provenance_of(renamed) | {"groups": []}
    ckpt = save(tmp_path / "run.pth", bright_vit(), trained=["other/A"], provenance={"known": True, "seen": [entry]})
    with pytest.raises(ValueError, match="leak: 1 groups of split val_test .*toy/P4"):
        look(root, ckpt)
    assert not looks(root)


def test_weights_that_change_while_they_are_read_are_refused(root, tmp_path, monkeypatch):
    ckpt, new = save(tmp_path / "run.pth", bright_vit()), save(tmp_path / "new.pth", bright_vit())
    real = h.load_backbone
    monkeypatch.setattr(h, "load_backbone", lambda path: (real(path), new.replace(path))[0])
    with pytest.raises(ValueError, match=r"run\.pth changed while it was read"):
        look(root, ckpt)
    assert not looks(root)


@pytest.mark.slow
def test_every_look_at_val_test_is_recorded(root, tmp_path):
    ckpt = save(tmp_path / "run.pth", bright_vit())
    look(root, ckpt, "--split", "train")
    assert not looks(root)
    look(root, ckpt)
    look(root, ckpt, "--split", "all")
    labels = d.file_sha256(root / "_labels" / "nodules.csv")
    for line, split in zip(looks(root), ("val_test", "all"), strict=True):
        assert (line["program"], line["labels_sha256"]) == ("tools/nodule_heatmaps.py", labels)
        assert line["weights_sha256"] == d.file_sha256(ckpt) and line["policy_sha256"] is None and split in line["why"]
    (root / "_splits" / "splits.json").unlink()
    report, _ = look(root, ckpt, "--split", "all")  # no contract, nothing to record
    assert len(looks(root)) == 2 and report["split_sha256"] is None


def test_near_duplicates_across_splits_are_refused_or_stand_in_the_title(root, tmp_path):
    ckpt = save(tmp_path / "run.pth", bright_vit())
    sha = d.file_sha256(root / "_index" / "index.csv")
    sets = {"version": 1, "index_sha256": sha, "groups": [["toy/P0", "toy/P5"]]}
    (root / "_splits" / "duplicates.json").write_text(json.dumps(sets))
    with pytest.raises(ValueError, match="1 sets of duplicate pictures.*--allow-duplicates"):
        look(root, ckpt)
    assert not looks(root)
    report, _ = look(root, ckpt, "--allow-duplicates")
    assert report["title"].endswith(": near-duplicates cross the splits (1 sets)") and len(looks(root)) == 1


def test_what_cannot_be_looked_at_is_passed_over_and_named(root, tmp_path, capsys):
    masks = root / "_labels" / "masks"
    with np.load(masks / "n6.npz") as file:
        parts = dict(file)
    parts["majority"] = np.zeros_like(parts["majority"])
    np.savez(masks / "n6.npz", **parts)
    np.savez(masks / "n7.npz", majority=np.ones((3, 90, 70), bool), origin=np.array([1, 20, 20]))
    table = root / "_labels" / "nodules.csv"
    table.write_text(table.read_text().replace("n8,toy/1.2.8.npy,2", "n8,toy/1.2.8.npy,4"))
    report, _ = look(root, save(tmp_path / "run.pth", bright_vit()))
    reasons = {item["id"]: item["reason"] for item in report["skipped"]}
    assert reasons.keys() == {"n6", "n7", "n8"} and len(report["nodules"]) == 3
    assert "marks nothing" in reasons["n6"] and "no crop of 48 mm" in reasons["n7"] and "index" in reasons["n8"]
    assert "passed over n7: no crop of 48 mm" in capsys.readouterr().out


def test_a_table_whose_slice_number_is_not_that_of_its_picture_is_not_believed(tmp_path):
    root = make_nodules(tmp_path / "data", encoding="rgb-v1")
    table = root / "_labels" / "nodules.csv"
    table.write_text(table.read_text().replace("n8,toy/1.2.8/0002.png,2", "n8,toy/1.2.8/0002.png,3"))
    report, _ = look(root, save(tmp_path / "run.pth", bright_vit(), "rgb-v1"))
    assert report["skipped"] == [{"id": "n8", "reason": "its slice is not in the index"}]


def replaced(path, number, column, text):
    """A table with one other cell; the header is row 1."""
    lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[number - 1][lines[0].index(column)] = text
    return "\n".join([*map(",".join, lines), ""])


def test_wrong_input_is_named(root, tmp_path):
    ckpt = save(tmp_path / "run.pth", bright_vit())

    def refused(match, *flags, folder=root, weights=ckpt, error=ValueError):
        with pytest.raises(error, match=match) as raised:
            look(folder, weights, *flags)
        assert len(str(raised.value)) < 600

    refused("not a multiple of the patch size 16", "--size", "100")
    refused("none of its 12 nodules is in the chosen split", "--split", "val_calib")
    for column, text in (("z", "-"), ("z", "2.5"), ("diameter_mm", "nan"), ("diameter_mm", "m" * 9999)):
        (root / "wrong.csv").write_text(replaced(root / "_labels" / "nodules.csv", 3, column, text))
        refused(f"wrong.csv, row 3: {column} is '{text[:3]}", "--labels", str(root / "wrong.csv"))
    refused("--device gpu", "--device", "gpu")
    assert not looks(root)
    refused("layer 4 does not exist", "--layer", "4")
    refused("0 usable nodules", "--crop-mm", "10")
    refused("trained on rgb-v1, --data is hu16-v1", weights=save(tmp_path / "rgb.pth", bright_vit(), "rgb-v1"))
    refused("does not exist; make it with", "--labels", str(root / "none.csv"), error=FileNotFoundError)
    (root / "odd.csv").write_text("path,label\na,1\n")
    refused("odd.csv is no table of nodules", "--labels", str(root / "odd.csv"))
    (root / "_labels" / "masks" / "n6.npz").unlink()
    refused("n6.npz does not exist", error=FileNotFoundError)
    photos = make_photos(tmp_path / "photos")
    refused("holds photographs", "--split", "all", folder=photos or tmp_path / "photos")
    for flags in (["--seed", "-1"], ["--crop-mm", "0"], ["--n", "1"]):
        with pytest.raises(SystemExit) as stop:
            look(root, ckpt, *flags)
        assert stop.value.code == 2


@pytest.mark.slow
def test_masks_of_the_phantom_s_readers_lie_on_its_nodules(tmp_path):
    """From DICOM and XML to the numbers: what is bright in the lung is what the readers outlined."""
    raw, root = tmp_path / "raw", tmp_path / "processed"
    flags = "--patients 8 --slices 24 --size 192 --workers 1 --seed 3".split()
    assert make_phantom.main(["--out", str(raw), *flags]) == 0
    flags = "--dataset phantom --format hu16 --workers 1".split()
    assert preprocess_dicom.main(["--raw", str(raw), "--out", str(root), *flags]) == 1  # scouts are rejected
    assert lidc_nodules.main(["--raw", str(raw), "--data", str(root)]) == 0
    flags = ["--split", "all", "--crop-mm", "64", "--size", "256", "--n", "30"]
    report, _ = look(root, save(tmp_path / "run.pth", bright_vit()), *flags)
    share = report["numbers"]["trained"]["own"]["head 0"]["share"]
    assert share["nodules"] >= 12 and share["low"] > 0.6
    moved = root / "_labels" / "masks"
    for path in moved.glob("*.npz"):  # the same outlines 20 mm away: the tissue there is no brighter than around it
        with np.load(path) as file:
            parts = dict(file)
        np.savez(path, **parts | {"origin": parts["origin"] + [0, 12, -12]})
    report, _ = look(root, tmp_path / "run.pth", *flags)
    assert report["numbers"]["trained"]["own"]["head 0"]["share"]["value"] < share["low"] - 0.1


def test_too_few_nodules_get_no_verdict():
    """Two real lesions: each interval is as narrow as it likes, and proves nothing."""
    numbers = planted_numbers(dict(share=(0.9, 0.89, 0.91), auroc=(0.9, 0.89, 0.91), hit=(0.9, 0.89, 0.91)))
    assert "lights up" in h.verdict(numbers, "mean")
    for part in numbers["trained"]["own"]["mean"].values():
        part["nodules"] = 2
    said = h.verdict(numbers, "mean")
    assert "is not judged: 2 nodules are too few to tell" in said and "lights up" not in said

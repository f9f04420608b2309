import colorsys
import contextlib
import csv
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data as d

GOLDEN = Path(__file__).parent / "golden"
SMALL = replace(d.RECIPES["ct"], global_size=32, local_size=16, local_crops=3)


def volume(series, slices=6, size=48):
    """HU of a small series; every slice and pixel is different, values are far from 0."""
    random = np.random.default_rng(series)
    return random.integers(-1100, 1500, (slices, size, size)).astype(np.int16)


def write_index(root, lines):
    (root / "_index").mkdir(parents=True, exist_ok=True)
    with open(root / "_index" / "index.csv", "w", newline="") as f:
        csv.writer(f).writerows([d.INDEX_COLUMNS, *lines])


def make_ct(root, encoding="hu16-v1", series=8, slices=6, size=48):
    """A processed folder of `series` series; patient 0 has two of them."""
    lines = []
    for s in range(series):
        hu, name = volume(s, slices, size), f"1.2.{s}"
        (root / "toy" / name).mkdir(parents=True, exist_ok=True)
        np.save(root / "toy" / f"{name}.npy", hu)
        for z in range(1, slices - 1):
            path = f"toy/{name}.npy"
            if encoding == "rgb-v1":
                path = f"toy/{name}/{z:04d}.png"
                three = zip(hu[z - 1 : z + 2], ("lung", "soft", "bone"))
                Image.fromarray(np.stack([d.window_codes(x, *d.WINDOWS_HU[w]) for x, w in three], -1)).save(root / path)
            ids = [path, encoding, "toy", f"P{max(s - 1, 0)}", f"s{s}", name, f"{name}.{z}"]
            lines.append([*ids, z, z * 2.5, 0.7, 0.7, 2.5, size, size, 4, 40, 6, 44])
    write_index(root, lines)
    return root


def make_split(root, groups):
    (root / "_splits").mkdir(exist_ok=True)
    contract = {"version": 1, "groups": groups, "index_sha256": d.file_sha256(root / "_index" / "index.csv")}
    (root / "_splits" / "splits.json").write_text(json.dumps(contract))


@pytest.fixture
def ct(tmp_path):
    return d.open_source(make_ct(tmp_path / "ct"))


def photo(seed, size=(60, 80)):
    """A smooth colour picture: JPEG and reduction hardly change it."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((1, 3, 4, 4)))
    return (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0] * 255).byte()


def make_photos(root, count=6):
    for i in range(count):
        path = root / f"c{i % 2}" / f"{i}.{('png', 'JPG')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i).permute(1, 2, 0).numpy()).save(path, quality=95)
    return root


# sources


def test_hu_and_codes_are_what_was_stored(tmp_path):
    hu = d.open_source(make_ct(tmp_path / "hu"))
    rgb = d.open_source(make_ct(tmp_path / "rgb", "rgb-v1"))
    for source in (hu, rgb):
        assert len(source) == 8 * 4 and source.groups == [f"toy/P{i}" for i in range(7)]
    for i in (0, 5, 31):
        row = hu.rows[i]
        stored = volume(int(row["series"][4:]))[row["z"] - 1 : row["z"] + 2]
        assert hu.read(i).dtype == torch.int16 and np.array_equal(hu.read(i), stored)
        for channel, (level, width) in enumerate([(-600, 1500), (40, 400), (300, 1500)]):
            share = np.clip((stored[channel] - (level - width / 2)) / width, 0, 1)
            assert np.array_equal(rgb.read(i)[channel], np.floor(255 * share + 0.5))
    assert hu.rows[5]["sop"] == "1.2.1.2" and hu.rows[5]["z_mm"] == 5.0 and hu.rows.column("patient")[5] == "P0"


def test_neighbours_come_from_the_full_volume_under_a_stride(tmp_path):
    source = d.thin(d.open_source(make_ct(tmp_path)), z_stride=3)
    assert sorted({r["z"] for r in source.rows}) == [1, 4] and len(source) == 16
    image = source.read(1)  # z = 4 of series 0
    assert np.array_equal(image, volume(0)[3:6])
    assert not torch.equal(image[0], image[1]) and not torch.equal(image[1], image[2])


def test_limit_is_a_fixed_subset(ct):
    few = d.thin(d.open_source(ct.root), 10)
    again = d.thin(d.open_source(ct.root), 10)
    assert [r["sop"] for r in few.rows] == [r["sop"] for r in again.rows] and len({r["sop"] for r in few.rows}) == 10


def test_splits_are_contracts(ct):
    with pytest.raises(FileNotFoundError, match=r"make the split of .*, with the ratios"):
        d.open_for(ct.root, "fit")
    groups = {g: "train" if g < "toy/P5" else "val_select" for g in ct.groups}
    make_split(ct.root, groups)
    train, held = d.open_for(ct.root, "fit"), d.open_for(ct, "select")
    assert train.groups == [g for g in ct.groups if g < "toy/P5"] and len(train) + len(held) == len(ct)
    assert train.split_sha256 == d.file_sha256(ct.root / "_splits" / "splits.json")
    with pytest.raises(ValueError, match="no image in val_calib; it has"):
        d.open_for(ct.root, "calibrate")
    make_split(ct.root, dict.fromkeys(ct.groups[1:], "train"))
    with pytest.raises(ValueError, match="does not name group toy/P0"):
        d.open_for(ct.root, "fit")
    make_split(ct.root, groups)
    index = ct.root / "_index" / "index.csv"
    index.write_text(index.read_text().replace("2.5", "2.6", 1))
    with pytest.raises(ValueError, match="made for another index"):
        d.open_for(ct.root, "fit")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        d.open_source(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither _index/index.csv nor"):
        d.open_source(tmp_path)
    root = make_ct(tmp_path / "ct")
    index = root / "_index" / "index.csv"
    good = index.read_text()

    def refused(text, match):
        index.write_text(text)
        with pytest.raises(ValueError, match=match):
            d.open_source(root)

    refused(good.replace("hu16-v1", "u16_offset32768"), r"encoding \['u16_offset32768'\]; known are")
    refused(good.replace("hu16-v1", "rgb-v1", 1), "mixes encodings")
    refused(good.replace("z_mm", "zmm"), "columns path,encoding")
    refused(good.replace(",2.5,", ",abc,", 1), "malformed")
    refused(good.splitlines()[0] + "\n", "no rows")
    index.unlink()
    with pytest.raises(FileNotFoundError, match="is missing beside its folder"):
        d.open_source(root)
    index.write_text(good)
    source = d.open_source(root)
    source.path(0).write_bytes(source.path(0).read_bytes()[:500])
    with pytest.raises(OSError, match="1.2.0.npy cannot be read"):
        source.read(0)
    np.save(source.path(5), volume(1)[:, :20])
    with pytest.raises(OSError, match=r"has \(20, 48\) pixels, the index says \(48, 48\)"):
        source.read(5)


def test_no_damage_of_a_file_escapes_as_another_error(tmp_path):
    random = np.random.default_rng(0)
    for root in (make_ct(tmp_path / "hu"), make_ct(tmp_path / "rgb", "rgb-v1")):
        source = d.open_source(root)
        whole = source.path(0).read_bytes()
        for _ in range(300):
            raw = bytearray(whole)
            for at in random.integers(0, min(len(raw), 200), 3):
                raw[at] = random.integers(256)
            source.path(0).write_bytes(raw)
            with contextlib.suppress(OSError):
                source.read(0)
        source.path(0).write_bytes(whole)


def test_sixteen_bit_photographs_are_refused_not_clipped(tmp_path):
    Image.fromarray(np.full((20, 20), 51000, np.uint16)).save(tmp_path / "xray.png")
    with pytest.raises(OSError, match="expected 8 bits per channel"):
        d.open_source(tmp_path).read(0)


def test_photographs_are_found_labelled_and_grouped(tmp_path):
    make_photos(tmp_path)
    (tmp_path / "_splits").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "_splits" / "ours.png")
    source = d.open_source(tmp_path)
    paths = ["c0/0.png", "c0/2.png", "c0/4.png", "c1/1.JPG", "c1/3.JPG", "c1/5.JPG"]
    assert [r["path"] for r in source.rows] == paths == source.groups
    assert source.index_sha256 == hashlib.sha256("\n".join(f"{p},{p}" for p in paths).encode()).hexdigest()
    assert source.read(0).shape == (3, 60, 80) and torch.equal(source.read(0), photo(0))
    (tmp_path / "labels.csv").write_text("path,label,group\nc0/0.png,cat,a\nc0/2.png,dog,a\n")
    source = d.open_source(tmp_path)
    assert source.rows[1]["label"] == "dog" and source.rows[1]["group"] == "a" and source.rows[3]["group"] == "c1/1.JPG"
    sha = source.index_sha256
    (tmp_path / "labels.csv").write_text("\ufeffpath,label,group\nc0/0.png,cat,a\nc0/2.png,dog,b\n")  # a spreadsheet's
    assert d.open_source(tmp_path).index_sha256 != sha  # another division into groups is other data
    taken = "rename column patient, .* is called group"
    for text, message in (("path,label,patient\n", taken), ("path,label\nc0/0.png\n", "1 cells of 2")):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            d.open_source(tmp_path)
    (tmp_path / "labels.csv").write_text(",".join(d.NODULE) + "\n")
    with pytest.raises(ValueError, match="is a table of CT nodules"):
        d.open_source(tmp_path)
    (tmp_path / "labels.csv").write_text("path,label\nc0/9.png,cat\n")
    with pytest.raises(FileNotFoundError, match="names 1 missing files, first c0/9.png"):
        d.open_source(tmp_path)
    (tmp_path / "labels.csv").write_bytes(b"path,label\nc0/0.png,\xff\xfe\n")
    with pytest.raises(ValueError, match="not a UTF-8 CSV file"):
        d.open_source(tmp_path)
    with pytest.raises(ValueError, match="photographs have no slices"):
        d.thin(d.open_source(tmp_path / "c0"), z_stride=2)
    (tmp_path / "labels.csv").write_text("file,class\n")
    with pytest.raises(ValueError, match="expected path,label"):
        d.open_source(tmp_path)


@pytest.mark.slow
def test_a_quarter_million_rows_open_quickly_and_small(tmp_path):
    series = [f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{10**26 + s}" for s in range(1000)]
    numbers = [0.703125, 0.703125, 1.25, 512, 512, 60, 450, 20, 490]
    lines = (
        [f"lidc/{s}/{z:04d}.png", "rgb-v1", "lidc", f"LIDC-IDRI-{p:04d}", s, s, f"{s}.{z}", z, z * 1.25, *numbers]
        for p, s in enumerate(series)
        for z in range(1, 251)
    )
    write_index(tmp_path, lines)
    script = (
        "import csv, data, time\n"
        "def mib(): return int(open('/proc/self/statm').read().split()[1]) / 256\n"  # pages of 4 KiB
        "before, t = mib(), time.process_time()\n"
        f"assert len(data.open_source({str(tmp_path)!r})) == 250000\n"
        "opened, used, t = time.process_time() - t, mib() - before, time.process_time()\n"
        f"sum(1 for _ in csv.reader(open({str(tmp_path / '_index' / 'index.csv')!r}, newline='')))\n"
        "print(opened, used, time.process_time() - t)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    seconds, mib, bare = map(float, out.split())
    assert seconds < max(2, 8 * bare) and mib < 200, out  # bare: only parsing it, a quarter of a second when quiet


# order and plan: functions of the step


def test_each_epoch_is_a_permutation_and_a_batch_holds_a_series_once(ct):
    for batch in (4, 8):
        seen = [
            np.stack([ct.order(3, step, batch) for step in range(e * 32 // batch, (e + 1) * 32 // batch)])
            for e in (0, 1)
        ]
        for epoch in seen:
            assert sorted(epoch.flatten()) == list(range(32))
            assert all(len(set(ct.series[ids])) == batch for ids in epoch)
        assert not np.array_equal(*seen)
    ids = ct.order(3, 5, 16)  # 16 of 8 series: two each, no more
    assert np.bincount(ct.series[ids]).max() == 2
    assert len(set(ct.order(0, 0, 24))) == 24  # 8 of 32 are left out of this epoch
    assert sorted(ct.order(0, 3, 64)) == sorted([*range(32)] * 2)  # fewer images than a batch
    d.epoch_order.cache_clear()
    assert np.array_equal(ct.order(3, 5, 16), ids) and not np.array_equal(ct.order(4, 5, 16), ids)


def test_a_plan_depends_on_seed_step_and_id_alone():
    together = d.plan(1, 7, [3, 9, 4], SMALL)
    alone = d.plan(1, 7, [9], SMALL)
    for a, b in zip(together[1:-1], alone[1:-1]):
        assert np.array_equal(a[:, 1:2], b)
    for other in (d.plan(2, 7, [9], SMALL), d.plan(1, 8, [9], SMALL), d.plan(1, 7, [10], SMALL)):
        assert not np.array_equal(alone.centres, other.centres)


@pytest.mark.parametrize("field", [None, (1.0, 1.0), (0.3, 0.3), (0.04, 1.0)])
def test_boxes_have_the_stated_areas_and_places(field):
    """field None: photographs."""
    recipe = d.RECIPES["photo"] if field is None else replace(d.RECIPES["ct"], field=field)
    sizes, regions = [(512, 400)] * 300, [(100, 50, 450, 390)] * 300
    if field is None:
        regions = [(0, 0, 512, 400)] * 300
    p = d.plan(0, 0, range(300), recipe)
    boxes = d.place(p, sizes, regions).boxes
    y0, x0, y1, x1 = regions[0]
    assert (boxes[..., :2] >= (y0, x0)).all() and (boxes[..., 2:] <= (y1, x1)).all()
    assert np.array_equal(boxes, np.floor(boxes))
    sides, shares = boxes[..., 2:] - boxes[..., :2], p.fields[0, :, 0]
    low, high = recipe.field
    assert low <= shares.min() and shares.max() <= high
    assert abs(np.log(shares).mean() - (np.log(low) + np.log(high)) / 2) < 0.1 + 0.01 * (low == high)
    spread = boxes[..., 2:].max(0) - boxes[..., :2].min(0)  # of all views of an image, which lie in its field
    limit = np.sqrt(shares * (y1 - y0) * (x1 - x0))[:, None]
    assert (spread <= np.where(shares[:, None] < 1, limit, 512)).all()
    share = sides.prod(-1) / (shares * (y1 - y0) * (x1 - x0))
    for views, (low, high) in ((slice(0, 2), recipe.global_scale), (slice(2, None), recipe.local_scale)):
        assert low * 0.85 < share[views].min() and share[views].max() < high * 1.1  # whole pixels of small fields
        assert abs(share[views].mean() - (low + high) / 2) < 0.1 * high
    aspect = sides[2:, :, 1] / sides[2:, :, 0]
    assert aspect.min() > 0.65 and aspect.max() < 1.5 and abs(np.log(aspect).mean()) < 0.02
    assert boxes[..., 0].min() < y0 + 20 and boxes[..., 2].max() > y1 - 20  # the whole region is used
    assert boxes[..., 1].min() < x0 + 20 and boxes[..., 3].max() > x1 - 20


@pytest.mark.slow
def test_block_masks_match_the_reference_statistics():
    reference = json.loads((GOLDEN / "07_masking.json").read_text())
    for entry in reference["collate"]:
        side = entry["img"] // 16
        masks = d.block_masks(0, 0, 64, (side, side))
        counts = sorted(masks.sum(1).tolist())
        assert counts == [0] * 32 + entry["per_mask_counts_sorted"] and masks.dtype == torch.bool
        assert sum(counts) == entry["total_masked"][0]
    assert torch.equal(masks, d.block_masks(0, 0, 64, (side, side)))
    assert not torch.equal(masks, d.block_masks(0, 1, 64, (side, side)))
    for entry in reference["per_target"]:
        side, target = entry["grid"], entry["target"]
        random, draws = np.random.default_rng(0), 1000
        found = np.zeros((draws, side, side), bool)
        for mask in found:
            d.fill_blocks(random, mask, target)
        assert (found.sum((1, 2)) == target).all()
        pairs = (found[:, 1:] & found[:, :-1]).sum() + (found[:, :, 1:] & found[:, :, :-1]).sum()
        expected = entry["adjacent_masked_pairs_per_masked_patch_mean"]
        assert pairs / (draws * target) == pytest.approx(expected, rel=0.03, abs=0.02), entry
        share = found[:, side // 2, side // 2].mean(), found[:, 0, 0].mean()
        assert share == pytest.approx(entry["centre_vs_corner_freq"], abs=0.05), entry


# rendering


def pillow_crop(image, box, out, flip):
    """The oracle: crop, then resize in mode F."""
    y0, x0, y1, x1 = map(int, box)
    channels = [Image.fromarray(c.numpy().astype(np.float32)).crop((x0, y0, x1, y1)) for c in image]
    resized = np.stack([np.asarray(c.resize((out, out), Image.Resampling.BICUBIC)) for c in channels])
    return torch.from_numpy(resized[..., ::-1].copy() if flip else resized)


def test_outside_its_bands_an_axis_matrix_is_zero():
    random, wasted = np.random.default_rng(0), []
    for out in (16, 96, 224):
        start = np.floor(random.uniform(0, 300, 200))
        end, low = start + np.floor(random.uniform(1, 600, 200)) + random.choice([0, 0.37], 200), np.floor(start)
        start, end, low = (torch.as_tensor(a, dtype=torch.float32) for a in (start, end, low))
        sigma = torch.as_tensor(random.choice([0, 0.3, 2.0], 200), dtype=torch.float32)
        flip = torch.from_numpy(random.random(200) < 0.5)
        length = int((end.ceil() - low).max())
        matrices = d.axis_matrices(start, end, flip, sigma, low, out, length)
        for matrix, bands in zip(matrices, d.reach(start, end, flip, sigma, low, out)):
            for k, (a, b) in zip(range(0, out, d.BLOCK), bands):
                rows = matrix[k : k + d.BLOCK].clone()
                assert rows.sum() > 0.99 * len(rows) and 0 <= a < b
                rows[:, a:b] = 0
                assert not rows.any()
                wasted.append((b - a) / length)
    assert np.mean(wasted) < 0.5  # else nothing is gained


def cut_by_taps(*inputs):
    return d.cut_by_taps(*inputs, each=lambda function: function)  # as torch compiles it on a card


@pytest.mark.parametrize("product", [d.cut_each, d.cut_batched, cut_by_taps])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_a_cut_equals_pillows_bicubic_to_a_hundredth_of_a_code(product, dtype):
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (2, 3, 96, 80))).to(dtype)
    if dtype == torch.int16:
        images = images * 10 - 1000
    boxes = [(0, 0, 96, 80), (5, 7, 25, 30), (0, 60, 3, 80), (90, 0, 96, 5), (10, 10, 11, 11), (3, 2, 90, 79)]
    flips = [False, True, False, True, False, True]
    for out in (8, 32, 100):
        args = torch.tensor(boxes, dtype=torch.float32), torch.tensor(flips), torch.zeros(6), out
        views = product(images, *args)
        for i, (box, flip) in enumerate(zip(boxes, flips)):
            expected = pillow_crop(images[i % 2], box, out, flip)
            assert (views[i] - expected).abs().max() < 0.01, (box, out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_sums_of_taps_compiled_are_the_products(dtype):
    """Views of several reductions, flipped and blurred, some in the margin of padding that no box reaches."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (4, 3, 128, 192))).to(dtype)
    low = np.floor(random.uniform(0, 60, (12, 2)))
    boxes = torch.as_tensor(np.concatenate([low, low + np.floor(random.uniform(1, 60, (12, 2)))], 1)).float()
    flips, sigmas = torch.arange(12) % 2 == 0, torch.tensor([0.0, 0.7, 2.0] * 4)
    for at in (slice(0, 12), slice(0, 4)):
        inputs = boxes[at], flips[at], sigmas[at], 16
        expected = d.cut_each(images, *inputs)
        assert (d.cut_by_taps(images, *inputs) - expected).abs().max() < 1e-3
        assert (cut_by_taps(images, *inputs) - expected).abs().max() < 1e-3


def test_blur_is_a_gaussian_convolution_of_the_view():
    images = torch.rand(1, 3, 40, 50) * 255
    boxes, flips = torch.tensor([[2.0, 3, 38, 47], [2, 3, 38, 47]]), torch.tensor([True, True])
    sharp, blurred = d.cut_each(images, boxes, flips, torch.tensor([0.0, 1.3]), 24)
    x = torch.arange(-4, 5)
    g = torch.exp(-(x**2) / (2 * 1.3**2))
    kernel = (g[:, None] * g / g.sum() ** 2)[None, None]
    expected = F.conv2d(F.pad(sharp[:, None], (4, 4, 4, 4), mode="reflect"), kernel)[:, 0]
    torch.testing.assert_close(blurred, expected, atol=1e-3, rtol=1e-4)
    assert d.blur_matrices(torch.tensor([1.0]), 3).sum(-1) == pytest.approx(torch.ones(1, 3))


@pytest.mark.parametrize("kind", ["hu", "rgb", "photo"])
def test_a_view_does_not_depend_on_its_batch(kind):
    recipe = replace(d.RECIPES["photo"], global_size=32, local_size=16)
    recipe = recipe if kind == "photo" else replace(SMALL, gram_size=48)
    images = torch.stack([photo(i, (64, 64)) for i in range(4)])
    if kind == "hu":
        images = images.short() * 9 - 1100
    whole = d.render(images, d.plan(0, 3, [5, 6, 7, 8], recipe))
    part = d.render(images[2:3], d.plan(0, 3, [7], recipe))
    for all_views, views in zip(whole, part):
        if all_views is None:
            continue
        assert torch.equal(all_views.unflatten(0, (-1, 4))[:, 2], views) and all_views.isfinite().all()
    assert whole.globals.shape == (8, 3, 32, 32) and whole.locals.shape == (4 * recipe.local_crops, 3, 16, 16)
    assert not torch.equal(whole.globals[2], whole.globals[6])


def test_views_of_odd_sizes_do_not_depend_on_their_batch():
    """BLAS adds in another order for other strides: those of the rows may not come from the batch's largest view."""
    recipe = replace(d.RECIPES["ct"], global_size=98, local_size=42)  # patches of 14 pixels
    images = torch.stack([photo(i, (200, 333)) for i in range(4)])
    for step in range(2):
        whole = d.render(images, d.plan(0, step, range(4), recipe))
        for i in range(4):
            for all_views, views in zip(whole[:2], d.render(images[i : i + 1], d.plan(0, step, [i], recipe))):
                assert torch.equal(all_views.unflatten(0, (-1, 4))[:, i], views)


def test_ct_windows_are_shared_by_the_three_slices_and_stay_near_the_named_ones():
    looks = np.random.default_rng(0).random((1, 4000, d.LOOK))
    levels, widths = d.look_windows(looks, "any")
    assert widths.min() > 400 * 0.8 and widths.max() < 1500 * 1.25
    assert -600 - 190 < levels.min() < -500 and 300 < levels.max() < 300 + 190
    levels, widths = d.look_windows(looks, "wide")
    assert 1500 * 0.81 < widths.min() < 1250 and 1800 < widths.max() < 1500 * 1.23
    assert -150 - 190 < levels.min() < -300 and 0 < levels.max() < -150 + 190
    assert d.eval_view("hu16-v1")["window"] == [-150, 1500]  # what views vary around
    images = torch.full((1, 3, 40, 40), -300, dtype=torch.int16)
    crops = d.render(images, d.plan(0, 1, [4], replace(SMALL, blur=(0, 0, 0))))
    values = crops.locals * torch.tensor(d.STD)[:, None, None] + torch.tensor(d.MEAN)[:, None, None]
    flat = values.std((2, 3)) < 1e-4  # views without noise
    assert flat.any() and torch.allclose(values.mean((2, 3))[flat.all(1)].std(1), torch.tensor(0.0), atol=1e-5)


def test_gram_crops_are_the_undistorted_globals():
    recipe = replace(SMALL, gram_size=64, blur=(1.0, 1.0, 1.0))
    images = torch.stack([photo(i, (64, 64)) for i in range(2)])
    crops = d.render(images, d.plan(0, 0, [0, 1], recipe))
    p = d.place(d.plan(0, 0, [0, 1], recipe), [(64, 64)] * 2)
    for v in range(2):
        for b in range(2):
            expected = pillow_crop(images[b], p.boxes[v, b], 64, p.flips[v, b]).clamp(0, 255)
            whole = d.normalise(expected[None] / 255)[0]
            torch.testing.assert_close(crops.gram[2 * v + b], whole, atol=1e-3, rtol=1e-3)


def test_noise_is_normal_alike_and_new_for_every_pixel():
    noise, other = torch.zeros(1, 3, 3, 64, 64), torch.zeros(1, 1, 3, 64, 64)
    d.add_noise_(noise, np.array([[10.0, 0.0, 20.0]]), np.array([[5, 6, 7]]))
    assert not noise[0, 1].any()
    assert noise[0, 0].std() == pytest.approx(10, rel=0.02) and abs(noise[0, 0].mean()) < 0.2
    assert noise[0, 2].std() == pytest.approx(20, rel=0.02)
    assert abs(np.corrcoef(noise[0, 0, 0].flatten(), noise[0, 0, 1].flatten())[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[0, 0].flatten(), noise[0, 2].flatten())[0, 1]) < 0.03
    d.add_noise_(other, np.array([[20.0]]), np.array([[7]]))
    assert torch.equal(other[0, 0], noise[0, 2])


@pytest.mark.parametrize("windows", ["wide", "any"])
def test_the_one_pass_for_accelerators_gives_the_looks_of_a_cpu(windows):
    """hu_look and rgb_look are compiled on a card; here they run as they are, noise of deviation 0 on quiet views."""
    plan = d.plan(3, 1, range(5), replace(d.RECIPES["ct"], windows=windows))
    for views in (slice(0, 2), slice(2, None)):
        x = 500 * torch.randn(*plan.flips[views].shape, 3, 12, 12)
        one_pass = d.hu_look(x.clone(), *d.hu_numbers(plan, views, x))
        of_codes = d.rgb_look(x.clone() / 9 + 128, *d.rgb_numbers(plan, views, x))
        assert torch.equal(of_codes, d.normalise(d.intensities(x / 9 + 128, torch.uint8, plan, views)))
        assert torch.equal(one_pass, d.normalise(d.intensities(x, torch.int16, plan, views)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_accelerator_gets_views_of_the_same_shapes(monkeypatch, dtype, compiled):
    """On the device without data: every tensor must be there, and nothing may ask for a value."""
    monkeypatch.setattr(d, "compile_once", lambda function: function)
    monkeypatch.setattr(d.cut_by_taps, "__defaults__", (d.compile_once,))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # this device has none
    images, recipe = torch.zeros(4, 3, 64, 128, dtype=dtype), replace(SMALL, gram_size=48, blur=(0.5, 0.5, 0.5))
    plan = d.plan(0, 0, range(4), recipe)
    for ours, theirs in zip(d.render(images.to("meta"), plan, compiled), d.render(images, plan)):
        assert ours.device.type == "meta" and ours.shape == theirs.shape and ours.dtype == theirs.dtype


def test_photo_colour_against_colorsys_and_plain_formulas():
    x = torch.rand(5, 3, 6, 6)
    turned = d.shift_hue(x, torch.full((5,), 0.07))
    for i in range(5):
        h, s, v = colorsys.rgb_to_hsv(*x[i, :, 2, 3].tolist())
        assert turned[i, :, 2, 3].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + 0.07) % 1, s, v), abs=1e-5)
    looks = np.full((5, d.LOOK), 0.99)  # no jitter, no grey

    def coloured(solarized):
        out = x.clone()
        d.colour_(out, looks, np.full(5, solarized))
        return out

    assert torch.equal(coloured(False), x)
    solarized = coloured(True)
    assert torch.equal(solarized, torch.where(x >= 128 / 255, 1 - x, x))
    looks[:, 9] = 0.1
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(coloured(False), (x * weights).sum(1, keepdim=True).expand_as(x))
    looks = np.full((5, d.LOOK), 0.5)  # jittered, each factor 1, a hue of 0
    looks[:, 9], grey = 0.99, (x * weights).sum(1, keepdim=True)
    torch.testing.assert_close(coloured(False), x, atol=1e-5, rtol=0)
    ways = (0.68, 0 * grey), (0.68, grey.mean((1, 2, 3), keepdim=True)), (0.84, grey)
    for op, (factor, other) in enumerate(ways):  # brightness, contrast, saturation
        looks[:, 1:4] = 0.5
        looks[:, 1 + op] = 0.1  # 0.8 of the largest reduction
        torch.testing.assert_close(coloured(False), factor * x + (1 - factor) * other, atol=1e-5, rtol=0)
    share = [(d.plan(0, s, range(50), d.RECIPES["photo"]).solarized[:3]).mean(1) for s in range(40)]
    assert np.mean(share, 0) == pytest.approx([0, 0.2, 0], abs=0.03)
    blurred = [(d.plan(0, s, range(50), d.RECIPES["photo"]).sigmas > 0).mean(1)[:3] for s in range(40)]
    assert np.mean(blurred, 0) == pytest.approx([1, 0.1, 0.5], abs=0.04)


def test_eval_view_is_a_plain_crop_of_the_body():
    images = torch.stack([photo(i, (50, 64)) for i in range(2)])
    boxes = d.eval_boxes([(50, 64)] * 2, [(10, 20, 40, 60), (0, 0, 50, 64)])
    assert boxes.tolist() == [[5, 20, 45, 60], [0, 7, 50, 57]]
    out = d.render_eval(images, d.eval_view("rgb-v1", 32), boxes)
    expected = pillow_crop(images[0], boxes[0], 32, False).clamp(0, 255)[None] / 255
    torch.testing.assert_close(out[:1], d.normalise(expected), atol=1e-3, rtol=1e-3)
    hu = d.render_eval(torch.full((1, 3, 32, 32), 225, dtype=torch.int16), d.eval_view("hu16-v1", 16))
    torch.testing.assert_close(hu, d.normalise(torch.full((1, 3, 16, 16), 0.75)))


# loading


def batches(source, **options):
    options = dict(recipes=SMALL, seed=1, steps=range(2, 5), batch=8) | options
    return list(d.make_loader(source, **options))


def equal(a, b):
    alike = np.array_equal(a.plan.boxes, b.plan.boxes)
    return alike and torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)


def test_readers_start_at_once_and_leave_the_global_generator_alone(ct):
    before, others = torch.get_rng_state(), set(multiprocessing.active_children())
    loader = d.make_loader(ct, SMALL, 0, range(3), 4, workers=1)
    assert len(set(multiprocessing.active_children()) - others) == 1  # before the caller builds what they would inherit
    assert torch.equal(torch.get_rng_state(), before)
    assert next(loader).step == 0
    loader.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_readers_ignore_what_tells_a_run_to_save(ct, number):
    others = set(multiprocessing.active_children())
    loader = d.make_loader(ct, SMALL, 0, range(20), 4, workers=1)
    (reader,) = set(multiprocessing.active_children()) - others
    assert next(loader).step == 0
    os.kill(reader.pid, number)  # a batch system sends it to every process of the job
    assert [batch.step for batch in loader] == list(range(1, 20))


@pytest.mark.slow
def test_a_script_that_fails_ends_though_its_readers_are_deaf(ct):
    script = (
        "import sys, data\n"
        f"source = data.open_source({str(ct.root)!r})\n"
        "loader = data.make_loader(source, data.RECIPES['ct'], 0, range(9), 4, workers=2)\n"
        "def main():\n    batches = loader\n    next(batches)\n    raise RuntimeError('no such luck')\n"
        "main()"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=Path(d.__file__).parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no such luck" in done.stderr


def test_a_loader_takes_the_name_of_a_recipe(ct):
    named, given = (next(d.make_loader(ct, recipe, 0, range(1), 4)) for recipe in ("ct", d.RECIPES["ct"]))
    assert equal(named, given)
    with pytest.raises(ValueError, match="there is no recipe 'xray'; known are ct, ct_any_window, photo"):
        d.make_loader(ct, "xray", 0, range(1), 4)


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_do_not_depend_on_workers(ct, workers):
    plain, other = batches(ct), batches(ct, workers=workers)
    assert [b.step for b in plain] == [2, 3, 4] and all(equal(a, b) for a, b in zip(plain, other, strict=True))


def test_batches_do_not_depend_on_ranks_micro_batches_or_where_the_run_started(ct):
    whole = batches(ct)
    for world, micro in ((1, 2), (2, 4), (4, 2), (2, 2)):
        ranks = [batches(ct, rank=r, world=world, micro_batch=micro) for r in range(world)]
        per_step = 8 // world // micro
        for n, expected in enumerate(whole):
            parts = [b for rank in ranks for b in rank[n * per_step : (n + 1) * per_step]]
            assert np.array_equal(np.concatenate([p.ids for p in parts]), expected.ids)
            assert torch.equal(torch.cat([p.images for p in parts]), expected.images)
            masks = torch.cat([p.masks.unflatten(0, (2, -1)) for p in parts], 1).flatten(0, 1)
            assert torch.equal(masks, expected.masks)
            assert np.array_equal(np.concatenate([p.plan.boxes for p in parts], 1), expected.plan.boxes)
    assert equal(batches(ct, steps=range(4, 5))[0], whole[2])
    assert batches(ct, steps=range(10**6, 10**6 + 1))[0].step == 10**6
    with pytest.raises(ValueError, match="batch 8 is not a multiple of ranks x micro-batch = 2 x 3"):
        batches(ct, world=2, micro_batch=3)


def test_slices_of_different_sizes_are_padded_with_air_outside_every_box(tmp_path):
    root = make_ct(tmp_path, series=4)
    index = root / "_index" / "index.csv"
    np.save(root / "toy" / "1.2.1.npy", volume(1)[:, :, :45])
    index.write_text(index.read_text().replace(",1.2.1,", ",1.2.1,").replace("48,48", "48,48"))
    lines = [
        line.replace("48,48", "48,45") if "/1.2.1.npy" in line else line for line in index.read_text().splitlines()
    ]
    index.write_text("\n".join(lines) + "\n")
    batch = batches(d.open_source(root), batch=4)[0]
    assert batch.images.shape == (4, 3, 64, 64)
    j = [d.open_source(root).rows[i]["series"] for i in batch.ids].index("1.2.1")
    right = int(batch.plan.boxes[:, j, 3].max())
    assert right <= 45 and (batch.images[j, :, :, right:] == -1024).all()


@pytest.mark.parametrize("encoding", ["hu16-v1", "rgb-v1"])
def test_readers_bring_the_part_of_a_slice_that_its_views_need(tmp_path, encoding):
    source = d.open_source(make_ct(tmp_path, encoding, size=96))
    assert torch.equal(source.read(9, (3, 20, 40, 81)), source.read(9)[:, 3:40, 20:81])
    small = replace(SMALL, field=(0.1, 0.2))
    (batch,) = batches(source, recipes=small, steps=range(4, 5))
    assert batch.images.shape[2:] == (64, 64) and batch.images.is_contiguous()
    whole = torch.stack([source.read(i) for i in batch.ids])
    places = [source.size(i) for i in batch.ids], [source.body(i) for i in batch.ids]
    for ours, theirs in zip(d.render(batch.images, batch.plan)[:2], d.render(whole, d.place(batch.plan, *places))[:2]):
        assert torch.equal(ours, theirs)


def test_a_broken_file_stops_or_is_counted(ct, capsys):
    broken = ct.path(0)
    broken.write_bytes(b"not a volume")
    with pytest.raises(OSError, match=r"1.2.0.npy cannot be read.*--skip-bad 0"):
        batches(ct, steps=range(4))
    capsys.readouterr()
    found = batches(ct, steps=range(4), skip_bad=1, workers=1)  # one file, however often it comes up
    assert capsys.readouterr().out.count("skipped 1 of at most 1 broken files") == 1
    for batch in found:  # the next image of the batch stands in, with its own plan
        j = [str(ct.path(i)) for i in batch.ids].index(str(broken))
        k = (j + 1) % 8
        boxes = batch.plan.boxes[:, j], batch.plan.boxes[:, k]
        assert torch.equal(batch.images[j], batch.images[k]) and np.array_equal(*boxes)
    for path in {ct.path(i) for i in range(len(ct))}:
        path.write_bytes(b"not a volume")
    with pytest.raises(OSError, match="--skip-bad 1 allows no more"):
        batches(ct, steps=range(4), skip_bad=1, workers=1)
    with pytest.raises(OSError, match="^no file of a whole micro-batch can be read; first: .*cannot be read"):
        batches(ct, steps=range(4), skip_bad=99, workers=1)  # one line, also from a reading process


def test_large_photographs_are_read_small_and_rendered_alike(tmp_path):
    picture = photo(0, (900, 1200))
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=98)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "b.png")
    recipe = replace(d.RECIPES["photo"], global_size=32, local_size=16, local_scale=(0.2, 0.32), blur=(0, 0, 0))
    for name in ("a.jpg", "b.png"):
        choices = d.plan(0, 0, [0], recipe)
        small, boxes = d.read_photo(tmp_path / name, functools.partial(d.boxes_in, choices), d.sides(recipe))
        placed = choices._replace(boxes=boxes[:, None])
        assert small.shape[1] < 460 and (placed.boxes[:, 0, 2:] <= torch.tensor(small.shape[1:]).numpy() + 1e-3).all()
        sides = (placed.boxes[:, 0, 2:] - placed.boxes[:, 0, :2]).min(1)
        assert (sides >= 2 * np.array([32] * 2 + [16] * 8) * 0.99).all()
        one, two = d.render(small[None], placed), d.render(picture[None], choices)
        assert (one.globals - two.globals).abs().mean() < 0.03 and (one.locals - two.locals).abs().mean() < 0.03
    source = d.open_source(tmp_path)
    batch = batches(source, recipes=recipe, batch=2)[0]
    assert d.render(batch.images, batch.plan).globals.isfinite().all()


def test_mixed_sizes_are_picked_by_step_alike_on_all_ranks(ct):
    recipes = [SMALL, replace(SMALL, global_size=48)]
    picked = [d.pick_recipe(recipes, 0, step).global_size for step in range(50)]
    assert set(picked) == {32, 48}
    first = batches(ct, recipes=recipes, steps=range(6))
    sizes = [d.pick_recipe(recipes, 1, s).global_size for s in range(6)]
    assert [b.masks.shape[1] for b in first] == [(size // 16) ** 2 for size in sizes]


def test_memory_stays_flat_over_updates(ct):
    loader = d.make_loader(ct, SMALL, 0, range(60), 8)
    sizes = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss for _ in loader]
    assert sizes[-1] - sizes[20] < 20_000  # KiB


def test_fixed_epochs_repeat_batches_crops_and_masks(ct):
    found = batches(ct, steps=range(2 * (len(ct) // 8)), fixed=True)
    once = len(found) // 2
    assert once > 1
    for a, b in zip(found[:once], found[once:]):
        assert (
            np.array_equal(a.ids, b.ids)
            and torch.equal(a.masks, b.masks)
            and np.array_equal(a.plan.boxes, b.plan.boxes)
        )
    assert not np.array_equal(found[0].ids, found[1].ids)


# neighbours at a distance


def test_neighbours_at_a_distance_are_the_nearest_true_slices(tmp_path):
    """Also at the ends, in parts of a source, and where slices are thicker than the distance."""
    hu = np.arange(12, dtype=np.int16)[:, None, None] + np.zeros((1, 8, 8), np.int16)
    lines = []
    for name, spacing in (("thin", 1.25), ("thick", 5.0)):
        (tmp_path / "t").mkdir(exist_ok=True)
        np.save(tmp_path / "t" / f"{name}.npy", hu)
        lines += [[f"t/{name}.npy", "hu16-v1", "t", name, "s", name, f"{name}.{z}", z, z * spacing, 1, 1, spacing, 8, 8,
                   0, 8, 0, 8] for z in range(1, 11)]  # fmt: skip
    write_index(tmp_path, lines)
    plain, far = d.open_source(tmp_path), d.open_source(tmp_path).at_distance(4)
    channels = [[int(c[0, 0]) for c in source.read(i)] for source in (plain, far) for i in (0, 4, 9, 10, 14)]
    assert channels[:5] == [[0, 1, 2], [4, 5, 6], [9, 10, 11], [0, 1, 2], [4, 5, 6]]
    assert channels[5:] == [[0, 1, 4], [2, 5, 8], [7, 10, 11], [0, 1, 2], [4, 5, 6]]  # 4 mm are 3 thin slices
    make_split(tmp_path, {"t/thin": "train", "t/thick": "val_select"})
    part = d.open_for(far, "fit", limit=5, z_stride=2)
    assert part.neighbour_mm == 4 and [int(c[0, 0]) for c in part.take(np.array([2])).read(0)][1:] == [5, 8]
    assert d.eval_view("hu16-v1", 64, 4.0)["neighbour_mm"] == 4 and "neighbour_mm" not in d.eval_view("hu16-v1")


def test_slices_whose_neighbours_are_inside_them_refuse_a_distance(tmp_path):
    make_ct(tmp_path / "ct", "rgb-v1")
    with pytest.raises(ValueError, match="neighbours 2.5 mm away need whole volumes.*--format hu16"):
        d.open_source(tmp_path / "ct").at_distance(2.5)
    assert d.open_source(tmp_path / "ct").at_distance(0).neighbour_mm is None


def test_readers_of_a_killed_process_end_although_nobody_takes_what_they_read(tmp_path):
    """Else they keep the lock of the run's folder, and the same command cannot go on."""
    root = make_ct(tmp_path, series=4)
    script = (
        f"import sys, time; sys.path.insert(0, {str(Path(d.__file__).parent)!r})\n"
        "import data, multiprocessing\n"
        f"source = data.open_source({str(root)!r})\n"
        "recipe = data.Recipe('ct', global_size=32, local_size=16, local_crops=200)\n"  # fills a pipe of 64 kB
        "batches = data.make_loader(source, recipe, 0, range(100), 8, workers=2)\n"
        "next(batches); time.sleep(0.5)\n"
        "print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    readers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(readers) == 2
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in readers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in readers if running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def running(pid):
    """Not gone, and no zombie that nobody has waited for."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

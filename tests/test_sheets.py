"""The drawing tools: what is drawn is what is there, and planted faults fail in words."""

import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import SMALL, make_ct, make_photos, make_split, write_index

import data as d
from tools import inspect_step, validate_samples
from tools.lib import sheet

torch.set_num_threads(1)


def chest(size=96):
    """HU [3, size, size] of a body with two lungs, vessels that move from slice to slice, a spine and noise."""
    random, y, x = np.random.default_rng(0), *np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    slices = []
    for shift in (-0.1, 0, 0.1):
        hu = np.where((x / 0.95) ** 2 + (y / 0.75) ** 2 < 1, 30.0, -1000.0)
        for side in (-0.45, 0.45):
            hu[((x - side) / 0.33) ** 2 + (y / 0.5) ** 2 < 1] = -850
            hu[(x - side) ** 2 + (y - shift) ** 2 < 0.01] = 50
        hu[x**2 + (y - 0.45) ** 2 < 0.02] = 600
        slices.append(hu + random.normal(0, 15, hu.shape))
    return np.array(slices).astype(np.int16)


def make_slice(root, encoding, hu, body=(12, 84, 2, 94)):
    """A processed folder of one slice with two neighbours; body is y0, y1, x0, x1, as in the index."""
    root.mkdir(exist_ok=True)
    path = "s.npy" if encoding == "hu16-v1" else "s.png"
    if encoding == "hu16-v1":
        np.save(root / path, hu)
    else:
        codes = [d.window_codes(h, *d.WINDOWS_HU[name]) for h, name in zip(hu, ("lung", "soft", "bone"))]
        Image.fromarray(np.stack(codes, -1)).save(root / path)
    ids = [path, encoding, "toy", "P0", "s0", "s", "s.1"]
    write_index(root, [[*ids, 1, 2.5, 3.5, 3.5, 2.5, *hu.shape[1:], *body]])
    return root


def validate(root, capsys, *flags):
    """-> (exit code, what was printed)"""
    code = validate_samples.main(["--data", str(root), *flags])
    return code, capsys.readouterr().out


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def locate(picture, patch):
    """(y, x) of a copy of `patch` in the picture, or None; rounding may move a code by one."""
    lines = [line.tobytes() for line in picture]
    for k in range(0, len(patch), 40):  # rows to look for until one is there to the byte
        row = patch[k].tobytes()
        for y in range(k, len(picture) - len(patch) + k + 1):
            at = lines[y].find(row)
            if at >= 0 and at % 3 == 0:
                there = picture[y - k :, at // 3 :][: len(patch), : patch.shape[1]].astype(int)
                if there.shape == patch.shape and np.abs(there - patch).max() <= 1:
                    return y - k, at // 3
    return None


# validate_samples


@pytest.mark.parametrize("encoding", ["hu16-v1", "rgb-v1"])
def test_a_chest_passes_and_its_numbers_are_right(tmp_path, capsys, encoding):
    hu = chest()
    code, printed = validate(make_slice(tmp_path / "ct", encoding, hu), capsys)
    first, last = printed.strip().split("\n")
    name = "s.npy#1" if encoding == "hu16-v1" else "s.png"
    assert code == 0 and first.startswith(f"pass  {name}, patient toy/P0: lung ")
    assert last.startswith("1 of 1 pass; wrote ")
    width = pixels(tmp_path / "ct" / "_validation" / "samples_all_0.png").shape[1]
    assert 6 * validate_samples.SIDE < width <= 1800  # a screen, and the picture of tools/demo.py
    source = d.open_source(tmp_path / "ct")
    measured = validate_samples.measure(validate_samples.as_rgb(source.read(0).numpy(), encoding), source.body(0))
    box = hu[:, 12:84, 2:94]  # the truth, without any code
    assert measured["lung"] == pytest.approx(((box[0] > -950) & (box[0] < -500)).mean(), abs=0.003)
    inside = [(b > low) & (b < high) for b, low, high in zip(box, (-1350, -160, -450), (150, 240, 1050))]
    assert measured["saturated"] == pytest.approx([1 - share.mean() for share in inside], abs=0.01)
    for k in (0, 1):
        apart = np.abs(box[k] - 1.0 * box[k + 1])[inside[k] & inside[k + 1]].mean()
        assert measured["differences"][k] == pytest.approx(apart, abs=1)
    assert abs(measured["tissue_hu"] - 30) < 2


def test_the_sheet_shows_the_windows_of_the_slice(tmp_path, capsys):
    hu = chest(validate_samples.SIDE)  # drawn pixel by pixel
    for encoding in ("hu16-v1", "rgb-v1"):
        root = make_slice(tmp_path / encoding, encoding, hu, (40, 256, 6, 282))
        validate(root, capsys, "--out", str(tmp_path / "sheet.png"))
        picture, slices = pixels(tmp_path / "sheet.png"), hu[[1, 1, 1]] if encoding == "hu16-v1" else hu
        codes = {name: d.window_codes(h, *d.WINDOWS_HU[name]) for h, name in zip(slices, ("lung", "soft", "bone"))}
        rgb = [d.window_codes(h, *d.WINDOWS_HU[name]) for h, name in zip(hu, ("lung", "soft", "bone"))]
        tiles = [np.stack([c] * 3, -1) for c in codes.values()] + [np.stack(rgb, -1)]
        columns = [locate(picture, tile[50:240, 10:278])[1] for tile in tiles]  # inside box and scale bar
        assert columns == sorted(columns) and len(set(columns)) == 4


def tenth(hu):
    return (hu / 10).astype(np.int16)


PLANTED = {
    "off by ten": (tenth, "neither air nor lung: 0.0% of the box .*HU off by ten"),
    "off by ten, padded": (lambda hu: np.where(hu < -990, -1024, tenth(hu)).astype(np.int16), "neither air nor lung"),
    "ten times": (lambda hu: np.clip(hu * 10.0, -32000, 32000).astype(np.int16), "soft tissue has 240 HU or beyond"),
    "no rescale": (lambda hu: hu + np.int16(1024), "neither air nor lung.*soft tissue has .* HU"),
    "all air": (lambda hu: (hu % 40 - 1000).astype(np.int16), "no body: 0.0% of the box is tissue"),
    "saturated": (lambda hu: np.full_like(hu, 3000), "saturated: 100% / 100% / 100% of channels"),
    "neighbours lost": (lambda hu: hu[[1, 1, 1]], "channels R and G show the same slice.*channels G and B show"),
    "one neighbour lost": (lambda hu: hu[[0, 1, 1]], ": channels G and B show the same slice: they differ by 1.. HU"),
}


@pytest.mark.parametrize("encoding", ["hu16-v1", "rgb-v1"])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails_in_words(tmp_path, capsys, encoding, name):
    change, reason = PLANTED[name]
    code, printed = validate(make_slice(tmp_path / "ct", encoding, change(chest())), capsys)
    assert code == 1 and printed.startswith("FAIL  s.") and "0 of 1 pass" in printed
    assert re.search(reason, printed), printed


def test_identical_channels_and_broken_files_fail(tmp_path, capsys):
    root = make_slice(tmp_path / "ct", "rgb-v1", chest())
    grey = np.asarray(Image.open(root / "s.png"))[..., :1].repeat(3, 2)
    Image.fromarray(grey).save(root / "s.png")
    assert "all three channels are identical" in validate(root, capsys)[1]
    (root / "s.png").write_bytes((root / "s.png").read_bytes()[:900])
    code, printed = validate(root, capsys)
    assert code == 1 and "s.png cannot be read" in printed


def test_photographs_are_judged_too(tmp_path, capsys):
    make_photos(tmp_path)
    code, printed = validate(tmp_path, capsys)
    assert code == 0 and printed.count("pass  c") == 6
    assert "patient" not in printed
    Image.new("RGB", (30, 20), (90, 80, 70)).save(tmp_path / "flat.png")
    ends = (np.random.default_rng(0).random((50, 50, 3)) < 0.5).astype(np.uint8) * 255
    Image.fromarray(ends).save(tmp_path / "x.png")
    code, printed = validate(tmp_path, capsys)
    assert code == 1 and "6 of 8 pass" in printed
    assert "flat.png: constant image" in printed and "x.png: saturated: 100% of a channel" in printed


def test_a_photograph_is_shown_upright(tmp_path, capsys):
    """Stored lying on its side, with the EXIF word that says so; the sheet shows it as its camera was held."""
    values = np.random.default_rng(0).integers(0, 255, (validate_samples.SIDE, 200, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # stored rows are columns from the right
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.rot90(values)).save(tmp_path / "photos" / "a.png", exif=exif)
    assert validate(tmp_path / "photos", capsys, "--out", str(tmp_path / "x.png"))[0] == 0
    assert locate(pixels(tmp_path / "x.png"), values)


@pytest.mark.parametrize("size", [(300, 900), (900, 300), (500, 500), (30, 1500)])
def test_picture_curves_and_numbers_of_a_photograph_fill_its_row(tmp_path, capsys, size):
    values = np.random.default_rng(0).integers(60, 200, (size[1], size[0], 3)).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(values).save(tmp_path / "photos" / "a.png")
    assert validate(tmp_path / "photos", capsys, "--out", str(tmp_path / "x.png"))[0] == 0
    picture = pixels(tmp_path / "x.png")
    assert picture.shape[1] == validate_samples.PHOTO + 16
    ground = (picture == [20, 23, 26]).all(2)
    empty = ground[-60:-12, 8 : -validate_samples.SIDE - 16].all(0)  # columns beside the numbers
    assert empty.sum() <= sheet.GAP  # between picture and curves


def test_samples_are_a_function_of_the_seed_and_of_the_split(tmp_path, capsys):
    root = make_ct(tmp_path)
    names = [set(validate(root, capsys, "--seed", str(seed), "--n", "2")[1].split("\n")[:-2]) for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and len(names[0]) == 2
    splits = {0: "val_select", 1: "val_calib", 2: "val_test"}
    make_split(root, {f"toy/P{i}": splits.get(i, "train") for i in range(7)})
    for split, inside, outside in (("val_select", "P0", "P1"), ("val_calib", "P1", "P0"), ("train", "P3", "P2")):
        printed = validate(root, capsys, "--split", split, "--n", "4")[1]
        assert f" patient toy/{inside}: " in printed and f" patient toy/{outside}: " not in printed
        assert f"samples_{split}_0.png" in printed
    with pytest.raises(ValueError, match="--split val_test gives the final number once.*use one of train, val_select"):
        validate(root, capsys, "--split", "val_test")
    assert not (root / "_splits" / "test_uses.jsonl").exists()
    with pytest.raises(ValueError, match="--split tea: use one of train, val_select, val_calib, or leave"):
        validate(root, capsys, "--split", "tea")
    for flags in (["--n", "0"], ["--n", "101"], ["--seed", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            validate(root, capsys, *flags)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        validate(root / "nowhere", capsys)


def test_a_file_name_cannot_command_the_terminal(tmp_path, capsys):
    make_photos(tmp_path)
    Image.new("RGB", (30, 20), (90, 80, 70)).save(tmp_path / "a\x1b[31mred.png")
    printed = validate(tmp_path, capsys)[1]
    assert "\x1b" not in printed and "a\\x1b[31mred.png: constant image" in printed


# inspect_step


def make_run(root, folder, recipes, split=None, **flags):
    """A run folder as train_ssl.py leaves it, as far as tools may rely on it."""
    args = dict(data=str(root), seed=3, steps=100, extend=0, batch_size=6, micro_batch=2, limit=None, z_stride=1)
    args |= dict(overfit=False, gram_start=0)
    config = dict(args=args | flags, recipes=[asdict(r) for r in recipes], masking=[0.5, [0.3, 0.6]], patch_size=8)
    source = d.open_for(root, "fit") if split else d.open_source(root)
    config |= dict(split=split, index_sha256=source.index_sha256, split_sha256=source.split_sha256)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def inspect(folder, step, *flags):
    assert inspect_step.main(["--run", str(folder), "--step", str(step), "--out", str(folder / "x.png"), *flags]) == 0
    return pixels(folder / "x.png")


def by_hand(crops):
    """Normalised crops -> codes [n, h, w, 3] by the definition."""
    values = crops.double().numpy() * np.reshape(d.STD, (3, 1, 1)) + np.reshape(d.MEAN, (3, 1, 1))
    return np.floor(255 * values.clip(0, 1) + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def enlarged(crop):
    zoom = round(inspect_step.SIDE / len(crop))
    return crop.repeat(zoom, 0).repeat(zoom, 1)


def assert_masked_as(picture, crop, mask, cell):
    """The crop is in the picture: open patches to one code, masked ones dark with a hatch."""
    crop, cell = enlarged(crop), cell * round(inspect_step.SIDE / len(crop))
    cells = [(slice(r * cell, (r + 1) * cell), slice(c * cell, (c + 1) * cell)) for r, c in np.ndindex(mask.shape)]
    row, column = np.argwhere(~mask)[0] * cell
    y, x = locate(picture, crop[row : row + cell, column : column + cell])
    drawn = picture[y - row :, x - column :][: len(crop), : len(crop)]
    for area, hidden in zip(cells, mask.flatten()):
        same = (np.abs(drawn[area].astype(int) - crop[area]) <= 1).all(-1).mean()
        dark = (np.abs(drawn[area].astype(int) - crop[area] // 4) <= 1).all(-1).mean()
        assert (0.7 < dark < 0.8) if hidden else same == 1


@pytest.mark.parametrize("kind", ["hu", "rgb", "photo"])
def test_the_picture_holds_the_crops_and_masks_of_that_update(tmp_path, kind):
    recipe = replace(SMALL, gram_size=64)
    if kind == "photo":
        root = make_photos(tmp_path / "data")
        recipe = replace(d.RECIPES["photo"], global_size=32, local_size=16, local_crops=3, gram_size=64)
    else:
        root = make_ct(tmp_path / "data", "hu16-v1" if kind == "hu" else "rgb-v1")
    make_run(root, tmp_path / "run", [recipe])
    picture = inspect(tmp_path / "run", 5, "--images", "3")
    # the same update, read in one piece
    (batch,) = d.make_loader(d.open_source(root), recipe, 3, range(4, 5), 6, patch_size=8, masking=(0.5, (0.3, 0.6)))
    crops, masks = d.render(batch.images, batch.plan), batch.masks.view(2, 6, 4, 4).numpy()
    assert masks[:, :3].any() and not masks[:, :3].any((2, 3)).all()
    for v, views in enumerate(by_hand(crops.globals).reshape(2, 6, 32, 32, 3)):
        for j in range(3):
            assert_masked_as(picture, views[j], masks[v, j], 8)
    # locals are enlarged as the globals are
    locals_ = by_hand(crops.locals).reshape(3, 6, 16, 16, 3)[:, :3].reshape(-1, 16, 16, 3).repeat(14, 1).repeat(14, 2)
    gram = [enlarged(crop) for crop in by_hand(crops.gram).reshape(2, 6, 64, 64, 3)[:, :3].reshape(-1, 64, 64, 3)]
    assert all(locate(picture, crop) for crop in [*locals_, *gram])
    fourth = by_hand(crops.locals).reshape(3, 6, 16, 16, 3)[0, 3].repeat(14, 0).repeat(14, 1)
    assert locate(picture, fourth) is None  # --images 3
    other = inspect(tmp_path / "run", 4, "--images", "3")
    assert locate(other, locals_[0]) is None


@pytest.mark.parametrize("locals_, rows", [(8, [4, 4]), (7, [7]), (15, [5, 5, 5]), (16, [6, 5, 5]), (1, [1])])
def test_no_local_crop_stands_alone_in_a_row(tmp_path, monkeypatch, locals_, rows):
    root, lengths, row = make_ct(tmp_path / "data"), [], inspect_step.sheet.row
    make_run(root, tmp_path / "run", [replace(SMALL, local_crops=locals_)])
    monkeypatch.setattr(inspect_step.sheet, "row", lambda tiles: lengths.append(len(tiles)) or row(tiles))
    inspect(tmp_path / "run", 2, "--images", "1")
    assert lengths == [3, *rows]  # 7 fit into the width


def test_gram_crops_appear_when_training_starts_to_use_them(tmp_path):
    root = make_ct(tmp_path / "data")
    make_run(root, tmp_path / "run", [replace(SMALL, gram_size=64)], gram_start=2)  # used from update 2, counted from 0
    one, two = (inspect(tmp_path / "run", step, "--images", "1") for step in (2, 3))
    assert one.shape[1] == two.shape[1] <= 1800 and two.shape[0] - one.shape[0] > 64 * 7  # a row more


def test_split_subset_sizes_and_overfit_are_those_of_the_run(tmp_path):
    root, recipes = make_ct(tmp_path / "data"), [SMALL, replace(SMALL, global_size=48, local_size=24)]
    make_split(root, {f"toy/P{i}": "train" if i else "val_select" for i in range(7)})
    config = make_run(root, tmp_path / "run", recipes, "train", limit=9, z_stride=2, overfit=True)
    source, drawn = d.open_for(root, "fit", limit=9, z_stride=2), set()
    source.path(source.order(3, 0, 6)[5]).write_bytes(b"rubbish")  # replaced from within its micro-batch
    how = dict(micro_batch=2, patch_size=8, masking=(0.5, (0.3, 0.6)), skip_bad=9, fixed=True)
    for step in (1, 2, 3):
        picture = inspect(tmp_path / "run", step)
        loader = d.make_loader(source, recipes, 3, range(step - 1, step), 6, **how)
        for batch, read in zip(loader, inspect_step.read_update(source, config, step, 6)):
            assert torch.equal(batch.images, read.images) and torch.equal(batch.masks, read.masks)
            zoom = round(inspect_step.SIDE / batch.plan.recipe.global_size)
            views = by_hand(d.render(batch.images, batch.plan).locals).repeat(zoom, 1).repeat(zoom, 2)
            assert all(locate(picture, crop) for crop in views)
        drawn.add(batch.plan.recipe.global_size)
    assert drawn == {32, 48}


def test_what_a_run_did_not_see_is_refused(tmp_path, capsys):
    root, folder = make_ct(tmp_path / "data"), tmp_path / "run"
    config = make_run(root, folder, [SMALL], steps=10)

    def refused(match, change=None, step=1, error=ValueError):
        (folder / "config.json").write_text(json.dumps(config | (change or {})))
        with pytest.raises(error, match=match):
            inspect(folder, step)

    for step, outside in ((10, False), (11, True)):
        inspect(folder, step, "--images", "1")
        assert ("NOT among the 10 updates" in capsys.readouterr().out) == outside
    refused("2", step=0, error=SystemExit)
    refused("split_sha256 is not that of the run", {"split_sha256": "0" * 64})
    refused(r"recipe of this run differs from ours in \['warp'\]", {"recipes": [asdict(SMALL) | {"warp": 1}]})
    refused(
        "nowhere is no folder here; .* give --data",
        {"args": config["args"] | {"data": str(tmp_path / "nowhere")}},
        error=OSError,
    )
    index = root / "_index" / "index.csv"
    index.write_text(index.read_text().replace("2.5", "2.6", 1))
    refused("index_sha256 is not that of the run")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged, or no JSON"):
        inspect(folder, 1)
    (folder / "config.json").write_text('{"args": {}}')
    with pytest.raises(ValueError, match="has no field 'recipes'"):
        inspect(folder, 1)
    (folder / "config.json").write_text(json.dumps(config | {"args": {"data": "x", "seed": 0}}))
    with pytest.raises(ValueError, match="has no field 'steps'; use the code that trained this run"):
        inspect(folder, 1)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        inspect(root, 1)


# sheet


def test_marks_are_where_they_should_be():
    black = Image.new("RGB", (300, 200))
    bar = np.asarray(sheet.scale_bar(black, 0.6))  # 50 mm are 83 pixels; 100 mm would be more than a third
    assert (bar[-8] == 255).all(-1).sum() in (83, 84, 85)
    boxes = [((10, 20, 60, 90), "#ff0000", "", 1), ((11, 21, 50, 80), "#00ff00", "", 1)]
    boxed = np.asarray(sheet.outline(black, boxes))
    red, green = ((boxed == colour).all(-1) for colour in ((255, 0, 0), (0, 255, 0)))
    assert red.sum() == 2 * (50 + 70) - 4 and red[10, 20] and red[59, 89]  # no line under another's rim
    assert green.sum() == 2 * (39 + 59) - 4
    name = "a" * 60 + "middle" + "z" * 60
    short = sheet.shorten(name, 200, 13)
    assert sheet.font(13).getlength(short) <= 200 and short[0] == "a" and short[-1] == "z" and "..." in short
    assert sheet.shorten("two\nlines", 200, 13) == "two lines"
    words = "one two three four five six seven eight nine ten"
    assert " ".join(sheet.wrap(words, 90, 13)) == words and len(sheet.wrap(words, 90, 13)) > 2


def test_no_type_is_smaller_than_a_reader_can_read():
    assert sheet.LEAST == 13 and sheet.font(9).size == 13 and sheet.font(20).size == 20


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12, 17, 21, 37])
def test_tiles_of_any_number_fill_the_sheet(count):
    white = Image.new("RGB", (50, 50), "white")
    block = np.asarray(sheet.justified([(white, [""])] * count))
    assert block.shape[1] == sheet.WIDTH <= 1800
    bright = block[(block == 255).all(2).mean(1) > 0.5]  # without titles
    assert (bright == 255).all(2).mean() > 0.93  # nothing but gaps between tiles
    assert (bright[:, :40] == 255).all() and (bright[:, -40:] == 255).all()
    widths = [len(part) for part in np.split(bright[0], np.flatnonzero(np.diff((bright[0] == 255).all(1)))[1::2])]
    assert min(widths) >= 150


def test_maps_are_enlarged_smoothly_or_as_they_are():
    values = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    assert (sheet.enlarge(values, 60, smooth=False) == values.repeat(10, 0).repeat(10, 1)).all()
    smooth = sheet.enlarge(values, 60)
    assert np.abs(np.diff(smooth, axis=0)).max() < 0.3 * np.abs(np.diff(values, axis=0)).max()
    assert np.abs(smooth.reshape(6, 10, 6, 10).mean((1, 3)) - values).max() < 0.2
    colours = np.stack([values, values.T, values], -1)
    assert (sheet.enlarge(colours, 60)[..., 0] == smooth).all() and sheet.enlarge(colours, 60).shape == (60, 60, 3)


def reds(picture):
    return np.argwhere((np.asarray(picture) == [255, 106, 90]).all(2))


def test_a_plot_has_ticks_and_curves_where_their_numbers_are():
    xs, ys = list(range(0, 101, 10)), [s**2 for s in range(0, 101, 10)]
    drawn = np.asarray(sheet.plot("losses", {"a": (xs, ys)}, (600, 300), "updates", [("x", 50, "cut")])).astype(int)
    orange = np.argwhere(np.abs(drawn - [255, 160, 48]).sum(2) < 60)
    curve = orange[orange[:, 0] >= 60]  # below title and names
    ends = np.array([[curve[:, 1].min(), curve[:, 0].max()], [curve[:, 1].max(), curve[:, 0].min()]])
    middle = curve[np.abs(curve[:, 1] - ends[:, 0].mean()) <= 1][:, 0].mean()
    quarter = 0.75 * ends[0, 1] + 0.25 * ends[1, 1]  # 50 squared is a quarter of 100 squared
    assert middle == pytest.approx(quarter, abs=4)
    line = reds(drawn)
    upright = line[np.abs(line[:, 1] - ends[:, 0].mean()) <= 2]
    assert len(upright) > 50 and np.ptp(upright[:, 1]) == 0  # the mark, in the middle
    grey = (drawn == [160, 168, 176]).all(2)
    assert np.abs(np.flatnonzero(grey[:-46, 55]) - ends[1, 1]).min() <= 1  # the tick of 10,000
    assert grey[-46:, 58:].any(1).sum() > 20 and grey[60:-46, :58].any()  # numbers below and beside the axes


def test_intervals_are_as_long_as_they_are_and_a_missing_one_is_a_dot():
    rows = [("probe", 0.8, 0.6, 0.9), ("few", 0.5, None, None), ("nan", 0.5, math.nan, math.nan)]
    drawn = np.asarray(sheet.intervals("t", rows, (800, 260)))
    left, right = 170, 800 - 210
    bright = np.argwhere((drawn[:, left : right + 1] == [255, 160, 48]).all(2))
    assert bright[:, 1].min() == pytest.approx(0.6 * (right - left), abs=1)
    assert bright[:, 1].max() == pytest.approx(0.9 * (right - left), abs=1)
    white = np.argwhere((drawn[50:210, left : right + 1] == 240).all(2))
    assert np.ptp(white[:, 1]) <= 13 and white[:, 1].mean() == pytest.approx(0.5 * (right - left), abs=1)
    assert np.median(reds(drawn)[:, 1]) == pytest.approx(left + 0.5 * (right - left), abs=1)

"""tools/check_duplicates.py: planted copies are found, strangers and neighbours are not, splits are guarded."""

import csv
import json
import os
import signal
import time
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from data import INDEX_COLUMNS, open_source
from tools import check_duplicates as cd
from tools import make_splits


def picture(seed, side=96):
    """A smooth random grey picture, uint8 [side, side]: different seeds share nothing."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (8, 8)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def noisy(pixels, seed, sigma=2.0):
    noise = np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def photographs(root, named):
    root.mkdir(parents=True, exist_ok=True)
    for name, pixels in named.items():
        Image.fromarray(pixels).save(root / name)
    return root


def index(root, rows, side):
    """Write index.csv; a row is (path, encoding, patient, z)."""
    (root / "_index").mkdir(parents=True, exist_ok=True)
    with open(root / "_index" / "index.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(INDEX_COLUMNS)
        for path, encoding, patient, z in rows:
            known = dict(path=path, encoding=encoding, dataset="d", patient=patient, series=path.split("/")[1], z=z)
            known |= dict(rows=side, cols=side, body_y1=side, body_x1=side, spacing_z=1, spacing_y=1, spacing_x=1)
            writer.writerow([known.get(name, 0) for name in INDEX_COLUMNS])
    return root


def check(root, *flags, code=0):
    assert cd.main(["--data", str(root), "--workers", "1", *map(str, flags)]) == code
    return json.loads((root / "_splits" / "duplicates.json").read_text())


def slow_near_pairs(hashes, owners, distance):
    return {
        (a, b)
        for a, b in combinations(range(len(hashes)), 2)
        if owners[a] != owners[b] and bin(int(hashes[a]) ^ int(hashes[b])).count("1") <= distance
    }


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_near_pairs_are_those_of_a_double_loop_each_once(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 6, dtype=np.uint64)[rng.integers(0, 6, 250)]
    for _ in range(distance + 1):  # a few flipped bits around six centres: many pairs on both sides of the limit
        hashes ^= np.where(
            rng.random(250) < 0.7, np.uint64(1) << rng.integers(0, 64, 250).astype(np.uint64), np.uint64(0)
        )
    owners = rng.integers(0, 100, 250)
    found = [tuple(pair) for pairs in cd.near_pairs(hashes, owners, distance) for pair in pairs.tolist()]
    expected = slow_near_pairs(hashes, owners, distance)
    assert len(found) == len(set(found)) and set(found) == expected and len(expected) > 100


def test_a_quarter_million_hashes_take_seconds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 250_000, dtype=np.uint64)
    planted = rng.choice(len(hashes), (500, 2), replace=False)
    for i, (a, b) in enumerate(planted):
        flips = rng.choice(64, i % 5, replace=False)  # 0 to 4 bits; 4 is too far
        hashes[b] = hashes[a] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    start = time.process_time()
    found = np.concatenate(list(cd.near_pairs(hashes, np.arange(len(hashes)), 3)))
    assert time.process_time() - start < 30  # 0.5 s on the machine this was written on
    assert {*map(tuple, found.tolist())} == {tuple(sorted(p)) for i, p in enumerate(planted.tolist()) if i % 5 < 4}


def test_the_hash_is_the_dct_written_out():
    thumb = picture(3, 32)
    coefs = np.zeros((8, 8))
    for u in range(8):
        for v in range(8):
            for y in range(32):
                for x in range(32):
                    wave = np.cos(np.pi * u * (y + 0.5) / 32) * np.cos(np.pi * v * (x + 0.5) / 32)
                    coefs[u, v] += wave * thumb[y, x]
    bits = coefs.flatten() > np.median(coefs)
    packed = cd.phash(thumb[None]).view(np.uint8)
    assert (np.unpackbits(packed) == bits).all()


def test_correlation_is_numpys():
    a, b = (np.stack([picture(seed, 32) for seed in seeds]) for seeds in ([1, 2], [3, 2]))
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b)]
    np.testing.assert_allclose(cd.correlation(a, b), expected, rtol=1e-4)


def test_photographs_exact_copies_near_copies_and_strangers(tmp_path):
    root = photographs(tmp_path, {f"p{i}.png": picture(i) for i in range(30)})
    rgb = np.stack([picture(i) for i in (40, 41, 42)], 2)
    pictures = {"rgb.png": rgb, "rgb_copy.png": rgb, "small.png": picture(7, 48), "noisy.png": noisy(picture(8), 0)}
    photographs(root, pictures)
    Image.fromarray(picture(9)).save(root / "jpeg.jpg", quality=40)
    found = check(root)
    pairs = "jpeg.jpg p9.png, noisy.png p8.png, p7.png small.png, rgb.png rgb_copy.png"
    assert found["groups"] == [pair.split() for pair in pairs.split(", ")]
    assert found["counts"]["exact_pairs"] == 1 and found["counts"]["near_pairs"] == 3
    assert found["pairs"][0] == {"a": "rgb.png", "b": "rgb_copy.png", "distance": 0}
    assert all(pair["distance"] <= 3 for pair in found["pairs"])


def test_copies_with_two_labels_are_named_with_both_files(tmp_path, capsys):
    """In one group or two, equal or nearly so; an unlabelled copy contradicts nobody."""
    pictures = {f"{name}.png": picture(seed, 96) for name, seed in zip("abcdefgh", (0, 0, 0, 1, 1, 2, 3, 3))}
    root = photographs(tmp_path, {name: np.stack([p] * 3, 2) for name, p in pictures.items()})
    Image.open(root / "f.png").convert("RGB").save(root / "near.jpg", quality=90)
    rows = "a.png,yes,s b.png,no,s c.png,yes,t d.png,yes, e.png,yes, f.png,no, near.jpg,yes, g.png,yes,".split()
    (root / "labels.csv").write_text("\n".join(["path,label,group", *rows]) + "\n")
    found = check(root)
    assert found["counts"]["exact_sets"] == 3 and found["counts"]["conflicting"] == 2
    assert found["conflicts"] == [
        {"a": "a.png", "b": "b.png", "labels": ["yes", "no"]},
        {"a": "f.png", "b": "near.jpg", "labels": ["no", "yes"]},
    ]
    assert "TWO LABELS of one picture: a.png is yes, b.png is no" in capsys.readouterr().out


def test_equal_bytes_in_another_shape_are_not_equal(tmp_path):
    wide = np.stack([picture(i)[:48] for i in range(3)], 2)
    photographs(tmp_path, {"wide.png": wide, "tall.png": wide.reshape(96, 48, 3)})
    assert check(tmp_path)["counts"]["exact_pairs"] == 0


def test_photographs_may_have_more_pixels_than_pillow_likes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    check(photographs(tmp_path, {"a.png": picture(1)}))


def test_constant_pictures_match_nothing_and_flat_ones_only_exactly(tmp_path):
    grey = np.full((40, 40), 99, np.uint8)
    dots = [grey.copy() for _ in range(3)]
    for i, dot in enumerate(dots):
        dot[i, i] = 101
    red = np.zeros((40, 40, 3), np.uint8) + np.array([200, 10, 10], np.uint8)
    named = {"red.png": red, "red2.png": red, "white.png": grey, "white2.png": grey}
    named |= {"dot0.png": dots[0], "copy0.png": dots[0], "dot1.png": dots[1]}
    found = check(photographs(tmp_path, named))
    assert found["groups"] == [["copy0.png", "dot0.png"]]
    assert found["counts"]["constant"] == 4 and found["counts"]["flat"] == 7


def test_one_picture_many_times_is_one_chain_not_all_pairs(tmp_path):
    found = check(photographs(tmp_path, {f"{i:03d}.png": picture(0) for i in range(60)}), "--max-pairs", 5)
    assert found["counts"]["exact_pairs"] == 59 and found["counts"]["near_pairs"] == 0
    assert [len(members) for members in found["groups"]] == [60] and len(found["pairs"]) == 5


def hu_volume(seed, slices=6):
    """int16 [Z,64,64]: neighbours are near copies, as in a scan."""
    start, end = picture(seed, 64).astype(float), picture(seed + 1000, 64).astype(float)
    return np.stack([(start + (end - start) * 0.002 * z) * 6 - 900 for z in range(slices)]).astype(np.int16)


def test_hu16_neighbours_of_one_patient_are_no_finding_and_a_shared_series_is(tmp_path):
    (tmp_path / "d").mkdir()
    volumes = {"s1": hu_volume(1), "s2": hu_volume(2), "s3": hu_volume(2), "s5": hu_volume(1)}
    volumes["s4"] = hu_volume(1) + np.int16(3)
    patient = {"s1": "P1", "s2": "P2", "s3": "P3", "s4": "P4", "s5": "P1"}
    for name, volume in volumes.items():
        np.save(tmp_path / "d" / f"{name}.npy", volume)
    index(tmp_path, [(f"d/{name}.npy", "hu16-v1", patient[name], z) for name in volumes for z in range(1, 5)], 64)
    found = check(tmp_path)
    assert found["groups"] == [["d/P1", "d/P4"], ["d/P2", "d/P3"]]
    assert found["counts"]["exact_pairs"] == 4  # P2 and P3, slice by slice; s1 and s5 belong to one patient
    assert found["pairs"][0] == {"a": "d/s2.npy#1", "b": "d/s3.npy#1", "distance": 0}


def test_the_middle_slice_is_hashed(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    volume = np.stack([picture(i, 64).astype(np.int16) * 6 - 900 for i in range(5)])
    np.save(tmp_path / "d" / "s.npy", volume)
    source = open_source(index(tmp_path, [("d/s.npy", "hu16-v1", "P", 3)], 64))
    monkeypatch.setattr(cd, "SOURCE", source, raising=False)
    codes = ((volume[3] + 1000) * (255 / 2000)).astype(np.uint8)
    expected = Image.fromarray(codes).resize((32, 32), Image.Resampling.BILINEAR)
    assert abs(cd.look(0)[1] - np.asarray(expected).astype(int)).max() <= 1


def test_strangers_with_close_hashes_are_told_apart_in_ct(tmp_path):
    """Two chests alike at 8x8 but not at 32x32: hash within 3 bits, r about 0.99. As photographs they count as near."""
    base, rough = picture(1, 64), np.random.default_rng(0).normal(0, 14, (32, 32)).repeat(2, 0).repeat(2, 1)
    volumes = [np.stack([a] * 3).astype(np.int16) * 6 - 900 for a in (base, (base + rough).clip(0, 255))]
    (tmp_path / "d").mkdir()
    for name, volume in zip("ab", volumes):
        np.save(tmp_path / "d" / f"{name}.npy", volume)
    index(tmp_path, [(f"d/{n}.npy", "hu16-v1", f"P{n}", 1) for n in "ab"], 64)
    _, thumbs, _ = cd.look_at_all(open_source(tmp_path), [0, 1], 1)
    assert cd.hamming(cd.phash(thumbs[:1]), cd.phash(thumbs[1:]))[0] <= 3
    assert cd.ALIKE_PHOTO < cd.correlation(thumbs[:1], thumbs[1:])[0] < cd.ALIKE_CT
    assert check(tmp_path)["groups"] == []
    pictures = {f"{n}.png": np.asarray(Image.fromarray(t).resize((64, 64))) for n, t in zip("ab", thumbs)}
    assert check(photographs(tmp_path / "photos", pictures))["groups"] == [["a.png", "b.png"]]


def rgb_folder(root, order=1):
    """Six patients of four slices; P4 holds a copy of a slice of P0."""
    rows = []
    for p in range(6):
        for z in range(1, 5):
            path = f"d/s{p}/{z:04d}.png"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.stack([picture(100 * p + z + c) for c in range(3)], 2)
            if (p, z) == (4, 2):
                pixels = np.stack([picture(3 + c) for c in range(3)], 2)
            Image.fromarray(pixels).save(root / path)
            rows.append((path, "rgb-v1", f"P{p}", z))
    return index(root, rows[::order], 96)


def test_rgb_slices_and_the_way_through_make_splits(tmp_path, capsys):
    root = rgb_folder(tmp_path)
    found = check(root)
    assert found["groups"] == [["d/P0", "d/P4"]] and found["pairs"][0]["a"] == "d/s0/0003.png"
    flags = ["--data", str(root), "--ratios", "train=0.5,val_test=0.5"]
    seed = 0
    duplicates = root / "_splits" / "duplicates.json"
    duplicates.unlink()  # where it is there, make_splits.py uses it
    while make_splits.main([*flags, "--seed", str(seed), "--force"]) == 0:
        groups = json.loads((root / "_splits" / "splits.json").read_text())["groups"]
        if groups["d/P0"] != groups["d/P4"]:
            break
        seed += 1
    assert check(root, code=1)["counts"]["crossing"] == 1
    assert "CROSSES SPLITS: d/P0 d/P4" in capsys.readouterr().out
    assert make_splits.main([*flags, "--seed", str(seed), "--force"]) == 0
    assert check(root)["counts"]["crossing"] == 0


def test_the_file_does_not_depend_on_workers_or_on_the_order_of_rows(tmp_path):
    a, b = check(rgb_folder(tmp_path / "a")), check(rgb_folder(tmp_path / "b", order=-1), "--workers", 2)
    a.pop("index_sha256"), b.pop("index_sha256")
    assert a == b


def test_what_cannot_be_read_is_named(tmp_path):
    root = rgb_folder(tmp_path)
    (root / "_splits").mkdir()
    groups = [b'{"version": 1, "groups": %s}' % value for value in (b"[]", b'{"d/P0": 3}', b"null")]
    for damaged in (b"", b"[]", b"{}", b"\xff", *groups):
        (root / "_splits" / "splits.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="splits.json.*make it again with tools/make_splits.py --force"):
            check(root)
    (root / "_splits" / "splits.json").unlink()
    (root / "d" / "s3" / "0002.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    with pytest.raises(OSError, match="s3/0002.png cannot be read"):
        check(root)
    assert not list((root / "_splits").iterdir())


def test_names_of_files_reach_no_terminal_raw(tmp_path, capsys):
    copy = picture(1)
    root = photographs(tmp_path, {"a\x1b[2J.png": copy, "b\u202eb.png": copy, "c.png": picture(2)})
    found = check(root)
    assert found["groups"] == [["a\x1b[2J.png", "b\u202eb.png"]]
    said = capsys.readouterr().out
    assert "same pictures in a\\x1b[2J.png b\\u202eb.png\n" in said and "\x1b" not in said and "\u202e" not in said


def test_a_pipe_among_the_photographs_is_refused_and_not_waited_for(tmp_path):
    root = photographs(tmp_path, {f"{i}.png": picture(i) for i in range(3)})
    os.mkfifo(root / "x.png")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(10)
    with pytest.raises(OSError, match="x.png"):
        check(root)
    signal.alarm(0)

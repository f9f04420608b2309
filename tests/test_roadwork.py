"""tools/make_roadwork.py: one seed = the same bytes, masks that are exact, and no short cut to the label."""

import csv
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import open_source
from tools import make_roadwork

SIZE, SHARES = "96x128", (0.002, 0.02)


def make(out, images, *flags, size=SIZE, share=SHARES):
    flags = ["--out", out, "--images", images, "--size", size, "--object-share", *share, "--workers", 1, *flags]
    assert make_roadwork.main(list(map(str, flags))) == 0
    return out


def rows_of(root):
    with open(root / "labels.csv", newline="") as f:
        return list(csv.DictReader(f))


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return make(tmp_path_factory.mktemp("streets"), 96, "--frames-per-scene", 2)


def test_more_pictures_other_workers_and_wrong_labels_change_no_picture(streets, tmp_path):
    few = files_of(make(tmp_path / "few", 9, "--frames-per-scene", 2, "--workers", 2, "--flip", 0.4))
    few.pop("labels.csv")
    many = files_of(streets)
    assert len(few) >= 9 and all(many[name] == content for name, content in few.items())
    other = files_of(make(tmp_path / "other", 2, "--seed", 1))
    assert not {content for name, content in other.items() if name != "labels.csv"} & set(many.values())


def test_the_table_is_a_label_table_of_the_pictures(streets):
    rows = rows_of(streets)
    assert [row["path"] for row in rows] == sorted({row["path"] for row in rows}, key=lambda p: p.split("/")[-1])
    source = open_source(streets)  # masks are not read as photographs
    assert [source.rows[i]["path"] for i in range(len(source))] == sorted(row["path"] for row in rows)
    assert len(source.groups) == 48 and {source.rows[i]["truth"] for i in range(96)} == {"roadwork", "no_roadwork"}
    by_source = Counter((row["source"], row["label"]) for row in rows)
    for source in {row["source"] for row in rows}:
        assert by_source[source, "roadwork"] == by_source[source, "no_roadwork"] > 0
    assert len({row["group"] for row in rows}) == len({(row["group"], row["truth"]) for row in rows}) == 48
    for column, least in (("source", 3), ("weather", 5), ("daytime", 3), ("street", 3)):
        assert len({row[column] for row in rows} - {""}) >= least, column
    assert all(row["label"] == row["truth"] for row in rows)
    assert 0 < sum(row["lat"] == "" for row in rows) < 48 and 0 < sum(row["weather"] == "" for row in rows) < 48


def test_masks_hold_what_the_table_says(streets):
    shares, sizes = [], []
    for row in rows_of(streets):
        mask = streets / "_labels" / "masks" / row["path"].replace(".jpg", ".png")
        assert mask.exists() == (row["truth"] == "roadwork") == (float(row["object_share"]) > 0)
        if mask.exists():
            codes = np.asarray(Image.open(mask))
            assert codes.shape == (96, 128) and set(np.unique(codes)) <= {0, 1, 2, 3}
            assert int(row["objects"]) in (1, 2, 3)
            assert (codes > 0).mean() == pytest.approx(float(row["object_share"]), rel=0.4)
            sizes.append((codes > 0).mean())
            shares.append(float(row["object_share"]))
    assert np.mean(sizes) == pytest.approx(np.mean(shares), rel=0.03)
    assert SHARES[0] * 0.6 < min(shares) < SHARES[0] * 2 and SHARES[1] * 0.5 < max(shares) < SHARES[1] * 1.5


def test_easy_streets_have_no_lookalikes():
    for number in range(20):
        s, plain = (make_roadwork.make_scene(3, number, 96, 128, (0.002, 0.02), easy) for easy in (True, False))
        kinds, usual = ([thing[0] for thing in one.things] for one in (s, plain))
        orange = [kind for kind, thing in zip(kinds, s.things) if thing[-2] == make_roadwork.COLOURS["orange"]]
        assert set(orange) <= {*make_roadwork.OBJECTS} and bool(orange) == bool(s.truth) == bool(plain.truth)
        assert [k for k in usual if k in make_roadwork.OBJECTS] == orange, "the same objects"


def test_without_the_objects_only_the_pixels_of_the_mask_change():
    """At a size that is drawn as it is written; so the label is in these pixels, and nowhere else."""
    height, width, found = 384, 1000, set()
    for number in range(6):
        s = make_roadwork.make_scene(3, number, height, width, (0.002, 0.02))
        if not s.truth:
            continue
        _, x, z, tall, *_ = next(thing for thing in s.things if thing[0] in make_roadwork.OBJECTS)
        s.things.append(("bin", 0.8 * x, 0.8 * z, 0.6 * tall, None, 0))  # covers a part of an object
        image, mask, share = make_roadwork.draw_frame(3, number, 0, s, height, width)
        bare = SimpleNamespace(**vars(s))
        bare.things = [thing for thing in s.things if thing[0] not in make_roadwork.OBJECTS]
        empty = make_roadwork.draw_frame(3, number, 0, bare, height, width)
        assert empty[2] == 0 and not np.asarray(empty[1]).any()
        difference = abs(np.asarray(image, int) - np.asarray(empty[0])).max(2)
        changed = difference > 0
        inside = np.asarray(mask) > 0
        assert inside.mean() == pytest.approx(share) and not (changed & ~inside).any()
        assert changed.sum() > 0.97 * inside.sum()
        assert difference[inside].mean() > 10  # grain has 2: visible at night and in fog too
        found.add(number)
    assert len(found) == 3


def test_wrong_labels_are_as_many_as_asked_and_the_truth_stays(streets, tmp_path):
    make_roadwork.draw_frame, drawn = lambda *args: (Image.new("RGB", (8, 8)), None, 0.0), make_roadwork.draw_frame
    try:
        rows = rows_of(make(tmp_path / "noisy", 2000, "--flip", 0.05, "--frames-per-scene", 10))
    finally:
        make_roadwork.draw_frame = drawn
    wrong = [row for row in rows if row["label"] != row["truth"]]
    assert 70 <= len(wrong) <= 130  # 100 expected, 4 standard deviations are 39
    assert abs(sum(row["truth"] == "roadwork" for row in wrong) - len(wrong) / 2) < 25
    conflicts = defaultdict(set)
    for row in rows:
        conflicts[row["group"]].add(row["label"])
    assert sum(len(labels) == 2 for labels in conflicts.values()) > 40  # near duplicates that contradict each other


def auc(positive, negative):
    return (np.sign(np.asarray(positive)[:, None] - np.asarray(negative)[None]).mean() + 1) / 2


def test_no_statistic_of_a_whole_picture_tells_the_label(streets):
    rows, statistics = rows_of(streets), []
    for row in rows:
        picture = np.asarray(Image.open(streets / row["path"]).convert("HSV")).astype(int)
        hue, saturation, value = picture.transpose(2, 0, 1)
        orange = (abs(hue - 16) < 9) & (saturation > 150) & (value > 90)
        statistics.append((orange.mean(), saturation.mean(), value.mean(), value.std()))
    real = np.array([row["truth"] == "roadwork" for row in rows])
    for column in np.array(statistics).T:
        assert 0.3 < auc(column[real], column[~real]) < 0.7  # 24 scenes against 24: a standard deviation is 0.08


def test_frames_of_a_scene_are_alike_and_scenes_are_not(streets):
    rows = rows_of(streets)
    pictures = [Image.open(streets / row["path"]).convert("L").resize((32, 32), 2) for row in rows]
    small = [np.asarray(picture, float).ravel() for picture in pictures]
    r = np.corrcoef(small)
    same = np.array([[a["group"] == b["group"] for a in rows] for b in rows])
    np.fill_diagonal(r, np.nan)
    assert np.nanmin(r[same]) > 0.93 and np.nanmedian(r[same]) > 0.99 and np.median(r[~same]) < 0.7
    pairs = [(a, b) for a, b in zip(rows[::2], rows[1::2])]
    assert all((streets / a["path"]).read_bytes() != (streets / b["path"]).read_bytes() for a, b in pairs)


def test_a_camera_notes_place_and_time_as_the_table_does(streets):
    placed = 0
    for row in rows_of(streets)[::6]:
        exif = Image.open(streets / row["path"]).getexif()
        assert exif.get_ifd(0x8769)[0x9003] == row["time"].replace("-", ":").replace("T", " ")
        gps = exif.get_ifd(0x8825)
        assert bool(gps) == bool(row["lat"])
        if gps:
            assert gps[1] == "N"
            placed += 1
            lat, lon = (sum(float(n) / 60**k for k, n in enumerate(gps[key])) for key in (2, 4))
            place = float(row["lat"]), float(row["lon"])
            assert (lat, lon * (-1 if gps[3] == "W" else 1)) == pytest.approx(place, abs=1e-6)
    assert placed


def test_mistakes_are_named(streets, tmp_path, capsys):
    for flags, words in (
        (["--size", "32x900"], "--size: each side at least 64, got 32x900"),
        (["--size", "64"], "--size: invalid size value: '64'"),
        (["--object-share", 0.0001, 0.01], "--object-share: from 0.00081 (10 pixels) to 0.1"),
        (["--object-share", 0.1, 0.01], "--object-share"),
        (["--flip", 0.5], "--flip: must be below 0.5"),
    ):
        with pytest.raises(SystemExit):
            make(tmp_path / "x", 1, *flags)
        assert words in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="not empty: name a new folder"):
        make(streets, 1)
    assert not list(tmp_path.iterdir())

"""tools/sample_weights.py: columns by hand, only ids of train, nothing learned from pictures that are held out."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from data import open_for, weighed
from tools import make_splits, sample_weights

TOWN = (52.52, 13.40)
KM = 1 / 111.195  # degrees of latitude per kilometre


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 pictures, split; facts.csv tells source and place: every tenth has none, others lie north of a town."""
    root = tmp_path_factory.mktemp("photos")
    facts = [("path", "label", "source", "lat", "lon")]
    names = [f"p{k:02d} é.png" for k in range(80)]
    for k, name in enumerate(names):
        Image.new("RGB", (8, 8), (k, 3 * k, 0)).save(root / name)
        label, km = ("yes", "no")[k % 4 > 0], (10, 49.9, 50.1, 199, 201, 499, 501, 3000)[k % 8]
        place = ("", "") if k % 10 == 0 else (f"{TOWN[0] + km * KM:.6f}", TOWN[1])
        facts.append((name, label, ("natix", "extra")[k % 3 == 0], *place))
    write(root / "labels.csv", facts)
    ratios = "train=0.5,val_select=0.2,val_calib=0.2,val_test=0.1"
    assert make_splits.main(["--data", str(root), "--ratios", ratios, "--min-per-class", "1"]) == 0
    return root


def write(path, lines):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(lines)
    return path


def table(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def split_of(folder):
    return json.loads((folder / "_splits" / "splits.json").read_text())["groups"]


def weigh(folder, tmp_path, *columns):
    """{path: weight} and the facts of the same paths."""
    out = tmp_path / "weights.csv"
    argv = ["--data", folder, "--out", out, "--by", *columns]
    assert sample_weights.main(list(map(str, argv))) == 0
    labels = {row["path"]: row for row in table(folder / "labels.csv")}
    return {row["path"]: float(row["weight"]) for row in table(out)}, labels


def share(weights, chosen):
    return sum(w for path, w in weights.items() if chosen(path)) / sum(weights.values())


def test_classes_and_sources_get_their_shares_and_only_train_is_written(folder, tmp_path):
    weights, facts = weigh(folder, tmp_path, "class")
    assert set(weights) == {path for path, split in split_of(folder).items() if split == "train"}
    assert share(weights, lambda path: facts[path]["label"] == "yes") == pytest.approx(0.5)
    assert np.mean(list(weights.values())) == pytest.approx(1)
    alike, _ = weigh(folder, tmp_path, "source")
    assert share(alike, lambda path: facts[path]["source"] == "natix") == pytest.approx(0.5)
    mixed, _ = weigh(folder, tmp_path, "source:natix=70,extra=30")
    assert share(mixed, lambda path: facts[path]["source"] == "natix") == pytest.approx(0.7)
    product, _ = weigh(folder, tmp_path, "class", "source:natix=0.7,extra=0.3")
    first = next(iter(weights))
    for path in weights:
        ratio = weights[path] * mixed[path] / (weights[first] * mixed[first])
        assert product[path] / product[first] == pytest.approx(ratio, rel=1e-6)


def great_circle_km(a, b):
    """By the angle between two unit vectors: another formula than haversine."""
    u, v = (
        np.array([math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)])
        for lat, lon in (map(math.radians, place) for place in (a, b))
    )
    return 6371 * math.atan2(np.linalg.norm(np.cross(u, v)), u @ v)


def test_distances_are_great_circles():
    random = np.random.default_rng(0)
    points, centres = (random.uniform((-90, -180), (90, 180), (n, 2)) for n in (40, 7))
    expected = [min(great_circle_km(point, centre) for centre in centres) for point in points]
    np.testing.assert_allclose(sample_weights.nearest_km(points, centres), expected, rtol=1e-9)
    assert sample_weights.nearest_km(np.array([[0, 179.9]]), [[0, -179.9]]) == pytest.approx([22.239], abs=0.01)
    assert np.isnan(sample_weights.nearest_km(np.array([[np.nan, np.nan]]), centres)).all()


def test_pictures_near_the_region_are_drawn_more_often(folder, tmp_path, capsys):
    regions = write(tmp_path / "regions.csv", [("name", "Lat", "lon"), ("town", *TOWN), ("far", -60, 100)])
    weights, facts = weigh(folder, tmp_path, f"gps:{regions}")
    by_km = {10: 5, 49.9: 5, 50.1: 2.5, 199: 2.5, 201: 1, 499: 1, 501: 0.3, 3000: 0.3}
    expected = {}
    for path in weights:
        if facts[path]["lat"]:
            km = (float(facts[path]["lat"]) - TOWN[0]) / KM
            expected[path] = by_km[min(by_km, key=lambda known: abs(known - km))]
    median = np.median(list(expected.values()))
    expected |= {path: median for path in weights if not facts[path]["lat"]}
    assert len(set(expected.values())) >= 4
    mean = np.mean(list(expected.values()))
    assert weights == pytest.approx({path: w / mean for path, w in expected.items()}, rel=1e-6)
    said = capsys.readouterr().out
    told = [line for line in said.splitlines() if "within" in line]
    drawn = {line.split(":")[0]: float(line.split("%")[0].split()[-1]) for line in told}
    assert drawn["drawn"] > drawn["train"] + 10


def test_centres_that_are_places_of_held_out_pictures_are_refused(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "photos")
    places = {path: (40 + k / 10, 5) for k, path in enumerate(sorted(split_of(folder)))}
    write(own / "labels.csv", [("path", "label", "lat", "lon"), *((path, "no", *at) for path, at in places.items())])
    for split in ("train", "val_select", "val_calib", "val_test"):
        path = next(path for path, name in split_of(folder).items() if name == split)
        regions = write(tmp_path / "regions.csv", [("lat", "lon"), (60, 60), places[path]])
        if split == "train":
            weigh(own, tmp_path, f"gps:{regions}")
            continue
        with pytest.raises(ValueError, match="regions.csv, row 2: this centre is the place of a picture outside train"):
            weigh(own, tmp_path, f"gps:{regions}")
    write(own / "labels.csv", [("path", "label", "lat", "lon"), *((path, "no", 40, 5) for path in places)])
    weigh(own, tmp_path, f"gps:{write(regions, [('lat', 'lon'), (40, 5)])}")  # a picture of train lies there too


def predictions(folder, path, split="train"):
    """Every third is given 0.9 for yes, one exactly 0.7."""
    rows = [row for row in table(folder / "labels.csv") if split_of(folder)[row["path"]] == split]
    lines = [("id", "group", "label", "p_no", "p_yes", "decision", "set")]
    lines += [(row["path"], "", row["label"], 0, (0.9, 0.7, 0.1)[k % 3], "", "") for k, row in enumerate(rows)]
    return write(path, lines)


def test_hard_negatives_are_drawn_twice_as_often(folder, tmp_path):
    file = predictions(folder, tmp_path / "predictions.csv")
    weights, facts = weigh(folder, tmp_path, f"hard:{file}")
    hard = {row["id"] for row in table(file) if float(row["p_yes"]) == 0.9 and facts[row["id"]]["label"] == "no"}
    low = min(weights.values())
    assert {path for path, w in weights.items() if w == pytest.approx(2 * low)} == hard and 3 < len(hard) < 20
    assert all(weights[path] == pytest.approx(low) for path in weights if path not in hard)
    for split in ("val_select", "val_test"):
        with pytest.raises(ValueError, match="ids are not in train, first .*: predict on train alone"):
            weigh(folder, tmp_path, f"hard:{predictions(folder, tmp_path / 'other.csv', split)}")


def test_sources_that_are_hard_are_drawn_more_often(folder, tmp_path):
    """Two runs: the first one's mean log loss of each source of train is how often the second draws its pictures."""
    file = predictions(folder, tmp_path / "predictions.csv")
    scores = [{**row, "p_no": 1 - float(row["p_yes"])} for row in table(file)]
    write(file, [list(scores[0]), *(list(row.values()) for row in scores)])
    weights, facts = weigh(folder, tmp_path, f"loss:{file}")
    each = {"natix": [], "extra": []}
    for row in scores:
        each[facts[row["id"]]["source"]].append(-math.log(float(row[f"p_{facts[row['id']]['label']}"])))
    means = {name: sum(values) / len(values) for name, values in each.items()}
    for path, weight in weights.items():
        other = next(p for p in weights if facts[p]["source"] != facts[path]["source"])
        ratio = means[facts[path]["source"]] / means[facts[other]["source"]]
        assert weight / weights[other] == pytest.approx(ratio)
    write(file, [list(scores[0]), *(list(row.values()) for row in scores if facts[row["id"]]["source"] == "natix")])
    with pytest.raises(ValueError, match="scores no picture of source extra; predict on all of train"):
        weigh(folder, tmp_path, f"loss:{file}")


def test_mistakes_are_named(folder, tmp_path):
    regions = write(tmp_path / "regions.csv", [("lat", "lon")])
    odd = write(tmp_path / "odd.csv", [("lat", "lon"), (95, 0)])
    text = write(tmp_path / "text.csv", [("lat", "lon"), ("north", 0)])
    p = predictions(folder, tmp_path / "p.csv").read_text()
    (tmp_path / "p.csv").write_text(p.replace("p_yes", "p_maybe"))
    for column, words in (
        ("colour", "--by colour: columns are class, source, gps, hard, loss, each once"),
        ("source:natix=1", "--by source:natix=1: each source of train needs a share above 0; there are extra"),
        ("source:natix=1,extra=0", "needs a share above 0"),
        ("source:natix", "write it like source:natix=70,extra=30"),
        ("gps", "need a table with columns lat, lon: write gps:FILE"),
        (f"gps:{regions}", "there must be one"),
        (f"gps:{odd}", r"odd.csv: \[95.0, 0.0\] is no place on Earth"),
        (f"gps:{text}", "a lat or lon is no number"),
        (f"gps:{tmp_path / 'p.csv'}", "each row needs lat, lon as its header names them"),
        ("hard", "need a table with columns id"),
        (f"hard:{folder / 'labels.csv'}", "each row needs id as its header"),
        (
            f"hard:{write(tmp_path / 'one.csv', [('id', 'p_yes')])}",
            "columns id, p_yes; a table of predictions has some",
        ),
        (f"hard:{tmp_path / 'p.csv'}", "has classes no, maybe, but train has label yes"),
    ):
        with pytest.raises(ValueError, match=words):
            weigh(folder, tmp_path, column)
    with pytest.raises(ValueError, match="each once"):
        weigh(folder, tmp_path, "class", "class")
    own = shutil.copytree(folder, tmp_path / "photos")
    write(own / "labels.csv", [("path", "label"), *((path, "no") for path in split_of(folder))])
    for column, words in (("source", "labels.csv has no column source"), (f"gps:{regions}", "there must be one")):
        with pytest.raises(ValueError, match=words):
            weigh(own, tmp_path, column)
    write(regions, [("lat", "lon"), (1, 1)])
    with pytest.raises(ValueError, match="labels.csv has no column lat"):
        weigh(own, tmp_path, f"gps:{regions}")
    assert not (tmp_path / "weights.csv").exists()


def test_training_draws_by_the_file(folder, tmp_path):
    weights, facts = weigh(folder, tmp_path, "class", "source:natix=90,extra=10")
    source = weighed(open_for(folder, "fit"), tmp_path / "weights.csv")
    paths = source.rows.texts("path")
    drawn = np.concatenate([source.order(0, step, 100) for step in range(40)])
    natix = np.mean([facts[paths[i]]["source"] == "natix" for i in drawn])
    expected = share(weights, lambda path: facts[path]["source"] == "natix")
    assert expected > 0.8 and natix == pytest.approx(expected, abs=0.03)


def test_looking_at_no_picture_it_records_no_look(folder, tmp_path):
    weigh(folder, tmp_path, "class")
    assert not (folder / "_splits" / "test_uses.jsonl").exists()

"""Claims about import_crops.py: crops of nodules become pictures, labels and a ruler, whatever form they come in."""

import csv

import numpy as np
import pytest
from PIL import Image

import data
from tools import import_crops
from tools.lib import judge, samples


def views(diameter, seed=0, side=32):
    """uint8 [3, side, side]: a bright ball on noise, a bright wall at the edge of the axial view."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    ball = (y**2 + x**2 <= (diameter / 2) ** 2) * 150
    planes = np.stack([ball + rng.integers(0, 40, (side, side)) for _ in range(3)]).astype(np.uint8)
    planes[0, :, :4] = 220
    planes[1], planes[2] = planes[1] // 2, planes[2] // 4
    return planes


def write(folder, form, crops, ratings):
    """Nodules in one of the forms; -> --ratings or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["id,malignancy"]
    for k, (planes, rating) in enumerate(zip(crops, ratings)):
        lines.append(f"nodule_{k},{rating}")
        if form == "npy":
            np.save(folder / f"nodule_{k}.npy", planes)
        elif form == "npy last":
            np.save(folder / f"nodule_{k}.npy", planes.transpose(1, 2, 0))
        elif form == "rgb":
            Image.fromarray(planes.transpose(1, 2, 0)).save(folder / f"nodule_{k}.png")
        else:
            for view, plane in zip(("0", "1", "2") if form == "digits" else ("axial", "cor", "Sagittal"), planes):
                name = {"folders": f"{rating}/nodule_{k}/{view}.png", "named": f"n{k}_rating{rating}_{view}.png"}
                path = folder / name.get(form, f"nodule_{k}_{view}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(plane).save(path)
    if form in ("folders", "named"):
        return []
    (folder.parent / "ratings.csv").write_text("\n".join(lines) + "\n")
    return ["--ratings", folder.parent / "ratings.csv"]


def fetch(folder, out, *flags):
    return import_crops.main([str(word) for word in ("--from", folder, "--out", out, *flags)])


def table(out):
    with open(out / "labels.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("form", ["npy", "npy last", "rgb", "words", "digits", "folders", "named"])
def test_every_form_gives_the_same_pictures_and_labels(form, tmp_path, capsys):
    crops, ratings = [views(6 + 2 * k, k) for k in range(5)], [1, 2, 3, 4, 5]
    flags = write(tmp_path / "in", form, crops, ratings)
    assert fetch(tmp_path / "in", tmp_path / "out", *flags) == 0
    rows = sorted(table(tmp_path / "out"), key=lambda row: row["rating"])
    assert [(row["label"], row["rating"]) for row in rows] == [("0", "1"), ("0", "2"), ("1", "4"), ("1", "5")]
    assert "1 left out: rated 3: indeterminate" in capsys.readouterr().out
    for row, planes in zip(rows, [crops[k] for k in (0, 1, 3, 4)]):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / row["path"])).transpose(2, 0, 1), planes)


def test_the_ruler_measures_the_ball_and_not_the_wall(tmp_path):
    crops = [views(d, d) for d in (4, 8, 12, 16)]
    flags = write(tmp_path / "in", "npy", crops, [1, 1, 5, 5])
    assert fetch(tmp_path / "in", tmp_path / "out", *flags) == 0
    found = sorted(float(row["diameter_px"]) for row in table(tmp_path / "out"))
    assert found == pytest.approx([4, 8, 12, 16], abs=0.8)


def test_the_probe_gets_ruler_and_title(tmp_path):
    flags = write(tmp_path / "in", "npy", [views(6 + k, k) for k in range(6)], [0, 1, 0, 1, 1, 0])
    assert fetch(tmp_path / "in", tmp_path / "out", *flags) == 0  # 0 and 1 are labels, not ratings
    source = data.open_source(tmp_path / "out")
    found = samples.read_table(tmp_path / "out" / "labels.csv", source)
    assert found.unit == "crops" and found.sizes.shape == (6, 2) and found.centres is None and found.labels.sum() == 3
    assert "crops, no patient grouping" in judge.caveats([], 6, True, 0, unit=found.unit)
    rows = (tmp_path / "out" / "labels.csv").read_text()
    (tmp_path / "out" / "labels.csv").write_text(rows.replace("crops\n", "other\n", 1))
    assert samples.read_table(tmp_path / "out" / "labels.csv", source).unit == "groups"


def test_what_is_left_out_is_counted_and_damage_is_named(tmp_path, capsys):
    folder = tmp_path / "in"
    flags = write(folder, "npy", [views(6 + k, k) for k in range(4)], [1, 2, 4, 5])
    np.save(folder / "unrated.npy", views(5))
    np.save(folder / "nodule_1.npy", views(5).astype(np.float32))
    Image.fromarray(views(5)[0]).save(folder / "lonely_axial.png")
    (folder.parent / "ratings.csv").write_text((folder.parent / "ratings.csv").read_text() + "lonely,5\n")
    assert fetch(folder, tmp_path / "out", *flags) == 0
    said = capsys.readouterr().out
    assert "no rating" in said and "1 views; three are needed" in said and "expected uint8" in said
    assert len(table(tmp_path / "out")) == 3
    (folder.parent / "bad.csv").write_text("id,rating\nnodule_0,7\n")
    with pytest.raises(ValueError, match="row 2: no rating from 0 to 5"):
        fetch(folder, tmp_path / "other", "--ratings", folder.parent / "bad.csv")
    (folder.parent / "one.csv").write_text("id,rating\nnodule_0,1\n")
    with pytest.raises(ValueError, match="1 rated crops, not of both classes"):
        fetch(folder, tmp_path / "other", "--ratings", folder.parent / "one.csv")

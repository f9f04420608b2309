"""Claims about lesion_labels.py: lesions of masks and of LUNA16's tables lie where they were put."""

import csv

import numpy as np
import pytest

import data
from tools import lesion_labels, preprocess_volumes

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
pytestmark = pytest.mark.skipif(sitk is None, reason="reads through SimpleITK: pip install SimpleITK")
ORIGIN, SPACING = (-20.0, -30.0, -40.0), (0.7, 0.8, 2.5)
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.1"


def write(path, array, turned=False):
    """array [z, y, x] as a volume; turned: stored from the other end of x and y, so lying the same."""
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(ORIGIN)
    image.SetSpacing(SPACING)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.Flip(image, [True, True, False], False) if turned else image, str(path))


@pytest.fixture
def scan(tmp_path):
    """Processed folder of one volume, stored turned round; the volume lies in tmp_path/raw."""
    rng = np.random.default_rng(0)
    hu = rng.normal(-900, 60, (12, 40, 48)).astype(np.int16)
    hu[:, 10:30, 10:40] = rng.normal(40, 300, (12, 20, 30))
    write(tmp_path / "raw" / f"{UID}.mhd", hu, turned=True)
    argv = ["--raw", tmp_path / "raw", "--out", tmp_path / "p", "--dataset", "d", "--format", "hu16", "--workers", 1]
    assert preprocess_volumes.main([str(value) for value in argv]) == 0
    return tmp_path


def label(scan, *flags):
    lesion_labels.main(["--data", str(scan / "p"), *map(str, flags)])
    with open(scan / "p" / "_labels" / "nodules.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_each_piece_of_a_mask_is_a_lesion_where_it_was_drawn(scan):
    mask = np.zeros((12, 40, 48), np.uint8)
    mask[3:6, 12:18, 12:16] = 1
    mask[5:8, 20:24, 30:37] = 1  # of the same value, apart
    mask[5, 24, 30] = 2  # touches, another value
    write(scan / "masks" / f"{UID}.nrrd", mask)
    rows = label(scan, "--masks", scan / "masks")
    boxes = [tuple(int(row[key]) for key in ("z0", "z1", "y0", "y1", "x0", "x1")) for row in rows]
    assert boxes == [(3, 6, 12, 18, 12, 16), (5, 8, 20, 24, 30, 37), (5, 6, 24, 25, 30, 31)]
    assert [float(row["volume_mm3"]) for row in rows] == pytest.approx([n * 1.4 for n in (72, 84, 1)])
    assert (float(rows[0]["y"]), float(rows[0]["x"]), rows[0]["z"]) == (14.5, 13.5, "4")
    for row in rows:
        with np.load(scan / "p" / "_labels" / "masks" / f"{row['id']}.npz") as file:
            whole = np.zeros(mask.shape, bool)
            whole[tuple(slice(o, o + n) for o, n in zip(file["origin"], file["majority"].shape))] = file["majority"]
        assert whole.sum() * 1.4 == pytest.approx(float(row["volume_mm3"])) and mask[whole].min() > 0
    read, nodules = data.read_labels(scan / "p" / "_labels" / "nodules.csv", scan / "p")
    assert nodules and read[0]["group"] == f"d/{UID}"


def test_a_mask_of_another_volume_is_an_error(scan):
    write(scan / "masks" / f"{UID}.nrrd", np.ones((11, 40, 48), np.uint8))
    with pytest.raises(ValueError, match="must lie on the voxels of its volume"):
        label(scan, "--masks", scan / "masks")


def test_centres_in_millimetres_find_their_voxel_whatever_way_the_file_lies(scan):
    """The index begins at the first corner of the body; the file, and so LUNA16's tables, at the other one."""
    z, y, x = 6, 20, 30
    at = [o + s * v for o, s, v in zip(ORIGIN, SPACING, (x, y, z))]
    lines = [f"{UID},{at[0]},{at[1]},{at[2]},7.0", f"{UID},900,0,0,5", "1.2.3,0,0,0,5"]
    (scan / "annotations.csv").write_text("\n".join(["seriesuid,coordX,coordY,coordZ,diameter_mm", *lines]) + "\n")
    (row,) = label(scan, "--annotations", scan / "annotations.csv", "--raw", scan / "raw")
    assert (row["z"], float(row["y"]), float(row["x"])) == ("6", pytest.approx(y, abs=0.5), pytest.approx(x, abs=0.5))
    assert float(row["diameter_mm"]) == pytest.approx(7, abs=0.7) and row["box_mm"] != row["diameter_mm"]
    lines = [f"{UID},{at[0]},{at[1]},{at[2]},1", f"{UID},{at[0] + 7},{at[1]},{at[2]},0"]
    (scan / "candidates.csv").write_text("\n".join(["seriesuid,coordX,coordY,coordZ,class", *lines]) + "\n")
    label(scan, "--candidates", scan / "candidates.csv", "--raw", scan / "raw")
    rows, nodules = data.read_labels(scan / "p" / "_labels" / "candidates.csv", scan / "p")
    assert nodules and [row["label"] for row in rows] == ["1", "0"]
    assert len({row["diameter_mm"] for row in rows}) == 1, "size must not betray the class"
    assert float(rows[0]["x"]) == pytest.approx(x) and float(rows[1]["x"]) == pytest.approx(x + 10)

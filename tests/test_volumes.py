"""Claims about preprocess_volumes.py and itk.py. The truth is the DICOM route over the same phantom, to the bit."""

import builtins
import csv
import gzip
import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from tools import lidc_nodules, make_phantom, preprocess_dicom, preprocess_volumes
from tools.lib import itk
from tools.lib.dicom import Reject

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
needs_itk = pytest.mark.skipif(sitk is None, reason="reads through SimpleITK: pip install SimpleITK")
AXES = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def phantom_hu(shape=(10, 32, 40), seed=0):
    """int16 [z, y, x] with air, tissue, bone and metal, no two voxels' neighbourhoods alike."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(30, 300, shape)
    hu[:, :6] = rng.normal(-1000, 8, hu[:, :6].shape)
    hu[:, -2:, -2:] = 2500
    return np.clip(hu, -1024, 3071).astype(np.int16)


def write_mhd(path, hu, element="MET_SHORT", dim=None, spacing="0.7 0.8 2.5", matrix="1 0 0 0 1 0 0 0 1", **more):
    """A MetaImage header and its .raw; more: further or other fields."""
    z, y, x = hu.shape
    fields = {"ObjectType": "Image", "NDims": 3, "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
              "CompressedData": "False", "TransformMatrix": matrix, "Offset": "-10 -20 -30", "ElementSpacing": spacing,
              "DimSize": dim or f"{x} {y} {z}", "ElementType": element, **more,
              "ElementDataFile": f"{path.stem}.raw"}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {value}\n" for key, value in fields.items() if value))
    (path.parent / f"{path.stem}.raw").write_bytes(hu.tobytes())
    return path


def nifti(hu, dim=None, qform=1, sform=1, rows=None, quaternion=(0, 0, 0), offset=(5, 6, 7), spacing=(0.5, 0.5, 2)):
    """Bytes of a NIfTI-1 file of int16 [z, y, x]."""
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, *(dim or (3, *hu.shape[::-1], 1, 1, 1, 1)))
    struct.pack_into("<hh", head, 70, 4, 16)
    struct.pack_into("<8f", head, 76, 1, *spacing, 0, 0, 0, 0)
    struct.pack_into("<f", head, 108, 352)
    struct.pack_into("<B", head, 123, 2)
    struct.pack_into("<hh", head, 252, qform, sform)
    struct.pack_into("<6f", head, 256, *quaternion, *offset)
    rows = rows if rows is not None else np.column_stack([np.diag(spacing), offset])
    struct.pack_into("<12f", head, 280, *np.ravel(rows))
    head[344:348] = b"n+1\0"
    return bytes(head) + hu.tobytes()


def reason_of(path):
    """Why a file is refused, and that nothing large was allocated for finding out."""
    tracemalloc.start()
    try:
        with pytest.raises(Reject) as caught:
            itk.check_data(itk.read_header(path))
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    return caught.value.reason


def preprocess(raw, out, *flags):
    argv = ["--raw", raw, "--out", out, "--dataset", "d", "--format", "hu16", "--workers", 1, *flags]
    return preprocess_volumes.main([str(value) for value in argv])


def index(out):
    with open(out / "_index" / "index.csv", newline="") as f:
        return list(csv.DictReader(f))


def rejected(out):
    manifest = json.loads((out / "_manifests" / "d.json").read_text())
    return {entry.get("series", ""): (entry["reason"], entry["detail"]) for entry in manifest["rejected"]}


# headers, with no SimpleITK needed


def test_a_header_that_lies_about_its_size_is_refused_before_anything_is_allocated(tmp_path):
    hu = phantom_hu()
    assert itk.check_data(itk.read_header(write_mhd(tmp_path / "ok.mhd", hu))) is None
    for name, more, reason in (
        ("more", {"dim": "4000 4000 100"}, "pixel_size"),
        ("fewer", {"dim": "40 32 9"}, "pixel_size"),
        ("huge", {"dim": "60000 60000 60000"}, "pixel_format"),
        ("none", {"dim": "0 32 10"}, "pixel_format"),
        ("words", {"dim": "40 32 ten"}, "header"),
        ("type", {"element": "MET_FLOAT"}, "pixel_size"),
        ("colour", {"ElementNumberOfChannels": "3"}, "not_3d"),
        ("mask", {"element": "MET_UCHAR"}, "not_hu"),
        ("lost", {"matrix": ""}, "no_orientation"),
        ("unspaced", {"spacing": ""}, "header"),
    ):
        assert reason_of(write_mhd(tmp_path / f"{name}.mhd", hu, **more)) == reason, name
    path = write_mhd(tmp_path / "else.mhd", hu)
    path.write_text(path.read_text().replace("else.raw", "../else.raw"))
    assert reason_of(path) == "header"


def test_packed_pixels_are_counted_before_they_are_read(tmp_path):
    hu = phantom_hu()
    path = write_mhd(tmp_path / "a.mhd", hu, CompressedData="True")
    data, packed = path.with_suffix(".raw"), zlib.compress(hu.tobytes())
    data.write_bytes(packed)
    assert itk.check_data(itk.read_header(path)) is None
    for bad in (packed[:-9], packed[:200] + b"x" + packed[201:], zlib.compress(hu[:-1].tobytes()), b""):
        data.write_bytes(bad)
        assert reason_of(path) == "pixel_size"
    path = write_mhd(tmp_path / "bomb.mhd", hu, dim="4000 4000 60", CompressedData="True")
    path.with_suffix(".raw").write_bytes(zlib.compress(bytes(1 << 22)))
    assert reason_of(path) == "pixel_size"
    whole = gzip.compress(nifti(hu))
    for name, content in (("cut", whole[:-20]), ("head", whole[:100]), ("crc", whole[:-8] + bytes(8))):
        (tmp_path / f"{name}.nii.gz").write_bytes(content)
        assert reason_of(tmp_path / f"{name}.nii.gz") == "pixel_size", name


def test_nifti_must_say_once_how_it_lies(tmp_path):
    hu, path = phantom_hu(), tmp_path / "a.nii"
    diagonal = np.diag([0.5, 0.5, 2.0])
    for options, reason in (
        ({"qform": 0, "sform": 0}, "no_orientation"),
        ({"rows": np.column_stack([diagonal * [-1, 1, 1], (5, 6, 7)])}, "orientation_disagrees"),  # left is right
        ({"rows": np.column_stack([diagonal, (5, 9, 7)])}, "orientation_disagrees"),
        ({"rows": np.column_stack([diagonal * 2, (5, 6, 7)]), "qform": 0}, "orientation_disagrees"),
        ({"dim": (4, 40, 32, 5, 2, 1, 1, 1)}, "not_3d"),
        ({"dim": (3, 40, 32, 4000, 1, 1, 1, 1)}, "pixel_size"),
        ({"dim": (3, 32000, 32000, 32000, 1, 1, 1, 1)}, "pixel_format"),
        ({"spacing": (0.5, 0.5, float("nan"))}, "header"),
    ):
        path.write_bytes(nifti(hu, **options))
        assert reason_of(path) == reason, options
    for options in ({}, {"qform": 0}, {"sform": 0}, {"dim": (4, 40, 32, 10, 1, 1, 1, 1)}):
        path.write_bytes(nifti(hu, **options))
        assert itk.check_data(itk.read_header(path)) is None
    path.write_bytes(nifti(hu)[:300])
    assert reason_of(path) == "header"


def test_what_is_no_hu_is_refused_with_the_reason():
    hu = phantom_hu((12, 64, 64))
    itk.check_hu(hu)
    for values, words in (
        (np.clip((hu + 1000) / 1400, 0, 1), "0..1"),
        (np.clip((hu + 160) / 400 * 255, 0, 255), "8-bit picture"),
        (hu.astype(np.int32) + 1024, "before their rescale"),
        (hu / 10, "near -1000"),
        (hu * 10.0, "above 3100"),
        (np.clip(hu, -1000, 400), "cut off"),
        (np.clip(hu, -160, 240), "near -1000"),
        ((hu - hu.mean()) / hu.std(), "near -1000"),
    ):
        with pytest.raises(Reject, match="not_hu") as caught:
            itk.check_hu(np.asarray(values))
        assert words in caught.value.detail
    padded = hu.copy()
    padded[:, :5] = -3024
    found, notes = itk.to_hu(padded.astype(np.float32))
    assert (found[:, :5] == -1024).all() and np.array_equal(found[:, 5:], hu[:, 5:])
    assert notes["padding_voxels"] == padded[:, :5].size and not notes["rounded_voxels"]
    assert itk.to_hu(hu + 0.25)[1]["rounded_voxels"] == hu.size
    with pytest.raises(Reject, match="NaN"):
        itk.to_hu(np.where(hu > 2000, np.nan, hu))


def test_axes_are_turned_by_their_cosines_and_never_resampled():
    """The oracle looks every voxel up by its place in the body."""
    values, spacing = phantom_hu((3, 4, 5)), np.array([0.5, 0.7, 2.0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        direction = np.array(AXES)[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
        found, cosines, origin, steps, _ = itk.upright(values, direction.astype(float), np.array([1.0, 2, 3]), spacing)
        assert np.array_equal(cosines, np.eye(3))
        for z, y, x in np.ndindex(values.shape):
            at = direction @ (spacing * (x, y, z)) + (1, 2, 3)
            k = np.rint((at - origin) / steps).astype(int)
            assert found[k[2], k[1], k[0]] == values[z, y, x]
    for degrees, refused in ((19, False), (21, True), (45, True)):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        tilted = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        if refused:
            with pytest.raises(Reject, match=f"{degrees}.0 degrees"):
                itk.upright(values, tilted, np.zeros(3), spacing)
        else:
            assert np.allclose(itk.upright(values, tilted, np.zeros(3), spacing)[1], tilted)


def test_without_simpleitk_one_line_says_what_to_install(tmp_path, monkeypatch):
    write_mhd(tmp_path / "raw" / "a.mhd", phantom_hu())
    real = builtins.__import__

    def without(name, *args, **more):
        if name == "SimpleITK":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install SimpleITK"):
        preprocess(tmp_path / "raw", tmp_path / "out")


# the whole way


@pytest.fixture(scope="module")
def by_dicom(tmp_path_factory):
    """{series: (volume, rows of the index, raw folder)} of four phantom patients; processed in p beside raw."""
    root = tmp_path_factory.mktemp("phantom")
    flags = ["--patients", "4", "--size", "64", "--slices", "9", "--workers", "1"]
    assert make_phantom.main(["--out", str(root / "raw"), *flags]) == 0
    argv = ["--raw", root / "raw", "--out", root / "p", "--dataset", "d", "--format", "hu16", "--workers", 1]
    assert preprocess_dicom.main([str(value) for value in argv]) == 1  # the scout
    rows = index(root / "p")
    series = {name: [row for row in rows if row["series"] == name] for name in dict.fromkeys(r["series"] for r in rows)}
    return {name: (np.load(root / "p" / "d" / f"{name}.npy"), some, root / "raw") for name, some in series.items()}


def to_image(hu, rows, turn=0, pad=False):
    """A SimpleITK image of a processed volume, its axes turned round in one of several ways; padded as LUNA16 is."""
    spacing = [float(rows[0][f"spacing_{axis}"]) for axis in "xyz"]
    first = float(rows[0]["z_mm"]) - spacing[2]
    if pad:
        y, x = np.mgrid[: hu.shape[1], : hu.shape[2]] - hu.shape[1] / 2
        hu = np.where((hu == -1024) & (y**2 + x**2 > (hu.shape[1] / 2) ** 2), np.int16(-3024), hu)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing)
    image.SetOrigin((-150.0, -140.0, first))
    image = sitk.Flip(image, [bool(turn & 1), bool(turn & 2), bool(turn & 4)], False) if turn else image
    return sitk.PermuteAxes(image, [2, 0, 1]) if turn & 8 else image


@needs_itk
@pytest.mark.parametrize("kind", ["mhd", "nii.gz", "nrrd", "nii"])
def test_volumes_equal_the_dicom_route_to_the_bit(kind, by_dicom, tmp_path):
    (tmp_path / "raw").mkdir()
    for k, (name, (hu, rows, _)) in enumerate(by_dicom.items()):
        image = to_image(hu, rows, turn=(0, 3, 12, 7, 9)[k % 5], pad=k % 2 == 0)
        sitk.WriteImage(image, str(tmp_path / "raw" / f"{name}.{kind}"), kind != "nii")
    patients = "".join(f"{name},{rows[0]['patient']}\n" for name, (_, rows, _) in by_dicom.items())
    (tmp_path / "patients.csv").write_text("series,patient\n" + patients)
    assert preprocess(tmp_path / "raw", tmp_path / "out", "--patients", tmp_path / "patients.csv") == 0
    found = index(tmp_path / "out")
    for name, (hu, rows, _) in by_dicom.items():
        assert np.array_equal(np.load(tmp_path / "out" / "d" / f"{name}.npy"), hu)
        mine = [row for row in found if row["series"] == name]
        assert len(mine) == len(rows)
        for one, other in zip(mine, rows):
            assert one | {"study": "", "sop": ""} == other | {"study": "", "sop": ""}
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "d").iterdir()}
    assert preprocess(tmp_path / "raw", tmp_path / "out", "--patients", tmp_path / "patients.csv") == 0
    assert again == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "d").iterdir()}


@needs_itk
def test_every_file_that_is_not_used_is_named_with_its_reason(tmp_path, capsys):
    raw, hu = tmp_path / "raw", phantom_hu()
    write_mhd(raw / "good.mhd", hu)
    write_mhd(raw / "seg" / "good.mhd", (hu > 0).astype(np.uint8), element="MET_UCHAR")
    write_mhd(raw / "windowed.mhd", np.clip(hu, -160, 240))
    write_mhd(raw / "oblique.mhd", hu, matrix="1 0 0 0 0.7071068 0.7071068 0 -0.7071068 0.7071068")
    write_mhd(raw / "short.mhd", hu[:4])
    (raw / "4d.nii").write_bytes(nifti(hu, dim=(4, 40, 32, 5, 2, 1, 1, 1)))
    (raw / "readme.txt").write_text("hello")
    os.mkfifo(raw / "pipe.txt")  # opening it would wait for ever
    os.mkfifo(raw / "pipe.nii")
    assert preprocess(raw, tmp_path / "out", "--list-rejects") == 1
    assert {row["series"] for row in index(tmp_path / "out")} == {"good"}
    found = rejected(tmp_path / "out")
    assert {name: reason for name, (reason, _) in found.items()} == {
        "": "not_volume", "seg_good": "not_hu", "windowed": "not_hu", "oblique": "oblique", "short": "too_few_slices",
        "4d": "not_3d", "pipe": "unreadable",
    }  # fmt: skip
    assert "45.0 degrees" in found["oblique"][1]
    assert str(raw / "seg" / "good.mhd") in capsys.readouterr().out
    (tmp_path / "patients.csv").write_text("series,patient\nother,p1\n")
    assert preprocess(raw, tmp_path / "none", "--patients", tmp_path / "patients.csv") == 2
    assert rejected(tmp_path / "none")["good"][0] == "no_patient_id"


@needs_itk
def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for k in range(2):
        write_mhd(tmp_path / "raw" / f"case_{k}" / "ct.mhd", phantom_hu(seed=k))
    assert preprocess(tmp_path / "raw", tmp_path / "out") == 0
    assert {row["series"] for row in index(tmp_path / "out")} == {"case_0_ct", "case_1_ct"}


@needs_itk
def test_lidc_readings_find_volumes_by_series_and_position(by_dicom, tmp_path):
    """XML counts pixels as the scanner did and so the file does; of patients who lay prone our volume is turned."""
    raw = by_dicom[next(iter(by_dicom))][2]
    (tmp_path / "raw").mkdir()
    patients, prone = ["series,patient"], {name for k, name in enumerate(by_dicom) if k % 2}
    for name, (hu, rows, _) in by_dicom.items():
        image = to_image(hu, rows, turn=4)  # the order of slices says nothing
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, -1) if name in prone else image.GetDirection())
        sitk.WriteImage(image, str(tmp_path / "raw" / f"{name}.mhd"))
        patients.append(f"{name},{rows[0]['patient']}")
    (tmp_path / "patients.csv").write_text("\n".join(patients))
    assert preprocess(tmp_path / "raw", tmp_path / "p", "--patients", tmp_path / "patients.csv") == 0
    tables = []
    for out in (raw.parent / "p", tmp_path / "p"):
        assert lidc_nodules.main(["--raw", str(raw), "--data", str(out)]) == 0
        with open(out / "_labels" / "nodules.csv", newline="") as f:
            keys = ("series", "z0", "volume_mm3", "texture")
            tables.append({tuple(row[key] for key in keys): row for row in csv.DictReader(f)})
    assert len(tables[0]) > 5 and tables[0].keys() == tables[1].keys()
    assert {row["series"] for row in tables[0].values()} & prone
    for key, row in tables[0].items():
        other, size = tables[1][key], by_dicom[row["series"]][0].shape[1:]
        for axis, n in zip("yx", size):
            at = float(row[axis])
            assert float(other[axis]) == pytest.approx(n - 1 - at if row["series"] in prone else at)
        for same in ("path", "z", "label", "group", "diameter_mm", "box_mm", "readers", "malignancy"):
            assert row[same] == other[same]


@needs_itk
def test_shards_of_volumes_write_the_bytes_of_one_process(tmp_path):
    raw = tmp_path / "raw"
    for k in range(5):
        write_mhd(raw / f"scan{k}.mhd", phantom_hu(seed=k))
    write_mhd(raw / "mask.mhd", (phantom_hu() > 0).astype(np.uint8), element="MET_UCHAR")
    (raw / "readme.txt").write_text("hello")
    lines = ["Series UID,Subject ID\n", *(f"scan{k},P{k // 2}\n" for k in range(5))]
    (tmp_path / "patients.csv").write_text("".join(lines))
    flags = ("--patients", tmp_path / "patients.csv")
    assert preprocess(raw, tmp_path / "one", *flags) == 1
    for k in (2, 3, 1):
        preprocess(raw, tmp_path / "many", *flags, "--shard", f"{k}/3")
    assert preprocess(raw, tmp_path / "many", *flags, "--merge", 3) == 1
    one, many = ({p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in (tmp_path / name).rglob("*.*")
                  if p.is_file()} for name in ("one", "many"))  # fmt: skip
    a, b = (json.loads(found.pop("_manifests/d.json")) | {"created_utc": ""} for found in (one, many))
    assert a == b and one == many and {row["patient"] for row in index(tmp_path / "one")} == {"P0", "P1", "P2"}


@pytest.mark.proof
def test_damaged_headers_end_in_a_reason(tmp_path):
    """3,000 files with flipped, cut and doubled bytes: a reason or a file that its header describes, no other error."""
    hu, rng = phantom_hu(), np.random.default_rng(0)
    whole = {
        "a.nii": nifti(hu),
        "a.nii.gz": gzip.compress(nifti(hu)),
        "a.mhd": write_mhd(tmp_path / "x.mhd", hu).read_bytes(),
    }
    text = b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 40 32 10\nspace directions: (1,0,0) (0,1,0) (0,0,2)\nencoding: raw\nendian: little\nspace origin: (0,0,0)\n\n"  # noqa: E501
    whole["a.nrrd"], kept = text + hu.tobytes(), 0
    for k in range(3000):
        name = list(whole)[k % 4]
        content = bytearray(whole[name])
        for _ in range(rng.integers(1, 5)):
            at = rng.integers(0, min(400, len(content)))
            content[at] = rng.integers(0, 256)
        content = content[: rng.integers(1, len(content))] if k % 5 == 0 else content
        (tmp_path / name).write_bytes(content)
        tracemalloc.start()
        try:
            itk.check_data(itk.read_header(tmp_path / name))
            kept += 1
        except (Reject, OSError):
            pass
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
    assert 100 < kept < 2900

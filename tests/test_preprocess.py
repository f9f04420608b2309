"""Claims about preprocess_dicom.py, dicom_series.py and write_manifest.py. The truth is a volume in HU that the test
itself writes as DICOM, in every lawful and unlawful way."""

import concurrent.futures
import contextlib
import copy
import csv
import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from data import INDEX_COLUMNS, WINDOWS_HU
from tools import preprocess_dicom, write_manifest
from tools.lib import dicom, volumes

ROOT = Path(__file__).resolve().parent.parent
AXIAL = (1, 0, 0, 0, 1, 0)
DEPTH, HEIGHT, WIDTH = 10, 40, 48
IDENTIFYING = dict(PatientName="ZZDOE^JOHN", PatientBirthDate="19331224", PatientAddress="ZZ Elm Street")
IDENTIFYING |= dict(InstitutionName="ZZ General Hospital", ReferringPhysicianName="ZZHOUSE^GREG", StudyDate="19991231")
IDENTIFYING |= dict(StudyDescription="ZZ CHEST follow-up", SeriesDescription="ZZ LUNG 1.0", AccessionNumber="ZZ4711")
IDENTIFYING |= dict(DeviceSerialNumber="ZZ0815")


def truth(depth=DEPTH, height=HEIGHT, width=WIDTH, seed=0):
    """int16 [Z, H, W]: smooth in z, no two slices alike, HU from -1000 to 1400."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[:depth, :height, :width]
    wave = 900 * np.sin(x / 7 + seed) * np.cos(y / 5) + 300 * np.sin(z / 4 + y / 9) + 200
    return np.clip(wave + rng.normal(0, 20, wave.shape), -1000, 1400).astype(np.int16)


def uid(*parts):
    return "1.2.826.0.1.3680043.8.498." + ".".join(map(str, parts))


def ct_slice(hu, z, series=1, patient=1, orientation=AXIAL, spacing_z=2.5, shift=(0, 0, 0), **change):
    """One slice of a series as a dataset, 12 bits unsigned; `change` sets (or with None removes) header values.

    `slope`, `intercept`, `bits` and `signed` change how hu is stored; z counts slices along the normal.
    """
    slope, intercept = change.pop("slope", 1), change.pop("intercept", -1024)
    bits, signed = change.pop("bits", 12), change.pop("signed", False)
    normal = np.cross(orientation[:3], orientation[3:])
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", uid(patient, series, z + 100)
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientID, ds.PatientIdentityRemoved = f"P-{patient:03d}", "YES"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(patient, 0), uid(patient, series)
    ds.FrameOfReferenceUID = uid(patient, series, 0)
    ds.InstanceNumber = (z * 7) % 10  # of no help
    ds.ImagePositionPatient = [round(float(v), 5) for v in -100 + normal * z * spacing_z + np.multiply(shift, z)]
    ds.ImageOrientationPatient = [round(float(v), 6) for v in orientation]
    ds.PixelSpacing, ds.SliceThickness = [0.7, 0.8], 5
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = hu.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = slope, intercept, "HU"
    stored = np.round((hu.astype(np.float64) - intercept) / slope).astype(np.int32)
    ds.PixelData = (stored & ((1 << bits) - 1)).astype("<u2").tobytes()
    for keyword, value in change.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def encode(ds, syntax=ExplicitVRLittleEndian, preamble=True):
    """Dataset -> bytes of a file; without preamble only the bare elements, as before DICOM part 10."""
    ds, file = copy.deepcopy(ds), io.BytesIO()
    if "PixelData" in ds:
        ds["PixelData"].VR = "OW"
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    if preamble:
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", "1.2.3")
        ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", "1.2.3")
        compressed = syntax in (RLELossless, JPEGLSLossless)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if compressed else syntax
        if compressed:
            ds.compress(RLELossless, generate_instance_uid=False)
            ds.file_meta.TransferSyntaxUID = syntax  # no encoder of JPEG-LS here: only its name
        ds.save_as(file, enforce_file_format=True)
    else:
        ds.save_as(file, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    return file.getvalue()


def enhanced(hu, order, slope=lambda z: 1, **change):
    """A multi-frame CT file whose frames lie in `order`; rescale per frame, orientation and spacing shared."""
    ds = ct_slice(hu[0], 0, **change)
    ds.SOPClassUID, ds.NumberOfFrames, ds.PixelData = "1.2.840.10008.5.1.4.1.1.2.1", len(order), b""
    shared, ds.PerFrameFunctionalGroupsSequence = Dataset(), []
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [Dataset()], [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = ds.ImageOrientationPatient
    shared.PixelMeasuresSequence[0].PixelSpacing = ds.PixelSpacing
    ds.SharedFunctionalGroupsSequence = [shared]
    for z in order:
        frame, one = Dataset(), ct_slice(hu[z], z, slope=slope(z), **change)
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [Dataset()], [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = one.ImagePositionPatient
        for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
            frame.PixelValueTransformationSequence[0][keyword] = one[keyword]
        ds.PerFrameFunctionalGroupsSequence.append(frame)
        ds.PixelData += one.PixelData
    for keyword in "ImagePositionPatient ImageOrientationPatient PixelSpacing RescaleSlope RescaleIntercept".split():
        delattr(ds, keyword)
    return ds


def volume_of(files, **options):
    """Files of one series -> what dicom_series makes of them."""
    slices = [s for data in files for s in dicom.read_slices(data)]
    [volume] = dicom.assemble(slices, options.pop("min_slices", 8), **options)
    return volume


def write_tree(folder, datasets, syntax=ExplicitVRLittleEndian, seed=0):
    """Files with names and an order that say nothing, some in subfolders."""
    rng = random.Random(seed)
    for i, ds in enumerate(rng.sample(datasets, len(datasets))):
        path = Path(folder) / rng.choice(("", "a", "a/b.dcm")) / f"{rng.randrange(1 << 40):x}-{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ds if isinstance(ds, bytes) else encode(ds, syntax))
    return Path(folder)


def a_series(hu=None, **change):
    return [ct_slice(plane, z, **change) for z, plane in enumerate(truth() if hu is None else hu)]


def preprocess(raw, out, *flags, dataset="d", workers=1):
    argv = ["--raw", raw, "--out", out, "--dataset", dataset, "--workers", workers, *flags]
    return preprocess_dicom.main([str(value) for value in argv])


def index(out):
    with open(out / "_index" / "index.csv", newline="") as f:
        return list(csv.DictReader(f))


def manifest(out, dataset="d"):
    return json.loads((out / "_manifests" / f"{dataset}.json").read_text())


def tree(folder):
    """{path: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def reason_of(slices, **options):
    with pytest.raises(dicom.Reject) as caught:
        volume_of([encode(ds) for ds in slices], **options)
    return caught.value.reason


# pixels


def test_hu16_is_exact_and_rgb_follows_the_formula(tmp_path):
    hu = truth(height=64, width=50)
    hu[:, 0, :4] = -1350, -1000, 1049, 1050  # ends of windows
    write_tree(tmp_path / "raw", a_series(hu, bits=16, signed=True, intercept=-37))
    assert preprocess(tmp_path / "raw", tmp_path / "rgb/p") == 0
    assert preprocess(tmp_path / "raw", tmp_path / "hu/p", "--format", "hu16") == 0
    rgb_rows, hu_rows = index(tmp_path / "rgb/p"), index(tmp_path / "hu/p")
    assert [int(row["z"]) for row in rgb_rows] == [int(row["z"]) for row in hu_rows] == list(range(1, DEPTH - 1))
    assert list(rgb_rows[0]) == INDEX_COLUMNS and rgb_rows[0]["path"].endswith("/0001.png")
    assert len({row["path"] for row in hu_rows}) == 1
    for rgb_row, hu_row in zip(rgb_rows, hu_rows):
        z = int(hu_row["z"])
        volume = np.load(tmp_path / "hu/p" / hu_row["path"], mmap_mode="r")
        assert volume.dtype == np.int16 and np.array_equal(volume, hu)
        image = np.asarray(Image.open(tmp_path / "rgb/p" / rgb_row["path"]))
        for channel, (level, width) in enumerate(WINDOWS_HU.values()):
            share = (hu[z - 1 + channel].astype(float) - (level - width / 2)) / width
            assert np.array_equal(image[..., channel], np.floor(255 * np.clip(share, 0, 1) + 0.5))
        assert (rgb_row["spacing_z"], rgb_row["spacing_y"], rgb_row["spacing_x"]) == ("2.5", "0.7", "0.8")
        assert (rgb_row["rows"], rgb_row["cols"], rgb_row["patient"]) == ("64", "50", "P-001")
        assert rgb_row["sop"] == uid(1, 1, z + 100) and float(rgb_row["z_mm"]) == -100 + 2.5 * z


SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_transfer_syntaxes_change_nothing(syntax):
    hu = truth()
    for options in ({}, {"bits": 16, "signed": True, "intercept": 0, "PixelPaddingValue": -2000}):
        files = [encode(ds, syntax) for ds in a_series(hu, **options)]
        assert np.array_equal(volume_of(files).hu, hu)


def test_stored_values_by_a_slow_loop():
    for bits, high_bit in ((12, 11), (16, 15), (12, 15), (10, 12), (1, 0)):
        for signed in (False, True):
            got = dicom.stored_values(bits, high_bit, signed)
            for word in range(0, 1 << 16, 37):
                value = (word >> (high_bit + 1 - bits)) % (1 << bits)
                assert got[word] == value - ((1 << bits) if signed and value >= 1 << (bits - 1) else 0)


def test_stray_high_bits_and_padding_are_masked_before_rescale():
    hu, cases = truth(), ((True, -2000, None), (True, 63536, None), (False, 4095, 4090), (False, 4090, 4095))
    for signed, padding, limit in cases:
        slices = a_series(hu, signed=signed, intercept=-100 if signed else -1024)
        for ds in slices:
            words = np.frombuffer(ds.PixelData, "<u2").copy().reshape(HEIGHT, WIDTH)
            words[:3] = padding & 0xFFF
            words[3, :2] = 4092 if limit else padding & 0xFFF
            words |= (np.arange(WIDTH) % 16 << 12).astype(np.uint16)  # an old overlay lives up there
            ds.PixelData = words.tobytes()
            ds.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
            if limit:
                ds.add_new("PixelPaddingRangeLimit", "US", limit)
        expected = hu.copy()
        expected[:, :3], expected[:, 3, :2] = -1024, -1024
        volume = volume_of([encode(ds) for ds in slices])
        assert np.array_equal(volume.hu, expected) and volume.handled["padding_slices"] == DEPTH
        assert signed or volume.handled["stray_bits_slices"] == DEPTH


def test_a_padding_value_that_the_stored_bits_cannot_hold_is_a_whole_word():
    slices = a_series()
    for ds in slices:  # 63536 is 0xF830, and 0x830 is 1072 HU in 12 bits
        ds.PixelData = struct.pack("<3H", 63536, 0x830, 0x1830) + ds.PixelData[6:]
        ds.add_new("PixelPaddingValue", "US", 63536)
    assert volume_of([encode(ds) for ds in slices]).hu[4, 0, :3].tolist() == [-1024, 1072, 1072]


def test_fractional_slopes_round_half_up_and_values_beyond_int16_are_clipped_and_counted():
    stored = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    slices = [ct_slice(stored, z, slope=1, intercept=0, bits=16) for z in range(DEPTH)]
    for ds in slices:
        ds.RescaleSlope, ds.RescaleIntercept = "2.5", "-1000"
    volume = volume_of([encode(ds) for ds in slices])
    assert np.array_equal(volume.hu[0], [[(5 * s - 2000 + 1) // 2 for s in row] for row in stored.tolist()])
    for ds in slices:
        ds.RescaleSlope = 20
    volume = volume_of([encode(ds) for ds in slices])
    assert np.array_equal(volume.hu[0], np.minimum(20 * stored - 1000, 32767))
    assert volume.handled["clipped_pixels"] == DEPTH * np.count_nonzero(20 * stored - 1000 >= 32767)


def test_rescale_may_change_from_slice_to_slice():
    hu = truth()
    for slope in (lambda z: 1 + z % 2, lambda z: 1 + z / 64, lambda z: 2 if z == 4 else 1):
        hu_even = hu // 130 * 130  # stored exactly by every slope
        files = [encode(ct_slice(hu_even[z], z, slope=slope(z), intercept=-1040, bits=16)) for z in range(DEPTH)]
        volume = volume_of(files)
        assert np.abs(volume.hu - hu_even).max() <= 1 and volume.handled["own_rescale_slices"]


@pytest.mark.parametrize(
    "change",
    [{"RescaleIntercept": 0}, {"RescaleSlope": 2}, {"PixelRepresentation": 1}, {"HighBit": 15}, {"BitsStored": 9}],
)
@pytest.mark.parametrize("z", [0, 4])
def test_one_slice_whose_coding_contradicts_its_neighbours_is_noticed(change, z):
    slices = a_series(bits=12)
    for keyword, value in change.items():
        setattr(slices[z], keyword, value)
    assert reason_of(slices) == "coding_disagrees"


def test_a_lone_padding_value_within_the_tissue_is_noticed():
    slices = a_series()
    slices[5].PixelPaddingValue = int(np.median(np.frombuffer(slices[5].PixelData, "<u2")))
    assert reason_of(slices) == "coding_disagrees"


def test_monochrome1_inverts_the_display_not_the_hu():
    hu = truth()
    volume = volume_of([encode(ds) for ds in a_series(hu, PhotometricInterpretation="MONOCHROME1")])
    assert np.array_equal(volume.hu, hu) and volume.handled["monochrome1_slices"] == DEPTH


def test_enhanced_ct_uses_the_groups_of_each_frame():
    hu = truth() // 6 * 6
    order = list(range(DEPTH))
    random.Random(3).shuffle(order)
    volume = volume_of([encode(enhanced(hu, order, slope=lambda z: 1 + z % 3, intercept=-1026, bits=16))])
    assert np.array_equal(volume.hu, hu) and volume.handled["multiframe_slices"] == DEPTH
    broken = enhanced(hu, order, intercept=-1026)
    broken.PerFrameFunctionalGroupsSequence.pop()
    assert reason_of([broken]) == "header"
    shared = broken.SharedFunctionalGroupsSequence[0]
    broken = enhanced(hu, order, intercept=-1026)
    del broken.PerFrameFunctionalGroupsSequence[4].PixelValueTransformationSequence
    assert reason_of([broken]) == "rescale_missing"
    shared.CTImageFrameTypeSequence = [Dataset()]
    shared.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    broken.SharedFunctionalGroupsSequence = [shared]
    assert reason_of([broken]) == "localizer"


# geometry

TILT = np.deg2rad(20)
ORIENTATIONS = {
    "axial": AXIAL,
    "feet first": (-1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.6, 0.8, 0, -0.8 * 0.6, 0.6 * 0.6, 0.8),
    "tilted": (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_slices_ascend_along_the_normal_of_their_own_plane(name):
    """Position, not file name, instance number or the third coordinate, orders them; a flipped normal flips z."""
    hu = truth()
    shear = 2.5 * np.tan(TILT) * np.array(ORIENTATIONS["tilted"][3:]) if name == "tilted" else (0, 0, 0)
    files = [encode(ds) for ds in a_series(hu, orientation=ORIENTATIONS[name], shift=shear)]
    volume = volume_of(random.Random(1).sample(files, DEPTH))
    assert np.array_equal(volume.hu, hu)
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.8), abs=1e-4) and np.all(np.diff(volume.z_mm) > 0)
    assert volume.handled.get("tilt_deg", 0) == pytest.approx(20 if name == "tilted" else 0, abs=0.1)


def test_a_missing_slice_is_rejected_or_ends_the_longest_run():
    slices = a_series(truth(14))
    del slices[4]
    assert reason_of(slices) == "irregular_spacing"
    volume = volume_of([encode(ds) for ds in slices], allow_gaps=True)
    assert np.array_equal(volume.hu, truth(14)[5:]) and volume.handled["outside_regular_run"] == 4
    assert reason_of(slices, allow_gaps=True, min_slices=10) == "irregular_spacing"


def test_a_head_of_two_spacings_is_two_series_if_gaps_are_allowed(tmp_path):
    """14 slices at 4.2 mm through the skull base, 14 at 7.4 mm above it; a single run keeps the name of its series."""
    fine, coarse = truth(14, seed=1), truth(14, seed=2)
    slices = a_series(fine, spacing_z=4.2)
    for z, plane in enumerate(coarse):
        slices.append(ct_slice(plane, z + 14))
        slices[-1].ImagePositionPatient = [-100, -100, round(-100 + 13 * 4.2 + 5.8 + 7.4 * z, 3)]
    assert reason_of(slices) == "irregular_spacing"
    raw, out = write_tree(tmp_path / "raw", slices), tmp_path / "p"
    assert preprocess(raw, out, "--format", "hu16", "--allow-gaps") == 0
    for k, (hu, step) in enumerate(((fine, 4.2), (coarse, 7.4)), 1):
        name = f"{uid(1, 1)}-{k}"
        rows = [row for row in index(out) if row["series"] == name]
        assert np.array_equal(np.load(out / "d" / f"{name}.npy"), hu) and len(rows) == 12
        assert {float(row["spacing_z"]) for row in rows} == {step}
        assert manifest(out)["handled"][name]["outside_regular_run"] == 14
    before = tree(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "d").iterdir()}
    assert preprocess(raw, out, "--format", "hu16", "--allow-gaps") == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "d").iterdir()} == times
    assert same_trees(tree(out), before)
    assert preprocess(raw, out, "--format", "hu16", "--allow-gaps", "--min-slices", "15") == 2  # nothing stays behind
    assert not list((out / "d").iterdir())


def same_trees(one, other):
    """Equal but for the time in the manifest."""
    assert one.keys() == other.keys()
    for path in one:
        if path.startswith("_manifests/") and path.count("/") == 1:
            a, b = (json.loads(t[path]) | {"created_utc": ""} for t in (one, other))
            assert a == b, path
        else:
            assert one[path] == other[path], path
    return True


def test_shards_and_their_merge_write_the_bytes_of_one_process(tmp_path, capsys):
    """Series, rejects and files without a series are dealt to the shards; each one runs alone, in any order."""
    datasets = [ds for p in range(1, 7) for ds in a_series(truth(seed=p), patient=p, series=p)]
    datasets += a_series(truth(5), patient=9, series=9) + [b"no image", b"another"]
    raw, one, many = write_tree(tmp_path / "raw", datasets), tmp_path / "one" / "p", tmp_path / "many" / "p"
    flags = ("--format", "hu16")
    assert preprocess(raw, one, *flags) == 1
    with pytest.raises(FileNotFoundError, match="1_of_3.json does not exist; run it with --shard 1/3"):
        preprocess(raw, many, *flags, "--merge", "3")
    codes = [preprocess(raw, many, *flags, "--shard", f"{k}/3") for k in (3, 1, 2)]
    assert sorted(codes)[-1] == 1 and not (many / "_index").exists()
    parts = [json.loads((many / "_shards" / "d" / f"{k}_of_3.json").read_text()) for k in (1, 2, 3)]
    assert sum(len(part["kept"]) for part in parts) == 6 and max(len(part["kept"]) for part in parts) < 6
    scans = many.parent / "dinox_scans_d"
    assert scans.stat().st_mode & 0o077 == 0 and len(list(scans.iterdir())) == 1 and not list(many.rglob("*scans*"))
    assert preprocess(raw, many, *flags, "--merge", "3") == 1
    assert same_trees(tree(many), tree(one)) and not scans.exists()
    assert write_manifest.verify(many, "d") == []


def test_shards_read_each_header_once_between_them(tmp_path, monkeypatch):
    """And again where a file has changed its size since, or what was left is damaged."""
    raw = write_tree(tmp_path / "raw", [ds for p in (1, 2) for ds in a_series(patient=p, series=p)])
    read, real = [], preprocess_dicom.scan_file
    monkeypatch.setattr(preprocess_dicom, "scan_file", lambda path: read.append(path) or real(path))
    for k in (1, 2, 3):
        preprocess(raw, tmp_path / "o" / "p", "--shard", f"{k}/3")
    files = sum(path.is_file() for path in raw.rglob("*"))
    assert len(read) == len(set(read)) == files
    (kept,) = (tmp_path / "o" / "dinox_scans_d").iterdir()
    kept.write_text(kept.read_text()[:-5])
    preprocess(raw, tmp_path / "o" / "p", "--shard", "1/3")
    assert len(read) == 2 * files
    with open(next(path for path in raw.rglob("*") if path.is_file()), "ab") as f:
        f.write(b" ")
    preprocess(raw, tmp_path / "o" / "p", "--shard", "1/3")
    assert len(read) == 3 * files


def test_shards_that_begin_at_once_share_one_key(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(dicom.load_key, [tmp_path / "new" / "key"] * 32))
    assert len(keys) == 1 and [path.name for path in (tmp_path / "new").iterdir()] == ["key"]
    assert (tmp_path / "new" / "key").stat().st_mode & 0o777 == 0o600


def test_a_merge_names_the_shard_that_is_not_whole(tmp_path):
    raw = write_tree(tmp_path / "raw", [ds for p in (1, 2, 3, 4) for ds in a_series(patient=p, series=p)])
    out, flags = tmp_path / "p", ("--format", "hu16")
    for k in (1, 2):
        preprocess(raw, out, *flags, "--shard", f"{k}/2")
    lost = sorted((out / "d").iterdir())[0]
    k = next(k for k in (1, 2) if lost.stem in json.loads((out / "_shards/d" / f"{k}_of_2.json").read_text())["kept"])
    lost.write_bytes(lost.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{k}_of_2.json: 1 series are not whole.*--shard {k}/2"):
        preprocess(raw, out, *flags, "--merge", "2")
    preprocess(raw, out, *flags, "--shard", f"{k}/2")
    write_tree(raw, a_series(patient=5, series=5), seed=9)
    preprocess(raw, out, *flags, "--shard", "2/2")
    with pytest.raises(ValueError, match="disagree about raw, series"):
        preprocess(raw, out, *flags, "--merge", "2")
    preprocess(raw, out, *flags, "--shard", "1/2")
    assert preprocess(raw, out, *flags, "--merge", "2") == 0 and not (out / "_shards").exists()
    with pytest.raises(SystemExit):
        preprocess(raw, out, "--shard", "0/2")


def test_a_slice_shifted_within_its_plane_is_irregular():
    slices = a_series()
    slices[5].ImagePositionPatient[0] += 0.6  # the step grows from 2.5 to 2.57 mm only
    assert reason_of(slices) == "irregular_spacing"


def test_positions_rounded_to_one_decimal_are_regular():
    slices = a_series(truth(12), spacing_z=0.625)
    for ds in slices:
        ds.ImagePositionPatient = [round(float(v), 1) for v in ds.ImagePositionPatient]
    assert len(volume_of([encode(ds) for ds in slices]).hu) == 12


def test_copies_are_dropped_and_other_images_at_one_position_are_not_guessed_at():
    slices = a_series()
    copies = copy.deepcopy([slices[3], slices[7], slices[7]])
    copies[1].SOPInstanceUID = uid(9, 9, 9)  # a copy under a new name
    volume = volume_of([encode(ds) for ds in slices + copies])
    assert np.array_equal(volume.hu, truth()) and volume.handled["duplicates_dropped"] == 3
    changed = copy.deepcopy(slices[3])
    changed.PixelData = changed.PixelData[:-2] + b"\0\0"
    assert reason_of([*slices, changed]) == "duplicate_position"
    renamed = copy.deepcopy(slices)
    renamed[2].SOPInstanceUID = renamed[3].SOPInstanceUID
    assert reason_of(renamed) == "duplicate_sop"


# every reject has its reason

ONE_SLICE = {  # change of one slice -> reason for which this file is left out
    "not_ct": [{"Modality": "MR"}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, {"SOPClassUID": None}],
    "secondary_capture": [{"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}],
    "localizer": [{"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}],
    "derived": [{"ImageType": ["DERIVED", "PRIMARY"]}, {"ImageType": ["ORIGINAL", "SECONDARY", "AXIAL"]}],
    "not_grayscale": [{"PhotometricInterpretation": "RGB"}, {"SamplesPerPixel": 3}],
    "pixel_format": [{"BitsAllocated": 8}, {"BitsStored": 13}, {"HighBit": 17}, {"Rows": 50000, "Columns": 50000}],
    "rescale_missing": [{"RescaleSlope": None}, {"RescaleIntercept": None}, {"RescaleIntercept": ""}],
    "rescale_not_hu": [{"RescaleType": "US"}, {"RescaleType": "HU_MOD"}],
    "rescale_implausible": [{"RescaleSlope": 0}, {"RescaleSlope": -1024}, {"RescaleIntercept": "9e9"}],
    "pixel_size": [{"PixelData": None}, {"PixelData": b"\0" * 100}, {"Rows": HEIGHT - 1}, {"Columns": WIDTH + 1}],
    "header": [{"ImagePositionPatient": None}, {"ImagePositionPatient": [1, 2]}, {"PixelSpacing": [0, 0.7]}]
    + [{"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, {"SOPInstanceUID": None}, {"PixelRepresentation": None}]
    + [{"NumberOfFrames": 3}],
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", ONE_SLICE)
def test_a_file_that_is_no_measured_slice_is_left_out_with_its_reason(tmp_path, reason):
    """At an end of the series, so that what remains is regular; in the middle it takes the series with it."""
    for i, change in enumerate(ONE_SLICE[reason]):
        for z, kept in ((DEPTH - 1, True), (4, False)):
            raw, out = tmp_path / f"raw{i}{z}", tmp_path / f"{i}{z}/p"
            write_tree(raw, [ct_slice(hu, k, **(change if k == z else {})) for k, hu in enumerate(truth())])
            assert preprocess(raw, out, "--format", "hu16") == (1 if kept else 2), change
            if kept:
                assert np.array_equal(np.load(out / index(out)[0]["path"]), truth()[:-1])
                assert [entry["reason"] for entry in manifest(out)["rejected"]] == [reason], change
            else:
                (entry,) = manifest(out)["rejected"]
                assert entry["reason"] == "irregular_spacing" and entry["file_reasons"] == {reason: 1}, change
                assert index(out) == [] and entry["files"] == DEPTH


WHOLE_SERIES = {  # reason -> change of slice 3 that speaks against the whole series
    "mixed_patient": {"PatientID": "P-002"},
    "mixed_frame": {"FrameOfReferenceUID": uid(7)},
    "mixed_orientation": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    "mixed_spacing": {"PixelSpacing": [0.9, 0.8]},
    "mixed_matrix": {"Rows": WIDTH, "Columns": HEIGHT},
    "no_patient_id": {"PatientID": ""},
}


@pytest.mark.parametrize("reason", WHOLE_SERIES)
def test_a_mixed_series_is_rejected(reason):
    slices = a_series()
    for keyword, value in WHOLE_SERIES[reason].items():
        setattr(slices[3], keyword, value)
    assert reason_of(slices) == reason


def test_what_is_not_dicom_is_listed_and_bare_dicom_is_read(tmp_path, capsys):
    hu, raw = truth(), tmp_path / "raw"
    write_tree(raw, [encode(ds, ImplicitVRLittleEndian, preamble=False) for ds in a_series(hu)])
    write_tree(raw, [encode(ds, ExplicitVRLittleEndian, preamble=False) for ds in a_series(hu, series=2)], seed=1)
    for name, data in {"x.xml": b"<a/>", "empty": b"", "zeros": bytes(500), "near": b"\x08\0\x05\0junk" * 9}.items():
        (raw / name).write_bytes(data)
    assert preprocess(raw, tmp_path / "p", "--format", "hu16", "--list-rejects") == 0
    assert [e["reason"] for e in manifest(tmp_path / "p")["rejected"]] == ["not_dicom"] * 4
    assert manifest(tmp_path / "p")["counts"]["series"] == 2
    assert f"not_dicom            {raw / 'near'}" in capsys.readouterr().out


def test_links_are_followed_once_and_unreadable_entries_are_recorded(tmp_path):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    write_tree(elsewhere, a_series())
    raw.mkdir()
    (raw / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(raw)
    (raw / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(raw / "pipe")
    assert preprocess(raw, tmp_path / "p") == 1
    found = manifest(tmp_path / "p")
    assert found["raw"]["files"] == DEPTH + 2 and found["counts"]["slices"] == DEPTH - 2
    assert [e["reason"] for e in found["rejected"]] == ["unreadable", "unreadable"]


def test_devices_and_sockets_are_recorded_and_not_waited_for(tmp_path, monkeypatch, impatient):
    raw = write_tree(tmp_path / "raw", a_series())
    os.mkfifo(raw / "pipe.dcm")
    (raw / "zero.dcm").symlink_to("/dev/zero")
    monkeypatch.chdir(raw)  # the path of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket.dcm")
    assert preprocess(raw, tmp_path / "p") == 1
    assert [e["reason"] for e in manifest(tmp_path / "p")["rejected"]] == ["unreadable"] * 3
    os.mkfifo(tmp_path / "key")
    hidden = write_tree(tmp_path / "hidden", a_series(PatientIdentityRemoved=None))
    with pytest.raises(OSError, match="key is a FIFO, not a file"):
        preprocess(hidden, tmp_path / "q/p", "--key-file", tmp_path / "key")


def test_paths_of_rejects_are_shown_without_control_characters(tmp_path, capsys):
    raw = write_tree(tmp_path / "raw", a_series())
    (raw / "a\x1b[2J\u202e.txt").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(raw) + b"/b\xff.txt")).write_bytes(b"x")
    assert preprocess(raw, tmp_path / "p", "--list-rejects") == 0
    said = capsys.readouterr().out
    assert "/a\\x1b[2J\\u202e.txt\n" in said and "/b\\udcff.txt\n" in said and "\x1b" not in said


def test_a_directory_without_its_class_is_called_one_too(tmp_path):
    """Discs were seen whose file meta information lacks the class: group 0004 tells."""
    ds = Dataset()
    ds.FileSetID, ds.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = "DISC", 0
    ds.FileSetConsistencyFlag, ds.DirectoryRecordSequence = 0, []
    (tmp_path / "DICOMDIR").write_bytes(encode(ds))
    assert dicom.scan_file(tmp_path / "DICOMDIR").reason == "dicomdir"


def test_a_dicomdir_is_called_one(tmp_path, capsys):
    raw, entry = write_tree(tmp_path / "raw", a_series()), Dataset()
    entry.DirectoryRecordType, entry.SeriesInstanceUID, entry.PatientName = "IMAGE", uid(1, 1), "ZZDOE"
    for count in (0, 1, 300):  # 300: beyond the first 16 KiB
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = dicom.DICOMDIR, uid(count)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.FileSetID, ds.DirectoryRecordSequence = "ZZDOE", [copy.deepcopy(entry) for _ in range(count)]
        ds.save_as(raw / f"DICOMDIR{count}", enforce_file_format=True)
    assert (raw / "DICOMDIR300").stat().st_size > 1 << 14
    assert preprocess(raw, tmp_path / "p") == 1
    assert [e["reason"] for e in manifest(tmp_path / "p")["rejected"]] == ["dicomdir"] * 3
    assert "a DICOMDIR: the list of the files of a disc, no image" in capsys.readouterr().out


def test_a_missing_decoder_is_named_with_the_package_to_install(tmp_path, capsys):
    if dicom.get_decoder(JPEGLSLossless).is_available:
        pytest.skip("this machine decodes JPEG-LS")
    assert preprocess(write_tree(tmp_path / "raw", a_series(), JPEGLSLossless), tmp_path / "p") == 2
    assert "pip install pylibjpeg pylibjpeg-libjpeg" in capsys.readouterr().out
    assert manifest(tmp_path / "p")["rejected"][0]["reason"] == "compressed"


# ids


def test_nothing_that_identifies_leaves_the_raw_folder(tmp_path, capsys):
    """Names, dates, free text and ids are in every header and in every path; outputs hold none of them."""
    raw = tmp_path / "raw" / "ZZDOE_JOHN_19331224"
    changes = {"PatientIdentityRemoved": None, "PatientID": "ZZID-7", "StudyInstanceUID": uid("7" * 10)} | IDENTIFYING
    write_tree(raw, a_series(**changes))
    bad = [*a_series(series=2, **changes | {"Modality": "ZZ"}), *a_series(series=3, **changes)[:4]]
    write_tree(raw, bad + a_series(series=4, **changes | {"RescaleType": "ZZ"}), seed=1)
    (raw / "ZZDOE.txt").write_text("ZZDOE")
    for flags in ((), ("--format", "hu16")):
        out = tmp_path / f"out{len(flags)}"
        assert preprocess(raw, out, *flags) == 1
        content = [*tree(out), *map(str, tree(out).values())]
        written = "\n".join([*content, *map(str, out.rglob("*")), capsys.readouterr().out])
        written = written.replace(str(tmp_path), "")
        for secret in ("ZZ", "19331224", "19991231", uid(1), "7" * 10):
            assert secret not in written
        (row,) = {(row["patient"], row["study"], row["series"]) for row in index(out)}
        key = dicom.load_key(tmp_path / "dinox_id_key")
        assert row[0] == dicom.public_id("patient", "ZZID-7", key)
        assert index(out)[0]["sop"] == dicom.public_id("sop", uid(1, 1, 101), key)


def test_what_identifies_is_in_nested_and_private_elements_too_and_stays_there(tmp_path, capfd):
    """Every output, both streams, kept and rejected series, hashed ids; ZZ marks what must not get out."""
    more = {"OtherPatientIDs": "ZZ1", "PatientComments": "ZZ2", "ImageComments": "ZZ3", "OperatorsName": "ZZ^4"}
    more |= {"StudyID": "ZZ5", "StationName": "ZZ6", "ProtocolName": "ZZ7", "PatientBirthTime": "191919.202020"}
    hidden = IDENTIFYING | more | {"PatientIdentityRemoved": None, "PatientID": "ZZ-77 of ZZ"}
    slices = a_series(**hidden) + a_series(series=2, RescaleType="ZZ", **hidden) + a_series(series=3, **hidden)[:4]
    for ds in slices:
        request = Dataset()
        request.AccessionNumber, request.RequestedProcedureDescription = "ZZ8", "ZZ9"
        ds.RequestAttributesSequence = [request]
        block = ds.private_block(0x0011, "ZZ MAKER", create=True)
        block.add_new(1, "LO", "ZZ10")
        block.add_new(2, "SQ", [copy.deepcopy(request)])
    slices[2 * DEPTH + 1].ImageOrientationPatient = None
    files = [encode(ds) for ds in slices]
    files[0] = files[0].replace(b"ISO", b"ZZ!")
    files.append(files[3].replace(b"\x28\x00\x30\x00DS", b"\x28\x00\x30\x00ZZ"))  # a type that does not exist
    assert preprocess(write_tree(tmp_path / "raw", files), tmp_path / "o/p", workers=2) == 1
    assert write_manifest.main(["--data", str(tmp_path / "o/p"), "--verify"]) == 0
    found = tree(tmp_path / "o/p")
    written = "\n".join([*found, *map(str, found.values()), *capfd.readouterr()]).replace(str(tmp_path), "")
    for secret in ("ZZ", "19331224", "19991231", "191919.202020", uid(1)):
        assert secret not in written
    assert len(manifest(tmp_path / "o/p")["rejected"]) >= 2 and index(tmp_path / "o/p")


def test_spellings_of_a_patient_id_become_one_patient(tmp_path, capsys):
    for name, said in (("kept", "YES"), ("hashed", None)):
        raw = tmp_path / name
        for series, patient in enumerate(("Pat-1", "PAT-1", "Pat-2")):
            slices = a_series(series=series, PatientID=patient, PatientIdentityRemoved=said if series else None)
            write_tree(raw, slices, seed=series)
        assert preprocess(raw, tmp_path / f"{name}out/p") == 0
        assert "2 PatientIDs differ from others in case or outer spaces only" in capsys.readouterr().out
        patients = {row["series"]: row["patient"] for row in index(tmp_path / f"{name}out/p")}
        assert len(patients) == 3 and len(set(patients.values())) == 2
        assert ("Pat-2" in patients.values()) == (name == "kept") and "PAT-1" not in str(patients)
        key = dicom.load_key(tmp_path / f"{name}out" / "dinox_id_key")
        assert dicom.public_id("patient", "PAT-1", key) in patients.values()  # one file of Pat-1 does not say YES


def test_a_missing_study_is_no_id_that_patients_share(tmp_path):
    slices = [ds for p in (1, 2) for ds in a_series(patient=p, StudyInstanceUID=None, PatientIdentityRemoved=None)]
    assert preprocess(write_tree(tmp_path / "raw", slices), tmp_path / "o/p") == 0
    assert {row["study"] for row in index(tmp_path / "o/p")} == {""}


def test_ids_are_kept_only_when_all_files_say_that_identity_is_removed(tmp_path):
    slices = a_series() + a_series(series=2)
    write_tree(tmp_path / "raw", slices)
    preprocess(tmp_path / "raw", tmp_path / "a/p")
    assert {row["patient"] for row in index(tmp_path / "a/p")} == {"P-001"}
    slices[3].PatientIdentityRemoved = "NO"
    write_tree(tmp_path / "raw2", slices)
    preprocess(tmp_path / "raw2", tmp_path / "b/p")
    (patient,) = {row["patient"] for row in index(tmp_path / "b/p")}  # one name for both series: no leak over a split
    assert patient != "P-001" and uid(1, 1) not in str(index(tmp_path / "b/p")[0])
    odd = ct_slice(truth()[0], DEPTH, Modality="PT", PatientID="P-009", PatientIdentityRemoved=None)
    write_tree(tmp_path / "raw", [odd], seed=5)  # left out of series 1, so it decides nothing
    preprocess(tmp_path / "raw", tmp_path / "d/p")
    assert {row["patient"] for row in index(tmp_path / "d/p")} == {"P-001"}
    preprocess(tmp_path / "raw2", tmp_path / "c/p", "--keep-ids")
    assert {row["patient"] for row in index(tmp_path / "c/p")} == {"P-001"}


def test_the_key_is_made_once_for_its_owner_and_not_in_the_output(tmp_path, capsys):
    raw, key = write_tree(tmp_path / "raw", a_series(PatientIdentityRemoved=None)), tmp_path / "keys" / "k"
    for name in ("a", "b"):
        preprocess(raw, tmp_path / name, "--key-file", key)
        assert key.stat().st_mode & 0o777 == 0o600
    assert tree(tmp_path / "a/_index") == tree(tmp_path / "b/_index")
    preprocess(raw, tmp_path / "c", "--key-file", tmp_path / "keys" / "other")
    assert tree(tmp_path / "a/_index") != tree(tmp_path / "c/_index")
    with pytest.raises(SystemExit):
        preprocess(raw, tmp_path / "d", "--key-file", tmp_path / "d" / "k")
    assert "inside --out" in capsys.readouterr().err
    key.write_text("short")
    with pytest.raises(ValueError, match="64 hex digits"):
        preprocess(raw, tmp_path / "a", "--key-file", key)


def test_hostile_ids_become_plain_and_stay_distinct(tmp_path):
    warnings.simplefilter("ignore")  # pydicom's, that such ids are written
    hostile = ["../../../evil", "/etc/passwd", "a\nb", "..", "x" * 200, "1.2.3/../4", 'con,"quoted"']
    slices = [
        ds
        for i, text in enumerate(hostile)
        for ds in a_series(series=i, SeriesInstanceUID=text, PatientID=text, StudyInstanceUID=text)
    ]
    assert preprocess(write_tree(tmp_path / "raw", slices), tmp_path / "o/p") == 0
    rows = index(tmp_path / "o/p")
    assert len({r["series"] for r in rows}) == len({r["patient"] for r in rows}) == len(hostile)
    for row in rows:
        assert all(set(row[k]) <= set("0123456789abcdefghijklmnopqrstuvwxyz") for k in ("series", "patient", "study"))
        assert (tmp_path / "o/p" / row["path"]).is_file()
    assert sorted(os.listdir(tmp_path)) == ["o", "raw"] and os.listdir(tmp_path / "o") == ["p"]


# many series, killed runs, several datasets


def mixed_tree(folder, seed=0):
    """Three patients, four good series, one scout, one gap, one file of another modality, one note."""
    pairs = ((1, 1), (1, 2), (2, 1), (3, 1))
    slices = [ds for p, s in pairs for ds in a_series(truth(seed=p + 3 * s), patient=p, series=s)]
    slices += a_series(patient=3, series=5, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])[:1]
    slices += [ds for ds in a_series(patient=3, series=6) if ds.SOPInstanceUID[-1] != "4"]
    slices.append(ct_slice(truth()[0], DEPTH, patient=2, Modality="PT"))
    write_tree(folder, slices, seed=seed)
    (folder / f"note{seed}.txt").write_text("hello")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["rgb", "hu16"])
def test_output_is_the_same_for_any_worker_count_and_file_order(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    trees = []
    for seed, workers in ((0, 1), (1, 2), (2, 3)):
        raw, out = mixed_tree(tmp_path / f"raw{seed}", seed), tmp_path / f"out{seed}/p"
        assert preprocess(raw, out, "--format", encoding, workers=workers) == 1
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2]
    found = manifest(tmp_path / "out0/p")
    assert found["created_utc"] == "2023-11-14T22:13:20Z"
    assert found["counts"] == {"patient": 3, "study": 3, "series": 4, "slices": 4 * (DEPTH - 2)}
    assert sorted(e["reason"] for e in found["rejected"]) == ["irregular_spacing", "localizer", "not_ct", "not_dicom"]
    order = [(row["series"], int(row["z"])) for row in index(tmp_path / "out0/p")]
    assert order == sorted(order)


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_as_if_never_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    slices = [ds for p in range(1, 13) for ds in a_series(truth(seed=p, height=256, width=256), patient=p)]
    raw = write_tree(tmp_path / "raw", slices)
    preprocess(raw, tmp_path / "whole/p")
    out = tmp_path / "killed/p"
    argv = [sys.executable, "tools/preprocess_dicom.py", "--raw", raw, "--out", out, "--dataset", "d", "--workers", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(list(map(str, argv)), cwd=ROOT, start_new_session=True, **quiet)
    while run.poll() is None and len(list((out / "_manifests" / "d").glob("*.json"))) < 3:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):  # its workers notice and leave
        for _ in range(100):
            os.killpg(run.pid, 0)
            time.sleep(0.1)
    done = {path: path.stat().st_mtime_ns for path in (out / "_manifests" / "d").glob("*.json")}
    assert 3 <= len(done) < 12 and not (out / "_index" / "index.csv").exists()
    (out / "d" / ".1.2.3.99-abc.tmp").mkdir(parents=True)
    assert preprocess(raw, out) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())  # not made again
    assert tree(out) == tree(tmp_path / "whole/p")


def test_changed_lost_or_vanished_series_are_made_again_or_removed(tmp_path, capsys):
    raw, out = mixed_tree(tmp_path / "raw"), tmp_path / "o/p"
    preprocess(raw, out)
    rows, before = index(out), tree(out)
    shutil.rmtree(out / "d" / rows[0]["series"])
    preprocess(raw, out)
    assert tree(out / "d") == {k[2:]: v for k, v in before.items() if k.startswith("d/")}
    victim = next(p for p in raw.rglob("*") if p.is_file() and dicom.scan_file(p).series == rows[0]["series"])
    ds = pydicom.dcmread(victim)
    ds.RescaleIntercept = -1000
    ds.save_as(victim)
    capsys.readouterr()
    preprocess(raw, out)
    assert {row["series"] for row in index(out)} == {row["series"] for row in rows} - {rows[0]["series"]}
    assert not (out / "d" / rows[0]["series"]).exists()
    shutil.rmtree(raw)
    write_tree(raw, a_series(patient=2) + a_series(patient=4))
    assert preprocess(raw, out) == 0
    assert "removed 2 series of an earlier run" in capsys.readouterr().out
    assert {row["patient"] for row in index(out)} == {"P-002", "P-004"} and len(os.listdir(out / "d")) == 2


def test_datasets_share_a_root_and_a_dataset_has_one_encoding_and_source(tmp_path):
    raw, out = mixed_tree(tmp_path / "raw"), tmp_path / "o/p"
    preprocess(raw, out, dataset="b")
    one = index(out)
    preprocess(raw, out, "--format", "hu16", dataset="a")
    both = index(out)
    assert [row["dataset"] for row in both] == ["a"] * len(one) + ["b"] * len(one) and both[len(one) :] == one
    assert manifest(out, "a")["index_sha256"] == manifest(out, "b")["index_sha256"]
    assert write_manifest.main(["--data", str(out), "--verify"]) == 0
    with pytest.raises(ValueError, match="is hu16-v1: give another --dataset"):
        preprocess(raw, out, dataset="a")
    with pytest.raises(ValueError, match="none of them is in --raw"):
        preprocess(write_tree(tmp_path / "other", a_series(patient=9)), out, dataset="b")
    assert index(out) == both


def test_verify_names_what_changed_and_writing_accepts_it(tmp_path, capsys):
    raw, out = mixed_tree(tmp_path / "raw"), tmp_path / "o/p"
    preprocess(raw, out)
    verify = ["--data", str(out), "--dataset", "d", "--verify", "--raw", str(raw)]
    assert write_manifest.main(verify) == 0
    paths = [out / row["path"] for row in index(out)]
    paths[0].unlink()
    data = bytearray(paths[1].read_bytes())
    data[60] ^= 1
    paths[1].write_bytes(data)
    (paths[2].parent / "0099.png").write_bytes(b"x")
    (out / "d" / "stray").write_bytes(b"x")
    (raw / "more").write_bytes(b"x")
    text = (out / "_index/index.csv").read_text().replace(",P-003,", ",P-001,")
    (out / "_index/index.csv").write_text(text)
    capsys.readouterr()
    assert write_manifest.main(verify) == 1
    said = capsys.readouterr().out
    missing, changed = (row["path"] for row in index(out)[:2])
    for line in (f"missing: {missing}", f"changed: {changed}", "/0099.png", "extra: d/stray"):
        assert line in said
    for field in ("index_sha256", "rows_sha256", "counts", "raw"):
        assert f"changed: {field} is" in said
    (out / "d" / "stray").unlink()
    assert write_manifest.main(verify[:4]) == 0
    assert write_manifest.main(verify[:5]) == 0
    shutil.rmtree(paths[-1].parent)
    with pytest.raises(ValueError, match="preprocess it again"):
        write_manifest.main(verify[:4])
    (out / "_index/index.csv").write_text(text.replace("body_x1", "x"))
    assert write_manifest.main(verify[:5]) == 1
    (out / "_index/index.csv").unlink()
    capsys.readouterr()
    assert write_manifest.main(verify[:5]) == 1 and "missing: _index/index.csv" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="other.json does not exist; make it again with tools/preprocess"):
        write_manifest.main(["--data", str(out), "--dataset", "other"])


def series_record(out):
    (path,) = (out / "_manifests" / "d").glob("*.json")
    return path


DAMAGED = [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}']


@pytest.mark.parametrize("damaged", [*DAMAGED, {"series": []}, {"series": {"s": {"files": "3"}}}, {"rejected": 3}])
def test_a_damaged_manifest_is_one_sentence_and_is_made_again(tmp_path, monkeypatch, damaged):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    raw, out = write_tree(tmp_path / "raw", a_series()), tmp_path / "o/p"
    preprocess(raw, out)
    path, before, found = out / "_manifests" / "d.json", tree(out), manifest(out)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert write_manifest.main(["--data", str(out), "--verify"]) == 0  # a byte order mark is harmless
    path.write_bytes(json.dumps(found | damaged).encode() if isinstance(damaged, dict) else damaged)
    for flags in ([], ["--verify"]):
        with pytest.raises(ValueError, match="d.json.*; make it again with tools/preprocess_dicom.py") as caught:
            write_manifest.main(["--data", str(out), *flags])
        assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match="d.json.*; make it again"):  # of another dataset: not ours to make
        preprocess(write_tree(tmp_path / "raw2", a_series(patient=2)), out, dataset="e")
    shutil.rmtree(out / "_manifests" / "e")
    shutil.rmtree(out / "e")
    assert preprocess(raw, out) == 0 and tree(out) == before


@pytest.mark.parametrize(
    "damaged",
    [*DAMAGED, {"files": [1]}, {"files": {"d/x": ["3", 4]}}, {"rows": [[1]]}, {"rows": "x"}, {"handled": []}]
    + [{"rejected": [["9.9", "header", ""]]}, {"rejected": [3]}, {"inputs": 3}],
)
def test_a_damaged_record_is_named_and_its_series_made_again(tmp_path, monkeypatch, capsys, damaged):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    raw, out = write_tree(tmp_path / "raw", a_series()), tmp_path / "o/p"
    preprocess(raw, out)
    path, before, well_formed = series_record(out), tree(out), damaged == {"rejected": [["9.9", "header", ""]]}
    content = json.loads(path.read_bytes()) | damaged if isinstance(damaged, dict) else damaged
    path.write_bytes(json.dumps(content).encode() if isinstance(damaged, dict) else damaged)
    if not well_formed:
        (out / "d" / path.stem / "0002.png").write_bytes(b"x")
        assert write_manifest.main(["--data", str(out), "--verify"]) == 1
        assert f"changed: d/{path.stem}" in capsys.readouterr().out
    assert preprocess(raw, out) == 0 and tree(out) == before
    if not well_formed:
        path.write_bytes(json.dumps(content).encode() if isinstance(damaged, dict) else damaged)
        with pytest.raises(ValueError, match=f"{path.stem}.json.*; preprocess d again"):
            preprocess(write_tree(tmp_path / "raw2", a_series(patient=2)), out, dataset="e")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("2.5,40", "x,40"), "index.csv: spacing_z of d/.*/0001.png is x; preprocess again"),
        (lambda text: text.replace("2.5,40", "nan,40"), "index.csv: spacing_z of .* is nan; preprocess again"),
        (lambda text: text + "d/1,2\n", "index.csv, row 10: 2 cells of 18; preprocess again"),
        (lambda text: text.replace("path", "x" * 10**5, 1), "index.csv: columns are x.* characters"),
        (lambda text: text.encode()[:-1] + b"\xff", "index.csv is not a UTF-8 CSV file"),
    ],
)
def test_a_damaged_index_is_named_with_its_row(tmp_path, capsys, change, message):
    raw, out = write_tree(tmp_path / "raw", a_series()), tmp_path / "o/p"
    preprocess(raw, out)
    path = out / "_index" / "index.csv"
    content = change(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        write_manifest.main(["--data", str(out)])
    assert len(str(caught.value)) < 500
    capsys.readouterr()
    assert write_manifest.main(["--data", str(out), "--verify"]) == 1
    assert "changed: _index/index.csv" in capsys.readouterr().out


@pytest.fixture
def impatient():
    """Fails a test that waits, for a pipe say."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)


def test_pipes_and_names_with_escapes_in_the_output_are_named_and_not_waited_for(tmp_path, capsys, impatient):
    raw, out = write_tree(tmp_path / "raw", a_series()), tmp_path / "o/p"
    preprocess(raw, out)
    folder = (out / index(out)[0]["path"]).parent
    os.mkfifo(folder / "pipe")
    (folder / "x\x1b[2J\u202e").write_bytes(b"x")
    capsys.readouterr()
    assert write_manifest.main(["--data", str(out), "--verify"]) == 1
    said = capsys.readouterr().out
    assert f"extra: d/{folder.name}/pipe" in said and "/x\\x1b[2J\\u202e\n" in said and "\x1b" not in said
    with pytest.raises(ValueError, match="pipe is no regular file, or cannot be read; remove it"):
        write_manifest.main(["--data", str(out)])


BAD_FLAGS = {"--min-slices 2": "at least 3", "--dataset ../x": "no plain name", "--dataset _index": "no plain name"}
BAD_FLAGS |= {"--workers 0": "at least 1", "--raw nowhere": "is not a folder", "--raw empty": "holds no file"}
BAD_FLAGS |= {"--out raw/out": "inside each other"}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_a_bad_flag_is_named(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "raw", a_series()[:1])
    (tmp_path / "empty").mkdir()
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        preprocess("raw", "o", *flags.split())
    assert message in f"{caught.value} {capsys.readouterr().err}" and not (tmp_path / "o").exists()


# the body box


def scene(height=512, width=512, table="plates"):
    """Lungs in a body above a table -> HU and the box of the body."""
    y, x = np.mgrid[:height, :width] / 512.0 * (512 / np.array([height, width]))[:, None, None]
    hu = np.full((height, width), -1000.0)
    hu[((y - 0.45) / 0.25) ** 2 + ((x - 0.5) / 0.36) ** 2 < 1] = 40
    for side in (0.33, 0.67):
        hu[((y - 0.44) / 0.16) ** 2 + ((x - side) / 0.12) ** 2 < 1] = -850
    ys, xs = np.nonzero(hu > -500)
    box = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    if table == "plates":  # two curved plates, the upper one touching the back
        sag = 0.702 - 0.25 * (x - 0.5) ** 2
        hu[(np.abs(y - sag) < 0.004) | (np.abs(y - sag - 0.09) < 0.004)] = 200
    return hu, box


@pytest.mark.parametrize("shape", [(512, 512), (256, 256), (64, 64), (512, 300), (700, 701)])
def test_the_body_box_is_the_body_without_the_table(shape):
    for table in ("none", "plates"):
        hu, box = scene(*shape, table)
        noisy = (hu + np.random.default_rng(0).normal(0, 30, shape)).astype(np.int16)
        found = volumes.body_box(noisy)
        assert np.abs(np.subtract(found, box)).max() <= (0 if table == "none" else shape[0] // 64), (found, box)


def test_a_slice_without_a_body_keeps_its_whole_box():
    hu = np.full((50, 60), -1000, np.int16)
    assert volumes.body_box(hu) == (0, 50, 0, 60)
    hu[20, :] = 100
    assert volumes.body_box(hu) == (0, 50, 0, 60)


def test_largest_region_by_flood_fill():
    rng = np.random.default_rng(1)
    for density in (0.4, 0.55, 0.65, 0.9):
        mask = rng.random((23, 31)) < density
        left, best = set(zip(*np.nonzero(mask))), set()
        while left:
            stack, region = [left.pop()], set()
            while stack:
                y, x = stack.pop()
                region.add((y, x))
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
                left -= near
                stack += near
            best = max(best, region, key=len)
        found = volumes.largest_region(mask)
        assert found.sum() == len(best) and not np.any(found & ~mask)


# damaged files


def mutant(ds, rng):
    """One damaged file, and whether its pixels may have been hit: flips, cuts, lost or added bytes, swapped tags."""
    if rng.random() < 0.25:
        ds, tags = copy.deepcopy(ds), [e.tag for e in ds if e.VR in ("DS", "US", "UI", "LO")]
        first = rng.choice(tags)
        second = rng.choice([tag for tag in tags if ds[tag].VR == ds[first].VR])
        ds[first]._value, ds[second]._value = ds[second].value, ds[first].value
        return encode(ds), False
    data = bytearray(encode(ds))
    header = len(data) - 2 * HEIGHT * WIDTH
    at = rng.randrange(header if rng.random() < 0.85 else len(data))
    kind = rng.choice(("flip", "byte", "digit", "cut", "lose", "add", "swap"))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "digit":
        at = rng.choice([i for i in range(header) if 48 <= data[i] < 58])
        data[at] = rng.choice(b"0123456789")
    elif kind == "cut":
        del data[at:]
    elif kind == "lose":
        del data[at : at + rng.choice((1, 2, 4, 8))]
    elif kind == "add":
        data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
    else:
        to = rng.randrange(at, len(data))
        data[at : at + 4], data[to : to + 4] = data[to : to + 4], data[at : at + 4]
        return bytes(data), to + 4 > header
    return bytes(data), at >= header and kind in ("flip", "byte")


def survive_mutants(tmp_path, count, workers):
    """`count` series, each with one damaged file: every one ends as the truth or as a reject with a reason."""
    rng, raw, pixels_hit = random.Random(count), tmp_path / "raw", {}
    for i in range(count):
        change = ({}, {"bits": 16, "signed": True, "PixelPaddingValue": -2000})[i % 2] | IDENTIFYING
        slices = a_series(patient=i, **change)
        z = rng.randrange(DEPTH)
        files = [encode(ds) for ds in slices]
        files[z], pixels_hit[uid(i, 1)] = mutant(slices[z], rng)
        (raw / str(i)).mkdir(parents=True)
        for k, data in enumerate(files):
            (raw / str(i) / str(k)).write_bytes(data)
    assert preprocess(raw, tmp_path / "o/p", "--format", "hu16", workers=workers) == 1
    found, hu, kept = manifest(tmp_path / "o/p"), truth(), {}
    for row in index(tmp_path / "o/p"):
        kept.setdefault(row["series"], []).append(row)
    for series, rows in kept.items():
        volume = np.load(tmp_path / "o/p" / rows[0]["path"])
        first = round((float(rows[0]["z_mm"]) + 100) / 2.5) - 1
        wrong = np.count_nonzero(volume != hu[first : first + len(volume)])
        assert wrong <= (8 if pixels_hit[series] else 0), (series, wrong)
        assert abs(float(rows[0]["spacing_z"]) - 2.5) < 0.3 and float(rows[0]["spacing_x"]) == 0.8
    explained = kept.keys() | {entry.get("series") for entry in found["rejected"]}
    assert pixels_hit.keys() <= explained and all(e["reason"] in dicom.REASONS for e in found["rejected"])
    lost = sum(e.get("files", 1) for e in found["rejected"])
    dropped = sum(h.get("duplicates_dropped", 0) for h in found["handled"].values())
    assert sum(len(rows) + 2 for rows in kept.values()) + lost + dropped == found["raw"]["files"] == count * DEPTH
    assert "ZZ" not in str(found) and 0.1 * count < len(kept) < count
    return found


def test_a_file_that_ends_inside_a_sequence():
    data = encode(ct_slice(truth()[0], 0))[: -2 * HEIGHT * WIDTH - 12]
    for rest in (b"", b"\xfe\xff", b"\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000):  # nothing, half an item, an abyss
        opened = struct.pack("<HH2sHL", 0x5200, 0x9229, b"SQ", 0, 0xFFFFFFFF) + rest
        with pytest.raises(dicom.Reject):
            dicom.read_slices(data + opened)


def nested(n):
    """n private sequences of undefined length, each inside the one before."""
    begin = struct.pack("<HH2sHLHHL", 9, 0x1001, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    return begin * n + struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0) * n


def flat(n):
    """A private sequence of n empty items."""
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0)
    return struct.pack("<HH2sHL", 9, 0x1001, b"SQ", 0, 0xFFFFFFFF) + item * n + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)


def with_private(elements):
    data = encode(ct_slice(truth()[0], 0))
    at = data.index(b"\x10\x00\x20\x00LO")
    return data[:at] + struct.pack("<HH2sH4s", 9, 0x10, b"LO", 4, b"ACME") + elements + data[at:]


def deflated(n):
    """A deflated file of a few kB with n zeros behind its pixels."""
    ds = ct_slice(truth()[0], 0)
    ds.add_new(0xFFFCFFFC, "OB", bytes(n))
    return encode(ds, DeflatedExplicitVRLittleEndian)


def many_frames():
    ds = enhanced(truth(), range(DEPTH))
    ds.NumberOfFrames = 10**9
    return ds


HUGE = {
    "frames": lambda: encode(ct_slice(truth()[0], 0, NumberOfFrames=10**9)),
    "frames with groups": lambda: encode(many_frames()),
    "rows": lambda: encode(ct_slice(truth()[0], 0, Rows=65535, Columns=65535)),
    "depth": lambda: with_private(nested(10_000)),
    "items": lambda: with_private(flat(10**6)),
    "items, big endian": lambda: with_private(flat(10**6).replace(b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")),
    "deflated": lambda: deflated(140 << 20),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_counts_take_no_memory(name):
    data = HUGE[name]()
    for reader in (dicom.read_scan, dicom.read_slices):
        tracemalloc.start()
        with contextlib.suppress(dicom.Reject):
            reader(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (32 << 20) + 3 * len(data), (reader, peak)


def test_a_few_private_sequences_and_a_deflated_file_are_read():
    assert len(dicom.read_slices(with_private(nested(10)))) == len(dicom.read_slices(with_private(flat(1000)))) == 1
    assert len(dicom.read_slices(deflated(1 << 20))) == 1


def test_a_file_of_gigabytes_is_recorded_and_not_read(tmp_path):
    raw = write_tree(tmp_path / "raw", a_series())
    with open(raw / "zz", "wb") as f:
        f.write(encode(ct_slice(truth()[0], DEPTH)))
        f.truncate(1 << 40)  # sparse: takes no room on the disk
    assert preprocess(raw, tmp_path / "p") == 1
    (entry,) = manifest(tmp_path / "p")["rejected"]
    assert entry["reason"] == "unreadable" and manifest(tmp_path / "p")["counts"]["slices"] == DEPTH - 2


@pytest.mark.slow
def test_60_damaged_files_are_rejected_or_harmless(tmp_path):
    survive_mutants(tmp_path, 60, 1)


@pytest.mark.proof
def test_1000_damaged_files_are_rejected_or_harmless(tmp_path):
    reasons = {entry["reason"] for entry in survive_mutants(tmp_path, 1000, 2)["rejected"]}
    assert {"irregular_spacing", "too_few_slices", "header", "pixel_size", "mixed_patient", "no_series"} <= reasons

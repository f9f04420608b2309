"""The phantom is honest: real DICOM, LIDC's XML, known truth, one seed = the same bytes, and a ruler that is blind."""

import csv
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from tools import make_phantom

ROOT = Path(__file__).resolve().parent.parent
NS = {"n": "http://www.nih.gov"}
PATIENTS, SLICES, SIZE = 13, 16, 128


def make(out, *flags, patients=PATIENTS, slices=SLICES, size=SIZE):
    argv = ["--out", out, "--patients", patients, "--slices", slices, "--size", size, *flags]
    assert make_phantom.main(list(map(str, argv))) == 0
    return out


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return make(tmp_path_factory.mktemp("phantom"), "--workers", 2)


@pytest.fixture(scope="module")
def headers(phantom):
    """Every file, parsed with warnings as errors: (path, dataset)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [(path, pydicom.dcmread(path)) for path in sorted(phantom.rglob("*.dcm"))]
        for _, ds in found:
            ds.decode()
            assert all(element.value is not None for element in ds)
    return found


@pytest.fixture(scope="module")
def truth(phantom):
    with open(phantom / "truth.csv", newline="") as f:
        return list(csv.DictReader(f))


def ordered(stack):
    """HU [Z, H, W], sop uids and z in mm of the slices of one series, ordered by position, padding at -1024."""
    stack, planes = sorted(stack, key=lambda ds: ds.ImagePositionPatient[2]), []
    for ds in stack:
        stored = ds.pixel_array.astype(int)
        hu = stored * int(ds.RescaleSlope) + int(ds.RescaleIntercept)
        if "PixelPaddingValue" in ds:
            hu[stored == ds.PixelPaddingValue] = -1024
        planes.append(hu)
    return np.array(planes), [ds.SOPInstanceUID for ds in stack], [ds.ImagePositionPatient[2] for ds in stack]


@pytest.fixture(scope="module")
def volumes(headers):
    """{series: as ordered gives it}"""
    slices = {}
    for _, ds in headers:
        if ds.ImageType[2] == "AXIAL":
            slices.setdefault(ds.SeriesInstanceUID, []).append(ds)
    return {series: ordered(stack) for series, stack in slices.items()}


def peak(values, low, high):
    """Most frequent HU between two bounds, from bins of 10 HU."""
    counts, edges = np.histogram(values, np.arange(low, high + 1, 10))
    return edges[counts.argmax()] + 5


def auc(label, score):
    """Share of (positive, negative) pairs in the right order; ties count half."""
    a, b = np.asarray(score)[np.asarray(label)], np.asarray(score)[~np.asarray(label)]
    return (np.sign(a[:, None] - b[None]).mean() + 1) / 2


def test_headers_are_those_of_an_anonymised_ct(headers):
    uids = [ds.SOPInstanceUID for _, ds in headers]
    assert len(set(uids)) == len(uids)
    for path, ds in headers:
        for element in ds:
            if element.VR == "UI":
                assert element.value.is_valid and len(element.value) <= 64
        assert ds.PatientIdentityRemoved == "YES" and re.fullmatch(r"PHANTOM-\d{4}", ds.PatientID)
        assert (ds.Modality, ds.RescaleType, ds.ImageType[:2]) == ("CT", "HU", ["ORIGINAL", "PRIMARY"])
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert re.fullmatch(r"[0-9a-f]{8}\.dcm", path.name)
        assert {"FrameOfReferenceUID", "KVP", "ConvolutionKernel", "Manufacturer", "SliceThickness"} <= set(dir(ds))
    by_name = [int(ds.InstanceNumber) for path, ds in headers if path.parent == headers[0][0].parent]
    assert by_name != sorted(by_name)


def test_the_variety_that_readers_must_cope_with_is_there(headers, volumes):
    axial = [ds for _, ds in headers if ds.ImageType[2] == "AXIAL"]
    scouts = [ds for _, ds in headers if ds.ImageType[2] == "LOCALIZER"]
    assert {ds.PixelRepresentation for ds in axial} == {0, 1}
    assert {int(ds.RescaleIntercept) for ds in axial} == {0, -1024, -8192}
    assert {ds.BitsStored for ds in axial} == {12, 16}
    assert {ds.file_meta.TransferSyntaxUID for ds in axial} == {ImplicitVRLittleEndian, ExplicitVRLittleEndian}
    assert {ds.PatientPosition for ds in axial} == {"HFS", "FFS"}
    assert len({tuple(ds.PixelSpacing) for ds in axial}) > 10 and len({ds.SliceThickness for ds in axial}) > 1
    assert sorted(ds.PatientID for ds in scouts) == ["PHANTOM-0002", "PHANTOM-0007", "PHANTOM-0012"]
    patients = [next(ds.PatientID for ds in axial if ds.SeriesInstanceUID == series) for series in volumes]
    assert sorted({name for name in patients if patients.count(name) == 2}) == ["PHANTOM-0003", "PHANTOM-0013"]
    orders = set()
    for series in volumes:
        stack = sorted((ds for ds in axial if ds.SeriesInstanceUID == series), key=lambda ds: int(ds.InstanceNumber))
        steps = np.sign(np.diff([ds.ImagePositionPatient[2] for ds in stack]))
        orders.add("up" if (steps > 0).all() else "down" if (steps < 0).all() else "shuffled")
    assert orders == {"up", "down", "shuffled"}
    corners = [int(ds.pixel_array[0, 0]) + int(ds.RescaleIntercept) for ds in axial]
    assert min(corners) < -3000  # padding is far from air unless it is masked before the rescale


def test_hu_of_air_lung_soft_tissue_and_bone(volumes):
    for hu, _, z in volumes.values():
        assert np.allclose(np.diff(z), z[1] - z[0], atol=1e-3)
        assert peak(hu[hu > -1024], -1020, -950) == pytest.approx(-1000, abs=10)
        assert peak(hu, -940, -700) == pytest.approx(-850, abs=35)
        assert peak(hu, -20, 120) == pytest.approx(45, abs=20)
        assert 0.002 < (hu > 700).mean() < 0.05


def enclosed(path):
    """Pixels inside a closed path of pixels: what four-connected water from outside cannot reach. Slow on purpose."""
    wall = set(path)
    low, high = (min(c[i] for c in path) - 1 for i in (0, 1)), (max(c[i] for c in path) + 1 for i in (0, 1))
    (r0, c0), (r1, c1) = low, high
    wet, todo = {(r0, c0)}, [(r0, c0)]
    while todo:
        row, col = todo.pop()
        for step in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
            if r0 <= step[0] <= r1 and c0 <= step[1] <= c1 and step not in wet and step not in wall:
                wet.add(step)
                todo.append(step)
    return {(r, c) for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)} - wet - wall


def points(roi):
    edges = roi.findall("n:edgeMap", NS)
    return [(int(e.find("n:yCoord", NS).text), int(e.find("n:xCoord", NS).text)) for e in edges]


def test_xml_is_that_of_lidc_and_its_contours_give_the_masks_of_the_truth(phantom, truth, volumes):
    files = sorted(phantom.rglob("*.xml"))
    assert len(files) == len(volumes)
    checked, holes, small, others = 0, 0, 0, 0
    for file in files:
        root = ET.parse(file).getroot()
        assert root.tag == "{http://www.nih.gov}LidcReadMessage"
        series = root.find("n:ResponseHeader/n:SeriesInstanceUid", NS).text
        assert series == file.parent.name
        assert root.find("n:ResponseHeader/n:StudyInstanceUID", NS).text == file.parent.parent.name
        hu, sops, z_mm = volumes[series]
        sessions = root.findall("n:readingSession", NS)
        assert len(sessions) == 4
        rows = {int(row["nodule"]): row for row in truth if row["series"] == series}
        for reader, session in enumerate(sessions, start=1):
            for place in session.findall(".//n:roi", NS) + session.findall("n:nonNodule", NS):
                z = sops.index(place.find("n:imageSOP_UID", NS).text)
                assert float(place.find("n:imageZposition", NS).text) == pytest.approx(z_mm[z], abs=1e-3)
            others += len(session.findall("n:nonNodule/n:locus", NS))
            nodules = session.findall("n:unblindedReadNodule", NS)
            ids = [int(nodule.find("n:noduleID", NS).text) % 1000 for nodule in nodules]
            assert ids == [k for k, row in rows.items() if str(reader) in row["readers"].split()]
            for nodule, row in zip(nodules, (rows[k] for k in ids)):
                rois = nodule.findall("n:roi", NS)
                ratings = nodule.find("n:characteristics", NS)
                if row["kind"] == "small":
                    assert ratings is None and len(rois) == 1 and len(points(rois[0])) == 1
                    small += 1
                    continue
                assert len(ratings) == 9 and all(1 <= int(item.text) <= 6 for item in ratings)
                masks, box = make_phantom.reader_masks(row)
                at = row["readers"].split().index(str(reader))
                assert ratings.find("n:malignancy", NS).text == row["malignancy"].split()[at]
                expected = np.zeros(hu.shape, bool)
                expected[box] = masks[at]
                found = np.zeros(hu.shape, bool)
                for roi in sorted(rois, key=lambda roi: roi.find("n:inclusion", NS).text, reverse=True):  # TRUE first
                    z, path = sops.index(roi.find("n:imageSOP_UID", NS).text), points(roi)
                    assert path[0] == path[-1]
                    assert all(max(abs(a - c), abs(b - d)) <= 1 for (a, b), (c, d) in zip(path, path[1:]))
                    holes += (hole := roi.find("n:inclusion", NS).text == "FALSE")
                    assert not expected[z][tuple(zip(*path))].any()  # no contour pixel belongs to the nodule
                    for pixel in enclosed(path) | (set(path) if hole else set()):
                        found[z][pixel] = not hole
                assert np.array_equal(found, expected)
                checked += 1
    assert checked > 60 and small and others and holes


def test_truth_is_where_the_image_shows_the_nodule(truth, volumes, headers):
    files = {ds.SOPInstanceUID: ds for _, ds in headers}
    sides, offsets = [], []
    for row in truth:
        hu, sops, _ = volumes[row["series"]]
        z, y, x = (float(row[axis]) for axis in "zyx")
        ds = files[sops[round(z)]]
        mm = np.array([x, y]) * ds.PixelSpacing + ds.ImagePositionPatient[:2]
        assert np.allclose(mm, [float(row["x_mm"]), float(row["y_mm"])], atol=0.01)
        assert float(row["z_mm"]) == pytest.approx(ds.ImagePositionPatient[2], abs=0.2 * ds.SliceThickness)
        if row["kind"] == "small":
            assert float(row["diameter_mm"]) < 3
            continue
        assert 4 <= float(row["diameter_mm"]) <= 24
        masks, box = make_phantom.reader_masks(row)
        majority = masks.mean(0) >= 0.5
        voxel_mm = np.array([ds.SliceThickness, *ds.PixelSpacing], float)
        centre = np.argwhere(majority).mean(0) + [s.start for s in box]
        assert np.abs(centre - [z, y, x]).max() < 0.5
        if float(row["diameter_mm"]) > 8 and len(masks) > 2:
            sides.append(2 * (3 / 4 / np.pi * majority.sum() * voxel_mm.prod()) ** (1 / 3) / float(row["diameter_mm"]))
            ring = make_phantom.grow(make_phantom.grow(make_phantom.grow(majority))) & ~make_phantom.grow(majority)
            assert np.median(hu[box][majority]) > np.median(hu[box][ring]) + 100
            offsets.append(centre - [z, y, x])
    assert np.mean(sides) == pytest.approx(1, abs=0.05)
    assert np.sqrt(np.mean(np.square(offsets))) < 0.15


def test_readers_mostly_recover_malignancy_and_doubt_what_is_ambiguous(truth):
    right, doubted = [], []
    for row in truth:
        ratings = list(map(int, row["malignancy"].split()))
        if len(ratings) >= 3 and row["ambiguous"] == "0":
            right.append((np.median(ratings) > 3) == (row["malignant"] == "1"))
        if len(ratings) >= 3 and row["ambiguous"] == "1":
            doubted.append(2 <= np.median(ratings) <= 4)
    assert len(right) > 15 and np.mean(right) >= 0.9
    assert doubted and np.mean(doubted) >= 0.9


def test_size_says_nothing_about_malignancy_but_form_does():
    """Volumes and bounding boxes of 1,600 nodules on a grid around each; the standard error of an AUC is 0.015."""
    rng, none = np.random.default_rng(0), SimpleNamespace(vessels=np.zeros((0, 8), np.float32))
    axis = np.linspace(-1.9, 1.9, 25)
    rows = []
    for _ in range(1600):
        radius = np.clip(np.exp(rng.normal(np.log(11.5), 0.4)), 4, 24) / 2
        n = make_phantom.draw_nodule(rng, none, "nodule", np.zeros(3), radius)
        at = axis * radius
        inside = np.argwhere(make_phantom.nodule_distance(n, at, at[:, None], at[:, None, None]) < 0)
        box = (np.ptp(inside, 0) + 1)[1:].max() * radius
        rows.append((n.malignant, radius, len(inside) * radius**3, box, n.spicularity + n.lobe))
    malignant, *rulers, form = map(np.array, zip(*rows))
    for ruler in rulers:
        assert auc(malignant, ruler) == pytest.approx(0.5, abs=0.035)
    assert 0.4 < malignant.mean() < 0.5
    assert auc(malignant, form) > 0.9


def test_one_seed_gives_the_same_bytes_for_any_workers_and_patients(tmp_path):
    small = dict(slices=8, size=64)
    a = make(tmp_path / "a", "--workers", 1, "--seed", 5, patients=3, **small)
    b = make(tmp_path / "b", "--workers", 2, "--seed", 5, patients=2, **small)
    files = sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    assert len(files) == 2 * (8 + 1) + 1 + 1  # slices and XML, a scout, the truth
    for path in files:
        if path.name != "truth.csv":
            assert (a / path).read_bytes() == (b / path).read_bytes(), path
    assert (a / "truth.csv").read_bytes().startswith((b / "truth.csv").read_bytes())
    c = make(tmp_path / "c", "--workers", 1, "--seed", 6, patients=1, **small)
    (folder_a,), (folder_c,) = (list(out.glob("PHANTOM-0001/*/*")) for out in (a, c))
    assert folder_a.name != folder_c.name
    one, other = (
        ordered([pydicom.dcmread(path) for path in folder.glob("*.dcm")])[0] for folder in (folder_a, folder_c)
    )
    assert (np.abs(one - other) > 100).mean() > 0.05


def test_vessels_are_connected_and_cross_slices_continuously():
    p = make_phantom.draw_patient(0, 1, 24)
    starts, ends = ({tuple(point) for point in p.vessels[:, a : a + 3].tolist()} for a in (0, 3))
    assert len(starts - ends) <= 4  # only the four roots begin nowhere
    g = make_phantom.make_grid(p, "chest", 128, p.fov)
    base, near, far = (make_phantom.cover_capsules(p.vessels, g, p.z.mean() + dz).ravel() for dz in (0, 0.5, 15))
    assert np.corrcoef(base, near)[0, 1] > 0.8 > 0.4 > np.corrcoef(base, far)[0, 1]


def test_capsules_match_a_loop_over_pixels():
    rng = np.random.default_rng(3)
    p = make_phantom.draw_patient(0, 2, 8)
    g = make_phantom.make_grid(p, "chest", 64, 200)
    ends = rng.uniform(-90, 90, (2, 12, 3)) * (1, 1, 0.2)
    tubes = make_phantom.capsules(*ends, rng.uniform(0.5, 9, (12, 1)), rng.uniform(0.5, 9, (12, 1)))
    expected = np.zeros((64, 64))
    for row, col, tube in np.ndindex(64, 64, 12):
        a, b, (r0, r1) = tubes[tube, :3].astype(float), tubes[tube, 3:6], tubes[tube, 6:]
        at = np.array([g.x[0, col], g.y[row, 0], 2.0])
        t = np.clip((at - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        radius = r0 + t * (r1 - r0)
        cover = np.clip((radius - np.linalg.norm(at - a - t * (b - a))) / g.px + 0.5, 0, 1) * min(1, 2 * radius / g.px)
        expected[row, col] = max(expected[row, col], cover)
    assert expected.max() == 1
    np.testing.assert_allclose(make_phantom.cover_capsules(tubes, g, 2.0), expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_traced_contour_encloses_exactly_its_region(seed):
    """Two ragged stars, apart or merged, as small as one pixel."""
    rng, (row, col) = np.random.default_rng(seed), np.mgrid[:32, :32]
    mask = np.zeros((32, 32), bool)
    for centre in (8, 11), (rng.integers(10, 23), 21):
        turn = np.arctan2(row - centre[0], col - centre[1])
        reach = rng.uniform(0.5, 6) * (1 + 0.4 * np.sin(rng.integers(2, 6) * turn + rng.uniform(0, 6)))
        mask |= np.hypot(row - centre[0], col - centre[1]) < reach
    mask = ~make_phantom.grow(~make_phantom.grow(mask))
    found = set()
    for piece in make_phantom.pieces(mask):
        around = {(r + i, c + j) for r, c in piece for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))}
        ring = make_phantom.trace(piece | around)
        found |= enclosed(ring)
    assert found == set(map(tuple, np.argwhere(mask).tolist()))


def refusal(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        make_phantom.main(argv)
    return stop.value.code, capsys.readouterr().err.strip()


@pytest.mark.parametrize("flags", ["--patients 0", "--size 63", "--slices 7", "--workers 0", "--nope"])
def test_bad_flags_get_one_line(flags, tmp_path, capsys):
    code, message = refusal(["--out", str(tmp_path / "new"), *flags.split()], capsys)
    assert code == 2 and message.count("\n") == 0 and flags.split()[0] in message
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_refused_and_force_removes_only_a_phantom(tmp_path):
    (tmp_path / "PHANTOM-0009").mkdir()
    (tmp_path / "mine.txt").write_text("keep")
    command = [sys.executable, str(ROOT / "tools/make_phantom.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--force" in done.stderr
    make(tmp_path, "--force", "--workers", 1, patients=1, slices=8, size=64)
    assert not (tmp_path / "PHANTOM-0009").exists() and (tmp_path / "mine.txt").read_text() == "keep"

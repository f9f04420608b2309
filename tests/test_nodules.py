"""LIDC's XML -> nodules: exact on the phantom, whose truth is known, and on hand-written files with every oddity."""

import csv
import json
import os
import re
import shutil
import signal
import tracemalloc

import numpy as np
import pydicom
import pytest
from test_data import write_index

from tools import lesion_labels, make_phantom, preprocess_dicom
from tools import lidc_nodules as n
from tools.lib import cli

HIDDEN = "PHANTOM-0002"  # this patient's files do not say that identity was removed: its ids are hashed


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """-> (raw, processed) of 6 patients, one with two series, one with hashed ids."""
    root = tmp_path_factory.mktemp("nodules")
    raw, out = root / "raw", root / "processed"
    flags = "--patients 6 --slices 16 --size 160 --workers 1 --seed 11".split()
    assert make_phantom.main(["--out", str(raw), *flags]) == 0
    for path in (raw / HIDDEN).rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.PatientIdentityRemoved = "NO"
        ds.save_as(path)
    flags = ["--dataset", "phantom", "--format", "hu16", "--workers", "1"]
    assert preprocess_dicom.main(["--raw", str(raw), "--out", str(out), *flags]) in (0, 1)
    return raw, out


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def run(raw, data, *flags):
    assert n.main(["--raw", str(raw), "--data", str(data), *map(str, flags)]) == 0
    labels = data / "_labels"
    return (
        read(labels / "nodules.csv"),
        read(labels / "malignancy.csv"),
        json.loads((labels / "nodules.json").read_text()),
    )


def full(mask, origin, shape):
    out = np.zeros(shape, bool)
    out[tuple(slice(o, o + s) for o, s in zip(origin, mask.shape))] = mask
    return out


def place(row):
    return np.array([float(row[k]) for k in ("z_mm", "y_mm", "x_mm")])


def test_the_phantom_comes_back_centres_masks_ratings_and_counts(phantom, capsys):
    raw, data = phantom
    rows, binary, report = run(raw, data)
    said = capsys.readouterr().out
    truth = [row for row in read(raw / "truth.csv") if row["kind"] == "nodule"]
    assert len(rows) == len(truth) == report["nodules"] and list(rows[0])[:9] == n.COLUMNS[:9]
    assert len({row["id"] for row in rows}) == len(rows)
    matched = set()
    for row in rows:
        own = [t for t in truth if t["series"] == row["series"]] or [t for t in truth if t["patient"] == HIDDEN]
        t = min(
            own, key=lambda t: np.abs(place(t) - place(row)).sum()
        )  # one patient has the same nodules in two series
        matched.add((t["series"], t["nodule"]))
        assert np.linalg.norm(place(t) - place(row)) < 1
        masks, box = make_phantom.reader_masks(t)
        shape = (16, 160, 160)
        saved = np.load(data / "_labels" / "masks" / f"{row['id']}.npz")
        for name, expected in (("majority", masks.mean(0) >= 0.5), ("union", masks.any(0))):
            whole = np.zeros(shape, bool)
            whole[box] = expected
            found = full(saved[name], saved["origin"], shape)
            assert 2 * (found & whole).sum() / (found.sum() + whole.sum()) == 1
        at = np.argwhere(full(saved["majority"], saved["origin"], shape))
        assert [int(row[k]) for k in "z0 y0 x0 z1 y1 x1".split()] == [*at.min(0), *(at.max(0) + 1)]
        assert int(row["readers"]) == len(masks) and row["sessions"] == t["readers"]
        assert row["malignancy"] == t["malignancy"]
        assert float(row["label"]) == np.median([int(v) for v in t["malignancy"].split()])
        assert float(row["diameter_mm"]) == pytest.approx(float(t["diameter_mm"]), rel=0.25)
        assert float(row["volume_mm3"]) == pytest.approx(np.pi / 6 * float(row["diameter_mm"]) ** 3, rel=0.001)
    assert len(matched) == len(truth)

    ratings = [[int(v) for v in t["malignancy"].split()] for t in truth]
    for rule, value in (("median", np.median), ("mean", np.mean), ("rint-mean", lambda v: round(sum(v) / len(v)))):
        for least in (1, 2, 3, 4):
            values = [value(v) for v in ratings if len(v) >= least]
            expected = [sum(v < 3 for v in values), sum(v == 3 for v in values), sum(v > 3 for v in values)]
            counted = report["rules"][rule][f"readers >= {least}"]
            assert [counted[k] for k in ("benign", "indeterminate", "malignant")] == expected
            assert ", ".join(f"{c} {k}" for k, c in counted.items()) in said
    by_rule = report["rules"]["median"]["readers >= 3"]
    assert [sum(row["label"] == k for row in binary) for k in "01"] == [by_rule["benign"], by_rule["malignant"]]
    assert list(binary[0])[:9] == n.COLUMNS[:9]
    assert report["counts"]["marks without outline (below 3 mm)"] == sum(
        len(t["readers"].split()) for t in read(raw / "truth.csv") if t["kind"] == "small"
    )


def test_centres_lie_on_rows_of_the_index_and_hashed_ids_are_found(phantom):
    raw, data = phantom
    rows, _, _ = run(raw, data)
    index = {(row["path"], row["z"]): row for row in read(data / "_index" / "index.csv")}
    hashed = 0
    for row in rows:
        at = index[row["path"], row["z"]]
        assert row["group"] == f"phantom/{at['patient']}" and row["series"] == at["series"]
        assert abs(float(at["z_mm"]) - float(row["z_mm"])) <= float(at["spacing_z"]) * 1.01
        hashed += not row["patient"].startswith("PHANTOM")
    truth = read(raw / "truth.csv")
    assert hashed == sum(t["patient"] == HIDDEN and t["kind"] == "nodule" for t in truth) > 0
    with open(data / "_labels" / "nodules.csv") as f:
        assert HIDDEN not in f.read()


@pytest.mark.parametrize("indeterminate", ["drop", "benign"])
@pytest.mark.parametrize("rule", n.RULES)
def test_rules_on_ratings_by_hand(rule, indeterminate):
    cases = {"5 4 4": 1, "1 2 2": 0, "3 3 3": None, "3 ? 5": "few", "2 3 4 4": 1, "2 3 3 3": 0, "1 3 5": None}
    median = {"2 3 4 4": 1, "2 3 3 3": None}  # medians 3.5 and 3; means 3.25 and 2.75, which round to 3
    rounded = {"2 3 4 4": None, "2 3 3 3": None}
    cases |= {"median": median, "rint-mean": rounded}.get(rule, {})
    for text, expected in cases.items():
        assert n.verdict({"malignancy": text}, 3, rule) == expected, text
    kept = n.binary([{"malignancy": text} for text in cases], 3, rule, indeterminate)
    undecided = sum(v is None for v in cases.values())
    decided = sum(v in (0, 1) and v is not None for v in cases.values())
    assert len(kept) == decided + (undecided if indeterminate == "benign" else 0)


# hand-written files on a series of 8 slices of 40 x 40 pixels, 2 mm apart

SHAPE = (8, 40, 40)


@pytest.fixture
def folder(tmp_path):
    lines = []
    for z in range(1, 7):
        ids = ["toy/1.2.0.npy", "hu16-v1", "toy", "P0", "s0", "1.2.0", f"1.2.0.{z}"]
        lines.append([*ids, z, -100 + 2.0 * z, 0.5, 0.5, 2.0, 40, 40, 0, 40, 0, 40])
    write_index(tmp_path / "data", lines)
    (tmp_path / "raw").mkdir()
    return tmp_path


def square(y, x, side):
    """The contour around side x side pixels from (y, x): the pixels just outside, corners left out as in LIDC."""
    low = [(y - 1, x + k) for k in range(side)] + [(y + k, x + side) for k in range(side)]
    return low + [(y + side, x + side - 1 - k) for k in range(side)] + [(y + side - 1 - k, x - 1) for k in range(side)]


def roi(z, path, inclusion="TRUE", sop=None, z_mm=None):
    points = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for y, x in path)
    where = f"<imageZposition>{-100 + 2.0 * z if z_mm is None else z_mm}</imageZposition>"
    where += f"<imageSOP_UID>{sop or f'1.2.0.{z}'}</imageSOP_UID>"
    return f"<roi>{where}<inclusion>{inclusion}</inclusion>{points}</roi>"


def nodule(rois, malignancy=4, name="x"):
    rated = "".join(f"<{k}>{malignancy if k == 'malignancy' else 2}</{k}>" for k in n.RATINGS)
    rated = f"<characteristics>{rated}</characteristics>" if malignancy else ""
    return f"<unblindedReadNodule><noduleID>{name}</noduleID>{rated}{''.join(rois)}</unblindedReadNodule>"


def write(folder, *sessions, name="1.xml", root="LidcReadMessage", space="http://www.nih.gov", series="1.2.0"):
    body = "".join(f"<readingSession>{''.join(nodules)}</readingSession>" for nodules in sessions)
    header = f"<ResponseHeader><SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>"
    (folder / "raw" / name).write_text(f'<{root} xmlns="{space}">{header}{body}</{root}>')


def cube(y, x, side, z=3, depth=2):
    return [roi(z + k, square(y, x, side)) for k in range(depth)]


def nodules_of(folder, *flags):
    rows, _, report = run(folder / "raw", folder / "data", *flags)
    saved = [np.load(folder / "data" / "_labels" / "masks" / f"{row['id']}.npz") for row in rows]
    return rows, [full(m["majority"], m["origin"], SHAPE) for m in saved], report


def expected_cube(y, x, side, z=3, depth=2):
    out = np.zeros(SHAPE, bool)
    out[z : z + depth, y : y + side, x : x + side] = True
    return out


def test_holes_islands_and_several_rois_on_a_slice(folder):
    rois = [*cube(5, 5, 9), *cube(20, 20, 4)]  # two pieces of one nodule on each slice
    hole = [(8, 8), (8, 9), (8, 10), (9, 10), (10, 10), (10, 9), (10, 8), (9, 8)]  # border pixels of a 3 x 3 hole
    write(folder, [nodule([roi(3, hole, "FALSE"), *rois])])
    (row,), (mask,), _ = nodules_of(folder)
    wanted = expected_cube(5, 5, 9) | expected_cube(20, 20, 4)
    wanted[3, 8:11, 8:11] = False
    assert np.array_equal(mask, wanted)
    centre = np.argwhere(wanted).mean(0)
    assert [float(row["y"]), float(row["x"])] == pytest.approx(centre[1:], abs=0.001)
    assert float(row["box_mm"]) == 19 * 0.5 and row["z_mm"] == ""  # no DICOM file there to say where in the patient


def test_points_have_no_inside_and_their_readers_do_not_count(folder):
    write(
        folder,
        [nodule([roi(3, [(9, 9)])], None), nodule([*cube(5, 5, 6), roi(5, [(7, 7)])])],
        [nodule([roi(3, [(8, 8)])], 3)],
    )
    (row,), (mask,), report = nodules_of(folder)
    assert row["readers"] == "1" and np.array_equal(mask, expected_cube(5, 5, 6))
    assert report["counts"]["marks without outline (below 3 mm)"] == 2


def test_missing_characteristics_are_a_question_mark_and_not_a_rating(folder):
    write(folder, *([nodule(cube(5, 5, 6), malignancy)] for malignancy in (None, 5, 9, 4)))
    rows, binary, report = run(folder / "raw", folder / "data", "--readers", 2)
    assert rows[0]["malignancy"] == "? 5 ? 4" and rows[0]["readers"] == "4"  # 9 is no rating
    assert rows[0]["median_malignancy"] == "4.5" and binary[0]["label"] == "1"
    assert report["counts"]["marks without malignancy"] == 2
    assert run(folder / "raw", folder / "data", "--readers", 3)[1] == []


def test_long_steps_of_a_contour_are_joined(folder):
    corners = [(4, 4), (4, 11), (11, 11), (11, 4)]
    write(folder, [nodule([roi(3, corners), roi(4, corners)])])
    assert np.array_equal(nodules_of(folder)[1][0], expected_cube(5, 5, 6))


def test_one_mark_per_session_and_touching_neighbours_stay_apart(folder):
    two = [nodule(cube(5, 5, 6), 1), nodule(cube(5, 12, 6), 5)]  # one reader marks two, beside each other
    big = [nodule(cube(5, 5, 10), 3)]  # another draws one around most of both
    touching = [nodule(cube(20, 5, 6), 2)], [nodule(cube(25, 5, 6), 4)]  # a sixth of each overlaps: 6 of 36 pixels
    edge = [nodule(cube(30, 30, 5, depth=1), 2)], [nodule(cube(34, 34, 5, depth=1), 4)]  # a 25th overlaps
    write(folder, two + touching[0] + edge[0], big + touching[1] + edge[1], two)
    rows, _, _ = nodules_of(folder)
    found = sorted((row["sessions"], row["malignancy"]) for row in rows)
    # the big mark covers all of the left cube and half of the right one: it joins the left
    assert found == sorted([("1 2 3", "1 3 1"), ("1 3", "5 5"), ("1 2", "2 4"), ("1", "2"), ("2", "4")])


def test_majority_is_at_least_half(folder):
    write(folder, *([nodule(cube(5, 5 + k, 6))] for k in range(4)))
    (row,), (mask,), _ = nodules_of(folder)
    votes = sum(expected_cube(5, 5 + k, 6).astype(int) for k in range(4))
    assert np.array_equal(mask, votes >= 2)
    saved = np.load(folder / "data" / "_labels" / "masks" / f"{row['id']}.npz")
    assert np.array_equal(full(saved["union"], saved["origin"], SHAPE), votes >= 1)


def test_the_first_and_last_slice_are_found_by_position(folder):
    first, last = cube(5, 5, 6, z=0), cube(20, 20, 6, z=6)
    write(folder, [nodule(first), nodule(last)])
    rows, masks, _ = nodules_of(folder)
    assert np.array_equal(masks[0], expected_cube(5, 5, 6, z=0)) and np.array_equal(
        masks[1], expected_cube(20, 20, 6, z=6)
    )
    assert [row["z"] for row in rows] == ["1", "6"]  # slices that have two neighbours


def test_a_flipped_normal_is_followed(folder):
    index = (folder / "data" / "_index" / "index.csv").read_text().splitlines()
    flipped = [",".join([*c[:8], str(-float(c[8])), *c[9:]]) for c in (line.split(",") for line in index[1:])]
    rows = [line.replace(f",{z},", f",{7 - z},", 1) for z, line in zip(range(1, 7), flipped)]
    (folder / "data" / "_index" / "index.csv").write_text("\n".join([index[0], *reversed(rows)]) + "\n")
    write(folder, [nodule(cube(5, 5, 6, z=2, depth=3))])
    assert np.array_equal(nodules_of(folder)[1][0], expected_cube(5, 5, 6, z=3, depth=3))


REJECTED = {
    "imageZposition contradicts": lambda: [roi(3, square(5, 5, 6), z_mm=-60)],
    "a slice that its series does not have": lambda: [roi(3, square(5, 5, 6), sop="9.9"), roi(4, square(5, 5, 6))],
    "outside the image": lambda: [roi(3, square(36, 36, 6))],
}


@pytest.mark.parametrize("reason", REJECTED)
def test_a_mark_that_does_not_fit_is_counted_and_left_out(folder, reason, capsys):
    write(folder, [nodule(cube(20, 20, 6)), nodule(REJECTED[reason]())], [nodule(cube(20, 20, 6))])
    rows, _, report = nodules_of(folder)
    assert len(rows) == 1 and rows[0]["readers"] == "2"
    (name,) = [name for name in report["counts"] if reason in name]
    assert report["counts"][name] == 1 and name in capsys.readouterr().out


def test_other_xml_and_copies_and_unknown_series_are_counted(folder):
    write(folder, [nodule(cube(5, 5, 6))])
    write(folder, [nodule(cube(5, 5, 6))], name="copy.xml")
    write(folder, [nodule(cube(5, 5, 6))], name="cxr.xml", root="IdriReadMessage", space="http://www.nih.gov/idri")
    write(folder, [nodule([roi(3, square(5, 5, 6), sop="7.7")])], name="other.xml", series="7")
    (folder / "raw" / "page.xml").write_text("<page/>")
    rows, _, report = nodules_of(folder)
    assert len(rows) == 1
    wanted = {"readings": 2, "copies of a reading": 1, "XML of a chest radiograph": 1, "XML that is no LIDC reading": 1}
    wanted |= {"files whose slices are not in the index": 1}
    assert {k: report["counts"].get(k) for k in wanted} == wanted


def test_masks_of_an_earlier_run_go(folder):
    write(folder, [nodule(cube(5, 5, 6)), nodule(cube(20, 20, 6))])
    assert len(nodules_of(folder)[0]) == 2
    write(folder, [nodule(cube(5, 5, 6))])
    nodules_of(folder)
    assert len(list((folder / "data" / "_labels" / "masks").glob("*.npz"))) == 1


def test_lesions_that_would_share_a_name_cost_no_mask_of_before(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "earlier.npz").write_bytes(b"")
    one = lesion_labels.Series("a" + 40 * "x", {1: "v.npy"}, "d/p", "p", 0.0, np.ones(3), (3, 8, 8))
    mask = np.ones((1, 2, 2), bool), np.array([1, 2, 2]), "unrated"
    with pytest.raises(ValueError, match="two series whose names end in the same 40 letters"):
        lesion_labels.write_labels(tmp_path, [(one, *mask), (one._replace(name="b" + 40 * "x"), *mask)])
    assert (tmp_path / "masks" / "earlier.npz").exists()
    lesion_labels.write_labels(tmp_path, [(one, *mask)])
    assert [path.name for path in (tmp_path / "masks").iterdir()] == [f"{40 * 'x'}_01.npz"]


def test_what_cannot_be_read_is_an_error_that_names_the_file(folder):
    raw, data = ["--raw", str(folder / "raw")], ["--data", str(folder / "data")]
    with pytest.raises(FileNotFoundError, match="no .xml file"):
        n.main(raw + data)
    (folder / "raw" / "1.xml").write_text("<LidcReadMessage><cut")
    with pytest.raises(ValueError, match="1.xml is no XML of LIDC .*download it again"):
        n.main(raw + data)
    write(folder, [nodule([roi(3, square(5, 5, 6), sop="7.7")])])
    with pytest.raises(ValueError, match="is it another set"):
        n.main(raw + data)
    write(folder, [nodule(cube(5, 5, 6))])
    write(folder, [nodule(cube(6, 6, 6))], name="2.xml")
    with pytest.raises(ValueError, match="readings of one series"):
        n.main(raw + data)
    with pytest.raises(FileNotFoundError, match="key"):
        n.main([*raw, *data, "--key-file", str(folder / "none")])
    assert not (folder / "dinox_id_key").exists()


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_that_of_whole_volumes(seed):
    random = np.random.default_rng(seed)
    marks = [n.Mark(k, {}, random.random((3, 5, 4)) < 0.7, random.integers(0, 4, 3)) for k in (1, 2)]
    a, b = (full(m.mask, m.origin, (8, 10, 10)) for m in marks)
    assert n.overlap(*marks) == pytest.approx((a & b).sum() / min(a.sum(), b.sum()))


# damaged and hostile files


def flags(folder):
    return ["--raw", str(folder / "raw"), "--data", str(folder / "data")]


def bad_xml(folder, content, name="0500.xml"):
    """The error of a run on three readings, the second of which is `content`."""
    write(folder, [nodule(cube(5, 5, 6))], name="0001.xml")
    write(folder, [nodule([roi(3, square(5, 5, 6), sop="7.7")])], name="0999.xml", series="9")
    (folder / "raw" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, OSError)) as caught:
        n.main(flags(folder))
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)
    return str(caught.value)


READING = "<?xml version='1.0'{}?>\n{}<LidcReadMessage xmlns='http://www.nih.gov'>\n{}\n</LidcReadMessage>"


def reading(body, encoding="", doctype=""):
    nodule = f"<unblindedReadNodule>\n{body}</unblindedReadNodule>"
    return READING.format(encoding, doctype, f"<readingSession>{nodule}</readingSession>")


@pytest.mark.parametrize("text", ["", "12x", "nan", "inf", "1e308", "1_0", "\u0663", "9" * 5000, "\x85" + "y" * 10**6])
@pytest.mark.parametrize("name", ["xCoord", "yCoord", "imageZposition"])
def test_a_bad_number_names_file_line_and_element(folder, name, text):
    good = {"xCoord": "5", "yCoord": "5", "imageZposition": "-94.0"} | {name: text}
    z, edge = f"<imageZposition>{good.pop('imageZposition')}</imageZposition>", "<edgeMap>{}</edgeMap>\n"
    points = edge.format("<xCoord>4</xCoord><yCoord>4</yCoord>")
    points += edge.format("".join(f"<{key}>{value}</{key}>" for key, value in good.items()))
    found = bad_xml(folder, reading(f"<roi>{z}<inclusion>TRUE</inclusion>\n{points}</roi>"))
    line = 4 if name == "imageZposition" else 6
    assert f"0500.xml, line {line}: {name} is " in found and "expected a number; download the file again" in found


def test_a_bad_inclusion_is_shown_in_short_and_without_control_characters(folder):
    text = "\x9b2J" + "y" * 100_000
    point = "<edgeMap><xCoord>1</xCoord><yCoord>1</yCoord></edgeMap>"
    found = bad_xml(folder, reading(f"<roi>{point}<inclusion>{text}</inclusion></roi>"))
    assert "0500.xml, line 4: a roi without edgeMap, or inclusion " in found and "\x9b" not in found


ENTITIES = "".join(f'<!ENTITY x{k} "{f"&x{k - 1};" * 10}">' for k in range(1, 12))
HOSTILE = {
    "unknown encoding": (lambda: reading("", " encoding='no-such'"), "unknown encoding"),
    "multi-byte encoding": (lambda: reading("", " encoding='shift_jis'"), "multi-byte"),
    "laughs": (lambda: reading("&x11;", "", f'<!DOCTYPE a [<!ENTITY x0 "ha">{ENTITIES}]>'), "line 2 declares an"),
    "external": (lambda: reading("&e;", "", '<!DOCTYPE a [<!ENTITY e SYSTEM "/etc/passwd">]>'), "line 2 declares an"),
    "100 MB": (lambda: reading(" " * 100_000_000), "it has 1000.* bytes, readings at most"),
    "elements": (lambda: reading("<roi/>" * 100_000), "it has more than 30000 elements"),
    "depth": (lambda: reading("<a>" * 100_000), "it has more than 30000 elements"),
    "binary": (lambda: "\x00\x01" * 99, "0500.xml is no XML of LIDC"),
    "empty": (lambda: "", "no element found"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_xml_is_refused_before_it_eats_memory(folder, monkeypatch, name):
    monkeypatch.setattr(n, "MAX_ELEMENTS", 30_000)  # 524,288 take 190 MB
    content, reason = HOSTILE[name][0]().encode(), HOSTILE[name][1]
    write(folder, [nodule(cube(5, 5, 6))])
    n.main(flags(folder))  # what the first run imports is not counted
    tracemalloc.start()
    found = bad_xml(folder, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "0500.xml is no XML of LIDC" in found and found.endswith("; download it again")
    assert re.search(reason, found) and peak < 32e6, (found, peak)


def test_a_file_of_another_kind_is_counted_whatever_its_rest(folder):
    write(folder, [nodule(cube(5, 5, 6))])
    (folder / "raw" / "page.xml").write_text("<!DOCTYPE html><html>" + "x" * 20_000_000)  # neither whole nor small
    rows, _, report = run(folder / "raw", folder / "data")
    assert len(rows) == 1 and report["counts"]["XML that is no LIDC reading"] == 1


def test_a_pipe_is_refused_and_not_waited_for(folder):
    write(folder, [nodule(cube(5, 5, 6))])
    os.mkfifo(folder / "raw" / "x.dcm")
    (folder / "raw" / "zero").symlink_to("/dev/zero")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    assert len(run(folder / "raw", folder / "data")[0]) == 1
    os.mkfifo(folder / "raw" / "x.xml")
    with pytest.raises(OSError, match="x.xml is a FIFO, not a file"):
        n.main(flags(folder))
    signal.alarm(0)


def test_a_file_name_that_is_not_utf8_is_named_with_escapes(folder, capsys):
    name = os.fsdecode(b"\xff\x1b.xml")
    write(folder, [nodule(cube(5, 5, 6))], name=name)
    assert len(run(folder / "raw", folder / "data")[0]) == 1
    (folder / "raw" / name).write_text("<LidcReadMessage><cut")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: n.main(list(map(str, flags(folder)))))
    said = capsys.readouterr().err
    assert "\x1b" not in said and "/\\udcff\\x1b.xml is no XML of LIDC" in said.splitlines()[-1]


def test_ratings_that_are_no_ratings_do_not_count(folder):
    write(folder, *([nodule(cube(5, 5, 6), text)] for text in ("9" * 6000, "\u0663", "-1", "4")))
    rows, _, report = run(folder / "raw", folder / "data")
    assert rows[0]["malignancy"] == "? ? ? 4" and report["counts"]["marks without malignancy"] == 3


def test_no_cell_of_the_tables_is_a_formula(folder):
    write(folder, [nodule(cube(5, 5, 6), None)], [nodule(cube(5, 5, 6), 4)])
    run(folder / "raw", folder / "data")
    for name in ("nodules.csv", "malignancy.csv"):
        for row in read(folder / "data" / "_labels" / name):
            assert not [cell for cell in row.values() if re.match("[=+@']|-(?![0-9.]+$)", cell)]


def test_a_nodule_is_in_the_tables_once(folder):
    write(folder, [nodule(cube(5, 5, 6)), nodule(cube(5, 5, 6), 2)], [nodule(cube(5, 5, 6))])
    rows, _, report = run(folder / "raw", folder / "data")
    assert len(rows) == 1 and rows[0]["sessions"] == "1 2" and report["counts"]["marks that a reader drew twice"] == 1
    write(folder, [nodule(cube(5, 5, 6))], name="again.xml", series="another")
    with pytest.raises(ValueError, match="again.xml and .*1.xml are readings of one series; remove one of them"):
        n.main(flags(folder))


def test_readings_without_a_series_uid_are_told_apart(folder):
    write(folder, [nodule(cube(5, 5, 6))], series="")
    write(folder, [nodule([roi(3, square(5, 5, 6), sop="7.7")])], name="2.xml", series="")
    assert len(run(folder / "raw", folder / "data")[0]) == 1


def test_two_series_whose_names_end_alike_have_ids_of_their_own(folder):
    lines = []
    for k, series in enumerate(("1.2.12345678", "1.3.12345678")):
        for z in range(1, 7):
            ids = [f"toy/{series}.npy", "hu16-v1", "toy", "P0", f"s{k}", series, f"{series}.{z}"]
            lines.append([*ids, z, -100 + 2.0 * z, 0.5, 0.5, 2.0, 40, 40, 0, 40, 0, 40])
        write(folder, [nodule([roi(3, square(5, 5, 6), sop=f"{series}.3")])], name=f"{k}.xml", series=series)
    write_index(folder / "data", lines)
    assert [row["id"] for row in run(folder / "raw", folder / "data")[0]] == ["P0_12345678_01", "P0_12345678_02"]


NONSENSE = {
    "a spacing": (",0.5,0.5,2.0,", ",500,0.5,2.0,"),
    "a size": (",40,40,", ",99999,99999,"),
    "an id": (",P0,", ",../P0,"),
    "a z": ("1.2.0.3,3,", "1.2.0.3,0,"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_an_index_that_would_spoil_the_tables_is_refused(folder, name):
    path = folder / "data" / "_index" / "index.csv"
    path.write_text(path.read_text().replace(*NONSENSE[name]))
    write(folder, [nodule(cube(5, 5, 6))])
    with pytest.raises(ValueError, match="index.csv, line 2: series 1.2.0 of patient .*P0 has a spacing, a size, a z"):
        n.main(flags(folder))
    assert not (folder / "data" / "_labels").exists()


@pytest.mark.parametrize("key, value", [("diameter_mm", v) for v in ("nan", "1e308", "-3")] + [("y1", 41), ("x0", -1)])
def test_a_nodule_that_cannot_be_is_not_written(key, value):
    series = n.Series({"rows": 40, "cols": 40}, {}, {})
    row = {"group": "d/P", "series": "1.2", "z": 3, "y": "5", "x": "5", "diameter_mm": "6.0"}
    row |= dict(z0=2, z1=4, y0=3, y1=40, x0=0, x1=9)
    masks = {"majority": np.ones((2, 37, 9), bool)}
    n.check([(series, row, masks)])
    with pytest.raises(ValueError, match="series 1.2, nodule at z 3, y 5, x 5: box .* cannot be"):
        n.check([(series, row | {key: value}, masks)])
    with pytest.raises(ValueError, match="it is there twice"):
        n.check([(series, row, masks), (series, row | {"diameter_mm": "7"}, masks)])


def test_a_dicom_file_that_lost_its_position_is_named(phantom, tmp_path):
    raw, data = phantom
    path = sorted((raw / "PHANTOM-0001").rglob("*.dcm"))[5]
    for change, message in (
        ({"ImagePositionPatient": None}, "is in the index and now damaged: ImagePositionPatient missing"),
        ({"ImagePositionPatient": [0, 0, 1e308]}, "ImagePositionPatient is not where the index has this slice"),
        ({"ImagePositionPatient": [0, 0, 4321]}, "ImagePositionPatient is not where the index has this slice"),
    ):
        (tmp_path / "raw").mkdir(exist_ok=True)
        for xml in raw.rglob("*.xml"):
            (tmp_path / "raw" / xml.name).write_bytes(xml.read_bytes())
        ds = pydicom.dcmread(path)
        for keyword, value in change.items():
            setattr(ds, keyword, value)
        ds.save_as(tmp_path / "raw" / "one.dcm")
        with pytest.raises(ValueError, match=f"one.dcm.*{message}.*; restore it, or preprocess again"):
            n.main(["--raw", str(tmp_path / "raw"), "--data", str(data)])


def test_nothing_that_identifies_reaches_the_labels(phantom, tmp_path, capfd):
    """Names in XML and DICOM, and the id of the patient whose ids are hashed; ZZ marks what must not get out."""
    raw, data = phantom
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "dinox_id_key").write_bytes((data.parent / "dinox_id_key").read_bytes())
    for path in (tmp_path / "raw" / HIDDEN).rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.PatientName, ds.InstitutionName, ds.AccessionNumber, ds.PatientBirthDate = "ZZ^A", "ZZ B", "ZZ1", "19331224"
        ds.save_as(path)
    for path in (tmp_path / "raw").rglob("*.xml"):
        said = "<readingSession><servicingRadiologistID>ZZ-19331224</servicingRadiologistID>"
        text = path.read_text().replace("<readingSession>", said)
        path.write_text(re.sub("<noduleID>[^<]*<", "<noduleID>ZZ^DOE<", text))
    shutil.rmtree(tmp_path / "data" / "_labels", ignore_errors=True)
    assert run(tmp_path / "raw", tmp_path / "data")[0]
    labels = tmp_path / "data" / "_labels"
    contents = [str(path.read_bytes()) for path in labels.glob("*.*")]
    written = "\n".join([*capfd.readouterr(), *map(str, labels.rglob("*")), *contents])
    for secret in ("ZZ", "19331224", HIDDEN):
        assert secret not in written.replace(str(tmp_path), "")

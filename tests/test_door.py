"""Claims about who may look at what: splits as contracts, leaks, duplicates, looks at val_test, hostile files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_data import make_ct, make_photos, make_split, photo

import data as d
from tools.lib import provenance
from tools.lib.slices import find_slice

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("train", "val_select", "val_calib", "val_test")
LOOK = dict(program="test", weights_sha256="w", policy_sha256=None, labels_sha256="l", why="a test")


@pytest.fixture
def four(tmp_path):
    """A folder with two patients in each split."""
    root = make_ct(tmp_path / "ct", series=8)
    make_split(root, {f"toy/P{i}": NAMES[i // 2] for i in range(8)})
    return root


@pytest.mark.parametrize("purpose", d.PURPOSES)
@pytest.mark.parametrize("split", NAMES)
def test_a_purpose_opens_its_own_split_and_no_other(four, purpose, split):
    source = d.open_for(four, purpose, LOOK)
    inside = {f"toy/P{i}" for i in range(8) if NAMES[i // 2] == split}
    assert bool(set(source.groups) & inside) == (d.PURPOSES[purpose] == split)
    assert set(source.splits) == {d.PURPOSES[purpose]} and source.split_sha256
    assert (four / "_splits" / "test_uses.jsonl").exists() == (purpose == "test")


def test_several_purposes_are_their_union_and_an_opened_source_is_not_read_again(four):
    everything = d.open_source(four)
    both = d.open_for(everything, ("fit", "select"))
    assert both.groups == ["toy/P0", "toy/P1", "toy/P2", "toy/P3"]
    assert set(both.splits) == {"train", "val_select"} and len(both.splits) == len(both)
    assert len(d.open_for(everything, "fit", limit=3)) == 3


def test_looks_at_val_test_are_recorded_and_counted(four, capsys):
    with pytest.raises(ValueError, match="needs used_by with program, weights_sha256"):
        d.open_for(four, "test")
    with pytest.raises(ValueError, match="needs used_by"):
        d.open_for(four, "test", {"program": "x"})
    assert not (four / "_splits" / "test_uses.jsonl").exists()
    d.open_for(four, "test", LOOK)
    d.open_for(four, "test", LOOK)  # the same look again is no other
    assert "looked at before" not in capsys.readouterr().out
    with open(four / "_splits" / "test_uses.jsonl", "a") as f:
        f.write("damaged\n[1]\n")
    d.open_for(four, "test", {**LOOK, "weights_sha256": "other"})
    said = capsys.readouterr().out
    assert "looked at before by 1 other weights or policies" in said and "has 2 damaged lines, which count" in said
    lines = (four / "_splits" / "test_uses.jsonl").read_text().splitlines()
    assert [json.loads(line)["weights_sha256"] for line in (lines[0], lines[1], lines[4])] == ["w", "w", "other"]


def test_a_look_after_a_cut_line_is_not_lost(four):
    looks = [d.open_for(four, "test", {**LOOK, "weights_sha256": "a"})]
    with open(four / "_splits" / "test_uses.jsonl", "ab") as f:
        f.write(b'{"version": 1, "wei')  # a full disk
    looks += [d.open_for(four, "test", {**LOOK, "weights_sha256": name}) for name in "bc"]
    assert [source.earlier_looks for source in looks] == [0, 2, 3]  # the cut one may have been a look
    assert looks[2].take([0]).earlier_looks == 3 and d.open_for(four, "fit").earlier_looks == 0


@pytest.mark.parametrize("split", ["val-test", "test", ""])
def test_a_split_that_nobody_may_open_is_refused(four, split):
    make_split(four, {f"toy/P{i}": split if i == 7 else NAMES[i // 2] for i in range(8)})
    with pytest.raises(ValueError, match=rf"splits\.json: '{split}' is no split, known are train, .*make the split of"):
        d.open_for(four, "fit")


def test_a_series_in_two_splits_is_refused(four):
    index = four / "_index" / "index.csv"
    index.write_text(index.read_text().replace("1.2.7,", "1.2.0,"))  # one series, preprocessed under two patients
    make_split(four, {f"toy/P{i}": NAMES[i // 2] for i in range(8)})
    with pytest.raises(ValueError, match=r"series 1\.2\.0 lies in train and in val_test; make the split of .* again"):
        d.open_for(four, "fit")


def duplicates(root, groups, **more):
    sha = d.open_source(root).index_sha256
    content = {"version": 1, "index_sha256": sha, "groups": groups} | more
    (root / "_splits" / "duplicates.json").write_text(json.dumps(content))


def test_duplicates_across_splits_are_refused_or_counted(four, capsys):
    duplicates(four, [["toy/P0", "toy/P1"]])
    assert d.open_for(four, "fit").crossing == 0
    duplicates(four, [["toy/P0", "toy/P6"], ["toy/P2", "toy/P3"]])
    for purpose in ("fit", "select", "test"):
        with pytest.raises(ValueError, match=r"1 sets of duplicate pictures .* first toy/P0, toy/P6; make the split"):
            d.open_for(four, purpose, LOOK)
    assert not (four / "_splits" / "test_uses.jsonl").exists()  # what is refused was no look
    assert d.open_for(four, "fit", allow_duplicates=True).crossing == 1
    duplicates(four, [["toy/P0", "toy/P6"]], index_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"made for another index; look for duplicates .* delete .*--allow-duplicates"):
        d.open_for(four, "fit")
    assert d.open_for(four, "fit", allow_duplicates=True).crossing == 0
    assert "made for another index and is not used" in capsys.readouterr().out
    for groups in ("toy/P0", [[["toy/P0"]]], [[]], [["toy/P0", "toy/P99"]], [[1]], {"toy/P0": 1}):
        duplicates(four, groups)
        with pytest.raises(ValueError, match=r"duplicates\.json: groups must be lists of groups of the index; look"):
            d.open_for(four, "fit", allow_duplicates=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "version list, expected 1"),
        ("{", "is not a JSON file"),
        ("[" * 100_000, "is not a JSON file"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1, "groups": {}}', "another index"),
    ],
)
def test_a_damaged_contract_is_named(four, text, message):
    (four / "_splits" / "splits.json").write_text(text)
    with pytest.raises(ValueError, match=rf"splits\.json.*{message}.*make the split of"):
        d.open_for(four, "fit")


def test_odd_fields_of_a_contract_are_named(four):
    path = four / "_splits" / "splits.json"
    good = json.loads(path.read_text())
    for groups in (None, [], {"toy/P0": 1}):
        path.write_text(json.dumps(good | {"groups": groups}))
        with pytest.raises(ValueError, match=r"splits\.json: groups must name one split"):
            d.open_for(four, "fit")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode())  # a spreadsheet's byte order mark is harmless
    assert d.open_for(four, "fit").groups == ["toy/P0", "toy/P1"]
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"splits\.json is not a JSON file"):
        d.open_for(four, "fit")


# what weights have seen


def test_a_leak_is_found_by_names_series_and_bytes(four, tmp_path):
    held_out = d.open_for(four, "select")
    assert provenance.refuse_leak({}, held_out, "x") == ([], False)  # unknown, not innocent
    assert provenance.refuse_leak({"trained_groups": ["toy/P0"]}, held_out, "x") == ([], True)
    with pytest.raises(ValueError, match=r"leak: 1 groups of val_select .*toy/P2"):
        provenance.refuse_leak({"trained_groups": ["Toy/p2 "]}, held_out, "val_select")
    assert provenance.refuse_leak({"trained_groups": ["toy/P2"]}, held_out, "x", allow=True).groups == ["toy/P2"]
    seen = provenance.provenance_of(held_out)
    renamed = make_ct(tmp_path / "again", series=8)
    index = renamed / "_index" / "index.csv"
    index.write_text(index.read_text().replace(",toy,", ",other,").replace(",P", ",Q"))
    other = d.open_source(renamed)
    assert not set(other.groups) & set(held_out.groups)
    facts = {"trained_groups": [], "provenance": {"known": True, "seen": [seen]}}
    assert provenance.refuse_leak(facts, other, "x", allow=True).groups == ["other/Q2", "other/Q3"]
    assert "toy" not in json.dumps(seen) and "P2" not in json.dumps(seen)


def test_what_earlier_weights_had_seen_is_unknown_where_nobody_noted_it(four):
    held_out = d.open_for(four, "select")
    for args, known in (({}, True), ({"init": None}, True), ({"init": "a.pth"}, False), ({"gram_teacher": "b"}, False)):
        old = {"trained_groups": ["toy/P0"], "args": args}  # of a checkpoint from before there was provenance
        assert provenance.refuse_leak(old, held_out, "x").known is known, args
    for odd in ([], {}, {"known": True}, {"known": True, "seen": [{}]}, {"known": 1, "seen": []}):
        with pytest.raises(ValueError, match="field provenance of the weights is damaged"):
            provenance.refuse_leak({"provenance": odd}, held_out, "x")


def test_renamed_photographs_are_recognised_by_their_bytes(tmp_path):
    make_photos(tmp_path / "a")
    seen = provenance.provenance_of(d.open_source(tmp_path / "a"), files=True)
    facts = {"provenance": {"known": True, "seen": [seen]}}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "new.png").write_bytes((tmp_path / "a" / "c0" / "0.png").read_bytes())
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "own.png")
    assert provenance.refuse_leak(facts, d.open_source(tmp_path / "b"), "x", allow=True) == (["new.png"], True)


# hostile and damaged files


def test_only_named_formats_are_opened_by_content(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    cases = {"EPS": eps, "GIF": b"GIF89a" + bytes(30), "HEIC or AVIF": b"\0\0\0\x18ftypheic" + bytes(30),
             "unknown": b"rubbish" * 9}  # fmt: skip
    for kind, content in cases.items():
        (tmp_path / "a.png").write_bytes(content)
        source = d.open_source(tmp_path)
        said = rf"a\.png cannot be read: its content is {kind}, expected PNG, JPEG, WEBP, BMP, TIFF"
        with pytest.raises(OSError, match=said):
            source.read(0)
        with pytest.raises(OSError, match=rf"content is {kind}"):
            d.read_view(source, 0)


def test_what_is_no_file_is_refused_not_waited_for(tmp_path):
    root = make_ct(tmp_path / "ct")
    source = d.open_source(root)
    source.path(0).unlink()
    os.mkfifo(source.path(0))
    with pytest.raises(OSError, match="is a FIFO, not a file"):
        source.read(0)
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(OSError, match="is a FIFO, not a file"):
        d.read_labels(tmp_path / "labels.csv", tmp_path)
    (root / "_index" / "index.csv").unlink()
    os.mkfifo(root / "_index" / "index.csv")
    with pytest.raises(OSError, match="is a FIFO, not a file"):
        d.open_source(root)


def test_a_volume_that_is_cut_while_it_is_used_is_an_error(tmp_path):
    source = d.open_source(make_ct(tmp_path))
    source.read(0)
    with open(source.path(0), "r+b") as f:
        f.truncate(os.path.getsize(source.path(0)) // 2)
    with pytest.raises(OSError, match="the file is shorter than its 6 slices"):
        source.read(0)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("spacing_y", "nan", "a spacing is not a number above 0"),
        ("spacing_x", "0", "a spacing is not a number above 0"),
        ("spacing_z", "-1", "a spacing is not a number above 0"),
        ("spacing_z", "1e308", "a spacing is not a number above 0"),
        ("z_mm", "inf", "z_mm is not a number"),
        ("body_y1", "-1", "the body box is empty"),
        ("body_x1", "9999", "the body box is empty"),
        ("path", "/etc/passwd", "leads out of the data folder"),
        ("path", "../x.npy", "leads out of the data folder"),
        ("rows", "99999999999999999999", "malformed"),
    ],
)
def test_numbers_that_would_move_results_are_refused_with_their_line(tmp_path, column, value, message):
    root = make_ct(tmp_path)
    index = root / "_index" / "index.csv"
    lines = [line.split(",") for line in index.read_text().splitlines()]
    lines[3][d.INDEX_COLUMNS.index(column)] = value
    index.write_text("\n".join(",".join(line) for line in lines) + "\n")
    with pytest.raises(ValueError, match=rf"index\.csv.*(line 4|lines 2 to).*{message}"):
        d.open_source(root)


def test_a_doubled_row_is_refused(tmp_path):
    root = make_ct(tmp_path)
    index = root / "_index" / "index.csv"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines, lines[5]]) + "\n")
    with pytest.raises(ValueError, match=r"line 6 .*path and z of a row stand in another row too"):
        d.open_source(root)


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "ä.png")
    assert len(d.open_source(tmp_path)) == 1
    (tmp_path / "ä.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    with pytest.raises(ValueError, match=r"file name '\\udcff\.png' is not UTF-8"):
        d.open_source(tmp_path)


@pytest.mark.slow
def test_readers_end_when_some_of_them_could_not_start(tmp_path):
    """16 readers with room for 64 open files: an error at once, and no process stays."""
    root = make_ct(tmp_path)
    code = (
        "import data, torch\n"
        f"source = data.open_source({str(root)!r})\n"
        "data.make_loader(source, data.Recipe('ct', 32, 16, 2), 0, range(9), 8, workers=16)\n"
    )
    command = f"ulimit -n 64; exec {sys.executable} -c '{code.replace(chr(39), chr(34))}'"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Too many open files" in done.stderr


# photographs as they were held


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_photographs_are_upright_wherever_they_are_read(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(photo(0, (240, 400)).permute(1, 2, 0).numpy()).save(path, exif=exif, quality=95)
    with Image.open(path) as file:
        truth = torch.from_numpy(np.asarray(ImageOps.exif_transpose(file)).transpose(2, 0, 1).copy())
    source = d.open_source(tmp_path)
    assert torch.equal(source.read(0), truth)
    height, width = truth.shape[1:]
    box = np.array([[height // 4, width // 3, height // 2, width - 20]])
    whole, moved = d.read_view(source, 0, box, size=200)  # nothing to reduce: the very pixels
    y0, x0, y1, x1 = moved[0].astype(int)
    assert torch.equal(whole[:, y0:y1, x0:x1], truth[:, box[0, 0] : box[0, 2], box[0, 1] : box[0, 3]])
    small, moved = d.read_view(source, 0, size=32)
    view = d.render_eval(small[None], d.eval_view("photo", 32), moved)
    full = d.render_eval(truth[None], d.eval_view("photo", 32))
    assert max(small.shape[1:]) < 200 and (view - full).abs().mean() < 0.05


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_reduced_photograph_shows_the_same_however_it_was_stored(tmp_path, orientation):
    """A pixel of the view is 4.2 codes of the ramp; a cell of reduce() at the wrong end moves it by half of one."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    rows, cols = np.mgrid[:998, :1003]
    picture = Image.fromarray(np.stack([rows / 4, cols / 4.1, (rows + cols) / 8], 2).astype(np.uint8))
    methods = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
               7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    picture.transpose(Image.Transpose[methods[orientation]]).save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "upright.png")
    views = []
    for name in ("turned", "upright"):
        small, boxes = d.read_photo(tmp_path / f"{name}.png", lambda h, w: np.array([[0, 0, h, w]]), 60)
        assert max(small.shape) < 140
        views.append(d.denormalise(d.render_eval(small[None], d.eval_view("photo", 60), boxes)) * 255)
    assert (views[0] - views[1])[..., 2:-2, 2:-2].abs().max() < 0.95  # two roundings; edges are cut cells


@pytest.mark.parametrize("encoding", ["hu16-v1", "rgb-v1"])
def test_a_slice_is_found_by_path_and_z_and_no_other_takes_its_place(tmp_path, encoding):
    source = d.open_source(make_ct(tmp_path, encoding, series=2))
    for i in range(len(source)):
        row = source.rows[i]
        assert find_slice(source, row["path"], str(row["z"])) == i
        assert find_slice(source, row["path"], row["z"] + 100) is None
    assert find_slice(source, "toy/none.npy") is None and find_slice(source, source.rows[0]["path"]) is not None


def test_an_index_of_photographs_is_taken_as_it_is_and_a_changed_picture_is_noticed_when_read(tmp_path):
    make_photos(tmp_path)
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("c*/*"))
    rows = [f"{name},{(tmp_path / name).stat().st_size}," for name in names]
    (tmp_path / "_index").mkdir()
    index = tmp_path / "_index" / "photos.csv"
    index.write_text("\n".join(["path,bytes,reason", *rows, "c0/small.png,10,too small"]) + "\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "new.png")  # not imported yet
    source = d.open_source(tmp_path)
    assert [row.decode() for row in source.rows.column("path")] == names
    before = source.read(0)
    os.utime(tmp_path / names[0])  # another time is no change
    assert torch.equal(d.open_source(tmp_path).read(0), before)
    assert d.open_source(tmp_path).index_sha256 == source.index_sha256
    with open(tmp_path / names[1], "ab") as f:
        f.write(b"\0")
    (tmp_path / names[2]).unlink()
    for read in (d.Source.read, d.read_view):
        with pytest.raises(OSError, match=f"{names[1]} has .* bytes, .* when it was indexed"):
            read(source, 1)
        with pytest.raises(OSError, match=f"{names[2]} is gone"):
            read(source, 2)
    batch = next(d.make_loader(source, d.RECIPES["photo"], 0, range(1), len(names), skip_bad=2))
    assert sorted(Path(path).name for path, _ in batch.bad) == sorted(Path(name).name for name in names[1:3])
    index.write_text("path,bytes\nc0/0.png,x\n")
    with pytest.raises(ValueError, match="photos.csv is damaged"):
        d.open_source(tmp_path)


@pytest.mark.proof
def test_a_million_pictures_are_listed_in_seconds(tmp_path):
    """At most 5 s of a core and 500 MB beyond what torch takes."""
    (tmp_path / "_index").mkdir()
    names = [f"s/{i % 2}/image_{i:07d}.jpg" for i in range(1_000_000)]
    (tmp_path / "_index" / "photos.csv").write_text("path,bytes,reason\n" + "".join(f"{n},123456,\n" for n in names))
    rows = (f"{n},{'yes' if i % 2 else 'no'},scene {i // 5},s\n" for i, n in enumerate(names))
    (tmp_path / "labels.csv").write_text("path,label,group,source\n" + "".join(rows))
    code = (
        "import resource, sys, time; import data\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n"
        "before, start = peak(), time.process_time()\n"
        "source = data.open_source(sys.argv[1])\n"
        "print(len(source), time.process_time() - start, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    count, seconds, megabytes = map(float, done.stdout.split()[-3:])
    print(done.stdout)
    assert count == 1_000_000 and seconds < 5 and megabytes < 500

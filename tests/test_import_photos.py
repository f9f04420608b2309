"""tools/import_photos.py: every form of source, exact paths, no picture dropped and no parts pooled without a word."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

from data import open_source
from tools import import_photos

ODD = (
    "with space.jpg",
    "ü ö/ß.jpg",
    "quote\"s'.png",
    "new\nline.jpg",
    "tab\tand\rreturn.jpg",
    "=1+1.jpg",
    ",comma,.JPG",
)


def picture(path, size=(40, 48), colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 255, (*size, 3)).astype(np.uint8)
    image = Image.fromarray(noise) if colour is None else Image.new("RGB", size[::-1], colour)
    image.save(path, **options)
    return path


def pictures(root, names):
    """A folder of pictures; labels alternate."""
    for name in names:
        picture(root / name)
    return [(name, k % 2) for k, name in enumerate(names)]


def bring(root, out, *flags, name="s"):
    argv = ["--from", root, "--out", out, "--name", name, "--min-side", 16, "--workers", 1, *flags]
    assert import_photos.main(list(map(str, argv))) == 0
    return table(out / "labels.csv")


def table(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def refused(out, name="s"):
    entry = json.loads((out / "_manifests" / "photos.json").read_text())["sources"][name]
    assert sum(entry["reasons"].values()) == len(entry["refused"])
    return {row["path"]: row["reason"] for row in entry["refused"]}


def write_csv(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(lines)


def labels_json(root, rows):
    (root / "labels.json").write_text(json.dumps([{"filename": n, "label": k, "camera": "a"} for n, k in rows]))


def bare_csv(root, rows):
    write_csv(root / "labels.csv", rows)


def csv_with_header(root, rows):
    write_csv(root / "labels.csv", [("Label", "Filename", "camera"), *((f"class_{k}", n, "a") for n, k in rows)])


def metadata_csv(root, rows):
    write_csv(root / "metadata.csv", [("file_name", "label", "camera"), *((n, k, "a") for n, k in rows)])


def metadata_jsonl(root, rows):
    text = "\n".join(json.dumps({"file_name": n, "label": k, "camera": "a"}) for n, k in rows)
    (root / "metadata.jsonl").write_text(text + "\n\n")


@pytest.mark.parametrize("write", [labels_json, bare_csv, csv_with_header, metadata_csv, metadata_jsonl])
def test_tables_of_every_form_give_the_same_labels_and_exact_paths(tmp_path, write):
    rows = pictures(tmp_path / "raw", ODD)
    write(tmp_path / "raw", rows)
    found = bring(tmp_path / "raw", tmp_path / "out")
    named = {row["path"]: row["label"] for row in found}
    assert named == {f"s/{name}": ("no_roadwork", "roadwork")[k] for name, k in rows}
    for name, _ in rows:
        assert (tmp_path / "out" / f"s/{name}").read_bytes() == (tmp_path / "raw" / name).read_bytes()
    if write is not bare_csv:
        assert {row["camera"] for row in found} == {"a"}
    assert {row["source"] for row in found} == {"s"} and not refused(tmp_path / "out")
    index = table(tmp_path / "out" / "_index" / "photos.csv")
    assert [(row["path"], row["height"], row["width"], row["upright"], row["reason"]) for row in index] == sorted(
        (f"s/{name}", "40", "48", "1", "") for name in ODD
    )
    assert all(int(row["bytes"]) == (tmp_path / "out" / row["path"]).stat().st_size for row in index)
    source = open_source(tmp_path / "out")
    assert dict(zip(source.rows.texts("path"), source.rows.texts("label"))) == named
    assert all(source.read(i).shape == (3, 40, 48) for i in range(len(rows)))


@pytest.mark.parametrize("classes", [("no_roadwork", "roadwork"), ("0", "1"), ("class_0", "Class 1"), ("0", "55")])
def test_folders_name_the_class(tmp_path, classes):
    for k, name in enumerate(classes):
        picture(tmp_path / "raw" / name / "deep" / f"{k}.jpg")
    picture(tmp_path / "raw" / ".cache" / "x.jpg")
    (tmp_path / "raw" / "README.md").write_text("no picture")
    found = bring(tmp_path / "raw", tmp_path / "out")
    assert [(row["path"].split("/")[-1], row["label"]) for row in sorted(found, key=lambda r: r["label"])] == [
        ("0.jpg", "no_roadwork"),
        ("1.jpg", "roadwork"),
    ]


def test_parquet_shards_or_a_line_that_says_what_is_missing(tmp_path, monkeypatch):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="needs pyarrow to be read: pip install pyarrow"):
            bring(tmp_path, tmp_path.parent / "parquet_out")
        return
    features = {"info": {"features": {"label": {"names": ["no_roadwork", "roadwork"], "_type": "ClassLabel"}}}}
    contents = [picture(tmp_path / "raw" / f"{k}.jpg").read_bytes() for k in range(5)]
    for shard, part in ((slice(0, 3), "train-00000-of-00002"), (slice(3, 5), "train-00001-of-00002")):
        images = [{"bytes": content, "path": f"x{k}.jpg"} for k, content in enumerate(contents)][shard]
        images[-1]["bytes"] = images[-1]["bytes"][:300] if shard.start else images[-1]["bytes"]
        rows = pyarrow.table({"image": images, "label": [0, 1, 1, 0, 1][shard], "city": list("abcde")[shard]})
        rows = rows.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(rows, tmp_path / "hub" / "data" / f"{part}.parquet")
    found = bring(tmp_path / "hub", tmp_path / "out")
    assert [(row["label"], row["city"], row["part"]) for row in found] == [
        ("no_roadwork", "a", "train"),
        ("roadwork", "b", "train"),
        ("roadwork", "c", "train"),
        ("no_roadwork", "d", "train"),
    ]
    assert [(tmp_path / "out" / row["path"]).read_bytes() for row in found] == contents[:4]
    assert list(refused(tmp_path / "out")) == ["s/data/train-00001-of-00002/000002.jpg"]
    assert not (tmp_path / "out" / "s/data/train-00001-of-00002/000002.jpg").exists()


def test_published_parts_are_never_pooled_without_a_word(tmp_path):
    for part, n in (("train", 3), ("Test", 2), ("validation", 1)):
        for k in range(n):
            picture(tmp_path / "raw" / part / "roadwork" / f"{k}.jpg")
    said = r"has parts \(test 2, train 3, val 1\).*name some; --parts test,train,val keeps all"
    with pytest.raises(ValueError, match=said):
        bring(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(bring(tmp_path / "raw", tmp_path / "out", "--parts", "train")) == 3
    found = bring(tmp_path / "raw", tmp_path / "out", "--parts", "train, test")
    assert sorted(row["part"] for row in found) == ["test", "test", "train", "train", "train"]
    with pytest.raises(ValueError, match="--parts dev: the source has test 2, train 3, val 1"):
        bring(tmp_path / "raw", tmp_path / "out", "--parts", "dev")
    rows = [("path", "label", "Split"), ("a.jpg", 1, "train"), ("b.jpg", 0, "test")]
    write_csv(tmp_path / "raw" / "labels.csv", rows)
    with pytest.raises(ValueError, match="has parts"):
        bring(tmp_path / "raw", tmp_path / "out")


def test_an_unknown_label_is_an_error_that_names_it(tmp_path):
    rows = pictures(tmp_path / "raw", ["a.jpg", "b.jpg", "c.jpg"])
    write_csv(tmp_path / "raw" / "labels.csv", [*rows[:2], ("c.jpg", "roadwrok")])
    with pytest.raises(ValueError, match=r"unknown labels 'roadwrok' \(1\), first in labels.csv, row 3; known are"):
        bring(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = bring(tmp_path / "raw", tmp_path / "out", "--classes", "as-is")
    assert [row["label"] for row in found] == ["0", "1", "roadwrok"]
    write_csv(tmp_path / "raw" / "labels.csv", [*rows, ("a.jpg", "roadwork")])
    with pytest.raises(ValueError, match=r"s/a.jpg has two labels: no_roadwork in labels.csv, row 1, roadwork in"):
        bring(tmp_path / "raw", tmp_path / "out")


def test_what_is_unfit_is_listed_with_its_reason_and_stays_out(tmp_path, capsys):
    raw = tmp_path / "raw"
    good = picture(raw / "good.jpg", (64, 48), quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(raw / "turned.jpg", (20, 44), exif=turned)
    picture(raw / "small.jpg", (15, 44))
    picture(raw / "long.png", (20, 61))
    (raw / "cut.jpg").write_bytes(good.read_bytes()[:2000])
    (raw / "trailing.jpg").write_bytes(good.read_bytes() + b"\0" * 10_000)  # cameras do so
    (raw / "page.jpg").write_text("<html>not found</html>")
    (raw / "empty.jpg").touch()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(raw / "deep.png")
    picture(raw / "kind.gif")
    picture(raw / "fine.webp")
    (raw / "folder.jpg").mkdir()
    names = sorted(p.name for p in raw.iterdir()) + ["gone.jpg", "good.jpg"]
    write_csv(raw / "labels.csv", [(name, 1) for name in names])
    found = bring(raw, tmp_path / "out")
    good = ["fine.webp", "good.jpg", "trailing.jpg", "turned.jpg"]
    assert [row["path"] for row in found] == [f"s/{name}" for name in good]
    reasons = {path.removeprefix("s/"): reason for path, reason in refused(tmp_path / "out").items()}
    expected = {"small.jpg": "too small: 15 x 44", "long.png": "too long: 20 x 61", "cut.jpg": "truncated",
                "gone.jpg": "missing", "page.jpg": "content is HTML", "empty.jpg": "content is unknown",
                "deep.png": "mode I;16", "kind.gif": "ends in none of",
                "folder.jpg": "a folder, not a file",
                "good.jpg": "named twice: labels.csv, row 14, and labels.csv, row 6"}  # fmt: skip
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], (name, reasons[name])
    assert sorted(p.name for p in (tmp_path / "out" / "s").iterdir()) == good
    index = {row["path"]: row for row in table(tmp_path / "out" / "_index" / "photos.csv")}
    assert [index["s/turned.jpg"][key] for key in ("height", "width", "upright")] == ["44", "20", "0"]
    assert index["s/gone.jpg"]["reason"] == "missing" and index["s/gone.jpg"]["bytes"] == ""
    said = capsys.readouterr().out
    assert "refused 1: too small" in said and "10 refused, each with its reason in" in said


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "raw" / "1").mkdir(parents=True)
    good = picture(tmp_path / "raw" / "1" / "good.jpg")
    with open(os.fsencode(tmp_path / "raw" / "1") + b"/bad\xff.jpg", "wb") as f:
        f.write(good.read_bytes())
    assert len(bring(tmp_path / "raw", tmp_path / "out")) == 1
    assert refused(tmp_path / "out") == {"s/1/bad\\udcff.jpg": "its name is not UTF-8"}


def gps(lat, lon, taken="2025:06:01 12:30:00"):
    exif = Image.Exif()
    parts = [(int(a), int(a * 60 % 60), round(a * 3600 % 60, 3)) for a in (abs(lat), abs(lon))]
    exif[0x8825] = {1: "S" if lat < 0 else "N", 2: parts[0], 3: "W" if lon < 0 else "E", 4: parts[1], 6: 77.0}
    exif[0x8769] = {0x9003: taken}
    exif[0x010F] = "SECRET MAKER"
    return exif


def test_exif_gives_place_and_time_and_nothing_else(tmp_path):
    raw = tmp_path / "raw"
    for name, exif in (
        ("a", gps(-52.5, -13.25)),
        ("b", gps(33.125, 151.2, "0000:00:00 00:00:00")),
        ("c", Image.Exif()),
    ):
        picture(raw / f"{name}.jpg", exif=exif)
    picture(raw / "zero.jpg", exif=gps(0, 0))
    write_csv(
        raw / "labels.csv",
        [
            ("path", "label", "lat", "time"),
            *((f"{n}.jpg", 1, "-33" * (n == "b"), "noon" * (n == "a")) for n in ("a", "b", "c", "zero")),
        ],
    )
    found = bring(raw, tmp_path / "out", "--facts", "exif")
    assert list(found[0]) == ["path", "label", "source", "lat", "lon", "time"]
    assert [(row["lat"], row["lon"], row["time"]) for row in found] == [
        ("-52.500000", "-13.250000", "noon"),
        ("-33", "", ""),  # what the source says stays, and stays alone
        ("", "", ""),
        ("", "", "2025-06-01T12:30:00"),  # 0, 0 is no place
    ]
    assert "SECRET" not in "".join(p.read_text() for p in (tmp_path / "out").rglob("*.[cj]s*"))
    assert list(bring(raw, tmp_path / "out")[0]) == ["path", "label", "source", "lat", "time"]


def test_links_by_default_copies_if_asked_and_the_same_again_changes_nothing(tmp_path):
    rows = pictures(tmp_path / "raw", ["a.jpg", "b.jpg", "c/d.jpg"])
    (tmp_path / "raw" / "link.jpg").symlink_to("a.jpg")
    labels_json(tmp_path / "raw", [*rows, ("link.jpg", 0)])
    out, one = tmp_path / "out", tmp_path / "out" / "s" / "c" / "d.jpg"
    bring(tmp_path / "raw", out)
    assert os.path.samefile(one, tmp_path / "raw" / "c" / "d.jpg")
    assert os.path.samefile(out / "s" / "link.jpg", out / "s" / "a.jpg") and not (out / "s" / "link.jpg").is_symlink()
    before = {p: (p.read_bytes(), p.stat().st_ino) for p in out.rglob("*.jpg")}
    files = {p: p.read_bytes() for p in out.rglob("*.csv")}
    bring(tmp_path / "raw", out)
    assert before == {p: (p.read_bytes(), p.stat().st_ino) for p in out.rglob("*.jpg")}
    assert files == {p: p.read_bytes() for p in out.rglob("*.csv")}
    bring(tmp_path / "raw", out, "--copy")
    assert not os.path.samefile(one, tmp_path / "raw" / "c" / "d.jpg") and one.stat().st_nlink == 1
    copied = one.stat().st_ino
    bring(tmp_path / "raw", out, "--copy")
    assert one.stat().st_ino == copied
    picture(tmp_path / "raw" / "c" / "d.jpg", (50, 50))
    bring(tmp_path / "raw", out, "--copy")
    assert one.read_bytes() == (tmp_path / "raw" / "c" / "d.jpg").read_bytes()
    assert not list(out.rglob("*.new"))


def test_where_hard_links_fail_there_are_symbolic_ones_then_copies(tmp_path, monkeypatch):
    labels_json(tmp_path / "raw", pictures(tmp_path / "raw", ["a.jpg"]))

    def no(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", no)
    bring(tmp_path / "raw", tmp_path / "one")
    assert (tmp_path / "one" / "s" / "a.jpg").is_symlink()
    monkeypatch.setattr("os.symlink", no)
    bring(tmp_path / "raw", tmp_path / "two")
    assert (tmp_path / "two" / "s" / "a.jpg").stat().st_nlink == 1 and not (tmp_path / "two/s/a.jpg").is_symlink()
    monkeypatch.setattr("shutil.copy2", no)
    with pytest.raises(OSError, match="cross-device"):  # our disk's fault is no reason to refuse a picture
        bring(tmp_path / "raw", tmp_path / "three")


def test_sources_add_up_and_an_import_again_replaces_its_own_only(tmp_path):
    for name, files in (("a", ["1.jpg", "2.jpg"]), ("b", ["1.jpg", "3.jpg"])):
        labels_json(tmp_path / name, pictures(tmp_path / name, files))
        bring(tmp_path / name, tmp_path / "out", name=name)
    labels_json(tmp_path / "a", [("2.jpg", 0)])
    found = bring(tmp_path / "a", tmp_path / "out", name="a")
    assert [(row["path"], row["source"], row["label"]) for row in found] == [
        ("a/2.jpg", "a", "no_roadwork"),
        ("b/1.jpg", "b", "no_roadwork"),
        ("b/3.jpg", "b", "roadwork"),
    ]
    assert not (tmp_path / "out" / "a" / "1.jpg").exists() and (tmp_path / "a" / "1.jpg").exists()
    assert len(table(tmp_path / "out" / "_index" / "photos.csv")) == 3


def test_mistakes_are_named(tmp_path):
    rows = pictures(tmp_path / "raw", ["a.jpg"])
    cases = (
        ("labels.json", '{"a": 1', "labels.json is damaged, or no JSON"),
        ("labels.json", '{"a": 1}', "expected objects with filename and label"),
        ("labels.json", '[{"name": "a", "label": 1}]', "row 1: no column path, filename.*but name, label"),
        ("labels.csv", "a.jpg,1,2\n", "row 1: 3 cells, expected path,label"),
        ("labels.csv", "../a.jpg,1\n", "row 1: ../a.jpg leads out of the source"),
        ("labels.csv", "", "no pictures"),
    )
    for name, text, words in cases:
        (tmp_path / "raw" / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            bring(tmp_path / "raw", tmp_path / "out")
        (tmp_path / "raw" / name).unlink()
    for column, words in (
        ("grop", "looks like 'group'; rename it"),
        ("series", "rename column series, a word of ours"),
    ):
        write_csv(tmp_path / "raw" / "labels.csv", [("path", "label", column), ("a.jpg", 1, "x")])
        with pytest.raises(ValueError, match=words):
            bring(tmp_path / "raw", tmp_path / "out")
    (tmp_path / "raw" / "labels.csv").unlink()
    labels_json(tmp_path / "raw", rows)
    with pytest.raises(ValueError, match="lies inside --from"):
        bring(tmp_path / "raw", tmp_path / "raw" / "out")
    with pytest.raises(ValueError, match="--name _x: letters"):
        bring(tmp_path / "raw", tmp_path / "out", name="_x")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "labels.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match="was not written by this program"):
        bring(tmp_path / "raw", tmp_path / "own")
    with pytest.raises(FileNotFoundError, match="--from .* does not exist"):
        bring(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fifty_thousand_rows_take_seconds(tmp_path):
    one = picture(tmp_path / "one.jpg", (64, 64))
    for k in range(50):
        (tmp_path / "raw" / f"{k:02d}").mkdir(parents=True)
    rows = [(f"{k % 50:02d}/{k}.jpg", k % 2) for k in range(50_000)]
    for name, _ in rows:
        os.link(one, tmp_path / "raw" / name)
    bare_csv(tmp_path / "raw", rows)
    before = sum(os.times()[:4])  # of this process and those it waited for; wall time of a shared machine says little
    assert len(bring(tmp_path / "raw", tmp_path / "out", "--workers", 2)) == 50_000
    assert sum(os.times()[:4]) - before < 45, "16 s on a busy machine, 2026-11"


def test_the_originals_are_never_where_the_import_lies(tmp_path):
    """A second import with other limits removed the only copy of what no longer fitted."""
    pictures(tmp_path / "data" / "natix", ["no_roadwork/a.jpg", "roadwork/b.jpg"])
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    write_csv(tmp_path / "rows.csv", [["data/natix/no_roadwork/a.jpg", 0], ["data/natix/roadwork/b.jpg", 1]])
    for source, name in (("data/natix", "natix"), ("data/natix", "data"), ("rows.csv", "natix")):
        out = tmp_path / ("data" if name == "natix" else ".")
        with pytest.raises(ValueError, match="would hold the import and holds originals in"):
            import_photos.main(["--from", str(tmp_path / source), "--out", str(out), "--name", name])
    (tmp_path / "rows.csv").unlink()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_source_of_which_nothing_is_fit_is_an_error_and_leaves_what_was_there(tmp_path):
    pictures(tmp_path / "raw", ["no_roadwork/a.jpg", "roadwork/b.jpg"])
    rows = bring(tmp_path / "raw", tmp_path / "out")
    argv = ["--from", tmp_path / "raw", "--out", tmp_path / "out", "--name", "s", "--min-side", 500]
    with pytest.raises(ValueError, match="none of 2 pictures is fit, first s/.*: too small"):
        import_photos.main(list(map(str, argv)))
    assert table(tmp_path / "out" / "labels.csv") == rows and len(open_source(tmp_path / "out")) == 2
    with pytest.raises(SystemExit):
        import_photos.main([*map(str, argv), "--max-aspect", "nan"])

"""labels.csv as people write it: what is understood and said, and what is refused with the remedy."""

import numpy as np
import pytest
from PIL import Image

import data
from tools import make_splits

NAMES = [f"{place}/{k}.jpg" for place in ("ice", "sea") for k in range(5)]
USUAL = "path,label,group\n" + "".join(f"{name},{name[:3]},g{k // 2}\n" for k, name in enumerate(NAMES))


@pytest.fixture
def folder(tmp_path):
    data.say_once.cache_clear()
    for k, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * k, 9, 9)).save(tmp_path / name)
    return tmp_path


def write(folder, text, encoding="utf-8"):
    (folder / "labels.csv").write_text(text.replace("ROOT", str(folder)), encoding=encoding)
    return folder


def columns(folder):
    rows = data.open_source(folder).rows
    return rows.column("label").tolist(), rows.column("group").tolist()


ACCEPTED = {
    "case and spaces of the header": (
        USUAL.replace("path,label,group", "Path, Label ,GROUP"),
        "are read as path,label",
    ),
    "another order": ("".join(",".join(reversed(line.split(","))) + "\n" for line in USUAL.split()), None),
    "semicolons": (USUAL.replace(",", ";"), "columns are separated by ';'"),
    "tabs": (USUAL.replace(",", "\t"), r"columns are separated by '\t'"),
    "./": (USUAL.replace("\nice", "\n./ice"), "'./ice/0.jpg' as 'ice/0.jpg'"),
    "//": (USUAL.replace("sea/", "sea//"), "'sea//0.jpg' as 'sea/0.jpg'"),
    "backslashes": (USUAL.replace("ice/", "ice\\"), r"'ice\\0.jpg' as 'ice/0.jpg'"),
    "outer spaces": (USUAL.replace("\nice", "\n ice"), "' ice/0.jpg' as 'ice/0.jpg'"),
    "below the root": (USUAL.replace("\nice", "\nROOT/ice"), "ice/0.jpg' as 'ice/0.jpg'"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_unambiguous_is_read_as_the_usual_table_and_said_once(folder, capsys, name):
    text, said = ACCEPTED[name]
    expected = columns(write(folder, USUAL))
    sha = data.open_source(folder).index_sha256
    assert capsys.readouterr().out == ""  # the usual table needs no word
    assert columns(write(folder, text, "utf-8-sig")) == expected
    assert data.open_source(folder).index_sha256 == sha
    printed = capsys.readouterr().out
    assert printed.count("\n") == bool(said) and (said or "") in printed


REFUSED = {
    "lable": (USUAL.replace("label", "lable"), "column 'lable' looks like 'label'; rename it"),
    "Pth": (USUAL.replace("path", "Pth"), "column 'Pth' looks like 'path'"),
    "groop": (USUAL.replace("group", "groop"), "column 'groop' looks like 'group'"),
    "no label": ("path,colour\n", "unknown columns path,colour; expected path,label.,group..,any facts."),
    "an empty name": (USUAL.replace("group\n", "group,\n").replace("\nice", ",\nice"), "column '' has no name"),
    "twice": ("path,label,label\n", "column 'label' has no name, or stands there twice"),
    "a word of ours": ("path,label,patient\n", "rename column patient, .*called group"),
    "another case": (USUAL.replace("ice/1.jpg", "Ice/1.JPG"), "first Ice/1.JPG; write ice/1.jpg instead"),
    "another folder": ("path,label\nIMG/ICE/1.jpg,x\nsea/9/7.JPG,x\n", "2 missing files, first IMG/ICE/1.jpg$"),
    "a file of one name": ("path,label\nIMG/only.JPG,x\n", "first IMG/only.JPG; write only.jpg instead"),
    "no folder": ("path,label\n9.jpg,x\n", "1 missing files, first 9.jpg$"),
    "outside": ("path,label\n/elsewhere/x.jpg,x\n", "first /elsewhere/x.jpg$"),
    "two labels": (USUAL + "./ice/0.jpg,sea,g0\n", "row 12: ice/0.jpg has label sea, and ice above; keep one"),
    "nodules": (",".join(data.NODULE) + "\n", "is a table of CT nodules"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ambiguous_is_refused_with_the_remedy(folder, name):
    text, message = REFUSED[name]
    if "only" in text:
        Image.new("RGB", (8, 8)).save(folder / "only.jpg")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        make_splits.main(["--data", str(write(folder, text))])
    assert name == "nodules" or "diameter_mm" not in str(caught.value)  # nothing of CT for a photographer
    assert not (folder / "_splits").exists()


def test_other_columns_are_facts_that_later_code_can_use(folder, capsys):
    long = "x" * 50_000
    facts = [f"{name},{name[:3]},{k % 2},{k / 8},{long if k == 3 else ''}" for k, name in enumerate(NAMES[1:])]
    source = data.open_source(write(folder, "path,label,source,lat,Text\n" + "\n".join(facts) + "\n"))
    assert "further columns are kept as facts: source, lat, Text" in capsys.readouterr().out
    assert source.rows.column("source").tolist() == [b"", *[b"01"[k % 2 : k % 2 + 1] for k in range(9)]]
    assert source.rows[2]["lat"] == "0.125" and source.take(np.array([4])).rows[0]["Text"] == long
    assert source.rows.columns["Text"].nbytes < 100  # one long text does not widen all rows
    plain = data.open_source(write(folder, "path,label\n" + "".join(f"{n},{n[:3]}\n" for n in NAMES[1:])))
    assert plain.index_sha256 == source.index_sha256  # facts decide nothing about who is trained on


@pytest.mark.parametrize("a, b, n", [("label", "lable", 2), ("path", "pth", 1), ("a", "", 1), ("kitten", "sitting", 3)])
def test_edits_are_levenshteins(a, b, n):
    assert data.edits(a, b) == data.edits(b, a) == n and data.edits(a, a) == 0


def test_known_facts_are_not_taken_for_misspelt_columns(folder):
    names = "source lat lon weather daytime camera text date time split city place site name device scene".split()
    header = ",".join(["path", "label", *names])
    assert data.open_source(write(folder, f"{header}\nice/0.jpg,x{',' * len(names)}\n"))

"""tools/make_splits.py: exact shares, no group in two splits, the same answer for any order of rows."""

import csv
import json
import os
import random
import signal
import time
from collections import Counter
from fractions import Fraction

import pytest
from PIL import Image

from data import INDEX_COLUMNS, file_sha256, open_source
from tools import make_splits

FOUR = {"train": 0.60, "val_select": 0.15, "val_calib": 0.15, "val_test": 0.10}
THREE = {"train": 0.85, "val_select": 0.05, "val_test": 0.10}


def processed(root, groups, slices=2, shuffle=0, **ids):
    """A processed folder with an index only: `slices` rgb slices for each dataset/patient.

    ids: study={group: id} or series={group: id} instead of ids of their own; shuffle None: rows in the given order.
    """
    rows = []
    for group in groups:
        dataset, patient = group.split("/")
        own = {kind: ids.get(kind, {}).get(group, f"{kind}.{group}") for kind in ("study", "series")}
        for z in range(1, slices + 1):
            path = f"{dataset}/s{patient}/{z:04d}.png"
            known = dict(path=path, encoding="rgb-v1", dataset=dataset, patient=patient, z=z, **own)
            known |= dict.fromkeys("spacing_z spacing_y spacing_x rows cols body_y1 body_x1".split(), 1)
            rows.append({name: known.get(name, 0) for name in INDEX_COLUMNS})
    if shuffle is not None:
        random.Random(shuffle).shuffle(rows)
    (root / "_index").mkdir(parents=True, exist_ok=True)
    with open(root / "_index" / "index.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, INDEX_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return root


def patients(n):
    return [f"lidc/{i:04d}" for i in range(n)]


def photographs(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(root / name)
    return root


def table(path, lines, header="path,label"):
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def split(root, *flags):
    assert make_splits.main(["--data", str(root), *map(str, flags)]) == 0
    return json.loads((root / "_splits" / "splits.json").read_text())


def found_copies(root, sets):
    """What check_duplicates.py would write."""
    return {"version": 1, "groups": sets, "index_sha256": file_sha256(root / "_index" / "index.csv")}


def sizes(splits):
    return dict(Counter(splits["groups"].values()))


@pytest.mark.parametrize("n, expected", [(100, (85, 5, 10)), (1013, (861, 51, 101)), (10, (8, 1, 1)), (3, (1, 1, 1))])
def test_default_shares_are_exact_and_no_split_is_empty(tmp_path, n, expected):
    found = split(processed(tmp_path, patients(n), 1))
    assert sizes(found) == dict(zip(THREE, expected))
    assert found["ratios"] == THREE and found["index_sha256"] == file_sha256(tmp_path / "_index" / "index.csv")
    assert {s: c["groups"] for s, c in found["counts"].items()} == sizes(found)


def test_four_way_is_60_15_15_10_and_not_the_nested_fractions_that_give_15_9_16(tmp_path):
    assert sizes(split(processed(tmp_path, patients(200), 1), "--four-way")) == {k: 200 * r for k, r in FOUR.items()}


def test_decimal_ratios_are_exact():
    ratios = make_splits.parse_ratios("train=0.71, val_test=0.29")
    assert ratios == {"train": Fraction(71, 100), "val_test": Fraction(29, 100)}
    assert make_splits.quotas(100, ratios) == {"train": 71, "val_test": 29}  # floor(0.29 * 100.0) is 28


def test_order_of_rows_does_not_matter_and_the_seed_does(tmp_path):
    names = patients(50)
    a = split(processed(tmp_path / "a", names, shuffle=1))["groups"]
    b = split(processed(tmp_path / "b", names[::-1], shuffle=2))["groups"]
    c = split(processed(tmp_path / "c", names), "--seed", 1)["groups"]
    assert a == b != c
    assert list(a) == sorted(a)


def test_equal_patient_names_in_two_datasets_are_two_groups(tmp_path):
    found = split(processed(tmp_path, [*patients(10), *(f"nlst/{i:04d}" for i in range(10))]))
    assert len(found["groups"]) == 20 and "nlst/0003" in found["groups"]


def test_every_class_is_within_one_group_of_its_share(tmp_path):
    names, rng = patients(237), random.Random(0)
    label = {name: rng.choices("abc", (80, 15, 5))[0] for name in names}
    root = processed(tmp_path, names)
    labels = table(tmp_path / "l.csv", [f"lidc/s{name[5:]}/0001.png,{label[name]}" for name in names])
    for flags, ratios in (((), THREE), (("--four-way", "--force"), FOUR)):
        groups = split(root, "--labels", labels, *flags)["groups"]
        for which in "abc":
            n = sum(v == which for v in label.values())
            got = Counter(groups[name] for name in names if label[name] == which)
            assert all(abs(got[s] - n * r) < 1 for s, r in ratios.items()), (which, n, got)


def test_allocation_is_floor_or_ceiling_in_random_tables():
    rng = random.Random(0)
    for _ in range(200):
        ratios = make_splits.parse_ratios(rng.choice([make_splits.THREE_WAY, make_splits.FOUR_WAY]))
        strata = {f"k{i}": rng.randint(1, 40) for i in range(rng.randint(1, 30))}
        cells, want = make_splits.allocate(strata, ratios), make_splits.quotas(sum(strata.values()), ratios)
        for k, n in strata.items():
            assert sum(cells[k].values()) == n and all(abs(cells[k][s] - n * r) < 1 for s, r in ratios.items())
        assert all(abs(sum(row[s] for row in cells.values()) - want[s]) <= 1 for s in ratios)


def test_a_group_with_several_labels_belongs_to_the_rarest():
    labels = [("1", "common", ""), ("2", "common", ""), *[("2", "rare", "")] * 5, ("4", "common", "")]
    group_of = {"1": "g1", "2": "g2", "3": "g3", "4": "g1"}
    assert make_splits.rarest_label([["g1"], ["g2"], ["g3"]], labels, group_of) == ["common", "rare", ""]


def test_nodule_tables_are_recognised_and_counted_by_row(tmp_path):
    root = processed(tmp_path, patients(20))
    header = "id,path,z,y,x,label,group,diameter_mm,box_mm"
    lines = [f"n{i},lidc/s{i:04d}/0001.png,1,5,5,{'mb'[i % 2]},lidc/{i:04d},9,9" for i in [*range(20), 3, 3]]
    counts = split(root, "--labels", table(tmp_path / "n.csv", lines, header))["counts"]
    assert {k: sum(c["labels"][k] for c in counts.values()) for k in "bm"} == {"b": 12, "m": 10}
    assert sum(c["slices"] for c in counts.values()) == 40


def test_joined_groups_stay_together_through_chains(tmp_path):
    root, names = processed(tmp_path, patients(40)), patients(40)
    chains = [names[0:2], names[1:3], names[10:16]]
    (root / "d.json").write_text(json.dumps(found_copies(root, chains)))
    for seed in range(20):
        got = split(root, "--duplicates", root / "d.json", "--seed", seed, "--force")
        assert len({got["groups"][n] for n in names[0:3]}) == 1 and len({got["groups"][n] for n in names[10:16]}) == 1
        assert list(got["groups"]) == names
        assert sizes(got) == {"train": 34, "val_select": 2, "val_test": 4}  # single groups fill what large ones left
    processed(root, patients(41))
    with pytest.raises(ValueError, match="d.json was made for another index; look for duplicates"):
        split(root, "--duplicates", root / "d.json", "--force")


def test_join_is_the_transitive_closure():
    rng = random.Random(0)
    for _ in range(100):
        names = [f"{i:02d}" for i in range(30)]
        sets = [rng.sample(names, rng.randint(1, 4)) for _ in range(rng.randint(0, 20))]
        reach = {name: {name} for name in names}
        for _ in names:  # slow: grow every reach through every set until nothing changes
            for name in names:
                reach[name] |= set().union(*(members for members in sets if reach[name] & set(members)))
        assert make_splits.join(names, sets) == sorted({tuple(sorted(r)): sorted(r) for r in reach.values()}.values())


def test_groups_that_share_a_label_group_stay_together(tmp_path):
    names = patients(20)
    lines = [f"lidc/s{i:04d}/0001.png,x,site{i // 2}" for i in range(20)]
    labels = table(tmp_path / "l.csv", lines, "path,label,group")
    groups = split(processed(tmp_path, names), "--labels", labels)["groups"]
    assert all(groups[names[i]] == groups[names[i + 1]] for i in range(0, 20, 2))


def test_group_by_dataset_keeps_datasets_whole(tmp_path):
    names = [f"{dataset}/{i}" for dataset in "abcd" for i in range(5)]
    groups = split(processed(tmp_path, names), "--group-by", "dataset")["groups"]
    assert all(len({groups[f"{dataset}/{i}"] for i in range(5)}) == 1 for dataset in "abcd")


def test_stable_never_moves_an_earlier_patient(tmp_path):
    before = split(processed(tmp_path / "a", patients(300)), "--stable")
    after = split(processed(tmp_path / "b", [*patients(400), *(f"a/{i}" for i in range(50))]), "--stable")
    assert before["groups"].items() <= after["groups"].items()
    assert abs(sizes(after)["train"] / 450 - 0.85) < 0.05
    moved = split(processed(tmp_path / "c", patients(400)))["groups"]
    assert not split(processed(tmp_path / "d", patients(300)))["groups"].items() <= moved.items()  # the default does


def test_an_existing_split_is_kept_without_force(tmp_path):
    root = processed(tmp_path, patients(30))
    split(root)
    path = root / "_splits" / "splits.json"
    content, stamp = path.read_bytes(), path.stat().st_mtime_ns
    split(root)
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="--force"):
        split(root, "--seed", 1)
    assert path.read_bytes() == content
    split(root, "--seed", 1, "--force")
    assert path.read_bytes() != content
    assert [p.name for p in path.parent.iterdir()] == ["splits.json"]


def test_an_image_in_two_label_groups_joins_them(tmp_path):
    root = photographs(tmp_path, [f"{i}.png" for i in range(9)])
    table(root / "labels.csv", ["0.png,x,g1", "0.png,x,g2", "1.png,y,g1", "2.png,x,g2"], "path,label,group")
    found = split(root, "--min-per-class", 0)
    assert len({found["groups"][name] for name in ("g1", "g2")}) == 1
    assert {k: sum(c["labels"][k] for c in found["counts"].values()) for k in "xy"} == {"x": 3, "y": 1}


def test_photographs_are_groups_by_file_or_by_the_group_column(tmp_path):
    names = [f"{'cat' if i % 2 else 'dog'}/_{i}.{'JPG' if i % 3 else 'png'}" for i in range(40)]
    root = photographs(tmp_path, [*names, "_labels/x.png", ".thumbs/y.png", "cat/._z.png"])
    assert set(split(root)["groups"]) == set(names)
    lines = [f"{n},{n[:3]},scene{i // 4}" for i, n in enumerate(names[:20])]
    labels = table(root / "labels.csv", lines, "path,label,group")
    found = split(root, "--force", "--min-per-class", 0)
    assert set(found["groups"]) == {f"scene{i}" for i in range(5)} | set(names[20:])
    assert sum(c["slices"] for c in found["counts"].values()) == 40
    assert found["stratify"]["sha256"] == file_sha256(labels)


def test_the_photograph_hash_follows_names_and_not_the_listing(tmp_path, monkeypatch):
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: sorted(walk(*a, **k), reverse=True))
    a = open_source(photographs(tmp_path / "a", ["b.png", "a/c.png", "a.png"])).index_sha256
    monkeypatch.setattr(os, "walk", lambda *a, **k: sorted(walk(*a, **k)))
    b = open_source(photographs(tmp_path / "b", ["a/c.png", "a.png", "b.png"])).index_sha256
    c = open_source(photographs(tmp_path / "c", ["a/c.png", "a.png"])).index_sha256
    assert a == b != c


@pytest.mark.parametrize(
    "ratios",
    ["train", "train=x,val_test=1", "train=0.5,val_test=0.4", "train=0.5,test=0.5", "val_test=1",
     "train=1.5,val_test=-0.5", "train=0.5,train=1", "train=0.5=1,val_test=0.5", ""],
)  # fmt: skip
def test_bad_ratios_are_refused(ratios):
    with pytest.raises(ValueError, match="--ratios"):
        make_splits.parse_ratios(ratios)


@pytest.mark.parametrize(
    "lines, header, message",
    [
        (["lidc/s0001/0001.png,x"], "file,label", "unknown columns file,label; expected"),
        (["lidc/s0001/0001.png,x", "lidc/s0001/0001.png,y"], "path,label", "row 3: .*0001.png has label y, and x"),
        (["lidc/s0001/0009.png,x"], "path,label", "row 2: no image 'lidc/s0001/0009.png' in the data"),
        (["lidc/s0001/0001.png,"], "path,label", "row 2"),
        (["lidc/s0001/0001.png,x,g"], "path,label", "row 2"),
        (["lidc/s0001/0001.png," + "x" * 200_000], "path,label", "not a UTF-8 CSV file"),
    ],
)
def test_a_broken_label_table_is_one_sentence(tmp_path, lines, header, message):
    root = processed(tmp_path, patients(5))
    with pytest.raises(ValueError, match=message):
        split(root, "--labels", table(tmp_path / "l.csv", lines, header))


def test_too_few_groups_and_a_missing_index_are_errors(tmp_path):
    with pytest.raises(ValueError, match="2 independent groups cannot fill 3 splits"):
        split(processed(tmp_path / "a", patients(2)))
    photographs(tmp_path / "b", ["_index/../lidc/s1/0001.png"])  # slices whose index was lost are not photographs
    with pytest.raises(FileNotFoundError):
        split(tmp_path / "b")
    with pytest.raises(ValueError, match="without dataset or patient"):
        split(processed(tmp_path / "c", [*patients(4), "lidc/"]))


# one patient under several names


def together(root, *names):
    """Whether these groups lie in one split whatever the seed."""
    flags = ("--force", "--min-per-class", 0)
    groups = [split(root, "--seed", seed, *flags)["groups"] for seed in range(20)]
    return all(len({g[name] for name in names}) == 1 for g in groups)


def test_a_patient_whose_name_differs_in_case_or_outer_spaces_is_one_patient(tmp_path, capsys):
    names = ["lidc/P1", "lidc/a", "lidc/b", "lidc/p1 ", "lidc/c", "LIDC/ P1", "lidc/P11", *patients(13)]
    root = processed(tmp_path, names, shuffle=None)
    assert together(root, "lidc/P1", "lidc/p1 ", "LIDC/ P1")
    assert not together(root, "lidc/P1", "lidc/P11")
    assert list(split(root, "--force")["groups"]) == sorted(names)
    said = capsys.readouterr().out
    assert "joined 3 groups: their names differ in case or outer spaces only, " in said
    assert "first lidc/P1 (row 2 of index.csv) and lidc/p1  (row 8 of index.csv)" in said
    assert "40 slices in 20 groups, 18 of them independent" in said


def test_a_collection_that_was_preprocessed_twice_is_joined_by_its_series(tmp_path, capsys):
    names = [f"{dataset}/{i:02d}" for dataset in ("a", "b") for i in range(30)]
    root = processed(tmp_path, names, series={name: f"1.2.{name[2:]}" for name in names})
    groups = split(root)["groups"]
    assert all(groups[f"a/{i:02d}"] == groups[f"b/{i:02d}"] for i in range(30)) and sizes(split(root))["val_test"] == 6
    assert "joined 60 groups: one series stands under several patients or datasets" in capsys.readouterr().out


def test_patients_that_share_a_study_are_joined_and_a_placeholder_joins_nobody(tmp_path, capsys):
    names = patients(30)
    shared = {"lidc/0003": "1.2.9", "lidc/0017": "1.2.9"}
    root = processed(tmp_path / "a", names, shuffle=None, study=shared)
    assert together(root, "lidc/0003", "lidc/0017")
    said = capsys.readouterr().out
    assert "joined 2 groups: one study stands under several patients, first lidc/0003 (row 8 of index.csv) and " in said
    for empty in ("", "0", " "):
        root = processed(tmp_path / f"b{empty}", names, study=dict.fromkeys(names, empty))
        assert "30 of them independent" in (split(root), capsys.readouterr().out)[1]
    root = processed(tmp_path / "c", names, shuffle=None, study=shared | dict.fromkeys(names[18:], "1.2.3"))
    with pytest.raises(ValueError, match=r"under 12 patients, so it is no id: lidc/0018 \(row 38 of index.csv\) and"):
        split(root)
    assert not (root / "_splits").exists()


@pytest.mark.parametrize("row, words", [
    ("1.png,Cone,", "row 32: label Cone differs from cone in capitals alone; write one of them"),
    ("1.png,cone,s1", "row 32: 1.png stands above already; keep one row for each"),
])  # fmt: skip
def test_labels_in_other_capitals_and_rows_that_stand_twice_are_refused(tmp_path, row, words):
    root = photographs(tmp_path, [f"{i}.png" for i in range(30)])
    table(root / "labels.csv", [*(f"{i}.png,cone,s{i}" for i in range(30)), row], "path,label,group")
    with pytest.raises(ValueError, match=words):
        split(root)


def test_pictures_without_label_or_group_are_counted(tmp_path, capsys):
    root = photographs(tmp_path, [f"{i}.png" for i in range(90)])
    rows = [f"{i}.png,cone,{f's{i // 2}' if i < 40 else ''}" for i in range(60)]
    table(root / "labels.csv", rows, "path,label,group")
    split(root)
    said = capsys.readouterr().out
    assert f"{root}/labels.csv: 60 of 90 pictures have a label" in said
    assert f"{root}/labels.csv: 20 of 60 rows have no group, first 40.png: each is a group of its own" in said


@pytest.mark.parametrize("grouped", [0, 4, 60])
def test_pictures_that_nobody_grouped_are_counted(tmp_path, capsys, grouped):
    root = photographs(tmp_path, [f"{i}.png" for i in range(60)])
    table(root / "labels.csv", [f"{i}.png,x,{i // 2 if i < grouped else ''}" for i in range(60)], "path,label,group")
    split(root)
    assert (f"note: {60 - grouped} of 60 pictures are groups of their own" in capsys.readouterr().out) == (grouped < 60)


def test_photographs_are_joined_by_name_too(tmp_path, capsys):
    root = photographs(tmp_path, [f"{i}.png" for i in range(12)])
    table(root / "labels.csv", [f"{i}.png,x,{g}" for i, g in enumerate(["S1", "s1 ", "0", "0 "])], "path,label,group")
    assert together(root, "S1", "s1 ") and together(root, "0", "0 ")
    assert "first S1 and s1 \n" in capsys.readouterr().out


def test_a_patient_of_spaces_is_no_patient(tmp_path):
    with pytest.raises(ValueError, match="without dataset or patient"):
        split(processed(tmp_path, [*patients(4), "lidc/ "]))


# what check_duplicates.py found


def test_the_duplicates_that_were_found_are_used_without_a_flag(tmp_path, capsys):
    root, names = processed(tmp_path, patients(20)), patients(20)
    (root / "_splits").mkdir()
    path = root / "_splits" / "duplicates.json"
    path.write_text(json.dumps(found_copies(root, [names[2:5]])))
    assert together(root, *names[2:5])
    assert "duplicates.json: 1 sets of groups share pictures and stay together" in capsys.readouterr().out
    (root / "d.json").write_text(json.dumps(found_copies(root, [])))
    split(root, "--duplicates", root / "d.json", "--force")  # the flag names another file, which is used instead
    assert "0 sets of groups" in capsys.readouterr().out
    processed(root, patients(21))
    with pytest.raises(ValueError, match="duplicates.json was made for another index; look for duplicates"):
        split(root, "--force")
    with pytest.raises(FileNotFoundError, match="none.json does not exist; look for duplicates"):
        split(root, "--duplicates", root / "none.json", "--force")


DAMAGED = {
    "empty": b"",
    "a list": b"[]",
    "cut": b'{"version": 1, "gro',
    "not UTF-8": b"\xff\xfe{}",
    "nested": b"[" * 100_000,
    "no version": b'{"groups": [], "index_sha256": "x"}',
    "groups null": b'{"version": 1, "index_sha256": "SHA", "groups": null}',
    "groups of numbers": b'{"version": 1, "index_sha256": "SHA", "groups": [[1, 2]]}',
    "an empty group": b'{"version": 1, "index_sha256": "SHA", "groups": [[]]}',
    "groups a text": b'{"version": 1, "index_sha256": "SHA", "groups": ["lidc/0001"]}',
    "groups as objects": b'{"version": 1, "index_sha256": "SHA", "groups": [{"lidc/0001": 1, "lidc/0002": 1}]}',
    "an unknown group": b'{"version": 1, "index_sha256": "SHA", "groups": [["lidc/0001", "lidc/9"]]}',
    "a number as hash": b'{"version": 1, "index_sha256": 3, "groups": []}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_duplicates_file_is_one_sentence(tmp_path, name):
    root = processed(tmp_path, patients(9))
    path = root / "_splits" / "duplicates.json"
    path.parent.mkdir()
    path.write_bytes(DAMAGED[name].replace(b"SHA", file_sha256(root / "_index" / "index.csv").encode()))
    with pytest.raises(ValueError, match="s/duplicates.json.*look for duplicates in") as caught:
        split(root)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(found_copies(root, [])).encode())  # a byte order mark is harmless
    split(root)


# what tables say to a terminal


def test_labels_are_shown_in_short_and_without_control_characters(tmp_path, capsys):
    names = patients(9)
    long = "\x1b[2J" + "y" * 100_000
    root = processed(tmp_path, names)
    lines = [f"lidc/s{i:04d}/0001.png,{long if i else 'x'}" for i in range(9)]
    counts = split(root, "--labels", table(tmp_path / "l.csv", lines))["counts"]
    assert sum(c["labels"][long] for c in counts.values()) == 8
    said = capsys.readouterr().out
    assert "\x1b" not in said and len(said) < 3000 and "\\x1b[2Jyyy" in said
    lines[3] = f"{long},x"
    with pytest.raises(ValueError, match="row 5: no image") as caught:
        split(root, "--force", "--labels", table(tmp_path / "l.csv", lines))
    assert len(str(caught.value)) < 500 and "\x1b" not in str(caught.value)


def test_a_pipe_as_label_table_is_refused_and_not_waited_for(tmp_path):
    root = processed(tmp_path, patients(9))
    os.mkfifo(tmp_path / "l.csv")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(10)
    with pytest.raises(OSError, match="l.csv is a FIFO, not a file"):
        split(root, "--labels", tmp_path / "l.csv")
    signal.alarm(0)


# photographs: by pictures, stratified by label and source


def road(root, scenes, header="path,label,group,source", **more):
    """scenes: {(label, source): [pictures of each scene]} -> a folder with its labels.csv."""
    lines = []
    for (label, source), sizes in scenes.items():
        for k, size in enumerate(sizes):
            lines += [f"{source}/{label}_{k}_{i}.png,{label},{source} {label} {k},{source}" for i in range(size)]
    photographs(root, [line.split(",")[0] for line in lines])
    table(root / "labels.csv", lines, header)
    return root


def numbers_of(found, label):
    return {split: c["labels"].get(label, 0) for split, c in found["counts"].items()}


@pytest.mark.parametrize("seed", range(3))
def test_pictures_follow_the_shares_of_each_class_where_scenes_allow(tmp_path, seed):
    sizes = [12, 7, 7, 5, 3, *[1] * 66]  # 100 pictures
    root = road(tmp_path, {("yes", "a"): sizes, ("no", "a"): sizes[2:], ("no", "b"): [2] * 10 + [1] * 51})
    found = split(root, "--seed", seed)
    assert found["ratios"] == FOUR
    for label, n in (("yes", 100), ("no", 81 + 71)):
        for name, count in numbers_of(found, label).items():
            assert abs(count - n * FOUR[name]) < 1 + 1e-9, (label, name)
    of_b = Counter(found["groups"][group] for group in found["groups"] if group.startswith("b "))
    assert set(of_b) == set(FOUR)  # a source is spread as well


def test_a_class_that_is_too_rare_in_a_split_is_an_error(tmp_path):
    root = road(tmp_path, {("yes", "a"): [1] * 30, ("no", "a"): [1] * 60})
    with pytest.raises(ValueError, match="would have [34] pictures of yes, fewer than --min-per-class 5"):
        split(root)
    assert not (root / "_splits").exists()
    assert numbers_of(split(root, "--min-per-class", 3), "yes")["val_test"] == 3


def test_sources_for_training_only_stay_out_of_all_other_splits(tmp_path, capsys):
    root = road(tmp_path, {("yes", "a"): [1] * 60, ("no", "a"): [1] * 60, ("yes", "web"): [1] * 40})
    found = split(root, "--train-only", "source=web")
    assert {found["groups"][name] for name in found["groups"] if name.startswith("web")} == {"train"}
    assert numbers_of(found, "yes") == {"train": 76, "val_select": 9, "val_calib": 9, "val_test": 6}
    assert found["train_only"] == ["web"]
    lines = (root / "labels.csv").read_text().replace("a yes 0,a", "web yes 0,a")  # one scene of both sources
    (root / "labels.csv").write_text(lines)
    assert split(root, "--train-only", "source=web", "--force")["groups"]["web yes 0"] == "train"
    assert "1 pictures of other sources are copies of these, or of one scene, and train too" in capsys.readouterr().out
    for words, message in (("source=wbe", "no source wbe"), ("web", "write it like source=")):
        with pytest.raises(ValueError, match=message):
            split(root, "--train-only", words)


def test_extending_moves_no_picture_and_deals_new_ones_to_what_lacks_most(tmp_path):
    root = road(tmp_path / "a", {("yes", "a"): [1] * 60, ("no", "a"): [1] * 60})
    before = split(root)
    road(root, {("yes", "a"): [1] * 100, ("no", "a"): [1] * 60})
    with pytest.raises(ValueError, match="exists and differs"):
        split(root)
    after = split(root, "--extend")
    assert all(after["groups"][name] == where for name, where in before["groups"].items())
    assert numbers_of(after, "yes") == {"train": 60, "val_select": 15, "val_calib": 15, "val_test": 10}
    assert numbers_of(after, "no") == numbers_of(before, "no")
    names = sorted(name for name in after["groups"] if after["groups"][name] == "val_test")[:1]
    names += sorted(name for name in after["groups"] if after["groups"][name] == "train")[:1]
    (root / "_splits" / "duplicates.json").write_text(json.dumps(
        {"version": 1, "groups": [names], "index_sha256": after["index_sha256"]}))  # fmt: skip
    with pytest.raises(ValueError, match="belong together now .*--force"):
        split(root, "--extend")


def test_extending_keeps_patients_too(tmp_path):
    before = split(processed(tmp_path, patients(40)))
    after = split(processed(tmp_path, patients(80)), "--extend")
    assert all(after["groups"][name] == where for name, where in before["groups"].items())
    assert Counter(after["groups"].values()) == {"train": 68, "val_select": 4, "val_test": 8}


@pytest.mark.slow
def test_fifty_thousand_pictures_are_split_in_seconds(tmp_path):
    units = [[f"{i}"] for i in range(50_000)]
    contents = [Counter({(str(i % 2), "ab"[i % 3 == 0]): 1}) for i in range(50_000)]
    begin = time.process_time()
    ratios = make_splits.parse_ratios(make_splits.FOUR_WAY)
    placed = make_splits.assign(units, contents, make_splits.lacking(contents, ratios), 0, {})
    assert Counter(placed.values()) == {"train": 30_000, "val_select": 7500, "val_calib": 7500, "val_test": 5000}
    assert time.process_time() - begin < 10

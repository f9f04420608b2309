"""tools/shadow.py: agreement by id, McNemar against brute force, and the same arm for the same id for ever."""

import itertools
import json

import numpy as np
import pytest

from tools import shadow


def write(path, decisions, labels=None, ids=None, p=0.8):
    ids = ids or [f"{k}.jpg" for k in range(len(decisions))]
    labels, lines = labels or [""] * len(ids), ["id,group,label,p_no,p_yes,decision,set"]
    for name, label, d in zip(ids, labels, decisions):
        yes = {"yes": p, "no": 1 - p}.get(d, 0.5)
        lines.append(f"{name},{name},{label},{1 - yes:.6g},{yes:.6g},{d},")
    path.write_text("\n".join(lines))
    return path


def compare(tmp_path, *words):
    flags = ["--a", tmp_path / "a.csv", "--b", tmp_path / "b.csv", "--out", tmp_path / "out", *words]
    assert shadow.main(list(map(str, flags))) == 0
    return json.loads((tmp_path / "out" / "shadow.json").read_text())


def test_mcnemar_is_the_exact_binomial_test():
    for a, b in itertools.product(range(7), range(7)):
        outcomes = np.array([sum(flips) for flips in itertools.product((0, 1), repeat=a + b)])
        extreme = np.abs(outcomes - (a + b) / 2) >= abs(a - (a + b) / 2) - 1e-9
        assert shadow.mcnemar(a, b) == pytest.approx(min(1, extreme.mean()) if a + b else 1)
    assert shadow.mcnemar(400, 600) < 1e-8 < shadow.mcnemar(5000, 5100) < 1


def test_agreement_and_the_paired_difference(tmp_path, capsys):
    truth = ["yes"] * 20 + ["no"] * 20
    write(tmp_path / "a.csv", ["yes"] * 10 + ["no"] * 29 + ["left"], truth)
    order = np.random.default_rng(0).permutation(40)  # joined by id, not by position
    b = ["yes"] * 20 + ["no"] * 19 + ["left"]
    write(tmp_path / "b.csv", [b[k] for k in order], ids=[f"{k}.jpg" for k in order], p=0.9)
    found = compare(tmp_path)
    assert found["agreement"] == 0.75 and found["left_a"] == found["left_b"] == 1 / 40
    assert found["probability_apart"] == pytest.approx(0.1)
    paired = found["paired"]
    assert (paired["only_a"], paired["only_b"], paired["n"]) == (0, 10, 40)
    assert paired["difference"] == pytest.approx(0.25) and paired["p"] == pytest.approx(2 / 2**10)
    assert "right alone: A 0, B 10): B is better" in capsys.readouterr().out
    write(tmp_path / "a.csv", ["yes"] * 10 + ["no"] * 29 + ["left"])
    assert "paired" not in compare(tmp_path) and "No labels yet." in capsys.readouterr().out
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(f"{k}.jpg,{truth[k]}" for k in range(12)))
    assert compare(tmp_path, "--labels", tmp_path / "labels.csv")["paired"]["n"] == 12


def test_the_arm_is_a_function_of_the_id(tmp_path):
    ids = [f"camera/{k}.jpg" for k in range(4000)]
    share = np.array([shadow.assigned(name, 0.1) for name in ids])
    assert 0.08 < share.mean() < 0.12
    more = np.array([shadow.assigned(name, 0.3) for name in ids])
    assert not (share & ~more).any()  # a larger share keeps those who were in the smaller one
    write(tmp_path / "a.csv", ["yes"] * 200, ["yes"] * 200)
    write(tmp_path / "b.csv", ["no"] * 200)
    found = compare(tmp_path, "--assign", 0.3)
    rows = [line.split(",") for line in (tmp_path / "out" / "shadow.csv").read_text().splitlines()[1:]]
    assert all((arm == "b") == shadow.assigned(name, 0.3) == (served == "no") for name, _, _, _, arm, served in rows)
    assert found["right_as_served"]["a"]["right"] == 1 and found["right_as_served"]["b"]["right"] == 0
    assert found["assigned_to_b"] == np.mean([row[4] == "b" for row in rows])


def test_what_cannot_be_compared_is_a_sentence(tmp_path):
    write(tmp_path / "a.csv", ["yes", "no"])
    write(tmp_path / "b.csv", ["yes", "no"], ids=["0.jpg", "x.jpg"])
    with pytest.raises(ValueError, match="2 pictures are in one file alone, first 1.jpg"):
        compare(tmp_path)
    write(tmp_path / "b.csv", ["yes", "no"], ids=["0.jpg", "0.jpg"])
    with pytest.raises(ValueError, match="names 0.jpg twice"):
        compare(tmp_path)
    (tmp_path / "b.csv").write_text("id,group,label,p_no,p_yes,decision,set\n0.jpg,0.jpg,,0.5,half,yes,\n")
    with pytest.raises(ValueError, match="0.5,half,yes, is no row of this table"):
        compare(tmp_path)
    (tmp_path / "b.csv").write_text("path,label\n0.jpg,yes\n")
    with pytest.raises(ValueError, match="name a CSV that tools/predict.py wrote"):
        compare(tmp_path)
    write(tmp_path / "b.csv", ["yes", "no"])
    (tmp_path / "b.csv").write_text((tmp_path / "b.csv").read_text().replace("p_no", "p_maybe"))
    with pytest.raises(ValueError, match="is about classes"):
        compare(tmp_path)
    write(tmp_path / "b.csv", ["yes", "no"])
    write(tmp_path / "a.csv", ["yes", "no"], ["yes", "perhaps"])
    with pytest.raises(ValueError, match="label perhaps of 1.jpg is none of the classes"):
        compare(tmp_path)
